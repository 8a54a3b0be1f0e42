// The conversation in view: its turns and texts, what streams into them, forks and edits.

import { count, known, make, mean, numberAt, short } from "./dom.js";
import { TextView, emitter, emptySample, firstDifference, meterOf, push, whole } from "./tokens.js";
import { samplesOf } from "./tree.js";
import { Refused, call, stream } from "./client.js";
import { Knobs } from "./knobs.js";
import { keep, newConversation, newTurn, pathOf, siblings, textOfSample } from "./store.js";

const BATCH = 1500; // tokens that enter the document per frame
const BESIDE = 4; // texts side by side while a group is written
const TOP = 10; // alternatives that are asked per token
export const FORCED = "forced"; // the branch of a token that a person chose

/** The answers of a group's samples, with the weight that each has. */
function votesOf({ votes = {} }) {
  const entries = Object.entries(votes).map(([answer, x]) => [answer, Number(x)]).sort((a, b) => b[1] - a[1]), all = entries.reduce((n, [, x]) => n + Math.max(0, x), 0);
  return entries.length < 1 ? "" : make("table", { class: "votes" }, make("tbody", {}, ...entries.slice(0, 8).map(([answer, x]) =>
    make("tr", {}, make("td", {}, answer), make("td", {}, meterOf(Math.log(all > 0 ? Math.max(0, x) / all : 0))), make("td", { class: "num" }, short(x))))));
}

export class Talk {
  /** `on`: active(pane), grown(pane), kept(error or null), key(), busy(whether something is generated). */
  constructor(box, knobs, on) {
    Object.assign(this, { box, knobs, on, panes: [], running: new Map(), made: new WeakMap(), frame: 0, kept: 0, cost: 0, active: null, editing: null, keeping: 0, panels: new Map() });
    this.resized = new ResizeObserver((entries) => { for (const { target } of entries) this.plots?.find(({ node }) => node === target)?.draw(); });
    this.open(newConversation("chat"));
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.editing = null;
    this.panels.clear();
    this.show();
  }

  get most() { return this.knobs.both[0].max_tokens ?? this.knobs.most; }
  get busy() { return this.running.size > 0; }

  stop(sample) {
    for (const [one, controller] of this.running) if (!sample || sample === one) controller.abort();
  }

  // -- what a request holds ---------------------------------------------------------------------

  turnAfter(parent, user) {
    const { conversation } = this, mode = conversation.turns.length ? conversation.mode : this.knobs.mode;
    conversation.mode = mode;
    const before = parent === null ? [] : pathOf({ ...conversation, leaf: parent }).map((t) => conversation.turns[t]);
    const follows = parent === null ? 0 : conversation.turns[parent].at;
    const said = (turn, i) => textOfSample(turn, i + 1 < before.length ? before[i + 1].follows : turn.at);
    const messages = mode === "chat"
      ? [...(this.knobs.both[0].system ? [{ role: "system", content: this.knobs.both[0].system }] : []),
        ...before.flatMap((turn, i) => [{ role: "user", content: turn.user }, { role: "assistant", content: said(turn, i) }]), { role: "user", content: user }]
      : before.map((turn, i) => turn.user + said(turn, i)).join("") + user;
    return newTurn({ parent, follows, user, messages });
  }

  bodyOf(turn, sample, forced, most) {
    const { sampler, params, seed, sample: noise, method, options } = sample.with;
    const entropix = { sampler, params, trace: "lines" };
    if (forced.length) entropix.forced_ids = forced;
    if (noise) entropix.sample = noise;
    if (method && !forced.length) entropix.group = { method, ...options };
    const body = { stream: true, seed, max_tokens: most, entropix };
    if (Array.isArray(turn.messages)) return ["/v1/chat/completions", { ...body, messages: turn.messages, logprobs: true, top_logprobs: TOP }];
    return ["/v1/completions", { ...body, prompt: turn.messages ?? turn.ids, logprobs: TOP }];
  }

  sampleWith(one, seed, facts = {}) {
    const settings = this.knobs.record(one, seed);
    if (one.method) Object.assign(settings, { method: one.method, options: { ...one.options } });
    return emptySample({ with: settings, thresholds: this.knobs.thresholds(one), why: Knobs.why(settings), ...facts });
  }

  // -- what a person does -----------------------------------------------------------------------

  /** Send a message after the turn in view, or in its place where one is edited. */
  send(user, parent = this.conversation.leaf) {
    const { conversation, knobs: { both } } = this, turn = this.turnAfter(parent, user);
    conversation.turns.push(turn);
    conversation.leaf = conversation.turns.length - 1;
    conversation.title ||= user.trim().slice(0, 60);
    this.editing = null;
    this.begin(turn, both.filter(Boolean), Knobs.seedOf(both[0]));
  }

  /** Texts of one turn by each of the settings, with one seed. */
  begin(turn, settings, seed) {
    const first = turn.samples.length;
    settings.forEach((one, i) => turn.samples.push(this.sampleWith(one, seed, { name: settings.length > 1 ? "AB"[i] : first ? `again ${first}` : null })));
    const fresh = settings.map((_, i) => first + i);
    turn.shown = first && settings.length === 1 ? [turn.at, first] : fresh;
    turn.at = first;
    this.active = null;
    this.follow = true;
    this.show();
    for (const s of fresh) this.run(turn, s, []);
  }

  again(turn) {
    const { both } = this.knobs;
    this.begin(turn, both.filter(Boolean), Knobs.seedOf(both[0]));
  }

  /** Go on from token i of sample s, which becomes `chosen`: ids with their texts. */
  fork(turn, s, i, chosen) {
    const table = whole(turn.samples, s), forced = [...table.ids.slice(0, i), ...chosen.map(({ id }) => id)];
    const same = firstDifference(forced, table.ids), at = same < 0 ? forced.length : Math.min(same, forced.length);
    const up = emitter(turn.samples, s, at), { with: { seed, sample: noise } } = turn.samples[s];
    const one = { ...this.knobs.both[0], method: "" }, n = turn.samples.filter(({ name }) => name?.startsWith("fork")).length + 1;
    const sample = this.sampleWith(one, seed, { parent: up, at, name: `fork ${n}` });
    sample.with.sample = noise ?? 0;
    for (let k = at; k < forced.length; k++) {
      const { id, text } = chosen[k - i], line = { id, text, branch: FORCED, forced: true, top: k === i ? table.tops[i] : null };
      if (k === i) {
        const known = (table.tops[i] ?? []).find(([other]) => other === id);
        Object.assign(line, { logprob: known?.[2], entropy: table.columns.entropy?.[i], varentropy: table.columns.varentropy?.[i] });
      }
      push(sample, line);
    }
    turn.samples.push(sample);
    turn.shown = [s, turn.samples.length - 1];
    turn.at = turn.samples.length - 1;
    this.toTurn(turn);
    const { most } = this, rest = most - forced.length; // the whole text has as many tokens as it would have had
    return this.run(turn, turn.at, forced, rest > 0 ? rest : most);
  }

  /** Choose what a typed text is made of, and go on from there. */
  async forkByText(turn, s, i, text) {
    const { tokens, token_strs: texts } = await call("/tokenize", { prompt: text, add_special_tokens: false, return_token_strs: true });
    if (tokens.length) await this.fork(turn, s, i, tokens.map((id, k) => ({ id, text: texts[k] })));
  }

  goOn(turn, s) {
    const sample = turn.samples[s];
    sample.finish = null;
    this.run(turn, s, whole(turn.samples, s).ids);
  }

  /** Put a turn in view, with the turns that were last written after it. */
  toTurn(turn) {
    const { conversation } = this, { turns } = conversation;
    if (!turn.rule) turn.chosen = turn.at;
    let leaf = turns.indexOf(turn);
    for (;;) {
      const next = turns.findLastIndex(({ parent, follows }) => parent === leaf && follows === turns[leaf].at);
      if (next < 0) break;
      leaf = next;
    }
    conversation.leaf = leaf;
    this.show();
    this.save();
  }

  /** Show these samples of a turn; the first one given is at hand. */
  choose(turn, s, shown = [s]) {
    turn.at = s;
    turn.shown = shown;
    this.toTurn(turn);
    this.activate(this.panes.find((pane) => pane.turn === turn && pane.sample === s));
  }

  // -- what the server sends --------------------------------------------------------------------

  async run(turn, s, forced, most = this.most) {
    const sample = turn.samples[s], controller = new AbortController(), { conversation } = this;
    Object.assign(sample, { trouble: null, finish: null });
    const rate = { from: 0, tokens: 0, rate: 0 };
    this.running.set(sample, controller);
    this.on.busy(true);
    this.controls(turn);
    try {
      for await (const events of stream(...this.bodyOf(turn, sample, forced, most), controller.signal)) {
        for (const event of events) this.take(turn, s, event, rate);
        this.due();
      }
    } catch (error) {
      if (error.name === "AbortError") sample.finish = "cancelled";
      else {
        sample.trouble = { said: error.message, lost: error instanceof Refused && error.status === 0 };
        sample.finish ??= error instanceof Refused && error.status === 0 ? "cancelled" : "error";
        if (error.status === 401) this.on.key();
        if (!(error instanceof Refused)) console.error(error);
      }
    }
    for (const [one, other] of this.running) if (other === controller) this.running.delete(one);
    for (const pane of this.panes) if (pane.turn === turn) pane.answer.finish = turn.samples[pane.sample].finish;
    this.on.busy(this.busy);
    this.due();
    if (conversation === this.conversation) this.controls(turn);
    this.save(conversation);
  }

  take(turn, s, { entropix, choices = [] }, rate) {
    if (entropix?.prompt_ids) turn.ids = entropix.prompt_ids[0];
    const now = performance.now();
    let fresh = false;
    for (const { entropix: own, finish_reason: finish } of choices) {
      for (const line of own?.lines ?? []) {
        const k = s + (turn.samples[s].with.method ? line.sample ?? 0 : 0);
        while (turn.samples.length <= k) {
          fresh = true;
          const facts = { ...turn.samples[s], at: 0, name: null };
          turn.samples.push(emptySample({ with: { ...facts.with, sample: turn.samples.length - s }, thresholds: facts.thresholds, why: facts.why, at: line.position }));
          this.running.set(turn.samples.at(-1), this.running.get(turn.samples[s]));
          if (turn.shown.length < BESIDE) turn.shown.push(turn.samples.length - 1);
        }
        if (!known.branches.includes(line.branch)) known.branches.push(line.branch);
        push(turn.samples[k], line);
        turn.samples[k].rate = rate.rate;
        const pane = this.made.get(turn.samples[k]);
        if (pane) { push(pane.answer, line); this.measure(pane); }
        rate.tokens++;
      }
      if (own?.group) this.outcome(turn, s, own.group);
      if (finish) turn.samples[s].finish ??= finish;
    }
    if (!rate.from) Object.assign(rate, { from: now, tokens: 0 });
    else if (now - rate.from > 50) rate.rate = 1000 * rate.tokens / (now - rate.from);
    turn.samples[s].rate = rate.rate;
    if (fresh) this.show();
  }

  /** The choice of a group: where each sample forked, how it ended, and which was chosen. */
  outcome(turn, s, { method, rule, chosen, samples, why, votes }) {
    for (const { sample: k, parent, tokens: _, ...facts } of samples) {
      turn.samples[s + k] ??= emptySample({ with: { ...turn.samples[s].with, sample: k }, thresholds: turn.samples[s].thresholds });
      Object.assign(turn.samples[s + k], facts, { parent: parent === null ? null : parent + s });
      this.made.delete(turn.samples[s + k]);
    }
    Object.assign(turn, { method, rule, chosen: s + chosen, said: String(why ?? ""), votes: votes ?? {}, at: s + chosen, shown: [s + chosen] });
    this.show();
  }

  save(conversation = this.conversation) {
    conversation.changed = Date.now();
    clearTimeout(this.keeping);
    this.kept = performance.now();
    this.keeping = setTimeout(() => {
      if (conversation.turns.length) keep(conversation).then(() => this.on.kept(null), this.on.kept);
    }, 150);
  }

  // -- drawing ----------------------------------------------------------------------------------

  measure(pane) {
    for (let i = pane.xs.length; i < pane.answer.ids.length; i++) {
      pane.xs.push(numberAt(pane.answer, "entropy", i));
      pane.ys.push(numberAt(pane.answer, "varentropy", i));
    }
  }

  /** The pane of sample s: its whole text as a table and as a view. It stays the same while the sample grows. */
  paneOf(turn, s) {
    const sample = turn.samples[s];
    if (!this.made.has(sample)) {
      const pane = { turn, choice: turn, sample: s, own: sample, answer: whole(turn.samples, s), plots: [], xs: [], ys: [], text: new TextView("The answer, token by token; the arrow keys move along it, Enter continues from a token"), compared: 0, split: -1 };
      this.measure(pane);
      pane.head = make("div", { class: "head" });
      pane.foot = make("div", { class: "feet" });
      pane.node = make("section", { class: "column" }, pane.head, pane.text.box, pane.foot);
      this.made.set(sample, pane);
    }
    return this.made.get(sample);
  }

  show() {
    const { conversation } = this, held = document.activeElement?.closest?.(".tok")?.dataset.i, holder = this.active;
    this.panes = [];
    this.plots = [];
    this.resized.disconnect();
    const sections = pathOf(conversation).map((t) => this.turnNode(t));
    this.box.replaceChildren(...sections);
    document.body.classList.toggle("empty", !sections.length);
    this.panes.forEach((pane, i) => { pane.node.dataset.pane = i; });
    for (const plot of this.plots) { plot.draw(); this.resized.observe(plot.node); }
    const last = conversation.turns[conversation.leaf];
    const keepIt = holder && this.panes.includes(holder) && (holder.turn !== last || holder.sample === last.at);
    this.activate(keepIt ? holder : this.panes.find((pane) => pane.turn === last && pane.sample === last.at) ?? null);
    if (held !== undefined && holder && this.panes.includes(holder)) holder.text.spans[held]?.focus({ preventScroll: true });
    this.due();
  }

  turnNode(t) {
    const { conversation } = this, turn = conversation.turns[t], others = siblings(conversation, t);
    const to = (by) => make("button", { type: "button", class: "plain", disabled: !others[others.indexOf(t) + by] && others[others.indexOf(t) + by] !== 0, "aria-label": by < 0 ? "the version before" : "the next version", onclick: () => this.toTurn(conversation.turns[others[others.indexOf(t) + by]]) }, by < 0 ? "‹" : "›");
    const versions = others.length > 1 ? make("span", { class: "versions" }, to(-1), `${others.indexOf(t) + 1} of ${others.length}`, to(1)) : null;
    const asked = this.editing === t ? this.editor(t) : make("div", { class: "asked" }, make("div", { class: "said" }, turn.user), make("div", { class: "tools" }, versions,
      make("button", { type: "button", class: "plain", onclick: () => { this.editing = t; this.show(); this.box.querySelector(".editor textarea").focus(); } }, "Edit")));
    const panes = turn.shown.filter((s) => turn.samples[s]).map((s) => this.paneOf(turn, s));
    panes.forEach((pane, k) => {
      if (pane.beside !== panes[k ? 0 : 1]) { pane.beside = panes[k ? 0 : 1]; pane.compared = 0; pane.split = -1; for (const span of pane.text.spans) span.classList.remove("split", "differs"); }
      pane.node.classList.toggle("alone", panes.length === 1);
    });
    this.panes.push(...panes);
    for (const pane of panes) this.dress(pane);
    const panel = this.panels.get(turn) ?? make("div", { class: "panel" });
    this.panels.set(turn, panel);
    this.samplesPanel(turn);
    return make("section", { class: "turn", "aria-label": `Turn ${t + 1}` }, asked, make("div", { class: `columns n${Math.min(panes.length, 4)}` }, ...panes.map(({ node }) => node)), panel);
  }

  editor(t) {
    const turn = this.conversation.turns[t], text = make("textarea", { rows: "3", "aria-label": "Edit the message" }, turn.user);
    const close = () => { this.editing = null; this.show(); };
    const node = make("form", { class: "editor", onsubmit: (event) => { event.preventDefault(); if (text.value.trim()) this.send(text.value, turn.parent); }, onkeydown: (event) => { if (event.key === "Escape") { event.stopPropagation(); close(); } } },
      text, make("div", { class: "buttons" }, make("button", { type: "submit", class: "main" }, "Send"), make("button", { type: "button", onclick: close }, "Cancel")));
    return node;
  }

  /** The table and the tree of a turn's samples. */
  samplesPanel(turn) {
    const panel = this.panels.get(turn);
    if (!panel || panel.contains(document.activeElement) && document.activeElement.matches(".rename")) return;
    const said = turn.said ? make("p", { class: "soft small said" }, turn.said, votesOf(turn)) : "";
    if (turn.samples.length < 2) return panel.replaceChildren(said);
    const pane = { choice: turn, sample: turn.at, shown: turn.shown, plots: [] };
    const node = samplesOf(pane, this.conversation.turns.indexOf(turn), null, (s, name) => { turn.samples[s].name = name; this.dressAll(turn); this.save(); });
    panel.replaceChildren(make("details", { open: panel.querySelector("details")?.open ?? true }, make("summary", {}, `${count(turn.samples.length, "text")} of this prompt`), node, said));
    panel.tree = pane.tree ? { choice: turn, sample: turn.at, text: { spans: [] }, plots: [], tree: pane.tree } : null;
    for (const plot of pane.plots) { plot.draw(); this.plots.push(plot); this.resized.observe(plot.node); }
  }

  /** What stands above and below a text. */
  dress(pane) {
    const { turn, sample: s, own: sample, answer: table } = pane, runs = this.running.has(sample), n = table.ids.length;
    const several = turn.samples.length > 1, title = sample.name ?? (several ? `text ${s + 1}` : "");
    pane.head.replaceChildren(...(several ? [make("b", {}, title), make("span", { class: "soft small" }, sample.why ?? ""),
      ...(turn.shown.length > 1 ? [make("button", { type: "button", class: "plain", "aria-label": `hide ${title}`, onclick: () => { const rest = turn.shown.filter((k) => k !== s); this.choose(turn, rest.includes(turn.at) ? turn.at : rest[0], rest); } }, "×")] : [])] : []));
    const facts = [...(sample.parent === null && sample.at ? [`from token ${sample.at}`] : []), count(n, "token"), ...(n ? [`mean entropy ${short(mean(pane.xs))} nats`] : []), ...(sample.rate ? [`${short(sample.rate)} tokens/s`] : []), ...(sample.finish && !runs ? [`ended by ${sample.finish}`] : [])];
    if (pane.beside && pane.split >= 0) facts.push(pane.split ? `differs from token ${pane.split}` : "differs from the first token");
    const buttons = runs ? [make("button", { type: "button", class: "plain", onclick: () => this.stop(sample) }, "Stop")] : [
      ...(sample.foreign ? [] : [make("button", { type: "button", class: "plain", title: "Another text, with the current settings", onclick: () => this.again(turn) }, "Regenerate")]),
      ...(n && sample.finish !== "stop" && sample.with ? [make("button", { type: "button", class: "plain go-on", onclick: () => this.goOn(turn, s) }, "Continue")] : []),
    ];
    pane.foot.replaceChildren(make("span", { class: "soft small facts" }, runs && !n ? "Reading the prompt…" : facts.join(" · ")), make("span", { class: "tools" }, ...buttons),
      ...(sample.trouble ? [make("p", { class: "error", role: "alert" }, sample.trouble.said, sample.trouble.lost && n ? " The tokens received so far are kept; Continue requests the rest." : "")] : []));
    pane.text.box.setAttribute("aria-busy", String(runs));
  }

  dressAll(turn) { for (const pane of this.panes) if (!turn || pane.turn === turn) this.dress(pane); }

  controls(turn) {
    this.dressAll(turn);
    this.samplesPanel(turn);
  }

  activate(pane) {
    const changed = pane !== this.active;
    this.active = pane;
    for (const one of this.panes) one.node.classList.toggle("active", one === pane);
    this.on.active(pane, changed);
  }

  due() { this.frame ||= requestAnimationFrame(() => this.tick()); }

  tick() {
    this.frame = 0;
    const page = document.scrollingElement, follows = this.follow || (this.busy && page.scrollHeight - page.scrollTop - window.innerHeight < 120);
    this.follow = false;
    let room = BATCH;
    for (const pane of this.panes) {
      const { spans } = pane.text, to = Math.min(pane.answer.ids.length, spans.length + room);
      if (to > spans.length) {
        room -= to - spans.length;
        pane.text.add(pane.answer, to);
        if (this.running.has(pane.own)) this.dressSoon(pane);
        this.on.grown(pane);
      }
      this.compare(pane);
      if (pane.answer.ids.length > spans.length) this.due();
    }
    if (follows) page.scrollTop = page.scrollHeight;
  }

  /** The figures below a text that is written, a few times a second. */
  dressSoon(pane) {
    const now = performance.now();
    if (now - (pane.dressed ?? 0) < 250) return;
    pane.dressed = now;
    const facts = pane.foot.querySelector(".facts");
    if (now - (this.kept ?? now) > 3000 + this.cost) { // a page that is closed in mid-stream is found again
      this.save();
      this.cost = 20 * (performance.now() - now);
    }
    if (facts) facts.textContent = `${count(pane.answer.ids.length, "token")}${pane.own.rate ? ` · ${short(pane.own.rate)} tokens/s` : ""}`;
    const panel = this.panels.get(pane.turn);
    if (panel && pane.turn.samples.length > 1 && now - (panel.drawn ?? 0) > 1000) { panel.drawn = now; this.samplesPanel(pane.turn); }
  }

  /** Mark the tokens in which a text differs from the one beside it. */
  compare(pane) {
    const { beside, text, answer: table } = pane;
    if (!beside || beside.node.parentNode !== pane.node.parentNode || pane.own.with?.method && this.running.has(pane.own)) return;
    const over = !this.running.has(pane.own) && !this.running.has(beside.own);
    const n = Math.min(text.spans.length, over ? text.spans.length : beside.answer.ids.length);
    for (; pane.compared < n; pane.compared++) {
      const i = pane.compared;
      if (table.ids[i] === beside.answer.ids[i]) continue;
      text.spans[i].classList.add("differs");
      if (pane.split < 0) { pane.split = i; text.spans[i].classList.add("split"); this.dress(pane); }
    }
  }

  /** Which branch tokens would take, where it is another: names per token, or null. */
  moved(pane, branches) {
    pane.text.spans.forEach((span, i) => {
      const other = branches?.[i] && branches[i] !== pane.answer.branches[i];
      if (other || span.classList.contains("moved")) { span.className = span.className.replace(/ ?moved/, ""); span.classList.toggle("moved", Boolean(other)); }
    });
  }
}
