"""Reads traces (report/trace.py has the format), checks every line and arranges the tokens as tables.

Why: code that draws a trace can rely on it, since a damaged file is refused here. The trace of a run that was
interrupted or killed is read as far as it goes, and marked as incomplete. No sampler is known here: branches,
settings and statistics are those that the trace names.
"""

import collections
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropix_jax.errors import UserError

# Sampler settings that are thresholds on an axis, in any sampler that has them.
THRESHOLDS = {
  "entropy": ("low_ent", "ask_ent", "high_ent"),
  "varentropy": ("low_varent", "high_varent"),
}
_NEEDED = ("prompt", "position", "id", "text", "branch", "entropy", "varentropy")
_ENTRY = ("parent", "at", "tokens", "finish", "score", "answer")
_MOST_SAMPLES = 1 << 16  # of one prompt of an incomplete trace, whatever a damaged line says
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def _row(line: str | bytes) -> dict[str, Any] | None:
  """The JSON object of a line, or None; NaN and infinities become their names."""
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
  """A sample with an empty table; facts that are not given default to those of an only sample."""
  empty = {"ids": [], "texts": [], "branches": [], "tops": [], "columns": {}}
  return {"parent": None, "at": 0, "finish": None, "score": None, "answer": None} | facts | empty


def _choice_fault(choice: Any, answers: Sequence[dict]) -> str | None:
  """What is wrong with the line that lists a prompt's samples, or None."""
  entries = choice.get("samples") if isinstance(choice, dict) else None
  if not entries or not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
    return "lists no samples"
  prompt = choice.get("prompt")
  if not _is_index(prompt, len(answers)):
    return f"is about prompt {prompt!r}, but the header has {len(answers)}"
  if "method" in answers[prompt]:
    return f"lists the samples of prompt {prompt} again"
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
      return f"gives sample {s} the parent {parent!r}, which is not an earlier sample"
    first = 0 if parent is None else found[parent]["at"]
    last = 0 if parent is None else first + found[parent]["tokens"]
    if not _is_index(at, last + 1) or at < first:
      where = "the text begins at 0" if parent is None else f"its parent covers {first} to {last}"
      return f"lets sample {s} begin at {at!r}, but {where}"
    wrong = [name for name in ("finish", "answer") if not isinstance(entry[name], str | None)]
    wrong += [] if entry["score"] is None or _is_number(entry["score"]) else ["score"]
    if wrong:
      return f"has a wrong type of {', '.join(wrong)} of sample {s}"
  wrong = [name for name in ("method", "rule") if not isinstance(choice.get(name), str)]
  return f"lacks {', '.join(wrong)}" if wrong else None


def _fault(row: dict[str, Any], branches: Sequence[str], answers: Sequence[dict]) -> str | None:
  """What is wrong with a token's line, or None."""
  missing = [name for name in _NEEDED if name not in row]
  if missing:
    return f"lacks {', '.join(missing)}"
  if row["branch"] not in branches:
    return f"names the branch {row['branch']!r}, which the header does not list"
  if not _is_index(row["prompt"], len(answers)):
    return f"belongs to prompt {row['prompt']!r}, but the header has {len(answers)}"
  samples, s = answers[row["prompt"]]["samples"], row.get("sample", 0)
  if not _is_index(s, len(samples)):
    return f"belongs to sample {s!r}, but prompt {row['prompt']} has {len(samples)}"
  due = samples[s]["at"] + len(samples[s]["ids"])
  if row["position"] != due:
    return f"has position {row['position']!r} instead of {due}"
  wrong = [name for name in ("entropy", "varentropy") if not _is_number(row[name])]
  return (
    f"has no number for {', '.join(wrong)}" if wrong or not isinstance(row["text"], str) else None
  )


def _error_fault(error: Any, answers: Sequence[dict]) -> str | None:
  """What is wrong with the line of a text that ended with an error, or None."""
  known = isinstance(error, dict) and _is_index(error.get("prompt"), len(answers))
  if not known or not _is_index(error.get("sample"), len(answers[error["prompt"]]["samples"])):
    return "names no prompt and sample that ended with an error"
  return None


def _listed(rows: Sequence[tuple[int, dict | None]], answers: Sequence[dict]) -> None:
  """List the samples that lines of an incomplete trace name; what they forked from is not known."""
  for _, row in rows:
    row = row if row and "error" not in row else (row or {}).get("error")
    if not isinstance(row, dict) or not _is_index(row.get("prompt"), len(answers)):
      continue
    answer, s = answers[row["prompt"]], row.get("sample", 0)
    if "method" in answer or not _is_index(s, _MOST_SAMPLES):
      continue
    samples = answer["samples"]
    samples += [_sample(at=None) for _ in range(s + 1 - len(samples))]
    if samples[s]["at"] is None and _is_index(row.get("position", 0), sys.maxsize):
      samples[s]["at"] = row.get("position", 0)
  for sample in (sample for answer in answers for sample in answer["samples"]):
    sample["at"] = sample["at"] or 0


def read(path: str | Path) -> dict[str, Any]:
  """A trace as a dict of `header`, `summary`, `thresholds`, `answers` and whether it is `incomplete`.

  Each prompt has an answer: its `samples`, the number of the `chosen` one and, if the trace lists
  samples, the `method` and `rule`. A sample holds a table of the tokens that it emitted itself;
  `whole` adds those that it shares with its ancestors.

  Raises:
    UserError: the file cannot be read, is not a trace or is damaged.
  """
  try:
    data = Path(os.path.expanduser(path)).read_bytes()
    whole, _, rest = data.rpartition(b"\n")
    lines = (data if _row(rest) else whole).decode("utf-8").split("\n")  # else the last is cut
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
  ended = isinstance(summary, dict)
  summary = summary if ended else {}
  incomplete = not ended or summary.get("interrupted") is True

  def refuse(i: int, fault: str | None) -> None:
    if fault:
      raise UserError(f"Line {i} of {path} {fault}; the trace is damaged, make it again.")

  answers: list[dict] = [{"chosen": 0, "samples": [_sample()]} for _ in header["prompts"]]
  rows = [(i, _row(line)) for i, line in numbered[1 : -1 if ended else None]]
  while rows and "samples" in (rows[-1][1] or ()):
    i, row = rows.pop()
    choice = row["samples"]
    refuse(i, _choice_fault(choice, answers))
    entries = sorted(choice["samples"], key=lambda entry: entry["sample"])
    answers[choice["prompt"]] = {name: choice[name] for name in ("method", "rule", "chosen")} | {
      "samples": [_sample(**{name: entry[name] for name in _ENTRY}) for entry in entries]
    }
  if incomplete:
    _listed(rows, answers)
  drawn: collections.Counter[str] = collections.Counter()
  for i, row in rows:
    if row is not None and "error" in row:
      refuse(i, _error_fault(row["error"], answers))
      failed = answers[row["error"]["prompt"]]
      failed["samples"][row["error"]["sample"]]["finish"] = "error"
      continue
    refuse(i, "is not a JSON object" if row is None else _fault(row, header["branches"], answers))
    drawn[row["branch"]] += 1
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
    if found != due and not incomplete:
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
  if incomplete:
    shares = {name: n / found for name, n in drawn.most_common()}
    summary = {"generated_tokens": found, "branches": shares} | summary
  for answer in answers:
    if "method" not in answer and len(answer["samples"]) > 1:
      answer |= {"method": "a run that did not end", "rule": "default"}
  knobs = header["sampler"]
  thresholds = {
    axis: {name: knobs[name] for name in names if _is_number(knobs.get(name))}
    for axis, names in THRESHOLDS.items()
  }
  facts = {"thresholds": thresholds, "answers": answers, "incomplete": incomplete}
  return {"header": header, "summary": summary} | facts


def lineage(samples: Sequence[dict], s: int) -> list[tuple[int, int]]:
  """The parts of the text of sample `s`, in order: (sample that emitted it, number of tokens)."""
  parts = [(s, len(samples[s]["ids"]))]
  while (parent := samples[s]["parent"]) is not None:
    parts.append((parent, samples[s]["at"] - samples[parent]["at"]))
    s = parent
  return parts[::-1]


def whole(samples: Sequence[dict], s: int) -> dict[str, Any]:
  """Sample `s` with the table of its whole text: its ancestors' tokens up to each fork, then its own."""
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
  """The chosen sample of a prompt of a run, with the table of its whole text."""
  answer = run["answers"][prompt]
  return whole(answer["samples"], answer["chosen"])


def names(paths: Sequence[str | Path]) -> list[str]:
  """A title for each trace: the file names without suffix if they all differ, else the paths."""
  stems = [Path(path).stem for path in paths]
  return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def match(runs: Sequence[dict]) -> list[dict[str, Any]]:
  """The prompts of all runs as {"text", "members"}; members are the (run, prompt) pairs with this text.

  Prompts match by text, since the ids of one text differ between models; the n-th occurrence of a text
  in one run matches its n-th in another.
  """
  found: dict[tuple[str, int], list[tuple[int, int]]] = {}
  for r, run in enumerate(runs):
    texts = [prompt["text"] for prompt in run["header"]["prompts"]]
    for p, text in enumerate(texts):
      found.setdefault((text, texts[:p].count(text)), []).append((r, p))
  return [{"text": text, "members": members} for (text, _), members in found.items()]
