"""Every Triton kernel of the package, compiled without a GPU: a registry, and the walk that the static panel shows.

    python -m attnlab_kernels.static_kernels --capabilities 90 --kernels "softmax forward"

prints one JSON document: versions, and the facts of each kernel in each form for each card. ``--resume FILE`` takes up
a walk that was cut off, and compiles only what has changed since one that was not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from attnlab_kernels.static_facts import CAPABILITIES, StaticCase, compile_case

# operation -> module with ``cases(capability)``; a kernel that is not here is not on the panel
REGISTRY: dict[str, str] = {
    "softmax": "attnlab_kernels.operations.softmax.triton_static",
    "fp8": "attnlab_kernels.operations.fp8.triton_static",
    "linear": "attnlab_kernels.operations.linear.triton_static",
    "differential": "attnlab_kernels.operations.differential.triton_static",
    "neighborhood": "attnlab_kernels.operations.neighborhood.triton_static",
    "latent": "attnlab_kernels.operations.latent.triton_static",
    "expert_projection": "attnlab_kernels.operations.expert_projection.triton_static",
    "map_pooling": "attnlab_kernels.operations.map_pooling.triton_static",
    "sparse": "attnlab_kernels.operations.sparse.triton_static",
}


def cases(capability: int) -> Iterator[tuple[str, StaticCase]]:
    """Every (operation, case) that a launcher can start on sm_``capability``."""
    for operation, module in REGISTRY.items():
        list_cases: Callable[[int], list[StaticCase]] = import_module(module).cases
        for case in list_cases(capability):
            yield operation, case


def typical_cases(capability: int) -> Iterator[tuple[str, StaticCase]]:
    """One form of each kernel and dtype."""
    done: set[tuple[str, str, str]] = set()
    for operation, case in cases(capability):
        key = (operation, case.kernel, case.dtype)
        if case.typical and key not in done:
            done.add(key)
            yield operation, case


def walk(
    capabilities: tuple[int, ...] = CAPABILITIES,
    every_form: bool = False,
    keep: Callable[[StaticCase], bool] = lambda case: True,
    tell: Callable[[str], None] = lambda line: None,
    known: dict[str, dict[str, Any]] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Compile what ``keep`` keeps; a case that does not compile is a row with its error.

    Args:
        known: rows of an earlier walk by their ``key``; what has not changed since is not compiled again.
        save: called with the document after every row that was compiled, so that a walk can be taken up again.
    """
    rows: list[dict[str, Any]] = []
    versions = {"triton": metadata.version("triton"), "torch": metadata.version("torch")}
    document: dict[str, Any] = {"versions": versions, "capabilities": list(capabilities), "rows": rows}
    for capability in capabilities:
        for operation, case in (cases if every_form else typical_cases)(capability):
            if not keep(case):
                continue
            key = case_key(case, capability)
            if known and key in known:
                rows.append(known[key])
                continue
            tell(f"sm_{capability} {case.kernel}: {case.form}")
            rows.append({"key": key} | _row(operation, case, capability))
            save(document | {"made_at": _now()})
    return document | {"made_at": _now()}


def case_key(case: StaticCase, capability: int) -> str:
    """Changes with the card, the case, the compiler and the source of the kernel's module."""
    source = Path(str(import_module(case.module).__file__)).read_bytes()
    words = f"{capability} {metadata.version('triton')} {case!r}".encode()
    return hashlib.sha256(words + source).hexdigest()[:16]


def read_known(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier document by key; none where there is no document. A row with an error is tried again."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {row["key"]: row for row in rows if "key" in row and not row["error"]}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write(path: Path, document: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(dumps(document))
    beside.replace(path)


def dumps(document: dict[str, Any]) -> str:
    """The document as text, one row a line."""
    rows = ",\n".join(json.dumps(row) for row in document["rows"])
    head = json.dumps({name: value for name, value in document.items() if name != "rows"})
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def _row(operation: str, case: StaticCase, capability: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operation": operation,
        "kernel": case.kernel,
        "form": case.form,
        "capability": capability,
        "dtype": case.dtype,
        "spill_bound": case.spill_bound,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "facts": None,
        "error": None,
    }
    try:
        row["facts"] = asdict(compile_case(case, capability))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES)
    )
    parser.add_argument("--kernels", nargs="+", help="only kernels whose name has one of these words in it")
    parser.add_argument(
        "--every-form", action="store_true", help="every tile a launcher can choose: minutes more"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        help="a document of before: only what changed is compiled, and every row is written into it at once",
    )
    options = parser.parse_args()

    def keep(case: StaticCase) -> bool:
        return options.kernels is None or any(word in case.kernel for word in options.kernels)

    document = walk(
        tuple(options.capabilities),
        options.every_form,
        keep,
        lambda line: print(line, file=sys.stderr, flush=True),
        **(
            {}
            if options.resume is None
            else {
                "known": read_known(options.resume),
                "save": functools.partial(_write, options.resume),
            }
        ),
    )
    if options.resume is not None:
        _write(options.resume, document)
    print(dumps(document), end="")
    return 1 if any(row["error"] for row in document["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
