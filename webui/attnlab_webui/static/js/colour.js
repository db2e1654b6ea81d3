// From weights to colours: linear or logarithmic, a shared range, look-up tables from the server.

import { getJson } from "./request.js";

const DECADES = 5; // how far below the largest value a logarithmic scale reaches
const DARK_DIFFERENCE = ["6cb6ff", "2f6fb5", "12161d", "b5403c", "ff8a80"];
let tables = null;
let darkTable = null;

// The same tables that the PNG and SVG exports use: {name: Uint8Array(768)}.
export async function loadTables() {
  if (!tables) {
    tables = getJson("/colormaps").then((document) => {
      const entries = Object.entries(document.colormaps);
      return Object.fromEntries(entries.map(([name, flat]) => [name, Uint8Array.from(flat)]));
    });
    tables.catch(() => {
      tables = null;
    });
  }
  return tables;
}

export function isDark() {
  return document.body.classList.contains("dark");
}

export function tableName(colours) {
  if (colours !== "auto") return colours;
  return isDark() ? "magma" : "paper";
}

// The table of a map, or of signed numbers; on a dark page zero is dark too.
export function chooseTable(tables, colours, signed) {
  if (!signed) {
    const name = tableName(colours);
    return { name, colours: tables[name] };
  }
  if (!isDark()) return { name: "blue_red", colours: tables.blue_red };
  darkTable ??= ramp(DARK_DIFFERENCE);
  return { name: "dark_difference", colours: darkTable };
}

function ramp(stops) {
  const colours = stops.map((stop) => [0, 2, 4].map((at) => Number.parseInt(stop.slice(at, at + 2), 16)));
  const table = new Uint8Array(768);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const from = Math.min(stops.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c++) {
      table[i * 3 + c] = Math.round(colours[from][c] + (at - from) * (colours[from + 1][c] - colours[from][c]));
    }
  }
  return table;
}

// A scale maps a weight to 0..255. `top` is the value of the last colour, `floor` that of the first.
export function makeScale({ kind, top, signed = false, decades = DECADES }) {
  const safe = top > 0 && Number.isFinite(top) ? top : 1;
  if (signed) return signedScale(kind, safe);
  if (kind === "log") {
    const floor = safe * 10 ** -decades;
    const low = Math.log10(floor);
    const span = Math.log10(safe) - low;
    const unit = (value) => (value <= floor ? 0 : (Math.log10(value) - low) / span);
    return { kind, top: safe, floor, signed, unit, value: (u) => 10 ** (low + u * span) };
  }
  return { kind, top: safe, floor: 0, signed, unit: (value) => value / safe, value: (u) => u * safe };
}

// Differences: the middle colour is zero; logarithmic means linear below 1/1000 of the top.
function signedScale(kind, top) {
  if (kind === "log") {
    const knee = top * 1e-3;
    const span = Math.log10(1 + top / knee);
    const unit = (value) => 0.5 + (Math.sign(value) * Math.log10(1 + Math.abs(value) / knee)) / span / 2;
    const value = (u) => Math.sign(u - 0.5) * knee * (10 ** (Math.abs(u - 0.5) * 2 * span) - 1);
    return { kind, top, floor: -top, signed: true, unit, value };
  }
  return {
    kind,
    top,
    floor: -top,
    signed: true,
    unit: (value) => 0.5 + value / top / 2,
    value: (u) => (u - 0.5) * 2 * top,
  };
}

export function indexOf(scale, value) {
  const index = Math.round(scale.unit(value) * 255);
  return index < 0 ? 0 : index > 255 ? 255 : index;
}

// Paints a tile into RGBA pixels; masked cells (NaN) stay transparent, so that the hatch behind them shows.
// tops: of each row what its colours are shares of, or null
export function paint(tile, scale, table, tops = null) {
  const { height, width, values } = tile;
  const pixels = new Uint8ClampedArray(height * width * 4);
  for (let row = 0; row < height; row++) {
    const start = row * width;
    const factor = tops ? 1 / tops[row] : 1;
    for (let at = start; at < start + width; at++) {
      const value = values[at];
      if (Number.isNaN(value)) continue;
      const colour = indexOf(scale, value * factor) * 3;
      const pixel = at * 4;
      pixels[pixel] = table[colour];
      pixels[pixel + 1] = table[colour + 1];
      pixels[pixel + 2] = table[colour + 2];
      pixels[pixel + 3] = 255;
    }
  }
  return new ImageData(pixels, width, height);
}

// The largest weight of each row of a tile between two of its columns.
export function rowTops({ height, width, values }, from, to) {
  return Float32Array.from({ length: height }, (_, row) => {
    let top = 0;
    for (let at = row * width + from; at < row * width + to; at++) if (Math.abs(values[at]) > top) top = Math.abs(values[at]);
    return top || 1;
  });
}

// The value below which `percent` of the allowed cells lie; 100 is the maximum.
export function topOf(tiles, percent) {
  const found = [];
  let top = 0;
  for (const tile of tiles) {
    for (const value of tile.values) {
      if (Number.isNaN(value)) continue;
      const size = Math.abs(value);
      if (size > top) top = size;
      if (percent < 100 && size > 0) found.push(size);
    }
  }
  if (percent >= 100 || !found.length) return top;
  const sorted = Float32Array.from(found).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * percent) / 100))];
}

// Black or white, whichever is easier to read on a colour: at least 4.5:1 on any (WCAG 2.2).
export function inkOn(red, green, blue) {
  const linear = (channel) => (channel <= 10 ? channel / 255 / 12.92 : ((channel / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  return luminance > 0.179 ? "#000" : "#fff";
}

export function ticks(scale) {
  if (scale.signed) return [-scale.top, 0, scale.top];
  if (scale.kind === "linear") return [0, scale.top / 4, scale.top / 2, (3 * scale.top) / 4, scale.top];
  const first = Math.ceil(Math.log10(scale.floor));
  const last = Math.floor(Math.log10(scale.top));
  const decades = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  const apart = decades.filter((value) => scale.unit(value) > 0.24 && scale.unit(value) <= 0.86);
  return [scale.floor, ...apart, scale.top];
}

export function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 0.001 && size < 10000) return String(Number(value.toPrecision(2)));
  return value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
}

// A weight with the digits that float32 has.
export function precise(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-4 ? value.toPrecision(6) : value.toExponential(4);
}
