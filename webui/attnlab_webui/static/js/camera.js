// The window onto the maps, in cells (fractions while it moves). All panels of a page share one camera.

const SMALLEST = 4; // cells; nothing is gained by going closer
const SETTLE_MS = 220;

export class Camera {
  constructor(onSettle) {
    this.extent = { rows: 1, cols: 1 };
    this.window = { r0: 0, r1: 1, c0: 0, c1: 1 };
    this.listeners = new Set();
    this.onSettle = onSettle;
    this.settling = null;
    this.moving = false;
  }

  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  // Sets what "everything" is, and the window: [from, to) cells each, or null for all.
  open(extent, rows, cols) {
    this.extent = extent;
    this.window = { ...span("r", rows, extent.rows), ...span("c", cols, extent.cols) };
    this.clamp();
    this.tell();
  }

  // What a LinkedCamera says of another map.
  get frame() {
    return this.window;
  }

  get lacksAll() {
    return false;
  }

  // Whether these ranges (null for all) are the window.
  isAt(rows, cols) {
    const wanted = { ...span("r", rows, this.extent.rows), ...span("c", cols, this.extent.cols) };
    return Object.entries(wanted).every(([edge, at]) => this.window[edge] === at);
  }

  get isWhole() {
    const { r0, r1, c0, c1 } = this.window;
    return r0 <= 0 && c0 <= 0 && r1 >= this.extent.rows && c1 >= this.extent.cols;
  }

  get isClosest() {
    const { r0, r1, c0, c1 } = this.window;
    return Math.min(r1 - r0, c1 - c0) <= SMALLEST;
  }

  zoom(factor, row, col) {
    const { r0, r1, c0, c1 } = this.window;
    const rows = limit((r1 - r0) * factor, this.extent.rows);
    const cols = limit((c1 - c0) * factor, this.extent.cols);
    const r = row - ((row - r0) * rows) / (r1 - r0);
    const c = col - ((col - c0) * cols) / (c1 - c0);
    this.move({ r0: r, r1: r + rows, c0: c, c1: c + cols });
  }

  pan(rows, cols) {
    const { r0, r1, c0, c1 } = this.window;
    this.move({ r0: r0 + rows, r1: r1 + rows, c0: c0 + cols, c1: c1 + cols });
  }

  // Shows whole cells only.
  show(rows, cols) {
    this.window = { ...span("r", rows, this.extent.rows), ...span("c", cols, this.extent.cols) };
    this.clamp();
    this.tell();
    this.settle();
  }

  reset() {
    this.show(null, null);
  }

  move(window) {
    this.window = window;
    this.clamp();
    this.moving = true;
    this.tell();
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.snap(), SETTLE_MS);
  }

  // After a movement the window is set on cell borders, so that the address shows exactly what is seen.
  snap() {
    const { r0, r1, c0, c1 } = this.window;
    this.show([Math.round(r0), Math.round(r1)], [Math.round(c0), Math.round(c1)]);
  }

  settle() {
    clearTimeout(this.settling);
    this.moving = false;
    const { r0, r1, c0, c1 } = this.window;
    const rows = r0 <= 0 && r1 >= this.extent.rows ? null : [r0, r1];
    const cols = c0 <= 0 && c1 >= this.extent.cols ? null : [c0, c1];
    this.onSettle(rows, cols);
    this.tell();
  }

  clamp() {
    const at = this.window;
    [at.r0, at.r1] = inside(at.r0, at.r1, this.extent.rows);
    [at.c0, at.c1] = inside(at.c0, at.c1, this.extent.cols);
  }

  tell() {
    for (const listener of this.listeners) listener(this);
  }

  stop() {
    clearTimeout(this.settling);
    this.listeners.clear();
  }
}

function span(axis, range, extent) {
  const [from, to] = range ?? [0, extent];
  return { [`${axis}0`]: from, [`${axis}1`]: to };
}

function limit(size, extent) {
  return Math.min(extent, Math.max(Math.min(SMALLEST, extent), size));
}

function inside(from, to, extent) {
  const size = limit(to - from, extent);
  const start = Math.min(Math.max(0, from), extent - size);
  return [start, start + size];
}
