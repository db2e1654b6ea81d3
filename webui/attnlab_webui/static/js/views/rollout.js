// Through all layers: where a position takes its input from, by rollout or by maximum flow, or all positions at once.

import { indexOf, makeScale, precise } from "../colour.js";
import { onTheme } from "../dark.js";
import { showFiles } from "../files.js";
import { readInk } from "../ink.js";
import { button, element } from "../make.js";
import { ApiError, getWorkedOut, post } from "../request.js";
import { TokenText, topList } from "../token_text.js";
import { Waiting } from "./waiting.js";

const DECADES = 4;
const AROUND = 1024; // tokens of the text that stand in the page, up to the chosen one
const MOST_FLOW = 96;
const LEFT = 46; // room for the names of the rows of the picture
const LETTER = 10;
const WAYS = { rollout: "rollout", flow: "maximum flow", all: "all positions" };
const WORDS = {
  rollout: "Shares are multiplied from layer to layer: R = A~ of the last layer times … times A~ of the first, A~ = (1 − r) mean of heads + r I.",
  flow: "Every weight is the capacity of an edge; shown is the maximum flow from the position at the top to each token at the bottom, in colours from the least to the most.",
  all: "The rollout of all positions: a row is the mean of some neighbouring positions. Click a row to see a position of it.",
};
const SOURCE = " Abnar and Zuidema 2020, arXiv 2005.00928.";

// Leaving it lets the server's work go on, for whoever comes back.
export class Rollout extends Waiting {
  constructor(root, run) {
    super(root, run);
    root.className = "at-view at-rollout-view";
    root.innerHTML =
      '<div class="at-view-bar"><span role="radiogroup" aria-label="way" class="at-switch"></span>' +
      '<label class="at-of-one">position <input type="number" name="token" min="0" step="1"><b></b></label>' +
      '<label class="at-of-flow">tokens from <input type="number" name="from" min="0" step="1"></label>' +
      '<label>residual share <input type="range" name="residual" min="0" max="0.95" step="0.05"><output class="at-number"></output></label>' +
      '<label>scale <select name="scale"><option value="log">logarithmic</option><option value="linear">linear</option></select></label>' +
      '<label>colours <select name="sink"><option value="without">up to the largest but the first token</option>' +
      '<option value="with">up to the largest</option></select></label></div>' +
      '<p class="at-complaint" role="alert" hidden></p><p class="at-hint" data-part="words"></p>' +
      '<div class="at-token-body"><div><div class="at-layers-place"><canvas class="at-layers" role="img"></canvas>' +
      '<div class="at-veil" hidden><span role="status"></span> <button type="button">Cancel</button></div></div>' +
      '<div data-part="text" aria-label="tokens; arrow keys choose another position"></div></div>' +
      '<aside class="at-side"><section class="at-readout" aria-live="polite"></section><section data-part="top"></section><section data-part="files" hidden></section></aside></div>';
    this.find = (name) => root.querySelector(name);
    this.canvas = this.find("canvas");
    this.text = new TokenText(this.find('[data-part="text"]'), {
      click: (at) => this.state.go({ token: at }),
      over: (at) => this.say(at),
      key: (event) => this.onKey(event),
    });
    this.ways = Object.entries(WAYS).map(([name, words]) => {
      const made = button(words, "", () => this.state.go({ through: name }));
      made.setAttribute("role", "radio");
      made.dataset.way = name;
      return made;
    });
    this.find(".at-switch").append(...this.ways);
    this.wire();
    this.ready = this.reload();
  }

  wire() {
    const box = (name, set) => this.find(`[name="${name}"]`).addEventListener("change", (event) => set(event.target.value));
    box("token", (value) => this.choose(Number.parseInt(value, 10)));
    box("from", (value) => this.setFrom(Number.parseInt(value, 10)));
    box("residual", (value) => this.state.set({ residual: Number(value) }));
    box("sink", (value) => this.state.set({ sink: value }));
    box("scale", (value) => this.state.set({ scale: value }));
    this.find(".at-veil button").addEventListener("click", () => this.giveUp());
    this.canvas.addEventListener("pointermove", (event) => this.onPoint(event));
    this.canvas.addEventListener("pointerleave", () => this.say(null));
    this.canvas.addEventListener("click", (event) => this.onPick(event));
    const resized = new ResizeObserver(() => this.drawLayers());
    resized.observe(this.canvas.parentElement);
    this.detach = [
      this.state.listen((changed) => this.onState(changed)),
      onTheme(() => this.draw()),
      () => resized.disconnect(),
    ];
  }

  // ---- what is asked for

  get size() {
    return this.run.source.layer.queries;
  }

  get row() {
    return Math.min(this.state.get("token") ?? this.size - 1, this.size - 1);
  }

  get way() {
    return this.state.get("through");
  }

  // Whether later tokens can have a share: where a layer looks ahead.
  get ahead() {
    return this.run.facts.layers.some(({ grows }) => !grows);
  }

  // The tokens that a flow may reach: from the one in the address, or as many as there can be.
  get flowSpan() {
    const last = this.ahead ? this.size : this.row + 1;
    const from = Math.min(this.state.get("from") ?? 0, this.row);
    const start = Math.max(from, this.row + 1 - MOST_FLOW);
    return [start, Math.min(last, start + MOST_FLOW)];
  }

  choose(row) {
    if (row >= 0) this.state.set({ token: Math.min(row, this.size - 1) });
  }

  setFrom(from) {
    this.state.set({ from: from > 0 ? from : null });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = {
      ArrowLeft: this.row - 1,
      ArrowRight: this.row + 1,
      ArrowUp: this.text.overLine(-1),
      ArrowDown: this.text.overLine(1),
      Home: 0,
      End: this.size - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to !== null && to >= 0 && to < this.size) this.choose(to);
  }

  onState(changed) {
    if (changed.some((name) => ["through", "token", "residual", "from"].includes(name))) this.reload();
    else if (changed.some((name) => ["scale", "colours", "sink"].includes(name))) {
      this.mark();
      this.draw();
    }
  }

  // What is asked for, and the address that stops the server's work on it.
  path(of = "") {
    const residual = this.state.get("residual");
    if (this.way === "all") return this.run.path(`rollout${of}`, { residual });
    if (this.way === "rollout") return this.run.path(`rollout${of}`, { row: this.row, residual });
    return this.run.path(`flow${of}`, { row: this.row, tokens: this.flowSpan.join(":"), residual });
  }

  async load() {
    await this.request();
    this.show();
  }

  async reload() {
    this.mark();
    try {
      await this.load();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.wanted = null;
      this.wait(null);
      this.document = null;
      this.complain(error.message);
      this.showNothing();
      if (!(error instanceof ApiError)) throw error;
    }
  }

  // Stops the work that is waited for: somebody wants something else now, or nothing.
  async stopWork() {
    if (!this.working) return;
    this.wanted?.abort();
    this.wanted = null;
    const path = this.working;
    this.working = null;
    await post(path).catch(() => {}); // it may be finished, or the server gone: either way nothing is waited for
  }

  async giveUp() {
    const waiting = this.stopWork();
    this.wait(null);
    this.document = null;
    this.showNothing();
    this.complain("Given up. Choose a position, a way or another residual share to begin again.");
    await waiting;
  }

  async request() {
    this.asked = true;
    this.stopWork();
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    const { way } = this;
    this.mark();
    const [path, stop] = [this.path(), this.path("/cancel")];
    let found = this.run.cache.get(path);
    found ??= await getWorkedOut(path, controller.signal, (done) => {
      if (this.wanted === controller) this.working = stop;
      this.wait(done);
    });
    if (this.wanted !== controller) throw new DOMException("something else is wanted", "AbortError");
    this.run.cache.put(path, found);
    this.wanted = this.working = null;
    this.document = found;
    this.shownWay = way;
    this.wait(null);
    this.complain("");
  }

  wait(done) {
    const veil = this.find(".at-veil");
    veil.hidden = done === null;
    if (done !== null) veil.firstElementChild.textContent = `Working through the layers: ${Math.round(done * 100)} %`;
  }

  // ---- drawing

  mark() {
    for (const made of this.ways) {
      const chosen = made.dataset.way === this.way;
      made.setAttribute("aria-checked", String(chosen));
      made.setAttribute("aria-pressed", String(chosen));
    }
    this.find(".at-of-one").hidden = this.way === "all";
    this.find(".at-of-flow").hidden = this.way !== "flow";
    this.find('[name="scale"]').parentElement.hidden = this.way === "flow";
    this.find('[data-part="words"]').textContent = WORDS[this.way] + SOURCE;
    const fill = (name, value) => {
      const box = this.find(`[name="${name}"]`);
      if (box !== document.activeElement || box.type === "range") box.value = value; // nobody's typing is overwritten
    };
    fill("token", this.row);
    fill("from", this.flowSpan[0]);
    fill("residual", this.state.get("residual"));
    fill("scale", this.state.get("scale"));
    fill("sink", this.state.get("sink"));
    this.find('[name="residual"] + output').textContent = this.state.get("residual").toFixed(2);
    this.find(".at-of-one b").textContent = this.label(this.row);
  }

  label(at) {
    return this.run.source.labels().query?.[at] ?? `position ${at}`;
  }

  // Flows lie close together, so that their colours run from the least to the most.
  get scale() {
    const { shares, values, start = 0 } = this.document;
    const first = start === 0 && this.state.get("sink") === "without" ? 1 : 0;
    let [low, top] = [Infinity, 0];
    for (const line of values ?? [shares]) {
      for (let i = first; i < line.length; i++) {
        if (line[i] > top) top = line[i];
        if (line[i] < low) low = line[i];
      }
    }
    if (this.shownWay !== "flow") return makeScale({ kind: this.state.get("scale"), top, decades: DECADES });
    return { kind: "linear", top, floor: low, signed: false, unit: (value) => (value - low) / (top - low || 1) };
  }

  show() {
    if (this.stopped) return;
    const { start = 0, shares, top } = this.document;
    this.find('[data-part="text"]').hidden = !shares;
    this.find('[data-part="top"]').hidden = !top;
    this.find(".at-layers-place").classList.toggle("at-empty-layers", !this.document.values);
    if (shares) {
      const stop = this.ahead ? start + shares.length : this.row + 1;
      const first = Math.max(start, Math.min(this.row + 1 - AROUND, this.row));
      this.first = first;
      const labels = Array.from({ length: Math.min(stop - first, AROUND) }, (_, i) => this.label(first + i));
      this.text.write(labels, first, "text");
      const words = this.shownWay === "flow" ? "most flow to" : "largest shares";
      topList(this.find('[data-part="top"]'), words, top, (at) => this.label(at), (at) => this.state.go({ token: at }));
    }
    this.draw();
    this.text.reveal();
  }

  // What could not be worked out leaves no picture of something else behind.
  showNothing() {
    this.find('[data-part="text"]').hidden = true;
    this.find('[data-part="top"]').hidden = true;
    this.find('[data-part="files"]').hidden = true;
    this.find(".at-layers-place").classList.add("at-empty-layers");
    this.say(null);
  }

  draw() {
    if (!this.document || this.stopped) return;
    const { shares, start = 0 } = this.document;
    const { colours } = this.run.table(false);
    if (shares) this.text.paint(shares.slice(this.first - start), this.scale, colours, this.row);
    this.drawLayers();
    this.say(null);
    this.showFiles();
  }

  showFiles() {
    const place = this.find('[data-part="files"]');
    place.hidden = false;
    const tokens = this.shownWay === "flow" ? this.flowSpan.join(":") : null;
    const { residual, sink } = this.state.values;
    const all = this.shownWay === "all";
    const fields = { token: all ? null : this.row, through: this.shownWay, tokens, residual, sink };
    showFiles(place, this.run, fields, "rollout/", all ? ["npz", "parquet"] : []);
    place.querySelector(".at-label").textContent = all ? "all positions" : "this text";
  }

  // The picture: layers over tokens from the position itself down to the input, or positions over tokens.
  drawLayers() {
    const { values, columns, rows } = this.document ?? {};
    if (!values) return;
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const pitch = Math.round(rows ? Math.max(4, Math.min(8, 400 / values.length)) : Math.max(7, Math.min(16, 300 / values.length)));
    const height = pitch * values.length + 18;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const ink = readInk(this.root);
    const { scale } = this;
    const { colours } = this.run.table(false);
    const size = columns.at(-1);
    this.plot = { pitch, width: width - LEFT, size };
    context.clearRect(0, 0, width, height);
    values.forEach((line, y) => {
      line.forEach((value, i) => {
        const at = indexOf(scale, value) * 3;
        context.fillStyle = value > 0 ? `rgb(${colours[at]},${colours[at + 1]},${colours[at + 2]})` : ink.empty;
        const [x, to] = [columns[i], columns[i + 1]].map((edge) => Math.round((LEFT + (edge * this.plot.width) / size) * ratio) / ratio);
        context.fillRect(x, y * pitch, Math.max(0.6, to - x), pitch - (rows ? 0 : 1));
      });
    });
    context.fillStyle = ink.muted;
    context.font = `${LETTER}px ${ink.mono}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / pitch);
    values.forEach((_, y) => {
      if (y % every === 0 || (!rows && y === values.length - 1)) context.fillText(this.lineName(y, true), LEFT - 5, Math.max(LETTER / 2, (y + 0.5) * pitch));
    });
    context.textAlign = "left";
    context.fillText("0", LEFT, height - 7);
    context.textAlign = "right";
    context.fillText(`token ${size - 1}`, width, height - 7);
    this.canvas.setAttribute("aria-label", rows ? "rollout of all positions over the tokens" : "shares of the tokens, layer by layer");
  }

  lineName(y, brief = false) {
    const { rows, layers } = this.document;
    if (rows) return brief ? String(rows[y][0]) : `positions ${rows[y][0]}–${rows[y][1] - 1}`;
    if (y === 0) return brief ? "top" : "the position itself";
    return brief ? `L${layers[y - 1]}` : `below layer ${layers[y - 1]}`;
  }

  // [line, column] of the picture under the pointer, or null
  cellAt(event) {
    const { values, columns } = this.document ?? {};
    if (!values || !this.plot) return null;
    const token = ((event.offsetX - LEFT) / this.plot.width) * this.plot.size;
    const line = Math.floor(event.offsetY / this.plot.pitch);
    if (token < 0 || token >= this.plot.size || line < 0 || line >= values.length) return null;
    return [line, columns.findLastIndex((edge) => edge <= token)];
  }

  onPoint(event) {
    const cell = this.cellAt(event);
    if (!cell) return this.say(null);
    const [line, i] = cell;
    const { values, columns } = this.document;
    const [from, to] = [columns[i], columns[i + 1] - 1];
    const tokens = from === to ? `${this.label(from)} (${from})` : `tokens ${from}–${to}`;
    return this.read([this.lineName(line)], [element("b", "", tokens)], ["share ", element("b", "", precise(values[line][i]))]);
  }

  onPick(event) {
    const cell = this.cellAt(event);
    if (!cell) return;
    const { rows, columns } = this.document;
    if (rows) this.state.go({ through: "rollout", token: rows[cell[0]][1] - 1 });
    else this.state.go({ token: columns[cell[1]] });
  }

  say(at) {
    const { shares, start = 0, inside, error } = this.document ?? {};
    if (at !== null && shares) {
      const word = this.shownWay === "flow" ? "flow " : "share ";
      this.read([element("b", "", this.label(at)), ` (${at})`], [word, element("b", "", precise(shares[at - start] ?? 0))]);
    } else if (this.shownWay === "flow" && inside) {
      const least = Math.min(...inside);
      this.read(
        [`tokens ${start}–${start + shares.length - 1}`],
        ["weights inside ", element("b", "", `${(100 * least).toFixed(1)} % or more`)],
        ["error at most ", element("b", "", error.toExponential(1))],
      );
    } else this.read(["Point at the picture or at a token."]);
  }

  read(...lines) {
    const made = lines.map((parts) => {
      const line = element("div", "at-read");
      line.append(...parts);
      return line;
    });
    this.find(".at-readout").replaceChildren(...made);
  }

  get loaded() {
    return this.asked === true;
  }
}
