"""Several continuations of one prompt: what they have in common, and the loop that runs them.

Why: search and voting are opinions about rows, so they stand above the engine and never inside a step. A
method is a `Group` for one request: it begins rows while there are free ones, looks at every token, may
end, fork or resume rows, and at last chooses. All begin from one prefill. Groups of several requests
share the rows of one engine, and since a row is independent of its neighbours, so are they.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from entropix_jax import sampling
from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.decoding import select
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import Prefix
from entropix_jax.errors import UserError
from entropix_jax.rows import Failure, Pause, Row, Rows, Token
from entropix_jax.scheduler import Job, Scheduler


@dataclasses.dataclass(eq=False)
class Sample:
  """One continuation: a row's tokens, and those of the sample that it was forked from before."""

  row: Row
  index: int  # among the samples of the request
  parent: int | None = None  # index of the sample it was forked from,
  at: int = 0  # before its own token of this index
  tokens: list[Token] = dataclasses.field(default_factory=list)
  finish: str | None = None  # as of a Token or Failure, or "pruned", "cancelled" or "budget"
  score: float | None = None
  error: str | None = None  # one sentence, where it ended with a Failure

  @property
  def text(self) -> str:
    """What it says."""
    return "".join(token.text for token in self.tokens)

  @property
  def own(self) -> int:
    """Tokens it has emitted itself."""
    return len(self.tokens) - self.at

  def candidate(self, start: int = 0) -> select.Candidate:
    """What select.py looks at, from a token onwards."""
    tokens = self.tokens[start:]
    names = tokens[0].numbers if tokens else ()
    return select.Candidate(
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
  rule: str  # the rule that was asked for
  judge: str  # the rule that chose: mean_logprob where the other could not
  chosen: int  # sample
  samples: tuple[Sample, ...]
  scores: tuple[float, ...]  # of each sample under the rule; nan: none
  answers: tuple[str | None, ...]
  votes: dict[str, float]  # answer -> weight; empty where the rule does not vote
  prefix_bytes: int  # keys and values of the prompt
  prefix_copies: int  # at a time, at most: one for all rows that share it, one for each other
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the method

  @property
  def text(self) -> str:
    """The chosen text."""
    return self.samples[self.chosen].text

  @property
  def answer(self) -> str | None:
    """The chosen answer."""
    return self.answers[self.chosen]

  @property
  def error(self) -> str | None:
    """One sentence where even the chosen text ended with an error."""
    return self.samples[self.chosen].error

  @property
  def tokens_total(self) -> int:
    """Tokens that were emitted for it, the chosen text's among them."""
    return sum(sample.own for sample in self.samples)

  @property
  def why(self) -> str:
    """The choice in one line, for people, who count samples from 1."""
    n, score = len(self.samples), self.scores[self.chosen]
    said = f"Sample {self.chosen + 1} of {n}, by "
    if self.votes:
      whole, most = sum(self.votes.values()), self.votes[self.answer]
      tied = [repr(answer) for answer, weight in self.votes.items() if weight == most]
      share = f"{100 * most / whole:.0f}% of the votes"
      if len(tied) > 1:
        return (
          f"{said}{self.rule}: a tie of {', '.join(tied)}, each with {share}; the first is taken."
        )
      return f"{said}{self.rule}: {self.answer!r} holds {share}."
    said += self.judge
    if self.judge != self.rule:
      said += f", because {self.rule} found nothing to choose by"
    return f"{said} ({score:.3g})." if score == score else f"{said}."

  def line(self) -> dict[str, Any]:
    """Its line in a trace."""
    listed = [
      {
        "sample": sample.index,
        "parent": sample.parent,
        "at": sample.at,
        "tokens": sample.own,
        "finish": sample.finish,
        "score": float(f"{score:.6g}") if math.isfinite(score) else None,
        "answer": answer,
      }
      for sample, score, answer in zip(self.samples, self.scores, self.answers, strict=True)
    ]
    return {
      "prompt": self.prompt,
      "method": self.method,
      "rule": self.rule,
      "chosen": self.chosen,
      "samples": listed,
      **self.facts,
    }


class Group(Job):
  """One request and its continuations; a method says what to start and what to make of an event.

  Args:
    request: its stream is that of the first sample; the others' follow.
    config: the method's Config.
    prompt: index of the request.
  """

  method = ""

  def __init__(self, request: Request, config: Any, prompt: int = 0):
    super().__init__(request, prompt)
    self.config = config
    self.samples: list[Sample] = []
    self.outcome: Outcome | None = None
    self.answer = select.answerer(config.answer)
    self.facts: dict[str, Any] = {}
    self._prefix: Prefix | None = None
    self._copies = 0

  @property
  def done(self) -> bool:
    """Whether the choice is made."""
    return self.outcome is not None

  def begin(self, prefix: Prefix) -> None:
    """The prompt has been fed."""
    self._prefix = prefix

  def cancel(self, rows: Rows) -> None:
    """End all samples."""
    for sample in self.samples:
      self.end(rows, sample, "cancelled")

  # -- what a method says --------------------------------------------------------------------

  def fit(self, batch_size: int, sampler: ModuleType) -> None:
    """Told what there is, before `width` is asked for. Raises UserError where that will not do."""

  def start(self, rows: Rows) -> None:
    """Begin what shall begin now; called again whenever something has been read."""
    raise NotImplementedError

  def read(self, rows: Rows, sample: Sample) -> None:
    """A sample has a new token."""

  def paused(self, rows: Rows, sample: Sample, pause: Pause) -> None:
    """A sample waits."""

  # -- what it may do ------------------------------------------------------------------------

  def admit(self, rows: Rows, request: Request, **how: Any) -> Sample:
    """A new sample from the prompt; `how` as of Rows.admit."""
    index = len(self.samples)
    row = rows.admit(request, self._prefix, self.prompt, index, several=True, **how)
    return self._keep(rows, Sample(row, index))

  def draw(self, rows: Rows) -> Sample:
    """A new sample: what a request whose stream is larger by the number of samples so far would get."""
    stream = self.request.stream + len(self.samples)
    return self.admit(rows, dataclasses.replace(self.request, stream=stream))

  def fork(self, rows: Rows, sample: Sample, **how: Any) -> Sample:
    """A new sample that goes on from where one waits; `how` as of Rows.fork."""
    index = len(self.samples)
    row = rows.fork(sample.row, index, self.request.stream + index, **how)
    at = len(sample.tokens)
    return self._keep(rows, Sample(row, index, sample.index, at, list(sample.tokens)))

  def end(self, rows: Rows, sample: Sample, why: str) -> None:
    """End a sample that has not ended; its row is free at once."""
    rows.cancel(sample.row)
    sample.finish = sample.finish or why

  def choose(
    self, rows: Rows, rule: str, candidates: Sequence[select.Candidate], **options: Any
  ) -> None:
    """Make the choice; samples that are still running are cancelled."""
    self.cancel(rows)
    made = select.choose(rule, candidates, self.answer, **options)
    self.outcome = Outcome(
      self.prompt,
      self.method,
      rule,
      made.rule,
      made.index,
      tuple(self.samples),
      made.scores,
      made.answers,
      made.votes,
      rows.prefix_bytes(self.request),
      self._copies,
      self.facts,
    )
    self._prefix = None

  @property
  def running(self) -> list[Sample]:
    """Samples that have not ended."""
    return [sample for sample in self.samples if sample.finish is None]

  def candidates(self) -> list[select.Candidate]:
    """All samples, as select.py takes them."""
    return [sample.candidate() for sample in self.samples]

  def _keep(self, rows: Rows, sample: Sample) -> Sample:
    self.samples.append(sample)
    held = [s.row for s in self.samples if rows.slots[s.row.slot] is s.row]
    alone = sum(row.prefix is None for row in held)
    self._copies = max(self._copies, alone + (alone < len(held)))
    return sample

  def see(self, rows: Rows, event: Token | Pause | Failure) -> None:
    """An event of this group."""
    if isinstance(event, Pause):
      self.paused(rows, self.samples[event.row.sample], event)
      return
    sample = self.samples[event.sample]
    if isinstance(event, Failure):
      sample.finish, sample.error = event.finish, event.why
      event.close(sample.tokens)
      return
    sample.tokens.append(event)
    sample.finish = event.finish
    self.read(rows, sample)


def check_groups(setup: Setup, groups: Sequence[Group]) -> None:
  """Raises UserError when an engine of this setup cannot run the groups; needs no weights."""
  for group in groups:
    check_request(setup, group.request)
    sampler = sampling.kind(setup.sampler, group.request.sampler)
    group.fit(setup.config.batch_size, sampler)
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
  scheduler = Scheduler(Rows(engine, tokenizer, clock, decoder=decoder))
  for group in groups:
    scheduler.submit(group)
  while scheduler.busy:
    for _, event in scheduler.step():
      if isinstance(event, Token):
        yield event
    for group in scheduler.ended:
      yield group.outcome
