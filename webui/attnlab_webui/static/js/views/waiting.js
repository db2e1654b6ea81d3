// What all views of a run but the map share: what is on its way, what went wrong, how all of it ends.

import { complain } from "../make.js";

export class Waiting {
  constructor(root, run) {
    this.root = root;
    this.run = run;
    this.state = run.state;
    this.detach = []; // undo what the view listens to
    this.wanted = null; // an AbortController while something is on its way
  }

  complain(message) {
    complain(this.root, message);
  }

  get idle() {
    return Boolean(this.loaded) && !this.wanted;
  }

  stop() {
    this.stopped = true;
    this.wanted?.abort();
    for (const detach of this.detach) detach();
  }
}
