// How the weights become colours: scale, pooling, normalising, clipping, colour map.

import { CHOICES } from "./state.js";

const FIELDS = [
  ["scale", "scale", { log: "logarithmic", linear: "linear" }, "how weights become colours"],
  ["reduce", "pooling", { max: "maximum", mean: "mean" }, "what one pixel shows when it covers several cells"],
  ["norm", "normalise", { none: "as is", row: "each row to its maximum" }, "per-row: every query uses the whole scale"],
  ["clip", "clip at", { 100: "the maximum", 99.9: "99.9 %", 99: "99 %", 95: "95 %" }, "where the last colour begins"],
  ["colours", "colours", { auto: "automatic", paper: "paper", viridis: "viridis", magma: "magma" }, "colour map"],
];

export class Options {
  constructor(root, state) {
    this.state = state;
    root.classList.add("at-options");
    this.selects = {};
    for (const [name, label, words, help] of FIELDS) {
      const row = document.createElement("label");
      row.title = help;
      const word = document.createElement("span");
      word.textContent = label;
      const select = document.createElement("select");
      select.name = name;
      for (const choice of CHOICES[name]) select.append(new Option(words[choice], String(choice)));
      select.addEventListener("change", () => {
        state.set({ [name]: CHOICES[name].find((choice) => String(choice) === select.value) });
      });
      row.append(word, select);
      root.append(row);
      this.selects[name] = select;
    }
    this.show();
  }

  show() {
    for (const [name, select] of Object.entries(this.selects)) select.value = String(this.state.get(name));
  }
}
