"""Between the event loop, where HTTP requests live, and the thread that drives the engine.

Why a thread: a dispatch keeps its caller waiting for as long as the device computes, and the event loop must answer
meanwhile. Only that thread touches the scheduler. It takes commands from a list, and hands over all events of a
round at once, because waking the event loop costs as much as several tokens do.
"""

import asyncio
import base64
import collections
import contextlib
import functools
import hashlib
import itertools
import pickle
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from entropix_jax.decoding.groups import check_groups
from entropix_jax.engine import warm
from entropix_jax.engine.programs import Program, any_request, compile_all, urgent
from entropix_jax.engine.request import check_request
from entropix_jax.engine.setup import compute_dtype
from entropix_jax.errors import UserError
from entropix_jax.prefix_store import PrefixStore
from entropix_jax.rows import Failure, Rows, Token
from entropix_jax.scheduler import Scheduler
from entropix_jax.serve.exchange import (
  Candidate,
  Event,
  Generation,
  Limits,
  News,
  ServiceError,
  refusal,
)
from entropix_jax.serve.grammar import Grammars
from entropix_jax.serve.task import Task
from entropix_jax.session import Session

NOISE = 1  # raise it when the same seed stops giving the same text
_BEAT_S = 60.0  # a round that takes longer means that the engine hangs
_FAILURES = 3  # rounds that may fail one after another before the engine is dead
_SLOW = 512  # events that a client may be behind before it is dropped,
_SLOW_S = 30.0  # if it has taken none for so long


class Stream:
  """The events of one submission: `async for event in stream`. It ends after the last one.

  Raises ServiceError where the submission ends early: a deadline, a failed dispatch, the end of the server.

  Attributes:
    cached_tokens: tokens of all prompts whose keys and values were kept; known from the first event on.
    late: seconds from the submission until its first prompt left the queue.
  """

  def __init__(self, service: "Service", generations: Sequence[Generation]):
    self.number, self.generations = next(service.numbers), generations
    self.cached_tokens, self.late = 0, 0.0
    self.loop, self.began = asyncio.get_running_loop(), time.monotonic()
    self.deadline = self.began + service.limits.deadline_s
    self.rows = sum(max(1, g.rows) for g in generations)
    self.tokens = sum(len(g.request.ids) for g in generations)  # of prompts that are not fed yet
    self.ended = False  # nothing more will come
    self._service, self._left = service, len(generations)
    self._events: collections.deque[Event] = collections.deque()
    self._error: ServiceError | None = None
    self._more = asyncio.Event()
    self._taken = self.began

  def __aiter__(self) -> "Stream":
    return self

  async def __anext__(self) -> Event:
    while not self._events:
      if self._error:
        raise self._error
      if self.ended:
        raise StopAsyncIteration
      self._more.clear()
      await self._more.wait()
    self._taken = time.monotonic()
    return self._events.popleft()

  def cancel(self) -> None:
    """Give up: rows are free within one dispatch. May be called at any time from the event loop, repeatedly."""
    if not self.ended:
      self._end()
      self._service.command("drop", self.number)

  # -- called in the event loop by the service ---------------------------------------------------

  def take(self, news: "News") -> None:
    """What a round has brought."""
    if self.ended:
      return
    self._service.fed(self, news.fed)
    self.cached_tokens += news.cached
    self.late = self.late or max(news.taken - self.began, 0.0)
    self._events += news.events
    self._left -= news.done
    self._error = news.error
    if news.error or not self._left:
      self._end()
    elif len(self._events) > _SLOW and time.monotonic() - self._taken > _SLOW_S:
      self._error = ServiceError(408, "slow_reader", "The client did not read its answer.")
      self.cancel()
    self._more.set()

  def _end(self) -> None:
    self.ended = True
    self._service.closed(self)
    self._more.set()


class Service:
  """Requests in, events out; it owns the engine's thread.

  Args:
    session: of the model, made with `samplers`.
    store_share: memory for kept beginnings of prompts, as a share of the rows' cache.
    budget: prompt tokens that are fed in a round while rows decode.
    metrics: a `metrics.Metrics`; None: nothing is counted.
    staged: be ready when texts after short prompts can be written, and compile the rest meanwhile; what is asked for
      before it is there waits for its own program only.
  """

  def __init__(
    self,
    session: Session,
    limits: Limits,
    store_share: float = 0.5,
    budget: int = 512,
    metrics: Any = None,
    staged: bool = False,
  ):
    self.session, self.limits, self.metrics, self.budget = session, limits, metrics, budget
    self.samplers = session.samplers
    self.grammars = Grammars(session.tokenizer, session.model.cfg.vocab) if session.masks else None
    self.state = "starting"
    self.error: BaseException | None = None  # why it is dead
    self.numbers = itertools.count()
    self.late_compiles = self._failures = 0
    self.compiling = 0  # programs that are still to be compiled
    self._staged = staged and session.peers.alone
    self._planned: set[Program] = set()
    self._rest: list[Program] = []
    self._ending = False
    self._compiler = threading.Thread(target=self._compile_rest, name="compiler", daemon=True)
    engine = session.settings.engine
    pieces = int(store_share * engine.batch_size * engine.max_seq_len) // engine.prefill_chunk
    self.store = PrefixStore(engine.prefill_chunk, pieces)
    self.scheduler: Scheduler | None = None
    self._counted = {"queries": 0, "hits": 0}
    # Of open streams: continuations, and prompt tokens that are not fed.
    self._rows = self._tokens = 0
    self._sinks: dict[int, Stream] = {}  # of process 0; written by the event loop only
    self._tasks: dict[int, list[Task]] = {}  # of each stream; touched by the thread only
    self._prompts = itertools.count()
    self._commands: list[tuple] = []
    self._peers = session.peers
    self._wake = threading.Condition()
    self._beat = time.monotonic()
    self._ready = threading.Event()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  # -- for the event loop ----------------------------------------------------------------------

  @functools.cached_property
  def fingerprint(self) -> str:
    """Equal ones promise equal texts for equal requests on equal hardware.

    Of the weights it hashes the names and sizes of their files, and the first and last megabyte of each.
    """
    model, settings = self.session.model, self.session.settings
    digest = hashlib.sha256()
    for path in sorted(
      p for p in [Path(model.folder), *Path(model.folder).glob("*")] if p.is_file()
    ):
      with open(path, "rb") as file:
        digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
        file.seek(max(path.stat().st_size - 2**20, 0))
        digest.update(file.read(2**20))
    facts = NOISE, jax.__version__, compute_dtype(settings.engine.dtype), settings.engine
    facts += settings.mesh, jax.default_backend()
    return f"fp_{hashlib.sha256(digest.digest() + repr(facts).encode()).hexdigest()[:12]}"

  @property
  def healthy(self) -> bool:
    """Whether the engine's thread has shown a sign of life lately."""
    if self.state == "dead":
      return False
    return self.state == "starting" or time.monotonic() - self._beat < _BEAT_S

  def submit(self, generations: Sequence[Generation]) -> Stream:
    """Queue all of them or none; call it from the event loop.

    Raises:
      ServiceError: full, draining, starting or dead.
      UserError: a request that the engine cannot run.
    """
    if self.state != "ready":
      raise refusal(self.state)
    rows = sum(max(1, g.rows) for g in generations)
    tokens = sum(len(g.request.ids) for g in generations)
    # An empty queue takes any request, however long, so that none is refused for ever.
    full = self._rows + rows > self.limits.queued_requests
    full |= bool(self._tokens) and self._tokens + tokens > self.limits.queued_tokens
    if full:
      raise refusal("full")
    setup = self.scheduler.rows.engine.setup
    for generation in generations:
      check_request(setup, generation.request)
      if generation.method:
        check_groups(setup, [generation.job(0)])
    stream = Stream(self, generations)
    self._sinks[stream.number] = stream
    self._rows, self._tokens = self._rows + rows, self._tokens + tokens
    self.command("begin", stream.number, stream.generations)
    if self.state == "dead":  # it has died since the check above
      self.closed(stream)
      raise refusal("dead")
    return stream

  def fed(self, stream: Stream, tokens: int) -> None:
    """Prompt tokens of a stream have been fed."""
    self._tokens -= tokens
    stream.tokens -= tokens

  def closed(self, stream: Stream) -> None:
    """A stream has ended."""
    if self._sinks.pop(stream.number, None):
      self._rows -= stream.rows
      self.fed(stream, stream.tokens)

  async def drain(self, timeout_s: float) -> None:
    """Take on nothing more, and return when all streams have ended; after the timeout, end them."""
    if self.state == "ready":
      self.state = "draining"
    end = time.monotonic() + timeout_s
    while self._sinks and time.monotonic() < end and self.state == "draining":
      await asyncio.sleep(0.05)
    self.abort()

  def abort(self) -> None:
    """End all streams; call it from the event loop."""
    if self.state == "ready":
      self.state = "draining"
    for stream in list(self._sinks.values()):
      stream.take(News(error=refusal("draining")))
      self.command("drop", stream.number)

  # -- from any thread -------------------------------------------------------------------------

  def start(self) -> None:
    """Load the model and compile, in the engine's thread."""
    self._thread.start()

  def wait(self) -> None:
    """Wait until it is ready. Raises what made it fail."""
    self._ready.wait()
    if self.error:
      raise self.error

  def stop(self) -> None:
    """End the engine's thread."""
    self._ending = True
    self.command("end")
    self._thread.join(timeout=10)

  def command(self, *what) -> None:
    """Have the engine's thread do something before its next round: "begin", "drop" or "end"."""
    with self._wake:
      self._commands.append(what)
      self._wake.notify()

  def follow(self) -> None:
    """On another process than the first: run what that one runs, until it ends."""
    self._load()
    while self._round():
      pass

  # -- the engine's thread ---------------------------------------------------------------------

  def _run(self) -> None:
    try:
      self._load()
      self.state = "ready"
      self._ready.set()
      if self._rest:
        self._compiler.start()
      while self._round():
        pass
    except BaseException as error:
      self.error, self.state = error, "dead"
      self._ready.set()
      self._all_end(refusal("dead"))
      if not isinstance(error, UserError):
        traceback.print_exc()

  def _load(self) -> None:
    first: list[Program] = []

    def compile(decoder) -> None:
      setup = decoder.engine.setup
      need = any_request(setup)
      first[:], self._rest = urgent(setup, need) if self._staged else (need, [])
      self._planned, self.compiling = {*need}, len(self._rest)
      compile_all(decoder.engine.compiled.jobs(first))

    session = self.session
    decoder = session.model.decoder(session, session.settings.engine.batch_size, compile)
    warm.run_once(decoder.engine, first)
    # On a CPU the host's part of a round is short beside a dispatch, and a row that ends would idle for a whole one.
    ahead = 0 if decoder.engine.setup.platform == "cpu" else 1
    self._make = lambda: Scheduler(
      Rows(decoder.engine, session.tokenizer, ahead=ahead, decoder=decoder),
      self.budget,
      self.store,
    )
    self.scheduler = self._make()

  def _compile_rest(self) -> None:
    compiled = self.scheduler.rows.engine.compiled
    try:
      for program in self._rest:
        if self._ending:
          return
        compile_all(compiled.jobs([program]))
        self.compiling -= 1
    except Exception:  # it goes on with what it has
      traceback.print_exc()
      self.compiling = 0

  def _round(self) -> bool:
    """One round; False when it shall end."""
    for what, *args in self._next_commands():
      if what == "end":
        self._all_end(refusal("draining"))
        return False
      (self._begin if what == "begin" else self._drop)(*args)
    news: dict[int, News] = collections.defaultdict(News)
    tokens: list[Token] = []
    worked = self.scheduler.busy
    try:
      for task, event in self.scheduler.step():
        self._tell(task, news)
        tokens += [event] if isinstance(event, Token) else []
        if isinstance(event, Token | Failure) and not task.generation.method:
          news[task.stream].events.append(Event(task.call, event.sample, event))
          if isinstance(event, Token) and event.position == len(task.request.forced_ids):
            self._deliver(news)  # a first token does not wait for the dispatch that is read next
            news.clear()
        elif isinstance(event, Token) and task.generation.live:
          news[task.stream].events.append(Event(task.call, 0, Candidate(event)))
      for task in (*self.scheduler.active, *self.scheduler.ended):
        self._tell(task, news)
    except Exception:
      if not self._peers.alone:
        raise
      traceback.print_exc()
      self._recover()
      return True
    for task in self.scheduler.ended:
      news[task.stream].events += [Event(task.call, 0, what) for what in task.chosen()]
      news[task.stream].done += 1
      if all(other.done for other in self._tasks.get(task.stream, ())):
        self._tasks.pop(task.stream, None)
    self._deliver(news)
    self._failures = 0 if worked else self._failures
    self._measure(tokens)
    return True

  def _next_commands(self) -> list[tuple]:
    """What the event loop wants; on several processes, what that of process 0 wants."""

    def read() -> list[tuple]:
      with self._wake:
        while not self._commands and not self.scheduler.busy:
          self._wake.wait(0.25)
          self._beat = time.monotonic()
        self._expire()
        commands, self._commands = self._commands, []
      return commands

    self._beat = time.monotonic()
    if self._peers.alone:
      return read()
    told = self._peers.share(lambda: base64.b64encode(pickle.dumps(read())).decode())
    return pickle.loads(base64.b64decode(told))

  def _tell(self, task: Task, news: dict[int, News]) -> None:
    """What is new of a task's prompt."""
    if task.begun and not task.counted:
      task.counted, mine = True, news[task.stream]
      mine.fed += len(task.request.ids)
      mine.cached += task.cached
      mine.taken = mine.taken or task.taken
    for result in task.results():
      news[task.stream].events.append(Event(task.call, 0, result))

  def _deliver(self, news: dict[int, News]) -> None:
    """Give the streams what is new, in their event loop, all at once."""
    loops: dict[Any, list[tuple[Stream, News]]] = collections.defaultdict(list)
    for number, one in news.items():
      if stream := self._sinks.get(number):
        loops[stream.loop].append((stream, one))
    for loop, own in loops.items():
      with contextlib.suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(_take_all, own)

  def _begin(self, number: int, generations: Sequence[Generation]) -> None:
    calls = enumerate(generations)
    self._tasks[number] = [Task(number, i, g, next(self._prompts)) for i, g in calls]
    for task in self._tasks[number]:
      self.scheduler.submit(task)

  def _drop(self, number: int) -> None:
    """End what a stream still has in the queue and the rows."""
    for task in self._tasks.pop(number, ()):
      phase = self.scheduler.cancel(task)
      if self.metrics and phase != "done":
        self.metrics.count("cancelled", label=phase)

  def _all_end(self, error: ServiceError) -> None:
    # Of some the thread has not heard yet.
    self._deliver({number: News(error=error) for number in [*self._sinks]})
    self._tasks.clear()

  def _expire(self) -> None:
    """Drop streams that have waited too long."""
    now = time.monotonic()
    for number in {task.stream for task in self.scheduler.waiting}:
      stream = self._sinks.get(number)
      begun = any(task.begun for task in self._tasks.get(number, ()))
      if stream and now > stream.deadline and not begun:
        message = f"The request waited for {now - stream.began:.0f} s without a free place."
        self._deliver({number: News(error=ServiceError(408, "queue_timeout", message, 1))})
        self._commands.append(("drop", number))

  def _recover(self) -> None:
    """After a dispatch that failed: end what was running, and go on with what waits."""
    self._failures += 1
    waiting = [*self.scheduler.waiting]
    # The dispatch that failed may have taken its arrays or not; the device may lack the memory for two caches.
    for array in jax.tree.leaves(self.scheduler.rows.state):
      array.delete()
    self.scheduler = self._make()
    failed = "The engine failed while it worked on this request; try again."
    error = ServiceError(500, "internal_error", failed)
    for number, tasks in [*self._tasks.items()]:
      if any(task not in waiting and not task.done for task in tasks):
        del self._tasks[number]
        self._deliver({number: News(error=error)})
    self.scheduler.waiting.extend(task for task in waiting if task.stream in self._tasks)
    if self._failures >= _FAILURES:
      raise RuntimeError(f"{_FAILURES} rounds failed one after another")

  def _measure(self, tokens: Sequence[Token]) -> None:
    """Count what this round did."""
    rows, metrics = self.scheduler.rows, self.metrics
    late = [p for p in [*rows.engine.compiled] if p not in self._planned]
    self._planned.update(late)
    self.late_compiles += len(late)
    if metrics is None:
      return
    for program in late:
      metrics.count("compilations", label=program.verb)
    held = [row for row in rows.slots if row and not row.done]
    room = len(rows.slots) * rows.engine.setup.capacity
    metrics.set("engine_up", 1)
    metrics.set("num_requests_running", len(held))
    metrics.set("num_requests_waiting", sum(task.n for task in self.scheduler.waiting))
    metrics.set("kv_cache_usage_perc", sum(row.held for row in held) / room)
    for name, now in (("queries", self.store.asked), ("hits", self.store.found)):
      metrics.count(f"prefix_cache_{name}", now - self._counted[name])
      self._counted[name] = now
    if tokens:
      metrics.observe("iteration_tokens", len(tokens))
      for name in ("entropy", "varentropy"):
        metrics.tally(f"token_{name}", [token.numbers[name] for token in tokens])
      for branch, n in collections.Counter(token.branch for token in tokens).items():
        metrics.count("sampler_action", n, branch)


def _take_all(all_news: list[tuple[Stream, News]]) -> None:
  for stream, news in all_news:
    stream.take(news)
