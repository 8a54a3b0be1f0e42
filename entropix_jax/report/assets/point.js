// The token at hand: what the pointer or the keyboard is at is told in the tip and marked in its text, its charts and its tree.

import { besidePointer, boxOf, emitter, placeTip, tipOf, whole } from "./tokens.js";

/** Whether somebody walks along a text with the keyboard, whom the pointer must not disturb. */
const byKeys = () => Boolean(document.activeElement?.matches(":is(.tok, .tree, .grip):focus-visible"));

export class Pointing {
  /**
   * `on`: paneOf(node) -> what is drawn there, {choice: {samples}, sample: the one shown, answer: its table, text, plots, tree} or
   * undefined; about(pane, s, i) -> the options of tipOf; choose(pane, s); open(pane, i): optional, a token is entered; quiet():
   * optional, whether nothing may be told.
   */
  constructor(on) {
    Object.assign(this, { on, tip: document.getElementById("tip"), now: null });
    for (const name of ["pointermove", "pointerdown"]) document.addEventListener(name, (event) => this.over(event));
    document.addEventListener("focusin", (event) => this.enter(event));
    document.addEventListener("focusout", () => this.hide());
    document.addEventListener("scroll", () => { if (!byKeys()) this.hide(); }, { passive: true });
  }

  /** Mark the token wherever it is drawn. */
  mark() {
    if (!this.now) return;
    const { pane, s, i, own } = this.now;
    pane.text.spans[own]?.classList.add("on");
    for (const plot of pane.plots) plot.mark(own);
    pane.tree?.show(s, i);
  }

  unmark() {
    if (!this.now) return;
    const { pane, own } = this.now;
    pane.text.spans[own]?.classList.remove("on");
    for (const plot of pane.plots) plot.mark(-1);
    pane.tree?.show(0, -1);
  }

  hide() {
    this.unmark();
    this.now = null;
    this.tip.hidden = true;
  }

  /** Tell of token i of sample s, with the words around it where it is found in a tree; `near` is what the tip must not cover. */
  tell(pane, s, i, near, around = false) {
    if (i < 0) return this.hide();
    const { now, on } = this, { samples } = pane.choice;
    const own = i < pane.text.spans.length && emitter(samples, s, i) === emitter(samples, pane.sample, i) ? i : -1;
    const fresh = !now || now.pane !== pane || now.s !== s || now.i !== i || now.around !== around;
    this.unmark();
    this.now = { pane, s, i, own, around };
    this.mark();
    if (fresh) this.tip.replaceChildren(...tipOf(s === pane.sample && pane.answer ? pane.answer : whole(samples, s), i, { ...on.about(pane, s, i), around }));
    this.tip.hidden = false;
    placeTip(this.tip, near);
  }

  /** Bring the token into sight within its own box only: the page under the pointer must stay where it is. */
  reveal() {
    const { box, spans } = this.now?.pane.text ?? {}, span = spans?.[this.now.own];
    if (!span) return;
    const top = span.offsetTop;
    if (top < box.scrollTop || top + span.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  }

  over(event) {
    const { on } = this, node = event.target.closest?.(".tok, .frame, .tree"), pane = node && on.paneOf(node);
    if (on.quiet?.()) return;
    const found = pane && node.matches(".tree") ? pane.tree.find(event) : null, plot = pane?.plots.find((one) => one.node === node && one.index);
    if (pane && node.matches(".tok") && !(on.open && event.pointerType === "touch")) {
      return this.tell(pane, pane.sample, Number(node.dataset.i), boxOf(node, event.clientY));
    }
    if (found || plot) {
      this.tell(pane, found ? found.s : pane.sample, found ? found.i : plot.index(event), besidePointer(event), Boolean(found));
      return this.reveal();
    }
    if (event.type === "pointerdown" || (event.pointerType !== "touch" && !byKeys())) this.hide();
  }

  /** Where the keyboard enters a text or a tree. */
  enter({ target }) {
    const pane = byKeys() && !this.on.quiet?.() ? this.on.paneOf(target) : null;
    if (!pane) return;
    if (target.matches(".tok")) return this.tell(pane, pane.sample, Number(target.dataset.i), boxOf(target, -1));
    const { at, ids } = pane.choice.samples[pane.sample], n = at + ids.length;
    if (target.matches(".tree") && n && this.now?.pane !== pane) this.walk(pane, { s: pane.sample, i: Math.min(at, n - 1) });
  }

  walk(pane, { s, i }) {
    this.tell(pane, s, i, pane.tree.boxOf(s, i), true);
    this.reveal();
  }

  /** A key in a text or a tree. */
  key(event) {
    if (event.key === "Escape") return this.hide();
    const node = event.target.closest?.(".tok, .tree"), pane = node && this.on.paneOf(node);
    if (!pane) return;
    const enters = ["Enter", " "].includes(event.key), inTree = node.matches(".tree");
    const here = this.now?.pane === pane ? this.now : { s: pane.sample, i: -1 };
    const found = inTree ? pane.tree.next(event.key, here.s, here.i) : null, i = inTree ? -1 : pane.text.next(event.key);
    if (!found && i < 0 && !(enters && (inTree || this.on.open))) return;
    event.preventDefault();
    if (enters) return inTree ? this.on.choose(pane, here.s) : this.on.open(pane, Number(node.dataset.i));
    if (inTree) this.walk(pane, found);
    else pane.text.focus(i);
  }
}
