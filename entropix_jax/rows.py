"""The host's side of a generation: which row is in which slot, what was sent to the device and what was read.

Why: reading a result waits for the device, so the next dispatch is sent before the last one is read.
The price is that a row which stops early runs on, masked, for at most one more dispatch.

`Rows` does not decide what happens next; `scheduler.py` and the methods of `decoding/` do.
"""

import collections
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import jax
import numpy as np

from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer
from entropix_jax.engine import record
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.moves import WAKE
from entropix_jax.engine.request import Request
from entropix_jax.engine.state import Prefix, abstract_state
from entropix_jax.errors import UserError

# What ends a row, in a record and for people.
_ENDS = {record.STOPPED: "stop", record.EXHAUSTED: "length", record.UNCERTAIN: "uncertain"}


@dataclasses.dataclass(frozen=True)
class Token:
  """One emitted token of one request."""

  prompt: int  # index of the request
  position: int  # 0 for the first generated token
  id: int
  text: str  # what became readable with this token; a character may need several tokens
  branch: str  # of the sampler, or "inject"
  numbers: dict[str, float]  # logprob, entropy, attention statistics, sampler knobs: record.numbers
  finish: str | None  # "stop", "length" or "uncertain" on the last token
  seconds: float  # since the generation began, when the host saw it
  fork: bool = False  # marked as a place to try several continuations
  new_pass: bool = True  # the first token of a forward pass of the model
  drafted: int = 0  # tokens that had been drafted for that pass
  accepted: bool = False  # it had been drafted
  top: tuple[tuple[int, str, float], ...] = ()  # (id, text, logprob) of the most likely, raw model
  sample: int = 0  # which of several continuations of the prompt
  forced: bool = False  # chosen by the decoding method, not drawn

  def __getattr__(self, name: str) -> float:
    """A number by its name: token.entropy is token.numbers["entropy"]."""
    numbers = self.__dict__.get("numbers", {})
    if name not in numbers:
      raise AttributeError(f"A token has no number {name!r}; it has: {', '.join(numbers)}.")
    return numbers[name]

  def __dir__(self):
    return [*super().__dir__(), *self.numbers]


@dataclasses.dataclass(frozen=True)
class Pause:
  """A row has stopped at a place where it may go on: `Rows.wake`, `fork` or `cancel` it."""

  row: "Row"
  why: str  # "fork": before a token that would be marked; "limit": its present limit is reached
  numbers: dict[str, float] | None = None  # of the token that it waits before
  top: tuple[tuple[int, str, float], ...] = ()


class Guide(Protocol):
  """What restricts a row's tokens, each after those before it."""

  over: bool  # the text is complete, and nothing may follow
  free: bool  # anything may follow: the row has no guide any more
  lifts: Mapping[int, float]  # nats that are added to the logits of ids in the mask

  def push(self, id: int) -> None:
    """The row has emitted a token."""

  def mask(self) -> np.ndarray:
    """bits_X: of the ids that may come next, as in `State.allowed_BX`. Raises UserError where there are none."""


@dataclasses.dataclass(frozen=True)
class Failure:
  """A row has ended without a token: the model's logits were not finite, or its guide has failed."""

  prompt: int
  sample: int
  after: int  # tokens that it had emitted
  text: str  # what was still held back
  seconds: float
  of_guide: str = ""  # what the guide says
  finish: ClassVar[str] = "error"

  @property
  def why(self) -> str:
    """One sentence for people."""
    if self.of_guide:
      return f"The text cannot go on as it must after {self.after} tokens: {self.of_guide}."
    return (
      f"The text of prompt {self.prompt + 1} ends with an error after {self.after} tokens, because the model gave "
      "numbers that are not finite (NaN or infinity); check the checkpoint, or use "
      "config.engine.dtype=float32."
    )

  def close(self, tokens: list[Token]) -> None:
    """Add the text that was held back to the last token, if there is one."""
    tokens[-1:] = [dataclasses.replace(t, text=t.text + self.text) for t in tokens[-1:]]


@dataclasses.dataclass(eq=False)
class Row:
  """One continuation of one prompt, in a slot until it is done."""

  prompt: int
  sample: int
  request: Request
  text: StreamDecoder
  slot: int
  limit: int  # tokens it may emit for now
  stays: bool = False  # keeps its slot when it ends, until it is cancelled: it will be scored
  emitted: int = 0
  expected: int = 0  # tokens after all dispatches that were sent, read or not
  most: int = 0  # and the most they can be
  prefix: Prefix | None = None  # that it shares with other rows; None: it has a copy
  own: tuple[int, ...] | None = None  # see `record.own`
  guide: Guide | None = None
  waits: str = ""  # why it is paused: "fork" or "limit"
  past: bool = False  # the device went on after a stop string, which only the host reads
  done: bool = False

  @property
  def held(self) -> int:
    """Tokens of it in the cache."""
    return self.request.prompt_tokens + max(self.emitted - 1, 0)

  @property
  def shared(self) -> int:
    """Tokens of it that are in the shared prefix."""
    return 0 if self.prefix is None else len(self.request.ids) - 1


class Rows:
  """The rows of an engine.

  Args:
    decoder: how rows get their tokens; plainly when None.
    ahead: dispatches that may be sent before one is read. With 0 the caller can react to each.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    clock: Callable[[], float] = time.perf_counter,
    ahead: int = 1,
    decoder: PlainDecoder | None = None,
  ):
    self.engine, self.tokenizer, self.ahead = engine, tokenizer, ahead
    self.decoder = decoder or PlainDecoder(engine)
    self.decoder.begin()
    self.state = engine.init()
    self.slots: list[Row | None] = [None] * engine.setup.config.batch_size
    # (record, {slot: row}, (expected, most) tokens per row) of what was sent and not read
    self._unread: collections.deque = collections.deque()
    self._fresh: dict[int, Row] = {}  # inserted, without a first token yet
    self._changes: dict[str, dict[int, int]] = {}
    self._masks: dict[int, np.ndarray] = {}
    self._lifts: dict[int, Mapping[int, float]] = {}
    self._clock, self._start = clock, clock()

  @property
  def free(self) -> int:
    """The number of free slots."""
    return self.slots.count(None)

  @property
  def busy(self) -> bool:
    """Whether `step` has anything to send or to read."""
    return bool(self._unread or self._fresh or self._active)

  @property
  def _active(self) -> list[Row]:
    """Rows that a dispatch may move; none where all of them are expected to be at their limits."""
    rows = [row for row in self.slots if row and not row.done and not row.waits]
    return rows if any(row.expected < row.limit for row in rows) else []

  @property
  def prefix(self) -> Prefix | None:
    """The prefix that some rows share."""
    return next((row.prefix for row in self.slots if row and row.prefix is not None), None)

  # -- what may be done to rows --------------------------------------------------------------

  def admit(
    self,
    request: Request,
    prefix: Prefix,
    prompt: int = 0,
    sample: int = 0,
    *,
    limit: int | None = None,
    forced: int = -1,
    stays: bool = False,
    several: bool = False,
    guide: Guide | None = None,
  ) -> Row:
    """Begin a row in a free slot; its first token is drawn at the next `step`.

    Args:
      prefix: of the request's prompt. With `forced_ids` the row begins after them.
      limit: pause after so many tokens; the request's own limit where it is less.
      forced: id of the first token; -1: drawn.
      several: more rows of this prompt are expected, so they share the prefix instead of copying it where
        that saves time. Rows share one prefix at a time.
      guide: of its tokens, for an engine with `Setup.masks`; then the row never pauses.
    """
    setup, slot = self.engine.setup, self.slots.index(None)
    cap, given = setup.limit(request), len(request.forced_ids)
    limit = given + 1 if guide else limit
    limit = cap if limit is None else min(limit, cap)
    share = several and self.decoder.shares_prefix and setup.may_share(len(request.ids))
    if given and not self.decoder.resumes:
      raise UserError("Speculation cannot begin with forced tokens; leave out forced_ids.")
    share = share and not given and (self.prefix is None or self.prefix is prefix)
    how = {"stop": request.stop_text, "begins": request.begins, "keep_stop": request.keep_stop}
    how["skip"] = len(self.tokenizer.decode_bytes(request.held, True))
    text = StreamDecoder(self.tokenizer, request.show_control, **how)
    shared, own = prefix if share else None, record.own(setup, request.sampler)
    row = Row(prompt, sample, request, text, slot, limit, stays, prefix=shared, own=own)
    row.guide = guide
    row.emitted = given
    row.expected = row.most = given or 1
    for id in request.forced_ids:
      row.text.push(id)
      if guide:
        guide.push(id)
    self._steer()  # what was decided about the slot's last row comes first
    request = dataclasses.replace(request, max_new_tokens=limit)
    self.slots[slot] = row
    if given:
      self.state = self.engine.resume(self.state, prefix, slot, request)
      self._change(row, live=1, limit=limit, forced=forced)
    else:
      self.state = self.engine.insert(self.state, prefix, slot, request, forced, share)
      self._fresh[slot] = row
    self.decoder.inserted(slot, request)
    if guide:
      self._masks[slot], self._lifts[slot] = guide.mask(), guide.lifts
    return row

  def fork(self, row: Row, sample: int, stream: int, limit: int | None = None, forced: int = -1):
    """A row that goes on from where a paused one waits, in a free slot; it goes on at once."""
    slot = self.slots.index(None)
    self._flush()
    seed = row.request.seed
    self.state = self.engine.fork(self.state, row.slot, slot, seed, stream)
    self.decoder.forked(row.slot, slot)
    twin = dataclasses.replace(
      row,
      sample=sample,
      request=dataclasses.replace(row.request, stream=stream),
      text=copy.copy(row.text),
      slot=slot,
    )
    self.slots[slot] = twin
    self.wake(twin, limit, forced)
    return twin

  def wake(self, row: Row, limit: int | None = None, forced: int = -1) -> None:
    """Let a paused row go on.

    Args:
      limit: pause after so many tokens in all; None: only its request's own limit.
    """
    cap = self.engine.setup.limit(row.request)
    row.limit = cap if limit is None else min(limit, cap)
    live = WAKE if row.waits == "fork" else 1
    row.waits = ""
    # The dispatches that were sent while it was paused did not move it.
    for _, rows, _ in self._unread:
      if rows.get(row.slot) is row:
        del rows[row.slot]
    row.expected = row.most = row.emitted
    self._change(row, live=live, limit=row.limit, forced=forced)

  def cancel(self, row: Row) -> None:
    """End a row. Its slot is free at once, and its tokens that were not read yet are dropped."""
    row.done = True
    if self.slots[row.slot] is row:
      self.slots[row.slot] = None
      if self._fresh.get(row.slot) is row:
        del self._fresh[row.slot]
      else:
        self._change(row, live=0, limit=-1, forced=-1)

  def score(self, rows: dict[Row, Sequence[int]], labels: Sequence[int]) -> dict[Row, np.ndarray]:
    """{row: log p of each label, nats} after a suffix, of rows that are paused or have ended."""
    self._flush()
    for row in rows:
      if row.past:
        at = self.state, row.slot, row.request, row.emitted
        self.state = self.engine.rewind(*at, attempt=0, prefix=self.prefix)
        self.decoder.rewound(self.state)
        row.past = False
    suffixes = {row.slot: ids for row, ids in rows.items()}
    longest = max(row.held - row.shared + len(ids) for row, ids in rows.items())
    found = self.engine.score(self.state, longest, suffixes, labels, self.prefix)
    return {row: found[row.slot] for row in rows}

  def prefix_bytes(self, request: Request) -> int:
    """Bytes of the keys and values of a prompt."""
    setup = self.engine.setup
    leaves = jax.tree.leaves(abstract_state(setup).cache)
    slots = setup.config.batch_size * setup.capacity
    return sum(x.dtype.itemsize * math.prod(x.shape) for x in leaves) // slots * len(request.ids)

  def _change(self, row: Row, **values: int) -> None:
    for name, value in values.items():
      self._changes.setdefault(name, {})[row.slot] = value

  def _flush(self) -> None:
    """Send what was put off."""
    self._steer()
    if self._fresh:
      several = not self.engine.setup.varied_rows
      for slots in [[*self._fresh]] if several else [[slot] for slot in self._fresh]:
        self.state, packed = self.engine.first(self.state, slots)
        self._sent(packed, {slot: self._fresh[slot] for slot in slots}, (1, 1))
      self.decoder.first()
      self._fresh = {}

  def _steer(self) -> None:
    if self._changes or self._masks:
      self.state = self.engine.steer(
        self.state, **self._changes, masks=self._masks, lifts=self._lifts
      )
      self._changes, self._masks, self._lifts = {}, {}, {}

  # -- going on --------------------------------------------------------------------------------

  def step(self) -> Iterator[Token | Pause | Failure]:
    """Send the next dispatch, if any row can go on, and read the oldest one that was sent.

    The caller may change rows between two events. A cancelled row has no further events.
    """
    active = self._active
    if active and not self._fresh and not self._unread:
      self._move_down(active)
    if active or self._fresh:
      self._flush()
    if active:
      longest = max(map(self._covers, active))
      how = self._steps(active)
      expected, most = (1, 1) if how else self.decoder.per_dispatch
      count = max(row.slot for row in active) + 1
      how["rows"] = min(n for n in self.engine.setup.row_counts if n >= count)
      self.state, packed = self.decoder.decode(self.state, longest, self.prefix, **how)
      for row in active:
        row.expected, row.most = row.expected + expected, row.most + most
      self._sent(packed, {row.slot: row for row in active}, (expected, most))
    # Guided rows need what they read, so a dispatch that is sent before would move only some of them.
    ahead = 0 if all(row.guide for row in active) else self.ahead
    while self._unread and (len(self._unread) > ahead or not active):
      packed, rows, (few, many) = self._unread[0]
      before = {slot: row.emitted for slot, row in rows.items()}
      yield from self._read(np.asarray(packed), dict(rows))
      self._unread.popleft()
      for slot, row in rows.items():
        got = row.emitted - before[slot]
        row.expected, row.most = row.expected + got - few, row.most + got - many
        if row.done and not row.stays and self.slots[row.slot] is row:
          self.slots[row.slot] = None

  def _move_down(self, active: list[Row]) -> None:
    """Put rows of the last slots into free ones before them, where the next dispatch can then have fewer rows.

    Nothing may be unread, because what was sent knows rows by their slots. So with `ahead` rows stay where they are, which
    costs little: accelerators take about as long for few rows as for many, because a step reads all weights.
    """
    counts = self.engine.setup.row_counts
    fewer = next(n for n in counts if n >= len(active))
    high = [row for row in active if row.slot >= fewer]
    low = [slot for slot in range(fewer) if self.slots[slot] is None]
    if not high or len(high) > len(low):
      return
    for row, slot in zip(high, low, strict=False):
      self._steer()
      key = row.request.seed, row.request.stream
      self.state = self.engine.fork(self.state, row.slot, slot, *key)
      self.decoder.forked(row.slot, slot)
      self._change(row, live=0, limit=-1, forced=-1)
      self.slots[row.slot], self.slots[slot], row.slot = None, row, slot

  def _steps(self, active: list[Row]) -> dict[str, int]:
    """How many steps the next dispatch has, if not as many as usual."""
    # A guided row has one step per dispatch. Others lose less by short dispatches than it would by long ones.
    return {"steps": 1} if any(row.guide for row in active) else {}

  def _covers(self, row: Row) -> int:
    """Slots of its cache that the next dispatch must read for a row."""
    setup, start = self.engine.setup, row.request.prompt_tokens - row.shared
    return setup.covers(start + min(row.most, row.limit) - 1, start + setup.limit(row.request))

  def _sent(self, packed, rows: dict[int, Row], gives: tuple[int, int]) -> None:
    packed.copy_to_host_async()
    self._unread.append((packed, rows, gives))

  def _read(self, packed: np.ndarray, rows: dict[int, Row]) -> Iterator[Token | Pause | Failure]:
    setup, now = self.engine.setup, self._clock() - self._start
    values = self.engine.unpack(packed.reshape(-1, *packed.shape[-2:]))
    self.decoder.read(values)
    names = record.numbers(setup)
    # Plain Python numbers, all at once: picking them from arrays one by one costs more than a step.
    numbers_NBX = np.stack([values[name] for name in names], axis=-1).tolist()
    ids_NB, branch_NB = values["id"].tolist(), values["branch"].tolist()
    flags_NB = values["flags"].tolist()
    for n in range(len(flags_NB)):
      for i, row in rows.items():
        flags = flags_NB[n][i]
        if row.done or not flags & (record.EMITTED | record.WAITS | record.BROKEN):
          continue
        if flags & record.BROKEN:
          row.done = True
          yield Failure(row.prompt, row.sample, row.emitted, row.text.flush(), now)
          continue
        values_X = numbers_NBX[n][i]
        if row.own is None:
          numbers = dict(zip(names, values_X, strict=True))
        else:
          numbers = {names[x]: values_X[x] for x in row.own}
        few = setup.top if row.request.alternatives else 0
        top = tuple(
          self._alternative(values[f"top_id_{k}"][n, i], values[f"top_logprob_{k}"][n, i])
          for k in range(few)
        )
        if flags & record.WAITS:
          row.waits = "fork"
          yield Pause(row, "fork", numbers, top)
          continue
        yield self._token(row, flags, ids_NB[n][i], branch_NB[n][i], numbers, top, now)
        if row.waits and row.guide:
          yield from self._guided(row, now)
        elif row.waits:
          yield Pause(row, "limit")

  def _guided(self, row: Row, now: float) -> Iterator[Failure]:
    """Let a row have its next token, or end it where its guide fails."""
    if row.done:
      return
    try:
      if row.guide.free:
        row.guide = None
        self._masks[row.slot] = np.zeros((self.engine.setup.mask_words,), np.uint32)
        self.wake(row)
        return
      self._masks[row.slot], self._lifts[row.slot] = row.guide.mask(), row.guide.lifts
      self.wake(row, row.emitted + 1)
    except UserError as error:
      self.cancel(row)
      yield Failure(row.prompt, row.sample, row.emitted, row.text.flush(), now, str(error))

  def _alternative(self, id, logprob) -> tuple[int, str, float]:
    text = self.tokenizer.decode_bytes([int(id)], True).decode("utf-8", "replace")
    return int(id), text, float(logprob)

  def _token(self, row: Row, flags: int, id: int, branch: int, numbers, top, now: float) -> Token:
    """The next token of a row, with everything about the row that follows from it."""
    finish = next((why for flag, why in _ENDS.items() if flags & flag), None)
    row.emitted += 1
    if finish == "length" and row.emitted < self.engine.setup.limit(row.request):
      finish, row.waits = None, "limit"
    if row.guide and finish in (None, "length"):
      row.guide.push(id)
      if row.guide.over:
        finish, row.waits = "stop", ""
    text = "" if flags & record.STOPPED else row.text.push(id)
    if row.text.stopped:
      finish, row.waits, row.past = "stop", "", True
      self._change(row, live=0, limit=-1, forced=-1)
    row.done = finish is not None
    if row.done:
      text += row.text.flush()
    injected = flags & record.INJECTED
    return Token(
      prompt=row.prompt,
      position=row.emitted - 1,
      id=id,
      text=text,
      branch="inject" if injected else self.engine.setup.sampler.BRANCHES[branch],
      numbers=numbers,
      finish=finish,
      seconds=now,
      fork=bool(flags & record.FORK),
      new_pass=not flags & record.LATER,
      drafted=flags >> record.DRAFTED,
      accepted=bool(flags & record.ACCEPTED),
      top=top,
      sample=row.sample,
      forced=bool(flags & record.FORCED),
    )
