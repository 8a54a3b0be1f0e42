"""The key/value cache: which slots a row has written, and which of them a query may read.

Why: three counters that all ancestors mixed up are one here. `len_B` tokens of a row are in the cache;
feeding T tokens writes slots len_B .. len_B + T - 1 and gives them the same numbers as positions;
afterwards the caller adds T to len_B. Slots beyond a row's length are never read, so they may hold anything.

  slot      0   1   2   3   4   5   6          len_B = 4, T = 2
  before    a   b   c   d   ?   ?   ?
  after     a   b   c   d   e   f   ?          query e reads 0..4, query f reads 0..5

Decode steps of one dispatch only read the cache. Their tokens go to a small buffer (`Recent`), in which all
rows write the same slot whatever their lengths, and `merge` moves them into the cache at the end. Otherwise
a TPU carries the cache through the loop in the layout that appending prefers and, for several rows, moves it
to on-chip memory and back to add one token: a third more memory traffic for 1B.
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
  """An empty cache; dtype int8 means Int8.

  Zeros and not `empty`: the value of an unreadable slot is multiplied by an exact zero, and zero times an
  uninitialised NaN would be NaN.
  """
  shape = (rows, cfg.kv_heads, capacity, cfg.head_dim)

  def one():
    if jnp.dtype(dtype) == jnp.int8:
      return quant.Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32))
    return jnp.zeros(shape, dtype)

  return Cache(*(tuple(one() for _ in range(cfg.layers)) for _ in "kv"))


@struct.dataclass
class Recent:
  """Keys and values of the tokens that decode steps fed since the cache was last written."""

  kv: Cache  # each BKSH, S slots; all rows have written the first n
  n: jax.Array  # int32

  @classmethod
  def empty(cls, cfg: ModelConfig, rows: int, slots: int, dtype) -> "Recent":
    """A buffer for `slots` tokens per row that holds none."""
    return cls(init(cfg, rows, slots, dtype), jnp.zeros((), jnp.int32))


@struct.dataclass
class SharedPrefix:
  """The beginning of several rows' texts, stored once and read once for all of them [n23]."""

  cache: Cache  # of one row, each 1KSH
  len_B: (
    jax.Array
  )  # int32; how many of its tokens each row begins with; 0 for a row with another text


@struct.dataclass
class Past:
  """What each row has seen: everything that the tokens of a forward pass can attend to besides each other.

  In order of position: the shared prefix, the cache, the recent tokens. With `recent` a forward pass
  writes there and only reads the cache; without, it appends to the cache.
  """

  len_B: jax.Array  # int32; tokens of each row in `prefix` and `cache` together
  cache: Cache | None = None  # None: rows are empty; the pass makes a cache of its tokens
  recent: Recent | None = None
  prefix: SharedPrefix | None = None
  # Slots of the cache that attention reads; None: all. It must cover the rows whose results matter.
  window: int | None = struct.field(pytree_node=False, default=None)

  @property
  def own_B(self) -> jax.Array:
    """Tokens in each row's own cache."""
    return self.len_B if self.prefix is None else self.len_B - self.prefix.len_B

  @property
  def n(self) -> jax.Array:
    """Tokens in `recent`."""
    return jnp.int32(0) if self.recent is None else self.recent.n

  def positions(self, T: int) -> jax.Array:
    """pos_BT of the T tokens that are fed next."""
    return self.len_B[:, None] + self.n + jnp.arange(T, dtype=jnp.int32)

  def live(self, T: int) -> list[jax.Array]:
    """live_BTS for each piece that `feed` returns: the slots that each of the T next tokens may read."""
    t_T, own_B1 = jnp.arange(T, dtype=jnp.int32), self.own_B[:, None]
    S = T if self.cache is None else (self.window or self.cache.capacity)
    if self.recent is None:
      lives = [readable(own_B1 + t_T, S)]
    else:
      lives = [readable(own_B1 - 1, S), readable((self.n + t_T)[None], self.recent.kv.capacity)]
    if self.prefix is not None:
      live_B1S = readable(self.prefix.len_B[:, None] - 1, self.prefix.cache.capacity)
      lives.append(jnp.broadcast_to(live_B1S, (live_B1S.shape[0], T, live_B1S.shape[2])))
    return lives

  @property
  def before(self) -> jax.Array | None:
    """Slots that come before the new tokens in the one piece that `feed` returns; None if it returns several."""
    one = self.cache is not None and self.recent is None and self.prefix is None
    return jnp.max(self.own_B) if one else None

  def layer(self, i: int) -> "Past":
    """The same of one layer: each Cache is the pair (k_BKSH, v_BKSH) of layer `i`."""

    def pick(cache):
      return cache and (cache.k[i], cache.v[i])

    recent, prefix = self.recent, self.prefix
    return self.replace(
      cache=pick(self.cache),
      recent=recent and recent.replace(kv=pick(recent.kv)),
      prefix=prefix and prefix.replace(cache=pick(prefix.cache)),
    )

  def feed(self, new_BTKH):
    """Add the keys and values of T tokens per row to one layer; `self` is of `layer`.

    Args:
      new_BTKH: the pair (k_BTKH, v_BTKH).

    Returns:
      The pair that was written, and the pairs that these tokens' queries read, in the order of `live`.
    """
    new_BTKH = _masking(*new_BTKH)
    if self.cache is None:
      written = tuple(x_BTKH.swapaxes(1, 2) for x_BTKH in new_BTKH)
      pieces = [written]
    elif self.recent is None:
      pairs = zip(self.cache, new_BTKH, strict=True)
      written = tuple(append(*pair, self.own_B) for pair in pairs)
      pieces = [self._window(written)]
    else:
      pairs = zip(self.recent.kv, new_BTKH, strict=True)
      written = tuple(_extend(*pair, self.n) for pair in pairs)
      pieces = [self._window(self.cache), written]
    return written, pieces if self.prefix is None else [*pieces, self.prefix.cache]

  def _window(self, pair):
    return pair if self.window is None else tuple(window(x, self.window) for x in pair)

  def fed(self, written: Cache, T: int) -> "Past":
    """This past after T tokens were fed, with what `feed` wrote in each layer; `len_B` is as before."""
    if self.recent is None:
      return self.replace(cache=written)
    return self.replace(recent=Recent(written, self.n + T))


def _masking(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same pair, but a value that is not finite is a NaN of the key.

  A row that masks a slot multiplies its value by zero, and zero times NaN is NaN; it never sees the key.
  """
  sound_BTKH = jnp.isfinite(v_BTKH)
  return jnp.where(sound_BTKH, k_BTKH, jnp.nan), jnp.where(sound_BTKH, v_BTKH, 0)


def append(old_BKSH, new_BTKH: jax.Array, len_B: jax.Array):
  """Write T tokens of each row after its first `len_B`; tokens past the end of the cache are dropped."""
  new = _as_stored(old_BKSH, new_BTKH)
  T_B = jnp.full_like(len_B, new_BTKH.shape[1])
  return jax.tree.map(lambda old, new: _scatter(old, new, len_B, T_B), old_BKSH, new)


def merge(cache: Cache, recent: Recent, len_B: jax.Array, count_B: jax.Array) -> Cache:
  """The cache with the first `count_B` recent tokens of each row written after its first `len_B`."""

  def put(old_BKSH, new_BKNH):
    args = old_BKSH, new_BKNH.swapaxes(1, 2), len_B, count_B
    return jax.lax.platform_dependent(*args, tpu=_update_rows, default=_scatter)

  return jax.tree.map(put, cache, recent.kv)


def _as_stored(old_BKSH, new_BTKH: jax.Array):
  """Keys or values in the cache's format: axes BTKH and, for a scale, BTK."""
  if isinstance(old_BKSH, quant.Int8):
    return quant.cached(new_BTKH)
  return new_BTKH.astype(old_BKSH.dtype)


def _extend(old_BKNH, new_BTKH: jax.Array, n: jax.Array):
  def put(old, new):
    return jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), n, axis=2)

  return jax.tree.map(put, old_BKNH, _as_stored(old_BKNH, new_BTKH))


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
    # dynamic_update_slice moves an update that would pass the end back. So the start is moved back here,
    # and the slots before the new tokens are written with what they held.
    start = jnp.clip(len_B[b], 0, S - T)
    t_T = start + jnp.arange(T) - len_B[b]
    at = (b, 0, start, *[0] * len(rest))
    new = jax.lax.dynamic_index_in_dim(new_BKTH, b)
    was = jax.lax.dynamic_slice(old, at, new.shape)
    new_T = ((t_T >= 0) & (t_T < count_B[b])).reshape(T, *[1] * len(rest))
    now = jnp.where(new_T, jnp.take(new, t_T, axis=2, mode="clip"), was)
    return jax.lax.dynamic_update_slice(old, now, at)

  return jax.lax.fori_loop(0, B, row, old_BKSH)


def window(kv, S: int):
  """The first S slots of keys, of values or of a whole cache."""
  return jax.tree.map(lambda x: x[:, :, :S], kv)


def readable(pos_BT: jax.Array, S: int) -> jax.Array:
  """live_BTS: which of the first S slots a query at each position may read: its own and earlier."""
  return jnp.arange(S) <= pos_BT[..., None]
