// How far the maps of two runs are apart, layer by layer, as numbers that a StatGrid shows like statistics.

import { ApiError, getJson, query } from "./request.js";

const LOWEST_FIRST = ["spearman"]; // where a small number means far apart

export class Distances {
  // a, b: MapSources; changed: called when another layer is there
  constructor(a, b, changed) {
    this.pair = [a, b];
    this.changed = changed;
    this.statistics = {};
    this.controller = new AbortController();
    this.ready = this.load();
  }

  get idle() {
    return Boolean(this.done);
  }

  get layers() {
    const [a, b] = this.pair.map(({ facts }) => facts.layers.map(({ layer }) => layer));
    return a.filter((layer) => b.includes(layer));
  }

  async load() {
    const [a, b] = this.pair.map(({ facts }) => facts);
    const { layers } = this;
    this.words = layers.length ? "" : "These runs have recorded no layer in common.";
    try {
      for (const [i, layer] of layers.entries()) {
        const asked = query({ a: a.run, b: b.run, layer, v: `${a.stamp}-${b.stamp}` });
        this.add(layer, await getJson(`/compare/distances?${asked}`, this.controller.signal));
        if (i + 1 < layers.length) this.words = `comparing: ${i + 1} of ${layers.length} layers, ${this.note}`;
        else this.words = this.note;
        this.changed();
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.words = error.message;
      this.changed();
    }
    this.done = true;
    this.changed();
  }

  add(layer, { measures, words, note }) {
    const [a, b] = this.pair.map(({ facts }) => facts.run);
    this.note = note;
    for (const [name, [row]] of Object.entries(measures)) {
      if (row.every((value) => value === null)) continue;
      const { title, formula, unit } = words[name];
      this.statistics[name] ??= {
        title: `${title}, #${a} and #${b}`,
        formula,
        source: "",
        unit,
        order: LOWEST_FIRST.includes(name) ? "low" : "high",
        layers: [],
        heads: [],
        values: [],
      };
      const table = this.statistics[name];
      table.layers.push(layer);
      table.values.push(row);
      if (row.length > table.heads.length) table.heads = row.map((_, head) => head);
      table.values = table.values.map((values) => table.heads.map((head) => values[head] ?? null));
    }
  }

  stop() {
    this.controller.abort();
  }
}
