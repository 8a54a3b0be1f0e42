"""Whether a model fits its devices, said before a weight is read, from the compiler's own analysis.

Why: running out of memory shows minutes into a load, as a stack trace that names a buffer. The compiler
knows beforehand what weights, cache and temporaries take on each device; what would fit instead is
arithmetic from there.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.model import quant, sharding, weights
from entropix_jax.model.weights import Weights

HEADROOM = 0.03  # of a device's memory, for what the runtime keeps to itself


def abstract_weights(
  cfg: ModelConfig,
  dtype,
  mesh: jax.sharding.Mesh | None,
  int8: bool = False,
  finish: Callable | None = None,
) -> Weights:
  """Weights of `jax.ShapeDtypeStruct` that say where each would live.

  Args:
    finish: as in `checkpoint.load_weights`.
  """
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
) -> Engine:
  """An Engine that can compile every program and run none: its weights are not there."""
  sharding.check(cfg, shape, config.batch_size)
  mesh = sharding.mesh(shape, cfg, devices)
  params = abstract_weights(cfg, dtype, mesh, config.weights == "int8")
  return Engine(cfg, params, sampler, config, shape, devices)


def longest(engine: Engine) -> list[tuple]:
  """The programs that need most: the last piece of the longest prompt, and the widest decode."""
  T, S = engine.bucket(engine.config.max_seq_len - 1)
  return [("prefill", T, S), ("decode", engine.config.steps_per_dispatch, engine.windows[-1])]


def per_device(tree: Any) -> int:
  """Bytes of a tree's largest share on one device."""

  def share(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(share(x) for x in jax.tree.leaves(tree))


def step_bytes(engine: Engine, length: float) -> float:
  """Bytes of memory that a decode step cannot but read on each device: weights once (of an untied
  embedding the rows it looks up), and `length` tokens' keys and values of every row."""
  params, cache = engine.weights, engine.abstract_state().cache
  read = per_device(params) + per_device(cache) * length / engine.capacity
  if params.head_DV is not None:
    read -= per_device(params.embed_VD) * (1 - engine.config.batch_size / engine.cfg.vocab)
  return read


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes on each device."""

  weights: int
  cache: int  # of all slots
  row: int  # of one prompt's cache while it is fed
  temporaries: int  # the most any program takes beside its arguments
  least: bool = False  # temporaries are more than that: the compiler gave up, or was not asked

  @property
  def total(self) -> int:
    """All of it at once."""
    return self.weights + self.cache + self.row + self.temporaries


def temporaries(program) -> int:
  """Bytes that a compiled program takes beside its arguments, results that reuse one not counted."""
  m = program.memory_analysis()
  return m.temp_size_in_bytes + max(0, m.output_size_in_bytes - m.alias_size_in_bytes)


def exhausts(error: Exception) -> bool:
  """Whether a compiler's error says that the program does not fit the device."""
  return "RESOURCE_EXHAUSTED" in str(error)


def need(engine: Engine, limit: int) -> Need:
  """What an engine takes of devices of `limit` bytes; compiles its two largest programs, if the rest
  leaves room for any."""
  _, S = engine.bucket(engine.config.max_seq_len - 1)
  state, row = engine.abstract_state(), engine.abstract_state(1, S)
  now = Need(per_device(engine.weights), per_device(state.cache), per_device(row.cache), 0, True)
  if not fits(now.total, limit):
    return now
  try:
    engine.compile(longest(engine))
  except jax.errors.JaxRuntimeError as error:
    if not exhausts(error):
      raise
    return dataclasses.replace(now, temporaries=limit - now.total)
  most = max(temporaries(engine.compiled[key]) for key in longest(engine))
  return dataclasses.replace(now, temporaries=most, least=False)


def least_memory(engine: Engine) -> int:
  """Bytes of the smallest of this process's devices that the engine uses."""
  if engine.mesh is None:
    return device_bytes(jax.devices()[0])
  mine = [d for d in engine.mesh.devices.flat if d.process_index == jax.process_index()]
  return min(map(device_bytes, mine))


def device_bytes(device: jax.Device) -> int:
  """Memory of a device; of a CPU, the machine's, shared by the CPU devices of this process."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return whole // len([d for d in jax.local_devices() if d.platform == device.platform])


def fits(total: int, limit: int) -> bool:
  """Whether so many bytes fit a device of `limit` bytes, with HEADROOM left."""
  return total <= limit * (1 - HEADROOM)


def alternatives(engine: Engine, now: Need, limit: int) -> list[str]:
  """Settings that would fit where the present ones do not, each with what it takes; the mildest first.

  Temporaries count as they are, or by rows: the compiler has not seen these.
  """
  cfg, config, shape = engine.cfg, engine.config, engine.shape
  itemsize = jnp.dtype(engine.dtype).itemsize
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
  """(whether it fits, the lines to print)."""
  shape = engine.shape
  ok, more = fits(now.total, limit), " or more" * now.least
  devices = shape.data * shape.model
  lines = [
    f"On each of {devices} device{'s' * (devices > 1)} of {limit / 1e9:.1f} GB, batch "
    f"{engine.config.batch_size}, {engine.config.max_seq_len} tokens a row:",
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
