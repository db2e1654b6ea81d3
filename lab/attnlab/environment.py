"""Where a number was measured: processor, device, clocks, versions, commit, and which kernels there are."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import attnlab_kernels
from attnlab_kernels.operations.survey import survey
from attnlab_storage.settings import built_commit

PACKAGES = (
    "attnlab",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "ray",
    "flash-attn",
)
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
"""settings that decide how long threads spin at a barrier, which a busy machine pays for"""
CLOCK_FIELDS = (
    "driver_version",
    "uuid",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
    "ecc.mode.current",
)


def describe_environment(device: str | None = None) -> dict[str, Any]:
    """Return everything about this machine that a result depends on, as plain values.

    Args:
        device: "cpu" or "cuda"; the implementations are surveyed there. None: CUDA where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device,
        "cpu": {
            "model": _processor(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "openmp": {name: value for name, value in sorted(os.environ.items()) if name.startswith(OPENMP)},
        },
        "memory_bytes": _memory(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "versions": _versions(),
        "commit": _commit(),
        "kernel_sources": kernel_sources(),
        "platform": platform.platform(),
        "implementations": _survey(device),
    }


def name_device(device: torch.device) -> str:
    """Return what a time may be set beside another of: the card, or the processor with its cores and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


@cache
def _survey(device: str) -> list[dict[str, Any]]:
    return survey(device)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    # the installed metadata drops what a build says of itself, such as +cpu
    return found | {"torch": torch.__version__}


@cache
def _commit() -> str | None:
    """The commit of the checkout this code runs from, marked if files differ; else the one an image was built from."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return built_commit()
    return done.stdout.strip() or built_commit()


@cache
def kernel_sources(folder: Path = Path(attnlab_kernels.__file__).parent) -> str:
    """SHA-256 over the paths and contents of every Python file of the kernels; two that differ ran other code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name, content = str(path.relative_to(folder)).encode(), path.read_bytes()
        digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
    } | _clocks(str(properties.uuid))


def _clocks(uuid: str) -> dict[str, Any]:
    """Driver, clocks and limits as nvidia-smi says them at this moment; what it does not say is left out."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(CLOCK_FIELDS)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"not known: {type(error).__name__}"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {
        name: value for name, value in zip(CLOCK_FIELDS, values, strict=False) if not value.startswith("[")
    }
