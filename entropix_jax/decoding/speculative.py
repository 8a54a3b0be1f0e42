"""Speculative decoding: a drafter guesses, one forward pass checks several guesses.

Why: by shared noise the token of every position is argmax(law + noise) with noise that is fixed
beforehand, so a guess is right or wrong before anybody looks: verification is running the sampler itself
and comparing. Therefore the text is that of plain decoding for every sampler, stateful ones included,
every drafter and every draft length; only the number of forward passes changes [n14].

Whether fewer passes are less time depends on the machine, the drafter and the text. So the two ways of
going on, plainly and drafting, race: each dispatch is timed, and the slower way is tried again now and
then. A drafter that is not asked costs nothing: it reads prompts and text only when it is.

By rejection (arXiv:2211.17192, arXiv:2302.01318) a guess is drawn with noise of its own and stands with
probability min(1, p / q): more of them stand, as many as can. It keeps the law of the text, of whole texts and of
every sampler, but not the text: that depends on the drafter, on how far it drafts and on the limit too [n22].
It always drafts, since otherwise a clock would have a part in the text.
"""

import collections
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.decoding.drafters import MOST, DraftModel, Ngram, check_pair
from entropix_jax.engine.engine import (
  EMITTED,
  EXHAUSTED,
  LATER,
  STOPPED,
  UNCERTAIN,
  WAITS,
  Engine,
  Request,
  State,
  abstract,
)
from entropix_jax.errors import UserError
from entropix_jax.model import sharding

NONE = -1  # in place of a drafted id: there is none
ENDS = STOPPED | EXHAUSTED | UNCERTAIN | WAITS


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  drafter: str = "ngram"  # who guesses: "ngram" (the text's own past) or "draft" (a smaller model)
  checkpoint: str = ""  # the smaller model's folder
  length: int = 7  # most tokens guessed for a pass, which is over one more: machines like eight
  bar: float = 0.65  # drafts end where the chance that all of them is right is below it
  always: bool = False  # guess even where the clock says that plain decoding is faster
  # What a guess has to pass: "noise" (the text stays) or "rejection" (its law stays; implies always).
  verify: str = "noise"

  def __post_init__(self):
    if self.drafter not in ("ngram", "draft"):
      raise UserError(f"config.decoding.drafter is {self.drafter!r}; use 'ngram' or 'draft'.")
    if self.verify not in ("noise", "rejection"):
      raise UserError(f"config.decoding.verify is {self.verify!r}; use 'noise' or 'rejection'.")
    if self.length not in range(1, MOST + 1):
      raise UserError(
        f"config.decoding.length is {self.length!r}; use a whole number from 1 to {MOST}."
      )
    if not 0.0 <= self.bar <= 1.0:
      raise UserError(f"config.decoding.bar is {self.bar!r}; use a number from 0 to 1.")
    if (self.drafter == "draft") != bool(self.checkpoint):
      raise UserError(
        "config.decoding.drafter=draft and config.decoding.checkpoint=DIR go together; give both, or "
        "neither for n-grams."
      )
    if self.drafter == "ngram" and self.bar != Config.bar:
      raise UserError("config.decoding.bar is for config.decoding.drafter=draft; leave it out.")

  @property
  def folders(self) -> list[str]:
    """Of models beside the target."""
    return [self.checkpoint] if self.checkpoint else []


class Speculative(Engine):
  """An Engine whose `decode` drafts and verifies; to `generate` it looks like any other.

  Args:
    target: the engine whose text this is.
    drafter: see drafters.py.
    length: G, the most tokens drafted for a pass.
    always: draft even where plain decoding is faster.
    verify: "noise", or "rejection", which always drafts.
  """

  common_from = None  # a drafter reads each row's prompt by itself

  def __new__(cls, target: Engine, *args, **kwargs):
    """Of the target's own kind, too: `super()` below is whatever engine the target is."""
    if not issubclass(cls, type(target)):
      cls = type(f"{cls.__name__}{type(target).__name__}", (cls, type(target)), {})
    return super().__new__(cls)

  def __init__(
    self,
    target: Engine,
    drafter: Ngram | DraftModel,
    length: int = 4,
    always: bool = False,
    verify: str = "noise",
    clock: Callable[[], float] = time.perf_counter,
  ):
    vars(self).update(vars(target))
    if isinstance(drafter, DraftModel):
      check_pair(target, drafter.engine)
    self.compiled = collections.ChainMap({}, target.compiled)
    self.drafter, self.length, self.judges = drafter, length, verify == "rejection"
    self.race = Race(always or self.judges, clock, drafter.reads, self._waits())

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(expected, most) tokens that the next dispatch gives a live row."""
    if not self.race.drafts:
      return super().per_dispatch
    rounds = self._rounds
    return max(rounds, round(rounds * self.race.per_pass)), rounds * (self.length + 1)

  def _waits(self) -> int:
    """Dispatches before drafting is tried: so many that the try costs little of their time.

    What a pass costs beyond a step is not known yet: of weights that are read, the drafter's once a
    guess, and a half for the verification of several tokens.
    """
    drafter, target = (
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
      for weights in (self.drafter.weights, self.weights)
    )
    beyond = 0.5 + self.length * drafter / target
    passes = TRY + self.drafter.reads
    return max(FIRST, math.ceil(passes * beyond / (LOST * self.config.steps_per_dispatch)))

  @property
  def _rounds(self) -> int:
    """Passes of the next dispatch that drafts: for twice as many tokens as a plain one gives.

    To start a program that drafts takes as long as one or two steps: it is several times as large.
    """
    if self.race.trying:
      return 1 if self.race.warms else TRY
    usual = self.race.per_pass or 1 + self.length / 2
    return min(
      max(2, round(2 * self.config.steps_per_dispatch / usual)), self.config.steps_per_dispatch
    )

  # -- pure functions --------------------------------------------------------------------------

  def _round(self, weights, draft_weights, state: State, memory, G: int, window: int):
    """Draft and verify once; (State, memory, record_TBR), T = G + 1."""
    law_BGV, args = None, (draft_weights, memory, state, G, window)
    if self.judges:
      memory, draft_BG, count_B, law_BGV = self.drafter.propose(*args)
    else:
      memory, draft_BG, count_B = self.drafter.draft(*args)
    count_B = jnp.clip(count_B, 0, jnp.maximum(state.limit_B - state.out_B - 1, 0))
    count_B = jnp.where(state.live_B, count_B, 0)
    draft_BG = jnp.where(jnp.arange(G) < count_B[:, None], draft_BG, NONE)
    how = {"window": window, "judges": self.judges, "law_BGV": law_BGV}
    rows, recent, record_TBR = self.verify(weights, state, draft_BG, count_B, **how)
    cache = self.merge(state.cache, recent, self.lengths(state), rows.len_B - state.len_B)
    # A row that emits nothing accepts nothing.
    accepted_B = jnp.maximum(rows.out_B - state.out_B - 1, 0)
    memory = self.drafter.learn(self.drafter.forget(memory, rows), count_B, accepted_B)
    return rows.replace(cache=cache), memory, record_TBR

  def look(self, weights, rows: State, token_BT, cache, base, recent, window: int):
    """As the target's; of a token and its drafts only as many as the row with most has, the rest is zeros.

    A pass over fewer tokens is cheaper, but where asking for their number would wait for the host [n02].
    """
    look, T = super().look, token_BT.shape[1]
    if self.length + 1 != T or jax.default_backend() == "gpu":
      return look(weights, rows, jnp.maximum(token_BT, 0), cache, base, recent, window)

    def first(n):
      few_BN = jnp.maximum(token_BT[:, : n + 1], 0)
      logits, after, attn = look(weights, rows, few_BN, cache, base, recent, window)
      seen = jax.tree.map(lambda x: x[:, None], (logits, attn)) if n == 0 else (logits, attn)

      def pad(x):
        return jnp.pad(x, ((0, 0), (0, T - n - 1), *[(0, 0)] * (x.ndim - 2)))

      logits, attn = jax.tree.map(pad, seen)
      return logits, after, attn

    sizes = sorted({0, self.length // 4, self.length // 2, self.length})
    most = jnp.max(jnp.sum(token_BT != NONE, axis=1)) - 1
    which = jnp.searchsorted(jnp.asarray(sizes), most)
    return jax.lax.switch(which, [functools.partial(first, n) for n in sizes])

  def _speculate(self, weights, draft_weights, state, memory, rounds, *, most: int, G: int, window):
    """`rounds` <= most of drafting and verifying; (State, memory, record_NBR), N = most * (G + 1)."""
    memory = self.drafter.follow(draft_weights, memory, state, window)
    record_XTBR = jnp.zeros((most, G + 1, state.len_B.shape[0], len(self.columns)), jnp.int32)

    def more(carry):
      i, state, *_ = carry
      return (i < rounds) & jnp.any(state.live_B)

    def step(carry):
      i, state, memory, record_XTBR = carry
      state, memory, record_TBR = self._round(weights, draft_weights, state, memory, G, window)
      return i + 1, state, memory, record_XTBR.at[i].set(record_TBR)

    start = (jnp.int32(0), state, memory, record_XTBR)
    _, state, memory, record_XTBR = jax.lax.while_loop(more, step, start)
    return state, memory, record_XTBR.reshape(-1, *record_XTBR.shape[2:])

  # -- compiling -------------------------------------------------------------------------------

  def _lower(self, key: tuple):
    if key[0] != "speculate":
      return super()._lower(key)
    G, window = key[1:]
    state, memory = self.abstract_state(), self.drafter.abstract()
    rounds = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.of(self.mesh, ""))

    def speculate(weights, draft_weights, state, memory, rounds):
      how = {"most": self.config.steps_per_dispatch, "G": G, "window": window}
      return self._speculate(weights, draft_weights, state, memory, rounds, **how)

    placed = {}
    if self.mesh is not None:
      out = jax.tree.map(lambda x: x.sharding, (state, memory))
      placed["out_shardings"] = (*out, sharding.of(self.mesh, "___"))
    jitted = jax.jit(speculate, donate_argnames=("state", "memory"), **placed)
    args = abstract(self.weights), abstract(self.drafter.weights), state, memory, rounds
    return jitted.lower(*args)

  def programs(self, requests: Sequence[Request]) -> list[tuple]:
    """What running these requests will need."""
    keys = super().programs(requests)
    windows = [key[2] for key in keys if key[0] == "decode"]
    ahead = self.window(max(windows) + self.config.steps_per_dispatch * (self.length + 1))
    mine = [w for w in self.windows if min(windows) <= w <= ahead]
    if self.race.always:
      keys = [key for key in keys if key[0] != "decode"]
    return keys + [("speculate", self.length, w) for w in mine]

  def compile(self, programs: Sequence[tuple], done: Callable[[], None] = lambda: None) -> None:
    """Compile these programs now, and what the drafter needs beside them."""
    super().compile(programs, done)
    self.drafter.compile(programs)

  # -- the verbs, on (State, memory, slots whose prompt the drafter has not read) ---------------

  def init(self):
    """Empty rows, of the engine; the drafter has none until it is asked."""
    self.race.begin()
    return super().init(), None, {}

  def prefill(self, request: Request):
    """(Prefix, the prompt as the drafter will read it: once, and only if it is asked)."""
    return super().prefill(request), functools.cache(lambda: self.drafter.prefill(request))

  def insert(self, state, prefix, slot: int, request: Request, forced: int = -1):
    """(State and what is beside it, record_1R); `state` is donated."""
    rows, memory, unread = state
    rows, record = super().insert(rows, prefix[0], slot, request, forced)
    self.race.prompt()
    return (rows, memory, unread | {slot: prefix[1]}), record

  def join(self, state, prefix, requests: dict[int, Request], forced=None, shares: bool = False):
    """(State and what is beside it, record_BR); `state` is donated."""
    rows, memory, unread = state
    rows, record = super().join(rows, prefix[0], requests, forced, shares)
    self.race.prompt()
    return (rows, memory, unread | dict.fromkeys(requests, prefix[1])), record

  def likeliest(self, prefix, n: int) -> list[int]:
    """As the target's."""
    return super().likeliest(prefix[0], n)

  def fork(self, state, source: int, target: int, seed: int, stream: int, attempt: int = 0):
    """The row at `source`, also at `target`; `state` is donated."""
    rows, memory, unread = state
    rows = super().fork(rows, source, target, seed, stream, attempt)
    if source in unread:
      return rows, memory, unread | {target: unread[source]}
    memory = self.drafter.fork(memory, source, target)
    return rows, memory, {slot: text for slot, text in unread.items() if slot != target}

  def steer(self, state, live=None, limit=None, forced=None):
    """As the target's; the drafter looks at the target's rows."""
    return super().steer(state[0], live, limit, forced), *state[1:]

  def rewind(self, state, slot: int, request: Request, n: int, attempt: int):
    """As the target's; the drafter forgets as much."""
    rows, memory, unread = state
    rows = super().rewind(rows, slot, request, n, attempt)
    if memory is not None:
      memory = self.drafter.forget(memory, rows)
    return rows, memory, unread

  def score(self, state, longest: int, suffixes, labels):
    """As the target's."""
    return super().score(state[0], longest, suffixes, labels)

  def decode(self, state, longest: int, steps: int | None = None):
    """(State and what is beside it, record_NBR): `steps` passes; a row's tokens stand where it emitted."""
    rows, memory, unread = state
    if not self.race.drafts:
      self.race.next()
      rows, record = super().decode(rows, longest, steps)
      return (rows, memory, unread), record
    rounds = min(steps or self._rounds, self.config.steps_per_dispatch)
    self.race.next(counts=not (unread and self.drafter.reads))
    memory = self.drafter.init() if memory is None else memory
    for slot, prefix in unread.items():
      memory = self.drafter.insert(memory, prefix(), slot)
    window = self.window(longest + rounds * (self.length + 1))
    run = self._program(("speculate", self.length, window))
    count = self.put(np.asarray(rounds, np.int32))
    rows, memory, record = run(self.weights, self.drafter.weights, rows, memory, count)
    return (rows, memory, {}), record

  def unpack(self, record: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values; who wins the race is seen here, where the host waits for a dispatch."""
    values = super().unpack(record)
    flags_NB = values["flags"]
    emitted_NB, ended_NB, later_NB = (flags_NB & x > 0 for x in (EMITTED, ENDS, LATER))
    # Of a row that ended, part of the time was spent on nothing.
    whole_B = emitted_NB.any(axis=0) & ~ended_NB.any(axis=0)
    tokens, later = (int(x_NB[:, whole_B].sum()) for x_NB in (emitted_NB, later_NB))
    self.race.read(tokens, tokens - later, int(whole_B.sum()))
    return values


# Dispatches before the other way is tried: at first, at least, then at least and at most.
FIRST, AGAIN, LONGEST = 4, 16, 128
LOST = 0.05  # of the time before the first try, on it
TRY = 2  # passes of a dispatch that tries drafting
RECENT = 8  # dispatches that a way is judged by
MARGIN = 1.1  # by how much drafting must be faster: a few dispatches of it say less than as many plain ones
HALFWAY = 1.05  # by so much it may be faster after all: the next try comes soon
SPENT = 0.02  # of the time, on tries that were lost


class Race:
  """Which way the next dispatch goes: True drafts.

  Why by time and not by acceptance: what a pass over G + 1 tokens and a draft cost is a fact of the
  machine, and a clock knows it. What a try that was lost has cost says when the next one may be; one that was
  won, but not by MARGIN, is repeated soon.

  Args:
    catches_up: the drafter reads what it has missed, so its first dispatch does not count and a try has
      two of them.
    first: plain dispatches before drafting is tried.
  """

  def __init__(
    self, always: bool, clock: Callable[[], float], catches_up: bool = True, first: int = FIRST
  ):
    self.always, self.clock, self.catches_up, self.first = always, clock, catches_up, first
    self.way, self.calm, self.since = always, first, 0
    # Whether the present try has no verdict yet, and whether the one before was cut off by a text's end.
    self.open = self.cut = False
    # (tokens a row, seconds, tokens a pass) of dispatches
    self.seen = {way: collections.deque(maxlen=RECENT) for way in (True, False)}
    self.begin()

  def begin(self) -> None:
    """Forget what was sent; what was learned stays."""
    if self.open and not self.cut:
      self.since = self.calm  # once: texts may all be as short
    self.cut, self.open = self.open, False
    self.sent: list[tuple[bool, bool] | None] = []  # not read yet: (way, counts); None is a prompt
    self.last: bool | None = None  # the way that was sent last
    self.tries = 0  # dispatches of the other way that the present try still sends
    self.last_s: float | None = None
    self.lost_s = 0.0  # by the present try

  @property
  def per_pass(self) -> float:
    """Tokens of a pass that drafts, in the mean; 0 where none was read."""
    return statistics.fmean(n for *_, n in self.seen[True]) if self.seen[True] else 0.0

  def rate(self, way: bool) -> float:
    """Tokens/s of a row, in the mean of the last dispatches but the slowest: a machine may stall."""
    seen = sorted(self.seen[way], key=lambda sample: sample[0] / sample[1])
    seen = seen[len(seen) > 2 :]
    return sum(n for n, *_ in seen) / sum(s for _, s, _ in seen) if seen else 0.0

  @property
  def trying(self) -> bool:
    """Whether the next dispatch goes the other way, to try it."""
    due = self.since >= self.calm and all(x is None or x[0] == self.way for x in self.sent)
    return not self.always and (self.tries > 0 or due)

  @property
  def warms(self) -> bool:
    """Whether the next dispatch would begin to draft after others, and so not count."""
    return self.catches_up and not self.last

  @property
  def drafts(self) -> bool:
    """The way of the next dispatch."""
    return self.way != self.trying

  def next(self, counts: bool = True) -> bool:
    """The way of a dispatch that is sent now.

    Args:
      counts: False where it has more to do than others.
    """
    way, trying = self.drafts, self.trying
    if not trying:
      self.since += 1
    elif self.tries:
      self.tries -= 1
    else:
      self.since, self.calm = 0, max(self.calm, AGAIN)
      self.tries = int(way and self.catches_up)
      self.lost_s, self.open = 0.0, True
    if not counts:
      self.disturb()
    self.sent.append((way, counts and not (way and self.warms)))
    self.last = way
    return way

  def prompt(self) -> None:
    """A prompt is sent now."""
    self.disturb()
    self.sent.append(None)

  def disturb(self) -> None:
    """The host has other work before it can read what was sent, so its time says nothing."""
    self.sent = [sent and (sent[0], False) for sent in self.sent]

  def read(self, tokens: int, passes: int, rows: int) -> None:
    """The oldest unread dispatch has given so many tokens to so many rows, in so many passes in all."""
    if not self.sent:
      return
    now, sent, before = self.clock(), self.sent.pop(0), self.last_s
    self.last_s = now
    if sent is None or before is None or not rows:
      return
    (way, counts), spent, each = sent, max(now - before, 1e-9), tokens / rows
    tried, mine = way != self.way, self.rate(self.way)
    if tried and mine:
      self.lost_s += spent - each / mine
    if not counts:
      return
    self.seen[way].append((each, spent, tokens / passes))
    if tried:
      self.open = self.cut = False
    if self.always:
      return
    bar = 1.0 if self.way else MARGIN
    if self.rate(not self.way) > bar * self.rate(self.way) > 0:
      self.calm = self.first if self.way else FIRST
      self.way, self.since, self.tries = not self.way, 0, 0
    elif tried and self.rate(way) > HALFWAY * mine > 0:
      self.calm = FIRST  # too little seen to go over, and nothing lost by looking again
    elif tried and mine:
      usual = statistics.fmean(s for _, s, _ in self.seen[self.way])
      self.calm = int(min(max(self.lost_s / (SPENT * usual), AGAIN), LONGEST))
