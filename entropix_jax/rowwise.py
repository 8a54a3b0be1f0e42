"""Telling the rows of a batch apart without paying for every branch in every row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def col(knob) -> jax.Array:
  """A scalar or (B,) knob as something that broadcasts against (B, V)."""
  return jnp.asarray(knob)[..., None]


def best_id(x_BV: jax.Array) -> jax.Array:
  """id_B: the lowest id among each row's largest values.

  Two plain reductions: XLA:CPU does argmax, a reduction of pairs, in one thread and one at a time, with
  whatever made its operand inside; a draw from 128,256 ids took 4.3 ms that way and takes 1.1 ms so.
  """
  ids = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
  top = jnp.max(x_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(x_BV == top, ids, ids[-1]), axis=-1)


def best(logits_BV: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
  """The C largest logits of each row, descending, and their ids; C <= V. An id >= V belongs to a -inf.

  In two stages, since sorting a whole vocabulary costs more than reading it: the C best tokens lie
  in the C blocks with the best maxima.
  """
  B, V = logits_BV.shape
  width = 1 << max(0, (V // C).bit_length() // 2)  # near sqrt(V / C): both stages sort alike
  blocks = -(-V // width)
  if blocks <= 2 * C:
    return jax.lax.top_k(logits_BV, C)
  padded_BV = jnp.pad(logits_BV, ((0, 0), (0, blocks * width - V)), constant_values=-jnp.inf)
  block_BXY = padded_BV.reshape(B, blocks, width)
  _, block_BC = jax.lax.top_k(jnp.max(block_BXY, axis=-1), C)
  few_BY = jnp.take_along_axis(block_BXY, block_BC[..., None], axis=1).reshape(B, C * width)
  value_BC, at_BC = jax.lax.top_k(few_BY, C)
  id_BC = jnp.take_along_axis(block_BC, at_BC // width, axis=-1) * width + at_BC % width
  return value_BC, id_BC


def any_row(need_B: jax.Array, dear: Callable, cheap: Callable, *operands):
  """Row by row `dear(*operands)` where needed, else `cheap(*operands)`; dear runs if any row needs it.

  One scalar condition on TPU and CPU. A GPU copies the condition to the host and waits for it, which
  costs more than a pass over the vocabulary, so there both sides are computed and selected [n02].
  Both must return arrays with a leading row axis.
  """

  def select(*operands):
    def pick(a, b):
      return jnp.where(need_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, dear(*operands), cheap(*operands))

  def branch(*operands):
    return jax.lax.cond(jnp.any(need_B), select, cheap, *operands)

  return jax.lax.platform_dependent(*operands, cuda=select, rocm=select, default=branch)
