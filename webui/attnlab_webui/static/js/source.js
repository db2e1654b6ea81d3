// What a panel draws: one run's map, or the difference of two.

import { query } from "./request.js";

// facts: the document of /runs/{id}/map; tokens: of /runs/{id}/tokens (or null)
export class MapSource {
  constructor(facts, tokens, state) {
    this.facts = facts;
    this.tokens = tokens;
    this.state = state;
    this.key = `run ${facts.run}`;
    this.noun = "head";
    this.named = false; // whether the title says the model, where those compared have several
  }

  get layer() {
    return this.facts.layers.find((entry) => entry.layer === this.state.get("layer"));
  }

  // A part is another map of the same head: one of the two of a difference, or one part of a latent score.
  get part() {
    const part = this.state.get("part");
    return this.layer && part in this.layer.parts ? part : null;
  }

  get signed() {
    const scores = this.part === "content" || this.part === "position";
    return scores || Boolean(this.layer?.signed && !this.part);
  }

  title() {
    const role = this.role() ? ` ${this.role()}` : "";
    const part = this.part ? ` · ${this.part}` : "";
    const model = this.named ? `${this.facts.model} · ` : "";
    return `L${this.state.get("layer")}H${this.state.get("head")}${role}${part} · ${model}${this.facts.label}`;
  }

  // "encoder", "self" or "cross", where the model has more than one of them.
  role() {
    const roles = new Set(this.facts.layers.map((entry) => entry.role));
    return roles.size > 1 ? (this.layer?.role ?? "") : "";
  }

  extent() {
    const { layer } = this;
    return layer && this.state.get("head") < layer.heads ? { rows: layer.queries, cols: layer.keys } : null;
  }

  // Why there is no map of the chosen head, "" where there is one: a compared run may have fewer.
  lack() {
    const [layer, head] = [this.state.get("layer"), this.state.get("head")];
    if (!this.layer) return `#${this.facts.run} has no map of layer ${layer}, only of ${spans(this.facts.layers.map((one) => one.layer))}.`;
    return head < this.layer.heads ? "" : `#${this.facts.run} has no head ${head} in layer ${layer}, only ${spans([...Array(this.layer.heads).keys()])}.`;
  }

  // The names of rows and columns of the chosen layer: of its own two sequences where the model has several.
  labels() {
    const streams = this.tokens?.streams ?? {};
    const query = streams[this.layer?.query_stream];
    const key = streams[this.layer?.key_stream];
    // slots and cells are no tokens of the input
    const columns = this.layer?.columns ? { slots: "slot", reduced: "cell" }[this.layer.kind] : "key";
    return {
      query: query?.labels ?? this.tokens?.query ?? null,
      key: this.layer?.columns ? null : (key?.labels ?? this.tokens?.key ?? null),
      queryTitle: query?.title ?? "",
      keyTitle: key?.title ?? "",
      columns,
    };
  }

  path(fields) {
    return `/runs/${this.facts.run}/viewport?${query({ ...fields, part: this.part ?? undefined, v: this.facts.stamp })}`;
  }

  cellPath(fields) {
    return `/runs/${this.facts.run}/cell?${query({ ...fields, part: this.part ?? undefined })}`;
  }
}

// One head of a run that stays, whatever is chosen: another layer or head is compared with it.
export class PinnedSource extends MapSource {
  constructor(facts, tokens, state, at) {
    super(facts, tokens, { get: (name) => (name in at ? at[name] : state.get(name)) });
    this.at = at;
    this.key = `run ${facts.run} L${at.layer}H${at.head}`;
  }

  path(fields) {
    return super.path({ ...fields, ...this.at });
  }

  cellPath({ row, col }) {
    return super.cellPath({ ...this.at, row, col });
  }
}

export class DifferenceSource {
  constructor(a, b, state) {
    this.a = a;
    this.b = b;
    this.state = state;
    this.signed = true;
    this.key = `difference ${a.facts.run} ${b.facts.run}`;
    this.noun = "difference";
  }

  // What is taken away where it is another head of the same run.
  get second() {
    const { at } = this.b;
    return at ? { layer_b: at.layer, head_b: at.head } : {};
  }

  title() {
    const { layer, head } = this.state.values;
    const { at } = this.b;
    if (at) return `difference L${layer}H${head} − L${at.layer}H${at.head}`;
    const [a, b] = [this.a, this.b].map(({ facts, named }) => `#${facts.run}${named ? ` ${facts.model}` : ""}`);
    return `L${layer}H${head} · difference ${a} − ${b}`;
  }

  extent() {
    return this.b.extent() && this.a.extent();
  }

  lack() {
    return this.a.lack() || this.b.lack();
  }

  labels() {
    return this.a.labels();
  }

  path(fields) {
    const reduce = fields.reduce === "mean" ? "mean" : "signed_max";
    const pair = { a: this.a.facts.run, b: this.b.facts.run };
    const v = `${this.a.facts.stamp}-${this.b.facts.stamp}`;
    return `/compare/viewport?${query({ ...pair, ...fields, ...this.second, reduce, v })}`;
  }

  cellPath(fields) {
    return `/compare/cell?${query({ a: this.a.facts.run, b: this.b.facts.run, ...fields, ...this.second })}`;
  }
}

// "0–5", or all of them where some are missing between.
function spans(layers) {
  const [first, last] = [layers[0], layers.at(-1)];
  return last - first + 1 === layers.length && last > first ? `${first}–${last}` : layers.join(", ");
}
