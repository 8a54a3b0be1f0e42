"""Grouped-query attention over a window of the cache, with the scores of chosen queries.

Why: scores, softmax and statistics are float32 whatever dtype the cache has. Masks come from positions,
never from values, since a true score can be zero and an unwritten slot can hold anything [n04]. A CPU reads
the cache of a prompt in blocks, whose scores stay in a core's cache; elsewhere one product is faster.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from entropix_jax.model.quant import Int8

BLOCK = 256  # slots that a CPU reads at a time, where many queries read a cache


def attend(
  q_BTNH: jax.Array,
  pieces: Sequence[tuple[jax.Array | Int8, jax.Array | Int8, jax.Array]],
  last_B: jax.Array | None = None,
  before: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of T queries per row over the slots of one or more pieces of a cache.

  Args:
    pieces: (k_BKSH, v_BKSH, live_BTS) each. live_BTS says which slots a query may read; it needs at
      least one over all pieces. Keys and values with B = 1 are shared by all rows, in one product.
    last_B: index in T of the query of each row whose scores to return, or of several, (B, Q).
    before: of a single piece: no query t reads a slot after before + t. With it a CPU reads blocks of slots,
      and none after the last query's own. A gradient cannot be taken through that.

  Returns:
    out_BTNH in q's dtype, and the scaled float32 score_BNS of that query of each row (score_BQNS of
    several), -inf where it may not look; None instead if `last_B` is None.
  """
  B, T, N, H = q_BTNH.shape
  K, S = jax.tree.leaves(pieces[0][0])[0].shape[1:3]
  last_BQ = None if last_B is None else last_B.reshape(B, -1)
  args = q_BTNH.reshape(B, T, K, N // K, H), pieces, last_BQ
  if before is None or S % min(S, BLOCK):
    out_BKGTH, score_BKGQS = _at_once(*args)
  else:
    blocks = functools.partial(_in_blocks, end=before + T)
    out_BKGTH, score_BKGQS = jax.lax.platform_dependent(*args, cpu=blocks, default=_at_once)
  out_BTNH = out_BKGTH.reshape(B, N, T, H).swapaxes(1, 2)
  if last_B is None:
    return out_BTNH, None
  score_BQNS = score_BKGQS.reshape(B, N, -1, score_BKGQS.shape[-1]).swapaxes(1, 2)
  return out_BTNH, score_BQNS if last_B.ndim > 1 else score_BQNS[:, 0]


def _at_once(q_BTKGH, pieces, last_BQ):
  """(out_BKGTH, score_BKGQS or None) from the scores of all slots."""
  scores = [_scores(q_BTKGH, k_BKSH, live_BTS) for k_BKSH, _, live_BTS in pieces]
  most = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
  # The softmax is divided by its sum after the product: one pass less over S, and one kernel on a GPU.
  add = functools.partial(jnp.sum, axis=-1, keepdims=True)
  pairs = zip(scores, pieces, strict=True)
  parts = [_sums(s, most, v_BKSH, q_BTKGH.dtype, add) for s, (_, v_BKSH, _) in pairs]
  total, out_BKGTH = map(sum, zip(*parts, strict=True))
  out_BKGTH = (out_BKGTH / total).astype(q_BTKGH.dtype)
  if last_BQ is None:
    return out_BKGTH, None
  at_B11Q1 = last_BQ[:, None, None, :, None]
  picked = [jnp.take_along_axis(score_BKGTS, at_B11Q1, axis=3) for score_BKGTS in scores]
  return out_BKGTH, jnp.concatenate(picked, axis=-1)


def _in_blocks(q_BTKGH, pieces, last_BQ, end):
  """The same of the first `end` slots of a single piece, a block at a time (arXiv:2205.14135)."""
  ((k_BKSH, v_BKSH, live_BTS),) = pieces
  dtype, S = q_BTKGH.dtype, live_BTS.shape[-1]
  size = min(S, BLOCK)
  add = functools.partial(_by_halves, jnp.add)
  # Otherwise XLA:CPU transposes the scores of every block.
  q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)

  def block(i, carry):
    most, total, out_BKGTH = carry
    k, v, live_BTC = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2),
      (k_BKSH, v_BKSH, live_BTS),
    )
    score_BKGTC = _scores(q_BTKGH, k, live_BTC, q_BKGTH)
    rise = jnp.maximum(most, _by_halves(jnp.maximum, score_BKGTC))
    kept = jnp.exp(most - rise)
    more, more_BKGTH = _sums(score_BKGTC, rise, v, dtype, add)
    return rise, total * kept + more, out_BKGTH * kept + more_BKGTH

  out_BKGTH = jnp.zeros(q_BKGTH.shape, jnp.float32)
  # The least float instead of -inf: a query may read nothing of the first blocks.
  least = jnp.full_like(out_BKGTH[..., :1], jnp.finfo(jnp.float32).min)
  n = jnp.minimum(end + size - 1, S) // size
  _, total, out_BKGTH = jax.lax.fori_loop(0, n, block, (least, jnp.zeros_like(least), out_BKGTH))
  out_BKGTH = (out_BKGTH / total).astype(dtype)
  if last_BQ is None:
    return out_BKGTH, None
  q_BQKGH = jnp.take_along_axis(q_BTKGH, last_BQ[:, :, None, None, None], axis=1)
  live_BQS = jnp.take_along_axis(live_BTS, last_BQ[:, :, None], axis=1)
  return out_BKGTH, _scores(q_BQKGH, k_BKSH, live_BQS)


def _by_halves(op: Callable, x: jax.Array) -> jax.Array:
  """`op`, a maximum or a sum, over the last axis, which is kept: up to four times as fast as XLA:CPU's own."""
  while x.shape[-1] > 32 and x.shape[-1] % 2 == 0:
    x = op(*jnp.split(x, 2, axis=-1))
  return op.reduce(x, axis=-1, keepdims=True)


def _sums(score_BKGTS: jax.Array, most, v_BKSH: jax.Array | Int8, dtype, add: Callable):
  """The sums over S of the weights exp(score - most), and of the weights times the values."""
  B, T = score_BKGTS.shape[0], score_BKGTS.shape[3]
  v_BKSH, v_scale_BKS = _parts(v_BKSH, dtype)
  e_BKGTS = jnp.exp(score_BKGTS - most).astype(dtype)
  # Over the rounded weights, so that they add up to one.
  total = add(e_BKGTS.astype(jnp.float32))
  if v_scale_BKS is not None:
    e_BKGTS = (e_BKGTS.astype(jnp.float32) * v_scale_BKS[:, :, None, None]).astype(dtype)
  common = v_BKSH.shape[0] < B
  if common:
    e_BKGTS = e_BKGTS.transpose(1, 0, 3, 2, 4).reshape(1, v_BKSH.shape[1], -1, 1, v_BKSH.shape[2])
  out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", e_BKGTS, v_BKSH, preferred_element_type=jnp.float32)
  return total, _unfold(out_BKGTH, B, T) if common else out_BKGTH


def _scores(q_BTKGH, k_BKSH: jax.Array | Int8, live_BTS: jax.Array, q_BKGTH=None) -> jax.Array:
  """Scaled float32 score_BKGTS, -inf where a query may not look; of the same queries in another order if given."""
  k_BKSH, k_scale_BKS = _parts(k_BKSH, q_BTKGH.dtype)
  B, T, K, _, H = q_BTKGH.shape
  f32 = jnp.float32
  common = k_BKSH.shape[0] < B
  if common:
    q_BTKGH = q_BTKGH.transpose(2, 0, 1, 3, 4).reshape(1, 1, K, -1, H)
  if q_BKGTH is None:
    score_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=f32)
  else:
    score_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=f32)
  score_BKGTS *= H**-0.5
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
