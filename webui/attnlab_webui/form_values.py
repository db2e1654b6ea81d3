"""Between what a field holds, a text, and what the document holds: numbers, sizes in bytes, lists."""

import re
from collections.abc import Iterable
from typing import Any

Document = dict[str, Any]

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def typed(text: str) -> Any:
    """A number where the text is one; anything else stays text, for the spec to complain about."""
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def typed_list(text: str) -> list[Any]:
    """The values between commas."""
    return [typed(part) for part in text.split(",") if part.strip()]


def typed_bytes(text: str) -> Any:
    """Bytes of `16 MiB` or `1.5 GiB`; otherwise as `typed`."""
    size = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KiB|MiB|GiB|TiB)", text.strip())
    return round(float(size[1]) * UNITS[size[2]]) if size else typed(text)


def text_of(value: Any) -> str:
    """What a field shows of a value; empty for what it cannot hold."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or isinstance(value, dict | list) else str(value)


def text_of_bytes(value: Any) -> str:
    """`16 MiB` where that says it exactly, else the number."""
    if type(value) is int and value > 0:
        for unit, size in reversed(UNITS.items()):
            if value % size == 0:
                return f"{value // size} {unit}"
    return text_of(value)


def texts_of(value: Any) -> str:
    """The values with commas between them."""
    return ", ".join(text_of(item) for item in listed(value))


def picked(values: Any, choices: Iterable[str]) -> tuple[str, ...]:
    """The choices among the values, in the order of the choices; a field cannot show anything else."""
    given = {text_of(value) for value in listed(values)}
    return tuple(choice for choice in choices if choice in given)


def listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list of itself, nothing as an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def mapping(value: Any) -> Document:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}
