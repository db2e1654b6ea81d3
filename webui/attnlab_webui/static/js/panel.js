// One map on a canvas: a pooled tile for the region in view, over the pooled tile of everything.

import { drawAxes, drawCrosshair, plotArea } from "./axes.js";
import { indexOf, inkOn, paint, precise, rowTops, short } from "./colour.js";
import { attachGestures } from "./gestures.js";
import { ApiError, getTile } from "./request.js";
import { hatch, readInk } from "./ink.js";

const MOST_PIXELS = 512;
const MOST_BYTES = 300_000;
// longer than one step of the wheel moves the map: a step asks for one picture, at its end
const MOVING_MS = 300;
const SLOW_MS = 180;

export class Panel {
  // source: {key, noun, title, extent(): {rows, cols} or null, lack(), labels, path(fields), signed}
  constructor(root, source, shared) {
    this.root = root;
    this.source = source;
    this.shared = shared; // camera, state, cache, actions, onTile(panel)
    this.camera = shared.camera;
    this.actions = shared.actions;
    this.base = null;
    this.tile = null;
    this.scale = null;
    this.table = null;
    this.error = null;
    this.pending = null;
    this.box = null;
    this.borrowed = null;
    this.build();
    this.detach = [attachGestures(this), this.camera.listen(() => this.onCamera())];
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.stage);
  }

  build() {
    this.root.classList.add("at-panel");
    this.root.innerHTML =
      '<div class="at-panel-head"><span class="at-panel-title"></span><span class="at-panel-value"></span></div>' +
      '<div class="at-stage"><canvas class="at-map" tabindex="0" role="application"' +
      ' aria-roledescription="attention map"></canvas><canvas class="at-over" aria-hidden="true"></canvas>' +
      '<div class="at-none" role="status" hidden></div><div class="at-busy" hidden></div><div class="at-veil" role="alert" hidden></div></div>';
    const find = (name) => this.root.querySelector(name);
    this.stage = find(".at-stage");
    this.canvas = find(".at-map");
    this.over = find(".at-over");
    this.none = find(".at-none");
    this.busy = find(".at-busy");
    this.veil = find(".at-veil");
    this.heading = find(".at-panel-title");
    this.value = find(".at-panel-value");
  }

  // Throws away what is shown (another layer, head or run) and asks for the new map.
  restart() {
    this.release(this.base, this.tile);
    this.base = null;
    this.tile = null;
    this.error = null;
    this.heading.textContent = this.source.title();
    this.canvas.setAttribute("aria-label", `${this.source.title()}. Rows are queries, columns are keys.`);
    this.showVeil();
    this.request();
    this.draw();
  }

  resize() {
    const box = this.stage.getBoundingClientRect();
    if (box.width < 20 || box.height < 20) return;
    this.dpr = window.devicePixelRatio || 1;
    this.size = { w: box.width, h: box.height };
    for (const canvas of [this.canvas, this.over]) {
      canvas.width = Math.round(box.width * this.dpr);
      canvas.height = Math.round(box.height * this.dpr);
    }
    this.plot = plotArea(box.width, box.height);
    this.request();
    this.draw();
  }

  onCamera() {
    this.draw();
    if (!this.camera.moving) this.request();
    else this.throttle ??= setTimeout(() => this.request(), MOVING_MS);
  }

  // ---- asking for tiles

  region() {
    const extent = this.source.extent();
    const { window } = this.camera;
    if (!extent || !this.plot || !window) return null;
    const { r0, r1, c0, c1 } = window;
    const rows = [Math.max(0, Math.floor(r0)), Math.min(extent.rows, Math.ceil(r1))];
    const cols = [Math.max(0, Math.floor(c0)), Math.min(extent.cols, Math.ceil(c1))];
    return rows[1] > rows[0] && cols[1] > cols[0] ? { rows, cols } : null;
  }

  fields(rows, cols) {
    const size = (length) => Math.max(16, Math.min(MOST_PIXELS, Math.round(length * this.dpr)));
    const { layer, head, reduce } = this.shared.state.values;
    return {
      layer,
      head,
      rows: rows.join(":"),
      cols: cols.join(":"),
      height: size(this.plot.h),
      width: size(this.plot.w),
      reduce,
      most_bytes: MOST_BYTES,
    };
  }

  async request() {
    clearTimeout(this.throttle);
    this.throttle = null;
    const extent = this.source.extent();
    if (!extent || !this.plot) return;
    try {
      if (!this.base) {
        this.base = await this.load([0, extent.rows], [0, extent.cols]);
        this.shared.onTile(this);
      }
      const region = this.base.exact && !this.base.rounded ? null : this.region();
      const tile = region ? await this.load(region.rows, region.cols) : this.base;
      if (this.tile !== tile && this.tile !== this.base) this.release(this.tile);
      this.tile = tile;
      this.error = null;
      this.shared.onTile(this);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.error = error.message;
    }
    this.showVeil();
    this.draw();
  }

  // Aborts the tile that is on its way when another one is wanted.
  load(rows, cols) {
    const path = this.source.path(this.fields(rows, cols));
    if (this.pending?.path === path) return this.pending.promise;
    this.pending?.controller.abort();
    this.pending = null;
    const known = this.shared.cache.get(path);
    if (known) return known;
    const controller = new AbortController();
    const pending = { path, controller, promise: this.fetch(path, controller) };
    this.pending = pending;
    return pending.promise;
  }

  async fetch(path, controller) {
    const slow = setTimeout(() => (this.busy.hidden = false), SLOW_MS);
    try {
      const tile = await getTile(path, controller.signal, (done) => {
        this.veil.hidden = false;
        this.veil.textContent = `Building the overview of this ${this.source.noun}: ${Math.round(done * 100)} %`;
      });
      this.showVeil();
      this.shared.cache.put(path, tile);
      return tile;
    } finally {
      clearTimeout(slow);
      if (this.pending?.controller === controller) {
        this.pending = null;
        this.busy.hidden = true;
      }
    }
  }

  get idle() {
    const settled = !this.camera.moving && !this.pending && !this.throttle;
    return settled && (this.error !== null || this.tile !== null || this.source.extent() === null);
  }

  showVeil() {
    this.veil.hidden = this.error === null;
    if (this.error === null) return;
    this.veil.replaceChildren();
    const words = document.createElement("p");
    words.textContent = this.error;
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = "Try again";
    again.addEventListener("click", () => this.shared.again());
    this.veil.append(words, again);
  }

  // ---- drawing

  colour(scale, table) {
    this.scale = scale;
    this.table = table;
    this.draw();
  }

  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      this.drawNow();
    });
  }

  // Draws another panel's map in this place (null: its own again).
  borrow(panel) {
    this.borrowed = panel;
    this.heading.textContent = (panel ?? this).source.title();
    this.root.classList.toggle("at-borrowed", panel !== null);
    this.draw();
  }

  // the panel whose map is drawn here
  get shown() {
    return this.borrowed ?? this;
  }

  get window() {
    return this.shown.camera.window;
  }

  drawNow() {
    if (!this.plot) return;
    const { base, tile, source, window } = this.shown;
    const context = this.canvas.getContext("2d");
    const ink = readInk(this.root);
    context.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    context.clearRect(0, 0, this.size.w, this.size.h);
    context.fillStyle = ink.empty;
    context.fillRect(this.plot.x, this.plot.y, this.plot.w, this.plot.h);
    context.save();
    context.beginPath();
    context.rect(this.plot.x, this.plot.y, this.plot.w, this.plot.h);
    context.clip();
    if (this.scale && base && window) this.drawTile(context, base, ink);
    if (this.scale && tile && tile !== base && window) this.drawTile(context, tile, ink);
    if (window) this.drawGrid(context, ink);
    context.restore();
    context.strokeStyle = ink.frame;
    context.lineWidth = 1;
    context.strokeRect(this.plot.x - 0.5, this.plot.y - 0.5, this.plot.w + 1, this.plot.h + 1);
    const lack = source.lack();
    if (window && !lack) drawAxes(context, this.plot, window, source.labels(), ink, this.shared.pad(this));
    this.none.hidden = !lack && !this.shown.camera.lacksAll;
    this.none.textContent = lack || `None of the tokens in view are in the input of ${source.key}.`;
    this.drawOver(ink);
  }

  place(rows, cols) {
    const { r0, r1, c0, c1 } = this.window;
    const { x, y, w, h } = this.plot;
    const left = x + ((cols[0] - c0) * w) / (c1 - c0);
    const top = y + ((rows[0] - r0) * h) / (r1 - r0);
    return {
      x: left,
      y: top,
      w: ((cols[1] - cols[0]) * w) / (c1 - c0),
      h: ((rows[1] - rows[0]) * h) / (r1 - r0),
    };
  }

  drawTile(context, tile, ink) {
    const at = this.place(tile.rows, tile.cols);
    context.fillStyle = hatch(context, ink);
    context.fillRect(at.x, at.y, at.w, at.h);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.bitmap(tile), at.x, at.y, at.w, at.h);
  }

  // whole: for a picture of all columns, which has colours of its own where each row is counted by itself
  bitmap(tile, whole = false) {
    const byRow = this.shared.state.get("norm") === "row" && !this.source.signed;
    const columns = byRow ? (whole ? [0, tile.width] : this.columnsInView(tile)) : null;
    const slot = byRow && whole ? "wholeBitmap" : "bitmap";
    const key = [this.scale.kind, this.scale.top, this.scale.signed, columns, this.table.name].join();
    if (tile[slot]?.key === key) return tile[slot].canvas;
    const canvas = tile[slot]?.canvas ?? document.createElement("canvas");
    canvas.width = tile.width;
    canvas.height = tile.height;
    const tops = columns && rowTops(tile, ...columns);
    canvas.getContext("2d").putImageData(paint(tile, this.scale, this.table.colours, tops), 0, 0);
    tile[slot] = { key, canvas, tops };
    return canvas;
  }

  // [from, to) of the tile's columns that are seen: a row's own maximum is that of its picture, as in an export.
  columnsInView({ cols, width }) {
    const { c0, c1 } = this.window;
    const at = (col) => Math.min(width, Math.max(0, ((col - cols[0]) * width) / (cols[1] - cols[0])));
    return [Math.floor(at(c0)), Math.ceil(at(c1))];
  }

  // A picture takes as much as its numbers: those that are not shown go at once, and not when the browser tidies up.
  release(...tiles) {
    for (const tile of tiles.filter(Boolean)) {
      for (const slot of ["bitmap", "wholeBitmap"]) {
        if (tile[slot]) tile[slot].canvas.width = 0;
        tile[slot] = null;
      }
    }
  }

  drawGrid(context, ink) {
    const { r0, r1, c0, c1 } = this.window;
    const width = this.plot.w / (c1 - c0);
    const height = this.plot.h / (r1 - r0);
    if (Math.min(width, height) < 9) return;
    context.strokeStyle = ink.grid;
    context.lineWidth = 1;
    context.beginPath();
    for (let row = Math.ceil(r0); row < r1; row++) {
      const y = Math.round(this.plot.y + (row - r0) * height) + 0.5;
      context.moveTo(this.plot.x, y);
      context.lineTo(this.plot.x + this.plot.w, y);
    }
    for (let col = Math.ceil(c0); col < c1; col++) {
      const x = Math.round(this.plot.x + (col - c0) * width) + 0.5;
      context.moveTo(x, this.plot.y);
      context.lineTo(x, this.plot.y + this.plot.h);
    }
    context.stroke();
    if (width >= 44 && height >= 16) this.drawNumbers(context, width, height, ink);
  }

  drawNumbers(context, width, height, ink) {
    const { r0, r1, c0, c1 } = this.window;
    context.font = `11px ${ink.mono}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let row = Math.floor(r0); row < r1; row++) {
      for (let col = Math.floor(c0); col < c1; col++) {
        const tile = this.shown.exactTile(row, col);
        const value = this.shown.valueAt(row, col);
        if (!tile || Number.isNaN(value)) continue;
        const at = indexOf(this.scale, value / (tile.bitmap?.tops?.[row - tile.rows[0]] ?? 1)) * 3;
        context.fillStyle = inkOn(...this.table.colours.subarray(at, at + 3));
        const x = this.plot.x + (col + 0.5 - c0) * width;
        context.fillText(short(value), x, this.plot.y + (row + 0.5 - r0) * height);
      }
    }
  }

  drawOver(ink = readInk(this.root)) {
    const context = this.over.getContext("2d");
    context.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    context.clearRect(0, 0, this.size.w, this.size.h);
    this.shared.over(context, this, ink);
    const cell = this.shared.cross(this.shown);
    if (cell && this.window && this.shown.source.extent()) drawCrosshair(context, this.plot, this.window, this.shown.source.labels(), cell, ink);
    if (!this.box) return;
    context.strokeStyle = ink.accent;
    context.fillStyle = ink.wash;
    context.setLineDash([4, 3]);
    context.fillRect(this.box.x, this.box.y, this.box.w, this.box.h);
    context.strokeRect(this.box.x + 0.5, this.box.y + 0.5, this.box.w, this.box.h);
    context.setLineDash([]);
  }

  setBox(box) {
    this.box = box;
    if (this.plot) this.drawOver();
  }

  // ---- reading

  pointAt(x, y) {
    const { r0, r1, c0, c1 } = this.camera.frame;
    return {
      row: r0 + ((y - this.plot.y) * (r1 - r0)) / this.plot.h,
      col: c0 + ((x - this.plot.x) * (c1 - c0)) / this.plot.w,
    };
  }

  cellAt(x, y) {
    const extent = this.camera.window && this.source.extent();
    const { row, col } = this.pointAt(x, y);
    const cell = { row: Math.floor(row), col: Math.floor(col) };
    return extent && cell.row < extent.rows && cell.col < extent.cols ? cell : null;
  }

  // The exact weight when a tile in hand holds it, NaN when masked, null when it must be asked for.
  valueAt(row, col) {
    const tile = this.exactTile(row, col);
    return tile ? tile.values[(row - tile.rows[0]) * tile.width + col - tile.cols[0]] : null;
  }

  exactTile(row, col) {
    const holds = ({ rows, cols }) => row >= rows[0] && row < rows[1] && col >= cols[0] && col < cols[1];
    return [this.tile, this.base].find((tile) => tile?.exact && !tile.rounded && holds(tile)) ?? null;
  }

  // What the tile shows there: the pooled value of the block that holds the cell.
  pooledAt(row, col) {
    for (const tile of [this.tile, this.base]) {
      if (!tile) continue;
      const r = Math.floor(((row - tile.rows[0]) * tile.height) / (tile.rows[1] - tile.rows[0]));
      const c = Math.floor(((col - tile.cols[0]) * tile.width) / (tile.cols[1] - tile.cols[0]));
      if (r >= 0 && c >= 0 && r < tile.height && c < tile.width) return tile.values[r * tile.width + c];
    }
    return null;
  }

  showValue(value) {
    if (value === null) this.value.textContent = "";
    else this.value.textContent = Number.isNaN(value) ? "masked" : signed(value, this.source.signed);
  }

  cellPath(row, col) {
    const { layer, head } = this.shared.state.values;
    return this.source.cellPath({ layer, head, row, col });
  }

  stop() {
    this.pending?.controller.abort();
    clearTimeout(this.throttle);
    this.release(this.base, this.tile);
    this.observer.disconnect();
    for (const detach of this.detach) detach();
  }
}

function signed(value, withSign) {
  return (withSign && value > 0 ? "+" : "") + precise(value);
}
