// The ways to look at a run, in the order of their tabs; `?view=key` is the link to one.
//
// load() gives a class: new Made(root, run), where run is a RunData, with
//   ready    a promise: the first picture is there (an ApiError is shown in the view's place)
//   idle     whether nothing is on its way, for tests
//   stop()   gives back listeners, timers and requests
// missing(run), where a view cannot show every run: "" or the sentence that says why this one has none.

const NO_PICTURE = "This run read no picture. Give an experiment an image as its input, or a module neighborhood attention in 2 dimensions.";
const NO_CROSS = "No layer of this run reads another sequence. Encoder-decoders do: Whisper over sound, a translator over its source.";
const NO_STEPS = "No step follows another in this run: its attention is not causal, so there is no cache that grows.";
const ONE_STEP =
  "This run decoded one token, so it keeps one row and no step after another. Give an experiment of phase decode `decode: {steps: 32}`, and each step is a row.";
const ONE_TEXT = "The way through the layers needs the maps of every layer, all over one text; this run did not record them.";

export const VIEWS = [
  { key: "map", title: "Map", help: "the weights of one head", load: async () => (await import("./view.js")).View },
  { key: "grid", title: "Grid", help: "all layers and heads", load: async () => (await import("./views/grid.js")).Grid },
  { key: "token", title: "Token", help: "one token over the text", load: async () => (await import("./views/token.js")).Token },
  { key: "lines", title: "Lines", help: "lines between two columns of tokens", load: async () => (await import("./views/lines.js")).Lines },
  {
    key: "rollout",
    title: "Rollout",
    help: "through all layers: rollout and maximum flow",
    missing: (run) => (throughLayers(run.facts.layers) ? "" : ONE_TEXT),
    load: async () => (await import("./views/rollout.js")).Rollout,
  },
  {
    key: "image",
    title: "Image",
    help: "the weights of one patch over the picture",
    missing: (run) => (run.facts.layers.some(({ grid }) => grid) ? "" : NO_PICTURE),
    load: async () => (await import("./views/image.js")).ImageView,
  },
  {
    key: "cross",
    title: "Cross",
    help: "what one sequence reads of another: text over sound, a decoder over its encoder",
    missing: (run) => (run.facts.layers.some(({ role }) => role === "cross") ? "" : NO_CROSS),
    load: async () => (await import("./views/cross.js")).Cross,
  },
  {
    key: "generation",
    title: "Generation",
    help: "step by step over the growing cache",
    missing: (run) => (run.facts.layers.some(({ grows }) => grows) ? "" : run.facts.phase === "decode" ? ONE_STEP : NO_STEPS),
    load: async () => (await import("./views/generation.js")).Generation,
  },
];

function throughLayers(layers) {
  const size = layers[0].queries;
  const fits = ({ layer, role, queries, keys, columns }, i) => layer === i && role !== "cross" && queries === size && keys === size && !columns;
  return layers.every(fits);
}
