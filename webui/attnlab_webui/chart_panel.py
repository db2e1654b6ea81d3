"""The components of the chart panel, the same on every page that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from attnlab.views.chart import Axes
from attnlab_webui.chart_view import (
    BAR_CHOICES,
    CHART_CHOICES,
    FIELD_CHOICES,
    MEASURE_CHOICES,
    NONE,
    OWN,
    PARTS,
    Chosen,
    Panel,
    picked,
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


def choice_of(changed: str, chart: str, x: str, y: str, colour: str, facet: str, bars: str) -> Chosen:
    """What the pickers say after one of them was changed: an axis makes the chart one's own."""
    if changed == "chart" and chart != OWN:
        return picked(chart)
    return Chosen(OWN, Axes(x, y, colour or "", facet or "", bars))
