// What the views that ask for one thing at a time share: what is on its way, what went wrong, how all of it ends.

export class Waiting {
  constructor(root, run) {
    this.root = root;
    this.run = run;
    this.state = run.state;
    this.detach = []; // undo what the view listens to
    this.wanted = null; // an AbortController while something is on its way
  }

  complain(message) {
    const place = this.root.querySelector(".at-complaint");
    place.textContent = message;
    place.hidden = !message;
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
