"""Speculative decoding: a drafter guesses, one forward pass checks several guesses.

Why: by shared noise the token of every position is argmax(law + noise) with noise that is fixed beforehand, so a guess is
right or wrong before anybody looks: verification is running the sampler itself and comparing. Therefore
the text is that of plain decoding for every sampler, stateful ones included, every drafter and every
draft length; only the number of forward passes changes [n14].

Whether fewer passes are less time depends on the machine, the drafter and the text. So the two ways of
going on, plainly and drafting, race: each dispatch is timed, and the slower way is only tried again
after 16, 32, 64, ... dispatches of the faster one.

By rejection (arXiv:2211.17192, arXiv:2302.01318) a guess is drawn with noise of its own and stands with
probability min(1, p / q): more of them stand, as many as can. It keeps the law of the text, of whole texts and of
every sampler, but not the text: that depends on the drafter, on how far it drafts and on the limit too [n22].
It always drafts, since otherwise a clock would have a part in the text.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import sharding
from entropix_jax.decoding.drafters import DraftModel, Ngram, check_pair
from entropix_jax.engine import EMITTED, Engine, Request, State, abstract
from entropix_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  drafter: str = "ngram"  # who guesses: "ngram" (the text's own past) or "draft" (a smaller model)
  checkpoint: str = ""  # the smaller model's folder
  length: int = 4  # most tokens guessed for a pass
  bar: float = (
    0.3  # lambda of AdaEDL: a draft ends before the next token where 1 - sqrt(0.2 H) is less
  )
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


AGAIN = 16  # dispatches of the faster way before the slower one is tried again; doubles


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
    self.compiled = {key: run for key, run in target.compiled.items() if key[0] != "decode"}
    self.drafter, self.length, self.judges = drafter, length, verify == "rejection"
    # As many tokens a dispatch as the plain engine's, where half of the guesses are right.
    self.rounds = max(1, round(self.config.steps_per_dispatch / (1 + length / 2)))
    self.race = Race(always or self.judges, clock)

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(least, most) tokens that the next dispatch gives a live row."""
    if self.race.drafts:
      return self.rounds, self.rounds * (self.length + 1)
    return super().per_dispatch

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
    return rows.replace(cache=cache), memory, record_TBR

  def _speculate(self, weights, draft_weights, state, memory, *, rounds: int, G: int, window: int):
    """`rounds` of drafting and verifying; (State, memory, record_NBR), N = rounds * (G + 1)."""

    def step(carry, _):
      *carry, record_TBR = self._round(weights, draft_weights, *carry, G, window)
      return tuple(carry), record_TBR

    (state, memory), record_XTBR = jax.lax.scan(step, (state, memory), length=rounds)
    return state, memory, record_XTBR.reshape(-1, *record_XTBR.shape[2:])

  def _beside(self, weights, draft_weights, state: State, memory, *, steps: int, window: int):
    """Plain steps; the drafter is told what came of them."""
    before = state.replace(cache=None)
    state, record_NBR = self._decode(weights, state, steps=steps, window=window)
    memory = self.drafter.follow(draft_weights, memory, before, state, steps, window)
    return state, memory, record_NBR

  # -- compiling -------------------------------------------------------------------------------

  def _lower(self, key: tuple):
    verb, *sizes = key
    if verb == "speculate":
      rounds, G, window = sizes
      run, kwargs = self._speculate, {"rounds": rounds, "G": G, "window": window}
    elif verb == "decode":
      run, kwargs = self._beside, {"steps": sizes[0], "window": sizes[1]}
    else:
      return super()._lower(key)
    state, memory = self.abstract_state(), self.drafter.abstract()

    def speculate(weights, draft_weights, state, memory):
      return run(weights, draft_weights, state, memory, **kwargs)

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

  # -- the verbs, on (State, memory) -------------------------------------------------------------

  def init(self):
    """Empty rows, of the engine and of the drafter."""
    self.race.begin()
    return super().init(), self.drafter.init()

  def prefill(self, request: Request):
    """(Prefix, what the drafter keeps of the prompt)."""
    return super().prefill(request), self.drafter.prefill(request)

  def insert(self, state, prefix, slot: int, request: Request, forced: int = -1):
    """((State, memory), record_1R); `state` is donated."""
    rows, record = super().insert(state[0], prefix[0], slot, request, forced)
    self.race.sent.append(None)
    return (rows, self.drafter.insert(state[1], prefix[1], slot, request)), record

  def likeliest(self, prefix, n: int) -> list[int]:
    """As the target's."""
    return super().likeliest(prefix[0], n)

  def fork(self, state, source: int, target: int, seed: int, stream: int, attempt: int = 0):
    """The row at `source`, also at `target`; `state` is donated."""
    rows = super().fork(state[0], source, target, seed, stream, attempt)
    return rows, self.drafter.fork(state[1], source, target)

  def steer(self, state, live=None, limit=None, forced=None):
    """As the target's; the drafter looks at the target's rows."""
    return super().steer(state[0], live, limit, forced), state[1]

  def rewind(self, state, slot: int, request: Request, n: int, attempt: int):
    """As the target's; what the drafter has seen beyond is beyond the row's length."""
    return super().rewind(state[0], slot, request, n, attempt), state[1]

  def score(self, state, longest: int, suffixes, labels):
    """As the target's."""
    return super().score(state[0], longest, suffixes, labels)

  def decode(self, state, longest: int, steps: int | None = None):
    """((State, memory), record_NBR): `steps` passes; a row's tokens stand where it emitted."""
    if self.race.next():
      rounds = steps or self.rounds
      window = self.window(longest + rounds * (self.length + 1))
      key = ("speculate", rounds, self.length, window)
    else:
      key = ("decode", steps or self.config.steps_per_dispatch, self.window(longest))
    rows, memory, record = self._program(key)(self.weights, self.drafter.weights, *state)
    return (rows, memory), record

  def unpack(self, record: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values; who wins the race is seen here, where the host waits for a dispatch."""
    values = super().unpack(record)
    emitted_NB = values["flags"] & EMITTED
    self.race.read(int(emitted_NB.sum()), int(emitted_NB.any(axis=0).sum()))
    return values


class Race:
  """Which way the next dispatch goes: True drafts.

  Why by time and not by acceptance: what a pass over G + 1 tokens and a draft cost is a fact of the
  machine, and a clock knows it.
  """

  def __init__(self, always: bool, clock: Callable[[], float]):
    self.always, self.clock = always, clock
    self.rate: dict[bool, float] = {}  # tokens/s of a row, by way
    self.calm, self.since = AGAIN, 0
    self.begin()

  def begin(self) -> None:
    """Forget what was sent; what was learned stays."""
    self.sent: list[bool | None] = []  # not read yet, the oldest first; None is a prompt
    self.last_s: float | None = None

  @property
  def best(self) -> bool:
    """The faster way, as far as both are known."""
    return self.rate.get(True, 0.0) >= self.rate.get(False, 0.0)

  @property
  def drafts(self) -> bool:
    """The way of the next dispatch."""
    if self.always:
      return True
    untried = [way for way in (True, False) if way not in self.rate and way not in self.sent]
    if untried or len(self.rate) < 2:
      return (untried or [way for way in (True, False) if way not in self.rate])[0]
    return self.best if self.since < self.calm else not self.best

  def next(self) -> bool:
    """The way of a dispatch that is sent now."""
    way = self.drafts
    self.sent.append(way)
    if len(self.rate) == 2:
      again = way != self.best
      self.since, self.calm = (0, 2 * self.calm) if again else (self.since + 1, self.calm)
    return way

  def read(self, tokens: int, rows: int) -> None:
    """The oldest unread dispatch has given so many tokens to so many rows."""
    if not self.sent:
      return
    now, way, before = self.clock(), self.sent.pop(0), self.last_s
    self.last_s = now
    if way is None or before is None or not rows:
      return
    rate = tokens / rows / max(now - before, 1e-9)
    self.rate[way] = 0.5 * (self.rate.get(way, rate) + rate)
