// Elements without markup in strings: text is only ever text.

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/** An HTML element with attributes and children; strings become text. */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element, likewise. */
export const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Shows these elements or hides them, all by their ids. */
export const show = (shown, ...ids) => ids.forEach((id) => { $(id).hidden = !shown; });

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
