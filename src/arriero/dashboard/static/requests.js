// One row a request; a row that changes instance travels to its new card.

import { element, setText } from "./element.js";
import { count, decimal, milliseconds, requestName } from "./format.js";

const MODES = { live: "live", stop_and_copy: "stop and copy", recompute: "recompute" };
const FROM_MS = 4_000;
const TRAVEL_MS = 450;

export class RequestRow {
  node;
  request;
  #cells;
  #button;
  #form = null;
  #from = null; // { instance, until }
  #move;
  #targets;

  /** move(request, to, mode) returns a promise; targets(request) lists instances it could go to. */
  constructor(request, { move, targets }) {
    this.request = request;
    this.#move = move;
    this.#targets = targets;
    const cell = (name) => element("span", { class: name });
    this.#cells = Object.fromEntries(["id", "state", "tokens", "moves", "pause"].map((name) => [name, cell(name)]));
    this.#button = element("button", { type: "button", class: "open" }, "move");
    this.#button.addEventListener("click", () => (this.#form ? this.#close() : this.#open()));
    this.node = element("li", { class: "request" }, ...Object.values(this.#cells), this.#button);
    setText(this.#cells.id, requestName(request.client_id ?? request.id));
  }

  update(request, now) {
    if (request.instance !== this.request.instance) {
      this.#from = { instance: this.request.instance, until: now + FROM_MS };
      this.#close();
      this.#flash();
    }
    this.request = request;
    if (this.#from && now > this.#from.until) this.#from = null;
    const { id, state, tokens, moves, pause } = this.#cells;
    id.title = `${request.id}, priority ${request.priority}, ${milliseconds(1000 * request.age_s)} old`;
    this.node.dataset.state = this.#from ? "moved" : request.state;
    setText(state, this.#from ? `from ${this.#from.instance}` : request.state);
    setText(tokens, count(request.prompt_tokens + request.output_tokens));
    tokens.title = `prompt ${count(request.prompt_tokens)}, output ${count(request.output_tokens)}`;
    setText(moves, count(request.moves));
    this.node.classList.toggle("unmoved", request.moves === 0);
    setText(pause, request.paused_ms ? milliseconds(request.paused_ms) : "–");
    this.#button.disabled = request.state === "moving" || Boolean(request.unmovable);
    this.#button.title = request.unmovable ? `cannot move: ${request.unmovable}` : "";
    this.#button.setAttribute("aria-label", `move ${id.textContent}`);
  }

  /** Put the row before `next` in `list`; from another card it is seen to travel. */
  place(list, next) {
    if (this.node.parentNode === list && this.node.nextSibling === next) return;
    const before = this.node.isConnected && this.node.parentNode !== list ? this.node.getBoundingClientRect() : null;
    list.insertBefore(this.node, next);
    if (before && !matchMedia("(prefers-reduced-motion: reduce)").matches) this.#travel(before);
  }

  #travel(before) {
    const card = this.node.closest(".card");
    const after = this.node.getBoundingClientRect();
    const start = `translate(${before.left - after.left}px, ${before.top - after.top}px)`;
    const frames = [{ transform: start }, { transform: "none" }];
    card.classList.add("receiving"); // above its neighbours
    const journey = this.node.animate(frames, { duration: TRAVEL_MS, easing: "cubic-bezier(0.2, 0.7, 0.2, 1)" });
    journey.finished.catch(() => {}).finally(() => card.classList.remove("receiving"));
  }

  #flash() {
    this.node.classList.remove("arrived");
    void this.node.offsetWidth; // so that the animation starts anew
    this.node.classList.add("arrived");
  }

  #open() {
    const targets = this.#targets(this.request);
    const to = element("select", { "aria-label": "destination" });
    for (const { id, freeness } of targets) {
      to.append(element("option", { value: id }, `${id}, freeness ${decimal(freeness)}`));
    }
    const mode = element("select", { "aria-label": "mode" });
    for (const [value, text] of Object.entries(MODES)) mode.append(element("option", { value }, text));
    const go = element("button", { type: "submit", class: "primary" }, "Move");
    const fields = targets.length ? [element("label", {}, "to ", to), mode, go] : ["No other instance is ready."];
    this.#form = element("form", { class: "move" }, ...fields);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#close();
      this.#move(this.request, Number(to.value), mode.value);
    });
    this.#form.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape") return;
      this.#close();
      this.#button.focus();
    });
    this.node.append(this.#form);
    setText(this.#button, "close");
    to.focus();
  }

  #close() {
    this.#form?.remove();
    this.#form = null;
    setText(this.#button, "move");
  }
}
