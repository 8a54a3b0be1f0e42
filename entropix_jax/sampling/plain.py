"""The samplers everybody knows: greedy, temperature, top-k, top-p and min-p, in this order.

Why: the control that every adaptive claim must beat, and what most people want most of the time. The
order changes the result of every probability threshold, so it is fixed: temperature first, then top-k,
then top-p of what top-k left, then min-p relative to the best token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.rows import any_row
from entropix_jax.sampling import Decision, Observation
from entropix_jax.sampling import _filters as filters

BRANCHES = ("greedy", "sample")
RANGES = {
  "temperature": (0.0, 1e4),
  "top_k": (0, 2**31 - 1),
  "top_p": (0.0, 1.0),
  "min_p": (0.0, 1.0),
}


@struct.dataclass
class Config:
  temperature: float = 1.0  # larger is flatter; below 1e-4: the argmax
  top_k: int = 0  # tokens; keep the k best; 0: all
  top_p: float = 1.0  # probability; keep the smallest set of best tokens that holds it; 1: all
  min_p: float = 0.0  # share of the best token's probability that a token needs; 0: none


def init(cfg: Config, B: int) -> tuple:
  return ()


def step(cfg: Config, state: tuple, obs: Observation) -> Decision:
  B = obs.raw.lse.shape
  temp_B = jnp.broadcast_to(cfg.temperature, B)
  greedy_B = temp_B < filters.GREEDY_BELOW

  def sample(logits_BV: jax.Array) -> jax.Array:
    score_BV = logits_BV / jnp.where(greedy_B, 1.0, temp_B)[:, None]
    return filters.normalise(filters.truncate(score_BV, cfg.top_k, cfg.top_p, cfg.min_p))

  return Decision(
    law_BV=any_row(~greedy_B, sample, filters.delta, obs.logits_BV),
    branch_B=jnp.where(greedy_B, 0, 1),
    stats={
      "temperature": temp_B,
      "top_k": jnp.broadcast_to(cfg.top_k, B).astype(jnp.float32),
      "top_p": jnp.broadcast_to(cfg.top_p, B),
      "min_p": jnp.broadcast_to(cfg.min_p, B),
    },
  )


def commit(cfg: Config, state: tuple, decision: Decision, token_B: jax.Array) -> tuple:
  return state


CASES = {"greedy": {"p": [0.5, 0.3, 0.2], "temperature": 0.0}, "sample": {"p": [0.5, 0.3, 0.2]}}
