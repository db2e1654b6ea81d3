// The ways to look at a run, in the order of their tabs; `?view=key` is the link to one.
//
// load() gives a class: new Made(root, run), where run is a RunData, with
//   ready    a promise: the first picture is there (an ApiError is shown in the view's place)
//   idle     whether nothing is on its way, for tests
//   stop()   gives back listeners, timers and requests
// missing(run), where a view cannot show every run: "" or the sentence that says why this one has none.

export const VIEWS = [
  { key: "map", title: "Map", help: "the weights of one head", load: async () => (await import("./view.js")).View },
  { key: "grid", title: "Grid", help: "all layers and heads", load: async () => (await import("./views/grid.js")).Grid },
  { key: "token", title: "Token", help: "one token over the text", load: async () => (await import("./views/token.js")).Token },
];
