"""Row-wise helpers: each row's largest entries, and expensive work that runs only if some row needs it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def col(knob) -> jax.Array:
  """Add a trailing axis to a scalar or (B,) knob, so that it broadcasts against (B, V)."""
  return jnp.asarray(knob)[..., None]


def best_id(x_BV: jax.Array) -> jax.Array:
  """id_B: the id of each row's largest value; the lowest id among equal ones.

  Two plain reductions, because XLA:CPU runs argmax, a reduction of pairs, in a single thread, one element
  at a time, with its operand's computation fused in. A draw from 128,256 ids took 4.3 ms with argmax and
  takes 1.1 ms this way.
  """
  ids = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
  top = jnp.max(x_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(x_BV == top, ids, ids[-1]), axis=-1)


def best(logits_BV: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
  """(value_BC, id_BC): the C largest logits of each row, descending, and their ids; C <= V.

  An id >= V is padding, and its value is -inf. There are two stages, because sorting a whole vocabulary
  costs more than reading it: the C largest logits lie in the C blocks with the largest maxima.
  """
  B, V = logits_BV.shape
  width = 1 << max(0, (V // C).bit_length() // 2)  # near sqrt(V / C): both stages sort equally many
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


def while_loop(condition: Callable, body: Callable, start):
  """`jax.lax.while_loop`, with the condition computed at the end of the body and carried.

  A condition over rows of several devices is a message between them. From a program that was read from disk,
  XLA:CPU of jax 0.10.2 may use it before it has come; then devices disagree and wait for ever [n28].
  """

  def step(carry):
    after = body(carry[1])
    return condition(after), after

  return jax.lax.while_loop(lambda carry: carry[0], step, (condition(start), start))[1]


def any_row(need_B, dear: Callable, cheap: Callable, *operands, many_kernels: bool = False):
  """Use an expensive function for the rows in `need_B` and a cheap one for the others.

  If no row needs the expensive function, it does not run: that is one scalar condition on TPU and CPU. What a
  NumPy `need_B` says is settled when the program is traced, without a condition [n02].
  Both take `operands` and return the same structure of arrays with a leading row axis.

  Args:
    many_kernels: whether the expensive function takes an NVIDIA GPU some ten kernels or more. Otherwise a GPU
      always runs both, because a condition costs as much as a few kernels; an AMD GPU, whose graphs hold no
      conditions, always does.
  """

  # Both are part of several branches below, of which each is traced; jit traces a function once.
  dear, cheap = jax.jit(dear), jax.jit(cheap)

  def select(*operands):
    def pick(a, b):
      return jnp.where(need_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, dear(*operands), cheap(*operands))

  def branch(*operands):
    return jax.lax.cond(jnp.any(need_B), select, cheap, *operands)

  if isinstance(need_B, np.ndarray):
    return (dear if need_B.all() else select if need_B.any() else cheap)(*operands)
  cuda = branch if many_kernels else select
  return jax.lax.platform_dependent(*operands, cuda=cuda, rocm=select, default=branch)
