// Axes around a map: token labels when the cells are large enough, positions otherwise; always the axis words.

export const GUTTER = { left: 84, top: 64, right: 8, bottom: 8 };
const LABEL_CELL = 11; // px a cell needs for its own label
const FONT = 11;

export function plotArea(width, height) {
  return {
    x: GUTTER.left,
    y: GUTTER.top,
    w: Math.max(16, width - GUTTER.left - GUTTER.right),
    h: Math.max(16, height - GUTTER.top - GUTTER.bottom),
  };
}

// pad: pixels between the plot and the marks of each side that something else takes
export function drawAxes(context, plot, window, labels, ink, pad = { rows: 0, cols: 0 }) {
  context.save();
  context.font = `${FONT}px ${ink.mono}`;
  context.fillStyle = ink.text;
  drawRows(context, plot, window, labels.query, Boolean(labels.queryTitle), ink, pad.rows);
  drawColumns(context, plot, window, labels.key, Boolean(labels.keyTitle), ink, pad.cols);
  context.font = `600 ${FONT}px ${ink.sans}`;
  context.fillStyle = ink.muted;
  context.textAlign = "left";
  context.textBaseline = "top";
  context.fillText(axisWord(`${labels.columns ?? "key"} (to)`, labels.keyTitle) + " →", plot.x, 3);
  context.translate(3, plot.y);
  context.rotate(-Math.PI / 2);
  context.textAlign = "right";
  context.fillText("← " + axisWord("query (from)", labels.queryTitle), 0, 0);
  context.restore();
}

export function axisWord(word, title) {
  return title ? `${word}: ${title}` : word;
}

// named: positions have a meaning of their own (seconds, patches), so that a mark says it and not its number
function drawRows(context, plot, window, tokens, named, ink, pad) {
  const cell = plot.h / (window.r1 - window.r0);
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const at of marks(window.r0, window.r1, cell, tokens)) {
    const y = plot.y + (at + 0.5 - window.r0) * cell;
    if (y < plot.y || y > plot.y + plot.h) continue;
    rule(context, plot.x - 4 - pad, y, plot.x - 1 - pad, y, ink);
    context.fillText(label(context, tokens, named, at, cell, GUTTER.left - 22 - pad), plot.x - 7 - pad, y);
  }
}

function drawColumns(context, plot, window, tokens, named, ink, pad) {
  const cell = plot.w / (window.c1 - window.c0);
  context.textBaseline = "middle";
  for (const at of marks(window.c0, window.c1, cell, tokens)) {
    const x = plot.x + (at + 0.5 - window.c0) * cell;
    if (x < plot.x || x > plot.x + plot.w) continue;
    rule(context, x, plot.y - 4 - pad, x, plot.y - 1 - pad, ink);
    context.save();
    context.translate(x, plot.y - 7 - pad);
    const words = label(context, tokens, named, at, cell, GUTTER.top - 22 - pad);
    if (tokens && cell >= LABEL_CELL) {
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(words, 0, 0);
    } else {
      context.textAlign = "center";
      context.textBaseline = "bottom";
      context.fillText(words, 0, 0);
    }
    context.restore();
  }
}

// The positions that get a label: every cell, or a round step that keeps labels 56 px apart.
export function marks(from, to, cell, tokens) {
  const step = tokens && cell >= LABEL_CELL ? 1 : niceStep(Math.ceil(56 / cell));
  const first = Math.ceil(Math.floor(from) / step) * step;
  const found = [];
  for (let at = first; at < to; at += step) found.push(at);
  return found;
}

function niceStep(least) {
  for (let power = 1; ; power *= 10) {
    for (const digit of [1, 2, 5]) if (digit * power >= least) return digit * power;
  }
}

function label(context, tokens, named, at, cell, room) {
  if (!tokens || (cell < LABEL_CELL && !named)) return String(at);
  return fit(context, tokens[at] ?? "", room);
}

export function fit(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let end = Math.min(text.length, 64);
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end--;
  return `${text.slice(0, end)}…`;
}

// The label of the cell under the crosshair, in a box over the axis, at any zoom.
export function drawCrosshair(context, plot, window, labels, cell, ink) {
  const height = plot.h / (window.r1 - window.r0);
  const width = plot.w / (window.c1 - window.c0);
  const x = plot.x + (cell.col - window.c0) * width;
  const y = plot.y + (cell.row - window.r0) * height;
  const middle = { x: x + width / 2, y: y + height / 2 };
  context.save();
  context.beginPath();
  context.rect(plot.x, plot.y, plot.w, plot.h);
  context.clip();
  context.strokeStyle = ink.cross;
  context.lineWidth = 1;
  line(context, plot.x, middle.y, Math.max(plot.x, x), middle.y);
  line(context, middle.x, plot.y, middle.x, Math.max(plot.y, y));
  context.lineWidth = width > 6 ? 2 : 1;
  context.strokeRect(x, y, Math.max(width, 2), Math.max(height, 2));
  context.restore();
  context.font = `600 ${FONT}px ${ink.mono}`;
  const inRows = middle.y >= plot.y && middle.y <= plot.y + plot.h;
  const inCols = middle.x >= plot.x && middle.x <= plot.x + plot.w;
  if (inRows) rowTag(context, plot, middle.y, tagText(context, labels.query, cell.row, GUTTER.left - 16), ink);
  if (inCols) columnTag(context, plot, middle.x, tagText(context, labels.key, cell.col, 150), ink);
}

// Token and position; where room is short the token gives way, never the position.
function tagText(context, tokens, at, room) {
  if (tokens?.[at] === undefined) return String(at);
  const position = ` ${at}`;
  return fit(context, tokens[at], room - context.measureText(position).width) + position;
}

function rowTag(context, plot, y, text, ink) {
  const width = context.measureText(text).width + 8;
  context.fillStyle = ink.accent;
  context.fillRect(plot.x - width - 3, y - 8, width, 16);
  context.fillStyle = ink.onAccent;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText(text, plot.x - 7, y);
}

function columnTag(context, plot, x, text, ink) {
  const width = context.measureText(text).width + 8;
  const left = Math.min(Math.max(plot.x, x - width / 2), plot.x + plot.w - width);
  context.fillStyle = ink.accent;
  context.fillRect(left, plot.y - 20, width, 16);
  context.fillStyle = ink.onAccent;
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.fillText(text, left + 4, plot.y - 12);
}

function rule(context, x0, y0, x1, y1, ink) {
  context.strokeStyle = ink.faint;
  context.lineWidth = 1;
  line(context, x0, y0, x1, y1);
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}
