// A statistic over the layers: a dot for each head, a line through their means.

import { short } from "./colour.js";

const SPACE = "http://www.w3.org/2000/svg";
const SIZE = { width: 260, height: 150, left: 38, right: 8, top: 8, bottom: 24 };

// info: {title, unit, layers, heads, values: [layer][head]}; chosen: {layer, head}; select({layer, head})
export function drawCurves(root, info, chosen, select) {
  const known = info.values.flat().filter((value) => value !== null);
  const picture = make("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, class: "at-curves", role: "img" });
  picture.setAttribute("aria-label", `${info.title} of every head over the layers, with the mean of each layer`);
  root.replaceChildren(picture);
  if (!known.length) return;
  const [low, high] = [Math.min(0, ...known), Math.max(...known)];
  const x = (at) => SIZE.left + ((at + 0.5) * (SIZE.width - SIZE.left - SIZE.right)) / info.layers.length;
  const y = (value) => SIZE.height - SIZE.bottom - ((value - low) / (high - low || 1)) * (SIZE.height - SIZE.top - SIZE.bottom);
  for (const value of [low, (low + high) / 2, high]) {
    picture.append(
      make("line", { class: "at-curves-rule", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: y(value), y2: y(value) }),
      words(short(value), { x: SIZE.left - 5, y: y(value) + 3, "text-anchor": "end" }),
    );
  }
  const last = info.layers.length - 1;
  for (const at of new Set([0, Math.floor(last / 2), last])) {
    picture.append(words(`L${info.layers[at]}`, { x: x(at), y: SIZE.height - 8, "text-anchor": "middle" }));
  }
  info.layers.forEach((layer, l) => {
    info.heads.forEach((head, h) => {
      const value = info.values[l][h];
      if (value === null) return;
      const mine = chosen.layer === layer && chosen.head === head;
      const dot = make("circle", { cx: x(l), cy: y(value), r: mine ? 4 : 2, class: mine ? "at-curves-chosen" : "at-curves-dot" });
      const title = make("title", {});
      title.textContent = `L${layer}H${head} ${short(value)} ${info.unit}`;
      dot.append(title);
      dot.addEventListener("click", () => select({ layer, head }));
      picture.append(dot);
    });
  });
  const means = info.values.map((row) => mean(row.filter((value) => value !== null)));
  const points = means.map((value, l) => (value === null ? "" : `${x(l)},${y(value)}`)).filter(Boolean);
  picture.insertBefore(make("polyline", { class: "at-curves-mean", points: points.join(" ") }), picture.querySelector("circle"));
  const chosenDot = picture.querySelector(".at-curves-chosen");
  if (chosenDot) picture.append(chosenDot);
}

// Numbers along the positions of a head, from the first to the last.
export function drawLine(root, title, points, last) {
  const height = 62;
  const picture = make("svg", { viewBox: `0 0 ${SIZE.width} ${height}`, class: "at-curves", role: "img", "aria-label": title });
  const top = Math.max(...points) || 1;
  const x = (at) => SIZE.left + (at * (SIZE.width - SIZE.left - SIZE.right)) / Math.max(1, points.length - 1);
  const y = (value) => height - 14 - (value / top) * (height - 20);
  for (const value of [0, top]) {
    picture.append(
      make("line", { class: "at-curves-rule", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: y(value), y2: y(value) }),
      words(short(value), { x: SIZE.left - 5, y: y(value) + 3, "text-anchor": "end" }),
    );
  }
  picture.append(
    make("polyline", { class: "at-curves-mean", points: points.map((value, at) => `${x(at)},${y(value)}`).join(" ") }),
    words("0", { x: SIZE.left, y: height - 3, "text-anchor": "start" }),
    words(String(last), { x: SIZE.width - SIZE.right, y: height - 3, "text-anchor": "end" }),
  );
  const name = document.createElement("div");
  name.className = "at-hint";
  name.textContent = title;
  root.append(name, picture);
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function make(name, attributes) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function words(text, attributes) {
  const made = make("text", attributes);
  made.textContent = text;
  return made;
}
