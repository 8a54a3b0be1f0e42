"""Rules that choose one of several samples of a prompt, with or without a vote on their answers.

  rule            score of a sample                         weight of its vote    source
  logprob         sum of log-probabilities                  no vote
  mean_logprob    mean log-probability                      no vote
  self_certainty  mean of KL(uniform || p)                  no vote               arXiv:2502.18581
  borda           as self_certainty                         (n - rank + 1)^power  arXiv:2502.18581
  majority        how many samples have its answer          1                     arXiv:2203.11171
  deepconf        confidence of its weakest parts           the score             arXiv:2508.15260
  cot             mean top-2 gap of the answer's tokens     score; "best": none   arXiv:2402.10200
  judge           given from outside                        no vote

Why: all numbers are of the raw logits. Those of the law that a token was drawn from tell how it was drawn and
not how good it is: under that law, every greedily decoded text has probability 1 [n15].
Doubt: a sum prefers shorter texts. Sum and mean prefer samples of a lower temperature, even with raw
logits, so samples of several temperatures need a score that ignores the chosen token [n15].
"""

import bisect
import collections
import dataclasses
import decimal
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from entropix_jax.errors import UserError

OUT = ("cancelled", "pruned", "error")  # finish reasons that exclude a sample from score and vote
NAN = math.nan


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One of several texts that were generated for a prompt."""

  text: str
  pieces: tuple[str, ...]  # the text that each token added; they join to `text`
  numbers: dict[str, np.ndarray]  # name -> (T,) float64, in nats except "gap"; see `Rule`
  finish: (
    str | None
  )  # "stop", "length", "uncertain", "cancelled", "pruned", "budget", "error"; None: runs
  score: float | None = None  # from outside, for the rule judge; larger is better

  def __post_init__(self):
    if "".join(self.pieces) != self.text:
      raise ValueError("the pieces of a sample must join to its text")
    if any(np.shape(x) != (len(self.pieces),) for x in self.numbers.values()):
      raise ValueError("a sample needs one number of each name for each token")


@dataclasses.dataclass(frozen=True)
class Choice:
  """The choice of a rule."""

  index: int  # of the chosen sample
  scores: tuple[float, ...]  # of each sample, larger is better; nan: no score
  answers: tuple[str | None, ...]  # of each sample, normalised; None: no answer
  votes: dict[str, float]  # answer -> total weight; empty if there was no vote
  rule: str  # that made it: mean_logprob where the one that was asked for could not


@dataclasses.dataclass(frozen=True)
class Rule:
  """How samples are weighed: `weigh(samples, answers, answerer, **options)` -> (scores, weights).

  Scores and weights are nan where a sample has none; weights are None for a rule without a vote.
  needs: statistics of each token under the raw logits, all but `gap` in nats:
    logprob         ln p of the token
    self_certainty  KL(uniform || p) = -ln V - mean over the vocabulary of ln p
    confidence      -(mean of ln p over the top k = 20 tokens)
    gap             probability of the most likely token minus that of the second
  """

  weigh: Callable[..., tuple[list[float], list[float] | None]]
  needs: tuple[str, ...] = ()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> default


# -- answers -----------------------------------------------------------------------------------

# A sign belongs to the number unless it may be a binary minus; a comma, if three digits follow it.
NUMBER = re.compile(
  r"(?:(?<![\w.)\]}])[-+\u2212]\$?)?"
  r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
  r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
FINAL = re.compile(r"(?:####|answer is\b)\s*+:?+\s*+", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?=\s|\Z)|\n")
BRACE = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)


def normalise(text: str) -> str:
  """A canonical form of an answer: equal numbers become equal strings; letters alone become lower case.

  White space and punctuation around the answer are removed; from numbers also dollar and percent signs,
  thousands separators and redundant zeros: "$1,234.50." becomes "1234.5".
  """
  text = " ".join(re.sub(r"\\[()\[\]]", "", text).split())
  text = text.lstrip(" *_`\"'").rstrip(" *_`$\"'.,;:")
  bare = re.sub(r"\\?\$ ?| ?\\?%\Z", "", text)
  if NUMBER.fullmatch(bare):
    plain = format(decimal.Decimal(bare.replace(",", "").replace("\u2212", "-")), "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain
  text = text.lstrip("$ ")
  return text.casefold() if text.replace(" ", "").isalpha() else text


def _last_number(text: str) -> Iterator[tuple[int, int]]:
  return reversed([match.span() for match in NUMBER.finditer(text)])


def _final(text: str) -> Iterator[tuple[int, int]]:
  # Lazily, from the last match back: a text that repeats itself has thousands of matches.
  for match in reversed(list(FINAL.finditer(text))):
    end = SENTENCE_END.search(text, match.end())
    yield match.end(), end.start() if end else len(text)


def _boxed(text: str) -> Iterable[tuple[int, int]]:
  spans, opened = [], []
  for match in BRACE.finditer(text):
    if match[0].endswith("}") and len(match[0]) == 1:
      boxed, start = opened.pop() if opened else (False, 0)
      if boxed:
        spans.append((start, match.start()))
    elif match[0] == "{" or len(match[0]) > 2:
      opened.append((match[0] != "{", match.end()))
  return sorted(spans, reverse=True)


@dataclasses.dataclass(frozen=True)
class Answerer:
  """Finds the answer in a text: a call gives the normalised answer or None, `span` its place."""

  spec: str  # see `answerer`
  find: Callable[[str], Iterable[tuple[int, int]]]  # text -> possible spans, the last one first

  def span(self, text: str) -> tuple[int, int] | None:
    """(start, end) of the last non-empty answer, without white space around it; None if there is none."""
    for start, end in self.find(text):
      raw = text[start:end]
      if normalise(raw):
        start += len(raw) - len(raw.lstrip())
        return start, start + len(raw.strip())
    return None

  def __call__(self, text: str) -> str | None:
    span = self.span(text)
    return normalise(text[slice(*span)]) if span else None


PLACES = {"last_number": _last_number, "boxed": _boxed, "final": _final}


def answerer(spec: str = "last_number") -> Answerer:
  """The Answerer of a specification.

  Args:
    spec: "last_number"; "boxed", the content of the last complete \\boxed{...}; "final", the text after
      the last "####" or "answer is" up to the end of its sentence or line; or "regex:PATTERN", the last
      match's first group, or the whole match if the pattern has no group.

  Raises:
    UserError: another spec, or an invalid pattern.
  """
  if spec in PLACES:
    return Answerer(spec, PLACES[spec])
  kind, _, source = spec.partition(":")
  if kind != "regex" or not source:
    known = ", ".join(PLACES)
    raise UserError(f"Answers cannot be found by {spec!r}; use {known} or regex:PATTERN.")
  try:
    pattern = re.compile(source)
  except (re.error, OverflowError, RecursionError) as error:
    raise UserError(f"The pattern of {spec!r} is no regular expression ({error}).") from None
  group = min(pattern.groups, 1)

  def find(text: str) -> Iterator[tuple[int, int]]:
    return reversed([match.span(group) for match in pattern.finditer(text)])

  return Answerer(spec, find)


# -- DeepConf ----------------------------------------------------------------------------------


def _total(x_T: Sequence[float]) -> float:
  """The sum; nan if a value is not finite, or if there is none: an empty sum of 0 would beat any text."""
  return math.fsum(x_T) if len(x_T) and np.isfinite(x_T).all() else NAN


def _mean(x_T: Sequence[float]) -> float:
  return _total(x_T) / max(len(x_T), 1)


class GroupConfidence:
  """Running mean of the confidence of the last `window` tokens, called a group (arXiv:2508.15260).

  A value that is not finite makes the groups that hold it nan, and `least` from then on.
  """

  def __init__(self, window: int):
    if not window >= 1:
      raise UserError(f"The window of group confidence is {window} tokens; it must be at least 1.")
    self.window = window
    self._last: collections.deque[float] = collections.deque(maxlen=window)
    self._least = math.inf

  def push(self, c: float) -> float | None:
    """Add a token's confidence; the mean of the latest group, None before `window` tokens."""
    self._last.append(float(c) if math.isfinite(c) else NAN)
    if len(self._last) < self.window:
      return None
    group = math.fsum(self._last) / self.window
    if group < self._least or group != group:
      self._least = group
    return group

  @property
  def least(self) -> float:
    """The lowest group's mean so far; before the first group the mean of all tokens, nan without tokens."""
    return self._least if len(self._last) == self.window else _mean(self._last)


def _trace_confidence(confidence_T: Sequence[float], measure: str, window: int) -> float:
  """One number for a sample's confidences; nan if there is none, or if one is not finite.

  measure: "min", the lowest group; "bottom", the mean of the lowest tenth of the groups, at least one; "tail",
  the mean of the last `window` tokens; "mean", that of all tokens. All are equal for fewer tokens than that.
  """
  if not np.isfinite(confidence_T).all():
    return NAN
  if measure in ("tail", "mean"):
    return _mean(confidence_T[-window:] if measure == "tail" else confidence_T)
  groups = GroupConfidence(window)
  means = sorted(g for g in map(groups.push, confidence_T) if g is not None)
  lowest = means[: len(means) // 10]
  return _mean(lowest) if measure == "bottom" and lowest else groups.least


def bar(scores: Sequence[float], eta: float) -> float:
  """The value that about `eta` percent of the finite `scores` reach or exceed; -inf if none is finite.

  DeepConf online takes the lowest groups of the first samples as scores and ends a later sample when a group
  is below the bar (arXiv:2508.15260: 90 is cautious, 10 saves most). Raises UserError unless 0 <= eta <= 100.
  """
  if not 0 <= eta <= 100:
    raise UserError(f"The bar must be reached by 0 to 100 percent of the samples, not {eta}.")
  ranked = sorted(x for x in scores if math.isfinite(x))
  if not ranked:
    return -math.inf
  # Not numpy's percentile: it divides first, and rounding may then raise a whole rank.
  rank = (len(ranked) - 1) * (100 - eta) / 100
  low = math.floor(rank)
  high = min(low + 1, len(ranked) - 1)
  return ranked[low] + (rank - low) * (ranked[high] - ranked[low])


def settled(votes: Mapping[str, float], share: float = 0.95) -> bool:
  """Whether one answer has at least this share of all votes. Raises UserError unless 0 < share <= 1."""
  if not 0 < share <= 1:
    raise UserError(f"The share that settles a vote is {share}; use a number above 0, up to 1.")
  total = math.fsum(votes.values())
  return total > 0 and max(votes.values()) / total >= share


# -- rules -------------------------------------------------------------------------------------


def _by(name: str, combine: Callable[[Sequence[float]], float]) -> Callable[..., tuple]:
  """The `weigh` of a rule without a vote, whose score is the sum or mean of a statistic."""

  def weigh(samples, answers, answer):
    del answers, answer
    return [combine(sample.numbers.get(name, ())) for sample in samples], None

  return weigh


def _borda(samples, answers, answer, power):
  """Ranks are among all samples, also those without an answer; equal scores rank in sample order."""
  scores, _ = _by("self_certainty", _mean)(samples, answers, answer)
  ranked = sorted((i for i, x in enumerate(scores) if not math.isnan(x)), key=lambda i: -scores[i])
  weights = [NAN] * len(scores)
  for rank, i in enumerate(ranked):
    weights[i] = float(len(ranked) - rank) ** power
  return scores, weights


def _majority(samples, answers, answer):
  del samples, answer
  count = collections.Counter(answers)
  return [NAN if a is None else float(count[a]) for a in answers], [1.0] * len(answers)


def _deepconf(samples, answers, answer, measure, window, keep, least):
  del answer
  scores = [
    _trace_confidence(sample.numbers.get("confidence", ()), measure, window) for sample in samples
  ]
  answered = [x for x, a in zip(scores, answers, strict=True) if a is not None]
  least = max(least, bar(answered, keep))
  return scores, [x if x >= least else NAN for x in scores]


def _cot(samples, answers, answer, combine):
  del answers
  if not hasattr(answer, "span"):
    raise UserError("The rule cot needs the place of an answer; give it a result of answerer().")
  scores = []
  for sample in samples:
    span = answer.span(sample.text)
    covered = _covering(sample.pieces, *span) if span else slice(0)
    scores.append(_mean(sample.numbers.get("gap", ())[covered]))
  return scores, scores if combine == "sum" else None


def _covering(pieces: Sequence[str], start: int, end: int) -> slice:
  """The tokens whose text overlaps [start, end) of the whole text."""
  ends = list(itertools.accumulate(map(len, pieces)))
  return slice(bisect.bisect_right(ends, start), bisect.bisect_left(ends, end) + 1)


def _judge(samples, answers, answer):
  del answers, answer
  if all(sample.score is None and sample.finish not in OUT for sample in samples):
    raise UserError("The rule judge needs scores of the samples; set them, or use another rule.")
  scores = [NAN if sample.score is None else float(sample.score) for sample in samples]
  return [x if math.isfinite(x) else NAN for x in scores], None


RULES: dict[str, Rule] = {
  "logprob": Rule(_by("logprob", _total), ("logprob",)),
  "mean_logprob": Rule(_by("logprob", _mean), ("logprob",)),
  "self_certainty": Rule(_by("self_certainty", _mean), ("self_certainty",)),
  # power 0 is a majority vote; 0.5 is from the authors' repository, backprop07/Self-Certainty.
  "borda": Rule(_borda, ("self_certainty",), {"power": 0.5}),
  "majority": Rule(_majority),
  # The authors' window of 2048 never fills in a short answer, and their keep = 10 percent of eight samples
  # would be one sample. `least` is for DeepConf online: a sample below the bar has no vote.
  "deepconf": Rule(
    _deepconf,
    ("confidence",),
    {"measure": "bottom", "window": 128, "keep": 90.0, "least": -math.inf},
  ),
  "cot": Rule(_cot, ("gap",), {"combine": "sum"}),
  "judge": Rule(_judge),
}
ALLOWED = {
  "power": (0.0, 50.0),
  "measure": ("bottom", "min", "tail", "mean"),
  "window": (1, 2**31 - 1),  # tokens
  "keep": (0.0, 100.0),  # percent of the samples with an answer that vote, the best ones by score
  "least": (-math.inf, math.inf),  # lowest score that may vote
  "combine": ("sum", "best"),
}


def check_rule(rule: str, **options: Any) -> dict[str, Any]:
  """All options of a rule, those not given at their defaults.

  Raises:
    UserError: no such rule or option, or a value that the option cannot have.
  """
  if rule not in RULES:
    raise UserError(f"There is no rule {rule!r} to choose a sample by; use {', '.join(RULES)}.")
  defaults = RULES[rule].options
  for name, value in options.items():
    if name not in defaults:
      known = ", ".join(defaults) or "none"
      raise UserError(f"The rule {rule} has no option {name!r}; it has {known}.")
    allowed, default = ALLOWED[name], defaults[name]
    if isinstance(default, str):
      good, wanted = value in allowed, f"one of {', '.join(allowed)}"
    else:
      whole = isinstance(default, int)
      kind = numbers.Integral if whole else numbers.Real
      good = isinstance(value, kind) and not isinstance(value, bool)
      good = good and allowed[0] <= value <= allowed[1]
      wanted = f"a {'whole ' if whole else ''}number from {allowed[0]} to {allowed[1]}"
    if not good:
      raise UserError(f"The option {name} of the rule {rule} must be {wanted}, not {value!r}.")
  if options.get("measure") == "mean" and "window" in options:
    raise UserError("The measure mean has no window; leave it out, or use another measure.")
  return {**defaults, **options}


def choose(
  rule: str, samples: Sequence[Candidate], answer: Callable[[str], str | None], **options: Any
) -> Choice:
  """The sample that a rule chooses; deterministic.

  Without a vote, the sample with the best score is chosen. With a vote, the answer with the largest weight
  wins, and of the samples that voted for it the one with the best score is chosen. Of equals, the one with
  the lowest index is taken. Cancelled, pruned and failed samples have no score and no vote, unless all samples
  are. If no sample has a score, or none can vote, the choice is that of mean_logprob, without votes; if that
  has no score either, the first sample.

  Args:
    rule: one of RULES.
    samples: of one prompt; at least one.
    answer: text -> its normalised answer or None; `cot` needs an Answerer.
    options: of the rule, see `check_rule`.

  Raises:
    UserError: as `check_rule`; no samples; samples without the statistics or scores that the rule needs.
  """
  options = check_rule(rule, **options)
  if not samples:
    raise UserError("There is no sample to choose; generate at least one.")
  live = [i for i, sample in enumerate(samples) if sample.finish not in OUT]
  live = live or list(range(len(samples)))
  for name in RULES[rule].needs:
    if any(samples[i].pieces and name not in samples[i].numbers for i in live):
      raise UserError(f"The rule {rule} needs {name} of every token; ask the engine for it.")
  answers = tuple(answer(sample.text) for sample in samples)

  seen = [samples[i] for i in live], [answers[i] for i in live]
  live_scores, live_weights = RULES[rule].weigh(*seen, answer, **options)
  score = dict(zip(live, live_scores, strict=True))
  able = [i for i in live if not math.isnan(score[i])]
  votes: dict[str, float] = {}
  if live_weights is not None:
    weight = dict(zip(live, live_weights, strict=True))
    able = [i for i in able if answers[i] is not None and not math.isnan(weight[i])]
    ballots = collections.defaultdict(list)
    for i in able:
      ballots[answers[i]].append(weight[i])
    # Exact sums, so that equal weights tie in any order of samples.
    votes = {a: math.fsum(weights) for a, weights in ballots.items()}
    winner = max(votes, key=votes.__getitem__, default=None)
    able = [i for i in able if answers[i] == winner]
  if not able and rule != "mean_logprob":
    return choose("mean_logprob", samples, answer)
  return Choice(
    index=max(able, key=score.__getitem__, default=live[0]),
    scores=tuple(score.get(i, NAN) for i in range(len(samples))),
    answers=answers,
    votes=votes,
    rule=rule,
  )
