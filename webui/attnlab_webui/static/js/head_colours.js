// One colour a head, brighter on a dark page: far apart to the colour-blind too, the first ones furthest
// (tests/test_lab_colour_vision.py).

import { isDark } from "./colour.js";

const LIGHT = [
  "#007686", "#f7a100", "#03cbb2", "#873bb4", "#a1aeff", "#df0208", "#a19b61", "#3b3721",
  "#690ff0", "#4b003c", "#0f0078", "#d23cff", "#1e0000", "#5a695a", "#e15ac3", "#a5c35a",
  "#78693c", "#690fc3", "#1e4b78", "#789678", "#871e00", "#3c005a", "#ff692d", "#693c5a",
  "#b469e1", "#4b2d87", "#78c396", "#000f1e", "#2d96c3", "#872d3c", "#a5783c", "#5a0000",
];
const DARK = [
  "#0093ff", "#f3bd00", "#4f7d58", "#9065a6", "#baffec", "#ff8953", "#ffebaf", "#a4a7b6",
  "#694bff", "#78e1ff", "#87c396", "#a56900", "#d2ff69", "#c32dd2", "#ff2d69", "#78e178",
  "#c35a87", "#c387e1", "#b49600", "#69783c", "#ff1ec3", "#ffc3c3", "#0ff02d", "#f04bff",
  "#ffa5e1", "#5ab44b", "#d2f0ff", "#789678", "#b4d296", "#3c962d", "#ffffd2", "#ff69a5",
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
