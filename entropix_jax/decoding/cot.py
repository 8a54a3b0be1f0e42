"""CoT-decoding (arXiv:2402.10200): begin with each of the k likeliest first tokens, keep the surest answer.

Why: what greedy decoding would have said second, third, ... at the first token is often a worked answer,
and a model is surer of an answer that it has worked out: how much likelier each token of the answer
is than the runner-up tells.
"""

import dataclasses

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.generate import Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  n: int = 10  # first tokens
  combine: str = "sum"  # over branches of one answer; "best": the best branch
  answer: str = "last_number"

  def __post_init__(self):
    if self.n < 1:
      raise UserError(f"config.decoding.n is {self.n}; it must be at least 1.")
    select.answerer(self.answer)
    select.check("cot", combine=self.combine)

  confident = True


class Group(groups.Group):
  """k branches of one request; behind the first token the sampler decides, best a greedy one."""

  method = "cot"

  def start(self, rows: Rows) -> None:
    """The next likeliest first tokens, as many as there is room for."""
    if self._prefix is None:
      self._prefix = rows.prefill(self.request)
      self._first = rows.engine.most_likely(self._prefix, self.config.n)
    while rows.free and len(self.streams) < len(self._first):
      self.admit(rows, self.request, forced=self._first[len(self.streams)])
    if len(self.streams) == len(self._first) and not self.running:
      self.choose(rows, "cot", self.samples(), combine=self.config.combine)
