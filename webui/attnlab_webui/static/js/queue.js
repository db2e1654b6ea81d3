// The queue's rows and buttons: what was clicked goes to the server as {do, run, shift, query}; the server draws.
// Gradio morphs the old HTML into the new, which keeps focus; what a morph does not touch is set in `settle`.

import { choose, click } from "./address.js";

export function mount(element, watch) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (!button) open(event);
    else if (button.dataset.do === "state") toggle(button.dataset.value);
    else send(button.dataset.do, Number(button.closest("[data-run]")?.dataset.run ?? 0), event.shiftKey);
  });
  element.addEventListener("auxclick", (event) => {
    if (event.button === 1) open(event);
  });
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") send("none");
  });
  watch("value", () => settle(element));
  settle(element);
}

function send(action, run = 0, shift = false) {
  click({ do: action, run, shift, query: window.location.search });
}

// The states to see stand in the address; "" is all of them.
function toggle(state) {
  const chosen = new Set((new URLSearchParams(window.location.search).get("state") ?? "").split(",").filter(Boolean));
  if (!chosen.delete(state)) chosen.add(state);
  choose({ state: state ? [...chosen].join(",") : null });
}

// A click anywhere in a row opens its run, unless it was on a control or ended a text selection.
function open(event) {
  const row = event.target.closest("tr[data-href]");
  if (!row || event.target.closest("a, button, input, label")) return;
  if (!window.getSelection().isCollapsed) return;
  if (event.ctrlKey || event.metaKey || event.button === 1) window.open(row.dataset.href, "_blank");
  else window.location.assign(row.dataset.href);
}

function settle(element) {
  for (const box of element.querySelectorAll("input[type=checkbox]")) {
    box.checked = box.hasAttribute("checked");
    box.indeterminate = box.dataset.some === "1";
  }
}
