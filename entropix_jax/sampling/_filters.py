"""Filters and laws that samplers share: truncations, the greedy law, best of n.

Why: the common truncations keep the tokens whose logit reaches a threshold. The threshold is found exactly,
by a search over the bits of a float32, without sorting 128,256 logits. All tokens tied at the threshold are
kept, so permuting the vocabulary permutes the law.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from entropix_jax import metrics
from entropix_jax.rowwise import best, best_id, col

GREEDY_BELOW = 1e-4  # a lower temperature means greedy, because dividing by it could overflow


def delta(logits_BV: jax.Array) -> jax.Array:
  """law_BV: probability 1 for each row's most likely token, the lowest id among equal ones.

  NaN, and no sure token, where the best logit is not finite.
  """
  best_B1 = best_id(logits_BV)[:, None]
  return jnp.where(jnp.arange(logits_BV.shape[-1]) == best_B1, 0.0 * top(logits_BV), -jnp.inf)


def normalise(score_BV: jax.Array) -> jax.Array:
  """Log-probabilities of softmax(score); -inf stays -inf. Exact also for scores far from 0."""
  return jax.nn.log_softmax(score_BV, axis=-1)


def _ordered(x: jax.Array) -> jax.Array:
  """uint32 in the same order as the float32 `x` (-0.0 equals 0.0)."""
  bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _sums(xs_BV: list[jax.Array]) -> list[jax.Array]:
  """The sum of each row of each array, all in one pass."""
  if len(xs_BV) == 1:
    return [jnp.sum(xs_BV[0], axis=-1)]

  def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]

  return jax.lax.reduce(xs_BV, [jnp.float32(0)] * len(xs_BV), add, (1,))


def _search(fits: Callable, *operands: jax.Array) -> jax.Array:
  """edge_B: the smallest uint32 that fits. All larger ones do, and the largest does.

  Args:
    fits: (list of edge_B, *operands) -> list of fits_B.
    operands: with a leading row axis.
  """

  def settle(bits: int, *operands):
    """Settle so many bits at once, by trying all their values but the largest."""

    def next_bits(i, edge_B):
      shift = jnp.asarray(32 - bits * (i + 1), jnp.uint32)
      rest_B = edge_B & ~(jnp.uint32(2**bits - 1) << shift)
      tried = [rest_B | (jnp.uint32(n) << shift) for n in range(2**bits - 1)]
      fail_B = sum((~fit_B).astype(jnp.uint32) for fit_B in fits(tried, *operands))
      return rest_B | (fail_B << shift)

    edge_B = jnp.full(operands[0].shape[:1], 0xFFFFFFFF, jnp.uint32)
    return jax.lax.fori_loop(0, 32 // bits, next_bits, edge_B, unroll=bits > 1)

  # On a GPU a pass costs the launch of its kernels, and a loop would end the graph of kernels; elsewhere a
  # pass costs its sums.
  wide = functools.partial(settle, 4)
  return jax.lax.platform_dependent(
    *operands, cuda=wide, rocm=wide, default=functools.partial(settle, 1)
  )


def reach(score_BV: jax.Array, weight_BV: jax.Array, budget_B: jax.Array) -> jax.Array:
  """keep_BV: tokens for which the weights of all tokens with a higher score sum to less than the budget.

  Top-k (weights of 1) and top-p (probabilities) are both defined this way. The token with the highest score
  is kept for any budget above 0.
  """
  place_BV = _ordered(score_BV)

  def fits(edges, place_BV, weight_BV, budget_B):
    above = [jnp.where(place_BV > edge_B[:, None], weight_BV, 0.0) for edge_B in edges]
    return [sum_B < budget_B for sum_B in _sums(above)]

  return place_BV >= _search(fits, place_BV, weight_BV, budget_B)[:, None]


def cut(score_BV: jax.Array, keep_BV: jax.Array) -> jax.Array:
  """score_BV, with -inf where `keep_BV` is False."""
  return jnp.where(keep_BV, score_BV, -jnp.inf)


def top(score_BV: jax.Array) -> jax.Array:
  """top_B1: each row's best score."""
  return jnp.max(score_BV, axis=-1, keepdims=True)


# Each filter below takes float32 scores and returns them with the dropped tokens at -inf. Probabilities are
# those of softmax(scores). Every filter but `typical` keeps the top token, whatever its parameter is.


def top_k(score_BV: jax.Array, k_B: jax.Array) -> jax.Array:
  """Keep the top k tokens and all tied with the k-th (arXiv:1805.04833)."""
  live_BV = (score_BV > -jnp.inf).astype(jnp.float32)
  return cut(score_BV, reach(score_BV, live_BV, jnp.maximum(k_B, 1).astype(jnp.float32)))


def top_p(score_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Keep tokens if all more likely ones have less than p of the probability (arXiv:1904.09751)."""
  mass_BV = jnp.exp(score_BV - top(score_BV))
  budget_B = jnp.maximum(p_B, 1e-9) * jnp.sum(mass_BV, axis=-1)
  return cut(score_BV, reach(score_BV, mass_BV, budget_B))


def min_p(score_BV: jax.Array, m_B: jax.Array) -> jax.Array:
  """Keep tokens with at least m times the top token's probability (arXiv:2407.01082)."""
  return cut(score_BV, score_BV >= top(score_BV) + jnp.log(col(m_B)))


def top_n_sigma(score_BV: jax.Array, n_B: jax.Array) -> jax.Array:
  """Keep scores at most n standard deviations, of all finite scores, below the best (arXiv:2411.07641)."""
  live_BV = score_BV > -jnp.inf
  count_B1 = jnp.sum(live_BV, -1, keepdims=True, dtype=jnp.float32)
  top_B1 = top(score_BV)
  below_BV = jnp.where(live_BV, score_BV - top_B1, 0.0)
  mean_B1 = jnp.sum(below_BV, -1, keepdims=True) / count_B1
  away_BV = jnp.where(live_BV, below_BV - mean_B1, 0.0)
  sigma_B1 = jnp.sqrt(jnp.sum(away_BV * away_BV, -1, keepdims=True) / count_B1)
  return cut(score_BV, live_BV & (below_BV >= -col(n_B) * sigma_B1))


def top_h(score_BV: jax.Array, share_B: jax.Array) -> jax.Array:
  """Keep as many top tokens as have a renormalised entropy of at most this share of the whole entropy
  (arXiv:2509.02510). Each token added in descending order raises the entropy, so a threshold exists."""
  logp_BV = normalise(score_BV)
  p_BV = jnp.exp(logp_BV)
  self_BV = jnp.where(p_BV > 0, p_BV * logp_BV, 0.0)
  most_B = -share_B * jnp.sum(self_BV, axis=-1)
  place_BV = _ordered(score_BV)

  def fits(edges, place_BV, p_BV, self_BV, most_B):
    # Everything at or above the edge; the entropy of an empty set counts as 0.
    within = [place_BV >= edge_B[:, None] for edge_B in edges]
    sums = _sums([jnp.where(in_BV, x_BV, 0.0) for in_BV in within for x_BV in (p_BV, self_BV)])
    fit = []
    for s_B, self_B in zip(sums[::2], sums[1::2], strict=True):
      some_B = jnp.where(s_B > 0, s_B, 1.0)
      fit.append(jnp.log(some_B) - self_B / some_B <= most_B)
    return fit

  edge_B = _search(fits, place_BV, p_BV, self_BV, most_B)
  return cut(score_BV, (place_BV >= edge_B[:, None]) | (score_BV == top(score_BV)))


def p_less(score_BV: jax.Array) -> jax.Array:
  """Keep tokens at least as likely as two draws are to be equal, sum p^2 (arXiv:2509.23234)."""
  logp_BV = normalise(score_BV)
  agree_B1 = jax.nn.logsumexp(2.0 * logp_BV, axis=-1, keepdims=True)
  return cut(score_BV, (logp_BV >= agree_B1) | (score_BV == top(score_BV)))


def typical(score_BV: jax.Array, mass_B: jax.Array) -> jax.Array:
  """Keep the tokens whose surprise is closest to the entropy, until they have this probability in all
  (arXiv:2202.00666). The only filter that may drop the top token."""
  logp_BV = normalise(score_BV)
  ent_B1 = col(metrics.spread(score_BV).ent)
  near_BV = cut(-jnp.abs(logp_BV + ent_B1), score_BV > -jnp.inf)
  keep_BV = reach(near_BV, jnp.exp(logp_BV), jnp.maximum(mass_B, 1e-9))
  return cut(score_BV, keep_BV & (score_BV > -jnp.inf))


def epsilon(score_BV: jax.Array, least_B: jax.Array) -> jax.Array:
  """Keep tokens of at least this probability (arXiv:2210.15191)."""
  logp_BV = normalise(score_BV)
  keep_BV = logp_BV >= jnp.log(col(least_B))
  return cut(score_BV, keep_BV | (score_BV == top(score_BV)))


def eta(score_BV: jax.Array, eps_B: jax.Array) -> jax.Array:
  """Keep tokens of at least the probability min(eps, sqrt(eps) exp(-entropy)) (arXiv:2210.15191)."""
  least_B = jnp.minimum(eps_B, jnp.sqrt(eps_B) * jnp.exp(-metrics.spread(score_BV).ent))
  return epsilon(score_BV, least_B)


def without_top_choices(score_BV: jax.Array, least_B: jax.Array, spare_BV: jax.Array) -> jax.Array:
  """XTC when it acts (oobabooga/text-generation-webui#6335): of all tokens of at least this probability,
  drop all but the least likely; drop none where that would drop a token of `spare_BV`."""
  logp_BV = normalise(score_BV)
  above_BV = (logp_BV >= jnp.log(col(least_B))) & (score_BV > -jnp.inf)
  last_B1 = jnp.min(jnp.where(above_BV, score_BV, jnp.inf), axis=-1, keepdims=True)
  drop_BV = above_BV & (score_BV != last_B1)
  return cut(score_BV, ~drop_BV | jnp.any(drop_BV & spare_BV, axis=-1, keepdims=True))


def truncated_best_of(
  logits_BV: jax.Array, temp_B, top_k_B, top_p_B, min_p_B, n_B, most: int
) -> jax.Array:
  """law_BV of the most likely of n draws from the truncated softmax; for n = 1 that softmax itself.

  The best of n draws is in a group of equally likely tokens if all n draws are in it or less likely, and not
  all are less likely. So the group has (mass up to and including it)^n - (mass below it)^n, which its tokens
  share equally. Ties are exact: a tie at the k-th place that extends past the `most` candidates is one group
  with its true size.

  Args:
    temp_B: temperature, > 0.
    top_k_B: int, 1 <= k < most.
    top_p_B: share of the whole softmax at this temperature, not of the top k: a token is kept if all more
      likely ones have less than it [n03].
    min_p_B: as in `min_p`.
    n_B: number of draws, >= 1.
    most: how many top tokens are candidates; static.
  """
  value_BC, id_BC = best(logits_BV, min(most, logits_BV.shape[-1]))
  last_B1 = jnp.minimum(top_k_B, value_BC.shape[-1])[:, None] - 1
  edge_B1 = jnp.take_along_axis(value_BC, last_B1, axis=-1)
  at_edge_BC = value_BC == edge_B1
  size_B1 = jnp.sum(logits_BV == edge_B1, axis=-1, keepdims=True, dtype=jnp.float32)
  weight_BC = jnp.where(
    at_edge_BC, size_B1 / jnp.sum(at_edge_BC, -1, keepdims=True, dtype=jnp.float32), 1.0
  )

  z_BC = (value_BC - value_BC[:, :1]) / col(temp_B)
  alive_BC = (value_BC >= edge_B1) & (value_BC > -jnp.inf)
  mass_BC = jnp.where(alive_BC, weight_BC * jnp.exp(z_BC), 0.0)
  above_BCC = value_BC[:, None, :] > value_BC[:, :, None]
  equal_BCC = value_BC[:, None, :] == value_BC[:, :, None]

  def total(which_BCC, x_BC):
    return jnp.sum(jnp.where(which_BCC, x_BC[:, None, :], 0.0), axis=-1)

  z_BV = (logits_BV - value_BC[:, :1]) / col(temp_B)
  within_BC = total(above_BCC, mass_BC) < col(top_p_B) * jnp.sum(jnp.exp(z_BV), -1, keepdims=True)
  alive_BC &= within_BC | (col(top_p_B) >= 1.0)
  alive_BC &= z_BC >= jnp.log(col(min_p_B))
  alive_BC |= value_BC == value_BC[:, :1]
  mass_BC = jnp.where(alive_BC, mass_BC, 0.0)

  group_BC = total(equal_BCC, mass_BC)
  upto_BC = total(~above_BCC, mass_BC)
  # 1 - (below / upto)^n, without the difference of two numbers near 1.
  share_BC = -jnp.expm1(col(n_B) * jnp.log1p(-group_BC / jnp.where(alive_BC, upto_BC, 1.0)))
  logp_BC = (
    col(n_B) * jnp.log(upto_BC / jnp.sum(mass_BC, -1, keepdims=True))
    + jnp.log(share_BC)
    - jnp.log(total(equal_BCC, weight_BC))
  )
  logp_BC = jnp.where(alive_BC, logp_BC, -jnp.inf)
  # Rounding in the powers adds up: 6e-4 of the mass for the best of 10,000.
  logp_BC -= jnp.log(jnp.sum(weight_BC * jnp.exp(logp_BC), axis=-1, keepdims=True))

  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  law_BV = jnp.full(logits_BV.shape, -jnp.inf)
  law_BV = law_BV.at[rows_B1, id_BC].set(logp_BC, mode="drop", unique_indices=True)
  edge_logp_B1 = jnp.take_along_axis(logp_BC, last_B1, axis=-1)
  return jnp.where(logits_BV == edge_B1, edge_logp_B1, law_BV)
