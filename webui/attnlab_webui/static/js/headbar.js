// Layer and head of a view that stands beside the map, with the mean of all heads where the view can show it.

import { Picker } from "./picker.js";
import { Strip } from "./strip.js";

export class HeadBar {
  constructor(root, run, { mean = false } = {}) {
    this.run = run;
    this.state = run.state;
    const { selection } = run;
    this.picker = new Picker(root, {
      select: (at) => this.choose(at),
      step: (name, by) => (name === "head" && this.isMean ? this.choose({}) : selection.step(name, by)),
    });
    this.strip = new Strip(this.picker, run);
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
    this.strip.show();
  }

  draw() {
    this.strip.draw();
  }

  stop() {
    this.strip.stop();
  }
}
