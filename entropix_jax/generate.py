"""The host loop: requests in, a stream of tokens out, with the device always one dispatch ahead.

Why: reading a result waits for the device, so the next dispatch is sent before the last one is read.
The price is that a row which stops early runs on, masked, for at most one more dispatch.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from entropix_jax.engine import (
  ACCEPTED,
  DRAFTED,
  EMITTED,
  EXHAUSTED,
  FORK,
  INJECTED,
  LATER,
  STOPPED,
  UNCERTAIN,
  Engine,
  Request,
  check,
)
from entropix_jax.tokenizer import StreamDecoder, Tokenizer


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


@dataclasses.dataclass
class _Run:
  index: int
  request: Request
  text: StreamDecoder
  emitted: int = 0
  least: int = 0  # tokens after the dispatches that were sent, the unread ones included,
  most: int = 0  # if the row does not end
  done: bool = False


def generate(
  engine: Engine,
  tokenizer: Tokenizer,
  requests: Sequence[Request],
  clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Token]:
  """Run all requests, as many at a time as the engine has rows; yields tokens as they are read.

  Tokens of one request come in order; those of different requests interleave. A request is
  independent of all others: its text is the same alone.

  Raises:
    UserError: a request that the engine cannot run; checked for all before any work.
  """
  for request in requests:
    check(engine.cfg, engine.config, engine.sampler, request)
  start = clock()
  queue = collections.deque(
    _Run(i, request, StreamDecoder(tokenizer)) for i, request in enumerate(requests)
  )
  slots: list[_Run | None] = [None] * engine.config.batch_size
  unread: collections.deque = collections.deque()
  state = engine.init()

  while queue or unread or any(slots):
    for slot in range(len(slots)):
      if slots[slot] is None and queue:
        run = slots[slot] = queue.popleft()
        row, record = engine.prefill(run.request)
        state = engine.insert(state, row, slot)
        record.copy_to_host_async()
        run.least = run.most = 1
        unread.append((record, {0: run}, (1, 1)))

    active = {i: r for i, r in enumerate(slots) if r and r.least < engine.limit(r.request)}
    if active:
      longest = max(len(run.request.ids) + run.most - 1 for run in active.values())
      least, most = engine.per_dispatch
      state, record = engine.decode(state, longest)
      record.copy_to_host_async()
      for run in active.values():
        run.least, run.most = run.least + least, run.most + most
      unread.append((record, active, (least, most)))

    while unread and (len(unread) > 1 or not active):
      record, rows, (few, many) = unread.popleft()
      before = {run.index: run.emitted for run in rows.values()}
      yield from _read(engine, tokenizer, np.asarray(record), rows, clock() - start)
      for run in rows.values():
        got = run.emitted - before[run.index]
        run.least, run.most = run.least + got - few, run.most + got - many
      slots = [None if run and run.done else run for run in slots]


def _read(
  engine: Engine, tokenizer: Tokenizer, record: np.ndarray, rows: dict[int, _Run], now: float
) -> Iterator[Token]:
  values = engine.unpack(record.reshape(-1, *record.shape[-2:]))
  ends = {STOPPED: "stop", EXHAUSTED: "length", UNCERTAIN: "uncertain"}
  flags_NB = values["flags"]
  for n in range(len(flags_NB)):
    for row, run in rows.items():
      flags = int(flags_NB[n, row])
      if not flags & EMITTED or run.done:
        continue
      token = int(values["id"][n, row])
      finish = next((why for flag, why in ends.items() if flags & flag), None)
      run.done = finish is not None
      text = "" if flags & STOPPED else run.text.push(token)
      if run.done:
        text += run.text.flush()
      run.emitted += 1
      branch = engine.sampler.BRANCHES[int(values["branch"][n, row])]
      yield Token(
        prompt=run.index,
        position=run.emitted - 1,
        id=token,
        text=text,
        branch="inject" if flags & INJECTED else branch,
        numbers={name: float(values[name][n, row]) for name in engine.numbers},
        finish=finish,
        seconds=now,
        fork=bool(flags & FORK),
        new_pass=not flags & LATER,
        drafted=flags >> DRAFTED,
        accepted=bool(flags & ACCEPTED),
        top=tuple(
          (int(i), tokenizer.decode_bytes([int(i)], True).decode("utf-8", "replace"), float(x))
          for i, x in (
            (values[f"top_id_{k}"][n, row], values[f"top_logprob_{k}"][n, row])
            for k in range(engine.top)
          )
        ),
      )
