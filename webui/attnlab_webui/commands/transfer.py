"""`export` and `import`: what leaves the lab as a file, and an experiment's zip coming back."""

import os
import re
from json import loads as json_of
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlab.export import arrays, image, pictures, table
from attnlab.export.bundle import read_bundle, write_bundle
from attnlab.export.report import write_report
from attnlab_storage.database import Store
from attnlab_webui.commands.console import (
    JsonOption,
    print_document,
    reading_store,
    refuse,
    say,
    short_bytes,
    writing_store,
)
from attnlab_webui.commands.targets import Target, find_runs, parse_map, parse_region, parse_target

WHOLE = ("html", "zip")
FORMATS = (*table.FORMATS, *arrays.FORMATS, *WHOLE)
LAYER_SUFFIXES = tuple(f".{form}" for form in (*arrays.FORMATS, *image.FORMATS))
MAP_SUFFIXES = (*LAYER_SUFFIXES, *(f".{form}" for form in table.MAP_FORMATS))


def export(
    target: Annotated[
        str, typer.Argument(help="3 or run:3 is a run, experiment:3 an experiment (html, zip: 3 too).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help=", ".join(FORMATS))] = None,
    map: Annotated[
        str | None,
        typer.Option("--map", metavar="LAYER[:HEAD]", help="One head's map, or a whole layer, instead."),
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Only these queries of the map.")] = None,
    cols: Annotated[str | None, typer.Option(metavar="A:B", help="Only these keys of the map.")] = None,
    view: Annotated[
        str | None,
        typer.Option("--view", metavar="VIEW", help=f"A view as a picture: {', '.join(pictures.VIEWS)}."),
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="What the view shows: layer=5, head=2, row=40, rows=0:64."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write measurements, statistics of heads (npz, safetensors), a report, a whole experiment, a map or a view.

    With --view token --set layer=5 --set row=40 the file is a picture of that view (.png, .svg, .pdf).

    With --map 5:2 the file holds the exact weights of one head (.npz, .safetensors, .parquet, .csv) or a picture of
    them (.png, .svg, .pdf); with --map 5 the layer's Q, K and LSE, or a picture of all its heads.
    """
    if [map, format, view].count(None) != 2:
        given = f"exactly one of --format, --map and --view must be given; choices of --format: {', '.join(FORMATS)}"
        refuse(given)
    check_out(out)
    store = reading_store()
    if view is not None:
        wanted = parse_target(target)
        write_whole(out, view_file(store, wanted, view, choose or [], out.suffix))
    elif map is not None:
        wanted = parse_target(target)
        write_whole(out, map_file(store, wanted, map, rows, cols, out.suffix))
    else:
        wanted = export_document(store, target, format or "", out)
    size = out.stat().st_size
    if json:
        print_document({"out": str(out), "bytes": size, wanted.kind: wanted.id})
    else:
        say(f"{wanted} written to {out}, {short_bytes(size)}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.zip", help="A zip written by `attnlab export`.")],
    json: JsonOption = False,
) -> None:
    """Read an exported experiment back, all of it or nothing."""
    if not file.is_file():
        refuse(f"FILE must be a zip written by `attnlab export --format zip`, {str(file)!r} is no file")
    experiment = read_bundle(writing_store(), file)
    if json:
        print_document({"experiment": experiment})
    else:
        say(f"imported as experiment {experiment}")


def export_document(store: Store, text: str, format: str, out: Path) -> Target:
    """Writes measurements, a report or a bundle; returns what was written."""
    if format not in FORMATS:
        refuse(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = parse_target(text, bare="experiment" if format in WHOLE else "run")
    runs = find_runs(store, target)
    if format in table.FORMATS:
        write_whole(out, table.write_table(store, [run.id for run in runs], format))
        return target
    if format in arrays.FORMATS:
        if target.kind != "run":
            refuse(f"--format {format} is of one run's heads, got {target}")
        write_whole(out, arrays.write_statistics(store, target.id, format))
        return target
    if target.kind != "experiment":
        refuse(f"--format {format} is of a whole experiment, use experiment:{runs[0].experiment_id}")
    if format == "html":
        write_whole(out, write_report(store, target.id).encode())
    else:
        write_bundle(store, target.id, out)
    return target


def map_file(
    store: Store, target: Target, map: str, rows: str | None, cols: str | None, suffix: str
) -> bytes:
    """One head's weights or a whole layer, as the bytes of a file of this kind."""
    if target.kind != "run":
        refuse(f"--map needs one run, got {target}")
    layer, head = parse_map(map)
    suffixes = MAP_SUFFIXES if head is not None else LAYER_SUFFIXES
    if suffix not in suffixes:
        refuse(f"--out must end in one of {', '.join(suffixes)} for --map {map}, got {suffix!r}")
    find_runs(store, target)
    region, form = (parse_region("--rows", rows), parse_region("--cols", cols)), suffix[1:]
    if head is None:
        if (rows, cols) != (None, None):
            refuse(f"--rows and --cols are of one head's map, --map {map} is a whole layer")
        write = image.render_heads if form in image.FORMATS else arrays.write_trace
        return write(store, target.id, layer, form)
    if form in image.FORMATS:
        return image.render_view(store, target.id, layer, head, *region, form)
    write = arrays.write_map if form in arrays.FORMATS else table.write_map_table
    return write(store, target.id, layer, head, *region, form)


def view_file(store: Store, target: Target, view: str, choices: list[str], suffix: str) -> bytes:
    """One view of a run, as the bytes of a picture."""
    if target.kind != "run":
        refuse(f"--view needs one run, got {target}")
    find_runs(store, target)
    chosen = dict(parse_choice(text) for text in choices)
    return pictures.render_picture(store, target.id, view, suffix.removeprefix("."), **chosen)


def parse_choice(text: str) -> tuple[str, Any]:
    """``layer=5``, ``rows=0:64``, ``heads=1,3``, ``residual=0.25``, ``sink=true`` or ``theme=dark``."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value:
        refuse(f"--set must be NAME=VALUE, got {text!r}")
    if re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", value):
        start, _, stop = value.partition(":")
        return name, (int(start), int(stop))
    if name == "heads" and value != "mean":
        value = f"[{value}]"
    try:
        return name, json_of(value)
    except ValueError:
        return name, value


def check_out(out: Path) -> None:
    folder = out.absolute().parent
    if not folder.is_dir():
        refuse(f"--out must be in a folder that exists, {str(folder)!r} does not")
    if out.is_dir():
        refuse(f"--out must be a file, {str(out)!r} is a folder")


def write_whole(out: Path, data: bytes) -> None:
    """Writes the file in one rename, so that a full disk leaves no half of it."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
