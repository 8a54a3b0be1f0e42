"""The key/value cache: who was written where, and which slots a query may read.

Why: three counters that all ancestors mixed up are one here. `len_B` tokens of a row are in the cache;
feeding T tokens writes slots len_B .. len_B + T - 1 and gives them the same numbers as positions;
afterwards len_B grows by T. What lies beyond a row's length is never read, so it may be anything.

  slot      0   1   2   3   4   5   6          len_B = 4, T = 2
  before    a   b   c   d   ?   ?   ?
  after     a   b   c   d   e   f   ?          query e reads 0..4, query f reads 0..5

Decode steps that run in one dispatch do not even write it. They read it, keep their tokens beside it
(`Recent`: all rows write one slot together, whatever their lengths) and `merge` both at the end. A TPU
otherwise carries the cache through the loop in the order that appending likes and, for several rows, brings
it onto the chip and back to add a token to each: a third more memory traffic for 1B.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.config import ModelConfig
from entropix_jax.model import quant


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


@struct.dataclass
class Recent:
  """The tokens of decode steps since a cache was last written."""

  held: Cache  # each BKNH, of which all rows have written the first n
  n: jax.Array  # int32


@struct.dataclass
class Common:
  """The beginning of several rows' texts, read once for all [n23]; each row's own cache goes on behind it."""

  cache: Cache  # of one row, each 1KSH
  held_B: jax.Array  # int32; how many of its tokens are a row's; 0 where its text begins otherwise


def room(cfg: ModelConfig, rows: int, slots: int, dtype) -> Recent:
  """Room for `slots` tokens a row, none of which is there."""
  return Recent(init(cfg, rows, slots, dtype), jnp.zeros((), jnp.int32))


def write(old, beside, new_BTKH, len_B: jax.Array, n: jax.Array, S: int):
  """Feed a layer the keys and values of T tokens a row; each argument of three is a pair (k, v).

  Args:
    old: the layer's k_BKSH and v_BKSH; None where there is no cache.
    beside: its k_BKNH and v_BKNH of a Recent, which are written after the first n; None where there is
      none: then `old` is written.
    S: slots of the cache that queries look at.

  Returns:
    The pair that was written, and the pairs that these tokens' queries read, in the order of `live`.
  """
  if old is None:
    now = tuple(x_BTKH.swapaxes(1, 2) for x_BTKH in new_BTKH)
    return now, [now]
  if beside is None:
    now = tuple(append(*pair, len_B) for pair in zip(old, new_BTKH, strict=True))
    return now, [tuple(window(x, S) for x in now)]
  now = tuple(_extend(*pair, n) for pair in zip(beside, new_BTKH, strict=True))
  return now, [tuple(window(x, S) for x in old), now]


def live(recent: Recent | None, len_B: jax.Array, T: int, S: int) -> list[jax.Array]:
  """For each piece of `write`, the live_BTS of T queries: their own slot and earlier ones."""
  t_T = jnp.arange(T, dtype=jnp.int32)
  if recent is None:
    return [readable(len_B[:, None] + t_T, S)]
  return [readable(len_B[:, None] - 1, S), readable((recent.n + t_T)[None], recent.held.capacity)]


def common_live(common: Common, T: int) -> jax.Array:
  """live_BTS of T queries over a Common: all that the row has of it."""
  live_B1S = readable(common.held_B[:, None] - 1, common.cache.capacity)
  return jnp.broadcast_to(live_B1S, (live_B1S.shape[0], T, live_B1S.shape[2]))


def append(old_BKSH, new_BTKH: jax.Array, len_B: jax.Array):
  """Write T tokens of each row after its first `len_B`; what would fall off the end is dropped."""
  new = _as_held(old_BKSH, new_BTKH)
  T_B = jnp.full_like(len_B, new_BTKH.shape[1])
  return jax.tree.map(lambda old, new: _scatter(old, new, len_B, T_B), old_BKSH, new)


def merge(cache: Cache, recent: Recent, len_B: jax.Array, count_B: jax.Array) -> Cache:
  """The cache, with the first `count_B` recent tokens of each row after its first `len_B`."""

  def put(old_BKSH, new_BKNH):
    args = old_BKSH, new_BKNH.swapaxes(1, 2), len_B, count_B
    return jax.lax.platform_dependent(*args, tpu=_update_rows, default=_scatter)

  return jax.tree.map(put, cache, recent.held)


def _as_held(old_BKSH, new_BTKH: jax.Array):
  """Keys or values as the cache keeps them, axes BTKH and, of a scale, BTK."""
  if isinstance(old_BKSH, quant.Int8):
    return quant.cached(new_BTKH)
  return new_BTKH.astype(old_BKSH.dtype)


def _extend(old_BKNH, new_BTKH: jax.Array, n: jax.Array):
  def put(old, new):
    return jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), n, axis=2)

  return jax.tree.map(put, old_BKNH, _as_held(old_BKNH, new_BTKH))


def _scatter(old_BKSH: jax.Array, new_BTKH: jax.Array, len_B: jax.Array, count_B: jax.Array):
  B, T = new_BTKH.shape[:2]
  t_T = jnp.arange(T)
  slot_BT = jnp.where(t_T < count_B[:, None], len_B[:, None] + t_T, old_BKSH.shape[2])
  at = old_BKSH.at[jnp.arange(B)[:, None], :, slot_BT]
  return at.set(new_BTKH, mode="drop", unique_indices=True)


def _update_rows(old_BKSH: jax.Array, new_BTKH: jax.Array, len_B: jax.Array, count_B: jax.Array):
  """The same as `_scatter`, a row at a time and in place."""
  B, T = new_BTKH.shape[:2]
  S, rest = old_BKSH.shape[2], old_BKSH.shape[3:]
  new_BKTH = new_BTKH.swapaxes(1, 2)

  def row(b, old):
    # An update that would pass the end is moved back by the machine; so it moves back here, and what
    # lies before the new tokens is written as it was.
    start = jnp.clip(len_B[b], 0, S - T)
    t_T = start + jnp.arange(T) - len_B[b]
    at = (b, 0, start, *[0] * len(rest))
    new = jax.lax.dynamic_index_in_dim(new_BKTH, b)
    was = jax.lax.dynamic_slice(old, at, new.shape)
    new_T = ((t_T >= 0) & (t_T < count_B[b])).reshape(T, *[1] * len(rest))
    now = jnp.where(new_T, jnp.take(new, t_T, axis=2, mode="clip"), was)
    return jax.lax.dynamic_update_slice(old, now, at)

  return jax.lax.fori_loop(0, B, row, old_BKSH)


def window(held, S: int):
  """The first S slots, of keys, of values or of a whole cache."""
  return jax.tree.map(lambda x: x[:, :, :S], held)


def readable(pos_BT: jax.Array, S: int) -> jax.Array:
  """live_BTS: which of the first S slots a query at each position may read: its own and earlier."""
  return jnp.arange(S) <= pos_BT[..., None]
