"""Routing: each word by the base model where it has several in mind, else by the aligned one.

BACo (Wang et al., arXiv:2511.05650): p = w p_base + (1 - w) p_aligned with w in {0, 1}. Base writes where
it is uncertain, by its best probability (BACo-P) or by its entropy (BACo-H), since there an aligned model
has given up the variety that base still has. Before that, content decides: the aligned model writes
punctuation (-Punc) and, if asked, function words (-FC). Models change at word boundaries only.

The defaults are the combination the paper finds best, -P-Punc; its threshold is a dial from the aligned
model (0) to base (1), and 0.5 is ours. Which model's likeliest token tells the role of what comes is not
stated where we could read; we ask base, since it is base that is to be kept from writing it.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import (
  FUNCTION,
  MARK,
  Mixed,
  View,
  boundary,
  entropies,
  look,
  surest,
)
from entropix_jax.rowwise import col

MODELS = ("base", "aligned")
NEVER = 1e9  # nats; no entropy is above
RANGES = {"prob": (0.0, 2.0), "ent": (0.0, NEVER)}
USES = ({"prob": 0.0, "ent": 1.0},)


@struct.dataclass
class Config:
  """Knobs of the router; prob = 0 is the aligned model alone, prob = 2 without marks base."""

  prob: float = 0.5  # of base's likeliest token; below: base writes
  ent: float = NEVER  # nats; base's entropy above: base writes
  marks: bool = True  # the aligned model writes what base would make punctuation or an end
  functions: bool = False  # and what base would make a function word


@struct.dataclass
class State:
  """Who wrote the last token."""

  aligned_B: jax.Array  # bool


def init(cfg: Config, B: int) -> State:
  """Nobody has written; the first token is a boundary."""
  return State(jnp.zeros((B,), bool))


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The logits of the model that writes this word."""
  base_BV, aligned_BV = view.logits
  seen = look(view)
  base_B, p_B = surest(base_BV, seen[0])
  aligned_B, _ = surest(aligned_BV, seen[1])
  role_B = view.words_V[base_B]
  style_B = (cfg.marks & (role_B == MARK)) | (cfg.functions & (role_B == FUNCTION))
  open_B = (p_B < cfg.prob) | (seen[0].ent > cfg.ent)
  here_B = boundary(view, jnp.where(state.aligned_B, aligned_B, base_B))
  writes_B = jnp.where(here_B, style_B | ~open_B, state.aligned_B)
  return Mixed(
    logits_BV=jnp.where(col(writes_B), aligned_BV, base_BV),
    stats=entropies(seen) | {"weight": writes_B.astype(jnp.float32)},
    aux=State(writes_B),
  )


def commit(cfg: Config, state: State, mixed: Mixed, view: View, token_B: jax.Array) -> State:
  """Who wrote is remembered."""
  return mixed.aux
