// Links to a view as a picture for a paper, in the colours of the page.

import { isDark } from "./colour.js";
import { element } from "./make.js";
import { query } from "./request.js";

export const FORMATS = ["png", "svg", "pdf"];
const WORDS = { parquet: "Parquet", safetensors: "safetensors" };

// fields: what the address of the export holds besides its look; of: what is exported, where it is not the map;
// more: formats beside the pictures
export function showFiles(place, run, fields, of = "", more = []) {
  const { state } = run;
  const look = { scale: state.get("scale"), colormap: run.table(false).name, theme: isDark() ? "dark" : "light" };
  place.className = "at-exports";
  place.replaceChildren(element("span", "at-label", "this view"));
  for (const format of [...FORMATS, ...more]) {
    place.append(fileLink(format, `/api/v1/runs/${run.run}/${of}export/${format}?${query({ ...fields, ...look })}`));
  }
}

export function fileLink(format, address) {
  const link = element("a", "", WORDS[format] ?? format.toUpperCase());
  link.href = address;
  link.setAttribute("download", "");
  return link;
}
