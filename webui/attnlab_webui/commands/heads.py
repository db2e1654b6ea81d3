"""`attnlab heads`: heads of all runs by what was measured of them."""

from typing import Annotated

import typer

from attnlab.heads import find_heads, head_document
from attnlab_webui.commands.console import (
    JsonOption,
    print_document,
    print_table,
    reading_store,
    say,
    short_number,
)


def heads(
    where: Annotated[str, typer.Argument(help='Such as "sink_mass > 0.8 and entropy < 1".')],
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    mechanism: Annotated[list[str] | None, typer.Option(help="Only this mechanism; may be repeated.")] = None,
    experiment: Annotated[int | None, typer.Option(help="Only runs of this experiment.")] = None,
    search: Annotated[str, typer.Option(help="Text in name, note, tags, mechanism or model.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows a page.")] = 50,
    after: Annotated[str | None, typer.Option(help="`next` of the page before (in its JSON).")] = None,
    json: JsonOption = False,
) -> None:
    """Find heads of all runs by their statistics, those first that go furthest beyond the first bound."""
    filters = {"model": model, "mechanism": mechanism, "experiment": experiment}
    page = find_heads(reading_store(), where, filters=filters, search=search, limit=limit, after=after)
    found = [head_document(row) for row in page.rows]
    if json:
        print_document({"heads": found, "next": page.next})
        return
    names = list(found[0]["values"]) if found else []
    rows = [
        (
            head["run"],
            head["name"],
            *(short_number(value) for value in head["values"].values()),
            head["model"],
            head["mechanism"],
            head["sequence_length"],
            head["experiment_name"],
        )
        for head in found
    ]
    columns = ("run", "head", *names, "model", "mechanism", "tokens", "experiment")
    print_table(columns, rows, empty=f"no head of any run has {where}")
    if page.next:
        say(f"more: --after '{page.next}'")
