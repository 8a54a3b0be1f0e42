"""Every command line answers mistakes alike: one sentence, exit code 2, nothing written, at once."""

import errno
import io
import json
import os
import signal
import sys
import time

import pytest
from absl import flags
from command import CONFIG, ROOT, is_one_sentence, process, run

from entropix_jax.cli import commands, printer
from entropix_jax.errors import UserError

# What each needs before it looks at --out.
SCRIPTS = {
  "benchmarks/answers.py": [CONFIG],
  "benchmarks/decode.py": [CONFIG],
  "benchmarks/int8.py": [],
  "benchmarks/load.py": [],
  "benchmarks/paths.py": [],
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


@every_script
def test_mistakes_are_one_sentence(path, tmp_path):
  given = SCRIPTS[path] or []
  is_one_sentence(run(path, "--no_such_flag=1"), "no_such_flag")
  is_one_sentence(run(path, *given, "stray"), "'stray'")
  if CONFIG in given:
    is_one_sentence(run(path), "Give a config file")
    is_one_sentence(run(path, "--config=none.py"), "'none.py' does not exist")
    is_one_sentence(run(path, CONFIG, "--config.engine.batch=3"), "Known here: attn_stats")
  if SCRIPTS[path] is None:
    is_one_sentence(run(path), "--out=folder")
    return
  ending = ".json" if "calibrate" in path else ".jsonl"
  folder = tmp_path / f"folder{ending}"
  folder.mkdir()
  for out, words in ((tmp_path / f"none/x{ending}", "cannot be written"), (folder, "is a folder")):
    is_one_sentence(run(path, *given, f"--out={out}"), f"--out={out} {words}")
  assert list(tmp_path.rglob("*")) == [folder]


@every_script
def test_help_is_its_docstring_and_every_flag(path):
  code, out, _ = run(path, "--help")
  assert code == 0
  first, *_ = (ROOT / path).read_text().removeprefix('"""').splitlines()
  assert out.startswith(first)
  assert out.count("\n  --out ") == 1


def test_a_script_by_itself():
  """Its last line hands the exit code on."""
  is_one_sentence(process("benchmarks/int8.py", "--out=none/x"), "--out=none/x")


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


def test_sigterm_ends_a_program_as_an_interrupt_does(capsys):
  def program(argv):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

  assert commands.entry(program, []) == 143
  assert capsys.readouterr().err == "\nstopped.\n"
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Full(io.StringIO):
  """Where there is no room."""

  def flush(self):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", [print, printer.emit])
def test_stdout_on_a_full_disk_is_one_sentence(capsys, monkeypatch, write):
  moved = []
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", Full())
    patch.setattr(os, "dup2", lambda *fds: moved.append(fds[1]))
    assert commands.entry(lambda argv: write("text"), []) == 2
  assert moved == [1]
  said = "error: The output cannot be written (No space left on device).\n"
  assert capsys.readouterr().err == said


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
def test_a_broken_config_file_is_one_sentence(tmp_path, name, form):
  text, words = CONFIGS[name]
  (tmp_path / "config.py").write_text(text)
  args = form.format(tmp_path / "config.py").split()
  is_one_sentence(run("benchmarks/decode.py", *args), words)


@pytest.mark.parametrize("args", [["--config="], ["--config", "none.py"], ["--config=configs"]])
def test_a_missing_config_file_is_named(args):
  is_one_sentence(run("benchmarks/decode.py", *args), "does not exist; see the folder configs/")


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
