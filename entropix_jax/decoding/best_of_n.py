"""Best of n: sample n times, keep one by a rule, such as the answer that most samples give.

  python -m entropix_jax.main --config=configs/demo.py --config.decoding.name=best_of_n \\
      --config.decoding.n=8 --config.decoding.rule=majority --prompt="..."

Sample i is what a request with stream i says by itself, so more samples never change the first ones, and a
study of n = 8 has those of n = 4 in it.
"""

import dataclasses

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.generate import Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """How many, and how one is chosen; see select.py for rules, their options and places of answers."""

  n: int = 8
  rule: str = "majority"
  answer: str = "last_number"
  power: float = 0.5  # borda
  measure: str = "bottom"  # deepconf
  window: int = 128  # deepconf
  keep: float = 90.0  # deepconf
  combine: str = "sum"  # cot

  def __post_init__(self):
    if self.n < 1:
      raise UserError(f"config.decoding.n is {self.n}; it must be at least 1.")
    select.answerer(self.answer)
    select.check(self.rule, **self.options)
    if self.rule == "judge":
      raise UserError("The rule judge needs a judge; use --config.decoding.name=adaptive.")
    for field in dataclasses.fields(self)[3:]:
      if getattr(self, field.name) != field.default and field.name not in self.options:
        raise UserError(f"config.decoding.{field.name} is not for the rule {self.rule}.")

  @property
  def options(self):
    """Those of the rule."""
    names = select.RULES[self.rule].options if self.rule in select.RULES else ()
    return {name: getattr(self, name) for name in names if hasattr(self, name)}

  @property
  def confident(self) -> bool:
    """Whether measures of confidence are looked at."""
    return bool(set(select.RULES[self.rule].needs) - {"logprob"})


class Group(groups.Group):
  """n samples of one request."""

  method = "best_of_n"

  def start(self, rows: Rows) -> None:
    """As many as there is room for; the choice when all have ended."""
    while rows.free and len(self.streams) < self.config.n:
      stream = self.request.stream + len(self.streams)
      self.admit(rows, dataclasses.replace(self.request, stream=stream))
    if len(self.streams) == self.config.n and not self.running:
      self.choose(rows, self.config.rule, self.samples(), **self.config.options)
