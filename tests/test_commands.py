"""Every command line answers mistakes alike: one sentence, exit code 2, nothing written, at once."""

import errno
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import unittest.mock

import pytest
from absl import flags

from entropix_jax.cli import commands
from entropix_jax.errors import UserError

# The way ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "--config=configs/demo.py"
# What each needs before it looks at --out.
SCRIPTS = {
  "benchmarks/decode.py": [CONFIG],
  "benchmarks/int8.py": [],
  "benchmarks/load.py": [],
  "benchmarks/sampler.py": [],
  "benchmarks/startup.py": [],
  "benchmarks/sweep.py": [CONFIG, "--task=demo"],
  "scripts/aot.py": [CONFIG, "--target=v5e:1"],
  "scripts/calibrate.py": [CONFIG],
  "scripts/convert_checkpoint.py": None,
  "scripts/convert_npy.py": None,
  "scripts/download.py": None,
}
every_script = pytest.mark.parametrize("path", SCRIPTS)


@pytest.fixture
def call(monkeypatch, capsys):
  """call(script, *args) -> (exit code, stdout, stderr), in this process."""
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.chdir(ROOT)

  def run(path, *args):
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config file before
    argv = [path, *map(str, args)]
    monkeypatch.setattr(sys, "argv", argv)  # config flags read it themselves
    code = commands.entry(module.run, argv)
    return code, *capsys.readouterr()

  with unittest.mock.patch.dict(os.environ):  # aot.py sets some
    yield run


def is_one_sentence(found, words):
  code, out, err = found
  assert (code, out) == (2, "")
  assert err.startswith("error: ")
  assert err.count("\n") == 1, err
  assert words in err


@every_script
def test_mistakes_are_one_sentence(call, path, tmp_path):
  given = SCRIPTS[path] or []
  is_one_sentence(call(path, "--no_such_flag=1"), "no_such_flag")
  is_one_sentence(call(path, *given, "stray"), "'stray'")
  if CONFIG in given:
    is_one_sentence(call(path), "Give a config file")
    is_one_sentence(call(path, "--config=none.py"), "'none.py' does not exist")
    is_one_sentence(call(path, CONFIG, "--config.engine.batch=3"), "known here: attn_stats")
  if SCRIPTS[path] is None:
    is_one_sentence(call(path), "--out=folder")
    return
  ending = ".json" if "calibrate" in path else ".jsonl"
  folder = tmp_path / f"folder{ending}"
  folder.mkdir()
  for out in (tmp_path / f"none/x{ending}", folder):
    is_one_sentence(call(path, *given, f"--out={out}"), f"--out={out} cannot be written")
  assert list(tmp_path.rglob("*")) == [folder]


@every_script
def test_help_is_its_docstring_and_every_flag(call, capsys, path):
  with pytest.raises(SystemExit) as end:
    call(path, "--help")
  out = capsys.readouterr().out
  assert not end.value.code
  first, *_ = (ROOT / path).read_text().removeprefix('"""').splitlines()
  assert out.startswith(first)
  assert out.count("\n  --out ") == 1


def test_a_script_by_itself():
  """Its last line hands the exit code on."""
  done = subprocess.run(
    [sys.executable, "benchmarks/int8.py", "--out=none/x"],
    capture_output=True, text=True, cwd=ROOT, timeout=100, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  is_one_sentence((done.returncode, done.stdout, done.stderr), "--out=none/x")


# -- the pieces --------------------------------------------------------------------------------


def table(*args):
  """(argv, FlagValues) with one flag."""
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "File.", flag_values=values)
  values(["x", *args])
  return values


@pytest.mark.parametrize(
  ("error", "code", "words"),
  [
    (UserError("Do\n this."), 2, "error: Do this.\n"),
    (KeyboardInterrupt(), 130, "\nstopped.\n"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 2, "--preflight"),
  ],
  ids=lambda x: type(x).__name__,
)
def test_how_a_program_ends(capsys, error, code, words):
  def program(argv):
    raise error

  assert commands.entry(program, []) == code
  assert words in capsys.readouterr().err


def test_a_defect_is_not_hidden():
  with pytest.raises(RuntimeError, match="defect"):
    commands.entry(lambda argv: (_ for _ in ()).throw(RuntimeError("defect")), [])


CONFIGS = {
  "of another kind": ("def get_config():\n  return 3\n", "cannot be loaded"),
  "without the function": ("x = 3\n", "cannot be used"),
  "with a bug": ("def get_config():\n  return 1 / 0\n", "(division by zero)"),
  "that is no program": ("pip install entropix\n", "(invalid syntax"),
  "with a wrong value": (
    "from entropix_jax.cli import config_file\n\n\ndef get_config():\n"
    "  return config_file.base(checkpoint='', batch_size=0)\n",
    "config.engine.batch_size is 0",
  ),
}


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_config_file_is_one_sentence(call, tmp_path, name, form):
  text, words = CONFIGS[name]
  (tmp_path / "config.py").write_text(text)
  args = form.format(tmp_path / "config.py").split()
  is_one_sentence(call("benchmarks/decode.py", *args), words)


@pytest.mark.parametrize("args", [["--config="], ["--config", "none.py"], ["--config=configs"]])
def test_a_missing_config_file_is_named(call, args):
  is_one_sentence(call("benchmarks/decode.py", *args), "does not exist; see the folder configs/")


def test_lines_are_kept_whole_and_short(tmp_path):
  path = tmp_path / "runs.jsonl"
  facts = {"a": 1 / 3, "b": {"c": 2e9 / 3, "d": 12345678}, "e": True}
  lines = [commands.keep(path, facts), commands.keep(path, facts)]
  assert path.read_text() == "\n".join([*lines, ""])
  want = {"a": 0.333333, "b": {"c": 666667000.0, "d": 12345678}, "e": True}
  assert json.loads(lines[0]) == want
  assert commands.keep(None, facts) == lines[0]


def test_a_file_that_is_not_there_is_not_made_beforehand(tmp_path):
  assert commands.ready(table()["out"]) is None
  path = tmp_path / "x"
  assert commands.ready(table(f"--out={path}")["out"]) == path
  assert not path.exists()


def test_what_cannot_be_appended_is_not_lost(tmp_path, monkeypatch):
  """The disk may have filled while something was measured."""

  def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("builtins.open", full)
  with pytest.raises(UserError, match=r'No space left on device\); it lacks: {"a": 1}'):
    commands.keep(tmp_path / "x", {"a": 1})
