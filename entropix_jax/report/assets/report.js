// The report of traces: everything shown comes from the element #data.

import { count, finite, known, largest, make, mean, numbers, pressed, short, smallest, spelled, switchOf, unit, wellFormed } from "./dom.js";
import { COLOURINGS, TextView, firstDifference, legendOf, whole } from "./tokens.js";
import { figure, linePlot, lineKey, planeLimits, scatterPlot, sharesOf } from "./charts.js";
import { samplesOf } from "./tree.js";
import { Pointing } from "./point.js";

const DATA = JSON.parse(document.getElementById("data").textContent, wellFormed);
Object.assign(known, { branches: [...new Set(DATA.runs.flatMap((run) => run.header.branches))], units: DATA.units, steps: DATA.steps, attention: DATA.attention });
const view = { group: DATA.first, colour: "entropy", root: true, other: null, samples: new Map() };
let panes = [];
const pointing = new Pointing({
  paneOf: (node) => panes[Number(node.closest(".pane")?.dataset.pane)],
  about: (pane, s) => ({ thresholds: pane.run.thresholds, name: sampleName(pane, s) }),
  choose,
});

// -- one answer -------------------------------------------------------------------------------

function alongText(pane, names, colours, title, options) {
  const series = names.map((name, i) => ({ name, values: numbers(pane.answer, name), colour: colours[i], dash: [[], [7, 3], [2, 3]][i] }));
  const alone = names.length === 1 && series[0].values.every(Number.isFinite);
  const inAll = () => panes.flatMap((p) => names.flatMap((name) => numbers(p.answer, name)));
  let high = null;
  const plot = linePlot(() => series.map((s) => ({ ...s, alone, width: s.values.length > 1500 ? 1 : 1.6 })), {
    height: 128, ...options, label: `${names.join(", ")} (${options.unit || "no unit"}) along the text`,
    length: () => panes.reduce((n, p) => Math.max(n, p.answer.ids.length), 0),
    low: () => Math.min(0, smallest(series.flatMap((s) => s.values), 0)),
    // The same axis in every pane, so that answers compare by eye.
    high: () => (high ??= options.unit === "0 to 1" ? 1 : 1.06 * largest(inAll(), 0)),
  });
  return figure(pane.plots, plot, title, ...(names.length > 1 ? lineKey(series) : []));
}

function attentionOf(pane) {
  const measured = known.attention.filter((name) => name in pane.answer.columns);
  const units = [...new Set(measured.map(unit))];
  return units.map((u) => {
    const names = measured.filter((name) => unit(name) === u);
    return alongText(pane, names, [2, 4, 1], `attention (${u})`, { unit: u });
  });
}

/** Any other number of the trace, chosen from a list. */
function otherOf(pane) {
  const names = Object.keys(pane.answer.columns).filter((name) =>
    !(name in known.steps) && !known.attention.includes(name) && finite(numbers(pane.answer, name)).length);
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

function textOf(pane) {
  pane.text = new TextView("The answer, token by token; the arrow keys move along it");
  pane.text.add(pane.answer);
  pane.text.spans[pane.split]?.classList.add("split");
  return pane.text.box;
}

function buildPane(pane, index, first) {
  const { run } = pane;
  pane.plots = [];
  const tokens = { xs: pane.xs, ys: pane.ys, branches: pane.answer.branches, names: run.header.branches };
  const limits = planeLimits(() => panes, () => {
    const steps = panes.map((p) => p.run.thresholds);
    return { entropy: steps.flatMap((s) => Object.values(s.entropy)), varentropy: steps.flatMap((s) => Object.values(s.varentropy)) };
  });
  const several = run.answers.length > 1 || pane.choice.samples.length > 1;
  pane.samples = pane.choice.samples.length > 1 ? samplesOf(pane, index, panes.length > 1 ? run.name : null) : null;
  const box = make("input", { type: "checkbox", checked: view.root });
  box.dataset.does = "root";
  pane.node = make("section", { class: "pane", "aria-label": run.name },
    make("div", { class: "name" },
      make("div", { class: "top" }, make("h2", {}, run.name), make("span", { class: "soft" }, `sampler ${run.header.sampler.name}`, sampleName(pane, pane.sample))), factsOf(pane), noteOf(pane, first)),
    make("div", { class: "words" }, make("p", { class: "asked" }, run.header.prompts[pane.p].text), textOf(pane)),
    pane.samples && panes.length === 1 ? pane.samples : null,
    make("div", { class: "branches" }, ...sharesOf(pane.answer.branches, run.header.branches, several ? { "whole run": run.summary.branches || {} } : {})),
    make("div", { class: "cloud" }, figure(pane.plots, scatterPlot(() => tokens, limits, () => run.thresholds, () => view.root), "varentropy (nats²) over entropy (nats)", make("label", { class: "check" }, box, "square-root axes"))),
    make("div", { class: "plots" },
      alongText(pane, ["entropy"], [0], "entropy (nats)", { unit: "nats", thresholds: () => run.thresholds.entropy }),
      alongText(pane, ["varentropy"], [3], "varentropy (nats²)", { unit: "nats²", thresholds: () => run.thresholds.varentropy, axis: true, height: 144 })),
    make("div", { class: "plots pair" }, ...attentionOf(pane), otherOf(pane)));
  pane.node.dataset.pane = index;
  return pane.node;
}

// -- the page ---------------------------------------------------------------------------------

const resized = new ResizeObserver((entries) => {
  const seen = new Set(entries.map((entry) => entry.target));
  for (const pane of panes) for (const plot of pane.plots) if (seen.has(plot.node)) plot.draw();
  pointing.mark();
});

function redraw() {
  for (const pane of panes) for (const plot of pane.plots) plot.draw();
  pointing.mark();
}

function show() {
  pointing.hide();
  resized.disconnect();
  const group = DATA.groups[view.group];
  panes = (group ? group.members : []).map(([r, p]) => {
    const run = DATA.runs[r], choice = run.answers[p], key = `${r} ${p}`, sample = view.samples.get(key) ?? choice.chosen;
    const answer = whole(choice.samples, sample);
    return { run, p, key, choice, sample, answer, xs: numbers(answer, "entropy"), ys: numbers(answer, "varentropy"), split: -1 };
  });
  for (const pane of panes.slice(1)) pane.split = firstDifference(panes[0].answer.ids, pane.answer.ids);
  document.getElementById("panes").className = `${panes.length === 1 ? "one" : "many"}${panes.some((pane) => pane.choice.samples.length > 1) ? " sampled" : ""}`;
  const built = panes.map((pane, i) => buildPane(pane, i, panes[0]));
  document.getElementById("cards").replaceChildren(...(panes.length > 1 ? panes.flatMap((pane) => pane.samples ?? []) : []));
  document.getElementById("panes").replaceChildren(...built);
  for (const pane of panes) for (const plot of pane.plots) { plot.draw(); resized.observe(plot.node); }
  for (const list of document.querySelectorAll(".picks")) list.scrollTop = list.querySelector(".on").offsetTop - list.clientHeight / 2;
  legend();
  document.body.dataset.tokens = panes.reduce((n, pane) => n + pane.text.spans.length, 0);
}

function legend() {
  const here = new Set(panes.flatMap((pane) => pane.run.header.branches));
  document.getElementById("key").replaceChildren(...legendOf(view.colour, known.branches.filter((name) => here.has(name))));
}

/** Show another sample of a pane; what had the focus keeps it. */
function choose(pane, s) {
  if (s === pane.sample) return;
  const index = panes.indexOf(pane), find = ({ samples, node }, selector) => samples.querySelector(selector) ?? node.querySelector(selector);
  const list = find(pane, ".picks").scrollTop;
  const held = [".tree", ".picks input:checked", ".tok[tabindex]"].find((selector) => find(pane, selector) === document.activeElement);
  view.samples.set(pane.key, s);
  show();
  find(panes[index], ".picks").scrollTop = list;
  if (held) find(panes[index], held).focus({ preventScroll: true });
}

const paneOf = (element) => panes[Number(element.closest(".pane").dataset.pane)];

function clicked(event) {
  const row = event.target.closest?.(".picks tr[data-sample]");
  if (row) return choose(paneOf(row), Number(row.dataset.sample));
  const tree = event.target.closest?.(".tree");
  if (!tree) return;
  const pane = paneOf(tree), found = pane.tree.find(event);
  if (found) choose(pane, found.s);
}

function setColour(colour) {
  view.colour = document.body.dataset.colour = colour;
  pressed(document.getElementById("bar"), colour);
  legend();
}

function buildHead() {
  const models = [...new Set(DATA.runs.map((run) => [run.header.checkpoint, run.header.dtype, run.header.device].filter(Boolean).map((x) => String(x).split("/").slice(-2).join("/")).join(", ")))];
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
  bar.append(make("fieldset", {}, make("legend", {}, "colour by"), switchOf(COLOURINGS, view.colour)), make("div", { class: "key", id: "key" }));
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
document.addEventListener("keydown", (event) => pointing.key(event));
document.addEventListener("change", changed);
document.addEventListener("click", clicked);
document.getElementById("bar").addEventListener("click", (event) => { if (event.target.closest(".switch button")) setColour(event.target.value); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.body.dataset.ready = "yes";
