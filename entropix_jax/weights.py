"""The parameters of a Llama: their names, shapes and where each comes from, as one table.

Why: one array per layer and not one stack, because slices of a stack are copied every step (10x
slower on CPU, 1.65x on a GPU engine that measured it). Input axes come first so that `x @ w` streams
memory in order; keys and values, and the two halves of the gated unit, share a matrix to launch less.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax.config import ModelConfig


@struct.dataclass
class Layer:
  """One decoder layer."""

  attn_norm_D: jax.Array
  wq_DNH: jax.Array
  wkv_D2KH: jax.Array  # [:, 0] makes keys, [:, 1] values
  wo_NHD: jax.Array
  ffn_norm_D: jax.Array
  wgu_D2F: jax.Array  # [:, 0] is the gate, [:, 1] goes up
  wdown_FD: jax.Array


@struct.dataclass
class Weights:
  """All parameters; `head_DV` is None when the embedding serves as head."""

  embed_VD: jax.Array
  layers: tuple[Layer, ...]
  norm_D: jax.Array
  head_DV: jax.Array | None


# Field -> the Hugging Face tensors that make it, each stored there as (out, in).
LAYER_SOURCES: dict[str, tuple[str, ...]] = {
  "attn_norm_D": ("input_layernorm",),
  "wq_DNH": ("self_attn.q_proj",),
  "wkv_D2KH": ("self_attn.k_proj", "self_attn.v_proj"),
  "wo_NHD": ("self_attn.o_proj",),
  "ffn_norm_D": ("post_attention_layernorm",),
  "wgu_D2F": ("mlp.gate_proj", "mlp.up_proj"),
  "wdown_FD": ("mlp.down_proj",),
}
TOP_SOURCES: dict[str, tuple[str, ...]] = {
  "embed_VD": ("model.embed_tokens",),
  "norm_D": ("model.norm",),
  "head_DV": ("lm_head",),
}


def letters(field: str) -> str:
  """The axis letters of a field name: `wq_DNH` -> "DNH"."""
  return field.rsplit("_", 1)[1]


def shape(cfg: ModelConfig, field: str) -> tuple[int, ...]:
  """The shape of our array."""
  return tuple(cfg.size(axis) for axis in letters(field))


def sources(cfg: ModelConfig) -> dict[tuple[int | None, str], tuple[str, ...]]:
  """(layer index or None, field) -> full names of the Hugging Face tensors that make it."""
  table: dict[tuple[int | None, str], tuple[str, ...]] = {
    (None, field): tuple(f"{name}.weight" for name in names)
    for field, names in TOP_SOURCES.items()
    if not (field == "head_DV" and cfg.tied)
  }
  for layer in range(cfg.layers):
    for field, names in LAYER_SOURCES.items():
      table[layer, field] = tuple(f"model.layers.{layer}.{name}.weight" for name in names)
  return table


def hf_shape(cfg: ModelConfig, field: str) -> tuple[int, ...]:
  """The shape of each Hugging Face tensor behind a field."""
  if field == "embed_VD":
    return (cfg.vocab, cfg.width)
  axes = letters(field).replace("2", "")
  if len(axes) == 1:
    return (cfg.size(axes),)
  if field == "wo_NHD":
    return (cfg.width, cfg.heads * cfg.head_dim)
  return (math.prod(cfg.size(axis) for axis in axes[1:]), cfg.size(axes[0]))


def from_hf_tensors(
  cfg: ModelConfig,
  field: str,
  tensors: list[np.ndarray],
  dtype=None,
  block: tuple[slice, ...] | None = None,
) -> np.ndarray:
  """Our array, or a block of it, from the Hugging Face tensors of `sources`, in their order.

  Always a copy, in `dtype` if given, and made once. It keeps the memory order of `tensors` where it
  can: reading a mapped file front to back is fast, and the transfer to the device transposes.
  """
  full = shape(cfg, field)
  block = block or (slice(None),) * len(full)
  if "2" in letters(field):
    part, cut = (full[0], *full[2:]), (block[0], *block[2:])
    parts = [tensor.T.reshape(part)[cut] for tensor in tensors[block[1]]]
    return np.stack(parts, axis=1, dtype=dtype, casting="unsafe")
  whole = tensors[0] if field == "embed_VD" else tensors[0].T
  return np.array(whole.reshape(full)[block], dtype)


def to_hf_tensors(field: str, array: np.ndarray) -> list[np.ndarray]:
  """The inverse of `from_hf_tensors`."""
  if field == "embed_VD" or array.ndim == 1:
    return [array]
  if field == "wo_NHD":
    return [array.reshape(-1, array.shape[-1]).T]
  parts = [array[:, i] for i in range(2)] if "2" in letters(field) else [array]
  return [part.reshape(array.shape[0], -1).T for part in parts]


def assemble(cfg: ModelConfig, make) -> Weights:
  """Weights whose every leaf is `make(layer index or None, field)`, in the order of a forward pass."""
  return Weights(
    embed_VD=make(None, "embed_VD"),
    layers=tuple(
      Layer(**{field: make(layer, field) for field in LAYER_SOURCES}) for layer in range(cfg.layers)
    ),
    norm_D=make(None, "norm_D"),
    head_DV=None if cfg.tied else make(None, "head_DV"),
  )


def shapes(cfg: ModelConfig, dtype) -> Weights:
  """Weights of `jax.ShapeDtypeStruct`: enough to compile, nothing allocated."""

  def make(layer, field):
    del layer
    return jax.ShapeDtypeStruct(shape(cfg, field), dtype)

  return assemble(cfg, make)


@functools.partial(jax.jit, static_argnames=("dims", "dtype"))
def _normal(key, dims, scale, dtype):
  return (jax.random.normal(key, dims, jnp.float32) * scale).astype(dtype)


def random(cfg: ModelConfig, dtype, seed: int = 0) -> Weights:
  """Gaussian weights of standard deviation 1/sqrt(fan in) (0.02 for the embedding), norms of one."""
  key = jax.random.key(seed, impl="rbg")  # made in bulk; compiles ten times faster than threefry

  def make(layer, field):
    dims = shape(cfg, field)
    if len(dims) == 1:
      return jnp.ones(dims, dtype)
    fan_in = cfg.heads * cfg.head_dim if field == "wo_NHD" else cfg.size(letters(field)[0])
    scale = 0.02 if field == "embed_VD" else fan_in**-0.5
    place = sorted({**LAYER_SOURCES, **TOP_SOURCES}).index(field)
    place += 16 * (0 if layer is None else layer + 1)
    return _normal(jax.random.fold_in(key, place), dims, scale, jnp.dtype(dtype))

  return assemble(cfg, make)


def count(cfg: ModelConfig) -> int:
  """Number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(cfg, jnp.float32)))
