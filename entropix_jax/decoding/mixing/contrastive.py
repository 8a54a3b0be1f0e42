"""Contrastive decoding: what a strong model likes better than a weak one, among what it likes at all.

  z = (1 + beta) z_expert - beta z_amateur / amateur_temp   where p_expert >= cut max p_expert

Li et al. (arXiv:2210.15097) give the set, with cut = 0.1, and the amateur's temperature; O'Brien and
Lewis (arXiv:2309.09117) the form with beta, which is the expert's own at beta = 0, and use 0.5.

Why the amateur is normalised first: then the expert alone is the amount by which an id is moved where the
amateur excludes it and there is no difference to speak of.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import (
  Mixed,
  View,
  entropies,
  leaning,
  look,
  normalised,
  plausible,
)
from entropix_jax.rowwise import col

MODELS = ("expert", "amateur")
RANGES = {"cut": (0.0, 1.0), "beta": (0.0, 100.0), "amateur_temp": (1e-2, 100.0)}


@struct.dataclass
class Config:
  """Knobs of contrastive decoding; cut = beta = 0 is the expert alone, bit for bit."""

  cut: float = 0.1  # share of the expert's best probability that an id needs
  beta: float = 0.5  # how much of the difference
  amateur_temp: float = 1.0  # larger: a flatter amateur, who objects less


def init(cfg: Config, B: int) -> tuple:
  """Nothing is remembered."""
  return ()


def mix(cfg: Config, state: tuple, view: View) -> Mixed:
  """The expert's logits inside its plausible set, moved away from the amateur's."""
  expert_BV, amateur_BV = view.logits
  seen = look(view)
  amateur_logp_BV = normalised(amateur_BV, seen[1]) / col(cfg.amateur_temp)
  lean_BV = leaning(normalised(expert_BV, seen[0]), amateur_logp_BV)
  live_BV = plausible(expert_BV, cfg.cut)
  return Mixed(
    logits_BV=jnp.where(live_BV, expert_BV + col(cfg.beta) * lean_BV, -jnp.inf),
    stats=entropies(seen) | {"kept": jnp.sum(live_BV, axis=-1).astype(jnp.float32)},
  )


def commit(cfg: Config, state: tuple, mixed: Mixed, view: View, token_B: jax.Array) -> tuple:
  """Nothing changes."""
  return state
