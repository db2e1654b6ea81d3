// Small pictures of heads, asked for a few at a time while they are in sight.

import { ApiError, getTile } from "./request.js";

const AT_ONCE = 3;

export class Thumbs {
  // told: {there(key, tile), building(key, share of what it is made from), failed(key, message)}
  // size: {height, width} of pictures that are no square, which are this view's own
  constructor(run, told, size = null) {
    this.run = run;
    this.size = size;
    this.known = size ? new Map() : run.thumbs;
    this.told = told;
    this.wanted = [];
    this.busy = new Map();
  }

  static key(layer, head, reduce) {
    return `${layer}.${head}.${reduce}`;
  }

  have(key) {
    return this.known.get(key) ?? null;
  }

  want(key) {
    if (this.have(key) || this.busy.has(key) || this.wanted.includes(key)) return;
    this.wanted.push(key);
    this.next();
  }

  forget(key) {
    const at = this.wanted.indexOf(key);
    if (at >= 0) this.wanted.splice(at, 1);
  }

  next() {
    while (this.busy.size < AT_ONCE && this.wanted.length) this.load(this.wanted.shift());
  }

  async load(key) {
    const controller = new AbortController();
    this.busy.set(key, controller);
    const [layer, head, reduce] = key.split(".");
    try {
      const fields = { layer, head, reduce, ...this.size };
      const path = this.run.path(this.size ? "viewport" : "thumbnails", fields);
      const tile = await getTile(path, controller.signal, (share) => this.told.building?.(key, share));
      this.known.set(key, tile);
      this.told.there(key, tile);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.told.failed(key, error.message);
    } finally {
      if (this.busy.get(key) === controller) this.busy.delete(key);
    }
    this.next();
  }

  get idle() {
    return this.busy.size === 0 && this.wanted.length === 0;
  }

  stop() {
    this.wanted = [];
    for (const controller of this.busy.values()) controller.abort();
    this.busy.clear();
  }
}
