// Layer and head of a view that stands beside the map, with the mean of all heads where the view can show it.

import { makeScale } from "./colour.js";
import { Picker } from "./picker.js";
import { ApiError, getTile } from "./request.js";

export class HeadBar {
  constructor(root, run, { mean = false } = {}) {
    this.run = run;
    this.state = run.state;
    const { selection } = run;
    this.picker = new Picker(root, {
      select: (at) => this.choose(at),
      step: (name, by) => (name === "head" && this.isMean ? this.choose({}) : selection.step(name, by)),
    });
    if (mean) this.addMean(root);
    this.show();
  }

  addMean(root) {
    this.mean = document.createElement("button");
    this.mean.type = "button";
    this.mean.textContent = "Mean of heads";
    this.mean.title = "the mean of all heads of the layer";
    this.mean.addEventListener("click", () => this.state.set({ heads: this.isMean ? "" : "mean" }));
    root.querySelector(".at-layer").after(this.mean);
  }

  get isMean() {
    return Boolean(this.mean) && this.state.get("heads") === "mean";
  }

  choose(at) {
    if (at.layer === undefined && this.isMean) this.state.set({ heads: "" });
    this.run.selection.select(at);
  }

  show() {
    const layers = this.run.facts.layers.map(({ layer }) => layer);
    const { layer, head } = this.state.values;
    this.picker.show(layers, layer, this.run.source.layer.heads, head);
    if (this.isMean) this.picker.name.textContent = `L${layer} mean`;
    this.mean?.setAttribute("aria-pressed", String(this.isMean));
    this.picker.root.classList.toggle("at-mean", this.isMean);
    this.loadThumbs();
  }

  async loadThumbs() {
    const path = this.run.path("thumbnails", { layer: this.state.get("layer"), reduce: this.state.get("reduce") });
    if (path === this.path) return;
    this.path = path;
    this.wanted?.abort();
    this.wanted = new AbortController();
    try {
      const { heads } = this.run.source.layer;
      let thumbs = this.run.cache.get(path);
      if (!thumbs) {
        const tile = await getTile(path, this.wanted.signal);
        thumbs = { heads, height: tile.height / heads, width: tile.width, values: tile.values };
        this.run.cache.put(path, thumbs);
      }
      this.thumbs = thumbs;
      this.draw();
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ApiError)) throw error;
    }
  }

  draw() {
    const signed = Boolean(this.run.source.layer.signed);
    const kind = this.state.get("scale");
    const scaleOf = ({ values }) => makeScale({ kind, top: largest(values), signed });
    if (this.thumbs) this.picker.drawThumbs(this.thumbs, scaleOf, this.run.table(signed));
  }

  stop() {
    this.wanted?.abort();
  }
}

function largest(values) {
  let top = 0;
  for (const value of values) if (Math.abs(value) > top) top = Math.abs(value);
  return top;
}
