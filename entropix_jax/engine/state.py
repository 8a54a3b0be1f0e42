"""The state of a batch: everything about its rows that lives on the device.

Lengths: `len_B` tokens are in the cache; `token_B` is the next to be fed, already emitted, not yet in the
cache; `out_B` tokens have been emitted. After its first token a row has len = prompt and out = 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import metrics
from entropix_jax.engine.request import NewRow, blank_row
from entropix_jax.engine.setup import LIFTS, Setup
from entropix_jax.model import kvcache, sharding
from entropix_jax.sampling import actions, draw


@struct.dataclass
class Prefix:
  """A prompt that has been fed. It depends only on the token ids, so any number of rows can continue it."""

  cache: kvcache.Cache  # of one row; of several networks, a tuple
  len_1: jax.Array  # int32; tokens in the cache
  last_1: jax.Array  # int32; the last of them
  logits_1V: jax.Array  # of the first token; of several networks, a tuple
  attn: metrics.AttnStats | None


@struct.dataclass
class First:
  """What the first token of each row is drawn from, until it is drawn."""

  logits: Any  # logits_BV; of several networks, a tuple
  attn: metrics.AttnStats | None


@struct.dataclass
class State:
  """All rows."""

  cache: Any  # a kvcache.Cache; of several networks, a tuple
  first: First | None
  len_B: jax.Array  # int32; tokens in the cache, or in it and the shared prefix
  shared_B: jax.Array  # int32; how many of them are in the prefix that several rows share
  history_BS: jax.Array  # int32; the ids of those tokens, and the one to be fed next
  token_B: jax.Array  # int32; emitted last, to be fed next
  out_B: jax.Array  # int32; tokens emitted
  limit_B: jax.Array  # int32; emit at most this many
  live_B: jax.Array  # bool; still generating
  stop_BE: jax.Array  # int32; ids that end the row, -1 where unused
  key_B2: jax.Array  # uint32; noise key of (seed, stream, attempt)
  knobs: Any  # the sampler's Config, every leaf with a row axis
  sampler_state: Any
  actions: actions.Config  # every leaf with a row axis
  actions_state: actions.State
  alternatives_B: jax.Array  # bool; report the most likely tokens
  model_state: Any = ()  # see `LanguageModel.begin`
  # None where `Setup.masks` is False.
  masked_B: jax.Array | None = None  # bool; only ids whose bit in `allowed_BX` is 1 may come next
  allowed_BX: jax.Array | None = None  # uint32; bit i % 32 of word i // 32 is that of id i
  # Nats that a masked row adds to the logits of up to LIFTS ids; an id of -1 is none.
  lifted_BC: jax.Array | None = None  # int32
  lift_BC: jax.Array | None = None  # float32

  @property
  def light(self) -> "State":
    """Without the large arrays, which a loop over tokens must not carry."""
    return self.replace(cache=None, first=None)

  def with_large(self, other: "State") -> "State":
    """With the large arrays of another State."""
    return self.replace(cache=other.cache, first=other.first)


def begin(setup: Setup, row: NewRow, history_BS, len_B, last_B) -> State:
  """Rows that have emitted nothing, without their large arrays; `row` has a leading row axis."""
  none_B = jnp.zeros_like(len_B)
  rows = State(
    cache=None,
    first=None,
    len_B=len_B,
    shared_B=none_B,
    history_BS=history_BS,
    token_B=last_B,
    out_B=none_B,
    live_B=none_B > 0,
    key_B2=draw.row_keys(row.seed_B2, row.stream_B, none_B),
    limit_B=row.limit_B,
    stop_BE=row.stop_BE,
    knobs=row.knobs,
    sampler_state=None,
    actions=row.actions,
    actions_state=None,
    alternatives_B=row.alternatives_B,
    model_state=setup.model.begin(row.model),
  )
  if setup.masks:
    none_BX = jnp.zeros((len_B.shape[0], setup.mask_words), jnp.uint32)
    lift_BC = jnp.zeros((len_B.shape[0], LIFTS), jnp.float32)
    rows = rows.replace(
      masked_B=none_B > 0,
      allowed_BX=none_BX,
      lifted_BC=jnp.full(lift_BC.shape, -1, jnp.int32),
      lift_BC=lift_BC,
    )
  rows = fresh(setup, rows)
  return rows.replace(actions_state=rows.actions_state.replace(forced_B=row.forced_B))


def fresh(setup: Setup, rows: State) -> State:
  """Rows whose sampler, actions and model are as before the first token."""
  B = rows.len_B.shape[0]
  return rows.replace(
    sampler_state=setup.sampler.init(setup.constants(rows.knobs), B),
    actions_state=actions.init(rows.actions, B),
    model_state=setup.model.restart(rows.model_state),
  )


def blank(setup: Setup, rows: int, capacity: int | None = None) -> State:
  """A State in which every slot is free."""
  int_B = jnp.zeros((rows,), jnp.int32)
  row = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), blank_row(setup))
  history_BS = jnp.zeros((rows, setup.capacity), jnp.int32)
  float_B = jnp.zeros((rows,), jnp.float32)
  logits = [jnp.zeros((rows, setup.cfg.vocab), jnp.float32) for _ in setup.model.networks]
  return begin(setup, row, history_BS, int_B, int_B).replace(
    cache=setup.model.cache(rows, capacity or setup.capacity),
    first=First(setup.model.join(logits), setup.attn_stats(float_B)),
    key_B2=jnp.zeros((rows, 2), jnp.uint32),
  )


# -- shapes ------------------------------------------------------------------------------------


def abstract(tree):
  """The shapes, dtypes and shardings of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@functools.lru_cache(maxsize=16)  # tracing one takes as long as several decode steps
def abstract_state(setup: Setup, rows: int | None = None, capacity: int | None = None) -> State:
  """The State's shapes, dtypes and shardings; nothing is allocated."""
  rows = rows or setup.config.batch_size
  state = jax.eval_shape(functools.partial(blank, setup, rows, capacity))
  if setup.mesh is None:
    return state
  row = "_" if rows == 1 else "B"  # one row cannot be split over `data`

  def place(letters):
    def put(x):
      # An Int8's scale lacks the last axis, and most arrays have fewer axes than there are letters.
      spec = (row + letters)[: x.ndim].ljust(x.ndim, "_")
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of(setup.mesh, spec))

    return put

  first = state.first.replace(
    logits=jax.tree.map(place("V"), state.first.logits),
    attn=jax.tree.map(place(""), state.first.attn),
  )
  return jax.tree.map(place(""), state.light).replace(
    cache=jax.tree.map(place("KSH"), state.cache), first=first
  )


def abstract_prefix(setup: Setup, slots: tuple[int, ...]) -> Prefix:
  """A Prefix's shapes, dtypes and shardings; nothing is allocated.

  Args:
    slots: of the cache of each network.
  """
  networks = zip(setup.model.networks, slots, strict=True)
  return join_prefixes(setup, [network_prefix(setup, n, S) for n, S in networks])


def network_prefix(setup: Setup, network, slots: int) -> Prefix:
  """The same of one network."""
  mesh = setup.mesh

  def shape(letters, dims, dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.of(mesh, letters))

  one = shape("_", (1,), jnp.int32)
  cache = jax.eval_shape(functools.partial(network.cache, 1, slots))
  cache = jax.tree.map(lambda x: shape("_KSH"[: x.ndim], x.shape, x.dtype), cache)
  logits_1V = shape("_V", (1, setup.cfg.vocab), jnp.float32)
  return Prefix(cache, one, one, logits_1V, setup.attn_stats(shape("_", (1,), jnp.float32)))


def join_prefixes(setup: Setup, prefixes: list[Prefix]) -> Prefix:
  """The networks' prefixes as one; lengths, ids and attention statistics are the main network's."""
  return prefixes[0].replace(
    cache=setup.model.join([prefix.cache for prefix in prefixes]),
    logits_1V=setup.model.join([prefix.logits_1V for prefix in prefixes]),
  )


def prefix_slots(setup: Setup, prefix: Prefix) -> tuple[int, ...]:
  """Slots of the cache of each network."""
  return tuple(cache.capacity for cache in setup.model.parts(prefix.cache))


# -- rows --------------------------------------------------------------------------------------


def row_at(tree, slot):
  """The one row at `slot` of every array."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), tree)


def first_rows(tree, n: int):
  """The first n rows of every array."""
  return jax.tree.map(lambda x: x[:n], tree)


def put_row(tree, one, slot):
  """`tree` with the row `one` at `slot` of every array, or with several from there on; shorter axes of `one` are
  put at the start."""

  def put(big, one):
    start = (slot, *[0] * (big.ndim - 1))
    return jax.lax.dynamic_update_slice(big, one.astype(big.dtype), start)

  return jax.tree.map(put, tree, one)


def where_rows(on_B, new, old):
  """Row by row `new` where `on_B` is set, else `old`, of every array."""

  def pick(new, old):
    return jnp.where(on_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return jax.tree.map(pick, new, old)
