// The lines between two columns of tokens: colour says the head, strength the weight.

const LEVELS = 12; // strengths that are told apart; all lines of one are one stroke
const WEAKEST = 0.06;

// tile: {heads, rows, cols, values}; drawn: [{head, colour}]; only(row, col): whether a pair is to be seen
export function drawLines(context, { tile, drawn, above, width, pitch, only, average }) {
  const spread = Math.min(pitch * 0.6, 1.6 * (drawn.length - 1));
  drawn.forEach(({ head, colour }, i) => {
    const shift = drawn.length > 1 ? (i / (drawn.length - 1) - 0.5) * spread : 0; // heads run side by side
    const found = Array.from({ length: LEVELS * 2 }, () => []);
    for (let row = 0; row < tile.rows; row++) {
      for (let col = 0; col < tile.cols; col++) {
        if (!only(row, col)) continue;
        const weight = average ? average(row, col) : tile.values[(head * tile.rows + row) * tile.cols + col];
        const size = Math.abs(weight);
        if (!(size >= above) || size === 0) continue;
        const level = Math.min(LEVELS - 1, Math.floor(size * LEVELS));
        found[level + (weight < 0 ? LEVELS : 0)].push(row, col);
      }
    }
    context.strokeStyle = colour;
    found.forEach((pairs, kind) => {
      if (!pairs.length) return;
      const strength = ((kind % LEVELS) + 0.5) / LEVELS;
      context.globalAlpha = Math.min(1, WEAKEST + strength);
      context.lineWidth = 0.8 + strength * 1.6;
      context.setLineDash(kind >= LEVELS ? [4, 3] : []);
      context.beginPath();
      for (let at = 0; at < pairs.length; at += 2) {
        context.moveTo(0, (pairs[at] + 0.5) * pitch + shift);
        context.lineTo(width, (pairs[at + 1] + 0.5) * pitch + shift);
      }
      context.stroke();
    });
  });
  context.globalAlpha = 1;
  context.setLineDash([]);
}
