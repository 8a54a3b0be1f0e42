"""Reads the traces of `trace.Tracer` back, checked line by line, as tables to draw.

Why: whatever draws a trace can rely on it: a file that is damaged or incomplete is refused here.
Nothing here knows a sampler: branches, knobs and statistics are those that a trace names.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropix_jax.errors import UserError

# Knobs that split an axis, whichever sampler has them.
THRESHOLDS = {
  "entropy": ("low_ent", "ask_ent", "high_ent"),
  "varentropy": ("low_varent", "high_varent"),
}
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
