"""Several continuations of one prompt: what they have in common, and the loop that runs them.

Why: search and voting are opinions about rows, so they stand above the engine and never inside a step. A
method is a `Group` for one request: it begins rows while there are free ones, looks at every token, may
end, fork or resume rows, and at last chooses. All begin from one prefill. Groups of several requests
share the rows of one engine, and since a row is independent of its neighbours, so are they.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.decoding import select
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.setup import Setup
from entropix_jax.errors import UserError
from entropix_jax.generate import Pause, Row, Rows, Token


@dataclasses.dataclass(eq=False)
class Stream:
  """One continuation: a row's tokens, and those of the stream that it was forked from before."""

  row: Row
  sample: int
  parent: int | None = None  # the sample it was forked from,
  at: int = 0  # before its own token of this index
  tokens: list[Token] = dataclasses.field(default_factory=list)
  finish: str | None = None  # as of a Token, or "pruned", "cancelled" or "budget"
  score: float | None = None

  @property
  def text(self) -> str:
    """What it says."""
    return "".join(token.text for token in self.tokens)

  @property
  def own(self) -> int:
    """Tokens it has emitted itself."""
    return len(self.tokens) - self.at

  def sample_from(self, start: int = 0) -> select.Sample:
    """What select.py looks at, from a token on."""
    tokens = self.tokens[start:]
    names = tokens[0].numbers if tokens else ()
    return select.Sample(
      text="".join(token.text for token in tokens),
      pieces=tuple(token.text for token in tokens),
      numbers={name: np.asarray([t.numbers[name] for t in tokens], np.float64) for name in names},
      finish=self.finish,
      score=self.score,
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a request."""

  prompt: int  # index of the request
  method: str
  rule: str  # that the choice was made by
  chosen: int  # sample
  streams: tuple[Stream, ...]  # by sample
  scores: tuple[float, ...]  # of each sample under the rule; nan: none
  answers: tuple[str | None, ...]
  votes: dict[str, float]  # answer -> weight; empty where the rule does not vote
  prefix_bytes: int  # keys and values of the prompt
  prefix_copies: int  # at a time, at most: one for all rows that share it, one for each other
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the method

  @property
  def text(self) -> str:
    """The chosen text."""
    return self.streams[self.chosen].text

  @property
  def answer(self) -> str | None:
    """The chosen answer."""
    return self.answers[self.chosen]

  @property
  def tokens_total(self) -> int:
    """Tokens that were emitted for it, the chosen text's among them."""
    return sum(stream.own for stream in self.streams)

  @property
  def why(self) -> str:
    """The choice in one line, for people."""
    n, score = len(self.streams), self.scores[self.chosen]
    said = f"Sample {self.chosen} of {n}, by {self.rule}"
    if self.votes:
      whole = sum(self.votes.values())
      said += f": {self.answer!r} holds {100 * self.votes[self.answer] / whole:.0f}% of the votes"
    elif score == score:
      said += f" ({score:.3g})"
    return said + "."

  def line(self) -> dict[str, Any]:
    """Its line in a trace."""
    samples = [
      {
        "sample": stream.sample,
        "parent": stream.parent,
        "at": stream.at,
        "tokens": stream.own,
        "finish": stream.finish,
        "score": None if score != score else float(f"{score:.6g}"),
        "answer": answer,
      }
      for stream, score, answer in zip(self.streams, self.scores, self.answers, strict=True)
    ]
    return {
      "prompt": self.prompt,
      "method": self.method,
      "rule": self.rule,
      "chosen": self.chosen,
      "samples": samples,
      **self.facts,
    }


class Group:
  """One request and its continuations; a method says what to start and what to make of an event.

  Args:
    request: its stream is that of the first sample; the others' follow.
    config: the method's Config.
    prompt: index of the request.
  """

  method = ""
  width = 1  # rows that it must be able to hold at once

  def __init__(self, request: Request, config: Any, prompt: int = 0):
    self.request, self.config, self.prompt = request, config, prompt
    self.streams: list[Stream] = []
    self.outcome: Outcome | None = None
    self.answer = select.answerer(config.answer)
    self.facts: dict[str, Any] = {}
    self._prefix: Any = None
    self._copies = 0

  # -- what a method says --------------------------------------------------------------------

  def fit(self, batch_size: int, sampler: ModuleType) -> None:
    """Told what there is, before `width` is asked for. Raises UserError where that will not do."""

  def start(self, rows: Rows) -> None:
    """Begin what shall begin now; called again whenever something has been read."""
    raise NotImplementedError

  def read(self, rows: Rows, stream: Stream) -> None:
    """A stream has a new token."""

  def paused(self, rows: Rows, stream: Stream, pause: Pause) -> None:
    """A stream waits."""

  # -- what it may do ------------------------------------------------------------------------

  def admit(self, rows: Rows, request: Request, **how: Any) -> Stream:
    """A new stream from the prompt; `how` as of Rows.admit."""
    if self._prefix is None:
      self._prefix = rows.prefill(self.request)
    sample = len(self.streams)
    row = rows.admit(request, self._prefix, self.prompt, sample, several=True, **how)
    return self._keep(rows, Stream(row, sample))

  def draw(self, rows: Rows) -> Stream:
    """A new sample: what a request whose stream is larger by the number of samples so far would get."""
    stream = self.request.stream + len(self.streams)
    return self.admit(rows, dataclasses.replace(self.request, stream=stream))

  def fork(self, rows: Rows, stream: Stream, **how: Any) -> Stream:
    """A new stream that goes on from where one waits; `how` as of Rows.fork."""
    sample = len(self.streams)
    row = rows.fork(stream.row, sample, self.request.stream + sample, **how)
    at = len(stream.tokens)
    return self._keep(rows, Stream(row, sample, stream.sample, at, list(stream.tokens)))

  def end(self, rows: Rows, stream: Stream, why: str) -> None:
    """End a stream that has not ended; its row is free at once."""
    rows.cancel(stream.row)
    stream.finish = stream.finish or why

  def choose(self, rows: Rows, rule: str, samples: Sequence[select.Sample], **options: Any) -> None:
    """Make the choice; samples that are still running are cancelled."""
    for stream in self.streams:
      self.end(rows, stream, "cancelled")
    made = select.choose(rule, samples, self.answer, **options)
    self.outcome = Outcome(
      self.prompt,
      self.method,
      rule,
      made.index,
      tuple(self.streams),
      made.scores,
      made.answers,
      made.votes,
      rows.prefix_bytes(self.request),
      self._copies,
      self.facts,
    )
    self._prefix = None

  @property
  def running(self) -> list[Stream]:
    """Streams that have not ended."""
    return [stream for stream in self.streams if stream.finish is None]

  def samples(self) -> list[select.Sample]:
    """All streams, as select.py wants them."""
    return [stream.sample_from() for stream in self.streams]

  def _keep(self, rows: Rows, stream: Stream) -> Stream:
    self.streams.append(stream)
    held = [s.row for s in self.streams if rows.slots[s.row.slot] is s.row]
    alone = sum(row.prefix is None for row in held)
    self._copies = max(self._copies, alone + (alone < len(held)))
    return stream

  def see(self, rows: Rows, event: Token | Pause) -> None:
    """An event of this group."""
    if isinstance(event, Pause):
      self.paused(rows, self.streams[event.row.sample], event)
      return
    stream = self.streams[event.sample]
    stream.tokens.append(event)
    stream.finish = event.finish
    self.read(rows, stream)


def check_groups(setup: Setup, groups: Sequence[Group]) -> None:
  """Raises UserError when an engine of this setup cannot run the groups; needs no weights."""
  for group in groups:
    check_request(setup, group.request)
    group.fit(setup.config.batch_size, setup.sampler)
    if group.width > setup.config.batch_size:
      raise UserError(
        f"The method {group.method} holds {group.width} rows at once and config.engine.batch_size is "
        f"{setup.config.batch_size}; raise that, or ask for fewer ways."
      )


def run(
  engine: Engine,
  tokenizer: Tokenizer,
  groups: Sequence[Group],
  clock: Callable[[], float] = time.perf_counter,
  decoder: PlainDecoder | None = None,
) -> Iterator[Token | Outcome]:
  """Run groups to their outcomes, several at a time where there are rows; tokens as they are read.

  Raises:
    UserError: as `check_groups`, before any work.
  """
  check_groups(engine.setup, groups)
  rows = Rows(engine, tokenizer, clock, decoder=decoder)
  queue = collections.deque(groups)
  active: list[Group] = []
  by_prompt = {group.prompt: group for group in groups}
  while queue or active:
    for group in active:
      group.start(rows)
    while queue and _fits(rows, active, queue[0]):
      active.append(queue.popleft())
      active[-1].start(rows)
    for event in rows.step():
      token = isinstance(event, Token)
      if token:
        yield event
      by_prompt[event.prompt if token else event.row.prompt].see(rows, event)
    for group in active:
      if group.outcome:
        yield group.outcome
    active = [group for group in active if not group.outcome]


def _fits(rows: Rows, active: list[Group], group: Group) -> bool:
  reserved = sum(other.width for other in active) + group.width
  return rows.free > 0 and reserved <= rows.engine.setup.config.batch_size
