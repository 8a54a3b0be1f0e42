"""Changes to the logits that depend on ids and history: lists of ids, penalties and DRY.

Why: they do not depend on probabilities, so they come before every filter. Counts are computed from the
history when a penalty is on, and are not part of the state: a row that is rewound or forked needs only its
history, and a batch without penalties need not compute them.
"""

import jax
import jax.numpy as jnp

from entropix_jax.rowwise import col
from entropix_jax.sampling import Biases, Ids, Observation

DRY_CAP = 1e30  # logits; the largest penalty of DRY, so that differences of logits stay finite


def marked(ids: Ids, V: int) -> jax.Array:
  """in_BV: whether each id is in the row's list."""
  B = ids.id_X.shape[0]
  id_BX = jnp.where(ids.id_X < 0, V, ids.id_X)
  return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], id_BX].set(True, mode="drop")


def add_biases(logits_BV: jax.Array, biases: Biases) -> jax.Array:
  """logits_BV with each row's biases added."""
  B, V = logits_BV.shape
  id_BX = jnp.where(biases.id_X < 0, V, biases.id_X)
  return logits_BV.at[jnp.arange(B)[:, None], id_BX].add(biases.bias_X, mode="drop")


def counts(obs: Observation) -> tuple[jax.Array, jax.Array]:
  """(seen_BV, count_BV): whether each id is in prompt or answer, and how often it is in the answer."""
  B, V = obs.logits_BV.shape
  place_S = jnp.arange(obs.history_BS.shape[1])
  live_BS = place_S < obs.len_B[:, None]
  mine_BS = live_BS & (place_S >= obs.prompt_B[:, None])
  row_B1 = jnp.arange(B)[:, None]

  def tally(which_BS):
    id_BS = jnp.where(which_BS, obs.history_BS, V)
    return jnp.zeros((B, V), jnp.int32).at[row_B1, id_BS].add(1, mode="drop")

  return tally(live_BS) > 0, tally(mine_BS)


def penalise(logits_BV: jax.Array, obs: Observation, repetition, presence, frequency) -> jax.Array:
  """logits_BV with the three common penalties, each (B,).

  repetition: divides positive logits of seen ids and multiplies their other logits (arXiv:1909.05858). It
  needs raw logits, because its effect changes with a constant added to all logits.
  presence, frequency: subtracted from ids in the answer, once and once per occurrence (OpenAI's API).
  """
  seen_BV, count_BV = counts(obs)
  theta_B1 = col(repetition)
  bent_BV = jnp.where(logits_BV > 0, logits_BV / theta_B1, logits_BV * theta_B1)
  logits_BV = jnp.where(seen_BV, bent_BV, logits_BV)
  return (
    logits_BV
    - col(presence) * (count_BV > 0).astype(jnp.float32)
    - col(frequency) * count_BV.astype(jnp.float32)
  )


def repeats(obs: Observation, breakers: Ids, window_B: jax.Array, on_B: jax.Array) -> jax.Array:
  """longest_BV: if the id came next, how many tokens before it would repeat an earlier passage.

  The earlier passage lies in the last `window_B` tokens (0: all) and ends before an occurrence of the id; a
  repetition holds no breaker, and an id that is one repeats nothing. Rows where `on_B` is not set get 0 and do not
  prolong the search, which takes as many steps as the longest repetition.
  """
  B, V = obs.logits_BV.shape
  S = obs.history_BS.shape[1]
  place_S = jnp.arange(S)
  start_B1 = jnp.where(window_B > 0, obs.len_B - window_B, 0)[:, None]
  breaks_BV = marked(breakers, V)
  breaks_BS = jnp.take_along_axis(breaks_BV, obs.history_BS, axis=1)

  def longer(carry):
    i, alive_BS, length_BS = carry
    end_B1 = (obs.len_B - 1 - i)[:, None]
    token_B1 = jnp.take_along_axis(obs.history_BS, jnp.maximum(end_B1, 0), axis=1)
    stops_B1 = jnp.take_along_axis(breaks_BS, jnp.maximum(end_B1, 0), axis=1)
    before_BS = jnp.roll(obs.history_BS, 1 + i, axis=1)  # what wraps around lies before `start_B1`
    alive_BS &= (before_BS == token_B1) & ~stops_B1 & (end_B1 >= 0)
    alive_BS &= place_S - 1 - i >= jnp.maximum(start_B1, 0)
    return i + 1, alive_BS, length_BS + alive_BS.astype(jnp.int32)

  seen_BS = place_S < obs.len_B[:, None]
  start = (jnp.int32(0), seen_BS & ~breaks_BS & on_B[:, None], jnp.zeros((B, S), jnp.int32))
  # Passages of any length, as in llama.cpp.
  _, _, length_BS = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), longer, start)
  id_BS = jnp.where(seen_BS, obs.history_BS, V)
  return jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], id_BS].max(length_BS, mode="drop")


def dry(logits_BV, obs: Observation, multiplier, base, allowed, window, breakers: Ids) -> jax.Array:
  """logits_BV minus multiplier * base^(n - allowed) for ids that would continue a repetition of n >= allowed
  tokens, n > 0 (oobabooga/text-generation-webui#5677)."""
  longest_BV = repeats(obs, breakers, window, multiplier > 0.0)
  over_BV = (longest_BV - col(allowed)).astype(jnp.float32)
  # exp(80) is finite, and beyond what any law shows.
  grown_BV = jnp.exp(jnp.minimum(jnp.log(col(base)) * jnp.maximum(over_BV, 0.0), 80.0))
  off_BV = jnp.minimum(col(multiplier) * grown_BV, DRY_CAP)
  return jnp.where((over_BV >= 0) & (longest_BV > 0), logits_BV - off_BV, logits_BV)
