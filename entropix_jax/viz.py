"""Traces as one web page to look at, and as two figures to print.

  python -m entropix_jax.viz TRACE.jsonl [MORE.jsonl ...] -o report.html
  python -m entropix_jax.viz TRACE.jsonl --png PREFIX     PREFIX-scatter.png, PREFIX-timeline.png

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

from entropix_jax import commands
from entropix_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets" / "viz"

# Upper bounds of all colour steps but the last; those of entropy are the terminal's.
STEPS = {"entropy": (0.05, 0.3, 0.8, 1.5, 2.5), "varentropy": (0.05, 0.3, 1.0, 2.5, 5.0)}
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
_NEEDED = ("prompt", "position", "id", "text", "branch", "entropy", "varentropy")
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


def _fault(row: dict[str, Any], branches: Sequence[str], answers: Sequence[dict]) -> str | None:
  """What is wrong with a token's line, or None."""
  missing = [name for name in _NEEDED if name not in row]
  if missing:
    return f"lacks {', '.join(missing)}"
  if row["branch"] not in branches:
    return f"names the branch {row['branch']!r}, which the header does not"
  if row["prompt"] not in range(len(answers)):
    return f"belongs to prompt {row['prompt']!r}, but the header has {len(answers)}"
  if row["position"] != len(answers[row["prompt"]]["ids"]):
    return f"has position {row['position']!r} where {len(answers[row['prompt']]['ids'])} is due"
  wrong = [name for name in ("entropy", "varentropy") if not _is_number(row[name])]
  return (
    f"has no number for {', '.join(wrong)}" if wrong or not isinstance(row["text"], str) else None
  )


def read(path: str | Path) -> dict[str, Any]:
  """A trace as `header`, `summary`, `thresholds` and a table of columns for each prompt's `answers`.

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

  answers: list[dict] = [
    {"ids": [], "texts": [], "branches": [], "finish": None, "columns": {}, "tops": []}
    for _ in header["prompts"]
  ]
  for i, line in numbered[1:-1]:
    row = _row(line)
    fault = "is not a JSON object" if row is None else _fault(row, header["branches"], answers)
    if row is None or fault:
      raise UserError(f"Line {i} of {path} {fault}; the trace is damaged, make it again.")
    answer = answers[row.pop("prompt")]
    n = row.pop("position")
    answer["ids"].append(row.pop("id"))
    answer["texts"].append(row.pop("text"))
    answer["branches"].append(row.pop("branch"))
    answer["tops"].append(row.pop("top", None))
    answer["finish"] = row.pop("finish", None)
    for name in row:
      answer["columns"].setdefault(name, [None] * n)
    for name, column in answer["columns"].items():
      column.append(row.get(name))
  found = sum(len(answer["ids"]) for answer in answers)
  if summary.get("generated_tokens", found) != found:
    raise UserError(
      f"The trace {path} is incomplete ({found} of {summary['generated_tokens']} tokens); "
      "make it again."
    )
  knobs = header["sampler"]
  thresholds = {
    axis: {name: knobs[name] for name in names if _is_number(knobs.get(name))}
    for axis, names in THRESHOLDS.items()
  }
  return {"header": header, "summary": summary, "thresholds": thresholds, "answers": answers}


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
  """Branch, entropy and varentropy of every token."""
  return [
    (branch, float(x), float(y))
    for a in run["answers"]
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
    columns = runs[r]["answers"][p]["columns"]
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
    "--png", metavar="PREFIX", help="write PREFIX-scatter.png and PREFIX-timeline.png, 300 dpi"
  )
  parser.add_argument(
    "--prompt", type=int, default=1, metavar="N",
    help="the prompt that the page opens with and that the timeline shows (default 1)",
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
    }
    for kind, content in figures.items():
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
