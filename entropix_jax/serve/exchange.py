"""What passes between the routes and the engine's thread: requests one way, events and errors the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

from entropix_jax import decoding
from entropix_jax.decoding.groups import Outcome
from entropix_jax.engine.request import Request
from entropix_jax.rows import Failure, Guide, Token
from entropix_jax.scheduler import Job, Samples


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server takes on; more is refused."""

  queued_requests: int = 256  # continuations that wait or run, each of n counted
  queued_tokens: int = 131_072  # tokens of prompts that are not fed yet
  samples: int = 32  # n of one request
  prompts: int = 64  # of one request
  body_bytes: int = 4 * 2**20
  stop_texts: int = 64
  deadline_s: float = 300.0  # from arrival until the first prompt has been fed


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
  guide: Callable[[], Guide] | None = None  # makes the guide of each sample

  method: str = ""  # of decoding/, with several rows of which one is chosen
  options: Any = None  # the method's Config
  live: bool = False  # tokens of all samples of a group are told as they come

  @property
  def rows(self) -> int:
    """Continuations that it asks for."""
    if self.method:
      return getattr(self.options, "n", 1)
    return self.samples if self.generates and not self.labels else 0

  def job(self, prompt: int) -> Job:
    """What the scheduler runs; `prompt` as of a Job."""
    if self.method:
      return decoding.find(self.method).Group(self.request, self.options, prompt)
    return Samples(self.request, prompt, self.rows, self.guide)


@dataclasses.dataclass(frozen=True)
class PromptScores:
  """Log-probabilities of a prompt's tokens under the raw model, in nats."""

  logprobs: tuple[float | None, ...]  # of each token of the prompt; None for the first
  # The most likely tokens at each place, best first, (id, logprob); None for the first.
  tops: tuple[tuple[tuple[int, float], ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A token of one of a group's samples, told before the choice is made."""

  token: Token


@dataclasses.dataclass(frozen=True)
class Labels:
  """Log-probabilities of `Generation.labels` after the prompt, in nats."""

  logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Event:
  """One result of a generation: a token, a failure, scores, or a candidate or the choice of a group."""

  call: int  # index of the generation in its submission
  sample: int
  what: Token | Failure | PromptScores | Labels | Candidate | Outcome


class ServiceError(Exception):
  """Why a submission is refused, or ends before its texts do."""

  def __init__(self, status: int, code: str, message: str, retry_after: float | None = None):
    super().__init__(message)
    self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


# By the state of a service, or "full": code, message, and seconds after which to try again.
_REFUSALS = {
  "starting": ("not_ready", "The model is being loaded; try again soon.", 2.0),
  "full": ("engine_overloaded", "The server has as many requests as it takes on; try again later.", 1.0),
  "draining": ("engine_draining", "The server is about to end; send the request to another one, or try again later.", 2.0),
  "dead": ("engine_dead", "The engine has failed; the server must be started again.", None),
}  # fmt: skip


def refusal(why: str) -> ServiceError:
  """Why a service takes no request: its state, or "full"."""
  code, message, retry_after = _REFUSALS[why]
  return ServiceError(503, code, message, retry_after)


@dataclasses.dataclass
class News:
  """What a round has brought for a submission."""

  events: list[Event] = dataclasses.field(default_factory=list)
  fed: int = 0  # tokens of prompts that are not waiting any more
  cached: int = 0  # how many of them need not be fed
  taken: float = 0.0  # when the first of its prompts left the queue
  done: int = 0  # generations that have ended
  error: ServiceError | None = None  # what ends it early
