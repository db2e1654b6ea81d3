// Which cell of one compared map is which of another: their tokens decide where the inputs differ.

import { Borders } from "./borders.js";
import { ApiError, getJson, query } from "./request.js";

export class Alignment {
  constructor() {
    this.forget(null);
  }

  // layer: the one whose places are known, null while they are not
  forget(layer) {
    this.layer = layer;
    this.places = new Map(); // source -> {query, key}: for each position of the first its place in the source
    this.borders = new Map(); // source -> {query, key}: the same as Borders, for windows
    this.reasons = new Map(); // source -> why its tokens could not be matched
  }

  get known() {
    return this.layer !== null;
  }

  // Asks for the places of all sources; where tokens cannot be matched, positions are, and `reasons` says why.
  async load(sources, layer, signal) {
    if (this.layer !== layer) this.forget(null);
    const [first, ...others] = sources.filter((source) => source.extent());
    const found = await Promise.all(others.map((other) => ask(first, other, layer, signal)));
    this.forget(layer);
    found.forEach((answer, i) => this.add(others[i], answer));
  }

  add(source, { query, key, reason }) {
    if (reason) this.reasons.set(source, reason);
    if (!key) return;
    const { rows, cols } = source.extent();
    this.places.set(source, { query, key });
    this.borders.set(source, { query: Borders.of(query, rows), key: Borders.of(key, cols) });
  }

  // A cell of the first map in the map of a source; null where it has no such token.
  to(source, cell) {
    const places = this.places.get(source);
    if (!cell || !places) return cell;
    const [row, col] = [places.query[cell.row] ?? -1, places.key[cell.col] ?? -1];
    return row < 0 || col < 0 ? null : { row, col };
  }

  // A cell of a source's map in the first.
  from(source, cell) {
    const places = this.places.get(source);
    if (!cell || !places) return cell;
    const [row, col] = [places.query.indexOf(cell.row), places.key.indexOf(cell.col)];
    return row < 0 || col < 0 ? null : { row, col };
  }

  // A window of the first map as one of a source's: the same tokens, null where it has none of them.
  range(source, window) {
    const borders = this.borders.get(source);
    return borders ? turn(borders.query, borders.key, window) : window;
  }

  // A window of a source's map as one of the first.
  rangeFrom(source, window) {
    const borders = this.borders.get(source);
    return borders ? turn(borders.query.inverse, borders.key.inverse, window) : window;
  }

  // A point between the cells of a source's map in the first.
  pointFrom(source, { row, col }) {
    const borders = this.borders.get(source);
    if (!borders) return { row, col };
    return { row: borders.query.inverse.at(row), col: borders.key.inverse.at(col) };
  }
}

async function ask(first, other, layer, signal) {
  const [a, b] = [first.facts.run, other.facts.run];
  if (a === b) return {};
  const v = `${first.facts.stamp}-${other.facts.stamp}`;
  try {
    return await getJson(`/compare/alignment?${query({ a, b, layer, v })}`, signal);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return { reason: error.message };
  }
}

function turn(rows, cols, { r0, r1, c0, c1 }) {
  const [down, across] = [rows.range(r0, r1), cols.range(c0, c1)];
  return down && across && { r0: down[0], r1: down[1], c0: across[0], c1: across[1] };
}
