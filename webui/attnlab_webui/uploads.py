"""Pictures, sounds and traces of requests that were uploaded for an experiment that is still being written.

The YAML on the page names them (``image: upload-0123456789abcdef.png``); what is queued holds the file itself, so
that a worker needs nothing but the database. The newest hundred are kept in ``ATTNLAB_HOME/uploads``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.files import MAX_TRACE_BYTES
from attnlab.pictures import PictureError, open_picture, pack_picture, picture_samples
from attnlab.serving.workload import COLUMNS, TraceError, read_trace
from attnlab.sounds import SoundError, open_sound, pack_sound, sound_samples
from attnlab_storage.settings import home_folder
from attnlab_webui.form_values import Document, mapping

KEPT = 100
TRACE_HEADER = ",".join(names[0] for names in COLUMNS)
NAME = re.compile(r"upload-[0-9a-f]{16}\.[a-z]{3,4}")
PACKERS: dict[str, Callable[[bytes], str]] = {"image": pack_picture, "audio": pack_sound}


def keep(kind: str, name: str, data: bytes) -> str:
    """Stores an uploaded picture, sound or trace; returns the name that a spec on the page may use.

    Args:
        kind: "image", "audio" or "trace".
        name: what the person's file is called, for the message.

    Raises:
        ValueError: it is none that a model could be given, or it cannot be stored.
    """
    if kind == "trace":
        return _keep_trace(name, data)
    try:
        uri = PACKERS[kind](data)
    except (PictureError, SoundError) as problem:
        raise ValueError(f"file: {problem} ({name!r})") from None
    return _write(uri, data)


def with_uploads(document: Document) -> Document:
    """The document with what was uploaded in place of its name; a name that is no upload stays as it is."""
    packed = _each(document, lambda kind, source: _packed(kind, source) if NAME.fullmatch(source) else source)
    return _with_trace(packed, _rows)


def without_contents(document: Document) -> Document:
    """The document as a page shows it: what a stored experiment holds becomes an upload with a short name."""
    unpacked = _each(
        document, lambda kind, source: _unpacked(source) if source.startswith("data:") else source
    )
    return _with_trace(unpacked, _file_of_rows)


def contents(kind: str, source: str) -> str | None:
    """A picture or sound as a data URI for the page: of a sample, an upload, or itself; None if it is none."""
    if source.startswith("data:"):
        return source if _is_sound_or_picture(kind, source) else None
    if NAME.fullmatch(source):
        packed = _packed(kind, source)
        return packed if packed.startswith("data:") else None
    sample = (picture_samples() if kind == "image" else sound_samples()).get(source)
    return None if sample is None else _data_uri(kind, sample)


def _each(document: Document, change: Callable[[str, str], str]) -> Document:
    given = document.get("input")
    if not isinstance(given, Mapping):
        return document
    changed: dict[str, Any] = {
        key: change(key, value) if key in PACKERS and isinstance(value, str) else value
        for key, value in given.items()
    }
    return document if changed == given else {**document, "input": changed}


def _with_trace(document: Document, change: Callable[[Any], Any]) -> Document:
    serving = mapping(document.get("serving"))
    workload = mapping(serving.get("workload"))
    trace = workload.get("trace")
    changed = change(trace)
    if changed == trace:
        return document
    return {**document, "serving": {**serving, "workload": {**workload, "trace": changed}}}


def _rows(trace: Any) -> Any:
    """The rows of an uploaded trace; anything else as it is."""
    if not isinstance(trace, str) or not NAME.fullmatch(trace):
        return trace
    try:
        return [list(row) for row in read_trace((_folder() / trace).read_text())]
    except (OSError, ValueError):
        return trace


def _file_of_rows(trace: Any) -> Any:
    """The name of an upload that holds the rows; what are none as it is."""
    if not isinstance(trace, list | tuple) or not trace:
        return trace
    try:
        return _keep_rows(trace)
    except (TypeError, ValueError):
        return trace


def _keep_trace(name: str, data: bytes) -> str:
    if len(data) > MAX_TRACE_BYTES:
        raise ValueError(f"file: must be at most {MAX_TRACE_BYTES:,} bytes, {name!r} has more")
    try:
        return _keep_rows(read_trace(data.decode("utf-8-sig")))
    except UnicodeDecodeError as problem:
        raise ValueError(f"file: must be UTF-8 text, byte {problem.start:,} of {name!r} is not") from None
    except TraceError as problem:
        raise ValueError(f"file: {problem} ({name!r})") from None


def _keep_rows(rows: Iterable[Sequence[Any]]) -> str:
    lines = [TRACE_HEADER, *(f"{float(arrival)!r},{prompt},{output}" for arrival, prompt, output in rows)]
    return _write("data:text/csv;", "\n".join(lines).encode())


def _packed(kind: str, name: str) -> str:
    try:
        return PACKERS[kind]((_folder() / name).read_bytes())
    except (OSError, PictureError, SoundError):
        return name


def _unpacked(uri: str) -> str:
    _, _, data = uri.partition(";base64,")
    try:
        return _write(uri, base64.b64decode(data, validate=True))
    except ValueError:
        return uri


def _write(uri: str, data: bytes) -> str:
    extension = uri.partition(";")[0].rpartition("/")[2].rpartition("-")[2]
    name = f"upload-{hashlib.sha256(data).hexdigest()[:16]}.{extension[:4]}"
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        kept = sorted(folder.glob("upload-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[KEPT:]:
            path.unlink(missing_ok=True)
    except OSError as problem:
        raise ValueError(f"file: cannot be kept: {problem}") from None
    return name


def _is_sound_or_picture(kind: str, uri: str) -> bool:
    try:
        open_picture(uri) if kind == "image" else open_sound(uri)
    except (PictureError, SoundError):
        return False
    return True


def _folder() -> Path:
    return home_folder() / "uploads"


def _data_uri(kind: str, path: Path) -> str:
    extension = {"jpg": "jpeg"}.get(path.suffix[1:], path.suffix[1:])
    return f"data:{kind}/{extension};base64,{base64.b64encode(path.read_bytes()).decode()}"
