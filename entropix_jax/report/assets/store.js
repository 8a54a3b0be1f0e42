// Conversations: how they are kept in the browser, and how they are written and read as traces.
//
// A conversation has turns; a turn follows one sample of an earlier turn, so an edited message is one more turn there. A turn has
// samples as a trace has them: {parent, at, ids, texts, branches, tops, columns, finish, ...} and `with`, the settings it had.

import { known, wellFormed } from "./dom.js";
import { emptySample, push, whole } from "./tokens.js";

const THRESHOLDS = { entropy: ["low_ent", "ask_ent", "high_ent"], varentropy: ["low_varent", "high_varent"] };

export const newConversation = (mode) => ({ id: crypto.randomUUID?.() ?? String(Math.random()), title: "", mode, turns: [], leaf: null, changed: Date.now() });
export const newTurn = (facts) => ({ parent: null, follows: 0, user: "", ids: null, samples: [], chosen: 0, method: "hand", rule: "", shown: [0], at: 0, ...facts });

/** The indices of turns from the first to the one in view. */
export function pathOf({ turns, leaf }) {
  const path = [];
  for (let t = leaf; t !== null; t = turns[t].parent) path.unshift(t);
  return path;
}

/** The turns that stand at the same place as turn t. */
export const siblings = ({ turns }, t) =>
  turns.flatMap((turn, i) => (turn.parent === turns[t].parent && (turn.parent === null || turn.follows === turns[t].follows) ? [i] : []));

export const textOfSample = (turn, s) => whole(turn.samples, s).texts.join("");

// -- kept in the browser ------------------------------------------------------------------------------------------------

const request = (asked) => new Promise((resolve, reject) => {
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => reject(asked.error);
});

let opening = null;
function database() {
  opening ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("entropix", 1);
    asked.onupgradeneeded = () => { for (const name of ["heads", "bodies"]) asked.result.createObjectStore(name, { keyPath: "id" }); };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opening;
}

async function within(mode, work) {
  try {
    const tx = (await database()).transaction(["heads", "bodies"], mode);
    const done = new Promise((resolve, reject) => { tx.oncomplete = resolve; tx.onabort = () => reject(tx.error); });
    const found = await work(tx.objectStore("heads"), tx.objectStore("bodies"));
    if (mode === "readwrite") await done;
    return found;
  } catch (error) {
    throw new Error(error?.name === "QuotaExceededError"
      ? "The browser has no room for this conversation; delete others, or save it as a file."
      : `The browser cannot keep conversations (${error?.message ?? "no storage"}); save what you need as a file.`);
  }
}

/** {id, title, changed} of all that are kept, the newest first. */
export const listed = async () => (await within("readonly", (heads) => request(heads.getAll()))).sort((a, b) => b.changed - a.changed);
export const load = (id) => within("readonly", (_, bodies) => request(bodies.get(id)));
export const drop = (id) => within("readwrite", (heads, bodies) => { heads.delete(id); bodies.delete(id); });
export const keep = (conversation) => within("readwrite", (heads, bodies) => {
  const { id, title, changed } = conversation;
  heads.put({ id, title, changed });
  bodies.put(conversation);
});

// -- traces -------------------------------------------------------------------------------------------------------------

/** A conversation as a trace that entropix_jax.report.reader reads: a prompt for each turn. `base` is the server's header. */
export function traceOf(conversation, base) {
  const turns = conversation.turns.filter((turn) => turn.samples.length);
  const index = new Map(turns.map((turn, p) => [conversation.turns.indexOf(turn), p]));
  const samples = turns.flatMap((turn) => turn.samples), drawn = samples.flatMap((sample) => sample.branches);
  const counts = new Map();
  for (const name of drawn) counts.set(name, (counts.get(name) ?? 0) + 1);
  const first = samples[0]?.with ?? {};
  const header = {
    ...base, seed: first.seed ?? base.seed ?? 0, sampler: first.knobs ? { name: first.sampler, ...first.knobs } : base.sampler, branches: [...new Set([...base.branches, ...known.branches, ...drawn])],
    prompts: turns.map(({ user, ids, parent, follows, messages, shown, at, said, votes }) => ({ text: user, ids: ids ?? [], page: { parent: parent === null ? null : index.get(parent) ?? null, follows, messages, shown, at, said, votes } })),
    page: { title: conversation.title, mode: conversation.mode },
  };
  const lines = [header];
  turns.forEach((turn, prompt) => turn.samples.forEach((sample, s) => sample.ids.forEach((id, i) => {
    const line = { prompt, position: sample.at + i, id, text: sample.texts[i], branch: sample.branches[i] };
    for (const [name, column] of Object.entries(sample.columns)) if (column[i] !== null) line[name] = column[i];
    for (const name of ["entropy", "varentropy"]) line[name] ??= "NaN"; // of a token that was typed, nothing was measured
    if (sample.tops[i]) line.top = sample.tops[i];
    if (s) line.sample = s;
    if (i === sample.ids.length - 1 && sample.finish) line.finish = sample.finish;
    lines.push(line);
  })));
  // What a sample forked from is not known before its group has ended; such a turn is one of a run that was interrupted.
  const open = turns.map((turn) => turn.samples.some(({ parent, at }) => parent === null && at > 0));
  turns.forEach(({ method, rule, chosen, samples: own }, prompt) => open[prompt] || lines.push({ samples: { prompt, method, rule, chosen, samples: own.map((sample, s) => ({
    sample: s, parent: sample.parent, at: sample.at, tokens: sample.ids.length, finish: sample.finish, score: sample.score, answer: sample.answer,
    page: { name: sample.name, why: sample.why, with: sample.with, thresholds: sample.thresholds },
  })) } }));
  const branches = Object.fromEntries([...counts].map(([name, n]) => [name, n / drawn.length]));
  lines.push({ summary: { generated_tokens: drawn.length, branches, ...(open.some(Boolean) ? { interrupted: true } : {}) } });
  return lines.map((line) => `${JSON.stringify(line)}\n`).join("");
}

/** {header, answers: [turn], incomplete} of a trace's text. Raises Error with a sentence. */
function readTrace(name, text) {
  const bad = (i, why) => new Error(`Line ${i + 1} of ${name} ${why}; it cannot be opened.`);
  const lines = text.split("\n").filter((line) => line.trim()).map((line, i, all) => {
    // Python writes numbers that are not finite by names that JSON does not have.
    try { return JSON.parse(line.replace(/(?<=[:[,]\s*)(NaN|-?Infinity)(?=\s*[,\]}])/g, '"$1"'), wellFormed); } catch {
      if (i === all.length - 1) return null;
      throw bad(i, "is not JSON");
    }
  }).filter(Boolean);
  const header = lines[0];
  const isIndex = (x, n) => Number.isInteger(x) && x >= 0 && x < n;
  if (!header || !Array.isArray(header.branches) || !header.branches.every((x) => typeof x === "string") || !Array.isArray(header.prompts) || !header.sampler?.name) throw new Error(`${name} is not a trace; python -m entropix_jax.main --trace=FILE makes one.`);
  const thresholds = Object.fromEntries(Object.entries(THRESHOLDS).map(([axis, names]) => [axis, Object.fromEntries(names.filter((knob) => typeof header.sampler[knob] === "number").map((knob) => [knob, header.sampler[knob]]))]));
  const { name: sampler, ...knobs } = header.sampler;
  const sampleOf = (facts) => emptySample({ thresholds, with: { sampler, knobs, params: {}, seed: header.seed, sample: 0 }, ...facts });
  const turns = header.prompts.map((prompt) => newTurn({ user: String(prompt.text), ids: prompt.ids ?? null, ...prompt.page }));
  for (const { samples: choice } of lines.filter((line) => line.samples)) {
    const turn = turns[choice.prompt];
    if (!turn || !Array.isArray(choice.samples)) throw new Error(`${name} lists samples of a prompt that it does not have; it cannot be opened.`);
    for (const { sample: s, page, tokens: _, ...facts } of choice.samples) turn.samples[s] = sampleOf({ ...facts, ...page });
    Object.assign(turn, { method: choice.method, rule: choice.rule, chosen: choice.chosen }, header.prompts[choice.prompt].page ?? { at: choice.chosen, shown: [choice.chosen] });
  }
  lines.forEach((line, i) => {
    if (i === 0 || line.samples || line.summary || line.error) return;
    const turn = turns[line.prompt];
    const top = line.top ?? [];
    if (!turn || !isIndex(line.position, Infinity) || typeof line.text !== "string" || typeof line.branch !== "string" || !isIndex(line.sample ?? 0, 2 ** 16)
      || !Array.isArray(top) || !top.every((one) => Array.isArray(one) && typeof one[1] === "string")) throw bad(i, "is damaged");
    const s = line.sample ?? 0;
    turn.samples[s] ??= sampleOf({ at: line.position });
    if (line.position !== turn.samples[s].at + turn.samples[s].ids.length) throw bad(i, `has position ${line.position}, which is not the next`);
    push(turn.samples[s], line);
  });
  for (const turn of turns) {
    turn.samples = Array.from(turn.samples, (sample) => sample ?? sampleOf({}));
    if (!turn.samples.length) turn.samples.push(sampleOf({}));
  }
  turns.forEach((turn, t) => { // what follows must end: no turn or sample may be its own ancestor
    const { samples, parent, follows, at, shown, chosen } = turn, n = samples.length;
    const right = (parent === null || (isIndex(parent, t) && isIndex(follows, turns[parent].samples.length))) && isIndex(at, n) && isIndex(chosen, n)
      && Array.isArray(shown) && shown.length && shown.every((s) => isIndex(s, n))
      && samples.every((sample, s) => isIndex(sample.at, Infinity) && (sample.parent === null ? true : isIndex(sample.parent, s)));
    if (!right) throw new Error(`${name} has turns or samples that do not fit together; it cannot be opened.`);
  });
  return { header, turns };
}

/** One conversation of traces: those of one prompt stand side by side. files: [{name, text}]. Raises Error with a sentence. */
export function opened(files) {
  const runs = files.map(({ name, text }) => ({ name: name.replace(/\.jsonl?$/, ""), ...readTrace(name, text) }));
  const branches = new Set(runs.flatMap(({ header }) => header.branches));
  known.branches = [...new Set([...known.branches, ...branches])];
  const page = runs[0].header.page, conversation = { ...newConversation(page?.mode ?? "text"), title: page?.title || runs.map(({ name }) => name).join(", ") };
  const found = new Map();
  for (const run of runs) {
    const seen = new Map();
    for (const turn of run.turns) {
      const nth = seen.get(turn.user) ?? 0, key = `${nth} ${turn.user}`;
      seen.set(turn.user, nth + 1);
      if (runs.length > 1) for (const [s, sample] of turn.samples.entries()) { sample.name = turn.samples.length > 1 ? `${run.name} ${s + 1}` : run.name; sample.foreign = true; }
      if (!page) for (const sample of turn.samples) sample.foreign = true;
      const there = found.get(key);
      if (!there || runs.length === 1) { found.set(runs.length === 1 ? turn : key, turn); continue; }
      const shift = there.samples.length;
      there.samples.push(...turn.samples.map((sample) => ({ ...sample, parent: sample.parent === null ? null : sample.parent + shift })));
      there.shown.push(turn.chosen + shift);
    }
  }
  conversation.turns = [...found.values()];
  // Prompts of a foreign trace do not follow one another: they are turns at the first place.
  conversation.leaf = page ? conversation.turns.length - 1 : 0;
  return conversation;
}
