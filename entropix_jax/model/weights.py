"""The parameters of a Llama model as one table: name, shape and Hugging Face tensor of each.

Why: each layer has its own arrays, because slices of a stack are copied in every step (10x slower on
CPU, 1.65x on a GPU engine that measured it). Every matrix is two-dimensional, input axis first, so that
`x @ w` reads memory in order; only XLA:CPU wants another layout (linear.py). With an axis for heads,
or one that pairs gate and up, TPU compilers re-laid out 10 GB of a 70B model per dispatch.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.config import ModelConfig


@struct.dataclass
class Layer:
  """One decoder layer; a bias is None in a model that has none."""

  attn_norm_D: jax.Array
  wq_DQ: jax.Array
  wk_DJ: jax.Array
  wv_DJ: jax.Array
  wo_QD: jax.Array
  ffn_norm_D: jax.Array
  wgate_DF: jax.Array
  wup_DF: jax.Array
  wdown_FD: jax.Array
  bq_Q: jax.Array | None = None
  bk_J: jax.Array | None = None
  bv_J: jax.Array | None = None
  bo_D: jax.Array | None = None
  bgate_F: jax.Array | None = None
  bup_F: jax.Array | None = None
  bdown_D: jax.Array | None = None


@struct.dataclass
class Weights:
  """All parameters; `head_DV` is None when the embedding is also the output head."""

  embed_VD: jax.Array
  layers: tuple[Layer, ...]
  norm_D: jax.Array
  head_DV: jax.Array | None


# Field -> the Hugging Face module whose weight it is, which is stored as (out, in), or whose bias.
LAYER_SOURCES: dict[str, str] = {
  "attn_norm_D": "input_layernorm",
  "wq_DQ": "self_attn.q_proj",
  "wk_DJ": "self_attn.k_proj",
  "wv_DJ": "self_attn.v_proj",
  "wo_QD": "self_attn.o_proj",
  "ffn_norm_D": "post_attention_layernorm",
  "wgate_DF": "mlp.gate_proj",
  "wup_DF": "mlp.up_proj",
  "wdown_FD": "mlp.down_proj",
}
ATTENTION_BIASES: dict[str, str] = {
  "bq_Q": "self_attn.q_proj",
  "bk_J": "self_attn.k_proj",
  "bv_J": "self_attn.v_proj",
  "bo_D": "self_attn.o_proj",
}
MLP_BIASES: dict[str, str] = {
  "bgate_F": "mlp.gate_proj",
  "bup_F": "mlp.up_proj",
  "bdown_D": "mlp.down_proj",
}
BIASES = ATTENTION_BIASES | MLP_BIASES
TOP_SOURCES: dict[str, str] = {
  "embed_VD": "model.embed_tokens",
  "norm_D": "model.norm",
  "head_DV": "lm_head",
}


def letters(field: str) -> str:
  """The axis letters of a field name: `wq_DQ` -> "DQ"."""
  return field.rsplit("_", 1)[1]


def shape(cfg: ModelConfig, field: str) -> tuple[int, ...]:
  """The shape of a field's array in this package."""
  return tuple(cfg.size(axis) for axis in letters(field))


def layer_sources(cfg: ModelConfig) -> dict[str, str]:
  """Each field of a layer that a model has -> its Hugging Face tensor, by its name within the layer."""
  biases = (ATTENTION_BIASES if cfg.attention_bias else {}) | (MLP_BIASES if cfg.mlp_bias else {})
  weights = {field: f"{name}.weight" for field, name in LAYER_SOURCES.items()}
  return weights | {field: f"{name}.bias" for field, name in biases.items()}


def sources(cfg: ModelConfig) -> dict[tuple[int | None, str], str]:
  """(layer index or None, field) -> the full name of its Hugging Face tensor."""
  table: dict[tuple[int | None, str], str] = {
    (None, field): f"{name}.weight"
    for field, name in TOP_SOURCES.items()
    if not (field == "head_DV" and cfg.tied)
  }
  for layer in range(cfg.layers):
    for field, name in layer_sources(cfg).items():
      table[layer, field] = f"model.layers.{layer}.{name}"
  return table


def hf_order(field: str, array):
  """A view of an array that turns our axis order into Hugging Face's, or theirs into ours."""
  return array if field == "embed_VD" else array.T


def hf_shape(cfg: ModelConfig, field: str) -> tuple[int, ...]:
  """The shape of a field's Hugging Face tensor."""
  dims = shape(cfg, field)
  return dims if field == "embed_VD" else dims[::-1]


def assemble(cfg: ModelConfig, make) -> Weights:
  """Weights with `make(layer index or None, field)` as leaves, made in the order of a forward pass."""
  return Weights(
    embed_VD=make(None, "embed_VD"),
    layers=tuple(
      Layer(**{field: make(layer, field) for field in layer_sources(cfg)})
      for layer in range(cfg.layers)
    ),
    norm_D=make(None, "norm_D"),
    head_DV=None if cfg.tied else make(None, "head_DV"),
  )


def shapes(cfg: ModelConfig, dtype) -> Weights:
  """Weights of `jax.ShapeDtypeStruct`: enough to compile, without allocating anything."""

  def make(layer, field):
    del layer
    return jax.ShapeDtypeStruct(shape(cfg, field), dtype)

  return assemble(cfg, make)


@functools.partial(jax.jit, static_argnames=("dims", "dtype"))
def _normal(key, dims, scale, dtype):
  return (jax.random.normal(key, dims, jnp.float32) * scale).astype(dtype)


def random(cfg: ModelConfig, dtype, seed: int = 0, finish: Callable | None = None) -> Weights:
  """Gaussian weights with standard deviation 1/sqrt(fan in) (0.02 for the embedding, 0.1 for biases).

  Norms are one.

  Args:
    finish: (field name, matrix) -> the leaf, for example `linear.transpose`; None keeps the matrix.
  """
  key = jax.random.key(
    seed, impl="rbg"
  )  # for large arrays, compiles ten times faster than threefry

  def make(layer, field):
    dims = shape(cfg, field)
    if "norm" in field:
      return jnp.ones(dims, dtype)
    scale = 0.02 if field == "embed_VD" else 0.1 if field in BIASES else dims[0] ** -0.5
    # A model has the same matrices with and without biases.
    names = BIASES if field in BIASES else {**LAYER_SOURCES, **TOP_SOURCES}
    place = sorted(names).index(field) + (1 << 20) * (field in BIASES)
    place += 16 * (0 if layer is None else layer + 1)
    leaf = _normal(jax.random.fold_in(key, place), dims, scale, jnp.dtype(dtype))
    return finish(field, leaf) if finish else leaf

  return assemble(cfg, make)


def count(cfg: ModelConfig) -> int:
  """The number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(cfg, jnp.float32)))
