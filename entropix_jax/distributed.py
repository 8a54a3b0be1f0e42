"""Several processes, one run: who is there, whether they agree, and what is said when one is lost.

  place    from flags, or from what a TPU pod or Slurm tells: where to meet, how many, which one is this
  join     a context: all processes have come; on leaving it, all end together
  agree    all run the same code on the same settings
  share    a line that only process 0 can read, handed to all
  cores    of a CPU, as devices
  claim    the devices, or one sentence why they cannot be had

JAX's coordination service connects the processes. It stores settings, shared lines and the sentence that
ends a run, and it notices a process that is silent. Three things it cannot do are done here: a roll call
before it starts, one sentence in place of its stack dumps, and an answer to Ctrl-C while C++ runs [n27].
Only process 0 prints; all of them print an error.
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
from entropix_jax.config import MeshConfig
from entropix_jax.errors import UserError

LOST = 3  # exit code of a process that ends because another one has gone
_FORCED = "xla_force_host_platform_device_count"
SILENCE_S = 20  # a process that JAX does not hear from for so long has gone
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
    """Make sure that `facts` are the same everywhere."""

  def share(self, read: Callable[[], str]) -> str:
    """What `read()` returns on process 0, on every process."""
    return read()

  def at_end(self, tidy: Callable[[], None]) -> None:
    """Call this before the process is ended because of another one."""


def _gather(at: Place, wait_s: float) -> list[str]:
  """Process 0 waits until all others have come, and answers them; the host names of all.

  Raises:
    UserError: the port is in use, one is missing, or two have one number; those who have come say it, too.
  """
  host, port = at.address
  both = socket.has_dualstack_ipv6()
  options = {"family": socket.AF_INET6 if both else socket.AF_INET, "dualstack_ipv6": both}
  try:
    server = socket.create_server(("", port), backlog=at.processes, **options)
  except OSError as error:
    raise UserError(
      f"Port {port} of this host cannot be used ({error.strerror}); end the run that has it, or "
      "choose another port for the coordinator."
    ) from None
  others, until, trouble = at.processes - 1, time.monotonic() + wait_s, ""
  hosts: dict[int, str] = {0: socket.gethostname()}
  links: list[socket.socket] = []
  print(
    f"waiting for {others} more process{'es' * (others > 1)} at {host}:{port} (up to {wait_s:g} s)",
    file=sys.stderr,
    flush=True,
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    while len(hosts) < at.processes and not trouble:
      ready = select.select([server, *links], [], [], max(0, until - time.monotonic()))[0]
      if not ready:
        gone = [str(i) for i in range(at.processes) if i not in hosts]
        trouble = (
          f"Process{'es' * (len(gone) > 1)} {', '.join(gone)} {'have' if len(gone) > 1 else 'has'} "
          f"not come to {host}:{port} within {wait_s:g} s; see what was said there, and start all "
          "processes again."
        )
      elif ready != [server]:
        trouble = "A process has gone before all had come; start all processes again."
      else:
        link = stack.enter_context(server.accept()[0])
        link.settimeout(5)
        try:
          process, processes, name = json.loads(link.makefile().readline())
        except (OSError, ValueError, TypeError):
          continue  # a stranger
        links.append(link)
        if processes != at.processes:
          trouble = (
            f"--processes is {at.processes} on process 0 ({hosts[0]}) but {processes} on process "
            f"{process} ({name}); every process needs the same."
          )
        elif process in hosts:
          trouble = (
            f"two processes are number {process}, on {hosts[process]} and on {name}; number them 0 "
            f"to {others}."
          )
        hosts[process] = name
    answer = trouble, [name for _, name in sorted(hosts.items())]
    for link in links:
      with contextlib.suppress(OSError):
        link.sendall(json.dumps(answer).encode() + b"\n")
  if trouble:
    raise UserError(trouble)
  return answer[1]


def _come(at: Place, wait_s: float) -> list[str]:
  """The others come to process 0 and wait for its answer; the host names of all. Raises UserError."""
  host, port = at.address
  until = time.monotonic() + wait_s
  while True:
    try:
      left = until - time.monotonic()
      with socket.create_connection((host, port), timeout=max(0.1, min(left, 5))) as link:
        if link.getsockname() == link.getpeername():  # TCP can connect a free port to itself
          raise OSError("nothing listens there")
        link.sendall(json.dumps([at.process, at.processes, socket.gethostname()]).encode() + b"\n")
        link.settimeout(wait_s + 10)
        trouble, hosts = json.loads(link.makefile().readline())
      break
    except OSError as error:
      if left <= 0:
        raise UserError(
          f"Process 0 did not answer at {host}:{port} within {wait_s:g} s ({_brief(error)}); "
          "start it on that host, open that port, or correct --coordinator."
        ) from None
    except ValueError:
      raise UserError(
        f"Process 0 at {host}:{port} has gone before all had come, or another run has that port."
      ) from None
    threading.Event().wait(0.3)
  if trouble:
    raise UserError(trouble)
  return hosts


class _Joined(Peers):
  """One of several processes that JAX's coordination service connects."""

  alone = False

  def __init__(self, at: Place):
    self.at, self.first = at, at.process == 0
    self._me = f"process {at.process} ({socket.gethostname()})"
    self._client: Any = None
    self._shared = 0
    self._over = False
    self._tidy: list[Callable[[], None]] = []
    self._ending = threading.Lock()
    self._hold_back()
    # JAX aborts this process when another one is lost, in a thread of its own, which comes here first.
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
    self._held = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
    for name, fd in (("stdout", 1), ("stderr", 2)):
      old = getattr(sys, name)
      old.flush()
      new = open(os.dup(fd), "w", encoding=old.encoding, errors=old.errors, buffering=1)  # noqa: SIM115
      if name == "stderr":
        self._error = new
      setattr(sys, name, new if self.first else open(os.devnull, "w"))  # noqa: SIM115
      os.dup2(self._held.fileno(), fd)

  def _kept(self) -> str:
    self._held.seek(max(0, self._held.seek(0, os.SEEK_END) - (1 << 16)))
    return self._held.read().decode("utf-8", "replace")

  # -- ends

  def _end(self, text: str, code: int, told: str = "", reach: bool = True) -> None:
    """Say `text` here and `told` to all the others, and end this process.

    Args:
      reach: whether JAX's service may be called; not from its own thread, and not after a crash.
    """
    if not self._ending.acquire(blocking=False):
      threading.Event().wait(10)  # another thread is doing just that
      os._exit(code)
    for tidy in self._tidy:
      with contextlib.suppress(Exception):
        tidy()
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.write("\n" * sys.stdout.isatty())  # a text may have been cut in its line
      sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
      print(text, file=self._error, flush=True)
    if self._client and reach:
      with contextlib.suppress(Exception):
        if told:
          self._client.key_value_set("stop", json.dumps({"text": told, "code": code}))
      with contextlib.suppress(Exception):  # process 0 takes the service away: not before all know
        self._client.wait_at_barrier("stopped", 3000)
    os._exit(code)

  def fail(self, error: BaseException) -> None:
    """End all processes for what went wrong in this one; the others say whose fault it was."""
    if isinstance(error, UserError):
      text = " ".join(str(error).split())
      self._end(f"error: {text}", 2, f"error: {self._me}: {text}")
    elif isinstance(error, KeyboardInterrupt):
      self._end("stopped.", 130, f"error: {self._me} was interrupted.")
    elif isinstance(error, BrokenPipeError):
      self._end("", 1, f"error: nobody reads what {self._me} prints any more.")
    if isinstance(error, RuntimeError | ValueError):
      self._wait_for_news()
    trace = "".join(traceback.format_exception(error))
    text = f"error: {self._me} failed"
    self._end(f"{trace}{self._kept()}{text}.", 1, f"{text}: {_brief(error)}.")

  def _wait_for_news(self) -> None:
    """A collective fails because a peer has gone: JAX learns that later, and says which."""
    threading.Event().wait(SILENCE_S + 10)

  def _aborted(self, _: int) -> None:
    """What an aborting thread of C++ runs."""
    if self._over:
      os._exit(0)
    kept = self._kept()
    if "JAX distributed service detected fatal errors" not in kept:
      self._wait_for_news()
      self._end(f"{kept}error: {self._me} crashed.", 1, reach=False)
    silent = re.findall(r"unhealthy.*\n((?:\d+\n)+)", kept)
    names = [f"process {i} ({self._hosts[int(i)]})" for i in (silent or ["0"])[-1].split()]
    if not silent and (self.first or "RegisterTask" in kept):
      names = ["another process"]
    self._end(
      f"error: {' and '.join(names)} has gone or was silent for {SILENCE_S} s; this run cannot go "
      "on, so start all processes again.",
      LOST,
      reach=False,
    )

  def _interrupted(self, signals: socket.socket) -> None:
    while signals.recv(1)[0] != signal.SIGINT:
      pass
    self.fail(KeyboardInterrupt())

  def _heed(self) -> None:
    """End when another process says why."""
    with contextlib.suppress(Exception):  # not reached: then JAX aborts, or the run is over
      self._end(**json.loads(self._client.blocking_key_value_get("stop", _FOREVER_MS)))

  # -- what a run uses

  def meet(self, wait_s: float) -> None:
    """Wait until all have come, and let JAX connect them. Raises UserError."""
    self._hosts = (_gather if self.first else _come)(self.at, wait_s)
    import jax
    from jax._src import distributed  # private, but the one place that has the client

    jax.config.update("jax_enable_preemption_service", False)  # a process would survive SIGTERM
    try:
      jax.distributed.initialize(
        self.at.coordinator,
        self.at.processes,
        self.at.process,
        self.at.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=30,
        heartbeat_timeout_seconds=SILENCE_S,
        shutdown_timeout_seconds=30,
      )
    except RuntimeError as error:
      raise UserError(
        f"JAX could not connect the processes at {self.at.coordinator} ({_brief(error)})."
      ) from None
    self._client = distributed.global_state.client
    threading.Thread(target=self._heed, daemon=True).start()

  def agree(self, folder: str, settings: dict[str, Any]) -> None:
    """Make sure that `facts` are the same everywhere."""
    mine = facts(folder, settings)
    if self.first:
      self._client.key_value_set("facts", json.dumps(mine))
    theirs = json.loads(self._client.blocking_key_value_get("facts", _FOREVER_MS))
    if found := _difference(theirs, mine):
      name, first, here = found
      text = (
        f"error: {name} is {first} on process 0 ({self._hosts[0]}) but {here} on {self._me}; "
        "every process needs the same."
      )
      self._end(text, 2, text)
    self._client.wait_at_barrier("agreed", _FOREVER_MS)

  def share(self, read: Callable[[], str]) -> str:
    """What `read()` returns on process 0, on every process."""
    self._shared += 1
    key = f"shared/{self._shared}"
    if self.first:
      self._client.key_value_set(key, read())
    return self._client.blocking_key_value_get(key, _FOREVER_MS)

  def at_end(self, tidy: Callable[[], None]) -> None:
    """Call this before the process is ended because of another one."""
    self._tidy.append(tidy)

  def finish(self) -> None:
    """Wait until all have finished; from then on nobody is missed."""
    import jax

    self._client.wait_at_barrier("finished", _FOREVER_MS)
    self._over = True
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
