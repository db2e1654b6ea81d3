// One colour a head, brighter on a dark page: far apart to the colour-blind too, the first ones furthest
// (tests/test_lab_colour_vision.py).

import { isDark } from "./colour.js";

const LIGHT = [
  "#007686", "#f7a100", "#03cbb2", "#873bb4", "#a1aeff", "#df0208", "#a19b61", "#3b3721",
  "#690ff0", "#4b003c", "#0f0078", "#d23cff", "#1e0000", "#e1c369", "#5a695a", "#d2c3f0",
  "#e15ac3", "#78693c", "#690fc3", "#1e4b78", "#789678", "#87d296", "#871e00", "#3c005a",
  "#ff692d", "#693c5a", "#b469e1", "#4b2d87", "#000f1e", "#2d96c3", "#872d3c", "#a5783c",
];
const DARK = [
  "#0093ff", "#f3bd00", "#4f7d58", "#9065a6", "#baffec", "#ff8953", "#ffebaf", "#a4a7b6",
  "#6900ff", "#960f00", "#3c3c4b", "#690087", "#78e1ff", "#d23c00", "#5a00b4", "#87c396",
  "#a53cc3", "#d2ff69", "#5a3c2d", "#696978", "#3c5af0", "#8796e1", "#870f78", "#78e178",
  "#b4693c", "#ff691e", "#2da587", "#b49669", "#874b2d", "#ffc3c3", "#ff2dc3", "#0ff02d",
];

// head -> its colour, for the heads that are shown: its own by its number, the next free one where another has that.
export function headColours(heads) {
  const colours = isDark() ? DARK : LIGHT;
  const free = new Set(colours.keys());
  const found = new Map();
  for (const head of heads) {
    if (!free.size) for (const at of colours.keys()) free.add(at);
    let at = head % colours.length;
    while (!free.has(at)) at = (at + 1) % colours.length;
    free.delete(at);
    found.set(head, colours[at]);
  }
  return found;
}
