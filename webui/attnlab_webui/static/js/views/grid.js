// All layers and heads at once: small pictures that are sorted and filtered by any statistic; a click opens the map.

import { makeScale, paint, short } from "../colour.js";
import { parseConditions } from "../conditions.js";
import { drawCurves, drawLine } from "../curves.js";
import { onTheme } from "../dark.js";
import { fileLink, showFiles } from "../files.js";
import { hatch, readInk } from "../ink.js";
import { element } from "../make.js";
import { ApiError, getJson } from "../request.js";
import { StatGrid } from "../statgrid.js";
import { Thumbs } from "../thumbs.js";
import { Waiting } from "./waiting.js";

const SIDE = 48;
const ORDERS = { layer: "layer and head", high: "highest first", low: "lowest first" };

export class Grid extends Waiting {
  constructor(root, run) {
    super(root, run);
    this.thumbs = new Thumbs(run, {
      there: (key, tile) => this.onThumb(key, tile),
      building: (key, share) => this.onBuilding(key, share),
      failed: (key, message) => this.onFailed(key, message),
    });
    this.problem = ""; // why there are no statistics
    this.failures = new Map(); // tile -> why it has no picture
    this.tiles = new Map(); // "layer.head" -> its button
    this.statistics = {};
    root.className = "at-view at-grid-view";
    root.innerHTML =
      '<div class="at-view-bar"><label>statistic <select name="statistic"></select></label>' +
      '<label>order <select name="sort"></select></label>' +
      '<label class="at-grow">only heads with <input type="text" name="where" list="at-statistics" maxlength="200"' +
      ' placeholder="sink_mass &gt; 0.8 and entropy &lt; 1" spellcheck="false"></label>' +
      '<datalist id="at-statistics"></datalist><output class="at-count" aria-live="polite"></output></div>' +
      '<p class="at-complaint" role="alert" hidden></p><div data-part="building" role="status"></div>' +
      '<div class="at-grid-body"><div class="at-grid" role="grid" aria-label="heads"></div>' +
      '<aside class="at-side"><section data-part="stats" hidden></section>' +
      '<section data-part="curves"></section><section data-part="formula" class="at-hint"></section>' +
      '<section data-part="positions"></section><section data-part="files" hidden></section></aside></div>';
    this.find = (name) => root.querySelector(name);
    this.grid = this.find(".at-grid");
    this.seen = new IntersectionObserver((entries) => this.onSeen(entries), { rootMargin: "120px" });
    this.stats = new StatGrid(this.find('[data-part="stats"]'), this.state, { select: (at) => this.choose(at) });
    this.detach = [this.state.listen((changed) => this.onState(changed)), onTheme(() => this.recolour())];
    this.wire();
    this.ready = this.load();
  }

  wire() {
    const order = this.find('[name="sort"]');
    for (const [name, words] of Object.entries(ORDERS)) order.append(new Option(words, name));
    this.find('[name="statistic"]').addEventListener("change", (event) => this.state.set({ statistic: event.target.value }));
    order.addEventListener("change", () => this.state.set({ sort: order.value }));
    this.find('[name="where"]').addEventListener("input", (event) => this.state.set({ where: event.target.value }));
    this.grid.addEventListener("click", (event) => {
      const tile = event.target.closest(".at-tile");
      if (tile) this.open(tile);
    });
    this.grid.addEventListener("keydown", (event) => this.onKey(event));
  }

  async load() {
    this.makeTiles();
    this.arrange();
    this.revealChosen();
    try {
      const found = await getJson(`/runs/${this.run.run}/statistics`);
      this.statistics = found.statistics;
      this.curves = found.curves;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.problem = error.message;
    }
    if (this.stopped) return;
    const names = Object.keys(this.statistics);
    this.find('[name="statistic"]').replaceChildren(...names.map((name) => new Option(this.statistics[name].title, name)));
    this.find("datalist").replaceChildren(...names.map((name) => new Option(this.statistics[name].title, name)));
    for (const name of ["statistic", "sort", "where"]) this.find(`[name="${name}"]`).disabled = !names.length;
    if (!names.length && !this.problem) this.find('[data-part="formula"]').textContent = "This run recorded no statistics: add `statistics` to `record`.";
    this.stats.load(this.statistics);
    this.loaded = true;
    this.arrange();
    this.recolour();
    await this.showPositions();
  }

  // What the run keeps of the chosen head along its positions.
  async showPositions() {
    const { layer, head } = this.state.values;
    const { queries, keys } = this.run.source.layer;
    const place = this.find('[data-part="positions"]');
    this.wanted?.abort();
    const controller = new AbortController();
    this.wanted = controller;
    try {
      const asked = (this.curves ?? []).map((name) => getJson(this.run.path("curve", { name, layer, head }), controller.signal));
      const found = await Promise.all(asked);
      place.replaceChildren();
      for (const { name, points } of found) {
        const [words, last] = name === "row_entropy" ? ["entropy of each query, nats", queries - 1] : ["weight that each key receives", keys - 1];
        drawLine(place, `L${layer}H${head} · ${words}`, points, last);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      place.replaceChildren(); // a layer that kept none
    }
    if (this.wanted === controller) this.wanted = null;
  }

  makeTiles() {
    for (const { layer, heads } of this.run.facts.layers) {
      for (let head = 0; head < heads; head++) {
        const tile = document.createElement("button");
        tile.type = "button";
        tile.className = "at-tile";
        tile.dataset.layer = layer;
        tile.dataset.head = head;
        tile.tabIndex = -1;
        const picture = document.createElement("canvas");
        picture.width = picture.height = SIDE;
        tile.append(picture, document.createElement("small"), document.createElement("span"));
        this.tiles.set(`${layer}.${head}`, tile);
        this.seen.observe(tile);
      }
    }
  }

  // ---- order and filter

  value(tile) {
    return this.stats.valueOf({ layer: Number(tile.dataset.layer), head: Number(tile.dataset.head) });
  }

  // The tiles that the filter lets through, as a Set; a filter that cannot be read lets all through and says why.
  kept() {
    const all = [...this.tiles.values()];
    this.complain(this.problem);
    let conditions = [];
    try {
      if (this.loaded) conditions = parseConditions(this.state.get("where"), Object.keys(this.statistics));
    } catch (error) {
      this.complain(error.message);
    }
    const passes = (tile) =>
      conditions.every(({ name, test }) => {
        const { layers, heads, values } = this.statistics[name];
        const row = values[layers.indexOf(Number(tile.dataset.layer))];
        return test(row?.[heads.indexOf(Number(tile.dataset.head))] ?? null);
      });
    return new Set(all.filter(passes));
  }

  arrange() {
    const kept = this.kept();
    const { sort, where, statistic } = this.state.values;
    const matrix = sort === "layer" || !this.loaded;
    const [box, order] = [this.find('[name="where"]'), this.find('[name="sort"]')];
    if (box.value !== where) box.value = where;
    order.value = sort;
    if (this.stats.info) this.find('[name="statistic"]').value = this.stats.info.name;
    this.grid.classList.toggle("at-sorted", !matrix);
    const focused = document.activeElement?.closest?.(".at-tile");
    if (matrix) this.asMatrix(kept);
    else this.asList(kept, sort === "high" ? -1 : 1);
    focused?.focus();
    const { size } = this.tiles;
    this.find(".at-count").textContent = kept.size < size ? `${kept.size} of ${size} heads` : `${size} heads`;
    this.showChosen();
    this.showStatistic(statistic);
  }

  asMatrix(kept) {
    const { layers } = this.run.facts;
    const most = Math.max(...layers.map(({ heads }) => heads));
    this.grid.style.setProperty("--at-heads", String(most));
    const rows = [this.line([corner("")].concat(Array.from({ length: most }, (_, head) => corner(`H${head}`, "columnheader"))))];
    for (const { layer, heads } of layers) {
      const tiles = Array.from({ length: heads }, (_, head) => this.tiles.get(`${layer}.${head}`));
      for (const tile of tiles) {
        tile.classList.toggle("at-faint", !kept.has(tile));
        this.name(tile, false);
      }
      rows.push(this.line([corner(`L${layer}`, "rowheader"), ...tiles.map(cell)]));
    }
    this.grid.replaceChildren(...rows);
  }

  asList(kept, sign) {
    const order = [...kept].sort((a, b) => sign * ((this.value(a) ?? Infinity * sign) - (this.value(b) ?? Infinity * sign)));
    for (const tile of order) {
      tile.classList.remove("at-faint");
      this.name(tile, true);
    }
    this.grid.replaceChildren(this.line(order.map(cell)));
    if (order.length) return;
    const none = document.createElement("p");
    none.className = "at-hint";
    none.textContent = "No head of this run passes the filter.";
    this.grid.append(none);
  }

  line(children) {
    const row = document.createElement("div");
    row.className = "at-grid-row";
    row.setAttribute("role", "row");
    row.append(...children);
    return row;
  }

  name(tile, full) {
    const { layer, head } = tile.dataset;
    const value = this.value(tile);
    const number = value === null ? "" : short(value);
    const failed = this.failures.has(tile) ? "failed" : "";
    tile.querySelector("span").textContent = full ? `L${layer}H${head} ${failed || number}` : failed;
    const what = value === null ? "" : `, ${this.stats.info.title} ${number}`;
    tile.setAttribute("aria-label", `layer ${layer} head ${head}${what}`);
    tile.title = `L${layer}H${head}${what}`;
  }

  showStatistic() {
    const { info } = this.stats;
    if (!info) return;
    const at = { layer: this.state.get("layer"), head: this.state.get("head") };
    drawCurves(this.find('[data-part="curves"]'), info, at, (chosen) => this.choose(chosen));
    this.find('[data-part="formula"]').textContent = `${info.title}: ${info.formula}. ${info.source}.`;
    this.showFiles(info);
  }

  showFiles(info) {
    const place = this.find('[data-part="files"]');
    place.hidden = false;
    showFiles(place, this.run, { statistic: info.name }, "grid/");
    place.querySelector(".at-label").textContent = "this statistic";
    const numbers = ["npz", "parquet", "safetensors"];
    const links = numbers.map((format) => fileLink(format, `/api/v1/runs/${this.run.run}/export/${format}`));
    place.append(element("span", "at-label", "all numbers"), ...links);
  }

  // ---- what is chosen

  choose(at) {
    this.state.set(at);
    this.tiles.get(`${this.state.get("layer")}.${this.state.get("head")}`)?.scrollIntoView({ block: "nearest" });
  }

  open(tile) {
    this.state.go({ view: "map", layer: Number(tile.dataset.layer), head: Number(tile.dataset.head), rows: null, cols: null });
  }

  onKey(event) {
    const tile = event.target.closest(".at-tile");
    if (!tile) return;
    const shown = [...this.grid.querySelectorAll(".at-tile")];
    const at = shown.indexOf(tile);
    const top = tile.offsetTop;
    const side = shown.filter((other) => other.offsetLeft === tile.offsetLeft);
    const to = {
      ArrowLeft: () => shown[at - 1],
      ArrowRight: () => shown[at + 1],
      ArrowUp: () => side.filter((other) => other.offsetTop < top).at(-1),
      ArrowDown: () => side.find((other) => other.offsetTop > top),
      Home: () => shown[0],
      End: () => shown.at(-1),
    }[event.key]?.();
    if (!to) return;
    event.preventDefault();
    this.choose({ layer: Number(to.dataset.layer), head: Number(to.dataset.head) });
    to.focus();
  }

  showChosen() {
    const wanted = this.tiles.get(`${this.state.get("layer")}.${this.state.get("head")}`);
    const reachable = wanted?.isConnected ? wanted : this.grid.querySelector(".at-tile");
    for (const tile of this.tiles.values()) {
      tile.tabIndex = tile === reachable ? 0 : -1;
      tile.classList.toggle("at-chosen", tile === wanted);
    }
  }

  // Scrolls the grid, and not the page, to the head of the address.
  revealChosen() {
    const { grid } = this;
    const tile = grid.querySelector(".at-chosen");
    if (tile && tile.offsetTop + tile.offsetHeight > grid.clientHeight) grid.scrollTop = tile.offsetTop - grid.clientHeight / 2;
  }

  onState(changed) {
    if (changed.some((name) => ["statistic", "sort", "where"].includes(name))) {
      this.stats.show();
      this.arrange();
    }
    if (changed.includes("layer") || changed.includes("head")) {
      this.run.selection.settle();
      this.showChosen();
      this.stats.show();
      this.showStatistic();
      this.showPositions();
    }
  }

  // ---- pictures

  key(tile) {
    return Thumbs.key(tile.dataset.layer, tile.dataset.head, this.state.get("reduce"));
  }

  onSeen(entries) {
    for (const { target, isIntersecting } of entries) {
      const key = this.key(target);
      const known = this.thumbs.have(key);
      if (isIntersecting && known) this.draw(target, known);
      else if (isIntersecting) this.thumbs.want(key);
      else this.leave(target, key);
    }
  }

  leave(tile, key) {
    this.thumbs.forget(key);
    if (!this.thumbs.busy.has(key)) tile.querySelector("small").textContent = "";
  }

  onThumb(key, tile) {
    const place = this.placeOf(key);
    this.failures.delete(place);
    place.querySelector("small").textContent = "";
    this.draw(place, tile);
    this.sayBuilding();
  }

  onBuilding(key, share) {
    this.placeOf(key).querySelector("small").textContent = share > 0 ? `${Math.round(share * 100)} %` : "waits";
    this.long = true;
    this.sayBuilding();
  }

  onFailed(key, message) {
    const place = this.placeOf(key);
    this.failures.set(place, message);
    place.querySelector("small").textContent = "";
    this.name(place, this.grid.classList.contains("at-sorted"));
    this.sayBuilding();
  }

  placeOf(key) {
    const [layer, head] = key.split(".");
    return this.tiles.get(`${layer}.${head}`);
  }

  // A long map is read from its first to its last key for a picture: once a head, one head after another.
  sayBuilding() {
    const lines = [];
    const there = [...this.tiles.values()].filter((tile) => this.thumbs.have(this.key(tile))).length;
    const left = this.tiles.size - there - this.failures.size;
    if (this.long && left) lines.push(`These maps are long: each picture is made when its head comes into sight, and kept. ${there} of ${this.tiles.size} are there.`);
    if (this.failures.size) {
      const [[tile, why]] = this.failures;
      const others = this.failures.size > 1 ? ` (and ${this.failures.size - 1} more)` : "";
      lines.push(`No picture of L${tile.dataset.layer}H${tile.dataset.head}${others}: ${why}`);
    }
    this.find('[data-part="building"]').replaceChildren(...lines.map((words) => element("p", "at-hint", words)));
  }

  draw(place, tile) {
    if (!this.run.tables) return;
    const canvas = place.querySelector("canvas");
    const context = canvas.getContext("2d");
    const signed = this.run.facts.layers.find(({ layer }) => layer === Number(place.dataset.layer)).signed;
    let top = 0;
    for (const value of tile.values) if (Math.abs(value) > top) top = Math.abs(value);
    const scale = makeScale({ kind: this.state.get("scale"), top, signed });
    const small = document.createElement("canvas");
    small.width = tile.width;
    small.height = tile.height;
    small.getContext("2d").putImageData(paint(tile, scale, this.run.table(signed).colours), 0, 0);
    context.imageSmoothingEnabled = false;
    context.fillStyle = hatch(context, readInk(this.root));
    context.fillRect(0, 0, SIDE, SIDE);
    context.drawImage(small, 0, 0, SIDE, SIDE);
    place.classList.add("at-drawn");
    this.name(place, this.grid.classList.contains("at-sorted"));
  }

  recolour() {
    for (const place of this.tiles.values()) {
      const tile = this.thumbs.have(this.key(place));
      if (tile) this.draw(place, tile);
    }
    this.stats.colour(this.run.table(false));
    if (this.stats.info) this.showFiles(this.stats.info);
  }

  get idle() {
    return super.idle && this.thumbs.idle;
  }

  stop() {
    super.stop();
    this.thumbs.stop();
    this.seen.disconnect();
    this.stats.stop();
  }
}

function corner(words, role = "presentation") {
  const made = document.createElement("span");
  made.className = "at-grid-name";
  made.setAttribute("role", role);
  made.textContent = words;
  return made;
}

function cell(tile) {
  const made = document.createElement("div");
  made.setAttribute("role", "gridcell");
  made.append(tile);
  return made;
}
