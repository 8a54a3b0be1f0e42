// The samples of a prompt: as a tree where one forked from another, and as a table to pick from.

import { drawing, make, roundTicks, shape, short } from "./dom.js";
import { figure } from "./charts.js";
import { classesOf, emitter, lineage } from "./tokens.js";

const ENDS = { // how a sample's line ends: an outline on a square from -1 to 1, and whether it is filled
  stop: ["M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", true],
  length: ["M-.8-1L1 0L-.8 1z", true],
  uncertain: ["M0-1.15L1.15 0L0 1.15L-1.15 0z", true],
  cancelled: ["M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", false],
  pruned: ["M-.9-.9L.9 .9M-.9 .9L.9-.9", false],
  budget: ["M-.85-.85H.85V.85H-.85z", false],
};
const OTHER_END = ["M0-1L1 .8L-1 .8z", false];

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

/** The samples along the text, each from where it forked. find(event) -> { s, i } or null; show(s, i) rings a token. */
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
  const classes = samples.map((sample) => sample.ids.map((_, i) => classesOf(sample, i)));
  const named = samples.reduce((n, { name }) => Math.max(n, (name ?? "").length), 2), margin = 38 + 6 * Math.min(20, named);
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
    group.append(shape("text", { x: end + 9, y: y(s), class: s === pane.sample ? "on" : "" }, `${(samples[s].name ?? String(s + 1)).slice(0, 20)}${s === chosen ? " ✓" : ""}`));
    return group;
  }

  const plot = { node };
  plot.draw = () => {
    const width = node.clientWidth, bottom = 8 + pitch * samples.length;
    x = (i) => 8 + (width - 8 - margin) * i / longest;
    const rules = roundTicks(longest, width - 8 - margin, 52).filter((t) => t % 1 === 0).flatMap((t) => [
      shape("path", { class: "rule", d: `M${Math.round(x(t)) + .5} 0V${bottom}` }), shape("text", { x: x(t), y: bottom + 11, class: "tick" }, short(t))]);
    const roots = order.filter((s) => samples[s].parent === null);
    const joints = order.filter((s) => samples[s].parent !== null).map((s) =>
      shape("path", { class: shown.has(s) ? "joint on" : "joint", "stroke-width": kept.has(s) ? 4 : 1.5, d: `M${x(samples[s].at)} ${y(samples[s].parent)}V${y(s)}` }));
    if (roots.length > 1) joints.unshift(shape("path", { class: "joint", "stroke-width": 1.5, "stroke-dasharray": "2 3", d: `M${x(0)} ${y(roots[0])}V${y(roots[roots.length - 1])}` }));
    joints.sort((a, b) => a.classList.contains("on") - b.classList.contains("on"));
    svg.replaceChildren(shape("rect", { class: "band", x: 0, y: y(pane.sample) - pitch / 2, width, height: pitch, rx: 4 }), ...rules, ...joints, ...order.map(line),
      shape("text", { x: width - 4, y: bottom + 29, class: "tick last" }, "generated token"));
  };
  plot.find = (event) => {
    const corner = node.getBoundingClientRect(), px = event.clientX - corner.left, py = event.clientY - corner.top;
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
  /** Where a key leads from token i of sample s, or null. */
  plot.next = (key, s, i) => {
    const aside = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (aside) s = order[Math.max(0, Math.min(order.length - 1, row[s] + aside))];
    const { at, ids } = samples[s], n = at + ids.length;
    const to = aside ? Math.max(i, at) : { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: n - 1 }[key];
    return to === undefined || !n ? null : { s, i: Math.max(0, Math.min(n - 1, to)) };
  };
  plot.boxOf = (s, i) => {
    const { left, top } = node.getBoundingClientRect(), at = left + x(i + .5), down = top + y(emitter(samples, s, i));
    return { left: at + 14, right: at + 14, top: down - 14, bottom: down + 14 };
  };
  return plot;
}

/**
 * What can be picked: the samples in a table, and as a tree where one forked from another.
 *
 * Args: pane: {choice: {samples, chosen, method, rule}, sample: the one at hand, shown: those in view, plots}; its `tree` is set.
 * title: of a card of its own; index: of the pane; rename: optional, rename(s, name).
 */
export function samplesOf(pane, index, title, rename) {
  const { samples, chosen, method, rule } = pane.choice, shown = pane.shown ?? [pane.sample];
  const name = title ? make("h2", {}, title) : null;
  const forked = samples.some((sample) => sample.parent !== null), whyed = new Set(samples.map(({ why }) => why)).size > 1;
  const number = (x) => (x === null ? "–" : short(Number(x)));
  const columns = [ // name, of numbers, cell
    ["name", false, ({ name }, s) => make("input", { class: "rename", value: name ?? "", "aria-label": `name of sample ${s + 1}`, onchange: (event) => rename(s, event.target.value) }), rename],
    ["score", true, ({ score }) => number(score), samples.some(({ score }) => score !== null)],
    ["answer", false, ({ answer }) => make("span", { class: "said", title: answer ?? "" }, answer ?? "–"), samples.some(({ answer }) => answer !== null)],
    ["tokens", true, ({ ids }) => String(ids.length), true],
    ["ended by", false, ({ finish }) => [endIcon(finish), finish ?? "–"], true],
    ["from", false, ({ parent, at }) => (parent === null ? "the prompt" : `${parent + 1} at ${at}`), forked],
    ["with", false, ({ why }) => make("span", { class: "said" }, why ?? ""), whyed],
  ].filter(([, , , there]) => there);
  const side = (isNumber) => (isNumber ? "num right" : "");
  const rows = samples.map((sample, s) => {
    const pick = make("input", { type: pane.shown ? "checkbox" : "radio", name: `sample-${index}`, value: String(s), checked: shown.includes(s), "aria-label": `sample ${s + 1}${s === chosen ? ", chosen" : ""}` });
    pick.dataset.does = "sample";
    const row = make("tr", { class: s === pane.sample ? "on" : "" }, make("td", {}, make("label", {}, pick, String(s + 1), s === chosen ? make("b", { title: "chosen" }, " ✓") : null)),
      ...columns.map(([, isNumber, cell]) => make("td", { class: side(isNumber) }, cell(sample, s))));
    row.dataset.sample = s;
    return row;
  });
  const head = make("tr", {}, make("th", {}, "sample"), ...columns.map(([name, isNumber]) => make("th", { class: side(isNumber) }, name)));
  const parts = [make("div", { class: "picks" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)))];
  if (forked) {
    pane.tree = treePlot(pane);
    const ends = [...new Set(samples.map((sample) => sample.finish))];
    parts.unshift(figure(pane.plots, pane.tree, "where samples forked", ...ends.map((finish) => make("span", { class: "line" }, endIcon(finish), finish ?? "not ended"))));
  }
  return make("div", { class: name ? "pane samples" : "samples", "data-pane": String(index) }, name,
    rule ? make("p", { class: "facts" }, make("span", {}, make("b", {}, String(samples.length)), ` samples by ${method}`), make("span", {}, "chosen by ", make("b", {}, rule), ": sample ", make("b", {}, String(chosen + 1)), " ✓")) : null, make("div", { class: "pickers" }, ...parts));
}
