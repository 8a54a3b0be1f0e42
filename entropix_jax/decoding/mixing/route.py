"""Routing: the base model writes a word where it is uncertain; else the aligned model writes it.

BACo (Wang et al., arXiv:2511.05650): p = w p_base + (1 - w) p_aligned with w in {0, 1}. Base writes where
it is uncertain, measured by its highest probability (BACo-P) or its entropy (BACo-H), because there the
aligned model has lost the variety that base still has. A rule on content comes first: the aligned model
writes punctuation (-Punc) and, with `functions`, function words (-FC). The model changes only at word
boundaries.

The defaults are the paper's best combination, -P-Punc. Its threshold goes from the aligned model (0) to base
(1); 0.5 is our choice. We found no statement of which model's most likely token decides what kind of word
comes next. We use base's, because the rule is to keep base from writing such words.
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
  spreads,
  surest,
)
from entropix_jax.rowwise import col

MODELS = ("base", "aligned")
NEVER = 1e9  # nats; no entropy exceeds this
RANGES = {"prob": (0.0, 2.0), "ent": (0.0, NEVER)}
USES = ({"prob": 0.0, "ent": 1.0},)


@struct.dataclass
class Config:
  """Knobs of the router; prob = 0 is the aligned model alone, prob = 2 with marks off is base alone."""

  prob: float = 0.5  # base writes if its most likely token is less likely than this
  ent: float = NEVER  # nats; base also writes if its entropy is above this
  marks: bool = True  # the aligned model writes where base would write punctuation or end the text
  functions: bool = False  # the aligned model also writes where base would write a function word


@struct.dataclass
class State:
  """Which model wrote the last token."""

  aligned_B: jax.Array  # bool


def init(cfg: Config, B: int) -> State:
  """The value does not matter, because the first token is a word boundary."""
  return State(jnp.zeros((B,), bool))


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The logits of the model that writes this word."""
  base_BV, aligned_BV = view.logits
  seen = spreads(view)
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
  """Store which model wrote the token."""
  return mixed.aux
