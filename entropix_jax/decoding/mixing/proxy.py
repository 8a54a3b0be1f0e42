"""Proxy tuning: add to a large untuned model the change that tuning made to a small one.

  z = z_base + alpha (log p_expert - log p_anti)

`expert` is the small model `anti` after tuning (DExperts, arXiv:2105.03023; proxy tuning, arXiv:2401.08565,
with alpha = 1 and no cut).

Why there are exceptions: the difference is infinite where `anti` excludes an id, and large where both
probabilities are tiny. So an id that base or expert excludes is excluded, an id that only anti excludes keeps
z_base, and `cut` drops ids that are implausible for base. Where no id is left, base is used alone.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import (
  Mixed,
  View,
  entropies,
  leaning,
  normalised,
  plausible,
  spreads,
)
from entropix_jax.rowwise import col

MODELS = ("base", "expert", "anti")
RANGES = {"alpha": (0.0, 100.0), "cut": (0.0, 1.0)}


@struct.dataclass
class Config:
  """Knobs of proxy tuning; with alpha = cut = 0 it is base alone, bit for bit."""

  alpha: float = 1.0  # weight of the difference
  cut: float = 0.0  # share of base's highest probability that a token needs; 0: none


def init(cfg: Config, B: int) -> tuple:
  """There is no state."""
  return ()


def mix(cfg: Config, state: tuple, view: View) -> Mixed:
  """Base's logits plus alpha times the difference of expert and anti; -inf at excluded ids."""
  base_BV, expert_BV, anti_BV = view.logits
  seen = spreads(view)
  lean_BV = leaning(normalised(expert_BV, seen[1]), normalised(anti_BV, seen[2]))
  live_BV = plausible(base_BV, cfg.cut) & ((expert_BV > -jnp.inf) | (col(cfg.alpha) == 0))
  kept_B = jnp.sum(live_BV, axis=-1)
  moved_BV = jnp.where(live_BV, base_BV + col(cfg.alpha) * lean_BV, -jnp.inf)
  return Mixed(
    logits_BV=jnp.where(col(kept_B) > 0, moved_BV, base_BV),
    stats=entropies(seen) | {"kept": kept_B.astype(jnp.float32)},
  )


def commit(cfg: Config, state: tuple, mixed: Mixed, view: View, token_B: jax.Array) -> tuple:
  """There is no state."""
  return state
