// The map view: panels that share one camera, one crosshair and one colour scale, with their controls.

import { Alignment } from "./alignment.js";
import { Camera } from "./camera.js";
import { loadTables, makeScale, topOf } from "./colour.js";
import { Controls } from "./controls.js";
import { onTheme } from "./dark.js";
import { Panel } from "./panel.js";
import { Overlays } from "./overlay.js";
import { LinkedCamera } from "./linked_camera.js";
import { getJson, TileCache } from "./request.js";
import { RunData } from "./run_data.js";
import { Selection } from "./selection.js";
import { DifferenceSource, MapSource, PinnedSource } from "./source.js";
import { State } from "./state.js";

const CELL_MS = 40;

export class View {
  // given: the RunData of one run, or {config: {mode: "compare", runs: [ids], pair: [a, b] or null}}
  constructor(root, given) {
    this.root = root;
    this.config = given.config;
    this.ownState = !given.state;
    this.state = given.state ?? new State();
    this.cache = given.cache ?? new TileCache();
    this.panels = [];
    this.alignment = new Alignment();
    this.hovered = null;
    this.held = null;
    this.camera = new Camera((rows, cols) => this.state.set({ rows, cols }));
    this.actions = {
      hover: (cell) => this.hover(cell),
      hold: (cell) => this.hold(cell),
      moveCross: (rows, cols) => this.moveCross(rows, cols),
      step: (name, by) => this.selection.step(name, by),
      select: (at) => this.selection.select(at),
      toggleScale: () => this.state.set({ scale: this.state.get("scale") === "log" ? "linear" : "log" }),
    };
    this.ready = given.source ? this.show(given, [given.source]) : this.load();
  }

  async load() {
    const runs = this.config.runs;
    const answers = [loadTables(), ...runs.map((run) => getJson(`/runs/${run}/map`))];
    const [tables, ...facts] = await Promise.all(answers);
    const tokens = await Promise.all(runs.map((run) => getJson(`/runs/${run}/tokens`)));
    const sources = facts.map((fact, i) => new MapSource(fact, tokens[i], this.state));
    if (this.config.against) sources.push(new PinnedSource(facts[0], tokens[0], this.state, this.config.against));
    const models = new Set(facts.map(({ model }) => model));
    for (const source of sources) source.named = models.size > 1;
    const first = Object.assign(new RunData(this.config, this.state), { tables, facts: facts[0], source: sources[0] });
    if (!this.stopped) await this.show(first, sources);
  }

  // run: the RunData of the first source
  async show(run, sources) {
    this.run = run;
    this.sources = sources;
    this.selection = new Selection(this.state, this.first);
    this.selection.settle();
    this.controls = new Controls(this.root, this);
    this.overlays = new Overlays(this.controls.part("overlays"), this);
    this.makePanels();
    this.openCamera();
    this.deaf = this.state.listen((changed) => this.onState(changed));
    this.unwatch = onTheme(() => {
      this.recolour();
      this.controls.show([]); // exports are drawn in the page's colours
    });
    this.restart();
  }

  get first() {
    return this.sources[0];
  }

  pair() {
    const wanted = this.config.pair ?? [];
    const known = wanted.map((run) => this.sources.find((source) => source.facts.run === run));
    return known.length === 2 && known.every(Boolean) ? known : this.sources.slice(0, 2);
  }

  makePanels() {
    const shared = {
      state: this.state,
      cache: this.cache,
      actions: this.actions,
      cross: (panel) => this.cellIn(panel),
      again: () => this.restart(),
      onTile: () => this.recolour(),
      over: (context, panel, ink) => this.overlays.draw(context, panel, ink),
      pad: (panel) => this.overlays.pad(panel),
    };
    const sources = [...this.sources];
    if (this.config.mode === "compare" && sources.length > 1) sources.push(new DifferenceSource(...this.pair(), this.state));
    this.panels = sources.map((source) => {
      const counted = source.a ?? source;
      const ours = (cell) => this.alignment.from(counted, cell);
      const actions = { ...this.actions, hover: (cell) => this.hover(ours(cell)), hold: (cell) => this.hold(ours(cell)) };
      const camera = counted === this.first ? this.camera : new LinkedCamera(this.camera, this.alignment, counted);
      return new Panel(this.controls.panelRoot(), source, { ...shared, camera, actions });
    });
    this.controls.arrange(this.panels);
  }

  // The crosshair's cell as a panel counts it: other inputs have other places for the same tokens.
  cellIn({ source }) {
    return this.alignment.to(source.a ?? source, this.held ?? this.hovered);
  }

  // Whether the text of a panel's map, or of either of a difference, has not both tokens of the first one's cell.
  lacks({ source }, cell) {
    return [source, source.b].some((one) => one && this.alignment.to(one, cell) === null);
  }

  async align() {
    if (this.sources.length < 2) return;
    this.aligning?.abort();
    this.aligning = new AbortController();
    try {
      await this.alignment.load(this.sources, this.state.get("layer"), this.aligning.signal);
      this.aligning = null;
      this.controls.showUnaligned(this.first, this.alignment.reasons);
      if (this.camera.moving) this.camera.tell();
      else this.openCamera();
      this.readCross();
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  }

  openCamera() {
    // a map whose tokens are matched shows what the first one does, however long it is
    const counted = this.sources.filter((source) => !this.alignment.places.has(source));
    const extents = counted.map((source) => source.extent()).filter(Boolean);
    const rows = Math.max(1, ...extents.map((extent) => extent.rows));
    const cols = Math.max(1, ...extents.map((extent) => extent.cols));
    this.camera.open({ rows, cols }, this.state.get("rows"), this.state.get("cols"));
  }

  // The region came from the address ("back"), not from the camera.
  followRegion() {
    const { rows, cols } = this.state.values;
    if (!this.camera.isAt(rows, cols)) this.openCamera();
  }

  restart() {
    for (const panel of this.panels) panel.restart();
    this.controls.showSelection();
    this.controls.strip.show();
    this.overlays.load();
    this.align();
    this.readCross();
  }

  onState(changed) {
    if (changed.includes("layer") || changed.includes("head")) {
      this.selection.settle();
      this.openCamera();
      this.restart();
    } else if (changed.includes("reduce") || changed.includes("part")) this.restart();
    else if (changed.includes("rows") || changed.includes("cols")) this.followRegion();
    else if (changed.some((name) => ["scale", "norm", "clip", "colours"].includes(name))) this.recolour();
    this.controls.show(changed);
  }

  // ---- colours: one scale for everything that is compared

  table(signed) {
    return this.run.table(signed);
  }

  recolour() {
    for (const signed of [false, true]) {
      const panels = this.panels.filter(({ source }) => source.signed === signed && source.extent());
      const tiles = panels.flatMap((panel) => [panel.base, panel.tile]).filter(Boolean);
      this.controls.hideScale(signed, !panels.length);
      if (!tiles.length) continue;
      const { scale: kind, norm, clip } = this.state.values;
      const whole = norm === "row" && !signed;
      const top = whole ? 1 : topOf([...new Set(tiles)], clip);
      const scale = makeScale({ kind, top, signed });
      const table = this.table(signed);
      for (const panel of panels) panel.colour(scale, table);
      this.controls.showScale(scale, table, signed);
    }
    this.controls.drawStrip();
  }

  // ---- the crosshair

  hover(cell) {
    if (this.held || same(cell, this.hovered)) return;
    this.hovered = cell;
    this.readCross();
  }

  hold(cell) {
    this.held = same(cell, this.held) ? null : cell;
    this.hovered = cell;
    this.readCross();
  }

  moveCross(rows, cols) {
    const { r0, r1, c0, c1 } = this.camera.window;
    const from = this.held ?? this.hovered ?? { row: Math.floor((r0 + r1) / 2), col: Math.floor((c0 + c1) / 2) };
    const into = (value, size) => Math.min(size - 1, Math.max(0, value));
    const { extent } = this.camera;
    const cell = { row: into(from.row + rows, extent.rows), col: into(from.col + cols, extent.cols) };
    this.held = cell;
    if (cell.row < r0 || cell.row >= r1) this.camera.pan(rows, 0);
    if (cell.col < c0 || cell.col >= c1) this.camera.pan(0, cols);
    this.readCross();
  }

  // Shows the weight under the crosshair in every panel: from the tile when it is exact, else from the server.
  readCross() {
    const cell = this.held ?? this.hovered;
    this.cellWanted?.abort();
    clearTimeout(this.cellTimer);
    for (const panel of this.panels) if (panel.plot) panel.drawOver();
    const values = this.panels.map((panel) => inside(panel, this.cellIn(panel)));
    this.panels.forEach((panel, i) => panel.showValue(values[i]));
    this.controls.showCell(cell, values, this.held !== null);
    if (!cell || values.every((value) => value !== null)) return;
    this.cellTimer = setTimeout(() => this.askCell(cell, values), CELL_MS);
  }

  async askCell(cell, values) {
    const controller = new AbortController();
    this.cellWanted = controller;
    const asked = this.panels.map(async (panel, i) => {
      const extent = panel.source.extent();
      const at = this.cellIn(panel);
      if (values[i] !== null || !extent || !at || at.row >= extent.rows || at.col >= extent.cols) return values[i];
      const answer = await getJson(panel.cellPath(at.row, at.col), controller.signal);
      return answer.masked ? Number.NaN : answer.value;
    });
    const answers = await Promise.allSettled(asked);
    if (controller.signal.aborted) return;
    this.cellWanted = null;
    const found = answers.map((answer) => (answer.status === "fulfilled" ? answer.value : null));
    this.panels.forEach((panel, i) => panel.showValue(found[i]));
    this.controls.showCell(cell, found, this.held !== null);
  }

  get idle() {
    const compared = this.controls?.distances?.idle ?? true;
    return this.panels.length > 0 && compared && !this.aligning && !this.cellWanted && this.panels.every((panel) => panel.idle);
  }

  stop() {
    this.stopped = true;
    this.cellWanted?.abort();
    this.aligning?.abort();
    clearTimeout(this.cellTimer);
    this.unwatch?.();
    for (const panel of this.panels) panel.stop();
    this.controls?.stop();
    this.camera.stop();
    this.deaf?.();
    if (this.ownState) this.state.stop();
  }
}

function inside(panel, cell) {
  const extent = panel.source.extent();
  if (!extent || !cell) return null;
  const { row, col } = cell;
  return row < extent.rows && col < extent.cols ? panel.valueAt(row, col) : null;
}

function same(a, b) {
  return a === b || (a !== null && b !== null && a.row === b.row && a.col === b.col);
}
