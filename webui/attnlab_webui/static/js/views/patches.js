// A picture under the weights of its patches: one canvas, drawn and read patch by patch.

import { paint } from "../colour.js";
import { hatch } from "../ink.js";

// A picture without its colours, so that the colours that are seen are weights.
export async function loadGrey(address) {
  if (!address) return null;
  const image = new Image();
  image.src = address;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const [red, green, blue] = pixels.data.subarray(at, at + 3);
    pixels.data.fill(0.3 * red + 0.59 * green + 0.11 * blue, at, at + 3);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// given: {grid: {rows, columns}, weights, scale, table, grey (canvas or null), share (of the picture), query, hovered, ink}
// query and hovered are patches, or null
export function drawPatches(canvas, given) {
  const { grid, weights, ink } = given;
  const dpr = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (width < 8) return;
  const height = (width * grid.rows) / grid.columns;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * dpr);
  canvas.height = Math.round(height * dpr);
  const context = canvas.getContext("2d");
  context.scale(dpr, dpr);
  context.imageSmoothingEnabled = false;
  context.fillStyle = hatch(context, ink);
  context.fillRect(0, 0, width, height);
  if (given.grey) context.drawImage(given.grey, 0, 0, width, height);
  const small = document.createElement("canvas");
  small.width = grid.columns;
  small.height = grid.rows;
  const tile = { height: grid.rows, width: grid.columns, values: weights };
  small.getContext("2d").putImageData(paint(tile, given.scale, given.table.colours), 0, 0);
  context.globalAlpha = given.grey ? 1 - given.share : 1;
  context.drawImage(small, 0, 0, width, height);
  context.globalAlpha = 1;
  const cell = { w: width / grid.columns, h: height / grid.rows };
  drawWindow(context, grid, weights, cell, ink);
  if (given.hovered !== null) outline(context, grid, given.hovered, cell, ink.text, 1.5, ink);
  if (given.query !== null) outline(context, grid, given.query, cell, ink.accent, 3, ink);
}

// Where only some patches may be seen, a line around them: the k x k window of neighborhood attention.
function drawWindow(context, grid, weights, cell, ink) {
  const seen = (row, col) =>
    row >= 0 && col >= 0 && row < grid.rows && col < grid.columns && !Number.isNaN(weights[row * grid.columns + col]);
  if (!weights.some(Number.isNaN)) return;
  context.beginPath();
  for (let row = 0; row < grid.rows; row++) {
    for (let col = 0; col < grid.columns; col++) {
      if (!seen(row, col)) continue;
      const [x, y] = [col * cell.w, row * cell.h];
      if (!seen(row - 1, col)) segment(context, x, y, x + cell.w, y);
      if (!seen(row + 1, col)) segment(context, x, y + cell.h, x + cell.w, y + cell.h);
      if (!seen(row, col - 1)) segment(context, x, y, x, y + cell.h);
      if (!seen(row, col + 1)) segment(context, x + cell.w, y, x + cell.w, y + cell.h);
    }
  }
  stroke(context, ink.text, 1.5, ink);
}

function segment(context, x0, y0, x1, y1) {
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
}

function outline(context, grid, patch, cell, colour, width, ink) {
  const [row, col] = [Math.floor(patch / grid.columns), patch % grid.columns];
  context.beginPath();
  context.rect(col * cell.w + 1, row * cell.h + 1, cell.w - 2, cell.h - 2);
  stroke(context, colour, width, ink);
}

// A wide line of the ground under a thin one is seen on any colour.
function stroke(context, colour, width, ink) {
  for (const [style, line] of [[ink.surface, width + 2.5], [colour, width]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.stroke();
  }
}

// The patch under a pointer, by its number.
export function patchAt(canvas, grid, event) {
  const box = canvas.getBoundingClientRect();
  const col = Math.floor(((event.clientX - box.left) * grid.columns) / box.width);
  const row = Math.floor(((event.clientY - box.top) * grid.rows) / box.height);
  const inside = row >= 0 && col >= 0 && row < grid.rows && col < grid.columns;
  return inside ? row * grid.columns + col : null;
}
