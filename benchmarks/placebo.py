"""Quadrant without its signal: the same sampler, whose entropy, varentropy and attention are not those of the token.

It is a sampler of its own, registered by benchmarks/study.py. With its two own knobs off it is quadrant, bit for bit.

  shuffle      all signals together are those of one of the row's earlier tokens, each of the last 256 equally likely, drawn by the
               row's noise. So a branch has about the share that its signals give it, at the wrong moments. The first token has its own
  varent       varentropy is replaced by a number, or by its mean over the row's earlier tokens (-2)

The law is conditional on the signals that were drawn. Attention that is off, and one branch's policy alone, are knobs of quadrant.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.metrics import AttnStats
from entropix_jax.rowwise import col
from entropix_jax.sampling import Decision, Observation, draw, quadrant

KEPT = 256  # tokens
OWN, MEAN = -1.0, -2.0  # values of `varent`

BRANCHES, CASES, QUANTILES, USES = (
  quadrant.BRANCHES, quadrant.CASES, quadrant.QUANTILES, quadrant.USES
)  # fmt: skip
RANGES = quadrant.RANGES | {"varent": (MEAN, 1e3)}


@struct.dataclass
class Config(quadrant.Config):
  shuffle: bool = False  # the signals of an earlier token
  varent: float = OWN  # nats^2; what varentropy is replaced by; -1: nothing; -2: its mean so far


@struct.dataclass
class State:
  """What a row remembers."""

  own: quadrant.State | tuple  # of quadrant, whose quantiles are those of the true signals
  value_BXM: jax.Array  # float32; a ring of the signals of KEPT tokens
  count_B: jax.Array  # int32; tokens so far
  sum_B: jax.Array  # nats^2; of their varentropies


def _signals(obs: Observation) -> jax.Array:
  """signal_BM: entropy, varentropy and the attention statistics, zeros where none are measured."""
  attn = jax.tree.leaves(obs.attn) or [jnp.zeros_like(obs.raw.ent)] * len(AttnStats.__annotations__)
  return jnp.stack([obs.raw.ent, obs.raw.varent, *attn], axis=-1)


def init(cfg: Config, B: int) -> State:
  M = 2 + len(AttnStats.__annotations__)
  zero_B = jnp.zeros((B,), jnp.float32)
  return State(
    quadrant.init(cfg, B), jnp.zeros((B, KEPT, M), jnp.float32), jnp.zeros((B,), jnp.int32), zero_B
  )


def chosen(cfg: Config, state: State, obs: Observation) -> jax.Array:
  """index_B: which remembered token each row's signals are of; -1: its own."""
  noise_BX = draw.gumbel(obs.key_B2, obs.pos_B, KEPT, draw.Purpose.AUX)
  live_BX = jnp.arange(KEPT) < col(jnp.minimum(state.count_B, KEPT))
  index_B = jnp.argmax(jnp.where(live_BX, noise_BX, -jnp.inf), axis=-1)
  return jnp.where(cfg.shuffle & (state.count_B > 0), index_B, -1)


def seen(cfg: Config, state: State, obs: Observation) -> Observation:
  """What quadrant is shown in place of an observation."""
  index_B = chosen(cfg, state, obs)
  other_BM = jnp.take_along_axis(state.value_BXM, jnp.maximum(index_B, 0)[:, None, None], axis=1)
  signal_BM = jnp.where(col(index_B < 0), _signals(obs), other_BM[:, 0])
  varent_B = signal_BM[:, 1]
  mean_B = state.sum_B / jnp.maximum(state.count_B, 1).astype(jnp.float32)
  mean_B = jnp.where(state.count_B > 0, mean_B, varent_B)
  varent_B = jnp.where(cfg.varent >= 0, cfg.varent, jnp.where(cfg.varent == MEAN, mean_B, varent_B))
  attn = obs.attn
  if attn is not None:
    attn = jax.tree.unflatten(jax.tree.structure(attn), list(jnp.moveaxis(signal_BM[:, 2:], -1, 0)))
  raw = obs.raw.replace(ent=signal_BM[:, 0], varent=varent_B)
  return obs.replace(raw=raw, attn=attn)


def step(cfg: Config, state: State, obs: Observation) -> Decision:
  decision = quadrant.step(cfg, state.own, seen(cfg, state, obs))
  return decision.replace(aux=(obs.raw, _signals(obs)))


def commit(cfg: Config, state: State, decision: Decision, token_B: jax.Array) -> State:
  raw, signal_BM = decision.aux
  here_BX = jnp.arange(KEPT) == col(state.count_B % KEPT)
  return State(
    quadrant.commit(cfg, state.own, decision.replace(aux=raw), token_B),
    jnp.where(here_BX[..., None], signal_BM[:, None], state.value_BXM),
    state.count_B + 1,
    state.sum_B + raw.varent,
  )
