"""Branching at uncertainty: where the entropy is high, try several next tokens and keep the best paths.

  ... a a a ?--b b b b b b      at `?` the entropy is above `ent`: the row pauses before it draws
            |--c c c c c c      `ways` rows continue with the most likely tokens, for `horizon` tokens each
            `--d d d d d d      the best `beam` of all such rows continue, each to its next `?`

Why: the original entropix named its quadrant of low entropy and high varentropy after this, "exploring
forks", but never did it. Entropy is known before the draw, so a row can pause exactly at the uncertain
token. The published method (entropy-gated branching, arXiv:2503.21961) rolls back to the first uncertain
token instead and generates the tokens after it again.
Doubt: the published method ranks paths by a reward model. Without one, the mean log-probability that is
used here is a weak judge [n21].
"""

import dataclasses

import numpy as np

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.rows import Pause, Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  ways: int = 3  # rows that continue from a fork
  beam: int = 2  # rows of a round that are kept
  horizon: int = 16  # tokens after a fork before its ways are judged
  ent: float = 0.7  # nats; a row forks if the entropy of the raw logits is above this
  varent: float = 0.0  # nats^2; and their varentropy at least this
  # Most tokens in all; 0: as many as `beam` rows could emit up to their limits, and the ways of one round. If it
  # is at least one row's limit, enough of it is reserved for the best row to finish.
  budget: int = 0
  rule: str = "mean_logprob"  # of select.RULES; judges the ways, and in the end the whole texts
  answer: str = "last_number"  # how answers are found, see select.answerer

  def __post_init__(self):
    for name, least in (("ways", 2), ("beam", 1), ("horizon", 1), ("budget", 0)):
      if getattr(self, name) < least:
        raise UserError(
          f"config.decoding.{name} is {getattr(self, name)}; it must be at least {least}."
        )
    if self.ways > 32:
      raise UserError(f"config.decoding.ways is {self.ways}; it must be at most 32.")
    select.answerer(self.answer)
    select.check_rule(self.rule)
    if select.RULES[self.rule].needs in ((), ("gap",)):
      raise UserError(f"The rule {self.rule} cannot judge a way that has no answer yet.")

  @property
  def confident(self) -> bool:
    """Whether the rule needs measures of confidence, see metrics.Confidence."""
    return bool(set(select.RULES[self.rule].needs) - {"logprob"})

  @property
  def alternatives(self) -> int:
    """How many of the most likely tokens must be known where a row forks."""
    return self.ways


class Group(groups.Group):
  """The tree of one request.

  It proceeds in rounds of two phases. In the first, all rows run until each waits at a fork or has ended. In
  the second, each way of each fork runs for `horizon` tokens; then the best `beam` are kept. When another round
  would leave too little for the best row to end, that row goes on alone.
  """

  method = "branch"

  def __init__(self, request, config, prompt: int = 0):
    actions = {
      "fork_ent": config.ent,
      "fork_varent": config.varent - 1e-6,
      "fork_every": config.horizon + 1,
      "fork_wait": True,
    }
    for name in actions:
      if name in request.actions:
        raise UserError(
          f"The method branch sets config.actions.{name} itself; leave it out, and use config.decoding."
        )
    actions = request.actions | actions
    super().__init__(dataclasses.replace(request, actions=actions), config, prompt)
    self.width = config.ways * config.beam
    self._waits: dict[groups.Sample, Pause] = {}  # samples that wait at a fork
    self._target: dict[groups.Sample, int] = {}  # second phase: length at which each way is judged
    self._from: dict[groups.Sample, int] = {}  # length of each way at its fork
    self.facts |= {"forks": 0}

  def start(self, rows: Rows) -> None:
    """Begin the next phase once every sample waits or has ended."""
    if not self.samples:
      self._limit = rows.engine.setup.limit(self.request)
      round_ = self.width * self.config.horizon
      self._budget = self.config.budget or self.config.beam * self._limit + round_
      self.facts["budget"] = self._budget
      self.admit(rows, self.request, limit=min(self._limit, self._budget))
      return
    if any(not s.row.waits for s in self.running):
      return
    if self._left and self._short:
      self._go(rows, self._short)
    elif self._target:
      self._prune(rows)
    elif self._left and self._waits:
      spans = [min(self.config.horizon, self._limit - len(s.tokens)) for s in self._waits]
      # The best row's own tokens are reserved already.
      cost = self.config.ways * sum(spans) - min(spans)
      if self._budget < self._limit or cost <= self._left - self._reserved:
        self._branch(rows)
      else:
        self._finish(rows)
    else:
      self._end(rows)

  @property
  def _left(self) -> int:
    return self._budget - sum(sample.own for sample in self.samples)

  @property
  def _reserved(self) -> int:
    """Tokens of the budget that are reserved for the best row to finish; none of a budget below its limit."""
    if self._budget < self._limit:
      return 0
    return self._limit - min((len(sample.tokens) for sample in self.running), default=self._limit)

  @property
  def _short(self) -> list[groups.Sample]:
    """Samples that paused only because of the budget; other samples may have left some of their share."""
    running = self.running
    if self._target:
      return [s for s in running if len(s.tokens) < self._target.get(s, 0)]
    return [s for s in running if s not in self._waits]

  def paused(self, rows: Rows, sample: groups.Sample, pause: Pause) -> None:
    """Remember a sample that waits at a fork; at a limit there is nothing to do."""
    if pause.why == "fork":
      self._waits[sample] = pause

  def _share(self, samples) -> list[int]:
    """How many tokens each of the samples may emit now, so that together they stay within the budget."""
    n = len(samples)
    alone = max(n, len(self.running)) == 1
    left = self._left if alone else self._left - self._reserved
    return [left // n + (i < left % n) for i in range(n)]

  def _go(self, rows: Rows, samples) -> None:
    if len(self.running) > 1 and self._left <= self._reserved:
      self._finish(rows)
      return
    for sample, share in zip(samples, self._share(samples), strict=True):
      if share:
        n = len(sample.tokens)
        rows.wake(sample.row, min(n + share, self._target.get(sample, n + share)))

  def _finish(self, rows: Rows) -> None:
    """Let the best row go on alone, without further ways; the others end here."""
    ways, self._waits, self._target = self.running, {}, {}
    if len(ways) > 1:
      scores = select.choose(self.config.rule, [s.candidate() for s in ways], self.answer).scores
      best = max(range(len(ways)), key=lambda i: np.nan_to_num(scores[i], nan=-np.inf))
      for sample in ways[:best] + ways[best + 1 :]:
        self.end(rows, sample, "pruned")
    self._go(rows, self.running)

  def _branch(self, rows: Rows) -> None:
    """Begin the ways of every fork: the waiting row takes the most likely token, new rows the next ones."""
    # Not in the order in which they came to wait: that depends on other rows and on how tokens are made.
    forks, self._waits = sorted(self._waits.items(), key=lambda wait: wait[0].index), {}
    self.facts["forks"] += len(forks)
    ways = [
      (sample, i, id)
      for sample, pause in forks
      for i, (id, _, logprob) in enumerate(pause.top[: self.config.ways])
      if logprob > -np.inf
    ]
    plans = []
    for (parent, i, id), share in zip(ways, self._share(ways), strict=True):
      if share:
        plans.append((parent, i, id, share))
    # New rows first: a row must wait while others are forked from it.
    for parent, i, id, share in sorted(plans, key=lambda plan: plan[1] == 0):
      n = len(parent.tokens)
      limit = n + min(share, self.config.horizon)
      sample = parent
      if i:
        sample = self.fork(rows, parent, limit=limit, forced=id)
      else:
        rows.wake(parent.row, limit, forced=id)
      self._target[sample] = n + self.config.horizon
      self._from[sample] = n

  def _prune(self, rows: Rows) -> None:
    """Keep the best `beam` of the ways that have not ended; those that have ended await the choice."""
    ways = [s for s in self._target if s.finish is None]
    if len(ways) > self.config.beam:
      scores = select.choose(
        self.config.rule, [s.candidate(self._from[s]) for s in ways], self.answer
      ).scores
      ranked = sorted(
        zip(ways, scores, strict=True), key=lambda pair: -np.nan_to_num(pair[1], nan=-np.inf)
      )
      for sample, _ in ranked[self.config.beam :]:
        self.end(rows, sample, "pruned")
    self._target = {}
    if self._left:
      self._go(rows, self.running)

  def _end(self, rows: Rows) -> None:
    """Choose among the samples that have ended, or, if none has, among those that the budget stops."""
    ended = any(s.finish not in (None, "pruned", "error") for s in self.samples)
    for sample in self.running:
      self.end(rows, sample, "pruned" if ended else "budget")
    self.choose(rows, self.config.rule, self.candidates())
