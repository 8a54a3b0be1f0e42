"""How files are written: whole or not at all, through symbolic links, and never in place of a device.

  with files.whole(path) as file:   path + ".part" until the block has ended, then renamed
    file.write(data)
  files.append(path, line)

Why: a reader never sees half a file, a link stays a link, and every failure is one sentence. A device or a pipe has
no other name to write under, so it is written to as the data comes.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from entropix_jax.errors import UserError

PART = ".part"  # suffix of a file's name until it is complete


@contextlib.contextmanager
def told(name: str | Path) -> Iterator[None]:
  """Turns an OSError into a UserError that says `name` cannot be written."""
  try:
    yield
  except OSError as error:
    unread = error.errno == errno.ENXIO
    why = "no program reads this pipe" if unread else error.strerror or error
    raise UserError(f"{name} cannot be written ({why}).") from None


def aim(
  path: str | Path, name: str | Path = "", whole: bool = False
) -> tuple[Path, os.stat_result | None]:
  """(the file at the end of all links, its status or None if it does not exist).

  Args:
    whole: as by `whole`, which needs a second file in the same folder.

  Raises:
    UserError: the file evidently cannot be written; the message begins with `name`, by default the path.
  """
  name, path, found = name or path, os.path.expanduser(path), None
  if not os.fspath(path):
    raise UserError(f"{name} names no file; give one.")
  with told(name):
    with contextlib.suppress(FileNotFoundError):
      found = os.stat(path)
    mode = found.st_mode if found else stat.S_IFREG
    final = Path(os.path.realpath(path) if stat.S_ISREG(mode) else path)
    if stat.S_ISDIR(mode):
      raise UserError(f"{name} is a folder; name a file in it.")
    if not final.parent.is_dir():
      raise UserError(f"{name} cannot be written (the folder {final.parent} does not exist).")
    beside = stat.S_ISREG(mode) and (whole or not found)
    if not all(os.access(p, os.W_OK) for p in [final] * bool(found) + [final.parent] * beside):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if stat.S_ISBLK(mode):
      raise OSError(errno.EINVAL, "it is a disk")
    for fd in (1, 2) if found and stat.S_ISREG(mode) else ():
      with contextlib.suppress(OSError):
        if os.path.samestat(found, os.fstat(fd)):
          raise UserError(f"{name} gets what this program prints; name another file.")
  return final, found


def _opener(path: str, flags: int) -> int:
  fd = os.open(path, flags | os.O_NONBLOCK, 0o666)  # else a pipe that no program reads would block
  os.set_blocking(fd, True)
  return fd


class Draft:
  """A file that has another name until `keep`; a device or a pipe has its own from the beginning.

  Raises:
    UserError: as `aim`, and if the file cannot be written; so do the methods.
  """

  def __init__(self, path: str | Path, name: str | Path = ""):
    self.name, self.kept = name or path, False
    self._final, found = aim(path, self.name, whole=True)
    self._part = None
    if not found or stat.S_ISREG(found.st_mode):
      self._part = self._final.with_name(self._final.name + PART)
    with told(self.name):
      self.file: BinaryIO = open(self._part or self._final, "wb", opener=_opener)  # noqa: SIM115
      if self._part and found:
        os.chmod(self._part, stat.S_IMODE(found.st_mode))

  def write(self, begin: int, data: bytes) -> int:
    """Make `data` all that follows the first `begin` bytes; the new length. A kept file stays as it is."""
    try:
      with told(self.name):
        if not self.file.closed:
          if self._part and self.file.tell() != begin:  # a write was interrupted
            self.file.seek(begin)
            self.file.truncate()
          self.file.write(data)
          self.file.flush()
    except UserError:
      self.drop()
      raise
    return begin + len(data)

  def keep(self) -> None:
    """Give the file its name."""
    with told(self.name):
      self.file.close()
      if self._part and not self.kept:
        self.kept = True
        os.replace(self._part, self._final)

  def drop(self) -> None:
    """Delete the file if it is not kept."""
    with contextlib.suppress(OSError):
      self.file.close()
    if self._part:
      self._part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: str | Path, name: str | Path = "") -> Iterator[BinaryIO]:
  """A file to write that gets its name when the block ends, and does not when it fails.

  Args:
    name: of the file in messages; default: its path.

  Raises:
    UserError: as `Draft`.
  """
  draft = Draft(path, name)
  try:
    with told(draft.name):
      yield draft.file
    draft.keep()
  finally:
    draft.drop()


def append(path: str | Path, line: str) -> None:
  """Add a line to a file, all of it or nothing. Raises UserError if it cannot be written."""
  data = f"{line}\n".encode()
  aimed, found = aim(path)
  with told(path), open(aimed, "ab", buffering=0, opener=_opener) as file:
    end = os.fstat(file.fileno()).st_size
    try:
      while data:
        data = data[file.write(data) :]
    except OSError:
      with contextlib.suppress(OSError):  # a device has no length
        file.truncate(end)
      if not found:
        aimed.unlink(missing_ok=True)
      raise
