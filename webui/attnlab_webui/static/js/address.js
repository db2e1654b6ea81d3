// What a person chose stands in the address. Only the browser writes it, and what is written makes the server draw.

let trigger = null;
let waiting = false;

// Called by the page's invisible component: from now on a choice draws.
export function mount(given) {
  trigger = given;
  if (waiting) draw();
}

export function draw() {
  waiting = trigger === null;
  trigger?.("select", {});
}

// What has no place in the address: taken, in order, with the next request.
const clicks = (window.attnlabClicks = []);

export function click(what) {
  clicks.push(what);
  draw();
}

// changes: parameters of the address; "" and null take one away
export function choose(changes) {
  const params = new URLSearchParams(window.location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") params.delete(name);
    else params.set(name, value);
  }
  const words = params.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
  history.replaceState(history.state, "", words ? `${window.location.pathname}?${words}` : window.location.pathname);
  draw();
}

// Fields that the address fills are lent when it has: the answer would take back what was typed before.
const hold = () => {
  for (const form of document.querySelectorAll(".at-held")) form.inert = true;
};
const arriving = new MutationObserver(hold);
arriving.observe(document.documentElement, { childList: true, subtree: true });
hold();

export function release() {
  arriving.disconnect();
  for (const form of document.querySelectorAll(".at-held")) form.inert = false;
}

window.addEventListener("popstate", draw);
