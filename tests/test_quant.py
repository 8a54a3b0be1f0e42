"""int8 weights and cache entries: errors bounded by half a level, and nothing else changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_weights

from entropix_jax.model import kvcache, linear, llama, quant, weights


def dequantised(field, w):
  """The weight that an Int8 stands for."""
  axes = tuple(weights.letters(field).index(axis) for axis in quant.inputs(field))
  return np.asarray(w.q, np.float32) * np.expand_dims(w.scale, axes)


@pytest.mark.parametrize("field", [*weights.LAYER_SOURCES, *weights.BIASES, *weights.TOP_SOURCES])
def test_a_weight_is_within_half_a_level(field):
  w = jax.random.normal(jax.random.key(0), weights.shape(TINY, field), jnp.float32)
  got = quant.quantise(field, w)
  if not quant.inputs(field):
    np.testing.assert_array_equal(got, w)
    return
  back = dequantised(field, got)
  axes = tuple(weights.letters(field).index(a) for a in quant.inputs(field))
  level = np.abs(np.asarray(w)).max(axes, keepdims=True) / 127
  assert got.q.dtype == jnp.int8
  assert got.scale.shape == tuple(TINY.size(a) for a in quant.outputs(field))
  assert (np.abs(back - np.asarray(w)) <= 0.5001 * level).all()
  assert np.abs(np.asarray(got.q)).max() == 127


def test_zeros_stay_zeros():
  got = quant.quantise("wq_DQ", jnp.zeros((4, 6)))
  np.testing.assert_array_equal(dequantised("wq_DQ", got), np.zeros((4, 6)))
  assert (got.scale == 1).all()


def test_keys_have_a_scale_a_token_and_head():
  x = jax.random.normal(jax.random.key(1), (2, 3, 4, 8)).at[0, 0, 0, 0].set(1000.0)
  got = quant.cached(x)
  assert got.scale.shape == (2, 3, 4)
  off = np.abs(np.asarray(got.q.astype(jnp.float32) * got.scale[..., None] - x))
  assert (off <= 0.5001 * np.asarray(got.scale)[..., None]).all()
  assert off[1].max() < 0.02  # one large channel blurs its own token and head only


def test_shapes_are_those_of_weights():
  real = quant.weights(TINY, random_weights())
  planned = quant.shapes(TINY, jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
    lambda x: (x.shape, x.dtype), planned
  )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("field", ["wq_DQ", "wdown_FD", "embed_VD"])
def test_a_product_is_that_of_the_weight_it_stands_for(field, rows):
  w = quant.quantise(field, jax.random.normal(jax.random.key(2), weights.shape(TINY, field)))
  transposed = field == "embed_VD"
  whole = dequantised(field, w).T if transposed else dequantised(field, w)
  x = jax.random.normal(jax.random.key(3), (rows, whole.shape[0]))
  for bias in (None, jnp.arange(whole.shape[1], dtype=jnp.float32)):
    got = linear.dot(x, w, transposed=transposed, bias=bias)
    want = np.asarray(x) @ whole + (0 if bias is None else np.asarray(bias))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_rows_of_an_embedding_are_those_it_stands_for():
  w = quant.quantise("embed_VD", jax.random.normal(jax.random.key(4), (7, 5)))
  id_BT = jnp.asarray([[3, 0], [6, 6]])
  got = quant.rows_of(w, id_BT, jnp.float32)
  np.testing.assert_allclose(got, dequantised("embed_VD", w)[np.asarray(id_BT)], rtol=1e-6)


def test_an_int8_cache_hardly_moves_the_logits():
  """Fed in two pieces, so that what is cached is read."""
  w, token_BT = random_weights(), jax.random.randint(jax.random.key(5), (2, 9), 0, TINY.vocab)
  none_B = jnp.zeros((2,), jnp.int32)

  @jax.jit
  def feed(token_BT, cache, len_B):
    x_BTD, past, _ = llama.forward(TINY, w, token_BT, kvcache.Past(len_B, cache))
    cache = past.cache
    return llama.unembed(w, x_BTD), cache

  def logits(dtype):
    _, cache = feed(token_BT[:, :6], kvcache.init(TINY, 2, 16, dtype), none_B)
    return np.asarray(feed(token_BT[:, 6:], cache, none_B + 6)[0])

  want = logits(jnp.float32)
  off = np.abs(logits(jnp.int8) - want).max() / want.std()
  assert 0 < off < 0.05
