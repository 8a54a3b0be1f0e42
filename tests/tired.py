"""A sampler for tests of everything but samplers: it compiles several times faster than a real one.

Its law depends on all that a law may depend on: its state, the history, attention and the row's noise.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import sampling
from entropix_jax.sampling import draw

BRANCHES = ("calm", "lively")


@struct.dataclass
class Config:
  temperature: float = 1.0  # 0: the model's most likely token
  tires: float = 1.0  # nats off an id that was just emitted, or stands four places back
  luck: float = 0.25  # probability of `lively`, which raises the temperature


def init(cfg, B):
  return jnp.zeros((B, 8))  # how often and how recently ids of each remainder were emitted


def step(cfg, state, obs):
  id_V, back_B = jnp.arange(obs.logits_BV.shape[-1]), jnp.maximum(obs.len_B - 4, 0)
  back_B1 = jnp.take_along_axis(obs.history_BS, back_B[:, None], axis=1)
  said_BV = state[:, id_V % 8] + (id_V == back_B1).astype(jnp.float32)
  lively_B = draw.log_uniform(obs.key_B2, obs.pos_B, draw.Purpose.AUX) < jnp.log(cfg.luck)
  agreement_B = 0.0 if obs.attn is None else obs.attn.agreement
  temp_B = cfg.temperature * jnp.where(lively_B, 1.3, 1.0) * (1.0 + 0.3 * agreement_B)
  score_BV = obs.logits_BV / jnp.maximum(temp_B, 1e-6)[:, None] - cfg.tires[:, None] * said_BV
  stats = {"temperature": temp_B, "tired": jnp.sum(state, axis=1)}
  return sampling.Decision(jax.nn.log_softmax(score_BV), lively_B.astype(jnp.int32), stats)


def commit(cfg, state, decision, token_B):
  return 0.7 * state + (token_B[:, None] % 8 == jnp.arange(8)).astype(jnp.float32)
