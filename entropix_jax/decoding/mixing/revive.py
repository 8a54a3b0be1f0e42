"""Entropy-collapse injection: where an instruct model has run dry, some of its base model's law.

Ours; the nearest published kin is BACo, see route.py. The definition, with H_t the entropy in nats of the
instruct model's next-token law at position t:

  mean        E_0 = H_0, E_t = decay E_{t-1} + (1 - decay) H_t
  collapse    begins at t if E_t < low_ent and so were the `patience` - 1 positions before;
              ends at t if E_t >= high_ent, or behind the `most`-th injected token
  injection   begins at the first word boundary of a collapse and lasts as long as the collapse
  law         p_t = (1 - w_t) p_instruct + w_t p_base in an injection, else p_instruct
  weight      w_t = 1 - (1 - weight) exp(-weight_kl KL_t), KL_t = KL(base || instruct) in nats

E_t holds H_t, which is known before the token of t is drawn. Behind `most` injected tokens the count to
`patience` begins anew, so in a text that stays dry at least `patience` - 1 tokens of its own lie
between two injections.
A word boundary is where the instruct model's likeliest token begins a word (`mixing.boundary`). KL_t is
taken over the ids that both models allow.

Doubt: whether a low mean tells a model that has run dry from one that is right, and whether the injected
tokens buy variety that noise would not, is not measured; nor are the defaults more than guesses [n17].
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.decoding.mixing import Mixed, View, boundary, entropies, leaning, look, normalised
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
  """Knobs of the injection; weight = weight_kl = 0 is the instruct model alone, bit for bit."""

  decay: float = 0.9  # of the running mean of the entropy
  low_ent: float = 0.1  # nats; mean below: running dry
  high_ent: float = 0.5  # nats; mean from here on: recovered
  patience: int = 8  # tokens that the mean must be low
  most: int = 8  # tokens injected in one collapse
  weight: float = 0.5  # base's part of the law; 1: base alone, by its own logits
  weight_kl: float = 0.0  # per nat; how fast the part grows with the distance of the models


@struct.dataclass
class State:
  """Where a row is in a collapse."""

  mean_B: jax.Array  # float32, nats; E of the last position
  low_B: jax.Array  # int32; positions in a row with a low mean
  collapsed_B: jax.Array  # bool
  spent_B: jax.Array  # int32; tokens injected in this collapse


def check(cfg: Config) -> None:
  """Raises UserError for knobs that contradict each other."""
  if cfg.high_ent <= cfg.low_ent:
    raise UserError("high_ent ends what low_ent begins; give it more nats than low_ent.")


def init(cfg: Config, B: int) -> State:
  """Nothing seen."""
  zero_B = jnp.zeros((B,), jnp.int32)
  return State(jnp.zeros((B,)), zero_B, jnp.zeros((B,), bool), zero_B)


def mix(cfg: Config, state: State, view: View) -> Mixed:
  """The instruct model's logits, or in an injection those of the mixed law."""
  instruct_BV, base_BV = view.logits
  seen = look(view)
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
  # The law has no level of its own, and penalties that look at one shall see no jump [n08].
  mixed_BV = law_BV + col((1.0 - w_B) * seen[0].lse + w_B * seen[1].lse)
  alone_BV = jnp.where(w_B1 == 0, instruct_BV, base_BV)
  return jnp.where((w_B1 == 0) | (w_B1 == 1), alone_BV, mixed_BV), w_B, kl_B


def commit(cfg: Config, state: State, mixed: Mixed, view: View, token_B: jax.Array) -> State:
  """The position is counted."""
  return mixed.aux
