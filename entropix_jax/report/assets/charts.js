// Charts of numbers along a text and of tokens in the plane of entropy and varentropy. A plot has draw(), index(event) -> token
// or -1, and mark(i).

/* global uPlot */
import { css, drawing, largest, make, percent, roundTicks, short } from "./dom.js";
import { branchClass, branchIndex, dot, shapeOf } from "./tokens.js";

/** Round places of an axis from 0 to `high` that is drawn by square roots, at least `gap` pixels apart. */
function rootTicks(high, pixels, gap) {
  const all = [0], ticks = [];
  for (let k = -2; k < 7; k++) for (const m of [1, 2, 5]) all.push(m * 10 ** k);
  let last = -Infinity;
  for (const t of all) {
    const at = Math.sqrt(t / high) * pixels;
    if (t <= high && at - last >= gap) { ticks.push(t); last = at; }
  }
  return ticks;
}

const axisOf = (side, props) => ({
  side: { x: 2, y: 3 }[side], scale: side, stroke: () => css("--soft"), font: "11.5px system-ui, 'DejaVu Sans', sans-serif", labelFont: "11.5px system-ui, 'DejaVu Sans', sans-serif",
  grid: { stroke: () => css("--grid"), width: 1 }, ticks: { show: false }, border: { show: side === "x", stroke: () => css("--soft"), width: 1 },
  filter: (_, splits) => splits, values: (_, splits) => splits.map(short), space: side === "x" ? 52 : 24, size: side === "x" ? 22 : 46, gap: 5, labelSize: 16, labelGap: 0, ...props,
});

/** A chart: label, cursor ("bar" or "ring"), options() for uPlot, data(), drawn(u) after each drawing. */
function chart({ label, cursor: kind, options, data, drawn }) {
  const node = make("div", { class: "frame", role: "img", "aria-label": label });
  const cursor = make("div", { class: `cursor ${kind}` });
  const plot = { node, cursor, u: null };
  plot.draw = () => {
    const width = node.clientWidth, height = node.clientHeight;
    if (!width || !height) return;
    if (!plot.u) {
      const given = options();
      plot.u = new uPlot({
        width, height, legend: { show: false }, cursor: { show: false }, padding: [8, 12, 0, 0], ...given,
        hooks: { draw: [(u) => {
          u.ctx.save();
          u.ctx.setTransform(uPlot.pxRatio, 0, 0, uPlot.pxRatio, 0, 0);
          drawn(u);
          u.ctx.restore();
        }] },
      }, data(), node);
      plot.u.over.append(cursor);
    } else {
      if (plot.u.width !== width || plot.u.height !== height) plot.u.setSize({ width, height });
      plot.u.setData(data());
    }
  };
  /** [across, up] of an event, in pixels from the corner of what is plotted. */
  plot.from = (event) => { const { left, top } = plot.u.over.getBoundingClientRect(); return [event.clientX - left, event.clientY - top]; };
  return plot;
}

const boxOfPlot = (u) => {
  const [left, top, width, height] = ["left", "top", "width", "height"].map((side) => u.bbox[side] / uPlot.pxRatio);
  return { left, top, right: left + width, bottom: top + height };
};

/** Dashed lines at the sampler's thresholds. Labels that would touch climb; a line reaches its label. */
function drawThresholds(u, thresholds, upright) {
  const g = u.ctx, box = boxOfPlot(u), axis = upright ? "x" : "y", { min, max } = u.scales[axis];
  const rule = (x0, y0, x1, y1) => { g.beginPath(); g.moveTo(x0, y0); g.lineTo(x1, y1); g.stroke(); };
  g.font = "11.5px system-ui, 'DejaVu Sans', sans-serif";
  g.lineWidth = 1;
  g.strokeStyle = g.fillStyle = css("--soft");
  g.setLineDash([5, 4]);
  const taken = []; // for each level the right end of what is written there
  let lower = { at: Infinity, right: box.right - 2 }; // the label below, for thresholds that lie close
  const labels = []; // written last, over a halo, so that no line crosses them
  for (const [name, raw] of Object.entries(thresholds).sort((a, b) => a[1] - b[1])) {
    const value = Number(raw);
    if (!(value >= min && value <= max)) continue;
    const at = Math.round(u.valToPos(value, axis) + (upright ? box.left : box.top)) + .5;
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
}

const isolated = (values) => values.flatMap((v, i) => (v !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null ? [i] : []));

/**
 * Lines along the text.
 *
 * Args: series() -> [{values, colour, dash}]; options: label, unit, height, axis (whether the tokens are written below), low() and
 * high() of the values, length() of the longest text, thresholds() -> knob -> value.
 */
export function linePlot(series, options) {
  const nulls = (values, n) => Array.from({ length: n }, (_, i) => (Number.isFinite(values[i]) ? values[i] : null));
  let n = 0;
  const plot = chart({
    label: options.label, cursor: "bar",
    data: () => {
      const lines = series();
      n = lines[0].values.length;
      const most = Math.max(1, ...lines.map(({ values }) => values.length));
      return [Array.from({ length: most }, (_, i) => i), ...lines.map(({ values }) => nulls(values, most))];
    },
    options: () => ({
      scales: {
        x: { time: false, range: () => [0, Math.max(1, options.length() - 1)] },
        y: { range: () => { const low = options.low(), high = options.high(); return [low, high > low ? high : low + 1]; } },
      },
      axes: [
        axisOf("x", { grid: { show: false }, incrs: [1, 2, 5].flatMap((m) => [0, 1, 2, 3, 4, 5].map((k) => m * 10 ** k)).sort((a, b) => a - b), label: options.axis ? "generated token" : undefined }),
        axisOf("y", {})],
      series: [{}, ...series().map(({ colour, dash, width, alone }) => ({
        stroke: () => css(`--c${colour}`), width: width ?? 1.6, dash, spanGaps: false,
        fill: alone ? () => `color-mix(in srgb, ${css(`--c${colour}`)} 14%, transparent)` : undefined,
        points: { show: false, filter: (u, k) => isolated(u.data[k]), size: 3 },
      }))],
    }),
    drawn: (u) => drawThresholds(u, options.thresholds?.() ?? {}, false),
  });
  plot.node.style.height = `${options.height}px`;
  plot.index = (event) => (plot.u && n ? Math.max(0, Math.min(n - 1, Math.round(plot.u.posToVal(plot.from(event)[0], "x")))) : -1);
  plot.mark = (i) => {
    const on = i >= 0 && plot.u;
    plot.cursor.style.display = on ? "block" : "none";
    if (on) Object.assign(plot.cursor.style, { left: `${plot.u.valToPos(i, "x") - .75}px`, top: "0", height: "100%" });
  };
  return plot;
}

/**
 * Every token by entropy and varentropy.
 *
 * Args: tokens() -> {xs, ys, branches, names}; limits: x() and y(); thresholds() -> axis -> knob -> value; root() whether the axes
 * are drawn by square roots; drag: optional, drag(knob, value, last), while a threshold is moved and when it stays.
 */
export function scatterPlot(tokens, limits, thresholds, root, drag) {
  const axis = (side) => ({
    time: false, distr: 100, range: () => [0, limits[side]()],
    fwd: (x) => (root() ? Math.sqrt(Math.max(0, x)) : x), bwd: (x) => (root() ? x * x : x),
  });
  const splits = (u, i, low, high) => {
    const pixels = u.bbox[i ? "height" : "width"] / uPlot.pxRatio, gap = i ? 24 : 52;
    return root() ? rootTicks(high, pixels, gap) : roundTicks(high, pixels, gap);
  };
  const grips = new Map();
  const plot = chart({
    label: "every token by entropy in nats (across) and varentropy in nats squared (up)", cursor: "ring",
    data: () => [[0, limits.x()], [0, limits.y()]],
    options: () => ({
      padding: [44, 12, 0, 0], scales: { x: axis("x"), y: axis("y") },
      axes: [axisOf("x", { splits, label: "entropy (nats)" }), axisOf("y", { splits })],
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
    }),
    drawn: (u) => {
      const g = u.ctx, box = boxOfPlot(u), { xs, ys, branches, names } = tokens(), lines = thresholds();
      drawThresholds(u, lines.entropy ?? {}, true);
      drawThresholds(u, lines.varentropy ?? {}, false);
      const r = xs.length > 1500 ? 2.6 : 3.6;
      g.globalAlpha = xs.length > 1500 ? .5 : .72;
      for (const name of names) {
        const outline = shapeOf(name);
        g.fillStyle = css(`--c${branchIndex(name)}`);
        g.beginPath();
        for (let i = 0; i < xs.length; i++) {
          if (branches[i] !== name || !Number.isFinite(xs[i]) || !Number.isFinite(ys[i])) continue;
          const x = box.left + u.valToPos(xs[i], "x"), y = box.top + u.valToPos(ys[i], "y");
          outline.forEach(([a, b], j) => (j ? g.lineTo(x + a * r, y + b * r) : g.moveTo(x + a * r, y + b * r)));
          g.closePath();
        }
        g.fill();
      }
      g.globalAlpha = 1;
      if (drag) placeGrips(u, lines);
    },
  });

  /** Strips over the lines: sliders for the pointer and the keyboard. */
  function placeGrips(u, lines) {
    const wanted = new Set();
    for (const [axis, side] of [["entropy", "x"], ["varentropy", "y"]]) {
      for (const [name, raw] of Object.entries(lines[axis] ?? {})) {
        const value = Number(raw);
        if (!(value >= 0 && value <= u.scales[side].max)) continue;
        wanted.add(name);
        if (!grips.has(name)) {
          const grip = make("div", { class: `grip ${side}`, role: "slider", tabindex: "0", "aria-label": `threshold ${name}`, "aria-valuemin": "0", "aria-orientation": side === "x" ? "horizontal" : "vertical" });
          grip.addEventListener("pointerdown", (event) => { grip.setPointerCapture(event.pointerId); event.preventDefault(); grip.focus(); });
          const move = (event, last) => {
            if (!grip.hasPointerCapture(event.pointerId)) return;
            const [x, y] = plot.from(event), at = plot.u.posToVal(side === "x" ? x : y, side);
            drag(name, Number(Math.max(0, Math.min(plot.u.scales[side].max, at)).toPrecision(3)), last);
          };
          grip.addEventListener("pointermove", (event) => move(event, false));
          grip.addEventListener("pointerup", (event) => move(event, true));
          grip.addEventListener("keydown", (event) => {
            const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[event.key];
            if (!by) return;
            event.preventDefault();
            event.stopPropagation();
            const now = Number(grip.getAttribute("aria-valuenow"));
            drag(name, Number(Math.max(0, now + by * Math.max(.01, now * .05)).toPrecision(3)), true);
          });
          grips.set(name, grip);
          u.over.append(grip);
        }
        const grip = grips.get(name);
        grip.setAttribute("aria-valuenow", String(value));
        grip.style[side === "x" ? "left" : "top"] = `${u.valToPos(value, side)}px`;
      }
    }
    for (const [name, grip] of grips) if (!wanted.has(name)) { grip.remove(); grips.delete(name); }
  }

  plot.index = (event) => {
    if (!plot.u) return -1;
    const [x, y] = plot.from(event), { xs, ys } = tokens();
    let best = -1, least = 26 ** 2;
    for (let i = 0; i < xs.length; i++) {
      const d = (plot.u.valToPos(xs[i], "x") - x) ** 2 + (plot.u.valToPos(ys[i], "y") - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  };
  plot.mark = (i) => {
    const { xs, ys } = tokens(), on = i >= 0 && plot.u && Number.isFinite(xs[i]) && Number.isFinite(ys[i]);
    plot.cursor.style.display = on ? "block" : "none";
    if (on) Object.assign(plot.cursor.style, { left: `${plot.u.valToPos(xs[i], "x")}px`, top: `${plot.u.valToPos(ys[i], "y")}px` });
  };
  return plot;
}

export function figure(plots, plot, title, ...extra) {
  plots.push(plot);
  return make("figure", {}, make("figcaption", {}, make("h3", {}, title), ...extra), plot.node);
}

export const lineKey = (series) => series.map((s) => make("span", { class: `line b${s.colour}` },
  drawing(22, 8, "line", { x1: 0, y1: 4, x2: 22, y2: 4, "stroke-dasharray": (s.dash || []).join(" ") }), s.name));

/** Limits of the plane that hold all tokens and all thresholds. */
export const planeLimits = (texts, thresholds) => ({
  x: () => 1.06 * largest([...texts().flatMap(({ xs }) => xs), ...Object.values(thresholds().entropy ?? {}).map(Number)], 1),
  y: () => 1.1 * largest([...texts().flatMap(({ ys }) => ys), ...Object.values(thresholds().varentropy ?? {}).map(Number)], 1),
});

/** How often each branch was taken, as a bar and a table; further columns: {title: share of a branch}. */
export function sharesOf(branches, names, further = {}) {
  const n = branches.length, counts = new Map(names.map((name) => [name, 0]));
  for (const name of branches) counts.set(name, (counts.get(name) ?? 0) + 1);
  const bar = make("div", { class: "share", "aria-hidden": "true" });
  for (const [name, number] of counts) {
    if (!number) continue;
    const part = make("span", { class: branchClass(name) });
    part.style.flex = `${number} 0 0`;
    bar.append(part);
  }
  const titles = Object.keys(further);
  const head = make("tr", {}, ...["branch", "tokens", "share", ...titles].map((t) => make("th", {}, t)));
  const rows = [...counts].map(([name, number]) => {
    const row = make("tr", { class: "branch-row" }, make("td", {}, dot(name), name), make("td", {}, String(number)), make("td", {}, percent(n ? number / n : 0)),
      ...titles.map((title) => make("td", {}, percent(further[title][name] || 0))));
    row.dataset.branch = name;
    row.dataset.count = number;
    return row;
  });
  return [bar, make("table", { class: "shares" }, head, ...rows)];
}
