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
      '<div class="at-heads" role="radiogroup" aria-label="head"></div>';
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
      chip.title = `L${layer}H${chip.dataset.head}`;
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
      chip.append(picture, word);
      this.chips.append(chip);
    }
  }

  // thumbs: {heads, height, width, values} of this layer, or null while they are on their way
  drawThumbs(thumbs, makeScale, table) {
    const ink = readInk(this.root);
    for (const chip of this.chips.children) {
      const canvas = chip.querySelector("canvas");
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.fillStyle = thumbs ? hatch(context, ink) : ink.empty;
      context.fillRect(0, 0, canvas.width, canvas.height);
      const head = Number(chip.dataset.head);
      if (!thumbs || head >= thumbs.heads) continue;
      const size = thumbs.height * thumbs.width;
      const values = thumbs.values.subarray(head * size, (head + 1) * size);
      const tile = { height: thumbs.height, width: thumbs.width, values };
      const small = document.createElement("canvas");
      small.width = thumbs.width;
      small.height = thumbs.height;
      small.getContext("2d").putImageData(paint(tile, makeScale(tile), table.colours, "none"), 0, 0);
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
    }
  }
}
