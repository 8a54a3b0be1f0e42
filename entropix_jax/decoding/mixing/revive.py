"""Entropy-collapse injection: mix in the base model's law where the instruct model's entropy stays low.

This is our own method; the most similar published one is BACo, see route.py. Definition, with H_t the
entropy in nats of the instruct model's next-token law at position t:

  mean        E_0 = H_0, E_t = decay E_{t-1} + (1 - decay) H_t
  collapse    begins at t if E < low_ent at t and at the `patience` - 1 positions before it;
              ends at t if E_t >= high_ent, or after the `most`-th injected token
  injection   begins at the first word boundary of a collapse and lasts as long as the collapse
  law         p_t = (1 - w_t) p_instruct + w_t p_base in an injection, else p_instruct
  weight      w_t = 1 - (1 - weight) exp(-weight_kl KL_t), KL_t = KL(base || instruct) in nats

E_t includes H_t, which is known before the token of t is drawn. After `most` injected tokens the count to
`patience` starts again, so if the entropy stays low there are at least `patience` - 1 tokens between two
injections. A word boundary is where the instruct model's most likely token begins a word
(`mixing.boundary`). KL_t is summed over the ids that both models allow.

Doubt: it is not measured whether a low mean tells a collapsed model from one that is certain and right, nor
whether the injected tokens give variety that noise would not. The defaults are guesses [n17].
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import (
  Mixed,
  View,
  boundary,
  entropies,
  leaning,
  normalised,
  spreads,
)
from entropix_jax.errors import UserError
from entropix_jax.rowwise import any_row, best_id, col

MODELS = ("instruct", "base")
COUNT = (1, 2**31 - 1)
RANGES = {
  "decay": (0.0, 0.9999),
  "patience": COUNT,
  "most": COUNT,
  "weight": (0.0, 1.0),
  "weight_kl": (0.0, 1e3),
}


@struct.dataclass
class Config:
  """Knobs of the injection; with weight = weight_kl = 0 it is the instruct model alone, bit for bit."""

  decay: float = 0.9  # of the running mean of the entropy, per token
  low_ent: float = 0.1  # nats; the mean is low if it is below this
  high_ent: float = 0.5  # nats; a collapse ends if the mean is at least this
  patience: int = 8  # positions in a row with a low mean that begin a collapse
  most: int = 8  # most tokens injected in one collapse
  weight: float = 0.5  # base's share of the law; 1: base alone, bit for bit
  weight_kl: float = 0.0  # per nat; how fast that share grows with KL(base || instruct)


@struct.dataclass
class State:
  """Where each row is in a collapse."""

  mean_B: jax.Array  # float32, nats; E of the last position
  low_B: jax.Array  # int32; positions in a row with a low mean
  collapsed_B: jax.Array  # bool; in a collapse
  spent_B: jax.Array  # int32; tokens injected in this collapse so far


def check(cfg: Config) -> None:
  """Raises UserError for knobs that contradict each other."""
  if cfg.high_ent <= cfg.low_ent:
    raise UserError("high_ent must be larger than low_ent; raise high_ent, or lower low_ent.")


def init(cfg: Config, B: int) -> State:
  """The state before the first position."""
  zero_B = jnp.zeros((B,), jnp.int32)
  return State(jnp.zeros((B,)), zero_B, jnp.zeros((B,), bool), zero_B)


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The instruct model's logits; in an injection, those of the mixed law."""
  instruct_BV, base_BV = view.logits
  seen = spreads(view)
  mean_B = cfg.decay * state.mean_B + (1.0 - cfg.decay) * seen[0].ent
  mean_B = jnp.where(view.pos_B == 0, seen[0].ent, mean_B)
  low_B = jnp.where(mean_B < cfg.low_ent, state.low_B + 1, 0)
  collapsed_B = jnp.where(state.collapsed_B, mean_B < cfg.high_ent, low_B >= cfg.patience)
  begins_B = (state.spent_B > 0) | boundary(view, best_id(instruct_BV))
  injects_B = collapsed_B & begins_B

  def inject(instruct_BV, base_BV):
    return _blend(cfg, instruct_BV, base_BV, seen)

  def leave(instruct_BV, base_BV):
    return instruct_BV, jnp.zeros_like(mean_B), jnp.zeros_like(mean_B)

  logits_BV, weight_B, kl_B = any_row(injects_B, inject, leave, instruct_BV, base_BV)
  spent_B = jnp.where(injects_B, state.spent_B + 1, 0)
  over_B = spent_B >= cfg.most
  return Mixed(
    logits_BV=logits_BV,
    stats=entropies(seen)
    | {
      "entropy_mean": mean_B,
      "collapsed": collapsed_B.astype(jnp.float32),
      "weight": weight_B,
      "kl": kl_B,
    },
    aux=State(
      mean_B=mean_B,
      low_B=jnp.where(over_B, 0, low_B),
      collapsed_B=collapsed_B & ~over_B,
      spent_B=jnp.where(over_B, 0, spent_B),
    ),
  )


def _blend(cfg: Config, instruct_BV, base_BV, seen) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits_BV of the mixed law, weight_B, kl_B)."""
  instruct_logp_BV = normalised(instruct_BV, seen[0])
  base_logp_BV = normalised(base_BV, seen[1])
  apart_BV = leaning(base_logp_BV, instruct_logp_BV)
  kl_B = jnp.maximum(jnp.sum(jnp.exp(base_logp_BV) * apart_BV, axis=-1), 0.0)
  w_B = cfg.weight - (1.0 - cfg.weight) * jnp.expm1(-cfg.weight_kl * kl_B)
  w_B1 = col(w_B)
  law_BV = jnp.logaddexp(jnp.log1p(-w_B1) + instruct_logp_BV, jnp.log(w_B1) + base_logp_BV)
  # Log-probabilities have no level; a level keeps penalties that depend on it from a jump [n08].
  mixed_BV = law_BV + col((1.0 - w_B) * seen[0].lse + w_B * seen[1].lse)
  alone_BV = jnp.where(w_B1 == 0, instruct_BV, base_BV)
  return jnp.where((w_B1 == 0) | (w_B1 == 1), alone_BV, mixed_BV), w_B, kl_B


def commit(cfg: Config, state: State, mixed: Mixed, view: View, token_B: jax.Array) -> State:
  """Store what `mix` computed for the position."""
  return mixed.aux
