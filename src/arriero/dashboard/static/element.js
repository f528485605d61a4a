// Elements by hand: data becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Write only what changed: an untouched node keeps its selection, and costs no layout. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** An instance's number in its colour, the same wherever the instance is named. */
export function badge(instance) {
  return element("span", { class: `badge ${series(instance)}` }, String(instance));
}

export function series(instance) {
  return `series-${instance % 8}`;
}
