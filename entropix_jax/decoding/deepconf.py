"""DeepConf online (arXiv:2508.15260): samples that lose confidence are ended early, and the others vote.

Why: the first samples run to their end and set a bar: the confidence that `eta` percent of them never fall
below. A later sample that falls below it is ended at once, and its row is free for the next one. Votes are
weighted by confidence; once one answer has nearly all the weight, no more samples are drawn.
Doubt: the authors' window of 2048 tokens never fills in a short answer; ours is 32 [n19].
"""

import dataclasses
import math

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  n: int = 16  # samples in all
  warmup: int = 8  # first samples, which run to their end and set the bar
  eta: float = 90.0  # percent of these that reach the bar; 10 saves the most tokens
  window: int = 32  # tokens over which confidence is averaged
  share: float = 0.95  # of the weight, with which one answer settles the vote
  answer: str = "last_number"  # how answers are found, see select.answerer

  def __post_init__(self):
    if not 1 <= self.warmup <= self.n:
      raise UserError(
        f"config.decoding.warmup is {self.warmup}; it must lie between 1 and config.decoding.n={self.n}."
      )
    select.answerer(self.answer)
    select.bar((), self.eta)
    select.settled({}, self.share)
    select.GroupConfidence(self.window)

  confident = True


class Group(groups.Group):
  """The samples of one request."""

  method = "deepconf"

  def __init__(self, request, config, prompt=0):
    super().__init__(request, config, prompt)
    self._confidence: dict[int, select.GroupConfidence] = {}
    self._bar: float | None = None
    self._settled = False

  def start(self, rows: Rows) -> None:
    """Begin samples: the first ones, which set the bar, and when these have ended the others."""
    c = self.config
    if self._bar is None and len(self.samples) == c.warmup and not self.running:
      self._bar = select.bar([self._confidence[i].least for i in range(c.warmup)], c.eta)
      self.facts["bar"] = float(f"{self._bar:.6g}") if math.isfinite(self._bar) else None
    due = 0 if self._settled else c.warmup if self._bar is None else c.n
    while rows.free and len(self.samples) < due:
      self._confidence[len(self.samples)] = select.GroupConfidence(c.window)
      self.draw(rows)
    if self._settled or (len(self.samples) == c.n and not self.running):
      self.choose(rows, "deepconf", self.candidates(), **self._options())

  def read(self, rows: Rows, sample: groups.Sample) -> None:
    """End the sample if it is below the bar; if it has ended, count the votes."""
    group = self._confidence[sample.index].push(sample.tokens[-1].numbers["confidence"])
    if self._bar is None:
      return
    if sample.finish is None and group is not None and group < self._bar:
      self.end(rows, sample, "pruned")
    if sample.finish is not None and not self._settled:
      ended = [s.candidate() for s in self.samples if s.finish is not None]
      made = select.choose("deepconf", ended, self.answer, **self._options())
      votes = zip(made.scores, made.answers, strict=True)
      voters = sum(score >= self._bar and answer is not None for score, answer in votes)
      # Few votes may agree by chance, so as many as `warmup` are needed.
      many = voters >= self.config.warmup
      self._settled = many and select.settled(made.votes, self.config.share)

  def _options(self):
    # All samples that were not pruned vote if they reach the bar, the first ones too.
    bar = -float("inf") if self._bar is None else self._bar
    return {"measure": "min", "window": self.config.window, "keep": 100.0, "least": bar}
