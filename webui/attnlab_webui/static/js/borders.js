// The borders between the tokens of one text as those of another: a rising broken line through the tokens of both.

export class Borders {
  // from, to: the corners of the line, neither of them ever falls
  constructor(from, to) {
    this.from = from;
    this.to = to;
  }

  // places: for each token of one text its place in the other, or -1; size: tokens of the other
  static of(places, size) {
    const [from, to] = [[0], [0]];
    const corner = (at, place) => {
      from.push(at);
      to.push(place);
    };
    places.forEach((place, at) => {
      if (place < 0) return;
      if (at > 0 && place > 0 && places[at - 1] === place - 1) {
        from.pop();
        to.pop();
      } else corner(at, place);
      corner(at + 1, place + 1);
    });
    corner(places.length, size);
    return new Borders(from, to);
  }

  get inverse() {
    return new Borders(this.to, this.from);
  }

  // Where [start, end) lies in the other text, null where nothing of it does. Tokens that both have are met to the
  // fraction, others that stand in the same place as whole tokens; what only the other has lies between its neighbours
  // and before or after everything.
  range(start, end) {
    const low = start <= 0 ? 0 : this.after(start, Math.floor);
    const high = end >= this.from.at(-1) ? this.to.at(-1) : this.before(end, Math.ceil);
    return high > low ? [low, high] : null;
  }

  at(border) {
    return (this.before(border) + this.after(border)) / 2;
  }

  // Of several places of one border the first.
  before(border, round) {
    const high = search(this.from, (from) => from >= border);
    return high === 0 ? this.to[0] : this.between(high, border, round);
  }

  // Of several places of one border the last.
  after(border, round) {
    const high = search(this.from, (from) => from > border);
    return high === this.from.length ? this.to.at(-1) : this.between(high, border, round);
  }

  between(high, border, round = (value) => value) {
    const [from, to] = [this.from[high - 1], this.to[high - 1]];
    const [length, wide] = [this.from[high] - from, this.to[high] - to];
    const value = to + ((border - from) / length) * wide;
    return length === wide ? value : round(value);
  }
}

// The index of the first number that passes, as all after it do.
function search(numbers, passes) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (passes(numbers[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}
