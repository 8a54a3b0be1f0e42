"""The server's process: the socket, the start, signals, and the end."""

import asyncio
import os
import socket
import time
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from entropix_jax.errors import UserError
from entropix_jax.serve.service import Service


class _Server(uvicorn.Server):
  """The first SIGTERM or SIGINT lets running requests end, the second one ends them."""

  def __init__(
    self, config: uvicorn.Config, service: Service, drain_s: float, say: Callable, url: str
  ):
    super().__init__(config)
    self.service, self.drain_s, self.say, self.url = service, drain_s, say, url
    self._draining: asyncio.Task | None = None

  def handle_exit(self, sig: int, frame) -> None:
    """A signal has come; the parent's method would raise it again at the end, which is not a failure here."""
    del sig, frame
    # asyncio runs Python's signal handlers in the main thread, where the loop is.
    loop = asyncio.get_running_loop()
    loop.call_soon_threadsafe(self._end)

  def _end(self) -> None:
    if self._draining is None:
      self.say(
        "Ending: running requests may finish, new ones are refused. Ctrl-C again ends at once."
      )
      self._draining = asyncio.ensure_future(self._drain())
    else:
      self.drain_s = 0.0
      self.service.abort()
      self.should_exit = True

  async def _drain(self) -> None:
    await self.service.drain(self.drain_s)
    self.should_exit = True

  async def watch(self, started: float) -> None:
    """Say when the model is ready, or end where it cannot be loaded."""
    while self.service.state == "starting":  # a thread that waited could not be given up
      await asyncio.sleep(0.05)
    if self.service.error:  # `run` raises it
      self.should_exit = True
      return
    engine = self.service.session.settings.engine
    self.say(
      f"Ready after {time.perf_counter() - started:.0f} s: {engine.batch_size} rows of {engine.max_seq_len} "
      f"tokens, samplers {', '.join(self.service.samplers)}. A page is at {self.url}/."
    )
    if not self.service.compiling:
      return
    self.say(
      f"Compiling {self.service.compiling} more programs meanwhile; texts are slower until then."
    )
    while self.service.compiling:
      await asyncio.sleep(0.2)
    self.say(f"All are compiled after {time.perf_counter() - started:.0f} s.")


def bound(host: str, port: int) -> socket.socket:
  """A socket that listens. Raises UserError where the address cannot be had."""
  try:
    *how, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # With the protocol named, asyncio sets TCP_NODELAY; without, answers wait 40 ms for an acknowledgement.
    made = socket.socket(*how)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    made.listen(2048)
    return made
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", None) or "the name is not one of a host"
    raise UserError(
      f"The server cannot listen at {host}:{port} ({reason}); give another --host or --port."
    ) from None


def run(
  web: Starlette,
  service: Service,
  host: str,
  port: int,
  drain_s: float,
  say: Callable[[str], None],
) -> None:
  """Serve until a signal comes. Raises what kept the model from being loaded."""
  started, sock = time.perf_counter(), bound(host, port)
  config = uvicorn.Config(
    web,
    log_level="warning",
    access_log=False,
    lifespan="off",
    server_header=False,
    timeout_graceful_shutdown=5,
  )
  shown = f"[{host}]" if ":" in host else host
  url = f"http://{shown}:{sock.getsockname()[1]}"
  server = _Server(config, service, drain_s, say, url)
  say(f"Listening at {url}/v1; the model is being loaded.")

  async def whole() -> None:
    service.start()
    watching = asyncio.ensure_future(server.watch(started))
    await server.serve([sock])
    watching.cancel()

  try:
    asyncio.run(whole())
    # Compilers would keep the process for as long as they work.
    if service.state == "starting" or (service.compiling and not service.error):
      os._exit(0)
  finally:
    service.stop()
  if service.error:
    raise service.error
