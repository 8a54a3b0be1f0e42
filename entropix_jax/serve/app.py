"""The routes of the server, and how their answers are written."""

import asyncio
import collections
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

import entropix_jax
from entropix_jax.errors import UserError
from entropix_jax.serve import about, bodies, calls, page, schema, token_routes
from entropix_jax.serve.around import LOG, Cors, Json, Keys, Outside, Watched, problem
from entropix_jax.serve.bodies import Problem, Writer
from entropix_jax.serve.calls import Job
from entropix_jax.serve.exchange import Event, ServiceError, refusal
from entropix_jax.serve.metrics import Metrics
from entropix_jax.serve.schema import Chat, Completion, RequestError
from entropix_jax.serve.service import Service, Stream
from entropix_jax.session import Session

PING_S = 15.0  # the longest silence in a stream
_UNREAD = 256  # events of a request that may wait for a slow client
_LONG = 2**15  # bytes; a longer body is read as text and ids in a thread
_NAMES = 16  # of ignored fields in a header
_STREAM = {
  "content-type": "text/event-stream; charset=utf-8",
  "cache-control": "no-cache",
  "x-accel-buffering": "no",
}


def app(
  service: Service,
  session: Session,
  name: str,
  keys: Sequence[str] = (),
  origins: Sequence[str] = (),
  metrics: Metrics | None = None,
  implicit_bos: bool = False,
) -> Starlette:
  """The server as an ASGI application.

  Args:
    session: what prompts, the tokenizer and the settings of requests come from.
    name: of the model, for clients.
    keys: a client must send one of them; empty: no client needs a key.
    origins: of web pages that may use the server; empty: no CORS headers.
    metrics: those that the engine writes to; None: new ones. They are `app.state.metrics`.
    implicit_bos: see `calls.completion`.
  """
  metrics = metrics or Metrics(name)
  routes = _Routes(service, session, name, metrics, implicit_bos)
  table = {
    "/v1/chat/completions": ("POST", routes.chat),
    "/v1/completions": ("POST", routes.completions),
    "/v1/entropix/score": ("POST", routes.score),
    "/v1/entropix/info": ("GET", routes.info),
    "/v1/entropix/branches": ("POST", routes.branches),
    "/v1/entropix/calibrate": ("POST", routes.calibrate),
    "/v1/models": ("GET", routes.models),
    "/v1/models/{id:path}": ("GET", routes.model),
    **token_routes.table(routes),
    "/tokenize": ("POST", routes.tokenize),
    "/detokenize": ("POST", routes.detokenize),
    "/tokenizer_info": ("GET", routes.tokenizer_info),
    "/openapi.json": ("GET", routes.openapi),
    "/health": ("GET", routes.health),
    "/ready": ("GET", routes.ready),
    "/version": ("GET", routes.version),
    "/metrics": ("GET", routes.metrics_page),
    "/": ("GET", page.serve),
    page.ROUTE: ("GET", page.serve),
  }
  middleware = [Middleware(Outside, metrics=metrics, paths=frozenset(table))]
  if origins:
    shown = ["x-request-id", "x-entropix-ignored", "retry-after"]
    anything = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": shown}
    middleware.insert(0, Middleware(Cors, allow_origins=list(origins), **anything))
  if keys:
    middleware.append(Middleware(Keys, keys=keys, metrics=metrics))

  async def failed(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
      return Response(status_code=499)  # the client has gone; the status is for the metrics
    return problem(error, metrics)

  concrete = (HTTPException, RequestError, ServiceError, UserError, ClientDisconnect)
  made = Starlette(
    routes=[Route(path, call, methods=[verb]) for path, (verb, call) in table.items()],
    middleware=middleware,
    exception_handlers=dict.fromkeys(concrete, failed),
  )
  made.router.redirect_slashes = False
  made.state.metrics = metrics
  return made


async def _batches(stream: Stream) -> AsyncIterator[list[Event]]:
  """The events of a stream, all that are there at a time; [] after each PING_S seconds without one."""
  ready: list[Event] = []
  more, room = asyncio.Event(), asyncio.Event()

  async def pump() -> None:
    async for event in stream:
      ready.append(event)
      more.set()
      if len(ready) >= _UNREAD:
        room.clear()
        await room.wait()

  def over(task: asyncio.Task) -> None:
    if not task.cancelled():
      task.exception()  # asyncio complains of one that is not looked at
    more.set()

  task = asyncio.create_task(pump())
  task.add_done_callback(over)
  try:
    while True:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PING_S):
          await more.wait()
      more.clear()
      ended = task.done()
      batch, ready[:] = ready[:], []
      room.set()
      if batch or not ended:
        yield batch
      if ended:
        task.result()
        return
  finally:
    task.cancel()
    stream.cancel()


# -- routes ------------------------------------------------------------------------------------


class _Routes:
  def __init__(
    self, service: Service, session: Session, name: str, metrics: Metrics, implicit_bos: bool
  ):
    self.service, self.session, self.name, self.metrics = service, session, name, metrics
    self.implicit_bos = implicit_bos
    self.created = int(time.time())

  async def chat(self, request: Request) -> Response:
    return await self._generate(request, Chat, calls.chat)

  async def completions(self, request: Request) -> Response:
    plan = functools.partial(calls.completion, implicit_bos=self.implicit_bos)
    return await self._generate(request, Completion, plan)

  async def _generate(self, request: Request, kind, plan: Callable[..., Job]) -> Response:
    arrived = time.perf_counter()
    self._admit()
    data = await self._read(request)
    body, headers = self._check(kind, data)
    limits, prompts = self.service.limits, len(getattr(body, "prompt", "1"))
    for field, number, most in (
      ("n", body.n, limits.samples),
      ("prompt", prompts, limits.prompts),
      ("n", body.n * prompts, limits.queued_requests),
      ("stop", len(body.stop), limits.stop_texts),
    ):
      if number > most:
        raise RequestError(f"{field!r} asks for {number}, and {most} is the most here.", field)
    long = len(data) >= _LONG or body.grammars
    job = await self._planned(long, plan, self.session, self.service, body)
    if token_routes.wanted(self.session, body):
      job = await token_routes.healed(self.service, self.session, body, job)
    fingerprint = self.service.fingerprint
    writer = Writer(body, job, self.session.tokenizer, self.name, fingerprint)
    return _Answer(self._submit(job), writer, self.metrics, arrived, headers)

  async def score(self, request: Request) -> Response:
    self._admit()
    data = await self._read(request)
    body, headers = self._check(schema.Score, data)
    if len(body.items) > self.service.limits.prompts:
      most = self.service.limits.prompts
      raise RequestError(f"'items' has {len(body.items)} entries, and {most} is the most.", "items")
    job = await self._planned(len(data) >= _LONG, calls.score, self.session, body)
    stream = self._submit(job)

    async def work(send: Send) -> None:
      found: dict[int, dict] = {}
      async with contextlib.aclosing(_batches(stream)) as batches:
        async for batch in batches:
          for event in batch:
            found[event.call] = self._scored(event, body.apply_softmax)
      used = sum(len(generation.request.ids) for generation in job.generations)
      answer = {
        "object": "entropix.score",
        "model": self.name,
        "data": [found[i] for i in range(len(job.generations))],
        "usage": {"prompt_tokens": used, "completion_tokens": 0, "total_tokens": used},
      }
      await Json(answer, headers=headers)(request.scope, request.receive, send)

    return Watched(stream, work)

  def _scored(self, event: Event, softmax: bool) -> dict[str, Any]:
    logprobs = list(map(bodies.finite, event.what.logprobs))
    scored = {"index": event.call, "logprobs": logprobs}
    if softmax:
      shares = np.exp(np.asarray(logprobs) - max(logprobs))
      scored["probabilities"] = (shares / shares.sum()).tolist()
    return scored

  async def info(self, _: Request) -> Response:
    """What a page must know: samplers, knobs, presets, methods."""
    return Json(about.info(self.session, self.name))

  async def branches(self, request: Request) -> Response:
    """Which branches the sampler quadrant would choose with some knobs."""
    body, headers = self._check(schema.Texts, await self._read(request))
    return Json(await asyncio.to_thread(calls.branches, body), headers=headers)

  async def calibrate(self, request: Request) -> Response:
    """Thresholds of the sampler quadrant as quantiles of what some texts show."""
    body, headers = self._check(schema.Texts, await self._read(request))
    return Json(await asyncio.to_thread(calls.calibrated, body), headers=headers)

  async def models(self, _: Request) -> Response:
    return Json({"object": "list", "data": [self._card()]})

  async def model(self, request: Request) -> Response:
    self._known(request.path_params["id"])
    return Json(self._card())

  def _card(self) -> dict[str, Any]:
    most = self.session.settings.engine.max_seq_len
    card = {"id": self.name, "object": "model", "created": self.created}
    return card | {"owned_by": "entropix_jax", "max_model_len": most}

  async def tokenize(self, request: Request) -> Response:
    data = await self._read(request)
    body, headers = self._check(schema.Tokenize, data)

    def ids() -> list[int]:
      if body.messages is not None:
        return calls.messages(self.session, body.messages)
      plain = calls.spelt(tok, body.prompt)
      return calls.begun(tok, plain) if body.add_special_tokens else plain

    tok = self.session.tokenizer
    found = await self._planned(len(data) >= _LONG, ids)
    answer = {"count": len(found), "max_model_len": self._card()["max_model_len"], "tokens": found}
    if body.return_token_strs:
      answer["token_strs"] = [tok.token_bytes(id).decode("utf-8", "replace") for id in found]
    return Json(answer, headers=headers)

  async def detokenize(self, request: Request) -> Response:
    body, headers = self._check(schema.Detokenize, await self._read(request))
    calls.check_ids(self.session, body.tokens, "tokens")
    return Json({"prompt": self.session.tokenizer.decode(body.tokens, True)}, headers=headers)

  async def tokenizer_info(self, _: Request) -> Response:
    """What a client needs to write prompts itself; the template holds the names that it reads."""
    tok, form = self.session.tokenizer, self.session.format
    spelling = {id: text for text, id in tok.special.items()}
    end = next((spelling[id] for id in (*tok.ends, *self.session.stop) if id in spelling), None)
    template = None
    if form is not None:
      values = tok.names | form.variables
      template = "".join(
        f"{{% set {key} = {_literal(value)} %}}" for key, value in values.items()
      ) + form.source  # fmt: skip
    return Json(
      {
        "eos_token": end,
        "bos_token": spelling.get(tok.bos),
        "pad_token": tok.names.get("pad_token"),
        "chat_template": template,
        "model_max_length": self.session.settings.engine.max_seq_len,
      }
    )

  async def openapi(self, _: Request) -> Response:
    """What the routes that take a body accept, as an OpenAPI document."""
    return Json(schema.document(entropix_jax.__version__))

  async def health(self, _: Request) -> Response:
    if self.service.state == "dead" or not self.service.healthy:
      raise refusal("dead")
    return Json({"status": "ok"})

  async def ready(self, _: Request) -> Response:
    if self.service.state != "ready":
      raise refusal(self.service.state)
    return Json({"status": "ready", "compiling": self.service.compiling})

  async def version(self, _: Request) -> Response:
    return Json({"version": entropix_jax.__version__})

  async def metrics_page(self, _: Request) -> Response:
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(self.metrics.exposition(), headers={"content-type": kind})

  # -- what routes share ---------------------------------------------------------------------

  def _admit(self) -> None:
    """Raises ServiceError where the service takes no request at all."""
    if self.service.state != "ready":
      error = refusal(self.service.state)
      self.metrics.count("admission_rejections", label=error.code)
      raise error

  def _submit(self, job: Job) -> Stream:
    try:
      return self.service.submit(job.generations)
    except ServiceError as error:
      self.metrics.count("admission_rejections", label=error.code)
      raise

  async def _read(self, request: Request) -> bytes:
    """The body of a request. Raises RequestError for one that is too large or is not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
      raise RequestError("The content type must be application/json.", None, "invalid_json")
    most, parts = self.service.limits.body_bytes, []
    told = request.headers.get("content-length", "")
    size = int(told) if told.isascii() and told.isdecimal() and len(told) < 16 else 0
    if size <= most:
      size = 0
      async for part in request.stream():
        size += len(part)
        if size > most:
          break
        parts.append(part)
    if size > most:
      raise RequestError(f"The body has more than {most} bytes.", None, "body_too_large", 413)
    return b"".join(parts)

  def _check(self, kind, data: bytes):
    """(the checked body, headers that name ignored fields). Raises RequestError."""
    try:
      values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
      at = f"line {error.lineno}, column {error.colno}"
      raise RequestError(
        f"The body is not JSON: {error.msg} ({at}).", None, "invalid_json"
      ) from None
    body, ignored = schema.check(kind, values)
    self._known(body.model)
    counts = collections.Counter(x if x in schema.UNUSED else "other" for x in ignored)
    for field, number in counts.items():
      self.metrics.count("ignored_fields", number, field)
    names = ",".join(quote(field[:64], safe="") for field in ignored[:_NAMES])
    return body, {"x-entropix-ignored": names} if names else {}

  def _known(self, model: str | None) -> None:
    if model not in (None, self.name):
      raise RequestError(
        f"There is no model {model[:100]!r}; this server has {self.name!r}.",
        "model",
        "model_not_found",
        404,
      )

  async def _planned(self, long: bool, plan: Callable, *args) -> Any:
    """plan(*args); in a thread where it takes long, so that other requests go on."""
    return await asyncio.to_thread(plan, *args) if long else plan(*args)


class _Answer(Watched):
  """The answer of a chat or a completion, whole or as a stream, and its metrics."""

  def __init__(
    self, stream: Stream, writer: Writer, metrics: Metrics, arrived: float, headers: dict[str, str]
  ):
    super().__init__(stream, self._streamed if writer.body.stream else self._whole)
    self.writer, self.metrics, self.more = writer, metrics, headers
    self.arrived, self.first = arrived, 0.0

  async def _whole(self, send: Send) -> None:
    async with contextlib.aclosing(_batches(self.stream)) as batches:
      async for batch in batches:
        self._take(batch)
    self._ended()
    body = orjson.dumps(self.writer.whole())
    await _begin(
      send, {"content-type": "application/json", "content-length": str(len(body))} | self.more
    )
    await send({"type": "http.response.body", "body": body})

  async def _streamed(self, send: Send) -> None:
    """Begins with the first event, so that an error before it is a plain one, or with the first ping."""
    begun, writer = False, self.writer
    try:
      async with contextlib.aclosing(_batches(self.stream)) as batches:
        async for batch in batches:
          data = writer.pieces(self._take(batch)) if batch else bodies.PING
          if not begun:
            begun, data = True, writer.opening() + data
            await _begin(send, _STREAM | self.more)
          if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
      self._ended()
      data = writer.closing()
    except Exception as error:
      if not begun:
        raise
      said = Problem.of(error)
      if said.status == 500 and said.code == "internal_error":
        LOG.exception("stream %s", writer.head["id"])
      self.metrics.count("request_errors", label=said.code or str(said.status))
      data = bodies.event(said.body) + bodies.DONE
    await send({"type": "http.response.body", "body": data})

  def _take(self, batch: list[Event]) -> list[bodies.Choice]:
    """Take in events; the choices that have grown, each once."""
    if not self.first and batch:
      self._first()
    grown: dict[bodies.Choice, None] = {}
    for event in batch:
      grown |= dict.fromkeys(self.writer.push(event))
    now = time.perf_counter()
    for choice in grown:
      if choice.last:
        self.metrics.observe("inter_token_latency_seconds", now - choice.last)
      choice.first, choice.last = choice.first or now, now
      if choice.finish:
        self._finished(choice)
    return list(grown)

  def _first(self) -> None:
    self.first, metrics = time.perf_counter(), self.metrics
    self.writer.cached = self.stream.cached_tokens
    whole, late = self.first - self.arrived, self.stream.late
    metrics.observe("time_to_first_token_seconds", whole)
    metrics.observe("request_queue_time_seconds", late)
    metrics.observe("request_prefill_time_seconds", max(whole - late, 0.0))

  def _finished(self, choice: bodies.Choice) -> None:
    metrics, seconds = self.metrics, choice.last - choice.first
    metrics.count("request_success", label=choice.finish)
    metrics.observe("request_decode_time_seconds", seconds)
    if choice.count > 1:
      metrics.observe("request_time_per_output_token_seconds", seconds / (choice.count - 1))

  def _ended(self) -> None:
    """Check that all texts are there, and count them."""
    if not self.writer.done:
      raise RuntimeError("the stream of events ended before all texts did")
    metrics, usage = self.metrics, self.writer.usage()
    metrics.observe("e2e_request_latency_seconds", time.perf_counter() - self.arrived)
    metrics.observe("request_params_n", self.writer.body.n)
    for kind, name in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
      metrics.count(f"{kind}_tokens", usage[name])
      metrics.observe(f"request_{kind}_tokens", usage[name])


async def _begin(send: Send, headers: dict[str, str]) -> None:
  raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
  await send({"type": "http.response.start", "status": 200, "headers": raw})


def _literal(value: Any) -> str:
  """A string, a number or a truth value as a literal of Jinja."""
  return orjson.dumps(value).decode()
