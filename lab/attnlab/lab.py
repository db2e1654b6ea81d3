"""The Python API: `open_lab`, then experiments and runs as objects, maps as arrays.

    lab = attnlab.open_lab()
    run = lab.run_by_id(3)
    run.map(layer=5, head=2, rows=slice(0, 64), cols=slice(0, 64))

Nothing here loads torch except `Lab.run`, which does the work in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plotly.graph_objects import Figure

from attnlab.compare import Comparison, compare_runs
from attnlab.describe import experiment_document, find_experiment, run_brief, run_document
from attnlab.estimate import Estimate, estimate
from attnlab.export.arrays import statistics_arrays
from attnlab.export.bundle import read_bundle, write_bundle
from attnlab.export.notebooks import bertviz_arguments, circuitsvis_arguments
from attnlab.export.pictures import render_picture
from attnlab.heads import HeadPage, find_heads
from attnlab.spec import ExperimentSpec, parse_spec
from attnlab.views.distances import DistanceGrid, run_distances
from attnlab.views.flow import Flow, attention_flow
from attnlab.views.labels import map_label
from attnlab.views.map_figure import map_figure
from attnlab.views.rollout import Rollout, rollout
from attnlab.views.statistics import curve
from attnlab.views.token import TokenWeights, token_weights
from attnlab.views.tokens import TokenLabels, token_labels
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import (
    Region,
    Viewport,
    find_run,
    find_trace,
    head_tensor,
    load_map,
    recorded,
    region_of,
    viewport,
)
from attnlab_storage import queue, results
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.results import MeasurementRow, RunRow

Spec = ExperimentSpec | Mapping[str, Any] | str | Path


def open_lab(url: str | None = None) -> Lab:
    """The lab over a database: an SQLAlchemy URL, or None for ATTNLAB_DATABASE_URL and then ATTNLAB_HOME.

    An embedded database that does not exist yet is made; one that is older or newer than this program is not
    touched.

    Raises StoreURLError, StoreOutdated, StoreNewer (run `attnlab migrate`, or a newer attnlab).
    """
    store = open_store(url, check=False)
    if store.path is not None and not store.path.exists():
        migrate(store)
    store.close()
    return Lab(open_store(url))


class Lab:
    """Everything in one store. Use it as a context manager, or close it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Lab({self.store.label})"

    def close(self) -> None:
        """Closes the connections to the database."""
        self.store.close()

    def experiments(self, search: str = "", limit: int = 50) -> list[Experiment]:
        """The latest experiments, those first that were submitted last."""
        rows = results.list_experiments(self.store, search=search, limit=limit).rows
        return [Experiment(self, row.id) for row in rows]

    def experiment(self, experiment_id: int) -> Experiment:
        """One experiment. Raises NotFound."""
        return Experiment(self, find_experiment(self.store, experiment_id).id)

    def runs(self, search: str = "", *, sort: str = "-id", limit: int = 50, **filters: Any) -> list[Run]:
        """Runs by state, mechanism, model, dtype, sequence_length and so on; raises ListingError.

        ``lab.runs(state="succeeded", mechanism=["flash", "multi_head"], sort="latency_ms")``
        """
        page = results.list_runs(self.store, filters=filters, search=search, sort=sort, limit=limit)
        return [Run(self, row.id) for row in page.rows]

    def heads(
        self, where: str, search: str = "", *, limit: int = 50, after: str | None = None, **filters: Any
    ) -> HeadPage:
        """Heads of all runs by their statistics: ``lab.heads("sink_mass > 0.8 and entropy < 1", model="gpt2")``.

        Those first that go furthest beyond the first bound. Raises ViewError, ListingError.
        """
        return find_heads(self.store, where, filters=filters, search=search, limit=limit, after=after)

    def run_by_id(self, run_id: int) -> Run:
        """One run. Raises NotFound."""
        return Run(self, find_run(self.store, run_id).id)

    def submit(self, spec: Spec, *, created_by: str | None = None, priority: int = 0) -> Experiment:
        """Queues an experiment for the workers: YAML or JSON text, a path, plain values, or a parsed spec.

        Raises SpecError with everything that is wrong with it; nothing is queued then.
        """
        parsed = as_spec(spec)
        queued = queue.submit(
            self.store,
            name=parsed.name,
            spec=parsed.to_dict(),
            spec_hash=parsed.hash(),
            points=[point.to_dict() for point in parsed.points()],
            created_by=created_by,
            priority=priority,
        )
        return Experiment(self, queued.experiment_id)

    def run(self, spec: Spec, *, created_by: str | None = None) -> Experiment:
        """Runs an experiment here and now, in this process, without workers. Raises SpecError."""
        from attnlab.run import run_here  # the only way into torch from here

        return Experiment(self, run_here(self.store, as_spec(spec), created_by=created_by))

    def estimate(self, spec: Spec) -> Estimate:
        """What an experiment would cost. Raises SpecError."""
        return estimate(as_spec(spec), self.store)

    def compare(self, *runs: Run | int) -> Comparison:
        """What differs between two or more runs. Raises CompareError, NotFound."""
        return compare_runs(self.store, [run.id if isinstance(run, Run) else run for run in runs])

    def distances(self, a: Run | int, b: Run | int, layers: Sequence[int] | None = None) -> DistanceGrid:
        """How far the maps of two runs are apart, head by head; tokens are aligned where the inputs differ."""
        first, second = (run.id if isinstance(run, Run) else run for run in (a, b))
        return run_distances(self.store, first, second, layers)

    def import_bundle(self, path: str | Path) -> Experiment:
        """Stores the experiment in a zip that `Experiment.export_bundle` wrote. Raises BundleError."""
        return Experiment(self, read_bundle(self.store, path))


class Experiment:
    """A spec and its runs."""

    def __init__(self, lab: Lab, experiment_id: int) -> None:
        self.lab = lab
        self.id = experiment_id

    def __repr__(self) -> str:
        return f"Experiment({self.id}, {self.name!r}, {self.states})"

    @property
    def name(self) -> str:
        return find_experiment(self.lab.store, self.id).name

    @property
    def spec(self) -> dict[str, Any]:
        return find_experiment(self.lab.store, self.id).spec

    @property
    def states(self) -> dict[str, int]:
        """How many runs are in each state, those with none left out."""
        return {
            state: count for state, count in find_experiment(self.lab.store, self.id).states.items() if count
        }

    @property
    def runs(self) -> list[Run]:
        """Its runs in the order of the grid."""
        return [Run(self.lab, row.id) for row in results.runs_of(self.lab.store, experiment_id=self.id)]

    def document(self) -> dict[str, Any]:
        """Everything about it and its runs as plain JSON values."""
        return experiment_document(self.lab.store, self.id)

    def export_bundle(self, path: str | Path) -> None:
        """Writes it, with its maps, as one zip that `Lab.import_bundle` reads."""
        write_bundle(self.lab.store, self.id, path)


class Run:
    """One run: its outcome, its numbers and its maps. Layers and heads are zero-based."""

    def __init__(self, lab: Lab, run_id: int) -> None:
        self.lab = lab
        self.id = run_id

    def __repr__(self) -> str:
        row = self.row
        return f"Run({self.id}, {row.mechanism}, {row.sequence_length} tokens, {row.state})"

    @property
    def row(self) -> RunRow:
        """The run as it stands in the store now."""
        return find_run(self.lab.store, self.id)

    @property
    def outcome(self) -> str | None:
        """How it ended; None while it has not."""
        row = self.row
        return row.state if row.ended else None

    @property
    def layers(self) -> list[int]:
        """The layers whose maps are kept. Raises NothingRecorded where there are none."""
        return [trace.layer for trace in recorded(self.lab.store, self.id)[1]]

    @property
    def heads(self) -> int:
        """How many heads a layer has. Raises NothingRecorded where no maps are kept."""
        return recorded(self.lab.store, self.id)[1][0].heads

    @property
    def tokens(self) -> TokenLabels:
        """The text and its tokens, readable and raw, for queries and keys."""
        return token_labels(self.lab.store, self.id)

    def axes(self, layer: int) -> TokenLabels:
        """The names of the rows and columns of a layer's maps: an encoder-decoder's differ by layer."""
        return token_labels(self.lab.store, self.id, layer)

    def document(self) -> dict[str, Any]:
        """Everything but per-head numbers and maps as plain JSON values: `attnlab show --json`."""
        return run_document(self.lab.store, self.id)

    def measurements(self, name: str | None = None, layer: int | None = None) -> list[MeasurementRow]:
        """Its numbers with units, samples and details, all of them or those of one name or layer."""
        find_run(self.lab.store, self.id)
        return results.measurements(self.lab.store, self.id, name, layer)

    def map(self, layer: int, head: int, rows: Region = None, cols: Region = None) -> np.ndarray:
        """The exact probabilities of a region: float32 [queries, keys].

        Raises ViewError naming the layers, heads or tokens that there are.
        """
        full_map = load_map(self.lab.store, self.id, layer, head)
        region = region_of(full_map.shape, rows, cols)
        return full_map.tile(slice(*region[0]), slice(*region[1]))

    def viewport(
        self,
        layer: int,
        head: int,
        rows: Region = None,
        cols: Region = None,
        width: int = 512,
        height: int = 512,
        reduce: str = "max",
    ) -> Viewport:
        """A region reduced to at most ``width`` x ``height`` pixels by maximum or mean."""
        return viewport(self.lab.store, self.id, layer, head, rows, cols, height, width, reduce)

    def figure(
        self,
        layer: int,
        head: int,
        rows: Region = None,
        cols: Region = None,
        width: int = 256,
        height: int = 256,
        reduce: str = "max",
        colormap: str = "viridis",
    ) -> Figure:
        """`viewport` as a Plotly figure with the tokens under the pointer; signed weights in diverging colours."""
        view = self.viewport(layer, head, rows, cols, width, height, reduce)
        labels = self.axes(layer)
        title = map_label(run_brief(self.row), layer, head)
        signed = is_signed(find_trace(self.lab.store, self.id, layer)[1])
        return map_figure(view, title, labels.query, labels.key, colormap, signed=signed)

    def picture(self, view: str, format: str = "png", **choices: Any) -> bytes:
        """A view as PNG, SVG or PDF with title and colour bar: map, cross, generation, grid, heads, token, lines,
        rollout, flow or image.

        ``run.picture("token", "svg", layer=5, head=2, row=40)``; `attnlab.export.pictures.choices_of` names what can be
        chosen. Raises ViewError for an unknown view, format or choice, and what cannot be shown.
        """
        return render_picture(self.lab.store, self.id, view, format, **choices)

    def token(self, row: int, layer: int, head: int | None = None) -> TokenWeights:
        """What the token of query ``row`` attends to and who attends to it, in one head or the mean of a layer's."""
        return token_weights(self.lab.store, self.id, layer, row, head)

    def statistics(self) -> dict[str, np.ndarray]:
        """Every number of its heads: float64 [layers, heads] by name, NaN where there is none; ``layers`` names rows.

        `attnlab.views.statistics.STATISTICS` says what they are. Raises NothingRecorded.
        """
        return statistics_arrays(self.lab.store, self.id)

    def curve(self, name: str, layer: int, head: int) -> np.ndarray:
        """``row_entropy`` or ``column_mass`` of a head: float32, at most 1,024 points."""
        return curve(self.lab.store, self.id, name, layer, head)

    def rollout(self, row: int, residual: float = 0.5) -> Rollout:
        """How much each token contributes to position ``row`` through all layers."""
        return rollout(self.lab.store, self.id, row, residual=residual)

    def flow(self, row: int, span: tuple[int, int] | None = None, residual: float = 0.5) -> Flow:
        """How much can flow from position ``row`` to each token of a span of at most 96."""
        return attention_flow(self.lab.store, self.id, row, span, residual=residual)

    def bertviz(self, layers: Sequence[int] | None = None, span: Region = None) -> dict[str, Any]:
        """The arguments of ``bertviz.head_view`` for a span of tokens."""
        return bertviz_arguments(self.lab.store, self.id, layers, span)

    def circuitsvis(self, layer: int, span: Region = None) -> dict[str, Any]:
        """The arguments of ``circuitsvis.attention.attention_heads`` for a span of tokens."""
        return circuitsvis_arguments(self.lab.store, self.id, layer, span)

    def query(self, layer: int, head: int) -> np.ndarray:
        """The queries as the kernel saw them, after position encoding: float32 [queries, head_dim]."""
        return head_tensor(self.lab.store, self.id, "query", layer, head)

    def key(self, layer: int, head: int) -> np.ndarray:
        """The keys that query head ``head`` reads (shared in its group): float32 [keys, head_dim]."""
        return head_tensor(self.lab.store, self.id, "key", layer, head)

    def lse(self, layer: int, head: int) -> np.ndarray:
        """The natural log-sum-exp of each row: [queries], float64 where it is stored so."""
        return head_tensor(self.lab.store, self.id, "lse", layer, head)


def as_spec(spec: Spec) -> ExperimentSpec:
    """A parsed spec from YAML or JSON text, a path, plain values, or itself. Raises SpecError, OSError."""
    if isinstance(spec, ExperimentSpec):
        return spec
    if isinstance(spec, Path):
        return parse_spec(spec.read_bytes(), folder=spec.parent)
    if isinstance(spec, Mapping | str):
        return parse_spec(spec, folder=Path.cwd())
    raise TypeError(f"spec must be text, a path, a mapping or an ExperimentSpec; got {type(spec).__name__}")
