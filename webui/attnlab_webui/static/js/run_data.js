// What all views of one run share: its facts and tokens, the colour tables, what is chosen, tiles that were loaded.

import { chooseTable, loadTables } from "./colour.js";
import { getJson, query, TileCache } from "./request.js";
import { Selection } from "./selection.js";
import { MapSource } from "./source.js";

export class RunData {
  // config: {runs: [id]}; state: the State of the page
  constructor(config, state) {
    this.config = config;
    this.state = state;
    this.run = config.runs[0];
    this.cache = new TileCache();
    this.thumbs = new Map(); // small pictures of heads, see thumbs.js
  }

  async load() {
    const asked = [loadTables(), getJson(`/runs/${this.run}/map`), getJson(`/runs/${this.run}/tokens`)];
    [this.tables, this.facts, this.tokens] = await Promise.all(asked);
    this.source = new MapSource(this.facts, this.tokens, this.state);
    this.selection = new Selection(this.state, this.source);
  }

  // An address under /runs/{id} whose answer may be kept as long as the run stays as it is.
  path(name, fields) {
    return `/runs/${this.run}/${name}?${query({ ...fields, v: this.facts.stamp })}`;
  }

  table(signed) {
    return chooseTable(this.tables, this.state.get("colours"), signed);
  }
}
