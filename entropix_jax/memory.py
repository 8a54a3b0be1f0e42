"""Huge pages for what a CPU reads in every decode step: weights and cache.

Why: Linux maps memory in pages of 4 KB unless it is asked for 2 MB, and finding so many small pages took as long as
reading them: with huge pages a step of a 135M model takes 0.6 of the time. NumPy asks for them from 4 MB on,
which a small model's matrices do not reach; XLA never asks.
"""

import ctypes
import math
import sys
from typing import Any

import jax
import numpy as np

PIECE = 64 << 20  # bytes that small arrays share
_PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # advice of madvise(2); the second one since Linux 6.1


class Memory:
  """Uninitialised arrays, aligned to 64 bytes so that a CPU device can take them over without a copy.

  Args:
    piece: bytes that are allocated at a time, at least; arrays are cut from such pieces.
  """

  def __init__(self, piece: int = 0):
    self._piece, self._free = piece, np.empty(0, np.uint8)

  def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next array."""
    size = math.prod(shape) * dtype.itemsize
    if len(self._free) < size + 64:
      self._free = np.empty(max(size + 64, self._piece), np.uint8)
    start = -self._free.ctypes.data % 64
    found, self._free = np.split(self._free[start:], [size])
    return found.view(dtype).reshape(shape)


def huge_pages(tree: Any) -> None:
  """Ask Linux for huge pages under a tree of arrays on a CPU; elsewhere nothing happens, nor where it cannot be."""
  if sys.platform != "linux":
    return
  libc = ctypes.CDLL(None)
  arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
  for shard in (shard for array in arrays for shard in array.addressable_shards):
    if shard.device.platform != "cpu" or shard.data.nbytes < _PAGE:
      continue
    at = jax.block_until_ready(shard.data).unsafe_buffer_pointer()
    begin, end = -(-at // _PAGE) * _PAGE, (at + shard.data.nbytes) // _PAGE * _PAGE
    for advice in (_HUGEPAGE, _COLLAPSE) if begin < end else ():
      libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
