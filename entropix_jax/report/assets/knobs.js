// The settings of what is generated next: sampler, preset, knobs, seed, method; two of them where two are compared.

import { count, make, percent, pressed, short, switchOf } from "./dom.js";

const FIRST = /^(temp|temperature|top_k|top_p|min_p|best_of|target.*)$/;
const fresh = () => ({ sampler: null, preset: "", params: {}, seed: "", max_tokens: null, method: "", options: {}, system: "", mode: null });

export class Knobs {
  /** `changed()` is called after each change, `calibrate()` by its button. */
  constructor(box, { changed, calibrate }) {
    Object.assign(this, { box, changed, calibrate, info: null, both: [fresh(), null], side: 0, said: "" });
  }

  get now() { return this.both[this.side]; }
  get mode() { return this.info.chat ? this.both[0].mode ?? "chat" : "text"; }

  use(info) {
    this.info = info;
    this.most = Math.min(256, info.context >> 1);
    for (const one of this.both) if (one && !info.samplers[one.sampler]) Object.assign(one, { sampler: info.sampler, params: {}, preset: "" });
    this.draw();
  }

  /** All knobs of a sampler as they act: defaults, then what the server is configured with, then what is set here. */
  effective(one) {
    const { knobs, params = {} } = this.info.samplers[one.sampler];
    return { ...Object.fromEntries(Object.entries(knobs).map(([name, knob]) => [name, knob.default])), ...params, ...one.params };
  }

  /** The knobs that act otherwise than by default. */
  numbers(one) {
    const { knobs } = this.info.samplers[one.sampler];
    return Object.fromEntries(Object.entries(this.effective(one)).filter(([name, x]) => x !== knobs[name]?.default));
  }

  thresholds(one = this.both[0]) {
    const all = this.effective(one);
    return Object.fromEntries(Object.entries(this.info.samplers[one.sampler].thresholds).map(([axis, steps]) => [axis, Object.fromEntries(Object.keys(steps).map((name) => [name, all[name]]))]));
  }

  /** What a sample keeps of its settings. */
  record(one, seed, sample = 0) {
    return { sampler: one.sampler, params: { ...one.params }, knobs: this.effective(one), seed, sample };
  }

  /** One line that tells two settings apart. */
  static why({ sampler, params, seed }) {
    const knobs = Object.entries(params).map(([name, x]) => `${name} ${typeof x === "number" ? short(x) : JSON.stringify(x)}`);
    return [sampler, ...knobs.slice(0, 3), ...(knobs.length > 3 ? [`and ${knobs.length - 3} more`] : []), `seed ${seed}`].join(", ");
  }

  static seedOf = (one) => (one.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(one.seed));

  set(name, value, side = this.side) {
    const one = this.both[side], knob = this.info.samplers[one.sampler].knobs[name];
    const base = this.info.samplers[one.sampler].params?.[name] ?? knob?.default;
    if (JSON.stringify(value) === JSON.stringify(base)) delete one.params[name];
    else one.params[name] = value;
    this.said = "";
    this.changed();
  }

  toHash() {
    const [a, b] = this.both.map((one) => one && Object.fromEntries(Object.entries(one).filter(([key, x]) => JSON.stringify(x) !== JSON.stringify(fresh()[key]))));
    return `#s=${encodeURIComponent(JSON.stringify(b ? [a, b] : [a]))}`;
  }

  fromHash(hash) {
    if (!hash.startsWith("#s=")) return false;
    try {
      const [a, b] = JSON.parse(decodeURIComponent(hash.slice(3)));
      const plain = (x) => typeof x === "object" && x !== null && !Array.isArray(x);
      const fits = (x, base) => (plain(base) ? plain(x) : base === null ? ["string", "number"].includes(typeof x) : typeof x === typeof base);
      const read = (given) => Object.fromEntries(Object.entries(fresh()).map(([key, base]) => [key, fits(given[key], base) ? given[key] : base]));
      if (!plain(a) || (b && !plain(b))) return false;
      this.both = [read(a), b ? read(b) : null];
      this.side = 0;
      return true;
    } catch {
      return false;
    }
  }

  // -- drawing ----------------------------------------------------------------------------------

  draw() {
    const { info, now: one } = this, about = info.samplers[one.sampler];
    const opened = new Set([...this.box.querySelectorAll("details[open]")].map(({ dataset }) => dataset.name));
    const held = this.box.contains(document.activeElement) && document.activeElement.id;
    const edit = (work) => (event) => { work(event.target.value); this.changed(); };
    const change = (work) => (event) => { work(event.target.value); this.changed(); this.draw(); };
    const option = (value, text, on) => make("option", { value, selected: on }, text);
    const field = (name, control, hint) => make("label", { class: "field" }, make("span", {}, name), control, hint ? make("small", { class: "soft" }, hint) : null);
    const details = (name, ...children) => { const node = make("details", { open: opened.has(name) }, make("summary", {}, name), ...children); node.dataset.name = name; return node; };
    const sides = switchOf(["A", "B"], "AB"[this.side]);
    sides.addEventListener("click", (event) => {
      const side = "AB".indexOf(event.target.value);
      if (side < 0) return;
      if (side === 1) this.both[1] ??= structuredClone(this.both[0]);
      this.side = side;
      this.changed();
      this.draw();
    });
    const single = this.both[1] ? make("button", { type: "button", class: "plain", onclick: () => { this.both[1] = null; this.side = 0; this.changed(); this.draw(); } }, "Stop comparing")
      : make("small", { class: "soft" }, "choose B to compare two settings");
    const presets = Object.entries(info.presets).filter(([, preset]) => info.samplers[preset.sampler]);
    const knobs = Object.entries(about.knobs), steps = new Set(Object.values(about.thresholds).flatMap((axis) => Object.keys(axis)));
    const first = knobs.filter(([name]) => steps.has(name) || FIRST.test(name)), others = knobs.filter((entry) => !first.includes(entry));
    const group = info.groups[one.method];
    this.box.replaceChildren(
      make("div", { class: "title" }, make("h2", {}, "Settings"), sides, single),
      field("sampler", make("select", { id: "sampler", onchange: change((x) => Object.assign(one, { sampler: x, params: {}, preset: "" })) }, ...Object.keys(info.samplers).map((x) => option(x, x, x === one.sampler))), about.about),
      field("preset", make("select", { id: "preset", onchange: change((x) => {
        one.preset = x;
        if (x) Object.assign(one, { sampler: info.presets[x].sampler, params: { ...info.presets[x].knobs } });
        else one.params = {};
      }) }, option("", "as configured", !one.preset), ...presets.map(([name]) => option(name, name, name === one.preset))), info.presets[one.preset]?.about),
      make("div", { class: "knobs" }, ...first.map(([name, knob]) => this.row(name, knob))),
      others.length ? details(`${others.length} more knobs`, make("div", { class: "knobs" }, ...others.map(([name, knob]) => this.row(name, knob)))) : "",
      make("div", { class: "pairs" },
        field("seed", make("input", { id: "seed", type: "number", step: "1", placeholder: "new each time", value: one.seed, onchange: edit((x) => { one.seed = x; }) })),
        field("max tokens", make("input", { id: "most", type: "number", min: "1", step: "1", placeholder: String(this.most), value: String(one.max_tokens ?? ""), onchange: edit((x) => { one.max_tokens = Math.round(Number(x)) > 0 ? Math.round(Number(x)) : null; }) }))),
      field("method", make("select", { id: "method", onchange: change((x) => Object.assign(one, { method: x, options: {} })) }, option("", "none", !one.method), ...Object.keys(info.groups).map((x) => option(x, x, x === one.method))), group?.about),
      ...(group ? [make("div", { class: "knobs" }, ...Object.entries(group.options).map(([name, knob]) => this.row(name, knob, one.options)))] : []),
      details("Prompt",
        info.chat ? field("mode", make("select", { onchange: change((x) => { this.both[0].mode = x; }) }, option("chat", "chat", this.mode === "chat"), option("text", "completion", this.mode === "text"))) : "",
        this.mode === "chat" ? field("system message", make("textarea", { rows: "2", onchange: edit((x) => { this.both[0].system = x; }) }, this.both[0].system)) : make("small", { class: "soft" }, "The model continues your text as it is.")),
      make("div", { class: "buttons" },
        one.sampler === "quadrant" ? make("button", { type: "button", id: "calibrate", onclick: this.calibrate, title: "Fit the thresholds to the texts of this conversation" }, "Calibrate on these texts") : "",
        make("button", { type: "button", onclick: change(() => Object.assign(one, { params: {}, preset: "" })) }, "Reset knobs")),
      make("p", { class: "small soft", role: "status", id: "calibrated" }, this.said));
    if (held) document.getElementById(held)?.focus();
  }

  /** A knob: its name and meaning, a slider where it has a range, and a field for any value. `into`: options of a method. */
  row(name, knob, into = null) {
    const one = this.now, value = into ? into[name] ?? knob.default : this.effective(one)[name];
    const label = make("label", {}, name), mark = () => label.classList.toggle("changed", name in (into ?? one.params));
    const set = (x) => {
      if (into) { into[name] = x; this.changed(); } else this.set(name, x);
      mark();
    };
    mark();
    const id = `knob-${into ? "of-method-" : ""}${name}`, hint = make("small", { class: "soft" }, knob.about ?? "");
    const error = make("small", { class: "error", role: "alert" });
    if (knob.kind === "switch") {
      return make("div", { class: "knob" }, make("label", {}, make("input", { id, type: "checkbox", checked: Boolean(value), onchange: (event) => set(event.target.checked) }), ` ${name}`), hint);
    }
    const off = knob.off && value === knob.default;
    const spelt = off ? "" : typeof value === "object" && value !== null ? JSON.stringify(value) : String(value ?? "");
    const text = make("input", { id, class: "value", value: spelt, placeholder: off ? "off" : "", inputmode: ["number", "integer"].includes(knob.kind) && !knob.quantile ? "decimal" : "text", autocomplete: "off", spellcheck: false });
    const read = () => {
      const raw = text.value.trim();
      if (!raw) return knob.default;
      if (knob.kind === "text") return raw;
      if (knob.kind === "list") { try { return JSON.parse(raw); } catch { throw new Error(`${name} is written as JSON, such as [1, 2].`); } }
      if (knob.quantile && /^q\d+(\.\d+)?$/.test(raw)) return raw;
      const x = Number(raw);
      if (!Number.isFinite(x)) throw new Error(`${name} must be a number${knob.quantile ? " or a quantile such as q50" : ""}.`);
      if (knob.kind === "integer" && !Number.isInteger(x)) throw new Error(`${name} must be a whole number.`);
      if ((knob.least ?? -Infinity) > x || (knob.most ?? Infinity) < x) throw new Error(`${name} must be from ${knob.least ?? "−∞"} to ${knob.most ?? "∞"}.`);
      return x;
    };
    text.addEventListener("change", () => {
      error.textContent = "";
      try { const x = read(); set(x); if (slider) slider.value = String(x); } catch (trouble) { error.textContent = trouble.message; }
    });
    label.htmlFor = id;
    let slider = null;
    if (knob.choices) {
      return make("div", { class: "knob" }, make("label", { for: id }, name), make("select", { id, onchange: (event) => set(event.target.value) },
        ...knob.choices.map((x) => make("option", { value: x, selected: x === value }, x))), hint);
    }
    const parts = [label, text];
    const base = Number(knob.default);
    if (!into && ["number", "integer"].includes(knob.kind) && !knob.off) {
      const top = Math.min(knob.most ?? Infinity, knob.most && knob.most <= 1 ? 1 : Math.max(1, 3 * base, Number(value) || 0));
      slider = make("input", { type: "range", min: String(knob.least ?? Math.min(0, base * 3)), max: String(top), step: knob.kind === "integer" ? "1" : "any", value: String(Number(value)), "aria-label": `${name}, slider` });
      slider.addEventListener("input", () => { text.value = String(knob.kind === "integer" ? Number(slider.value) : Number(Number(slider.value).toPrecision(3))); error.textContent = ""; set(Number(text.value)); });
      parts.push(slider);
    }
    return make("div", { class: "knob", title: knob.about ?? "" }, ...parts, hint, error);
  }

  /** Show thresholds that were found, and use them. */
  calibrated({ knobs, shares, tokens, warning }) {
    Object.assign(this.now.params, knobs);
    this.changed();
    this.said = `Thresholds from ${count(tokens, "token")}: ${Object.entries(shares).map(([name, x]) => `${name} ${percent(x)}`).join(", ")}.${warning ? ` ${warning}` : ""}`;
    this.draw();
    pressed(this.box.querySelector(".switch"), "AB"[this.side]);
  }
}
