"""The cache's writers against a loop over rows and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entropix_jax import config
from entropix_jax.model import kvcache, quant

CFG = config.ModelConfig(
  vocab=7, width=8, ffn=8, layers=2, heads=4, kv_heads=2, head_dim=6, rope=config.RopeConfig()
)
S, N = 11, 4
LEN_B = np.array([0, 5, 7, 9, 11, 3], np.int32)  # from empty to full
COUNT_B = np.array([4, 0, 4, 4, 2, 3], np.int32)  # of the fourth, two fit; of the fifth, none
B = len(LEN_B)


def filled(slots, seed, dtype):
  """A cache of arbitrary numbers."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.integers(-100, 100, x.shape), x.dtype),
    kvcache.init(CFG, B, slots, dtype),
  )


def assert_written(old, new, got, count_B):
  """Every leaf (axes BKSH or BKS) has the first `count_B` of `new` after `LEN_B`, where they fit."""

  def check(old, new, got):
    want = np.array(old)
    for b in range(B):
      for j in range(min(count_B[b], S - LEN_B[b])):
        want[b, :, LEN_B[b] + j] = np.asarray(new)[b, :, j]
    np.testing.assert_array_equal(np.asarray(got), want)

  jax.tree.map(check, old, new, got)


@pytest.mark.parametrize("writer", ["_scatter", "_update_rows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_merge_writes_the_recent_tokens_that_fit_and_nothing_else(monkeypatch, writer, dtype):
  monkeypatch.setattr(kvcache, "_scatter", getattr(kvcache, writer))
  cache, recent = filled(S, 0, dtype), filled(N, 1, dtype)
  merged = kvcache.merge(
    cache, kvcache.Recent(recent, jnp.int32(N)), jnp.asarray(LEN_B), jnp.asarray(COUNT_B)
  )
  assert_written(cache, recent, merged, COUNT_B)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_append_writes_the_tokens_that_fit_and_nothing_else(dtype):
  old = filled(S, 0, dtype).k[0]
  tokens = np.random.default_rng(2).standard_normal((B, N, CFG.kv_heads, CFG.head_dim))
  tokens = jnp.asarray(tokens, jnp.float32)
  got = kvcache.append(old, tokens, jnp.asarray(LEN_B))
  new = quant.cached(tokens) if dtype == "int8" else tokens
  assert_written(old, jax.tree.map(lambda x: x.swapaxes(1, 2), new), got, [N] * B)


def test_recent_tokens_stand_where_all_rows_write_together():
  recent = kvcache.Recent(filled(N, 3, "float32"), jnp.int32(2))
  cache, k_B1KH = filled(S, 4, "float32"), jnp.ones((B, 1, CFG.kv_heads, CFG.head_dim))
  past = kvcache.Past(jnp.asarray(LEN_B), cache, recent, window=8)
  now, pieces = past.layer(1).feed((k_B1KH, 2 * k_B1KH))
  for got, was, value in zip(now, (recent.kv.k[1], recent.kv.v[1]), (1.0, 2.0), strict=True):
    want = np.array(was)
    want[:, :, 2] = value
    np.testing.assert_array_equal(got, want)
  assert [k_BKSH.shape[2] for k_BKSH, _ in pieces] == [8, N]
  settled, fresh = past.live(1)
  np.testing.assert_array_equal(settled[:, 0].sum(-1), np.minimum(LEN_B, 8))
  assert fresh.tolist() == [[[True, True, True, False]]]
