"""Adaptive best of n with self-evaluation (arXiv:2410.02725): draw samples until the model is content.

Why: a model that is asked whether it would do better if it started over gives each sample a probability of
being good enough. That costs one suffix of a few tokens, as the sample is already in the cache. So easy
prompts need one sample and hard ones many, and hopeless samples can be ended half-way.

  round        1     2      3          4                ...  until one is good enough, or there are n
  new samples  1     1      2          4
  factor       0     1/2    3/4, 7/8   15/16, 31/32, ..      times `heat` is the temperature: greedy first

Doubt: the paper's models were trained to answer this question; from a model that was not, the answer may be
noise [n20]. The question offers a restart, so "No" means good; the options `good` and `bad` are the labels.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from entropix_jax import sampling
from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.rows import Pause, Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  n: int = 8  # samples at most
  enough: float = 0.9  # probability of the good label from which the search ends
  heat: float = 1.0  # temperature that later samples approach; 0: always the sampler's own
  half: int = 0  # tokens after which a round is judged once and the worst are ended; 0: never
  half_keep: float = 0.5  # share of the round that continues from there
  question: str = "Would you do better if you started over? Answer Yes or No."
  good: str = "No"
  bad: str = "Yes"
  answer: str = "last_number"

  def __post_init__(self):
    for name in ("n", "half"):
      if getattr(self, name) < (name == "n"):
        raise UserError(f"config.decoding.{name} is {getattr(self, name)}; use a larger number.")
    for name in ("enough", "half_keep"):
      if not 0.0 < getattr(self, name) <= 1.0:
        raise UserError(
          f"config.decoding.{name} is {getattr(self, name)}; use a number above 0, up to 1."
        )
    if self.heat < 0:
      raise UserError(f"config.decoding.heat is {self.heat}; it must not be negative.")
    if not (self.question.strip() and self.good.strip() and self.bad.strip()):
      raise UserError("config.decoding.question, good and bad must not be empty.")
    select.answerer(self.answer)


class Group(groups.Group):
  """The samples of one request.

  Args:
    ask: ask(ended, question) -> ids of the suffix; ended: whether the text ends with a stop token.
    labels: ids of the good and the bad label, in this order.
  """

  method = "adaptive"

  def __init__(self, request, config, ask, labels: Sequence[int], prompt: int = 0):
    super().__init__(request, config, prompt)
    self._ask, self._labels = ask, list(labels)
    self._round: list[groups.Sample] = []
    self._halfway = False
    self.facts |= {"judged_tokens": 0}

  def fit(self, batch_size: int, sampler: ModuleType) -> None:
    """Limit a round to the batch, as its rows stay until all of them are judged.

    Raises UserError if `heat` is above 0 and the sampler has no knob `temperature`.
    """
    if self.config.heat and "temperature" not in sampling.knobs(sampler):
      raise UserError(
        f"The method adaptive sets the knob `temperature`, which the sampler {sampler.__name__.split('.')[-1]!r} "
        "does not have; use --config.sampler.name=plain, or --config.decoding.heat=0."
      )
    self.width = min(batch_size, max(1, self.config.n // 2))

  def _request(self, sample: int):
    stream = self.request.stream + sample
    request = dataclasses.replace(self.request, stream=stream)
    if not self.config.heat:
      return request
    temperature = self.config.heat * (1.0 - 0.5**sample)
    return dataclasses.replace(request, knobs=self.request.knobs | {"temperature": temperature})

  def start(self, rows: Rows) -> None:
    """Judge the round if all of its rows have stopped; then begin the next round, or choose."""
    c = self.config
    if self._round and len(self._round) == self._size and self._halted:
      if self._halfway:
        self._prune(rows)
      else:
        self._finish(rows)
    if self.outcome:
      return
    if not self._round:
      self._size = min(max(1, len(self.samples)), c.n - len(self.samples), self.width)
      self._halfway = bool(c.half) and self._size > 1
    while rows.free and len(self._round) < self._size:
      limit = c.half if self._halfway else None
      request = self._request(len(self.samples))
      self._round.append(self.admit(rows, request, limit=limit, stays=True))

  @property
  def _halted(self) -> bool:
    return all(s.finish is not None or s.row.waits for s in self._round)

  def paused(self, rows: Rows, sample: groups.Sample, pause: Pause) -> None:
    """Nothing yet: half-way, `start` judges the round when all of its rows are there."""

  def _prune(self, rows: Rows) -> None:
    self._judge(rows, self._round)
    ranked = sorted(self._round, key=lambda s: -s.score)
    stay = max(1, round(self.config.half_keep * len(ranked)))
    for sample in ranked[stay:]:
      if sample.finish is None:
        self.end(rows, sample, "pruned")
    for sample in ranked[:stay]:
      if sample.finish is None:
        rows.wake(sample.row)
    self._halfway = False

  def _finish(self, rows: Rows) -> None:
    self._judge(rows, [s for s in self._round if s.finish != "pruned"])
    for sample in self._round:
      rows.cancel(sample.row)
    self._round = []
    best = max(s.score for s in self.samples if s.finish != "pruned")
    if best >= self.config.enough or len(self.samples) == self.config.n:
      self.choose(rows, "judge", self.candidates())

  def _judge(self, rows: Rows, samples: Sequence[groups.Sample]) -> None:
    """Set each sample's score: the probability of the good label, of the two."""
    asked = {}
    for sample in samples:
      if sample.finish == "error":
        sample.score = 0.0
        continue
      room = rows.engine.setup.config.max_seq_len - sample.row.held - 1
      closed = sample.tokens[-1].id in self.request.stop
      suffix = self._ask(closed, self.config.question)
      if len(suffix) <= room:
        asked[sample.row] = suffix
      else:
        sample.score = 0.0  # no room for the question, so it cannot be judged good
    if not asked:
      return
    self.facts["judged_tokens"] += sum(map(len, asked.values()))
    found = rows.score(asked, self._labels)
    for sample in samples:
      if sample.row in found:
        good, bad = found[sample.row]
        sample.score = float(1.0 / (1.0 + np.exp(bad - good)))
