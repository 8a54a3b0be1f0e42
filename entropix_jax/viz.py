"""Traces as one web page to look at, and as figures to print.

  python -m entropix_jax.viz TRACE.jsonl [MORE.jsonl ...] -o report.html
  python -m entropix_jax.viz TRACE.jsonl --png PREFIX     PREFIX-scatter.png, PREFIX-timeline.png,
                                                          and PREFIX-tree.png where samples forked

Why: the page holds every number of the traces as JSON and draws them where it is opened, so it needs
no network and cannot show what was not measured. Nothing here knows a sampler: branches, knobs and
statistics are those that a trace names. Importing this starts no JAX.
"""

import argparse
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.report import ENTROPY_STEPS

ASSETS = Path(__file__).parent / "assets" / "viz"

# Upper bounds of all colour steps but the last.
STEPS = {"entropy": ENTROPY_STEPS, "varentropy": (0.05, 0.3, 1.0, 2.5, 5.0)}
# Knobs that split an axis, whichever sampler has them.
THRESHOLDS = {
  "entropy": ("low_ent", "ask_ent", "high_ent"),
  "varentropy": ("low_varent", "high_varent"),
}
UNITS = {
  "logprob": "nats",
  "logprob_law": "nats",
  "entropy": "nats",
  "varentropy": "nats²",
  "self_certainty": "nats",
  "confidence": "nats",
  "gap": "0 to 1",
}
ATTENTION = {
  "attn_ent": "nats",
  "score_mag": "nats",
  "attn_varent": "nats²",
  "attn_spread": "nats²",
  "attn_ent_norm": "0 to 1",
  "head_dispersion": "0 to 1",
  "agreement": "0 to 1",
}

# The first eight are Okabe and Ito's, told apart by every kind of colour vision; shapes tell all twelve
# apart in print. Three samplers side by side have twelve branches.
COLOURS = (
  "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #7f7f7f #b8a900 #4b3fb0 #7a1f3d #117777 #5b3a1e"
).split()
MARKERS = "o^sDvPX*<>dh"
# How a sample's line ends in the figure of a tree: marker, and whether it is filled.
ENDS = {
  "stop": ("o", True),
  "length": (">", True),
  "uncertain": ("D", True),
  "cancelled": ("o", False),
  "pruned": ("x", True),
  "budget": ("s", False),
}
# Of the steps of entropy; the page's on a light screen.
SHADES = "#ffffff #fdf1cf #fbd88a #f2a541 #b8560f #6e2405".split()
_NEEDED = ("prompt", "position", "id", "text", "branch", "entropy", "varentropy")
_ENTRY = ("parent", "at", "tokens", "finish", "score", "answer")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def _row(line: str) -> dict[str, Any] | None:
  """The JSON object of a line, or None; numbers that are not finite become their names."""
  try:
    row = json.loads(line, parse_constant=str)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) else None


def _is_header(row: dict[str, Any] | None) -> bool:
  if not row or not isinstance(row.get("sampler"), dict) or "name" not in row["sampler"]:
    return False
  branches, prompts = row.get("branches"), row.get("prompts")
  return (
    isinstance(branches, list)
    and all(isinstance(name, str) for name in branches)
    and isinstance(prompts, list)
    and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in prompts)
  )


def _is_number(x: Any) -> bool:
  return (isinstance(x, int | float) and not isinstance(x, bool)) or x in _NOT_FINITE


def _is_index(x: Any, n: int) -> bool:
  return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < n


def _sample(**facts: Any) -> dict[str, Any]:
  """A sample without its tokens; what is not said of it is what a prompt's only one has."""
  empty = {"ids": [], "texts": [], "branches": [], "tops": [], "columns": {}}
  return {"parent": None, "at": 0, "finish": None, "score": None, "answer": None} | facts | empty


def _choice_fault(choice: Any, answers: Sequence[dict]) -> str | None:
  """What is wrong with the line that tells of a prompt's samples, or None."""
  entries = choice.get("samples") if isinstance(choice, dict) else None
  if not entries or not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
    return "tells of no samples"
  prompt = choice.get("prompt")
  if not _is_index(prompt, len(answers)):
    return f"tells of prompt {prompt!r}, but the header has {len(answers)}"
  if "method" in answers[prompt]:
    return f"tells of prompt {prompt} once more"
  found = {e.get("sample"): e for e in entries if _is_index(e.get("sample"), len(entries))}
  if len(found) != len(entries):
    return f"does not number its samples from 0 to {len(entries) - 1}"
  if not _is_index(choice.get("chosen"), len(entries)):
    return f"chose sample {choice.get('chosen')!r} of {len(entries)}"
  for s, entry in sorted(found.items()):
    missing = [name for name in _ENTRY if name not in entry]
    if missing:
      return f"lacks {', '.join(missing)} of sample {s}"
    if not _is_index(entry["tokens"], sys.maxsize):
      return f"gives sample {s} {entry['tokens']!r} tokens"
    parent, at = entry["parent"], entry["at"]
    if parent is not None and not _is_index(parent, s):
      return f"gives sample {s} the parent {parent!r}, which is no sample before it"
    first = 0 if parent is None else found[parent]["at"]
    last = 0 if parent is None else first + found[parent]["tokens"]
    if not _is_index(at, last + 1) or at < first:
      where = "the text begins" if parent is None else f"its parent goes from {first} to {last}"
      return f"lets sample {s} begin at {at!r}, where {where}"
    wrong = [name for name in ("finish", "answer") if not isinstance(entry[name], str | None)]
    wrong += [] if entry["score"] is None or _is_number(entry["score"]) else ["score"]
    if wrong:
      return f"has no {', '.join(wrong)} of sample {s} that could be read"
  wrong = [name for name in ("method", "rule") if not isinstance(choice.get(name), str)]
  return f"lacks {', '.join(wrong)}" if wrong else None


def _fault(row: dict[str, Any], branches: Sequence[str], answers: Sequence[dict]) -> str | None:
  """What is wrong with a token's line, or None."""
  missing = [name for name in _NEEDED if name not in row]
  if missing:
    return f"lacks {', '.join(missing)}"
  if row["branch"] not in branches:
    return f"names the branch {row['branch']!r}, which the header does not"
  if not _is_index(row["prompt"], len(answers)):
    return f"belongs to prompt {row['prompt']!r}, but the header has {len(answers)}"
  samples, s = answers[row["prompt"]]["samples"], row.get("sample", 0)
  if not _is_index(s, len(samples)):
    return f"belongs to sample {s!r}, but prompt {row['prompt']} has {len(samples)}"
  due = samples[s]["at"] + len(samples[s]["ids"])
  if row["position"] != due:
    return f"has position {row['position']!r} where {due} is due"
  wrong = [name for name in ("entropy", "varentropy") if not _is_number(row[name])]
  return (
    f"has no number for {', '.join(wrong)}" if wrong or not isinstance(row["text"], str) else None
  )


def read(path: str | Path) -> dict[str, Any]:
  """A trace as `header`, `summary`, `thresholds` and `answers`.

  Each prompt has an answer: its `samples`, the number of the `chosen` one and, where the trace tells of
  several, the `method` and `rule`. A sample holds a table of the tokens that it emitted itself; `whole`
  adds those that it shares.

  Raises:
    UserError: a file that cannot be read, is no trace, or is not a whole one.
  """
  try:
    lines = Path(path).expanduser().read_bytes().decode("utf-8").split("\n")
  except FileNotFoundError:
    raise UserError(f"The trace {path} does not exist.") from None
  except OSError as error:
    raise UserError(f"The trace {path} cannot be read ({error.strerror}).") from None
  except UnicodeDecodeError:
    raise UserError(f"{path} is not a trace (it is not UTF-8 text).") from None
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  header = _row(numbered[0][1]) if numbered else None
  if header is None or not _is_header(header):
    raise UserError(f"{path} is not a trace (no header line); make one with main's --trace=FILE.")
  summary = (_row(numbered[-1][1]) or {}).get("summary")
  if not isinstance(summary, dict):
    raise UserError(f"The trace {path} is incomplete (no summary line); make it again.")

  def refuse(i: int, fault: str | None) -> None:
    if fault:
      raise UserError(f"Line {i} of {path} {fault}; the trace is damaged, make it again.")

  answers: list[dict] = [{"chosen": 0, "samples": [_sample()]} for _ in header["prompts"]]
  rows = [(i, _row(line)) for i, line in numbered[1:-1]]
  while rows and "samples" in (rows[-1][1] or ()):
    i, row = rows.pop()
    choice = row["samples"]
    refuse(i, _choice_fault(choice, answers))
    entries = sorted(choice["samples"], key=lambda entry: entry["sample"])
    answers[choice["prompt"]] = {name: choice[name] for name in ("method", "rule", "chosen")} | {
      "samples": [_sample(**{name: entry[name] for name in _ENTRY}) for entry in entries]
    }
  for i, row in rows:
    refuse(i, "is not a JSON object" if row is None else _fault(row, header["branches"], answers))
    answer = answers[row.pop("prompt")]
    sample = answer["samples"][row.pop("sample", 0)]
    n = len(sample["ids"])
    del row["position"]
    for name, column in (("id", "ids"), ("text", "texts"), ("branch", "branches"), ("top", "tops")):
      sample[column].append(row.pop(name, None))
    finish = row.pop("finish", None)
    if "method" not in answer:
      sample["finish"] = finish
    for name in row:
      sample["columns"].setdefault(name, [None] * n)
    for name, column in sample["columns"].items():
      column.append(row.get(name))

  def count(found: int, due: int, where: str = "") -> None:
    if found != due:
      raise UserError(
        f"The trace {path} is incomplete ({found} of {due} tokens{where}); make it again."
      )

  found = 0
  for p, answer in enumerate(answers):
    for s, sample in enumerate(answer["samples"]):
      n = len(sample["ids"])
      count(n, sample.pop("tokens", n), f" of sample {s} of prompt {p}")
      found += n
  count(found, summary.get("generated_tokens", found))
  knobs = header["sampler"]
  thresholds = {
    axis: {name: knobs[name] for name in names if _is_number(knobs.get(name))}
    for axis, names in THRESHOLDS.items()
  }
  return {"header": header, "summary": summary, "thresholds": thresholds, "answers": answers}


def lineage(samples: Sequence[dict], s: int) -> list[tuple[int, int]]:
  """(sample, how many of the tokens it emitted) along the text of sample `s`, eldest first."""
  parts = [(s, len(samples[s]["ids"]))]
  while (parent := samples[s]["parent"]) is not None:
    parts.append((parent, samples[s]["at"] - samples[parent]["at"]))
    s = parent
  return parts[::-1]


def whole(samples: Sequence[dict], s: int) -> dict[str, Any]:
  """Sample `s` with the table of its whole text: its ancestors' tokens up to the forks, then its own."""
  parts = [(samples[i], n) for i, n in lineage(samples, s)]
  names = dict.fromkeys(name for sample, _ in parts for name in sample["columns"])
  columns = {
    name: [x for t, n in parts for x in t["columns"].get(name, [None] * n)[:n]] for name in names
  }
  lists = {
    name: [x for t, n in parts for x in t[name][:n]]
    for name in ("ids", "texts", "branches", "tops")
  }
  return samples[s] | lists | {"columns": columns}


def opened(run: dict, prompt: int) -> dict[str, Any]:
  """The whole text that answers a prompt of a run: the chosen sample's."""
  answer = run["answers"][prompt]
  return whole(answer["samples"], answer["chosen"])


def names(paths: Sequence[str | Path]) -> list[str]:
  """What to call each trace: the bare file names where these differ, else the paths."""
  stems = [Path(path).stem for path in paths]
  return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def match(runs: Sequence[dict]) -> list[dict[str, Any]]:
  """The prompts of all runs, each with the (run, prompt) pairs that answer it.

  The text decides, since the ids of one text differ between models; its n-th occurrence in one run
  goes with the n-th in another.
  """
  found: dict[tuple[str, int], list[tuple[int, int]]] = {}
  for r, run in enumerate(runs):
    texts = [prompt["text"] for prompt in run["header"]["prompts"]]
    for p, text in enumerate(texts):
      found.setdefault((text, texts[:p].count(text)), []).append((r, p))
  return [{"text": text, "members": members} for (text, _), members in found.items()]


def page(runs: Sequence[dict], titles: Sequence[str], prompt: int = 0) -> str:
  """The report of `read` traces as one HTML document, opened at a prompt of `match`."""
  data = {
    "runs": [{"name": title} | run for title, run in zip(titles, runs, strict=True)],
    "groups": match(runs),
    "first": prompt,
    "steps": STEPS,
    "units": UNITS | ATTENTION,
    "attention": list(ATTENTION),
  }
  parts = {
    "title": html.escape(f"Trace of {', '.join(titles)}"),
    "css": (ASSETS / "report.css").read_text(encoding="utf-8"),
    "js": (ASSETS / "report.js").read_text(encoding="utf-8"),
    # Whatever a trace holds, a `<` in it must not be able to end the element that carries it.
    "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
  }
  template = (ASSETS / "report.html").read_text(encoding="utf-8")
  return re.sub(r"\{\{(\w+)\}\}", lambda hole: parts[hole[1]], template)


# -- figures for papers ------------------------------------------------------------------------


def _figure(width: float, height: float):
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError('--png needs matplotlib; install it with: pip install -e ".[viz]"') from None
  return Figure(figsize=(width, height), dpi=300, layout="constrained")


def _png(figure) -> bytes:
  for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
    text.set_parse_math(False)  # a name with dollar signs is no formula
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _style(runs: Sequence[dict]) -> dict[str, tuple[str, str]]:
  """Colour and marker of every branch of all runs."""
  branches = dict.fromkeys(name for run in runs for name in run["header"]["branches"])
  return {
    name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(branches)
  }


def _points(run: dict) -> list[tuple[str, float, float]]:
  """Branch, entropy and varentropy of every token; of several samples, the chosen one's."""
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
  """Every token of each run by entropy and varentropy, as a PNG of 300 dpi."""
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
        if axis == "entropy":  # above the frame, turned, so that close ones do not touch
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
  # Most tokens are near zero: the root spreads them out and still shows zero itself.
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
  """Entropy and varentropy along the answers to one prompt of `match`, as a PNG of 300 dpi."""
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
  for i, ax in enumerate(cells):  # one scale for all runs; a threshold above it is out of sight
    ax.set_ylim(0, 1.06 * top[list(STEPS)[i % 2]])
  cells[-1].set_xlabel("generated token", fontsize=8)
  return _png(figure)


def rank(samples: Sequence[dict]) -> list[int]:
  """The samples from top to bottom: below its parent whoever forked last, so that no lines cross."""
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
  """Draw an answer's samples; returns the marker of each kind of end."""
  samples, ends = answer["samples"], {}
  kept = dict(lineage(samples, answer["chosen"]))
  row = {s: i for i, s in enumerate(rank(samples))}
  for s, sample in enumerate(samples):
    y, at, n = row[s], sample["at"], len(sample["ids"])
    if sample["parent"] is not None:
      ax.vlines(at, row[sample["parent"]], y, color="0.6", lw=1.8 if s in kept else 0.6, zorder=1)
    shades = [_shade(float(x)) for x in sample["columns"].get("entropy", ())]
    turn = kept.get(s, 0)  # from here on it is not of the chosen text
    for lw, a, b in ((5.0, 0, turn), (2.4, turn, n)):
      ax.hlines(y, at + a, at + b, color="0.55", lw=lw + 0.8, zorder=2)
      x = range(at + a, at + b)
      # Antialiased, the rim would show between the tokens.
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
  """How the samples of one prompt of `match` forked, as a PNG of 300 dpi; None where none did."""
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


# -- command line ------------------------------------------------------------------------------


def write(outputs: dict[Path, bytes]) -> None:
  """Put files in place whole: all are written under other names first.

  Raises:
    UserError: a file that cannot be written.
  """
  for path in outputs:
    if path.is_dir():
      raise UserError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
      raise UserError(f"The folder {path.parent} does not exist; make it first.")
  parts = {path: path.with_name(path.name + ".part") for path in outputs}
  try:
    for path, part in parts.items():
      part.write_bytes(outputs[path])
    for path, part in parts.items():
      os.replace(part, path)
  except OSError as error:
    raise UserError(f"{path} cannot be written ({error.strerror}).") from None
  finally:
    for part in parts.values():
      part.unlink(missing_ok=True)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(f"{message[:1].upper()}{message[1:]}; try --help.")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="python -m entropix_jax.viz", description=__doc__.split("\n")[0])
  parser.add_argument("traces", nargs="+", metavar="TRACE.jsonl", help="written by --trace=FILE")
  parser.add_argument("-o", "--output", type=Path, metavar="REPORT.html", help="the page to write")
  parser.add_argument(
    "--png",
    metavar="PREFIX",
    help="write PREFIX-scatter.png, PREFIX-timeline.png and, where samples forked, PREFIX-tree.png, 300 dpi",
  )
  parser.add_argument(
    "--prompt", type=int, default=1, metavar="N",
    help="the prompt that the page opens with and that timeline and tree show (default 1)",
  )  # fmt: skip
  return parser


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  if args.output is None and args.png is None:
    raise UserError("Nothing to write: give -o REPORT.html, --png PREFIX or both.")
  runs, titles = [read(path) for path in args.traces], names(args.traces)
  groups = match(runs)
  if args.prompt - 1 not in range(len(groups)):
    raise UserError(f"--prompt {args.prompt} is not there; the traces have {len(groups)} prompts.")
  outputs: dict[Path, bytes] = {}
  if args.output is not None:
    outputs[args.output.expanduser()] = page(runs, titles, args.prompt - 1).encode()
  if args.png is not None:
    figures = {
      "scatter": scatter(runs, titles),
      "timeline": timeline(runs, titles, args.prompt - 1),
      "tree": tree(runs, titles, args.prompt - 1),
    }
    for kind, content in figures.items():
      if content is not None:
        outputs[Path(f"{args.png}-{kind}.png").expanduser()] = content
  inputs = [Path(path).expanduser().resolve() for path in args.traces]
  taken = [path for path in outputs if path.resolve() in inputs]
  if taken:
    raise UserError(f"{taken[0]} is one of the traces; give the report another name.")
  write(outputs)


def _entry(argv: list[str]) -> int:
  return commands.entry(_main, argv)


if __name__ == "__main__":
  sys.exit(_entry(sys.argv[1:]))
