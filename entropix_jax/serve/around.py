"""What surrounds the routes: request ids, keys, CORS, errors of every kind, and clients that go away."""

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entropix_jax.serve.bodies import Problem
from entropix_jax.serve.metrics import Metrics
from entropix_jax.serve.schema import RequestError
from entropix_jax.serve.service import Stream

OPEN = ("/", "/health", "/ready", "/version", "/metrics")  # routes that need no key
LOG = logging.getLogger(__name__)


class Json(Response):
  """A body as JSON."""

  media_type = "application/json"

  def render(self, content: Any) -> bytes:
    """The bytes of the body."""
    return orjson.dumps(content)


def problem(error: Exception, metrics: Metrics) -> Response:
  """The answer to a request that has failed before its answer began."""
  if isinstance(error, HTTPException):  # of the router
    what = "route" if error.status_code == 404 else "method for this route"
    said = Problem(
      error.status_code, f"There is no such {what}.", None, None, dict(error.headers or {})
    )
  else:
    said = Problem.of(error)
  metrics.count("request_errors", label=said.code or str(said.status))
  return Json(said.body, said.status, said.headers)


class Outside:
  """Gives each request an id, counts its status, and answers where a defect of the server would have no answer."""

  def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]):
    self.app, self.metrics, self.paths = app, metrics, paths

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    given = Headers(scope=scope).get("x-request-id", "")
    id = given if re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII) else f"req-{uuid.uuid4().hex}"
    begun = False

    async def outward(message: Message) -> None:
      nonlocal begun
      if message["type"] == "http.response.start":
        begun = True
        MutableHeaders(raw=message["headers"])["x-request-id"] = id
        path = scope["path"]
        path = "/v1/models/{id:path}" if path.startswith("/v1/models/") else path
        self.metrics.http(path if path in self.paths else "other", message["status"])
      await send(message)

    try:
      await self.app(scope, receive, outward)
    except Exception as error:
      LOG.exception("request %s", id)
      if not begun:
        await problem(error, self.metrics)(scope, receive, outward)


class Keys:
  """Lets requests with one of the keys through, and those that need none."""

  def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics):
    self.app, self.metrics = app, metrics
    self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    open = scope.get("path") in OPEN or scope.get("path", "").startswith("/page/")
    if scope["type"] == "http" and scope["method"] != "OPTIONS" and not open:
      kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
      digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
      # All keys are compared, so that the time does not tell which one is near.
      right = sum([hmac.compare_digest(digest, known) for known in self.digests])
      if kind.lower() != "bearer" or not right:
        refusal = RequestError("The API key is missing or wrong.", None, "invalid_api_key", 401)
        response = problem(refusal, self.metrics)
        response.headers["www-authenticate"] = "Bearer"
        return await response(scope, receive, send)
    await self.app(scope, receive, send)


class Cors(CORSMiddleware):
  """Its refusals have a body like all others."""

  def preflight_response(self, request_headers: Headers) -> Response:
    """The answer to a question of a browser before its request."""
    response = super().preflight_response(request_headers)
    if response.status_code == 200:
      return response
    headers = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
    return Json(Problem(400, bytes(response.body).decode() + ".").body, 400, headers)


class Watched(Response):
  """An answer that takes time: `work(send)` makes it, and is given up when the client goes."""

  def __init__(self, stream: Stream, work: Callable[[Send], Awaitable[None]]):
    self.stream, self.work = stream, work

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def gone() -> None:
      while (await receive())["type"] != "http.disconnect":
        pass

    tasks = [asyncio.create_task(self.work(send)), asyncio.create_task(gone())]
    try:
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if tasks[0].done():
        return tasks[0].result()
    finally:
      self.stream.cancel()
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
