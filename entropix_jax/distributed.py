"""Several processes, one run: who is there, whether they agree, and what is said when one is lost.

  place    from flags, or from what a TPU pod or Slurm tells: where to meet, how many, which one is this
  join     a context: all processes have come; on leaving it, all end together
  agree    all run the same code on the same settings
  share    a line that only process 0 can read, handed to all

JAX's coordination service connects the processes, carries what they tell each other, and notices when one is
lost. What it cannot do is done here [n27]: a roll call before it starts, one sentence in place of its stack
dumps, and Ctrl-C while C++ runs. Only process 0 prints text; all of them print an error.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import entropix_jax
from entropix_jax.checkpoints import hub
from entropix_jax.errors import Terminated, UserError

LOST = 3  # exit code of a process that ends because another one has gone
SILENCE_S = 20  # JAX gives a process up that it has not heard from for so long
_KEPT = 256  # shared texts that late processes may still read
_FOREVER_MS = 10**9


# -- where to meet -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of how many this is, and where process 0 listens."""

  coordinator: str  # "host:port"
  processes: int
  process: int
  local_devices: Sequence[int] | None = None  # None: all that this process sees

  @property
  def address(self) -> tuple[str, int]:
    """The coordinator's host and port."""
    host, port = self.coordinator.rsplit(":", 1)
    return host.strip("[]"), int(port)


def place(
  coordinator: str | None, processes: int | None, process: int | None, wait_s: float
) -> Place:
  """The Place that these three say; all None: what the TPU pod or Slurm allocation says.

  Raises:
    UserError: some but not all are given, one is out of range, or nothing is found.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == 3:
    return _detect(wait_s)
  if missing:
    raise UserError(
      f"{', '.join(given)} go together and {missing[0]} is missing; leave out all three on a TPU "
      "pod or under Slurm."
    )
  port = coordinator.rpartition(":")[2]
  if not re.fullmatch(r".+:\d{1,5}", coordinator) or not 0 < int(port) < 65536:
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.2:8482.")
  if not 0 <= process < processes:
    raise UserError(
      f"--process={process} of --processes={processes} does not exist; number them "
      f"0 to {processes - 1}."
    )
  return Place(coordinator, processes, process)


def _detect(wait_s: float) -> Place:
  by_hand = "say it with --coordinator=HOST:PORT --processes=N --process=I"
  try:
    # Private, but the one place that knows what jax.distributed.initialize() would find.
    from jax._src import clusters

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(wait_s)
    )
  except Exception as error:  # metadata servers, changed internals: anything may fail here
    raise UserError(
      f"What this host knows of its cluster cannot be read ({_brief(error)}); {by_hand}."
    ) from None
  if None in found[:3]:
    raise UserError(f"--distributed finds neither a TPU pod nor Slurm here; {by_hand}.")
  return Place(*found)


def _brief(error: BaseException) -> str:
  return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


# -- what must be the same everywhere ------------------------------------------------------------


def facts(folder: str, settings: dict[str, Any]) -> dict[str, str]:
  """What every process must have alike: versions, sources, settings and a folder's files.

  Args:
    settings: by the name that a message shall use; nested dictionaries get dotted names.
  """
  known = {"the Python version": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      known[f"the {package} version"] = importlib.metadata.version(package)
  source = hashlib.sha256()
  for path in sorted(Path(entropix_jax.__file__).parent.rglob("*.py")):
    source.update(path.read_bytes())
  known["the code of entropix_jax"] = f"{entropix_jax.__version__} ({source.hexdigest()[:8]})"
  for name in ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS"):
    known[name] = os.environ.get(name, "")

  def flatten(prefix: str, value: Any) -> None:
    if isinstance(value, dict):
      for key, inner in value.items():
        flatten(f"{prefix}.{key}", inner)
    else:
      known[prefix] = str(value)

  for name, value in settings.items():
    flatten(name, value)
  root = hub.local(folder) or Path(folder)
  within = [root] if root.is_file() else sorted(root.rglob("*"))
  files = ((path.relative_to(root), path) for path in within if path.is_file())
  known[f"what lies in {folder}"] = str(
    {str(name): path.stat().st_size for name, path in files if "/." not in f"/{name}"}
  )
  return known


def _short(value: str) -> str:
  if len(value) <= 60:
    return value or "empty"
  return f"{value[:40]}... (digest {hashlib.sha256(value.encode()).hexdigest()[:8]})"


def _difference(mine: dict[str, str], theirs: dict[str, str]) -> tuple[str, str, str] | None:
  """(name, mine, theirs) of the first fact that differs, fit to be read."""
  for name in dict.fromkeys((*mine, *theirs)):
    values = [_short(known.get(name, "unset")) for known in (mine, theirs)]
    if values[0] != values[1]:
      return name, *values
  return None


# -- the processes of a run ----------------------------------------------------------------------


class Peers:
  """The processes of a run, seen from one of them; this class itself is the only one of its run."""

  first = True  # the one that prints and writes
  alone = True  # none but it
  handles_signals = False  # the program ends the run itself when a signal comes

  def agree(self, folder: str, settings: dict[str, Any]) -> None:
    """Make sure that `facts` are the same everywhere."""

  def share(self, read: Callable[[], str]) -> str:
    """What `read()` returns on process 0, on every process."""
    return read()

  def at_end(self, tidy: Callable[[int], str]) -> None:
    """Call this with the exit code before the process is ended early; it returns what to say."""


def _unlike(name: str, there: Any, host: str, here: Any, who: str) -> str:
  both = f"{there} on process 0 ({host}) but {here} on {who}"
  return f"{name} is {both}; every process needs the same."


def _gather(at: Place, wait_s: float) -> list[str]:
  """On process 0: wait until all have come; the host names of all.

  Raises:
    UserError: the port is in use, one is missing, or two have one number; those that have come raise it, too.
  """
  port = at.address[1]
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
  except OSError as error:
    raise UserError(
      f"Port {port} of this host cannot be used ({os.strerror(error.errno)}); end the run that has "
      "it, or choose another port for the coordinator."
    ) from None
  where, until = f"{at.coordinator} within {wait_s:g} s", time.monotonic() + wait_s
  print(f"waiting for all {at.processes} processes to come to {where}", file=sys.stderr, flush=True)
  hosts, links, trouble = {0: socket.gethostname()}, {}, ""
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    while len(hosts) < at.processes and not trouble:
      ready, _, _ = select.select([server, *links], [], [], max(0, until - time.monotonic()))
      if not ready:
        gone = " and process ".join(str(i) for i in range(at.processes) if i not in hosts)
        trouble = f"Process {gone} did not come to {where}; see what it said, and start again."
      elif lost := [links[one] for one in ready if one in links]:
        trouble = f"{lost[0]} has gone before all had come; start all processes again."
      else:
        link = stack.enter_context(server.accept()[0])
        link.settimeout(5)
        try:
          process, processes, name = json.loads(link.makefile("rb").readline())["hello"]
        except (OSError, ValueError, TypeError, KeyError):
          continue  # a stranger
        links[link] = f"process {process} ({name})"
        if processes != at.processes:
          trouble = _unlike("--processes", at.processes, hosts[0], processes, links[link])
        elif process in hosts:
          both = f"on {hosts[process]} and on {name}"
          trouble = f"two processes are number {process}, {both}; number them 0 to {processes - 1}."
        hosts[process] = name
    names = [name for _, name in sorted(hosts.items())]
    for link in links:
      with contextlib.suppress(OSError):
        link.sendall(json.dumps([trouble, names]).encode() + b"\n")
  if trouble:
    raise UserError(trouble)
  return names


def _come(at: Place, wait_s: float) -> list[str]:
  """On another process: come to process 0 and wait for its answer; as `_gather`."""
  until = time.monotonic() + wait_s
  hello = json.dumps({"hello": [at.process, at.processes, socket.gethostname()]}).encode() + b"\n"
  answer = hello
  while answer == hello:  # TCP can connect a free port to itself
    left = until - time.monotonic()
    try:
      with socket.create_connection(at.address, timeout=max(0.1, min(left, 5))) as link:
        link.sendall(hello)
        link.settimeout(wait_s + 10)
        answer = link.makefile("rb").readline()
    except OSError as error:
      if left <= 0:
        raise UserError(
          f"Process 0 did not answer at {at.coordinator} within {wait_s:g} s ({_brief(error)}); "
          "start it on that host, open that port, or correct --coordinator."
        ) from None
      threading.Event().wait(0.3)
  if not answer.startswith(b"["):
    raise UserError(f"Process 0 has gone before all had come, or another run has {at.coordinator}.")
  trouble, names = json.loads(answer)
  if trouble:
    raise UserError(trouble)
  return names


class _Joined(Peers):
  """One of several processes that JAX's coordination service connects."""

  alone = False

  def __init__(self, at: Place):
    self.at, self.first = at, at.process == 0
    self._me = f"process {at.process} ({socket.gethostname()})"
    self._client: Any = None
    self._shared, self._over = 0, False
    self._tidy: list[Callable[[int], str]] = []
    self._ending, self._said, self._code = threading.Lock(), threading.Event(), LOST
    self._hold_back()
    # When a process is lost, a thread of JAX aborts the others; it runs this first.
    self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort)
    # Python raises KeyboardInterrupt only after a call into C++ (compiling!) has returned.
    signals, self._into = socket.socketpair()
    self._into.setblocking(False)
    signal.set_wakeup_fd(self._into.fileno())
    threading.Thread(target=self._interrupted, args=(signals,), daemon=True).start()

  def _hold_back(self) -> None:
    """Python prints as before (on process 0), while what C++ prints is kept for a crash.

    Collectives greet on stdout, and a lost peer makes JAX dump a stack over the sentence that says so.
    """
    self._kept = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
    for name, fd in (("stdout", 1), ("stderr", 2)):
      old = getattr(sys, name)
      old.flush()
      new = open(os.dup(fd), "w", encoding=old.encoding, errors=old.errors, buffering=1)  # noqa: SIM115
      setattr(sys, name, new if self.first else open(os.devnull, "w"))  # noqa: SIM115
      os.dup2(self._kept.fileno(), fd)
    self._error = new

  def _dump(self) -> str:
    """The end of what C++ has printed."""
    self._kept.seek(max(0, self._kept.seek(0, os.SEEK_END) - (1 << 16)))
    return self._kept.read().decode("utf-8", "replace")

  # -- ends

  def _end(self, text: str, code: int, told: str = "", reach: bool = True) -> None:
    """Say `text` here and `told` to all others, and end this process.

    Args:
      reach: whether JAX's service may be called: not from its own thread, and not after a crash.
    """
    if not self._ending.acquire(blocking=False):  # another thread is doing just that
      self._said.wait(10)
      if reach:  # it tells the others, while JAX's thread can wait for nothing more
        threading.Event().wait(10)
      os._exit(self._code)
    self._code = code
    for tidy in self._tidy:
      with contextlib.suppress(Exception):
        text = f"{text} {tidy(code)}".strip()
    cut = "\n" * sys.stdout.isatty()  # a text may have been cut in its line
    for out, line in ((sys.stdout, cut), (self._error, f"{text}\n")):
      with contextlib.suppress(OSError, ValueError):
        print(line, end="", file=out, flush=True)
    self._said.set()
    if self._client and reach:
      with contextlib.suppress(Exception):
        if told:
          said = json.dumps({"text": told, "code": code})
          self._client.key_value_set("stop", said, allow_overwrite=True)
        self._client.wait_at_barrier("stopped", 3000)  # process 0 takes the service with it
    os._exit(code)

  def fail(self, error: BaseException) -> None:
    """End all processes for what went wrong in this one; the others say whose fault it was."""
    text = f"error: {self._me} failed"
    if isinstance(error, UserError):
      text = " ".join(str(error).split())
      self._end(f"error: {text}", 2, f"error: {self._me}: {text}")
    elif isinstance(error, KeyboardInterrupt):
      self._end("stopped.", getattr(error, "code", 130), f"error: {self._me} was interrupted.")
    elif isinstance(error, BrokenPipeError):
      self._end(
        "", 1, f"error: the output of {self._me} was closed, for example by a pipe that ended."
      )
    elif isinstance(error, RuntimeError | ValueError):  # a collective may fail because one is lost
      threading.Event().wait(SILENCE_S + 5)  # JAX says later which
    trace = "".join(traceback.format_exception(error))
    self._end(f"{trace}{self._dump()}{text}.", 1, f"{text}: {_brief(error)}.")

  def _aborted(self, _: int) -> None:
    """What a thread of C++ runs that calls abort()."""
    if self._over:
      os._exit(0)
    dump = self._dump()
    if "JAX distributed service detected fatal errors" not in dump:
      threading.Event().wait(SILENCE_S + 5)  # as above
      self._end(f"{dump}error: {self._me} crashed.", 1, reach=False)
    silent = re.findall(r"unhealthy.*\n(\d+)", dump) or ["0"] * (not self.first)
    who = f"process {silent[-1]} ({self._hosts[int(silent[-1])]})" if silent else "another process"
    text = f"error: {who} has gone, or was silent for {SILENCE_S} s; start all processes again."
    self._end(text, LOST, reach=False)

  def _interrupted(self, signals: socket.socket) -> None:
    while (number := signals.recv(1)[0]) not in (
      signal.SIGINT,
      signal.SIGTERM,
    ) or self.handles_signals:
      pass
    self.fail(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())

  def _heed(self) -> None:
    """End when another process says why, and return when all have finished."""
    with contextlib.suppress(Exception):  # when the service is lost JAX aborts this process
      if said := json.loads(self._client.blocking_key_value_get("stop", _FOREVER_MS)):
        self._end(**said)

  # -- what a run uses

  def meet(self, wait_s: float) -> None:
    """Wait until all have come, and let JAX connect them. Raises UserError."""
    self._hosts = (_gather if self.first else _come)(self.at, wait_s)
    import jax
    from jax._src import distributed  # private, but the one place that has the client

    jax.config.update("jax_enable_preemption_service", False)  # it makes SIGTERM do nothing
    try:
      jax.distributed.initialize(
        *dataclasses.astuple(self.at),
        cluster_detection_method="deactivate",
        initialization_timeout=30,
        heartbeat_timeout_seconds=SILENCE_S,
        shutdown_timeout_seconds=30,
      )
    except RuntimeError as error:
      raise UserError(f"JAX could not connect the processes ({_brief(error)}).") from None
    self._client = distributed.global_state.client
    self._heeding = threading.Thread(target=self._heed, daemon=True)
    self._heeding.start()

  def agree(self, folder: str, settings: dict[str, Any]) -> None:
    mine = facts(folder, settings)
    if self.first:
      self._client.key_value_set("facts", json.dumps(mine))
    theirs = json.loads(self._client.blocking_key_value_get("facts", _FOREVER_MS))
    if found := _difference(theirs, mine):
      name, there, here = found
      text = "error: " + _unlike(name, there, self._hosts[0], here, self._me)
      self._end(text, 2, text)
    self._client.wait_at_barrier("agreed", _FOREVER_MS)

  def share(self, read: Callable[[], str]) -> str:
    self._shared += 1
    key = f"shared/{self._shared}"
    if self.first:
      self._client.key_value_set(key, read())
      # A server shares for weeks. No process is so many dispatches behind another one.
      if self._shared > _KEPT:
        self._client.key_value_delete(f"shared/{self._shared - _KEPT}")
    return self._client.blocking_key_value_get(key, _FOREVER_MS)

  def at_end(self, tidy: Callable[[int], str]) -> None:
    self._tidy.append(tidy)

  def finish(self) -> None:
    """Wait until all have finished; after that a lost process is not reported."""
    import jax

    self._client.wait_at_barrier("finished", _FOREVER_MS)
    self._over = True
    if self.first:
      self._client.key_value_set("stop", "null")
    self._heeding.join()  # a thread that waits in C++ would crash Python's own ending
    jax.distributed.shutdown()


@contextlib.contextmanager
def join(at: Place | None, wait_s: float) -> Iterator[Peers]:
  """All processes of a run, once they have come; on leaving, all have finished.

  An error inside ends all processes: this one says it, the others say whose it was. Then, and when a
  process is lost, the process ends here and now, since JAX's own ending waits for all of them.

  Args:
    at: None, or a place with one process, for a run of a single process.
    wait_s: seconds to wait for the others to come.

  Raises:
    UserError: this process cannot take its place.
  """
  if at is None or at.processes == 1:
    yield Peers()
    return
  peers = _Joined(at)
  try:
    peers.meet(wait_s)
    yield peers
    peers.finish()
  except BaseException as error:
    peers.fail(error)
