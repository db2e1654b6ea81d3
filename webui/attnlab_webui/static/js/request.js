// Requests to /api/v1: errors become Error objects with the server's sentence; every request can be aborted.

const BASE = new URL("/api/v1", window.location.origin).toString();

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(BASE + path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is attnlab still running?", 0);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // not JSON: the status is all there is to say
  }
  throw new ApiError(message, response.status);
}

export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

export async function post(path) {
  return (await ask(path, { method: "POST" })).json();
}

// What the server may still have to work out: it says how far it is, and told hears of it.
async function askUntilThere(path, signal, told) {
  let response = await ask(path, { signal });
  while (response.status === 202) {
    told((await response.json()).building);
    await pause(300, signal);
    response = await ask(path, { signal });
  }
  return response;
}

export async function getWorkedOut(path, signal, told) {
  return (await askUntilThere(path, signal, told)).json();
}

// A region as float32 [height, width] in row order; NaN where no query may attend to any key.
export async function getTile(path, signal, told = () => {}) {
  return readTile(await askUntilThere(path, signal, told));
}

// null where the server has yet to work it out, which it begins.
export async function getTileIfThere(path, signal) {
  const response = await ask(path, { signal });
  return response.status === 202 ? null : readTile(response);
}

async function readTile(response) {
  const pair = (name) => response.headers.get(name).split(/[,:]/).map(Number);
  const rounded = response.headers.get("x-attnlab-dtype") === "bfloat16";
  const body = await response.arrayBuffer();
  const [height, width] = pair("x-attnlab-shape");
  return {
    height,
    width,
    rows: pair("x-attnlab-rows"),
    cols: pair("x-attnlab-cols"),
    maximum: Number(response.headers.get("x-attnlab-max")),
    exact: response.headers.get("x-attnlab-exact") === "1",
    rounded,
    values: rounded ? widened(body) : new Float32Array(body),
  };
}

// bfloat16, all high bytes before all low ones, as float32.
function widened(body) {
  const bytes = new Uint8Array(body);
  const count = bytes.length / 2;
  const bits = new Uint32Array(count);
  for (let i = 0; i < count; i++) bits[i] = (bytes[i] << 24) | (bytes[count + i] << 16);
  return new Float32Array(bits.buffer);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

export function query(fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
  return given.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
}

const MOST_TILES = 64;
const MOST_TILE_BYTES = 16e6;

// Remembers the newest tiles; a tile of a finished run never changes, so the browser keeps older ones on its disk.
export class TileCache {
  constructor() {
    this.tiles = new Map();
    this.bytes = 0;
  }

  get(key) {
    const tile = this.tiles.get(key);
    if (tile) {
      this.tiles.delete(key);
      this.tiles.set(key, tile);
    }
    return tile;
  }

  put(key, tile) {
    this.drop(key);
    this.tiles.set(key, tile);
    this.bytes += sizeOf(tile);
    while (this.tiles.size > 1 && (this.tiles.size > MOST_TILES || this.bytes > MOST_TILE_BYTES)) {
      this.drop(this.tiles.keys().next().value);
    }
  }

  drop(key) {
    if (this.tiles.has(key)) this.bytes -= sizeOf(this.tiles.get(key));
    this.tiles.delete(key);
  }
}

function sizeOf(tile) {
  return tile.values?.byteLength ?? 0;
}
