"""The engine: jitted verbs over one donated state.

  prefill   a prompt -> a one-row State, its first token already drawn
  insert    that row into a slot of the big State
  decode    N steps for every slot in one dispatch: forward, statistics, law, draw, stop test
  fork      a slot's row into another slot, to go on from there with other noise

and, as a pure function for those who guess tokens (decoding/speculative.py),

  verify    one pass over a token and guesses behind it

Why: everything a request may change (seed, limit, stop ids, thresholds) is an array in the State, so
nothing recompiles once the shapes in use are compiled. Shapes come from two short lists: prefill
buckets (powers of two) and attention windows, and attention reads no more of the cache than the
window that covers the longest live row. A dispatch returns one packed int32 array: one copy to host.

Lengths: `len_B` tokens are in the cache; `token_B` is the next to be fed, already emitted, not yet in
the cache; `out_B` tokens have been emitted. A fresh row has len = prompt and out = 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax import (
  actions,
  draw,
  kernels,
  kvcache,
  metrics,
  model,
  quant,
  sampling,
  sharding,
)
from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.rows import best
from entropix_jax.weights import Weights

STOP_IDS = 8  # E: stop ids a request may have
_PREFILL_LEAST, _WINDOW_LEAST = 64, 128

# -- what a request is -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how it is to be continued."""

  ids: Sequence[int]  # the prompt, at least one token
  max_new_tokens: int = 256
  seed: int = 0
  stream: int = 0  # tells samples of one prompt and seed apart
  stop: Sequence[int] = ()  # ids that end the text; the ending id is reported, too
  knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # sampler settings, by name
  actions: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )  # settings of actions.py, by name


def check(cfg: ModelConfig, engine: EngineConfig, sampler: ModuleType, request: Request) -> None:
  """Raises UserError when such an engine cannot run the request; needs no weights."""
  n = len(request.ids)
  if n < 1:
    raise UserError("The prompt is empty; give at least one token.")
  if n >= engine.max_seq_len:
    raise UserError(
      f"The prompt has {n} tokens and leaves no room for an answer in "
      f"config.engine.max_seq_len={engine.max_seq_len}; shorten it or raise that setting."
    )
  if request.max_new_tokens < 1:
    raise UserError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.")
  if len(request.stop) > STOP_IDS:
    raise UserError(
      f"A request may have {STOP_IDS} stop ids at most; this one has {len(request.stop)}."
    )
  bad = [i for i in request.ids if not 0 <= i < cfg.vocab]
  if bad:
    raise UserError(f"Token id {bad[0]} is outside the model's vocabulary of {cfg.vocab}.")
  draw.seed_words(request.seed)
  sampling.configure(sampler, request.knobs)
  wanted = sampling.configure(actions, request.actions)
  for i in wanted.inject.id_X[wanted.inject.id_X >= cfg.vocab]:
    raise UserError(f"Token id {i} to inject is outside the model's vocabulary of {cfg.vocab}.")


# -- state -------------------------------------------------------------------------------------


@struct.dataclass
class State:
  """All rows, and everything about them that lives on the device."""

  cache: kvcache.Cache
  len_B: jax.Array  # int32; tokens in the cache
  history_BS: jax.Array  # int32; the ids of those tokens, and the one to be fed next
  token_B: jax.Array  # int32; emitted last, to be fed next
  out_B: jax.Array  # int32; tokens emitted
  limit_B: jax.Array  # int32; emit at most this many
  live_B: jax.Array  # bool; still generating
  stop_BE: jax.Array  # int32; ids that end the row, -1 where unused
  key_B2: jax.Array  # uint32; noise key of (seed, stream, attempt)
  knobs: Any  # the sampler's Config, every leaf (B,)
  memory: Any  # the sampler's state
  act: actions.Config  # every leaf with a row axis, as in knobs
  acting: actions.State


# Flags of a packed row.
EMITTED, STOPPED, EXHAUSTED, UNCERTAIN, INJECTED, FORK = 1, 2, 4, 8, 16, 32
# LATER: of the same forward pass as the token before it. ACCEPTED: it had been drafted. From bit DRAFTED on,
# at a pass's first token: how many tokens had been.
LATER, ACCEPTED, DRAFTED = 64, 128, 8
_HEAD = ("id", "flags", "branch")
_RAW = ("logprob", "logprob_law", "entropy", "varentropy")
_ATTN = tuple(field.name for field in dataclasses.fields(metrics.AttnStats))


def _pack(ints: list[jax.Array], floats: list[jax.Array]) -> jax.Array:
  """record_BR: int32, with the floats' bits after the integers."""
  f_BR = jnp.stack([x.astype(jnp.float32) for x in floats], axis=-1)
  i_BR = jnp.stack([x.astype(jnp.int32) for x in ints], axis=-1)
  return jnp.concatenate([i_BR, jax.lax.bitcast_convert_type(f_BR, jnp.int32)], axis=-1)


class Engine:
  """A model, a sampler and shapes; compiles each verb once per shape and owns no rows.

  Args:
    weights: placed on the device or mesh already, or `jax.ShapeDtypeStruct`s that say where.
    sampler: a module of `entropix_jax.sampling`.
    mesh: its shape; the default is one device.
    devices: to make the mesh of; all that there are where None. With devices given, a mesh of one is
      a mesh, too: so programs can be compiled for a device that is not here.
  """

  def __init__(
    self,
    cfg: ModelConfig,
    weights: Weights,
    sampler: ModuleType,
    engine: EngineConfig,
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    if not jax.config.jax_threefry_partitionable:
      raise UserError("Seeded noise needs jax_threefry_partitionable=True; unset that option.")
    if engine.max_seq_len > cfg.max_position:
      raise UserError(
        f"config.engine.max_seq_len={engine.max_seq_len} is beyond the {cfg.max_position} positions "
        "of this model; lower it."
      )
    mesh = mesh or MeshConfig()
    sharding.check(cfg, mesh, engine.batch_size)
    self.cfg, self.weights, self.sampler, self.config = cfg, weights, sampler, engine
    self.shape, self.mesh = mesh, sharding.mesh(mesh, cfg, devices)
    self.dtype, int8 = weights.norm_D.dtype, isinstance(weights.embed_VD, quant.Int8)
    if int8 != (engine.weights == "int8") or engine.dtype not in ("auto", self.dtype.name):
      raise UserError(
        f"The weights are {'int8 and ' * int8}{self.dtype.name} where config.engine.weights is "
        f"{engine.weights} and config.engine.dtype is {engine.dtype}; load them as those say."
      )
    self.cache_dtype = jnp.dtype(jnp.int8) if engine.cache == "int8" else self.dtype
    self.windows = _sizes(_WINDOW_LEAST, engine.max_seq_len, engine.prefill_chunk)
    self.capacity = self.windows[-1]
    self.top = min(engine.top_logprobs, cfg.vocab)
    self.ints = (*_HEAD, *(f"top_id_{i}" for i in range(self.top)))
    self.numbers = self._numbers()
    tops = tuple(f"top_logprob_{i}" for i in range(self.top))
    self.columns = self.ints + self.numbers + tops
    self.compiled: dict[tuple, Any] = {}

  def _numbers(self) -> tuple[str, ...]:
    attn = _ATTN if self.config.attn_stats != "off" else ()
    decision = jax.eval_shape(self._decide_once)
    clash = set(decision.stats) & set(_RAW + _ATTN + _HEAD)
    assert not clash, f"sampler statistics {clash} shadow the engine's own"
    return (*_RAW, *attn, *sorted(decision.stats))

  def _decide_once(self):
    cfg = self._knobs({})
    row = jnp.zeros((1,), jnp.float32)
    attn = None
    if self.config.attn_stats != "off":
      attn = metrics.AttnStats(**dict.fromkeys(_ATTN, row))
    obs = sampling.Observation(
      logits_BV=jnp.zeros((1, self.cfg.vocab), jnp.float32),
      raw=metrics.Spread(row, row, row),
      attn=attn,
      token_B=row.astype(jnp.int32),
      pos_B=row.astype(jnp.int32),
      key_B2=jnp.zeros((1, 2), jnp.uint32),
      history_BS=jnp.zeros((1, self.capacity), jnp.int32),
      len_B=row.astype(jnp.int32),
      stop_BE=jnp.zeros((1, STOP_IDS), jnp.int32),
    )
    return self.sampler.step(cfg, self.sampler.init(cfg, 1), obs)

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(least, most) tokens that a dispatch gives a live row."""
    return self.config.steps_per_dispatch, self.config.steps_per_dispatch

  # -- shapes --------------------------------------------------------------------------------

  def bucket(self, n: int) -> tuple[int, int]:
    """(T, S) of the prefill of an n-token prompt: tokens a call feeds, slots the row gets."""
    chunk = self.config.prefill_chunk
    if n <= chunk:
      size = max(_PREFILL_LEAST, 1 << (n - 1).bit_length())
      size = min(size, chunk)
      return size, size
    return chunk, min(s for s in self.windows if s >= n and s % chunk == 0)

  def window(self, n: int) -> int:
    """The smallest attention window that covers n slots."""
    return min(s for s in self.windows if s >= min(n, self.capacity))

  # -- the verbs, as pure functions -----------------------------------------------------------

  def forward(self, weights, token_BT: jax.Array, **kwargs):
    """`model.forward` of this engine's model, on its mesh, measuring what it measures."""
    return model.forward(
      self.cfg,
      weights,
      token_BT,
      attn_stats=self.config.attn_stats,
      mesh=self.mesh,
      own_kernels=kernels.wanted(self.config.kernels),
      **kwargs,
    )

  def room(self, rows: int, slots: int) -> kvcache.Recent:
    """Room beside the cache for so many tokens a row."""
    return kvcache.room(self.cfg, rows, slots, self.cache_dtype)

  def _decide(self, rows: State, logits_BV, attn) -> tuple[dict[str, Any], jax.Array]:
    """(what changes in these rows, record_BR): statistics, law, draw, commit, stop test."""
    raw = metrics.spread(logits_BV)
    obs = sampling.Observation(
      logits_BV=logits_BV,
      raw=raw,
      attn=attn,
      token_B=rows.token_B,
      pos_B=rows.out_B,
      key_B2=rows.key_B2,
      history_BS=rows.history_BS,
      len_B=rows.len_B,
      stop_BE=rows.stop_BE,
    )
    decision = self.sampler.step(rows.knobs, rows.memory, obs)
    verdict, acting = actions.step(rows.act, rows.acting, raw, decision.law_BV)
    decision = decision.replace(law_BV=verdict.law_BV)
    token_B = draw.draw(decision.law_BV, rows.key_B2, rows.out_B)
    memory = self.sampler.commit(rows.knobs, rows.memory, decision, token_B)

    live_B = rows.live_B
    out_B = rows.out_B + live_B.astype(jnp.int32)
    stopped_B = live_B & jnp.any(token_B[:, None] == rows.stop_BE, axis=-1)
    uncertain_B = live_B & ~stopped_B & verdict.uncertain_B
    exhausted_B = live_B & ~stopped_B & ~uncertain_B & (out_B >= rows.limit_B)

    def pick(new, old):
      return jnp.where(live_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def at(x_BV):
      return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

    flags = (
      (live_B, EMITTED),
      (stopped_B, STOPPED),
      (exhausted_B, EXHAUSTED),
      (uncertain_B, UNCERTAIN),
      (live_B & verdict.injected_B, INJECTED),
      (live_B & verdict.fork_B, FORK),
    )
    ints = [token_B, sum(jnp.where(on_B, flag, 0) for on_B, flag in flags), decision.branch_B]
    floats = [at(logits_BV) - raw.lse, at(decision.law_BV), raw.ent, raw.varent]
    floats += [getattr(attn, name) for name in _ATTN] if attn is not None else []
    floats += [decision.stats[name] for name in sorted(decision.stats)]
    if self.top:
      value_BC, id_BC = best(logits_BV, self.top)
      ints += list(id_BC.T)
      floats += list((value_BC - raw.lse[:, None]).T)
    changed = {
      "token_B": jnp.where(live_B, token_B, rows.token_B),
      "out_B": out_B,
      "live_B": live_B & ~stopped_B & ~exhausted_B & ~uncertain_B,
      "acting": jax.tree.map(pick, acting, rows.acting),
      "memory": jax.tree.map(pick, memory, rows.memory),
    }
    return changed, _pack(ints, floats)

  def logits(self, weights, x: jax.Array) -> jax.Array:
    """Logits (B, V) or (B, T, V) of hidden rows."""
    # One value, read by statistics, law and argmax alike: without the barrier a compiler may fuse
    # the vocabulary matmul into each reader and stream the head from memory three times.
    # And split by vocabulary, said aloud: samplers want rows, and a compiler may grant that by gathering
    # the head's weights on every chip (1 GB a step for 8B on four) in place of the few logits.
    logits = jax.lax.optimization_barrier(model.unembed(weights, x))
    rows_letter = "B" if logits.shape[0] > 1 else "_"
    return sharding.constrain(self.mesh, logits, rows_letter + "_" * (logits.ndim - 2) + "V")

  def emit(self, state: State, logits_BV, attn) -> tuple[State, jax.Array]:
    """From logits to the next token, in the rows that are live."""
    rows = state.replace(cache=None)
    changed, record_BR = sharding.per_row(self.mesh, self._decide, rows, logits_BV, attn)
    # A dead row writes past the end of its history, which drops it.
    slot_B = jnp.where(state.live_B, state.len_B, self.capacity)
    row_B = jnp.arange(slot_B.shape[0])
    history_BS = state.history_BS.at[row_B, slot_B].set(
      changed["token_B"], mode="drop", unique_indices=True
    )
    return state.replace(history_BS=history_BS, **changed), record_BR

  def _decode(self, weights, state: State, *, steps: int, window: int):
    cache, base_B = state.cache, state.len_B
    recent = self.room(base_B.shape[0], steps)

    def step(carry, _):
      state, recent = carry
      x_BTD, recent, attn = self.forward(
        weights,
        state.token_B[:, None],
        cache=cache,
        len_B=base_B,
        recent=recent,
        window=window,
        last_B=jnp.zeros_like(base_B),
      )
      state = state.replace(len_B=state.len_B + state.live_B.astype(jnp.int32))
      state, record_BR = self.emit(state, self.logits(weights, x_BTD[:, 0]), attn)
      return (state, recent), record_BR

    start = (state.replace(cache=None), recent)
    (state, recent), record_NBR = jax.lax.scan(step, start, length=steps)
    cache = self.merge(cache, recent, base_B, state.len_B - base_B)
    return state.replace(cache=cache), record_NBR

  def verify(
    self, weights, state: State, draft_BG: jax.Array, count_B: jax.Array, *, window: int
  ) -> tuple[State, kvcache.Recent, jax.Array]:
    """One forward pass over each row's next token and a draft behind it; emits 1 to G + 1 tokens a row.

    They are what decoding one by one would give: the sampler runs at every position with the state, noise
    and statistics that it would have there, for as long as it draws what was drafted. The first token
    that differs is the last one.

    Args:
      count_B: how many of the G drafted ids count; any ids and any number are right.

    Returns:
      The State, its cache as it was; the tokens that were fed, of which each row's first (how much len_B
      grew) belong into the cache; record_TBR with T = G + 1.
    """
    B, G = draft_BG.shape
    x_BTD, recent, attn_BT = self.forward(
      weights,
      jnp.concatenate([state.token_B[:, None], draft_BG], axis=1),
      cache=state.cache,
      len_B=state.len_B,
      recent=self.room(B, G + 1),
      window=window,
      last_B=jnp.broadcast_to(jnp.arange(G + 1), (B, G + 1)),
    )
    logits_BTV = self.logits(weights, x_BTD)

    def step(carry, at):
      state, agree_B = carry
      t, draft_B, logits_BV, attn = at
      on_B = state.live_B & agree_B
      now = state.replace(live_B=on_B, len_B=state.len_B + on_B.astype(jnp.int32))
      now, record_BR = self.emit(now, logits_BV, attn)
      hit_B = on_B & (t < count_B) & (now.token_B == draft_B)
      first_B = jnp.where(t == 0, count_B << DRAFTED, LATER)
      flags_B = jnp.where(on_B, first_B + jnp.where(hit_B, ACCEPTED, 0), 0)
      record_BR = record_BR.at[:, _HEAD.index("flags")].add(flags_B)
      live_B = jnp.where(on_B, now.live_B, state.live_B)
      return (now.replace(live_B=live_B), hit_B), record_BR

    draft_TB = jnp.pad(draft_BG, ((0, 0), (0, 1))).T
    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (logits_BTV, attn_BT))
    start = (state.replace(cache=None), state.live_B)
    (after, _), record_TBR = jax.lax.scan(step, start, (jnp.arange(G + 1), draft_TB, *by_step))
    return after.replace(cache=state.cache), recent, record_TBR

  def merge(self, cache: kvcache.Cache, recent: kvcache.Recent, len_B, count_B) -> kvcache.Cache:
    """The cache with each row's first `count_B` recent tokens behind its first `len_B`."""
    if self.mesh is None:
      return kvcache.merge(cache, recent, len_B, count_B)
    # Each chip merges its own rows and heads: a loop over rows must not be one over all chips' rows.
    spec = sharding.spec
    held = jax.tree.map(lambda x: spec("BKSH"[: x.ndim]), cache)
    specs = held, kvcache.Recent(held, spec("")), spec("B"), spec("B")
    local = jax.shard_map(
      kvcache.merge, mesh=self.mesh, in_specs=specs, out_specs=held, check_vma=False
    )
    return local(cache, recent, len_B, count_B)

  def _feed(self, weights, cache: kvcache.Cache, token_1T, len_1):
    """One full piece of a long prompt: cache only."""
    return self.forward(weights, token_1T, cache=cache, len_B=len_1)[1]

  def _prefill(self, weights, cache: kvcache.Cache, token_1T, len_1, n_1, row):
    """The last piece of a prompt, n_1 true tokens of it: the row's first token and its State."""
    x_1TD, cache, attn = self.forward(weights, token_1T, cache=cache, len_B=len_1, last_B=n_1 - 1)
    last_1 = jnp.take_along_axis(token_1T, n_1[:, None] - 1, axis=1)[:, 0]
    state = State(
      cache=cache,
      len_B=len_1 + n_1,
      history_BS=row["history_BS"],
      token_B=last_1,
      out_B=jnp.zeros_like(n_1),
      live_B=jnp.ones_like(n_1, bool),
      key_B2=draw.row_keys(row["seed_B2"], row["stream_B"], jnp.zeros_like(row["stream_B"])),
      limit_B=row["limit_B"],
      stop_BE=row["stop_BE"],
      knobs=row["knobs"],
      memory=self.sampler.init(row["knobs"], 1),
      act=row["act"],
      acting=actions.init(row["act"], 1),
    )
    x_1D = jnp.take_along_axis(x_1TD, n_1[:, None, None] - 1, axis=1)[:, 0]
    return self.emit(state, self.logits(weights, x_1D), attn)

  @staticmethod
  def _insert(state: State, row: State, slot) -> State:
    def put(big, one):
      start = (slot, *[0] * (big.ndim - 1))
      return jax.lax.dynamic_update_slice(big, one.astype(big.dtype), start)

    # A bucket may be longer than the cache; what lies past the prompt is padding.
    S = state.cache.capacity
    return jax.tree.map(put, state, row.replace(cache=kvcache.window(row.cache, S)))

  @staticmethod
  def _fork(state: State, source, target, stream) -> State:
    key_2 = draw.row_keys(stream["seed_B2"], stream["stream_B"], jnp.zeros_like(stream["stream_B"]))

    def copy(x):
      row = jax.lax.dynamic_slice_in_dim(x, source, 1)
      return jax.lax.dynamic_update_slice_in_dim(x, row, target, 0)

    state = jax.tree.map(copy, state)
    return state.replace(key_B2=jax.lax.dynamic_update_slice_in_dim(state.key_B2, key_2, target, 0))

  # -- compiling -------------------------------------------------------------------------------

  def _program(self, key: tuple):
    """The compiled program of (verb, sizes...); compiled at first use."""
    if key not in self.compiled:
      self.compiled[key] = self._lower(key).compile()
    return self.compiled[key]

  def _lower(self, key: tuple):
    verb, *sizes = key
    state = self.abstract_state()
    weights = abstract(self.weights)

    def place(letters):
      return sharding.of(self.mesh, letters)

    def shape(letters, dims, dtype=jnp.int32):
      return jax.ShapeDtypeStruct(dims, dtype, sharding=place(letters))

    def jit(f, out, donate):
      kwargs = (
        {} if self.mesh is None else {"out_shardings": jax.tree.map(lambda x: x.sharding, out)}
      )
      return jax.jit(f, donate_argnames=donate, **kwargs)

    if verb == "init":
      build = functools.partial(self._blank, self.config.batch_size, self.capacity)
      return jit(build, state, ()).lower()
    if verb == "cache":
      row = self.abstract_state(1, sizes[0]).cache
      return jit(
        functools.partial(kvcache.init, self.cfg, 1, sizes[0], self.cache_dtype), row, ()
      ).lower()
    if verb == "decode":
      steps, window = sizes
      f = functools.partial(self._decode, steps=steps, window=window)
      out = (state, shape("___", (steps, self.config.batch_size, len(self.columns))))
      return jit(_named(f, "decode"), out, ("state",)).lower(weights, state)
    if verb == "insert":
      row = self.abstract_state(1, sizes[0])
      return jit(self._insert, state, ("state",)).lower(state, row, shape("", ()))
    if verb == "fork":
      stream = {
        "seed_B2": shape("__", (1, 2), jnp.uint32),
        "stream_B": shape("_", (1,), jnp.uint32),
      }
      return jit(self._fork, state, ("state",)).lower(state, shape("", ()), shape("", ()), stream)
    T, S = sizes
    row = self.abstract_state(1, S)
    token, one = shape("__", (1, T)), shape("_", (1,))
    if verb == "feed":
      return jit(self._feed, row.cache, ("cache",)).lower(weights, row.cache, token, one)
    request = jax.tree.map(
      lambda x: shape("_" * x.ndim, x.shape, x.dtype), self._row(Request(ids=(0,)), limit=1)
    )
    out = (row, shape("__", (1, len(self.columns))))
    return jit(self._prefill, out, ("cache",)).lower(weights, row.cache, token, one, one, request)

  def abstract_state(self, rows: int | None = None, capacity: int | None = None) -> State:
    """The State's shapes, dtypes and shardings; nothing is allocated."""
    build = functools.partial(
      self._blank, rows or self.config.batch_size, capacity or self.capacity
    )
    state = jax.eval_shape(build)
    if self.mesh is None:
      return state
    # A one-row State is not split over `data`: there is one row.
    row = "_" if rows == 1 else "B"

    def place(x, letters):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of(self.mesh, letters))

    # An Int8's scale lacks the last axis.
    cache = jax.tree.map(lambda x: place(x, (row + "KSH")[: x.ndim]), state.cache)
    state = jax.tree.map(lambda x: place(x, row + "_" * (x.ndim - 1)), state)
    return state.replace(cache=cache)

  def _blank(self, rows: int, capacity: int) -> State:
    int_B = jnp.zeros((rows,), jnp.int32)
    knobs, act = (
      jax.tree.map(jnp.asarray, sampling.arrays(sampling.configure(module, {}), rows))
      for module in (self.sampler, actions)
    )
    return State(
      cache=kvcache.init(self.cfg, rows, capacity, self.cache_dtype),
      len_B=int_B,
      history_BS=jnp.zeros((rows, self.capacity), jnp.int32),
      token_B=int_B,
      out_B=int_B,
      limit_B=int_B,
      live_B=jnp.zeros((rows,), bool),
      stop_BE=jnp.full((rows, STOP_IDS), -1, jnp.int32),
      key_B2=jnp.zeros((rows, 2), jnp.uint32),
      knobs=knobs,
      memory=self.sampler.init(knobs, rows),
      act=act,
      acting=actions.init(act, rows),
    )

  def _knobs(self, settings: dict[str, Any]):
    return sampling.arrays(sampling.configure(self.sampler, settings))

  def compile(self, programs: Sequence[tuple], done: Callable[[], None] = lambda: None) -> None:
    """Compile these programs now, two at a time; `done()` after each."""
    todo = [key for key in dict.fromkeys(programs) if key not in self.compiled]
    lowered = [(key, self._lower(key)) for key in todo]
    with ThreadPoolExecutor(2) as pool:
      for key, program in pool.map(lambda kv: (kv[0], kv[1].compile()), lowered):
        self.compiled[key] = program
        done()

  def programs(self, requests: Sequence[Request]) -> list[tuple]:
    """What running these requests will need, warm-up included; a superset for mixed lengths."""
    need: list[tuple] = [("init",)]
    for S in {self.bucket(len(r.ids))[1] for r in requests}:
      need += [("cache", S), ("insert", S)]
    N = self.config.steps_per_dispatch
    longest = 0
    for r in requests:
      T, S = self.bucket(len(r.ids))
      need += [("prefill", T, S), *([("feed", T, S)] if len(r.ids) > T else [])]
      longest = max(longest, len(r.ids) + self.limit(r))
    shortest = min((len(r.ids) for r in requests), default=1)
    low, high = self.window(shortest), self.window(longest)
    return need + [("decode", N, w) for w in self.windows if low <= w <= high]

  # -- the verbs -------------------------------------------------------------------------------

  def init(self) -> State:
    """An empty State with every slot free."""
    return self._program(("init",))()

  def limit(self, request: Request) -> int:
    """Tokens the request can get: its own limit or what fits after the prompt."""
    return min(request.max_new_tokens, self.config.max_seq_len - len(request.ids))

  def _row(self, request: Request, limit: int) -> dict[str, Any]:
    stop = [*request.stop, *[-1] * (STOP_IDS - len(request.stop))]
    history_1S = np.zeros((1, self.capacity), np.int32)
    history_1S[0, : len(request.ids)] = request.ids
    return {
      "history_BS": history_1S,
      "seed_B2": np.asarray([draw.seed_words(request.seed)], np.uint32),
      "stream_B": np.asarray([request.stream], np.uint32),
      "limit_B": np.asarray([limit], np.int32),
      "stop_BE": np.asarray([stop], np.int32),
      "knobs": self._knobs(request.knobs),
      "act": sampling.arrays(sampling.configure(actions, request.actions)),
    }

  def prefill(self, request: Request) -> tuple[State, jax.Array]:
    """(one-row State, record_1R of its first token). The prompt runs alone: nobody can disturb it."""
    check(self.cfg, self.config, self.sampler, request)
    T, S = self.bucket(len(request.ids))
    cache = self._program(("cache", S))()
    ids = np.asarray(request.ids, np.int32)
    start = 0
    while len(ids) - start > T:
      args = (self._put(ids[None, start : start + T]), self._put(np.asarray([start], np.int32)))
      cache = self._program(("feed", T, S))(self.weights, cache, *args)
      start += T
    piece = np.zeros((1, T), np.int32)
    piece[0, : len(ids) - start] = ids[start:]
    args = (piece, np.asarray([start], np.int32), np.asarray([len(ids) - start], np.int32))
    row = self._row(request, self.limit(request))
    return self._program(("prefill", T, S))(
      self.weights, cache, *map(self._put, args), self._put(row)
    )

  def _put(self, tree):
    """NumPy leaves as device arrays, replicated over the mesh."""
    if self.mesh is None:
      return jax.device_put(tree)
    everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def put(x):
      # Among several processes device_put would compare every leaf by a collective of its own.
      return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return jax.tree.map(put, tree)

  def insert(self, state: State, row: State, slot: int) -> State:
    """The row in that slot; `state` is donated."""
    slot = self._put(np.asarray(slot, np.int32))
    return self._program(("insert", row.cache.capacity))(state, row, slot)

  def fork(self, state: State, source: int, target: int, seed: int, stream: int) -> State:
    """The row at `source`, also at `target`, to go on from here with other noise; `state` is donated.

    Args:
      seed, stream: of the noise of the row at `target`, as in a Request.
    """
    places = (np.asarray(x, np.int32) for x in (source, target))
    key = {"seed_B2": np.asarray([draw.seed_words(seed)], np.uint32)}
    key["stream_B"] = np.asarray([stream], np.uint32)
    return self._program(("fork",))(state, *map(self._put, places), self._put(key))

  def decode(self, state: State, longest: int, steps: int | None = None) -> tuple[State, jax.Array]:
    """(State, record_NBR) after N steps; `state` is donated.

    Args:
      longest: tokens in the cache of the longest live row before the call (an upper bound will do).
    """
    steps = steps or self.config.steps_per_dispatch
    return self._program(("decode", steps, self.window(longest)))(self.weights, state)

  def unpack(self, record: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values, of a record array fetched from the device."""
    n = len(self.ints)
    floats = np.ascontiguousarray(record[..., n:]).view(np.float32)
    values = [*np.moveaxis(record[..., :n], -1, 0), *np.moveaxis(floats, -1, 0)]
    return dict(zip(self.columns, values, strict=True))


def abstract(tree):
  """The shapes, dtypes and shardings of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _named(f: functools.partial, name: str):
  """A partial with a name, so that profiles and compiled text say what it is."""

  def call(weights, state):
    return f(weights, state)

  call.__name__ = name
  return call


def _sizes(least: int, most: int, chunk: int) -> tuple[int, ...]:
  """Powers of two from `least` that lie below `most`, then `most` rounded up to a multiple."""
  sizes = []
  size = least
  while size < most:
    sizes.append(size)
    size *= 2
  step = chunk if most > chunk else least
  return (*sizes, min(size, -(-most // step) * step))
