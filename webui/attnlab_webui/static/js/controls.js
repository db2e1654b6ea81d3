// Everything around the panels: picker, readout, minimap, colour bars, options, statistics, exports, help.

import { axisWord } from "./axes.js";
import { ColourBar, hatchSwatch } from "./colourbar.js";
import { isDark, precise } from "./colour.js";
import { Distances } from "./distances.js";
import { FORMATS, fileLink } from "./files.js";
import { HELP } from "./gestures.js";
import { complain, element } from "./make.js";
import { Minimap } from "./minimap.js";
import { Options } from "./options.js";
import { Picker } from "./picker.js";
import { getJson, query } from "./request.js";
import { StatGrid } from "./statgrid.js";
import { Strip } from "./strip.js";

const BLINK_MS = 700;
const NUMBERS = ["npz", "parquet", "safetensors"];
const ROUNDED =
  "The picture is rounded to travel fast: a weight by less than 1 %, in a dense map by up to 6 %. What you point at is exact.";
const TOOLS = '<div class="at-tools" data-part="tools"></div>';

export class Controls {
  constructor(root, view) {
    this.view = view;
    this.root = root;
    const compare = view.config.mode === "compare";
    root.className = `at-view ${compare ? "at-compare" : "at-single"}`;
    root.innerHTML =
      `<div class="at-top"><div data-part="picker"></div>${compare ? TOOLS : ""}</div>` +
      '<div data-part="unaligned" role="status"></div>' +
      '<div class="at-body"><div class="at-panels" data-part="panels"></div><aside class="at-side">' +
      (compare ? "" : TOOLS) +
      '<section class="at-readout" data-part="readout" aria-live="polite"></section>' +
      '<section class="at-scales"><div data-part="bar"></div><div data-part="difference" hidden></div>' +
      '<div class="at-legend"><span class="at-swatch"></span><span data-part="masked">masked: no such pair</span></div></section>' +
      '<section class="at-overlays" data-part="overlays" hidden></section>' +
      '<section class="at-mini-box" data-part="minimap"></section>' +
      '<section><div data-part="stats" hidden></div><p class="at-hint" data-part="distance"></p></section><section data-part="options"></section>' +
      '<section class="at-exports" data-part="exports" role="group" aria-label="this view"></section></aside></div>' +
      '<p class="at-complaint" role="alert" hidden></p>';
    this.part = (name) => root.querySelector(`[data-part="${name}"]`);
    this.picker = new Picker(this.part("picker"), view.actions);
    this.strip = new Strip(this.picker, view.run);
    this.options = new Options(this.part("options"), view.state);
    this.bar = new ColourBar(this.part("bar"), "");
    this.differenceBar = new ColourBar(this.part("difference"), "");
    this.stats = new StatGrid(this.part("stats"), view.state, view.actions);
    this.makeTools(compare);
    this.loadStatistics();
    if (compare && view.sources.length > 1) this.distances = new Distances(...view.pair(), () => this.showStatistics());
    this.showCell(null, [], false);
  }

  panelRoot() {
    const root = document.createElement("figure");
    this.part("panels").append(root);
    return root;
  }

  arrange(panels) {
    this.part("panels").style.setProperty("--at-columns", String(Math.min(3, panels.length)));
    this.minimap = new Minimap(this.part("minimap"), this.view.camera, panels[0]);
  }

  makeTools(compare) {
    const tools = this.part("tools");
    if (compare) {
      this.blink = button("Blink", "show the other map in the first panel, in turn", () => this.toggleBlink());
      tools.append(this.blink);
    }
    const help = button("?", "gestures and keys", () => {
      list.hidden = !list.hidden;
      help.setAttribute("aria-expanded", String(!list.hidden));
    });
    help.setAttribute("aria-expanded", "false");
    tools.append(button("Whole map", "show everything (0)", () => this.view.camera.reset()), help);
    const list = document.createElement("dl");
    list.className = "at-help";
    list.hidden = true;
    for (const [keys, words] of HELP) {
      const term = document.createElement("dt");
      term.textContent = keys;
      const meaning = document.createElement("dd");
      meaning.textContent = words;
      list.append(term, meaning);
    }
    tools.append(list);
  }

  // Shows the second map in the first panel, by turns: what differs moves, what is equal stands still.
  toggleBlink() {
    const [first, second] = this.view.panels;
    const stop = () => {
      clearInterval(this.blinking);
      this.blinking = null;
      first.borrow(null);
    };
    if (this.blinking) stop();
    else this.blinking = setInterval(() => first.borrow(first.borrowed ? null : second), BLINK_MS);
    this.blink.setAttribute("aria-pressed", String(Boolean(this.blinking)));
  }

  async loadStatistics() {
    const { run } = this.view.first.facts;
    try {
      const document = await getJson(`/runs/${run}/statistics`);
      this.statistics = document.statistics;
      this.showStatistics();
    } catch (error) {
      this.complain(error.message);
    }
  }

  // How far the compared maps are apart stands before the statistics of the first run.
  showStatistics() {
    this.stats.load({ ...this.distances?.statistics, ...this.statistics });
    this.stats.colour(this.view.table(false));
    this.showDistances();
  }

  // Words on how the maps were compared, and the same numbers as files once all layers are there.
  showDistances() {
    if (!this.distances) return;
    const place = this.part("distance");
    place.textContent = this.distances.words;
    if (!this.distances.idle || !Object.keys(this.distances.statistics).length) return;
    const measure = this.distances.statistics[this.view.state.get("statistic")] && this.view.state.get("statistic");
    const look = { measure, colormap: this.view.table(false).name, theme: isDark() ? "dark" : "light" };
    const files = element("span", "at-exports");
    files.setAttribute("role", "group");
    files.setAttribute("aria-label", "these distances");
    files.append(element("span", "at-label", "these distances"));
    for (const [format, fields] of [...FORMATS.map((one) => [one, look]), ...NUMBERS.map((one) => [one, {}])]) {
      const address = `/api/v1/compare/distances/export/${format}?${query({ ...this.distances.named, ...fields })}`;
      files.append(fileLink(format, address));
    }
    place.append(files);
  }

  // reasons: source -> why its tokens could not be matched with those of the first
  showUnaligned(first, reasons) {
    const lines = [...reasons].map(([source, reason]) => {
      const words = `The tokens of ${source.key} could not be matched with those of ${first.key}: its map is shown at the same positions. ${sentence(reason)}`;
      return line("at-notice at-notice-warning", words);
    });
    this.part("unaligned").replaceChildren(...lines);
    const other = this.view.alignment.places.size ? ", or no such token in one text" : "";
    this.part("masked").textContent = `masked: no such pair${other}`;
  }

  complain(message) {
    complain(this.root, message);
  }

  showSelection() {
    const { first, state } = this.view;
    const layers = first.facts.layers.map((entry) => entry.layer);
    this.picker.show(layers, state.get("layer"), first.layer.heads, state.get("head"));
    this.stats.show();
    this.showExports();
  }

  show(changed) {
    this.options.show();
    if (changed.includes("statistic")) this.stats.show();
    this.showDistances();
    this.showExports();
  }

  drawStrip() {
    this.strip.draw();
    hatchSwatch(this.root);
  }

  hideScale(signed, hidden) {
    (signed ? this.differenceBar : this.bar).root.hidden = hidden;
  }

  showScale(scale, table, signed) {
    const { norm, clip, reduce } = this.view.state.values;
    const pooled = this.view.panels.some((panel) => panel.tile && !panel.tile.exact);
    const { c0, c1 } = this.view.camera.window;
    const byRow = `share of the row's maximum${c0 <= 0 && c1 >= this.view.camera.extent.cols ? "" : " in view"}`;
    const words = signed ? signedWords(this.view) : norm === "row" ? byRow : "weight";
    const how = pooled ? `, ${signed && reduce === "max" ? "largest" : reduce} of the cells in a pixel` : "";
    const bar = signed ? this.differenceBar : this.bar;
    const rounded = this.view.panels.some((panel) => panel.source.signed === signed && panel.tile?.rounded);
    bar.root.title = rounded ? ROUNDED : "";
    bar.root.hidden = false;
    bar.show(scale, table, words + how, clip < 100);
    if (!signed || !this.view.panels.some((panel) => !panel.source.signed)) this.minimap?.draw();
    if (signed) return;
    this.stats.colour(table);
  }

  showCell(cell, values, held) {
    const place = this.part("readout");
    place.replaceChildren();
    if (!cell) {
      place.append(line("at-hint", "Point at the map to read a weight."));
      return;
    }
    const { query: queries, key: keys, queryTitle, keyTitle } = this.view.first.labels();
    place.append(
      tokenLine(axisWord("query (from)", queryTitle), queries?.[cell.row], cell.row),
      tokenLine(axisWord("key (to)", keyTitle), keys?.[cell.col], cell.col),
    );
    this.view.panels.forEach((panel, i) => {
      const name = panelName(panel.source, this.view.panels.length);
      place.append(valueLine(name, values[i], panel, this.view.cellIn(panel), this.view.lacks(panel, cell)));
    });
    if (held) place.append(line("at-hint", "held · Esc lets go"));
  }

  showExports() {
    const place = this.part("exports");
    const { view } = this;
    const { layer, head, rows, cols, scale, norm, reduce, clip } = view.state.values;
    const region = { layer, head, rows: rows?.join(":"), cols: cols?.join(":") };
    const theme = isDark() ? "dark" : "light";
    const colormap = view.table(false).name;
    const look = { ...region, scale: norm === "row" && !view.first.signed ? "row" : scale, reduce, clip, colormap, theme };
    const runs = [...new Set(view.sources.map((source) => source.facts.run))];
    const several = view.sources.length > 1;
    const base = several ? `/api/v1/compare/export` : `/api/v1/runs/${runs[0]}/export`;
    const which = several ? comparison(view, runs) : {};
    place.replaceChildren(line("at-label", "this view"));
    const numbers = several ? NUMBERS.filter((one) => one !== "parquet") : NUMBERS;
    const files = [...FORMATS.map((format) => [format, look]), ...numbers.map((format) => [format, region])];
    for (const [format, fields] of files) {
      place.append(fileLink(format, `${base}/${format}?${query({ ...which, ...fields })}`));
    }
    const share = button("Copy link", "copy the address of exactly this view", async () => {
      view.state.write();
      await navigator.clipboard.writeText(window.location.href);
      share.textContent = "Copied";
      setTimeout(() => (share.textContent = "Copy link"), 1500);
    });
    place.append(share);
    if (view.config.mode !== "compare") place.append(compareLink(runs[0], layer, head));
  }

  stop() {
    clearInterval(this.blinking);
    this.strip.stop();
    this.minimap?.stop();
    this.distances?.stop();
    this.stats.stop();
  }
}

// What an export of the panels names: the runs, the pair whose difference stands there, or the head that stays.
function comparison(view, runs) {
  const [, { at }] = view.pair();
  const pair = runs.length > 2 ? view.pair().map(({ facts }) => facts.run).join(",") : undefined;
  return { runs: runs.join(","), pair, against: at && `${at.layer}:${at.head}` };
}

// This head against the others of its run.
function compareLink(run, layer, head) {
  const link = document.createElement("a");
  link.href = `/compare?runs=${run}&layer=${layer}&head=${head}&against=${layer}:${head}`;
  link.textContent = "Compare heads";
  link.title = `other layers and heads of this run against L${layer}H${head}`;
  return link;
}

function panelName(source, panels) {
  if (source.key.startsWith("difference")) return "difference";
  if (source.at) return `L${source.at.layer}H${source.at.head}`;
  return panels > 1 ? `#${source.facts.run}` : "weight";
}

function signedWords(view) {
  if (view.sources.length === 1) return view.first.part ? `${view.first.part} part of the score` : "signed weight";
  const [a, b] = view.pair();
  return b.at ? `A − L${b.at.layer}H${b.at.head}` : `#${a.facts.run} − #${b.facts.run}`;
}

function button(words, help, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.title = help;
  made.addEventListener("click", onClick);
  return made;
}

function sentence(words) {
  return `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;
}

function line(css, words) {
  const made = document.createElement("div");
  made.className = css;
  made.textContent = words;
  return made;
}

function tokenLine(name, token, at) {
  const row = line("at-read", "");
  const label = document.createElement("span");
  label.textContent = `${name} `;
  const text = document.createElement("b");
  text.textContent = token ?? "position";
  row.append(label, text, ` (${at})`);
  return row;
}

function valueLine(name, value, panel, cell, lacks) {
  const row = line("at-read at-weight", "");
  const label = document.createElement("span");
  label.textContent = `${name} `;
  const text = document.createElement("b");
  const pooled = value === null && cell ? panel.pooledAt(cell.row, cell.col) : null;
  if (lacks) text.textContent = "no such tokens";
  else if (Number.isNaN(value ?? pooled)) text.textContent = "masked";
  else if (value !== null) text.textContent = (panel.source.signed && value > 0 ? "+" : "") + precise(value);
  else text.textContent = pooled === null ? "—" : `≲ ${precise(pooled)}`;
  row.append(label, text);
  return row;
}
