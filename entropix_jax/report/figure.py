"""Figures of traces for papers: scatter, timeline and tree, drawn by matplotlib as PNG at 300 dpi.

Why: panels and letters have one size in inches, whatever the number of traces; more traces make more rows.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

from entropix_jax.errors import UserError
from entropix_jax.report import COLOURS as RAMP
from entropix_jax.report import PALE, step
from entropix_jax.report.page import STEPS, UNITS
from entropix_jax.report.reader import lineage, match, opened

# The first eight are Okabe and Ito's, which every kind of colour vision can tell apart; markers tell all
# twelve apart in print. Three samplers side by side have twelve branches.
COLOURS = (
  "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #7f7f7f #b8a900 #4b3fb0 #7a1f3d #117777 #5b3a1e"
).split()
MARKERS = "o^sDvPX*<>dh"
# Finish of a sample -> the marker at its end in the tree figure, and whether it is filled.
ENDS = {
  "stop": ("o", True),
  "length": (">", True),
  "uncertain": ("D", True),
  "cancelled": ("o", False),
  "pruned": ("x", True),
  "budget": ("s", False),
}
SHADES = (PALE, *RAMP[1:])  # most tokens are certain; pale, they leave the others visible
LONG = 400  # tokens; longer texts get a timeline as wide as the figure


def _figure(width: float, height: float):
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError('--png needs matplotlib; install it with: pip install -e ".[viz]"') from None
  return Figure(figsize=(width, height), dpi=300, layout="constrained")


def _png(figure) -> bytes:
  for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
    text.set_parse_math(False)  # a name with dollar signs is not a formula
  figure.draw_without_rendering()  # now the places of the thresholds are known
  for ax in figure.axes:
    for i, gap in ((0, 13), (1, 7)):  # names above the frame are rotated, those beside it are not
      last = -math.inf
      for note in sorted((n for n in ax.texts if n.get_gid() == "xy"[i]), key=lambda n: n.xy[i]):
        at = ax.transData.transform(note.xy)[i] * 72 / figure.dpi
        place = list(note.xyann)
        place[i] += max(0.0, last + gap - at)
        last, note.xyann = at + place[i], tuple(place)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _thresholds(ax, axis: str, knobs: dict[str, Any], most: float = math.inf) -> None:
  """Dashed lines at thresholds up to `most` on the axis "x" or "y", with their names outside the frame."""
  for knob, value in ((knob, float(value)) for knob, value in knobs.items()):
    if value <= most:
      (ax.axvline if axis == "x" else ax.axhline)(value, color="0.55", lw=0.6, ls="--", zorder=0)
      xy, coords = (
        ((value, 1), ("data", "axes fraction"))
        if axis == "x"
        else ((1, value), ("axes fraction", "data"))
      )
      ax.annotate(knob, xy, xycoords=coords, xytext=(0, 2) if axis == "x" else (3, 0), textcoords="offset points",
                  rotation=35 if axis == "x" else 0, va="bottom" if axis == "x" else "center", gid=axis,
                  fontsize=6, color="0.35", annotation_clip=False)  # fmt: skip


def _title(run: dict, title: str, inches: float, more: str = "") -> str:
  """Title and sampler of a run, without its beginning where that is too long for so many inches at 8 points."""
  text, most = f"{title} ({run['header']['sampler']['name']}){more}", int(inches / 0.068)
  return text if len(text) <= most else f"…{text[1 - most :]}"


def _style(runs: Sequence[dict]) -> dict[str, tuple[str, str]]:
  """Branch name -> (colour, marker), for the branches of all runs."""
  branches = dict.fromkeys(name for run in runs for name in run["header"]["branches"])
  return {
    name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(branches)
  }


def _points(run: dict) -> list[tuple[str, float, float]]:
  """(branch, entropy, varentropy) of every token; of several samples only the chosen one counts."""
  tables = (opened(run, p) for p in range(len(run["answers"])))
  return [
    (branch, float(x), float(y))
    for a in tables
    if a["ids"]
    for branch, x, y in zip(
      a["branches"], a["columns"]["entropy"], a["columns"]["varentropy"], strict=True
    )
  ]


def scatter(runs: Sequence[dict], titles: Sequence[str]) -> bytes:
  """Every token of each run by entropy and varentropy, three runs in a row at most, as a PNG at 300 dpi."""
  rows = math.ceil(len(runs) / 3)
  columns = math.ceil(len(runs) / rows)
  figure = _figure(3.6 * columns, 4.0 * rows)
  style = _style(runs)
  cells = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
  far = {"entropy": [1.0], "varentropy": [1.0]}
  for ax in cells[len(runs) :]:
    ax.remove()
  for ax, run, title in zip(cells, runs, titles, strict=False):
    points = _points(run)
    for name in run["header"]["branches"]:
      own = [(x, y) for branch, x, y in points if branch == name]
      if own:
        colour, marker = style[name]
        label = f"{name} {100 * len(own) / len(points):.0f}%"
        x, y = zip(*own, strict=True)
        ax.scatter(x, y, s=9, c=colour, marker=marker, alpha=0.65, lw=0, label=label)
        far["entropy"] += filter(math.isfinite, x)
        far["varentropy"] += filter(math.isfinite, y)
    for axis, signal in zip("xy", far, strict=True):
      _thresholds(ax, axis, run["thresholds"][signal])
      far[signal] += map(float, run["thresholds"][signal].values())
    ax.set_title(_title(run, title, 3.4), fontsize=8, pad=26 if run["thresholds"]["entropy"] else 6)
    ax.set_xlabel("entropy (nats)", fontsize=8)
    ax.set_ylabel("varentropy (nats²)", fontsize=8)
    ax.tick_params(labelsize=7, labelbottom=True, labelleft=True)
    if points:
      longest = max(map(len, ax.get_legend_handles_labels()[1]))
      below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
      below["ncols"] = max(1, min(3, int(3.4 / (0.3 + 0.06 * longest))))
      ax.legend(fontsize=7, edgecolor="none", handletextpad=0.1, markerscale=1.4, **below)
  ax = cells[0]
  # Most tokens are near zero: a square-root scale spreads them out and still shows zero.
  ax.set_xscale("function", functions=(_root, _square))
  ax.set_yscale("function", functions=(_root, _square))
  for ticks, limit, axis in (
    (ax.set_xticks, ax.set_xlim, "entropy"),
    (ax.set_yticks, ax.set_ylim, "varentropy"),
  ):
    top = 1.08 * max(far[axis])
    at = [t for t in _TICKS if t <= top]
    ticks(at, [f"{t:g}" for t in at])
    limit(0, top)
  return _png(figure)


_TICKS = (0, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50, 100)


def _root(x):
  return abs(x) ** 0.5


def _square(x):
  return x**2


def timeline(runs: Sequence[dict], titles: Sequence[str], prompt: int = 0) -> bytes:
  """Entropy and varentropy along the answers to one prompt of `match`, as a PNG at 300 dpi."""
  members = match(runs)[prompt]["members"]
  tables = [opened(runs[r], p)["columns"] for r, p in members]
  longest = max((len(column) for table in tables for column in table.values()), default=0)
  columns = 2 if len(members) > 3 and longest <= LONG else 1
  width = 7.2 if columns == 1 and longest <= LONG else 10.8
  rows = math.ceil(len(members) / columns)
  figure = _figure(width, 2.6 * rows)
  cells = figure.subplots(2 * rows, columns, squeeze=False, sharex=True)
  top = {
    name: max([1e-9, *(y for t in tables for x in t.get(name, ()) if math.isfinite(y := float(x)))])
    for name in STEPS
  }
  for i, ((r, _), table) in enumerate(zip(members, tables, strict=True)):
    pair = cells[2 * (i // columns) :, i % columns][:2]
    for ax, name, colour in zip(pair, STEPS, COLOURS[:4:3], strict=True):
      y = [float(x) for x in table.get(name, ())]
      ax.plot(y, color=colour, lw=0.8)
      ax.fill_between(range(len(y)), y, color=colour, alpha=0.15, lw=0)
      ax.set_ylim(
        0, 1.06 * top[name]
      )  # one scale for all runs; thresholds above it are not visible
      _thresholds(ax, "y", runs[r]["thresholds"][name], 1.06 * top[name])
      ax.margins(x=0.01)
      ax.set_ylabel(f"{name}\n({UNITS[name]})", fontsize=7)
      ax.tick_params(labelsize=7)
    pair[0].set_title(_title(runs[r], titles[r], width / columns - 0.8), fontsize=8)
    pair[1].tick_params(labelbottom=True)
    pair[1].set_xlabel("generated token", fontsize=8)
  for ax in cells[-2:, 1:].ravel() if len(members) % columns else ():
    ax.remove()
  return _png(figure)


def rank(samples: Sequence[dict]) -> list[int]:
  """The samples from top to bottom: below a parent, later forks come first, so that no lines cross."""
  order: list[int] = []
  stack = [s for s in reversed(range(len(samples))) if samples[s]["parent"] is None]
  while stack:
    order.append(s := stack.pop())
    children = [c for c in range(len(samples)) if samples[c]["parent"] == s]
    stack += sorted(children, key=lambda c: (samples[c]["at"], -c))
  return order


def _grow(ax, answer: dict) -> dict[str, Any]:
  """Draw an answer's samples as a tree; returns finish -> the artist of its marker, for the legend."""
  samples, ends = answer["samples"], {}
  kept = dict(lineage(samples, answer["chosen"]))
  row = {s: i for i, s in enumerate(rank(samples))}
  for s, sample in enumerate(samples):
    y, at, n = row[s], sample["at"], len(sample["ids"])
    if sample["parent"] is not None:
      ax.vlines(at, row[sample["parent"]], y, color="0.6", lw=1.8 if s in kept else 0.6, zorder=1)
    shades = [SHADES[step(float(x))] for x in sample["columns"].get("entropy", ())]
    turn = kept.get(s, 0)  # its tokens from here on are not in the chosen text
    for lw, a, b in ((5.0, 0, turn), (2.4, turn, n)):
      ax.hlines(y, at + a, at + b, color="0.55", lw=lw + 0.8, zorder=2)
      x = range(at + a, at + b)
      # With antialiasing, the rim would show between the tokens.
      ax.hlines(
        [y] * len(x), x, [t + 1 for t in x], color=shades[a:b], lw=lw, zorder=3, antialiased=False
      )
    finish = sample["finish"] or "not ended"
    marker, filled = ENDS.get(finish, ("^", False))
    (ends[finish],) = ax.plot(at + n, y, marker, color="0.25", mfc="0.25" if filled else "white",
                              ms=4.5, ls="none", zorder=4)  # fmt: skip
    ax.annotate(str(s), (at + n, y), xytext=(6, 0), textcoords="offset points", va="center",
                fontsize=6, weight="bold" if s == answer["chosen"] else "normal")  # fmt: skip
  ax.set_ylim(len(samples) - 0.4, -0.6)
  return ends


def tree(runs: Sequence[dict], titles: Sequence[str], prompt: int = 0) -> bytes | None:
  """How the samples of one prompt of `match` forked, as a PNG at 300 dpi; None if none forked."""
  members = [
    (runs[r], titles[r], runs[r]["answers"][p])
    for r, p in match(runs)[prompt]["members"]
    if any(sample["parent"] is not None for sample in runs[r]["answers"][p]["samples"])
  ]
  if not members:
    return None
  columns = 2 if len(members) > 2 else 1
  width = 7.2 if columns == 1 else 10.8
  sizes = [0.6 + 0.16 * len(answer["samples"]) for *_, answer in members]
  heights = [max(sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
  figure = _figure(width, sum(heights) + 0.7)
  cells = figure.subplots(
    len(heights), columns, squeeze=False, sharex=True, height_ratios=heights
  ).ravel()
  ends: dict[str, Any] = {}
  for ax in cells[len(members) :]:
    ax.remove()
  for ax, (run, title, answer) in zip(cells, members, strict=False):
    ends |= _grow(ax, answer)
    more = f", {answer['method']}, {answer['rule']}"
    ax.set_title(_title(run, title, width / columns - 0.4, more), fontsize=8)
    ax.set_yticks([])
    ax.tick_params(labelsize=7, labelbottom=True)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.margins(x=0.04)
  for ax in cells[: len(members)][-columns:]:
    ax.set_xlabel("generated token", fontsize=8)
  bounds = STEPS["entropy"]
  words = [*(f"≤ {bound:g}" for bound in bounds), f"> {bounds[-1]:g} nats"]
  boxes = [cells[0].fill([], [], fc=shade, ec="0.55", lw=0.5)[0] for shade in SHADES]
  style = {"fontsize": 6.5, "edgecolor": "none", "handlelength": 1.2, "columnspacing": 1.2}
  figure.legend(list(ends.values()), list(ends), loc="outside lower left", ncols=3, **style)
  figure.legend(boxes, words, loc="outside lower right", ncols=6, **style)
  return _png(figure)
