"""CoT-decoding (arXiv:2402.10200): a branch for each of the top n first tokens; keep the most certain answer.

Why: a branch that begins with the second, third, ... most likely token often works its answer out step by
step, and a model is more certain of such an answer. The measure of certainty is the probability of each of
the answer's tokens minus that of the runner-up.
"""

import dataclasses
from collections.abc import Sequence

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  n: int = 10  # branches, one for each of the top n first tokens
  combine: str = "sum"  # add the scores of branches with the same answer; "best": the best branch
  answer: str = "last_number"  # how answers are found, see select.answerer

  def __post_init__(self):
    if self.n < 1:
      raise UserError(f"config.decoding.n is {self.n}; it must be at least 1.")
    select.answerer(self.answer)
    select.check_rule("cot", combine=self.combine)

  confident = True


class Group(groups.Group):
  """The branches of one request; after the first token the sampler decides, which should be greedy."""

  method = "cot"
  _first: Sequence[int] = ()  # tokens to begin with

  def start(self, rows: Rows) -> None:
    """Begin branches, most likely first token first, in all free rows; choose when all have ended."""
    if not self._first:
      self._first = rows.engine.most_likely(self._prefix, self.config.n)
    while rows.free and len(self.samples) < len(self._first):
      self.admit(rows, self.request, forced=self._first[len(self.samples)])
    if len(self.samples) == len(self._first) and not self.running:
      self.choose(rows, "cot", self.candidates(), combine=self.config.combine)
