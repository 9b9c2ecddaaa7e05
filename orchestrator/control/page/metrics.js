// Prometheus' text format, as far as our own /metrics uses it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

// Returns the series by name, each as a list of [labels, value].
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels, value] = LINE.exec(line) ?? [];
    if (name === undefined) continue;
    const made = {};
    for (const [, label, content] of (labels ?? "").matchAll(LABEL)) {
      made[label] = content.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    (found.get(name) ?? found.set(name, []).get(name)).push([made, Number(value.replace("Inf", "Infinity"))]);
  }
  return found;
}

export const series = (found, name) => found.get(name) ?? [];
export const sum = (found, name) => series(found, name).reduce((all, [, value]) => all + value, 0);
export const count = sum;

// Returns the cumulative counts of a histogram over all its series, by upper bound.
export function histogram(found, name) {
  const bounds = new Map();
  for (const [labels, value] of series(found, `${name}_bucket`)) {
    const bound = Number(labels.le.replace("Inf", "Infinity"));
    bounds.set(bound, (bounds.get(bound) ?? 0) + value);
  }
  return [...bounds].sort(([a], [b]) => a - b);
}

// Returns the quantile of what was counted since `before`, as Prometheus' histogram_quantile has it; null for nothing.
export function quantile(now, before, share) {
  const earlier = new Map(before ?? []);
  const counts = now.map(([bound, value]) => [bound, value - (earlier.get(bound) ?? 0)]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  const rank = share * all;
  const place = counts.findIndex(([, value]) => value >= rank);
  const [bound, value] = counts[place];
  const [lower, below] = place > 0 ? counts[place - 1] : [0, 0];
  if (bound === Infinity) return lower;
  return lower + ((bound - lower) * (rank - below)) / (value - below || 1);
}
