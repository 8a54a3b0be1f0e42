"""The sampler contract, and the folder as registry: a sampler is a module in here, found by name.

Why: a sampler states a *law*, the log-probabilities of what will be emitted, and never draws. One
shared draw does. So text does not depend on batch neighbours, log-probabilities are honest, and every
sampler can be tested against its law by counting.

A module `sampling/NAME.py` has
  BRANCHES   names of its branches, in the order of their codes
  Config     a flax.struct dataclass of numbers; each may be a scalar or one value a row, always traced
  init(cfg, B) -> state                          a pytree of arrays with a leading row axis
  step(cfg, state, obs) -> Decision              looks, states a law, changes nothing
  commit(cfg, state, decision, token_B) -> state
  CASES      branch name -> {"p": next-token probabilities that must reach it, any knob: its value}
  RANGES     optional: knob -> (least, most) that a user may set

Rows are told apart by `where`. `vmap(lax.cond)` runs every branch for every row [n02], so dear work
stands behind one `rows.any_row` for the whole batch.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import flax.struct
import jax

from entropix_jax.errors import UserError
from entropix_jax.metrics import AttnStats, Spread


@flax.struct.dataclass
class Observation:
  """All that a sampler may look at."""

  logits_BV: jax.Array  # float32, raw; -inf marks ids that must not be emitted
  raw: Spread  # of logits_BV: lse_B, ent_B, varent_B
  attn: AttnStats | None  # of the query that made the logits; None when the engine measures nothing
  token_B: jax.Array  # the token that was fed
  pos_B: jax.Array  # index of the token to be generated in its stream; 0 is the first
  key_B2: jax.Array  # noise key of each row, for draw.gumbel(..., Purpose.AUX)


@flax.struct.dataclass
class Decision:
  """What a sampler answers."""

  law_BV: jax.Array  # normalised log-probabilities, -inf where the token is excluded
  branch_B: jax.Array  # int32 index into BRANCHES
  stats: dict[
    str, jax.Array
  ]  # the knobs in force and other numbers worth a trace line, (B,) float32


def names() -> list[str]:
  """Every sampler in the folder."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(name: str) -> ModuleType:
  """The sampler module of that name. Raises UserError that lists what there is."""
  if name not in names():
    raise UserError(f"There is no sampler {name!r}; choose one of: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")


def knobs(sampler: ModuleType) -> dict[str, float | int | bool]:
  """Name -> default of every knob."""
  return {f.name: f.default for f in flax.struct.dataclasses.fields(sampler.Config)}


def configure(sampler: ModuleType, settings: dict[str, Any]):
  """The sampler's Config with some knobs set, each checked to be a number of its default's kind.

  Raises:
    UserError: an unknown knob (the known ones are listed) or a value that is not such a number.
  """
  defaults = knobs(sampler)
  values = dict(defaults)
  for name, value in settings.items():
    if name not in defaults:
      here = sampler.__name__.rsplit(".", 1)[1]
      raise UserError(f"The sampler {here!r} has no knob {name!r}; it has: {', '.join(defaults)}.")
    kind = type(defaults[name])
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float):
      raise UserError(f"The knob {name!r} is {value!r}; give it a {kind.__name__}.")
    if kind is int and not whole:
      raise UserError(f"The knob {name!r} is {value!r}; give it a whole number.")
    values[name] = kind(value)
  config = sampler.Config(**values)
  for name, (low, high) in getattr(sampler, "RANGES", {}).items():
    if not low <= values[name] <= high:
      raise UserError(f"The knob {name!r} is {values[name]}; it must lie in [{low}, {high}].")
  return config
