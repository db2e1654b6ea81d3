"""Every Triton kernel of the package, compiled without a GPU: a registry, and the walk that the static panel shows.

    python -m attnlab_kernels.static_kernels --capabilities 90 --kernels "softmax forward"

prints one JSON document: versions, and the facts of each kernel in each form for each card. ``--resume FILE`` takes up
a walk that was cut off, and compiles only what has changed since one that was not.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.util
import io
import json
import sys
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from attnlab_kernels import static_flash4
from attnlab_kernels.static_facts import CAPABILITIES, StaticCase, compile_case

CASE_COLUMNS = ("kernel", "form", "dtype", "spill_bound", "num_warps", "num_stages")
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
    keep: Callable[[str], bool] = lambda kernel: True,
    tell: Callable[[str], None] = lambda line: None,
    known: dict[str, dict[str, Any]] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Compile the kernels whose names ``keep`` keeps; a form that does not compile is a row with its error.

    Args:
        known: rows of an earlier walk by their ``key``; what has not changed since is not compiled again, and those
            of flash-attn 4 stay where it is not installed.
        save: called with the document after every row that was compiled, so that a walk can be taken up again.
    """
    rows: list[dict[str, Any]] = []
    facts = {key: {name: row[name] for name in ("facts", "error")} for key, row in (known or {}).items()}
    versions = {"triton": metadata.version("triton"), "torch": metadata.version("torch")}
    document: dict[str, Any] = {"versions": versions, "capabilities": list(capabilities), "rows": rows}
    elsewhere = (
        [] if static_flash4.installed() else [row for row in (known or {}).values() if _is_flash4(row)]
    )
    document["notes"] = [note for note in (static_flash4.absence(),) if note and not elsewhere]
    for job in (job for capability in capabilities for job in _jobs(capability, every_form)):
        if not keep(job.names["kernel"]):
            continue
        made = facts.get(job.key)
        if made is None:
            tell("sm_{capability} {kernel}: {form}".format_map(job.names))
            made = facts[job.key] = job.make()
        rows.append({"key": job.key} | job.names | made)
        if job.key not in (known or {}):
            rest = [row for key, row in (known or {}).items() if key not in {row["key"] for row in rows}]
            save(document | {"made_at": _now(), "rows": [*rows, *rest]})
    return document | {"made_at": _now(), "rows": [*rows, *elsewhere]}


def _is_flash4(row: dict[str, Any]) -> bool:
    return row["operation"] == static_flash4.OPERATION


class _Job(NamedTuple):
    """A row to come: its key, what it is called, and what makes its facts or its error."""

    key: str
    names: dict[str, Any]
    make: Callable[[], dict[str, Any]]


def _jobs(capability: int, every_form: bool) -> Iterator[_Job]:
    """Ours, and those of flash-attn 4 where it is installed."""
    compiler = metadata.version("triton")
    for operation, case in (cases if every_form else typical_cases)(capability):
        names = {"operation": operation, "capability": capability}
        names |= {name: getattr(case, name) for name in CASE_COLUMNS}
        make = functools.partial(_attempt, lambda case=case: asdict(compile_case(case, capability)))
        yield _Job(case_key(case, capability, compiler), names, make)
    for form in static_flash4.FORMS if static_flash4.installed() else ():
        names = static_flash4.names(form, capability)
        key = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        compile_it = functools.partial(static_flash4.compile_form, form, capability)
        yield _Job(key, names, functools.partial(_attempt, compile_it))


def _attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"facts": make(), "error": None}
    except Exception as error:
        return {"facts": None, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def case_key(case: StaticCase, capability: int, compiler: str) -> str:
    """Changes with what the compiler sees: the card, its version, the code of the kernel, and how it is launched.

    Two forms with one key are one compilation; what a form is called and what bound it has are not in it.
    """
    seen = (case.function, case.dtype, sorted(case.types.items()), sorted(case.constants.items()))
    words = (capability, compiler, code_of(case.module), *seen, case.num_warps, case.num_stages)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


@functools.cache
def code_of(module: str) -> str:
    """A hash of a module of kernels and of those of ours that it takes functions from: their code without comments."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module must be one that can be imported; got {module!r}")
    text = Path(spec.origin).read_text()
    taken = {node.module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)}
    ours = sorted(name for name in taken if name and name.startswith("attnlab_kernels."))
    words = "\n".join([*_code_words(text), *map(code_of, ours)])
    return hashlib.sha256(words.encode()).hexdigest()


def _code_words(text: str) -> Iterator[str]:
    """What the compiler reads of a source: no comments, no blank lines, no string that stands alone."""
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        alone = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
        before = token.type
        if not alone:
            blank = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            yield tokenize.tok_name[token.type] if blank else token.string


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

    def keep(kernel: str) -> bool:
        return options.kernels is None or any(word in kernel for word in options.kernels)

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
