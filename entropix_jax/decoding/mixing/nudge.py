"""Nudging: a base model writes, and where it is uncertain an aligned model writes the next words.

Fei et al. (arXiv:2410.09300; fywalter/nudging, `utils.py`), here token by token instead of by requests of
sixteen tokens:

  base writes     while its most likely token has p >= sure; below that, the aligned model takes over at
                  once, also inside a word
  aligned writes  at least to the end of the word; then base takes over if it is sure again, or if both
                  models have the same most likely token

A word ends where the aligned model's most likely token begins another one (`mixing.boundary`; the original
splits only at spaces, so that punctuation belongs to the word before it). The aligned model ends the text:
where base's most likely token would end it, base counts as uncertain, as in the original. A base model that is
sure of a line break after an answer misses the place where the aligned one would have ended, and the text runs
on; the demo's base does, so configs/demo_ways.py turns aligned_ends off.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import Mixed, View, boundary, entropies, spreads, surest
from entropix_jax.rowwise import col

MODELS = ("base", "aligned")
RANGES = {"sure": (0.0, 2.0)}


@struct.dataclass
class Config:
  """Knobs of nudging; base alone: sure = 0, aligned_ends off; aligned alone: sure = 2, agree off."""

  sure: float = 0.3  # base is uncertain if its most likely token has a lower probability than this
  agree: bool = True  # base also takes over at a word if both have the same most likely token
  aligned_ends: bool = True  # base is uncertain where it would end the text


@struct.dataclass
class State:
  """Which model wrote the last token."""

  aligned_B: jax.Array  # bool


def init(cfg: Config, B: int) -> State:
  """Base begins."""
  return State(jnp.zeros((B,), bool))


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The logits of the model whose turn it is."""
  base_BV, aligned_BV = view.logits
  seen = spreads(view)
  base_B, p_B = surest(base_BV, seen[0])
  aligned_B, _ = surest(aligned_BV, seen[1])
  ends_B = jnp.any(base_B[:, None] == view.stop_BE, axis=-1)
  sure_B = (p_B >= cfg.sure) & ~(cfg.aligned_ends & ends_B)
  back_B = boundary(view, aligned_B) & (sure_B | (cfg.agree & (base_B == aligned_B)))
  speaks_B = jnp.where(state.aligned_B, ~back_B, ~sure_B)
  return Mixed(
    logits_BV=jnp.where(col(speaks_B), aligned_BV, base_BV),
    stats=entropies(seen) | {"weight": speaks_B.astype(jnp.float32)},
    aux=State(speaks_B),
  )


def commit(cfg: Config, state: State, mixed: Mixed, view: View, token_B: jax.Array) -> State:
  """Store which model wrote the token."""
  return mixed.aux
