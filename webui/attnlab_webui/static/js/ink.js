// The colours of everything that is not data, read from the stylesheet so that light and dark have one source.

const NAMES = {
  text: "--at-text",
  muted: "--at-muted",
  faint: "--at-line-strong",
  frame: "--at-line-strong",
  empty: "--at-sunken",
  surface: "--at-surface",
  grid: "--at-map-grid",
  masked: "--at-map-masked",
  stripe: "--at-map-stripe",
  accent: "--at-accent",
  onAccent: "--at-on-accent",
  wash: "--at-accent-wash",
  shade: "--at-shade",
  cross: "--at-map-cross",
  mono: "--font-mono",
  sans: "--font",
};

export function readInk(element) {
  const style = getComputedStyle(element);
  const ink = {};
  for (const [name, variable] of Object.entries(NAMES)) ink[name] = style.getPropertyValue(variable).trim();
  ink.mono ||= "monospace";
  ink.sans ||= "sans-serif";
  return ink;
}

const patterns = new Map();

// Diagonal stripes: "no such pair", never to be mistaken for a weight of zero.
export function hatch(context, ink) {
  const key = ink.masked + ink.stripe;
  if (!patterns.has(key)) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const brush = tile.getContext("2d");
    brush.fillStyle = ink.masked;
    brush.fillRect(0, 0, 8, 8);
    brush.strokeStyle = ink.stripe;
    brush.lineWidth = 1;
    for (const offset of [-8, 0, 8]) {
      brush.beginPath();
      brush.moveTo(offset - 1, 9);
      brush.lineTo(offset + 9, -1);
      brush.stroke();
    }
    patterns.set(key, context.createPattern(tile, "repeat"));
  }
  return patterns.get(key);
}
