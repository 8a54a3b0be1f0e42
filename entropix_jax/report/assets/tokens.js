// Tokens as text: colours, the tables of samples, the text itself, the legend and what is told of one token.

import { drawing, known, make, numberAt, percent, short, spelled, unit, visible } from "./dom.js";

const SHAPES = [ // on a square from -1 to 1, so that a branch is known by more than its colour
  [[-.9, -.35], [-.35, -.9], [.35, -.9], [.9, -.35], [.9, .35], [.35, .9], [-.35, .9], [-.9, .35]],
  [[0, -1], [1, .8], [-1, .8]],
  [[-.8, -.8], [.8, -.8], [.8, .8], [-.8, .8]],
  [[0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]],
  [[0, 1], [1, -.8], [-1, -.8]],
  [[-.4, -1], [.4, -1], [.4, -.4], [1, -.4], [1, .4], [.4, .4], [.4, 1], [-.4, 1], [-.4, .4], [-1, .4], [-1, -.4], [-.4, -.4]],
  [[-1, -.5], [1, -.5], [1, .5], [-1, .5]],
  [[-.5, -1], [.5, -1], [.5, 1], [-.5, 1]],
  [[-1, 0], [.8, -1], [.8, 1]],
  [[1, 0], [-.8, -1], [-.8, 1]],
  [[-.9, -.9], [.9, -.9], [-.9, .9], [.9, .9]],
  [[0, -1], [1, -.2], [.6, .9], [-.6, .9], [-1, -.2]],
];
export const branchIndex = (name) => Math.max(0, known.branches.indexOf(name)) % SHAPES.length;
export const branchClass = (name) => `b${branchIndex(name)}`;
export const shapeOf = (name) => SHAPES[branchIndex(name)];
const points = (outline, x, y, r) => outline.map(([a, b]) => `${(x + a * r).toFixed(2)},${(y + b * r).toFixed(2)}`).join(" ");
export const dot = (name) => make("span", { class: `dot ${branchClass(name)}` }, drawing(12, 12, "polygon", { points: points(shapeOf(name), 6, 6, 5.2) }));

// What colours the text besides the branch. The first two have their bounds from the data; a falling one is calm when large.
const MEASURES = {
  entropy: { letter: "e", of: (table, i) => table.columns.entropy?.[i] },
  varentropy: { letter: "v", of: (table, i) => table.columns.varentropy?.[i] },
  surprise: { letter: "s", unit: "−logprob, nats", bounds: [.1, .5, 1, 2, 4], of: (table, i) => -numberAt(table, "logprob", i) },
  probability: { letter: "p", unit: "of the token", falling: true, bounds: [.95, .8, .5, .2, .05], of: (table, i) => Math.exp(numberAt(table, "logprob", i)) },
};
export const COLOURINGS = [...Object.keys(MEASURES), "branch"];

function step(name, x) {
  const { falling, bounds = known.steps[name] } = MEASURES[name];
  const found = bounds.findIndex((bound) => (falling ? x >= bound : x <= bound));
  return found < 0 ? bounds.length : found;
}

/** The classes that colour token i; a number that was not measured gives none. */
export function classesOf(table, i) {
  const classes = [];
  for (const name in MEASURES) {
    const { letter, of, bounds } = MEASURES[name], x = of(table, i);
    if (x !== null && x !== undefined && !(bounds && Number.isNaN(x))) classes.push(`${letter}${step(name, Number(x))}`);
  }
  classes.splice(2, 0, branchClass(table.branches[i]));
  return classes.join(" ");
}

/** The chips that explain a colouring; `branches` are those that occur. */
export function legendOf(colour, branches) {
  if (colour === "branch") return branches.map((name) => make("i", { class: `branch ${branchClass(name)}` }, name));
  const { falling, bounds = known.steps[colour], unit: of = unit(colour) } = MEASURES[colour];
  const [within, beyond] = falling ? ["≥", "<"] : ["≤", ">"];
  const chips = [...bounds, null].map((bound, s) => {
    const chip = make("i", {}, bound === null ? `${beyond} ${bounds[s - 1]}` : `${within} ${bound}`);
    Object.assign(chip.style, { background: `var(--tint${s})`, borderBottom: `3px solid var(--step${s})` });
    return chip;
  });
  return [make("span", {}, of), ...chips];
}

// -- samples: {parent, at, ids, texts, branches, tops, columns, ...}, each with the tokens that it emitted itself --------

/** [sample, how many of the tokens it emitted] along the text of sample s, eldest first. */
export function lineage(samples, s) {
  const parts = [[s, samples[s].ids.length]];
  for (let up = samples[s].parent; up !== null; s = up, up = samples[s].parent) parts.unshift([up, samples[s].at - samples[up].at]);
  return parts;
}

/** Sample s with the table of its whole text: its ancestors' tokens up to the forks, then its own. */
export function whole(samples, s) {
  const parts = lineage(samples, s).map(([i, n]) => [samples[i], n]);
  const along = (get) => parts.flatMap(([sample, n]) => get(sample, n).slice(0, n));
  const names = new Set(parts.flatMap(([sample]) => Object.keys(sample.columns)));
  const lists = Object.fromEntries(["ids", "texts", "branches", "tops"].map((name) => [name, along((sample) => sample[name])]));
  const columns = Object.fromEntries([...names].map((name) => [name, along((sample, n) => sample.columns[name] || Array(n).fill(null))]));
  return { ...samples[s], ...lists, columns };
}

/** Which sample emitted token i of the text of sample s. */
export function emitter(samples, s, i) {
  while (samples[s].parent !== null && i < samples[s].at) s = samples[s].parent;
  return s;
}

/** The first token in which two lists of ids differ; -1: none. */
export function firstDifference(a, b) {
  const n = Math.max(a.length, b.length);
  for (let i = 0; i < n; i++) if (a[i] !== b[i]) return i;
  return -1;
}

/** A sample without tokens. */
export const emptySample = (facts) =>
  ({ parent: null, at: 0, finish: null, score: null, answer: null, ...facts, ids: [], texts: [], branches: [], tops: [], columns: {} });

/** Add the token of a line of a trace to a sample or a table. */
export function push(table, line) {
  const { id, text, branch, top = null, prompt: _p, position: _i, sample: _s, finish, ...rest } = line;
  const n = table.ids.length;
  table.ids.push(id);
  table.texts.push(text);
  table.branches.push(branch);
  table.tops.push(top);
  for (const name in rest) table.columns[name] ??= Array(n).fill(null);
  for (const name in table.columns) table.columns[name].push(rest[name] ?? null);
  if (finish) table.finish = finish;
}

// -- the text -----------------------------------------------------------------------------------------------------------

function spanOf(table, i) {
  const span = document.createElement("span"), text = table.texts[i];
  span.className = `tok ${classesOf(table, i)}`;
  span.dataset.i = i;
  span.textContent = text;
  if (!text || (!text.trim() && text.includes("\n"))) {
    span.classList.add("parts");
    span.dataset.mark = text ? "↵" : i === table.ids.length - 1 && table.finish ? table.finish : "…";
  }
  if (table.columns.accepted?.[i]) span.classList.add("accepted");
  if (table.columns.forced?.[i]) span.classList.add("forced");
  const drafted = table.columns.drafted?.[i];
  if (drafted) { // the accepted guesses of a pass are its first tokens; what was refused has no text
    let kept = 0;
    while (table.columns.accepted?.[i + kept]) kept++;
    if (drafted > kept) span.dataset.refused = drafted - kept;
  }
  return span;
}

/** A text, token by token. One token takes part in the tab order; the arrow keys move along. */
export class TextView {
  constructor(label) {
    this.spans = [];
    this.at = 0;
    this.box = make("div", { class: "text", role: "group", "aria-label": label });
    this.part = null;
  }

  /** Append tokens [spans there, to) of a table. Paragraphs are blocks, so that the browser can skip those out of sight. */
  add(table, to = table.ids.length) {
    const from = this.spans.length;
    let batch = document.createDocumentFragment();
    const close = () => { this.part.append(batch); batch = document.createDocumentFragment(); };
    for (let i = from; i < to; i++) {
      if (!this.part) this.box.append(this.part = make("div", { class: "part" }));
      const span = spanOf(table, i);
      this.spans.push(span);
      batch.append(span);
      if (table.texts[i].endsWith("\n")) { close(); this.part = null; }
    }
    if (this.part) close();
    if (!from && this.spans.length) this.rove(0);
  }

  /** Colour and mark token i anew. */
  renew(table, i) {
    const span = spanOf(table, i);
    if (i === this.at) span.tabIndex = 0;
    this.spans[i].replaceWith(span);
    this.spans[i] = span;
  }

  rove(i) {
    this.spans[this.at]?.removeAttribute("tabindex");
    this.at = i;
    this.spans[i].tabIndex = 0;
  }

  /** Where a key leads from the token at hand; -1: nowhere. */
  next(key) {
    const n = this.spans.length, { at } = this;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: n - 1 }[key];
    return to === undefined || !n ? -1 : Math.max(0, Math.min(n - 1, to));
  }

  focus(i) {
    this.rove(i);
    this.spans[i].focus({ preventScroll: true });
    this.spans[i].scrollIntoView({ block: "nearest" });
  }
}

/** The line of a broken token that is nearest to the pointer, or its first. */
export function boxOf(span, y) {
  const boxes = [...span.getClientRects()];
  return boxes.find((box) => y >= box.top && y <= box.bottom) || boxes[0] || span.getBoundingClientRect();
}

export const besidePointer = ({ clientX: x, clientY: y }) => ({ left: x + 14, right: x + 14, top: y - 14, bottom: y + 14 });

// -- what is told of one token ------------------------------------------------------------------------------------------

/** The alternatives of token i as [id, text, logprob], the likeliest first, and the token itself among them. */
export function alternatives(table, i, most = 10) {
  const rows = (Array.isArray(table.tops[i]) ? table.tops[i] : []).slice(0, most).map(([id, text, logprob]) => [id, text, Number(logprob)]);
  const mine = numberAt(table, "logprob", i);
  if (rows.length && !rows.some(([id]) => id === table.ids[i]) && Number.isFinite(mine)) rows.push([table.ids[i], table.texts[i], mine]);
  return rows;
}

export function meterOf(logprob) {
  const meter = make("div", { class: "meter" });
  meter.style.width = `${100 * Math.exp(logprob)}%`;
  return meter;
}

/**
 * What is told of token i: {thresholds: axis -> knob -> value, name: of the sample, also: more elements}. With `around`, the words
 * around it and few numbers.
 */
export function tipOf(table, i, { thresholds, name, around, also = [] }) {
  const tip = [], own = table.texts[i] ? visible(table.texts[i]) : "(no text of its own)";
  const nearby = (from, to) => make("span", { class: "soft" }, table.texts.slice(Math.max(0, from), to).join(""));
  tip.push(make("div", { class: "said" }, ...(around ? [nearby(i - 8, i), make("mark", {}, own), nearby(i + 1, i + 7)] : [own])));
  tip.push(make("div", { class: "soft" }, dot(table.branches[i]), make("b", {}, table.branches[i]), `${name} · token ${i} · id ${spelled(table.ids[i])}`,
    i === table.ids.length - 1 && table.finish ? ` · the last (${table.finish})` : ""), ...also);
  if (around) {
    tip.push(make("div", { class: "facts" }, ...Object.keys(known.steps).filter((name) => table.columns[name]).map((name) =>
      make("span", {}, `${name} `, make("b", {}, spelled(table.columns[name][i])), ` ${unit(name)}`))));
    return tip;
  }
  const rows = alternatives(table, i);
  if (rows.length) {
    tip.push(make("table", {}, make("tbody", {}, ...rows.map(([id, text, logprob]) =>
      make("tr", { class: id === table.ids[i] ? "drawn" : "" }, make("td", {}, text ? visible(text) : `id ${id}`), make("td", {}, meterOf(logprob)),
        make("td", {}, percent(Math.exp(logprob))), make("td", {}, short(logprob)))))));
  }
  const ladders = Object.entries(thresholds).filter(([, steps]) => Object.keys(steps).length);
  if (ladders.length) {
    tip.push(make("div", { class: "ladder" }, ...ladders.map(([axis, steps]) => {
      const x = numberAt(table, axis, i), said = spelled(table.columns[axis]?.[i] ?? "–");
      const parts = [...Object.entries(steps).map(([name, v]) => [`${name} ${spelled(v)}`, Number(v)]), [null, x]].sort((a, b) => a[1] - b[1]);
      return make("div", {}, make("span", { class: "soft" }, `${axis}: `),
        ...parts.flatMap(([text], j) => [j ? " < " : "", text === null ? make("b", {}, said) : make("span", { class: "soft" }, text)]));
    })));
  }
  const list = make("dl");
  for (const [name, column] of Object.entries(table.columns)) {
    if (column[i] === null) continue;
    list.append(make("dt", {}, name), make("dd", {}, spelled(column[i]), unit(name).startsWith("nats") ? make("small", {}, ` ${unit(name)}`) : ""));
  }
  tip.push(list);
  return tip;
}

/** Place what is told so that it does not cover `near`, a rectangle in the window. */
export function placeTip(tip, near) {
  const width = tip.offsetWidth, height = tip.offsetHeight, margin = 8;
  tip.classList.toggle("up", near.bottom > window.innerHeight - height - margin); // for narrow screens
  let left = Math.min(near.left, window.innerWidth - width - margin);
  let top = near.bottom + 10;
  if (top + height > window.innerHeight - margin) top = near.top - height - 10;
  if (top < margin) { // neither below nor above: beside
    top = Math.max(margin, Math.min(near.top - height / 2, window.innerHeight - height - margin));
    left = near.right + 14 + width < window.innerWidth ? near.right + 14 : near.left - width - 14;
  }
  Object.assign(tip.style, { left: `${Math.max(margin, left)}px`, top: `${top}px` });
}
