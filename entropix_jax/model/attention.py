"""Grouped-query attention over a window of the cache, with the scores of chosen queries.

Why: scores, softmax and statistics are float32 whatever dtype the cache has. Masks come from positions,
never from values, since a true score can be zero and an unwritten slot can hold anything [n04].
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from entropix_jax.model.quant import Int8


def attend(
  q_BTNH: jax.Array,
  pieces: Sequence[tuple[jax.Array | Int8, jax.Array | Int8, jax.Array]],
  last_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of T queries per row over the slots of one or more pieces of a cache.

  Args:
    pieces: (k_BKSH, v_BKSH, live_BTS) each. live_BTS says which slots a query may read; it needs at
      least one over all pieces. Keys and values with B = 1 are shared by all rows, in one product.
    last_B: index in T of the query of each row whose scores to return, or of several, (B, Q).

  Returns:
    out_BTNH in q's dtype, and the scaled float32 score_BNS of that query of each row (score_BQNS of
    several), -inf where it may not look; None instead if `last_B` is None.
  """
  B, T, N, H = q_BTNH.shape
  K = jax.tree.leaves(pieces[0][0])[0].shape[1]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores = [_scores(q_BTKGH, k_BKSH, live_BTS) for k_BKSH, _, live_BTS in pieces]
  most = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
  # The softmax is divided by its sum after the product: one pass less over S, and one kernel on a GPU.
  # The sum is over the rounded weights, so that they add up to one.
  total, out_BKGTH = 0.0, 0.0
  for score_BKGTS, (_, v_BKSH, _) in zip(scores, pieces, strict=True):
    v_BKSH, v_scale_BKS = _parts(v_BKSH, q_BTNH.dtype)
    e_BKGTS = jnp.exp(score_BKGTS - most).astype(q_BTNH.dtype)
    total += jnp.sum(e_BKGTS.astype(jnp.float32), axis=-1, keepdims=True)
    if v_scale_BKS is not None:
      e_BKGTS = (e_BKGTS.astype(jnp.float32) * v_scale_BKS[:, :, None, None]).astype(q_BTNH.dtype)
    common = v_BKSH.shape[0] < B
    if common:
      e_BKGTS = e_BKGTS.transpose(1, 0, 3, 2, 4).reshape(1, K, -1, 1, e_BKGTS.shape[-1])
    more_BKGTH = jnp.einsum(
      "BKGTS,BKSH->BKGTH", e_BKGTS, v_BKSH, preferred_element_type=jnp.float32
    )
    out_BKGTH += _unfold(more_BKGTH, B, T) if common else more_BKGTH
  out_BKGTH = (out_BKGTH / total).astype(q_BTNH.dtype)
  out_BTNH = out_BKGTH.reshape(B, N, T, H).swapaxes(1, 2)
  if last_B is None:
    return out_BTNH, None
  at_B11Q1 = last_B.reshape(B, 1, 1, -1, 1)
  picked = [jnp.take_along_axis(score_BKGTS, at_B11Q1, axis=3) for score_BKGTS in scores]
  score_BQNS = jnp.concatenate(picked, axis=-1).reshape(B, N, at_B11Q1.shape[3], -1).swapaxes(1, 2)
  return out_BTNH, score_BQNS if last_B.ndim > 1 else score_BQNS[:, 0]


def _scores(q_BTKGH: jax.Array, k_BKSH: jax.Array | Int8, live_BTS: jax.Array) -> jax.Array:
  """Scaled float32 score_BKGTS, -inf where a query may not look."""
  k_BKSH, k_scale_BKS = _parts(k_BKSH, q_BTKGH.dtype)
  B, T, K, _, H = q_BTKGH.shape
  common = k_BKSH.shape[0] < B
  if common:
    q_BTKGH = q_BTKGH.transpose(2, 0, 1, 3, 4).reshape(1, 1, K, -1, H)
  score_BKGTS = jnp.einsum(
    "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  if common:
    score_BKGTS = _unfold(score_BKGTS, B, T)
  if k_scale_BKS is not None:
    score_BKGTS *= k_scale_BKS[:, :, None, None]
  return jnp.where(live_BTS[:, None, None], score_BKGTS, -jnp.inf)


def _unfold(x_BKGTS: jax.Array, B: int, T: int) -> jax.Array:
  """x_BKGTS of B rows and T queries, which were folded into the groups of a single row.

  Folded, they read a shared piece in one product, with its axes in the order that compilers want.
  """
  _, K, _, _, S = x_BKGTS.shape
  return x_BKGTS.reshape(K, B, T, -1, S).transpose(1, 0, 3, 2, 4)


def _parts(x_BKSH: jax.Array | Int8, dtype) -> tuple[jax.Array, jax.Array | None]:
  """The operand of the product, and the scale_BKS to apply after it or None."""
  if isinstance(x_BKSH, Int8):
    return x_BKSH.q.astype(dtype), x_BKSH.scale
  return x_BKSH, None
