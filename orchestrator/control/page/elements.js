// Elements made of text, and how figures are written.

export function el(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children.filter((child) => child !== ""));
  return made;
}

// Keeps the focus where it was, if what had it is there again.
export function put(parent, children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.textContent : null;
  parent.replaceChildren(...children.filter((child) => child !== ""));
  if (focused !== null) {
    const again = [...parent.querySelectorAll("button, [tabindex]")].find((one) => one.textContent === focused);
    again?.focus({ preventScroll: true });
  }
}

export function cell(text, isNumber = false, name = "") {
  const attributes = isNumber ? { class: "number" } : {};
  if (name) attributes["data-figure"] = name;
  return el("td", attributes, text);
}

export function table(caption, columns, body, numbers = [2, 3, 4, 5, 6, 7, 8, 9]) {
  const heads = columns.map((name, place) =>
    name ? el("th", numbers.includes(place) ? { scope: "col", class: "number" } : { scope: "col" }, name) : el("td", {}),
  );
  const parts = [el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...body)];
  return el("table", {}, ...(caption ? [el("caption", {}, caption)] : []), ...parts);
}

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return `${value}`;
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

export function seconds(value) {
  return value === null || value === undefined || Number.isNaN(value) ? "–" : ms(value * 1000);
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return `${value >= 100 ? value.toFixed(0) : value.toPrecision(3)} ms`;
}

export function at(moment) {
  return new Date(moment * 1000).toLocaleTimeString("en-GB");
}
