// The colour scale with numbers, and what the hatch means.

import { short, ticks } from "./colour.js";
import { readInk } from "./ink.js";

const WIDTH = 256;
const NARROW = 215; // pixels in which not every tick has room
const GAP = 3; // pixels between two numbers

export class ColourBar {
  constructor(root, words) {
    this.root = root;
    root.classList.add("at-scale");
    root.innerHTML =
      '<div class="at-scale-words"></div><canvas class="at-scale-strip" height="1" aria-hidden="true"></canvas>' +
      '<div class="at-scale-ticks"></div>';
    root.querySelector(".at-scale-words").textContent = words;
    this.words = root.querySelector(".at-scale-words");
    this.strip = root.querySelector("canvas");
    this.ticks = root.querySelector(".at-scale-ticks");
  }

  show(scale, table, words, clipped) {
    this.words.textContent = words;
    this.strip.width = WIDTH;
    this.strip.height = 1;
    const image = new ImageData(WIDTH, 1);
    for (let at = 0; at < WIDTH; at++) {
      const colour = Math.round((at / (WIDTH - 1)) * 255) * 3;
      image.data.set([...table.colours.subarray(colour, colour + 3), 255], at * 4);
    }
    this.strip.getContext("2d").putImageData(image, 0, 0);
    const narrow = this.strip.clientWidth > 0 && this.strip.clientWidth < NARROW;
    const marks = ticks(scale).filter((value, i, all) => !narrow || i === 0 || i === all.length - 1 || i === all.length >> 1);
    this.ticks.replaceChildren(...marks.map((value) => mark(scale, value, clipped)));
    if (this.strip.clientWidth) this.thin();
    const range = `${short(scale.floor)} to ${short(scale.top)}`;
    this.root.setAttribute("aria-label", `${words}, ${scale.kind} from ${range}`);
    this.root.setAttribute("role", "img");
  }

  // The numbers at both ends stay; one between them that would touch them goes.
  thin() {
    const boxes = [...this.ticks.children].map((tick) => ({ tick, box: tick.getBoundingClientRect() }));
    const [from, to] = [boxes[0].box.right + GAP, boxes.at(-1).box.left - GAP];
    for (const { tick, box } of boxes.slice(1, -1)) if (box.left < from || box.right > to) tick.remove();
  }
}

function mark(scale, value, clipped) {
  const tick = document.createElement("span");
  const at = scale.unit(value) * 100;
  tick.style.left = `${at}%`;
  tick.classList.toggle("at-first", at <= 1);
  tick.classList.toggle("at-last", at >= 99);
  const beyond = clipped && value === scale.top ? "≥ " : "";
  const below = scale.kind === "log" && !scale.signed && at <= 1 ? "≤ " : "";
  tick.textContent = beyond + below + (scale.signed && value > 0 ? "+" : "") + short(value);
  return tick;
}

// A small square of the hatch, for the legend.
export function hatchSwatch(root) {
  const ink = readInk(root);
  const swatch = root.querySelector(".at-swatch");
  const stripes = `${ink.stripe} 0 1px, ${ink.masked} 1px 5px`;
  if (swatch) swatch.style.background = `repeating-linear-gradient(-45deg, ${stripes})`;
}
