"""What a step allocates and when: allocations and frees replayed into a timeline, with whose they are."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OWNERS = ("kv_cache", "mask", "attention_scratch", "activations", "gradients")
"""whose memory it is that a step takes; weights and inputs were there before"""

POINTS = 400
"""moments that a stored timeline keeps; its peak is always one of them"""
HOLDERS = 12
"""groups of allocations that are named at the peak"""

_CACHES = ("cache_utils.py", "attnlab_kernels/caches.py", "attnlab_kernels/operations/paged/")
_ATTENTION = ("attnlab_kernels/operations/", "scaled_dot_product", "flash_attention")
_MASKS = ("attnlab_kernels/operations/softmax/lower.py", "masking_utils.py", "transformers_masks.py")
_BACKWARD = "autograd::engine"
_NOT_NAMED = ("torch/", "contextlib.py", "<built-in", "<frozen", "nn.Module", "runpy.py")


class Change(NamedTuple):
    """One allocation (bytes above 0) or free (below)."""

    at_ns: int
    address: int
    bytes: int
    operator: str
    """what asked the allocator, such as aten::bmm"""
    frames: tuple[str, ...] = ()
    """the calls around it, innermost first: ``path.py(line): function``, or an operator's name"""


@dataclass
class _Block:
    start: int
    """index of the change that made it"""
    bytes: int
    owner: str
    made: Change
    end: int | None = None


def replay(changes: Iterable[Change], held: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the timeline of a step as plain JSON, at most ``POINTS`` moments of it.

    Args:
        changes: everything allocated and freed, in any order.
        held: bytes by owner that were there before and stay (weights, a filled cache).

    Returns:
        ``times_us`` from the first change; ``owners``: bytes allocated in the step and not yet freed, a list an
        owner; ``given_back``: bytes from before the step that it has freed by then; ``held``; ``events``; and
        ``peak``: its ``index`` in the lists, ``bytes`` (all owners less what was given back) and ``holders``,
        the largest groups of allocations alive then.
    """
    ordered = sorted(changes, key=lambda change: change.at_ns)
    blocks, given_back = _blocks(ordered)
    series = {owner: [0] * len(ordered) for owner in OWNERS}
    for block in blocks:
        series[block.owner][block.start] += block.bytes
        if block.end is not None:
            series[block.owner][block.end] -= block.bytes
    series = {owner: list(_running(deltas)) for owner, deltas in series.items()}
    freed = list(_running(given_back))
    totals = [sum(now) - back for *now, back in zip(*series.values(), freed, strict=True)]
    top = max(range(len(totals)), key=totals.__getitem__, default=None)
    if top is not None and totals[top] <= 0:
        top = None
    kept = _kept(totals, top)
    return {
        "times_us": [(ordered[index].at_ns - ordered[0].at_ns) // 1000 for index in kept],
        "owners": {owner: [line[i] for i in kept] for owner, line in series.items() if any(line)},
        "given_back": [freed[index] for index in kept],
        "held": dict(held or {}),
        "events": len(ordered),
        "peak": {
            "index": kept.index(top) if top is not None else None,
            "bytes": totals[top] if top is not None else 0,
            "holders": _holders(blocks, top) if top is not None else [],
        },
    }


def _blocks(ordered: Sequence[Change]) -> tuple[list[_Block], list[int]]:
    """What was allocated, and for each change the bytes that it freed of what was there before."""
    alive: dict[int, _Block] = {}
    blocks: list[_Block] = []
    given_back = [0] * len(ordered)
    for index, change in enumerate(ordered):
        if change.bytes > 0:
            block = _Block(index, change.bytes, owner_of(change), change)
            alive[change.address] = block
            blocks.append(block)
        elif (freed := alive.pop(change.address, None)) is None:
            given_back[index] = -change.bytes
        else:
            freed.end = index
            if freed.owner == "attention_scratch" and not _inside(change, _ATTENTION):
                freed.owner = "activations"  # it outlived the attention: what that returned
    for block in alive.values():
        if block.owner == "attention_scratch":
            block.owner = "activations"
    return blocks, given_back


def owner_of(change: Change) -> str:
    """Whose an allocation is, from the calls around it; an attention's output counts as scratch until it is over."""
    if _inside(change, (_BACKWARD,)):
        return "gradients"
    if _inside(change, _CACHES):
        return "kv_cache"
    if _inside(change, _MASKS):
        return "mask"
    return "attention_scratch" if _inside(change, _ATTENTION) else "activations"


def _inside(change: Change, marks: Sequence[str]) -> bool:
    return any(mark in frame for frame in (change.operator, *change.frames) for mark in marks)


def _running(deltas: Iterable[int]) -> Iterator[int]:
    total = 0
    for delta in deltas:
        total += delta
        yield total


def _kept(totals: Sequence[int], top: int | None) -> list[int]:
    """The highest moment of each of ``POINTS`` equal stretches, the peak, the first and the last."""
    if len(totals) <= POINTS:
        return list(range(len(totals)))
    stretch = -(-len(totals) // (POINTS - 3))
    found = {0, len(totals) - 1, *([top] if top is not None else [])}
    for start in range(0, len(totals), stretch):
        found.add(max(range(start, min(start + stretch, len(totals))), key=totals.__getitem__))
    return sorted(found)


def _holders(blocks: Iterable[_Block], top: int) -> list[dict[str, Any]]:
    sizes: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for block in blocks:
        if block.start <= top and (block.end is None or block.end > top):
            key = (block.owner, block.made.operator, place_of(block.made))
            sizes[key] += block.bytes
            counts[key] += 1
    return [
        {"owner": key[0], "operator": key[1], "place": key[2], "bytes": size, "allocations": counts[key]}
        for key, size in sizes.most_common(HOLDERS)
    ]


def place_of(change: Change) -> str:
    """The innermost Python call that is not torch's own, as ``package/file.py(line): function``."""
    for frame in change.frames:
        if ".py(" in frame and not frame.startswith(_NOT_NAMED):
            path, _, rest = frame.partition(".py(")
            return "/".join(path.split("/")[-3:]) + ".py(" + rest
    return ""


def changes_of_tree(roots: Iterable[Any]) -> list[Change]:
    """What a CPU profile with memory and stacks recorded, from its event tree.

    Args:
        roots: ``kineto_results.experimental_event_tree()``.
    """
    found: list[Change] = []
    stack: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in roots]
    while stack:
        event, around = stack.pop()
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            operator = next((name for name in around if name.startswith(("aten::", "autograd::"))), "")
            if str(fields.device).startswith("cpu"):
                found.append(
                    Change(event.start_time_ns, int(fields.ptr), fields.alloc_size, operator, around)
                )
            continue
        inside = (str(event.name), *around)
        stack.extend((child, inside) for child in event.children)
    return found


def changes_of_snapshot(snapshot: Mapping[str, Any], device: int) -> list[Change]:
    """What ``torch.cuda.memory._snapshot()`` recorded of one device; a free counts once it is complete."""
    found: list[Change] = []
    for entry in snapshot["device_traces"][device]:
        sign = {"alloc": 1, "free_completed": -1}.get(entry["action"])
        if sign is None:
            continue
        frames = tuple(
            f"{frame['filename']}({frame['line']}): {frame['name']}" for frame in entry.get("frames") or ()
        )
        found.append(
            Change(int(entry["time_us"]) * 1000, int(entry["addr"]), sign * int(entry["size"]), "", frames)
        )
    return found
