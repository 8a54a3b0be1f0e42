"use strict";
// Everything shown comes from the element #data, and enters the page as text, never as markup.
// Half a surrogate pair, which JSON can spell, becomes the replacement character.
const DATA = JSON.parse(document.getElementById("data").textContent, (_, x) => (typeof x === "string" && x.toWellFormed ? x.toWellFormed() : x));
const SVG = "http://www.w3.org/2000/svg";
const BRANCHES = [...new Set(DATA.runs.flatMap((run) => run.header.branches))];
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
const ENDS = { // how a sample's line ends: an outline on a square from -1 to 1, and whether it is filled
  stop: ["M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", true],
  length: ["M-.8-1L1 0L-.8 1z", true],
  uncertain: ["M0-1.15L1.15 0L0 1.15L-1.15 0z", true],
  cancelled: ["M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", false],
  pruned: ["M-.9-.9L.9 .9M-.9 .9L.9-.9", false],
  budget: ["M-.85-.85H.85V.85H-.85z", false],
};
const OTHER_END = ["M0-1L1 .8L-1 .8z", false];
const view = { group: DATA.first, colour: "entropy", root: true, other: null, samples: new Map() };
let panes = [];
let current = null; // { pane, s, i, own, around }: whose numbers are shown, token i of sample s; own: i if it is of the pane's text, else -1

// -- small tools ------------------------------------------------------------------------------

function make(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(kind, props, ...children) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const drawing = (width, height, kind, props) =>
  shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, shape(kind, props));

const branchIndex = (name) => BRANCHES.indexOf(name);
const branchClass = (name) => `b${branchIndex(name) % SHAPES.length}`;
const shapeOf = (name) => SHAPES[branchIndex(name) % SHAPES.length];
const points = (shape, x, y, r) => shape.map(([a, b]) => `${(x + a * r).toFixed(2)},${(y + b * r).toFixed(2)}`).join(" ");
const dot = (name) => make("span", { class: `dot ${branchClass(name)}` }, drawing(12, 12, "polygon", { points: points(shapeOf(name), 6, 6, 5.2) }));
const finite = (values) => values.filter((x) => Number.isFinite(x));
// Not Math.max(...values): that overflows the stack for long lists.
const largest = (values, least) => finite(values).reduce((a, b) => Math.max(a, b), least);
const smallest = (values, most) => finite(values).reduce((a, b) => Math.min(a, b), most);
const mean = (values) => { const v = finite(values); return v.length ? v.reduce((a, b) => a + b, 0) / v.length : NaN; };
const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(3))) : "–");
const percent = (x) => `${(100 * x).toFixed(x > 0 && x < .01 ? 1 : 0)}%`;
const unit = (name) => DATA.units[name] || "";
const spelled = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
function step(axis, x) {
  const bounds = DATA.steps[axis];
  const found = bounds.findIndex((bound) => x <= bound);
  return found < 0 ? bounds.length : found;
}
// JSON has no word for NaN; the page gets such numbers as strings, and a gap where one is missing.
const numbers = (answer, name) => answer.ids.map((_, i) => { const x = (answer.columns[name] || [])[i]; return x === null || x === undefined ? NaN : Number(x); });

// -- samples ----------------------------------------------------------------------------------

/** [sample, how many of the tokens it emitted] along the text of sample s, eldest first. */
function lineage(samples, s) {
  const parts = [[s, samples[s].ids.length]];
  for (let up = samples[s].parent; up !== null; s = up, up = samples[s].parent) parts.unshift([up, samples[s].at - samples[up].at]);
  return parts;
}

/** Sample s with the table of its whole text: its ancestors' tokens up to the forks, then its own. */
function whole(samples, s) {
  const parts = lineage(samples, s).map(([i, n]) => [samples[i], n]);
  const along = (get) => parts.flatMap(([sample, n]) => get(sample, n).slice(0, n));
  const names = new Set(parts.flatMap(([sample]) => Object.keys(sample.columns)));
  const lists = Object.fromEntries(["ids", "texts", "branches", "tops"].map((name) => [name, along((sample) => sample[name])]));
  const columns = Object.fromEntries([...names].map((name) => [name, along((sample, n) => sample.columns[name] || Array(n).fill(null))]));
  return { ...samples[s], ...lists, columns };
}

/** Which sample emitted token i of the text of sample s. */
function emitter(samples, s, i) {
  while (samples[s].parent !== null && i < samples[s].at) s = samples[s].parent;
  return s;
}

/** The samples from top to bottom: below its parent whoever forked last, so that no lines cross. */
function ranked(samples) {
  const below = (parent) => samples.flatMap((sample, s) => (sample.parent === parent ? [s] : []))
    .sort((a, b) => samples[b].at - samples[a].at || a - b).flatMap((s) => [s, ...below(s)]);
  return below(null);
}

function endMark(finish, x, y, r) {
  const [d, full] = Object.hasOwn(ENDS, finish) ? ENDS[finish] : OTHER_END;
  return shape("path", { d, class: full ? "end full" : "end", transform: `translate(${x} ${y}) scale(${r})` });
}

function endIcon(finish) {
  const svg = drawing(12, 12, "g", {});
  svg.append(endMark(finish, 6, 6, 4));
  return make("span", { class: "dot" }, svg);
}

// -- scales and axes --------------------------------------------------------------------------

function ticksOf(low, high, pixels, root, gap) {
  const ticks = [];
  if (root) {
    const all = [0];
    for (let k = -2; k < 7; k++) for (const m of [1, 2, 5]) all.push(m * 10 ** k);
    let last = -Infinity;
    for (const t of all) {
      const at = Math.sqrt(t / high) * pixels;
      if (t <= high && at - last >= gap) { ticks.push(t); last = at; }
    }
    return ticks;
  }
  const rough = (high - low) / Math.max(1, pixels / gap);
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  for (let t = Math.ceil(low / stride) * stride; t <= high + stride * 1e-6; t += stride) ticks.push(t);
  return ticks;
}

function scale(low, high, from, to, root) {
  if (!(high > low)) high = low + 1;
  const place = root ? (x) => Math.sqrt(Math.max(0, x) / high) : (x) => (x - low) / (high - low);
  return { low, high, root, at: (x) => from + (to - from) * place(x) };
}

/** A cleared canvas with grid and labels; returns what is needed to draw on it. */
function axes(canvas, x, y, pad) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "11.5px system-ui, 'DejaVu Sans', sans-serif";
  const box = { left: pad.left, right: width - 12, top: pad.top, bottom: height - pad.bottom };
  const sx = scale(x.low, x.high, box.left, box.right, x.root), sy = scale(y.low, y.high, box.bottom, box.top, y.root);
  g.lineWidth = 1;
  g.fillStyle = css("--soft");
  const rule = (x0, y0, x1, y1) => { g.beginPath(); g.moveTo(x0, y0); g.lineTo(x1, y1); g.stroke(); };
  g.textAlign = "right"; g.textBaseline = "middle"; g.strokeStyle = css("--grid");
  for (const t of ticksOf(sy.low, sy.high, box.bottom - box.top, y.root, 24)) {
    const at = Math.round(sy.at(t)) + .5;
    rule(box.left, at, box.right, at);
    g.fillText(short(t), box.left - 6, at);
  }
  g.textAlign = "center"; g.textBaseline = "top";
  for (const t of x.hidden ? [] : ticksOf(sx.low, sx.high, box.right - box.left, x.root, 52)) {
    if (x.whole && t % 1) continue;
    const at = Math.round(sx.at(t)) + .5;
    if (x.rules) rule(at, box.top, at, box.bottom);
    g.fillText(short(t), at, box.bottom + 5);
  }
  g.strokeStyle = css("--soft");
  rule(box.left, box.bottom + .5, box.right, box.bottom + .5);
  if (x.label) { g.textAlign = "right"; g.textBaseline = "bottom"; g.fillText(x.label, box.right, height - 1); }
  return { g, sx, sy, box, rule };
}

/** Dashed lines at the sampler's thresholds. Labels that would touch climb; a line reaches its label. */
function drawThresholds({ g, sx, sy, box, rule }, thresholds, upright) {
  g.strokeStyle = css("--soft"); g.fillStyle = css("--soft");
  g.setLineDash([5, 4]);
  const taken = []; // for each level the right end of what is written there
  let lower = { at: Infinity, right: box.right - 2 }; // the label below, for thresholds that lie close
  const labels = []; // written last, over a halo, so that no line crosses them
  for (const [name, raw] of Object.entries(thresholds).sort((a, b) => a[1] - b[1])) {
    const value = Number(raw), on = upright ? sx : sy;
    if (!(value >= on.low && value <= on.high)) continue;
    const at = Math.round(on.at(value)) + .5;
    if (upright) {
      const wide = g.measureText(name).width, left = Math.min(at + 4, box.right - wide);
      let level = 0;
      while (taken[level] > left - 8) level++;
      taken[level] = left + wide;
      rule(at, box.top - 1 - 13 * level, at, box.bottom);
      labels.push([name, left, box.top - 2 - 13 * level, "left", "bottom"]);
    } else {
      rule(box.left, at, box.right, at);
      const below = at - 14 < box.top;
      const right = lower.at - at < 13 ? lower.right - lower.wide - 10 : box.right - 2;
      lower = { at, right, wide: g.measureText(name).width };
      labels.push([name, right, below ? at + 3 : at - 1, "right", below ? "top" : "bottom"]);
    }
  }
  g.setLineDash([]);
  g.strokeStyle = css("--card"); g.lineWidth = 3; g.lineJoin = "round";
  for (const [name, x, y, align, baseline] of labels) {
    g.textAlign = align; g.textBaseline = baseline;
    g.strokeText(name, x, y);
    g.fillText(name, x, y);
  }
  g.lineWidth = 1;
}

// -- plots ------------------------------------------------------------------------------------

/** Lines along the text. A plot has draw(), index(x, y) -> token or -1, and mark(i). */
function linePlot(pane, series, options) {
  const frame = make("div", { class: "frame" });
  frame.style.height = `${options.height}px`;
  const label = `${series.map((s) => s.name).join(", ")} (${options.unit || "no unit"}) along the text`;
  const canvas = make("canvas", { role: "img", "aria-label": label });
  const cursor = make("div", { class: "cursor bar" });
  frame.append(canvas, cursor);
  let last = null;
  const plot = { canvas, node: frame };
  plot.draw = () => {
    const high = options.high(), n = pane.answer.ids.length, low = Math.min(0, smallest(series.flatMap((s) => s.values), 0));
    last = axes(canvas, { low: 0, high: Math.max(1, options.length() - 1), whole: true, label: options.axis ? "generated token" : "" },
      { low, high: high > low ? high : low + 1 }, { left: 46, top: 8, bottom: options.axis ? 36 : 20 });
    const { g, sx, sy } = last;
    for (const s of series) {
      g.strokeStyle = css(`--c${s.colour}`); g.lineWidth = n > 1500 ? 1 : 1.6; g.lineJoin = "round";
      g.setLineDash(s.dash || []);
      g.beginPath();
      let pen = false;
      s.values.forEach((v, i) => {
        if (!Number.isFinite(v)) { pen = false; return; }
        const x = sx.at(i), y = sy.at(v);
        if (pen) g.lineTo(x, y); else g.moveTo(x, y);
        if (!pen && !Number.isFinite(s.values[i + 1])) g.arc(x, y, 1.5, 0, 7);
        pen = true;
      });
      g.stroke();
      g.setLineDash([]);
      if (series.length === 1 && s.values.every(Number.isFinite) && n > 1) {
        g.lineTo(sx.at(n - 1), sy.at(0)); g.lineTo(sx.at(0), sy.at(0));
        g.globalAlpha = .14; g.fillStyle = g.strokeStyle; g.fill(); g.globalAlpha = 1;
      }
    }
    if (options.thresholds) drawThresholds(last, options.thresholds, false);
  };
  plot.index = (x) => {
    if (!last || !pane.answer.ids.length) return -1;
    const part = (x - last.box.left) / (last.box.right - last.box.left);
    return Math.max(0, Math.min(pane.answer.ids.length - 1, Math.round(part * last.sx.high)));
  };
  plot.mark = (i) => {
    cursor.style.display = i < 0 || !last ? "none" : "block";
    if (i < 0 || !last) return;
    Object.assign(cursor.style, { left: `${last.sx.at(i) - .75}px`, top: `${last.box.top}px`, height: `${last.box.bottom - last.box.top}px` });
  };
  return plot;
}

function scatterPlot(pane, limits) {
  const frame = make("div", { class: "frame" });
  const canvas = make("canvas", { role: "img", "aria-label": "every token by entropy in nats (across) and varentropy in nats squared (up)" });
  const cursor = make("div", { class: "cursor ring" });
  frame.append(canvas, cursor);
  const { xs, ys, answer } = pane;
  let last = null;
  const plot = { canvas, node: frame };
  plot.draw = () => {
    last = axes(canvas, { low: 0, high: limits.x(), root: view.root, rules: true, label: "entropy (nats)" },
      { low: 0, high: limits.y(), root: view.root }, { left: 46, top: 44, bottom: 38 });
    const { g, sx, sy } = last;
    drawThresholds(last, pane.run.thresholds.entropy, true);
    drawThresholds(last, pane.run.thresholds.varentropy, false);
    const r = xs.length > 1500 ? 2.6 : 3.6;
    g.globalAlpha = xs.length > 1500 ? .5 : .72;
    for (const name of pane.run.header.branches) {
      const shape = shapeOf(name);
      g.fillStyle = css(`--c${branchIndex(name) % SHAPES.length}`);
      g.beginPath();
      for (let i = 0; i < xs.length; i++) {
        if (answer.branches[i] !== name || !Number.isFinite(xs[i]) || !Number.isFinite(ys[i])) continue;
        const x = sx.at(xs[i]), y = sy.at(ys[i]);
        shape.forEach(([a, b], j) => (j ? g.lineTo(x + a * r, y + b * r) : g.moveTo(x + a * r, y + b * r)));
        g.closePath();
      }
      g.fill();
    }
    g.globalAlpha = 1;
  };
  plot.index = (x, y) => {
    if (!last) return -1;
    let best = -1, least = 26 ** 2;
    for (let i = 0; i < xs.length; i++) {
      const d = (last.sx.at(xs[i]) - x) ** 2 + (last.sy.at(ys[i]) - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  };
  plot.mark = (i) => {
    const shown = i >= 0 && last && Number.isFinite(xs[i]) && Number.isFinite(ys[i]);
    cursor.style.display = shown ? "block" : "none";
    if (shown) Object.assign(cursor.style, { left: `${last.sx.at(xs[i])}px`, top: `${last.sy.at(ys[i])}px` });
  };
  return plot;
}

/** The samples along the text, each from where it forked. find(x, y) -> { s, i } or null; show(s, i) rings a token. */
function treePlot(pane) {
  const { samples, chosen } = pane.choice;
  const order = ranked(samples), row = [];
  order.forEach((s, i) => { row[s] = i; });
  const pitch = Math.max(14, Math.min(28, 420 / samples.length)), [thin, thick] = pitch < 18 ? [4, 8] : [6, 12];
  const longest = samples.reduce((n, sample) => Math.max(n, sample.at + sample.ids.length), 1);
  const text = "The tree of samples; left and right move along a text, up and down to another sample, Enter shows it";
  const node = make("div", { class: "tree", role: "group", tabindex: "0", "aria-label": text });
  node.style.height = `${pitch * samples.length + 46}px`;
  const svg = shape("svg", { width: "100%", height: "100%", "aria-hidden": "true" });
  const cursor = make("div", { class: "cursor ring" });
  node.append(svg, cursor);
  const kept = new Map(lineage(samples, chosen)), shown = new Map(lineage(samples, pane.sample));
  const classes = samples.map((sample) => {
    const xs = numbers(sample, "entropy"), ys = numbers(sample, "varentropy");
    return sample.branches.map((name, i) => `e${step("entropy", xs[i])} v${step("varentropy", ys[i])} ${branchClass(name)}`);
  });
  const y = (s) => 8 + pitch * (row[s] + .5);
  let x = null;

  function line(s) { // cut where the chosen text and the one that is shown leave it
    const { at, ids } = samples[s], n = ids.length, a = kept.get(s) ?? 0, b = shown.get(s) ?? 0;
    const cuts = [...new Set([0, a, b, n])].sort((p, q) => p - q), group = shape("g", { "data-sample": s });
    const runs = new Map();
    for (let k = 1; k < cuts.length; k++) {
      const [from, to] = [cuts[k - 1], cuts[k]], wide = from < a ? thick : thin;
      group.append(shape("path", { class: from < b ? "rim on" : "rim", "stroke-width": wide + 3, d: `M${x(at + from) - (from ? 0 : 1.5)} ${y(s)}H${x(at + to) + (to < n ? 0 : 1.5)}` }));
      for (let i = from; i < to;) {
        let j = i + 1;
        while (j < to && classes[s][j] === classes[s][i]) j++;
        const key = `${wide} ${classes[s][i]}`;
        runs.set(key, `${runs.get(key) ?? ""}M${x(at + i).toFixed(2)} ${y(s)}H${x(at + j).toFixed(2)}`);
        i = j;
      }
    }
    for (const [key, d] of runs) group.append(shape("path", { class: `seg ${key.slice(key.indexOf(" ") + 1)}`, "stroke-width": parseInt(key, 10), d }));
    const end = x(at + n) + (n ? 8 : 0);
    group.append(endMark(samples[s].finish, end, y(s), 4));
    group.append(shape("text", { x: end + 9, y: y(s), class: s === pane.sample ? "on" : "" }, `${s + 1}${s === chosen ? " ✓" : ""}`));
    return group;
  }

  const plot = { node };
  plot.draw = () => {
    const width = node.clientWidth, bottom = 8 + pitch * samples.length;
    x = scale(0, longest, 8, width - 50).at;
    const rules = ticksOf(0, longest, width - 58, false, 52).filter((t) => t % 1 === 0).flatMap((t) => [
      shape("path", { class: "rule", d: `M${Math.round(x(t)) + .5} 0V${bottom}` }), shape("text", { x: x(t), y: bottom + 11, class: "tick" }, short(t))]);
    const roots = order.filter((s) => samples[s].parent === null);
    const joints = order.filter((s) => samples[s].parent !== null).map((s) =>
      shape("path", { class: shown.has(s) ? "joint on" : "joint", "stroke-width": kept.has(s) ? 4 : 1.5, d: `M${x(samples[s].at)} ${y(samples[s].parent)}V${y(s)}` }));
    if (roots.length > 1) joints.unshift(shape("path", { class: "joint", "stroke-width": 1.5, "stroke-dasharray": "2 3", d: `M${x(0)} ${y(roots[0])}V${y(roots[roots.length - 1])}` }));
    joints.sort((a, b) => a.classList.contains("on") - b.classList.contains("on"));
    svg.replaceChildren(shape("rect", { class: "band", x: 0, y: y(pane.sample) - pitch / 2, width, height: pitch, rx: 4 }), ...rules, ...joints, ...order.map(line),
      shape("text", { x: width - 4, y: bottom + 29, class: "tick last" }, "generated token"));
  };
  plot.find = (px, py) => {
    let best = null, least = 30 ** 2;
    for (const [s, { at, ids }] of samples.entries()) {
      const d = Math.max(0, x(at) - px, px - x(at + ids.length) - 40) ** 2 + (y(s) - py) ** 2;
      if (d < least) { least = d; best = s; }
    }
    if (best === null) return null;
    const { at, ids } = samples[best], i = Math.floor((px - x(0)) / (x(1) - x(0)));
    return { s: best, i: Math.max(at, Math.min(at + ids.length - 1, i)) };
  };
  plot.show = (s, i) => {
    const on = i >= 0 && x;
    cursor.style.display = on ? "block" : "none";
    if (on) Object.assign(cursor.style, { left: `${x(i + .5)}px`, top: `${y(emitter(samples, s, i))}px` });
  };
  plot.mark = (i) => plot.show(pane.sample, i);
  plot.beside = (s, by) => order[Math.max(0, Math.min(order.length - 1, row[s] + by))];
  plot.boxOf = (s, i) => {
    const { left, top } = node.getBoundingClientRect(), at = left + x(i + .5), down = top + y(emitter(samples, s, i));
    return { left: at + 14, right: at + 14, top: down - 14, bottom: down + 14 };
  };
  return plot;
}

// -- one answer -------------------------------------------------------------------------------

function textOf(pane) {
  const { answer } = pane;
  const box = make("div", { class: "text", role: "group", tabindex: "0", "aria-label": "The answer, token by token; the arrow keys move along it" });
  pane.spans = answer.ids.map((_, i) => {
    const span = make("span", { class: `tok e${step("entropy", pane.xs[i])} v${step("varentropy", pane.ys[i])} ${branchClass(answer.branches[i])}` });
    span.dataset.i = i;
    span.textContent = answer.texts[i];
    if (i === pane.split) span.classList.add("split");
    if (!answer.texts[i]) {
      span.classList.add("parts");
      span.dataset.mark = i === answer.ids.length - 1 && answer.finish ? answer.finish : "…";
    } else if (!answer.texts[i].trim() && answer.texts[i].includes("\n")) {
      span.classList.add("parts");
      span.dataset.mark = "↵";
    }
    return span;
  });
  box.append(...pane.spans);
  pane.box = box;
  return box;
}

/** What can be picked: the samples in a table, and as a tree where one forked from another. */
function samplesOf(pane, index) {
  const { samples, chosen, method, rule } = pane.choice;
  const name = panes.length > 1 ? make("h2", {}, pane.run.name) : null;
  const forked = samples.some((sample) => sample.parent !== null);
  const number = (x) => (x === null ? "–" : short(Number(x)));
  const columns = [ // name, of numbers, cell
    ["score", true, ({ score }) => number(score), samples.some(({ score }) => score !== null)],
    ["answer", false, ({ answer }) => make("span", { class: "said", title: answer ?? "" }, answer ?? "–"), samples.some(({ answer }) => answer !== null)],
    ["tokens", true, ({ ids }) => String(ids.length), true],
    ["ended by", false, ({ finish }) => [endIcon(finish), finish ?? "–"], true],
    ["from", false, ({ parent, at }) => (parent === null ? "the prompt" : `${parent + 1} at ${at}`), forked],
  ].filter(([, , , there]) => there);
  const side = (isNumber) => (isNumber ? "num right" : "");
  const rows = samples.map((sample, s) => {
    const pick = make("input", { type: "radio", name: `sample-${index}`, value: String(s), checked: s === pane.sample, "aria-label": `sample ${s + 1}${s === chosen ? ", chosen" : ""}` });
    pick.dataset.does = "sample";
    const row = make("tr", { class: s === pane.sample ? "on" : "" }, make("td", {}, make("label", {}, pick, String(s + 1), s === chosen ? make("b", { title: "chosen" }, " ✓") : null)),
      ...columns.map(([, isNumber, cell]) => make("td", { class: side(isNumber) }, cell(sample))));
    row.dataset.sample = s;
    return row;
  });
  const head = make("tr", {}, make("th", {}, "sample"), ...columns.map(([name, isNumber]) => make("th", { class: side(isNumber) }, name)));
  const parts = [make("div", { class: "picks" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)))];
  if (forked) {
    pane.tree = treePlot(pane);
    const ends = [...new Set(samples.map((sample) => sample.finish))];
    parts.unshift(figure(pane, pane.tree, "where samples forked", ...ends.map((finish) => make("span", { class: "line" }, endIcon(finish), finish ?? "not ended"))));
  }
  return make("div", { class: name ? "pane samples" : "samples", "data-pane": String(index) }, name, make("p", { class: "facts" }, make("span", {}, make("b", {}, String(samples.length)), ` samples by ${method}`),
    make("span", {}, "chosen by ", make("b", {}, rule), ": sample ", make("b", {}, String(chosen + 1)), " ✓")), make("div", { class: "pickers" }, ...parts));
}

function sharesOf(pane) {
  const { answer, run } = pane;
  const n = answer.ids.length, several = run.answers.length > 1 || pane.choice.samples.length > 1;
  const counts = run.header.branches.map((name) => answer.branches.filter((b) => b === name).length);
  const bar = make("div", { class: "share", "aria-hidden": "true" });
  run.header.branches.forEach((name, i) => {
    if (!counts[i]) return;
    const part = make("span", { class: branchClass(name) });
    part.style.flex = `${counts[i]} 0 0`;
    bar.append(part);
  });
  const overall = run.summary.branches || {};
  const head = make("tr", {}, ...["branch", "tokens", "share", ...(several ? ["whole run"] : [])].map((t) => make("th", {}, t)));
  const rows = run.header.branches.map((name, i) => {
    const row = make("tr", { class: "branch-row" }, make("td", {}, dot(name), name), make("td", {}, String(counts[i])),
      make("td", {}, percent(n ? counts[i] / n : 0)), several ? make("td", {}, percent(overall[name] || 0)) : null);
    row.dataset.branch = name;
    row.dataset.count = counts[i];
    return row;
  });
  return [bar, make("table", { class: "shares" }, head, ...rows)];
}

function lineKey(series) {
  return series.map((s) => make("span", { class: `line b${s.colour}` },
    drawing(22, 8, "line", { x1: 0, y1: 4, x2: 22, y2: 4, "stroke-dasharray": (s.dash || []).join(" ") }), s.name));
}

function figure(pane, plot, title, ...extra) {
  pane.plots.push(plot);
  return make("figure", {}, make("figcaption", {}, make("h3", {}, title), ...extra), plot.node);
}

function alongText(pane, names, colours, title, options) {
  const series = names.map((name, i) => ({ name, values: numbers(pane.answer, name), colour: colours[i], dash: [[], [7, 3], [2, 3]][i] }));
  const inAll = () => panes.flatMap((p) => names.flatMap((name) => numbers(p.answer, name)));
  let high = null;
  const plot = linePlot(pane, series, {
    height: 128, ...options,
    length: () => panes.reduce((n, p) => Math.max(n, p.answer.ids.length), 0),
    // The same axis in every pane, so that answers compare by eye.
    high: () => (high ??= options.unit === "0 to 1" ? 1 : 1.06 * largest(inAll(), 0)),
  });
  return figure(pane, plot, title, ...(names.length > 1 ? lineKey(series) : []));
}

function attentionOf(pane) {
  const measured = DATA.attention.filter((name) => name in pane.answer.columns);
  const units = [...new Set(measured.map(unit))];
  return units.map((u) => {
    const names = measured.filter((name) => unit(name) === u);
    return alongText(pane, names, [2, 4, 1], `attention (${u})`, { unit: u });
  });
}

/** Any other number of the trace, chosen from a list. */
function otherOf(pane) {
  const names = Object.keys(pane.answer.columns).filter((name) =>
    !(name in DATA.steps) && !DATA.attention.includes(name) && finite(numbers(pane.answer, name)).length);
  if (!names.length) return null;
  const chosen = names.includes(view.other) ? view.other : names.find((name) => /temp/.test(name)) || names[names.length - 1];
  const select = make("select", { "aria-label": "which of the other numbers to draw" },
    ...names.map((name) => make("option", { value: name, selected: name === chosen }, unit(name) ? `${name} (${unit(name)})` : name)));
  select.dataset.does = "other";
  return alongText(pane, [chosen], [5], select, { unit: unit(chosen), axis: false });
}

const sampleName = ({ choice }, s) => (choice.samples.length < 2 ? "" : ` · sample ${s + 1}${s === choice.chosen ? " (chosen)" : ""}`);

function factsOf(pane) {
  const { answer, run } = pane;
  const fact = (name, value, u) => make("span", {}, `${name} `, make("b", {}, value), u ? ` ${u}` : "");
  const facts = [fact("tokens", String(answer.ids.length)), ...(answer.parent === null ? [] : [fact("its own", String(answer.ids.length - answer.at))]), fact("mean entropy", short(mean(pane.xs)), "nats"), fact("mean varentropy", short(mean(pane.ys)), "nats²")];
  if ("logprob" in answer.columns) facts.push(fact("mean logprob", short(mean(numbers(answer, "logprob"))), "nats"));
  if (answer.finish) facts.push(fact("ended by", answer.finish));
  if ("seed" in run.header) facts.push(fact("seed", spelled(run.header.seed)));
  return make("p", { class: "facts" }, ...facts);
}

function noteOf(pane, first) {
  if (pane === first) return null;
  const ids = (p) => p.run.header.prompts[p.p].ids || [];
  const notes = [];
  if (spelled(ids(pane)) !== spelled(ids(first))) notes.push(`The prompt's ids are not those of ${first.run.name}.`);
  if (pane.split === 0) notes.push(`Parts from ${first.run.name} at the first token.`);
  else if (pane.split > 0) notes.push(`Parts from ${first.run.name} at token ${pane.split}.`);
  else notes.push(`The same tokens as ${first.run.name}.`);
  return make("p", { class: "soft small", style: "margin: 4px 0 0" }, notes.join(" "));
}

function buildPane(pane, index, first) {
  const { run } = pane;
  pane.plots = [];
  const limits = {
    x: () => 1.06 * largest(panes.flatMap((p) => [...p.xs, ...Object.values(p.run.thresholds.entropy).map(Number)]), 1),
    y: () => 1.1 * largest(panes.flatMap((p) => [...p.ys, ...Object.values(p.run.thresholds.varentropy).map(Number)]), 1),
  };
  pane.samples = pane.choice.samples.length > 1 ? samplesOf(pane, index) : null;
  const box = make("input", { type: "checkbox", checked: view.root });
  box.dataset.does = "root";
  pane.node = make("section", { class: "pane", "aria-label": run.name },
    make("div", { class: "name" },
      make("div", { class: "top" }, make("h2", {}, run.name), make("span", { class: "soft" }, `sampler ${run.header.sampler.name}`, sampleName(pane, pane.sample))), factsOf(pane), noteOf(pane, first)),
    make("div", { class: "words" }, make("p", { class: "asked" }, run.header.prompts[pane.p].text), textOf(pane)),
    pane.samples && panes.length === 1 ? pane.samples : null,
    make("div", { class: "branches" }, ...sharesOf(pane)),
    make("div", { class: "cloud" }, figure(pane, scatterPlot(pane, limits), "varentropy (nats²) over entropy (nats)", make("label", { class: "check" }, box, "square-root axes"))),
    make("div", { class: "plots" },
      alongText(pane, ["entropy"], [0], "entropy (nats)", { unit: "nats", thresholds: run.thresholds.entropy }),
      alongText(pane, ["varentropy"], [3], "varentropy (nats²)", { unit: "nats²", thresholds: run.thresholds.varentropy, axis: true, height: 144 })),
    make("div", { class: "plots pair" }, ...attentionOf(pane), otherOf(pane)));
  pane.node.dataset.pane = index;
  return pane.node;
}

// -- the page ---------------------------------------------------------------------------------

const resized = new ResizeObserver((entries) => {
  const seen = new Set(entries.map((entry) => entry.target));
  for (const pane of panes) for (const plot of pane.plots) if (seen.has(plot.node)) plot.draw();
  if (current) mark();
});

function redraw() {
  for (const pane of panes) for (const plot of pane.plots) plot.draw();
  if (current) mark();
}

function show() {
  hide();
  resized.disconnect();
  const group = DATA.groups[view.group];
  panes = (group ? group.members : []).map(([r, p]) => {
    const run = DATA.runs[r], choice = run.answers[p], key = `${r} ${p}`, sample = view.samples.get(key) ?? choice.chosen;
    const answer = whole(choice.samples, sample);
    return { run, p, key, choice, sample, answer, xs: numbers(answer, "entropy"), ys: numbers(answer, "varentropy"), split: -1 };
  });
  for (const pane of panes.slice(1)) {
    const a = panes[0].answer.ids, b = pane.answer.ids;
    const n = Math.max(a.length, b.length);
    for (let i = 0; i < n; i++) if (a[i] !== b[i]) { pane.split = i; break; }
  }
  document.getElementById("panes").className = `${panes.length === 1 ? "one" : "many"}${panes.some((pane) => pane.choice.samples.length > 1) ? " sampled" : ""}`;
  const built = panes.map((pane, i) => buildPane(pane, i, panes[0]));
  document.getElementById("cards").replaceChildren(...(panes.length > 1 ? panes.flatMap((pane) => pane.samples ?? []) : []));
  document.getElementById("panes").replaceChildren(...built);
  for (const pane of panes) for (const plot of pane.plots) { plot.draw(); resized.observe(plot.node); }
  for (const list of document.querySelectorAll(".picks")) list.scrollTop = list.querySelector(".on").offsetTop - list.clientHeight / 2;
  legend();
  document.body.dataset.tokens = panes.reduce((n, pane) => n + pane.spans.length, 0);
}

function legend() {
  const key = document.getElementById("key");
  key.replaceChildren();
  if (view.colour === "branch") {
    const here = new Set(panes.flatMap((pane) => pane.run.header.branches));
    key.append(...BRANCHES.filter((name) => here.has(name)).map((name) => make("i", { class: `branch ${branchClass(name)}` }, name)));
    return;
  }
  const bounds = DATA.steps[view.colour];
  key.append(make("span", {}, unit(view.colour)));
  for (let s = 0; s <= bounds.length; s++) {
    const chip = make("i", {}, s < bounds.length ? `≤ ${bounds[s]}` : `> ${bounds[s - 1]}`);
    Object.assign(chip.style, { background: `var(--tint${s})`, borderBottom: `3px solid var(--step${s})` });
    key.append(chip);
  }
}

function tipFor(pane, s, i, answer, around) {
  const { run } = pane;
  const tip = [], own = answer.texts[i] ? visible(answer.texts[i]) : "(no text of its own)";
  const nearby = (from, to) => make("span", { class: "soft" }, answer.texts.slice(Math.max(0, from), to).join(""));
  tip.push(make("div", { class: "said" }, ...(around ? [nearby(i - 8, i), make("mark", {}, own), nearby(i + 1, i + 7)] : [own])));
  tip.push(make("div", { class: "soft" }, dot(answer.branches[i]), make("b", {}, answer.branches[i]), `${sampleName(pane, s)} · token ${i} · id ${spelled(answer.ids[i])}`,
    i === answer.ids.length - 1 && answer.finish ? ` · the last (${answer.finish})` : ""));
  if (around) {
    tip.push(make("div", { class: "facts" }, ...Object.keys(DATA.steps).map((name) => make("span", {}, `${name} `, make("b", {}, spelled(answer.columns[name][i])), ` ${unit(name)}`))));
    return tip;
  }
  const top = answer.tops[i];
  if (Array.isArray(top) && top.length) {
    const rows = top.slice(0, 10).map(([id, text, logprob]) => [id, text, Number(logprob)]);
    const mine = Number((answer.columns.logprob || [])[i]);
    if (!rows.some(([id]) => id === answer.ids[i]) && Number.isFinite(mine)) rows.push([answer.ids[i], answer.texts[i], mine]);
    tip.push(make("table", {}, make("tbody", {}, ...rows.map(([id, text, logprob]) => {
      const meter = make("div", { class: "meter" });
      meter.style.width = `${100 * Math.exp(logprob)}%`;
      return make("tr", { class: id === answer.ids[i] ? "drawn" : "" }, make("td", {}, text ? visible(text) : `id ${id}`), make("td", {}, meter), make("td", {}, percent(Math.exp(logprob))), make("td", {}, short(logprob)));
    }))));
  }
  const ladders = Object.entries(run.thresholds).filter(([, steps]) => Object.keys(steps).length);
  if (ladders.length) {
    tip.push(make("div", { class: "ladder" }, ...ladders.map(([axis, steps]) => {
      const x = Number(answer.columns[axis][i]);
      const parts = [...Object.entries(steps).map(([name, v]) => [`${name} ${spelled(v)}`, Number(v)]), [null, x]].sort((a, b) => a[1] - b[1]);
      return make("div", {}, make("span", { class: "soft" }, `${axis}: `),
        ...parts.flatMap(([text], j) => [j ? " < " : "", text === null ? make("b", {}, spelled(answer.columns[axis][i])) : make("span", { class: "soft" }, text)]));
    })));
  }
  const list = make("dl");
  for (const [name, column] of Object.entries(answer.columns)) {
    if (column[i] === null) continue;
    list.append(make("dt", {}, name), make("dd", {}, spelled(column[i]), unit(name).startsWith("nats") ? make("small", {}, ` ${unit(name)}`) : ""));
  }
  tip.push(list);
  return tip;
}

/** Mark the current token wherever it is drawn. */
function mark() {
  const { pane, s, i, own } = current;
  pane.spans[own]?.classList.add("on");
  for (const plot of pane.plots) plot.mark(own);
  pane.tree?.show(s, i);
}

function unmark() {
  if (!current) return;
  current.pane.spans[current.own]?.classList.remove("on");
  for (const plot of current.pane.plots) plot.mark(-1);
}

/** Show token i of a pane's text everywhere; `near` is what the numbers must not cover. */
function pick(pane, i, near, inText) {
  if (i < 0) return hide();
  tell(pane, pane.sample, i, near, false);
  if (!inText) reveal();
}

/** Show token i of any sample where the tree has it, with the words around it. */
function peek(pane, { s, i }, near) {
  if (i < 0) return hide();
  tell(pane, s, i, near, true);
  reveal();
}

/** Bring the current token into sight within its own box only: the page under the pointer must stay where it is. */
function reveal() {
  const { box, spans } = current.pane, span = spans[current.own];
  if (!span) return;
  const top = span.offsetTop;
  if (top < box.scrollTop || top + span.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
}

function tell(pane, s, i, near, around) {
  const { samples } = pane.choice;
  const own = i < pane.spans.length && emitter(samples, s, i) === emitter(samples, pane.sample, i) ? i : -1;
  const fresh = !current || current.pane !== pane || current.s !== s || current.i !== i || current.around !== around;
  unmark();
  current = { pane, s, i, own, around };
  mark();
  const tip = document.getElementById("tip");
  if (fresh) tip.replaceChildren(...tipFor(pane, s, i, s === pane.sample ? pane.answer : whole(pane.choice.samples, s), around));
  tip.hidden = false;
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

function hide() {
  unmark();
  current = null;
  document.getElementById("tip").hidden = true;
}

/** The line of a broken token that is nearest to the pointer, or its first. */
function boxOf(span, y) {
  const boxes = [...span.getClientRects()];
  return boxes.find((box) => y >= box.top && y <= box.bottom) || boxes[0] || span.getBoundingClientRect();
}

/** Whether somebody walks along a text with the keyboard, whom the pointer must not disturb. */
const byKeys = () => Boolean(document.activeElement?.matches(":is(.text, .tree):focus-visible"));

function point(event) {
  const section = event.target.closest?.(".pane");
  const pane = section && panes[Number(section.dataset.pane)];
  const span = event.target.closest?.(".tok");
  if (pane && span) return pick(pane, Number(span.dataset.i), boxOf(span, event.clientY), true);
  if (pane && event.target.tagName === "CANVAS") {
    const plot = pane.plots.find((p) => p.canvas === event.target);
    const { clientX: x, clientY: y } = event;
    return pick(pane, plot.index(event.offsetX, event.offsetY), { left: x + 14, right: x + 14, top: y - 14, bottom: y + 14 }, false);
  }
  if (pane && event.target.closest(".tree")) {
    const { left, top } = pane.tree.node.getBoundingClientRect(), { clientX: x, clientY: y } = event;
    const found = pane.tree.find(x - left, y - top);
    if (found) return peek(pane, found, { left: x + 14, right: x + 14, top: y - 14, bottom: y + 14 });
  }
  if (event.type === "pointerdown" || (event.pointerType !== "touch" && !byKeys())) hide();
}

/** Show another sample of a pane; what had the focus keeps it. */
function choose(pane, s) {
  if (s === pane.sample) return;
  const index = panes.indexOf(pane), find = ({ samples, node }, selector) => samples.querySelector(selector) ?? node.querySelector(selector);
  const list = find(pane, ".picks").scrollTop;
  const held = [".tree", ".picks input:checked", ".text"].find((selector) => find(pane, selector) === document.activeElement);
  view.samples.set(pane.key, s);
  show();
  find(panes[index], ".picks").scrollTop = list;
  if (held) find(panes[index], held).focus({ preventScroll: true });
}

const paneOf = (element) => panes[Number(element.closest(".pane").dataset.pane)];

function walk(event) {
  if (event.key === "Escape") return hide();
  const box = event.target.closest?.(".text, .tree");
  if (!box) return;
  const pane = paneOf(box), inTree = box.matches(".tree"), mine = current && current.pane === pane;
  const at = mine ? current.i : -1;
  let s = inTree && mine ? current.s : pane.sample;
  if (inTree && ["Enter", " "].includes(event.key)) { event.preventDefault(); return choose(pane, s); }
  const aside = inTree ? { ArrowDown: 1, ArrowUp: -1 }[event.key] : undefined;
  if (aside) s = pane.tree.beside(s, aside);
  const { at: first, ids } = pane.choice.samples[s], n = first + ids.length;
  const to = aside ? Math.max(at, first) : { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: n - 1 }[event.key];
  if (to === undefined || !n) return;
  event.preventDefault();
  const i = Math.max(0, Math.min(n - 1, to));
  if (inTree) return peek(pane, { s, i }, pane.tree.boxOf(s, i));
  pane.spans[i].scrollIntoView({ block: "nearest" });
  pick(pane, i, boxOf(pane.spans[i], -1), true);
}

function enter(event) {
  const box = event.target.closest?.(".text, .tree");
  if (!box || !byKeys()) return;
  const pane = paneOf(box), { at, ids } = pane.choice.samples[pane.sample];
  if (!pane.spans.length || current?.pane === pane) return;
  if (box.matches(".text")) return pick(pane, 0, boxOf(pane.spans[0], -1), true);
  const here = { s: pane.sample, i: Math.min(at, at + ids.length - 1) };
  peek(pane, here, pane.tree.boxOf(here.s, here.i));
}

function clicked(event) {
  const row = event.target.closest?.(".picks tr[data-sample]");
  if (row) return choose(paneOf(row), Number(row.dataset.sample));
  const tree = event.target.closest?.(".tree");
  if (!tree) return;
  const pane = paneOf(tree), { left, top } = tree.getBoundingClientRect();
  const found = pane.tree.find(event.clientX - left, event.clientY - top);
  if (found) choose(pane, found.s);
}

function setColour(colour) {
  view.colour = document.body.dataset.colour = colour;
  for (const button of document.querySelectorAll(".switch button")) button.setAttribute("aria-pressed", String(button.value === colour));
  legend();
}

function buildHead() {
  const models = [...new Set(DATA.runs.map((run) => [run.header.checkpoint, run.header.dtype, run.header.device].filter(Boolean).map((x) => String(x).split("/").slice(-2).join("/")).join(", ")))];
  const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const tokens = DATA.runs.flatMap((run) => run.answers).flatMap(({ samples }) => samples).reduce((n, { ids }) => n + ids.length, 0);
  document.getElementById("head").append(
    make("h1", {}, "How uncertain the model was, token by token"),
    make("div", { class: "soft small" }, [count(DATA.runs.length, "trace"), count(DATA.groups.length, "prompt"), count(tokens, "token"), ...models].join(" · ")));
}

function buildBar() {
  const bar = document.getElementById("bar");
  if (DATA.groups.length > 1) {
    const select = make("select", {}, ...DATA.groups.map((group, i) =>
      make("option", { value: String(i), selected: i === view.group }, `${i + 1}. ${group.text.replace(/\s+/g, " ").slice(0, 90)}`)));
    select.dataset.does = "group";
    bar.append(make("label", {}, make("span", {}, "prompt"), select));
  }
  const buttons = ["entropy", "varentropy", "branch"].map((name) => make("button", { type: "button", value: name, "aria-pressed": String(name === view.colour) }, name));
  bar.append(make("fieldset", {}, make("legend", {}, "colour by"), make("span", { class: "switch" }, ...buttons)), make("div", { class: "key", id: "key" }));
}

function flat(value, name, out) {
  const isTree = value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length;
  if (!isTree) out.set(name, spelled(value));
  else for (const [key, inner] of Object.entries(value)) flat(inner, name ? `${name}.${key}` : key, out);
  return out;
}

/** A table with a row a setting and a column a run; rows in which runs differ stand out. */
function sheet(parts) {
  const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, ""), ...DATA.runs.map((run) => make("th", {}, run.name)))));
  const body = make("tbody");
  for (const [title, values] of parts) {
    const columns = values.map((value) => flat(value, "", new Map()));
    const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))];
    body.append(make("tr", { class: "part" }, make("th", { colspan: String(DATA.runs.length + 1) }, title)));
    for (const key of keys) {
      const cells = columns.map((column) => column.get(key));
      body.append(make("tr", { class: cells.every((cell) => cell === cells[0]) ? "" : "differs" }, make("th", {}, key), ...cells.map((cell) => make("td", {}, cell ?? "–"))));
    }
  }
  table.append(body);
  return make("div", { class: "sheet" }, table);
}

function buildFoot() {
  const of = (name) => DATA.runs.map((run) => run.header[name] ?? {});
  const rest = DATA.runs.map((run) => Object.fromEntries(Object.entries(run.header).filter(([key]) => !["sampler", "model", "config", "prompts", "branches"].includes(key))));
  document.getElementById("foot").append(
    make("details", {}, make("summary", {}, "Summary and configuration"),
      sheet([["summary", DATA.runs.map((run) => run.summary)], ["sampler", of("sampler")], ["run", rest], ["settings", of("config")], ["model", of("model")]])),
    make("p", { class: "soft small" }, "Entropy, varentropy and logprob are the raw model's, before temperature and truncation; entropy is −Σ p ln p in nats, varentropy the variance of ln p in nats². logprob_law is under the law that was drawn from."));
}

function changed(event) {
  const { does } = event.target.dataset;
  if (does === "group") { view.group = Number(event.target.value); show(); }
  if (does === "root") {
    view.root = event.target.checked;
    for (const box of document.querySelectorAll("input[data-does=root]")) box.checked = view.root;
    redraw();
  }
  if (does === "sample") choose(paneOf(event.target), Number(event.target.value));
  if (does === "other") { view.other = event.target.value; show(); }
}

buildHead();
buildBar();
buildFoot();
show();
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("keydown", walk);
document.addEventListener("focusin", enter);
document.addEventListener("focusout", hide);
document.addEventListener("change", changed);
document.addEventListener("click", clicked);
document.addEventListener("scroll", () => { if (!byKeys()) hide(); }, { passive: true });
document.getElementById("bar").addEventListener("click", (event) => { if (event.target.closest(".switch button")) setColour(event.target.value); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.body.dataset.ready = "yes";
