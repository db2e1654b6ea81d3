// What a mechanism adds to its map: lines over it and strips beside it, each with a tick, and the names of its colours.

import { ApiError, getJson, query } from "./request.js";

const COLOURS = ["#05dbff", "#8f5000", "#a4d6b6", "#8662aa", "#8572ff", "#ddc519", "#1d706a", "#ff705f"];
const STRIP = 7;
const MOST_NAMES = 12;

export class Overlays {
  constructor(place, view) {
    this.place = place;
    this.view = view;
    this.found = new Map(); // source -> what its own mechanism adds
    this.shown = new Set();
    this.known = new Set();
  }

  async load() {
    this.wanted?.abort();
    const { signal } = (this.wanted = new AbortController());
    try {
      const asked = this.view.sources.map(async (source) => [source, await overlaysOf(source, this.view.state, signal)]);
      this.found = new Map(await Promise.all(asked));
    } catch (error) {
      if (error.name === "AbortError") return;
      throw error;
    }
    for (const { name } of this.all()) {
      if (!this.known.has(name)) this.shown.add(name);
      this.known.add(name);
    }
    this.list();
    this.redraw();
  }

  all() {
    return [...this.found.values()].flat();
  }

  // One tick for what has one name in several maps; sentences say whose they are.
  list() {
    this.place.replaceChildren();
    const parts = Object.entries(this.view.first.layer?.parts ?? {});
    this.place.hidden = !this.all().length && !parts.length;
    if (this.place.hidden) return;
    const several = this.view.sources.length > 1;
    const heading = document.createElement("div");
    heading.className = "at-label";
    heading.textContent = several ? "over the maps" : "over the map";
    this.place.append(heading);
    if (parts.length) this.place.append(this.choice(parts));
    const listed = new Set();
    for (const [source, overlays] of this.found) {
      for (const overlay of overlays) {
        if (overlay.kind === "note") this.place.append(note(overlay, several ? `${source.key}: ` : ""));
        else if (!listed.has(overlay.name)) this.place.append(this.tick(overlay));
        listed.add(overlay.name);
      }
    }
  }

  // Which map of this head is drawn: the weights, or what they are made of.
  choice(parts) {
    const label = document.createElement("label");
    label.className = "at-overlay";
    const words = document.createElement("span");
    words.textContent = "show";
    const select = document.createElement("select");
    select.name = "part";
    for (const [name, help] of [["whole", "the weights"], ...parts]) select.append(new Option(help, name));
    const chosen = this.view.state.get("part");
    select.value = [...select.options].some((option) => option.value === chosen) ? chosen : "whole";
    select.addEventListener("change", () => this.view.state.set({ part: select.value }));
    label.append(words, select);
    return label;
  }

  tick(overlay) {
    const label = document.createElement("label");
    label.className = "at-overlay";
    label.title = overlay.help;
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = this.shown.has(overlay.name);
    box.addEventListener("change", () => {
      if (box.checked) this.shown.add(overlay.name);
      else this.shown.delete(overlay.name);
      this.redraw();
    });
    const words = document.createElement("span");
    words.textContent = overlay.name;
    label.append(box, words);
    if (overlay.kind === "strip") label.append(legend(overlay));
    return label;
  }

  redraw() {
    for (const panel of this.view.panels) if (panel.plot) panel.draw();
  }

  // Strips lie between the plot and its marks: over the plot they would hide the first tokens.
  pad(panel) {
    const pad = { rows: 0, cols: 0 };
    for (const { kind, side } of this.over(panel)) if (kind === "strip") pad[side] += STRIP;
    return pad;
  }

  over({ source }) {
    return (this.found.get(source) ?? []).filter(({ name }) => this.shown.has(name));
  }

  draw(context, panel, ink) {
    if (panel.borrowed || !panel.camera.window) return;
    const { plot, camera } = panel;
    const pad = this.pad(panel);
    const shown = this.over(panel);
    within(context, [[plot.x, plot.y, plot.w, plot.h]], () => {
      for (const { kind, lines } of shown) if (kind === "lines") drawLines(context, plot, camera.window, lines, ink);
    });
    const margins = [
      [plot.x - pad.rows, plot.y, pad.rows, plot.h],
      [plot.x, plot.y - pad.cols, plot.w, pad.cols],
    ];
    within(context, margins, () => {
      const taken = { rows: 0, cols: 0 };
      for (const overlay of shown) {
        if (overlay.kind === "strip") drawStrip(context, plot, camera.window, overlay, STRIP * ++taken[overlay.side]);
      }
    });
  }
}

// Nothing where a run has no such layer or head.
async function overlaysOf(source, state, signal) {
  const { facts, at } = source;
  const { layer, head } = at ?? state.values;
  if (!source.extent()) return [];
  try {
    return (await getJson(`/runs/${facts.run}/overlays?${query({ layer, head, v: facts.stamp })}`, signal)).overlays;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return [];
  }
}

function within(context, boxes, draw) {
  context.save();
  context.beginPath();
  for (const box of boxes) context.rect(...box);
  context.clip();
  draw();
  context.restore();
}

function drawLines(context, plot, { r0, r1, c0, c1 }, lines, ink) {
  const x = (col) => plot.x + ((col - c0) * plot.w) / (c1 - c0);
  const y = (row) => plot.y + ((row - r0) * plot.h) / (r1 - r0);
  context.beginPath();
  for (const line of lines) line.forEach(([row, col], i) => context[i ? "lineTo" : "moveTo"](x(col), y(row)));
  // a dark line under a bright one is seen on any colour
  for (const [colour, width] of [[ink.empty, 3], [ink.accent, 1.25]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  }
}

// One run of equal tokens is one rectangle, so the cost follows what changes and not the number of tokens.
function drawStrip(context, plot, { r0, r1, c0, c1 }, { side, values }, out) {
  const [from, to, start, length] = side === "cols" ? [c0, c1, plot.x, plot.w] : [r0, r1, plot.y, plot.h];
  const unit = length / (to - from);
  const last = Math.min(values.length, Math.ceil(to));
  let at = Math.max(0, Math.floor(from));
  while (at < last) {
    let end = at + 1;
    while (end < last && values[end] === values[at]) end++;
    if (values[at] >= 0) {
      context.fillStyle = COLOURS[values[at] % COLOURS.length];
      const [place, size] = [start + (at - from) * unit, Math.max(0.5, (end - at) * unit)];
      if (side === "cols") context.fillRect(place, plot.y - out, size, STRIP - 1);
      else context.fillRect(plot.x - out, place, STRIP - 1, size);
    }
    at = end;
  }
}

function legend({ names }) {
  const list = document.createElement("span");
  list.className = "at-overlay-names";
  names.slice(0, MOST_NAMES).forEach((name, i) => {
    const swatch = document.createElement("i");
    swatch.style.background = COLOURS[i % COLOURS.length];
    const entry = document.createElement("span");
    entry.append(swatch, name);
    list.append(entry);
  });
  if (names.length > MOST_NAMES) list.append(`and ${names.length - MOST_NAMES} more, the colours in turn`);
  return list;
}

function note({ help }, whose) {
  const words = document.createElement("p");
  words.className = "at-hint";
  words.textContent = whose + help;
  return words;
}
