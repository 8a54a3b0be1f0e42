"""Compiled programs on disk: which folder, what its name depends on, its bound, damaged entries; keys of code."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import startup
import tired
from conftest import TINY, random_weights
from jax.experimental.compilation_cache import compilation_cache

from entropix_jax import compile_cache, metrics
from entropix_jax.config import EngineConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program, Programs
from entropix_jax.engine.request import Request
from entropix_jax.model import linear, quant
from entropix_jax.sampling import plain, quadrant
from entropix_jax.sampling._union import union

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
  """No folder is chosen, and the user's is a temporary one; everything is as before afterwards."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def compiled():
  """Compile a program as a new process would, and run it."""
  jax.clear_caches()
  assert jax.jit(lambda x: x * 3 + 1)(jnp.int32(2)) == 7


def entries(folder):
  return sorted(folder.glob("*-cache"))


@pytest.mark.parametrize("given", [None, "mine"])
def test_programs_are_kept_and_read(tmp_path, given):
  folder = tmp_path / (given or "entropix_jax/compiled") / compile_cache.key()
  compile_cache.enable(str(tmp_path / given) if given else "auto")
  assert folder.stat().st_mode & 0o77 == 0
  compiled()
  before = {path: path.stat().st_mtime_ns for path in entries(folder)}
  assert before
  hits = []
  listener = lambda event, **_: hits.append(event)  # noqa: E731
  jax.monitoring.register_event_listener(listener)
  compiled()
  jax.monitoring.unregister_event_listener(listener)
  assert "/jax/compilation_cache/cache_hits" in hits
  assert {path: path.stat().st_mtime_ns for path in entries(folder)} == before


def test_a_folder_that_the_user_set_is_left_alone(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
  compile_cache.enable()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
  compile_cache.enable("off")
  assert jax.config.jax_compilation_cache_dir is None
  compiled()
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  compile_cache.enable(str(tmp_path / "file"))
  compiled()
  said = capsys.readouterr().err
  assert said.startswith("Compiled programs are not kept: ")
  assert said.count("\n") == 1


def test_a_program_that_jax_had_in_memory_is_not_kept_either(tmp_path):
  """JAX remembers what it read for a computation, and then reads nothing."""
  compile_cache.enable(str(tmp_path))

  def programs(facts):
    return Programs(lambda program: lowered, lambda program: facts, {})

  def add(x):
    return x + 1.0

  jax.jit(add).lower(1.0).compile()
  jax.clear_caches()
  lowered = jax.jit(add).lower(1.0)
  for facts in (("one",), ("two",)):
    assert programs(facts)[Program("init")](1.0) == 2.0
  assert not list(tmp_path.rglob(f"*{compile_cache.SUFFIX}"))


@pytest.mark.parametrize("damage", [lambda x: x[:50], lambda x: b"", lambda x: bytes(len(x))])
def test_a_damaged_entry_is_compiled_anew(tmp_path, damage):
  compile_cache.enable(str(tmp_path))
  compiled()
  for path in entries(tmp_path / compile_cache.key()):
    path.write_bytes(damage(path.read_bytes()))
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
    compiled()


def test_the_key_is_of_processor_and_versions(monkeypatch):
  text = "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {}\nflags\t\t: {}\n\nprocessor\t: 1\n"

  def key(mhz, features):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: text.format(mhz, features))
    return compile_cache.key()

  keys = [key(1000, "avx"), key(2000, "avx"), key(1000, "avx avx2")]
  monkeypatch.setattr(jax, "__version__", "9")
  keys.append(key(1000, "avx"))
  assert keys[0] == keys[1]
  assert len(set(keys)) == 3


def test_what_was_not_used_for_longest_goes_first(tmp_path):
  names = [f"{k * 16}/{name}" for k in "0f" for name in ("a-cache", "b-program", "notes.txt")]
  for age, name in enumerate([*names, "mine/c-cache"]):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(10))
    os.utime(path, (1000 - age, 0))
  compile_cache.prune(tmp_path, most=25)
  left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
  assert left == {*names, "mine/c-cache"} - {f"{'f' * 16}/a-cache", f"{'f' * 16}/b-program"}


# -- programs that need not be traced ------------------------------------------------------------


def engine(sampler=plain, traced=None, **config):
  """An engine; `traced` receives the programs that it traces."""
  e = Engine.create(TINY, random_weights(), sampler, EngineConfig(2, 128, **config))
  lower = e.compiled._lower
  e.compiled._lower = lambda program: (traced.append(program), lower(program))[1]
  return e


def first_token(e):
  request = Request([3, 1, 4], seed=5)
  return np.asarray(e.first(e.insert(e.init(), e.prefill(request), 0, request), [0])[1])


@pytest.mark.parametrize("sampler", [plain, union(["entropy_target", "plain"])])
def test_a_kept_program_is_not_traced_again(tmp_path, sampler):
  compile_cache.enable(str(tmp_path))
  once, again, wider, other = [], [], [], []
  want = first_token(engine(sampler, traced=once))
  assert {program.verb for program in once} == {"init", "prompt", "insert", "first"}
  np.testing.assert_array_equal(first_token(engine(sampler, traced=again)), want)
  assert again == []
  engine(sampler, traced=wider, top_logprobs=2).init()
  engine(quadrant, traced=other).init()
  assert wider == other == [Program("init")]


def test_a_program_that_jax_had_is_not_kept(tmp_path):
  """XLA:CPU would write it without its functions."""
  compile_cache.enable(str(tmp_path))
  engine(traced=[]).init()
  for path in tmp_path.rglob(f"*{compile_cache.SUFFIX}"):
    path.unlink()
  for _ in range(2):
    jax.clear_caches()
    traced = []
    engine(traced=traced).init()
    assert traced == [Program("init")]
  assert not list(tmp_path.rglob(f"*{compile_cache.SUFFIX}"))


@pytest.mark.parametrize("damage", [lambda x: x[:50], lambda x: b"", lambda x: bytes(len(x))])
def test_a_damaged_program_is_traced_anew(tmp_path, damage):
  compile_cache.enable(str(tmp_path))
  engine(traced=[]).init()
  (path,) = tmp_path.rglob(f"*{compile_cache.SUFFIX}")
  path.write_bytes(damage(path.read_bytes()))
  traced = []
  with pytest.warns(UserWarning, match="Error reading the compiled program"):
    engine(traced=traced).init()
  assert traced == [Program("init")]


def test_nothing_is_kept_where_the_cache_is_off_or_code_is_not_the_packages(tmp_path, monkeypatch):
  compile_cache.enable("off")
  assert compile_cache.environment() == ""
  compile_cache.enable(str(tmp_path))
  assert compile_cache.environment()
  engine(types.SimpleNamespace(**vars(tired)), traced=[]).init()
  monkeypatch.setattr(metrics, "spread", lambda logits: logits)
  assert compile_cache.environment() == ""
  engine(traced=[]).init()
  assert not list(tmp_path.rglob(f"*{compile_cache.SUFFIX}"))


@pytest.mark.parametrize(
  ("owner", "name", "value"),
  [
    (linear, "TILES", (128,)),
    (linear, "NO_DOT_FUSION", {}),
    (plain, "step", quadrant.step),
    (metrics, "spread", metrics.confidence),
    (metrics.AttnStats, "mean", property(metrics.spread)),
    (quant.Int8, "__add__", quant.quantise),
  ],
)
def test_the_key_is_of_the_code_that_is_loaded(owner, name, value, monkeypatch):
  before = compile_cache.code()
  monkeypatch.setattr(owner, name, value, raising=False)
  assert compile_cache.code() != before
  monkeypatch.undo()
  assert compile_cache.code() == before


def test_the_key_is_the_same_in_another_process():
  """Orders of sets differ there."""
  text = "from entropix_jax import compile_cache, llm; print(compile_cache.code())"
  for seed in "01":
    command = [sys.executable, "-c", text]
    environment = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    if seed == "0":
      want = done.stdout
  assert done.stdout == want


def test_what_programs_depend_on_is_told_apart():
  facts = [
    None,
    1,
    1.0,
    "1",
    (1, 2),
    ((1,), 2),
    {"a": 1},
    {"a": 2},
    np.zeros(2),
    np.ones(2),
    np.zeros(2, np.float32),
    jax.ShapeDtypeStruct((2,), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    TINY,
    EngineConfig(1, 128),
    EngineConfig(2, 128),
    Program("init"),
    Program("first"),
    plain,
    quadrant,
    union(["plain"]),
    union(["plain", "quadrant"]),
    union(["quadrant", "plain"]),
    jnp.dtype(jnp.float32),
  ]
  texts = [compile_cache.describe(x) for x in facts]
  assert len(set(texts)) == len(texts)
  for unknown in (types.SimpleNamespace(), object(), lambda: 0, pytest, Request):
    with pytest.raises(compile_cache.UnknownError):
      compile_cache.describe([unknown])


def test_a_second_start_of_the_demo_compiles_nothing(capsys):
  """benchmarks/startup.py on the command line itself."""
  startup._FLAGS.unparse_flags()
  startup.run(["startup.py", "--model=demo", "--rounds=1"])
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["programs"] > 3
  assert found["warm_programs"] == 0
  assert found["cache_bytes"] < 10_000_000
  for kind in ("cold", "warm"):
    parts, total = found[kind], found[f"{kind}_s"]
    assert min(parts.values()) > 0
    # Weights are read while programs compile, so the shorter of both may be counted twice.
    most = sum(parts.values())
    assert most - min(parts["weights"], parts["compile"]) < 1.01 * total < 1.1 * most
  assert found["warm_over_cold"] < 1
