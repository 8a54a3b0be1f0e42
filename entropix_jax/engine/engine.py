"""The engine: jitted verbs over one donated state.

  prefill   a prompt -> its Prefix: keys, values and the logits of its first token; of the ids alone
  insert    a Prefix into a slot, as the row of a request, whose first token is drawn; as often as wanted
  join      a Prefix into several slots at once, as the rows of as many requests, with a copy each or without
  decode    N steps for every slot in one dispatch: forward, statistics, law, draw, stop test
  steer     end rows, wake rows that wait, move their limits, say which token comes next
  fork      a slot's row into another slot, to go on from there with other noise
  rewind    a row to the first n of its tokens, to go on from there with other noise
  score     log-probabilities of labels behind a suffix; no row notices

and, as a pure function for those who guess tokens (decoding/speculative.py),

  verify    one pass over a token and guesses behind it

Why: everything a request may change (seed, limit, stop ids, thresholds) is an array in the State, so
nothing recompiles once the shapes in use are compiled. Shapes come from two short lists: prefill
buckets (powers of two) and attention windows, and attention reads no more of the cache than the
window that covers the longest live row. A dispatch returns one packed int32 array: one copy to host.
What decides what happens next is above: these verbs know rows, not why there are several.

Lengths: `len_B` tokens are in the cache; `token_B` is the next to be fed, already emitted, not yet in
the cache; `out_B` tokens have been emitted. A fresh row has len = prompt and out = 1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax import metrics, sampling
from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.model import kernels, kvcache, llama, products, quant, sharding
from entropix_jax.model.weights import Weights
from entropix_jax.rowwise import best
from entropix_jax.sampling import actions, draw

STOP_IDS = 8  # E: stop ids a request may have
_PREFILL_LEAST, _WINDOW_LEAST, _SUFFIX_LEAST = 64, 128, 16
_REPLAY = 64  # tokens that a rewind goes through at once

# -- what a request is -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how it is to be continued."""

  ids: Sequence[int]  # the prompt, at least one token
  max_new_tokens: int = 256
  seed: int = 0
  stream: int = 0  # tells samples of one prompt and seed apart
  stop: Sequence[int] = ()  # ids that end the text; the ending id is reported, too
  stop_text: Sequence[str] = ()  # strings that end the text, which is then what stands before
  knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # sampler settings, by name
  actions: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )  # settings of actions.py, by name
  beside: Sequence[Sequence[int]] = ()  # the prompt, as further models of decoding/joint.py see it


def check(cfg: ModelConfig, engine: EngineConfig, sampler: ModuleType, request: Request) -> None:
  """Raises UserError when such an engine cannot run the request; needs no weights."""
  n = max(map(len, (request.ids, *request.beside)))
  if not all(map(len, (request.ids, *request.beside))):
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
  every = itertools.chain(request.ids, *request.beside)
  if not all(request.stop_text):
    raise UserError("A stop string is empty and would end every text; leave it out.")
  bad = [i for i in every if not 0 <= i < cfg.vocab]
  if bad:
    raise UserError(f"Token id {bad[0]} is outside the model's vocabulary of {cfg.vocab}.")
  draw.seed_words(request.seed)
  sampling.configure(sampler, request.knobs)
  wanted = sampling.configure(actions, request.actions)
  for i in wanted.inject.id_X[wanted.inject.id_X >= cfg.vocab]:
    raise UserError(f"Token id {i} to inject is outside the model's vocabulary of {cfg.vocab}.")


# -- state -------------------------------------------------------------------------------------


@struct.dataclass
class Prefix:
  """A prompt that has been fed; whoever continues it, and how, is not in here."""

  cache: kvcache.Cache  # of one row
  len_1: jax.Array  # int32; tokens in the cache
  last_1: jax.Array  # int32; the last of them
  logits_1V: jax.Array
  attn: metrics.AttnStats | None


@struct.dataclass
class State:
  """All rows, and everything about them that lives on the device."""

  cache: kvcache.Cache
  len_B: jax.Array  # int32; tokens in the cache
  common_B: jax.Array  # int32; the first so many of them are in the prefix of several rows
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
  mixing: Any = ()  # of several models (decoding/joint.py)


# Flags of a packed row.
EMITTED, STOPPED, EXHAUSTED, UNCERTAIN, INJECTED, FORK = 1, 2, 4, 8, 16, 32
# LATER: of the same forward pass as the token before it. ACCEPTED: it had been drafted. FORCED: by `steer` or
# `insert`. WAITS: no token, the row waits for `steer`. From bit DRAFTED on, at a pass's first token: how many
# tokens had been drafted.
LATER, ACCEPTED, FORCED, WAITS, DRAFTED = 64, 128, 256, 512, 10
WAKE = 2  # see Engine.steer
_HEAD = ("id", "flags", "branch")
_RAW = ("logprob", "logprob_law", "entropy", "varentropy")
_CONFIDENCE = tuple(field.name for field in dataclasses.fields(metrics.Confidence))
_ATTN = tuple(field.name for field in dataclasses.fields(metrics.AttnStats))


def _pack(ints: list[jax.Array], floats: list[jax.Array]) -> jax.Array:
  """record_BR: int32, with the floats' bits after the integers."""
  f_BR = jnp.stack([x.astype(jnp.float32) for x in floats], axis=-1)
  i_BR = jnp.stack([x.astype(jnp.int32) for x in ints], axis=-1)
  return jnp.concatenate([i_BR, jax.lax.bitcast_convert_type(f_BR, jnp.int32)], axis=-1)


def _drawn(decision: sampling.Decision, key_B2, pos_B) -> jax.Array:
  return draw.draw(decision.law_BV, key_B2, pos_B)


class Engine:
  """A model, a sampler and shapes; compiles each verb once per shape and owns no rows.

  Args:
    weights: placed on the device or mesh already, or `jax.ShapeDtypeStruct`s that say where.
    sampler: a module of `entropix_jax.sampling`.
    mesh: its shape; the default is one device.
    devices: to make the mesh of; all that there are where None. With devices given, a mesh of one is
      a mesh, too: so programs can be compiled for a device that is not here.
  """

  # Tokens of a prompt that rows may have in common, at least; None: they never do. A shorter one is read
  # in less time by each row than as a piece of its own.
  common_from: ClassVar[int | None] = _WINDOW_LEAST

  def __init__(
    self,
    cfg: ModelConfig,
    weights: Weights,
    sampler: ModuleType,
    engine: EngineConfig,
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
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
    placed = getattr(weights.norm_D, "sharding", None)
    self.platform = (
      next(iter(placed.device_set)).platform if placed is not None else jax.default_backend()
    )
    self.options = products.options(weights, self.platform)
    self.cache_dtype = jnp.dtype(jnp.int8) if engine.cache == "int8" else self.dtype
    self.windows = _sizes(_WINDOW_LEAST, engine.max_seq_len, engine.prefill_chunk)
    self.capacity = self.windows[-1]
    self.top = min(engine.top_logprobs, cfg.vocab)
    self.ints = (*_HEAD, *(f"top_id_{i}" for i in range(self.top)))
    self.numbers = self._numbers()
    tops = tuple(f"top_logprob_{i}" for i in range(self.top))
    self.columns = self.ints + self.numbers + tops
    self.compiled: dict[tuple, Any] = {}
    self._abstract: dict[tuple[int, int], State] = {}  # tracing one takes as long as several steps

  def _numbers(self) -> tuple[str, ...]:
    attn = _ATTN if self.config.attn_stats != "off" else ()
    decision = jax.eval_shape(self._decide_once)
    clash = set(decision.stats) & set(_RAW + _CONFIDENCE + _ATTN + _HEAD)
    assert not clash, f"sampler statistics {clash} shadow the engine's own"
    confidence = _CONFIDENCE if self.config.confidence else ()
    return (*_RAW, *confidence, *attn, *sorted(decision.stats))

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
    """(expected, most) tokens that a dispatch gives a live row."""
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
    """`llama.forward` of this engine's model, on its mesh, measuring what it measures."""
    return llama.forward(
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

  def _decide(
    self, rows: State, logits_BV, attn, choose: Callable = _drawn
  ) -> tuple[dict[str, Any], jax.Array]:
    """(what changes in these rows, record_BR): statistics, law, draw, commit, stop test.

    Args:
      choose: (Decision, key_B2, position_B) -> token_B.
    """
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
    if decision.score_BV is None:
      decision = decision.replace(score_BV=logits_BV)
    verdict, acting = actions.step(rows.act, rows.acting, raw, decision.law_BV)
    decision = decision.replace(law_BV=verdict.law_BV)
    token_B = choose(decision, rows.key_B2, rows.out_B)
    memory = self.sampler.commit(rows.knobs, rows.memory, decision, token_B)

    # Whoever waits has emitted nothing, so nothing of it changes but that it is not live.
    waits_B = rows.live_B & verdict.waits_B
    live_B = rows.live_B & ~waits_B
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
      (live_B & verdict.forced_B, FORCED),
      (waits_B, WAITS),
    )
    ints = [token_B, sum(jnp.where(on_B, flag, 0) for on_B, flag in flags), decision.branch_B]
    floats = [at(logits_BV) - raw.lse, at(decision.law_BV), raw.ent, raw.varent]
    if self.config.confidence:
      confidence = metrics.confidence(
        logits_BV, raw.lse, min(self.config.confidence, self.cfg.vocab)
      )
      floats += [getattr(confidence, name) for name in _CONFIDENCE]
    floats += [getattr(attn, name) for name in _ATTN] if attn is not None else []
    floats += [decision.stats[name] for name in sorted(decision.stats)]
    if self.top:
      value_BC, id_BC = best(logits_BV, self.top)
      ints += list(id_BC.T)
      floats += list((value_BC - raw.lse[:, None]).T)
    changed = {
      "token_B": jnp.where(live_B, token_B, rows.token_B),
      # The token it waits behind will be fed again.
      "len_B": rows.len_B - waits_B.astype(jnp.int32),
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
    logits = jax.lax.optimization_barrier(llama.unembed(weights, x))
    rows_letter = "B" if logits.shape[0] > 1 else "_"
    return sharding.constrain(self.mesh, logits, rows_letter + "_" * (logits.ndim - 2) + "V")

  def lengths(self, rows: State):
    """Tokens of each row in the cache, as `look` and `merge` want them."""
    return rows.len_B

  def look(
    self, weights, rows: State, token_BT: jax.Array, cache, base, recent, window: int, common=None
  ):
    """(logits, recent, attention statistics) of every token; without an axis of T where T is 1.

    Args:
      base: `lengths` when `cache` was written.
      common: the cache of the prefix that rows have in common; None where every row has its own.
    """
    B, T = token_BT.shape
    last = jnp.zeros((B,), jnp.int32) if T == 1 else jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, recent, attn = self.forward(
      weights,
      token_BT,
      cache=cache,
      len_B=base,
      recent=recent,
      window=window,
      last_B=last,
      common=None if common is None else kvcache.Common(common, rows.common_B),
    )
    return self.logits(weights, x_BTD[:, 0] if T == 1 else x_BTD), recent, attn

  def emit(
    self, state: State, logits_BV, attn, guess: draw.Guess | None = None
  ) -> tuple[State, jax.Array]:
    """From logits to the next token, in the rows that are live; `len_B` counts what made the logits.

    Args:
      guess: to be judged by its law, in place of a draw.
    """

    def decide(rows, logits_BV, attn, guess):
      def judge(decision, *at):
        return draw.judge(decision.law_BV, *at, guess)

      return self._decide(rows, logits_BV, attn, judge)

    rows = state.replace(cache=None)
    decide, more = (self._decide, ()) if guess is None else (decide, (guess,))
    changed, record_BR = sharding.per_row(self.mesh, decide, rows, logits_BV, attn, *more)
    return self._commit(state, changed, record_BR), record_BR

  def guess(self, state: State, logits_BV, attn) -> tuple[State, jax.Array, jax.Array]:
    """(State, record_BR, lead_B): as `emit`, and how far each draw was decided, as `draw.lead`."""

    def lead(decision, key_B2, pos_B):
      temp_B = decision.stats.get("temperature", jnp.ones(pos_B.shape, jnp.float32))
      return draw.lead(decision.law_BV, decision.score_BV, temp_B, key_B2, pos_B)

    return self._emit_and_say(state, logits_BV, attn, lead)

  def propose(self, state: State, logits_BV, attn) -> tuple[State, jax.Array, jax.Array]:
    """(State, record_BR, law_BV): as `emit`, with a drafter's noise, and the law that was drawn from."""

    def own(decision, *at):
      return draw.draw(decision.law_BV, *at, draw.Purpose.DRAFT), decision.law_BV

    return self._emit_and_say(state, logits_BV, attn, own)

  def _emit_and_say(self, state: State, logits_BV, attn, choose: Callable):
    """As `emit`; `choose` gives the token and something else, which is the last of the answer."""

    def decide(rows, logits_BV, attn):
      said = []

      def token(*args):
        token_B, other = choose(*args)
        said.append(other)
        return token_B

      return *self._decide(rows, logits_BV, attn, token), *said

    rows = state.replace(cache=None)
    changed, record_BR, said = sharding.per_row(self.mesh, decide, rows, logits_BV, attn)
    return self._commit(state, changed, record_BR), record_BR, said

  def _commit(self, state: State, changed: dict[str, Any], record_BR) -> State:
    # A row that emits nothing writes past the end of its history, which drops it.
    emits_B = record_BR[:, _HEAD.index("flags")] & EMITTED > 0
    slot_B = jnp.where(emits_B, state.len_B, self.capacity)

    def put(history_BS, slot_B, token_B):
      at = history_BS.at[jnp.arange(slot_B.shape[0]), slot_B]
      return at.set(token_B, mode="drop", unique_indices=True)

    args = state.history_BS, slot_B, changed["token_B"]
    if self.mesh is not None and slot_B.shape[0] > 1:
      # Told that rows stay where they are, no chip asks the others where theirs go [n24].
      rows = sharding.spec("B")
      put = jax.shard_map(put, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return state.replace(history_BS=put(*args), **changed)

  def _decode(self, weights, state: State, *common, steps: int, window: int):
    cache, base, base_B = state.cache, self.lengths(state), state.len_B
    recent = self.room(base_B.shape[0], steps)
    read = self.read(cache, window)

    def step(carry, _):
      state, recent = carry
      logits_BV, recent, attn = self.look(
        weights, state, state.token_B[:, None], read, base, recent, window, *common
      )
      state = state.replace(len_B=state.len_B + state.live_B.astype(jnp.int32))
      state, record_BR = self.emit(state, logits_BV, attn)
      return (state, recent), record_BR

    start = (state.replace(cache=None), recent)
    (state, recent), record_NBR = jax.lax.scan(step, start, length=steps)
    own = base - state.common_B if common else base
    cache = self.merge(cache, recent, own, state.len_B - base_B)
    return state.replace(cache=cache), record_NBR

  def read(self, cache, window: int):
    """What several steps read of a cache that none of them writes."""
    # A CPU's compiler copies a part of an array to read it, in every step and layer if it is taken there.
    # Others read it where it is, and would have to store the copy.
    return kvcache.window(cache, window) if self.platform == "cpu" else cache

  def verify(
    self,
    weights,
    state: State,
    draft_BG: jax.Array,
    count_B: jax.Array,
    *,
    window: int,
    judges: bool = False,
    law_BGV: jax.Array | None = None,
  ) -> tuple[State, kvcache.Recent, jax.Array]:
    """One forward pass over each row's next token and a draft behind it; emits 1 to G + 1 tokens a row.

    They are what decoding one by one would give: the sampler runs at every position with the state, noise
    and statistics that it would have there, for as long as it draws what was drafted. The first token
    that differs is the last one.

    Args:
      count_B: how many of the G drafted ids count; any ids and any number are right.
      judges: a draft is judged by its law: what is emitted has the law of decoding one by one, and is
        another text. Then any number is right that is chosen without a look at what it counts.
      law_BGV: what the ids were drawn from, by `propose`; None: they were not drawn.

    Returns:
      The State, its cache as it was; the tokens that were fed, of which each row's first (how much len_B
      grew) belong into the cache; record_TBR with T = G + 1.
    """
    B, G = draft_BG.shape
    token_BT = jnp.concatenate([state.token_B[:, None], draft_BG], axis=1)
    base, recent = self.lengths(state), self.room(B, G + 1)
    logits, recent, attn = self.look(weights, state, token_BT, state.cache, base, recent, window)

    def go_on(state, on_B, t, draft_B, law_BV, logits_BV, attn):
      now = state.replace(live_B=on_B, len_B=state.len_B + on_B.astype(jnp.int32))
      guess = draw.Guess(draft_B, t < count_B, law_BV) if judges else None
      now, record_BR = self.emit(now, logits_BV, attn, guess)
      emits_B = now.out_B > state.out_B
      hit_B = emits_B & (t < count_B) & (now.token_B == draft_B)
      first_B = jnp.where(t == 0, count_B << DRAFTED, LATER)
      flags_B = jnp.where(on_B, first_B + jnp.where(hit_B, ACCEPTED, 0), 0)
      record_BR = record_BR.at[:, _HEAD.index("flags")].add(flags_B)
      live_B = jnp.where(on_B, now.live_B, state.live_B)
      return (now.replace(live_B=live_B), hit_B), record_BR

    draft_TB = jnp.pad(draft_BG, ((0, 0), (0, 1))).T
    law_TBV = None
    if law_BGV is not None:
      law_TBV = jnp.pad(jnp.moveaxis(law_BGV, 1, 0), ((0, 1), (0, 0), (0, 0)))
    every = (draft_TB, law_TBV, *_by_step((logits, attn), G + 1))

    def more(carry):
      t, state, agree_B, _ = carry
      # Behind the last guess that stands there is nothing to do; a GPU would wait for the answer [n02].
      return (t <= G) & (jnp.any(state.live_B & agree_B) | (jax.default_backend() == "gpu"))

    def step(carry):
      t, state, agree_B, record_TBR = carry
      at = jax.tree.map(lambda x: x[t], every)
      (state, hit_B), record_BR = go_on(state, state.live_B & agree_B, t, *at)
      return t + 1, state, hit_B, record_TBR.at[t].set(record_BR)

    none_TBR = jnp.zeros((G + 1, B, len(self.columns)), jnp.int32)
    start = (jnp.int32(0), state.replace(cache=None), state.live_B, none_TBR)
    _, after, _, record_TBR = jax.lax.while_loop(more, step, start)
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

  def _prefill(self, weights, cache: kvcache.Cache, token_1T, len_1, n_1) -> Prefix:
    """The last piece of a prompt, n_1 true tokens of it."""
    x_1TD, cache, attn = self.forward(weights, token_1T, cache=cache, len_B=len_1, last_B=n_1 - 1)
    x_1D = jnp.take_along_axis(x_1TD, n_1[:, None, None] - 1, axis=1)[:, 0]
    last_1 = jnp.take_along_axis(token_1T, n_1[:, None] - 1, axis=1)[:, 0]
    return Prefix(cache, len_1 + n_1, last_1, self.logits(weights, x_1D), attn)

  def _begin(self, len_B, last_B, history_1S, row: dict[str, Any]) -> State:
    """Rows of one prompt that have emitted nothing, without their cache."""
    no_B = jnp.zeros_like(len_B)
    one = State(
      cache=None,
      len_B=len_B,
      common_B=no_B,
      history_BS=jnp.broadcast_to(history_1S, (len_B.shape[0], self.capacity)),
      token_B=last_B,
      out_B=no_B,
      live_B=None,
      key_B2=draw.row_keys(row["seed_B2"], row["stream_B"], no_B),
      limit_B=row["limit_B"],
      stop_BE=row["stop_BE"],
      knobs=row["knobs"],
      memory=None,
      act=row["act"],
      acting=None,
    )
    one = self._fresh(one)
    return one.replace(acting=one.acting.replace(forced_B=row["forced_B"]))

  def _fresh(self, rows: State) -> State:
    """Rows, with what they carry from token to token as before the first one."""
    B = rows.len_B.shape[0]
    memory, acting = self.sampler.init(rows.knobs, B), actions.init(rows.act, B)
    return rows.replace(memory=memory, acting=acting)

  def _first(self, prefix: Prefix, history_1S, bits_BX, live_B) -> tuple[State, jax.Array]:
    """(rows behind the prefix, without their cache, record_BR of the first tokens of those that live)."""
    row = _unpacked(self._row(Request(ids=(0,))), bits_BX)
    ends = prefix.replace(cache=None)
    ends = jax.tree.map(lambda x: jnp.broadcast_to(x, (bits_BX.shape[0], *x.shape[1:])), ends)
    begun = self._begin(ends.len_1, ends.last_1, history_1S, row)
    return self.emit(begun.replace(live_B=live_B), ends.logits_1V, ends.attn)

  def _insert(self, state: State, prefix: Prefix, history_1S, bits_1X, slot):
    one, record_1R = self._first(prefix, history_1S, bits_1X, jnp.ones((1,), bool))
    # A bucket may be longer than the cache; what lies past the prompt is padding.
    cache = jax.tree.map(lambda x, big: x[:, :, : big.shape[2]], prefix.cache, state.cache)
    return jax.tree.map(put_row(slot), state, one.replace(cache=cache)), record_1R

  def _join(self, state: State, prefix: Prefix, history_1S, bits_BX, slot_B, *, shares: bool):
    """Rows come in the order of their slots; `slot_B` begins with the slots that are filled, then -1."""
    bits_BX = sharding.constrain(self.mesh, bits_BX, "B_")
    joins_B = jnp.any(jnp.arange(slot_B.shape[0])[:, None] == slot_B, axis=1)
    rows, record_BR = self._first(prefix, history_1S, bits_BX, joins_B)

    def pick(new, old):
      return jnp.where(joins_B.reshape(-1, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

    if shares:
      rows = rows.replace(common_B=jnp.broadcast_to(prefix.len_1 - 1, rows.len_B.shape))

    def last(x, big):
      # The last token is a row's own: it is fed again when the row is rewound to its beginning.
      own = jax.lax.dynamic_slice_in_dim(x, prefix.len_1[0] - 1, 1, axis=2)
      return big.at[:, :, :1].set(pick(own, big[:, :, :1]))

    def copy(i, cache):
      def put(x, big):
        return put_row(slot_B[i])(big, x[:, :, : big.shape[2]])

      return jax.tree.map(put, prefix.cache, cache)

    if shares:
      cache = jax.tree.map(last, prefix.cache, state.cache)
    else:
      cache = jax.lax.fori_loop(0, jnp.sum(slot_B >= 0), copy, state.cache)
    old = state.replace(cache=None)
    return jax.tree.map(pick, rows, old).replace(cache=cache), record_BR

  @staticmethod
  def _fork(state: State, source, target, key) -> State:
    state = jax.tree.map(lambda x: put_row(target)(x, row_at(x, source)), state)
    key_12 = draw.row_keys(key["seed_B2"], key["stream_B"], key["attempt_B"])
    return state.replace(key_B2=put_row(target)(state.key_B2, key_12))

  @staticmethod
  def _steer(state: State, change: dict[str, jax.Array]) -> State:
    def chosen(name, old_B):
      return jnp.where(change[name] < 0, old_B, change[name].astype(old_B.dtype))

    acting = state.acting.replace(
      forced_B=chosen("forced_B", state.acting.forced_B),
      goes_on_B=state.acting.goes_on_B | (change["live_B"] == WAKE),
    )
    return state.replace(
      live_B=chosen("live_B", state.live_B),
      limit_B=chosen("limit_B", state.limit_B),
      acting=acting,
    )

  def _restart(self, state: State, slot, key) -> State:
    """The row at `slot` as it was before its first token; its cache and history stay."""
    one = jax.tree.map(lambda x: row_at(x, slot), state.replace(cache=None))
    prompt_1 = one.len_B + 1 - one.out_B
    one = one.replace(
      len_B=prompt_1 - 1,
      token_B=jnp.take_along_axis(one.history_BS, prompt_1[:, None] - 1, axis=1)[:, 0],
      out_B=jnp.zeros_like(one.out_B),
      live_B=jnp.zeros_like(one.live_B),
      key_B2=draw.row_keys(key["seed_B2"], key["stream_B"], key["attempt_B"]),
    )
    return self._put_back(state, self._fresh(one), slot)

  def _replay(self, weights, state: State, slot, n_1, *common, T: int, window: int) -> State:
    """The row at `slot` goes on by the first `n_1` <= T tokens that its history has behind it."""
    one = jax.tree.map(lambda x: row_at(x, slot), state)
    at_1T = jnp.minimum(one.len_B[:, None] + jnp.arange(T), self.capacity - 1)
    token_1T = jnp.take_along_axis(one.history_BS, at_1T, axis=1)
    next_1T = jnp.take_along_axis(one.history_BS, jnp.minimum(at_1T + 1, self.capacity - 1), axis=1)
    base, recent = self.lengths(one), self.room(1, T)
    logits, _, attn = self.look(weights, one, token_1T, one.cache, base, recent, window, *common)

    def step(row, at):
      t, next_1, logits, attn = at
      on_1 = t < n_1
      acting = row.acting.replace(forced_B=next_1, goes_on_B=jnp.ones_like(on_1))
      now = row.replace(live_B=on_1, acting=acting, len_B=row.len_B + on_1.astype(jnp.int32))
      now, _ = self.emit(now, logits, attn)
      return jax.tree.map(lambda new, old: jnp.where(on_1[0], new, old), now, row), None

    steps = (jnp.arange(T), next_1T.T, *_by_step((logits, attn), T))
    row, _ = jax.lax.scan(step, one.replace(cache=None), steps)
    return self._put_back(state, row.replace(live_B=jnp.zeros_like(row.live_B)), slot)

  @staticmethod
  def _put_back(state: State, one: State, slot) -> State:
    rows = jax.tree.map(put_row(slot), state.replace(cache=None), one)
    return rows.replace(cache=state.cache)

  def _score(
    self, weights, state: State, suffix_BT, n_B, label_BY, *common, window: int
  ) -> jax.Array:
    """log p_BY of labels behind each row's next token and the first n_B of a suffix."""
    B, T = suffix_BT.shape
    token_BT = jnp.concatenate([state.token_B[:, None], suffix_BT], axis=1)
    x_BTD, *_ = self.forward(
      weights,
      token_BT,
      cache=state.cache,
      len_B=state.len_B,
      recent=self.room(B, T + 1),
      window=window,
      common=kvcache.Common(*common, state.common_B) if common else None,
    )
    x_BD = jnp.take_along_axis(x_BTD, n_B[:, None, None], axis=1)[:, 0]
    logp_BV = jax.nn.log_softmax(self.logits(weights, x_BD))
    return jnp.take_along_axis(logp_BV, label_BY, axis=1)

  # -- compiling -------------------------------------------------------------------------------

  def _program(self, key: tuple):
    """The compiled program of (verb, sizes...); compiled at first use."""
    if key not in self.compiled:
      self.compiled[key] = self._lower(key).compile(self.options)
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
    # Sizes that some verbs have behind their own: slots of the prefix that rows have in common.
    own = {"decode": 2, "replay": 2, "score": 3}.get(verb, len(sizes))
    sizes, common = sizes[:own], [self.abstract_prefix((S,)).cache for S in sizes[own:]]
    if verb == "decode":
      steps, window = sizes
      f = functools.partial(self._decode, steps=steps, window=window)
      # Whoever sees all devices reads each row where it lies; otherwise every process needs every row.
      letters = "_B_" if jax.process_count() == 1 else "___"
      out = (state, shape(letters, (steps, self.config.batch_size, len(self.columns))))
      return jit(_named(f, "decode"), out, ("state",)).lower(weights, state, *common)
    B, slot = self.config.batch_size, shape("", ())
    key = jax.tree.map(lambda x: shape("_" * x.ndim, x.shape, x.dtype), self._key(0, 0, 0))
    if verb in ("insert", "join", "share"):
      rows = 1 if verb == "insert" else B
      out = (state, shape("__", (rows, len(self.columns))))
      bits = shape("__", (rows, _packed(self._row(Request(ids=(0,)))).size), jnp.uint32)
      args = self.abstract_prefix(*sizes), shape("__", (1, self.capacity)), bits
      if verb == "insert":
        return jit(self._insert, out, ("state",)).lower(state, *args, slot)
      f = functools.partial(self._join, shares=verb == "share")
      return jit(f, out, ("state",)).lower(state, *args, shape("_", (B,)))
    if verb == "fork":
      return jit(self._fork, state, ("state",)).lower(state, slot, slot, key)
    if verb == "steer":
      change = {name: shape("_", (B,)) for name in ("live_B", "limit_B", "forced_B")}
      return jit(self._steer, state, ("state",)).lower(state, change)
    if verb == "restart":
      return jit(self._restart, state, ("state",)).lower(state, slot, key)
    if verb == "replay":
      T, window = sizes
      f = functools.partial(self._replay, T=T, window=window)
      return jit(f, state, ("state",)).lower(weights, state, slot, shape("_", (1,)), *common)
    if verb == "score":
      T, Y, window = sizes
      f = functools.partial(self._score, window=window)
      args = shape("__", (B, T)), shape("_", (B,)), shape("__", (B, Y))
      return jit(f, shape("__", (B, Y)), ()).lower(weights, state, *args, *common)
    T, S = sizes
    prefix, token, one = self.abstract_prefix((S,)), shape("__", (1, T)), shape("_", (1,))
    if verb == "feed":
      return jit(self._feed, prefix.cache, ("cache",)).lower(weights, prefix.cache, token, one)
    return jit(self._prefill, prefix, ("cache",)).lower(weights, prefix.cache, token, one, one)

  def abstract_prefix(self, S: Sequence[int]) -> Prefix:
    """A Prefix's shapes, dtypes and shardings; nothing is allocated.

    Args:
      S: one; slots of its cache.
    """

    def shape(letters, dims, dtype):
      return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.of(self.mesh, letters))

    one = shape("_", (1,), jnp.int32)
    attn = None
    if self.config.attn_stats != "off":
      attn = metrics.AttnStats(**dict.fromkeys(_ATTN, shape("_", (1,), jnp.float32)))
    cache = self.abstract_state(1, *S).cache
    return Prefix(cache, one, one, shape("_V", (1, self.cfg.vocab), jnp.float32), attn)

  def abstract_state(self, rows: int | None = None, capacity: int | None = None) -> State:
    """The State's shapes, dtypes and shardings; nothing is allocated."""
    key = rows or self.config.batch_size, capacity or self.capacity
    if key not in self._abstract:
      self._abstract[key] = self._placed(jax.eval_shape(functools.partial(self._blank, *key)))
    return self._abstract[key]

  def _placed(self, state: State) -> State:
    if self.mesh is None:
      return state
    # A one-row State is not split over `data`: there is one row.
    row = "_" if state.len_B.shape[0] == 1 else "B"

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
    blank = State(
      cache=self._caches(rows, capacity),
      len_B=int_B,
      common_B=int_B,
      history_BS=jnp.zeros((rows, self.capacity), jnp.int32),
      token_B=int_B,
      out_B=int_B,
      limit_B=int_B,
      live_B=jnp.zeros((rows,), bool),
      stop_BE=jnp.full((rows, STOP_IDS), -1, jnp.int32),
      key_B2=jnp.zeros((rows, 2), jnp.uint32),
      knobs=knobs,
      memory=None,
      act=act,
      acting=None,
    )
    return self._fresh(blank)

  def _caches(self, rows: int, capacity: int):
    return kvcache.init(self.cfg, rows, capacity, self.cache_dtype)

  def _knobs(self, settings: dict[str, Any]):
    return sampling.arrays(sampling.configure(self.sampler, settings))

  def compile(self, programs: Sequence[tuple], done: Callable[[], None] = lambda: None) -> None:
    """Compile these programs now, two at a time; `done()` after each."""
    todo = [key for key in dict.fromkeys(programs) if key not in self.compiled]
    lowered = [(key, self._lower(key)) for key in todo]
    with ThreadPoolExecutor(2) as pool:
      for key, program in pool.map(lambda kv: (kv[0], kv[1].compile(self.options)), lowered):
        self.compiled[key] = program
        done()

  def programs(self, requests: Sequence[Request], shares: bool = False) -> list[tuple]:
    """What running these requests will need, warm-up included; a superset for mixed lengths.

    Args:
      shares: each request is continued by several rows; while one prompt's rows have it in common,
        those of others have copies.
    """
    need: list[tuple] = [("init",)]
    buckets = sorted({self.bucket(len(r.ids))[1] for r in requests})
    joined = {self.bucket(n)[1] for n in map(len, (r.ids for r in requests)) if self.may_share(n)}
    joined = joined if shares else set()
    copies = len(requests) > 1 or not joined
    copying = "join" if shares else "insert"
    for S in buckets:
      need += [("cache", S), *[("share", (S,))] * (S in joined), *[(copying, (S,))] * copies]
    N = self.config.steps_per_dispatch
    longest = 0
    for r in requests:
      T, S = self.bucket(len(r.ids))
      need += [("prefill", T, S), *([("feed", T, S)] if len(r.ids) > T else [])]
      longest = max(longest, len(r.ids) + self.limit(r))
    shortest = min((len(r.ids) for r in requests), default=1)
    if not copies:
      shortest, longest = 1, longest - shortest + 1
    low, high = self.window(shortest), self.window(longest)
    if copies:
      need += [("decode", N, w) for w in self.windows if low <= w <= high]
    return need + [("decode", N, w, S) for w in self.windows if w <= high for S in sorted(joined)]

  # -- the verbs -------------------------------------------------------------------------------

  def init(self) -> State:
    """An empty State with every slot free."""
    return self._program(("init",))()

  def limit(self, request: Request) -> int:
    """Tokens the request can get: its own limit or what fits after the prompt."""
    longest = max(map(len, (request.ids, *request.beside)))
    return min(request.max_new_tokens, self.config.max_seq_len - longest)

  def may_share(self, n: int) -> bool:
    """Whether rows may have a prompt of n tokens in common."""
    return self.common_from is not None and n >= self.common_from

  def _row(self, request: Request, forced: int = -1) -> dict[str, Any]:
    stop = [*request.stop, *[-1] * (STOP_IDS - len(request.stop))]
    return {
      **self._key(request.seed, request.stream),
      "forced_B": np.asarray([forced], np.int32),
      "limit_B": np.asarray([self.limit(request)], np.int32),
      "stop_BE": np.asarray([stop], np.int32),
      "knobs": self._knobs(request.knobs),
      "act": sampling.arrays(sampling.configure(actions, request.actions)),
    }

  @staticmethod
  def _key(seed: int, stream: int, attempt: int | None = None) -> dict[str, np.ndarray]:
    key = {"seed_B2": np.asarray([draw.seed_words(seed)], np.uint32)}
    key["stream_B"] = np.asarray([stream], np.uint32)
    return key if attempt is None else key | {"attempt_B": np.asarray([attempt], np.uint32)}

  def prefill(self, request: Request) -> Prefix:
    """The request's prompt, fed. It runs alone: nobody can disturb it."""
    check(self.cfg, self.config, self.sampler, request)
    T, S = self.bucket(len(request.ids))
    cache = self._program(("cache", S))()
    ids = np.asarray(request.ids, np.int32)
    start = 0
    while len(ids) - start > T:
      args = (self.put(ids[None, start : start + T]), self.put(np.asarray([start], np.int32)))
      cache = self._program(("feed", T, S))(self.weights, cache, *args)
      start += T
    piece = np.zeros((1, T), np.int32)
    piece[0, : len(ids) - start] = ids[start:]
    args = (piece, np.asarray([start], np.int32), np.asarray([len(ids) - start], np.int32))
    return self._program(("prefill", T, S))(self.weights, cache, *map(self.put, args))

  def put(self, tree):
    """NumPy leaves as a compiled program takes them; over a mesh, replicated arrays."""
    if self.mesh is None:
      # A program takes NumPy arrays as they are, 51 of a row in a third of device_put's time.
      return tree
    everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def put(x):
      # Among several processes device_put would compare every leaf by a collective of its own.
      return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return jax.tree.map(put, tree)

  def insert(
    self, state: State, prefix: Prefix, slot: int, request: Request, forced: int = -1
  ) -> tuple[State, jax.Array]:
    """(State with the request's row in that slot, record_1R of its first token); `state` is donated.

    Args:
      prefix: of the request's prompt; it may be inserted again.
      forced: the id that the first token is; -1: it is drawn.
    """
    bits_1X = _packed(self._row(request, forced))[None]
    args = self._history(request), bits_1X, np.asarray(slot, np.int32)
    return self._program(("insert", _slots(prefix)))(state, prefix, *map(self.put, args))

  def join(
    self,
    state: State,
    prefix: Prefix,
    requests: dict[int, Request],
    forced: dict[int, int] | None = None,
    shares: bool = False,
  ) -> tuple[State, jax.Array]:
    """(State with the requests' rows in these slots, record_BR of their first tokens); `state` is donated.

    Args:
      prefix: of the one prompt that all requests have.
      requests, forced: by slot; who has none forced draws the first token.
      shares: do not copy the prefix's keys and values; for as long as the rows live, `common` of what
        moves them is this prefix.
    """
    rows = {i: _packed(self._row(r, (forced or {}).get(i, -1))) for i, r in requests.items()}
    # Slots that are not filled get some row, which the program does not put there.
    any_X, request = next(iter(rows.values())), next(iter(requests.values()))
    bits_BX = np.stack([rows.get(i, any_X) for i in range(self.config.batch_size)])
    slot_B = np.full((self.config.batch_size,), -1, np.int32)
    slot_B[: len(rows)] = [*rows]
    args = self._history(request), bits_BX, slot_B
    run = self._program(("share" if shares else "join", _slots(prefix)))
    return run(state, prefix, *map(self.put, args))

  def _history(self, request: Request) -> np.ndarray:
    history_1S = np.zeros((1, self.capacity), np.int32)
    history_1S[0, : len(request.ids)] = request.ids
    return history_1S

  def likeliest(self, prefix: Prefix, n: int) -> list[int]:
    """The n likeliest first tokens of the raw model, the likeliest first; fewer where there are fewer."""
    logits_V = np.asarray(prefix.logits_1V)[0]
    return [int(i) for i in np.argsort(-logits_V, kind="stable")[:n] if logits_V[i] > -np.inf]

  def steer(self, state: State, live=None, limit=None, forced=None) -> State:
    """Change rows between two dispatches; `state` is donated. Each argument is {slot: value}.

    Args:
      live: False ends the row's text, True lets one go on whose limit was reached, WAKE one that waits.
      limit: of tokens emitted, in all.
      forced: the id that the next token is.
    """
    change = {}
    live = {slot: int(value) for slot, value in (live or {}).items()}
    for name, values in (("live_B", live), ("limit_B", limit), ("forced_B", forced)):
      change[name] = np.full((self.config.batch_size,), -1, np.int32)
      for slot, value in (values or {}).items():
        change[name][slot] = value
    return self._program(("steer",))(state, self.put(change))

  def fork(
    self, state: State, source: int, target: int, seed: int, stream: int, attempt: int = 0
  ) -> State:
    """The row at `source`, also at `target`, to go on from here with other noise; `state` is donated.

    Args:
      seed, stream: of the noise of the row at `target`, as in a Request.
    """
    args = *(np.asarray(x, np.int32) for x in (source, target)), self._key(seed, stream, attempt)
    return self._program(("fork",))(state, *map(self.put, args))

  def rewind(
    self,
    state: State,
    slot: int,
    request: Request,
    n: int,
    attempt: int,
    common: Prefix | None = None,
  ) -> State:
    """The row of `request` as it was after its first `n` tokens, waiting; `state` is donated.

    The sampler's state is made again by going through these tokens, so it is exact for every sampler.

    Args:
      attempt: counts the rewinds of this row; with the same one the same tokens would come again.
    """
    place = self.put(np.asarray(slot, np.int32))
    key = self._key(request.seed, request.stream, attempt)
    state = self._program(("restart",))(state, place, self.put(key))
    for start in range(0, n, _REPLAY):
      window = self.window(len(request.ids) + n)
      count = self.put(np.asarray([min(_REPLAY, n - start)], np.int32))
      sizes, held = _of(common)
      run = self._program(("replay", _REPLAY, window, *sizes))
      state = run(self.weights, state, place, count, *held)
    return state

  def score(
    self,
    state: State,
    longest: int,
    suffixes: dict[int, Sequence[int]],
    labels: Sequence[int],
    common: Prefix | None = None,
  ) -> dict[int, np.ndarray]:
    """{slot: log p of each label, in nats} behind the row's text and a suffix; no row notices.

    Args:
      longest: as for `decode`, of the rows that are asked.
      suffixes: slot -> ids, behind the last token that was emitted there.
    """
    T = max(_SUFFIX_LEAST, 1 << (max(map(len, suffixes.values())) - 1).bit_length())
    B = self.config.batch_size
    suffix_BT, n_B = np.zeros((B, T), np.int32), np.zeros((B,), np.int32)
    for slot, ids in suffixes.items():
      suffix_BT[slot, : len(ids)], n_B[slot] = ids, len(ids)
    args = suffix_BT, n_B, np.tile(np.asarray(labels, np.int32), (B, 1))
    sizes, held = _of(common)
    run = self._program(("score", T, len(labels), self.window(longest), *sizes))
    logp_BY = np.asarray(run(self.weights, state, *map(self.put, args), *held))
    return {slot: logp_BY[slot] for slot in suffixes}

  def decode(
    self, state: State, longest: int, steps: int | None = None, common: Prefix | None = None
  ) -> tuple[State, jax.Array]:
    """(State, record_NBR) after N steps; `state` is donated.

    Args:
      longest: tokens of the longest live row before the call (an upper bound will do), less what it has
        in common with others.
      common: the prefix that rows were inserted with that share it.
    """
    sizes, held = _of(common)
    steps = steps or self.config.steps_per_dispatch
    run = self._program(("decode", steps, self.window(longest), *sizes))
    return run(self.weights, state, *held)

  def unpack(self, record: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values, of a record array fetched from the device."""
    n = len(self.ints)
    floats = np.ascontiguousarray(record[..., n:]).view(np.float32)
    values = [*np.moveaxis(record[..., :n], -1, 0), *np.moveaxis(floats, -1, 0)]
    return dict(zip(self.columns, values, strict=True))


def _of(common: Prefix | None) -> tuple[list[int], list[kvcache.Cache]]:
  """(sizes, arguments) that a prefix which rows have in common adds to a program."""
  return ([], []) if common is None else ([common.cache.capacity], [common.cache])


def _slots(prefix: Prefix) -> tuple[int, ...]:
  """Slots of its cache, or of each of several models' caches."""
  caches = prefix.cache if isinstance(prefix.cache, tuple) else (prefix.cache,)
  return tuple(cache.capacity for cache in caches)


def _packed(row) -> np.ndarray:
  """bits_X of one row's NumPy arrays: one array is sent in the time that each of fifty would take."""
  words = (
    x.astype(np.uint32) if x.dtype == bool else x.view(np.uint32) for x in jax.tree.leaves(row)
  )
  return np.concatenate([x.ravel() for x in words])


def _unpacked(like, bits_BX: jax.Array):
  """Several rows' arrays from their bits; `like` has the shapes and dtypes of one row's."""
  leaves, tree = jax.tree.flatten(like)
  cuts = np.cumsum([x.size for x in leaves])[:-1]
  return jax.tree.unflatten(
    tree,
    [
      sharding.value(bits.reshape(-1, *x.shape[1:]), x.dtype)
      for bits, x in zip(jnp.split(bits_BX, cuts, axis=1), leaves, strict=True)
    ],
  )


def row_at(x: jax.Array, slot) -> jax.Array:
  """The one row at `slot`."""
  return jax.lax.dynamic_slice_in_dim(x, slot, 1)


def put_row(slot) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(all rows, one row) -> all rows, with that one at `slot`."""

  def put(big, one):
    start = (slot, *[0] * (big.ndim - 1))
    return jax.lax.dynamic_update_slice(big, one.astype(big.dtype), start)

  return put


def _by_step(tree, T: int):
  """Arrays (B, T, ...) as (T, B, ...); where T is 1, `Engine.look` gives them without T."""
  return jax.tree.map(lambda x: x[None] if T == 1 else jnp.moveaxis(x, 1, 0), tree)


def abstract(tree):
  """The shapes, dtypes and shardings of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _named(f: functools.partial, name: str):
  """A partial with a name, so that profiles and compiled text say what it is."""

  def call(weights, state, *common):
    return f(weights, state, *common)

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
