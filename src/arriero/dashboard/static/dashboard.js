// Polls the admin API and hands what it says to the parts of the page.

import * as api from "./api.js";
import { Cards } from "./cards.js";
import { Chart } from "./chart.js";
import { element, setText } from "./element.js";
import { bytes, clock, count, milliseconds, percent, requestName } from "./format.js";
import { MemoryHistory, ServerClock, WINDOW_MS } from "./history.js";
import { EventList } from "./log.js";

const POLL_MS = 500;
const SLOW_POLL_MS = 3_000; // hidden, or the server is away
const FRESH_MS = 5_000; // an event that came in a poll so soon after the last one has just happened
const NOTICE_MS = 8_000;

const at = (id) => document.getElementById(id);
const memory = new MemoryHistory();
const serverClock = new ServerClock();
const log = new EventList({ list: at("events"), empty: at("no-events"), filter: at("filter"), clock: serverClock });
const chart = new Chart({
  plot: at("chart"),
  legend: at("legend"),
  when: at("chart-when"),
  note: at("chart-note"),
  history: memory,
});
const cards = new Cards(at("cards"), { migrate, onFocus: (instance) => chart.focus(instance) });

// ---------------------------------------------------------------- polling

const link = {
  state: "connecting", // connecting, live, away, locked
  why: "",
  lastAnswer: null, // ms
};
let timer = null;
let isPolling = false;
let lastSeq = 0; // of the events that are shown
let pids = new Map(); // instance -> pid

async function poll() {
  clearTimeout(timer);
  if (isPolling || at("key").open) return;
  isPolling = true;
  const started = Date.now();
  try {
    // After a silence the server may be another one, whose events count from 1 again.
    const after = link.state === "live" ? lastSeq : 0;
    const [instances, requests, events] = await Promise.all([api.instances(), api.requests(), api.events(after)]);
    if (isSameServer(instances)) show(instances, requests, events, after);
    else forget();
    Object.assign(link, { state: "live", lastAnswer: Date.now() });
  } catch (error) {
    Object.assign(link, { state: error instanceof api.KeyNeeded ? "locked" : "away", why: error.message });
    if (!(error instanceof api.Away || error instanceof api.Refused || error instanceof api.KeyNeeded)) throw error;
  } finally {
    isPolling = false;
    const took = Date.now() - started;
    const period = link.state === "away" || document.hidden ? SLOW_POLL_MS : POLL_MS;
    if (link.state === "locked") askForKey();
    else timer = setTimeout(poll, Math.max(period - took, took, 50)); // at most half the time is spent polling
    showLink();
  }
}

/** An instance's number never comes back with another process while a server lives. */
function isSameServer(instances) {
  const isSame = instances.every(({ id, pid }) => (pids.get(id) ?? pid) === pid);
  pids = new Map(instances.map(({ id, pid }) => [id, pid]));
  return isSame;
}

function forget() {
  lastSeq = 0;
  for (const part of [memory, serverClock, log, cards]) part.clear();
}

function show(instances, requests, events, after) {
  const now = Date.now();
  const areNew = link.state === "live" && now - link.lastAnswer < FRESH_MS;
  if (after === 0) log.clear();
  lastSeq = events.at(-1)?.seq ?? after;
  memory.record(instances, now);
  const hasShifted = serverClock.learn(events, requests, now, areNew);
  log.add(events);
  if (hasShifted) log.retell();
  cards.update(instances, requests, now);
  const moves = log.moves();
  chart.update(moves, now);
  showTotals(instances, moves, now);
}

// ---------------------------------------------------------------- the head of the page

function showTotals(instances, moves, now) {
  const live = instances.filter((i) => i.state !== "dead");
  const sum = (name) => live.reduce((total, i) => total + (i[name] ?? 0), 0);
  const recent = moves.filter((m) => m.ok && m.at > now - WINDOW_MS).length;
  const ready = live.filter((i) => i.state === "ready").length;
  const totals = {
    ready: `${ready} / ${live.length}`,
    running: count(sum("running")),
    waiting: count(sum("waiting")),
    "KV memory": percent(sum("blocks_total") ? sum("blocks_used") / sum("blocks_total") : null),
    "moves in 2 min": count(recent),
  };
  const list = at("totals");
  if (!list.childElementCount) {
    for (const name of Object.keys(totals)) list.append(element("div", {}, element("dt", {}, name), element("dd")));
  }
  for (const [i, text] of Object.values(totals).entries()) setText(list.children[i].lastChild, text);
  document.title = `${ready}/${live.length} ready, arriero`;
}

function showLink() {
  const { state, why, lastAnswer } = link;
  const isAway = state === "away" || state === "locked";
  document.body.classList.toggle("stale", isAway);
  at("link").dataset.link = state;
  setText(at("link"), { locked: "needs a key" }[state] ?? state);
  at("away").hidden = !isAway || at("key").open;
  if (!isAway) return;
  const since = lastAnswer === null ? "" : ` What you see is from ${clock(lastAnswer)}.`;
  const then = state === "away" ? ` Trying again every ${SLOW_POLL_MS / 1000} s.` : " Reload the page to enter it.";
  setText(at("away"), `${why[0].toUpperCase()}${why.slice(1)}.${since}${then}`);
  if (state === "away") document.title = "away, arriero";
}

// ---------------------------------------------------------------- the key

function askForKey() {
  const dialog = at("key");
  if (dialog.open) return;
  setText(at("key-why"), api.hasKey() ? "The server did not accept this key." : "This server wants its API key.");
  at("key-input").value = "";
  dialog.showModal();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(at("key-input").value);
  link.state = "connecting";
  at("key").close();
  poll();
});

at("key").addEventListener("close", showLink);

// ---------------------------------------------------------------- moving a request

async function migrate(request, to, mode) {
  const name = requestName(request.client_id ?? request.id);
  try {
    const { migrations } = await api.migrate(request.id, to, mode);
    const size = migrations.reduce((total, m) => total + m.num_bytes, 0);
    const longest = Math.max(...migrations.map((m) => m.total_s));
    const what = size ? `${bytes(size)} in ` : "";
    notify(`${name} moved from ${request.instance} to ${to}: ${what}${milliseconds(1000 * longest)}.`, "good");
  } catch (error) {
    notify(`${name} was not moved to ${to}: ${error.message}`, "bad");
    if (error instanceof api.KeyNeeded) askForKey();
  }
  poll();
}

let noticeTimer = null;

/** Bad news stays until it is dismissed. */
function notify(text, kind) {
  clearTimeout(noticeTimer);
  const notice = at("notice");
  notice.dataset.kind = kind;
  notice.hidden = false;
  setText(at("notice-text"), text);
  if (kind === "good") noticeTimer = setTimeout(() => (notice.hidden = true), NOTICE_MS);
}

at("notice-close").addEventListener("click", () => (at("notice").hidden = true));

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
