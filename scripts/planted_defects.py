"""Prove that the tests can fail: plant known defects, one at a time, and say which of them are caught.

    python scripts/planted_defects.py
    python scripts/planted_defects.py --only='int8/*' --jobs=1

A defect is a table of tests/defects/AREA.toml:

    [name]
    wrong = "One sentence that says what is wrong."
    file = "entropix_jax/..."          (or once, at the top of the file)
    old = 'a text that occurs in that file exactly once'
    new = 'what replaces it'
    tests = ["tests/test_x.py::test_y"]  (pytest node ids, of which at least one must fail)

Defects are planted in a temporary copy of the repository, never in the checkout. The named tests must pass
without any defect; one run checks this first. The last line of the output is a JSON object.
"""

import concurrent.futures
import dataclasses
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from entropix_jax.cli import commands
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_ONLY = _FLAGS.string("only", "*", "Names of the defects to plant, AREA/NAME as a glob.")
_JOBS = _FLAGS.integer("jobs", 2, "Defects tested at once.", 1)
_LIST = _FLAGS.bool("list", False, "Only list the defects.")
_TRUST = _FLAGS.bool("trust", False, "Skip the run without defects.")

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("entropix_jax", "tests", "scripts", "benchmarks", "configs", "docs")
LIMIT_S = 300  # for the tests of one defect


@dataclasses.dataclass(frozen=True)
class Defect:
  """A replacement in one file, and the tests of which one must see it."""

  name: str
  wrong: str
  file: str
  old: str
  new: str
  tests: list[str]

  def planted(self, root: Path) -> str:
    """The file's text with the defect. Raises UserError if the defect does not apply."""
    text = _text(root / self.file)
    if text.count(self.old) != 1 or self.old == self.new:
      raise UserError(
        f"The defect {self.name} does not apply: its old text occurs {text.count(self.old)} times in "
        f"{self.file}; it must occur once and differ from the new one."
      )
    return text.replace(self.old, self.new)

  def check(self, root: Path) -> None:
    """Raises UserError if the defect does not apply or names a test that does not exist."""
    self.planted(root)
    for test in self.tests or [""]:
      file, _, name = test.partition("[")[0].partition("::")
      if not name or not re.search(rf"^def {re.escape(name)}\(", _text(root / file), re.MULTILINE):
        raise UserError(f"The defect {self.name} names the test {test!r}, which does not exist.")


def _text(path: Path) -> str:
  return path.read_text(encoding="utf-8") if path.is_file() else ""


def read(root: Path = ROOT) -> list[Defect]:
  """All defects by name. Raises UserError for a file that is not laid out as the docstring says."""
  out = []
  for path in sorted((root / "tests" / "defects").glob("*.toml")):
    try:
      tables = tomllib.loads(path.read_text(encoding="utf-8"))
      shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
      for name, table in tables.items():
        if isinstance(table, dict):
          out.append(Defect(f"{path.stem}/{name}", **shared | table))
    except (tomllib.TOMLDecodeError, TypeError) as error:
      raise UserError(f"{path} cannot be read ({error}).") from None
  return out


def pytest(
  root: Path, folder: Path, tests: list[str], *options: str, defect: Defect | None = None
) -> subprocess.CompletedProcess:
  """Run tests in a copy of the repository, which is removed afterwards."""
  with tempfile.TemporaryDirectory(dir=folder) as place:
    for path in root.iterdir():
      if path.is_file():
        shutil.copy(path, place)
      elif path.name in COPIED:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, Path(place) / path.name, ignore=skip)
    if defect:
      (Path(place) / defect.file).write_text(defect.planted(root), encoding="utf-8")
    # Programs that a defect leaves as they were are compiled once for all runs.
    cached = {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests],
      env=cached | os.environ | {"PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1"},
      cwd=place, capture_output=True, text=True, check=False, timeout=defect and LIMIT_S,
    )  # fmt: skip


def catch(root: Path, folder: Path, defect: Defect) -> bool:
  """Plant a defect and say what its tests do: whether one failed."""
  start = time.perf_counter()
  try:
    done = pytest(root, folder, defect.tests, "-x", "-n0", defect=defect)
    caught, why = done.returncode == 1, "its tests passed"
    if done.returncode > 1:
      why = f"pytest ended with code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-500:]}"
  except subprocess.TimeoutExpired:
    caught, why = False, f"its tests ran longer than {LIMIT_S} s"
  said = f"{'caught' if caught else 'MISSED'}  {defect.name}"
  commands.say(f"{said}  ({time.perf_counter() - start:.0f} s){'' if caught else f': {why}'}")
  return caught


def trial(root: Path, defects: list[Defect], jobs: int, trust: bool) -> list[str]:
  """Plant the defects; the names of those that no test saw.

  Raises:
    UserError: a defect does not apply, or a named test fails without any defect.
  """
  for defect in defects:
    defect.check(root)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if not trust:
      tests = sorted({test for defect in defects for test in defect.tests})
      commands.say(f"Running {len(tests)} tests without any defect.")
      done = pytest(root, folder, tests, f"-n{jobs}")
      if done.returncode:
        bad = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
        found = "; ".join(bad) or done.stdout[-2000:] + done.stderr[-500:]
        raise UserError(f"Tests do not pass without any defect: {found}.")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      caught = pool.map(functools.partial(catch, root, folder), defects)
      return [defect.name for defect, seen in zip(defects, caught, strict=True) if not seen]


def run(argv: list[str]) -> None:
  """Plant what the flags name."""
  commands.parse(argv, _FLAGS, __doc__)
  defects = [defect for defect in read() if fnmatch.fnmatchcase(defect.name, _ONLY.value)]
  if not defects:
    raise UserError(f"No defect has a name like --only={_ONLY.value}; see --list.")
  if _LIST.value:
    for defect in defects:
      print(f"{defect.name}: {defect.wrong}", *defect.tests, sep="\n  ")
    return
  missed = trial(ROOT, defects, _JOBS.value, _TRUST.value)
  counts = {"planted": len(defects), "caught": len(defects) - len(missed), "missed": missed}
  print(json.dumps(counts))
  if missed:
    raise UserError(f"No test saw {', '.join(missed)}.")


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
