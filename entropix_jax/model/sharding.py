"""Shardings: one table from axis letters to mesh axes, the mesh, and the sizes that must divide.

Why: names, einsums, the weight table and the mesh share one alphabet, so a spec follows from an array's
name. `data` splits rows, or the tokens of a single row. `model` splits heads, ffn and vocabulary (two
all-reduces per layer). It is two mesh axes, since Llama has 8 key/value heads and a pod more chips:
`kv` splits those heads, and `rep` splits the queries of one head over chips that hold the same keys.

A sampler needs a row's whole vocabulary and nothing of other rows. So the logits, which the head leaves
split by vocabulary, are redistributed: each chip gets all ids of some rows (`per_row`). That is one
message with the logits, smaller per chip on a larger mesh, one with the results, none in a sampler.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from entropix_jax.config import MeshConfig, ModelConfig
from entropix_jax.errors import UserError

MODEL = ("kv", "rep")
AXES = {
  "B": "data",
  "T": "data",  # of a single row
  "K": "kv",
  "J": "kv",
  "N": MODEL,
  "Q": MODEL,
  "F": MODEL,
  "V": MODEL,
}
NAMES = ("data", *MODEL)


def split(cfg: ModelConfig, model: int) -> tuple[int, int]:
  """(kv, rep) for `model` chips: as many as possible get key/value heads of their own."""
  kv = math.gcd(model, cfg.kv_heads)
  return kv, model // kv


def divides(cfg: ModelConfig, model: int) -> bool:
  """Whether `model` chips can share the model evenly."""
  _, rep = split(cfg, model)
  groups = cfg.heads // cfg.kv_heads
  return groups % rep == 0 and cfg.ffn % model == 0 and cfg.vocab % model == 0


def check_divisible(cfg: ModelConfig, shape: MeshConfig, batch_size: int) -> None:
  """Raise UserError if the mesh does not divide the model or the batch."""
  if not divides(cfg, shape.model):
    fits = [str(m) for m in range(1, cfg.heads + 1) if divides(cfg, m)]
    raise UserError(
      f"config.mesh.model={shape.model} does not divide this model ({cfg.kv_heads} key/value heads of "
      f"{cfg.heads // cfg.kv_heads} queries, {cfg.ffn} ffn channels, {cfg.vocab} vocabulary ids); "
      f"these numbers would fit: {', '.join(fits)}."
    )
  if batch_size % shape.data:
    raise UserError(
      f"config.mesh.data={shape.data} does not divide config.engine.batch_size={batch_size}; "
      "choose a multiple of it as batch size."
    )


def mesh(
  shape: MeshConfig, cfg: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
  """The device mesh; None, with which nothing is constrained, for a single default device. Raises
  UserError if there are too few devices."""
  need = shape.data * shape.model
  if need == 1 and devices is None:
    return None
  devices = jax.devices() if devices is None else devices
  if need > len(devices):
    raise UserError(
      f"config.mesh asks for {shape.data} x {shape.model} = {need} devices but there are "
      f"{len(devices)}; lower config.mesh.data or config.mesh.model."
    )
  grid = np.asarray(devices[:need]).reshape(shape.data, *split(cfg, shape.model))
  return Mesh(grid, NAMES, axis_types=(AxisType.Auto,) * 3)


def spec(letters: str) -> PartitionSpec:
  """The PartitionSpec of an array with these axis letters: "BKSH" -> ("data", "kv", None, None)."""
  return PartitionSpec(*(AXES.get(letter) for letter in letters))


def of(mesh: Mesh | None, letters: str) -> NamedSharding | None:
  """The sharding of an array with these axis letters; None when there is no mesh."""
  return None if mesh is None else NamedSharding(mesh, spec(letters))


def constrain(mesh: Mesh | None, x: jax.Array, letters: str) -> jax.Array:
  """`x`, constrained to the sharding of its axis letters; unchanged without a mesh."""
  return x if mesh is None else jax.lax.with_sharding_constraint(x, of(mesh, letters))


def per_row(mesh: Mesh | None, f: Callable, *args):
  """`f(*args)` with the rows spread over all chips; the results are split over `data` only.

  Args:
    f: every array in and out has the row axis first, and no row depends on another. Each chip runs it
      on its own rows, so a condition in it waits for no other chip.
    args: split over `data`; if the chips do not divide the rows evenly, some rows are computed twice.
  """
  if mesh is None:
    return f(*args)
  B = jax.tree.leaves(args)[0].shape[0]
  rows = PartitionSpec(NAMES)
  if B % mesh.size == 0 and mesh.size == mesh.shape["data"]:
    return jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*args)
  parts = mesh.shape["data"] if B % mesh.shape["data"] == 0 else 1
  own = B // parts
  each = -(-own // (mesh.size // parts)) * (mesh.size // parts)
  which = np.arange(parts)[:, None] * own + np.arange(each) % own
  first = np.arange(parts)[:, None] * each + np.arange(own)
  outs, tree = jax.tree.flatten(jax.eval_shape(f, *args))

  def local(*args):
    leaves = jax.tree.leaves(f(*args))
    return jnp.concatenate([_bits(x).reshape(x.shape[0], -1) for x in leaves], axis=1)

  if own != each:
    args = jax.tree.map(lambda x: jnp.take(x, which.ravel(), axis=0), args)
  packed = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*args)
  if own != each:
    packed = jnp.take(packed, first.ravel(), axis=0)
  # All results return in one message; many small ones would each wait for the slowest link.
  packed = constrain(mesh, packed, "B_" if parts == mesh.shape["data"] else "__")
  cuts = np.cumsum([math.prod(x.shape[1:]) for x in outs])[:-1]
  pieces = zip(jnp.split(packed, cuts, axis=1), outs, strict=True)
  return jax.tree.unflatten(tree, [value(x.reshape(like.shape), like.dtype) for x, like in pieces])


def _bits(x: jax.Array) -> jax.Array:
  return x.astype(jnp.uint32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.uint32)


def value(bits: jax.Array, dtype) -> jax.Array:
  """These uint32 bits as values of `dtype`: bool, or a type of 32 bits."""
  return bits != 0 if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(bits, dtype)
