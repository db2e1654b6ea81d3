// Layer slider and head chips; each chip carries a thumbnail of its head's map.

import { paint } from "./colour.js";
import { hatch, readInk } from "./ink.js";

const THUMB = 40;

export class Picker {
  // actions: select({layer, head}), step(name, by)
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    root.classList.add("at-picker");
    root.innerHTML =
      '<output class="at-name" aria-live="polite"></output>' +
      '<div class="at-layer"><span class="at-label" id="at-layer-word">layer</span>' +
      '<button type="button" class="at-step" data-by="-1" aria-label="previous layer">‹</button>' +
      '<input type="range" min="0" max="0" step="1" aria-labelledby="at-layer-word">' +
      '<button type="button" class="at-step" data-by="1" aria-label="next layer">›</button>' +
      '<span class="at-of"></span></div>' +
      '<div class="at-heads" role="radiogroup" aria-label="head"></div>' +
      '<p class="at-hint at-heads-words" role="status" title="These maps are long: each picture is made once, and kept."></p>';
    this.words = root.querySelector(".at-heads-words");
    this.small = document.createElement("canvas");
    this.drawn = new Map(); // chip -> what stands on it
    this.name = root.querySelector(".at-name");
    this.slider = root.querySelector("input");
    this.of = root.querySelector(".at-of");
    this.chips = root.querySelector(".at-heads");
    this.slider.addEventListener("input", () => actions.select({ layer: this.layers[this.slider.value] }));
    for (const button of root.querySelectorAll(".at-step")) {
      button.addEventListener("click", () => actions.step("layer", Number(button.dataset.by)));
    }
    this.chips.addEventListener("click", (event) => {
      const chip = event.target.closest(".at-head");
      if (chip) actions.select({ head: Number(chip.dataset.head) });
    });
    this.chips.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    this.actions.step("head", by);
    this.chips.querySelector('[aria-checked="true"]')?.focus();
  }

  show(layers, layer, heads, head) {
    this.layers = layers;
    this.slider.max = String(layers.length - 1);
    this.slider.value = String(layers.indexOf(layer));
    this.slider.setAttribute("aria-valuetext", `layer ${layer}`);
    this.of.textContent = layers.length > 1 ? `${layer} of ${layers[0]}–${layers.at(-1)}` : `${layer}, the only one`;
    this.slider.disabled = layers.length < 2;
    this.name.textContent = `L${layer}H${head}`;
    if (this.chips.children.length !== heads) this.makeChips(heads);
    for (const chip of this.chips.children) {
      const chosen = Number(chip.dataset.head) === head;
      chip.setAttribute("aria-checked", String(chosen));
      chip.tabIndex = chosen ? 0 : -1;
      if (chosen) this.reveal(chip);
    }
  }

  // Scrolls the strip of heads, and not the page.
  reveal(chip) {
    const [strip, at] = [this.chips.getBoundingClientRect(), chip.getBoundingClientRect()];
    if (at.left < strip.left) this.chips.scrollLeft -= strip.left - at.left;
    else if (at.right > strip.right) this.chips.scrollLeft += at.right - strip.right;
  }

  makeChips(heads) {
    this.chips.replaceChildren();
    this.drawn.clear();
    for (let head = 0; head < heads; head++) {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "at-head";
      chip.dataset.head = String(head);
      chip.setAttribute("role", "radio");
      chip.setAttribute("aria-label", `head ${head}`);
      const picture = document.createElement("canvas");
      picture.width = picture.height = THUMB * 2;
      const word = document.createElement("span");
      word.textContent = `H${head}`;
      chip.append(picture, document.createElement("small"), word);
      this.chips.append(chip);
    }
  }

  // pictureOf(head): {height, width, values}, or null while it is on its way; look: what else the colours depend on
  drawHeads(pictureOf, look, scaleOf, table) {
    const ink = readInk(this.root);
    const colours = [look, table.name, ink.empty].join();
    for (const chip of this.chips.children) {
      const canvas = chip.querySelector("canvas");
      const tile = pictureOf(Number(chip.dataset.head));
      const drawn = this.drawn.get(chip);
      if (drawn && drawn.tile === tile && drawn.colours === colours) continue;
      this.drawn.set(chip, { tile, colours });
      const context = canvas.getContext("2d");
      context.fillStyle = tile ? hatch(context, ink) : ink.empty;
      context.fillRect(0, 0, canvas.width, canvas.height);
      if (tile) this.drawHead(context, tile, scaleOf(tile), table);
    }
  }

  drawHead(context, tile, scale, table) {
    this.small.width = tile.width;
    this.small.height = tile.height;
    this.small.getContext("2d").putImageData(paint(tile, scale, table.colours), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small, 0, 0, context.canvas.width, context.canvas.height);
  }

  // A word in the place of a head's picture: how far it is, or that there is none.
  note(head, word, why = "") {
    const chip = this.chips.children[head];
    if (!chip) return;
    chip.querySelector("small").textContent = word;
    chip.title = why ? `${this.nameOf(head)}: ${why}` : this.nameOf(head);
  }

  nameOf(head) {
    return `L${this.layers[this.slider.value]}H${head}`;
  }

  say(words) {
    this.words.textContent = words;
  }
}
