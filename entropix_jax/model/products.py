"""x @ w for every form of a matrix: an array, an Int8, or Flipped into the layout that suits a CPU.

Why: a decode step is products with few rows, and a backend reads a matrix at memory speed only in some
layouts. XLA:CPU does so for one row in any layout, for several if the outputs come first and in tiles;
otherwise it copies the matrix to another layout in each step: five rows cost three times one [n25].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.model.quant import Int8
from entropix_jax.model.weights import Weights

# Outputs per tile; the most rows that are multiplied by tiles; the fewest entries of a matrix that is
# flipped, since a smaller one stays in a core's cache, where any layout is as fast.
TILE, FEW, LARGE = 256, 32, 1 << 18
# XLA:CPU of jax 0.10.2 reads beyond its stack if it fuses a large product with a maximum of it.
APART = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@struct.dataclass
class Flipped:
  """A matrix whose transpose is stored: value_IO = w_OI.T."""

  w: jax.Array

  @property
  def T(self) -> jax.Array:
    """The transpose, which is the stored array: Hugging Face's layout of the weight."""
    return self.w


def flips(dtype, pieces: int = 1) -> Callable | None:
  """`flip` where it pays: on a CPU, in float32 [n06], with a model in one of `pieces`; else None."""
  cpu = jax.default_backend() == "cpu"
  return flip if cpu and jnp.dtype(dtype) == jnp.float32 and pieces == 1 else None


def flip(field: str, w: jax.Array) -> Flipped | jax.Array:
  """A weight as Flipped, on its devices; unchanged if it is an embedding, a norm, small or untileable."""
  if w.ndim < 2 or field == "embed_VD" or w.size < LARGE or w.shape[1] % TILE:
    return w
  if isinstance(w, jax.ShapeDtypeStruct):
    # Only a model in one piece is flipped, so no axis is split.
    return Flipped(jax.ShapeDtypeStruct(w.shape[::-1], w.dtype, sharding=w.sharding))
  return Flipped(jax.block_until_ready(jax.jit(jnp.transpose)(w)))


def flipped(weights: Weights) -> bool:
  """Whether any matrix is Flipped."""
  leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Flipped))
  return any(isinstance(leaf, Flipped) for leaf in leaves)


def options(weights: Weights, platform: str) -> dict[str, str]:
  """Compiler options for programs with these weights on a platform ("cpu", "cuda", ...)."""
  large = any(leaf.size >= LARGE for leaf in jax.tree.leaves(weights))
  return APART if platform == "cpu" and large else {}


def product(
  x: jax.Array, w: Int8 | Flipped | jax.Array, out=None, transposed: bool = False
) -> jax.Array:
  """x @ w, or x @ w.T, in dtype `out` (None: x's); an Int8's scale multiplies the float32 result."""
  if isinstance(w, Flipped):
    w, transposed = w.w, not transposed
  axes = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
  int8 = isinstance(w, Int8)

  def plain(x):
    kind = jnp.float32 if int8 else out
    return jax.lax.dot_general(
      x, w.q.astype(x.dtype) if int8 else w, axes, preferred_element_type=kind
    )

  def doubled(x):
    return plain(jnp.concatenate([x, x], axis=0))[:1]

  def tiled(x):
    rows = x.reshape(-1, x.shape[-1])
    n = rows.shape[0]
    if n > 4:  # eight rows take less time than five
      rows = jnp.pad(rows, ((0, -n % 8), (0, 0)))
    tiles = w.reshape(-1, TILE, w.shape[-1])
    each = jnp.broadcast_to(rows, (tiles.shape[0], *rows.shape))
    y = jax.lax.dot_general(tiles, each, (((2,), (2,)), ((0,), (0,))), preferred_element_type=out)
    return y.reshape(-1, rows.shape[0]).T[:n].reshape(*x.shape[:-1], -1)

  ways = {}
  if x.size == x.shape[-1] and x.ndim > 1:
    # For a single row, XLA:GPU writes all products of entries to memory before it sums; not for two.
    ways |= {"cuda": doubled, "rocm": doubled}
  if transposed and not int8 and x.size <= FEW * x.shape[-1] and not w.shape[0] % TILE:
    ways |= {"cpu": tiled}
  y = jax.lax.platform_dependent(x, default=plain, **ways) if ways else plain(x)
  return (y * w.scale).astype(out or x.dtype) if int8 else y
