"""Branching at uncertainty: where the model is torn, follow several ways for a while, keep the best.

  ... a a a ?--b b b b b b      at `?` the entropy is above `ent`: the row waits before it draws
            |--c c c c c c      `ways` rows go on by the likeliest tokens, for `horizon` tokens each
            `--d d d d d d      of all such rows `beam` stay, up to the next `?` of each

Why: this is what the ancestors' quadrant of low entropy and high varentropy was named for, "exploring
forks", and never did. Entropy is known before the draw, so a row can wait at the very token: what the
published method (entropy-gated branching, arXiv:2503.21961) generates again after rolling back to
the first uncertain token is never generated here.
Doubt: the published method ranks ways by a reward model. Without one, the mean log-probability that
is used here is a weak judge [n21].
"""

import dataclasses

import numpy as np

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.generate import Pause, Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  ways: int = 3  # rows that go on from a fork
  beam: int = 2  # of all ways of a round that stay
  horizon: int = 16  # tokens of a way before it is judged
  ent: float = 0.7  # nats of the raw law above which a row forks
  varent: float = 0.0  # nats^2 above which, too
  budget: int = 0  # tokens in all, never more; 0: as many as `beam` rows could emit to their limits
  rule: str = "mean_logprob"  # that ways, and in the end whole texts, are judged by
  answer: str = "last_number"

  def __post_init__(self):
    for name, least in (("ways", 2), ("beam", 1), ("horizon", 1), ("budget", 0)):
      if getattr(self, name) < least:
        raise UserError(
          f"config.decoding.{name} is {getattr(self, name)}; it must be at least {least}."
        )
    if self.ways > 32:
      raise UserError(f"config.decoding.ways is {self.ways}; 32 are the most.")
    select.answerer(self.answer)
    select.check(self.rule)
    if select.RULES[self.rule].needs in ((), ("gap",)):
      raise UserError(f"The rule {self.rule} cannot judge a way that has no answer yet.")

  @property
  def confident(self) -> bool:
    """Whether measures of confidence are looked at."""
    return bool(set(select.RULES[self.rule].needs) - {"logprob"})

  @property
  def alternatives(self) -> int:
    """Likeliest tokens that must be known where a row forks."""
    return self.ways


class Group(groups.Group):
  """The tree of one request.

  It goes in rounds of two phases. In the first all rows run until each waits at a fork or has ended; in
  the second each way of each fork runs for the horizon; then the best are kept.
  """

  method = "branch"

  def __init__(self, request, config, prompt: int = 0):
    actions = {
      "fork_ent": config.ent,
      "fork_varent": config.varent - 1e-6,
      "fork_every": config.horizon + 1,
      "fork_wait": True,
    }
    actions = request.actions | actions
    super().__init__(dataclasses.replace(request, actions=actions), config, prompt)
    self.width = config.ways * config.beam
    self._waits: dict[groups.Stream, Pause] = {}  # at a fork
    self._target: dict[groups.Stream, int] = {}  # second phase: length at which a way is judged
    self._from: dict[groups.Stream, int] = {}  # its length at the fork
    self.facts |= {"forks": 0}

  def start(self, rows: Rows) -> None:
    """Once everybody waits or has ended: the next phase."""
    if not self.streams:
      limit = rows.engine.setup.limit(self.request)
      self._budget = self.config.budget or self.config.beam * limit
      self.facts["budget"] = self._budget
      self.admit(rows, self.request, limit=min(limit, self._budget))
      return
    if any(not s.row.waits for s in self.running):
      return
    if self._left and self._short:
      self._go(rows, self._short)
    elif self._target:
      self._prune(rows)
    elif self._left and self._waits:
      self._branch(rows)
    else:
      self._end(rows)

  @property
  def _left(self) -> int:
    return self._budget - sum(stream.own for stream in self.streams)

  @property
  def _short(self) -> list[groups.Stream]:
    """Streams that paused for the budget's sake only: others may have left some of theirs."""
    running = self.running
    if self._target:
      return [s for s in running if len(s.tokens) < self._target.get(s, 0)]
    return [s for s in running if s not in self._waits]

  def paused(self, rows: Rows, stream: groups.Stream, pause: Pause) -> None:
    """At a fork, or at a limit."""
    if pause.why == "fork":
      self._waits[stream] = pause

  def _share(self, streams) -> list[int]:
    """Tokens that each may emit now, so that all together keep to the budget."""
    left, n = self._left, len(streams)
    return [left // n + (i < left % n) for i in range(n)]

  def _go(self, rows: Rows, streams) -> None:
    for stream, share in zip(streams, self._share(streams), strict=True):
      if share:
        n = len(stream.tokens)
        rows.wake(stream.row, min(n + share, self._target.get(stream, n + share)))

  def _branch(self, rows: Rows) -> None:
    """Every fork's ways set out: the waiting row goes on by the likeliest token, new ones by the others."""
    forks, self._waits = self._waits, {}
    self.facts["forks"] += len(forks)
    ways = [
      (stream, i, id)
      for stream, pause in forks.items()
      for i, (id, _, logprob) in enumerate(pause.top[: self.config.ways])
      if logprob > -np.inf
    ]
    plans = []
    for (parent, i, id), share in zip(ways, self._share(ways), strict=True):
      if share:
        plans.append((parent, i, id, share))
    # The forks first: a row must wait for as long as others are forked from it.
    for parent, i, id, share in sorted(plans, key=lambda plan: plan[1] == 0):
      n = len(parent.tokens)
      limit = n + min(share, self.config.horizon)
      stream = parent
      if i:
        stream = self.fork(rows, parent, limit=limit, forced=id)
      else:
        rows.wake(parent.row, limit, forced=id)
      self._target[stream] = n + self.config.horizon
      self._from[stream] = n

  def _prune(self, rows: Rows) -> None:
    """The best of the ways that have not ended stay; who ended stays for the choice."""
    ways = [s for s in self._target if s.finish is None]
    if len(ways) > self.config.beam:
      scores = select.choose(
        self.config.rule, [s.sample_from(self._from[s]) for s in ways], self.answer
      ).scores
      ranked = sorted(
        zip(ways, scores, strict=True), key=lambda pair: -np.nan_to_num(pair[1], nan=-np.inf)
      )
      for stream, _ in ranked[self.config.beam :]:
        self.end(rows, stream, "pruned")
    self._target = {}
    if self._left:
      self._go(rows, self.running)

  def _end(self, rows: Rows) -> None:
    """A choice among those who ended; among those whom the budget stopped where nobody did."""
    ended = any(s.finish not in (None, "pruned") for s in self.streams)
    for stream in self.running:
      self.end(rows, stream, "pruned" if ended else "budget")
    self.choose(rows, self.config.rule, self.samples())
