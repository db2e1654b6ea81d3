"""`export` and `import`: what leaves the lab as a file, and an experiment's zip coming back."""

import os
from pathlib import Path
from typing import Annotated

import typer

from attnlab.export.arrays import write_map
from attnlab.export.bundle import read_bundle, write_bundle
from attnlab.export.image import render_view
from attnlab.export.report import write_report
from attnlab.export.table import write_table
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

TABLES = ("csv", "parquet", "json")
WHOLE = ("html", "zip")
FORMATS = (*TABLES, *WHOLE)
MAP_SUFFIXES = (".npz", ".safetensors", ".png", ".svg")


def export(
    target: Annotated[
        str, typer.Argument(help="3 or run:3 is a run, experiment:3 an experiment (html, zip: 3 too).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help=", ".join(FORMATS))] = None,
    map: Annotated[
        str | None, typer.Option("--map", metavar="LAYER:HEAD", help="One head's map instead.")
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Only these queries of the map.")] = None,
    cols: Annotated[str | None, typer.Option(metavar="A:B", help="Only these keys of the map.")] = None,
    json: JsonOption = False,
) -> None:
    """Write measurements, a report, a whole experiment, or with --map the exact map of one head."""
    if (map is None) == (format is None):
        refuse(f"exactly one of --format and --map must be given; choices of --format: {', '.join(FORMATS)}")
    check_out(out)
    store = reading_store()
    if map is not None:
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
    if format in TABLES:
        write_whole(out, write_table(store, [run.id for run in runs], format))
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
    """The exact probabilities of one head as the bytes of a file of this kind."""
    if target.kind != "run":
        refuse(f"--map needs one run, got {target}")
    if suffix not in MAP_SUFFIXES:
        refuse(f"--out must end in one of {', '.join(MAP_SUFFIXES)} for --map, got {suffix!r}")
    find_runs(store, target)
    layer, head = parse_map(map)
    region = parse_region("--rows", rows), parse_region("--cols", cols)
    write = render_view if suffix in {".png", ".svg"} else write_map
    return write(store, target.id, layer, head, *region, suffix[1:])


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
