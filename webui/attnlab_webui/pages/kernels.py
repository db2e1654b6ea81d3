"""Kernels: registers, spills and instructions of every Triton kernel for cards that need not be here."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attnlab_storage.database import Store
from attnlab_webui import drawing, kernel_view, pieces
from attnlab_webui.kernel_view import ANY, CARDS

DTYPES = (ANY, "bf16", "fp32")
# rows are sorted in the browser, and stay sorted when a filter brings other rows
SORTING = """
let column = null, rising = true;
const arrange = () => {
  const body = element.querySelector('tbody');
  if (column === null || !body) return;
  const button = element.querySelector(`button[data-column="${column}"]`);
  const numeric = button.dataset.number === '1';
  const value = (row) => row.children[column]?.dataset.value ?? '';
  const order = (a, b) => numeric ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b));
  const rows = [...body.children].sort((a, b) => (rising ? 1 : -1) * order(a, b));
  body.replaceChildren(...rows);
  for (const head of element.querySelectorAll('th')) head.setAttribute('aria-sort', 'none');
  button.closest('th').setAttribute('aria-sort', rising ? 'ascending' : 'descending');
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.at-sort');
  if (!button) return;
  rising = column === button.dataset.column ? !rising : true;
  column = button.dataset.column;
  arrange();
});
watch('value', () => requestAnimationFrame(arrange));
"""


def build(store: Store) -> None:
    """Create the page; it needs nothing from the store."""
    del store
    pieces.navigation("kernels")
    with gr.Row(elem_classes="at-fields"):
        card = gr.Dropdown(
            [ANY, *CARDS.values()], value=ANY, label="Card", min_width=140, elem_id="kernels-card"
        )
        operation = gr.Dropdown(
            [ANY], value=ANY, label="Operation", min_width=160, elem_id="kernels-operation"
        )
        dtype = gr.Dropdown(list(DTYPES), value=ANY, label="dtype", min_width=90, elem_id="kernels-dtype")
        words = gr.Textbox(
            label="Name or form has",
            placeholder="gradient D 128",
            max_lines=1,
            min_width=160,
            elem_id="kernels-words",
        )
        spilling = gr.Checkbox(label="only with spills", min_width=130, elem_id="kernels-spilling")
    head = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="kernels-head")
    table = gr.HTML(js_on_load=SORTING, apply_default_css=False, elem_id="kernels-table")
    filters = [card, operation, dtype, words, spilling]
    changes = [part.change for part in filters]
    gr.on([pieces.page().load, *changes], show, filters, [head, table], **drawing.LATEST)
    pieces.page().load(offer_operations, None, operation, **pieces.INTERNAL)


def offer_operations() -> Any:
    """The operations that there are kernels of."""
    return gr.update(choices=kernel_view.operations(kernel_view.read_panel()))


def show(card: str, operation: str, dtype: str, words: str, spilling: bool) -> tuple[str, str]:
    """Summary and table of the rows that the filters keep."""
    panel = kernel_view.read_panel()
    rows = kernel_view.chosen(panel, card, operation, dtype, words or "", spilling)
    return kernel_view.summary(panel, rows), kernel_view.table(rows)
