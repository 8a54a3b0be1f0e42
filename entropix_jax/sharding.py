"""Where arrays live: one table from axis letters to mesh axes, the mesh, and what must divide.

Why: names, einsums, the weight table and the mesh share one alphabet, so a spec follows from an
array's name. `model` splits heads, ffn and vocabulary (two all-reduces a layer), `data` splits rows.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from entropix_jax.config import MeshConfig, ModelConfig
from entropix_jax.errors import UserError

AXES = {"B": "data", "N": "model", "K": "model", "F": "model", "V": "model"}


def mesh(shape: MeshConfig) -> jax.sharding.Mesh | None:
  """The device mesh, or None for a single device (nothing is constrained then)."""
  need = shape.data * shape.model
  if need == 1:
    return None
  devices = jax.devices()
  if need > len(devices):
    raise UserError(
      f"config.mesh asks for {shape.data} x {shape.model} = {need} devices but there are "
      f"{len(devices)}; lower config.mesh.data or config.mesh.model."
    )
  grid = np.asarray(devices[:need]).reshape(shape.data, shape.model)
  return jax.sharding.Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check(cfg: ModelConfig, shape: MeshConfig, batch_size: int) -> None:
  """Raises UserError when the mesh does not divide the model or the batch."""
  for letter, what in (("K", "key/value heads"), ("F", "ffn channels"), ("V", "vocabulary ids")):
    if cfg.size(letter) % shape.model:
      raise UserError(
        f"config.mesh.model={shape.model} does not divide the model's {cfg.size(letter)} {what}; "
        "choose a divisor."
      )
  if batch_size % shape.data:
    raise UserError(
      f"config.mesh.data={shape.data} does not divide config.engine.batch_size={batch_size}; "
      "choose a multiple of it as batch size."
    )


def spec(letters: str) -> PartitionSpec:
  """The PartitionSpec of an array with these axis letters: "DNH" -> (None, "model", None)."""
  return PartitionSpec(*(AXES.get(letter) for letter in letters))


def of(mesh: jax.sharding.Mesh | None, letters: str) -> NamedSharding | None:
  """The sharding of an array with these axis letters; None when there is no mesh."""
  return None if mesh is None else NamedSharding(mesh, spec(letters))
