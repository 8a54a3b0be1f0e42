"""The scheduler: jobs wait in a queue, their prompts are fed between dispatches, and rows that end make room for the next.

Why: a prompt of thousands of tokens must not stop the texts that are being written, and a row that has ended
must not stay empty while requests wait. So a round is one dispatch of all rows and at most `budget` prompt tokens.

`generate` submits every request once. The methods of `decoding/` are jobs with several rows, and the server submits
jobs as they come. It knows tokens and rows, and nothing of how rows keep their keys and values.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.feeding import Feeding
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.state import Prefix
from entropix_jax.errors import UserError
from entropix_jax.prefix_store import PrefixStore
from entropix_jax.rows import Failure, Guide, Pause, Row, Rows, Token

# A round may feed `budget * min(1 + _HASTE * waiting prompts / busy rows, _MOST)` tokens.
_HASTE, _MOST = 3.0, 4.0


class Job:
  """A prompt and the rows that continue it.

  Args:
    request: of the first row.
    prompt: a number of its own, which its tokens carry.
  """

  width = 1  # rows that it must be able to hold at once
  salt = ""  # jobs with different ones share no keys and values
  # Alternatives to report for each token of the prompt; None: the prompt is not scored.
  score: int | None = None

  def __init__(self, request: Request, prompt: int = 0):
    self.request, self.prompt = request, prompt
    self.cached = 0  # tokens of the prompt that need not be fed
    self.taken = 0.0  # when it left the queue, by time.monotonic
    self.scores: Sequence[tuple[jax.Array, ...]] = ()  # of the prompt, see `Feeding.scores`

  @property
  def done(self) -> bool:
    """Whether nothing is left to do."""
    raise NotImplementedError

  def begin(self, prefix: Prefix) -> None:
    """The prompt has been fed."""
    raise NotImplementedError

  def start(self, rows: Rows) -> None:
    """Begin what shall begin now; called after `begin`, and again in each round."""
    raise NotImplementedError

  def see(self, rows: Rows, event: Token | Pause | Failure) -> None:
    """Something happened to one of its rows."""
    raise NotImplementedError

  def cancel(self, rows: Rows) -> None:
    """End all of its rows."""
    raise NotImplementedError


class Samples(Job):
  """n continuations of a request, which differ in their streams, each to its end.

  Args:
    guide: makes the guide of each.
  """

  def __init__(
    self,
    request: Request,
    prompt: int = 0,
    n: int = 1,
    guide: Callable[[], Guide] | None = None,
  ):
    super().__init__(request, prompt)
    self._guide = guide
    self.n, self._begun, self._ended = n, 0, 0
    self.width = min(n, 1)
    self._prefix: Prefix | None = None
    self._rows: list[Row] = []

  @property
  def done(self) -> bool:
    """Whether all have ended."""
    return self._ended == self.n

  def begin(self, prefix: Prefix) -> None:
    """The prompt has been fed."""
    self._prefix = prefix

  def start(self, rows: Rows) -> None:
    """Begin as many as there are free rows."""
    while rows.free and self._begun < self.n:
      stream = self.request.stream + self._begun
      request = dataclasses.replace(self.request, stream=stream)
      how = {"several": self.n > 1, "guide": self._guide() if self._guide else None}
      row = rows.admit(request, self._prefix, self.prompt, self._begun, **how)
      self._rows.append(row)
      self._begun += 1
    if self._begun == self.n:
      self._prefix = None

  def see(self, rows: Rows, event: Token | Pause | Failure) -> None:
    """Count those that have ended."""
    self._ended += getattr(event, "finish", None) is not None

  def cancel(self, rows: Rows) -> None:
    """End all of its rows."""
    for row in self._rows:
      if not row.done:
        rows.cancel(row)


class Scheduler:
  """A queue of jobs before the rows of an engine.

  Args:
    budget: prompt tokens to feed in a round; a round feeds one piece at least. Where several
      prompts wait and rows are free, up to _MOST times as many. None: all.
    store: where beginnings of prompts are kept; None: nowhere.
  """

  def __init__(self, rows: Rows, budget: int | None = None, store: PrefixStore | None = None):
    self.rows, self.budget, self.store = rows, budget, store
    self.waiting: collections.deque[Job] = collections.deque()
    self.active: list[Job] = []  # their prompts have been fed
    self.feeding: tuple[Job, Feeding] | None = None
    self._keys: list[bytes] = []  # of its pieces that may be kept
    self.ended: list[Job] = []  # in the last round
    self.prefills = 0  # prompts fed
    self._by_prompt: dict[int, Job] = {}
    # The prompt that was fed last; a job with the same one need not feed it again.
    self._last: tuple[Any, Prefix] | None = None

  @property
  def busy(self) -> bool:
    """Whether `step` has anything to do."""
    return bool(self.waiting or self.active or self.feeding or self.rows.busy)

  def submit(self, job: Job) -> None:
    """Queue a job; its `prompt` is a number that no other job of the queue or the rows has."""
    self.waiting.append(job)

  def cancel(self, job: Job) -> str:
    """End a job: its rows are free at once. The phase that it was in: "queued", "prefill", "decode" or "done"."""
    if job in self.waiting:
      self.waiting.remove(job)
      return "queued"
    if self.feeding and self.feeding[0] is job:
      self.feeding = None
      return "prefill"
    if job not in self.active:
      return "done"
    job.cancel(self.rows)
    self._end(job)
    return "decode"

  def step(self) -> Iterator[tuple[Job, Token | Pause | Failure]]:
    """One round: begin what can begin, feed prompts, send a dispatch and read an older one.

    The caller may submit and cancel jobs between two events. After the last one `ended` has the jobs that are done.
    """
    for job in self.active:
      job.start(self.rows)
    self._feed()
    for event in self.rows.step():
      prompt = event.row.prompt if isinstance(event, Pause) else event.prompt
      if job := self._by_prompt.get(prompt):
        job.see(self.rows, event)
        yield job, event
    self.ended = [job for job in self.active if job.done]
    for job in self.ended:
      self._end(job)

  def _end(self, job: Job) -> None:
    self.active.remove(job)
    del self._by_prompt[job.prompt]

  def _feed(self) -> None:
    """Feed prompts up to the budget, and begin the jobs whose prompts are whole."""
    fed = 0
    while self.feeding or (self.waiting and self._fits(self.waiting[0])):
      if self.feeding is None and not self._next():
        continue
      if fed and self.budget is not None and fed >= self._allowed:
        return
      job, feeding = self.feeding
      fed += feeding.feed()
      self._keep(job, feeding)
      if feeding.prefix is not None:
        self.feeding = None
        self.prefills += 1
        self._last = None if feeding.scored else (self._prompt(job), feeding.prefix)
        job.scores = feeding.scores
        self._begin(job, feeding.prefix)

  @property
  def _allowed(self) -> float:
    """Prompt tokens that may be fed in this round.

    A dispatch takes about as long for few rows as for many. So where prompts wait although rows are free, more are fed.
    """
    slots, free = len(self.rows.slots), self.rows.free
    waiting = min(free, len(self.waiting))
    return self.budget * min(1 + _HASTE * waiting / max(slots - free, 1), _MOST)

  def _next(self) -> bool:
    """Take the first job from the queue; whether its prompt must be fed."""
    job = self.waiting.popleft()
    job.taken = time.monotonic()
    if job.score is None and self._last and self._last[0] == self._prompt(job):
      job.cached = len(job.request.ids)
      self._begin(job, self._last[1])
      return False
    self._last = None
    scored = job.score is not None
    self._keys, known = [], []
    # Scored prompts are fed by another program, which may round otherwise [n32].
    if self.store is not None and not scored:
      self._keys = self.store.keys(job.request.ids, job.salt)
      known = self.store.find(self._keys, len(job.request.ids))
    job.cached = sum(piece.capacity for piece in known)
    self.feeding = job, Feeding(self.rows.engine, job.request, known, scored)
    return True

  def _prompt(self, job: Job) -> tuple:
    return job.request.ids, job.request.beside, job.salt

  def _keep(self, job: Job, feeding: Feeding) -> None:
    if not self._keys:
      return
    end = feeding.at or len(job.request.ids)
    keys = self._keys[: end // self.store.tokens]
    if end % self.store.tokens == 0 and keys[-1] not in self.store:
      piece = feeding.kept()
      if piece is not None:
        self.store.add(keys, piece)

  def _begin(self, job: Job, prefix: Prefix) -> None:
    self.active.append(job)
    self._by_prompt[job.prompt] = job
    job.begin(prefix)
    job.start(self.rows)

  def _fits(self, job: Job) -> bool:
    """Whether the rows can hold a job beside those that are active."""
    reserved = sum(other.width for other in self.active) + job.width
    return not job.width or (self.rows.free > 0 and reserved <= len(self.rows.slots))


def generate(
  engine: Engine,
  tokenizer: Tokenizer,
  requests: Sequence[Request],
  clock: Callable[[], float] = time.perf_counter,
  decoder: PlainDecoder | None = None,
  guides: Sequence[Callable[[], Guide] | None] = (),
) -> Iterator[Token | Failure]:
  """Run all requests, as many at a time as the engine has rows; yields tokens as they are read.

  A text that ends with an error ends with a Failure instead of a last token.

  Consecutive requests with the same prompt share one prefill.

  Tokens of one request come in order; those of different requests interleave. A request is
  independent of all others: its text is the same among any others, but for rounding [n29] in another batch size.

  Args:
    guides: what makes the guide of each request, if not empty.

  Raises:
    UserError: a request that the engine cannot run; all are checked before any work.
  """
  for request in requests:
    check_request(engine.setup, request)
    if request.actions.get("fork_wait"):
      raise UserError(
        "fork_wait is for decoding methods that fork; plain decoding never resumes the row."
      )
  scheduler = Scheduler(Rows(engine, tokenizer, clock, decoder=decoder))
  for i, request in enumerate(requests):
    scheduler.submit(Samples(request, i, guide=guides[i] if guides else None))
  while scheduler.busy:
    for _, event in scheduler.step():
      yield event


def raising(events: Iterable) -> Iterator:
  """The events, up to the first Failure. Raises UserError there."""
  for event in events:
    if isinstance(event, Failure):
      raise UserError(event.why)
    yield event
