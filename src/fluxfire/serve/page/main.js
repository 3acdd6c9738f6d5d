// The page: the form on one side, the picture on the other, and what the server says in between.
import * as charts from "./charts.js";
import * as compare from "./compare.js";
import { $, h, show } from "./dom.js";
import * as form from "./form.js";
import { make } from "./run.js";
import * as server from "./server.js";

const STATES = { ready: "ready", loading: "warming up", gone: "not answering" };
const STEADY_MS = 15_000;
const ANXIOUS_MS = 1_500;

let about = null;
let under = null; // AbortController of what is under way
let last = null; // the runs that are shown
let next = null; // timer of the next look at the server

// The server's state, looked at again and again; often while it is not ready.

async function watch() {
  const state = await server.state();
  if (state === "ready" && !about) await meet();
  if (state !== "gone") hideProblem("gone");
  else if ($("server").dataset.state === "ready" && !under) problem(new server.ServerError(0, server.GONE));
  tell(state);
}

/** Writes the state down, and looks again: soon if something is amiss. */
function tell(state) {
  $("server").dataset.state = state;
  $("server").textContent = state === "ready" && about ? about.model : STATES[state];
  ready();
  clearTimeout(next);
  next = setTimeout(watch, state === "ready" && about ? STEADY_MS : ANXIOUS_MS);
}

async function meet() {
  try {
    about = await server.about();
  } catch (error) {
    if (error.status === 401) askForKey();
    return;
  }
  show(false, "key-form");
  form.setUp(about);
  $("about").textContent = `fluxfire ${about.version} · ${about.model} on ${about.device}`;
}

function ready() {
  $("make").disabled = !about || Boolean(under);
}

// API keys.

let keyTried = false;

function askForKey() {
  if ($("key-form").hidden) {
    show(true, "key-form");
    $("key").focus();
  }
  $("key-wrong").hidden = !keyTried;
  keyTried = false;
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.useKey($("key").value.trim());
  keyTried = true;
  about = null;
  await meet();
  tell("ready");
  if (about) {
    hideProblem();
    $("prompt").focus();
  }
});

// Problems.

function problem(error, again = null) {
  if (error.status === 401) askForKey();
  if (error.status === 0) tell("gone");
  $("problem").dataset.kind = error.status === 0 ? "gone" : "other";
  $("problem-text").textContent = error.message;
  show(true, "problem");
  $("again").hidden = !again;
  $("again").onclick = again;
  for (const id of ["prompt", "width", "height", "steps", "guidance", "seed", "threshold"]) {
    $(id).toggleAttribute("aria-invalid", error.param === id || (id === "threshold" && error.param === "cache_threshold"));
  }
}

function hideProblem(kind = null) {
  if (!kind || $("problem").dataset.kind === kind) show(false, "problem");
}

// Making pictures.

async function start(changed = {}) {
  if (under || !about || !$("form").reportValidity()) return;
  const fields = form.fields();
  if (!fields) return;
  const asked = { ...fields, ...changed };
  under = new AbortController();
  ready();
  hideProblem();
  show(true, "cancel", "progress", "frame");
  show(false, "empty", "actions", "figures");
  $("cancel").focus({ preventScroll: true });
  compare.clear();
  $("frame").style.setProperty("--ratio", asked.width ? asked.width / asked.height : 1);
  if (matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ block: "start" });
  try {
    last = await make(asked, form.threshold(), form.compares(), under.signal, told);
    finished(asked);
  } catch (error) {
    const cancelled = under.signal.aborted;
    if (!cancelled && !(error instanceof server.ServerError)) throw error;
    show(true, "empty");
    show(false, "frame", "figures");
    if (!cancelled) problem(error, () => start());
    say(cancelled ? "Cancelled." : "");
  } finally {
    const focused = document.activeElement === $("cancel");
    under = null;
    ready();
    show(false, "cancel", "bar");
    if (focused) $("make").focus({ preventScroll: true });
  }
}

const told = {
  begins(run, runs) {
    show(true, "bar");
    $("bar").removeAttribute("value");
    say(run.name === "baseline" ? "The baseline." : "Sent.");
    if (run.name === "baseline") compare.split("baseline", `fluxfire ${charts.told(charts.seconds(runs[0].picture))}`);
    draw(runs);
  },
  ordered({ order }) {
    $("frame").style.setProperty("--ratio", order.width / order.height);
  },
  begun(run) {
    $("told").textContent = `${titled(run)}: begun.`;
  },
  queued(ahead) {
    if (ahead) say(`In the queue: ${ahead} ${ahead === 1 ? "picture" : "pictures"} ahead.`);
  },
  waits(left, error) {
    $("bar").removeAttribute("value");
    $("told").textContent = `${sentence(error.message)} Trying again in ${left} s.`;
  },
  stepped(run, runs) {
    $("bar").value = run.steps.length / run.count;
    const reused = run.steps.filter((step) => step?.hit).length;
    const counted = run.threshold ? `, ${reused} reused` : "";
    $("told").textContent = `${titled(run)}: step ${run.steps.length} of ${run.count}${counted}.`;
    draw(runs);
  },
  preview(run, base64) {
    compare.place(side(run), compare.link(base64, "png").url, "On the way");
    $("pair").classList.add("on-the-way");
  },
  made(run, runs) {
    $("pair").classList.remove("on-the-way");
    Object.assign(run, compare.link(run.picture.base64, "png"));
    compare.place(side(run), run.url, `${$("prompt").value || "The picture"}, ${run.name}`);
    draw(runs);
  },
};

/** What is shown and also spoken; each step is only shown. */
function say(text) {
  $("told").textContent = $("spoken").textContent = text;
}

const side = (run) => (run.name === "baseline" ? "before" : "after");
const titled = (run) => (run.name === "baseline" ? "Baseline" : "Picture");
const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

/** What is known of the steps so far; the baseline first, as on the slider. */
function draw(runs) {
  if (runs[0].threshold === null) return;
  show(true, "figures");
  $("threshold-key").textContent = `threshold ${runs[0].threshold}`;
  $("steps-chart").replaceChildren(charts.stepsChart([...runs].reverse()));
  const whole = runs.filter((run) => run.picture).reverse();
  $("figures").classList.toggle("unfinished", !whole.length);
  if (whole.length) {
    $("times-chart").replaceChildren(charts.timesChart(whole));
    charts.timesTable($("times"), whole);
  }
  numbers(whole);
}

async function numbers(runs, difference = null) {
  const [fast, base] = [...runs].reverse();
  if (!fast) return $("numbers").replaceChildren();
  const { cached_steps: cached, computed_steps: computed } = fast.picture;
  const pairs = [[charts.told(charts.seconds(fast.picture)), base ? `instead of ${charts.told(charts.seconds(base.picture))}` : "to make it"]];
  if (base) pairs.unshift([`${(charts.seconds(base.picture) / charts.seconds(fast.picture)).toFixed(1)} ×`, "the baseline's speed, this time"]);
  pairs.push([`${cached} of ${cached + computed}`, "steps reused"]);
  if (difference !== null) pairs.push([Number.isFinite(difference) ? `${difference.toFixed(0)} dB` : "none", Number.isFinite(difference) ? "PSNR to the baseline" : "difference to the baseline"]);
  $("numbers").replaceChildren(...pairs.map(([value, what]) => h("div", {}, h("dd", {}, value), h("dt", {}, what))));
}

async function finished(asked) {
  const [fast, base] = last;
  say(`Done. Seed ${fast.picture.seed}.`);
  for (const [id, run] of [["download", fast], ["download-before", base]]) {
    $(id).hidden = !run;
    if (run) Object.assign($(id), { href: run.url, download: `fluxfire-${asked.seed}-${run.name}.png` });
  }
  $("edit").hidden = !about.takes_picture;
  show(true, "actions");
  if (base) {
    compare.split(`baseline ${charts.told(charts.seconds(base.picture))}`, `fluxfire ${charts.told(charts.seconds(fast.picture))}`);
    numbers([base, fast], await compare.psnr(base.blob, fast.blob));
  }
}

// What the buttons and keys do.

$("form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
$("cancel").addEventListener("click", () => under?.abort());
$("another").addEventListener("click", () => { $("seed").value = ""; start(); });
$("edit").addEventListener("click", async () => {
  await form.setReference(last[0].blob);
  $("prompt").value = "";
  $("prompt").focus();
});
$("slider").addEventListener("input", compare.slide);
$("make-key").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
$("form").addEventListener("invalid", () => { $("more").open = true; }, true); // a field that is hidden cannot be mended
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  if (event.key === "Escape") under?.abort();
});
form.listen((message) => problem({ status: 1, message }));
watch();
