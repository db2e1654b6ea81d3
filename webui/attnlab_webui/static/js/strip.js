// The pictures on the chips of a layer's heads: one answer for all of them; of long maps each as soon as it is made.

import { makeScale } from "./colour.js";
import { ApiError, getTileIfThere } from "./request.js";
import { Thumbs } from "./thumbs.js";

export class Strip {
  // picker: the Picker whose chips carry the pictures; run: a RunData
  constructor(picker, run) {
    this.picker = picker;
    this.run = run;
    this.thumbs = new Thumbs(run, {
      there: (key) => this.onThumb(key),
      building: (key, share) => this.onBuilding(key, share),
      failed: (key, message) => this.onFailed(key, message),
    });
    this.failures = new Map(); // head -> why it has no picture
    this.seen = new IntersectionObserver((entries) => this.onSeen(entries), { root: picker.chips });
  }

  get heads() {
    return this.run.source.layer?.heads ?? 0;
  }

  key(head) {
    return Thumbs.key(this.run.state.get("layer"), head, this.run.state.get("reduce"));
  }

  // Shows the layer that is chosen, and asks for the pictures that are not here.
  show() {
    const shown = this.key("");
    if (shown !== this.shown) {
      this.shown = shown;
      this.rest();
      this.load();
    }
    this.draw();
  }

  async load() {
    const { layer, reduce } = this.run.state.values;
    const { heads } = this;
    if (Array.from({ length: heads }, (_, head) => this.thumbs.have(this.key(head))).every(Boolean)) return;
    this.wanted = new AbortController();
    try {
      const tile = await getTileIfThere(this.run.path("thumbnails", { layer, reduce }), this.wanted.signal);
      if (tile) this.keep(tile, heads);
      else this.oneByOne();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.oneByOne(); // each says for itself what is wrong
    }
  }

  keep({ height, width, values }, heads) {
    const size = values.length / heads;
    for (let head = 0; head < heads; head++) {
      this.thumbs.known.set(this.key(head), { height: height / heads, width, values: values.slice(head * size, (head + 1) * size) });
    }
    this.draw();
  }

  // The head that is looked at comes first: its map is being made anyway.
  oneByOne() {
    const head = this.run.state.get("head");
    if (head < this.heads) this.thumbs.want(this.key(head));
    for (const chip of this.picker.chips.children) this.seen.observe(chip);
    this.say();
  }

  onSeen(entries) {
    for (const { target, isIntersecting } of entries) {
      const head = Number(target.dataset.head);
      if (isIntersecting) this.thumbs.want(this.key(head));
      else if (head !== this.run.state.get("head")) this.thumbs.forget(this.key(head));
    }
  }

  onThumb(key) {
    const head = headOf(key);
    this.failures.delete(head);
    this.picker.note(head, "");
    this.draw();
    this.say();
  }

  onBuilding(key, share) {
    this.picker.note(headOf(key), share > 0 ? `${Math.round(share * 100)} %` : "waits");
  }

  onFailed(key, message) {
    const head = headOf(key);
    this.failures.set(head, message);
    this.picker.note(head, "failed", message);
    this.say();
  }

  // How many of a long layer's pictures there are; nothing once all are there.
  say() {
    const { heads } = this;
    const there = Array.from({ length: heads }, (_, head) => head).filter((head) => this.thumbs.have(this.key(head))).length;
    const lines = [];
    if (there + this.failures.size < heads) lines.push(`${there} of ${heads} pictures`);
    for (const [head, why] of [...this.failures].slice(0, 1)) {
      const others = this.failures.size > 1 ? ` (and ${this.failures.size - 1} more)` : "";
      lines.push(`No picture of H${head}${others}: ${why}`);
    }
    this.picker.say(lines.join(". "));
  }

  draw() {
    const signed = Boolean(this.run.source.layer?.signed);
    const kind = this.run.state.get("scale");
    const scaleOf = ({ values }) => makeScale({ kind, top: largest(values), signed });
    this.picker.drawHeads((head) => this.thumbs.have(this.key(head)), `${kind} ${signed}`, scaleOf, this.run.table(signed));
  }

  rest() {
    this.wanted?.abort();
    this.thumbs.stop();
    this.seen.disconnect();
    this.failures.clear();
    for (const chip of this.picker.chips.children) this.picker.note(Number(chip.dataset.head), "");
    this.picker.say("");
  }

  stop() {
    this.rest();
  }
}

function headOf(key) {
  return Number(key.split(".")[1]);
}

function largest(values) {
  let top = 0;
  for (const value of values) if (Math.abs(value) > top) top = Math.abs(value);
  return top;
}
