"""What is said of memory before a weight is read, against what is there afterwards."""

import dataclasses
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from command import process
from conftest import ROOT, TINY, refusal
from test_mesh import WIDE, params, spread

from entropix_jax import sampling, settings
from entropix_jax.checkpoints import checkpoint
from entropix_jax.cli import config_file
from entropix_jax.config import PRESETS, EngineConfig, MeshConfig
from entropix_jax.engine import preflight
from entropix_jax.engine.state import abstract_state
from entropix_jax.model import sharding

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
  need = preflight.need(engine, 10**12)
  decode = engine.compiled[preflight.largest(engine.setup)[1]].memory_analysis()
  small = decode.argument_size_in_bytes - need.weights - need.cache
  assert 0 < small < 24_000
  assert need.temporaries > 0
  assert not need.least
  assert need.total == need.weights + need.cache + need.row + need.temporaries


def test_what_would_fit_is_said_and_would():
  engine = plan(WIDE, EngineConfig(4, 4096))
  _, S = engine.setup.bucket(4095)
  cache = preflight.per_device(abstract_state(engine.setup).cache)
  row = preflight.per_device(abstract_state(engine.setup, 1, S).cache)
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
  assert preflight.per_device(abstract_state(smaller.setup).cache) == cache // 2
  assert "nothing short of more devices" in preflight.report(engine, need, 10)[1]


@pytest.mark.parametrize(
  ("name", "value"), [("max_seq_len", 2048), ("batch_size", 2), ("cache", "int8")]
)
def test_an_alternative_is_named_from_where_it_fits(name, value):
  config = EngineConfig(4, 4096)
  engine, other = plan(WIDE, config), plan(WIDE, dataclasses.replace(config, **{name: value}))
  now, enough = preflight.need(engine, 0), preflight.need(other, 0).total / (1 - preflight.HEADROOM)

  def named(limit):
    return any(f"{name}={value}" in x for x in preflight.alternatives(engine, now, limit))

  assert named(1.001 * enough)
  assert not named(0.999 * enough)


def test_temporaries_are_all_that_no_argument_holds():
  """What is written over an argument is counted with it."""
  sizes = {"temp_size_in_bytes": 100, "output_size_in_bytes": 50, "alias_size_in_bytes": 20}
  analysis = types.SimpleNamespace(**sizes)
  program = types.SimpleNamespace(memory_analysis=lambda: analysis)
  assert preflight.temporaries(program) == 130
  analysis.alias_size_in_bytes = 60
  assert preflight.temporaries(program) == 100


def test_the_smallest_device_decides(monkeypatch):
  monkeypatch.setattr(preflight, "device_bytes", lambda device: 100 + device.id)
  assert preflight.least_memory(plan(shape=(2, 4))) == 100 + min(d.id for d in jax.devices())
  assert preflight.least_memory(plan()) == 100 + jax.devices()[0].id


def test_no_compiler_is_asked_where_it_cannot_help():
  """Weights and cache alone are too large: an eighty-billion model would compile for minutes."""
  engine = plan(TINY)
  engine.compile = None
  held = preflight.per_device((engine.weights, abstract_state(engine.setup).cache))
  need = preflight.need(engine, held)
  assert need.least
  assert need.temporaries == 0
  ok, text = preflight.report(engine, need, held)
  assert not ok
  assert "or more, so it does not fit" in text
  assert "What would fit, temporaries apart: --config.engine.batch_size=2 (" in text


def test_a_compiler_that_gives_up_makes_a_report():
  """What a TPU's says instead of a program that does not fit; any other error is a defect."""
  engine, text = plan(TINY), "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."

  def give_up(programs):
    raise jax.errors.JaxRuntimeError(text)

  engine.compiled.jobs = give_up
  limit = 2 * preflight.per_device((engine.weights, abstract_state(engine.setup).cache))
  need = preflight.need(engine, limit)
  assert (need.total, need.least) == (limit, True)
  ok, said = preflight.report(engine, need, limit)
  assert not ok
  assert "--config.engine.batch_size=2 (" in said
  text = "INTERNAL: a defect"
  with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
    preflight.need(engine, limit)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 16)], ids=str)
def test_what_a_step_must_read(shape):
  """A chip's weights once, of an untied embedding the share of the looked-up rows, and its live cache."""
  untied = dataclasses.replace(WIDE, tied=False)
  data, model = shape
  tied, free = plan(WIDE, shape=shape), plan(untied, shape=shape)
  chips = data * min(model, WIDE.kv_heads)
  cache = 4 * 2 * WIDE.layers * 4 * WIDE.kv_heads * WIDE.head_dim * 5 / chips
  held = preflight.per_device(tied.weights)
  assert preflight.step_bytes(tied, 5) == pytest.approx(held + cache)
  rows = 4 * 4 * WIDE.width / model
  assert preflight.step_bytes(free, 5) == pytest.approx(held + rows + cache)


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "entropix_jax.main", "--preflight", *args],
    capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
  )  # fmt: skip


def test_from_the_command_line():
  """Without a checkpoint; and a model for which no machine that runs tests has the memory."""
  done = command("--config=configs/demo.py")
  assert done.returncode == 0, done.stderr
  assert "so it fits" in done.stdout
  assert "Looking at prefill and decode of instruct" in done.stderr
  done = command("--config=configs/demo.py", "--config.engine.batch_size=32768")
  assert done.returncode == 2
  assert "so it does not fit" in done.stdout
  assert "batch_size=" in done.stdout
  assert done.stderr.splitlines()[-1].startswith("error: This does not fit")
  assert "Traceback" not in done.stderr


def test_the_shape_is_the_checkpoints_or_that_of_the_named_model():
  def found(**changes):
    config = config_file.base(checkpoint=str(settings.ASSETS / "demo" / "base"))
    config.update(changes)
    return settings.shape(config_file.resolve(config))[1:]

  demo = checkpoint.load_config(settings.ASSETS / "demo" / "base")
  assert found() == found(model="llama3_1b") == (demo, "base")
  assert found(checkpoint="none", model="llama3_1b") == (PRESETS["llama3_1b"], "llama3_1b")
  refusal(["none does not exist"], found, checkpoint="none")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("mesh", ["1, 2", "2, 1"])
def test_a_core_is_a_device_for_each_part_of_a_small_mesh(mesh):
  """In a process of its own: the number of devices is fixed once JAX runs."""
  program = f"from entropix_jax import config, devices; devices.cores(config.MeshConfig({mesh}))"
  code, out, err = process("-c", f"{program}; import jax; print(jax.device_count())")
  assert (code, out) == (0, "2\n"), err
