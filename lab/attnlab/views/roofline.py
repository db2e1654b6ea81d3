"""The roofline of measured attentions: speed against operations for each byte, under the ceilings of their devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from attnlab.views.chart_style import FONT, color, log_axis, plain, styled, symbol
from attnlab.views.labels import OUTCOME_WORDS, mechanism_label, ran_as, run_label

_DASHES = ("solid", "dash", "dot", "dashdot")


class Roof(NamedTuple):
    """The ceilings of one device for one dtype."""

    label: str
    copy: float  # bytes a second, read and written
    matmul: float  # FLOP a second


class RoofPoint(NamedTuple):
    """The attention of one run under its roof."""

    label: str
    kind: str  # mechanism and implementation: one colour
    roof: str
    intensity: float  # FLOP a byte
    speed: float  # FLOP a second
    share: float  # of the ceiling, 1 is at it
    bound: str  # memory or compute


class RooflineInfo(NamedTuple):
    roofs: list[Roof]
    points: list[RoofPoint]
    missing: list[str]  # runs without a point, with their outcome


def roofline_info(documents: Sequence[Mapping[str, Any]]) -> RooflineInfo:
    """A point for every run whose attention was timed and counted, a roof for each of their devices and dtypes."""
    roofs: dict[str, Roof] = {}
    points: list[RoofPoint] = []
    missing: list[str] = []
    for document in documents:
        found = document.get("roofline")
        if not found:
            if document["state"] not in ("queued", "running"):
                missing.append(f"{run_label(document)}: {_why(document)}")
            continue
        ceilings = found["ceilings"]
        label = f"{ceilings['device']} · {ceilings['dtype']}"
        roof = Roof(label, ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"])
        before = roofs.get(label, roof)
        roofs[label] = Roof(label, max(before.copy, roof.copy), max(before.matmul, roof.matmul))
        points.append(
            RoofPoint(
                run_label(document),
                f"{mechanism_label(document)} · {ran_as(document)}",
                label,
                found["intensity"],
                found["flops_per_s"],
                found["share"],
                found["bound"],
            )
        )
    return RooflineInfo(list(roofs.values()), points, missing)


def _why(document: Mapping[str, Any]) -> str:
    if document["state"] == "succeeded":
        return "no count of operations, or no time"
    word = OUTCOME_WORDS.get(document["state"], str(document["state"]))
    return f"{word}: {document['reason']}" if document.get("reason") else word


def roofline_figure(info: RooflineInfo) -> go.Figure:
    """Both axes logarithmic; a roof rises with the copy and is flat at the matrix product."""
    figure = go.Figure()
    intensities = [point.intensity for point in info.points]
    ridges = [roof.matmul / roof.copy for roof in info.roofs]
    low = min([*intensities, *ridges], default=1.0) / 4
    high = max([*intensities, *ridges], default=1.0) * 4
    for i, roof in enumerate(info.roofs):
        ridge = roof.matmul / roof.copy
        figure.add_scatter(
            x=[low, ridge, high],
            y=[low * roof.copy, roof.matmul, roof.matmul],
            mode="lines",
            line={"color": FONT, "width": 2, "dash": _DASHES[i % len(_DASHES)]},
            name=plain(roof.label),
            hovertemplate=(
                f"copy {roof.copy / 1e9:.3g} GB/s, product {roof.matmul / 1e9:.3g} GFLOP/s"
                f"<extra>{plain(roof.label)}</extra>"
            ),
        )
    kinds = list(dict.fromkeys(point.kind for point in info.points))
    for at, point in enumerate(info.points):
        i = kinds.index(point.kind)
        figure.add_scatter(
            x=[point.intensity],
            y=[point.speed],
            mode="markers",
            marker={"color": color(i), "symbol": symbol(i), "size": 10},
            name=plain(point.kind),
            legendgroup=point.kind,
            showlegend=point.kind not in [before.kind for before in info.points[:at]],
            hovertemplate=(
                f"{point.speed / 1e9:.3g} GFLOP/s at {point.intensity:.3g} FLOP/byte<br>"
                f"{100 * point.share:.0f} % of its ceiling, bound by {point.bound}"
                f"<extra>{plain(point.label)}</extra>"
            ),
        )
    styled(
        figure,
        title="Attention under the ceilings that the lab measured",
        x="operations for each byte (FLOP/byte)",
        y="FLOP/s",
        height=440,
    )
    speeds = [*(point.speed for point in info.points), *(roof.matmul for roof in info.roofs)]
    figure.update_xaxes(**log_axis([low, high]))
    figure.update_yaxes(**log_axis(speeds, "FLOP/s"))
    return figure
