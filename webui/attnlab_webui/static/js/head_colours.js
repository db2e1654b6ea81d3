// One colour a head, brighter on a dark page: far apart to the colour-blind too (tests/test_lab_colour_vision.py).

import { isDark } from "./colour.js";

const LIGHT = ["#007686", "#f7a100", "#03cbb2", "#873bb4", "#a1aeff", "#df0208", "#a19b61", "#3b3721"];
const DARK = ["#0093ff", "#f3bd00", "#4f7d58", "#9065a6", "#baffec", "#ff8953", "#ffebaf", "#a4a7b6"];

export function headColour(head) {
  const colours = isDark() ? DARK : LIGHT;
  return colours[head % colours.length];
}
