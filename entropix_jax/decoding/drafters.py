"""Who guesses the next tokens: a look into the row's own past, or a smaller model.

Why: a forward pass over five tokens costs little more than one over one, where weights are what is read.
A drafter may guess anything: what is emitted never depends on it, only how many passes it takes; or, with
noise of its own, the text depends on it and its law does not.

A drafter has
  prefill(request) -> prefix, init() -> memory, abstract() -> its shapes
  insert(memory, prefix, slot) -> memory
  fork(memory, source, target) -> memory
  weights, compile(programs of the target), reads: whether it has a memory that must be fed
and, pure, as part of a dispatch,
  follow(weights, memory, state, window) -> memory      rows have gone on without it
  draft(weights, memory, state, G, window) -> (memory, draft_BG, count_B)
  propose(weights, memory, state, G, window) -> (memory, draft_BG, count_B, law_BGV)   with noise of its own
  forget(memory, state) -> memory                       of its guesses, those that were kept are in the rows
  learn(memory, drafted_B, accepted_B) -> memory        how many of its guesses were right
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax.engine.engine import Engine, Prefix, Request, State, put_row, row_at
from entropix_jax.errors import UserError
from entropix_jax.model import kvcache, sharding


@dataclasses.dataclass(frozen=True)
class Ngram:
  """What followed the last time the row's last tokens stood in it (prompt lookup decoding).

  The longest match wins, the latest of equals; it drafts what stands behind it, up to the present.
  """

  most: int = 4  # tokens of a match that count
  least: int = 2  # tokens that must match
  weights: Any = None
  reads: ClassVar[bool] = False

  def prefill(self, request: Request) -> None:
    """Nothing: the engine keeps the history."""

  def init(self) -> tuple:
    """No memory."""
    return ()

  def abstract(self) -> tuple:
    """No memory."""
    return ()

  def insert(self, memory: tuple, prefix: None, slot: int) -> tuple:
    """No memory."""
    del prefix, slot
    return memory

  def fork(self, memory: tuple, source: int, target: int) -> tuple:
    """No memory."""
    del source, target
    return memory

  def compile(self, programs: Sequence[tuple]) -> None:
    """Nothing of its own."""

  def follow(self, weights, memory, state: State, window: int):
    """No memory."""
    del weights, state, window
    return memory

  def forget(self, memory, state: State):
    """No memory."""
    del state
    return memory

  def learn(self, memory, drafted_B, accepted_B):
    """Nothing."""
    del drafted_B, accepted_B
    return memory

  def draft(self, weights, memory, state: State, G: int, window: int):
    """(memory, draft_BG, count_B) from `state.history_BS`, whose last id is the token to be fed."""
    del weights, window
    history_BS, len_B1 = state.history_BS, state.len_B[:, None]
    S = history_BS.shape[1]
    run_BS = jnp.ones(history_BS.shape, bool)
    match_BS = jnp.zeros(history_BS.shape, jnp.int32)
    for i in range(self.most):
      # The ids i places before each slot, and before the last one; -1 where there is none.
      shifted_BS = jnp.pad(history_BS, ((0, 0), (i, 0)), constant_values=-1)[:, :S]
      last_B1 = jnp.take_along_axis(history_BS, jnp.maximum(len_B1 - i, 0), axis=1)
      run_BS &= shifted_BS == last_B1
      match_BS += run_BS.astype(jnp.int32)
    match_BS = jnp.where(jnp.arange(S) < len_B1, match_BS, 0)
    end_B = S - 1 - jnp.argmax(match_BS[:, ::-1], axis=1).astype(jnp.int32)
    found_B = jnp.max(match_BS, axis=1) >= self.least
    slot_BG = end_B[:, None] + 1 + jnp.arange(G)
    draft_BG = jnp.take_along_axis(history_BS, jnp.minimum(slot_BG, S - 1), axis=1)
    return memory, draft_BG, jnp.where(found_B, jnp.minimum(state.len_B - end_B, G), 0)

  def propose(self, weights, memory, state: State, G: int, window: int):
    """(memory, draft_BG, count_B, None): nothing is drawn here."""
    return *self.draft(weights, memory, state, G, window), None


MOST = 32  # guesses of a draft
GAMMA = 0.2  # AdaEDL's (arXiv:2410.18351)
# Misses that a row begins with, as many seen as foreseen; and what each round leaves of those it has had.
BEGIN, KEPT = 1.0, 0.95


def risk(ent_B, lead_B):
  """risk_B that a guess does not stand: the drafter's entropy in nats, and by what the draw was decided [n26]."""
  return jnp.minimum(jnp.sqrt(GAMMA * ent_B), 1.0) * jnp.exp(-lead_B)


def adapt(missed_B, foreseen_B, risk_BG, drafted_B, accepted_B):
  """(missed_B, foreseen_B) after a round: guesses that did not stand, and as many as their risks said.

  Args:
    missed_B, foreseen_B: so far; older ones count less.
    risk_BG: of each guess, that it does not stand, before anything was learned.
  """
  # The guess that did not stand was judged, too, and those behind it were not.
  judged_B = jnp.minimum(accepted_B + 1, drafted_B)
  risk_BG = jnp.where(jnp.arange(risk_BG.shape[1]) < judged_B[:, None], risk_BG, 0.0)
  kept_B = jnp.where(judged_B > 0, KEPT, 1.0)
  misses_B = (accepted_B < drafted_B).astype(jnp.float32)
  return kept_B * missed_B + misses_B, kept_B * foreseen_B + jnp.sum(risk_BG, axis=1)


@struct.dataclass
class Read:
  """What a draft model has read of each row."""

  cache: kvcache.Cache
  len_B: jax.Array  # int32; of the row's tokens, those in the cache
  bar_B: jax.Array  # drafts end where the chance that all of them is right is less
  missed_B: jax.Array  # guesses that did not stand,
  foreseen_B: jax.Array  # of so many that were thought not to; see `adapt`
  risk_BG: jax.Array  # of each guess of the last draft, MOST of them


class DraftModel:
  """A smaller model with the same vocabulary, which samples as the target does, with the same noise.

  Sharing the noise makes both draw the same token wherever their laws are alike, and nowhere else has
  a law to be known; a small one that was distilled from the target's law will do [n16].

  How far it drafts begins with AdaEDL (arXiv:2410.18351): the target's token is another one with a risk of about
  sqrt(GAMMA H), H in nats of the raw law. That is what can be known before a draw. Made with the target's noise, a draw
  says more: the further its token leads the next one, the more the target's law must differ to take
  another, so the risk is that times exp(-lead), in nats [n26]. A row whose guesses fail more often than was
  foreseen, or less, has as much more or less of it. A draft ends where the chance that all of it stands is below `bar`.

  Args:
    engine: of the smaller model, with the target's sampler, EngineConfig and mesh.
    bar: from 0 to 1. 0 never ends a draft, 1 ends it behind the first guess that is not certain.
  """

  reads = True
  PIECE = 16  # tokens that it reads at once of a text that went on without it

  def __init__(self, engine: Engine, bar: float = 0.0):
    self.engine, self.bar = engine, bar
    self.weights = engine.weights

  def prefill(self, request: Request) -> Prefix:
    """The prompt, in the smaller model's cache."""
    return self.engine.prefill(request)

  def init(self) -> Read:
    """Nothing read."""
    rows = self.engine.init()
    return Read(rows.cache, rows.len_B, *self._program("new")(self._bar))

  def abstract(self) -> Read:
    """Shapes, dtypes and shardings."""
    rows = self.engine.abstract_state()
    B, place = rows.len_B.shape, rows.len_B.sharding
    float_B = jax.ShapeDtypeStruct(B, jnp.float32, sharding=place)
    float_BG = jax.ShapeDtypeStruct((*B, MOST), jnp.float32, sharding=place)
    return Read(rows.cache, rows.len_B, float_B, float_B, float_B, float_BG)

  def insert(self, memory: Read, prefix: Prefix, slot: int) -> Read:
    """The row in that slot; `memory` is donated."""
    run = self._program("place", prefix.cache.capacity)
    return run(memory, prefix.cache, prefix.len_1, self._slot(slot), self._bar)

  def fork(self, memory: Read, source: int, target: int) -> Read:
    """The row at `source`, also at `target`; `memory` is donated."""
    return self._program("copy")(memory, self._slot(source), self._slot(target))

  def compile(self, programs: Sequence[tuple]) -> None:
    """Compile what feeding prompts needs."""
    self.engine.compile([key for key in programs if key[0] in ("cache", "prefill", "feed", "init")])
    self._program("new")
    for S in {key[1] for key in programs if key[0] == "cache"}:
      self._program("place", S)

  @property
  def _bar(self) -> jax.Array:
    # Handed over, since drafters of one engine share its programs.
    return self.engine.put(np.asarray(self.bar, np.float32))

  def _slot(self, slot: int) -> jax.Array:
    return self.engine.put(np.asarray(slot, np.int32))

  def _program(self, *key):
    """The compiled program of (verb, sizes ...), beside those of its engine."""
    if key not in self.engine.compiled:
      memory, place = self.abstract(), sharding.of(self.engine.mesh, "")
      slot, bar = (jax.ShapeDtypeStruct((), x, sharding=place) for x in (jnp.int32, jnp.float32))
      if key[0] == "new":
        f = functools.partial(_new, memory.len_B.shape[0])
        args, out = (bar,), (memory.bar_B, memory.missed_B, memory.foreseen_B, memory.risk_BG)
      elif key[0] == "copy":
        f, args, out = _copy, (memory, slot, slot), memory
      else:
        prefix = self.engine.abstract_prefix(key[1:])
        f, args, out = _place, (memory, prefix.cache, prefix.len_1, slot, bar), memory
      placed = {}
      if self.engine.mesh is not None:
        placed["out_shardings"] = jax.tree.map(lambda x: x.sharding, out)
      run = jax.jit(f, donate_argnums=() if key[0] == "new" else 0, **placed).lower(*args).compile()
      self.engine.compiled[key] = run
    return self.engine.compiled[key]

  def _feed(self, weights, memory: Read, base_B, recent, token_BT, window):
    """(recent, hidden x_BD of the last token, its attention statistics)."""
    T = token_BT.shape[1]
    x_BTD, recent, attn = self.engine.forward(
      weights,
      token_BT,
      cache=memory.cache,
      len_B=base_B,
      recent=recent,
      window=window,
      last_B=jnp.full_like(base_B, T - 1),
    )
    return recent, x_BTD[:, -1], attn

  def follow(self, weights, memory: Read, state: State, window: int):
    """Feed it what live rows have fed without it, but for the last token, which a draft feeds anyway."""

    def missing(memory):
      return jnp.where(state.live_B, state.len_B - 1 - memory.len_B, 0)

    def read(memory):
      count_B = jnp.clip(missing(memory), 0, self.PIECE)
      slot_BT = memory.len_B[:, None] + jnp.arange(self.PIECE)
      at_BT = jnp.minimum(slot_BT, state.history_BS.shape[1] - 1)
      token_BT = jnp.take_along_axis(state.history_BS, at_BT, axis=1)
      recent = self.engine.room(count_B.shape[0], self.PIECE)
      recent, *_ = self._feed(weights, memory, memory.len_B, recent, token_BT, window)
      cache = self.engine.merge(memory.cache, recent, memory.len_B, count_B)
      return memory.replace(cache=cache, len_B=memory.len_B + count_B)

    return jax.lax.while_loop(lambda memory: jnp.any(missing(memory) > 0), read, memory)

  def forget(self, memory: Read, state: State):
    """A guess that was not kept lies beyond the row's length."""
    return memory.replace(len_B=jnp.minimum(memory.len_B, state.len_B))

  def learn(self, memory: Read, drafted_B, accepted_B):
    """What became of each row's guesses, after a round."""
    seen = memory.missed_B, memory.foreseen_B, memory.risk_BG
    missed_B, foreseen_B = adapt(*seen, drafted_B, accepted_B)
    return memory.replace(missed_B=missed_B, foreseen_B=foreseen_B)

  def draft(self, weights, memory: Read, state: State, G: int, window: int):
    """(memory, draft_BG, count_B): a copy of the rows goes on with this model's logits."""
    return self._ahead(weights, memory, state, None, G, window)[:3]

  def propose(self, weights, memory: Read, state: State, G: int, window: int):
    """(memory, draft_BG, count_B, law_BGV): the same with noise of its own, and what it drew from."""
    V = self.engine.cfg.vocab
    none_BGV = jnp.zeros((state.len_B.shape[0], G, V), jnp.float32)
    return self._ahead(weights, memory, state, none_BGV, G, window)

  def _ahead(self, weights, memory: Read, state: State, none_BGV, G: int, window: int):
    e = self.engine
    entropy = e.columns.index("entropy")
    # The last two tokens are fed, though the first was mostly fed before: where a whole draft was
    # accepted, its last token was not.
    base_B = jnp.maximum(state.len_B - 1, 0)
    B = base_B.shape[0]
    before_B1 = jnp.take_along_axis(state.history_BS, base_B[:, None], axis=1)
    seen = memory.replace(cache=e.read(memory.cache, window))

    def more(carry):
      g, _, _, wanted_B, *_ = carry
      return (g < G) & jnp.any(wanted_B)

    def step(carry):
      g, recent, rows, wanted_B, risk_BG, chance_B, draft_BG, count_B, law_BGV = carry

      def feed(token_BT):
        return self._feed(weights, seen, base_B, recent, token_BT, window)

      def two():
        return feed(jnp.concatenate([before_B1, state.token_B[:, None]], axis=1))

      # Whether to go on waits for the answer anyway; and one program, however it begins, starts faster.
      recent, x_BD, attn = jax.lax.cond(g == 0, two, lambda: feed(rows.token_B[:, None]))
      rows = rows.replace(live_B=wanted_B, len_B=rows.len_B + wanted_B.astype(jnp.int32))
      logits_BV = e.logits(weights, x_BD)
      if law_BGV is None:
        rows, record_BR, lead_B = e.guess(rows, logits_BV, attn)
      else:
        # The target has other noise, so by how much a draw was decided says nothing.
        rows, record_BR, law_BV = e.propose(rows, logits_BV, attn)
        law_BGV, lead_B = law_BGV.at[:, g].set(law_BV), 0.0
      draft_BG = draft_BG.at[:, g].set(jnp.where(wanted_B, rows.token_B, 0))
      count_B += wanted_B.astype(jnp.int32)
      ent_B = jax.lax.bitcast_convert_type(record_BR[:, entropy], jnp.float32)
      risk_B = risk(ent_B, lead_B)
      risk_BG = risk_BG.at[:, g].set(risk_B)
      chance_B *= jnp.maximum(1.0 - often_B * risk_B, 0.0)
      wanted_B &= rows.live_B & (chance_B >= memory.bar_B)
      return g + 1, recent, rows, wanted_B, risk_BG, chance_B, draft_BG, count_B, law_BGV

    often_B = (BEGIN + memory.missed_B) / (BEGIN + memory.foreseen_B)
    none_BG, none_B = jnp.zeros((B, G), jnp.int32), jnp.zeros((B,), jnp.int32)
    rows, room = state.replace(cache=None), e.room(B, G + 1)
    sure_B = jnp.ones((B,), jnp.float32)
    risks = jnp.zeros_like(memory.risk_BG), sure_B
    start = (jnp.int32(0), room, rows, state.live_B, *risks, none_BG, none_B, none_BGV)
    _, recent, _, _, risk_BG, _, *guessed = jax.lax.while_loop(more, step, start)
    fed_B = jnp.where(state.live_B, recent.n, 0)
    cache = e.merge(memory.cache, recent, base_B, fed_B)
    len_B = jnp.where(state.live_B, base_B + recent.n, memory.len_B)
    return memory.replace(cache=cache, len_B=len_B, risk_BG=risk_BG), *guessed


def _new(rows: int, bar) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(bar_B, missed_B, foreseen_B, risk_BG) of rows that have drafted nothing."""
  none_B = jnp.zeros((rows,), jnp.float32)
  return jnp.full((rows,), bar), none_B, none_B, jnp.zeros((rows, MOST), jnp.float32)


def _place(memory: Read, cache: kvcache.Cache, len_1, slot, bar) -> Read:
  # A bucket may be longer than the cache; what lies past the prompt is padding.
  cache = jax.tree.map(lambda x, big: x[:, :, : big.shape[2]], cache, memory.cache)
  return jax.tree.map(put_row(slot), memory, Read(cache, len_1, *_new(1, bar)))


def _copy(memory: Read, source, target) -> Read:
  return jax.tree.map(lambda x: put_row(target)(x, row_at(x, source)), memory)


def check_pair(target: Engine, draft: Engine) -> None:
  """Raises UserError when one model cannot draft for the other."""
  if target.cfg.vocab != draft.cfg.vocab:
    raise UserError(
      f"The draft model has {draft.cfg.vocab} ids and the target {target.cfg.vocab}; both must share "
      "one vocabulary."
    )
