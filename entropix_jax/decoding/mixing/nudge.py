"""Nudging: a base model writes, and where it is unsure an aligned one writes the next words.

Fei et al. (arXiv:2410.09300; fywalter/nudging, `utils.py`), here token by token instead of by requests of
sixteen tokens:

  base speaks     while its likeliest token has p >= sure; below, the aligned model takes over at once,
                  inside a word too
  aligned speaks  at least to the end of a word; then base takes over if it is sure again, or if both
                  models have the same likeliest token

A word ends where the aligned model's likeliest token begins another (`mixing.boundary`; the original
cuts at spaces alone, so that punctuation belongs to the word before). The aligned model ends the text:
where base's likeliest token would, base counts as unsure, as in the original.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import Mixed, View, boundary, entropies, look, surest
from entropix_jax.rowwise import col

MODELS = ("base", "aligned")
RANGES = {"sure": (0.0, 2.0)}


@struct.dataclass
class Config:
  """Knobs of nudging; sure = 0 without aligned_ends is base alone, sure = 2 without agree the other."""

  sure: float = 0.3  # probability of base's likeliest token; below, base is unsure; above 1: always
  agree: bool = True  # base also takes over at a word on which both agree
  aligned_ends: bool = True  # base, about to end the text, is unsure


@struct.dataclass
class State:
  """Who wrote the last token."""

  aligned_B: jax.Array  # bool


def init(cfg: Config, B: int) -> State:
  """Base has the word."""
  return State(jnp.zeros((B,), bool))


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The logits of the model whose turn it is."""
  base_BV, aligned_BV = view.logits
  seen = look(view)
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
  """Who spoke is who wrote."""
  return mixed.aux
