// Entry: mounts the views of a run, or the maps of a comparison, into an element that gr.HTML made.

import { ApiError } from "./request.js";
import { View } from "./view.js";
import { Workspace } from "./workspace.js";

const views = new Set();

// For tests and the browser's console: what every panel really shows.
window.__attnlab = {
  views,
  get idle() {
    return views.size > 0 && [...views].every((view) => view.idle);
  },
  panels() {
    return [...views].flatMap((view) => view.panels).map(describe);
  },
};

function describe(panel) {
  return {
    key: panel.source.key,
    title: panel.source.title(),
    signed: panel.source.signed,
    window: panel.camera.window && { ...panel.camera.window },
    plot: panel.plot,
    tile: panel.tile,
    base: panel.base,
    error: panel.error,
    scale: panel.scale && { kind: panel.scale.kind, top: panel.scale.top, floor: panel.scale.floor },
    colourOf: (value) => colourOf(panel, value),
    valueAt: (row, col) => panel.valueAt(row, col),
    cellAt: (x, y) => panel.cellAt(x, y),
  };
}

function colourOf(panel, value) {
  const at = Math.min(255, Math.max(0, Math.round(panel.scale.unit(value) * 255))) * 3;
  return [...panel.table.colours.subarray(at, at + 3)];
}

// element: the component's element; read: gives the value (a JSON text); watch: gr.HTML's watch.
export function mount(element, read, watch) {
  let view = null;
  let shown = null;
  const refresh = async () => {
    const value = read() || "";
    if (value === shown) return;
    shown = value;
    if (view) {
      view.stop();
      views.delete(view);
      view = null;
    }
    const place = element.querySelector(".at-view-place");
    if (!value) {
      place.replaceChildren();
      return;
    }
    const config = JSON.parse(value);
    const root = document.createElement("div");
    place.replaceChildren(root);
    if (config.message) {
      say(root, config.message);
      return;
    }
    view = config.mode === "compare" ? new View(root, { config }) : new Workspace(root, config);
    views.add(view);
    try {
      await view.ready;
    } catch (error) {
      if (view?.root !== root) return;
      say(root, error instanceof ApiError ? error.message : `The map cannot be shown: ${error.message}`);
      if (!(error instanceof ApiError)) throw error;
    }
  };
  watch("value", refresh);
  refresh();
}

function say(root, message) {
  root.className = "at-view-message";
  root.setAttribute("role", "status");
  root.textContent = message;
}
