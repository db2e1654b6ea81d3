// Mouse and keyboard on a map. The gestures are those of maps everywhere: wheel, drag, shift-drag, double click.

const CLICK_PX = 4;
const PAN_SHARE = 0.15;
const KEY_ZOOM = 1.5;

export const HELP = [
  ["wheel, + and −", "zoom at the cursor"],
  ["drag, arrow keys", "move"],
  ["shift + drag", "zoom into a box"],
  ["double click, 0", "show everything"],
  ["click", "hold the crosshair; Esc lets go"],
  ["shift + arrow keys", "move the crosshair cell by cell"],
  ["[ and ]", "head before and after"],
  ["{ and }", "layer before and after"],
  ["l", "logarithmic or linear colours"],
];

// `panel` gives: canvas, plot, camera, cellAt(x, y), setBox(rect or null), actions.
export function attachGestures(panel) {
  const { canvas } = panel;
  const held = new AbortController();
  const on = (name, handler, options = {}) => {
    canvas.addEventListener(name, handler, { signal: held.signal, ...options });
  };
  let drag = null;

  on("wheel", (event) => onWheel(event, panel), { passive: false });
  on("dblclick", () => panel.camera.reset());
  on("keydown", (event) => onKey(event, panel));
  on("pointerleave", () => drag || panel.actions.hover(null));

  on("pointerdown", (event) => {
    if (event.button !== 0 || !inPlot(event, panel)) return;
    canvas.setPointerCapture(event.pointerId);
    const { offsetX: x, offsetY: y } = event;
    drag = { x, y, fromX: x, fromY: y, box: event.shiftKey, moved: false };
  });
  on("pointermove", (event) => {
    const { offsetX: x, offsetY: y } = event;
    if (!drag) {
      panel.actions.hover(inPlot(event, panel) ? panel.cellAt(x, y) : null);
      return;
    }
    drag.moved ||= Math.hypot(x - drag.fromX, y - drag.fromY) > CLICK_PX;
    if (!drag.moved) return;
    if (drag.box) panel.setBox(boxOf(drag, x, y, panel.plot));
    else dragMap(panel, drag, x, y);
    drag.x = x;
    drag.y = y;
  });
  on("pointerup", (event) => {
    if (!drag) return;
    const { offsetX: x, offsetY: y } = event;
    if (drag.box && drag.moved) zoomToBox(panel, boxOf(drag, x, y, panel.plot));
    else if (!drag.moved) panel.actions.hold(panel.cellAt(x, y));
    panel.setBox(null);
    drag = null;
  });
  on("pointercancel", () => {
    panel.setBox(null);
    drag = null;
  });
  return () => held.abort();
}

function inPlot({ offsetX: x, offsetY: y }, { plot }) {
  return x >= plot.x && x < plot.x + plot.w && y >= plot.y && y < plot.y + plot.h;
}

function onWheel(event, panel) {
  if (!inPlot(event, panel)) return;
  const away = event.deltaY > 0;
  if (away && panel.camera.isWhole) return; // nothing left to zoom out of: let the page scroll
  event.preventDefault();
  const unit = event.deltaMode === 1 ? 16 : 1;
  const speed = event.ctrlKey ? 0.01 : 0.0016;
  const at = panel.pointAt(event.offsetX, event.offsetY);
  panel.camera.zoom(Math.exp(Math.max(-240, Math.min(240, event.deltaY * unit)) * speed), at.row, at.col);
}

function dragMap(panel, drag, x, y) {
  const { r0, r1, c0, c1 } = panel.camera.frame;
  const rows = ((drag.y - y) * (r1 - r0)) / panel.plot.h;
  const cols = ((drag.x - x) * (c1 - c0)) / panel.plot.w;
  panel.camera.pan(rows, cols);
}

function boxOf(drag, x, y, plot) {
  const insideX = (value) => Math.min(Math.max(value, plot.x), plot.x + plot.w);
  const insideY = (value) => Math.min(Math.max(value, plot.y), plot.y + plot.h);
  const [x0, x1] = [insideX(drag.fromX), insideX(x)].sort((a, b) => a - b);
  const [y0, y1] = [insideY(drag.fromY), insideY(y)].sort((a, b) => a - b);
  return { x: x0, y: y0, w: x1 - x0, h: y1 - y0 };
}

function zoomToBox(panel, box) {
  const from = panel.pointAt(box.x, box.y);
  const to = panel.pointAt(box.x + box.w, box.y + box.h);
  panel.camera.show([Math.floor(from.row), Math.ceil(to.row)], [Math.floor(from.col), Math.ceil(to.col)]);
}

function onKey(event, panel) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const { camera, actions } = panel;
  const { r0, r1, c0, c1 } = camera.frame;
  const middle = [(r0 + r1) / 2, (c0 + c1) / 2];
  const commands = {
    "+": () => camera.zoom(1 / KEY_ZOOM, ...middle),
    "=": () => camera.zoom(1 / KEY_ZOOM, ...middle),
    "-": () => camera.zoom(KEY_ZOOM, ...middle),
    0: () => camera.reset(),
    "[": () => actions.step("head", -1),
    "]": () => actions.step("head", 1),
    "{": () => actions.step("layer", -1),
    "}": () => actions.step("layer", 1),
    l: () => actions.toggleScale(),
    Escape: () => actions.hold(null),
  };
  if (arrow && event.shiftKey) actions.moveCross(arrow[0], arrow[1]);
  else if (arrow) {
    const step = (size) => Math.max(1, Math.round(size * PAN_SHARE));
    camera.pan(arrow[0] * step(r1 - r0), arrow[1] * step(c1 - c0));
  } else if (commands[event.key]) commands[event.key]();
  else return;
  event.preventDefault();
}
