// Tokens of a text with a number each, as the colour behind them; the chosen one has a frame.

import { indexOf, inkOn, precise } from "./colour.js";
import { element } from "./make.js";

export class TokenText {
  // click(at), over(at or null), key(event)
  constructor(root, { click, over, key }) {
    this.root = root;
    root.classList.add("at-text");
    root.tabIndex = 0;
    root.setAttribute("role", "listbox");
    const place = (event) => {
      const token = event.target.closest?.(".at-token");
      return token ? Number(token.dataset.at) : null;
    };
    root.addEventListener("click", (event) => place(event) !== null && click(place(event)));
    root.addEventListener("pointerover", (event) => over(place(event)));
    root.addEventListener("pointerleave", () => over(null));
    root.addEventListener("keydown", key);
  }

  // Puts the tokens of a stretch into the page; key says when they are other ones.
  write(labels, start, key) {
    const all = [key, start, labels.length].join();
    if (all === this.written) return;
    this.written = all;
    this.start = start;
    this.labels = labels;
    this.root.classList.toggle("at-gapped", !labels.some((label) => /^[·⏎]/.test(label)));
    const made = [];
    labels.forEach((label, i) => {
      const token = element("span", "at-token", label.replace(/^·(?=.)/, " "));
      token.dataset.at = start + i;
      token.id = `at-token-${start + i}`;
      token.setAttribute("role", "option");
      made.push(token);
      if (label.endsWith("⏎")) made.push(document.createElement("br"));
    });
    this.root.replaceChildren(...made);
  }

  // weights: one for each token that was written, null where there can be none; place: the chosen position or null
  paint(weights, scale, colours, place) {
    for (const token of this.root.querySelectorAll(".at-token")) {
      const at = Number(token.dataset.at);
      const weight = weights[at - this.start];
      const index = weight === null ? -1 : indexOf(scale, weight) * 3;
      const colour = index < 0 ? null : [...colours.subarray(index, index + 3)];
      token.classList.toggle("at-masked", colour === null);
      token.style.background = colour ? `rgb(${colour.join()})` : "";
      token.style.color = colour ? inkOn(...colour) : "";
      token.title = `${this.labels[at - this.start]} (${at}): ${weight === null ? "masked" : precise(weight)}`;
      token.setAttribute("aria-selected", String(at === place));
    }
    const chosen = this.chosen;
    if (chosen) this.root.setAttribute("aria-activedescendant", chosen.id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  get chosen() {
    return this.root.querySelector('[aria-selected="true"]');
  }

  reveal() {
    const { chosen, root } = this;
    if (!chosen) return;
    const [top, bottom] = [chosen.offsetTop, chosen.offsetTop + chosen.offsetHeight];
    if (top < root.scrollTop) root.scrollTop = top - 8;
    else if (bottom > root.scrollTop + root.clientHeight) root.scrollTop = bottom - root.clientHeight + 8;
  }

  // The position on the line above (-1) or below (1) the chosen one that is nearest to it, or null.
  overLine(by) {
    const here = this.chosen;
    if (!here) return null;
    const middle = (token) => token.offsetLeft + token.offsetWidth / 2;
    const beyond = [...this.root.querySelectorAll(".at-token")].filter((token) => Math.sign(token.offsetTop - here.offsetTop) === by);
    const tops = beyond.map((token) => token.offsetTop);
    const line = by > 0 ? Math.min(...tops) : Math.max(...tops);
    const near = (token) => Math.abs(middle(token) - middle(here));
    const found = beyond.filter((token) => token.offsetTop === line).sort((a, b) => near(a) - near(b))[0];
    return found ? Number(found.dataset.at) : null;
  }
}

// The largest weights as lines with a bar each. entries: [[at, weight]]; go(at), or null where a line leads nowhere
export function topList(place, title, entries, label, go) {
  place.replaceChildren(element("h3", "", title));
  const top = entries[0]?.[1] || 1;
  for (const [at, weight] of entries) {
    const line = element("button", "at-top-line");
    line.type = "button";
    line.title = `${label(at)} (${at})`;
    line.disabled = go === null;
    if (go) line.addEventListener("click", () => go(at));
    const bar = element("i", "at-top-bar");
    bar.style.width = `${100 * Math.abs(weight / top)}%`;
    line.append(bar, element("b", "", label(at)), element("span", "", String(at)), element("span", "at-number", brief(weight)));
    place.append(line);
  }
}

function brief(weight) {
  return Math.abs(weight) >= 0.001 ? weight.toPrecision(3) : weight.toExponential(1);
}
