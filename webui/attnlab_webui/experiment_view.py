"""What the experiment page shows, as escaped HTML made from rows and documents; no component in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from attnlab.compare import flatten
from attnlab.describe import run_brief
from attnlab.documents import write_document
from attnlab.views.labels import mechanism_label, ran_as
from attnlab_storage.results import ExperimentRow, RunRow
from attnlab_webui import pieces, serving_view
from attnlab_webui.memory_view import frontier_facts, memory_facts
from attnlab_webui.pieces import Raw, escape
from attnlab_webui.timing_view import (
    compilation_words,
    layout_words,
    ratio_words,
    timing_spread,
    timing_trouble,
)

# what a run's row may show, in this order; a column that is the same for all runs moves into the header
VARYING = ("model", "sequence_length", "dtype", "batch_size", "phase")
WORDS = {"sequence_length": "tokens", "batch_size": "batch"}
ROW_SUM_LIMIT = 5e-6
OUTPUT_LIMIT = 1e-4
EXPERIMENT_FORMATS = {"csv": "CSV", "parquet": "Parquet", "json": "JSON", "html": "Report", "zip": "Bundle"}
STRIP_WIDTH, STRIP_HEIGHT = 260, 26


def missing(asked: str, recent: Sequence[ExperimentRow]) -> str:
    """The page when no experiment, or an unknown one, was asked for."""
    title = f"There is no experiment {asked}" if asked else "Which experiment?"
    text = "It may have been removed for good, or the link is from another store."
    if not asked:
        text = "Open one of the latest, or find it in the queue."
    links = [(f"#{row.id} {row.name}", f"/experiment?id={row.id}") for row in recent]
    more = [("Open the queue", "/queue"), ("New experiment", "/")]
    return pieces.empty_state(title, text, [*links, *more])


def header(experiment: ExperimentRow, runs: Sequence[RunRow]) -> str:
    """Name, when, what all runs share, how many ended how, tags, note, downloads."""
    shared = " · ".join(_shared(runs))
    states = " ".join(
        f"{pieces.chip(state)}<span class='at-muted'> {count}</span>"
        for state, count in experiment.states.items()
        if count
    )
    tags = "".join(f'<span class="at-tag">{escape(tag)}</span>' for tag in experiment.tags)
    note = f'<p class="at-note">{escape(experiment.note)}</p>' if experiment.note else ""
    by = f" by {escape(experiment.created_by)}" if experiment.created_by else ""
    exports = "".join(
        f'<a href="/api/v1/experiments/{experiment.id}/export/{form}" download>{word}</a>'
        for form, word in EXPERIMENT_FORMATS.items()
    )
    return (
        f'<div class="at-head-line"><h1>{escape(experiment.name)}</h1>'
        f'<span class="at-muted">experiment #{experiment.id} · {pieces.ago(experiment.created_at)}{by}</span>{tags}'
        f'</div><div class="at-head-line at-second"><span>{escape(shared)}</span><span>{states}</span>'
        f'<span class="at-exports"><span class="at-label">export</span>{exports}</span></div>{note}'
    )


def runs_table(runs: Sequence[RunRow], chosen: int | None) -> str:
    """All runs with their outcomes; a row is chosen by its button, and checked to be compared."""
    varying = [name for name in VARYING if len({getattr(run, name) for run in runs}) > 1]
    heads = ["", "run", "mechanism", "implementation", *(WORDS.get(name, name) for name in varying)]
    served = serving_view.is_served(runs)
    numbers = serving_view.COLUMNS if served else ("latency", "peak memory", "row sums")
    header = "".join(f'<th scope="col">{escape(head)}</th>' for head in [*heads, "outcome"])
    header += "".join(f'<th scope="col" class="at-right">{head}</th>' for head in numbers)
    body = "".join(_run_row(run, varying, chosen) for run in runs)
    return (
        '<div class="at-scroll at-runs-scroll"><table class="at-table at-runs" aria-label="Runs">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
        '<div class="at-runs-foot"><a class="at-button" data-compare href="/compare" hidden>Compare</a></div>'
    )


def _run_row(run: RunRow, varying: Sequence[str], chosen: int | None) -> str:
    brief = run_brief(run)
    ran = ran_as(brief)
    asked = (
        f' <span class="at-muted">asked: {escape(run.implementation)}</span>'
        if ran != run.implementation
        else ""
    )
    cells = [
        f'<input type="checkbox" data-check="{run.id}" aria-label="compare run {run.id}">',
        f'<a href="/experiment?id={run.experiment_id}&amp;run={run.id}" data-open="{run.id}">#{run.id}</a>',
        escape(mechanism_label(brief)),
        f"{escape(ran)}{asked}",
        *(escape(_value(name, getattr(run, name))) for name in varying),
        state(run),
    ]
    numbers = [
        pieces.milliseconds(run.latency_ms),
        pieces.size_in_bytes(run.peak_memory_bytes),
        pieces.scientific((run.summary or {}).get("row_sum_defect")),
    ]
    if run.phase == "serving":
        numbers = serving_view.columns(run)
    current = ' aria-current="true"' if run.id == chosen else ""
    tail = "".join(f'<td class="at-right at-number">{escape(number)}</td>' for number in numbers)
    return (
        f'<tr data-run="{run.id}"{current}>' + "".join(f"<td>{cell}</td>" for cell in cells) + tail + "</tr>"
    )


def state(run: RunRow) -> str:
    """The chip of a run; a running one also shows its phase and how far it is."""
    if run.cancel_requested_at is not None and run.state == "running":
        return pieces.chip("running") + ' <span class="at-muted">ending, as asked</span>'
    if run.state == "running":
        words = run.phase_name or "starting"
        return f"{pieces.chip('running')} {pieces.progress_bar(run.progress_done, run.progress_total, words)}"
    return pieces.chip(run.state, run.reason or "")


def run_facts(document: Mapping[str, Any], run: RunRow) -> str:
    """The column beside the map: outcome, self-check, timing, memory, accuracy."""
    title = f"<h2>#{run.id} {escape(mechanism_label(document))}</h2>{state(run)}"
    sections = [f'<div class="at-head-line">{title}</div>', _trouble(document, run)]
    sections += [
        _check(document),
        _serving(document),
        _timing(document),
        _memory(document),
        _section("Longest that fits", frontier_facts(document["frontier"])) if document["frontier"] else "",
        _accuracy(document),
        _ran(document, run),
    ]
    return '<div class="at-facts-column">' + "".join(section for section in sections if section) + "</div>"


def _trouble(document: Mapping[str, Any], run: RunRow) -> str:
    if withheld := document.get("speed_withheld"):
        return pieces.notice(withheld, "error")
    if run.state in ("succeeded", "running"):
        return ""
    if run.state == "queued":
        return pieces.notice("Waiting in the queue. Results appear here as they are written.")
    reason = run.reason or pieces.STATE_WORDS.get(run.state, run.state)
    kind = "error" if run.state in ("failed", "out_of_memory", "timed_out") else "warning"
    detail = ""
    if document["error_detail"]:
        text = escape(document["error_detail"])
        detail = f'<details open><summary>detail</summary><pre class="at-pre">{text}</pre></details>'
    what = f" ({run.error_kind})" if run.error_kind else ""
    timed = " It was timed before, and its speed is not shown." if document["speed_discarded"] else ""
    return pieces.notice(reason + what + timed, kind) + detail


def _check(document: Mapping[str, Any]) -> str:
    check = document["map_check"]
    rows = []
    if check["row_sum_defect"] is not None:
        rows.append(("rows sum to 1 within", _judged(check["row_sum_defect"], ROW_SUM_LIMIT)))
    if check["output_defect"] is not None:
        rows.append(("P V equals the output within", _judged(check["output_defect"], OUTPUT_LIMIT)))
    if check["lse_defect"] is not None:
        rows.append(("kernel's log-sum-exp exact within", _judged(check["lse_defect"], OUTPUT_LIMIT)))
    return _section("Self-check of the maps", pieces.facts(rows)) if rows else ""


def _judged(value: float, limit: float) -> Raw:
    good = value <= limit
    mark, words = ("✓", "within its budget") if good else ("✗", f"above {limit:.0e}")
    css = "at-good" if good else "at-bad"
    return Raw(
        f'<span class="at-number">{value:.1e}</span> <span class="{css}" title="{words}">{mark}</span>'
    )


def _serving(document: Mapping[str, Any]) -> str:
    rows = serving_view.facts(document)
    return _section("Serving", pieces.facts(rows) + serving_view.exports(document)) if rows else ""


def _timing(document: Mapping[str, Any]) -> str:
    rows = []
    for name, words in (("latency_ms", "forward pass"), ("attention_latency_ms", "attention alone")):
        timing = document[name]
        if timing:
            interval = timing["detail"].get("interval")
            text = f"<b>{pieces.milliseconds(timing['median'])}</b> {timing_spread(timing)}"
            rows.append(
                (words, Raw(text + sample_strip(timing["samples"], words, interval) + timing_trouble(timing)))
            )
    if document["layout_latency_ms"]:
        rows.append(("of it, the layout", Raw(layout_words(document["layout_latency_ms"]))))
    if document["reference_ratio"]:
        rows.append(("against plain causal SDPA", Raw(ratio_words(document["reference_ratio"], "its time"))))
    if document["inputs_ratio"]:
        words = ratio_words(document["inputs_ratio"], "the time on normal inputs")
        rows.append(("on the model's own inputs", Raw(words)))
    if document["roofline"]:
        rows.append(("attention, of its ceiling", Raw(ceiling_words(document["roofline"]))))
    if document["capture_overhead"] is not None:
        rows.append(("cost of the capture", f"{document['capture_overhead']:.2f} x the plain forward"))
    return _section("Timing", pieces.facts(rows)) if rows else ""


def ceiling_words(roofline: Mapping[str, Any]) -> str:
    """How near the attention is to its device's ceiling, and which ceiling that is."""
    by = {"memory": "the copy", "compute": "the matrix product"}[roofline["bound"]]
    percent = percent_of(roofline["share"])
    speed = f"{roofline['flops_per_s'] / 1e9:.3g} of {roofline['ceiling_flops_per_s'] / 1e9:.3g} GFLOP/s"
    above = ": its data stay in a cache" if roofline["share"] > 1 and roofline["bound"] == "memory" else ""
    clock = clock_words(roofline.get("at_clock") or {})
    return f"<b>{percent} %</b> <span class='at-muted'>bound by {by}, {speed}{above}{clock}</span>"


def percent_of(share: float) -> str:
    """Whole per cents, two digits below ten."""
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"


def clock_words(found: Mapping[str, float]) -> str:
    """The same under the ceiling, and under the datasheet's peak, at the clock that was sampled in the window."""
    words = ""
    if "share" in found:
        words += f"; at the {found['mhz']:.0f} MHz sampled {percent_of(found['share'])} %"
        words += f" (ceiling measured at {found['ceiling_mhz']:.0f} MHz)"
    if "peak_share" in found:
        peak = f"{found['peak_flops_per_s'] / 1e12:.3g} TFLOP/s"
        words += f"; {percent_of(found['peak_share'])} % of the card's {peak} at {found['mhz']:.0f} MHz"
    return words


def sample_strip(samples: Sequence[float], name: str, interval: Sequence[float] | None = None) -> str:
    """Every sample as a dot on its own scale, the median as a line in its 95 % interval (inline SVG)."""
    if len(samples) < 2:
        return ""
    low, high = min(samples), max(samples)
    room = (high - low) or 1.0

    def place(value: float) -> float:
        return 4 + (value - low) / room * (STRIP_WIDTH - 8)

    places = [place(value) for value in samples]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{9 + (7 * i) % 11:.0f}" r="2.2"/>' for i, x in enumerate(places)
    )
    middle = place(median(samples))
    label = f"{len(samples)} samples of the {escape(name)}, {tick(low)} to {tick(high)} ms"
    band = ""
    if interval:
        left, right = place(interval[0]), place(interval[1])
        width = max(right - left, 1.0)
        band = (
            f'<rect x="{left:.1f}" width="{width:.1f}" y="2" height="22" fill="currentColor" opacity="0.15"/>'
        )
        label += f", median within {tick(interval[0])} to {tick(interval[1])} ms (95 %)"
    return (
        f'<svg class="at-strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" role="img" aria-label="{label}">'
        f'{band}<line x1="{middle:.1f}" x2="{middle:.1f}" y1="2" y2="24"/>{dots}</svg>'
        f'<div class="at-strip-ends" aria-hidden="true"><span>{tick(low)}</span><span>{tick(high)} ms</span></div>'
    )


def tick(milliseconds: float) -> str:
    """Four digits, never an exponent."""
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.4g}"


def _memory(document: Mapping[str, Any]) -> str:
    rows = []
    if document["peak_memory_bytes"] is not None:
        peak = f"<b>{pieces.size_in_bytes(document['peak_memory_bytes'])}</b>"
        method = (document["peak_memory"] or {}).get("method")
        how = f" <span class='at-muted'>{escape(method)}</span>" if method else ""
        rows.append(("peak above weights", Raw(peak + how)))
    rows += memory_facts(document)
    if document["stored_bytes"]:
        what = "stored timeline" if document.get("serving") else "stored for the maps"
        rows.append((what, pieces.size_in_bytes(document["stored_bytes"])))
    return _section("Memory", pieces.facts(rows)) if rows else ""


ACCURACY_WORDS = {
    "check_error": "check against eager",
    "logit_error": "logits, largest error",
    "kl": "KL of the logits, nats",
    "perplexity": "perplexity",
    "map_change": "change of the maps, total variation",
    "attention_error": "attention output, error",
    "lse_error": "log-sum-exp, error",
}


SWAP_WORDS = {
    "exact": "exact: the model's own function, computed another way",
    "approximate": "approximate: not what the weights were trained for, so the loss is below",
}


def _accuracy(document: Mapping[str, Any]) -> str:
    rows: list[tuple[str, object]] = []
    for name, value in document["accuracy"].items():
        if value is not None:
            number = f"{value:.2f}" if name == "perplexity" else pieces.scientific(value)
            rows.append(
                (
                    ACCURACY_WORDS.get(name, name.replace("_", " ")),
                    Raw(f'<span class="at-number">{number}</span>'),
                )
            )
    if document["swap"]["kind"] in SWAP_WORDS:
        rows.insert(0, ("swap", SWAP_WORDS[document["swap"]["kind"]]))
    return _section("Accuracy", pieces.facts(rows)) if rows else ""


def _ran(document: Mapping[str, Any], run: RunRow) -> str:
    rows: list[tuple[str, object]] = []
    if run.state == "succeeded":
        rows.append(("implementation", ran_as(document)))
    if document["kernels"]:
        rows.append(
            (
                "kernels that ran",
                Raw(f'<span class="at-mono">{escape(", ".join(document["kernels"]))}</span>'),
            )
        )
    rows += provenance_facts(document["provenance"] or {})
    if document["compilation"]:
        rows.append(("compiling and tuning", Raw(compilation_words(document["compilation"]))))
    if document["layers"]:
        rows.append(("layers x heads", f"{document['layers']} x {document['heads']}"))
    seconds = document["times"]["seconds"]
    if seconds is not None:
        rows.append(("took", pieces.duration(seconds)))
    if run.attempt > 1 or run.state in ("queued", "running"):
        rows.append(("attempt", f"{run.attempt} of {run.max_attempts}"))
    return _section("Run", pieces.facts(rows)) if rows else ""


def provenance_facts(provenance: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What launched every Triton kernel, ours and torch.compile's; version and hashes of another package's kernel."""
    rows: list[tuple[str, object]] = [("launched", _launch(one)) for one in provenance.get("launches") or []]
    if inductor := provenance.get("inductor"):
        rows += [("compiled by inductor", _launch(one)) for one in inductor["kernels"]]
        rows.append(("inductor's settings", _numbers(inductor["settings"])))
    if package := provenance.get("package"):
        revision = f" revision {package['revision']}" if package.get("revision") else ""
        hashes = "".join(
            f'<div class="at-mono" title="SHA-256 {escape(digest)}">{escape(name)} {escape(digest[:16])}</div>'
            for name, digest in package["files"].items()
        )
        rows.append(("kernel's package", Raw(f"{escape(package['version'] + revision)}{hashes}")))
    return rows


def _launch(launch: Mapping[str, Any]) -> Raw:
    numbers = _numbers({name: value for name, value in launch.items() if name != "kernel"})
    return Raw(
        f'<span class="at-mono">{escape(launch["kernel"])}</span> <span class="at-muted">{escape(numbers)}</span>'
    )


def _numbers(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _section(title: str, body: str) -> str:
    return f"<section><h3>{escape(title)}</h3>{body}</section>"


def log(text: str) -> str:
    """The end of a run's log."""
    if not text.strip():
        return '<p class="at-muted">Nothing was printed yet.</p>'
    return f'<pre class="at-pre" tabindex="0" aria-label="log">{escape(text)}</pre>'


def environment(document: Mapping[str, Any] | None) -> str:
    """Machine and software of a run as a flat list."""
    if not document:
        return '<p class="at-muted">The environment is written when the run starts.</p>'
    pairs = [(name, _text(value)) for name, value in flatten(document).items()]
    return f'<div class="at-columns">{pieces.facts(pairs)}</div>'


def spec(experiment: ExperimentRow) -> str:
    """The spec as YAML, ready to be submitted again."""
    return (
        f'<pre class="at-pre" tabindex="0" aria-label="spec">{escape(write_document(experiment.spec))}</pre>'
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    return "—" if value is None else str(value)


def _shared(runs: Sequence[RunRow]) -> list[str]:
    """What all runs have in common, in words."""
    words = []
    for name in VARYING:
        values = {getattr(run, name) for run in runs}
        if len(values) == 1 and (value := values.pop()) is not None:
            text = _value(name, value)
            words.append(f"{WORDS[name]} {text}" if name == "batch_size" else text)
            if name == "sequence_length":
                words[-1] = f"{text} tokens" if value else "as long as the text"
    return words


def _value(name: str, value: Any) -> str:
    if name == "sequence_length":
        return f"{value:,}" if value else "the text's length"
    return "—" if value is None else str(value)
