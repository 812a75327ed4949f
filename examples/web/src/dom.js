// The few things every part of the page does with elements.

export const $ = (id) => document.getElementById(id);

/** Show `text` in the element, or hide it for an empty text. */
export function say(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

export function show(id, shown) {
  $(id).hidden = !shown;
}

/** value in 0..1, or null while nobody knows how long it takes. */
export function setBar(id, value) {
  if (value === null) $(id).removeAttribute("value");
  else $(id).value = value;
}
