// One colour a head, told apart by the colour-blind (after Okabe and Ito 2008), brighter on a dark page.

import { isDark } from "./colour.js";

const LIGHT = ["#0072b2", "#d98a00", "#009e73", "#b8478f", "#3f9bd8", "#d55e00", "#867700", "#6b7280"];
const DARK = ["#4aa8e0", "#f0b429", "#2fc79a", "#e59ac7", "#9ad4f5", "#ff8a4c", "#e8e060", "#b4bcc8"];

export function headColour(head) {
  const colours = isDark() ? DARK : LIGHT;
  return colours[head % colours.length];
}
