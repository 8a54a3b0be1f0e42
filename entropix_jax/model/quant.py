"""Weights and key/value cache as int8 with float32 scales.

Why: decoding reads every weight for every token, so half the bytes take half the time wherever memory
is the limit. Weights have one scale per output channel, which multiplies the result of the product
and not the matrix, so the matrix unit reads int8 from memory and nothing wider is ever stored. Keys and
values have one scale per token and head, since a large channel of one token would blur other tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.config import ModelConfig
from entropix_jax.model.weights import Weights, assemble, letters, shape

LEVELS = 127  # symmetric: -128 is not used


@struct.dataclass
class Int8:
  """An array as int8: value = q * scale, with the scale broadcast over the axes that it lacks."""

  q: jax.Array  # int8
  scale: jax.Array  # float32


def inputs(field: str) -> str:
  """The axis letter that a product with this weight sums over: "wo_QD" -> "Q"; for a norm or a bias ""."""
  axes = letters(field)
  if len(axes) < 2:
    return ""
  return axes[1] if field == "embed_VD" else axes[0]


def outputs(field: str) -> str:
  """The axis letters of a weight's scale: "wo_QD" -> "D"."""
  return "".join(axis for axis in letters(field) if axis not in inputs(field))


def _scaled(x: jax.Array, axes: tuple[int, ...]) -> Int8:
  """`x` as int8 with one scale for all entries along `axes`; where all are zero, the scale is one."""
  x = x.astype(jnp.float32)
  most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  scale = jnp.where(most > 0, most / LEVELS, 1.0)
  q = jnp.round(x / scale).astype(jnp.int8)
  return Int8(q, jnp.squeeze(scale, axes))


@functools.partial(jax.jit, static_argnums=0)
def quantise(field: str, w: jax.Array) -> Int8 | jax.Array:
  """A weight as Int8, on the devices where it is; a norm or a bias is returned unchanged."""
  if not inputs(field):
    return w
  return _scaled(w, tuple(letters(field).index(axis) for axis in inputs(field)))


def weights(cfg: ModelConfig, params: Weights) -> Weights:
  """The weights of a model with every matrix as Int8."""

  def make(layer, field):
    return quantise(field, getattr(params if layer is None else params.layers[layer], field))

  return assemble(cfg, make)


def shapes(cfg: ModelConfig, dtype) -> Weights:
  """Weights of `jax.ShapeDtypeStruct` in the form that `weights` returns: enough to compile."""

  def make(layer, field):
    del layer
    whole = jax.ShapeDtypeStruct(shape(cfg, field), dtype)
    return jax.eval_shape(functools.partial(quantise, field), whole)

  return assemble(cfg, make)


def rows_of(table_VD: Int8 | jax.Array, id_BT: jax.Array, dtype) -> jax.Array:
  """x_BTD: the rows of an embedding table for these ids; those of an Int8 table are in `dtype`."""
  if not isinstance(table_VD, Int8):
    return table_VD[id_BT]
  return (table_VD.q[id_BT].astype(jnp.float32) * table_VD.scale[id_BT][..., None]).astype(dtype)


def cached(x_BTKH: jax.Array) -> Int8:
  """Keys or values as int8 with one scale per token and head: q_BTKH and scale_BTK."""
  return _scaled(x_BTKH, (x_BTKH.ndim - 1,))
