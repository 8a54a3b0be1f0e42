"""Compiled programs are kept on disk, so that a second start reads what the first one compiled.

Why: JAX's persistent compilation cache does the work; this module chooses its folder and bounds its size.
XLA's programs for a CPU hold machine code for the features of that CPU, and a home folder may be shared by
machines of several kinds, so the folder's name has a key of the processor and of the versions of JAX.

JAX can bound the size itself, but then needs one more package, locks the folder for every read, and never
looks at the folders of other keys. Here the entries that were not used for longest go at the next start.
"""

import hashlib
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

MOST_BYTES = (
  2 * 2**30
)  # of all keys together; entries of one model and config take a few MB at most
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
      root = _user_folder() if setting == "auto" else Path(setting).expanduser().absolute()
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
  for path in root.glob(f"{_KEY}/*-cache"):
    try:
      stat = path.stat()
    except FileNotFoundError:  # another process prunes, too
      continue
    entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  for _, size, path in sorted(entries, reverse=True):
    most -= size
    if most < 0:
      path.unlink(missing_ok=True)
