// How far the maps of two runs are apart, layer by layer, as numbers that a StatGrid shows like statistics.

import { ApiError, getJson, query } from "./request.js";

const MEASURES = {
  total_variation: { title: "total variation", formula: "half the sum of |p - q|, mean over rows: 0 equal, 1 disjoint", unit: "" },
  jensen_shannon: { title: "Jensen-Shannon", formula: "divergence, mean over rows: 0 equal, 1 disjoint", unit: "bits" },
  // a small correlation means far apart
  spearman: { title: "rank correlation", formula: "Spearman's, of a row's weights, mean over rows: 1 the same order", unit: "", order: "low" },
};

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

  // What the address of a file of these distances holds.
  get named() {
    const [a, { at, facts }] = this.pair;
    return at ? { a: a.facts.run, against: `${at.layer}:${at.head}` } : { a: a.facts.run, b: facts.run };
  }

  // Of two runs the layers that both have; of a head that stays all layers of its run.
  get layers() {
    const [first, second] = this.pair;
    if (second.at) {
      const { queries, keys } = second.layer ?? {};
      return first.facts.layers.filter((one) => one.queries === queries && one.keys === keys).map(({ layer }) => layer);
    }
    const [a, b] = this.pair.map(({ facts }) => facts.layers.map(({ layer }) => layer));
    return a.filter((layer) => b.includes(layer));
  }

  async load() {
    const [a, b] = this.pair.map(({ facts }) => facts);
    const { layers } = this;
    this.words = layers.length ? "" : "These runs have recorded no layer in common.";
    try {
      for (const [i, layer] of layers.entries()) {
        const { at } = this.pair[1];
        const path = at
          ? `/runs/${a.run}/distances?${query({ layer, layer_b: at.layer, head_b: at.head })}`
          : `/compare/distances?${query({ a: a.run, b: b.run, layer })}`;
        this.add(layer, await getJson(path, this.controller.signal), at);
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

  add(layer, { measures, note }, at) {
    const [a, b] = this.pair.map(({ facts }) => facts.run);
    const between = at ? `from L${at.layer}H${at.head}` : `#${a} and #${b}`;
    this.note = note;
    for (const [name, table] of Object.entries(measures)) {
      const row = at ? table.map(([value]) => value) : table[0];
      if (row.every((value) => value === null)) continue;
      const words = MEASURES[name];
      this.statistics[name] ??= { ...words, title: `${words.title}, ${between}`, source: "", layers: [], heads: [], values: [] };
      const found = this.statistics[name];
      found.layers.push(layer);
      found.values.push(row);
      if (row.length > found.heads.length) found.heads = row.map((_, head) => head);
      found.values = found.values.map((values) => found.heads.map((head) => values[head] ?? null));
    }
  }

  stop() {
    this.controller.abort();
  }
}
