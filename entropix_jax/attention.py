"""Grouped-query attention over a window of the cache, and what it looked at.

Why: scores, softmax and statistics are float32 whatever the cache holds; masks come from positions and
never from values, since a true score can be zero and an unwritten slot can hold anything [n04].
"""

import jax
import jax.numpy as jnp

from entropix_jax import metrics


def attend(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  live_BTS: jax.Array,
  last_B: jax.Array | None = None,
) -> tuple[jax.Array, metrics.AttnStats | None]:
  """Attention of T queries per row over S slots.

  Args:
    live_BTS: which slots each query may read; at least one each.
    last_B: index of the query whose attention is measured; None measures nothing.

  Returns:
    out_BTNH in q's dtype, and the statistics of query `last_B` of each row.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum(
    "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  score_BKGTS = jnp.where(live_BTS[:, None, None], score_BKGTS, -jnp.inf)
  p_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", p_BKGTS, v_BKSH)
  stats = None
  if last_B is not None:
    row_BKGS = jnp.take_along_axis(score_BKGTS, last_B[:, None, None, None, None], axis=3)[
      :, :, :, 0
    ]
    stats = metrics.attn_stats(row_BKGS.reshape(B, N, -1))
  return out_BKGTH.reshape(B, N, T, H).swapaxes(1, 2), stats
