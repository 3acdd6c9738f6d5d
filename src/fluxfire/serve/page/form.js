// What is asked: the form's fields, and the reference picture by drop, paste or file.
import { $, h, show } from "./dom.js";

const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]].map(([wide, high]) => [`${wide}:${high}`, wide / high]);
const AUTO = "Like the picture";
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp"];
const LONGEST = 2048; // of a reference: a larger one is scaled down to this before it is sent

let facts = null;
let reference = null; // data URI

/** Fills the form with what this server can do. */
export function setUp(about) {
  facts = about;
  chips("styles", "style", about.styles, about.styles[0]);
  show(about.styles.length > 0, "style-field");
  shapes();
  $("examples").replaceChildren(...about.examples.map((text) => {
    const button = h("button", { type: "button" }, text);
    button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    return button;
  }));
  for (const side of ["width", "height"]) Object.assign($(side), { min: about.multiple, step: about.multiple });
  Object.assign($("steps"), { max: about.max_steps, value: about.steps });
  $("guidance").value = about.guidance;
  show(about.takes_picture, "reference-field");
  show(about.cache_threshold !== null, "threshold-field", "compare-field");
  $("threshold").required = about.cache_threshold !== null;
  $("threshold").value = about.cache_threshold ?? "";
  $("prompt").value ||= about.examples[0] ?? "";
}

/** What `/inference` is asked, without the cache's threshold; null if there is nothing to make. */
export function fields() {
  const text = prompt();
  const hint = $("prompt-hint");
  hint.hidden = Boolean(text);
  hint.textContent = "Say what to draw, or choose a style for a picture.";
  if (!text) {
    $("prompt").focus();
    return null;
  }
  const number = (id) => ($(id).value === "" ? null : $(id).valueAsNumber);
  return {
    prompt: text,
    image: reference,
    width: number("width"),
    height: number("height"),
    steps: number("steps"),
    guidance: number("guidance"),
    seed: number("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0],
  };
}

export const threshold = () => (facts.cache_threshold === null ? null : $("threshold").valueAsNumber);
export const compares = () => facts.cache_threshold !== null && $("compare").checked && threshold() > 0;

function prompt() {
  const words = $("prompt").value.trim();
  const style = document.querySelector("input[name=style]:checked")?.value;
  const said = !style ? "" : reference ? `in ${style} style` : `${style} style`;
  return [words, said].filter(Boolean).join(", ");
}

function chips(id, name, words, chosen) {
  $(id).replaceChildren(...words.map((word) => {
    const input = h("input", { type: "radio", name, value: word });
    input.checked = word === chosen;
    return h("label", { class: "chip" }, input, h("span", {}, word || "none"));
  }));
}

function shapes() {
  const names = SHAPES.map(([name]) => name);
  chips("shapes", "shape", reference ? [AUTO, ...names] : names, reference ? AUTO : "1:1");
  $("shapes").querySelectorAll("input").forEach((input) => input.addEventListener("change", () => size(input.value)));
  size(reference ? AUTO : "1:1");
}

/** Width and height of a shape with about the model's own area. */
function size(name) {
  const ratio = Object.fromEntries(SHAPES)[name];
  const side = (share) => Math.max(1, Math.round((facts.side * Math.sqrt(share)) / facts.multiple)) * facts.multiple;
  [$("width").value, $("height").value] = ratio ? [side(ratio), side(1 / ratio)] : ["", ""];
  sizeText();
}

function sizeText() {
  const [width, height] = [$("width").value, $("height").value];
  $("size-text").textContent = width && height ? `${width} × ${height}` : "";
}

/** Makes a picture the one to edit. Throws when the browser cannot read it. */
export async function setReference(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = LONGEST / Math.max(bitmap.width, bitmap.height);
  const sent = scale >= 1 && SENT_AS_IS.includes(blob.type) ? blob : await redrawn(bitmap, Math.min(1, scale));
  reference = await dataUri(sent);
  URL.revokeObjectURL($("reference").src);
  $("reference").src = URL.createObjectURL(sent);
  show(true, "reference", "remove");
  $("drop-text").textContent = "Drop, paste or choose another";
  $("prompt").placeholder = "What to change; or only choose a style";
  shapes();
}

/** From now on there is none to edit. */
export function removeReference() {
  reference = null;
  $("file").value = "";
  show(false, "reference", "remove");
  $("drop-text").replaceChildren("Drop, paste or ", h("u", {}, "choose"), " one");
  $("prompt").placeholder = "";
  shapes();
}

/** Takes pictures from the file field, from drops anywhere and from the clipboard. */
export function listen(onProblem) {
  const take = (files) => {
    const file = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) setReference(file).catch(() => onProblem("This picture cannot be read. PNG, JPEG and WebP always can."));
    else if (files?.length) onProblem("That is no picture.");
  };
  const wanted = () => facts?.takes_picture;
  const over = (on) => $("drop").classList.toggle("over", on);
  $("file").addEventListener("change", () => take($("file").files));
  $("remove").addEventListener("click", () => { removeReference(); $("file").focus(); });
  $("width").addEventListener("input", sizeText);
  $("height").addEventListener("input", sizeText);
  addEventListener("paste", (event) => {
    if (wanted() && event.clipboardData.files.length) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
  addEventListener("dragover", (event) => { event.preventDefault(); over(wanted()); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  addEventListener("drop", (event) => {
    event.preventDefault(); // a file dropped beside the field must not replace the page
    over(false);
    if (wanted()) take(event.dataTransfer.files);
  });
}

async function redrawn(bitmap, scale) {
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/webp", quality: 0.95 });
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
