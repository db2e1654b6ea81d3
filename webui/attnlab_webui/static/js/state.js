// What is looked at: layer, head, region and how it is drawn. It lives in the address, so that a link shows the same.

const SCALES = ["log", "linear"];
const POOLING = ["max", "mean"];
const NORMS = ["none", "row"];
const CLIPS = [100, 99.9, 99, 95];
const COLOURS = ["auto", "paper", "viridis", "magma"];
const SORTS = ["layer", "high", "low"];
const DIRECTIONS = ["sent", "received"];
const SINKS = ["without", "with"];
const WAYS = ["rollout", "flow", "all"];
const PARTS = ["whole", "first", "second", "content", "position"];
const WORDS = /^[a-z_]{1,40}$/;

export const CHOICES = {
  scale: SCALES,
  reduce: POOLING,
  norm: NORMS,
  clip: CLIPS,
  colours: COLOURS,
  part: PARTS,
  sort: SORTS,
  direction: DIRECTIONS,
  through: WAYS,
  sink: SINKS,
};

const NUMBERS = ["layer", "head", "token", "from"];
const HEADS = /^(mean|\d{1,4}(,\d{1,4})*)$/;
const NAMES = ["view", "statistic"];

export const DEFAULTS = {
  view: "map",
  layer: 0,
  head: 0,
  rows: null, // [from, to) or null for all
  cols: null,
  scale: "log",
  reduce: "max",
  norm: "none",
  clip: 100,
  colours: "auto",
  statistic: null,
  part: "whole",
  sort: "layer",
  where: "", // which heads the grid shows
  token: null, // the query that is looked at; null for the last one
  direction: "sent",
  heads: "", // "mean", or the heads that are drawn together
  above: 0.05, // weights below are not drawn as lines
  through: "rollout",
  residual: 0.5, // the share of a layer that passes by its attention
  sink: "without", // whether the colours reach up to what the first token gets, a sink in most models
  from: null, // the first token that a flow may reach
};

const own = Object.keys(DEFAULTS);

export function parse(search) {
  const given = new URLSearchParams(search);
  const state = { ...DEFAULTS };
  for (const name of NUMBERS) {
    const value = Number.parseInt(given.get(name), 10);
    if (Number.isInteger(value) && value >= 0) state[name] = value;
  }
  for (const name of ["rows", "cols"]) state[name] = parseRange(given.get(name));
  for (const [name, choices] of Object.entries(CHOICES)) {
    const value = choices.find((choice) => String(choice) === given.get(name));
    if (value !== undefined) state[name] = value;
  }
  for (const name of NAMES) if (WORDS.test(given.get(name) ?? "")) state[name] = given.get(name);
  if (HEADS.test(given.get("heads") ?? "")) state.heads = given.get("heads");
  for (const name of ["above", "residual"]) {
    const value = Number.parseFloat(given.get(name));
    if (value >= 0 && value <= 1) state[name] = value;
  }
  state.where = (given.get("where") ?? "").slice(0, 200);
  return state;
}

export function parseRange(text) {
  const match = /^(\d{1,9}):(\d{1,9})$/.exec(text ?? "");
  if (!match) return null;
  const [from, to] = [Number(match[1]), Number(match[2])];
  return to > from ? [from, to] : null;
}

// The address of this state; parameters that are not ours (id, run, runs, pair) stay as they are.
export function format(state, search) {
  const params = new URLSearchParams(search);
  for (const name of own) {
    const value = state[name];
    const text = Array.isArray(value) ? value.join(":") : String(value);
    if (value === null || value === DEFAULTS[name]) params.delete(name);
    else params.set(name, text);
  }
  const always = ["layer", "head"];
  for (const name of always) params.set(name, state[name]);
  return params.toString().replaceAll("%3A", ":").replaceAll("%2C", ",");
}

export class State {
  constructor(search = window.location.search) {
    this.values = parse(search);
    this.listeners = new Set();
    this.writing = null;
    this.onPop = () => this.change(parse(window.location.search));
    window.addEventListener("popstate", this.onPop);
  }

  get(name) {
    return this.values[name];
  }

  set(patch) {
    if (!this.change(patch)) return;
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.write(), 200);
  }

  // A step that the browser's back button takes back: another view, or what was opened from one.
  go(patch) {
    this.write();
    if (this.change(patch)) history.pushState(history.state, "", this.address());
  }

  change(patch) {
    const changed = Object.keys(patch).filter((name) => !same(patch[name], this.values[name]));
    Object.assign(this.values, patch);
    for (const listener of [...this.listeners]) if (changed.length && this.listeners.has(listener)) listener(changed);
    return changed.length > 0;
  }

  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  address() {
    return `${window.location.pathname}?${format(this.values, window.location.search)}`;
  }

  write() {
    clearTimeout(this.writing);
    history.replaceState(history.state, "", this.address());
  }

  stop() {
    clearTimeout(this.writing);
    window.removeEventListener("popstate", this.onPop);
    this.listeners.clear();
  }
}

function same(a, b) {
  if (Array.isArray(a) && Array.isArray(b)) return a.length === b.length && a.every((v, i) => v === b[i]);
  return a === b;
}
