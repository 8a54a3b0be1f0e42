"""Changes to the logits that depend on ids and history: lists of ids, penalties and DRY.

Why: they do not depend on probabilities, so they come before every filter. Counts are computed from the
history when a penalty is on, and are not part of the state: a row that is rewound or forked needs only its
history, and a batch without penalties need not compute them.
"""

import jax
import jax.numpy as jnp

from entropix_jax.rowwise import col
from entropix_jax.sampling import Biases, Ids, Observation

DRY_MOST = 64  # tokens; longest repetition that DRY measures: longer ones have the same penalty


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


def repeats(obs: Observation, breakers: Ids, window_B: jax.Array) -> jax.Array:
  """longest_BV: if the id came next, how many tokens before it would repeat an earlier passage.

  The earlier passage lies in the last `window_B` tokens (0: all) and ends before an occurrence of the id; a
  repetition holds no breaker and at most DRY_MOST tokens.
  """
  B, V = obs.logits_BV.shape
  S = obs.history_BS.shape[1]
  place_S = jnp.arange(S)
  start_B1 = jnp.where(window_B > 0, obs.len_B - window_B, 0)[:, None]
  padded_BS = jnp.pad(obs.history_BS, ((0, 0), (DRY_MOST, 0)), constant_values=-1)
  breaks_BS = jnp.take_along_axis(marked(breakers, V), obs.history_BS, axis=1)

  def longer(i, carry):
    alive_BS, length_BS = carry
    end_B1 = (obs.len_B - 1 - i)[:, None]
    token_B1 = jnp.take_along_axis(obs.history_BS, jnp.maximum(end_B1, 0), axis=1)
    stops_B1 = jnp.take_along_axis(breaks_BS, jnp.maximum(end_B1, 0), axis=1)
    before_BS = jax.lax.dynamic_slice_in_dim(padded_BS, DRY_MOST - 1 - i, S, axis=1)
    alive_BS &= (before_BS == token_B1) & ~stops_B1 & (end_B1 >= 0)
    alive_BS &= place_S - 1 - i >= start_B1
    return alive_BS, length_BS + alive_BS.astype(jnp.int32)

  alive_BS = place_S < obs.len_B[:, None]
  _, length_BS = jax.lax.fori_loop(0, DRY_MOST, longer, (alive_BS, jnp.zeros((B, S), jnp.int32)))
  id_BS = jnp.where(alive_BS, obs.history_BS, V)
  return jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], id_BS].max(length_BS, mode="drop")


def dry(logits_BV, obs: Observation, multiplier, base, allowed, window, breakers: Ids) -> jax.Array:
  """logits_BV minus multiplier * base^(n - allowed) for ids that would continue a repetition of n >= allowed
  tokens, n > 0 (oobabooga/text-generation-webui#5677)."""
  longest_BV = repeats(obs, breakers, window)
  over_BV = (longest_BV - col(allowed)).astype(jnp.float32)
  # The cap of the exponent keeps the penalty finite for every base that RANGES allows.
  off_BV = col(multiplier) * col(base) ** jnp.minimum(over_BV, 24.0)
  return jnp.where((over_BV >= 0) & (longest_BV > 0), logits_BV - off_BV, logits_BV)
