// A card an instance: its state, its load, its requests.

import { badge, element, series, setText } from "./element.js";
import { count, decimal, percent } from "./format.js";
import { RequestRow } from "./requests.js";

const MAX_ROWS = 600; // on the whole page
const CAPTIONS = { id: "request", state: "state", tokens: "tokens", moves: "moves", pause: "pause" };

export class Cards {
  #grid;
  #migrate;
  #onFocus;
  #instances = [];
  #cards = new Map(); // instance -> Card
  #rows = new Map(); // request -> RequestRow

  /** migrate(request, to, mode) returns a promise; onFocus(instance or null) hears where the pointer is. */
  constructor(grid, { migrate, onFocus }) {
    this.#grid = grid;
    this.#migrate = migrate;
    this.#onFocus = onFocus;
  }

  update(instances, requests, now) {
    this.#instances = instances;
    const ordered = [...instances].sort((a, b) => isDead(a) - isDead(b) || a.id - b.id);
    this.#drop(this.#cards, new Set(instances.map((i) => i.id)));
    this.#drop(this.#rows, new Set(requests.map((r) => r.id)));
    for (const request of requests) this.#row(request).update(request, now);
    const limit = Math.max(4, Math.floor(MAX_ROWS / Math.max(1, ordered.length)));
    const rowsOf = new Map(instances.map((i) => [i.id, []]));
    for (const request of requests) rowsOf.get(request.instance)?.push(this.#rows.get(request.id));
    let next = null;
    for (const instance of ordered.reverse()) {
      const card = this.#card(instance.id);
      const rows = rowsOf.get(instance.id);
      card.update(instance, rows.slice(0, limit), rows.slice(limit));
      if (card.node.parentNode !== this.#grid || card.node.nextSibling !== next) this.#grid.insertBefore(card.node, next);
      next = card.node;
    }
  }

  clear() {
    this.#drop(this.#cards, new Set());
    this.#drop(this.#rows, new Set());
  }

  #drop(shown, keep) {
    for (const [id, { node }] of shown) {
      if (keep.has(id)) continue;
      node.remove();
      shown.delete(id);
    }
  }

  #card(id) {
    if (!this.#cards.has(id)) {
      const card = new Card(id);
      card.node.addEventListener("pointerenter", () => this.#onFocus(id));
      card.node.addEventListener("pointerleave", () => this.#onFocus(null));
      this.#cards.set(id, card);
    }
    return this.#cards.get(id);
  }

  #row(request) {
    if (!this.#rows.has(request.id)) {
      const targets = ({ instance }) =>
        this.#instances
          .filter((i) => i.state === "ready" && i.id !== instance)
          .sort((a, b) => (b.freeness ?? -Infinity) - (a.freeness ?? -Infinity));
      this.#rows.set(request.id, new RequestRow(request, { move: this.#migrate, targets }));
    }
    return this.#rows.get(request.id);
  }
}

class Card {
  node;
  #state = element("span", { class: "state" });
  #where = element("span", { class: "where" });
  #blocks = element("span", { class: "blocks" });
  #share = element("span", { class: "share" });
  #fill = element("span", { class: "fill" });
  #bar;
  #figures = {};
  #list = element("ol", { class: "requests" });
  #more = element("p", { class: "more", hidden: "" });

  constructor(id) {
    this.#bar = element("div", { class: `bar ${series(id)}`, role: "meter", "aria-label": "KV memory" }, this.#fill);
    const figures = element("dl", { class: "figures" });
    for (const name of ["running", "waiting", "incoming", "freeness", "preemptions"]) {
      this.#figures[name] = element("dd");
      figures.append(element("div", {}, element("dt", {}, name), this.#figures[name]));
    }
    const captions = Object.entries(CAPTIONS).map(([name, text]) => element("span", { class: name }, text));
    this.node = element(
      "article",
      { class: "card panel", "aria-label": `Instance ${id}` },
      element("header", {}, badge(id), element("h2", {}, `Instance ${id}`), this.#state, this.#where),
      element(
        "div",
        { class: "load" },
        element("p", { class: "memory" }, element("span", {}, "KV memory"), this.#blocks, this.#share),
        this.#bar,
        figures,
      ),
      element("div", { class: "captions", "aria-hidden": "true" }, ...captions),
      this.#list,
      this.#more,
    );
  }

  update(instance, rows, hidden) {
    const { state, stage, pid, host, blocks_used: used, blocks_total: total } = instance;
    const isStaging = state === "starting" && stage && stage !== state;
    this.node.dataset.state = state;
    this.node.classList.toggle("idle", rows.length === 0);
    setText(this.#state, isStaging ? `${state}: ${stage}` : state);
    setText(this.#where, `pid ${pid ?? "–"}${host ? ` on ${host}` : ""}`);
    const share = total ? used / total : null;
    setText(this.#blocks, total ? `${count(used)} / ${count(total)} blocks` : "");
    setText(this.#share, percent(share));
    this.#share.classList.toggle("full", share !== null && share >= 0.95);
    this.#fill.style.width = `${100 * Math.min(1, share ?? 0)}%`;
    this.#bar.setAttribute("aria-valuenow", String(Math.round(100 * (share ?? 0))));
    for (const [name, figure] of Object.entries(this.#figures)) {
      setText(figure, (name === "freeness" ? decimal : count)(instance[name]));
    }
    let next = null;
    for (const row of [...rows].reverse()) {
      row.place(this.#list, next);
      next = row.node;
    }
    for (const row of hidden) row.node.remove();
    setText(this.#more, hidden.length ? `and ${count(hidden.length)} more` : "no requests");
    this.#more.hidden = hidden.length === 0 && (rows.length > 0 || state !== "ready");
  }
}

const isDead = (instance) => Number(instance.state === "dead");
