// "sink_mass > 0.8 and entropy < 1": the same words that `attnlab heads` and /api/v1/heads understand.

const CONDITION = /^\s*([A-Za-z_0-9]+)\s*(>=|<=|>|<)\s*([^\s<>]+)\s*$/;
const TESTS = {
  ">": (a, b) => a > b,
  "<": (a, b) => a < b,
  ">=": (a, b) => a >= b,
  "<=": (a, b) => a <= b,
};

// The text as [{name, test(value)}]; an Error says what is wrong with it.
export function parseConditions(text, names) {
  if (!text.trim()) return [];
  return text.trim().split(/\s+and\s+/i).map((part) => {
    const found = CONDITION.exec(part);
    if (!found) throw new Error(`write a statistic, > or < and a number, such as sink_mass > 0.8; got "${part}"`);
    const [, name, operator, number] = found;
    if (!names.includes(name)) throw new Error(`no statistic "${name}"; there are ${names.join(", ")}`);
    const bound = Number(number);
    if (Number.isNaN(bound)) throw new Error(`the bound of ${name} must be a number; got "${number}"`);
    return { name, test: (value) => value !== null && TESTS[operator](value, bound) };
  });
}
