"""Rules that choose among samples of a prompt, applied to the kept samples of benchmarks/study.py.

Why: the first n of the samples serve every rule and every n, so rules are compared on the same texts, and a rule costs nothing to try.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from study_lines import Line

from entropix_jax.decoding import select

WARMUP = 4  # samples that set DeepConf's bar


def _candidate(a: Any, line: Line, tokens: int | None = None, finish: str | None = None):
  """A kept sample as select.py takes it, or its first tokens; its whole text is then its last piece."""
  kept = a.signals[line["id"]]
  numbers = {name: kept[name][:tokens] for name in ("logprob", "confidence")}
  pieces = ("",) * (len(numbers["logprob"]) - 1) + (line["text"],)
  return select.Candidate(line["text"], pieces, numbers, finish or line["finish"], None)


def online(a: Any, lines: Sequence[Line], eta: float, window: int) -> tuple[int, int]:
  """(index of the chosen sample, tokens) of DeepConf online, one sample after the other.

  As decoding/deepconf.py, but without samples in flight when the vote is settled; so it needs no fixed neighbours.
  """
  kept, least, spent, bar = [], [], 0, -np.inf
  for i, line in enumerate(lines):
    group, n, pruned = select.GroupConfidence(window), 0, False
    for n, c in enumerate(a.signals[line["id"]]["confidence"], 1):  # noqa: B007 (used below)
      value = group.push(c)
      if i >= WARMUP and value is not None and value < bar:
        pruned = True
        break
    spent += n
    kept.append(_candidate(a, line, n, "pruned" if pruned else None))
    least.append(group.least)
    if i == WARMUP - 1:
      bar = select.bar(least, eta)
    if i >= min(WARMUP, len(lines)) - 1:
      made = select.choose(
        "deepconf", kept, a.task.answer, measure="min", window=window, keep=100.0, least=bar
      )
      voters = sum(
        x >= bar and y is not None for x, y in zip(made.scores, made.answers, strict=True)
      )
      if voters >= WARMUP and select.settled(made.votes, 0.95):
        break
  return made.index, spent


def chosen_of(
  a: Any, part: str, method: str, index: int, pick: Callable[[list[Line]], tuple[int, int]]
):
  """(prompt -> score, prompt -> tokens) of a rule over the pool."""
  score, spent = {}, {}
  pool = a.pool(part, method, index)
  whole = max(map(len, pool.values()), default=0)
  for key, lines in pool.items():
    if len(lines) < whole:  # of a run that is not complete
      continue
    at, tokens = pick(lines)
    score[key], spent[key] = lines[at]["score"][a.task.METRIC], tokens
  return score, spent


def rule(a: Any, name: str, n: int, **options) -> Callable[[list[Line]], tuple[int, int]]:
  """`chosen_of` by a rule of select.RULES over the first n samples."""
  answer = getattr(a.task, "answer", lambda text: None)

  def pick(lines):
    some = lines[:n]
    made = select.choose(name, [_candidate(a, x) for x in some], answer, **options)
    return made.index, sum(x["tokens"] for x in some)

  return pick
