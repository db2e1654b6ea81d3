"""What stands beside a time: how sure its median is, how it was taken, and what disturbed it."""

from collections.abc import Mapping
from typing import Any

from attnlab_webui import pieces
from attnlab_webui.pieces import escape


def timing_spread(timing: Mapping[str, Any]) -> str:
    """The 95 % interval of the median, then the 10th to 90th percentile of the samples."""
    detail = timing["detail"]
    low, high = (pieces.milliseconds(timing[name]) for name in ("p10", "p90"))
    spread = f"samples {low} – {high} (p10 – p90)"
    if interval := detail.get("interval"):
        sure = " – ".join(pieces.milliseconds(end) for end in interval)
        spread = f"95 % interval {sure} · {spread}"
    return f"<span class='at-muted' title='{escape(taken(detail))}'>{spread}</span>"


def taken(detail: Mapping[str, Any]) -> str:
    """How the samples were taken, in words; empty where a run of an older version did not say."""
    words = [str(detail["timer"])] if "timer" in detail else []
    if "first_ms" in detail:
        words.append(
            f"{detail['warm_up']} calls to warm up, the first {pieces.milliseconds(detail['first_ms'])}"
        )
    if "cache" in detail:
        words.append(f"cache {detail['cache']}")
    if "threads" in detail:
        cores = detail.get("affinity")
        words.append(
            f"{detail['threads']} threads" + (f" on cores {', '.join(map(str, cores))}" if cores else "")
        )
    if "launch_gap_ms" in detail:
        words.append(f"{pieces.milliseconds(detail['launch_gap_ms'])} without a kernel")
    if graph := detail.get("graph"):
        words.append(
            f"no graph: {graph['not_captured']}"
            if "not_captured" in graph
            else f"{graph['calls']} calls a graph"
        )
    if first := detail.get("before_cool_down"):
        why = ", ".join(first["conditions"]["throttled"])
        words.append(f"taken again after {first['waited_s']:.1f} s, as it had slowed down before ({why})")
    if inputs := detail.get("inputs"):
        words.append(f"{inputs['class']} inputs: {inputs['what']}")
    return "; ".join(words)


def timing_trouble(timing: Mapping[str, Any]) -> str:
    """A line where the figure is not the kernel's alone; empty where it is."""
    detail = timing["detail"]
    reasons = list((detail.get("conditions") or {}).get("disturbed", []))
    if detail.get("steady") is False:
        reasons.append("not steady when its warm-up ended")
    if not reasons:
        return ""
    return f"<div class='at-bad' role='note'>disturbed: {escape('; '.join(reasons))}</div>"


def ratio_words(ratio: Mapping[str, Any], of: str) -> str:
    """The attention's time over another one's, timed in turn in the same process."""
    detail = ratio["detail"]
    sure = ""
    if interval := detail.get("interval"):
        sure = f"95 % interval {interval[0]:.3f} – {interval[1]:.3f}, "
    pairs = f"{len(ratio['samples'])} pairs in turn"
    proof = escape(str(detail.get("proof", "")))
    words = f"<b>{ratio['median']:.3f} x</b> {of} <span class='at-muted' title='{proof}'>{sure}{pairs}</span>"
    return words + timing_trouble(ratio)


def compilation_words(compilation: Mapping[str, Any]) -> str:
    """What was compiled and tuned in the run, none of which is in its samples."""
    made = compilation.get("torch_compile")
    kernels = compilation["triton"]
    if not kernels and made is None:
        return "nothing was compiled"
    words = []
    if kernels:
        cached = sum(one["cached"] for one in kernels)
        words.append(f"{len(kernels)} Triton kernels, {cached} of them from the cache")
    if made is not None:
        words.append(
            f"torch.compile {made['seconds']:.1f} s ({made['cache_hits']} hits and {made['cache_misses']} misses of "
            "its cache)"
        )
    tuned = compilation["autotune_seconds"]
    words.append(f"{tuned:.1f} s of trying configurations" if tuned else "no configuration was tried")
    return f"<b>{compilation['seconds']:.1f} s</b> <span class='at-muted'>{escape(', '.join(words))}</span>"


def layout_words(layout: Mapping[str, Any]) -> str:
    """What the kernel's own layout costs of the attention's time."""
    copied = layout["detail"]["copied_bytes"]
    if not copied:
        return "0 ms <span class='at-muted'>views suffice, nothing is copied</span>"
    words = f"{pieces.size_in_bytes(copied)} copied"
    return f"<b>{pieces.milliseconds(layout['median'])}</b> <span class='at-muted'>{words}</span>"
