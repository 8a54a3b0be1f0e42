"""Between the event loop, where HTTP requests live, and the thread that drives the engine."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from entropix_jax.engine.request import Request
from entropix_jax.rows import Failure, Token


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server takes on; more is refused."""

  queued_requests: int = 256  # continuations that wait or run, each of n counted
  queued_tokens: int = 131_072  # tokens of prompts that are not fed yet
  samples: int = 32  # n of one request
  prompts: int = 64  # of one request
  body_bytes: int = 4 * 2**20
  stop_texts: int = 64
  deadline_s: float = 300.0  # from arrival to the first token


@dataclasses.dataclass(frozen=True)
class Generation:
  """One prompt and what shall be done with it."""

  request: Request  # stream: that of the first sample; the others' follow
  samples: int = 1
  # The number of alternatives to report for each token of the prompt; None: the prompt is not scored.
  score: int | None = None
  # Ids whose log-probability after the prompt is asked; then nothing is generated.
  labels: tuple[int, ...] = ()
  salt: str = ""  # prompts of different salts share no keys and values
  generates: bool = True  # False: only score the prompt


@dataclasses.dataclass(frozen=True)
class PromptScores:
  """Log-probabilities of a prompt's tokens under the raw model, in nats."""

  logprobs: tuple[float | None, ...]  # of each token of the prompt; None for the first
  # The most likely tokens at each place, best first, (id, logprob); None for the first.
  tops: tuple[tuple[tuple[int, float], ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class Labels:
  """Log-probabilities of `Generation.labels` after the prompt, in nats."""

  logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Event:
  """What became of a generation."""

  call: int  # index of the generation in its submission
  sample: int
  what: Token | Failure | PromptScores | Labels


class ServiceError(Exception):
  """Why a submission is refused, or ends before its texts do."""

  def __init__(self, status: int, code: str, message: str, retry_after: float | None = None):
    super().__init__(message)
    self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Stream:
  """The events of one submission: `async for event in stream`. It ends after the last one.

  Raises ServiceError where the submission ends early: a deadline, a failed dispatch, the end of the server.
  """

  cached_tokens: int  # tokens of all prompts whose keys and values were there already; known from the first event on
  late: float  # seconds from submission until the first prompt was begun

  def __aiter__(self) -> AsyncIterator[Event]:
    raise NotImplementedError

  def cancel(self) -> None:
    """Give up: rows are free within one dispatch. May be called at any time, from the event loop, repeatedly."""
    raise NotImplementedError


class Service:
  """What the routes need."""

  state: str  # "starting", "ready", "draining" or "dead"
  limits: Limits

  @property
  def healthy(self) -> bool:
    """Whether the engine's thread has shown a sign of life lately."""
    raise NotImplementedError

  def submit(self, generations: Sequence[Generation]) -> Stream:
    """Queue all of them or none; call it from the event loop.

    Raises:
      ServiceError: full, draining, starting or dead.
      UserError: a request that the engine cannot run.
    """
    raise NotImplementedError
