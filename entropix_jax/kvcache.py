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

from entropix_jax.config import ModelConfig


@struct.dataclass
class Cache:
  """Keys and values, one array per layer; keys are stored already rotated."""

  k: tuple[jax.Array, ...]  # each k_BKSH
  v: tuple[jax.Array, ...]  # each v_BKSH

  @property
  def capacity(self) -> int:
    """S: slots per row."""
    return self.k[0].shape[2]


def init(cfg: ModelConfig, rows: int, capacity: int, dtype) -> Cache:
  """An empty cache. Zeros and not `empty`: a dead slot's value is multiplied by an exact zero, and
  zero times an uninitialised NaN would be NaN."""
  shape = (rows, cfg.kv_heads, capacity, cfg.head_dim)
  return Cache(
    k=tuple(jnp.zeros(shape, dtype) for _ in range(cfg.layers)),
    v=tuple(jnp.zeros(shape, dtype) for _ in range(cfg.layers)),
  )


def append(old_BKSH: jax.Array, new_BTKH: jax.Array, len_B: jax.Array) -> jax.Array:
  """Write T tokens of each row after its first `len_B`; what would fall off the end is dropped."""
  B, T = new_BTKH.shape[:2]
  slot_BT = len_B[:, None] + jnp.arange(T)
  row_B1 = jnp.arange(B)[:, None]
  new_BTKH = new_BTKH.astype(old_BKSH.dtype)
  return old_BKSH.at[row_B1, :, slot_BT].set(new_BTKH, mode="drop", unique_indices=True)


def readable(pos_BT: jax.Array, S: int) -> jax.Array:
  """live_BTS: which of the first S slots a query at each position may read: its own and earlier."""
  return jnp.arange(S) <= pos_BT[..., None]
