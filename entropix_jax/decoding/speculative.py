"""Speculative decoding: a drafter guesses, one forward pass of the target checks several guesses.

Why: the text is that of plain decoding for every sampler, stateful ones included, every drafter and every draft
length; only the number of forward passes changes (verify.py, [n14]).

Whether fewer passes take less time depends on the machine, the drafter and the text. So the two ways, plain
and drafting, race: each dispatch is timed, and the slower way is tried again now and then (race.py). A drafter
that is not asked costs nothing: it reads prompts and text only when it is.

By rejection, drafted tokens have noise of their own and more of them are accepted, as many as can be. That keeps the
law of the text, for whole texts and every sampler, but not the text: it depends on the drafter, on how far it
drafts and on the limit, too [n22]. It always drafts, since otherwise a clock would influence the text.
"""

import collections
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.decoding.drafters import MOST, DraftModel, Echo, Ngram, check_pair
from entropix_jax.decoding.race import FIRST, LOST, RECENT, TRY, Race
from entropix_jax.decoding.verify import NONE, verify
from entropix_jax.engine import record, step
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Job, Program, Programs, lower, named, needed, shape
from entropix_jax.engine.request import Request
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import Prefix, State, abstract, abstract_state
from entropix_jax.errors import UserError
from entropix_jax.rowwise import while_loop

ENDS = record.STOPPED | record.EXHAUSTED | record.UNCERTAIN | record.WAITS | record.BROKEN


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method."""

  drafter: str = "ngram"  # "ngram" (the text's own past) or "draft" (a smaller model)
  checkpoint: str = ""  # the smaller model's folder
  length: int = 7  # most tokens drafted for a pass, which is over one more: eight suit the hardware
  bar: float = 0.65  # a draft ends where the chance that all of it is accepted is below it
  always: bool = False  # draft even where plain decoding is measured to be faster
  # How drafted tokens are checked: "noise" (the text stays) or "rejection" (its law stays; implies always).
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
    """Of the models beside the target."""
    return [self.checkpoint] if self.checkpoint else []


def speculate(
  setup: Setup,
  drafter,
  reject: bool,
  weights,
  draft_weights,
  state: State,
  memory,
  rounds,
  *,
  most,
  G,
  window,
):
  """`rounds` <= most of drafting and verifying: (State, memory, record_NBR), N = most * (G + 1)."""
  memory = drafter.follow(draft_weights, memory, state, window)
  shape_XTBR = most, G + 1, state.len_B.shape[0], len(record.columns(setup))

  def more(carry):
    i, state, *_ = carry
    return (i < rounds) & jnp.any(state.live_B)

  def body(carry):
    i, state, memory, record_XTBR = carry
    law_BGV, args = None, (draft_weights, memory, state, G, window)
    if reject:
      memory, draft_BG, count_B, law_BGV = drafter.propose(*args)
    else:
      memory, draft_BG, count_B = drafter.draft(*args)
    count_B = jnp.clip(count_B, 0, jnp.maximum(state.limit_B - state.out_B - 1, 0))
    count_B = jnp.where(state.live_B, count_B, 0)
    draft_BG = jnp.where(jnp.arange(G) < count_B[:, None], draft_BG, NONE)
    how = {"window": window, "reject": reject, "law_BGV": law_BGV}
    rows, past, record_TBR = verify(setup, weights, state, draft_BG, count_B, **how)
    cache = step.merge(setup, state.cache, past, rows.len_B - state.len_B)
    # A row that emits nothing accepts nothing.
    accepted_B = jnp.maximum(rows.out_B - state.out_B - 1, 0)
    memory = drafter.learn(drafter.forget(memory, rows), count_B, accepted_B)
    return i + 1, rows.replace(cache=cache), memory, record_XTBR.at[i].set(record_TBR)

  first = state.first
  start = (jnp.int32(0), state.replace(first=None), memory, jnp.zeros(shape_XTBR, jnp.int32))
  _, state, memory, record_XTBR = while_loop(more, body, start)
  return state.replace(first=first), memory, record_XTBR.reshape(-1, *record_XTBR.shape[2:])


class SpeculativeDecoder(PlainDecoder):
  """A decoder that drafts and verifies, or decodes plainly, whichever is faster.

  Args:
    engine: of the target, whose text this is.
    drafter: see drafters.py.
    length: G, the most tokens drafted for a pass.
    always: draft even where plain decoding is faster.
    verify: "noise", or "rejection", which always drafts.
  """

  shares_prefix: ClassVar[bool] = False  # a drafter reads each row's prompt by itself
  resumes: ClassVar[bool] = False  # a drafter would have to read the forced ids, too

  def __init__(
    self,
    engine: Engine,
    drafter: Ngram | DraftModel,
    length: int = 4,
    always: bool = False,
    verify: str = "noise",
    clock: Callable[[], float] = time.perf_counter,
  ):
    super().__init__(engine)
    if isinstance(drafter, DraftModel):
      check_pair(engine, drafter.engine)
    self.compiled = Programs(self._lower, self._facts, engine.compiled.options)
    self.drafter, self.length, self.reject = drafter, length, verify == "rejection"
    self.race = Race(always or self.reject, clock, drafter.reads, self._first_try())
    # (way, window) of programs that have run: the first run of a program takes longer than others.
    self._ran: set[tuple[bool, int]] = set()
    self.begin()

  def _first_try(self) -> int:
    """Plain dispatches before drafting is tried: so many that the try costs little of their time.

    What a pass costs beyond a plain step is not known yet. An estimate: the drafter's weights are read once
    per drafted token, and verifying several tokens costs half a step.
    """
    drafter, target = (
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
      for weights in (self.drafter.weights, self.engine.weights)
    )
    beyond = 0.5 + self.length * drafter / target
    passes = TRY + self.drafter.reads
    steps = self.engine.setup.config.steps_per_dispatch
    return max(FIRST, math.ceil(passes * beyond / (LOST * steps)))

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(expected, most) tokens that the next dispatch gives a live row."""
    if not self.race.drafts:
      return super().per_dispatch
    rounds = self._rounds
    return max(rounds, round(rounds * self.race.per_pass)), rounds * (self.length + 1)

  @property
  def _rounds(self) -> int:
    """Passes of the next dispatch that drafts: for twice as many tokens as a plain one gives.

    Starting a program that drafts takes as long as one or two steps: it is several times as large.
    """
    if self.race.trying:
      return 1 if self.race.warms else TRY
    usual = self.race.per_pass or 1 + self.length / 2
    steps = self.engine.setup.config.steps_per_dispatch
    return min(max(2, round(2 * steps / usual)), steps)

  # -- compiling -------------------------------------------------------------------------------

  def _facts(self, p: Program) -> tuple:
    return self.engine.facts(p), self.drafter.facts(p), self.reject

  def _lower(self, p: Program) -> jax.stages.Lowered:
    setup, most = self.engine.setup, self.engine.setup.config.steps_per_dispatch
    state, memory = abstract_state(setup), self.drafter.abstract()
    weights, draft_weights = abstract(self.engine.weights), abstract(self.drafter.weights)
    dims = most * (p.tokens + 1), setup.config.batch_size, len(record.columns(setup))
    f = named("speculate", self._speculate, most=most, G=p.tokens, window=p.window)
    args = weights, draft_weights, state, memory, shape(setup, "", ())
    return lower(setup, f, args, (state, memory, shape(setup, "___", dims)), donate=(2, 3))

  def _speculate(self, *args, **sizes):
    return speculate(self.engine.setup, self.drafter, self.reject, *args, **sizes)

  def jobs(self, requests: Sequence[Request], several: bool = False) -> list[Job]:
    """What these requests need and is not compiled yet; see `programs.needed`."""
    del several  # rows do not share a prefix here
    setup = self.engine.setup
    programs = needed(setup, requests)
    windows = [p.window for p in programs if p.verb == "decode"]
    most = setup.config.steps_per_dispatch * (self.length + 1)  # tokens per dispatch
    ahead = max(r.prompt_tokens + setup.limit(r) for r in requests) + most
    windows = [w for w in setup.windows if min(windows) <= w <= setup.window(ahead)]
    if self.race.always:
      programs = [p for p in programs if p.verb != "decode"]
    mine = [Program("speculate", tokens=self.length, window=w) for w in windows]
    theirs = *self.engine.compiled.jobs(programs), *self.drafter.jobs(programs)
    return [*self.compiled.jobs(mine), *theirs]

  # -- what happens to rows ----------------------------------------------------------------------

  def begin(self) -> None:
    """All slots are free; the drafter has no memory until it is asked."""
    self.race.begin()
    self._memory = None
    self._unread: dict[int, Request] = {}  # slots whose prompt the drafter has not read
    # The last prompts that the drafter fed: several rows begin with the same one.
    self._fed: collections.OrderedDict = collections.OrderedDict()
    # By slot, what n-grams would have drafted; and (tokens, passes that they would have taken) of the last dispatches.
    self._echoes: dict[int, Echo] = {}
    self._would: collections.deque = collections.deque(maxlen=RECENT)

  def inserted(self, slot: int, request: Request) -> None:
    """The drafter will read the row's prompt when it is asked."""
    self._unread[slot] = request
    if isinstance(self.drafter, Ngram) and not self.race.always:
      self._echoes[slot] = Echo(self.drafter, self.length, request.ids)

  def first(self) -> None:
    """First tokens are drawn by a dispatch of their own."""
    self.race.prompt()

  def forked(self, source: int, target: int) -> None:
    """The row at `source` is now also at `target`."""
    self._unread.pop(target, None)
    self._echoes.pop(target, None)
    if source in self._echoes:
      self._echoes[target] = copy.copy(self._echoes[source])
    if source in self._unread:
      self._unread[target] = self._unread[source]
    elif self._memory is not None:
      self._memory = self.drafter.fork(self._memory, source, target)

  def rewound(self, state: State) -> None:
    """The drafter forgets what the rows no longer have."""
    self._echoes, self.race.would = {}, None
    self._would.clear()
    if self._memory is not None:
      self._memory = self.drafter.forget(self._memory, state)

  def decode(
    self, state: State, longest: int, prefix: Prefix | None = None, rows: int | None = None
  ) -> tuple[State, jax.Array]:
    """(State, record_NBR) of one dispatch, of all rows; `state` is donated."""
    if not self.race.drafts:
      self.race.next(counts=self._ran_before(False, longest))
      return super().decode(state, longest, prefix)
    rounds = self._rounds
    window = self.engine.setup.window(longest + rounds * (self.length + 1))
    ran = self._ran_before(True, window)
    self.race.next(counts=ran and not (self._unread and self.drafter.reads))
    memory = self.drafter.init() if self._memory is None else self._memory
    for slot, request in self._unread.items():
      memory = self.drafter.insert(memory, self._prefill(request), slot)
    self._unread = {}
    args = state, memory, self.engine.put(np.asarray(rounds, np.int32))
    run = self.compiled[Program("speculate", tokens=self.length, window=window)]
    state, self._memory, packed = run(self.engine.weights, self.drafter.weights, *args)
    return state, packed

  def _ran_before(self, way: bool, longest: int) -> bool:
    """Whether the program of that way for so many tokens ran before; it runs now."""
    key = way, self.engine.setup.window(longest)
    ran = key in self._ran
    self._ran.add(key)
    return ran

  def _prefill(self, request: Request):
    key = tuple(request.ids)
    if key not in self._fed:
      self._fed[key] = self.drafter.prefill(request)
      if len(self._fed) > self.engine.setup.config.batch_size:
        self._fed.popitem(last=False)
    return self._fed[key]

  def read(self, values: dict[str, np.ndarray]) -> None:
    """The race takes its time here, where the host has waited for a dispatch."""
    flags_NB = values["flags"]
    emitted_NB, ended_NB, later_NB = (
      flags_NB & x > 0 for x in (record.EMITTED, ENDS, record.LATER)
    )
    # A row that ended spent part of the time on nothing.
    whole_B = emitted_NB.any(axis=0) & ~ended_NB.any(axis=0)
    tokens, later = (int(x_NB[:, whole_B].sum()) for x_NB in (emitted_NB, later_NB))
    self.race.read(tokens, tokens - later, int(whole_B.sum()))
    said = [
      (int(emitted_N.sum()), self._echoes[slot].passes(ids_N[emitted_N].tolist()))
      for slot, (ids_N, emitted_N) in enumerate(zip(values["id"].T, emitted_NB.T, strict=True))
      if slot in self._echoes
    ]
    if np.sum(said):
      self._would.append(np.sum(said, axis=0))
      tokens, passes = np.sum(self._would, axis=0)
      self.race.would = float(tokens / max(passes, 1))
