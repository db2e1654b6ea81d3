"""Which kernel runs: what it was launched with, and of another package the version and hashes of its compiled files."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attnlab_kernels.operations.softmax import external, hub
from attnlab_kernels.operations.softmax.inductor import compiled_kernels
from attnlab_kernels.operations.triton_platform import Launch

# implementation -> the distribution, and the modules that its compiled files are found under once it has run
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "flash_attn_2": ("flash-attn", ("flash_attn", "flash_attn_2_cuda")),
    "flash_attn_3": ("flash-attn-3", ("flash_attn_interface", "flash_attn_3", "flash_attn_3_cuda")),
    "flash_attn_4": ("flash-attn-4", ("flash_attn",)),
    "flashinfer": ("flashinfer-python", ("flashinfer",)),
    "xformers": ("xformers", ("xformers",)),
    "natten": ("natten", ("natten",)),
    "fla": ("flash-linear-attention", ("fla",)),
}
COMPILED = (".so", ".pyd")
REVISION = re.compile(r"snapshots/([0-9a-f]{40})/")


def provenance_of(implementations: Iterable[str], launches: Sequence[Launch]) -> dict[str, Any]:
    """Return what is kept of the kernels of these implementations, once they have run in this process.

    ``launches`` of our own Triton kernels; ``package``, the first build of another package among them, or None;
    ``inductor``, what torch.compile made for FlexAttention, or None.
    """
    names = list(implementations)
    sources = map(source_of, names)
    return {
        "launches": list(launches),
        "package": next((source for source in sources if source is not None), None),
        "inductor": compiled_kernels() if "flex" in names else None,
    }


def source_of(implementation: str) -> dict[str, Any] | None:
    """Return ``version`` and ``files`` (name, SHA-256) of another package's kernel; None for others.

    ``files`` are the package's compiled modules that this process has loaded, its interface where there is none. A
    kernel of the hub has the ``revision`` of its repository.
    """
    if implementation == "flash_attn_hub":
        module = hub.load()
        path = str(module.__file__)
        revision = REVISION.search(path)
        folder = Path(path).parent
        files = sorted(one for one in folder.rglob("*") if one.suffix in COMPILED) or [Path(path)]
        named = revision[1] if revision else "unknown"
        return {"version": hub.REPOSITORY, "revision": named, "files": hash_files(files)}
    if implementation not in PACKAGES:
        return None
    distribution, packages = PACKAGES[implementation]
    return {"version": external.version(distribution), "files": hash_files(loaded_files(packages))}


def loaded_files(packages: Sequence[str]) -> list[Path]:
    """The compiled files that were loaded under these names; where there are none, the packages' own modules."""
    loaded = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    below = {name: Path(path) for name, path in loaded.items() if path and name.split(".")[0] in packages}
    compiled = {path for path in below.values() if path.suffix in COMPILED}
    return sorted(compiled or {path for name, path in below.items() if name in packages})


def hash_files(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {path.name: _hash(path) for path in paths}


@cache
def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
