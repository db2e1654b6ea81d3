// The two-column head view: a line for each weight between the tokens of a short range, a colour for each head.

import { precise } from "../colour.js";
import { onTheme } from "../dark.js";
import { showFiles } from "../files.js";
import { headColours } from "../head_colours.js";
import { readInk } from "../ink.js";
import { drawLines } from "../line_picture.js";
import { button, element } from "../make.js";
import { ApiError, getTile } from "../request.js";
import { Waiting } from "./waiting.js";

const MOST = 64; // tokens a side
const AT_FIRST = 32;
const PITCH = 20;

export class Lines extends Waiting {
  constructor(root, run) {
    super(root, run);
    this.held = null; // {side: "query" | "key", at}: the token that alone is shown
    this.hovered = null;
    root.className = "at-view at-lines-view";
    root.innerHTML =
      '<div class="at-view-bar"><output class="at-name" aria-live="polite"></output>' +
      '<label>layer <select name="layer"></select></label>' +
      '<span class="at-squares" role="group" aria-label="heads: a click adds or takes one, a double click shows it alone"></span>' +
      '<span class="at-all"></span></div>' +
      '<div class="at-view-bar"><span class="at-range" data-range="rows">queries </span><span class="at-range" data-range="cols">keys </span>' +
      '<span class="at-shifts"></span>' +
      '<label>weights from <input type="range" name="above" min="0" max="1" step="0.01"><output class="at-above at-number"></output></label></div>' +
      '<p class="at-complaint" role="alert" hidden></p>' +
      '<p class="at-hint" aria-live="polite"></p>' +
      '<div class="at-lines"><div class="at-column" data-side="query" role="listbox" aria-label="queries (from)"></div>' +
      '<canvas role="img"></canvas>' +
      '<div class="at-column" data-side="key" role="listbox" aria-label="keys (to)"></div></div>' +
      '<section data-part="files"></section>';
    this.find = (name) => root.querySelector(name);
    this.canvas = this.find("canvas");
    this.columns = { query: this.find('[data-side="query"]'), key: this.find('[data-side="key"]') };
    this.wire();
    this.ready = this.load();
  }

  wire() {
    const layer = this.find('[name="layer"]');
    for (const entry of this.run.facts.layers) layer.append(new Option(String(entry.layer), String(entry.layer)));
    layer.addEventListener("change", () => this.run.selection.select({ layer: Number(layer.value) }));
    const above = this.find('[name="above"]');
    above.addEventListener("input", () => this.state.set({ above: Number(above.value) }));
    for (const place of this.root.querySelectorAll("[data-range]")) this.makeRange(place);
    this.find(".at-shifts").append(
      button("‹", "earlier tokens", () => this.shift(-1)),
      button("›", "later tokens", () => this.shift(1)),
    );
    this.find(".at-all").append(
      button("All heads", "draw every head", () => this.state.set({ heads: "" })),
      button("Mean", "one line for the mean of all heads", () => this.state.set({ heads: "mean" })),
    );
    for (const [side, column] of Object.entries(this.columns)) {
      const tokenOf = (event) => event.target.closest?.(".at-line-token");
      column.addEventListener("pointerover", (event) => this.point(tokenOf(event), side));
      column.addEventListener("pointerleave", () => this.point(null, side));
      column.addEventListener("focusin", (event) => this.point(tokenOf(event), side));
      column.addEventListener("focusout", () => this.point(null, side));
      column.addEventListener("click", (event) => this.hold(tokenOf(event), side));
      column.addEventListener("keydown", (event) => this.onKey(event, side));
    }
    const resized = new ResizeObserver(() => this.draw());
    resized.observe(this.canvas);
    this.detach = [
      this.state.listen((changed) => this.onState(changed)),
      onTheme(() => this.show()),
      () => resized.disconnect(),
    ];
  }

  makeRange(place) {
    const name = place.dataset.range;
    const boxes = ["from", "to"].map((word) => {
      const box = element("input");
      box.type = "number";
      box.min = 0;
      box.setAttribute("aria-label", `${name === "rows" ? "queries" : "keys"} ${word}`);
      box.addEventListener("change", () => {
        this.setRange(name, boxes.map(({ value }) => Number.parseInt(value, 10) || 0));
        box.value = this.range(name)[boxes.indexOf(box)];
      });
      return box;
    });
    place.append(boxes[0], " to ", boxes[1]);
  }

  // ---- which tokens and heads

  // [from, to) of the rows or columns: what the address asks for, cut to what can be drawn.
  range(name) {
    const size = name === "rows" ? this.run.source.layer.queries : this.run.source.layer.keys;
    const [from, to] = this.state.get(name) ?? [0, Math.min(size, AT_FIRST)];
    const start = Math.max(0, Math.min(from, size - 1));
    return [start, Math.max(start + 1, Math.min(to, size, start + MOST))];
  }

  get square() {
    const { queries, keys } = this.run.source.layer;
    return queries === keys && !this.run.source.layer.columns;
  }

  // Over one text both columns move together as long as they show the same tokens.
  setRange(name, [from, to]) {
    const linked = this.square && this.range("rows").join() === this.range("cols").join();
    const { queries, keys } = this.run.source.layer;
    const size = name === "rows" ? queries : keys;
    const start = Math.max(0, Math.min(from, size - 1));
    const wanted = [start, Math.max(start + 1, Math.min(to, size))];
    this.state.set(linked ? { rows: wanted, cols: wanted } : { [name]: wanted });
  }

  shift(by) {
    const moved = (name) => {
      const size = name === "rows" ? this.run.source.layer.queries : this.run.source.layer.keys;
      const [from, to] = this.range(name);
      const length = to - from;
      const start = Math.max(0, Math.min(size - length, from + by * Math.ceil(length / 2)));
      return [start, start + length];
    };
    this.state.set({ rows: moved("rows"), cols: moved("cols") });
  }

  get isMean() {
    return this.state.get("heads") === "mean";
  }

  get heads() {
    const count = this.run.source.layer.heads;
    const all = Array.from({ length: count }, (_, head) => head);
    const list = this.state.get("heads");
    if (list === "" || list === "mean") return all;
    const wanted = list.split(",").map(Number);
    return all.filter((head) => wanted.includes(head));
  }

  toggle(head) {
    const shown = this.isMean ? [] : this.heads;
    const next = shown.includes(head) ? shown.filter((other) => other !== head) : [...shown, head].sort((a, b) => a - b);
    this.state.set({ heads: next.length === this.run.source.layer.heads || !next.length ? "" : next.join() });
  }

  // ---- data

  onState(changed) {
    if (changed.includes("layer")) this.run.selection.settle();
    if (changed.some((name) => ["layer", "rows", "cols"].includes(name))) this.reload();
    else if (changed.includes("heads") || changed.includes("above")) this.show();
  }

  async load() {
    await this.request();
    this.show();
  }

  async reload() {
    try {
      await this.load();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.wanted = null;
      this.complain(error.message);
      if (!(error instanceof ApiError)) throw error;
    }
  }

  async request() {
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    const [rows, cols] = [this.range("rows"), this.range("cols")];
    const { layer, heads } = this.run.source.layer;
    const path = this.run.path("heads", { layer, rows: rows.join(":"), cols: cols.join(":") });
    const found = await getTile(path, controller.signal);
    if (this.wanted !== controller) throw new DOMException("another range is wanted", "AbortError");
    this.wanted = null;
    this.tile = { heads, rows: rows[1] - rows[0], cols: cols[1] - cols[0], top: rows[0], left: cols[0], values: found.values };
    this.hovered = null;
    this.held = null;
    this.complain("");
  }

  weight(head, row, col) {
    return this.tile.values[(head * this.tile.rows + row) * this.tile.cols + col];
  }

  // Mean over all heads; NaN where no head allows the pair.
  average(row, col) {
    let [sum, known] = [0, false];
    for (let head = 0; head < this.tile.heads; head++) {
      const weight = this.weight(head, row, col);
      if (Number.isNaN(weight)) continue;
      sum += weight;
      known = true;
    }
    return known ? sum / this.tile.heads : Number.NaN;
  }

  // ---- pointing

  point(token, side) {
    this.hovered = token ? { side, at: Number(token.dataset.at) } : null;
    this.draw();
  }

  hold(token, side) {
    if (!token) return;
    const at = Number(token.dataset.at);
    this.held = this.held?.side === side && this.held.at === at ? null : { side, at };
    this.draw();
  }

  onKey(event, side) {
    if (event.key === "Escape") {
      this.held = null;
      this.draw();
      return;
    }
    const token = event.target.closest(".at-line-token");
    const column = [...this.columns[side].children];
    const at = column.indexOf(token);
    const other = this.columns[side === "query" ? "key" : "query"];
    const to = {
      ArrowUp: column[at - 1],
      ArrowDown: column[at + 1],
      Home: column[0],
      End: column.at(-1),
      ArrowLeft: side === "key" ? (other.children[at] ?? other.lastElementChild) : null,
      ArrowRight: side === "query" ? (other.children[at] ?? other.lastElementChild) : null,
    }[event.key];
    if (event.key === "Enter" || event.key === " ") this.hold(token, side);
    else if (!to) return;
    event.preventDefault();
    to?.focus();
  }

  // ---- drawing

  show() {
    if (!this.tile || this.stopped) return;
    const { layer, heads } = this.run.source.layer;
    this.find(".at-name").textContent = `L${layer}`;
    this.find('[name="layer"]').value = String(layer);
    this.find('[name="above"]').value = this.state.get("above");
    this.find(".at-above").textContent = this.state.get("above").toFixed(2);
    for (const place of this.root.querySelectorAll("[data-range]")) {
      const range = this.range(place.dataset.range);
      place.querySelectorAll("input").forEach((box, i) => {
        if (box !== document.activeElement) box.value = range[i]; // nobody's typing is overwritten
      });
    }
    this.showSquares(heads);
    const [all, mean] = this.find(".at-all").children;
    all.setAttribute("aria-pressed", String(this.state.get("heads") === ""));
    mean.setAttribute("aria-pressed", String(this.isMean));
    this.write();
    this.draw();
    this.showFiles();
  }

  showSquares(heads) {
    const place = this.find(".at-squares");
    if (place.children.length !== heads) {
      const squares = Array.from({ length: heads }, (_, head) => {
        const made = button(String(head), `head ${head}`, () => this.toggle(head));
        made.setAttribute("aria-label", `head ${head}`);
        made.addEventListener("dblclick", () => this.state.set({ heads: String(head) }));
        return made;
      });
      place.replaceChildren(...squares);
    }
    const shown = headColours(this.isMean ? [] : this.heads);
    const others = headColours(Array(heads).keys());
    [...place.children].forEach((square, head) => {
      square.setAttribute("aria-pressed", String(shown.has(head)));
      square.style.setProperty("--at-head", shown.get(head) ?? others.get(head));
    });
  }

  write() {
    const labels = this.run.source.labels();
    for (const [side, first, count] of [["query", this.tile.top, this.tile.rows], ["key", this.tile.left, this.tile.cols]]) {
      const key = [side, first, count, this.run.source.layer.layer].join();
      const column = this.columns[side];
      if (column.dataset.key === key) continue;
      column.dataset.key = key;
      const made = Array.from({ length: count }, (_, at) => {
        const token = element("div", "at-line-token");
        token.dataset.at = at;
        token.tabIndex = at === 0 ? 0 : -1;
        token.setAttribute("role", "option");
        const name = labels[side]?.[first + at] ?? `${side === "key" ? (labels.columns ?? "key") : "query"} ${first + at}`;
        token.title = `${name} (${first + at})`;
        token.append(element("span", "at-line-word", name), element("span", "at-line-number"));
        return token;
      });
      column.replaceChildren(...made);
    }
  }

  draw() {
    if (!this.tile || this.stopped) return;
    const { canvas, tile } = this;
    const only = this.hovered ?? this.held;
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = Math.max(tile.rows, tile.cols) * PITCH;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const drawn = this.isMean
      ? [{ head: 0, colour: readInk(this.root).accent }]
      : Array.from(headColours(this.heads), ([head, colour]) => ({ head, colour }));
    const seen = (row, col) => !only || (only.side === "query" ? row === only.at : col === only.at);
    const average = this.isMean ? (row, col) => this.average(row, col) : null;
    drawLines(context, { tile, drawn, above: this.state.get("above"), width, pitch: PITCH, only: seen, average });
    canvas.setAttribute("aria-label", `lines of ${this.isMean ? "the mean of all heads" : `${drawn.length} heads`} of layer ${this.run.source.layer.layer}`);
    this.mark(only);
  }

  showFiles() {
    const place = this.find('[data-part="files"]');
    const heads = this.isMean ? "mean" : this.heads.join();
    place.hidden = !heads;
    const [rows, cols] = [this.range("rows").join(":"), this.range("cols").join(":")];
    const { layer } = this.run.source.layer;
    showFiles(place, this.run, { layer, rows, cols, heads, above: this.state.get("above") }, "lines/");
  }

  // Of the token that is pointed at: the weights on the other side in numbers, the mean of the heads that are drawn.
  mark(only) {
    const heads = this.isMean ? null : this.heads;
    for (const [side, column] of Object.entries(this.columns)) {
      for (const token of column.children) {
        const at = Number(token.dataset.at);
        const number = token.querySelector(".at-line-number");
        const mine = only?.side === side && only.at === at;
        token.setAttribute("aria-selected", String(mine));
        const other = only && only.side !== side;
        const [row, col] = side === "key" ? [only?.at, at] : [at, only?.at];
        const weight = other ? this.shown(heads, row, col) : null;
        number.textContent = other ? (Number.isNaN(weight) ? "masked" : weight.toPrecision(3)) : "";
        token.style.setProperty("--at-share", other && weight > 0 ? Math.min(1, weight) : 0);
      }
    }
    const hint = this.root.querySelector("p.at-hint");
    if (!only) {
      hint.textContent = `Point at a token to see its lines alone; a click holds it. At most ${MOST} tokens a side.`;
      return;
    }
    const name = this.columns[only.side].children[only.at].title;
    const of = this.isMean ? "mean of all heads" : heads.length === 1 ? `head ${heads[0]}` : `mean of ${heads.length} heads`;
    const total = this.total(heads, only);
    hint.textContent = `${name} ${only.side === "query" ? "gives" : "receives"} ${precise(total)} here in all, ${of}${this.held ? " · held, Esc lets go" : ""}`;
  }

  shown(heads, row, col) {
    if (heads === null) return this.average(row, col);
    const weights = heads.map((head) => this.weight(head, row, col));
    const known = weights.filter((weight) => !Number.isNaN(weight));
    return known.length ? known.reduce((sum, weight) => sum + weight, 0) / heads.length : Number.NaN;
  }

  total(heads, { side, at }) {
    const count = side === "query" ? this.tile.cols : this.tile.rows;
    let sum = 0;
    for (let other = 0; other < count; other++) {
      const weight = side === "query" ? this.shown(heads, at, other) : this.shown(heads, other, at);
      if (!Number.isNaN(weight)) sum += weight;
    }
    return sum;
  }

  get loaded() {
    return this.tile;
  }
}
