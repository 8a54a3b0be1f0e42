"""Contrastive decoding: raise the tokens that a strong model, the expert, prefers more than a weak one does.

  z = (1 + beta) z_expert - beta z_amateur / amateur_temp   where p_expert >= cut max p_expert

The set of plausible tokens, with cut = 0.1, and the amateur's temperature are from Li et al.
(arXiv:2210.15097). The form with beta, which is the expert alone at beta = 0, is from O'Brien and Lewis
(arXiv:2309.09117), who use 0.5.

Why both are normalised first: then z_expert moves by a difference of log-probabilities, and an id that the
amateur excludes, where there is no difference, keeps exactly z_expert.
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

MODELS = ("expert", "amateur")
RANGES = {"cut": (0.0, 1.0), "beta": (0.0, 100.0), "amateur_temp": (1e-2, 100.0)}


@struct.dataclass
class Config:
  """Knobs of contrastive decoding; with cut = beta = 0 it is the expert alone, bit for bit."""

  cut: float = 0.1  # share of the expert's highest probability that a token needs; 0: none
  beta: float = 0.5  # weight of the difference
  amateur_temp: float = 1.0  # the amateur's temperature; larger is flatter


def init(cfg: Config, B: int) -> tuple:
  """There is no state."""
  return ()


def mix(cfg: Config, state: tuple, view: View) -> Mixed:
  """The expert's logits for its plausible tokens, moved away from the amateur's; -inf elsewhere."""
  expert_BV, amateur_BV = view.logits
  seen = spreads(view)
  amateur_logp_BV = normalised(amateur_BV, seen[1]) / col(cfg.amateur_temp)
  lean_BV = leaning(normalised(expert_BV, seen[0]), amateur_logp_BV)
  live_BV = plausible(expert_BV, cfg.cut)
  return Mixed(
    logits_BV=jnp.where(live_BV, expert_BV + col(cfg.beta) * lean_BV, -jnp.inf),
    stats=entropies(seen) | {"kept": jnp.sum(live_BV, axis=-1).astype(jnp.float32)},
  )


def commit(cfg: Config, state: tuple, mixed: Mixed, view: View, token_B: jax.Array) -> tuple:
  """There is no state."""
  return state
