"""Drafters guess the next tokens: n-grams of the row's own text, or a smaller model.

Why: a forward pass over eight tokens costs little more than one over one where reading the weights takes
the time. A drafter may guess anything. With the target's noise the emitted text never depends on it, only
the number of passes does; with noise of its own the text depends on it, and the law of the text does not.

A drafter has
  prefill(request) -> prefix, init() -> memory, abstract() -> its shapes
  insert(memory, prefix, slot) -> memory
  fork(memory, source, target) -> memory
  weights, reads: whether it has a memory that must be fed
  jobs(programs of the target): what it needs compiled, see `compile_all`
and, pure, as part of a dispatch,
  follow(weights, memory, state, window) -> memory      rows have gone on without it
  draft(weights, memory, state, G, window) -> (memory, draft_BG, count_B)
  propose(weights, memory, state, G, window) -> (memory, draft_BG, count_B, law_BGV)   with noise of its own
  forget(memory, state) -> memory                       the drafted tokens that were not accepted
  learn(memory, drafted_B, accepted_B) -> memory        how many drafted tokens were accepted
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax.engine import record, step
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Job, Program, Programs, lower, shape
from entropix_jax.engine.request import Request
from entropix_jax.engine.state import (
  Prefix,
  State,
  abstract_prefix,
  abstract_state,
  put_row,
  row_at,
)
from entropix_jax.errors import UserError
from entropix_jax.model import kvcache
from entropix_jax.rowwise import any_row, best_id, while_loop
from entropix_jax.sampling import draw


@dataclasses.dataclass(frozen=True)
class Ngram:
  """What followed the last time the row's last tokens stood in it (prompt lookup decoding).

  The longest match wins, the latest of equals; it drafts what stands behind it, up to the present.
  """

  most: int = 4  # tokens of a match that count
  least: int = 2  # tokens that must match
  weights: Any = None
  reads: ClassVar[bool] = False

  def facts(self, program: Program) -> "Ngram":
    """What a program that drafts depends on."""
    del program
    return self

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

  def jobs(self, programs: Sequence[Program]) -> list[Job]:
    """Nothing of its own."""
    del programs
    return []

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


class Echo:
  """Counts on the host how many passes an `Ngram` drafter would need for a row's text.

  Args:
    G: most tokens drafted for a pass.
    ids: of the prompt.
  """

  def __init__(self, rule: Ngram, G: int, ids: Sequence[int]):
    self.rule, self.G = rule, G
    self.ids: list[int] = []
    self.ends: dict[
      tuple[int, ...], int
    ] = {}  # n-gram -> where it ended last, but for those that end the text
    self.tails: list[tuple[int, ...]] = []  # those that end the text, the longest first
    self.draft: list[int] = []
    self.passes(ids[-HEARD:])

  def __copy__(self) -> "Echo":
    twin = Echo(self.rule, self.G, ())
    twin.ids, twin.ends = list(self.ids), dict(self.ends)
    twin.tails, twin.draft = self.tails, list(self.draft)
    return twin

  def passes(self, ids: Sequence[int]) -> int:
    """The number of passes that end with one of these tokens, which come next in the text."""
    ended, rule = 0, self.rule
    for id in ids:
      hit = self.draft[:1] == [id]
      self.ends |= dict.fromkeys(self.tails, len(self.ids))
      self.ids.append(id)
      longest = min(rule.most, len(self.ids))
      self.tails = [tuple(self.ids[-n:]) for n in range(longest, rule.least - 1, -1)]
      if hit:
        self.draft.pop(0)
        continue
      ended += 1
      end = next((self.ends[tail] for tail in self.tails if tail in self.ends), len(self.ids))
      self.draft = self.ids[end : end + self.G]
    return ended


HEARD = 2048  # tokens of a prompt that an Echo looks at
MOST = 32  # tokens of a draft
GAMMA = 0.2  # AdaEDL's (arXiv:2410.18351)
# Misses that a row begins with, seen and foreseen; and what each round keeps of those it has had.
BEGIN, KEPT = 1.0, 0.95


def risk(ent_B, lead_B):
  """risk_B that a drafted token is not accepted [n26].

  Args:
    ent_B: the drafter's entropy, in nats.
    lead_B: of the draw, in nats; see `draw_with_lead`.
  """
  return jnp.minimum(jnp.sqrt(GAMMA * ent_B), 1.0) * jnp.exp(-lead_B)


def adapt(missed_B, foreseen_B, risk_BG, drafted_B, accepted_B):
  """(missed_B, foreseen_B) after a round: how many drafted tokens were rejected, and how many by their risks.

  Args:
    missed_B, foreseen_B: so far; older ones count less.
    risk_BG: of each drafted token, before anything was learned.
  """
  # The rejected token was checked, too; the tokens after it were not.
  checked_B = jnp.minimum(accepted_B + 1, drafted_B)
  risk_BG = jnp.where(jnp.arange(risk_BG.shape[1]) < checked_B[:, None], risk_BG, 0.0)
  kept_B = jnp.where(checked_B > 0, KEPT, 1.0)
  misses_B = (accepted_B < drafted_B).astype(jnp.float32)
  return kept_B * missed_B + misses_B, kept_B * foreseen_B + jnp.sum(risk_BG, axis=1)


def draw_with_lead(
  law_BV: jax.Array, score_BV: jax.Array, temp_B: jax.Array, key_B2: jax.Array, pos_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(token_B of `draw.draw`, lead_B): how far the token leads the next one, noise included, in nats of the logits.

  A draw with the same noise from a slightly different law gives another token only where the difference of
  the laws exceeds the lead [n26].

  Args:
    score_BV: what chose the token where one token has the whole law.
    temp_B: temperature of the law: logits / temp_B. A lead of noise and law counts temp_B times.
  """

  def noisy(law_BV, score_BV, temp_B):
    drawn_BV = law_BV + draw.gumbel(key_B2, pos_B, law_BV.shape[-1])
    token_B = best_id(drawn_BV)
    return token_B, temp_B * _lead(drawn_BV, token_B)

  def sure(law_BV, score_BV, temp_B):
    token_B = best_id(law_BV)
    return token_B, _lead(score_BV, token_B)

  sure_B = jnp.max(law_BV, axis=-1) == 0.0
  return any_row(~sure_B, noisy, sure, law_BV, score_BV, temp_B)


def _lead(x_BV: jax.Array, id_B: jax.Array) -> jax.Array:
  """How much larger x is at that id than at the best other one; 0 where it is smaller."""
  mine_BV = jnp.arange(x_BV.shape[-1]) == id_B[:, None]
  mine_B = jnp.max(jnp.where(mine_BV, x_BV, -jnp.inf), axis=-1)
  return jnp.maximum(mine_B - jnp.max(jnp.where(mine_BV, -jnp.inf, x_BV), axis=-1), 0.0)


def _with_lead(decision, key_B2, pos_B):
  """`step.next_token` chooses by this with the target's noise: (token_B, lead_B)."""
  one_B = jnp.ones(pos_B.shape, jnp.float32)
  temp_B = decision.stats.get("temperature", one_B)
  temp_B = jnp.where(jnp.isnan(temp_B), one_B, temp_B)  # this row's sampler of a union reports none
  return draw_with_lead(decision.law_BV, decision.score_BV, temp_B, key_B2, pos_B)


def _with_own_noise(decision, key_B2, pos_B):
  """The same with the drafter's noise: (token_B, law_BV)."""
  law_BV = decision.law_BV
  return draw.draw(law_BV, key_B2, pos_B, draw.Purpose.DRAFT), law_BV


@struct.dataclass
class Memory:
  """What a draft model has read of each row."""

  cache: kvcache.Cache
  len_B: jax.Array  # int32; of the row's tokens, those in the cache
  bar_B: jax.Array  # a draft ends where the chance that all of it is accepted is below it
  missed_B: jax.Array  # drafted tokens that were rejected,
  foreseen_B: jax.Array  # and as many as their risks foresaw; see `adapt`
  risk_BG: jax.Array  # of each token of the last draft, MOST of them


class DraftModel:
  """A smaller model with the same vocabulary, which samples as the target does, with the same noise.

  Sharing the noise makes both draw the same token wherever their laws are alike, and neither law needs to
  be known to the other. A small model that was distilled from the target's law is enough [n16].

  How far it drafts follows AdaEDL (arXiv:2410.18351): with H the raw entropy in nats, a drafted token is
  rejected with a risk of about sqrt(GAMMA H). That can be known before a draw. A draw with the target's noise
  says more: the further its token leads the next one, the more the target's law must differ to take another,
  so the risk is that times exp(-lead) [n26]. It is scaled by the row's own rejections over the foreseen ones. A
  draft ends where the chance that all of it is accepted is below `bar`.

  Args:
    engine: of the smaller model, with the target's sampler, EngineConfig and mesh.
    bar: from 0 to 1. 0 never ends a draft, 1 ends it after the first token that is not certain.
  """

  reads = True
  PIECE = 16  # tokens read per call of a text that went on without the drafter

  def __init__(self, engine: Engine, bar: float = 0.0):
    self.engine, self.bar = engine, bar
    self.compiled = Programs(self._lower, engine.facts, {})

  @property
  def weights(self):
    """The smaller model's."""
    return self.engine.weights

  def facts(self, program: Program) -> tuple:
    """What a program that drafts depends on."""
    return self.engine.facts(program)

  def prefill(self, request: Request) -> Prefix:
    """The prompt, in the smaller model's cache."""
    return self.engine.prefill(request)

  def init(self) -> Memory:
    """Nothing read."""
    rows = self.engine.init()
    return Memory(rows.cache, rows.len_B, *self.compiled[Program("draft_new")](self._bar))

  def abstract(self) -> Memory:
    """Shapes, dtypes and shardings."""
    rows = abstract_state(self.engine.setup)
    B, place = rows.len_B.shape, rows.len_B.sharding
    float_B = jax.ShapeDtypeStruct(B, jnp.float32, sharding=place)
    float_BG = jax.ShapeDtypeStruct((*B, MOST), jnp.float32, sharding=place)
    return Memory(rows.cache, rows.len_B, float_B, float_B, float_B, float_BG)

  def insert(self, memory: Memory, prefix: Prefix, slot: int) -> Memory:
    """The row in that slot; `memory` is donated."""
    run = self.compiled[Program("draft_insert", slots=(prefix.cache.capacity,))]
    return run(memory, prefix.cache, prefix.len_1, self._slot(slot), self._bar)

  def fork(self, memory: Memory, source: int, target: int) -> Memory:
    """The row at `source`, also at `target`; `memory` is donated."""
    return self.compiled[Program("draft_fork")](memory, self._slot(source), self._slot(target))

  def jobs(self, programs: Sequence[Program]) -> list[Job]:
    """What feeding prompts needs and is not compiled yet."""
    verbs = ("init", "prompt", "cache", "feed", "prefill")
    theirs = [p for p in programs if p.verb in verbs and p.network == 0]
    mine = [Program("draft_insert", slots=p.slots) for p in theirs if p.slots]
    mine = self.compiled.jobs([Program("draft_new"), *mine])
    return [*self.engine.compiled.jobs(theirs), *mine]

  @property
  def _bar(self) -> jax.Array:
    # An argument and not a constant, since drafters of one engine share its programs.
    return self.engine.put(np.asarray(self.bar, np.float32))

  def _slot(self, slot: int) -> jax.Array:
    return self.engine.put(np.asarray(slot, np.int32))

  def _lower(self, program: Program) -> jax.stages.Lowered:
    setup, memory = self.engine.setup, self.abstract()
    slot, bar = (shape(setup, "", (), x) for x in (jnp.int32, jnp.float32))
    if program.verb == "draft_new":
      rows = memory.len_B.shape[0]
      out = memory.bar_B, memory.missed_B, memory.foreseen_B, memory.risk_BG
      return lower(setup, lambda bar: _new(rows, bar), (bar,), out)
    if program.verb == "draft_fork":
      return lower(setup, _fork, (memory, slot, slot), memory, donate=(0,))
    prefix = abstract_prefix(setup, program.slots)
    args = memory, prefix.cache, prefix.len_1, slot, bar
    return lower(setup, _insert, args, memory, donate=(0,))

  def _past(self, memory: Memory, len_B, slots: int, window: int) -> kvcache.Past:
    model = self.engine.setup.model
    recent = kvcache.Recent.empty(model.cfg, len_B.shape[0], slots, model.cache_dtype)
    return kvcache.Past(len_B, memory.cache, recent, None, window)

  def _feed(self, weights, token_BT, past: kvcache.Past):
    """(recent, hidden x_BD of the last token, its attention statistics)."""
    last_B = jnp.full_like(past.len_B, token_BT.shape[1] - 1)
    x_BTD, past, attn = self.engine.setup.model.forward(weights, token_BT, past, last_B)
    return past.recent, x_BTD[:, -1], attn

  def follow(self, weights, memory: Memory, state: State, window: int):
    """Feed it what live rows have fed without it, except for the last token, which a draft feeds anyway."""
    setup = self.engine.setup

    def missing(memory):
      return jnp.where(state.live_B, state.len_B - 1 - memory.len_B, 0)

    def read(memory):
      count_B = jnp.clip(missing(memory), 0, self.PIECE)
      slot_BT = memory.len_B[:, None] + jnp.arange(self.PIECE)
      at_BT = jnp.minimum(slot_BT, state.history_BS.shape[1] - 1)
      token_BT = jnp.take_along_axis(state.history_BS, at_BT, axis=1)
      past = self._past(memory, memory.len_B, self.PIECE, window)
      recent, *_ = self._feed(weights, token_BT, past)
      cache = step.merge(setup, memory.cache, past.replace(recent=recent), count_B)
      return memory.replace(cache=cache, len_B=memory.len_B + count_B)

    return while_loop(lambda memory: jnp.any(missing(memory) > 0), read, memory)

  def forget(self, memory: Memory, state: State):
    """Rejected tokens lie beyond the row's length."""
    return memory.replace(len_B=jnp.minimum(memory.len_B, state.len_B))

  def learn(self, memory: Memory, drafted_B, accepted_B):
    """Update each row's record of rejections after a round."""
    seen = memory.missed_B, memory.foreseen_B, memory.risk_BG
    missed_B, foreseen_B = adapt(*seen, drafted_B, accepted_B)
    return memory.replace(missed_B=missed_B, foreseen_B=foreseen_B)

  def draft(self, weights, memory: Memory, state: State, G: int, window: int):
    """(memory, draft_BG, count_B): a copy of the rows goes on with this model's logits."""
    return self._ahead(weights, memory, state, None, G, window)[:3]

  def propose(self, weights, memory: Memory, state: State, G: int, window: int):
    """(memory, draft_BG, count_B, law_BGV): the same with noise of its own, and the laws it drew from."""
    V = self.engine.setup.cfg.vocab
    none_BGV = jnp.zeros((state.len_B.shape[0], G, V), jnp.float32)
    return self._ahead(weights, memory, state, none_BGV, G, window)

  def _ahead(self, weights, memory: Memory, state: State, none_BGV, G: int, window: int):
    setup = self.engine.setup
    entropy = record.columns(setup).index("entropy")
    # The last two tokens are fed, though the first of them usually was before: where a whole draft was
    # accepted, its last token was not.
    base_B = jnp.maximum(state.len_B - 1, 0)
    B = base_B.shape[0]
    before_B1 = jnp.take_along_axis(state.history_BS, base_B[:, None], axis=1)
    cache = step.read_only(setup, memory.cache, window)
    past = self._past(memory.replace(cache=cache), base_B, G + 1, window)

    def more(carry):
      g, _, _, wanted_B, *_ = carry
      return (g < G) & jnp.any(wanted_B)

    def body(carry):
      g, recent, rows, wanted_B, risk_BG, chance_B, draft_BG, count_B, law_BGV = carry

      def feed(token_BT):
        return self._feed(weights, token_BT, past.replace(recent=recent))

      def two():
        return feed(jnp.concatenate([before_B1, state.token_B[:, None]], axis=1))

      # The loop waits for its condition anyway; and one program for both beginnings starts faster.
      recent, x_BD, attn = jax.lax.cond(g == 0, two, lambda: feed(rows.token_B[:, None]))
      rows = rows.replace(live_B=wanted_B, len_B=rows.len_B + wanted_B.astype(jnp.int32))
      logits_BV = setup.model.unembed(weights, x_BD)
      if law_BGV is None:
        rows, record_BR, lead_B = step.next_token(setup, rows, logits_BV, attn, _with_lead)
      else:
        # The target has other noise, so the lead of a draw says nothing about it.
        rows, record_BR, law_BV = step.next_token(setup, rows, logits_BV, attn, _with_own_noise)
        law_BGV, lead_B = law_BGV.at[:, g].set(law_BV), 0.0
      draft_BG = draft_BG.at[:, g].set(jnp.where(wanted_B, rows.token_B, 0))
      count_B += wanted_B.astype(jnp.int32)
      ent_B = jax.lax.bitcast_convert_type(record_BR[:, entropy], jnp.float32)
      risk_B = risk(ent_B, lead_B)
      risk_BG = risk_BG.at[:, g].set(risk_B)
      chance_B *= jnp.maximum(1.0 - scale_B * risk_B, 0.0)
      wanted_B &= rows.live_B & (chance_B >= memory.bar_B)
      return g + 1, recent, rows, wanted_B, risk_BG, chance_B, draft_BG, count_B, law_BGV

    scale_B = (BEGIN + memory.missed_B) / (BEGIN + memory.foreseen_B)
    none_BG, none_B = jnp.zeros((B, G), jnp.int32), jnp.zeros((B,), jnp.int32)
    risks = jnp.zeros_like(memory.risk_BG), jnp.ones((B,), jnp.float32)
    start = (jnp.int32(0), past.recent, state.light, state.live_B, *risks)
    start = (*start, none_BG, none_B, none_BGV)
    _, recent, _, _, risk_BG, _, *drafted = while_loop(more, body, start)
    fed_B = jnp.where(state.live_B, recent.n, 0)
    cache = step.merge(setup, memory.cache, past.replace(recent=recent), fed_B)
    len_B = jnp.where(state.live_B, base_B + recent.n, memory.len_B)
    return memory.replace(cache=cache, len_B=len_B, risk_BG=risk_BG), *drafted


def _new(rows: int, bar) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(bar_B, missed_B, foreseen_B, risk_BG) of rows that have drafted nothing."""
  none_B = jnp.zeros((rows,), jnp.float32)
  return jnp.full((rows,), bar), none_B, none_B, jnp.zeros((rows, MOST), jnp.float32)


def _insert(memory: Memory, cache: kvcache.Cache, len_1, slot, bar) -> Memory:
  # A bucket may be longer than the cache; the slots after the prompt are padding.
  cache = jax.tree.map(lambda x, big: x[:, :, : big.shape[2]], cache, memory.cache)
  return put_row(memory, Memory(cache, len_1, *_new(1, bar)), slot)


def _fork(memory: Memory, source, target) -> Memory:
  return put_row(memory, row_at(memory, source), target)


def check_pair(target: Engine, draft: Engine) -> None:
  """Raises UserError when one model cannot draft for the other."""
  ours, theirs = target.setup.cfg.vocab, draft.setup.cfg.vocab
  if ours != theirs:
    raise UserError(
      f"The draft model has {theirs} ids and the target {ours}; both must share one vocabulary."
    )
