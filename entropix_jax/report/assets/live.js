// The live page: it ties the conversation, the settings, the charts and the tip together.

import { count, known, largest, make, mean, numbers, percent, pressed, short, switchOf, unit, visible } from "./dom.js";
import { COLOURINGS, alternatives, boxOf, legendOf, meterOf, placeTip, tipOf, whole } from "./tokens.js";
import { figure, linePlot, planeLimits, scatterPlot, sharesOf } from "./charts.js";
import { Refused, call, setKey } from "./client.js";
import { Knobs } from "./knobs.js";
import { Pointing } from "./point.js";
import { drop, listed, load, newConversation, opened, traceOf } from "./store.js";
import { FORCED, Talk } from "./talk.js";

const EXAMPLES = { chat: ["Tell me a story about a kite.", "What is 7 + 5?", "Hello! How are you?"], text: ["Once upon a time", "One day, a little dog", "7 + 5 ="] };
const $ = (id) => document.getElementById(id);
const menu = $("fork");
let info = null;

// -- charts of the text at hand -----------------------------------------------------------------------------------------

const lens = { plots: [], root: true, drawn: 0, timer: 0, branches: null, asked: 0 };
const OPEN = "entropix open";
const EMPTY = { answer: { ids: [], branches: [], columns: {} }, xs: [], ys: [] };
const atHand = () => talk.active ?? EMPTY;
const beside = () => (talk.active ? [talk.active, ...talk.panes.filter((pane) => pane !== talk.active && pane.turn === talk.active.turn)] : [EMPTY]);

function buildLens() {
  const lines = (axis, colour) => {
    const values = (pane) => pane[axis === "entropy" ? "xs" : "ys"];
    // A chart has its number of series from the start; a text that is not there is a line without points.
    const series = () => Array.from({ length: 4 }, (_, k) => ({ values: values(beside()[k] ?? EMPTY), colour: k ? [6, 4, 8][k - 1] : colour, dash: k ? [4, 3] : undefined, width: k ? 1 : 1.5 }));
    return linePlot(series, {
      label: `${axis} (${unit(axis)}) along the text at hand`, unit: unit(axis), height: axis === "entropy" ? 116 : 132, axis: axis === "varentropy", low: () => 0,
      length: () => largest(beside().map((pane) => pane.xs.length), 12), high: () => 1.06 * largest(beside().flatMap(values), .5), thresholds: () => steps()[axis],
    });
  };
  const steps = () => (info ? knobs.thresholds() : { entropy: {}, varentropy: {} });
  const box = make("input", { type: "checkbox", checked: true, onchange: (event) => { lens.root = event.target.checked; drawLens(); } });
  const tokens = () => ({ xs: atHand().xs, ys: atHand().ys, branches: atHand().answer.branches.map((name, i) => lens.branches?.[i] ?? name), names: known.branches });
  const scatter = scatterPlot(tokens, planeLimits(beside, steps), steps, () => lens.root, (name, value, last) => {
    knobs.set(name, value, 0);
    if (last) knobs.draw();
    else if ($(`knob-${name}`)) $(`knob-${name}`).value = String(value);
    scatter.draw();
  });
  scatter.node.classList.add("square");
  $("lens").replaceChildren(
    make("div", { id: "facts", class: "facts" }),
    figure(lens.plots, lines("entropy", 0), "entropy (nats)"),
    figure(lens.plots, lines("varentropy", 3), "varentropy (nats²)"),
    figure(lens.plots, scatter, "varentropy over entropy", make("label", { class: "check" }, box, "square-root axes")),
    make("p", { class: "small soft", id: "whatif", role: "status" }),
    make("div", { id: "shares" }));
  const resized = new ResizeObserver(() => drawLens());
  for (const { node } of lens.plots) resized.observe(node);
}

/** Draw the charts, ten times a second at most. */
function drawLens() {
  const wait = lens.drawn + 100 - performance.now();
  if (wait > 0) { lens.timer ||= setTimeout(() => { lens.timer = 0; drawLens(); }, wait); return; }
  const pane = atHand(), n = pane.answer.ids.length;
  lens.drawn = performance.now();
  for (const plot of lens.plots) plot.draw();
  const fact = (name, value) => make("span", {}, `${name} `, make("b", {}, value));
  $("facts").replaceChildren(...[["tokens", String(n)], ["tokens/s", short(pane.own?.rate || NaN)], ["mean entropy", short(mean(pane.xs))], ["mean varentropy", short(mean(pane.ys))],
    ["mean surprise", n ? short(-mean(numbers(pane.answer, "logprob"))) : "–"]].map(([name, value]) => fact(name, value)));
  const names = branchesOf([pane]);
  const then = lens.branches ? Object.fromEntries(names.map((name) => [name, lens.branches.filter((b) => b === name).length / n])) : null;
  $("shares").replaceChildren(...(n ? sharesOf(pane.answer.branches, names, then ? { "with these thresholds": then } : {}) : []));
  pointing.mark();
  const cost = performance.now() - lens.drawn;
  lens.drawn += 4 * cost; // long texts are drawn less often
}

/** Ask which branches the tokens so far would take with the knobs as they are now, where those differ from the text's own. */
function whatIf() {
  const pane = talk.active, round = ++lens.asked, one = knobs.both[0];
  const forget = () => { if (lens.branches && pane) talk.moved(pane, null); lens.branches = null; $("whatif").textContent = ""; };
  clearTimeout(lens.waits);
  if (!pane || one.sampler !== "quadrant" || !pane.own.with?.knobs) return forget();
  const now = knobs.effective(one), was = pane.own.with.knobs;
  if (pane.own.with.sampler === one.sampler && Object.keys(now).every((name) => JSON.stringify(now[name]) === JSON.stringify(was[name] ?? now[name]))) return forget();
  lens.waits = setTimeout(async () => {
    const [text, measured] = textOf(pane);
    if (!measured.length) return;
    try {
      const { branches: [found] } = await call("/v1/entropix/branches", { params: knobs.numbers(one), texts: [text] });
      if (round !== lens.asked) return;
      const all = [...pane.answer.branches];
      measured.forEach((i, k) => { all[i] = found[k]; });
      lens.branches = all;
      const moved = all.filter((name, i) => name !== pane.answer.branches[i]).length, names = info.samplers.quadrant.branches;
      const shares = names.map((name) => `${name} ${percent(found.filter((x) => x === name).length / found.length)}`).join(", ");
      $("whatif").textContent = pane.own.with.sampler === "quadrant"
        ? `With these thresholds ${moved} of ${count(all.length, "token")} would take another branch.`
        : `The sampler quadrant would see these tokens as: ${shares}.`;
      talk.moved(pane, all);
      drawLens();
    } catch (error) {
      $("whatif").textContent = error.message;
    }
  }, 120);
}

/** The numbers of a text that a sampler looks at, and the places of the tokens that have them. */
function textOf(pane) {
  const names = ["entropy", "varentropy", ...known.attention].filter((name) => pane.answer.columns[name]);
  const measured = pane.answer.ids.flatMap((_, i) => (names.every((name) => Number.isFinite(pane.answer.columns[name][i])) ? [i] : []));
  return [Object.fromEntries(names.map((name) => [name, measured.map((i) => pane.answer.columns[name][i])])), measured];
}

// -- parts --------------------------------------------------------------------------------------------------------------

const knobs = new Knobs($("settings"), {
  changed: () => {
    history.replaceState(null, "", knobs.toHash());
    legend();
    whatIf();
    for (const plot of lens.plots) plot.draw();
  },
  calibrate: async () => {
    const texts = talk.conversation.turns.flatMap((turn) => turn.samples.map((_, s) => textOf({ answer: whole(turn.samples, s) })[0])).filter(({ entropy }) => entropy?.length);
    if (!texts.length) { knobs.said = "There is no text to calibrate on yet; generate one first."; return knobs.draw(); }
    try {
      knobs.calibrated(await call("/v1/entropix/calibrate", { texts }));
    } catch (error) {
      knobs.said = error.message;
      knobs.draw();
    }
  },
});
const talk = new Talk($("turns"), knobs, {
  active: (pane, changed) => {
    if (!info) return;
    for (const one of talk.panes) one.plots = one === pane ? lens.plots : [];
    legend();
    if (changed) { lens.branches = null; whatIf(); }
    drawLens();
  },
  grown: () => drawLens(),
  kept: (error) => { if (error) say(error.message); sessionStorage.setItem(OPEN, talk.conversation.id); listConversations(); },
  key: askKey,
  busy: (is) => { $("stop").hidden = !is; $("send").hidden = is; if (!is) whatIf(); },
});

const say = (text) => { $("trouble").textContent = text; $("trouble").hidden = !text; };

async function listConversations() {
  const held = document.activeElement?.closest?.("#conversations [data-id]")?.dataset.id;
  let kept = [];
  try { kept = await listed(); } catch (error) { say(error.message); }
  const open = async (id) => { try { talk.open(await load(id)); toText(); } catch (error) { say(error.message); } listConversations(); };
  const list = kept.map(({ id, title }) => {
    const item = make("li", { class: id === talk.conversation.id ? "on" : "" }, make("button", { type: "button", class: "plain", onclick: () => open(id) }, title || "without a title"),
      make("button", { type: "button", class: "plain", "aria-label": `Delete ${title}`, onclick: async () => {
        if (!confirm(`Delete “${title}”?`)) return;
        await drop(id);
        if (id === talk.conversation.id) talk.open(newConversation(knobs.mode));
        listConversations();
      } }, "×"));
    item.dataset.id = id;
    return item;
  });
  $("conversations").replaceChildren(
    make("div", { class: "title" }, make("h2", {}, "Texts"), make("button", { type: "button", class: "plain", id: "new", onclick: () => { sessionStorage.removeItem(OPEN); talk.open(newConversation(knobs.mode)); listConversations(); toText(); $("says").focus(); } }, "New"),
      make("button", { type: "button", class: "plain", onclick: () => $("file").click(), title: "Open traces; those of one prompt stand side by side" }, "Open"),
      make("button", { type: "button", class: "plain", id: "export", onclick: exportTrace, title: "Save as a trace, which python -m entropix_jax.viz reads" }, "Save")),
    list.length ? make("ul", {}, ...list) : make("p", { class: "small soft" }, "Texts are kept in this browser."));
  if (held) $("conversations").querySelector(`[data-id="${CSS.escape(held)}"] button`)?.focus();
}

function exportTrace() {
  if (!talk.conversation.turns.length) return say("There is nothing to save yet.");
  const url = URL.createObjectURL(new Blob([traceOf(talk.conversation, info.header)], { type: "application/jsonl" }));
  const name = (talk.conversation.title || "texts").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "texts";
  make("a", { href: url, download: `${name}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

$("file").addEventListener("change", async ({ target }) => {
  try {
    const files = await Promise.all([...target.files].map(async (file) => ({ name: file.name, text: await file.text() })));
    if (files.length) { talk.open(opened(files)); talk.save(); toText(); }
  } catch (error) {
    say(error.message);
  }
  target.value = "";
});

function toText() {
  document.body.dataset.panel = "text";
  pressed($("panels"), "text");
  invite();
}

function invite() {
  const box = $("turns");
  if (talk.conversation.turns.length || !info) return;
  const mode = knobs.mode, colours = make("p", {}, "Each token is coloured by the entropy of the model's prediction: ", ...["certain", "unsure", "very unsure"].map((text, k) => make("span", { class: `tok e${[0, 3, 5][k]}` }, text)).flatMap((x) => [x, " "]));
  box.replaceChildren(make("section", { class: "invitation" }, make("h2", {}, "See how uncertain a model is, token by token."), colours,
    make("p", { class: "soft" }, "Entropy measures how uncertain the model is about the next token; varentropy measures how unevenly the probabilities are spread. Both are of the model itself, before temperature and filters. From them an adaptive sampler such as quadrant chooses a branch, which sets how the next token is drawn. Point at a token to see its numbers and alternatives; click it to continue from another one."),
    make("div", { class: "buttons" }, ...EXAMPLES[mode].map((text) => make("button", { type: "button", class: "example", onclick: () => { say(""); talk.send(text); } }, text)))));
}

// -- colours and the tip ------------------------------------------------------------------------------------------------

/** The branches that texts can have: those of their samplers, and others that occur. */
function branchesOf(panes) {
  const names = new Set(panes.flatMap(({ own, answer }) => [...info.samplers[own?.with?.sampler]?.branches ?? [], ...answer.branches]));
  return known.branches.filter((name) => names.has(name));
}

function legend() {
  const mine = knobs.both.flatMap((one) => (one ? info.samplers[one.sampler].branches : []));
  const names = document.body.dataset.colour === "branch" ? [...new Set([...branchesOf(talk.panes), ...mine])] : [];
  $("key").replaceChildren(...legendOf(document.body.dataset.colour, names));
}

/** The pane, or the tree of a turn, that an element belongs to. */
function paneOf(node) {
  const column = node.closest(".column"), tree = node.closest(".tree");
  if (column) return talk.panes[Number(column.dataset.pane)];
  if (tree) return [...talk.panels.values()].find((panel) => panel.tree?.tree.node === tree)?.tree;
  return node.closest("#lens .frame") ? talk.active ?? undefined : undefined;
}

/** What the tip says besides the numbers of token i of sample s. */
function about(pane, s, i) {
  const { thresholds = {}, name } = pane.choice.samples[s], then = pane === talk.active && lens.branches?.[i];
  return {
    thresholds, name: name ? ` · ${name}` : "",
    also: then && then !== pane.answer.branches[i] ? [make("div", { class: "soft" }, "with the current thresholds: ", make("b", {}, then))] : [],
  };
}

const pointing = new Pointing({ paneOf, about, choose: ({ choice }, s) => talk.choose(choice, s), open: openMenu, quiet: () => !menu.hidden });

// -- going on from a token ----------------------------------------------------------------------------------------------

function openMenu(pane, i) {
  pointing.hide();
  talk.activate(pane);
  const { answer: table, turn, sample: s } = pane, span = pane.text.spans[i];
  const close = () => { menu.hidden = true; pane.text.spans[i]?.classList.remove("on"); span.classList.remove("on"); };
  const go = async (work) => {
    close();
    say("");
    try { await work(); } catch (error) { say(error.message); }
  };
  const rows = alternatives(table, i, 20);
  const typed = make("input", { id: "typed", "aria-label": "Other text to continue with", placeholder: "or type other text", autocomplete: "off" });
  const blocked = pane.own.foreign && !turn.ids?.length ? "The trace does not hold the prompt's token ids." : talk.running.has(pane.own) ? "Wait until the text has ended, or stop it." : "";
  menu.replaceChildren(
    make("div", { class: "title" }, make("h2", {}, `Continue from token ${i}`), make("button", { type: "button", class: "plain", "aria-label": "Close", onclick: () => menu.leave() }, "×")),
    make("p", { class: "small soft" }, blocked || "The text before this token is kept. Choose a token; the model continues with the current settings and the same seed."),
    ...(blocked ? [] : [
      make("div", { class: "choices" }, ...rows.map(([id, text, logprob]) => make("button", { type: "button", class: id === table.ids[i] ? "drawn" : "", onclick: () => go(() => talk.fork(turn, s, i, [{ id, text: text ?? "" }])) },
        make("span", { class: "word" }, text ? visible(text) : `id ${id}`), meterOf(logprob), make("span", { class: "num" }, percent(Math.exp(logprob))), make("small", {}, id === table.ids[i] ? "drawn" : "")))),
      make("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (typed.value) go(() => talk.forkByText(turn, s, i, typed.value)); } }, typed, make("button", { type: "submit", class: "main" }, "Continue")),
    ]),
    make("details", {}, make("summary", {}, "All numbers of this token"), make("div", { class: "numbers" }, ...tipOf(table, i, about(pane, s, i)).filter(({ tagName }) => tagName !== "TABLE"))));
  span.classList.add("on");
  menu.hidden = false;
  placeTip(menu, boxOf(span, -1));
  (menu.querySelector(".choices .drawn") ?? menu.querySelector(".choices button, input") ?? menu.querySelector("button")).focus();
  menu.leave = (back = true) => { close(); if (back) span.focus(); };
}

function keyed(event) {
  if (event.key === "Escape") {
    if (!menu.hidden) return menu.leave();
    if (!pointing.now && talk.busy) return talk.stop();
  }
  if (!menu.hidden && menu.contains(event.target)) {
    const buttons = [...menu.querySelectorAll(".choices button")], k = buttons.indexOf(document.activeElement), by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (k >= 0 && by) { event.preventDefault(); buttons[Math.max(0, Math.min(buttons.length - 1, k + by))].focus(); }
    return;
  }
  pointing.key(event);
}

function clicked(event) {
  const span = event.target.closest?.(".column .tok"), pane = event.target.closest && paneOf(event.target);
  if (!menu.hidden && !menu.contains(event.target)) { menu.leave(false); if (!span) return; }
  if (span && getSelection().isCollapsed) return openMenu(pane, Number(span.dataset.i));
  if (event.target.closest?.(".column") && !event.target.closest("button")) return talk.activate(pane);
  const found = event.target.closest?.(".tree") && pane.tree.find(event);
  if (found) talk.choose(pane.choice, found.s);
  const row = event.target.closest?.(".picks tr[data-sample]");
  if (row && !event.target.closest("input, label")) talk.choose(talk.conversation.turns[Number(row.closest("[data-pane]").dataset.pane)], Number(row.dataset.sample));
}

function changed({ target }) {
  if (target.dataset.does !== "sample") return;
  const turn = talk.conversation.turns[Number(target.closest("[data-pane]").dataset.pane)], s = Number(target.value);
  const shown = target.checked ? [...turn.shown, s] : turn.shown.filter((k) => k !== s);
  if (shown.length) talk.choose(turn, target.checked ? s : shown.includes(turn.at) ? turn.at : shown[0], shown.slice(-4));
  else target.checked = true;
}

// -- the start ----------------------------------------------------------------------------------------------------------

function askKey(error) {
  $("ask-key").hidden = false;
  $("ask-key").querySelector(".error").textContent = error && sessionStorage.getItem("entropix key") ? error.message : "";
  $("key-text").focus();
}

const state = (text) => { $("state").textContent = text; $("state").hidden = !text; };

/** The text that was open before this tab was loaded again. */
async function again() {
  try {
    const kept = sessionStorage.getItem(OPEN) && await load(sessionStorage.getItem(OPEN));
    if (kept) talk.open(kept);
    if (kept) listConversations();
  } catch { /* it is in the list, or storage is off and the list says so */ }
}

async function start() {
  for (;;) {
    try {
      await call("/ready");
      break;
    } catch (error) {
      state(error instanceof Refused && error.code === "not_ready" ? "The model is being loaded; this page continues when it is ready." : error.message);
      if (error.code === "engine_dead") return;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  state("");
  try {
    info = await call("/v1/entropix/info");
  } catch (error) {
    return error.status === 401 ? askKey(error) : state(error.message);
  }
  $("ask-key").hidden = true;
  $("model").textContent = info.model;
  document.title = `entropix: ${info.model}`;
  Object.assign(known, { units: info.units, steps: info.steps, attention: info.attention, branches: [...new Set([...(info.samplers.quadrant?.branches ?? []), ...info.header.branches, ...known.branches, FORCED])] });
  knobs.use(info);
  talk.conversation.mode = knobs.mode;
  $("says").placeholder = knobs.mode === "chat" ? "Write a message" : "Write the beginning of a text";
  buildLens();
  legend();
  invite();
  await listConversations();
  await again();
  try {
    const tinker = await import("./tinker.js");
    $("tabs").hidden = false;
    tinker.mount($("tinker"), { call, info });
  } catch { /* this page is without that tab */ }
  document.body.dataset.ready = "yes";
  for (;;) {
    const { compiling = 0 } = await call("/ready").catch(() => ({}));
    state(compiling ? `The server compiles ${count(compiling, "more program")}; texts are slower until then.` : "");
    if (!compiling) return;
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

$("colours").append(make("span", { class: "soft small" }, "colour by "), switchOf(COLOURINGS, "entropy"));
$("colours").addEventListener("click", ({ target }) => {
  if (!target.value) return;
  document.body.dataset.colour = target.value;
  pressed($("colours"), target.value);
  legend();
});
$("panels").addEventListener("click", ({ target }) => { if (target.value) { document.body.dataset.panel = target.value; pressed($("panels"), target.value); pointing.hide(); window.scrollTo(0, 0); } });
$("tabs").addEventListener("click", ({ target }) => { if (target.value) { document.body.dataset.tab = target.value; pressed($("tabs"), target.value); $("tinker").hidden = target.value !== "tinker"; pointing.hide(); } });
$("ask-key").addEventListener("submit", (event) => { event.preventDefault(); setKey($("key-text").value.trim()); start(); });
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("says").value;
  if (!info || talk.busy || !text.trim()) return;
  $("says").value = "";
  say("");
  talk.send(text);
});
$("says").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); } });
$("stop").addEventListener("click", () => talk.stop());
document.addEventListener("keydown", keyed);
document.addEventListener("click", clicked);
document.addEventListener("change", changed);
window.addEventListener("hashchange", () => { if (knobs.fromHash(location.hash) && info) knobs.use(info); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const plot of [...lens.plots, ...(talk.plots ?? [])]) plot.draw(); });
knobs.fromHash(location.hash);
start();
