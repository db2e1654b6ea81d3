// What a panel draws: one run's map, or the difference of two.

import { query } from "./request.js";

// facts: the document of /runs/{id}/map; tokens: of /runs/{id}/tokens (or null)
export class MapSource {
  constructor(facts, tokens, state) {
    this.facts = facts;
    this.tokens = tokens;
    this.state = state;
    this.signed = false;
    this.key = `run ${facts.run}`;
  }

  get layer() {
    return this.facts.layers.find((entry) => entry.layer === this.state.get("layer"));
  }

  title() {
    return `L${this.state.get("layer")}H${this.state.get("head")} · ${this.facts.label}`;
  }

  extent() {
    const { layer } = this;
    return layer && this.state.get("head") < layer.heads ? { rows: layer.queries, cols: layer.keys } : null;
  }

  labels() {
    return { query: this.tokens?.query ?? null, key: this.tokens?.key ?? null };
  }

  path(fields) {
    return `/runs/${this.facts.run}/viewport?${query({ ...fields, v: this.facts.stamp })}`;
  }

  cellPath(fields) {
    return `/runs/${this.facts.run}/cell?${fields}`;
  }
}

export class DifferenceSource {
  constructor(a, b, state) {
    this.a = a;
    this.b = b;
    this.state = state;
    this.signed = true;
    this.key = `difference ${a.facts.run} ${b.facts.run}`;
  }

  title() {
    const { layer, head } = this.state.values;
    return `L${layer}H${head} · difference #${this.a.facts.run} − #${this.b.facts.run}`;
  }

  extent() {
    return this.a.extent() ?? this.b.extent();
  }

  labels() {
    return this.a.labels();
  }

  path(fields) {
    const reduce = fields.reduce === "mean" ? "mean" : "signed_max";
    const pair = { a: this.a.facts.run, b: this.b.facts.run };
    const v = `${this.a.facts.stamp}-${this.b.facts.stamp}`;
    return `/compare/viewport?${query({ ...pair, ...fields, reduce, v })}`;
  }

  cellPath(fields) {
    return `/compare/cell?a=${this.a.facts.run}&b=${this.b.facts.run}&${fields}`;
  }
}
