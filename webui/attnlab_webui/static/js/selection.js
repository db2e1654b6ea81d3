// Which layer and head are chosen, always some that the run has.

export class Selection {
  constructor(state, source) {
    this.state = state;
    this.source = source;
  }

  // Layer and head of the address, or the nearest that the map has.
  settle() {
    const { layers } = this.source.facts;
    const wanted = this.state.get("layer");
    const { layer, heads } = layers.find((entry) => entry.layer === wanted) ?? layers[0];
    this.state.set({ layer, head: Math.min(this.state.get("head"), heads - 1) });
  }

  select({ layer = this.state.get("layer"), head = this.state.get("head") }) {
    this.state.set({ layer, head });
  }

  step(name, by) {
    if (name === "layer") {
      const { layers } = this.source.facts;
      const at = layers.findIndex((entry) => entry.layer === this.state.get("layer"));
      const next = layers[at + by];
      if (next) this.select({ layer: next.layer });
      return;
    }
    const head = this.state.get("head") + by;
    if (head >= 0 && head < this.source.layer.heads) this.select({ head });
  }
}
