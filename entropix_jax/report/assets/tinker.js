// The tab "Tokens": a text's tokens, what healing does to it, its segmentations, its next bytes, and answers side by side.
//
//   import { mount } from "./tinker.js";
//   mount(element, { call: async (path, body) => json });   // `call` throws an Error with the server's sentence
//
// Model output and input are put on the page as text only.

const ROOT = "/v1/entropix/tokens/";
const STYLE = `
.tinker form { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: end; }
.tinker label { display: grid; gap: 2px; font-size: 13px; color: var(--soft); min-width: 0; }
.tinker label.wide { flex: 1 1 100%; }
.tinker textarea, .tinker input {
  font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 7px; padding: 6px 8px;
  max-width: 100%;
}
.tinker textarea { width: 100%; min-height: 4.5em; resize: vertical; }
.tinker input[type=number] { width: 6.5em; }
.tinker .do { border: 1px solid var(--line); border-radius: 8px; padding: 6px 14px; background: var(--card); cursor: pointer; }
.tinker .do[disabled] { cursor: progress; opacity: .6; }
.tinker .out { margin-top: 16px; display: grid; gap: 12px; overflow-x: auto; }
.tinker .out p { margin: 0; overflow-wrap: anywhere; }
.tinker table { border-collapse: collapse; }
.tinker th, .tinker td { text-align: left; vertical-align: top; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--grid); }
.tinker td.num, .tinker th.num { text-align: right; font-variant-numeric: tabular-nums; }
.tinker .pieces { line-height: 2.1; overflow-wrap: anywhere; }
.tinker .piece { padding: 2px 1px; border-radius: 4px; border: 1px solid var(--line); margin-right: 1px; white-space: pre-wrap; }
.tinker button.piece { font: inherit; color: inherit; cursor: pointer; }
.tinker .piece, .tinker .k0 { background: none; }
.tinker [hidden] { display: none; }
.tinker .switch { flex-wrap: wrap; }
.tinker .k1 { background: color-mix(in srgb, var(--c6) var(--tint), transparent); }
.tinker .k2 { background: color-mix(in srgb, var(--c0) var(--tint), transparent); }
.tinker .k3 { background: color-mix(in srgb, var(--c1) var(--tint), transparent); }
.tinker .k4 { background: color-mix(in srgb, var(--c3) var(--tint), transparent); }
.tinker .k5 { background: color-mix(in srgb, var(--c4) var(--tint), transparent); }
.tinker .bar { display: inline-block; height: .7em; background: var(--accent); border-radius: 2px; vertical-align: baseline; }
.tinker .answers { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); }
.tinker .answers section { border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; background: var(--card); min-width: 0; }
.tinker .answers p { white-space: pre-wrap; }
`;
const SHEET = new CSSStyleSheet();  // which a content security policy without inline styles allows
SHEET.replaceSync(STYLE);
const KINDS = ["word", "space", "digit", "sign", "bytes", "control"];

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

const fixed = (x, digits = 3) => (x === null || x === undefined ? "" : Number(x).toFixed(digits));

function pieces(texts) {
  const line = make("span", { class: "pieces" });
  for (const text of texts) line.append(make("span", { class: "piece" }, text));
  return line;
}

function table(heads, rows) {
  const cell = (tag, value, i) => make(tag, typeof value === "number" || heads[i].endsWith(" ") ? { class: "num" } : {}, value);
  const head = make("tr", {}, ...heads.map((text, i) => cell("th", text, i)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", value, i))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function share(p) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${Math.max(p * 120, 1)}px`;
  return make("span", {}, bar, ` ${fixed(p, 4)}`);
}

// -- what the server said, as nodes ------------------------------------------------------------

function lens(found) {
  const told = make("p", { class: "soft small", "aria-live": "polite" }, "Choose a token to see how it was merged.");
  const line = make("p", { class: "pieces" });
  for (const piece of found.pieces) {
    const button = make("button", { type: "button", class: `piece k${KINDS.indexOf(piece.kind)}` }, piece.text);
    const merges = piece.merges.map(([a, b]) => `${a}+${b}`).join("  ");
    const rank = piece.rank === null ? "" : `, rank ${piece.rank}`;
    const facts = `id ${piece.id}${rank}, ${piece.kind}, bytes ${piece.start} to ${piece.end} (${piece.data})`;
    button.title = facts;
    button.addEventListener("click", () => { told.textContent = `${piece.text}: ${facts}${merges && `, merges ${merges}`}`; });
    line.append(button);
  }
  return [make("p", {}, `${found.tokens} tokens, ${found.bytes} bytes`), line, told];
}

function segmentations(found) {
  const scored = found.total !== undefined;
  const rows = found.rows.map((row) => (scored ? [fixed(row.logp), pieces(row.texts)] : [pieces(row.texts)]));
  const said = [make("p", {}, `${found.ways} ways to write it.`)];
  if (scored) {
    const error = found.exact ? "" : ` ± ${fixed(found.error)}, estimated`;
    said.push(make("p", {}, `log p ${fixed(found.logp)} as the tokenizer writes it, ${fixed(found.total)}${error} over all ways; the gap is ${fixed(found.gap)} nats.`));
  }
  return [...said, table(scored ? ["log p ", "tokens"] : ["tokens"], rows)];
}

function heal(found) {
  const usual = table(["p", "next token without healing"], found.usual.map((row) => [share(row.p), pieces([row.text])]));
  if (!found.rows.length) return [make("p", {}, "No token could bridge the end of this prompt: healing changes nothing."), usual];
  const said = `The last ${found.tokens.length} token${found.tokens.length > 1 ? "s are" : " is"} taken back, and what follows begins with `;
  const cost = `The model was asked about ${found.nodes} path${found.nodes > 1 ? "s" : ""}; at most ${fixed(found.missing, 6)} of the probability is left out.`;
  const rows = found.rows.map((row) => [share(row.p), pieces(row.texts)]);
  return [make("p", {}, said, pieces([found.held])), table(["p", "tokens with healing"], rows), usual, make("p", { class: "soft small" }, cost)];
}

function bytes(found) {
  const rows = found.rows.map((row) => [share(row.p), pieces([row.text]), row.byte]);
  rows.push([share(found.end), "end of the text", ""]);
  const cost = `${found.paths} path${found.paths > 1 ? "s" : ""} of tokens kept; at most ${fixed(found.missing, 6)} of the probability is left out.`;
  return [table(["p", "next byte", "value "], rows), make("p", { class: "soft small" }, cost)];
}

function answers(found) {
  const cards = found.rows.map((row, i) =>
    make("section", {},
      make("h3", {}, i ? `Segmentation ${i + 1}` : "As the tokenizer writes it"),
      make("p", { class: "soft small" }, `mean entropy ${fixed(row.entropy)} nats, ${row.tokens.length} tokens in the prompt`),
      make("p", {}, row.text),
      make("details", {}, make("summary", { class: "small" }, "The prompt's tokens"), pieces(row.tokens))));
  return [make("div", { class: "answers" }, ...cards)];
}

const TOOLS = [
  { name: "lens", title: "Tokens", show: lens, fields: [], about: "How the tokenizer writes a text: each token, its number, and the merges that made it." },
  { name: "heal", title: "Healing", show: heal, fields: [], about: "What comes next if the text ends inside a word: its last tokens are chosen anew, with the same letters." },
  { name: "segmentations", title: "Segmentations", show: segmentations, fields: ["before", "k", "dropout", "seed"], about: "Other ways to write the same text in tokens, and how likely the model finds each. Dropout is how often a merge is left out." },
  { name: "bytes", title: "Next byte", show: bytes, fields: [], about: "The likeliest next bytes, over all tokens that begin with them." },
  { name: "answers", title: "Answers", show: answers, fields: ["k", "dropout", "seed"], about: "The same question, written in tokens in other ways, answered side by side with one seed." },
];
const FIELDS = {
  before: { label: "After this text", type: "text", value: "" },
  k: { label: "Rows", type: "number", value: "4", min: "1", max: "16", step: "1" },
  dropout: { label: "Dropout", type: "number", value: "0.1", min: "0", max: "1", step: "0.05" },
  seed: { label: "Seed", type: "number", value: "0", min: "0", step: "1" },
};

/** Build the tab inside an element; returns nothing. */
export function mount(element, api) {
  const text = make("textarea", { name: "text", spellcheck: "false", required: "" }, "The quick bro");
  const choice = make("span", { class: "switch", role: "group", "aria-label": "Tool" });
  const inputs = {}, labels = {};
  for (const [name, { label, ...how }] of Object.entries(FIELDS)) {
    inputs[name] = make("input", { name, ...how });
    labels[name] = make("label", {}, label, inputs[name]);
  }
  const go = make("button", { class: "do", type: "submit" }, "Show");
  const about = make("p", { class: "soft small wide" });
  const form = make("form", {}, make("label", { class: "wide" }, "Text", text), choice, about, ...Object.values(labels), go);
  const out = make("div", { class: "out", "aria-live": "polite" });
  let tool, last = 0;

  function choose(next) {
    tool = next;
    for (const button of choice.children) button.setAttribute("aria-pressed", String(button.name === tool.name));
    for (const [name, label] of Object.entries(labels)) label.hidden = !tool.fields.includes(name);
    about.textContent = tool.about;
    out.replaceChildren();
  }

  for (const one of TOOLS) {
    const button = make("button", { type: "button", name: one.name }, one.title);
    button.addEventListener("click", () => choose(one));
    choice.append(button);
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = tool, number = ++last, body = { text: text.value };
    for (const name of asked.fields) body[name] = FIELDS[name].type === "number" ? Number(inputs[name].value) : inputs[name].value;
    go.disabled = true;
    let nodes;
    try {
      nodes = asked.show(await api.call(ROOT + asked.name, body));
    } catch (error) {
      nodes = [make("p", { role: "alert" }, error.message)];
    }
    go.disabled = false;
    if (number === last && asked === tool) out.replaceChildren(...nodes);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  if (!document.adoptedStyleSheets.includes(SHEET)) document.adoptedStyleSheets.push(SHEET);
  element.replaceChildren(make("div", { class: "tinker" }, form, out));
  choose(TOOLS[0]);
}
