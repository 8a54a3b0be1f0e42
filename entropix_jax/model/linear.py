"""x @ w for every form of a matrix: an array, an Int8, or Transposed, in the layout that suits a CPU.

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

TILES = (256, 320, 192)  # outputs; the first that divides a matrix
MAX_TILED_ROWS = 32  # more are multiplied by the whole matrix
# Of a matrix with fewer inputs, more than FEW_ROWS are.
MIN_TILED_INPUTS, FEW_ROWS = 1024, 8
# Entries of the smallest matrix that is transposed: a smaller one stays in a core's cache, where any layout
# is as fast.
MIN_TRANSPOSED = 1 << 18
# XLA:CPU of jax 0.10.2 reads beyond its stack if it fuses a large product with a maximum of it.
NO_DOT_FUSION = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@struct.dataclass
class Transposed:
  """A matrix whose transpose is stored: value_IO = w_OI.T."""

  w: jax.Array

  @property
  def T(self) -> jax.Array:
    """The transpose, which is the stored array: Hugging Face's layout of the weight."""
    return self.w


def transposer(dtype, pieces: int = 1) -> Callable | None:
  """`transpose` where it pays: on a CPU, in float32 [n06], with a model that is not split; else None.

  Args:
    pieces: into which the mesh splits every matrix.
  """
  cpu = jax.default_backend() == "cpu"
  return transpose if cpu and jnp.dtype(dtype) == jnp.float32 and pieces == 1 else None


def transpose(field: str, w: jax.Array) -> Transposed | jax.Array:
  """A weight as Transposed, on its devices; unchanged if it is an embedding, a norm, small or untileable."""
  if w.ndim < 2 or field == "embed_VD" or w.size < MIN_TRANSPOSED or not tile(w.shape[1]):
    return w
  if isinstance(w, jax.ShapeDtypeStruct):
    # Only a model that is not split is transposed.
    return Transposed(jax.ShapeDtypeStruct(w.shape[::-1], w.dtype, sharding=w.sharding))
  return Transposed(jax.block_until_ready(jax.jit(jnp.transpose)(w)))


def tile(outputs: int) -> int | None:
  """Outputs of a tile; None where no tile divides them."""
  return next((size for size in TILES if outputs % size == 0), None)


def any_transposed(weights: Weights) -> bool:
  """Whether any matrix is Transposed."""
  leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Transposed))
  return any(isinstance(leaf, Transposed) for leaf in leaves)


def compiler_options(weights: Weights, platform: str) -> dict[str, str]:
  """Compiler options for programs with these weights on a platform ("cpu", "cuda", ...)."""
  large = any(leaf.size >= MIN_TRANSPOSED for leaf in jax.tree.leaves(weights))
  return NO_DOT_FUSION if platform == "cpu" and large else {}


def dot(
  x: jax.Array,
  w: Int8 | Transposed | jax.Array,
  out=None,
  transposed: bool = False,
  bias: jax.Array | None = None,
) -> jax.Array:
  """x @ w, or x @ w.T, in dtype `out` (None: x's), plus `bias`, which has that dtype; None adds nothing.

  An Int8's scale multiplies the float32 result.
  """
  if isinstance(w, Transposed):
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
    tiles = w.reshape(-1, tile(w.shape[0]), w.shape[-1])
    each = jnp.broadcast_to(rows, (tiles.shape[0], *rows.shape))
    y = jax.lax.dot_general(tiles, each, (((2,), (2,)), ((0,), (0,))), preferred_element_type=out)
    return y.reshape(-1, rows.shape[0]).T[:n].reshape(*x.shape[:-1], -1)

  ways = {}
  if x.size == x.shape[-1] and x.ndim > 1:
    # For a single row, XLA:GPU writes all products of entries to memory before it sums; not for two.
    ways |= {"cuda": doubled, "rocm": doubled}
  most = MAX_TILED_ROWS if x.shape[-1] >= MIN_TILED_INPUTS else FEW_ROWS
  if transposed and not int8 and x.size <= most * x.shape[-1] and tile(w.shape[0]):
    ways |= {"cpu": tiled}
  y = jax.lax.platform_dependent(x, default=plain, **ways) if ways else plain(x)
  y = (y * w.scale).astype(out or x.dtype) if int8 else y
  return y if bias is None else y + bias
