// Two pictures over each other, the left one as wide as the slider says; and how much they differ.
import { $, show } from "./dom.js";

let links = [];

/** An address for a picture of the server; `clear` gives it back. */
export function link(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const blob = new Blob([bytes], { type: `image/${format}` });
  const url = URL.createObjectURL(blob);
  links.push(url);
  return { blob, url };
}

/** Takes all pictures off the page. */
export function clear() {
  for (const id of ["before", "after"]) $(id).removeAttribute("src");
  links.forEach((url) => URL.revokeObjectURL(url));
  links = [];
  show(false, "before", "before-tag", "after-tag", "handle", "slider");
  $("slider").value = 50;
  slide();
}

/** Shows one picture, `which` of "before" and "after". */
export function place(which, url, alt) {
  $(which).src = url;
  $(which).alt = alt;
  $(which).hidden = false;
}

/** Shows both pictures, half and half, under their names. */
export function split(before, after) {
  $("before-tag").textContent = before;
  $("after-tag").textContent = after;
  show(true, "before-tag", "after-tag", "handle", "slider");
}

/** Shows the baseline left of the slider's place. */
export function slide() {
  $("pair").style.setProperty("--at", `${$("slider").value}%`);
}

/** Peak signal-to-noise ratio of two pictures in dB; Infinity when they are equal. */
export async function psnr(one, other) {
  const [a, b] = await Promise.all([one, other].map(pixels));
  let squares = 0;
  for (let index = 0; index < a.length; index += 1) squares += (a[index] - b[index]) ** 2; // alpha is equal
  return 10 * Math.log10(255 ** 2 / (squares / (a.length * 0.75)));
}

async function pixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}
