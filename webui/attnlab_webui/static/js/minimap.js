// The whole map in a corner, with the window that is in view; a click or a drag moves the window.

import { hatch, readInk } from "./ink.js";

export class Minimap {
  constructor(root, camera, panel) {
    this.root = root;
    this.camera = camera;
    this.panel = panel;
    root.innerHTML = '<canvas class="at-mini" role="img" aria-label="The whole map and the part in view"></canvas>';
    this.canvas = root.querySelector("canvas");
    this.detach = camera.listen(() => this.draw());
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.goTo(event);
    });
    this.canvas.addEventListener("pointermove", (event) => event.buttons & 1 && this.goTo(event));
  }

  goTo(event) {
    const { r0, r1, c0, c1 } = this.camera.window;
    const row = (event.offsetY / this.canvas.clientHeight) * this.camera.extent.rows;
    const col = (event.offsetX / this.canvas.clientWidth) * this.camera.extent.cols;
    this.camera.pan(row - (r0 + r1) / 2, col - (c0 + c1) / 2);
  }

  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      this.drawNow();
    });
  }

  drawNow() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const { base, scale, table } = this.panel;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    const ink = readInk(this.root);
    context.scale(ratio, ratio);
    context.fillStyle = hatch(context, ink);
    context.fillRect(0, 0, width, height);
    if (base && scale && table) {
      context.imageSmoothingEnabled = base.width > this.canvas.width; // few cells stay cells
      context.drawImage(this.panel.bitmap(base, true), 0, 0, width, height);
    }
    const { rows, cols } = this.camera.extent;
    const { r0, r1, c0, c1 } = this.camera.window;
    const box = [(c0 / cols) * width, (r0 / rows) * height];
    box.push(Math.max(3, ((c1 - c0) / cols) * width), Math.max(3, ((r1 - r0) / rows) * height));
    context.fillStyle = ink.shade;
    context.beginPath();
    context.rect(0, 0, width, height);
    context.rect(...box);
    context.fill("evenodd");
    context.strokeStyle = ink.accent;
    context.lineWidth = 1.5;
    context.strokeRect(box[0] + 0.75, box[1] + 0.75, box[2] - 1.5, box[3] - 1.5);
  }

  stop() {
    this.detach();
  }
}
