"""Measure what a sampler's knobs do: run many settings on the same prompts, together in one batch.

  python benchmarks/sweep.py --config=configs/demo.py --task=demo --out=sweep.jsonl --sampler=plain --grid=temperature=0
  python benchmarks/sweep.py --config=configs/demo.py --task=demo --out=sweep.jsonl --sampler=plain --grid=temperature=0.3,0.7,1.0 --grid=min_p=0.02,0.05 --seeds=3
  python benchmarks/sweep.py --config=configs/demo.py --task=demo --out=sweep.jsonl --sampler=quadrant --random=high_ent=0.5:4 --random=temp=0.1:2:log --samples=64
  python benchmarks/sweep.py --config=configs/demo.py --prompt_file=prompts.csv --out=texts.jsonl --preset=smollm2-360m --grid=top_k=5,27

--grid runs the product of the given values. --random draws --samples settings from ranges, uniformly or with
`:log`. With neither, one setting runs: the preset with the config's knobs. The demo task has held-out word
problems in a fixed order; --skip omits the first ones, so that a setting chosen on some problems can be
tested on others. --out gets one line per run (a setting with a seed). Runs that the file already has are not
repeated, and the table and --plot show all of the file's runs on these prompts.

  right          0 or 1 per problem, in order; the intervals can be recomputed from it
  mean_entropy   nats; of the model's distribution before the sampler, along the generated text
  law_entropy    nats; mean -log-probability of the tokens under the distribution they were drawn from
  distinct_1/2   distinct words (pairs of words) over all words (pairs), over all answers of the run
  repeated_4     share of four successive words that stand earlier in the same answer
  seconds        from the run's first token to its last; other runs share the batch

Why: knobs are arrays, so rows with different settings share one compiled program. All settings get the same
noise for a problem, so their differences are more precise than each accuracy, but a lucky seed lifts all of
them: use several seeds. Intervals are by resampling problems (bootstrap, 10,000 times), the same resamples
for all settings; they do not resample seeds. The best of many settings looks better on the problems it was
chosen on than on others, so test it on others.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import decode
import demo_corpus

from entropix_jax import files, sampling, settings
from entropix_jax.cli import commands, config_file, prompts
from entropix_jax.engine.setup import compute_dtype
from entropix_jax.errors import UserError
from entropix_jax.llm import LLM
from entropix_jax.rows import Token
from entropix_jax.scheduler import raising
from entropix_jax.session import Session

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_SAMPLER = _FLAGS.string("sampler", None, "Same as --config.sampler.name.")
_PRESET = _FLAGS.string("preset", None, "Same as --config.sampler.preset.")
_GRID = _FLAGS.multi_string("grid", [], "KNOB=VALUE,VALUE,...; a threshold may be q20,q50")
_RANDOM = _FLAGS.multi_string(
  "random", [], "KNOB=LEAST:MOST or KNOB=LEAST:MOST:log; a threshold may be q5:q50"
)
_SAMPLES = _FLAGS.integer("samples", 16, "Settings to draw for --random.", 1)
_SAMPLE_SEED = _FLAGS.integer("sample_seed", 0, "Seed of --random.", 0)
_TASK = _FLAGS.enum("task", None, ["demo"], "Held-out word problems of the demo corpus.")
_PROBLEMS = _FLAGS.integer("problems", 102, "Number of problems.", 1)
_SKIP = _FLAGS.integer("skip", 0, "Problems to skip at the start.", 0)
_PROMPT_FILE = _FLAGS.string("prompt_file", None, "Prompts to use instead of a task; no accuracy.")
_SEEDS = _FLAGS.integer("seeds", 1, "Seeds per setting: 0, 1, ...", 1)
_MAX_NEW_TOKENS = _FLAGS.integer("max_new_tokens", 96, "Most tokens per answer.", 1)
_BATCH = _FLAGS.integer("batch", 32, "Rows; replaces config.engine.batch_size.", 1)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_PLOT = _FLAGS.string("plot", None, "PNG file to write a plot to.")

RESAMPLES = 10_000
Knobs = dict[str, float | int | bool | str]
Line = dict[str, Any]


# -- what is asked -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
  """Prompts, and their numeric answers if these are known."""

  name: str
  asks: tuple[str, ...]
  answers: tuple[int, ...] | None

  @property
  def digest(self) -> str:
    """A hash that identifies the prompts and answers."""
    return hashlib.sha256(repr((self.asks, self.answers)).encode()).hexdigest()[:16]


def held_out() -> Iterator[demo_corpus.Problem]:
  """Distinct held-out problems in a fixed order, cycling through the kinds."""
  rngs = {kind: random.Random(f"sweep/{kind}") for kind in demo_corpus.KINDS}
  seen = set()
  while rngs:
    for kind, rng in list(rngs.items()):
      tries = (demo_corpus.problem(rng, True, (kind,)) for _ in range(300))
      task = next((t for t in tries if (kind, t.numbers) not in seen), None)
      if task is None:
        del rngs[kind]  # this kind has no more distinct problems
        continue
      seen.add((kind, task.numbers))
      yield task


def demo_task(skip: int, count: int) -> Task:
  """`count` held-out problems after the first `skip`. Raises UserError if there are fewer."""
  tasks = list(itertools.islice(held_out(), skip, skip + count))
  if len(tasks) < count:
    raise UserError("The demo corpus has fewer held-out problems; lower --problems or --skip.")
  asks, answers = zip(*((t.question, t.answer) for t in tasks), strict=True)
  return Task(f"demo {skip}+{count}", asks, answers)


def read_task() -> Task:
  """The task given by the flags."""
  if not _PROMPT_FILE.value:
    return demo_task(_SKIP.value, _PROBLEMS.value)
  texts = tuple(prompt.text for prompt in prompts.read(_PROMPT_FILE.value))
  return Task(pathlib.Path(_PROMPT_FILE.value).name, texts, None)


# -- settings ----------------------------------------------------------------------------------------


def _split(flag: str, text: str, known: Knobs) -> tuple[str, str]:
  name, equals, values = text.partition("=")
  if not equals or not values:
    raise UserError(f"--{flag}={text} is not of the form KNOB=...; see --help.")
  if name not in known:
    raise UserError(f"--{flag}={text}: there is no such knob; there are: {', '.join(known)}.")
  return name, values


def _number(flag: str, text: str, kind: type) -> float | int | bool | str:
  if kind is bool:
    if text not in ("true", "false"):
      raise UserError(f"--{flag}: {text!r} must be true or false.")
    return text == "true"
  if kind is float and text.startswith("q"):  # a quantile; `sampling.configure` checks it
    return text
  try:
    return kind(text)
  except ValueError:
    words = "a whole number" if kind is int else "a number"
    raise UserError(f"--{flag}: {text!r} is not {words}.") from None


def grid(texts: Sequence[str], known: Knobs) -> list[Knobs]:
  """The product of `KNOB=VALUE,VALUE` texts; without any, one empty setting."""
  axes = {}
  for text in texts:
    name, values = _split("grid", text, known)
    axes[name] = [_number("grid", v, type(known[name])) for v in values.split(",")]
  return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def draws(texts: Sequence[str], known: Knobs, samples: int, seed: int) -> list[Knobs]:
  """Settings drawn from `KNOB=LEAST:MOST[:log]` ranges; a larger `samples` only appends settings."""
  axes = {}
  for text in texts:
    name, values = _split("random", text, known)
    kind = type(known[name])
    ends, log = values.removesuffix(":log").split(":"), values.endswith(":log")
    if len(ends) != 2 or kind is bool:
      raise UserError(f"--random={text} is not a range of numbers, KNOB=LEAST:MOST[:log].")
    quantile = kind is float and all(end.startswith("q") for end in ends)
    low, high = (_number("random", end[quantile:], kind) for end in ends)
    if isinstance(low, str) or isinstance(high, str):
      raise UserError(f"--random={text}: give two numbers, or two quantiles such as q5:q50.")
    if not (low < high and (low > 0 or not log)):
      raise UserError(f"--random={text}: needs LEAST < MOST, and LEAST > 0 with :log.")
    axes[name] = (kind, low, high, log, quantile)
  rng = np.random.default_rng(seed)

  def one(kind, low, high, log, quantile):
    half = (
      0.5 if kind is int else 0.0
    )  # so that the ends of an integer range are not half as likely
    a, b = low - half, high + half
    x = math.exp(rng.uniform(math.log(a), math.log(b))) if log else rng.uniform(a, b)
    if quantile:
      return f"q{round(x, 2):g}"
    return min(high, max(low, round(x))) if kind is int else float(f"{x:.4g}")

  return [{name: one(*axis) for name, axis in axes.items()} for _ in range(samples)]


def key(line: Line) -> tuple:
  """Identifies a setting of a sampler; knobs that are not given count with their defaults."""
  config = sampling.configure(sampling.find(line["sampler"]), line["knobs"])
  return (line["sampler"], *(tuple(np.ravel(x).tolist()) for x in jax.tree.leaves(config)))


# -- runs --------------------------------------------------------------------------------------------


class Run:
  """A setting with a seed, and its results so far."""

  def __init__(self, knobs: Knobs, seed: int, task: Task):
    self.knobs, self.seed, self.task = knobs, seed, task
    self.texts = [""] * len(task.asks)
    self.branches: collections.Counter[str] = collections.Counter()
    self.finish: collections.Counter[str] = collections.Counter()
    self.entropy, self.surprise, self.seconds = [], [], []

  def token(self, ask: int, token: Token) -> bool:
    """Count a token of one answer; returns whether the run is complete."""
    self.texts[ask] += token.text
    self.branches[token.branch] += 1
    self.entropy.append(token.numbers["entropy"])
    self.surprise.append(-token.numbers["logprob_law"])
    self.seconds.append(token.seconds)
    if token.finish:
      self.finish[token.finish] += 1
    return self.finish.total() == len(self.texts)

  def line(self) -> Line:
    """The figures."""
    n = len(self.entropy)
    figures: Line = {}
    if self.task.answers is not None:
      said = map(demo_corpus.extract_answer, self.texts)
      right = [a == b for a, b in zip(said, self.task.answers, strict=True)]
      figures = {
        "accuracy": sum(right) / len(right),
        "count": sum(right),
        "of": len(right),
        "right": "".join("01"[r] for r in right),
      }
    words = [text.split() for text in self.texts]
    pairs = [list(itertools.pairwise(w)) for w in words]
    figures |= {
      "ended": self.finish["stop"] / len(self.texts),
      "tokens": n,
      "mean_entropy": float(np.mean(self.entropy)),
      "law_entropy": float(np.mean(self.surprise)),
      "branches": {name: c / n for name, c in self.branches.most_common()},
      "distinct_1": _distinct(words),
      "distinct_2": _distinct(pairs),
      "repeated_4": _repeated(words),
      "seconds": self.seconds[-1] - self.seconds[0],
    }
    return {"knobs": self.knobs, "seed": self.seed} | figures


def _distinct(answers: list[list]) -> float:
  grams = list(itertools.chain(*answers))
  return len(set(grams)) / max(1, len(grams))


def _repeated(answers: list[list[str]]) -> float:
  fours = [[tuple(words[i : i + 4]) for i in range(len(words) - 3)] for words in answers]
  total = sum(map(len, fours))
  return (total - sum(len(set(grams)) for grams in fours)) / max(1, total)


def play(session: Session, task: Task, runs: Sequence[Run], limit: int) -> Iterator[Line]:
  """Generate all runs in one stream of requests; yields each run's line when it is complete."""
  end = "" if session.is_chat else "\n"  # a base model continues after the question's line
  coded = [session.encode(ask + end) for ask in task.asks]
  requests = [
    dataclasses.replace(session.request(ids, limit, run.seed), knobs=run.knobs)
    for run in runs
    for ids in coded
  ]
  session.ready(requests)
  with tqdm(total=len(requests), desc="answers", disable=None) as bar:
    for token in raising(session.go(requests)):
      run, ask = divmod(token.prompt, len(coded))
      over = runs[run].token(ask, token)
      bar.update(token.finish is not None)
      if over:
        yield runs[run].line()


def read(path: pathlib.Path, benchmark: str = "sweep", what: str = "runs") -> list[Line]:
  """The lines of a benchmark's file; an incomplete last line is removed from it."""
  begun = f'{{"benchmark": "{benchmark}"'
  if not path.is_file():  # a device may be endless
    return []
  try:
    text = path.read_text(encoding="utf-8")
    *whole, rest = text.split("\n")
    lines = [json.loads(line) for line in whole]
    assert all(line["benchmark"] == benchmark and "digest" in line for line in lines)
    assert rest[: len(begun)] == begun[: len(rest)]
  except (ValueError, TypeError, KeyError, AssertionError):
    raise UserError(f"--out={path} holds something else than {what}; name another file.") from None
  if rest:
    os.truncate(path, path.stat().st_size - len(rest.encode()))
  return lines


# -- what came of it ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
  """A setting with all its seeds; intervals are None if there are no answers."""

  lines: list[Line]
  accuracy: float | None = None
  interval: tuple[float, float] | None = None
  gain: tuple[float, float, float] | None = None  # over the control: mean, and the interval's ends

  def mean(self, name: str) -> float:
    """The mean of a figure over the seeds."""
    return float(np.mean([line[name] for line in self.lines]))

  @property
  def greedy(self) -> bool:
    """Whether every token was drawn with probability 1."""
    return self.mean("law_entropy") == 0


def resampled(N: int, resamples: int = RESAMPLES) -> np.ndarray:
  """share_RN of each of N problems in every bootstrap resample; always the same for one N."""
  return np.random.default_rng(0).multinomial(N, [1 / N] * N, size=resamples) / N


def compare(lines: Sequence[Line], resamples: int = RESAMPLES) -> list[Row]:
  """One row per setting, the most accurate first (without answers, the lowest entropy first).

  Intervals contain 95% of the resamples of the problems, the same resamples for all rows. The control is
  greedy decoding if it was run, otherwise the best row.
  """
  groups = collections.defaultdict(list)
  for line in lines:
    groups[key(line)].append(line)
  rows = [Row(group) for group in groups.values()]
  if any("right" not in line for line in lines):
    return sorted(rows, key=lambda row: row.mean("law_entropy"))
  right_NX = np.stack(
    [np.mean([[c == "1" for c in line["right"]] for line in row.lines], axis=0) for row in rows], 1
  )
  mean_RX = resampled(len(right_NX), resamples) @ right_NX
  mean_X = right_NX.mean(axis=0)
  control = next((i for i, row in enumerate(rows) if row.greedy), int(np.argmax(mean_X)))
  ends_2X = np.quantile(mean_RX, [0.025, 0.975], axis=0)
  gain_2X = np.quantile(mean_RX - mean_RX[:, [control]], [0.025, 0.975], axis=0)
  for i, row in enumerate(rows):
    row.accuracy = float(mean_X[i])
    row.interval = tuple(map(float, ends_2X[:, i]))
    row.gain = (float(mean_X[i] - mean_X[control]), *map(float, gain_2X[:, i]))
  return sorted(rows, key=lambda row: -row.accuracy)


def table(rows: Sequence[Row]) -> str:
  """The rows as readable text, with those of a sampler's knobs that differ."""
  values = collections.defaultdict(lambda: collections.defaultdict(set))
  knobs = {}
  for row in rows:
    line = row.lines[0]
    known = sampling.knobs(sampling.find(line["sampler"])) | line["knobs"]
    knobs[id(row)] = {
      k: f"{v:g}" if isinstance(v, int | float) else str(v) for k, v in known.items()
    }
    for name, value in knobs[id(row)].items():
      values[line["sampler"]][name].add(value)
  scored = rows[0].accuracy is not None
  control = "greedy" if any(row.greedy for row in rows) else "the first"
  head = f"{'accuracy  95%':22}{f'over {control}  95%':26}" if scored else ""
  out = [f"{head}{'seeds':>6}{'tokens':>8}{'entropy':>9}{'law':>7}{'distinct-2':>12}  setting"]
  for row in rows:
    sampler = row.lines[0]["sampler"]
    differ = [f"{k}={v}" for k, v in knobs[id(row)].items() if len(values[sampler][k]) > 1]
    text = ""
    if scored:
      text = "{:.3f}  {:.3f} to {:.3f} ".format(row.accuracy, *row.interval)
      text += "{:+.3f}  {:+.3f} to {:+.3f}    ".format(*row.gain)
    each = row.mean("tokens") / row.lines[0]["prompts"]
    text += f"{len(row.lines):>6}{each:>8.1f}"
    text += f"{row.mean('mean_entropy'):>9.3f}{row.mean('law_entropy'):>7.3f}"
    out.append(f"{text}{row.mean('distinct_2'):>12.3f}  {' '.join([sampler, *differ])}")
  if len({tuple(sorted(x["seed"] for x in row.lines)) for row in rows if not row.greedy}) > 1:
    out.append("Rows of other seeds met other noise; compare rows of the same seeds.")
  return "\n".join(out)


def import_figure():
  """matplotlib's Figure. Raises UserError that says how to install it."""
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError("--plot needs matplotlib; install it with `pip install -e .[viz]`.") from None
  return Figure


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Plot accuracy with intervals against entropy and against tokens, one colour per sampler."""
  figure = import_figure()(figsize=(10, 4.5), layout="constrained")
  panels = figure.subplots(1, 2, sharey=True)
  titles = {
    "law_entropy": "mean entropy of the sampler's law, nats",
    "tokens": "tokens an answer",
  }
  for axes, (name, title) in zip(panels, titles.items(), strict=True):
    for sampler in sorted({row.lines[0]["sampler"] for row in rows}):
      some = [row for row in rows if row.lines[0]["sampler"] == sampler]
      y = np.array([row.accuracy for row in some])
      error = np.abs(np.array([row.interval for row in some]).T - y)
      each = some[0].lines[0]["prompts"] if name == "tokens" else 1
      x = [row.mean(name) / each for row in some]
      axes.errorbar(x, y, error, fmt="o", ms=4, lw=0.6, alpha=0.6, label=sampler)
    axes.set_xlabel(title)
  panels[0].set_ylabel("share of problems solved")
  panels[0].legend()
  with files.whole(path) as file:
    figure.savefig(file, format="png", dpi=150)


# -- the run -----------------------------------------------------------------------------------------


def _resolve() -> settings.Settings:
  config = _CONFIG.value
  for name, value in (("name", _SAMPLER.value), ("preset", _PRESET.value)):
    if value is not None:
      if config.sampler[name] not in (None, settings.AUTO, value):
        raise UserError(f"config.sampler.{name} is set twice, to {config.sampler[name]!r}.")
      config.sampler[name] = value
  for text in (*_GRID.value, *_RANDOM.value):
    knob = text.partition("=")[0]
    if config.sampler.get(knob) is not None:
      raise UserError(f"config.sampler.{knob} is set, so it cannot be swept; leave one out.")
  resolved = config_file.resolve(config)
  if resolved.preset == settings.AUTO:
    resolved, *_ = settings.shape(resolved)
  shapes = dataclasses.replace(resolved.engine, batch_size=_BATCH.value)
  return dataclasses.replace(resolved, engine=shapes)


def _check_flags() -> None:
  if bool(_TASK.value) == bool(_PROMPT_FILE.value):
    raise UserError("Give either --task=demo or --prompt_file.")
  if _GRID.value and _RANDOM.value:
    raise UserError("--grid and --random exclude each other; give one kind.")
  if not _OUT.value:
    raise UserError("Give the file that gets the runs with --out.")
  if _PLOT.value:
    if not _TASK.value:
      raise UserError("--plot draws accuracy, so it needs --task=demo.")
    import_figure()


def run(argv: list[str]) -> None:
  """Run the settings that are missing and print the table."""
  commands.parse(argv, _FLAGS, __doc__)
  _check_flags()
  out, picture = map(commands.ready, (_OUT, _PLOT))
  resolved = _resolve()
  sampler, task = sampling.find(resolved.sampler), read_task()
  known = sampling.knobs(sampler)
  swept = (
    draws(_RANDOM.value, known, _SAMPLES.value, _SAMPLE_SEED.value)
    if _RANDOM.value
    else grid(_GRID.value, known)
  )
  every = [resolved.knobs | knobs for knobs in swept]
  for knobs in every:
    sampling.configure(sampler, knobs)

  facts = {
    "benchmark": "sweep",
    "checkpoint": "/".join(pathlib.Path(resolved.checkpoint).absolute().parts[-2:]),
    "task": task.name,
    "digest": task.digest,
    "prompts": len(task.asks),
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "sampler": resolved.sampler,
    "preset": pathlib.Path(resolved.preset).name,  # without folders, which differ between machines
  }

  def same(line: Line) -> bool:
    return all(line[k] == facts[k] for k in ("checkpoint", "digest", "max_new_tokens"))

  have = {(key(line), line["seed"]) for line in read(out) if same(line)}
  runs = {}
  for seed, knobs in itertools.product(range(_SEEDS.value), every):
    which = (key({"sampler": resolved.sampler, "knobs": knobs}), seed)
    if which not in have:
      runs[which] = Run(knobs, seed, task)
  print(f"{len(runs)} runs of {len(task.asks)} prompts to do", file=sys.stderr, flush=True)
  if runs:
    session = LLM.of(resolved).session(resolved, any_knob=True)
    dtype = compute_dtype(resolved.engine.dtype)
    facts |= {"dtype": dtype.name, "batch": _BATCH.value} | decode.machine()
    for line in play(session, task, list(runs.values()), _MAX_NEW_TOKENS.value):
      commands.keep(out, facts | line)
  rows = compare([line for line in read(out) if same(line)])
  print(table(rows), flush=True)
  if picture:
    plot(rows, picture)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
