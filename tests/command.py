"""The repository's programs, run inside the test process or in one of their own, over shared demo models."""

import contextlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import unittest.mock
import warnings

from entropix_jax import settings
from entropix_jax.cli import commands
from entropix_jax.llm import LLM

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = settings.ASSETS / "demo" / "instruct"
BASE = DEMO.parent / "base"
MAIN = "entropix_jax/main.py"
CONFIG = "--config=configs/demo.py"
MODELS = {}  # compiling their engines is most of the time that a program takes


def load(path):
  """A program as a module of its own, whose flags nothing has parsed yet."""
  spec = importlib.util.spec_from_file_location(f"fresh_{pathlib.Path(path).stem}", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  with unittest.mock.patch.object(sys, "path", list(sys.path)):
    spec.loader.exec_module(module)
  return module


def _shared(resolved, peers=None, make=LLM.of):
  key = resolved.checkpoint, resolved.engine, resolved.mesh
  if key not in MODELS:
    MODELS[key] = make(resolved, peers)
  return MODELS[key]


def run(program, *args, stdin=""):
  """(exit code, stdout, stderr) of a program, given by its path or loaded, in this process."""
  out, err = io.StringIO(), io.StringIO()
  with (
    contextlib.chdir(ROOT),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    unittest.mock.patch.object(sys, "stdin", io.StringIO(stdin)),
    unittest.mock.patch.object(LLM, "of", _shared),
    unittest.mock.patch.dict(os.environ),  # aot.py sets some
    warnings.catch_warnings(),
  ):
    # The way ml_collections loads a config file.
    warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
    sys.modules.pop("config_config", None)  # the config file before
    module = load(program) if isinstance(program, str) else program
    argv = [module.__file__, *map(str, args)]
    with unittest.mock.patch.object(sys, "argv", argv):  # config flags read it themselves
      try:
        code = commands.entry(getattr(module, "run", None) or module._main, argv)
      except SystemExit as end:  # --help
        code = end.code or 0
  return code, out.getvalue(), err.getvalue()


run.cache_clear = MODELS.clear  # for conftest.forget


ENV = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}


def process(*args):
  """(exit code, stdout, stderr) of `python ARGS`."""
  done = subprocess.run(
    [sys.executable, *map(str, args)],
    capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=300, check=False,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


def is_one_sentence(found, words):
  """That a program ended with one sentence, which holds these words."""
  code, out, err = found
  assert (code, out) == (2, "")
  assert err.startswith("error: ")
  assert err.count("\n") == 1, err
  assert words in err
