// The latest events, newest first.

import { badge, element, setText } from "./element.js";
import { bytes, clock, count, milliseconds, requestName } from "./format.js";

const KEEP = 200; // lines of a kind
const KINDS = { migration: "moves", dispatch: "requests", finish: "requests", reject: "requests",
  queue: "requests", first_token: "requests", preempt: "requests", resume: "requests" };
const NAMES = { migration: "move", instance_ready: "ready", instance_lost: "lost" };
const GENERAL = new Set(["seq", "time_s", "event"]);

export class EventList {
  #list;
  #empty;
  #clock;
  #lines = { moves: [], requests: [], instances: [] }; // oldest first

  constructor({ list, empty, filter, clock }) {
    this.#list = list;
    this.#empty = empty;
    this.#clock = clock;
    filter.addEventListener("click", ({ target }) => {
      if (!target.dataset.show) return;
      list.dataset.show = target.dataset.show;
      for (const button of filter.children) button.setAttribute("aria-pressed", String(button === target));
      this.#showIfEmpty();
    });
  }

  add(events) {
    for (const event of events) {
      const kind = KINDS[event.event] ?? "instances";
      const time = element("time");
      const name = element("span", { class: "kind" }, NAMES[event.event] ?? event.event.replaceAll("_", " "));
      const what = element("div", { class: "what" }, ...describe(event));
      const line = element("li", { "data-kind": kind }, time, name, what);
      if (event.ok === false || event.event === "instance_lost" || event.how === "lost") line.classList.add("bad");
      this.#list.prepend(line);
      const lines = this.#lines[kind];
      lines.push({ line, time, event });
      if (lines.length > KEEP) lines.shift().line.remove();
      this.#tell(lines.at(-1));
    }
    this.#showIfEmpty();
  }

  /** The migrations still in the list, each with `at`, our time in ms. */
  moves() {
    return this.#lines.moves.map(({ event }) => ({ ...event, at: this.#clock.toLocal(event.time_s) }));
  }

  /** Write every time again: the server's clock is better known. */
  retell() {
    for (const line of Object.values(this.#lines).flat()) this.#tell(line);
  }

  clear() {
    this.#list.replaceChildren();
    for (const lines of Object.values(this.#lines)) lines.length = 0;
    this.#showIfEmpty();
  }

  #tell({ time, event }) {
    const at = this.#clock.toLocal(event.time_s);
    setText(time, at === null ? "earlier" : clock(at));
  }

  #showIfEmpty() {
    const { show } = this.#list.dataset;
    const shown = show === "all" ? Object.values(this.#lines).flat() : this.#lines[show];
    this.#empty.hidden = shown.length > 0;
  }
}

/** A migration in one line of plain text. */
export function moveText(event) {
  const from = event.source === null ? "replay" : event.source;
  const facts = [...moveFacts(event), ...(event.ok ? [] : [outcome(event)])];
  return `${requestName(event.request_id)}  ${from} → ${event.destination}  ${facts.join(", ")}`;
}

const moveFacts = (event) => [
  event.mode.replaceAll("_", " "),
  ...(event.num_bytes ? [bytes(event.num_bytes)] : []),
  ...(event.num_stages > 1 ? [`${event.num_stages} stages`] : []),
  milliseconds(1000 * event.total_s),
];

function outcome(event) {
  if (event.ok) return event.reason || "moved";
  return `${event.source === null ? "not replayed" : "stayed"}: ${event.reason || "no reason given"}`;
}

function describe(event) {
  switch (event.event) {
    case "dispatch":
      return [request(event.request), " → ", badge(event.instance)];
    case "finish":
      return [request(event.request), " on ", badge(event.instance), ` ${event.how}, ${tokens(event.num_output_tokens)}`];
    case "queue":
      return [request(event.request), ` waits for an instance, with ${count(event.num_queued)} in the queue`];
    case "first_token":
      return [request(event.request), " on ", badge(event.instance), ` after ${milliseconds(1000 * event.ttft_s)}`];
    case "preempt":
      return [
        request(event.request), " on ", badge(event.instance),
        ...(event.avoidable ? [` with ${count(event.free_blocks)} blocks free on `, badge(event.roomiest)] : []),
      ];
    case "resume":
      return [request(event.request), " on ", badge(event.instance), ` after ${milliseconds(1000 * event.pause_s)}`];
    case "instance_ready":
      return [badge(event.instance), " is ready"];
    case "instance_lost":
      return [badge(event.instance), ` is lost, exit code ${event.returncode}`];
    case "migration":
      return describeMove(event);
    default:
      return [facts(event)];
  }
}

function describeMove(event) {
  const from = event.source === null ? "replayed" : badge(event.source);
  const detached = event.detach_to_commit_s;
  const numbers = [...moveFacts(event), ...(detached == null ? [] : [`detached ${milliseconds(1000 * detached)}`])];
  return [
    request(event.request_id), " ", from, " → ", badge(event.destination),
    element("span", { class: "numbers" }, numbers.join(" · ")),
    element("span", { class: "outcome" }, outcome(event)),
    element("span", { class: "cause" }, ` (${event.cause})`),
  ];
}

const tokens = (number) => `${count(number)}\u00a0tokens`;
const request = (id) => element("span", { class: "id", title: id }, requestName(id));

/** An event this page does not know. */
const facts = (event) =>
  Object.entries(event)
    .filter(([name, value]) => !GENERAL.has(name) && value !== null)
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join(", ");
