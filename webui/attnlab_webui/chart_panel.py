"""The components of the chart panel, the same on every page that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from attnlab_webui import drawing
from attnlab_webui.chart_view import (
    BAR_CHOICES,
    CHART_CHOICES,
    FIELD_CHOICES,
    MEASURE_CHOICES,
    NONE,
    OWN,
    PARTS,
    Panel,
)


@dataclass(frozen=True)
class ChartPanel:
    """Pickers and what they change."""

    pickers: dict[str, Any]
    plot: Any
    note: Any
    table: Any

    @property
    def outputs(self) -> dict[str, Any]:
        """Every component by the name that `values` uses."""
        return {**self.pickers, "figure": self.plot, "note": self.note, "chart_table": self.table}


def build(prefix: str) -> ChartPanel:
    """Create the panel; element ids begin with the prefix."""
    with gr.Row(elem_classes="at-chart-pick"):
        pickers = {
            name: gr.Dropdown(
                choices, label=label, elem_id=f"{prefix}-{name}", filterable=True, min_width=140, scale=1
            )
            for name, label, choices in (
                ("chart", "Chart", CHART_CHOICES),
                ("x", "x", [*FIELD_CHOICES, *MEASURE_CHOICES]),
                ("y", "y", MEASURE_CHOICES),
                ("colour", "Colour", [*NONE, *FIELD_CHOICES]),
                ("facet", "Panel for each", [*NONE, *FIELD_CHOICES]),
                ("bars", "Error bars", BAR_CHOICES),
            )
        }
    plot = gr.Plot(show_label=False, elem_id=f"{prefix}-plot", elem_classes="at-plot-of-runs")
    note = gr.HTML("", elem_id=f"{prefix}-note", js_on_load=None)
    table = gr.HTML("", elem_id=f"{prefix}-table", js_on_load=None)
    return ChartPanel(pickers, plot, note, table)


def values(shown: Panel) -> dict[str, Any]:
    """The value of every output."""
    chosen = shown.chosen
    own = {"interactive": chosen.chart not in ("roofline", "samples")}
    axes = {name: {"value": getattr(chosen.axes, name), **own} for name in PARTS[1:]}
    return {
        "chart": {"value": chosen.chart or None},
        **axes,
        "figure": shown.figure,
        "note": shown.note,
        "chart_table": shown.table,
    }


def updates(shown: Panel) -> list[Any]:
    """`values` as updates of `ChartPanel.outputs`, in their order."""
    return [gr.update(**value) if isinstance(value, dict) else value for value in values(shown).values()]


def follow_choices(chart: ChartPanel) -> None:
    """Write what is picked into the address: a chart by its name, or axes, which make it a chart of one's own."""
    pickers = list(chart.pickers.values())
    for name, picker in chart.pickers.items():
        kind = "values[0]" if name == "chart" else f'"{OWN}"'
        own = f'{kind} === "{OWN}"'
        axes = ", ".join(f"{part}: {own} ? values[{i}] : null" for i, part in enumerate(PARTS[1:], 1))
        picker.input(None, pickers, None, js=drawing.choose(f"{{ chart: {kind}, {axes} }}"))
