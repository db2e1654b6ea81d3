// The runs of an experiment: a click chooses one, the check boxes make the link to the comparison.

import { choose } from "./address.js";

const MOST = 16;

export function mount(element, trigger, watch) {
  const checked = new Set();

  const settle = () => {
    for (const box of element.querySelectorAll("[data-check]")) box.checked = checked.has(box.dataset.check);
    const link = element.querySelector("[data-compare]");
    if (!link) return;
    link.hidden = checked.size === 0;
    const ready = checked.size > 1 && checked.size <= MOST;
    link.textContent = ready ? `Compare ${checked.size} runs` : checked.size > MOST ? `At most ${MOST} runs` : "Check one more run to compare";
    if (ready) link.href = `/compare?runs=${[...checked].join(",")}`;
    else link.removeAttribute("href");
  };

  element.addEventListener("change", (event) => {
    const box = event.target.closest("[data-check]");
    if (!box) return;
    if (box.checked) checked.add(box.dataset.check);
    else checked.delete(box.dataset.check);
    settle();
  });

  element.addEventListener("click", (event) => {
    if (event.target.closest("input, [data-compare]") || event.ctrlKey || event.metaKey) return;
    const row = event.target.closest("[data-run]");
    if (!row) return;
    event.preventDefault();
    choose({ run: row.dataset.run });
    trigger("select", { index: 0, value: row.dataset.run, run: row.dataset.run });
  });

  watch("value", settle);
  settle();
}
