"""The routes under /v1/entropix/tokens/, and healing for completions.

Why a thread: the tools of tokens/ ask for next-token laws one batch after another. They run in a thread of their own, and what
they ask is a submission like any other, so that the rows of other requests go on between two of them.
"""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from entropix_jax.rows import Failure, Token
from entropix_jax.serve import calls, schema
from entropix_jax.serve.around import Json
from entropix_jax.serve.exchange import Generation
from entropix_jax.serve.schema import RequestError
from entropix_jax.serve.service import Service
from entropix_jax.session import Session
from entropix_jax.tokens import heal
from entropix_jax.tokens.spelling import spelling
from entropix_jax.tokens.tools import Tools

_THREADS = ThreadPoolExecutor(4, thread_name_prefix="tokens")
_AT_ONCE = 16  # texts in a submission
_ASKED = 400  # texts that the model is asked about for one request


class _Tool(schema._Body):
  model: str | None = None
  text: str
  k: int = Field(8, ge=1, le=64)


class Lens(_Tool):
  """POST /v1/entropix/tokens/lens."""

  control: bool = False


class Segmentations(_Tool):
  """POST /v1/entropix/tokens/segmentations."""

  before: str = ""
  dropout: float = Field(0.1, ge=0, le=1)
  seed: int = Field(0, ge=0, lt=2**63)
  draws: int = Field(8, ge=2, le=32)
  scored: bool = True


class Heal(_Tool):
  """POST /v1/entropix/tokens/heal."""


class Bytes(_Tool):
  """POST /v1/entropix/tokens/bytes."""


class Answers(_Tool):
  """POST /v1/entropix/tokens/answers."""

  k: int = Field(4, ge=1, le=16)
  dropout: float = Field(0.1, ge=0, le=1)
  seed: int = Field(0, ge=0, lt=2**63)
  max_tokens: int = Field(64, ge=1, le=512)


class ServiceLaws:
  """`laws.Laws` of a server's model, for a thread beside the event loop."""

  def __init__(self, service: Service, session: Session):
    self._service, self._session, self._left = service, session, _ASKED
    self._loop = asyncio.get_running_loop()

  def after(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """See Laws."""
    every = tuple(range(self._session.model.cfg.vocab))
    found = self._asked(
      [Generation(self._request(t), labels=every, generates=False) for t in texts]
    )
    return np.asarray([one.logprobs for one in found])

  def score(self, texts: Sequence[Sequence[int]], start: int) -> list[np.ndarray]:
    """See Laws."""
    found = self._asked([Generation(self._request(t), score=0, generates=False) for t in texts])
    return [np.asarray(one.logprobs[start:], np.float64) for one in found]

  def _request(self, ids: Sequence[int]):
    return dataclasses.replace(self._session.request([*ids], 1, 0), alternatives=False)

  def _asked(self, generations: list[Generation]) -> list[Any]:
    self._left -= len(generations)
    if self._left < 0:
      raise RequestError(
        f"This asks the model about more than {_ASKED} texts; give a shorter text.", "text"
      )
    coming = asyncio.run_coroutine_threadsafe(self._collect(generations), self._loop)
    return coming.result()

  async def _collect(self, generations: list[Generation]) -> list[Any]:
    found: list[Any] = []
    for i in range(0, len(generations), _AT_ONCE):
      group = generations[i : i + _AT_ONCE]
      by_call = {}
      stream = self._service.submit(group)
      try:
        async for event in stream:
          by_call[event.call] = event.what
      finally:
        stream.cancel()
      found += [by_call[call] for call in range(len(group))]
    return found


async def _threaded(work: Callable, *args: Any) -> Any:
  return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *args)


# -- the routes ----------------------------------------------------------------------------------


def table(routes: Any) -> dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]]:
  """Path -> (method, route), over what the other routes share (app.py)."""
  works = {"lens": (Lens, _lens), "segmentations": (Segmentations, _segmentations)}
  works |= {"heal": (Heal, _heal), "bytes": (Bytes, _bytes)}
  found = {
    name: functools.partial(_answer, routes, kind, work) for name, (kind, work) in works.items()
  }
  found["answers"] = functools.partial(_answers, routes)
  return {f"/v1/entropix/tokens/{name}": ("POST", route) for name, route in found.items()}


async def _answer(routes: Any, kind: Any, work: Callable, request: Request) -> Response:
  routes._admit()
  body, headers = routes._check(kind, await routes._read(request))
  return Json(await _threaded(work, _tools(routes), body), headers=headers)


def _tools(routes: Any) -> Tools:
  session = routes.session
  laws = ServiceLaws(routes.service, session)
  return Tools(session.tokenizer, lambda: laws, session.stop, most=128)


def _lens(tools: Tools, body: Lens) -> dict[str, Any]:
  return tools.lens(body.text, body.control)


def _segmentations(tools: Tools, body: Segmentations) -> dict[str, Any]:
  how = body.k, body.dropout, body.seed, body.draws, body.scored
  return tools.segmentations(body.text, body.before, *how)


def _heal(tools: Tools, body: Heal) -> dict[str, Any]:
  return tools.heal(body.text, body.k)


def _bytes(tools: Tools, body: Bytes) -> dict[str, Any]:
  return tools.next_bytes(body.text, body.k)


async def _answers(routes: Any, request: Request) -> Response:
  """A question in k segmentations, answered with the same noise; a chat where the model chats."""
  routes._admit()
  body, headers = routes._check(Answers, await routes._read(request))
  session, tools = routes.session, _tools(routes)

  def plan() -> list[Generation]:
    ids = session.encode(body.text)
    room = calls._room(session, [*ids, *[0] * 3 * len(ids)], None, "text")
    limit, first = min(body.max_tokens, room), session.request(ids, 1, body.seed)
    paths = tools.variants(ids, body.text, body.k, body.dropout, body.seed)
    requests = (session.request(path, limit, body.seed) for path in paths)
    return [Generation(dataclasses.replace(r, stream=first.stream)) for r in requests]

  generations = await _threaded(plan)
  made: list[list[Token]] = [[] for _ in generations]
  stream = routes.service.submit(generations)
  try:
    async for event in stream:
      if isinstance(event.what, Failure):
        raise RequestError(event.what.why, "text")
      made[event.call].append(event.what)
  finally:
    stream.cancel()
  rows = [
    {
      "tokens": tools.texts(one.request.ids),
      "text": "".join(token.text for token in tokens),
      "entropies": [token.entropy for token in tokens],
      "entropy": float(np.mean([token.entropy for token in tokens])),
    }
    for one, tokens in zip(generations, made, strict=True)
  ]
  return Json({"rows": rows}, headers=headers)


# -- healing for completions -----------------------------------------------------------------------


def wanted(session: Session, body: schema.Chat | schema.Completion) -> bool:
  """Whether a body asks for healing, or the server heals all completions."""
  asked, usual = body.entropix.heal, session.settings.heal
  return usual and isinstance(body, schema.Completion) if asked is None else asked


async def healed(service: Service, session: Session, body: Any, job: calls.Job) -> calls.Job:
  """A completion's job with its prompts rolled back. Raises RequestError where that cannot be done."""
  where = "entropix.heal"
  if isinstance(body, schema.Chat):
    raise RequestError(
      f"{where!r} is for texts that are continued; use the route /v1/completions.", where
    )
  if not session.masks:
    raise RequestError(
      f"{where!r} needs the package llguidance at the server, as all that restricts tokens does.",
      where,
      schema.UNSUPPORTED,
    )
  for one in job.generations:
    if one.guide or one.method or one.score is not None:
      raise RequestError(
        f"{where!r} goes neither with a grammar, nor with 'entropix.group' or scores of the prompt; leave out one.",
        where,
      )
    for knob in ("allowed", "banned"):
      if one.request.knobs.get(knob):
        raise RequestError(
          f"The knob {knob!r} could leave no token that {where!r} allows; leave out one of them.",
          where,
        )
  return await _threaded(_healed, session, ServiceLaws(service, session), job)


def _healed(session: Session, laws: ServiceLaws, job: calls.Job) -> calls.Job:
  spelled, found = spelling(session.tokenizer), []
  for one in job.generations:
    kept, held = heal.roll_back(spelled, one.request.ids)
    if held:
      # As for a grammar, nothing but the held bytes decides how the text begins.
      request = dataclasses.replace(one.request, ids=[*kept], held=held, actions={})
      tree = heal.Tree(laws, spelled, kept, held)
      one = dataclasses.replace(one, request=request, guide=tree.guide)
    found.append(one)
  return dataclasses.replace(job, generations=found)
