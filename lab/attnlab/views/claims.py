"""Claims beside measurements: the data of a chart, then its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from attnlab.presets.claim import Claim
from attnlab.presets.verdict import KIND_WORDS, Kind, Verdict
from attnlab.views.chart_style import FONT, PALETTE, plain, styled

UNITS = {
    "cache_bytes": "share of the baseline's bytes",
    "attention_peak_memory_bytes": "share of the baseline's bytes",
    "latency_ms": "times as fast as the baseline",
    "tokens_per_second": "times the baseline's tokens a second",
    "reaches": "tokens",
    "runs_out": "tokens",
}
COLORS: dict[Kind, str] = {
    "holds": PALETTE[2],
    "does_not_hold": PALETTE[1],
    "not_measurable": PALETTE[6],
    "not_run": PALETTE[6],
}


class ClaimBar(NamedTuple):
    label: str
    low: float
    high: float
    measured: float | None
    interval: tuple[float, float] | None
    kind: Kind


class ClaimInfo(NamedTuple):
    title: str
    unit: str
    bars: list[ClaimBar]


def claim_infos(title: str, claims: Sequence[Claim], verdicts: Mapping[str, Verdict]) -> list[ClaimInfo]:
    """One chart a unit, in the order of the claims; a claim without a number to compare is left out."""
    found: dict[str, ClaimInfo] = {}
    for claim in claims:
        if not claim.high:
            continue
        unit = UNITS[claim.quantity]
        info = found.setdefault(unit, ClaimInfo(title, unit, []))
        verdict = verdicts[claim.id]
        interval = None if verdict.low is None or verdict.high is None else (verdict.low, verdict.high)
        info.bars.append(
            ClaimBar(claim.says, claim.low, claim.high, verdict.measured, interval, verdict.kind)
        )
    return list(found.values())


def claim_figure(info: ClaimInfo) -> go.Figure:
    """A row a claim: a bar up to what is claimed, a point where it was measured, coloured by the verdict."""
    figure = go.Figure()
    rows = [plain(bar.label.split(":")[0] if bar.label.count(":") == 1 else bar.label) for bar in info.bars]
    places = list(range(len(info.bars)))
    figure.add_bar(
        y=places,
        x=[bar.high for bar in info.bars],
        orientation="h",
        marker={"color": "rgba(128,128,128,0.28)"},
        width=0.6,
        name="claimed",
        hovertemplate="claimed %{x:.4g}<extra></extra>",
    )
    for kind, color in COLORS.items():
        shown = [
            (i, bar.measured, bar.interval or (bar.measured, bar.measured))
            for i, bar in enumerate(info.bars)
            if bar.kind == kind and bar.measured is not None
        ]
        if not shown:
            continue
        figure.add_scatter(
            y=[i for i, *_ in shown],
            x=[value for _, value, _ in shown],
            mode="markers",
            marker={"color": color, "size": 11, "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - value for _, value, (_, high) in shown],
                "arrayminus": [value - low for _, value, (low, _) in shown],
                "color": color,
            },
            name=f"measured: {KIND_WORDS[kind]}",
            hovertemplate="measured %{x:.4g}<extra></extra>",
        )
    styled(
        figure, title=f"{info.title}: claimed and measured", x=info.unit, y="", height=130 + 30 * len(rows)
    )
    figure.update_yaxes(tickvals=places, ticktext=rows, autorange="reversed", showgrid=False, zeroline=False)
    # above the bars: a place below, which is a share of the height, meets the axis title on a short chart
    legend = {"x": 0, "y": 1, "yanchor": "bottom", "font": {"color": FONT}}
    figure.update_layout(showlegend=True, legend=legend, margin_t=64)
    figure.update_xaxes(rangemode="tozero")
    if info.unit == "tokens":
        lengths = sorted(
            {bar.high for bar in info.bars} | {bar.measured for bar in info.bars if bar.measured}
        )
        figure.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{n / 1024:g}K" for n in lengths])
    return figure
