// The camera of all panels, seen from a map over another text: its window shows the tokens that the first map shows.

export class LinkedCamera {
  // source: the MapSource whose positions this camera counts in
  constructor(camera, alignment, source) {
    this.camera = camera;
    this.alignment = alignment;
    this.source = source;
  }

  // null where the map has none of the tokens in view, and before it is known where they are
  get window() {
    return this.alignment.known ? this.alignment.range(this.source, this.camera.window) : null;
  }

  get lacksAll() {
    return this.alignment.known && this.window === null;
  }

  // what gestures are measured on, also where nothing is shown
  get frame() {
    return this.window ?? this.camera.window;
  }

  get isWhole() {
    return this.camera.isWhole;
  }

  get moving() {
    return this.camera.moving;
  }

  listen(listener) {
    return this.camera.listen(listener);
  }

  // What is pointed at stays where it is; among tokens that only this map has the first one is zoomed around them.
  zoom(factor, row, col) {
    const at = this.window;
    if (!at || (factor < 1 && this.camera.isClosest)) return this.camera.zoom(factor, ...this.firstAt(row, col));
    const [top, left] = [row - (row - at.r0) * factor, col - (col - at.c0) * factor];
    const wanted = { r0: top, r1: top + (at.r1 - at.r0) * factor, c0: left, c1: left + (at.c1 - at.c0) * factor };
    const found = this.alignment.rangeFrom(this.source, wanted);
    if (found) this.camera.move(found);
    else this.camera.zoom(factor, ...this.firstAt(row, col));
  }

  firstAt(row, col) {
    const at = this.window ? this.alignment.pointFrom(this.source, { row, col }) : { row, col };
    return [at.row, at.col];
  }

  pan(rows, cols) {
    const [ours, theirs] = [this.frame, this.camera.window];
    const down = (theirs.r1 - theirs.r0) / (ours.r1 - ours.r0);
    const across = (theirs.c1 - theirs.c0) / (ours.c1 - ours.c0);
    this.camera.pan(rows * down, cols * across);
  }

  show(rows, cols) {
    const [[r0, r1], [c0, c1]] = [rows, cols];
    const box = { r0, r1, c0, c1 };
    const found = this.window ? this.alignment.rangeFrom(this.source, box) : box;
    if (found) this.camera.show([found.r0, found.r1], [found.c0, found.c1]);
  }

  reset() {
    this.camera.reset();
  }
}
