// One press of the button: a picture, then its baseline with the same seed, each tried again while the server is full.
import { generate, ServerError } from "./server.js";

const PREVIEWS = 4;

/**
 * Makes the pictures.
 *
 * fields: of `/inference`; `threshold`: the cache's, null if the server has none; `compare`: whether to make a baseline.
 * told: what the page shows meanwhile, `begins(name)`, `waiting(seconds, reason)` and the events of `/inference`.
 * Resolves with the runs, `{name, steps, count, threshold, order, picture}`; `signal` ends it.
 */
export async function make(fields, threshold, compare, signal, told) {
  const runs = [];
  const kinds = [["fluxfire", threshold], ...(compare ? [["baseline", 0]] : [])];
  for (const [name, value] of kinds) {
    const run = { name, threshold: value, steps: [], count: fields.steps, order: null, picture: null };
    runs.push(run);
    told.begins(run, runs);
    const asked = { ...fields, previews: PREVIEWS, ...(value !== null && { cache_threshold: value }) };
    run.picture = await patiently(signal, told, () => generate(asked, signal, {
      order: (order) => { run.order = order; run.steps = []; told.ordered(run); },
      waiting: ({ ahead }) => told.queued(ahead),
      begun: () => told.begun(run),
      step: (step) => { run.steps[step.step] = step; told.stepped(run, runs); },
      preview: ({ base64 }) => told.preview(run, base64),
    }));
    told.made(run, runs);
  }
  return runs;
}

/** Comes back as often as the server says when. */
async function patiently(signal, told, ask) {
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ServerError) || !error.retryAfter) throw error;
      for (let left = error.retryAfter; left > 0; left -= 1) {
        told.waits(left, error);
        await second(signal);
      }
    }
  }
}

function second(signal) {
  return new Promise((resolve, reject) => {
    const stop = () => { clearTimeout(timer); reject(signal.reason); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", stop); resolve(); }, 1000);
    signal.addEventListener("abort", stop, { once: true });
  });
}
