"""Axis suffixes tell the truth: every array of the engine's containers has the shape that its name spells."""

import dataclasses
import re

import chex
import jax
import pytest
from conftest import TINY

from entropix_jax import sampling
from entropix_jax.config import EngineConfig
from entropix_jax.engine import state
from entropix_jax.engine.setup import STOP_IDS, Setup
from entropix_jax.model import weights
from entropix_jax.sampling import dslider

B = 3
SUFFIX = re.compile("[A-WYZ0-9]+")  # X has the size of whatever it was made from


def setup(sampler: str) -> Setup:
  return Setup.create(TINY, sampling.find(sampler), EngineConfig(B, 128))


def check(tree, dims: chex.Dimensions) -> int:
  """Compare every suffixed field, however deep, with its shape; how many there were."""
  count = 0
  for field in dataclasses.fields(tree):
    name, letters = field.name.rpartition("_")[::2]
    value = getattr(tree, field.name)
    if dataclasses.is_dataclass(value):
      count += check(value, dims)
    elif name and SUFFIX.fullmatch(letters) and hasattr(value, "shape"):
      chex.assert_shape(value, dims[letters])
      count += 1
  return count


def dimensions(rows: int) -> chex.Dimensions:
  sizes = {letter: TINY.size(letter) for letter in "VDFLNKGHQJ"}
  return chex.Dimensions(B=rows, S=128, E=STOP_IDS, M=dslider.RANKS + 1, **sizes)


@pytest.mark.parametrize("sampler", sampling.names())
def test_a_state_is_what_its_names_say(sampler):
  rows = state.abstract_state(setup(sampler))
  assert check(rows, dimensions(B)) >= 16
  chex.assert_tree_shape_prefix(jax.tree.leaves((rows.knobs, rows.sampler_state)), (B,))


def test_weights_are_what_their_names_say():
  shapes, dims = weights.shapes(TINY, "float32"), dimensions(1)
  assert check(shapes, dims) == 2
  assert all(check(layer, dims) == 9 for layer in shapes.layers)


def test_a_wrong_suffix_is_found():
  rows = state.abstract_state(setup("plain"))
  with pytest.raises(AssertionError, match="shape"):
    check(rows.replace(len_B=rows.history_BS), dimensions(B))
