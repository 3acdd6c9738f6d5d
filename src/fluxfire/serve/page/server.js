// The server as this page sees it. Paths are relative: the page works below a prefix too.

/** What the server refused or failed at, or that it is not there (status 0). */
export class ServerError extends Error {
  constructor(status, { message, code, param } = {}, retryAfter = null) {
    super(message ?? `the server answered ${status}`);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

export const GONE = { message: "The server does not answer.", code: "gone" };
const KEY = "fluxfire-key";

export const useKey = (key) => sessionStorage.setItem(KEY, key); // for this tab, until it is closed

/** The model and its limits. */
export async function about() {
  return (await ask("about")).json();
}

/** "ready", "loading" or "gone". */
export async function state() {
  try {
    return (await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(10_000) })).ok ? "ready" : "loading";
  } catch {
    return "gone";
  }
}

/** Makes a picture; `on[name](values)` for every event. Resolves with the finished picture. */
export async function generate(fields, signal, on) {
  const body = JSON.stringify({ ...fields, stream: true });
  const answer = await ask("inference", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  let made = null;
  for await (const [name, values] of events(answer.body, signal)) {
    if (name === "error") throw new ServerError(500, values.error);
    if (name === "picture") made = values;
    on[name]?.(values);
  }
  if (!made) throw new ServerError(0, GONE);
  return made;
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await unlessAborted(options.signal, () => fetch(path, { ...options, headers, cache: "no-store" }));
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const wait = Number(answer.headers.get("Retry-After"));
  throw new ServerError(answer.status, body.error, wait > 0 ? wait : null);
}

async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await unlessAborted(signal, () => reader.read());
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts.filter((part) => !part.startsWith(":"))) {  // a comment, so that nobody closes the stream
      const [event, data] = part.split("\n");
      yield [event.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

/** A connection that fails is a server that is gone, unless we have cut it. */
async function unlessAborted(signal, act) {
  try {
    return await act();
  } catch (error) {
    throw signal?.aborted ? error : new ServerError(0, GONE);
  }
}
