// What all pages share: elements, numbers as text, and what the data says about names and units.

const SVG = "http://www.w3.org/2000/svg";

/** What the data says: the sampler's branches, the unit of each number, bounds of colour steps, attention statistics. */
export const known = { branches: [], units: {}, steps: {}, attention: [] };

/** An element. Text enters a page only here and by textContent, never as markup. */
export function make(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function shape(kind, props, ...children) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const drawing = (width, height, kind, props) =>
  shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, shape(kind, props));

export const finite = (values) => values.filter((x) => Number.isFinite(x));
// Not Math.max(...values): that overflows the stack for long lists.
export const largest = (values, least) => finite(values).reduce((a, b) => Math.max(a, b), least);
export const smallest = (values, most) => finite(values).reduce((a, b) => Math.min(a, b), most);
export const mean = (values) => { const v = finite(values); return v.length ? v.reduce((a, b) => a + b, 0) / v.length : NaN; };
export const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(3))) : "–");
export const percent = (x) => `${(100 * x).toFixed(x > 0 && x < .01 ? 1 : 0)}%`;
export const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
export const unit = (name) => known.units[name] || "";
export const spelled = (value) => (typeof value === "string" ? value : JSON.stringify(value));
export const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
export const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
/** Half a surrogate pair, which JSON can spell, becomes the replacement character. */
export const wellFormed = (_, x) => (typeof x === "string" && x.toWellFormed ? x.toWellFormed() : x);

/** Number i of a column; NaN where one is missing. JSON has no word for NaN; such numbers come as strings. */
export function numberAt(table, name, i) {
  const x = table.columns[name]?.[i];
  return x === null || x === undefined ? NaN : Number(x);
}
export const numbers = (table, name) => table.ids.map((_, i) => numberAt(table, name, i));

export function pressed(box, value) {
  for (const button of box.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.value === value));
}

/** Buttons of which one is pressed. */
export const switchOf = (names, value) =>
  make("span", { class: "switch" }, ...names.map((name) => make("button", { type: "button", value: name, "aria-pressed": String(name === value) }, name)));

/** Round places from 0 to `high`, at least `gap` pixels apart. */
export function roundTicks(high, pixels, gap) {
  const rough = high * gap / Math.max(1, pixels), power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  return Array.from({ length: Math.floor(high / stride + 1e-6) + 1 }, (_, k) => k * stride);
}
