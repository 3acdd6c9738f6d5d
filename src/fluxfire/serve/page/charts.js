// Steps and times, drawn as SVG. Colours are classes of page.css, so that they follow light and dark.
import { h, s } from "./dom.js";

const WIDTH = 100; // of a drawing, which is stretched to its place: heights are pixels
export const STAGES = ["prepare", "denoise", "decode", "encode"]; // the queue and previews are no part of making
export const seconds = (picture) => STAGES.reduce((sum, stage) => sum + picture.timings_s[stage], 0);

/** A time as people read it. */
export const told = (value) => (value < 0.0995 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`);

/** One row of steps for each run: `{name, steps: [{hit, distance}], count, threshold}`. */
export function stepsChart(runs) {
  return h("div", {}, ...runs.map(row));
}

function row({ name, steps, count, threshold }) {
  const height = threshold ? 76 : 18;
  const cell = WIDTH / count;
  const top = 2 * (threshold || 1); // a distance this large or larger fills the height
  const y = (distance) => height - Math.max(0.06, Math.min(1, distance / top)) * height;
  const bars = [];
  for (let index = 0; index < count; index += 1) {
    const step = steps[index];
    const from = step && threshold && step.distance !== null ? y(step.distance) : 0;
    const kind = !step ? "coming" : step.hit ? "reused" : "computed";
    const bar = s("rect", {
      class: kind, x: index * cell + cell * 0.1, width: cell * 0.8, y: from, height: height - from,
    });
    if (step) bar.append(s("title", {}, caption(index, step)));
    bars.push(bar);
  }
  const line = threshold ? [s("line", { class: "threshold", x1: 0, x2: WIDTH, y1: y(threshold), y2: y(threshold) })] : [];
  const reused = steps.filter((step) => step?.hit).length;
  const label = `${name}: ${reused} of ${count} steps reused, ${steps.length - reused} computed`;
  return named(name, height, label, [...bars, ...line]);
}

function named(name, height, label, shapes) {
  const box = { viewBox: `0 0 ${WIDTH} ${height}`, height, preserveAspectRatio: "none" };
  const svg = s("svg", { ...box, role: "img", "aria-label": label }, ...shapes);
  return h("div", { class: "chart-row" }, h("span", {}, name), svg);
}

function caption(index, { hit, distance }) {
  const far = distance === null ? "" : `, distance ${distance.toFixed(3)}`;
  return `step ${index + 1}: ${hit ? "reused" : "computed"}${far}`;
}

/** A bar for each run, all on one scale: `{name, picture}`. */
export function timesChart(runs) {
  const longest = Math.max(...runs.map((run) => seconds(run.picture)), 1e-9);
  const bars = runs.map(({ name, picture }) => {
    let x = 0;
    const parts = STAGES.map((stage) => {
      const width = (picture.timings_s[stage] / longest) * WIDTH;
      const part = s("rect", { class: `stage-${stage}`, x, y: 0, width, height: 22 },
        s("title", {}, `${stage}: ${told(picture.timings_s[stage])}`));
      x += width;
      return part;
    });
    return named(name, 22, `${name}: ${told(seconds(picture))}`, parts);
  });
  return h("div", {}, ...bars);
}

/** The same figures as a table, which is the chart's legend too. */
export function timesTable(table, runs) {
  const head = h("tr", {}, h("th", { scope: "col" }, "stage"), ...runs.map(({ name }) => h("th", { scope: "col" }, name)));
  const rows = STAGES.map((stage) => h("tr", {},
    h("th", { scope: "row" }, h("span", { class: `swatch stage-${stage}` }), stage),
    ...runs.map(({ picture }) => h("td", {}, told(picture.timings_s[stage])))));
  const total = h("tr", { class: "total" }, h("th", { scope: "row" }, "made in"),
    ...runs.map(({ picture }) => h("td", {}, told(seconds(picture)))));
  const beside = h("tr", { class: "beside" }, h("th", { scope: "row" }, "queue, previews"),
    ...runs.map(({ picture: { timings_s: t } }) => h("td", {}, `+ ${told(t.queue + t.previews)}`)));
  table.replaceChildren(h("thead", {}, head), h("tbody", {}, ...rows, total, beside));
}
