// The parts that every page shares: the switch between light and dark, and the count of live runs.

import "./address.js";

const KEY = "attnlab-theme";
const LIVE_MS = 5000;

function applyTheme(theme) {
  document.body.classList.toggle("dark", theme === "dark");
  document.documentElement.style.colorScheme = theme;
}

function wantedTheme() {
  const asked = new URLSearchParams(window.location.search).get("__theme");
  if (asked === "dark" || asked === "light") return asked;
  const kept = localStorage.getItem(KEY);
  if (kept) return kept;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

document.addEventListener("click", (event) => {
  if (!event.target.closest?.("[data-attnlab-theme]")) return;
  const next = document.body.classList.contains("dark") ? "light" : "dark";
  localStorage.setItem(KEY, next);
  applyTheme(next);
});

async function countLive() {
  const places = document.querySelectorAll("[data-attnlab-live]");
  if (!places.length || document.hidden) return;
  const response = await fetch("/api/v1/queue").catch(() => null);
  if (!response?.ok) return;
  const { running, queued, paused } = await response.json();
  for (const place of places) {
    place.hidden = !(running || queued);
    place.textContent = `${running} running · ${queued} queued${paused ? " · paused" : ""}`;
    place.classList.toggle("at-running", running > 0);
  }
}

// Gradio draws the page after this module ran: wait for the bar, then go on by clock.
const bar = new MutationObserver(() => {
  if (!document.querySelector("[data-attnlab-theme]")) return;
  bar.disconnect();
  applyTheme(wantedTheme());
  countLive();
  setInterval(countLive, LIVE_MS);
});
bar.observe(document.documentElement, { childList: true, subtree: true });
