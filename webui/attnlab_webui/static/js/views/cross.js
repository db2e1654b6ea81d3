// What one sequence reads of another: text over sound, a decoder over its encoder, words over a picture's patches.

import { indexOf, inkOn, makeScale, paint, precise, short, topOf } from "../colour.js";
import { ColourBar } from "../colourbar.js";
import { GUTTER } from "../axes.js";
import { onTheme } from "../dark.js";
import { showFiles } from "../files.js";
import { hatch, readInk } from "../ink.js";
import { button, element } from "../make.js";
import { ApiError, getJson, getTile } from "../request.js";
import { Sheet } from "../sheet.js";
import { Thumbs } from "../thumbs.js";
import { Waiting } from "./waiting.js";

const SMALL = { height: 32, width: 96 };
const LARGE = { height: 512, width: 1024 };
const AFTER = 0.5; // seconds of silence that are shown behind the sound
const BODY =
  '<div class="at-view-bar"><span data-part="words"></span><label data-part="rest" hidden><input type="checkbox" name="rest"> ' +
  'the silence behind it</label><label>scale <select name="scale"><option value="linear">linear</option>' +
  '<option value="log">logarithmic</option></select></label><span data-part="open"></span></div>' +
  '<p class="at-complaint" role="alert" hidden></p>' +
  '<div class="at-cross-body"><div><div class="at-cross-heads" data-part="heads" role="group" aria-label="heads that read the other sequence"></div>' +
  '<figure><figcaption data-part="title"></figcaption><canvas data-part="wave" class="at-wave" aria-hidden="true" hidden></canvas>' +
  '<div data-part="map"></div></figure><div class="at-text at-said" data-part="said" aria-label="what is written, with its place"></div></div>' +
  '<aside class="at-side"><section data-part="bar"></section><section class="at-readout" data-part="read"></section>' +
  '<section data-part="top"></section><section class="at-hint" data-part="hint"></section><section data-part="files"></section></aside></div>';

export class Cross extends Waiting {
  constructor(root, run) {
    super(root, run);
    this.layers = run.facts.layers.filter(({ role }) => role === "cross");
    this.path = null;
    root.className = "at-view at-cross-view";
    root.innerHTML = BODY;
    this.find = (name) => root.querySelector(name);
    this.part = (name) => root.querySelector(`[data-part="${name}"]`);
    this.bar = new ColourBar(this.part("bar"), "");
    this.scale = this.find('[name="scale"]');
    this.scale.addEventListener("change", () => this.state.set({ scale: this.scale.value }));
    this.find('[name="rest"]').addEventListener("change", () => this.ask());
    this.part("open").append(button("Open the map", "this head alone, with zoom", () => this.openMap()));
    const told = { hover: (cell) => this.say(cell), pick: ({ row }) => this.choose(row), key: (event) => this.onKey(event) };
    this.sheet = new Sheet(this.part("map"), told);
    const pictures = { there: (key, tile) => this.drawHead(key, tile), failed: (key, message) => this.complain(message) };
    this.thumbs = new Thumbs(run, pictures, SMALL);
    const observer = new ResizeObserver(() => this.drawWave());
    observer.observe(this.part("wave"));
    this.detach = [
      this.state.listen((changed) => this.onState(changed)),
      onTheme(() => this.recolour()),
      () => observer.disconnect(),
    ];
    this.ready = this.load();
  }

  async load() {
    this.sound = await getJson(this.run.path("sound", {}));
    if (this.stopped) return;
    this.settle();
    this.makeHeads();
    const { queryTitle, keyTitle } = this.labels;
    this.part("words").textContent = `${queryTitle || "text"} → ${keyTitle || "other sequence"}`;
    this.part("rest").hidden = !this.sound.envelope;
    await this.ask();
  }

  settle() {
    const { layer, heads } = this.layer;
    this.state.set({ layer, head: Math.min(this.state.get("head"), heads - 1) });
  }

  get layer() {
    return this.layers.find(({ layer }) => layer === this.state.get("layer")) ?? this.layers[0];
  }

  get labels() {
    return this.run.source.labels();
  }

  get row() {
    const token = this.state.get("token");
    return token === null ? null : Math.min(token, this.layer.queries - 1);
  }

  // The keys that are shown: as far as the sound goes, where there is one.
  get columns() {
    const { seconds, seconds_per_position: step } = this.sound;
    const { keys } = this.layer;
    if (!seconds || !step || this.find('[name="rest"]').checked) return keys;
    return Math.min(keys, Math.ceil((seconds + AFTER) / step));
  }

  onState(changed) {
    if (changed.includes("layer") || changed.includes("head")) {
      this.settle();
      this.ask();
    } else if (changed.includes("token")) this.draw();
    else if (changed.includes("scale")) this.recolour();
  }

  choose(row) {
    this.state.set({ token: row === this.row ? null : row });
  }

  openMap() {
    this.state.go({ view: "map", rows: null, cols: this.columns < this.layer.keys ? [0, this.columns] : null });
  }

  onKey(event) {
    const last = this.layer.queries - 1;
    const row = { ArrowUp: (this.row ?? last + 1) - 1, ArrowDown: (this.row ?? -1) + 1, Home: 0, End: last }[event.key];
    const by = { "[": -1, "]": 1 }[event.key];
    if (row !== undefined) this.state.set({ token: Math.max(0, Math.min(last, row)) });
    else if (event.key === "Escape") this.state.set({ token: null });
    else if (by) this.stepHead(by);
    else return;
    event.preventDefault();
  }

  stepHead(by) {
    const chips = [...this.part("heads").querySelectorAll("button")];
    const at = chips.findIndex((chip) => chip.getAttribute("aria-pressed") === "true");
    chips[at + by]?.click();
  }

  // ---- all heads, small

  makeHeads() {
    const place = this.part("heads");
    this.chips = new Map();
    for (const { layer, heads } of this.layers) {
      const row = element("div", "at-cross-row");
      row.append(element("span", "at-grid-name", `L${layer}`));
      for (let head = 0; head < heads; head++) {
        const chip = button("", `L${layer}H${head}: click for the map below`, () => this.state.set({ layer, head }));
        chip.className = "at-cross-head";
        chip.setAttribute("aria-label", `layer ${layer} head ${head}`);
        const canvas = document.createElement("canvas");
        Object.assign(canvas, SMALL);
        chip.append(canvas);
        row.append(chip);
        const key = this.key(layer, head);
        this.chips.set(key, chip);
        this.thumbs.want(key);
      }
      place.append(row);
    }
  }

  key(layer, head) {
    return Thumbs.key(layer, head, "max");
  }

  drawHead(key, tile) {
    const canvas = this.chips.get(key).querySelector("canvas");
    const context = canvas.getContext("2d");
    const width = Math.max(1, Math.round((tile.width * this.columns) / this.layer.keys));
    const { signed } = this.layer;
    const scale = makeScale({ kind: this.state.get("scale"), top: topOf([tile], 100), signed });
    const small = document.createElement("canvas");
    small.width = tile.width;
    small.height = tile.height;
    small.getContext("2d").putImageData(paint(tile, scale, this.run.table(signed).colours), 0, 0);
    context.imageSmoothingEnabled = false;
    context.fillStyle = hatch(context, readInk(this.root));
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(small, 0, 0, width, tile.height, 0, 0, canvas.width, canvas.height);
  }

  recolour() {
    for (const [key, tile] of this.thumbs.known) this.drawHead(key, tile);
    this.draw();
  }

  // ---- the chosen head, large

  async ask() {
    const { layer, head } = this.state.values;
    const fields = { layer, head, cols: `0:${this.columns}`, ...LARGE, reduce: this.state.get("reduce") };
    const path = this.run.path("viewport", fields);
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    try {
      const [tile, { overlays }] = await Promise.all([
        this.run.cache.get(path) ?? getTile(path, controller.signal),
        getJson(this.run.path("overlays", { layer, head }), controller.signal),
      ]);
      if (controller.signal.aborted || this.stopped) return;
      this.run.cache.put(path, tile);
      this.line = overlays.find(({ name }) => name === "alignment")?.lines[0] ?? null;
      this.tile = tile;
      this.complain("");
      this.recolour();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.complain(error.message);
    } finally {
      if (this.wanted === controller) this.wanted = null;
    }
  }

  draw() {
    if (!this.tile) return;
    this.scale.value = this.state.get("scale");
    const { layer, head } = this.state.values;
    const { signed, queries } = this.layer;
    const scale = makeScale({ kind: this.state.get("scale"), top: topOf([this.tile], this.state.get("clip")), signed });
    const table = this.run.table(signed);
    this.bar.show(scale, table, signed ? "signed weight" : "weight", this.state.get("clip") < 100);
    this.look = { scale, table };
    for (const [key, chip] of this.chips) chip.setAttribute("aria-pressed", String(key === this.key(layer, head)));
    const title = this.run.source.title();
    this.part("title").textContent = title;
    this.part("hint").textContent = this.line ? "The line is the best path that only moves forwards, in this head alone." : "";
    this.part("map").style.setProperty("--at-rows", String(Math.min(queries, 40)));
    const window = { r0: 0, r1: queries, c0: 0, c1: this.columns };
    const lines = this.line ? [this.line] : [];
    this.sheet.show({ tile: this.tile, window, labels: this.labels, scale, table, row: this.row, lines, words: title });
    showFiles(this.part("files"), this.run, { layer, head, cols: `0:${this.columns}` });
    this.drawWave();
    this.drawSaid();
    this.say(this.sheet.cross);
  }

  // The loudness of the sound over its own columns.
  drawWave() {
    const canvas = this.part("wave");
    const { envelope, seconds, seconds_per_position: step } = this.sound ?? {};
    canvas.hidden = !envelope;
    if (!envelope || !this.tile || !canvas.clientWidth) return;
    const dpr = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * dpr);
    canvas.height = Math.round(canvas.clientHeight * dpr);
    const context = canvas.getContext("2d");
    context.scale(dpr, dpr);
    const [width, height] = [canvas.clientWidth - GUTTER.left - GUTTER.right, canvas.clientHeight];
    const top = Math.max(...envelope) || 1;
    const unit = (width * seconds) / (this.columns * step) / envelope.length;
    context.fillStyle = readInk(this.root).muted;
    envelope.forEach((loud, at) => {
      const size = Math.max(1, (loud / top) * height);
      context.fillRect(GUTTER.left + at * unit, (height - size) / 2, Math.max(0.5, unit * 0.8), size);
    });
  }

  // What is written, each token with the place that it reads most (on the line, where there is one).
  drawSaid() {
    const { query, key } = this.labels;
    const starts = new Map();
    for (const [row, col] of this.line ?? []) if (!starts.has(Math.floor(row))) starts.set(Math.floor(row), Math.floor(col));
    const chips = Array.from({ length: Math.min(this.layer.queries, 400) }, (_, row) => {
      const chip = element("span", "at-token");
      const at = starts.get(row) ?? this.mostOf(row);
      const place = document.createElement("small");
      place.textContent = at === null ? "—" : (key?.[at] ?? String(at));
      chip.append(query?.[row] ?? String(row), place);
      chip.classList.toggle("at-asked-token", row === this.row);
      chip.addEventListener("click", () => this.choose(row));
      return chip;
    });
    this.part("said").replaceChildren(...chips);
    this.showTop();
  }

  // Where a row of the tile is largest; null where it allows nothing.
  mostOf(row) {
    const { width, values, cols } = this.tile;
    let best = -1;
    for (let at = 0; at < width; at++) if (values[row * width + at] > (best < 0 ? 0 : values[row * width + best])) best = at;
    return best < 0 ? null : cols[0] + Math.floor(((best + 0.5) * (cols[1] - cols[0])) / width);
  }

  showTop() {
    const place = this.part("top");
    place.replaceChildren();
    if (this.row === null || this.tile.height !== this.layer.queries) return;
    const { width, values, cols } = this.tile;
    const weights = values.subarray(this.row * width, (this.row + 1) * width);
    const order = [...weights.keys()].filter((at) => weights[at]).sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]));
    place.append(element("div", "at-label", `most of "${this.labels.query?.[this.row] ?? this.row}"`));
    for (const at of order.slice(0, 8)) {
      const col = cols[0] + Math.floor((at * (cols[1] - cols[0])) / width);
      place.append(this.readLine(this.labels.key?.[col] ?? "position", col, weights[at]));
    }
  }

  readLine(name, at, weight) {
    const made = element("div", "at-read");
    const number = element("b", "at-chip", this.tile.exact ? precise(weight) : short(weight));
    const [r, g, b] = this.look.table.colours.subarray(indexOf(this.look.scale, weight) * 3, indexOf(this.look.scale, weight) * 3 + 3);
    number.style.background = `rgb(${r},${g},${b})`;
    number.style.color = inkOn(r, g, b);
    made.append(element("b", "", name), ` (${at}) `, number);
    return made;
  }

  say(cell) {
    const place = this.part("read");
    if (!cell || !this.tile) {
      place.replaceChildren(element("div", "at-read", "point at the map to read a weight"));
      return;
    }
    const value = this.sheet.valueAt(cell);
    const { query, key, keyTitle } = this.labels;
    const from = element("div", "at-read", "from ");
    from.append(element("b", "", query?.[cell.row] ?? "position"), ` (${cell.row})`);
    const to = element("div", "at-read", keyTitle ? `to ${keyTitle} ` : "to ");
    to.append(element("b", "", key?.[cell.col] ?? "position"), ` (${cell.col})`);
    const weight = element("div", "at-read at-weight", this.tile.exact ? "" : "at most ");
    weight.append(element("b", "", Number.isNaN(value) ? "masked" : precise(value)));
    place.replaceChildren(from, to, weight);
  }

  get idle() {
    return !this.wanted && this.thumbs.idle && (Boolean(this.tile) || !this.find(".at-complaint").hidden);
  }

  stop() {
    super.stop();
    this.thumbs.stop();
    this.sheet.stop();
  }
}
