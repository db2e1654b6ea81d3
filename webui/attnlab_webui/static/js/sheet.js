// A small map without zoom: a tile with axes, a row that is chosen, a crosshair. For views that stand on several of them.

import { drawAxes, drawCrosshair, plotArea } from "./axes.js";
import { paint } from "./colour.js";
import { hatch, readInk } from "./ink.js";

export class Sheet {
  // told: {hover(cell or null), pick(cell), key(event)}, each may be left out
  constructor(root, told) {
    this.told = told;
    this.given = null;
    this.cross = null;
    root.classList.add("at-sheet");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    root.append(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.told.pick?.(cell);
    });
    this.canvas.addEventListener("keydown", (event) => this.told.key?.(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.canvas);
  }

  // given: {tile, window: {r0, r1, c0, c1}, labels, scale, table, row (chosen, or null), lines: [[[row, col], ..]], words}
  show(given) {
    this.given = given;
    this.canvas.setAttribute("aria-label", given.words);
    this.draw();
  }

  point(cell) {
    if (cell?.row === this.cross?.row && cell?.col === this.cross?.col) return;
    this.cross = cell;
    this.draw();
    this.told.hover?.(cell);
  }

  cellAt(event) {
    if (!this.given || !this.plot) return null;
    const { r0, r1, c0, c1 } = this.given.window;
    const { x, y, w, h } = this.plot;
    const row = Math.floor(r0 + ((event.offsetY - y) * (r1 - r0)) / h);
    const col = Math.floor(c0 + ((event.offsetX - x) * (c1 - c0)) / w);
    return row >= r0 && row < r1 && col >= c0 && col < c1 ? { row, col } : null;
  }

  // The weight under a cell; of a pooled tile that of the block which holds it, NaN where masked.
  valueAt({ row, col }) {
    const { tile } = this.given;
    const r = Math.floor(((row - tile.rows[0]) * tile.height) / (tile.rows[1] - tile.rows[0]));
    const c = Math.floor(((col - tile.cols[0]) * tile.width) / (tile.cols[1] - tile.cols[0]));
    return tile.values[r * tile.width + c];
  }

  draw() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!this.given || width < 20 || height < 20) return;
    const dpr = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * dpr);
    this.canvas.height = Math.round(height * dpr);
    this.plot = plotArea(width, height);
    const context = this.canvas.getContext("2d");
    const ink = readInk(this.canvas);
    const { labels, row } = this.given;
    context.scale(dpr, dpr);
    this.drawTile(context, ink);
    drawAxes(context, this.plot, this.given.window, labels, ink);
    this.drawLines(context, ink);
    if (row !== null) this.drawRow(context, row, ink);
    if (this.cross) drawCrosshair(context, this.plot, this.given.window, labels, this.cross, ink);
  }

  drawTile(context, ink) {
    const { x, y, w, h } = this.plot;
    const { tile, scale, table } = this.given;
    context.fillStyle = hatch(context, ink);
    context.fillRect(x, y, w, h);
    const small = document.createElement("canvas");
    small.width = tile.width;
    small.height = tile.height;
    small.getContext("2d").putImageData(paint(tile, scale, table.colours), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, x, y, w, h);
    context.strokeStyle = ink.frame;
    context.lineWidth = 1;
    context.strokeRect(x - 0.5, y - 0.5, w + 1, h + 1);
  }

  drawLines(context, ink) {
    const { r0, r1, c0, c1 } = this.given.window;
    const { x, y, w, h } = this.plot;
    context.save();
    context.beginPath();
    context.rect(x, y, w, h);
    context.clip();
    context.beginPath();
    for (const line of this.given.lines) {
      line.forEach(([row, col], i) => {
        context[i ? "lineTo" : "moveTo"](x + ((col - c0) * w) / (c1 - c0), y + ((row - r0) * h) / (r1 - r0));
      });
    }
    double(context, ink.accent, 1.5, ink.empty);
    context.restore();
  }

  drawRow(context, row, ink) {
    const { r0, r1 } = this.given.window;
    const { x, y, w, h } = this.plot;
    const height = h / (r1 - r0);
    context.beginPath();
    context.rect(x - 1, y + (row - r0) * height - 1, w + 2, Math.max(2, height) + 2);
    double(context, ink.accent, 1.5, ink.empty);
  }

  stop() {
    this.observer.disconnect();
  }
}

// A dark line under a bright one is seen on any colour.
function double(context, colour, width, ground) {
  for (const [style, line] of [[ground, width + 2], [colour, width]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.stroke();
  }
}
