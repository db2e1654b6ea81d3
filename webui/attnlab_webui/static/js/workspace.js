// The views of one run behind a row of tabs. Which one is open stands in the address, and "back" goes to the last one.

import { VIEWS } from "./registry.js";
import { ApiError } from "./request.js";
import { RunData } from "./run_data.js";
import { State } from "./state.js";

export class Workspace {
  constructor(root, config) {
    this.root = root;
    this.state = new State();
    this.run = new RunData(config, this.state);
    this.view = null;
    root.innerHTML =
      '<div class="at-view-tabs" role="tablist" aria-label="Views of this run"></div>' +
      '<div id="at-view-panel" role="tabpanel"></div>';
    [this.tabs, this.place] = root.children;
    this.makeTabs();
    this.state.listen((changed) => changed.includes("view") && this.open());
    this.ready = this.load();
  }

  makeTabs() {
    for (const { key, title, help } of VIEWS) {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = `at-tab-${key}`;
      tab.dataset.view = key;
      tab.title = help;
      tab.textContent = title;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", "at-view-panel");
      tab.addEventListener("click", () => this.state.go({ view: key }));
      this.tabs.append(tab);
    }
    this.tabs.addEventListener("keydown", (event) => this.onKey(event));
    this.markTabs();
  }

  onKey(event) {
    const tabs = [...this.tabs.children];
    const at = tabs.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    tab.focus();
    tab.click();
  }

  markTabs() {
    const wanted = this.state.get("view");
    const known = VIEWS.some(({ key }) => key === wanted);
    [...this.tabs.children].forEach((tab, i) => {
      const chosen = tab.dataset.view === wanted;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen || (!known && i === 0) ? 0 : -1;
      if (chosen) this.place.setAttribute("aria-labelledby", tab.id);
    });
  }

  async load() {
    try {
      await this.run.load();
      this.run.selection.settle();
    } catch (error) {
      this.complain(error);
      return;
    }
    for (const { key, missing } of VIEWS) {
      const why = missing?.(this.run) ?? "";
      const tab = this.tabs.querySelector(`[data-view="${key}"]`);
      tab.classList.toggle("at-missing", why !== "");
      if (why) tab.title = why;
    }
    this.loaded = true;
    await this.open();
  }

  async open() {
    this.markTabs();
    if (!this.loaded || this.stopped) return;
    this.view?.stop();
    this.view = null;
    const root = document.createElement("div");
    this.place.replaceChildren(root);
    const wanted = this.state.get("view");
    const found = VIEWS.find(({ key }) => key === wanted);
    const why = found ? (found.missing?.(this.run) ?? "") : `There is no view called "${wanted}".`;
    if (why) {
      this.sayMissing(root, why);
      return;
    }
    this.opening = root;
    try {
      const Made = await found.load();
      if (this.opening !== root || this.stopped) return;
      this.view = new Made(root, this.run);
      await this.view.ready;
    } catch (error) {
      if (this.opening === root) this.complain(error);
    }
  }

  sayMissing(root, why) {
    this.opening = null;
    root.className = "at-view-message";
    root.setAttribute("role", "status");
    const words = document.createElement("p");
    words.textContent = why;
    const back = document.createElement("button");
    back.type = "button";
    back.className = "at-button";
    back.textContent = "Open the map";
    back.addEventListener("click", () => this.state.go({ view: "map" }));
    root.append(words, back);
  }

  complain(error) {
    if (error.name === "AbortError" || this.stopped) return;
    this.failed = true;
    const root = document.createElement("div");
    root.className = "at-view-message";
    root.setAttribute("role", "alert");
    root.textContent = error instanceof ApiError ? error.message : `This view cannot be shown: ${error.message}`;
    this.view?.stop();
    this.view = null;
    this.place.replaceChildren(root);
    if (!(error instanceof ApiError)) throw error;
  }

  get panels() {
    return this.view?.panels ?? [];
  }

  get idle() {
    return this.view ? this.view.idle : Boolean(this.failed || (this.loaded && this.opening === null));
  }

  stop() {
    this.stopped = true;
    this.view?.stop();
    this.state.stop();
  }
}
