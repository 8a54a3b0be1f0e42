"""The key/value cache: who was written where, and which slots a query may read.

Why: three counters that all ancestors mixed up are one here. `len_B` tokens of a row are in the cache;
feeding T tokens writes slots len_B .. len_B + T - 1 and gives them the same numbers as positions;
afterwards len_B grows by T. What lies beyond a row's length is never read, so it may be anything.

  slot      0   1   2   3   4   5   6          len_B = 4, T = 2
  before    a   b   c   d   ?   ?   ?
  after     a   b   c   d   e   f   ?          query e reads 0..4, query f reads 0..5
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import quant
from entropix_jax.config import ModelConfig


@struct.dataclass
class Cache:
  """Keys and values, one entry per layer; keys are stored already rotated."""

  k: tuple[jax.Array | quant.Int8, ...]  # each k_BKSH; as Int8, with scale_BKS
  v: tuple[jax.Array | quant.Int8, ...]  # each v_BKSH

  @property
  def capacity(self) -> int:
    """S: slots per row."""
    return jax.tree.leaves(self.k[0])[0].shape[2]


def init(cfg: ModelConfig, rows: int, capacity: int, dtype) -> Cache:
  """An empty cache; dtype int8 means Int8. Zeros and not `empty`: a dead slot's value is multiplied by
  an exact zero, and zero times an uninitialised NaN would be NaN."""
  shape = (rows, cfg.kv_heads, capacity, cfg.head_dim)

  def one():
    if jnp.dtype(dtype) == jnp.int8:
      return quant.Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32))
    return jnp.zeros(shape, dtype)

  return Cache(*(tuple(one() for _ in range(cfg.layers)) for _ in "kv"))


def append(old_BKSH, new_BTKH: jax.Array, len_B: jax.Array):
  """Write T tokens of each row after its first `len_B`; what would fall off the end is dropped."""
  B, T = new_BTKH.shape[:2]
  slot_BT = len_B[:, None] + jnp.arange(T)
  row_B1 = jnp.arange(B)[:, None]

  def write(old, new):
    at = old.at[row_B1, :, slot_BT]
    return at.set(new.astype(old.dtype), mode="drop", unique_indices=True)

  new = quant.cached(new_BTKH) if isinstance(old_BKSH, quant.Int8) else new_BTKH
  return jax.tree.map(write, old_BKSH, new)


def window(x_BKSH, S: int):
  """The first S slots."""
  return jax.tree.map(lambda x: x[:, :, :S], x_BKSH)


def readable(pos_BT: jax.Array, S: int) -> jax.Array:
  """live_BTS: which of the first S slots a query at each position may read: its own and earlier."""
  return jnp.arange(S) <= pos_BT[..., None]
