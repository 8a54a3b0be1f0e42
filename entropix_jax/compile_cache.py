"""Compiled programs are kept on disk, so that a second start reads what the first one compiled.

Why: JAX's persistent compilation cache does the work; this module chooses its folder and bounds its size.
XLA's programs for a CPU hold machine code for the features of that CPU, and a home folder may be shared by
machines of several kinds, so the folder's name has a key of the processor and of the versions of JAX.

JAX's own keys are made of traced programs, and tracing is half of a second start of the demo. So `load` and
`save` keep executables under another key, of everything that they are traced from, this package's code included.

JAX can bound the size itself, but then needs one more package, locks the folder for every read, and never
looks at the folders of other keys. Here the entries that were not used for longest go at the next start.
"""

import dataclasses
import functools
import hashlib
import inspect
import os
import pickle
import platform
import re
import sys
import sysconfig
import tempfile
import threading
import types
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

MOST_BYTES = 2 * 2**30  # of all keys together; the programs of one model take a few MB
SUFFIX = "-program"  # of the files that `save` writes
_KEY = "[0-9a-f]" * 16
_PROCESSOR = re.compile(
  r"^(?:vendor_id|cpu family|model|model name|flags|Features|CPU (?:implementer|variant|part))\s*:.*",
  re.MULTILINE,
)


def enable(setting: str = "auto") -> None:
  """Make JAX keep compiled programs on disk. Call it before the first of them is compiled.

  Where the folder cannot be written, it says so in one line on stderr and nothing is kept. An entry that is
  damaged costs a warning by JAX and a compilation.

  Args:
    setting: as config.engine.compile_cache. "auto": the folder that JAX_COMPILATION_CACHE_DIR or JAX's own
      setting names, else `entropix_jax/compiled` in the user's cache folder; "off"; or a folder.
  """
  if setting == "auto" and jax.config.jax_compilation_cache_dir:
    return
  folder = None
  if setting != "off":
    try:
      root = _user_folder() if setting == "auto" else Path(os.path.expanduser(setting)).absolute()
      folder = root / key()
      # Private: code that another user writes there would run in this process.
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder):
        pass
      prune(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
      reason = getattr(error, "strerror", None) or error
      print(f"Compiled programs are not kept: {folder or setting}: {reason}.", file=sys.stderr)
      folder = None
  jax.config.update("jax_compilation_cache_dir", folder and str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  compilation_cache.reset_cache()  # JAX looks at the folder once


def _user_folder() -> Path:
  base = Path(os.environ.get("XDG_CACHE_HOME", ""))
  return (base if base.is_absolute() else Path.home() / ".cache") / "entropix_jax" / "compiled"


def key() -> str:
  """16 hexadecimal digits of what compiled code depends on and JAX's keys of entries may lack."""
  try:
    first, *_ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")
    processor = _PROCESSOR.findall(first)
  except OSError:
    processor = [platform.processor()]
  facts = [jax.__version__, jaxlib.__version__, platform.system(), platform.machine(), *processor]
  return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def prune(root: Path, most: int = MOST_BYTES) -> None:
  """Delete the entries below `root` that were not used for longest, until `most` bytes are left."""
  entries = []
  for path in (p for end in ("-cache", SUFFIX) for p in root.glob(f"{_KEY}/*{end}")):
    try:
      stat = path.stat()
    except FileNotFoundError:  # another process prunes, too
      continue
    entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  for _, size, path in sorted(entries, reverse=True):
    most -= size
    if most < 0:
      path.unlink(missing_ok=True)


# -- programs that need not be traced ------------------------------------------------------------

# Modules whose functions may be traced.
_TRACED = re.compile(
  r"entropix_jax\.(model|engine|sampling|metrics|rowwise|decoding\.(mixing|joint|speculative|drafters|verify))\b"
)
# Code from here is the same wherever `key` is.
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


_here = threading.local()


def _count(event: str, **_) -> None:
  if event == "/jax/compilation_cache/cache_misses":
    _here.written = written() + 1


jax.monitoring.register_event_listener(_count)


def written() -> int:
  """How many programs this thread has compiled and written to JAX's own cache."""
  return getattr(_here, "written", 0)


class UnknownError(Exception):
  """A program depends on something that cannot be put into a key."""


def load(common: str, facts: Any) -> Any | None:
  """The executable that was saved under `environment()` and these facts; None where there is none.

  Args:
    common: what `environment` said.
    facts: everything else that the program depends on; see `describe`.
  """
  try:
    path = _path(common, facts)
  except UnknownError:
    return None
  try:
    ids, parts = pickle.loads(zlib.decompress(path.read_bytes()))
    devices = {device.id: device for device in jax.devices()}
    where = {"execution_devices": [devices[i] for i in ids]}
    return serialize_executable.deserialize_and_load(*parts, **where)
  except FileNotFoundError:
    return None
  except Exception as error:  # whatever reading a damaged file raises
    warnings.warn(f"Error reading the compiled program {path}: {error}", stacklevel=2)
    return None


def save(common: str, facts: Any, executable: jax.stages.Compiled) -> None:
  """Keep an executable for `load`, where the cache is on and the facts make a key.

  It must have been compiled just now, see `written`: XLA:CPU serialises one that was read without its functions, and
  JAX may answer a second request with one that it read for the first.
  """
  try:
    path = _path(common, facts)
    ids = [device.id for device in executable.runtime_executable().local_devices()]
    parts = ids, serialize_executable.serialize(executable)
    packed = zlib.compress(pickle.dumps(parts), 1)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      try:
        file.write(packed)
        file.flush()
        os.replace(file.name, path)
      except OSError:
        os.unlink(file.name)
        raise
  except (UnknownError, OSError):  # of the folder JAX's own cache complains
    pass
  except Exception as error:  # whatever a backend raises that cannot serialise; the run goes on
    warnings.warn(f"A compiled program is not kept: {error}", stacklevel=2)


def environment() -> str:
  """What all programs of this process depend on; empty where none are kept."""
  if not jax.config.jax_compilation_cache_dir or jax.process_count() > 1:
    return ""  # several processes must agree on what they compile
  options = sorted((k, repr(v)) for k, v in jax.config.values.items() if "cache" not in k)
  flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
  devices = [(d.id, d.device_kind) for d in jax.devices()]
  try:
    return describe((key(), code(), options, flags, devices))
  except UnknownError:
    return ""


def _path(common: str, facts: Any) -> Path:
  if not common:
    raise UnknownError
  name = hashlib.sha256(f"{common} {describe(facts)}".encode()).hexdigest()
  return Path(jax.config.jax_compilation_cache_dir) / (name + SUFFIX)


def describe(x: Any) -> str:
  """A text that differs between facts that lead to different programs. Raises UnknownError if there is none."""
  if x is None or isinstance(x, bool | int | float | str | np.dtype):
    return repr(x)
  if isinstance(x, list | tuple):
    return f"[{','.join(map(describe, x))}]"
  if isinstance(x, dict):
    return describe(sorted(x.items()))
  if isinstance(x, np.ndarray):
    return describe((x.shape, str(x.dtype), hashlib.sha256(x.tobytes()).hexdigest()))
  if isinstance(x, jax.ShapeDtypeStruct):
    return describe((x.shape, str(x.dtype), repr(x.sharding)))
  if isinstance(x, jax.sharding.Mesh):
    return describe((list(x.shape.items()), [d.id for d in x.devices.flat]))
  if isinstance(x, types.ModuleType) and _TRACED.match(x.__name__):
    return x.__name__  # its content is in `code`
  if dataclasses.is_dataclass(x) and type(x).__module__.startswith("entropix_jax."):
    fields = [(field.name, getattr(x, field.name)) for field in dataclasses.fields(x)]
    return describe((type(x).__module__, type(x).__qualname__, fields))
  raise UnknownError


def code() -> str:
  """A hash of the code that may be traced, as it is now: edits, reloads and replaced functions change it.

  Raises:
    UnknownError: a function was replaced by one from a notebook or a script.
  """
  digest = hashlib.sha256()
  for name in sorted(filter(_TRACED.match, sys.modules)):
    digest.update(Path(sys.modules[name].__file__).read_bytes())
    own = {k: v for k, v in vars(sys.modules[name]).items() if not k.startswith("__")}
    for text in _texts(own, name):
      digest.update(text.encode())
  return digest.hexdigest()


@functools.cache
def _instructions(x: types.CodeType) -> str:
  names = f"{x.co_names} {x.co_varnames} {x.co_freevars} {x.co_flags}"
  return f"{x.co_code.hex()} {names} {' '.join(_texts(x.co_consts, ''))}"


def _texts(x: Any, module: str) -> Iterator[str]:
  """What there is to know of a value that a module holds: of code its instructions, else its value or kind."""
  x = inspect.unwrap(getattr(x, "__func__", getattr(x, "fget", getattr(x, "func", x))))
  yield type(x).__name__
  if isinstance(x, types.CodeType):
    yield _instructions(x)
  elif isinstance(x, types.FunctionType):
    home = x.__globals__.get("__name__", "")
    # Others are in _TRACED only where tests add them.
    ours = home.startswith("entropix_jax") or _TRACED.match(home)
    if not ours and not x.__code__.co_filename.startswith(_INSTALLED):
      raise UnknownError
    yield f"{home}.{x.__qualname__}"
    if home == module:
      yield from _texts((x.__code__, x.__defaults__, x.__kwdefaults__), module)
  elif isinstance(x, type):
    yield f"{x.__module__}.{x.__qualname__}"
    if x.__module__ == module:
      yield from _texts(dict(vars(x)), module)
  elif isinstance(x, list | tuple | dict):
    for part in x.items() if isinstance(x, dict) else x:
      yield from _texts(part, module)
  elif isinstance(x, set | frozenset):
    yield repr(sorted(map(repr, x)))
  elif isinstance(x, bool | int | float | str | bytes | types.NoneType):
    yield repr(x)
