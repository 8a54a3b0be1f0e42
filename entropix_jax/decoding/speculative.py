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
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import sharding
from entropix_jax.decoding.drafters import DraftModel, Ngram, check_pair
from entropix_jax.engine import (
  EMITTED,
  EXHAUSTED,
  STOPPED,
  UNCERTAIN,
  WAITS,
  Engine,
  Request,
  State,
  abstract,
)
from entropix_jax.errors import UserError


ENDS = STOPPED | EXHAUSTED | UNCERTAIN | WAITS


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  drafter: str = "ngram"  # who guesses: "ngram" (the text's own past) or "draft" (a smaller model)
  checkpoint: str = ""  # the smaller model's folder
  length: int = 4  # most tokens guessed for a pass
  bar: float = 0.3  # lambda of AdaEDL: a draft ends before a token where 1 - sqrt(0.2 H) is less
  always: bool = False  # guess even where the clock says that plain decoding is faster
  # What a guess has to pass: "noise" (the text stays) or "rejection" (its law stays; implies always).
  verify: str = "noise"

  def __post_init__(self):
    if self.drafter not in ("ngram", "draft"):
      raise UserError(f"config.decoding.drafter is {self.drafter!r}; use 'ngram' or 'draft'.")
    if self.verify not in ("noise", "rejection"):
      raise UserError(f"config.decoding.verify is {self.verify!r}; use 'noise' or 'rejection'.")
    if self.length not in range(1, 33):
      raise UserError(
        f"config.decoding.length is {self.length!r}; use a whole number from 1 to 32."
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
    # As many tokens a dispatch as the plain engine's, where all guesses are right.
    self.rounds = -(-self.config.steps_per_dispatch // (1 + length))
    self.race = Race(always or self.judges, clock, drafter.reads)

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(expected, most) tokens that the next dispatch gives a live row."""
    if not self.race.drafts:
      return super().per_dispatch
    most = self.rounds * (self.length + 1)
    return min(most, max(self.rounds, round(self.race.tokens(True)))), most

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

    def verify(n):
      how = {"window": window, "judges": self.judges}
      if law_BGV is not None:
        how["law_BGV"] = law_BGV[:, :n]
      return self.verify(weights, state, draft_BG[:, :n], count_B, **how)

    def wide():
      after, recent, record_TBR = verify(G)
      return after.replace(cache=None), recent, record_TBR

    def narrow():
      after, recent, record_1BR = verify(0)

      def put(all, one):
        return all.at[:, :, :1].set(one) if all.ndim else one

      room = jax.tree.map(put, self.room(draft_BG.shape[0], G + 1), recent)
      return after.replace(cache=None), room, jnp.pad(record_1BR, ((0, G), (0, 0), (0, 0)))

    # A pass without any guess is a plain step, but where asking would wait for the host [n02].
    if jax.default_backend() == "gpu":
      rows, recent, record_TBR = wide()
    else:
      rows, recent, record_TBR = jax.lax.cond(jnp.any(count_B > 0), wide, narrow)
    cache = self.merge(state.cache, recent, self.lengths(state), rows.len_B - state.len_B)
    return rows.replace(cache=cache), self.drafter.forget(memory, rows), record_TBR

  def _speculate(self, weights, draft_weights, state, memory, *, rounds: int, G: int, window: int):
    """`rounds` of drafting and verifying; (State, memory, record_NBR), N = rounds * (G + 1)."""
    memory = self.drafter.follow(draft_weights, memory, state, window)

    def step(carry, _):
      *carry, record_TBR = self._round(weights, draft_weights, *carry, G, window)
      return tuple(carry), record_TBR

    (state, memory), record_XTBR = jax.lax.scan(step, (state, memory), length=rounds)
    return state, memory, record_XTBR.reshape(-1, *record_XTBR.shape[2:])

  # -- compiling -------------------------------------------------------------------------------

  def _lower(self, key: tuple):
    if key[0] != "speculate":
      return super()._lower(key)
    rounds, G, window = key[1:]
    state, memory = self.abstract_state(), self.drafter.abstract()

    def speculate(weights, draft_weights, state, memory):
      how = {"rounds": rounds, "G": G, "window": window}
      return self._speculate(weights, draft_weights, state, memory, **how)

    placed = {}
    if self.mesh is not None:
      out = jax.tree.map(lambda x: x.sharding, (state, memory))
      placed["out_shardings"] = (*out, sharding.of(self.mesh, "___"))
    jitted = jax.jit(speculate, donate_argnames=("state", "memory"), **placed)
    return jitted.lower(abstract(self.weights), abstract(self.drafter.weights), state, memory)

  def programs(self, requests: Sequence[Request]) -> list[tuple]:
    """What running these requests will need."""
    keys = super().programs(requests)
    windows = [key[2] for key in keys if key[0] == "decode"]
    ahead = self.window(max(windows) + self.rounds * (self.length + 1))
    mine = [w for w in self.windows if min(windows) <= w <= ahead]
    if self.race.always:
      keys = [key for key in keys if key[0] != "decode"]
    return keys + [("speculate", self.rounds, self.length, w) for w in mine]

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
    self.race.sent.append(None)
    return (rows, memory, unread | {slot: (prefix[1], request)}), record

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
    self.race.next(counts=not (unread and self.drafter.reads))
    memory = self.drafter.init() if memory is None else memory
    for slot, (prefix, request) in unread.items():
      memory = self.drafter.insert(memory, prefix(), slot, request)
    rounds = steps or self.rounds
    window = self.window(longest + rounds * (self.length + 1))
    run = self._program(("speculate", rounds, self.length, window))
    rows, memory, record = run(self.weights, self.drafter.weights, rows, memory)
    return (rows, memory, {}), record

  def unpack(self, record: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values; who wins the race is seen here, where the host waits for a dispatch."""
    values = super().unpack(record)
    emitted_NB, ended_NB = (values["flags"] & flag > 0 for flag in (EMITTED, ENDS))
    # Of a row that ended, part of the time was spent on nothing.
    whole_B = emitted_NB.any(axis=0) & ~ended_NB.any(axis=0)
    self.race.read(int(emitted_NB[:, whole_B].sum()), int(whole_B.sum()))
    return values


FIRST, AGAIN, LONGEST = 2, 16, 128  # dispatches before the other way is tried, at first and then
RECENT = 4  # dispatches that a way is judged by
MARGIN = 1.03  # by how much the other way must be faster


class Race:
  """Which way the next dispatch goes: True drafts.

  Why by time and not by acceptance: what a pass over G + 1 tokens and a draft cost is a fact of the
  machine, and a clock knows it. After a try that was lost the next one is twice as far away.

  Args:
    catches_up: the drafter reads what it has missed, so the first dispatch of a way does not count and a
      try has two of them.
  """

  def __init__(self, always: bool, clock: Callable[[], float], catches_up: bool = True):
    self.always, self.clock, self.catches_up = always, clock, catches_up
    self.way, self.calm, self.since = always, FIRST, 0
    self.seen = {way: collections.deque(maxlen=RECENT) for way in (True, False)}
    self.begin()

  def begin(self) -> None:
    """Forget what was sent; what was learned stays."""
    self.sent: list[bool | None] = []  # not read yet, the oldest first; None does not count
    self.last: bool | None = None  # the way that was sent last
    self.tries = 0  # dispatches of the other way that the present try still sends
    self.last_s: float | None = None

  def tokens(self, way: bool) -> float:
    """Tokens that a dispatch of that way gave a row, in the mean; 0 where none was read."""
    return statistics.fmean(n for n, _ in self.seen[way]) if self.seen[way] else 0.0

  def rate(self, way: bool) -> float:
    """Tokens/s of a row. The least time: what a neighbour takes from the machine only adds to it."""
    return self.tokens(way) / min((s for _, s in self.seen[way]), default=1.0)

  @property
  def drafts(self) -> bool:
    """The way of the next dispatch."""
    if self.always:
      return True
    other = not self.way
    due = self.since >= self.calm and other not in self.sent
    return other if self.tries or due else self.way

  def next(self, counts: bool = True) -> bool:
    """The way of a dispatch that is sent now.

    Args:
      counts: False where it has more to do than others.
    """
    way = self.drafts
    if way == self.way:
      self.since += 1
    elif self.tries:
      self.tries -= 1
    else:
      self.since, self.tries = 0, int(self.catches_up)
    self.sent.append(way if counts and (way == self.last or not self.catches_up) else None)
    self.last = way
    return way

  def read(self, tokens: int, rows: int) -> None:
    """The oldest unread dispatch has given so many tokens to so many rows."""
    if not self.sent:
      return
    now, way, before = self.clock(), self.sent.pop(0), self.last_s
    self.last_s = now
    if way is None or before is None or not rows:
      return
    self.seen[way].append((tokens / rows, max(now - before, 1e-9)))
    if self.always:
      return
    if self.rate(not self.way) > MARGIN * self.rate(self.way) > 0:
      self.way, self.calm, self.since, self.tries = not self.way, AGAIN, 0, 0
    elif way != self.way:
      self.calm = min(max(2 * self.calm, AGAIN), LONGEST)
