"""Grouped-query attention over a window of the cache, and what it looked at.

Why: scores, softmax and statistics are float32 whatever the cache holds; masks come from positions and
never from values, since a true score can be zero and an unwritten slot can hold anything [n04].
"""

import jax
import jax.numpy as jnp

from entropix_jax.quant import Int8


def attend(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array | Int8,
  v_BKSH: jax.Array | Int8,
  live_BTS: jax.Array,
  last_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of T queries per row over S slots.

  Args:
    live_BTS: which slots each query may read; at least one each.
    last_B: index of the query whose scores are wanted; None wants none.

  Returns:
    out_BTNH in q's dtype, and the float32 score_BNS of query `last_B` of each row, -inf where it may
    not look.
  """
  B, T, N, H = q_BTNH.shape
  k_BKSH, k_scale_BKS = _parts(k_BKSH, q_BTNH.dtype)
  v_BKSH, v_scale_BKS = _parts(v_BKSH, q_BTNH.dtype)
  K = k_BKSH.shape[1]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum(
    "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  if k_scale_BKS is not None:
    score_BKGTS *= k_scale_BKS[:, :, None, None]
  score_BKGTS = jnp.where(live_BTS[:, None, None], score_BKGTS, -jnp.inf)
  # Softmax, divided by its sum behind the product: one pass less over S, and one kernel on a GPU. The
  # sum is that of the rounded weights, so that they add up to one.
  e_BKGTS = jnp.exp(score_BKGTS - jnp.max(score_BKGTS, axis=-1, keepdims=True)).astype(q_BTNH.dtype)
  sum_BKGT1 = jnp.sum(e_BKGTS.astype(jnp.float32), axis=-1, keepdims=True)
  if v_scale_BKS is not None:
    e_BKGTS = (e_BKGTS.astype(jnp.float32) * v_scale_BKS[:, :, None, None]).astype(q_BTNH.dtype)
  out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", e_BKGTS, v_BKSH, preferred_element_type=jnp.float32)
  out_BKGTH = (out_BKGTH / sum_BKGT1).astype(q_BTNH.dtype)
  out_BTNH = out_BKGTH.reshape(B, N, T, H).swapaxes(1, 2)
  if last_B is None:
    return out_BTNH, None
  at_B1111 = last_B[:, None, None, None, None]
  score_BKG1S = jnp.take_along_axis(score_BKGTS, at_B1111, axis=3)
  return out_BTNH, score_BKG1S.reshape(B, N, -1)


def _parts(x_BKSH: jax.Array | Int8, dtype) -> tuple[jax.Array, jax.Array | None]:
  """What enters the product, and the scale_BKS that belongs behind it."""
  if isinstance(x_BKSH, Int8):
    return x_BKSH.q.astype(dtype), x_BKSH.scale
  return x_BKSH, None
