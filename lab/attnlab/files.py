"""The files that a spec names, read into it when it is parsed: a run needs nothing but its spec."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .pictures import MAX_PICTURE_BYTES, PictureError, pack_picture, picture_samples
from .problems import Problem, SpecError, shown
from .serving.workload import TraceError, read_trace
from .sounds import MAX_SOUND_BYTES, SoundError, pack_sound, sound_samples

MAX_TEXT_BYTES = 1_000_000
MAX_TRACE_BYTES = 1_000_000
ONE_INPUT = "must hold exactly one of text, file, image, audio and synthetic"


def with_files_read(values: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the document with the content of its files in place of their names.

    Args:
        folder: where they are looked up; None refuses them.

    Raises:
        SpecError: a file is refused, cannot be read, or is too large.
    """
    given = values.get("input")
    if not isinstance(given, Mapping):
        return values
    if isinstance(given.get("file"), str):
        if given.get("text") is not None:
            raise SpecError([Problem("input", ONE_INPUT, "both text and file")])
        kept = {key: item for key, item in given.items() if key != "file"}
        return values | {"input": kept | {"text": _text(given["file"], folder)}}
    for name, samples in (("image", picture_samples()), ("audio", sound_samples())):
        source = given.get(name)
        if isinstance(source, str) and not source.startswith("data:") and source not in samples:
            given = {**given, name: _packed(name, source, folder, tuple(samples))}
    return values | {"input": dict(given)}


def with_trace_read(values: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the document with the rows of a workload's trace in place of the file's name.

    Raises:
        SpecError: the file is refused, cannot be read, or is no trace.
    """
    serving = values.get("serving")
    workload = serving.get("workload") if isinstance(serving, Mapping) else None
    if not isinstance(serving, Mapping) or not isinstance(workload, Mapping):
        return values
    if not isinstance(workload.get("trace"), str):
        return values
    name = workload["trace"]
    if not name.strip():
        rule = "must be a file of requests, or rows of arrival_s, prompt_tokens and output_tokens"
        raise SpecError([Problem("serving.workload.trace", rule, shown(name))])
    try:
        rows = read_trace(_read("serving.workload.trace", name, folder, MAX_TRACE_BYTES).decode())
    except (TraceError, UnicodeDecodeError) as error:
        raise SpecError([Problem("serving.workload.trace", str(error), shown(name))]) from None
    return values | {"serving": {**serving, "workload": {**workload, "trace": rows}}}


def _text(name: str, folder: Path | None) -> str:
    try:
        return _read("input.file", name, folder, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        rule = f"must be a readable UTF-8 text file: {error}"
        raise SpecError([Problem("input.file", rule, shown(name))]) from None


def _packed(kind: str, name: str, folder: Path | None, samples: tuple[str, ...]) -> str:
    argument = f"input.{kind}"
    if folder is None:
        rule = "must be a sample or a data URI here: files are read by the command line and by Python only"
        raise SpecError([Problem(argument, rule, shown(name), samples)])
    if not (folder / Path(name).expanduser()).is_file():
        raise SpecError([Problem(argument, "must be a sample, a data URI or a file", shown(name), samples)])
    try:
        if kind == "image":
            return pack_picture(_read(argument, name, folder, MAX_PICTURE_BYTES))
        return pack_sound(_read(argument, name, folder, MAX_SOUND_BYTES))
    except (PictureError, SoundError) as error:
        raise SpecError([Problem(argument, str(error), shown(name))]) from None


def _read(argument: str, name: str, folder: Path | None, limit: int) -> bytes:
    if folder is None:
        rule = "files are read by the command line and by Python only; send the text itself as input.text"
        raise SpecError([Problem(argument, rule, shown(name))])
    path = folder / Path(name).expanduser()
    try:
        if path.stat().st_size > limit:
            rule = f"must be at most {limit} bytes"
            raise SpecError([Problem(argument, rule, f"{path.stat().st_size} in {name}")])
        return path.read_bytes()
    except OSError as error:
        raise SpecError([Problem(argument, f"must be a readable file: {error}", shown(name))]) from None
