// Which cell of one compared map is which of another: their tokens decide where the inputs differ.

import { ApiError, getJson, query } from "./request.js";

export class Alignment {
  constructor() {
    this.places = new Map(); // source -> {query, key}: for each position of the first its place in the source
  }

  // Asks for the places of all sources; where tokens cannot be matched, positions are.
  async load(sources, layer, signal) {
    const [first, ...others] = sources;
    await Promise.all(
      others.map(async (other) => {
        const [a, b] = [first.facts.run, other.facts.run];
        if (a === b) return;
        try {
          const v = `${first.facts.stamp}-${other.facts.stamp}`;
          const found = await getJson(`/compare/alignment?${query({ a, b, layer, v })}`, signal);
          if (found.key) this.places.set(other, found);
          else this.places.delete(other);
        } catch (error) {
          if (!(error instanceof ApiError)) throw error;
          this.places.delete(other);
        }
      }),
    );
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
}
