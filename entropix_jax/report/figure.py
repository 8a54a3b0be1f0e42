"""Figures of traces for papers: scatter, timeline and tree, drawn by matplotlib as PNG at 300 dpi."""

import io
import math
from collections.abc import Sequence
from typing import Any

from entropix_jax.errors import UserError
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
# Colours of the entropy steps, the same as the page's in light mode.
SHADES = "#ffffff #fdf1cf #fbd88a #f2a541 #b8560f #6e2405".split()


def _figure(width: float, height: float):
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError('--png needs matplotlib; install it with: pip install -e ".[viz]"') from None
  return Figure(figsize=(width, height), dpi=300, layout="constrained")


def _png(figure) -> bytes:
  for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
    text.set_parse_math(False)  # a name with dollar signs is not a formula
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


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
  """Every token of each run by entropy and varentropy, as a PNG at 300 dpi."""
  figure = _figure(3.6 * len(runs), 4.0)
  style = _style(runs)
  cells = figure.subplots(1, len(runs), squeeze=False, sharex=True, sharey=True)[0]
  far = {"entropy": [1.0], "varentropy": [1.0]}
  for ax, run, title in zip(cells, runs, titles, strict=True):
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
    for axis, draw in (("entropy", ax.axvline), ("varentropy", ax.axhline)):
      for knob, value in run["thresholds"][axis].items():
        draw(float(value), color="0.55", lw=0.6, ls="--", zorder=0)
        far[axis].append(float(value))
        words = {"fontsize": 5, "color": "0.4", "annotation_clip": False}
        if axis == "entropy":  # above the frame and rotated, so that close labels do not touch
          ax.annotate(knob, (float(value), 1), xycoords=("data", "axes fraction"), rotation=35,
                      xytext=(0, 2), textcoords="offset points", **words)  # fmt: skip
        else:
          ax.annotate(knob, (1, float(value)), xycoords=("axes fraction", "data"), ha="right",
                      xytext=(-2, 1), textcoords="offset points", **words)  # fmt: skip
    ax.set_title(f"{title} ({run['header']['sampler']['name']})", fontsize=8, pad=24)
    ax.set_xlabel("entropy (nats)", fontsize=8)
    ax.tick_params(labelsize=7)
    if points:
      below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
      ax.legend(fontsize=7, edgecolor="none", handletextpad=0.1, markerscale=1.4, **below)
  ax = cells[0]
  ax.set_ylabel("varentropy (nats²)", fontsize=8)
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
  figure = _figure(7.2, 2.6 * len(members))
  cells = figure.subplots(2 * len(members), 1, squeeze=False, sharex=True)[:, 0]
  top = dict.fromkeys(STEPS, 1e-9)
  for i, (r, p) in enumerate(members):
    columns = opened(runs[r], p)["columns"]
    for ax, name, colour in zip(cells[2 * i :], STEPS, COLOURS[:4:3], strict=False):
      y = [float(x) for x in columns.get(name, ())]
      ax.plot(y, color=colour, lw=0.8)
      ax.fill_between(range(len(y)), y, color=colour, alpha=0.15, lw=0)
      for value in runs[r]["thresholds"][name].values():
        ax.axhline(float(value), color="0.55", lw=0.6, ls="--", zorder=0)
      top[name] = max([top[name], *filter(math.isfinite, y)])
      ax.margins(x=0.01)
      ax.set_ylabel(f"{name}\n({UNITS[name]})", fontsize=7)
      ax.tick_params(labelsize=7)
    cells[2 * i].set_title(f"{titles[r]} ({runs[r]['header']['sampler']['name']})", fontsize=8)
  for i, ax in enumerate(cells):  # one scale for all runs; thresholds above it are not visible
    ax.set_ylim(0, 1.06 * top[list(STEPS)[i % 2]])
  cells[-1].set_xlabel("generated token", fontsize=8)
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


def _shade(entropy: float) -> str:
  return next(
    (c for c, b in zip(SHADES, STEPS["entropy"], strict=False) if entropy <= b), SHADES[-1]
  )


def _grow(ax, answer: dict) -> dict[str, Any]:
  """Draw an answer's samples as a tree; returns finish -> the artist of its marker, for the legend."""
  samples, ends = answer["samples"], {}
  kept = dict(lineage(samples, answer["chosen"]))
  row = {s: i for i, s in enumerate(rank(samples))}
  for s, sample in enumerate(samples):
    y, at, n = row[s], sample["at"], len(sample["ids"])
    if sample["parent"] is not None:
      ax.vlines(at, row[sample["parent"]], y, color="0.6", lw=1.8 if s in kept else 0.6, zorder=1)
    shades = [_shade(float(x)) for x in sample["columns"].get("entropy", ())]
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
    (f"{titles[r]} ({runs[r]['header']['sampler']['name']})", runs[r]["answers"][p])
    for r, p in match(runs)[prompt]["members"]
    if any(sample["parent"] is not None for sample in runs[r]["answers"][p]["samples"])
  ]
  if not members:
    return None
  heights = [0.6 + 0.16 * len(answer["samples"]) for _, answer in members]
  figure = _figure(7.2, sum(heights) + 0.7)
  cells = figure.subplots(len(members), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
  ends: dict[str, Any] = {}
  for ax, (title, answer) in zip(cells, members, strict=True):
    ends |= _grow(ax, answer)
    ax.set_title(f"{title}, {answer['method']}, {answer['rule']}", fontsize=8)
    ax.set_yticks([])
    ax.tick_params(labelsize=7)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.margins(x=0.04)
  cells[-1].set_xlabel("generated token", fontsize=8)
  bounds = STEPS["entropy"]
  words = [*(f"≤ {bound:g}" for bound in bounds), f"> {bounds[-1]:g} nats"]
  boxes = [cells[0].fill([], [], fc=shade, ec="0.55", lw=0.5)[0] for shade in SHADES]
  style = {"fontsize": 6.5, "edgecolor": "none", "handlelength": 1.2, "columnspacing": 1.2}
  figure.legend(list(ends.values()), list(ends), loc="outside lower left", ncols=3, **style)
  figure.legend(boxes, words, loc="outside lower right", ncols=6, **style)
  return _png(figure)
