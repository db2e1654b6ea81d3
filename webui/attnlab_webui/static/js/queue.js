// The queue's rows and buttons: what was clicked goes to the server as {do, value, run, shift}; the server draws.
// Gradio morphs the old HTML into the new, which keeps focus; what a morph does not touch is set in `settle`.

export function mount(element, trigger, watch) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) {
      trigger("select", payload(button, event));
      return;
    }
    open(event);
  });
  element.addEventListener("auxclick", (event) => {
    if (event.button === 1) open(event);
  });
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    trigger("select", { index: 0, value: "", do: "none", run: 0, shift: false });
  });
  watch("value", () => settle(element));
  settle(element);
}

function payload(button, event) {
  const row = button.closest("[data-run]");
  return {
    index: 0,
    value: button.dataset.value ?? "",
    do: button.dataset.do,
    run: row ? Number(row.dataset.run) : 0,
    shift: event.shiftKey,
  };
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
  const place = element.querySelector("[data-address]");
  if (place && window.location.pathname === "/queue") {
    const address = `/queue${place.dataset.address}`;
    if (address !== window.location.pathname + window.location.search) {
      window.history.replaceState(window.history.state, "", address);
    }
  }
}
