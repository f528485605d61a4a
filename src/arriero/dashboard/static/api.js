// The admin API, with the key that the server may want.

const KEY = "arriero-api-key";
const TIMEOUT_MS = 5_000;

export class KeyNeeded extends Error {
  constructor() {
    super("the server wants its API key");
  }
}

/** No answer came. */
export class Away extends Error {
  constructor(cause) {
    super("the server does not answer", { cause });
  }
}

/** The server answered, and the answer is no. */
export class Refused extends Error {
  constructor(status, body) {
    super(reasonIn(body) ?? `the server answers with status ${status}`);
    this.status = status;
    this.body = body;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export const instances = () => call("instances");
export const requests = () => call("requests");
export const events = (after) => call(`events?after=${after}&limit=1000`);

/** Resolves when the move has ended. Rejects with Refused if it did not happen. */
export function migrate(requestId, to, mode) {
  return call(`requests/${encodeURIComponent(requestId)}/migrate`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ to, mode }),
    signal: null, // it takes as long as it takes
  });
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const response = await fetch(path, { cache: "no-store", signal, ...options, headers }).catch((error) => {
    throw new Away(error);
  });
  if (response.status === 401) throw new KeyNeeded();
  if (response.ok) return response.json();
  throw new Refused(response.status, await response.json().catch(() => null));
}

/** The reason in an answer, in whichever of the shapes: a migration's, OpenAI's, FastAPI's. */
function reasonIn(body) {
  if (Array.isArray(body?.migrations)) return body.migrations.filter((m) => !m.ok).map((m) => m.reason).join("; ");
  if (body?.error?.message) return body.error.message;
  if (Array.isArray(body?.detail)) return body.detail.map((d) => d.msg).join("; ");
  return body?.detail ?? null;
}
