// A picture under what one of its patches attends to: the chosen head large, all heads of the layer beside it.

import { precise, short } from "../colour.js";
import { showFiles } from "../files.js";
import { readInk } from "../ink.js";
import { getJson } from "../request.js";
import { OneQuery } from "./one_query.js";
import { drawPatches, loadGrey, patchAt } from "./patches.js";

const TOP = 8;
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const BAR =
  '<span>query <output data-part="query" aria-live="polite"></output></span><span data-part="prefix"></span>' +
  '<label data-part="share">picture <input type="range" name="share" min="0" max="100" value="30"></label>';
const BODY =
  '<div class="at-image-body"><figure><figcaption data-part="title"></figcaption>' +
  '<canvas class="at-image" data-part="large" tabindex="0" role="application" aria-label=""></canvas>' +
  '<p class="at-hint">click a patch, or move by the arrow keys: it becomes the query</p></figure>' +
  '<div class="at-image-heads" data-part="heads" role="group" aria-label="heads of this layer"></div>' +
  '<aside class="at-side"><section data-part="bar"></section><section class="at-readout" data-part="read"></section>' +
  '<section data-part="top"></section><section class="at-hint" data-part="answer"></section><section data-part="files"></section></aside></div>';

export class ImageView extends OneQuery {
  constructor(root, run) {
    const layers = run.facts.layers.filter(({ grid }) => grid);
    super(root, run, { layers, css: "at-image-view", bar: BAR, body: BODY });
    this.hovered = null;
    this.large = this.part("large");
    this.share = this.find('[name="share"]');
    this.share.addEventListener("input", () => this.draw());
    this.wire(this.large);
    this.large.addEventListener("keydown", (event) => this.onKey(event));
    this.ready = this.load();
  }

  async load() {
    const { picture, answer } = await getJson(this.run.path("picture", {}));
    this.grey = await loadGrey(picture);
    this.part("share").hidden = !this.grey;
    if (answer) this.part("answer").textContent = `The model answers "${answer.label}" (${Math.round(answer.probability * 100)} %).`;
    await this.start();
  }

  get grid() {
    return this.layer.grid;
  }

  // Whether the queries are patches too: those of a text that reads a picture are not.
  get patchQueries() {
    return this.layer.queries === this.layer.keys;
  }

  firstQuery() {
    const { rows, columns, prefix } = this.grid;
    return this.patchQueries ? prefix + Math.floor(rows / 2) * columns + Math.floor(columns / 2) : 0;
  }

  wire(canvas) {
    canvas.addEventListener("pointermove", (event) => this.hover(patchAt(canvas, this.grid, event)));
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("click", (event) => this.choose(patchAt(canvas, this.grid, event)));
  }

  hover(patch) {
    if (patch === this.hovered) return;
    this.hovered = patch;
    this.draw();
  }

  choose(patch) {
    if (patch !== null && this.patchQueries) this.state.set({ token: this.grid.prefix + patch });
  }

  onKey(event) {
    const arrow = ARROWS[event.key];
    if (!arrow || !this.patchQueries) {
      this.onCommand(event);
      return;
    }
    event.preventDefault();
    const { rows, columns, prefix } = this.grid;
    const patch = Math.max(0, this.query - prefix);
    const row = Math.min(rows - 1, Math.max(0, Math.floor(patch / columns) + arrow[0]));
    const col = Math.min(columns - 1, Math.max(0, (patch % columns) + arrow[1]));
    this.choose(row * columns + col);
  }

  name(position) {
    const { prefix, columns } = this.grid;
    const label = this.run.source.labels().key?.[position];
    if (position < prefix) return label ?? `token ${position}`;
    return `patch ${Math.floor((position - prefix) / columns)},${(position - prefix) % columns}`;
  }

  draw() {
    if (!this.rows || this.stopped) return;
    this.makeHeads();
    const { prefix } = this.grid;
    const head = this.state.get("head");
    const all = Array.from({ length: this.rows.heads }, (_, one) => this.weights(one, prefix));
    const look = {
      grid: this.grid,
      ...this.scaleOf(all),
      grey: this.grey,
      share: this.share.value / 100,
      query: this.patchQueries && this.rows.query >= prefix ? this.rows.query - prefix : null,
      hovered: this.hovered,
      ink: readInk(this.root),
    };
    drawPatches(this.large, { ...look, weights: all[head] });
    [...this.part("heads").children].forEach((chip, one) => {
      chip.setAttribute("aria-pressed", String(one === head));
      drawPatches(chip.querySelector("canvas"), { ...look, weights: all[one] });
      chip.querySelector("span").textContent = this.headWords(one);
    });
    this.say(head);
    showFiles(this.part("files"), this.run, { layer: this.rows.layer, query: this.rows.query });
  }

  makeHeads() {
    const place = this.part("heads");
    if (place.children.length === this.rows.heads) return;
    place.replaceChildren();
    for (let head = 0; head < this.rows.heads; head++) {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "at-image-head";
      const canvas = document.createElement("canvas");
      canvas.className = "at-image";
      chip.append(canvas, document.createElement("span"));
      chip.addEventListener("click", () => this.state.set({ head }));
      canvas.addEventListener("pointermove", (event) => this.hover(patchAt(canvas, this.grid, event)));
      canvas.addEventListener("pointerleave", () => this.hover(null));
      place.append(chip);
    }
  }

  headWords(head) {
    const at = this.hovered === null ? "" : ` ${wordOf(this.weights(head, this.grid.prefix)[this.hovered])}`;
    return `H${head}${at}`;
  }

  say(head) {
    const { prefix } = this.grid;
    const query = this.name(this.rows.query);
    const title = `L${this.rows.layer}H${head} · what ${query} attends to`;
    this.part("title").textContent = title;
    this.large.setAttribute("aria-label", `${title}. Arrow keys choose another patch.`);
    this.part("query").textContent = this.patchQueries ? query : (this.run.source.labels().query?.[this.query] ?? query);
    this.showPrefix();
    const weights = this.weights(head);
    const read = this.hovered === null ? "point at a patch to read its weight" : "";
    this.part("read").replaceChildren(line(read || this.name(this.hovered + prefix), read ? "" : wordOf(weights[this.hovered + prefix])));
    const order = [...weights.keys()].filter((key) => weights[key]).sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]));
    const label = document.createElement("div");
    label.className = "at-label";
    label.textContent = `most of L${this.rows.layer}H${head}`;
    this.part("top").replaceChildren(label, ...order.slice(0, TOP).map((key) => line(this.name(key), precise(weights[key]))));
  }

  // Tokens that are no patch, such as [CLS], are queries that a picture has no place for.
  showPrefix() {
    const place = this.part("prefix");
    const count = this.patchQueries ? this.grid.prefix : 0;
    if (place.children.length !== count) {
      place.replaceChildren();
      for (let token = 0; token < count; token++) {
        const made = document.createElement("button");
        made.type = "button";
        made.textContent = this.name(token);
        made.title = "show what this token attends to";
        made.addEventListener("click", () => this.state.set({ token }));
        place.append(made);
      }
    }
    [...place.children].forEach((made, token) => made.setAttribute("aria-pressed", String(token === this.query)));
  }
}

function wordOf(value) {
  return Number.isNaN(value) ? "masked" : short(value);
}

function line(words, number) {
  const made = document.createElement("div");
  made.className = "at-read";
  const value = document.createElement("b");
  value.textContent = number;
  made.append(`${words} `, value);
  return made;
}
