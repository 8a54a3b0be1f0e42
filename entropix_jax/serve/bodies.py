"""Bodies of answers, whole and in pieces, and of errors.

All log-probabilities are those of the raw model, whatever the sampler made of them.
"""

import dataclasses
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer
from entropix_jax.decoding.groups import Outcome
from entropix_jax.errors import UserError
from entropix_jax.report.trace import token_line
from entropix_jax.rows import Failure, Token
from entropix_jax.serve.calls import Job
from entropix_jax.serve.exchange import Candidate, Event, PromptScores, ServiceError
from entropix_jax.serve.schema import Chat, Completion, RequestError

NEVER = -9999.0  # a log-probability of -inf or NaN, which JSON cannot write
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_RETRY_MOST = 120  # seconds; clients do not retry after a longer wait
_KINDS = {
  400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
  404: "not_found_error", 405: "not_found_error", 408: "timeout_error",
  413: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_PATH = re.compile(r"(?<![\w/])/(?:[\w.+-]+/)+[\w.+-]*")


# -- errors ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a client is told of an error."""

  status: int
  message: str
  code: str | None = None
  param: str | None = None
  headers: dict[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, error: Exception) -> "Problem":
    """What may be said of an exception; of a defect of the server, nothing."""
    if isinstance(error, RequestError):
      return cls(error.status, error.message[:1000], error.code, error.param)
    if isinstance(error, UserError):
      return cls(400, _PATH.sub("...", str(error))[:1000])
    if isinstance(error, ServiceError):
      headers = {}
      if error.retry_after is not None:
        headers["retry-after"] = str(min(max(1, round(error.retry_after)), _RETRY_MOST))
      if error.code == "engine_dead":
        headers["x-should-retry"] = "false"
      return cls(error.status, error.message, error.code, None, headers)
    return cls(500, "The server has failed at this request; its log says why.", "internal_error")

  @property
  def body(self) -> dict[str, Any]:
    """The body of an answer, or of an event in a stream."""
    kind = _KINDS.get(self.status, "server_error")
    return {
      "error": {
        "message": self.message, "type": kind, "param": self.param, "code": self.code
      }
    }  # fmt: skip


def event(body: Any) -> bytes:
  """A body as an event of a stream."""
  return b"data: " + orjson.dumps(body) + b"\n\n"


# -- answers -----------------------------------------------------------------------------------


class Choice:
  """One text of an answer, and what of it is not written yet."""

  def __init__(self, index: int, call: int):
    self.index, self.call = index, call
    self.texts: list[str] = []
    self.tokens: list[Token] = []  # kept only where more than their text is asked for
    self.lines: list[dict[str, Any]] = []  # of a trace
    self.count = 0  # tokens in all
    self.finish: str | None = None
    self.begun = False  # its first piece is written
    self.offset = 0  # characters before the next token
    self.decoder: StreamDecoder | None = None
    self.first = self.last = 0.0  # when its first and its latest token came
    self.group: dict[str, Any] | None = None  # of the texts that it was chosen from


class Writer:
  """Turns the events of one request into bodies.

  Args:
    model: the name under which the model is served.
  """

  def __init__(
    self, body: Chat | Completion, job: Job, tokenizer: Tokenizer, model: str, fingerprint: str
  ):
    self.body, self.job, self.tokenizer = body, job, tokenizer
    self.is_chat, self.trace = isinstance(body, Chat), body.entropix.trace
    self.echo = getattr(body, "echo", False)
    self.keeps = body.alternatives is not None or self.trace != "none" or body.return_token_ids
    calls = range(len(job.generations))
    self.choices = [Choice(i * body.n + j, i) for i in calls for j in range(body.n)]
    self.scores: dict[int, PromptScores] = {}
    options = body.stream_options
    self.usage_last = bool(options and options.include_usage)
    self.usage_always = bool(options and options.continuous_usage_stats)
    self.cached = 0  # tokens of prompts that were not fed again
    kind = "chat.completion" if self.is_chat else "text_completion"
    self.head: dict[str, Any] = {
      "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
      "object": kind + ".chunk" * (self.is_chat and body.stream),
      "created": int(time.time()),
      "model": model,
      "system_fingerprint": fingerprint,
    }
    if self.trace != "none":
      self.head["entropix"] = {"sampler": job.sampler, "seed": job.seed}
    if self.trace == "lines":
      self.head["entropix"]["prompt_ids"] = [[*g.request.ids] for g in job.generations]

  def push(self, event: Event) -> list[Choice]:
    """Take in an event; the choices that have grown. Raises ServiceError where a text ends with an error."""
    what, n = event.what, self.body.n
    if isinstance(what, Token):
      choice = self.choices[event.call * n + event.sample]
      choice.texts.append(what.text)
      choice.count += 1
      if self.keeps:
        choice.tokens.append(what)
      choice.finish = what.finish
      if self.trace == "lines" and not self.job.generations[event.call].method:
        choice.lines.append(self._line(what))
      return [choice]
    if isinstance(what, Candidate):
      choice = self.choices[event.call * n]
      choice.lines.append(self._line(what.token))
      return [choice]
    if isinstance(what, Outcome):
      return [self._chosen(self.choices[event.call * n], what)]
    if isinstance(what, Failure):
      status, code = (400, "grammar_error") if what.of_guide else (500, "model_error")
      raise ServiceError(status, code, what.why)
    self.scores[event.call] = what
    if self.job.generations[event.call].generates:
      return []
    grown = self.choices[event.call * n : (event.call + 1) * n]
    for choice in grown:
      choice.finish = "length"
    return grown

  def _chosen(self, choice: Choice, outcome: Outcome) -> Choice:
    """The choice with what is known of the group that it comes from, whose tokens all count."""
    if outcome.error:
      raise ServiceError(500, "model_error", outcome.error)
    choice.finish, choice.count = choice.finish or "length", outcome.tokens_total
    facts = outcome.line()
    del facts["prompt"]
    choice.group = facts | {"why": outcome.why, "votes": outcome.votes}
    return choice

  @property
  def done(self) -> bool:
    """Whether all texts have ended."""
    return all(choice.finish for choice in self.choices)

  def whole(self) -> dict[str, Any]:
    """The answer that is no stream."""
    return self.head | {
      "choices": [self._piece(choice) for choice in self.choices],
      "usage": self.usage(),
    }

  def opening(self) -> bytes:
    """The events with which the texts of a streamed chat begin."""
    if not self.is_chat:
      return b""
    rest = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return b"".join(self._chunk({"index": choice.index, **rest}) for choice in self.choices)

  def pieces(self, grown: Iterable[Choice]) -> bytes:
    """An event for each of these choices, with what is new of it."""
    return b"".join(
      self._chunk(self._piece(choice))
      for choice in grown
      if choice.finish or choice.tokens or choice.lines or any(choice.texts)
    )

  def closing(self) -> bytes:
    """The events at the end of a stream."""
    if not self.usage_last:
      return DONE
    return event(self.head | {"choices": [], "usage": self.usage()}) + DONE

  def usage(self) -> dict[str, Any]:
    """Counts of tokens so far; a prompt counts once for all its samples."""
    parts = zip(self.job.generations, self.job.echoes, strict=True)
    prompt = sum(len(generation.request.ids) - echo.hidden for generation, echo in parts)
    new = sum(choice.count for choice in self.choices)
    unused = "accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens"
    return {
      "prompt_tokens": prompt,
      "completion_tokens": new,
      "total_tokens": prompt + new,
      "prompt_tokens_details": {"cached_tokens": self.cached},
      "completion_tokens_details": dict.fromkeys(unused, 0),
    }

  def _sent(self, call: int) -> list[int]:
    """The ids of a prompt, without those that only the server added."""
    return list(self.job.generations[call].request.ids[self.job.echoes[call].hidden :])

  def _chunk(self, choice: dict[str, Any]) -> bytes:
    chunk = self.head | {"choices": [choice]}
    if self.usage_last or self.usage_always:
      chunk["usage"] = self.usage() if self.usage_always else None
    return event(chunk)

  def _piece(self, choice: Choice) -> dict[str, Any]:
    """What is new of a choice; of one that is no stream, everything."""
    text, tokens = "".join(choice.texts), choice.tokens
    choice.texts, choice.tokens = [], []
    first, choice.begun = not choice.begun, True
    finish = "stop" if choice.finish == "uncertain" else choice.finish
    piece: dict[str, Any] = {"index": choice.index}
    if not self.is_chat:
      piece["text"] = self.job.echoes[choice.call].text + text if self.echo and first else text
    elif self.body.stream:
      piece["delta"] = {"content": text} if text else {}
    else:
      piece["message"] = {"role": "assistant", "content": text, "refusal": None}
    piece["logprobs"] = None
    if self.body.alternatives is not None:
      if self.is_chat:
        piece["logprobs"] = {"content": [self._entry(token) for token in tokens]}
      else:
        piece["logprobs"] = self._arrays(choice, tokens, first)
    piece["finish_reason"] = finish
    if self.body.return_token_ids:
      piece["token_ids"] = [token.id for token in tokens]
      if first:
        piece["prompt_token_ids"] = self._sent(choice.call)
    if self.trace == "lines":
      piece["entropix"], choice.lines = {"lines": choice.lines}, []
    elif self.trace != "none":
      piece["entropix"] = self._traced(choice, tokens)
    if choice.group:
      piece["entropix"] = piece.get("entropix", {}) | {"group": choice.group}
    return piece

  def _line(self, token: Token) -> dict[str, Any]:
    """A token as a trace has it, with the alternatives that are asked for; n texts are no samples of one choice."""
    few = self.body.alternatives or 0
    line = token_line(dataclasses.replace(token, top=token.top[:few]))
    if self.body.n > 1:
      line.pop("sample", None)
    return line

  # -- log-probabilities ---------------------------------------------------------------------

  def _name(self, id: int) -> str:
    """A token as text; one that is a part of a character has no text of its own."""
    if self.body.return_tokens_as_token_ids:
      return f"token_id:{id}"
    return self.tokenizer.token_bytes(id).decode("utf-8", "replace")

  def _top(self, token: Token) -> list[tuple[int, float]]:
    """The alternatives of a token that are asked for, itself among them."""
    top = [(id, logprob) for id, _, logprob in token.top[: self.body.alternatives]]
    if all(id != token.id for id, _ in top):
      top.append((token.id, token.numbers["logprob"]))
    return top

  def _entry(self, token: Token) -> dict[str, Any]:
    """A token as chats report it."""
    entry = self._scored(token.id, token.numbers["logprob"])
    top = self._top(token) if self.body.alternatives else []
    entry["top_logprobs"] = [self._scored(id, logprob) for id, logprob in top]
    return entry

  def _scored(self, id: int, logprob: float) -> dict[str, Any]:
    data = list(self.tokenizer.token_bytes(id))
    return {"token": self._name(id), "logprob": finite(logprob), "bytes": data}

  def _arrays(self, choice: Choice, tokens: list[Token], first: bool) -> dict[str, list]:
    """Tokens as completions report them, after those of the prompt in the first piece of an echo.

    The offset of a token is where its first character is in the text: the same in one piece and in many.
    """
    rows = [(t.id, t.numbers["logprob"], self._top(t)) for t in tokens]
    offsets: list[int] = []
    if first and self.echo:
      echo, ids = self.job.echoes[choice.call], self._sent(choice.call)
      scores = self.scores[choice.call]
      told = scores.logprobs[echo.hidden :], scores.tops[echo.hidden :]
      rows[:0] = zip(ids, *told, strict=True)
      decoder = StreamDecoder(self.tokenizer, True)
      shown = ("" if i < echo.unseen else decoder.push(id) for i, id in enumerate(ids))
      offsets = list(_before(shown, 0))
      choice.offset = len(echo.text)
    if choice.decoder is None:
      control = not self.body.skip_special_tokens
      choice.decoder = StreamDecoder(self.tokenizer, control, begins=False)
    lengths = [choice.decoder.push(token.id) for token in tokens]
    offsets += _before(lengths, choice.offset)
    choice.offset += sum(map(len, lengths))
    return {
      "tokens": [self._name(id) for id, _, _ in rows],
      "token_logprobs": [finite(logprob) for _, logprob, _ in rows],
      "top_logprobs": [self._dict(*row) for row in rows],
      "text_offset": offsets,
    }

  def _dict(self, id: int, logprob: float | None, top) -> dict[str, float] | None:
    """The alternatives by name; where two have one name, the more likely one, and before all the token itself."""
    if logprob is None:
      return None
    named: dict[str, float] = {}
    for other, x in top:
      named.setdefault(self._name(other), finite(x))
    return named | {self._name(id): finite(logprob)}

  def _traced(self, choice: Choice, tokens: list[Token]) -> dict[str, Any]:
    """The numbers of tokens, in arrays; null where one is not finite."""
    names = ["entropy", "varentropy"]
    if self.trace == "full":
      names = list(dict.fromkeys(name for token in tokens for name in token.numbers))
    traced: dict[str, Any] = {n: [token.numbers.get(n) for token in tokens] for n in names}
    traced["action"] = [token.branch for token in tokens]
    if choice.finish == "uncertain":
      traced["finish"] = choice.finish
    return traced


def finite(logprob: float | None) -> float | None:
  """A log-probability that JSON can write."""
  return logprob if logprob is None or logprob > NEVER else NEVER


def _before(texts: Iterable[str], start: int) -> Iterator[int]:
  """The number of characters before each text."""
  for text in texts:
    yield start
    start += len(text)
