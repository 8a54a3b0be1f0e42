"""Proxy tuning: what tuning did to a small model, added to a large one that nobody tuned.

  z = z_base + alpha (log p_expert - log p_anti)

`expert` is `anti` after tuning, and the difference is what tuning taught (DExperts, arXiv:2105.03023;
proxy tuning, arXiv:2401.08565, with alpha = 1 and no cut).

Why the guards: a difference of logits explodes where `anti` excludes an id, and is large where both are
far down in their tails. An id that base or expert excludes is excluded; what only anti excludes is left
where base has it; `cut` keeps to what base finds plausible. Where that leaves nothing, base speaks alone.
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

MODELS = ("base", "expert", "anti")
RANGES = {"alpha": (0.0, 100.0), "cut": (0.0, 1.0)}


@struct.dataclass
class Config:
  """Knobs of proxy tuning."""

  alpha: float = 1.0  # how much of the difference; 0: base alone, bit for bit
  cut: float = 0.0  # share of base's best probability that an id needs; 0: none


def init(cfg: Config, B: int) -> tuple:
  """Nothing is remembered."""
  return ()


def mix(cfg: Config, state: tuple, view: View) -> Mixed:
  """Base's logits, moved by what the expert likes better than its untuned self."""
  base_BV, expert_BV, anti_BV = view.logits
  seen = look(view)
  lean_BV = leaning(normalised(expert_BV, seen[1]), normalised(anti_BV, seen[2]))
  live_BV = plausible(base_BV, cfg.cut) & ((expert_BV > -jnp.inf) | (col(cfg.alpha) == 0))
  kept_B = jnp.sum(live_BV, axis=-1)
  moved_BV = jnp.where(live_BV, base_BV + col(cfg.alpha) * lean_BV, -jnp.inf)
  return Mixed(
    logits_BV=jnp.where(col(kept_B) > 0, moved_BV, base_BV),
    stats=entropies(seen) | {"kept": kept_B.astype(jnp.float32)},
  )


def commit(cfg: Config, state: tuple, mixed: Mixed, view: View, token_B: jax.Array) -> tuple:
  """Nothing changes."""
  return state
