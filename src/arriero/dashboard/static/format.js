// How values read. A number and its unit stay on one line.

const NBSP = "\u00a0";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => (value == null ? "–" : whole.format(value));

export const percent = (share) => {
  if (share == null) return "–";
  return share > 0 && share < 0.0995 ? `${(100 * share).toFixed(1)}${NBSP}%` : `${Math.round(100 * share)}${NBSP}%`;
};

export const decimal = (value) => (value == null ? "–" : value.toFixed(Math.abs(value) < 100 ? 1 : 0));

export function milliseconds(ms) {
  if (ms == null) return "–";
  if (ms >= 10_000) return `${(ms / 1000).toFixed(0)}${NBSP}s`;
  if (ms >= 1_000) return `${(ms / 1000).toFixed(1)}${NBSP}s`;
  return `${ms.toFixed(ms < 9.95 ? 1 : 0)}${NBSP}ms`;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)}${NBSP}${units[unit]}`;
}

export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

/** What a person needs of a request's id: without vLLM's prefix and random suffix, the middle cut out. */
export function requestName(id) {
  const name = id.replace(/-[0-9a-f]{8}$/, "").replace(/^(\d+_)?(?:chat)?cmpl-/, "$1");
  return name.length <= 15 ? name : `${name.slice(0, 7)}…${name.slice(-7)}`;
}
