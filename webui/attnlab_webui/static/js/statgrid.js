// One number for each layer and head, as a small map of the model: a click goes to that head.

import { makeScale, precise, short } from "./colour.js";
import { readInk } from "./ink.js";

const TOP = 5;

export class StatGrid {
  // statistics: {name: {title, formula, source, unit, layers, heads, values: [layer][head]}}
  constructor(root, state, actions) {
    this.root = root;
    this.state = state;
    this.actions = actions;
    root.classList.add("at-stats");
    root.innerHTML =
      '<div class="at-stats-head"><select aria-label="statistic"></select><select aria-label="order">' +
      '<option value="high">highest</option><option value="low">lowest</option></select></div>' +
      '<canvas class="at-stats-grid" tabindex="0" role="application" aria-label=""></canvas>' +
      '<div class="at-stats-axes"><span>layers →</span><span>heads ↓</span></div>' +
      '<div class="at-stats-words" aria-live="polite"></div><div class="at-stats-top"></div>';
    [this.choice, this.order] = root.querySelectorAll("select");
    this.canvas = root.querySelector("canvas");
    this.words = root.querySelector(".at-stats-words");
    this.top = root.querySelector(".at-stats-top");
    this.usual = "high";
    this.choice.addEventListener("change", () => state.set({ statistic: this.choice.value }));
    this.order.addEventListener("change", () => this.showTop());
    this.canvas.addEventListener("pointermove", (event) => this.say(this.headAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.say(this.chosen()));
    this.canvas.addEventListener("click", (event) => this.go(this.headAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(root);
  }

  load(statistics) {
    this.statistics = statistics;
    const names = Object.keys(statistics);
    this.root.hidden = names.length === 0;
    this.choice.replaceChildren(...names.map((name) => new Option(statistics[name].title, name)));
    this.show();
  }

  get info() {
    const names = Object.keys(this.statistics ?? {});
    const name = names.includes(this.state.get("statistic")) ? this.state.get("statistic") : names[0];
    return name ? { name, ...this.statistics[name] } : null;
  }

  show() {
    const { info } = this;
    if (!info) return;
    const usual = info.order ?? "high"; // a small correlation is a large change
    if (usual !== this.usual) this.order.value = usual;
    this.usual = usual;
    this.choice.value = info.name;
    this.choice.title = `${info.formula}\n${info.source}`;
    this.canvas.setAttribute(
      "aria-label",
      `${this.choice.selectedOptions[0].text} of every layer and head; arrow keys move, Enter opens`,
    );
    this.say(this.chosen());
    this.showTop();
    this.draw();
  }

  chosen() {
    return { layer: this.state.get("layer"), head: this.state.get("head") };
  }

  valueOf({ layer, head }) {
    const { info } = this;
    const value = info?.values[info.layers.indexOf(layer)]?.[info.heads.indexOf(head)];
    return value ?? null;
  }

  say(at) {
    const value = at && this.valueOf(at);
    const { info } = this;
    this.words.textContent = value === null || !at ? "" : `L${at.layer}H${at.head}  ${precise(value)} ${info.unit}`;
  }

  go(at) {
    if (at && this.valueOf(at) !== null) this.actions.select(at);
  }

  onKey(event) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const { layer, head } = this.chosen();
    // layers run along x, heads along y
    const { layers, heads } = this.info;
    const next = (list, value, step) => list[Math.min(list.length - 1, Math.max(0, list.indexOf(value) + step))];
    this.go({ layer: next(layers, layer, by[1]), head: next(heads, head, by[0]) });
  }

  headAt(event) {
    const { info } = this;
    if (!info) return null;
    const layer = info.layers[Math.floor((event.offsetX / this.canvas.clientWidth) * info.layers.length)];
    const head = info.heads[Math.floor((event.offsetY / this.canvas.clientHeight) * info.heads.length)];
    return layer === undefined || head === undefined ? null : { layer, head };
  }

  ranked() {
    const { info } = this;
    const found = [];
    info.layers.forEach((layer, l) =>
      info.heads.forEach((head, h) => {
        const value = info.values[l][h];
        if (value !== null) found.push({ layer, head, value });
      }),
    );
    const sign = this.order.value === "high" ? -1 : 1;
    return found.sort((a, b) => sign * (a.value - b.value));
  }

  showTop() {
    const buttons = this.ranked()
      .slice(0, TOP)
      .map(({ layer, head, value }) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `L${layer}H${head} `;
        const number = document.createElement("b");
        number.textContent = short(value);
        button.append(number);
        button.addEventListener("click", () => this.go({ layer, head }));
        return button;
      });
    this.top.replaceChildren(...buttons);
  }

  colour(table) {
    this.table = table;
    this.draw();
  }

  draw() {
    const { info, table, canvas } = this;
    if (!info || !table) return;
    const width = this.root.clientWidth;
    if (!width) return;
    const cell = Math.max(4, Math.min(22, Math.floor(width / info.layers.length)));
    const [w, h] = [cell * info.layers.length, Math.max(6, Math.min(cell, 16)) * info.heads.length];
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
    canvas.width = w * ratio;
    canvas.height = h * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const ink = readInk(this.root);
    const known = info.values.flat().filter((value) => value !== null);
    const low = Math.min(0, ...known);
    const scale = makeScale({ kind: "linear", top: Math.max(...known) - low });
    const high = h / info.heads.length;
    info.layers.forEach((layer, l) =>
      info.heads.forEach((head, k) => {
        const value = info.values[l][k];
        const at = value === null ? -1 : Math.round(Math.min(1, scale.unit(value - low)) * 255) * 3;
        context.fillStyle = at < 0 ? ink.empty : `rgb(${table.colours.slice(at, at + 3).join()})`;
        context.fillRect(l * cell, k * high, cell - 1, high - 1);
      }),
    );
    const column = info.layers.indexOf(this.state.get("layer"));
    const row = info.heads.indexOf(this.state.get("head"));
    if (column < 0 || row < 0) return;
    context.strokeStyle = ink.accent;
    context.lineWidth = 2;
    context.strokeRect(column * cell - 0.5, row * high - 0.5, cell, high);
  }

  stop() {
    this.observer.disconnect();
  }
}
