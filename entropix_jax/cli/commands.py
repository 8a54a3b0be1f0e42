"""What every command line shares: flags, help, one sentence for a mistake, files of results.

  _FLAGS = commands.Flags()
  _OUT = _FLAGS.string("out", None, "JSONL file to append to.")

  def run(argv):
    commands.parse(argv, _FLAGS, __doc__)
    out = commands.ready(_OUT)
    ...
    print(commands.keep(out, facts))

  sys.exit(commands.entry(run, sys.argv))

Why: whatever a user gets wrong is answered by one sentence and exit code 2 wherever it happens, and a
file that cannot be written is found before minutes of work and not after them.
"""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from entropix_jax import files
from entropix_jax.errors import Terminated, UserError, nearest


def say(text: str) -> None:
  """Print to stderr, now."""
  with contextlib.suppress(OSError):  # then there is no place left to say it
    print(text, file=sys.stderr, flush=True)


def entry(program: Callable[[list[str]], None], argv: list[str]) -> int:
  """Run a program; its exit code. SIGTERM ends it as Ctrl-C does."""
  sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None where it is closed)
  here = threading.current_thread() is threading.main_thread()
  default = here and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  if default:
    signal.signal(signal.SIGTERM, _terminate)
  try:
    return _code(program, argv)
  finally:
    try:
      sys.stdout.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter's last flush complains
    if default:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_) -> None:
  raise Terminated


def _code(program: Callable[[list[str]], None], argv: list[str]) -> int:
  try:
    try:
      program(argv)
    finally:
      sys.stdout.flush()
    return 0
  except UserError as error:
    say(f"error: {' '.join(str(error).split())}")
    return 2
  except KeyboardInterrupt as error:
    say(" ".join(["\nstopped.", *map(str, error.args)]))
    return getattr(error, "code", 130)
  except BrokenPipeError:
    return 1
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
      raise
    say(f"error: The output cannot be written ({error.strerror}).")
    return 2
  except RuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
      raise
    say(
      "error: A device's memory does not suffice; python -m entropix_jax.main --preflight says what "
      "takes it, and what would fit."
    )
    return 2


# -- flags -------------------------------------------------------------------------------------


def _definer(kind: str) -> Callable[..., flags.FlagHolder]:
  define = getattr(flags, f"DEFINE_{kind}")

  def method(self, name: str, *args, **options) -> flags.FlagHolder:
    assert not hasattr(Flags, name), f"a flag {name!r} would be hidden by the method of that name"
    return define(name, *args, flag_values=self, **options)

  return method


class Flags(flags.FlagValues):
  """The flags of one command line: `_OUT = _FLAGS.string("out", None, "...")` is absl's DEFINE_string in it."""

  string, bool, integer, enum = map(_definer, "string bool integer enum".split())
  strings = _definer("list")  # separated by commas
  float, multi_string, multi_integer, multi_float, multi_enum = map(
    _definer, "float multi_string multi_integer multi_float multi_enum".split()
  )

  def config_file(self, text: str) -> flags.FlagHolder:
    """--config, a config file whose keys are flags."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file("config", None, text, flag_values=self)


class Place:
  """The flags of a run of several processes."""

  def __init__(self, flags: Flags):
    self._on = flags.bool(
      "distributed", False, "One of several processes; a TPU pod or Slurm says which."
    )
    coordinator = flags.string("coordinator", None, "Elsewhere: HOST:PORT of process 0,")
    processes = flags.integer("processes", None, "how many processes there are,")
    process = flags.integer("process", None, "and which one this is, counted from 0.")
    self._where = (coordinator, processes, process)
    self._wait_s = flags.integer("wait_s", 120, "Seconds to wait for all processes to come.")

  @property
  def wait_s(self) -> int:
    """Seconds to wait for the others."""
    return self._wait_s.value

  def check(self) -> None:
    """Raises UserError for flags that cannot go together."""
    for flag in self._where:
      if flag.value is not None and not self._on.value:
        raise UserError(f"--{flag.name} goes with --distributed.")
    if self.wait_s < 1:
      raise UserError(f"--wait_s is {self.wait_s}; it must be at least 1.")

  def get(self) -> Any:
    """The distributed.Place of this process; None where it is the only one."""
    from entropix_jax import distributed

    where = (flag.value for flag in self._where)
    return distributed.place(*where, self.wait_s) if self._on.value else None


def parse(argv: list[str], values: flags.FlagValues, doc: str) -> None:
  """Parse flags, `--config` perhaps among them; --help prints them after `doc` and exits.

  Raises:
    UserError: whatever is wrong with the flags or with the config file.
  """
  if any(arg in ("--help", "-help", "-h") for arg in argv[1:]):
    print(doc, *map(_help, map(values.__getitem__, values)), sep="\n")
    sys.exit()
  argv, chat = _chat_variables(argv)
  whole, sys.argv = sys.argv, argv  # where config flags look for their keys
  try:
    rest = values(argv)
    config = values["config"].value if "config" in values else {}
    _ = config and dict(config)  # a config file that failed to load raises here
  except UserError:
    raise
  except flags.Error as error:
    last = str(error).strip().splitlines()[-1]  # ml_collections puts a whole stack trace in some
    raise UserError(f"{last.rstrip('.')}. Try --help.") from None
  except AttributeError as error:
    raise UserError(_unknown_key(argv, error)) from None
  except Exception as error:  # a config file is a program of the user's
    at = max(i for i, arg in enumerate(argv) if arg.lstrip("-").split("=")[0] == "config")
    path = argv[at].partition("=")[2] if "=" in argv[at] else argv[at + 1]
    if not os.path.isfile(path):
      raise UserError(
        f"The config file {path!r} does not exist; see the folder configs/."
      ) from None
    raise UserError(f"The config file {path} cannot be loaded ({error}).") from None
  finally:
    sys.argv = whole
  if rest[1:]:
    raise UserError(f"Unexpected argument {rest[1]!r}; see --help.")
  if config is None:
    raise UserError("Give a config file, such as --config=configs/demo.py.")
  if chat and not config:
    raise UserError(f"Unexpected argument --config.chat.{next(iter(chat))}; see --help.")
  if chat:
    with config.chat.unlocked():
      config.chat.update(chat)


def _chat_variables(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
  """The arguments without --config.chat.KEY=VALUE, whose keys belong to a checkpoint's template, and these."""
  rest, chat = [], {}
  for arg in argv:
    found = re.fullmatch(r"--?config\.chat\.(\w+)=(.*)", arg, re.DOTALL)
    if not found:
      rest.append(arg)
      continue
    try:
      value = json.loads(found[2])
    except ValueError:
      value = found[2]
    chat[found[1]] = value if isinstance(value, bool | int | float) else found[2]
  return rest, chat


def _help(flag: flags.Flag) -> str:
  unset = flag.default in (None, []) or flag.default is False
  return f"  --{flag.name:16} {flag.help}" + ("" if unset else f" (default {flag.default})")


def _unknown_key(argv: list[str], error: Exception) -> str:
  from entropix_jax.cli import config_file

  known = config_file.base(checkpoint="")
  for arg in argv:
    path = arg.lstrip("-").split("=")[0].split(".")
    if path[0] != "config" or len(path) < 2:
      continue
    section: Any = known
    for key in path[1:]:
      if not hasattr(section, "keys") or key not in section:
        names = sorted(section.keys()) if hasattr(section, "keys") else []
        known = ", ".join(names) or "nothing below it"
        return f"Unknown key {'.'.join(path)}{nearest(key, names)} Known here: {known}."
      section = section[key]
  return f"The config file cannot be used ({error})."


# -- results -----------------------------------------------------------------------------------


def ready(flag: flags.FlagHolder, whole: bool = False) -> Path | None:
  """The file that a flag names, None where it names none. Raises UserError if it cannot be written.

  Args:
    whole: by `files.whole`, not by `keep`.
  """
  if flag.value is None:
    return None
  files.aim(flag.value, f"--{flag.name}={flag.value}", whole)
  return Path(os.path.expanduser(flag.value)).absolute()


def keep(path: Path | None, facts: dict[str, Any]) -> str:
  """Facts as a line of JSON, floats with six digits, which is appended to the file if there is one."""
  line = json.dumps(short(facts))
  try:
    if path:
      files.append(path, line)
  except UserError as error:
    raise UserError(f"{str(error).rstrip('.')}; it lacks: {line}") from None
  return line


def loads(folder: str) -> str:
  """A sentence with the flag that loads a folder that was written."""
  return f"Wrote {folder}; load it with --config.checkpoint={folder}"


def short(x: Any) -> Any:
  """Floats with six digits, in whatever they are."""
  if isinstance(x, dict):
    return {key: short(value) for key, value in x.items()}
  return float(f"{x:.6g}") if isinstance(x, float) else x
