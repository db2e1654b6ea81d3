"""The experiment that would test a recommendation, as a spec, scaled to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnlab.advice.model_shapes import ModelShape, grouped
from attnlab.advice.tree import AdviceError, Leaf
from attnlab.spec import MAX_CELLS
from attnlab_kernels.catalog import validate_parameters
from attnlab_kernels.catalog_rules import blocks_needed

Entry = str | dict[str, dict[str, Any]]
SCALES = ("cpu", "gpu")
_POOL = validate_parameters("paged", {})
DEFAULT_BLOCK, DEFAULT_BLOCKS = _POOL["block_size"], _POOL["num_blocks"]
CPU_HEADS, CPU_DIM = 8, 256
GPU_LONGEST = 32_768
GPU_DRIVER = Path("/proc/driver/nvidia/gpus")

# widths that suit a module of 256, where the catalog's defaults are a large model's
ON_CPU: dict[str, dict[str, Any]] = {
    "multi_head_latent": {
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
}


def machine_scale() -> str:
    """``gpu`` where this machine has an NVIDIA driver with a device, else ``cpu``."""
    return "gpu" if GPU_DRIVER.is_dir() and any(GPU_DRIVER.iterdir()) else "cpu"


def trial_spec(leaf: Leaf, shape: ModelShape, scale: str) -> dict[str, Any]:
    """The leaf's experiment as a spec.

    Args:
        shape: the reader's model; on a GPU its heads, dtype and context are used, on a CPU only how its key heads
            relate to its heads.
        scale: cpu or gpu.

    Raises:
        AdviceError: an unknown scale.
    """
    if scale not in SCALES:
        raise AdviceError(f"scale must be one of {', '.join(SCALES)}; got {scale!r}")
    trial = leaf.trial
    on_gpu = scale == "gpu"
    module = _gpu_module(shape) if on_gpu else _cpu_module(shape)
    lengths = _gpu_lengths(leaf, shape) if on_gpu else trial.lengths
    entries = [entry if on_gpu else _small(entry) for entry in trial.mechanisms]
    blocks = blocks_needed(
        max(lengths), max(trial.batch_sizes), DEFAULT_BLOCK, decoding=trial.phase == "decode"
    )
    return {
        "name": f"advice: {leaf.key.replace('/', ', ').replace('_', ' ')}",
        "module": module | {"causal": trial.causal},
        "input": {"synthetic": "random"},
        "vary": {
            "mechanism": [_with_room(entry, blocks) for entry in entries],
            "sequence_length": list(lengths),
            "dtype": [shape.dtype if on_gpu and shape.dtype in ("bfloat16", "float16") else "float32"],
            "batch_size": list(trial.batch_sizes),
        },
        "phase": trial.phase,
        "record": ["timing", "memory"] if trial.phase == "train" else ["maps", "timing", "memory"],
        "repeats": 20 if on_gpu else 5,
        "resources": {"gpus": 1 if on_gpu else 0},
    }


def _with_room(entry: Entry, blocks: int) -> Entry:
    """A pool of the default size, or of as many blocks as the longest run fills."""
    return {"paged": {"num_blocks": blocks}} if entry == "paged" and blocks > DEFAULT_BLOCKS else entry


def _small(entry: Entry) -> Entry:
    name = entry if isinstance(entry, str) else next(iter(entry))
    given = {} if isinstance(entry, str) else entry[name]
    parameters = ON_CPU.get(name, {}) | given
    return {name: parameters} if parameters else name


def _cpu_module(shape: ModelShape) -> dict[str, Any]:
    share = grouped(shape).kv_heads / shape.heads
    kv_heads = next(n for n in (1, 2, 4, 8) if n >= min(CPU_HEADS // 2, share * CPU_HEADS))
    return {"dim": CPU_DIM, "num_heads": CPU_HEADS, "num_kv_heads": kv_heads}


def _gpu_module(shape: ModelShape) -> dict[str, Any]:
    used = grouped(shape)
    return {"dim": shape.heads * shape.head_dim, "num_heads": shape.heads, "num_kv_heads": used.kv_heads}


def _gpu_lengths(leaf: Leaf, shape: ModelShape) -> tuple[int, ...]:
    if leaf.trial.fixed:
        return leaf.trial.lengths
    longest = min(shape.context, GPU_LONGEST, MAX_CELLS // max(leaf.trial.batch_sizes))
    return tuple(dict.fromkeys(max(16, longest // part) for part in (4, 2, 1)))
