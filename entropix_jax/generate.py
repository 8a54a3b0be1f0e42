"""The host's side of a generation: who sits in which row, what was sent to the device and what was read.

Why: reading a result waits for the device, so the next dispatch is sent before the last one is read.
The price is that a row which stops early runs on, masked, for at most one more dispatch.

`Rows` has no opinion about what should happen next. `generate` is the plainest one: every request once,
to its end. The others are in decoding/.
"""

import collections
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer
from entropix_jax.engine.engine import (
  ACCEPTED,
  DRAFTED,
  EMITTED,
  EXHAUSTED,
  FORCED,
  FORK,
  INJECTED,
  LATER,
  STOPPED,
  UNCERTAIN,
  WAITS,
  WAKE,
  Engine,
  Prefix,
  Request,
  check,
)
from entropix_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Token:
  """One emitted token of one request."""

  prompt: int  # index of the request
  position: int  # 0 for the first generated token
  id: int
  text: str  # what became readable with this token; a character may need several tokens
  branch: str  # of the sampler, or "inject"
  numbers: dict[str, float]  # logprob, entropy, attention statistics, sampler knobs: engine.numbers
  finish: str | None  # "stop", "length" or "uncertain" on the last token
  seconds: float  # since the generation began, when the host saw it
  fork: bool = False  # marked as a place to try several continuations
  new_pass: bool = True  # the first of a forward pass of the model
  drafted: int = 0  # tokens that a drafter had guessed for that pass
  accepted: bool = False  # it had been guessed
  top: tuple[tuple[int, str, float], ...] = ()  # (id, text, logprob) of the likeliest, raw model
  sample: int = 0  # which of several continuations of the prompt
  forced: bool = False  # chosen by who decodes and not drawn

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


@dataclasses.dataclass(eq=False)
class Row:
  """One continuation of one prompt, in a slot until it is done."""

  prompt: int
  sample: int
  request: Request
  text: StreamDecoder
  slot: int
  limit: int  # tokens it may emit as things stand
  stays: bool = False  # in its slot when it ends, until it is cancelled: it will be scored
  emitted: int = 0
  expected: int = 0  # tokens after the dispatches that were sent, the unread ones included,
  most: int = 0  # and the most they can be
  common: Prefix | None = None  # holds its prompt, for it and others; None: it has a copy
  waits: str = ""  # why it is paused: "fork" or "limit"
  past: bool = False  # the device went on behind the end: only the host reads text
  done: bool = False

  @property
  def held(self) -> int:
    """Tokens of it in the cache."""
    return len(self.request.ids) + max(self.emitted - 1, 0)

  @property
  def shared(self) -> int:
    """Tokens of it that it has in common with other rows."""
    return 0 if self.common is None else len(self.request.ids) - 1


class Rows:
  """The rows of an engine.

  Args:
    ahead: dispatches that may be sent before one is read; 0 for who must decide before the next is sent.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    clock: Callable[[], float] = time.perf_counter,
    ahead: int = 1,
  ):
    self.engine, self.tokenizer, self.ahead = engine, tokenizer, ahead
    self.state = engine.init()
    self.slots: list[Row | None] = [None] * engine.config.batch_size
    self.prefills = 0  # prompts fed
    self._unread: collections.deque = collections.deque()
    # Rows of groups that are to join: (row, prefix, request, forced). All of a prompt go in one dispatch.
    self._joining: list[tuple[Row, Prefix, Request, int]] = []
    self._changes: dict[str, dict[int, int]] = {}
    self._clock, self._start = clock, clock()

  @property
  def free(self) -> int:
    """Slots that nobody sits in."""
    return self.slots.count(None)

  @property
  def busy(self) -> bool:
    """Whether `step` has anything to send or to read."""
    return bool(self._unread or self._joining or self._active)

  @property
  def _active(self) -> list[Row]:
    """Rows that a dispatch may move; none where all of them are expected to be at their limits."""
    rows = [row for row in self.slots if row and not row.done and not row.waits]
    return rows if any(row.expected < row.limit for row in rows) else []

  @property
  def common(self) -> Prefix | None:
    """The prefix that some rows have in common."""
    return next((row.common for row in self.slots if row and row.common is not None), None)

  @property
  def _sharing(self) -> dict[str, Prefix]:
    return {} if self.common is None else {"common": self.common}

  # -- what may be done to rows --------------------------------------------------------------

  def prefill(self, request: Request) -> Prefix:
    """Feed a prompt, once for all rows that will be admitted with it."""
    self.prefills += 1
    return self.engine.prefill(request)

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
    shares: bool = False,
  ) -> Row:
    """Begin a row in a free slot.

    Args:
      prefix: of the request's prompt.
      limit: pause after so many tokens; the request's own limit where it is less.
      forced: id of the first token; -1: drawn.
      shares: more rows of this prompt are to be expected: they begin together, at the next dispatch, and
        do without copies of the prefix where that is worth it; rows have one in common at a time.
    """
    slot = self.slots.index(None)
    cap = self.engine.limit(request)
    limit = cap if limit is None else min(limit, cap)
    text = StreamDecoder(self.tokenizer, stop=request.stop_text)
    row = Row(prompt, sample, request, text, slot, limit, stays)
    row.expected = row.most = 1
    free = self.common is None or self.common is prefix
    joins = shares and free and self.engine.may_share(len(request.ids))
    row.common = prefix if joins else None
    self._steer()
    if limit < cap:
      request = dataclasses.replace(request, max_new_tokens=limit)
    self.slots[slot] = row
    if shares:
      self._joining.append((row, prefix, request, forced))
      return row
    self.state, record = self.engine.insert(self.state, prefix, slot, request, forced)
    self._sent(record, {0: row}, (1, 1))
    return row

  def fork(self, row: Row, sample: int, stream: int, limit: int | None = None, forced: int = -1):
    """A row that goes on from where a paused one waits, in a free slot; it goes on at once."""
    slot = self.slots.index(None)
    self._flush()
    seed = row.request.seed
    self.state = self.engine.fork(self.state, row.slot, slot, seed, stream)
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
    cap = self.engine.limit(row.request)
    row.limit = cap if limit is None else min(limit, cap)
    live = WAKE if row.waits == "fork" else 1
    row.waits = ""
    # It has slept through whatever was sent meanwhile.
    for _, rows, _ in self._unread:
      if rows.get(row.slot) is row:
        del rows[row.slot]
    row.expected = row.most = row.emitted
    self._change(row, live=live, limit=row.limit, forced=forced)

  def cancel(self, row: Row) -> None:
    """End a row; its slot is free at once, and what it was sent for is not read."""
    row.done = True
    if self.slots[row.slot] is row:
      self.slots[row.slot] = None
      joining = [one for one in self._joining if one[0] is not row]
      if len(joining) == len(self._joining):
        self._change(row, live=0, limit=-1, forced=-1)
      self._joining = joining

  def score(self, rows: dict[Row, Sequence[int]], labels: Sequence[int]) -> dict[Row, np.ndarray]:
    """{row: log p of each label, nats} behind a suffix, of rows that are paused or have ended."""
    self._flush()
    for row in rows:
      if row.past:
        at = self.state, row.slot, row.request, row.emitted
        self.state = self.engine.rewind(*at, attempt=0, **self._sharing)
        row.past = False
    suffixes = {row.slot: ids for row, ids in rows.items()}
    longest = max(row.held - row.shared + len(ids) for row, ids in rows.items())
    found = self.engine.score(self.state, longest, suffixes, labels, **self._sharing)
    return {row: found[row.slot] for row in rows}

  def prefix_bytes(self, request: Request) -> int:
    """Bytes of the keys and values of a prompt."""
    leaves = jax.tree.leaves(self.engine.abstract_state().cache)
    slots = self.engine.config.batch_size * self.engine.capacity
    return sum(x.dtype.itemsize * math.prod(x.shape) for x in leaves) // slots * len(request.ids)

  def _change(self, row: Row, **values: int) -> None:
    for name, value in values.items():
      self._changes.setdefault(name, {})[row.slot] = value

  def _flush(self) -> None:
    """Send what was put off."""
    while self._joining:
      first, prefix, *_ = self._joining[0]
      rows, requests, forced, later = {}, {}, {}, []
      for one in self._joining:
        row, text, request, id = one
        if text is prefix and row.common is first.common:
          rows[row.slot], requests[row.slot], forced[row.slot] = row, request, id
        else:
          later.append(one)
      self._joining = later
      shares = first.common is not None
      self.state, record = self.engine.join(self.state, prefix, requests, forced, shares)
      self._sent(record, rows, (1, 1))
    self._steer()

  def _steer(self) -> None:
    if self._changes:
      self.state = self.engine.steer(self.state, **self._changes)
      self._changes = {}

  # -- going on --------------------------------------------------------------------------------

  def step(self) -> Iterator[Token | Pause]:
    """Send the next dispatch, if any row can go on, and read the oldest one that has been sent.

    Rows may be treated between two events: of a row that has been cancelled there are no more.
    """
    active = self._active
    if active or self._joining:
      self._flush()
    if active:
      longest = max(
        len(row.request.ids) - row.shared + min(row.most, row.limit) - 1 for row in active
      )
      expected, most = self.engine.per_dispatch
      self.state, record = self.engine.decode(self.state, longest, **self._sharing)
      for row in active:
        row.expected, row.most = row.expected + expected, row.most + most
      self._sent(record, {row.slot: row for row in active}, (expected, most))
    while self._unread and (len(self._unread) > self.ahead or not active):
      record, rows, (few, many) = self._unread[0]
      before = {slot: row.emitted for slot, row in rows.items()}
      yield from self._read(np.asarray(record), dict(rows))
      self._unread.popleft()
      for slot, row in rows.items():
        got = row.emitted - before[slot]
        row.expected, row.most = row.expected + got - few, row.most + got - many
        if row.done and not row.stays and self.slots[row.slot] is row:
          self.slots[row.slot] = None

  def _sent(self, record, rows: dict[int, Row], gives: tuple[int, int]) -> None:
    record.copy_to_host_async()
    self._unread.append((record, rows, gives))

  def _read(self, record: np.ndarray, rows: dict[int, Row]) -> Iterator[Token | Pause]:
    engine, now = self.engine, self._clock() - self._start
    values = engine.unpack(record.reshape(-1, *record.shape[-2:]))
    # Plain Python numbers, all at once: picking them from arrays one by one costs more than a step.
    numbers_NBX = np.stack([values[name] for name in engine.numbers], axis=-1).tolist()
    ids_NB, branch_NB = values["id"].tolist(), values["branch"].tolist()
    ends = {STOPPED: "stop", EXHAUSTED: "length", UNCERTAIN: "uncertain"}
    flags_NB = values["flags"].tolist()
    for n in range(len(flags_NB)):
      for i, row in rows.items():
        flags = flags_NB[n][i]
        if row.done or not flags & (EMITTED | WAITS):
          continue
        numbers = dict(zip(engine.numbers, numbers_NBX[n][i], strict=True))
        top = tuple(
          (int(k), self.tokenizer.decode_bytes([int(k)], True).decode("utf-8", "replace"), float(x))
          for k, x in (
            (values[f"top_id_{k}"][n, i], values[f"top_logprob_{k}"][n, i])
            for k in range(engine.top)
          )
        )
        if flags & WAITS:
          row.waits = "fork"
          yield Pause(row, "fork", numbers, top)
          continue
        finish = next((why for flag, why in ends.items() if flags & flag), None)
        token = ids_NB[n][i]
        row.emitted += 1
        if finish == "length" and row.emitted < engine.limit(row.request):
          finish, row.waits = None, "limit"
        text = "" if flags & STOPPED else row.text.push(token)
        if row.text.stopped:
          finish, row.waits, row.past = "stop", "", True
          self._change(row, live=0, limit=-1, forced=-1)
        row.done = finish is not None
        if row.done:
          text += row.text.flush()
        branch = engine.sampler.BRANCHES[branch_NB[n][i]]
        yield Token(
          prompt=row.prompt,
          position=row.emitted - 1,
          id=token,
          text=text,
          branch="inject" if flags & INJECTED else branch,
          numbers=numbers,
          finish=finish,
          seconds=now,
          fork=bool(flags & FORK),
          new_pass=not flags & LATER,
          drafted=flags >> DRAFTED,
          accepted=bool(flags & ACCEPTED),
          top=top,
          sample=row.sample,
          forced=bool(flags & FORCED),
        )
        if row.waits:
          yield Pause(row, "limit")


def generate(
  engine: Engine,
  tokenizer: Tokenizer,
  requests: Sequence[Request],
  clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Token]:
  """Run all requests, as many at a time as the engine has rows; yields tokens as they are read.

  A prompt that follows itself is fed once.

  Tokens of one request come in order; those of different requests interleave. A request is
  independent of all others: its text is the same alone.

  Raises:
    UserError: a request that the engine cannot run; checked for all before any work.
  """
  for request in requests:
    check(engine.cfg, engine.config, engine.sampler, request)
    if request.actions.get("fork_wait"):
      raise UserError("fork_wait is for decoding methods that fork; here nobody would go on.")
  rows = Rows(engine, tokenizer, clock)
  queue = collections.deque(enumerate(requests))
  before, prefix = None, None
  while queue or rows.busy:
    while queue and rows.free:
      i, request = queue.popleft()
      prompt = (request.ids, request.beside)
      if prompt != before:
        before, prefix = prompt, rows.prefill(request)
      rows.admit(request, prefix, i)
    yield from rows.step()
