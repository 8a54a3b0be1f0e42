"""The report of benchmarks/study.py: tables, plots and one page, from the lines of one or more runs.

Every figure of docs/study.md is one of these. Scores are computed from the texts each time, so a check can be mended afterwards.
"""

import collections
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import study_methods as methods
import study_stats as stats
import study_tasks as tasks
from study_lines import SCORED, SIGNALS, Line, choices, source, unpacked
from study_lines import lines as lines_of
from study_plots import dots, forest
from study_rules import chosen_of, online, rule

from entropix_jax import files
from entropix_jax.errors import UserError

PRIMARY = {  # family -> (methods, what they are compared with)
  "adaptive samplers": (methods.ADAPTIVE, "temperature"),
  "fixed samplers": (methods.CONTROLS, "temperature"),
  "placebos": (methods.PLACEBOS, "quadrant"),
  "transfer": (methods.TRANSFERS, "quadrant_calibrated"),
  "warm": (methods.WARM[1:], "warm"),
}
ENOUGH = 0.02  # a smaller difference is called small even if it is not chance
DEEPCONF = [(eta, window) for window in (8, 16) for eta in (10.0, 50.0, 90.0)]
# Signal -> whether more of it should mean wrong.
PREDICTORS = {
  "entropy": 1, "entropy_most": 1, "varentropy": 1, "varentropy_most": 1, "attn_ent": 1, "attn_ent_most": 1,
  "attn_spread": 1, "agreement": -1, "score_mag": -1, "gap": -1, "gap_least": -1, "confidence": -1, "group_least": -1,
  "self_certainty": -1, "logprob": -1, "logprob_least": -1, "length": 1, "samples_agree": -1,
}  # fmt: skip


class Answers:
  """The answers of one task in one run, scored."""

  def __init__(self, folder: pathlib.Path, name: str, by: str, data: pathlib.Path):
    self.folder, self.name, self.task = folder, name, tasks.find(name)
    self.items = {p: {i.key: i for i in self.task.items(p, 10**6, data)} for p in ("dev", "test")}
    self.lines: dict[str, list[Line]] = {"dev": [], "test": []}
    self.settings, self.header = {}, {}
    for line in lines_of(folder, "answers.jsonl"):
      if line.get("kind") == "header":
        self.header = line
      elif "setting" in line:
        self.settings[line["setting"]] = line
      elif line.get("id", "").startswith(f"{name}/"):
        _, part, key, method, index, seed = line["id"].split("/")
        line |= {"key": key, "method": method, "index": int(index), "seed": int(seed)}
        line["score"] = self.task.score(self.items[part][key], line["text"])
        self.lines[part].append(line)
    methods_ = {line["method"] for line in self.lines["test"]}
    self.winner = (
      choices(folder, by, data).get("quadrant") if methods_ & {*methods.PLACEBOS} else None
    )

  @functools.cached_property
  def by_method(self) -> dict[str, list[Line]]:
    """Method -> its lines of the comparison; "quadrant" is the best of the three kinds."""
    found = collections.defaultdict(list)
    for line in self.lines["test"]:
      if line["method"] != "temperature" or line["seed"] < self.header["seeds"]:
        found[line["method"]].append(line)
    if self.winner in found:
      found["quadrant"] = found[self.winner]
    return dict(found)

  def means(self, lines: Sequence[Line], value: Callable[[Line], float]) -> dict[str, float]:
    """Prompt -> mean over its seeds."""
    found = collections.defaultdict(list)
    for line in lines:
      found[line["key"]].append(value(line))
    return {key: float(np.mean(x)) for key, x in found.items()}

  def metric(self, method: str, name: str = "") -> dict[str, float]:
    """Prompt -> mean score of a method."""
    name = name or self.task.METRIC
    return self.means(self.by_method[method], lambda line: line["score"][name])

  @functools.cached_property
  def signals(self) -> dict[str, dict[str, np.ndarray]]:
    """Id -> its tokens' signals."""
    every = lines_of(self.folder, "signals.jsonl")
    return {
      x["id"]: unpacked(x["x"], SIGNALS) for x in every if x["id"].startswith(f"{self.name}/")
    }

  def pool(self, part: str, method: str, index: int) -> dict[str, list[Line]]:
    """Prompt -> its samples in the order of their seeds."""
    found = collections.defaultdict(list)
    for line in self.lines[part]:
      if line["method"] == method and line["index"] == index:
        found[line["key"]].append(line)
    return {key: sorted(x, key=lambda line: line["seed"]) for key, x in found.items()}


def paired(a: dict[str, float], b: dict[str, float]):
  """`stats.compare` over the prompts that both have, and how many these are."""
  keys = sorted(a.keys() & b.keys())
  return (*stats.compare(np.array([a[k] for k in keys]), np.array([b[k] for k in keys])), len(keys))


def share(values: Iterable[float]) -> tuple[float, tuple[float, float]]:
  """A mean of values between 0 and 1, and its 95% interval."""
  mean, (low, high), _ = stats.compare(np.array(list(values)))
  return mean, (max(0.0, low), min(1.0, high))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table in Markdown; numbers with three digits after the point."""

  def cell(x):
    if isinstance(x, tuple):
      return (
        f"{x[0]:+.3f} to {x[1]:+.3f}" if x[0] < 0 or len(x) > 2 else f"{x[0]:.3f} to {x[1]:.3f}"
      )
    return f"{x:.3f}" if isinstance(x, float) else str(x)

  return "\n".join(
    "| " + " | ".join(map(cell, row)) + " |" for row in (head, ["---"] * len(head), *rows)
  )


# -- parts of the page -----------------------------------------------------------------------------


def accuracies(a: Answers) -> tuple[str, list]:
  """Every method: score, tokens, seconds."""
  others = [n for n in a.lines["test"][0]["score"] if n != a.task.METRIC]
  head = [
    "method",
    "setting",
    "prompts",
    "seeds",
    a.task.METRIC,
    "95%",
    *others,
    "tokens",
    "seconds",
    "ended",
    "law, nats",
  ]
  rows = []
  for method in (m for m in methods.NAMES if m in a.by_method):
    lines = a.by_method[method]
    values = a.metric(method)
    mean, interval = share(values.values())
    rest = [float(np.mean(list(a.metric(method, n).values()))) for n in others]
    index = lines[0]["index"]
    rows.append([
      method, index + 1 if index >= 0 else "-", len(values), len({x["seed"] for x in lines}), mean, interval, *rest,
      round(float(np.mean([x["tokens"] for x in lines])), 1), round(float(np.mean([x["seconds"] for x in lines])), 2),
      float(np.mean([x["finish"] == "stop" for x in lines])), float(abs(np.mean([x["signals"]["logprob_law"] for x in lines]))),
    ])  # fmt: skip
  return table(head, rows), rows


def differences(a: Answers) -> tuple[str, list]:
  """The families of comparisons, each corrected by Holm, with what each could have seen."""
  out, plotted = [], []
  for family, (names, control) in PRIMARY.items():
    names = [n for n in names if n in a.by_method]
    if control not in a.by_method or not names:
      continue
    found = [paired(a.metric(n), a.metric(control)) for n in names]
    least = [least_effect(a, control, n, len(names)) for n in names]
    rows = []
    for name, (gain, interval, p, n), adjusted, power in zip(
      names, found, stats.holm([f[2] for f in found]), least, strict=True
    ):
      says = "nothing found" if adjusted >= 0.05 else "better" if gain > 0 else "worse"
      says += " (small)" if adjusted < 0.05 and abs(gain) < ENOUGH else ""
      says += (
        ", none above 0.03"
        if interval[0] > -0.03 and interval[1] < 0.03 and adjusted >= 0.05
        else ""
      )
      rows.append(
        [name, f"{gain:+.3f}", (*interval, ""), f"{p:.4f}", f"{adjusted:.4f}", n, power, says]
      )
      plotted.append((family, name, gain, interval))
    what = control if control != "quadrant" else f"{a.winner}, the best of its kind"
    head = [
      "method",
      f"{a.task.METRIC} minus that of {control}",
      "95%",
      "p",
      "Holm",
      "prompts",
      "would see",
      "finding",
    ]
    out.append(f"**{family}** against {what}\n\n{table(head, rows)}")
  return "\n\n".join(out), plotted


def least_effect(a: Answers, control: str, method: str, tests: int) -> float | str:
  """The least gain that this comparison finds with probability 0.8 after the strictest step of Holm; simulated.

  The spread of the prompts is that of the pool's seeds; "-" where scores are not 0 or 1, or prompts are few.
  """
  metric = a.task.METRIC
  if {line["score"][metric] for line in a.by_method[control]} - {0.0, 1.0}:
    return "-"
  many = collections.defaultdict(list)
  for line in a.lines["test"]:
    if line["method"] == ("pool" if "pool" in a.by_method else "temperature"):
      many[line["key"]].append(line["score"][metric])
  both = [(many[k], x) for k, x in a.metric(method).items() if len(many[k]) > 1]
  seeds = min((len(x) for x, _ in both), default=0)
  if len(both) < 8 or seeds < 2:
    return "-"
  got = stats.moments([x[:seeds] for x, _ in both], [[x] for _, x in both])
  return stats.detectable(*got, len(both), a.header["seeds"], 0.05 / tests)


def equal_tokens(a: Answers) -> tuple[str, list]:
  """Methods that choose among several texts, against the simplest rule with as many tokens."""
  votes = hasattr(a.task, "answer")
  method = "pool" if votes else "temperature"
  indices = {x["index"] for x in a.lines["test"] if x["method"] == method}
  if not indices:
    return "", []
  (index,) = indices
  curve = {
    n: chosen_of(a, "test", method, index, rule(a, "majority" if votes else "mean_logprob", n))
    for n in (1, 2, 4, methods.POOL)
  }
  simple = "majority" if votes else "mean_logprob"
  ways = {f"{simple}@{n}": x for n, x in curve.items()}
  ways[f"mean_logprob@{methods.POOL}"] = chosen_of(
    a, "test", method, index, rule(a, "mean_logprob", methods.POOL)
  )
  if votes:

    def dev(setting):
      temps = {x["index"] for x in a.lines["dev"] if x["method"] == "temperature"} & {index}
      return np.mean(
        [
          v
          for t in temps
          for v in chosen_of(a, "dev", "temperature", t, lambda s: online(a, s, *setting))[
            0
          ].values()
        ]
        or [0]
      )

    best = max(DEEPCONF, key=dev)
    ways[f"deepconf, eta {best[0]:g}, window {best[1]}"] = chosen_of(
      a, "test", method, index, lambda s: online(a, s, *best)
    )
    ways[f"deepconf offline@{methods.POOL}"] = chosen_of(
      a, "test", method, index, rule(a, "deepconf", methods.POOL, window=best[1])
    )
  else:

    def least(lines):
      worst = [x["signals"]["group_least"] for x in lines]
      return int(np.argmax(worst)), sum(x["tokens"] for x in lines)

    ways[f"confidence@{methods.POOL}"] = chosen_of(a, "test", method, index, least)
  for name in (m for m in methods.SEVERAL if m in a.by_method):
    lines = a.by_method[name]
    ways[name] = a.metric(name), a.means(lines, lambda x: x["tokens"] + x.get("judged_tokens", 0))
  keys = sorted(set.intersection(*({*x[0]} for x in ways.values())))
  at = [np.mean([curve[n][1][k] for k in keys]) for n in curve]
  rows, gains = [], []
  for name, (score, spent) in ways.items():
    tokens = float(np.mean([spent[k] for k in keys]))
    mean, interval = share(score[k] for k in keys)
    row = [name, len(keys), round(tokens, 1), mean, interval]
    if name.startswith(f"{simple}@"):
      rows.append([*row, "", "", ""])
      continue
    part = [np.interp(tokens, at, np.eye(len(at))[k]) for k in range(len(at))]
    same = {k: sum(w * curve[n][0][k] for w, n in zip(part, curve, strict=True)) for k in keys}
    gain, inside, p, _ = paired({k: score[k] for k in keys}, same)
    gains.append((len(rows), p))
    rows.append([*row, f"{gain:+.3f}", (*inside, ""), f"{p:.4f}"])
  for (i, _), adjusted in zip(gains, stats.holm([p for _, p in gains]), strict=True):
    rows[i].append(f"{adjusted:.4f}")
  rows = [row + [""] * (9 - len(row)) for row in rows]
  return table(
    [
      "way",
      "prompts",
      "tokens",
      a.task.METRIC,
      "95%",
      f"minus {simple} at equal tokens",
      "95%",
      "p",
      "Holm",
    ],
    rows,
  ), rows


def predictions(a: Answers) -> tuple[str, list]:
  """Which signal knows that an answer is wrong."""
  votes = hasattr(a.task, "answer")
  method = "pool" if votes else "temperature"
  lines = [x for x in a.lines["test"] if x["method"] == method]
  if not lines:
    return "", []
  bad = np.array([x["score"][a.task.METRIC] < 1 for x in lines])
  prompt = [x["key"] for x in lines]
  value = {n: np.array([x["signals"].get(n, np.nan) for x in lines]) for n in PREDICTORS}
  value["length"] = np.array([x["tokens"] for x in lines], float)
  if votes:
    said = collections.defaultdict(collections.Counter)
    for x in lines:
      said[x["key"]][a.task.answer(x["text"])] += 1
    value["samples_agree"] = np.array(
      [said[x["key"]][a.task.answer(x["text"])] / said[x["key"]].total() for x in lines]
    )
  rows, plotted = [], []
  for name, sign in PREDICTORS.items():
    found = None if np.isnan(value[name]).any() else stats.auroc(sign * value[name], bad, prompt)
    if found:
      rows.append([name, "more" if sign > 0 else "less", found[0], found[1]])
      plotted.append((name, *found))
  rows.sort(key=lambda r: -abs(r[2] - 0.5))
  if not rows:
    return "", []
  text = table(["signal", "wrong answers have", "AUROC", "95%"], rows)
  text += f"\n\n{len(lines)} answers to {len(set(prompt))} prompts, of which {bad.mean():.1%} are wrong.\n\n"
  models = {
    "varentropy to entropy": (
      ("entropy", "entropy_most", "length"),
      ("varentropy", "varentropy_most"),
    ),
    "entropy to varentropy": (
      ("varentropy", "varentropy_most", "length"),
      ("entropy", "entropy_most"),
    ),
    "attention to entropy": (
      ("entropy", "entropy_most", "length"),
      ("attn_ent", "attn_spread", "agreement"),
    ),
    "confidence to entropy": (("entropy", "entropy_most", "length"), ("confidence", "group_least")),
  }
  nested = []
  if bad.any() and not bad.all() and len(set(prompt)) >= stats.FOLDS:
    for name, (less, more) in models.items():
      if not any(np.isnan(value[n]).any() for n in (*less, *more)):
        small, large, gain, interval, p = stats.nested(
          [value[n] for n in less], [value[n] for n in more], bad, prompt
        )
        nested.append(
          [
            name,
            f"{small:.4f}",
            f"{large:.4f}",
            f"{gain:+.4f}",
            f"{interval[0]:+.4f} to {interval[1]:+.4f}",
            f"{p:.4f}",
          ]
        )
    text += table(["what is added", "log loss without", "with", "gain", "95%", "p"], nested)
  return text, plotted


def ordinary(folder: pathlib.Path) -> str:
  """Whether a signal predicts what the next token costs, and the one after it, on ordinary text."""
  groups = collections.defaultdict(list)
  for i, line in enumerate(lines_of(folder, "scored.jsonl")):
    x = unpacked(line["x"], SCORED)
    for values in x.values():
      values[~np.isfinite(values)] = 0.0
    groups[line["id"].split("/")[0]].append(x | {"text": np.full(len(x["loss"]), i)})
  out = []
  for name, texts in groups.items():
    flat = {k: np.concatenate([t[k] for t in texts]) for k in texts[0]}
    later = {k: np.concatenate([t[k][:-1] for t in texts]) for k in texts[0]}
    after = np.concatenate([t["loss"][1:] for t in texts])
    rows = []
    for signal in SCORED[1:8]:
      sign = -1 if signal in ("confidence", "gap", "agreement", "attn_spread") else 1
      wrong = stats.auroc(sign * flat[signal], flat["right"] < 0.5, flat["text"], 300)
      rows.append([
        signal, float(np.corrcoef(flat[signal], flat["loss"])[0, 1]), float(np.corrcoef(later[signal], after)[0, 1]),
        *(wrong or ("-", "-")),
      ])  # fmt: skip
    out.append(
      f"**{name}**: {len(flat['loss'])} tokens of {len(texts)} texts, mean loss {flat['loss'].mean():.3f} nats, mean entropy "
      f"{flat['entropy'].mean():.3f}\n\n"
      + table(
        [
          "signal",
          "correlation with the loss",
          "with the next token's",
          "AUROC of a wrong first choice",
          "95%",
        ],
        rows,
      )
    )
    if len(texts) >= 4:
      target = (flat["entropy"], flat["varentropy"])
      small, large, gain, interval, p = stats.nested(
        target[:1], target[1:], flat["loss"], flat["text"], "linear"
      )
      total = flat["loss"].var()
      out.append(
        f"Varentropy beside entropy, linear, cross-validated by text: it explains {1 - small / total:.4f} of the loss's variance without and "
        f"{1 - large / total:.4f} with it; gain {gain / total:+.4f}, 95% {interval[0] / total:+.4f} to {interval[1] / total:+.4f}, p {p:.4f}."
      )
  return "\n\n".join(out)


def degeneration(a: Answers) -> str:
  """Self-BLEU over the answers of a method, and perplexity under the raw model."""
  rows = []
  for method in (m for m in methods.NAMES if m in a.by_method):
    per = collections.defaultdict(list)
    for line in a.by_method[method]:
      per[line["seed"]].append(line["text"])
    bleu = float(np.mean([stats.self_bleu(texts) for texts in per.values()]))
    costs = [-x["signals"]["logprob"] for x in a.by_method[method]]
    rows.append([method, bleu, float(np.exp(np.mean(costs)))])
  return table(["method", "self-BLEU", "perplexity"], rows)


def tried(a: Answers) -> str:
  """All settings, on the prompts for choosing."""
  per = collections.defaultdict(list)
  for line in a.lines["dev"]:
    if line["seed"] == 0:
      per[line["method"], line["index"]].append(line)
  rows = []
  for (method, index), lines in sorted(per.items()):
    setting = a.settings.get(f"{a.name}/{method}/{index}", {})
    base = methods.preset("entropix-2410")
    said = {
      k: v
      for k, v in {**setting.get("knobs", {}), **setting.get("options", {})}.items()
      if base.get(k) != v
    }
    shown = ", ".join(
      f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in list(said.items())[:8]
    )
    shown += ", ..." * (len(said) > 8)
    mean = float(np.mean([x["score"][a.task.METRIC] for x in lines]))
    rows.append([method, index + 1, shown, len(lines), mean])
  return table(["method", "setting", "knobs", "prompts", a.task.METRIC], rows)


# -- the page --------------------------------------------------------------------------------------


def write(folders: Sequence[pathlib.Path], data: pathlib.Path) -> str:
  """Write report.md and plots into the first folder; the text. Raises UserError where there is nothing to report."""
  out, page = folders[0], ["# What the lines say"]
  for folder in folders:
    header = next((x for x in lines_of(folder, "answers.jsonl") if x.get("kind") == "header"), None)
    if header is None:
      raise UserError(
        f"{folder} has no answers.jsonl of this benchmark; run it without --report first."
      )
    page.append(
      "## {checkpoint}\n\n{device}, {threads} threads, {dtype}, batch {batch}, jax {jax}, commit {commit}, {date}".format(
        **header
      )
    )
    names = {x["id"].split("/")[0] for x in lines_of(folder, "answers.jsonl") if "id" in x}
    for name in (n for n in tasks.NAMES if n in names):
      a = Answers(folder, name, source(name, sorted(names)), data)
      if a.lines["dev"]:
        page.append(f"### {name}, the settings that were tried\n\n{tried(a)}")
      if not a.lines["test"]:
        continue
      stem = f"{folder.name}_{name}"
      text, rows = accuracies(a)
      page.append(f"### {name}, the comparison\n\n{text}")
      dots(rows, out / f"{stem}_tokens.png", -4, 4, ("tokens per answer", a.task.METRIC))
      page.append(f"![]({stem}_tokens.png)")
      if name == "prose":
        page.append(f"### {name}, degeneration\n\n{degeneration(a)}")
        continue
      text, plotted = differences(a)
      if plotted:
        forest(
          plotted, out / f"{stem}_differences.png", f"difference in {a.task.METRIC}, 95% intervals"
        )
        page.append(f"### {name}, differences\n\n{text}\n\n![]({stem}_differences.png)")
      text, rows = equal_tokens(a)
      if rows:
        page.append(f"### {name}, at equal tokens\n\n{text}")
      text, plotted = predictions(a)
      if plotted:
        forest(
          [("", n, x, i) for n, x, i in plotted],
          out / f"{stem}_auroc.png",
          "AUROC of a wrong answer, 95% intervals",
        )
        page.append(f"### {name}, prediction\n\n{text}\n\n![]({stem}_auroc.png)")
    if text := ordinary(folder):
      page.append(f"### Ordinary text, token by token\n\n{text}")
  whole = "\n\n".join(page) + "\n"
  with files.whole(out / "report.md") as file:
    file.write(whole.encode())
  return whole
