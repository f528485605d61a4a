// What the page remembers of the last minutes: each instance's memory, and the server's clock.

export const WINDOW_MS = 120_000;
const GAP_MS = 8_000; // no samples for longer: the line breaks

export class MemoryHistory {
  #samples = new Map(); // instance -> [{ at, share }], oldest first

  record(instances, now) {
    for (const { id, blocks_used: used, blocks_total: total, state } of instances) {
      if (!total || state === "dead") continue;
      if (!this.#samples.has(id)) this.#samples.set(id, []);
      this.#samples.get(id).push({ at: now, share: used / total });
    }
    for (const [id, samples] of this.#samples) {
      while (samples.length && samples[0].at < now - WINDOW_MS - GAP_MS) samples.shift();
      if (!samples.length) this.#samples.delete(id);
    }
  }

  clear() {
    this.#samples.clear();
  }

  instances() {
    return [...this.#samples.keys()].sort((a, b) => a - b);
  }

  /** Unbroken stretches of samples. */
  stretches(instance) {
    const stretches = [];
    let last = -Infinity;
    for (const sample of this.#samples.get(instance) ?? []) {
      if (sample.at - last > GAP_MS) stretches.push([]);
      stretches.at(-1).push(sample);
      last = sample.at;
    }
    return stretches;
  }

  /** Memory in use at a time, between samples on the line that is drawn; null where there is none. */
  shareAt(instance, at) {
    const samples = this.#samples.get(instance) ?? [];
    const next = samples.findIndex((s) => s.at >= at);
    if (next === 0) return samples[0].at - at < 1000 ? samples[0].share : null;
    const before = samples.at(next === -1 ? -1 : next - 1);
    if (before === undefined) return null;
    if (next === -1) return at - before.at < 4000 ? before.share : null;
    const after = samples[next];
    if (after.at - before.at > GAP_MS) return null;
    return before.share + ((after.share - before.share) * (at - before.at)) / (after.at - before.at);
  }

  highest() {
    return Math.max(0, ...[...this.#samples.values()].flat().map((s) => s.share));
  }
}

/**
 * Places the server's monotonic clock on ours. An event that is new was at most one poll ago, and a request's age beside
 * its dispatch says it to the millisecond; of several estimates the earliest is the closest.
 */
export class ServerClock {
  #offset = Infinity;
  #dispatched = new Map(); // request -> time_s

  clear() {
    this.#offset = Infinity;
    this.#dispatched.clear();
  }

  /** Ours in ms for the server's time_s; null until something told. */
  toLocal(timeS) {
    return Number.isFinite(this.#offset) ? 1000 * timeS + this.#offset : null;
  }

  /** Returns whether times have shifted visibly. */
  learn(events, requests, now, areNew) {
    let offset = this.#offset;
    for (const event of events) {
      if (areNew) offset = Math.min(offset, now - 1000 * event.time_s);
      if (event.event === "dispatch") this.#dispatched.set(event.request, event.time_s);
    }
    const dispatched = new Map();
    for (const { id, age_s: age } of requests) {
      const at = this.#dispatched.get(id);
      if (at === undefined) continue;
      dispatched.set(id, at);
      offset = Math.min(offset, now - 1000 * (at + age));
    }
    this.#dispatched = dispatched; // of those that still run
    const shifted = Math.abs(this.#offset - offset) > 250 || Number.isFinite(this.#offset) !== Number.isFinite(offset);
    this.#offset = offset;
    return shifted;
  }
}
