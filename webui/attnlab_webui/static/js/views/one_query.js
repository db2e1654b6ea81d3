// What the views of one query share: layers that they can show, the query in every head, scale, colours, keys.

import { makeScale, topOf } from "../colour.js";
import { ColourBar } from "../colourbar.js";
import { onTheme } from "../dark.js";
import { ApiError, getTile } from "../request.js";
import { Waiting } from "./waiting.js";

const ASK_MS = 30;

export class OneQuery extends Waiting {
  // choices: {layers: those the view can show, css: its class, bar: HTML beside the layer's choice, body: HTML}
  constructor(root, run, { layers, css, bar, body }) {
    super(root, run);
    this.layers = layers;
    this.rows = null; // {heads, keys, values} of the query that is shown
    root.className = `at-view ${css}`;
    root.innerHTML =
      `<div class="at-view-bar"><label>layer <select name="layer"></select></label>${bar}` +
      '<label>scale <select name="scale"><option value="linear">linear</option><option value="log">logarithmic</option>' +
      '</select></label><button type="button" data-part="open">Open the map</button></div>' +
      `<p class="at-complaint" role="alert" hidden></p>${body}`;
    this.find = (name) => root.querySelector(name);
    this.part = (name) => root.querySelector(`[data-part="${name}"]`);
    this.bar = new ColourBar(this.part("bar"), "");
    this.choice = this.find('[name="layer"]');
    this.scaleChoice = this.find('[name="scale"]');
    this.choice.append(...layers.map(({ layer, name }) => new Option(`${layer} · ${name}`, layer)));
    this.choice.addEventListener("change", () => this.state.set({ layer: Number(this.choice.value) }));
    this.scaleChoice.addEventListener("change", () => this.state.set({ scale: this.scaleChoice.value }));
    this.part("open").addEventListener("click", () => this.state.go({ view: "map", rows: null, cols: null }));
    const observer = new ResizeObserver(() => this.draw());
    observer.observe(root);
    this.detach = [
      this.state.listen((changed) => this.onState(changed)),
      onTheme(() => this.draw()),
      () => observer.disconnect(),
    ];
  }

  // Called by the view once it can draw.
  start() {
    this.settle();
    this.showChoices();
    return this.ask();
  }

  get layer() {
    return this.layers.find(({ layer }) => layer === this.state.get("layer")) ?? this.layers[0];
  }

  get query() {
    return this.state.get("token") ?? this.firstQuery();
  }

  firstQuery() {
    return this.layer.queries - 1;
  }

  // Layer, head and query of the address, or the nearest that this view can show.
  settle() {
    const { layer, heads, queries } = this.layer;
    const token = this.state.get("token");
    this.state.set({
      layer,
      head: Math.min(this.state.get("head"), heads - 1),
      token: token === null ? null : Math.min(token, queries - 1),
    });
  }

  onState(changed) {
    if (changed.some((name) => ["layer", "head", "token"].includes(name))) this.settle();
    this.showChoices();
    if (changed.includes("layer") || changed.includes("token")) this.ask();
    else this.draw();
  }

  showChoices() {
    this.choice.value = String(this.layer.layer);
    this.scaleChoice.value = this.state.get("scale");
  }

  // The row of the query in every head; of several that are asked for while one is on its way only the last is fetched.
  async ask() {
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    const query = this.query;
    const path = this.run.path("heads", { layer: this.layer.layer, rows: `${query}:${query + 1}` });
    try {
      let tile = this.run.cache.get(path);
      if (!tile) {
        await new Promise((resolve) => setTimeout(resolve, ASK_MS));
        if (controller.signal.aborted) return;
        tile = await getTile(path, controller.signal);
        this.run.cache.put(path, tile);
      }
      if (this.wanted !== controller || this.stopped) return;
      this.rows = { heads: tile.height, keys: tile.width, values: tile.values, query, layer: this.layer.layer };
      this.complain("");
      this.draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.complain(error.message);
    } finally {
      if (this.wanted === controller) this.wanted = null;
    }
  }

  // One head's weights, from key `from` on.
  weights(head, from = 0) {
    const { keys, values } = this.rows;
    return values.subarray(head * keys + from, (head + 1) * keys);
  }

  // One scale for everything that is shown together: values is a list of arrays.
  scaleOf(values) {
    const { signed } = this.layer;
    const top = topOf(values.map((part) => ({ values: part })), this.state.get("clip"));
    const scale = makeScale({ kind: this.state.get("scale"), top, signed });
    const table = this.run.table(signed);
    this.bar.show(scale, table, signed ? "signed weight" : "weight", this.state.get("clip") < 100);
    return { scale, table };
  }

  // Keys that every one of these views knows; true if it was one.
  onCommand(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    const at = this.layers.indexOf(this.layer);
    const layer = (by) => this.state.set({ layer: (this.layers[at + by] ?? this.layer).layer });
    const head = (by) => {
      const to = this.state.get("head") + by;
      if (to >= 0 && to < this.layer.heads) this.state.set({ head: to });
    };
    const commands = {
      "[": () => head(-1),
      "]": () => head(1),
      "{": () => layer(-1),
      "}": () => layer(1),
      l: () => this.state.set({ scale: this.state.get("scale") === "log" ? "linear" : "log" }),
    };
    commands[event.key]?.();
    if (commands[event.key]) event.preventDefault();
    return event.key in commands;
  }

  get idle() {
    return !this.wanted && (this.rows !== null || !this.find(".at-complaint").hidden);
  }
}
