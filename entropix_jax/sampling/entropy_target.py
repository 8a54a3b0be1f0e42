"""A temperature per token that gives the law a target entropy.

Why: it is the cleanest idea of the entropix family, and its authors never ran it. Instead of thresholds on
the model's uncertainty, it states how uncertain the draw may be. The target entropy is `cap`, or less where
the branch gives less:
  cool   the entropy of the model's law, so that the temperature is at most 1
  steer  w_const + w_mean * (running mean of the entropy) + w_now * (entropy now)
Afterwards min-p cuts the tail that a high temperature raises.
Doubt: nobody has shown that constant uncertainty gives better text than constant temperature [n10].
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import metrics
from entropix_jax.rowwise import any_row, col
from entropix_jax.sampling import Decision, Observation
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _temperature as temperature

BRANCHES = ("cool", "steer")
COOL, STEER = range(2)
RANGES = {
  "cap": (0.0, 20.0), "w_const": (-20.0, 20.0), "w_mean": (-20.0, 20.0), "w_now": (-20.0, 20.0),
  "decay": (0.0, 0.9999), "temp_least": (0.05, 20.0), "temp_most": (0.05, 20.0), "min_p": (0.0, 1.0),
}  # fmt: skip
LEAST, MOST = 0.05, 20.0  # the solver's range of temperatures; temp_least and temp_most narrow it


@struct.dataclass
class Config:
  cap: float = 1.5  # nats; highest target entropy
  steer: bool = False  # the target is the sum below, not the entropy of the model's law
  w_const: float = 0.0  # nats
  w_mean: float = 1.0  # weight of the running mean of the model's entropy
  w_now: float = 0.0  # weight of the model's entropy now
  decay: float = 0.9  # of the running mean, per token
  temp_least: float = 0.1  # lowest temperature
  temp_most: float = 2.5  # highest temperature
  min_p: float = 0.05  # share of the top token's probability, after the temperature; 0: off


@struct.dataclass
class State:
  """The running mean of each row's entropy; float32."""

  mean_B: jax.Array  # nats; weighted sum of the model's entropies; the mean is mean_B / weight_B
  weight_B: jax.Array  # sum of the weights


def init(cfg: Config, B: int) -> State:
  return State(jnp.zeros((B,)), jnp.zeros((B,)))


def step(cfg: Config, state: State, obs: Observation) -> Decision:
  ent_B = obs.raw.ent
  mean_B = jnp.where(state.weight_B > 0, state.mean_B / jnp.maximum(state.weight_B, 1e-9), ent_B)
  mixture_B = cfg.w_const + cfg.w_mean * mean_B + cfg.w_now * ent_B
  target_B = jnp.minimum(jnp.where(cfg.steer, mixture_B, ent_B), cfg.cap)
  target_B = jnp.maximum(target_B, 0.0)
  same_B = target_B == ent_B  # the temperature is 1

  def solve(logits_BV):
    return temperature.for_entropy(logits_BV, target_B, LEAST, MOST)

  def one(logits_BV):
    return jnp.ones_like(ent_B), jnp.zeros_like(same_B)

  temp_B, clamped_B = any_row(~same_B, solve, one, obs.logits_BV)
  inside_B = jnp.clip(temp_B, cfg.temp_least, jnp.maximum(cfg.temp_least, cfg.temp_most))
  score_BV = (obs.logits_BV - filters.top(obs.logits_BV)) / col(inside_B)
  score_BV = filters.min_p(score_BV, cfg.min_p)
  return Decision(
    law_BV=filters.normalise(score_BV),
    branch_B=jnp.where(cfg.steer, STEER, COOL),
    stats={
      "temperature": inside_B,
      "target": target_B,
      "law_entropy": metrics.spread(score_BV).ent,
      "clamped": (clamped_B | (inside_B != temp_B)).astype(jnp.float32),
    },
    aux=ent_B,
  )


def commit(cfg: Config, state: State, decision: Decision, token_B: jax.Array) -> State:
  left_B = 1.0 - cfg.decay
  return State(
    mean_B=cfg.decay * state.mean_B + left_B * decision.aux,
    weight_B=cfg.decay * state.weight_B + left_B,
  )


CASES = {
  "cool": {"p": [0.25] * 4},
  "steer": {"p": [0.5, 0.25, 0.125, 0.0625, 0.0625], "steer": True, "w_const": 0.3, "w_mean": 0.4},
}
USES = ({"steer": True, "w_now": 0.5, "w_const": 0.2, "w_mean": 0.1, "cap": 3.0},)
