// Step by step: what each new token attends to in the cache that has grown so far.

import { inkOn, indexOf, precise, short } from "../colour.js";
import { showFiles } from "../files.js";
import { button, element } from "../make.js";
import { ApiError, getTile } from "../request.js";
import { Sheet } from "../sheet.js";
import { OneQuery } from "./one_query.js";

const BEAT_MS = 400;
const CHIPS = 160; // tokens of the cache that stand as words
const PIXELS = { height: 384, width: 512 };
const BAR =
  '<span class="at-steps"><span data-part="play"></span><label>step <input type="range" name="step" min="0" step="1"></label>' +
  '<output data-part="query" aria-live="polite"></output></span>';
const BODY =
  '<div class="at-generation-body"><div><div class="at-text" data-part="text" aria-label="the cache at this step"></div>' +
  '<figure><figcaption data-part="heads-words"></figcaption><div data-part="heads"></div></figure>' +
  '<figure><figcaption data-part="steps-words"></figcaption><div data-part="steps"></div></figure>' +
  '<p class="at-hint">← and → go a step, Home and End to the first and last, space plays; click a row to choose it</p></div>' +
  '<aside class="at-side"><section data-part="bar"></section><section class="at-readout" data-part="read"></section>' +
  '<section data-part="top"></section><section class="at-hint" data-part="hint"></section><section data-part="files"></section></aside></div>';
const HINTS = {
  prefill: "A prefill computed all steps at once: each row is what that step sees when it is decoded on its own.",
  decode: "Each row was computed in a decoding step of its own, over the cache as it was then.",
  train: "A training step computed all steps at once: each row is what that step sees when it is decoded on its own.",
};

export class Generation extends OneQuery {
  constructor(root, run) {
    super(root, run, { layers: run.facts.layers.filter(({ grows }) => grows), css: "at-generation-view", bar: BAR, body: BODY });
    this.slider = this.find('[name="step"]');
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    this.play = button("Play", "play the steps (space)", () => this.toggle());
    this.part("play").append(this.play);
    const told = { key: (event) => this.onKey(event), hover: (cell) => this.say(cell) };
    this.heads = new Sheet(this.part("heads"), { ...told, pick: ({ row }) => this.state.set({ head: row }) });
    this.steps = new Sheet(this.part("steps"), { ...told, pick: ({ row }) => this.go(row) });
    this.slider.addEventListener("keydown", (event) => this.onKey(event));
    this.part("text").addEventListener("click", (event) => {
      const at = event.target.closest(".at-token")?.dataset.at;
      if (at >= this.offset) this.go(Number(at) - this.offset);
    });
    const wrote = run.facts.generated ? " The model wrote these tokens: a step reads one and writes the next." : "";
    this.part("hint").textContent = (HINTS[run.facts.phase] ?? "") + wrote;
    this.ready = this.start();
  }

  // Keys that were there before the first step.
  get offset() {
    return this.layer.keys - this.layer.queries;
  }

  get labels() {
    return this.run.source.labels();
  }

  go(step) {
    const token = Math.max(0, Math.min(this.layer.queries - 1, step));
    this.state.set({ token });
  }

  toggle() {
    if (this.beat) this.pause();
    else {
      if (this.query === this.layer.queries - 1) this.go(0);
      this.beat = setInterval(() => (this.query < this.layer.queries - 1 ? this.go(this.query + 1) : this.pause()), BEAT_MS);
    }
    this.showPlay();
  }

  pause() {
    clearInterval(this.beat);
    this.beat = null;
    this.showPlay();
  }

  showPlay() {
    this.play.textContent = this.beat ? "Pause" : "Play";
    this.play.setAttribute("aria-pressed", String(Boolean(this.beat)));
  }

  onKey(event) {
    const last = this.layer.queries - 1;
    const to = { ArrowLeft: this.query - 1, ArrowRight: this.query + 1, ArrowUp: this.query - 1, ArrowDown: this.query + 1, Home: 0, End: last };
    if (event.key === " ") this.toggle();
    else if (event.key in to) this.go(to[event.key]);
    else {
      this.onCommand(event);
      return;
    }
    event.preventDefault();
  }

  // The row of the step in all heads, and all steps of the chosen head.
  async ask() {
    this.slider.max = this.layer.queries - 1;
    this.slider.value = this.query;
    await Promise.all([super.ask(), this.askSteps()]);
  }

  async askSteps() {
    const { layer, head } = this.state.values;
    const path = this.run.path("viewport", { layer, head, ...PIXELS, reduce: this.state.get("reduce") });
    if (path === this.stepsPath) return;
    this.stepsPath = path;
    this.stepsWanted?.abort();
    this.stepsWanted = new AbortController();
    const caption = this.part("steps-words");
    try {
      const building = (share) => (caption.textContent = `building the overview of this head: ${Math.round(share * 100)} %`);
      const tile = this.run.cache.get(path) ?? (await getTile(path, this.stepsWanted.signal, building));
      this.run.cache.put(path, tile);
      if (path !== this.stepsPath || this.stopped) return;
      this.stepsTile = tile;
      this.stepsWanted = null;
      this.draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.stepsWanted = null;
      if (!(error instanceof ApiError)) throw error;
      this.complain(error.message);
    }
  }

  onState(changed) {
    super.onState(changed);
    if (changed.includes("head") && !changed.includes("layer")) this.askSteps();
  }

  draw() {
    if (!this.rows || !this.stepsTile || this.stopped) return;
    const { head } = this.state.values;
    const { layer, query, heads, keys, values } = this.rows;
    const look = { ...this.scaleOf([values, this.stepsTile.values]), lines: [] };
    const labels = this.labels;
    const seen = this.offset + query + 1;
    const tile = { height: heads, width: keys, values, rows: [0, heads], cols: [0, keys] };
    const names = Array.from({ length: heads }, (_, one) => `H${one}`);
    const words = `L${layer}, all heads at step ${query}`;
    this.part("heads-words").textContent = `${words} · rows are heads, columns the cache`;
    const window = { r0: 0, r1: heads, c0: 0, c1: keys };
    const ofHeads = { ...labels, query: names, queryTitle: "head" };
    this.heads.show({ ...look, tile, window, labels: ofHeads, row: head, words });
    const all = `L${layer}H${head}, all steps`;
    this.part("steps-words").textContent = `${all} · rows are steps, columns the cache`;
    const whole = { r0: 0, r1: this.layer.queries, c0: 0, c1: keys };
    this.steps.show({ ...look, tile: this.stepsTile, window: whole, labels, row: query, words: all });
    this.slider.value = query;
    this.slider.setAttribute("aria-valuetext", `step ${query} of ${this.layer.queries}`);
    this.part("query").textContent = `${query + 1} of ${this.layer.queries}${this.tokenWords(query)}`;
    showFiles(this.part("files"), this.run, { layer, head });
    this.drawText(look, seen);
    this.showTop(seen);
    this.say(this.heads.cross ?? this.steps.cross);
  }

  // What the step reads; of a generation also what it wrote, which the next one reads.
  tokenWords(step) {
    const [token, next] = (this.labels.query ?? []).slice(step, step + 2);
    if (token === undefined) return "";
    return ` · ${token}${this.run.facts.generated && next !== undefined ? ` → ${next}` : ""}`;
  }

  // The newest tokens of the cache as words on the colour of their weight.
  drawText({ scale, table }, seen) {
    const weights = this.weights(this.state.get("head"));
    const first = Math.max(0, seen - CHIPS);
    const names = this.labels.key;
    const chips = [];
    if (first > 0) chips.push(element("span", "at-hint", `${first} earlier … `));
    for (let at = first; at < seen; at++) {
      const chip = element("span", "at-token", names?.[at] ?? String(at));
      const value = weights[at];
      chip.dataset.at = at;
      chip.title = `${at}: ${Number.isNaN(value) ? "masked" : precise(value)}`;
      chip.classList.toggle("at-asked-token", at === seen - 1);
      chip.classList.toggle("at-decoded-token", this.offset > 0 && at >= this.offset);
      if (!Number.isNaN(value)) {
        const colour = table.colours.subarray(indexOf(scale, value) * 3, indexOf(scale, value) * 3 + 3);
        chip.style.background = `rgb(${colour.join()})`;
        chip.style.color = inkOn(...colour);
      }
      chips.push(chip);
    }
    const text = this.part("text");
    text.replaceChildren(...chips);
    text.scrollTop = text.scrollHeight; // the step's own token is the last one
  }

  showTop(seen) {
    const { head } = this.state.values;
    const weights = this.weights(head).subarray(0, seen);
    const order = [...weights.keys()].filter((key) => weights[key]).sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]));
    const lines = order.slice(0, 8).map((key) => this.line(this.labels.key?.[key] ?? "position", key, precise(weights[key])));
    const title = element("div", "at-label", `most of L${this.rows.layer}H${head}, ${seen} keys in the cache`);
    this.part("top").replaceChildren(title, ...lines);
  }

  line(token, at, number) {
    const made = element("div", "at-read");
    made.append(element("b", "", token), ` (${at}) `, element("b", "", number));
    return made;
  }

  say(cell) {
    const sheet = [this.heads, this.steps].find(({ cross }) => cross && cross === cell);
    const place = this.part("read");
    if (!cell || !sheet?.given) {
      place.replaceChildren(element("div", "at-read", "point at a map to read its weights"));
      return;
    }
    const value = sheet.valueAt(cell);
    const number = value === undefined || Number.isNaN(value) ? "masked" : short(value);
    const from = sheet === this.heads ? `H${cell.row}` : `step ${cell.row}`;
    place.replaceChildren(element("div", "at-read", `${from} to`), this.line(this.labels.key?.[cell.col] ?? "position", cell.col, number));
  }

  get idle() {
    return super.idle && Boolean(this.stepsTile) && !this.stepsWanted && !this.beat;
  }

  stop() {
    super.stop();
    clearInterval(this.beat);
    this.stepsWanted?.abort();
    this.heads.stop();
    this.steps.stop();
  }
}
