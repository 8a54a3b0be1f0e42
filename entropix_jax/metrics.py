"""Entropy and varentropy of a softmax, defined once for logits and for attention; measures of confidence.

Why: the original entropix had one definition in bits, one in nats and one over padding, so thresholds
changed their meaning silently between them. Here all logarithms are natural, and only live entries
count: those whose score is not -inf [n01, n04].
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.rowwise import best


@struct.dataclass
class Spread:
  """Statistics of a masked softmax; each field is float32, of the scores' shape without the last axis."""

  lse: jax.Array  # nats; log-normaliser: log p_i = score_i - lse
  ent: jax.Array  # nats; -sum p ln p
  varent: jax.Array  # nats^2; the variance of ln p under p


def spread(score: jax.Array) -> Spread:
  """Entropy and varentropy of softmax(score) over the last axis, in one pass after the maximum.

  Args:
    score: unnormalised log-probabilities (..., n); entries at -inf are excluded.

  Returns:
    Spread of shape (...). A row whose entries are all -inf has ent = varent = 0 and lse = -inf. A NaN or
    +inf makes `lse` one of them, too, so a row is sound exactly where `lse` is finite.
  """
  score = score.astype(jnp.float32)
  top = jnp.max(score, axis=-1, keepdims=True)
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  live = score != -jnp.inf
  u = jnp.where(live, score - top, 0.0)
  e = jnp.where(live, jnp.exp(u), 0.0)
  s0, s1, s2 = (jnp.sum(x, axis=-1) for x in (e, e * u, e * u * u))
  some = jnp.where(s0 > 0, s0, 1.0)
  mean = s1 / some
  return Spread(
    lse=top[..., 0] + jnp.log(s0),
    ent=jnp.maximum(jnp.log(some) - mean, 0.0),
    varent=jnp.maximum(s2 / some - mean * mean, 0.0),
  )


@struct.dataclass
class Confidence:
  """How peaked the model's raw law is; each (B,), float32, larger where the model is more certain."""

  # nats; KL(uniform over the V ids || law) = -ln V - mean ln p (arXiv:2502.18581)
  self_certainty: jax.Array
  # nats; -mean ln p over the top k ids (DeepConf, arXiv:2508.15260)
  confidence: jax.Array
  gap: jax.Array  # [0, 1]; probability of the most likely id minus the second's (arXiv:2402.10200)


def confidence(logits_BV: jax.Array, lse_B: jax.Array, k: int) -> Confidence:
  """Measures of confidence of each row's law; ids at -inf are excluded, also from the V of the formulas.

  Args:
    lse_B: log-normaliser of the logits, nats.
    k: number of top ids for `confidence`; at least 2, if there are two ids.
  """

  def mean_logp(x):
    live = x > -jnp.inf
    n = jnp.maximum(jnp.sum(live, axis=-1), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(live, x - lse_B[:, None], 0.0), axis=-1) / n, n

  value_BC, _ = best(logits_BV, k)
  p_BC = jnp.exp(value_BC - lse_B[:, None])
  whole_B, n_B = mean_logp(logits_BV)
  return Confidence(
    self_certainty=-whole_B - jnp.log(n_B),
    confidence=-mean_logp(value_BC)[0],
    gap=p_BC[:, 0] - (p_BC[:, 1] if k > 1 else 0.0),
  )


@struct.dataclass
class AttnStats:
  """Attention statistics of one decoding query, averaged over the measured layers; float32, (B,).

  Only live keys enter (written, causal, of the same row), so no value depends on the cache's size [n04].
  """

  attn_ent: jax.Array  # nats, [0, ln keys]; mean over heads of each head's attention entropy
  attn_ent_norm: jax.Array  # [0, 1]; attn_ent / ln keys; 0 where there is one key
  attn_varent: jax.Array  # nats^2; mean over heads of the varentropy of each head's attention
  attn_spread: jax.Array  # nats^2; population variance over heads of the attention entropies
  head_dispersion: jax.Array  # [0, 1 - 1/N]; mean total variation of a head from the heads' mean
  agreement: jax.Array  # [0, 1]; 1 - head_dispersion / (1 - 1/N): 1 when all heads attend alike
  score_mag: jax.Array  # nats; mean |score| over heads and live keys


def attn_stats(score_BNS: jax.Array) -> AttnStats:
  """Statistics of one layer's attention for one query per row; for several, all shapes begin (B, queries).

  Args:
    score_BNS: scaled float32 scores of the query against the cache, -inf at every dead slot.
  """
  N = score_BNS.shape[-2]
  live_BNS = score_BNS > -jnp.inf
  keys_B = jnp.sum(live_BNS[..., 0, :], axis=-1).astype(jnp.float32)
  heads = spread(score_BNS)
  p_BNS = jnp.exp(score_BNS - heads.lse[..., None])
  apart_BN = jnp.sum(jnp.abs(p_BNS - jnp.mean(p_BNS, axis=-2, keepdims=True)), axis=-1)
  apart_B = 0.5 * jnp.mean(apart_BN, axis=-1)
  size_BN = jnp.sum(jnp.where(live_BNS, jnp.abs(score_BNS), 0.0), axis=-1)
  ent_B = jnp.mean(heads.ent, axis=-1)
  widest = jnp.log(jnp.maximum(keys_B, 2.0))
  most = 1.0 - 1.0 / N if N > 1 else 1.0
  return AttnStats(
    attn_ent=ent_B,
    attn_ent_norm=jnp.where(keys_B > 1, ent_B / widest, 0.0),
    attn_varent=jnp.mean(heads.varent, axis=-1),
    attn_spread=jnp.var(heads.ent, axis=-1),
    head_dispersion=apart_B,
    agreement=1.0 - apart_B / most,
    score_mag=jnp.mean(size_BN, axis=-1) / jnp.maximum(keys_B, 1.0),
  )


def mean_stats(stats: list[AttnStats]) -> AttnStats:
  """The mean of each statistic over the measured layers."""
  return jax.tree.map(lambda *layers: sum(layers) / len(layers), *stats)
