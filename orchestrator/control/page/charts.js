// Curves of the last minutes, drawn as SVG.

import { el, number, put, seconds } from "/page/elements.js";

const KEPT = 300; // points: ten minutes
const [WIDTH, HEIGHT] = [300, 84];
const SPEC = [
  ["rate", "Requests per second", ["per second"], number],
  ["ttft", "Time to first token", ["p50", "p99"], seconds],
  ["itl", "Time between tokens", ["p50", "p99"], seconds],
  ["open", "Requests", ["in flight", "waiting"], number],
];

export class Charts {
  constructor(parent) {
    this.points = [];
    this.figures = new Map(SPEC.map(([name]) => [name, el("figure", { id: `chart-${name}` })]));
    parent.replaceChildren(...this.figures.values());
  }

  add(time, values) {
    this.points.push([time, values]);
    if (this.points.length > KEPT) this.points.shift();
    for (const [name, title, curves, text] of SPEC) put(this.figures.get(name), this.drawn(name, title, curves, text));
  }

  drawn(name, title, curves, text) {
    const values = this.points.map(([time, all]) => [time, all[name]]);
    const most = Math.max(...values.flatMap(([, all]) => all).filter((value) => value !== null), 0) || 1;
    const latest = values.at(-1)[1];
    const words = curves.map((curve, place) => `${curve} ${text(latest[place])}`).join(", ");
    const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}, the last minutes: now ${words}, at most ${text(most)}` });
    svg.append(node("path", { class: "grid", d: `M0 ${HEIGHT - 1}H${WIDTH}M0 12H${WIDTH}` }));
    curves.forEach((_, place) => svg.append(node("path", { class: place ? "curve second" : "curve", d: path(values, place, most) })));
    return [el("figcaption", {}, el("span", {}, title), el("span", {}, `${words}; top ${text(most)}`)), svg];
  }
}

function node(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function path(values, place, most) {
  const [first, last] = [values[0][0], values.at(-1)[0]];
  const span = Math.max(last - first, 60000);
  let drawn = "";
  let pen = "M";
  for (const [time, all] of values) {
    const value = all[place];
    if (value === null || value === undefined) {
      pen = "M"; // nothing was seen: a gap
      continue;
    }
    const x = WIDTH - ((last - time) / span) * WIDTH;
    const y = HEIGHT - 1 - (value / most) * (HEIGHT - 13);
    drawn += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  }
  return drawn;
}
