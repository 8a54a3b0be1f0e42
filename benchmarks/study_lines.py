"""The lines of a run of benchmarks/study.py: how they are read, and which settings they choose."""

import base64
import collections
import gzip
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import study_methods as methods
import study_tasks as tasks

from entropix_jax.errors import UserError

# What is kept of each token, of each answer (means), and of each token of ordinary text.
SIGNALS = ("entropy", "varentropy", "logprob", "confidence", "gap", "attn_ent")
MEANS = (*SIGNALS, "logprob_law", "self_certainty", "attn_spread", "agreement", "score_mag")
SCORED = (
  "loss",
  "entropy",
  "varentropy",
  "confidence",
  "gap",
  "attn_ent",
  "attn_spread",
  "agreement",
  "right",
)
WINDOW = 16  # tokens of a group, whose lowest mean confidence is kept
Line = dict[str, Any]


def lines(folder: pathlib.Path, name: str) -> Iterator[Line]:
  """The whole lines of a file of a run, compressed or not; a last line that was cut short is left out."""
  for end, opener in (("", open), (".gz", gzip.open)):
    if (folder / f"{name}{end}").is_file():
      with opener(folder / f"{name}{end}", "rt", encoding="utf-8") as file:
        for line in file:
          if line.endswith("\n"):
            yield json.loads(line)


def mend(path: pathlib.Path) -> None:
  """Remove what follows the last whole line."""
  if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
    path.write_bytes(data[: data.rfind(b"\n") + 1])


def packed(values: np.ndarray) -> str:
  """Numbers as base64 of float16."""
  return base64.b64encode(np.asarray(values, "<f2").tobytes()).decode()


def unpacked(text: str, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Name -> values, of `packed` with one row per name."""
  flat = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)
  return dict(zip(names, flat.reshape(len(names), -1), strict=True))


def source(name: str, names: Sequence[str]) -> str:
  """The task whose choices a task uses: prose has no right answers, so it takes those of the first other task.

  Raises UserError if there is none.
  """
  if name != "prose":
    return name
  if not (others := [n for n in names if n != name]):
    raise UserError(
      "The task prose takes its settings from another one; add that to --tasks, before it."
    )
  return others[0]


# -- choosing --------------------------------------------------------------------------------------


def scores(
  out: pathlib.Path, name: str, part: str, data: pathlib.Path
) -> dict[tuple[str, int], dict[tuple[str, int], float]]:
  """(method, setting) -> {(prompt, seed): score} of a task, for choosing."""
  task = tasks.find(name)
  items = {item.key: item for item in task.items(part, 10**6, data)}
  found = collections.defaultdict(dict)
  for line in lines(out, "answers.jsonl"):
    if line.get("id", "").startswith(f"{name}/{part}/"):
      key, method, index, seed = line["id"].split("/")[2:]
      found[method, int(index)][key, int(seed)] = task.score(items[key], line["text"])[task.METRIC]
  return found


def choices(out: pathlib.Path, name: str, data: pathlib.Path) -> Line:
  """Method -> index of its best setting; of equals the first.

  Also "warm_temperature", the temperature whose law is about as uncertain as that of the first setting of `quadrant_calibrated`, "pool", the temperature whose majority of POOL samples is best, "quadrant", the best of the three kinds, and "varent", the
  mean varentropy of its answers.
  """
  found = scores(out, name, "dev", data)
  mean = {k: np.mean([x for (_, seed), x in v.items() if seed == 0]) for k, v in found.items()}
  best: Line = {}
  for method, index in sorted(mean):
    if method not in best or mean[method, index] > mean[method, best[method]]:
      best[method] = index
  entropy = collections.defaultdict(list)
  for x in lines(out, "answers.jsonl"):
    parts = x.get("id", "").split("/")
    if parts[:2] == [name, "dev"] and parts[5] == "0":
      entropy[parts[3], int(parts[4])].append(-x["signals"]["logprob_law"])
  warm = np.mean(entropy.get(("quadrant_calibrated", 0), [0.0]))
  heats = [i for m, i in mean if m == "temperature"]
  if heats:
    away = {i: abs(np.mean(entropy["temperature", i]) - warm) for i in sorted(heats)}
    best["warm_temperature"] = min(away, key=away.__getitem__)
  kinds = [m for m in methods.QUADRANTS if m in best]
  if kinds:
    best["quadrant"] = max(kinds, key=lambda m: mean[m, best[m]])
    at = f"/{best['quadrant']}/{best[best['quadrant']]}/"
    some = [
      x["signals"]["varentropy"]
      for x in lines(out, "answers.jsonl")
      if x.get("id", "").startswith(f"{name}/dev/") and at in x["id"]
    ]
    best["varent"] = float(f"{np.mean(some):.4g}")
  task = tasks.find(name)
  if hasattr(task, "answer") and "temperature" in best:
    best["pool"] = _best_pool(out, name, data)
  return best


def _best_pool(out: pathlib.Path, name: str, data: pathlib.Path) -> int:
  task = tasks.find(name)
  items = {item.key: item for item in task.items("dev", 10**6, data)}
  said = collections.defaultdict(list)
  for line in lines(out, "answers.jsonl"):
    parts = line.get("id", "").split("/")
    if parts[:2] == [name, "dev"] and parts[3] == "temperature":
      said[int(parts[4]), parts[2]].append((int(parts[5]), line["text"]))
  right = collections.defaultdict(list)
  for (index, key), texts in sorted(said.items()):
    votes = collections.Counter(a for _, t in sorted(texts) if (a := task.answer(t)) is not None)
    winner = votes.most_common(1)[0][0] if votes else None
    text = next((t for _, t in sorted(texts) if task.answer(t) == winner), "")
    right[index].append(task.score(items[key], text)[task.METRIC])
  return max(sorted(right), key=lambda i: np.mean(right[i]))


def dev_tokens(out: pathlib.Path, name: str, index: int) -> dict[str, np.ndarray]:
  """Signals of all tokens of the prompts for choosing, by the chosen temperature."""
  at = f"/temperature/{index}/"
  some = [
    unpacked(x["x"], SIGNALS)
    for x in lines(out, "signals.jsonl")
    if x["id"].startswith(f"{name}/dev/") and at in x["id"]
  ]
  return {n: np.concatenate([x[n] for x in some]) for n in SIGNALS}
