"""Best of n: draw n samples and keep one by a rule, such as a majority vote on their answers.

  python -m entropix_jax.main --config=configs/demo.py --config.decoding.name=best_of_n \\
      --config.decoding.n=8 --config.decoding.rule=majority --prompt="..."

Sample i is the text of a request whose stream is i larger, so a larger n does not change the first samples:
a study with n = 8 contains the one with n = 4.
"""

import dataclasses

from entropix_jax.decoding import groups, select
from entropix_jax.errors import UserError
from entropix_jax.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method; select.py explains the rules, their options and how answers are found."""

  n: int = 8  # samples
  rule: str = "majority"  # of select.RULES
  answer: str = "last_number"  # how answers are found, see select.answerer
  power: float = 0.5  # option of the rule borda
  measure: str = "bottom"  # of deepconf
  window: int = 128  # of deepconf; tokens
  keep: float = 90.0  # of deepconf; percent
  combine: str = "sum"  # of cot

  def __post_init__(self):
    if self.n < 1:
      raise UserError(f"config.decoding.n is {self.n}; it must be at least 1.")
    select.answerer(self.answer)
    select.check_rule(self.rule, **self.options)
    if self.rule == "judge":
      raise UserError("The rule judge needs a judge; use --config.decoding.name=adaptive.")
    for field in dataclasses.fields(self)[3:]:
      if getattr(self, field.name) != field.default and field.name not in self.options:
        raise UserError(f"config.decoding.{field.name} is not for the rule {self.rule}; omit it.")

  @property
  def options(self):
    """Name -> value of the rule's own options."""
    names = select.RULES[self.rule].options if self.rule in select.RULES else ()
    return {name: getattr(self, name) for name in names if hasattr(self, name)}

  @property
  def confident(self) -> bool:
    """Whether the rule needs measures of confidence, see metrics.Confidence."""
    return bool(set(select.RULES[self.rule].needs) - {"logprob"})


class Group(groups.Group):
  """n samples of one request."""

  method = "best_of_n"

  def start(self, rows: Rows) -> None:
    """Begin as many samples as there are free rows; choose one when all have ended."""
    while rows.free and len(self.samples) < self.config.n:
      self.draw(rows)
    if len(self.samples) == self.config.n and not self.running:
      self.choose(rows, self.config.rule, self.candidates(), **self.config.options)
