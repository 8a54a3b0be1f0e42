"""Measure how many problems each decoding method solves, and with how many tokens.

  python benchmarks/answers.py --config=configs/demo_ways.py --out=answers.jsonl
  python benchmarks/answers.py --config=configs/demo_ways.py --out=answers.jsonl --runs=greedy,majority,branch

The methods are the config's runs. All get the same held-out word problems of the demo corpus, whose answers
are known. --out gets one line per method; methods that the file already has for these problems are not run
again, and the table shows all of them.

  right      0 or 1 per problem, in order; the intervals can be recomputed from it
  tokens     generated per problem, over all samples; `judged` counts tokens fed to judge them, in addition
  at equal tokens   accuracy minus that of majority voting with the same number of tokens, interpolated
             linearly between majority@1, 2, 4, 8 and 16 of one run

Why: more tokens nearly always help, so a method is only as good as its gain over the simplest use of them.
Intervals are 95%, by resampling problems (bootstrap, 10,000 times), with the same resamples for all methods.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import decode
import sweep

from entropix_jax.cli import commands, config_file
from entropix_jax.decoding import select
from entropix_jax.errors import UserError
from entropix_jax.llm import LLM
from entropix_jax.rows import Token
from entropix_jax.scheduler import raising
from entropix_jax.session import Session

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file with runs, such as configs/demo_ways.py.")
_RUNS = _FLAGS.strings("runs", [], "Names of the runs to make; default: all.")
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_PROBLEMS = _FLAGS.integer("problems", 200, "Number of problems.")
_SKIP = _FLAGS.integer("skip", 0, "Problems to skip at the start.")
_LIMIT = _FLAGS.integer("max_new_tokens", 96, "Most tokens per answer.")
_SEED = _FLAGS.integer("seed", 0, "Seed of all runs.")

CURVE = "majority"  # the run that gives the baseline accuracy for a number of tokens
Line = dict[str, Any]


def play(session: Session, task: sweep.Task, limit: int, seed: int) -> Line:
  """Answer all problems in one way."""
  count, known = len(task.asks), [str(number) for number in task.answers]
  requests = [session.ask(ask, limit, seed + 1000 * i) for i, ask in enumerate(task.asks)]
  todo = session.plan(requests)
  session.ready(todo)
  answer = select.answerer()
  texts, tokens, curves, outcomes = [""] * count, [0] * count, [None] * count, [None] * count
  start = time.perf_counter()
  with tqdm(total=count, leave=False, disable=None) as bar:
    for event in raising(session.go(todo)):
      if isinstance(event, Token):
        tokens[event.prompt] += 1
        if not session.chooses:
          texts[event.prompt] += event.text
          bar.update(event.finish is not None)
        continue
      i = event.prompt
      outcomes[i], texts[i] = event, event.text
      if event.rule == "majority":
        curves[i] = _curve(event)
      bar.update()
  seconds = time.perf_counter() - start

  def right(said) -> str:
    return "".join(str(int(a == b)) for a, b in zip(said, known, strict=True))

  line: Line = {
    "right": right(map(answer, texts)),
    "tokens": round(sum(tokens) / count, 3),
    "seconds": round(seconds, 3),
    "samples": round(sum(len(o.samples) if o else 1 for o in outcomes) / count, 3),
  }
  if all(curves):
    line["curve"] = []
    for n in curves[0]:
      said, spent = zip(*(curve[n] for curve in curves), strict=True)
      point = {"n": n, "right": right(said), "tokens": round(sum(spent) / count, 3)}
      line["curve"].append(point)
  facts = [o.facts for o in outcomes if o]
  for name in ("judged_tokens", "forks"):
    if facts and name in facts[0]:
      line[name] = round(sum(f[name] for f in facts) / count, 3)
  judged = [
    (score, answer(s.text) == number)
    for o, number in zip(outcomes, known, strict=True)
    if o and o.rule == "judge"
    for score, s in zip(o.scores, o.samples, strict=True)
    if score == score
  ]
  if judged:
    line["auroc"] = auroc(*zip(*judged, strict=True))
  return line


def read(path: pathlib.Path) -> list[Line]:
  """The lines of a file."""
  return sweep.read(path, "answers", "ways")


def _curve(outcome) -> dict[int, tuple[str | None, int]]:
  """n -> (majority's answer, tokens) of the first n samples, for n a power of two."""
  samples = [s.candidate() for s in outcome.samples]
  out = {}
  n = 1
  while n <= len(samples):
    made = select.choose("majority", samples[:n], select.answerer())
    out[n] = made.answers[made.index], sum(s.own for s in outcome.samples[:n])
    n *= 2
  return out


def auroc(scores, right) -> float | None:
  """Probability that a right answer has a higher score than a wrong one; ties count half."""
  good = np.asarray([s for s, r in zip(scores, right, strict=True) if r])
  bad = np.asarray([s for s, r in zip(scores, right, strict=True) if not r])
  if not len(good) or not len(bad):
    return None
  wins = (good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean()
  return round(float(wins), 4)


def _bits(right: str) -> np.ndarray:
  return np.asarray([c == "1" for c in right], float)


def figures(lines: list[Line]) -> list[Line]:
  """Each method's accuracy and its gain over majority voting at equal tokens, with intervals."""
  share_RN = sweep.resampled(len(lines[0]["right"]))
  curve = next((line["curve"] for line in lines if line["run"] == CURVE and "curve" in line), None)
  out = []
  for line in lines:
    right_N = _bits(line["right"])
    row = dict(line, accuracy=float(right_N.mean()), interval=_interval(share_RN @ right_N))
    if curve and line["run"] != CURVE:
      at = [point["tokens"] for point in curve]
      share = [np.interp(line["tokens"], at, np.eye(len(at))[k]) for k in range(len(at))]
      same_N = sum(w * _bits(point["right"]) for w, point in zip(share, curve, strict=True))
      gain_N = right_N - same_N
      row |= {"gain": float(gain_N.mean()), "gain_interval": _interval(share_RN @ gain_N)}
      row["beyond"] = not at[0] <= line["tokens"] <= at[-1]
    out.append(row)
    if line["run"] == CURVE:
      out.pop()
      for point in line.get("curve", ()):
        right_N = _bits(point["right"])
        more = {"run": f"{CURVE}@{point['n']}", "tokens": point["tokens"], "samples": point["n"]}
        accuracy = {"accuracy": float(right_N.mean()), "interval": _interval(share_RN @ right_N)}
        out.append(more | accuracy)
  return out


def _interval(mean_R: np.ndarray) -> tuple[float, float]:
  low, high = np.quantile(mean_R, [0.025, 0.975])
  return float(low), float(high)


def table(rows: list[Line]) -> str:
  """The rows as readable text, in the order they were run."""
  out = [f"{'way':18}{'samples':>8}{'tokens':>8}  {'accuracy  95%':24}at equal tokens  95%"]
  for row in rows:
    text = f"{row['run']:18}{row['samples']:>8.1f}{row['tokens']:>8.1f}  "
    text += "{:.3f}  {:.3f} to {:.3f}  ".format(row["accuracy"], *row["interval"])
    if "gain" in row:
      text += "{:+.3f}  {:+.3f} to {:+.3f}".format(row["gain"], *row["gain_interval"])
      text += "  (outside the curve)" * row["beyond"]
    if row.get("auroc") is not None:
      text += f"  AUROC {row['auroc']:.2f}, {row['judged_tokens']:.0f} tokens judged"
    out.append(text.rstrip())
  return "\n".join(out)


def run(argv: list[str]) -> None:
  """Run the methods that are missing and print the table."""
  commands.parse(argv, _FLAGS, __doc__)
  if not _OUT.value:
    raise UserError("Give the file that gets the ways with --out.")
  out = commands.ready(_OUT)
  config = _CONFIG.value
  names = _RUNS.value or list(config.runs)
  if not names:
    raise UserError("The config has no runs; see configs/demo_ways.py.")
  chosen = {n: config_file.resolve(config_file.named(config, n), ways=True) for n in names}
  task = sweep.demo_task(_SKIP.value, _PROBLEMS.value)
  facts = {
    "benchmark": "answers",
    "task": task.name,
    "digest": task.digest,
    "max_new_tokens": _LIMIT.value,
    "seed": _SEED.value,
  }

  def same(line: Line) -> bool:
    return all(line[k] == v for k, v in facts.items())

  have = {line["run"] for line in read(out) if same(line)}
  models: dict[tuple, LLM] = {}  # ways share weights and engines
  todo = [name for name in chosen if name not in have]
  start = time.perf_counter()
  for i, name in enumerate(todo):
    resolved, spent = chosen[name], time.perf_counter() - start
    left = f", about {spent / i * (len(todo) - i) / 60:.0f} minutes left" if i else ""
    print(f"{name}, {i + 1} of {len(todo)}{left} ...", file=sys.stderr, flush=True)
    key = resolved.checkpoint, resolved.engine, resolved.mesh
    if key not in models:
      models[key] = LLM.of(resolved)
    session = models[key].session(resolved)
    line = play(session, task, _LIMIT.value, _SEED.value)
    way = {"run": name, "sampler": resolved.sampler, "knobs": session.settings.knobs}
    way |= {"method": resolved.method}
    if resolved.decoding is not None:
      options = dataclasses.asdict(resolved.decoding)
      way["options"] = {k: v for k, v in options.items() if k != "models"}
    commands.keep(out, facts | way | line | decode.machine())
  rows = figures([line for line in read(out) if same(line)])
  print(table(rows), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
