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


def extend(old_BKNH, new_BTKH: jax.Array, n: jax.Array):
  """Write T tokens of every row after its first `n`, which all rows have in common."""
  new = quant.cached(new_BTKH) if isinstance(old_BKNH, quant.Int8) else new_BTKH

  def write(old, new):
    new = new.swapaxes(1, 2).astype(old.dtype)
    return jax.lax.dynamic_update_slice_in_dim(old, new, n, axis=2)

  return jax.tree.map(write, old_BKNH, new)


def merge(cache: Cache, recent: Cache, len_B: jax.Array, count_B: jax.Array) -> Cache:
  """The cache, with the first `count_B` recent tokens of each row after its first `len_B`."""
  S, N = cache.capacity, recent.capacity
  # An update a row, in place: the compiler of a TPU does a scatter on the chip, with the whole cache.
  start_B = jnp.clip(len_B, 0, max(S - N, 0))

  def put(old, new):
    for b in range(old.shape[0]):
      at = (b, 0, start_B[b], *[0] * (old.ndim - 3))
      there = jax.lax.dynamic_slice(old, at, (1, *there_shape(old, N)))
      i_N = start_B[b] + jnp.arange(N) - len_B[b]
      mine = jnp.take(new[b : b + 1], jnp.clip(i_N, 0, N - 1), axis=2)
      fresh_N = ((i_N >= 0) & (i_N < count_B[b])).reshape(1, 1, N, *[1] * (old.ndim - 3))
      old = jax.lax.dynamic_update_slice(old, jnp.where(fresh_N, mine, there), at)
    return old

  def there_shape(old, N):
    return (old.shape[1], N, *old.shape[3:])

  return jax.tree.map(put, cache, recent)


def window(x_BKSH, S: int):
  """The first S slots."""
  return jax.tree.map(lambda x: x[:, :, :S], x_BKSH)


def readable(pos_BT: jax.Array, S: int) -> jax.Array:
  """live_BTS: which of the first S slots a query at each position may read: its own and earlier."""
  return jnp.arange(S) <= pos_BT[..., None]
