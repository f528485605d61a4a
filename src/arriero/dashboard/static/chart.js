// KV memory of every instance over the last two minutes, with every migration between the lines it joined.

import { badge, element, series, setText, svg } from "./element.js";
import { clock, percent } from "./format.js";
import { WINDOW_MS } from "./history.js";
import { moveText } from "./log.js";

const HEIGHT = 170;
const MARGIN = { top: 10, right: 26, bottom: 20, left: 44 };
const TOPS = [0.05, 0.1, 0.25, 0.5, 1]; // of the vertical axis
const MAX_LINES = 24;
const LABEL_GAP = 12;
const NEAR_PX = 7;

export class Chart {
  #plot;
  #legend;
  #when;
  #note;
  #key; // what the note says when no move is picked
  #history;
  #moves = [];
  #now = 0;
  #pointerX = null;
  #focus = null;
  #items = new Map(); // instance -> its legend entry's value

  constructor({ plot, legend, when, note, history }) {
    this.#plot = plot;
    this.#legend = legend;
    this.#when = when;
    this.#note = note;
    this.#key = note.textContent;
    this.#history = history;
    plot.addEventListener("pointermove", (event) => {
      this.#pointerX = event.clientX - plot.getBoundingClientRect().left;
      this.draw();
    });
    plot.addEventListener("pointerleave", () => {
      this.#pointerX = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(plot);
  }

  /** moves: the migration events, with `at` in ms. */
  update(moves, now) {
    this.#moves = moves.filter((m) => m.at !== null && m.at > now - WINDOW_MS);
    this.#now = now;
    this.draw();
  }

  /** Bring one instance's line forward; null for none. */
  focus(instance) {
    this.#focus = instance;
    this.draw();
  }

  draw() {
    const width = this.#plot.clientWidth;
    if (!width || !this.#now) return;
    const highest = this.#history.highest();
    const scale = new Scale(width, this.#now, TOPS.find((t) => highest <= 0.94 * t) ?? 1);
    const shown = this.#history.instances().slice(0, MAX_LINES);
    const picked = this.#picked(scale);
    const root = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": "KV memory in use by instance" });
    root.append(...grid(scale), ...shown.flatMap((i) => this.#line(i, scale)), ...labels(shown, this.#history, scale));
    for (const move of this.#moves) root.append(...mark(move, this.#history, scale, move === picked?.move));
    if (picked) root.append(svg("path", { class: "cursor", d: `M${picked.x} ${MARGIN.top}V${scale.bottom}` }));
    this.#plot.replaceChildren(root);
    this.#readOut(shown, picked);
  }

  /** What the pointer is at: a time, and a move if one is near. */
  #picked(scale) {
    if (this.#pointerX === null) return null;
    const x = Math.min(Math.max(this.#pointerX, MARGIN.left), scale.right);
    let move = null;
    for (const m of this.#moves) {
      const distance = Math.abs(scale.x(m.at) - x);
      if (distance <= NEAR_PX && (!move || distance < Math.abs(scale.x(move.at) - x))) move = m;
    }
    return { x: move ? scale.x(move.at) : x, at: move ? move.at : scale.timeAt(x), move };
  }

  #line(instance, scale) {
    const faded = this.#focus !== null && this.#focus !== instance ? " faded" : "";
    const dash = ["none", "6 3", "2 3"][Math.floor(instance / 8) % 3];
    return this.#history.stretches(instance).map((samples) => {
      const points = samples.filter((s) => s.at >= scale.start).map((s) => `${scale.x(s.at)} ${scale.y(s.share)}`);
      const d = points.length === 1 ? `M${points[0]}h1` : `M${points.join("L")}`;
      const shape = { d: points.length ? d : "", "stroke-dasharray": dash };
      return svg("path", { class: `line ${series(instance)}${faded}`, ...shape });
    });
  }

  #readOut(shown, picked) {
    for (const [instance, { item }] of this.#items) {
      if (!shown.includes(instance)) {
        item.remove();
        this.#items.delete(instance);
      }
    }
    for (const instance of shown) {
      if (!this.#items.has(instance)) {
        const value = element("span", { class: "value" });
        const item = element("li", {}, badge(instance), value);
        this.#items.set(instance, { item, value });
        this.#legend.append(item);
      }
      setText(this.#items.get(instance).value, percent(this.#history.shareAt(instance, picked?.at ?? this.#now)));
    }
    const total = this.#history.instances().length;
    const part = total > shown.length ? `, ${shown.length} of ${total} instances` : "";
    setText(this.#when, picked ? clock(picked.at) : `last 2 minutes${part}`);
    setText(this.#note, picked?.move ? moveText(picked.move) : this.#key);
  }
}

/** Pixels for times and shares. */
class Scale {
  constructor(width, now, top) {
    this.start = now - WINDOW_MS;
    this.top = top;
    this.right = width - MARGIN.right;
    this.bottom = HEIGHT - MARGIN.bottom;
  }

  x(at) {
    return round(MARGIN.left + ((at - this.start) / WINDOW_MS) * (this.right - MARGIN.left));
  }

  y(share) {
    return round(this.bottom - (share / this.top) * (this.bottom - MARGIN.top));
  }

  timeAt(x) {
    return this.start + ((x - MARGIN.left) / (this.right - MARGIN.left)) * WINDOW_MS;
  }
}

const round = (pixels) => Math.round(10 * pixels) / 10;

function grid(scale) {
  const nodes = [];
  for (const part of [0, 0.5, 1]) {
    const y = scale.y(part * scale.top);
    nodes.push(svg("path", { class: part ? "grid" : "axis", d: `M${MARGIN.left} ${y}H${scale.right}` }));
    const text = `${100 * part * scale.top} %`;
    nodes.push(svg("text", { class: "tick", x: MARGIN.left - 6, y: y + 3.5, "text-anchor": "end" }, text));
  }
  for (const [ago, text] of [[120, "2 min ago"], [60, "1 min"], [0, "now"]]) {
    const x = scale.x(scale.start + WINDOW_MS - 1000 * ago);
    const anchor = { 120: "start", 60: "middle", 0: "end" }[ago];
    nodes.push(svg("text", { class: "tick", x, y: HEIGHT - 5, "text-anchor": anchor }, text));
  }
  return nodes;
}

/** Each line's number at its end, pushed apart where lines end close together. */
function labels(shown, history, scale) {
  const ends = shown
    .map((instance) => ({ instance, at: history.stretches(instance).at(-1).at(-1) }))
    .filter(({ at }) => at.at > scale.start + WINDOW_MS - 4000)
    .map(({ instance, at }) => ({ instance, y: scale.y(at.share) }))
    .sort((a, b) => a.y - b.y);
  if (ends.length * LABEL_GAP > HEIGHT - MARGIN.bottom) return [];
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + LABEL_GAP);
  let floor = scale.bottom;
  for (const end of [...ends].reverse()) {
    end.y = Math.min(end.y, floor);
    floor = end.y - LABEL_GAP;
  }
  return ends.map(({ instance, y }) =>
    svg("text", { class: `end ${series(instance)}`, x: scale.right + 7, y: y + 4 }, String(instance)),
  );
}

/**
 * A move: from a dot on the source's line to an arrow on the destination's; a cross where it was given up; before the
 * lines begin, a tick on the axis.
 */
function mark({ at, ok, source, destination }, history, scale, isPicked) {
  const x = scale.x(at);
  const kind = `mark${ok ? "" : " failed"}${isPicked ? " picked" : ""}`;
  const shares = [source, destination].map((i) => (i === null ? null : history.shareAt(i, at)));
  if (shares.every((s) => s === null)) return [svg("path", { class: kind, d: `M${x} ${scale.bottom}v-6` })];
  const [from, to] = shares.map((s) => (s === null ? scale.bottom : scale.y(s)));
  if (!ok) return [svg("path", { class: kind, d: `M${x - 3} ${from - 3}l6 6m0 -6l-6 6` })];
  const away = to <= from ? 1 : -1; // where the arrow's tail is
  const tail = to + 5 * away;
  return [
    svg("path", { class: kind, d: `M${x} ${from}V${to}M${x - 3} ${tail}L${x} ${to}L${x + 3} ${tail}` }),
    svg("circle", { class: `${kind} dot`, cx: x, cy: from, r: 2.5 }),
  ];
}
