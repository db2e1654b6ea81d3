"""The catalog: every mechanism with its formula, its cost for a shape of the reader's choice, and how to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from urllib.parse import urlencode

import gradio as gr

from attnlab.bundled import BUNDLED
from attnlab.views.sample_maps import sample_map
from attnlab.views.sample_pictures import sample_png
from attnlab_kernels.catalog import MECHANISMS, Mechanism, Parameter, validate_parameters
from attnlab_storage.database import Store
from attnlab_webui import drawing, pieces
from attnlab_webui.mechanism_facts import parameter_default, range_words
from attnlab_webui.pieces import escape

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
GROWTH = (1024, 8192, 65_536, 262_144)
SWAP_WORDS = {
    "exact": "exact swap",
    "approximate": "approximate swap",
    "not_applicable": "needs training",
}


@dataclass(frozen=True)
class Shape:
    """The model whose key-value cache is counted."""

    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    tokens: int = 8192
    dtype: str = "bfloat16"


class ShapeError(ValueError):
    """A shape that no model can have."""


def checked_shape(
    layers: float | None,
    heads: float | None,
    kv_heads: float | None,
    head_dim: float | None,
    tokens: float | None,
    dtype: str | None,
) -> Shape:
    """The shape in the fields; ShapeError names the first field that breaks its rule."""
    given = {"layers": layers, "heads": heads, "KV heads": kv_heads, "head size": head_dim, "tokens": tokens}
    numbers: list[int] = []
    for name, value in given.items():
        if value is None or not 1 <= value <= 10**9 or value != int(value):
            raise ShapeError(f"{name} must be a whole number from 1 to 1,000,000,000, got {value}")
        numbers.append(int(value))
    if numbers[1] % numbers[2]:
        raise ShapeError(f"KV heads must divide heads ({numbers[1]}), got {numbers[2]}")
    if dtype not in BYTES_PER_ELEMENT:
        raise ShapeError(f"dtype must be one of {', '.join(BYTES_PER_ELEMENT)}, got {dtype!r}")
    return Shape(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], dtype)


def cache_bytes(mechanism: Mechanism, shape: Shape) -> int:
    """Bytes of this mechanism's cache for the shape, with the default value of every parameter."""
    return mechanism.cache_bytes(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tokens=shape.tokens,
        layers=shape.layers,
        bytes_per_element=BYTES_PER_ELEMENT[shape.dtype],
        **validate_parameters(mechanism.id, {}),
    )


def catalog(shape: Shape) -> str:
    """All mechanisms as a list of rows that open."""
    sizes = {name: cache_bytes(mechanism, shape) for name, mechanism in MECHANISMS.items()}
    largest = max(sizes.values(), default=0) or 1
    rows = "".join(row(mechanism, sizes[name], largest, shape) for name, mechanism in MECHANISMS.items())
    head = (
        '<div class="at-mech-head"><span>Mechanism</span><span>Complexity</span>'
        f"<span>Cache, {escape(shape_words(shape))}</span><span>Swap into trained weights</span></div>"
    )
    return f'<div class="at-mech-list">{head}{rows}</div>'


def shape_words(shape: Shape) -> str:
    return f"{shape.tokens:,} tokens, {shape.dtype}"


def row(mechanism: Mechanism, size: int, largest: int, shape: Shape | None = None) -> str:
    complexity = escape(mechanism.complexity)
    year = f'<span class="at-muted"> {mechanism.year}</span>'
    return (
        f'<details class="at-mech" id="{escape(mechanism.id)}"><summary>'
        f"<span><b>{escape(mechanism.title)}</b>{year}</span>"
        f'<span class="at-mono at-clip" title="{complexity}">{complexity}</span>'
        f"<span>{bar(size, largest)}</span>"
        f"<span>{escape(SWAP_WORDS[mechanism.swap])}</span>"
        f"</summary>{detail(mechanism, shape or Shape())}</details>"
    )


def bar(size: int, largest: int) -> str:
    words = pieces.size_in_bytes(size) if size else "none"
    return (
        f'<span class="at-bar" aria-hidden="true"><span style="width:{100 * size / largest:.1f}%"></span></span>'
        f'<span class="at-number">{escape(words)}</span>'
    )


def detail(mechanism: Mechanism, shape: Shape) -> str:
    use = (
        f'<a class="at-button at-primary" href="/?{escape(urlencode({"mechanism": mechanism.id}))}">'
        "Use in an experiment</a>"
    )
    return (
        f'<div class="at-mech-body"><div>{picture(mechanism)}<p>{escape(mechanism.summary)}</p>'
        f'<pre class="at-formula">{escape(mechanism.formula)}</pre>'
        f"<h4>Complexity</h4><p>{escape(mechanism.complexity)}</p>"
        f"<h4>Cache of one sequence</h4><p>{escape(mechanism.cache_formula)}</p>{growth(mechanism, shape)}"
        f"<h4>Use it for</h4><ul>{items(mechanism.use_cases)}</ul>"
        f"<h4>Not for</h4><p>{escape(mechanism.not_for)}</p>"
        f"<h4>Swapping it in</h4><p>{escape(mechanism.swap_note)}</p>"
        f'<h4>Paper</h4><p>{escape(mechanism.paper_title)}<br><span class="at-mono at-select">'
        f"{escape(mechanism.paper_url)}</span></p></div>"
        f"<div>{parameter_table(mechanism.parameters)}"
        f'<h4>Python</h4><pre class="at-code">{escape(mechanism.snippet)}</pre><p>{use}</p></div></div>'
    )


def picture(mechanism: Mechanism) -> str:
    """The mechanism's map on the input that all share; what is masked shows the ground."""
    made = sample_map(mechanism.id)
    queries, keys = made.weights.shape
    words = f"{made.words}. Rows are {queries} queries, columns {keys} keys; brighter is more (square root)."
    return (
        f'<figure class="at-sample"><img src="{sample_png(mechanism.id)}" alt="attention map of '
        f'{escape(mechanism.title)}" width="{3 * keys}" height="{3 * queries}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def growth(mechanism: Mechanism, shape: Shape) -> str:
    """How the cache grows with the tokens, for the shape in the fields."""
    if not cache_bytes(mechanism, shape):
        return ""
    sizes = [(tokens, cache_bytes(mechanism, replace(shape, tokens=tokens))) for tokens in GROWTH]
    cells = "".join(
        f"<span>{tokens // 1024}K<b>{escape(pieces.size_in_bytes(size))}</b></span>" for tokens, size in sizes
    )
    return f'<div class="at-growth">{cells}</div>'


def items(texts: tuple[str, ...]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def parameter_table(parameters: tuple[Parameter, ...]) -> str:
    if not parameters:
        return '<h4>Parameters</h4><p class="at-muted">None beyond the model\'s own shape.</p>'
    rows = [(item.name, parameter_default(item), range_words(item), item.help) for item in parameters]
    return "<h4>Parameters</h4>" + pieces.table(("parameter", "default", "may be", "what it does"), rows)


def show_catalog(*fields: float | str | None) -> str:
    """The list for the shape in the fields, or what is wrong with the shape."""
    try:
        return catalog(checked_shape(*fields))  # type: ignore[arg-type]
    except ShapeError as problem:
        return pieces.notice(str(problem), "error")


def shapes() -> dict[str, list[int]]:
    """Bundled model -> its layers, heads, KV heads, head size and context."""
    return {
        name: [model.layers, model.heads, model.kv_heads, model.head_dim, model.context]
        for name, model in BUNDLED.items()
    }


OPENING = """
const opened = new Set();
const reopen = () => {
  for (const item of element.querySelectorAll('details.at-mech')) item.open = opened.has(item.id);
};
element.addEventListener('toggle', (event) => {
  if (!event.target.isConnected) return;
  event.target.open ? opened.add(event.target.id) : opened.delete(event.target.id);
}, true);
const wanted = decodeURIComponent(location.hash.slice(1));
if (wanted) { opened.add(wanted); reopen(); document.getElementById(wanted)?.scrollIntoView(); }
watch('value', () => requestAnimationFrame(reopen));
"""


def build(store: Store) -> None:
    """Create the page; it needs nothing from the store."""
    del store
    start = Shape()
    pieces.navigation("mechanisms")
    with gr.Row(elem_classes="at-fields"):
        model = gr.Dropdown(list(BUNDLED), value="smollm2-135m", label="Shape of", min_width=160)
        layers = gr.Number(start.layers, label="Layers", precision=0, minimum=1, min_width=80)
        heads = gr.Number(start.heads, label="Heads", precision=0, minimum=1, min_width=80)
        kv_heads = gr.Number(start.kv_heads, label="KV heads", precision=0, minimum=1, min_width=80)
        head_dim = gr.Number(start.head_dim, label="Head size", precision=0, minimum=1, min_width=80)
        tokens = gr.Number(start.tokens, label="Tokens", precision=0, minimum=1, min_width=100)
        dtype = gr.Dropdown(list(BYTES_PER_ELEMENT), value=start.dtype, label="Cache dtype", min_width=110)
    listing = gr.HTML(catalog(start), js_on_load=OPENING, apply_default_css=False, elem_id="mechanisms")

    fields = [layers, heads, kv_heads, head_dim, tokens, dtype]
    # in the browser: an answer on its way would take back what is typed after it
    model.input(None, model, fields[:5], js=f"(name) => ({json.dumps(shapes())})[name]")
    gr.on([field.change for field in fields], show_catalog, fields, listing, **drawing.LATEST)
