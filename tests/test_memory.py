"""Memory for weights and cache: whole, aligned, apart, and in huge pages where a CPU has them."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entropix_jax import memory


def test_arrays_are_aligned_and_apart():
  room, arrays = memory.Memory(1 << 16), []
  for i, shape in enumerate([(3, 5), (1000,), (200, 200), (7,), (0, 4), (64, 3)]):
    array = room.array(shape, np.dtype(np.float32 if i % 2 else np.uint8))
    assert array.shape == shape
    assert array.ctypes.data % 64 == 0 or not array.size
    array[...] = i
    arrays.append(array)
  for i, array in enumerate(arrays):
    assert (array == i).all()


def test_huge_pages_change_nothing_but_the_pages():
  x = jnp.arange(3 << 20, dtype=jnp.float32)
  before = x.unsafe_buffer_pointer()
  memory.huge_pages({"a": x, "small": jnp.ones(3), "b": [np.ones(4)]})
  assert x.unsafe_buffer_pointer() == before
  assert (np.asarray(x) == np.arange(3 << 20)).all()
  enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if not enabled.exists() or "[never]" in enabled.read_text():
    pytest.skip("this kernel has no huge pages")
  rows, inside = [], False
  for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    parts = line.split()
    if "-" in parts[0] and not parts[0].endswith(":"):
      begin, end = (int(n, 16) for n in parts[0].split("-"))
      inside = begin < before + x.nbytes and before < end
    elif inside and parts[0] == "VmFlags:":
      rows.append("hg" in parts)
  assert any(rows)


def test_sharded_arrays_and_other_platforms(monkeypatch):
  mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  x = jax.device_put(np.ones((2, 1 << 20), np.float32), spread)
  memory.huge_pages(x)
  assert float(x.sum()) == 2 << 20
  monkeypatch.setattr(sys, "platform", "darwin")
  monkeypatch.setattr(memory.ctypes, "CDLL", None)
  memory.huge_pages(x)
