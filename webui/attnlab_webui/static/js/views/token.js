// One token over the text: what it attends to, or who attends to it, as the colour behind every token.

import { indexOf, makeScale, precise } from "../colour.js";
import { onTheme } from "../dark.js";
import { showFiles } from "../files.js";
import { HeadBar } from "../headbar.js";
import { readInk } from "../ink.js";
import { button, element } from "../make.js";
import { ApiError, getJson } from "../request.js";
import { TokenText, topList } from "../token_text.js";
import { Waiting } from "./waiting.js";

const PAGE = 1024; // tokens of the text that stand in the page at once
const DECADES = 3;
const STRIP_HEIGHT = 26;
const WORDS = { sent: "attends to", received: "attended by" };

export class Token extends Waiting {
  constructor(root, run) {
    super(root, run);
    root.className = "at-view at-token-view";
    root.innerHTML =
      '<div class="at-top"><div data-part="picker"></div></div>' +
      '<div class="at-view-bar"><span class="at-asked"></span>' +
      '<label>query <input type="number" name="token" min="0" step="1"></label>' +
      '<span role="radiogroup" aria-label="direction" class="at-switch"></span>' +
      '<label>scale <select name="scale"><option value="log">logarithmic</option><option value="linear">linear</option></select></label>' +
      '<span class="at-pages"></span></div>' +
      '<p class="at-complaint" role="alert" hidden></p>' +
      '<div class="at-token-body"><div><canvas class="at-strip-all" aria-hidden="true"></canvas>' +
      '<div data-part="text" aria-label="tokens; arrow keys choose another one"></div></div>' +
      '<aside class="at-side"><section class="at-readout" aria-live="polite"></section>' +
      '<section data-part="sent"></section><section data-part="received"></section><section data-part="files"></section></aside></div>';
    this.find = (name) => root.querySelector(name);
    this.text = new TokenText(this.find('[data-part="text"]'), {
      click: (at) => this.ask(at),
      over: (at) => this.say(at),
      key: (event) => this.onKey(event),
    });
    this.strip = this.find(".at-strip-all");
    this.heads = new HeadBar(this.find('[data-part="picker"]'), run, { mean: true });
    this.directions = Object.entries(WORDS).map(([name, words]) => {
      const made = button(words, "", () => this.state.set({ direction: name }));
      made.setAttribute("role", "radio");
      made.dataset.direction = name;
      return made;
    });
    this.find(".at-switch").append(...this.directions);
    this.wire();
    this.ready = this.load();
  }

  wire() {
    const number = this.find('[name="token"]');
    number.max = this.rows - 1;
    number.addEventListener("change", () => {
      const row = Number.parseInt(number.value, 10);
      if (row >= 0) this.state.set({ token: Math.min(row, this.rows - 1) });
    });
    const scale = this.find('[name="scale"]');
    scale.addEventListener("change", () => this.state.set({ scale: scale.value }));
    this.strip.addEventListener("click", (event) => this.onStrip(event));
    const resized = new ResizeObserver(() => this.drawStrip());
    resized.observe(this.strip.parentElement);
    this.detach = [
      this.state.listen((changed) => this.onState(changed)),
      onTheme(() => this.draw()),
      () => resized.disconnect(),
    ];
  }

  // ---- which token

  get rows() {
    return this.run.source.layer.queries;
  }

  get row() {
    return Math.min(this.state.get("token") ?? this.rows - 1, this.rows - 1);
  }

  // Rows and columns are one text: a place in the text is a query and a key.
  get oneText() {
    return Boolean(this.document?.received);
  }

  get direction() {
    return this.oneText ? this.state.get("direction") : "sent";
  }

  get side() {
    return this.document[this.direction];
  }

  // The name of a position on the side that is shown.
  label(at, side = this.direction) {
    const { query, key, columns } = this.run.source.labels();
    return (side === "sent" ? key : query)?.[at] ?? `${columns ?? "position"} ${at}`;
  }

  get shift() {
    const { keys, queries } = this.document;
    return keys - queries; // the key of query r stands at r + shift
  }

  // Asks for the query at a place of the text that is shown.
  ask(at) {
    if (this.oneText) this.goTo(at, this.direction);
  }

  // Where the chosen query stands in the text that is shown; null where it is not part of it.
  get place() {
    if (!this.oneText) return null;
    return this.direction === "sent" ? this.row + this.shift : this.row;
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const to =
      by !== undefined
        ? this.row + by
        : { Home: 0, End: this.rows - 1, ArrowUp: this.onLine(-1), ArrowDown: this.onLine(1) }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to !== null && to >= 0 && to < this.rows) this.state.set({ token: to });
  }

  // The query on the line above or below, or null.
  onLine(by) {
    if (!this.oneText) return this.row + by;
    const at = this.text.overLine(by);
    return at === null || this.direction !== "sent" ? at : at - this.shift;
  }

  // ---- data

  onState(changed) {
    if (changed.some((name) => ["layer", "head", "heads"].includes(name))) {
      this.run.selection.settle();
      this.heads.show();
    }
    if (changed.includes("token")) this.page = null;
    if (changed.some((name) => ["layer", "head", "heads", "token"].includes(name))) this.reload();
    else if (changed.includes("direction")) this.show();
    else if (changed.includes("scale") || changed.includes("colours")) this.draw();
  }

  async load() {
    this.page = null;
    await this.request();
    this.show();
  }

  // After another choice: an answer that comes too late is dropped, an error stands over the view.
  async reload() {
    try {
      await this.request();
      this.show();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.wanted = null;
      this.complain(error.message);
      if (!(error instanceof ApiError)) throw error;
    }
  }

  async request() {
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    const { layer, keys, queries } = this.run.source.layer;
    const size = Math.max(keys, queries);
    const page = this.page ?? Math.floor(Math.min(this.row + Math.max(0, keys - queries), size - 1) / PAGE);
    const shown = `${page * PAGE}:${Math.min(size, (page + 1) * PAGE)}`;
    const head = this.heads.isMean ? null : this.state.get("head");
    const found = await getJson(this.run.path("token", { layer, row: this.row, head, shown }), controller.signal);
    if (this.wanted !== controller) throw new DOMException("another token is wanted", "AbortError");
    this.wanted = null;
    this.document = found;
    this.shownPage = page;
    this.complain("");
  }

  turn(page) {
    this.page = page;
    this.reload();
  }

  // ---- drawing

  show() {
    if (this.stopped) return;
    const { start, weights } = this.side;
    const labels = weights.map((_, i) => this.label(start + i));
    this.text.write(labels, start, `${this.direction} ${this.state.get("layer")}`);
    this.showPages();
    this.draw();
    this.text.reveal();
  }

  showPages() {
    const size = this.direction === "sent" ? this.document.keys : this.document.queries;
    const pages = Math.ceil(size / PAGE);
    const place = this.find(".at-pages");
    place.replaceChildren();
    if (pages < 2) return;
    const { start, weights } = this.side;
    const before = button("‹", "the tokens before", () => this.turn(this.shownPage - 1));
    const after = button("›", "the tokens after", () => this.turn(this.shownPage + 1));
    before.disabled = this.shownPage <= 0;
    after.disabled = this.shownPage >= pages - 1;
    place.append(before, element("span", "", `tokens ${start}–${start + weights.length - 1} of ${size}`), after);
  }

  get scale() {
    const signed = Boolean(this.run.source.layer.signed);
    const top = Math.max(...this.side.strip.map(Math.abs));
    return makeScale({ kind: this.state.get("scale"), top, signed, decades: DECADES });
  }

  draw() {
    if (!this.document || this.stopped) return;
    const { scale, side, place } = this;
    const { colours } = this.run.table(scale.signed);
    this.text.paint(side.weights, scale, colours, place);
    this.find('[name="scale"]').value = this.state.get("scale");
    for (const made of this.directions) {
      const chosen = made.dataset.direction === this.direction;
      made.setAttribute("aria-checked", String(chosen));
      made.setAttribute("aria-pressed", String(chosen));
      made.disabled = !this.oneText && made.dataset.direction === "received";
    }
    const number = this.find('[name="token"]');
    if (number !== document.activeElement) number.value = this.row; // nobody's typing is overwritten
    const name = this.run.source.labels().query?.[this.row] ?? "query";
    const asked = this.find(".at-asked");
    asked.replaceChildren(element("b", "", name), ` (${this.row})`);
    for (const which of Object.keys(WORDS)) this.list(which);
    this.say(null);
    this.drawStrip();
    this.heads.draw();
    this.showFiles();
  }

  showFiles() {
    const { start, weights } = this.side;
    const { layer, head } = this.state.values;
    const heads = this.heads.isMean ? "mean" : null;
    const shown = `${start}:${start + weights.length}`;
    showFiles(this.find('[data-part="files"]'), this.run, { layer, head, heads, token: this.row, direction: this.direction, shown }, "token/");
  }

  // The largest weights of a side, as buttons that go to the token.
  list(which) {
    const place = this.find(`[data-part="${which}"]`);
    const side = this.document[which];
    place.hidden = !side;
    if (!side) return;
    const go = this.oneText ? (at) => this.goTo(at, which) : null;
    topList(place, `${WORDS[which]} most`, side.top, (at) => this.label(at, which), go);
  }

  goTo(at, which) {
    const row = which === "sent" ? at - this.shift : at;
    if (row >= 0 && row < this.rows) this.state.go({ token: row });
  }

  say(at) {
    const place = this.find(".at-readout");
    place.replaceChildren();
    const line = (...parts) => {
      const made = element("div", "at-read");
      made.append(...parts);
      place.append(made);
    };
    const { sent } = this.document ?? {};
    if (at === null || !sent) {
      const { queryTitle, keyTitle } = this.run.source.labels();
      if (queryTitle || keyTitle) line(`queries: ${queryTitle}, keys: ${keyTitle}`);
      line("row sum ", element("b", "", sent ? precise(sent.sum) : ""));
      if (this.oneText) line("received in all ", element("b", "", precise(this.document.received.sum)));
      place.append(element("div", "at-hint", this.oneText ? "Click a token, or use the arrow keys." : "Arrow keys choose another query."));
      return;
    }
    const weight = this.side.weights[at - this.side.start];
    line(element("b", "", this.label(at)), ` (${at})`);
    line(`${WORDS[this.direction]} `, element("b", "", weight === null ? "masked" : precise(weight)));
  }

  // ---- the whole row or column in one line

  drawStrip() {
    if (!this.document) return;
    const { strip: canvas, side, scale } = this;
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.parentElement.clientWidth;
    if (!width) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = STRIP_HEIGHT * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const ink = readInk(this.root);
    context.fillStyle = ink.empty;
    context.fillRect(0, 0, width, STRIP_HEIGHT);
    const { colours } = this.run.table(scale.signed);
    const step = width / side.strip.length;
    const high = STRIP_HEIGHT - 6;
    side.strip.forEach((value, i) => {
      const at = indexOf(scale, value) * 3;
      const seen = scale.signed ? value !== 0 : scale.unit(value) > 0;
      context.fillStyle = seen ? `rgb(${colours.slice(at, at + 3).join()})` : ink.empty;
      context.fillRect(i * step, 0, Math.max(1, step), high);
    });
    const size = this.direction === "sent" ? this.document.keys : this.document.queries;
    const x = (at) => (at * width) / size;
    context.fillStyle = ink.faint;
    context.fillRect(x(side.start), high + 2, Math.max(2, x(side.weights.length)), 3);
    if (this.place === null) return;
    context.fillStyle = ink.accent;
    context.fillRect(Math.min(width - 3, x(this.place + 0.5) - 1.5), 0, 3, STRIP_HEIGHT);
  }

  onStrip(event) {
    const size = this.direction === "sent" ? this.document.keys : this.document.queries;
    const at = Math.min(size - 1, Math.floor((event.offsetX / this.strip.clientWidth) * size));
    const page = Math.floor(at / PAGE);
    if (page !== this.shownPage) this.turn(page);
    else this.find(`#at-token-${at}`)?.scrollIntoView({ block: "nearest" });
  }

  get loaded() {
    return this.document;
  }

  stop() {
    super.stop();
    this.heads.stop();
  }
}
