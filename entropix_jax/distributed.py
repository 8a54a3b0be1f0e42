"""Several processes, one run: who is there, whether they agree, and what is said when one is lost.

  place    from flags, or from what a TPU pod or Slurm tells: where to meet, how many, which one is this
  join     a context: all processes have come; on leaving it, all end together
  agree    all run the same code on the same settings; JAX is told of the others
  share    a line that only process 0 can read, handed to all
  cores    of a CPU, as devices
  claim    the devices, or one sentence why they cannot be had

Why: JAX aborts with a stack dump when a peer never starts, waits in a collective when one dies, and
hangs or answers wrongly when settings differ. So the processes also hold plain TCP connections, one
from each to process 0, at the port beside the coordinator's: they meet there first, beat while they
run, and carry the one sentence that ends them all. Only process 0 prints; all of them print an error.
"""

import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import entropix_jax
from entropix_jax.config import MeshConfig
from entropix_jax.errors import UserError

LOST = 3  # exit code of a process that ends because another one has gone
_FORCED = "xla_force_host_platform_device_count"
_BEAT_S, _SILENCE_S = 3.0, 40.0
_LONGEST = 1 << 24  # bytes of a message; what is longer comes from a stranger


# -- where to meet -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of how many this is, and where process 0 listens."""

  coordinator: str  # "host:port" of JAX's own service; the port beside it is ours
  processes: int
  process: int
  local_devices: Sequence[int] | None = None  # None: all that this process sees

  def address(self, beside: bool = False) -> tuple[str, int]:
    """(host, port) of JAX's service, or of the meeting place beside it."""
    host, port = self.coordinator.rsplit(":", 1)
    number = int(port)
    return host.strip("[]"), number + (1 if number < 65535 else -1) * beside


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
  if (
    not re.fullmatch(r".+:\d{1,5}", coordinator) or not 0 < int(coordinator.split(":")[-1]) < 65536
  ):
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
  root = Path(folder).expanduser()
  files = ((path.relative_to(root), path) for path in sorted(root.rglob("*")) if path.is_file())
  known[f"what lies in {folder}"] = str(
    {str(name): path.stat().st_size for name, path in files if "/." not in f"/{name}"}
  )
  return known


def _difference(mine: dict[str, str], theirs: dict[str, str]) -> tuple[str, str, str] | None:
  """(name, mine, theirs) of the first fact that differs, fit to be read."""
  for name in dict.fromkeys((*mine, *theirs)):
    values = [known.get(name, "unset") or "empty" for known in (mine, theirs)]
    if values[0] != values[1]:
      return name, *map(_short, values)
  return None


def _short(value: str) -> str:
  if len(value) <= 60:
    return value
  return f"{value[:40]}... (digest {hashlib.sha256(value.encode()).hexdigest()[:8]})"


# -- the processes of a run ----------------------------------------------------------------------


class Peers:
  """The processes of a run, seen from one of them; this class itself is the only one of its run."""

  first = True  # the one that prints and writes
  alone = True  # none but it

  def agree(self, folder: str, settings: dict[str, Any]) -> None:
    """Make sure that `facts` are the same everywhere, then let JAX connect the processes."""

  def share(self, read: Callable[[], str]) -> str:
    """What `read()` returns on process 0, on every process."""
    return read()

  def at_end(self, tidy: Callable[[], None]) -> None:
    """Call this before the process is ended because of another one."""


class _Link:
  """One connection: JSON lines both ways."""

  def __init__(self, sock: socket.socket):
    sock.settimeout(10)
    self.sock = sock
    self.process: int | None = None  # not known before it has said so
    self.host = ""
    self.heard = time.monotonic()
    self.facts: dict[str, str] | None = None
    self.done = False
    self._rest = b""
    self._lock = threading.Lock()

  def __str__(self):
    return f"process {self.process} ({self.host})"

  def send(self, kind: str, **content: Any) -> None:
    """A failure to send is no news: reading will notice it."""
    with self._lock, contextlib.suppress(OSError):
      self.sock.sendall(json.dumps({"kind": kind} | content).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """Messages that have come; None when the other end is closed or is no process of ours."""
    try:
      data = self.sock.recv(1 << 16)
      *lines, self._rest = (self._rest + data).split(b"\n")
      messages = [json.loads(line) for line in lines]
    except (OSError, ValueError):
      return None
    known = all(isinstance(m, dict) and "kind" in m for m in messages)
    if not data or not known or len(self._rest) > _LONGEST:
      return None
    self.heard = time.monotonic()
    return messages

  def drain(self, until: float) -> None:
    """Read to the end of what comes: closing with unread bytes would discard what was sent."""
    with contextlib.suppress(OSError):
      self.sock.shutdown(socket.SHUT_WR)
      while time.monotonic() < until:
        self.sock.settimeout(max(0.01, until - time.monotonic()))
        if not self.sock.recv(1 << 16):
          return


class _Joined(Peers):
  """One of several processes: process 0 holds a link to each other one, and they to it."""

  alone = False

  def __init__(self, at: Place, wait_s: float):
    self.at, self.first, self._wait_s = at, at.process == 0, wait_s
    self._host = socket.gethostname()
    self._links: list[_Link] = []
    self._selector = selectors.DefaultSelector()
    self._changed = threading.Condition()
    self._came = self._agreed = self._over = False
    self._lines: queue.Queue[str] = queue.Queue()
    self._tidy: list[Callable[[], None]] = []
    self._ending = threading.Lock()
    if self.first:
      self._server = self._listen()
      self._selector.register(self._server, selectors.EVENT_READ)
    # Python raises KeyboardInterrupt only after a call into C++ (compiling!) has returned.
    self._signals, into = socket.socketpair()
    into.setblocking(False)
    self._selector.register(self._signals, selectors.EVENT_READ, into)  # and keeps `into` open
    signal.set_wakeup_fd(into.fileno())
    self._error, self._held = sys.stderr, b""
    self._hold_back()

  # -- output

  def _hold_back(self) -> None:
    """Python prints as before (on process 0), while what C++ prints is kept for a crash.

    Collectives greet on stdout, and a lost peer makes JAX dump a stack over the sentence that says so.
    """
    for name, fd in (("stdout", 1), ("stderr", 2)):
      old = getattr(sys, name)
      old.flush()
      new = open(os.dup(fd), "w", encoding=old.encoding, errors=old.errors, buffering=1)  # noqa: SIM115
      if name == "stderr":
        self._error = new
      setattr(sys, name, new if self.first else open(os.devnull, "w"))  # noqa: SIM115
    out, into = os.pipe()
    for fd in (1, 2):
      os.dup2(into, fd)
    threading.Thread(target=self._keep, args=(out,), daemon=True).start()

  def _keep(self, fd: int) -> None:
    while data := os.read(fd, 1 << 16):
      self._held = (self._held + data)[-(1 << 16) :]
      if re.search(rb"^F\d{4} ", self._held, re.MULTILINE):  # a fatal line of absl's log
        threading.Event().wait(3)  # long enough to learn that a peer has gone
        with self._ending:
          self._show_held()

  def _show_held(self) -> None:
    held, self._held = self._held, b""
    with contextlib.suppress(OSError):
      self._error.write(held.decode("utf-8", "replace"))
      self._error.flush()

  def _end(self, text: str, code: int, told: str | None = None) -> None:
    """Say `text` here and `told` to all the others, and end this process."""
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # another thread is doing just that
    for link in self._links:
      link.send("stop", text=told or text, code=code)
    for tidy in self._tidy:
      with contextlib.suppress(Exception):
        tidy()
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.write("\n" * sys.stdout.isatty())  # a text may have been cut in its line
      sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
      print(text, file=self._error, flush=True)
    until = time.monotonic() + 2
    for link in self._links:
      link.drain(until)
    os._exit(code)

  def fail(self, error: BaseException) -> None:
    """End all processes for what went wrong in this one; the others say whose fault it was."""
    me = f"process {self.at.process} ({self._host})"
    if isinstance(error, UserError):
      text = " ".join(str(error).split())
      self._end(f"error: {text}", 2, f"error: {me}: {text}")
    elif isinstance(error, KeyboardInterrupt):
      self._end("stopped.", 130, f"error: {me} was interrupted.")
    elif isinstance(error, BrokenPipeError):
      self._end("", 1, f"error: nobody reads what {me} prints any more.")
    threading.Event().wait(5)  # a collective fails because a peer has gone: let that be said
    with self._ending:
      traceback.print_exception(error, file=self._error)
      self._show_held()
    self._end(f"error: {me} failed.", 1, f"error: {me} failed: {_brief(error)}.")

  # -- meeting

  def _listen(self) -> socket.socket:
    port = self.at.address()[1]
    both = socket.has_dualstack_ipv6()
    options = {"family": socket.AF_INET6 if both else socket.AF_INET, "dualstack_ipv6": both}
    try:
      socket.create_server(("", port), **options).close()  # JAX would abort later
      port = self.at.address(beside=True)[1]
      return socket.create_server(("", port), backlog=self.at.processes, **options)
    except OSError as error:
      raise UserError(
        f"Port {port} of this host cannot be used ({error.strerror}); end the run that has it, or "
        "choose another port for the coordinator."
      ) from None

  def _connect(self) -> socket.socket:
    host, port = self.at.address(beside=True)
    start = time.monotonic()
    said = False
    while True:
      left = start + self._wait_s - time.monotonic()
      try:
        sock = socket.create_connection((host, port), timeout=max(0.1, min(left, 5)))
        if sock.getsockname() != sock.getpeername():  # TCP can connect a free port to itself
          return sock
        sock.close()
      except OSError as error:
        if left <= 0:
          raise UserError(
            f"Process 0 did not answer at {host}:{port} within {self._wait_s:g} s ({_brief(error)}); "
            "start it on that host, open that port, or correct --coordinator."
          ) from None
      if not said and time.monotonic() - start > 5:
        print(
          f"waiting for process 0 at {host}:{port} (up to {self._wait_s:g} s)",
          file=self._error,
          flush=True,
        )
        said = True
      threading.Event().wait(0.3)

  def meet(self) -> None:
    """Wait until all have come. Raises UserError, or ends the process with a sentence."""
    if self.first:
      host, port = self.at.address(beside=True)
      others = self.at.processes - 1
      print(
        f"waiting for {others} more process{'es' * (others > 1)} at {host}:{port} "
        f"(up to {self._wait_s:g} s)",
        file=self._error,
        flush=True,
      )
    else:
      link = _Link(self._connect())
      link.process, link.host = 0, self.at.address()[0]
      self._links.append(link)
      self._selector.register(link.sock, selectors.EVENT_READ, link)
      link.send("hello", process=self.at.process, processes=self.at.processes, host=self._host)
    self._thread = threading.Thread(target=self._attend, daemon=True)
    self._thread.start()
    # Process 0 judges who is missing; the others allow it the time to say so.
    if self._await(lambda: self._came, self._wait_s if self.first else self._wait_s + 10):
      return
    here = {link.process for link in self._links} | {self.at.process}
    gone = [str(i) for i in range(self.at.processes) if i not in here]
    if not self.first or not gone:
      raise UserError(f"Process 0 did not say within {self._wait_s:g} s that all have come.")
    which = f"Process {gone[0]} has" if len(gone) == 1 else f"Processes {', '.join(gone)} have"
    text = (
      f"error: {which} not come to {host}:{port} within {self._wait_s:g} s; see what was said "
      "there, and start all processes again."
    )
    self._end(text, 2)

  def _await(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
    with self._changed:
      return self._changed.wait_for(ready, seconds)

  # -- the thread that reads

  def _attend(self) -> None:
    beaten = 0.0
    while not self._over:
      for key, _ in self._selector.select(timeout=0.5):
        if key.fileobj is self._signals:
          if signal.SIGINT in self._signals.recv(64):
            self.fail(KeyboardInterrupt())
        elif key.data is None:
          with contextlib.suppress(OSError):
            link = _Link(self._server.accept()[0])
            self._selector.register(link.sock, selectors.EVENT_READ, link)
        else:
          self._read(key.data)
      now = time.monotonic()
      if now - beaten > _BEAT_S:
        beaten = now
        for link in self._links:
          link.send("beat")
      for link in self._links:
        if not link.done and now - link.heard > _SILENCE_S:
          self._lost(link)

  def _read(self, link: _Link) -> None:
    messages = link.receive()
    if messages is None:
      self._selector.unregister(link.sock)
      if link in self._links and not link.done:
        self._lost(link)
      return
    for message in messages:
      kind = message["kind"]
      if link.process is None and kind != "hello":
        continue  # a stranger
      if kind == "hello":
        with contextlib.suppress(KeyError, TypeError, ValueError):
          self._greet(link, message)
      elif kind == "stop":
        self._end(str(message["text"]), int(message["code"]))
      elif kind == "line":
        self._lines.put(message["text"])
      with self._changed:
        if kind == "facts":
          link.facts = message["facts"]
        elif kind == "here":
          link.host, self._came = message["host"], True
        elif kind == "go":
          self._agreed = True
        elif kind == "done":
          link.done = True
        self._changed.notify_all()

  def _greet(self, link: _Link, message: dict[str, Any]) -> None:
    link.process, link.host = int(message["process"]), str(message["host"])
    twin = next((other for other in self._links if other.process == link.process), None)
    self._links.append(link)
    if message["processes"] != self.at.processes:
      self._end(
        f"error: --processes is {self.at.processes} on process 0 ({self._host}) but "
        f"{message['processes']} on {link}; every process needs the same.",
        2,
      )
    if twin:
      self._end(
        f"error: two processes are number {link.process}, on {twin.host} and on {link.host}; "
        f"number them 0 to {self.at.processes - 1}.",
        2,
      )
    if len(self._links) == self.at.processes - 1:
      for known in self._links:
        known.send("here", host=self._host)
      self._came = True

  def _lost(self, link: _Link) -> None:
    self._end(f"error: {link} has gone; this run cannot go on, so start all processes again.", LOST)

  # -- what a run uses

  def agree(self, folder: str, settings: dict[str, Any]) -> None:
    """Make sure that `facts` are the same everywhere, then let JAX connect the processes."""
    known = facts(folder, settings)
    if self.first:
      self._await(lambda: all(link.facts is not None for link in self._links))
      for link in self._links:
        if found := _difference(known, link.facts):
          name, mine, theirs = found
          self._end(
            f"error: {name} is {mine} on process 0 ({self._host}) but {theirs} on {link}; "
            "every process needs the same.",
            2,
          )
      for link in self._links:
        link.send("go")
    else:
      self._links[0].send("facts", facts=known)
      self._await(lambda: self._agreed)
    import jax

    try:
      jax.distributed.initialize(
        self.at.coordinator,
        self.at.processes,
        self.at.process,
        self.at.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(self._wait_s),
        shutdown_timeout_seconds=30,
      )
    except RuntimeError as error:
      raise UserError(
        f"JAX could not connect the processes at {self.at.coordinator} ({_brief(error)})."
      ) from None
    # A thread that aborts first sleeps SIGABRT (6) seconds: time to say which peer has gone.
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), libc.sleep)

  def share(self, read: Callable[[], str]) -> str:
    """What `read()` returns on process 0, on every process."""
    if not self.first:
      return self._lines.get()
    text = read()
    for link in self._links:
      link.send("line", text=text)
    return text

  def at_end(self, tidy: Callable[[], None]) -> None:
    """Call this before the process is ended because of another one."""
    self._tidy.append(tidy)

  def finish(self) -> None:
    """Wait until all have finished; from then on nobody is missed."""
    if not self.first:
      self._links[0].send("done")
    self._await(lambda: all(link.done for link in self._links))
    if self.first:
      for link in self._links:
        link.send("done")
    self._over = True
    self._thread.join()
    until = time.monotonic() + 2
    for link in self._links:
      link.drain(until)


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
  peers = _Joined(at, wait_s)
  try:
    peers.meet()
    yield peers
    peers.finish()
  except BaseException as error:
    peers.fail(error)


# -- devices -----------------------------------------------------------------------------------


def cores(mesh: MeshConfig) -> None:
  """Let a CPU be a device for each part of `mesh.data`, unless it is said elsewhere; before JAX runs [n24].

  No more than it has cores, and only where nothing else is split: who asks for eight parts of a 70B means
  other devices.
  """
  import jax

  count = min(mesh.data, os.cpu_count() or 1) if mesh.model == 1 else 1
  if (
    count > 1
    and jax.config.jax_num_cpu_devices < 1
    and _FORCED not in os.environ.get("XLA_FLAGS", "")
  ):
    with contextlib.suppress(RuntimeError):  # JAX is running and keeps what it has
      jax.config.update("jax_num_cpu_devices", count)


def claim() -> None:
  """Take this host's devices now. Raises UserError, in one sentence, when that is not possible."""
  import jax

  try:
    local = jax.local_device_count()
  except RuntimeError as error:
    raise UserError(_refusal(str(error))) from None
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    few, many = min(counts.values()), max(counts.values())
    raise UserError(
      f"Some processes have {few} devices and others {many} (this one {local}); each needs as many."
    )


def _refusal(text: str) -> str:
  brief = " ".join(text.split())
  if held := re.search(r"in use by process with pid (\d+)", brief):
    return (
      f"The TPU of {socket.gethostname()} is in use by process {held[1]} there; end it (kill "
      f"{held[1]}) or wait for it, then start again."
    )
  if "already in use" in brief or "libtpu_lockfile" in brief:
    return (
      f"The TPU of {socket.gethostname()} is in use by another process, or a crashed one left its "
      f"lock; end that process or remove the lock, as libtpu says: {brief[:300]}"
    )
  return f"JAX cannot use the devices of {socket.gethostname()} ({brief[:300].rstrip('.')})."


def check_mesh(mesh: Any) -> None:
  """Raises UserError when a mesh (None: one device) leaves devices of a run of several processes."""
  import jax

  size = 1 if mesh is None else mesh.size
  if jax.process_count() > 1 and size != jax.device_count():
    raise UserError(
      f"config.mesh takes {size} of the {jax.device_count()} devices of {jax.process_count()} "
      "processes; they must all be used, so raise config.mesh.model or config.mesh.data."
    )
