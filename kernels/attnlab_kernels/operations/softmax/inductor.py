"""What torch.compile made of an operator on a card: its Triton kernels, as this process has loaded them."""

from __future__ import annotations

import sys
from typing import Any

SETTINGS = ("max_autotune", "coordinate_descent_tuning", "fx_graph_cache")
"""of ``torch._inductor.config``: what decides which configurations are tried, and whether an old choice is kept"""


def compiled_kernels() -> dict[str, Any] | None:
    """Return ``settings`` and ``kernels`` (name, tile sizes, warps, stages) of torch.compile; None where it made none.

    A kernel of which several configurations are left is listed once each: none was chosen yet.
    """
    codecache = sys.modules.get("torch._inductor.codecache")
    modules = [] if codecache is None else codecache.PyCodeCache.modules
    made = [part for module in modules for part in vars(module).values() if hasattr(part, "launchers")]
    kernels = [one for kernel in made for one in _configurations(kernel)]
    if not kernels:
        return None
    config: Any = sys.modules["torch._inductor.config"]
    settings = {name: getattr(config, name, None) for name in SETTINGS}
    return {
        "settings": settings,
        "kernels": [one for at, one in enumerate(kernels) if one not in kernels[:at]],
    }


def _configurations(kernel: Any) -> list[dict[str, Any]]:
    """Tile sizes are of the configuration, those of a template constants of its source that its meta data repeat."""
    meta = getattr(kernel, "inductor_meta", None) or {}
    fixed = {name: value for name, value in meta.get("config_args", {}).items() if isinstance(value, int)}
    found = []
    for launcher in kernel.launchers:
        config = launcher.config
        numbers = {**fixed, **config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        name = meta.get("kernel_name") or getattr(kernel.fn, "__name__", "kernel")
        found.append({"kernel": name, **{key.lower(): value for key, value in numbers.items()}})
    return found
