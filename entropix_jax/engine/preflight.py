"""Checks that a model fits its devices before any weight is read, from the compiler's own analysis.

Why: otherwise memory runs out minutes into a load, with a stack trace that names a buffer. The compiler
knows beforehand what weights, cache and temporaries take on each device, and which other settings
would fit follows by arithmetic.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax

from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program, compile_all
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import abstract_state
from entropix_jax.model import quant, sharding, weights
from entropix_jax.model.weights import Weights

HEADROOM = 0.03  # fraction of a device's memory that is left to the runtime


def abstract_weights(
  cfg: ModelConfig,
  dtype,
  mesh: jax.sharding.Mesh | None,
  int8: bool = False,
  finish: Callable | None = None,
) -> Weights:
  """Weights of `jax.ShapeDtypeStruct` with their shardings; with `int8`, matrices are `quant.Int8`."""
  shapes = (quant if int8 else weights).shapes(cfg, dtype)

  def placed(x, letters):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of(mesh, letters))

  def make(layer, field):
    leaf = getattr(shapes if layer is None else shapes.layers[layer], field)
    if isinstance(leaf, quant.Int8):
      scale = placed(leaf.scale, quant.outputs(field))
      return quant.Int8(placed(leaf.q, weights.letters(field)), scale)
    leaf = placed(leaf, weights.letters(field))
    return finish(field, leaf) if finish else leaf

  return weights.assemble(cfg, make)


def engine(
  cfg: ModelConfig,
  sampler: ModuleType,
  config: EngineConfig,
  shape: MeshConfig,
  dtype,
  devices: Sequence[jax.Device] | None = None,
  varying: Sequence[str] | None = None,
) -> Engine:
  """An Engine with abstract weights, which can compile every program but run none. Raises UserError
  if the mesh does not divide the model or the batch, or needs more devices than there are."""
  setup = Setup.create(cfg, sampler, config, shape, devices, dtype, varying)
  params = abstract_weights(cfg, setup.dtype, setup.mesh, config.weights == "int8")
  return Engine(setup, params)


def largest(setup: Setup) -> list[Program]:
  """The programs that need most memory: the longest prompt's last chunk, and the widest decode."""
  T, S = setup.bucket(setup.config.max_seq_len - 1)
  steps, window = setup.config.steps_per_dispatch, setup.windows[-1]
  return [
    Program("prefill" if S > T else "prompt", tokens=T, slots=(S,)),
    Program("decode", steps=steps, window=window),
  ]


def per_device(tree: Any) -> int:
  """Bytes that the arrays of a tree take on one device, as their shardings split them."""

  def share(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(share(x) for x in jax.tree.leaves(tree))


def step_bytes(engine: Engine, length: float) -> float:
  """Bytes that a decode step must read on each device: all weights once (only the looked-up rows of
  an untied embedding), and the keys and values of `length` tokens of every row."""
  setup = engine.setup
  params, cache = engine.weights, abstract_state(setup).cache
  read = per_device(params) + per_device(cache) * length / setup.capacity
  if params.head_DV is not None:
    read -= per_device(params.embed_VD) * (1 - setup.config.batch_size / setup.cfg.vocab)
  return read


@dataclasses.dataclass(frozen=True)
class Need:
  """The memory that an engine needs on each device, in bytes."""

  weights: int
  cache: int  # for all slots
  row: int  # a prompt's own cache during prefill
  temporaries: int  # the most that any program takes besides its arguments
  least: bool = False  # temporaries is a lower bound: the compiler gave up, or was not asked

  @property
  def total(self) -> int:
    """The sum."""
    return self.weights + self.cache + self.row + self.temporaries


def temporaries(program) -> int:
  """Bytes that a compiled program takes besides its arguments and outputs that alias arguments."""
  m = program.memory_analysis()
  return m.temp_size_in_bytes + max(0, m.output_size_in_bytes - m.alias_size_in_bytes)


def exhausts(error: Exception) -> bool:
  """Whether a compiler's error says that the program does not fit the device."""
  return "RESOURCE_EXHAUSTED" in str(error)


def need(engine: Engine, limit: int) -> Need:
  """What an engine needs on devices of `limit` bytes each; compiles its two largest programs, unless
  weights and cache alone do not fit."""
  setup = engine.setup
  _, S = setup.bucket(setup.config.max_seq_len - 1)
  state, row = abstract_state(setup), abstract_state(setup, 1, S)
  now = Need(per_device(engine.weights), per_device(state.cache), per_device(row.cache), 0, True)
  if not fits(now.total, limit):
    return now
  try:
    compile_all(engine.compiled.jobs(largest(setup)))
  except jax.errors.JaxRuntimeError as error:
    if not exhausts(error):
      raise
    return dataclasses.replace(now, temporaries=limit - now.total)
  most = max(temporaries(engine.compiled[program]) for program in largest(setup))
  return dataclasses.replace(now, temporaries=most, least=False)


def least_memory(engine: Engine) -> int:
  """Memory in bytes of the smallest device that the engine uses in this process."""
  if engine.setup.mesh is None:
    return device_bytes(jax.devices()[0])
  mine = [d for d in engine.setup.mesh.devices.flat if d.process_index == jax.process_index()]
  return min(map(device_bytes, mine))


def device_bytes(device: jax.Device) -> int:
  """Memory of a device in bytes; for a CPU device, its share of the machine's memory."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return whole // len([d for d in jax.local_devices() if d.platform == device.platform])


def fits(total: int, limit: int) -> bool:
  """Whether `total` bytes fit a device of `limit` bytes and leave HEADROOM."""
  return total <= limit * (1 - HEADROOM)


def alternatives(engine: Engine, now: Need, limit: int) -> list[str]:
  """Changed settings that would fit, each with the memory it takes; the mildest changes come first.

  Temporaries are estimates, kept as they are or scaled by rows, since nothing is compiled here.
  """
  setup = engine.setup
  cfg, config, shape = setup.cfg, setup.config, setup.mesh_config
  itemsize = setup.dtype.itemsize
  out = []

  def consider(text, weights=1.0, cache=1.0, rows=1.0):
    held = now.weights * weights + (now.cache * rows + now.row) * cache
    total = int(held + now.temporaries * rows)
    if fits(total, limit):
      out.append(f"{text} ({total / 1e9:.1f} GB a device)")

  half_w = 1.0 if config.weights == "int8" else 1.02 / itemsize
  half_c = 1.0 if config.cache == "int8" else (1 + 4 / cfg.head_dim) / itemsize
  length = config.max_seq_len
  while length > 256:
    length //= 2
    before = len(out)
    consider(f"--config.engine.max_seq_len={length}", cache=length / config.max_seq_len)
    if len(out) > before:
      break
  batch = config.batch_size
  while batch // 2 >= shape.data and batch % (2 * shape.data) == 0:
    batch //= 2
    before = len(out)
    consider(f"--config.engine.batch_size={batch}", rows=batch / config.batch_size)
    if len(out) > before:
      break
  if half_c < 1:
    consider("--config.engine.cache=int8", cache=half_c)
  if half_w < 1:
    consider("--config.engine.weights=int8", weights=half_w)
  if half_w < 1 and half_c < 1 and not out:
    consider("int8 weights and cache", weights=half_w, cache=half_c)
  for model in range(shape.model + 1, cfg.heads + 1):
    if sharding.divides(cfg, model):
      kv_now, kv = sharding.split(cfg, shape.model)[0], sharding.split(cfg, model)[0]
      before = len(out)
      consider(
        f"--config.mesh.model={model} on {shape.data * model} devices",
        weights=shape.model / model,
        cache=kv_now / kv,
      )
      if len(out) > before:
        break
  return out


def report(engine: Engine, now: Need, limit: int) -> tuple[bool, str]:
  """(whether it fits, the text to print)."""
  setup, shape = engine.setup, engine.setup.mesh_config
  ok, more = fits(now.total, limit), " or more" * now.least
  devices = shape.data * shape.model
  lines = [
    f"On each of {devices} device{'s' * (devices > 1)} of {limit / 1e9:.1f} GB, batch "
    f"{setup.config.batch_size}, {setup.config.max_seq_len} tokens a row:",
    f"  weights      {now.weights / 1e9:8.2f} GB",
    f"  cache        {now.cache / 1e9:8.2f} GB",
    f"  prompt's own {now.row / 1e9:8.2f} GB",
    f"  temporaries  {now.temporaries / 1e9:8.2f} GB{more}",
    f"  together     {now.total / 1e9:8.2f} GB{more}, so it {'fits' if ok else 'does not fit'}.",
  ]
  if not ok:
    found = alternatives(engine, now, limit)
    apart = ", temporaries apart" * now.least
    lines.append(f"What would fit{apart}: {'; '.join(found) or 'nothing short of more devices'}.")
  return ok, "\n".join(lines)
