"""What is said of memory before a weight is read, against what is there afterwards."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from test_mesh import WIDE, params, spread

from entropix_jax import preflight, sampling, sharding
from entropix_jax.config import EngineConfig, MeshConfig

CONFIG = EngineConfig(4, 128)


def plan(cfg=WIDE, config=CONFIG, shape=(1, 1)):
  return preflight.engine(cfg, sampling.find("quadrant"), config, MeshConfig(*shape), jnp.float32)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 16)], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_weights_are_counted_as_they_will_lie(shape, int8):
  config = dataclasses.replace(CONFIG, weights="int8" if int8 else "auto")
  planned = plan(config=config, shape=shape).weights
  mesh = sharding.mesh(MeshConfig(*shape), WIDE)
  real = spread(params(int8), mesh) if mesh else params(int8)
  here = jax.devices()[0]
  bytes_here = sum(
    s.data.nbytes for x in jax.tree.leaves(real) for s in x.addressable_shards if s.device == here
  )
  assert preflight.per_device(planned) == bytes_here


def test_the_compiler_agrees_about_the_arguments():
  """Weights and cache as counted are the decode program's arguments, but for small rows."""
  engine = plan(TINY)
  need = preflight.need(engine)
  decode = engine.compiled[preflight.longest(engine)[1]].memory_analysis()
  small = decode.argument_size_in_bytes - need.weights - need.cache
  assert 0 < small < 20_000
  assert need.temporaries > 0
  assert need.total == need.weights + need.cache + need.row + need.temporaries


def test_what_would_fit_is_said_and_would():
  engine = plan(WIDE, EngineConfig(4, 4096))
  _, S = engine.bucket(4095)
  cache = preflight.per_device(engine.abstract_state().cache)
  row = preflight.per_device(engine.abstract_state(1, S).cache)
  need = preflight.Need(preflight.per_device(engine.weights), cache, row, 1000)
  ok, text = preflight.report(engine, need, need.total * 2)
  assert ok
  assert "fits" in text
  limit = need.total * 2 // 3
  ok, text = preflight.report(engine, need, limit)
  assert not ok
  for setting in ("max_seq_len=2048", "cache=int8", "mesh.model=2"):
    assert setting in text
  smaller = plan(WIDE, EngineConfig(4, 2048))
  assert preflight.per_device(smaller.abstract_state().cache) == cache // 2
  assert "nothing short of more devices" in preflight.report(engine, need, 10)[1]


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "entropix_jax.main", "--preflight", *args],
    capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], timeout=300, check=False,
  )  # fmt: skip


def test_from_the_command_line():
  """Without a checkpoint; and a model for which no machine that runs tests has the memory."""
  done = command("--config=configs/demo.py")
  assert done.returncode == 0, done.stderr
  assert "so it fits" in done.stdout
  done = command("--config=configs/demo.py", "--config.engine.batch_size=32768")
  assert done.returncode == 2
  assert "so it does not fit" in done.stdout
  assert "batch_size=" in done.stdout
  assert done.stderr.splitlines()[-1].startswith("error: This does not fit")
  assert "Traceback" not in done.stderr
