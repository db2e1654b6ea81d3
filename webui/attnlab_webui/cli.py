"""The command line `attnlab`: every command in one table; what they do is in `attnlab_webui.commands`.

Others script against it, so it is a contract: `--json` prints one JSON document on stdout and words go to stderr;
exit code 0 is good, 1 says that a run ended badly or a check failed, 2 that the input was wrong.
"""

import typer

from attnlab_webui.commands import (
    advise,
    catalog,
    doctor,
    head_numbers,
    heads,
    listing,
    presets,
    reproduce,
    services,
    submit,
    transfer,
)
from attnlab_webui.commands.console import CommandGroup

app = typer.Typer(
    name="attnlab",
    cls=CommandGroup,
    help="A lab for attention: run real kernels on real models, keep the exact maps, compare them side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVICES, EXPERIMENTS, RESULTS, FACTS = "Services", "Experiments", "Results", "What there is"

app.command("up", context_settings=services.PASS_THROUGH, rich_help_panel=SERVICES)(services.up)
app.command("web", rich_help_panel=SERVICES)(services.web)
app.command("dispatch", context_settings=services.PASS_THROUGH, rich_help_panel=SERVICES)(services.dispatch)
app.command("migrate", rich_help_panel=SERVICES)(services.migrate)
app.command("purge", rich_help_panel=SERVICES)(services.purge)
app.command("doctor", rich_help_panel=SERVICES)(doctor.doctor)

app.command("submit", rich_help_panel=EXPERIMENTS)(submit.submit)
app.command("run", rich_help_panel=EXPERIMENTS)(submit.run)
app.command("cancel", rich_help_panel=EXPERIMENTS)(listing.cancel)
app.command("retry", rich_help_panel=EXPERIMENTS)(listing.retry)
app.command("reproduce", rich_help_panel=EXPERIMENTS)(reproduce.reproduce)

app.command("list", rich_help_panel=RESULTS)(listing.list_)
app.command("show", rich_help_panel=RESULTS)(listing.show)
app.command("compare", rich_help_panel=RESULTS)(listing.compare)
app.command("heads", rich_help_panel=RESULTS)(heads.heads)
app.command("statistics", rich_help_panel=RESULTS)(head_numbers.statistics)
app.command("distances", rich_help_panel=RESULTS)(head_numbers.distances)
app.command("export", rich_help_panel=RESULTS)(transfer.export)
app.command("import", rich_help_panel=RESULTS)(transfer.import_)

app.command("mechanisms", rich_help_panel=FACTS)(catalog.mechanisms)
app.command("advise", rich_help_panel=FACTS)(advise.advise_command)
app.command("presets", rich_help_panel=FACTS)(presets.presets)
app.add_typer(presets.preset, name="preset", rich_help_panel=EXPERIMENTS)
app.command("kernels", rich_help_panel=FACTS)(catalog.kernels)
app.add_typer(catalog.models, name="models", rich_help_panel=FACTS)


def main() -> None:
    """The entry point of the `attnlab` script."""
    app()


if __name__ == "__main__":
    main()
