"""Our own kernels against what XLA makes of the same layer, in Pallas' interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from test_engine import PROMPTS, assert_same, run
from test_mesh import spread

from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig, RopeConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.request import Request
from entropix_jax.model import kernels, kvcache, linear, llama, quant, rope, sharding, weights
from entropix_jax.model.attention import attend

# Two key/value heads of four queries: four chips hold each twice.
SMALL = ModelConfig(
  vocab=208, width=64, ffn=128, layers=2, heads=8, kv_heads=2, head_dim=32, tied=True
)


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels here and now; a list that grows by one for each layer traced through them."""
  layers, decode = [], kernels.decode

  def counted(*args):
    layers.append(args[0])
    return decode(*args)

  monkeypatch.setattr(kernels, "INTERPRET", True)
  monkeypatch.setattr(kernels, "decode", counted)
  return layers


# -- attention -----------------------------------------------------------------------------------


def poisoned(x_BKSH, len_B):
  """NaN wherever no token is; of int8, in the scales."""

  def spoil(x):
    if x.dtype == jnp.int8:
      return x
    dead_BKS = jnp.arange(x.shape[2]) >= len_B[:, None, None]
    return jnp.where(dead_BKS.reshape(*dead_BKS.shape, *[1] * (x.ndim - 3)), jnp.nan, x).astype(
      x.dtype
    )

  return jax.tree.map(spoil, x_BKSH)


def both_attend(B, K, G, H, capacity, lens, S=None, dtype=jnp.float32, int8=False, n=5, slots=8):
  """(out_BQ, beside) of the kernels over a poisoned cache, and of XLA over a clean one."""
  N, S, rng = K * G, S or capacity, np.random.default_rng(B * H + G)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  def pair(size):
    kv = normal(B, K, size, H), normal(B, K, size, H)
    return tuple(quant.cached(x) for x in kv) if int8 else kv

  qkv_BX, len_B, n = normal(B, (N + 2 * K) * H), jnp.asarray(lens, jnp.int32), jnp.int32(n)
  old, beside = pair(capacity), pair(slots)
  cos, sin = rope.angles(RopeConfig(), H, (len_B + n)[:, None])
  bad = tuple(poisoned(x, len_B) for x in old)
  bad_beside = tuple(poisoned(x, jnp.full((B,), n)) for x in beside)
  got = kernels._attend(qkv_BX, bad, bad_beside, len_B, n[None], cos[:, 0], sin[:, 0], S, True)

  q_BTNH, k_BTKH, v_BTKH = (
    x.reshape(B, 1, -1, H) for x in jnp.split(qkv_BX, [N * H, (N + K) * H], axis=1)
  )
  new = rope.rotate(k_BTKH, cos, sin), v_BTKH
  caches = (kvcache.Cache((k,), (v,)) for k, v in (old, beside))
  past = kvcache.Past(len_B, next(caches), kvcache.Recent(next(caches), n), window=S)
  now, pieces = past.layer(0).feed(new)
  lives = past.live(1)
  pieces = [(*kv, live_BTS) for kv, live_BTS in zip(pieces, lives, strict=True)]
  out_BTNH, _ = attend(rope.rotate(q_BTNH, cos, sin), pieces)
  return got, (out_BTNH.reshape(B, -1), now), bad_beside, int(n)


def assert_written(got, want, bad, n):
  """The token is in slot n, and no other bit has changed."""
  for x, y, old in zip(*map(jax.tree.leaves, (got, want, bad)), strict=True):
    apart = np.abs(np.asarray(x, np.float32)[:, :, n] - np.asarray(y, np.float32)[:, :, n])
    # int8 may round a tie the other way.
    assert apart.max() <= (1 if x.dtype == jnp.int8 else 1e-5)
    assert (apart > 1e-5).mean() < 0.01
    bits, old_bits = (
      np.ascontiguousarray(np.delete(np.asarray(a), n, axis=2)).view(np.uint8) for a in (x, old)
    )
    np.testing.assert_array_equal(bits, old_bits)


CASES = {
  "empty, one, a full block and its neighbours, full": (8, 2, 4, 64, 192, [0, 1, 63, 64, 65, 128, 191, 192]),
  "a lone row in many parts": (1, 1, 8, 64, 640, [601]),
  "as many keys as queries": (4, 3, 1, 64, 128, [3, 100, 64, 127]),
  "wide heads": (1, 2, 8, 128, 256, [200]),
  "sixteen queries a key": (4, 1, 16, 32, 128, [3, 100, 64, 127]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_xla(case):
  got, want, bad, n = both_attend(*CASES[case])
  np.testing.assert_allclose(got[0], want[0], atol=2e-6, rtol=2e-5)
  assert_written(got[1], want[1], bad, n)


@pytest.mark.parametrize(("n", "slots"), [(0, 1), (0, 8), (7, 8), (15, 16), (16, 17), (39, 40)])
def test_any_number_of_tokens_beside_the_cache(n, slots):
  got, want, bad, n = both_attend(3, 2, 4, 64, 128, [0, 5, 128], n=n, slots=slots)
  np.testing.assert_allclose(got[0], want[0], atol=2e-6, rtol=2e-5)
  assert_written(got[1], want[1], bad, n)


def test_nothing_beyond_the_window_is_read():
  """Rows that have outgrown it (they are dead) may not cost time; they see what XLA sees."""
  got, want, bad, n = both_attend(4, 2, 4, 64, 256, [127, 128, 200, 256], S=128)
  np.testing.assert_allclose(got[0], want[0], atol=2e-6, rtol=2e-5)
  assert_written(got[1], want[1], bad, n)


@pytest.mark.parametrize(
  ("dtype", "int8", "atol"),
  [(jnp.bfloat16, False, 2e-2), (jnp.bfloat16, True, 2e-2), (jnp.float32, True, 2e-5)],
)
def test_other_caches(dtype, int8, atol):
  got, want, bad, n = both_attend(4, 2, 4, 64, 192, [0, 64, 150, 192], dtype=dtype, int8=int8)
  np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (got, want)), atol=atol)
  assert_written(got[1], want[1], bad, n)


def test_a_value_that_is_not_finite_is_never_stored():
  """The row that has it sees it; its key does, and a masked slot is multiplied by zero."""
  rng = np.random.default_rng(0)
  x_BX = rng.standard_normal((2, (4 + 4) * 32)).astype(np.float32)
  x_BX[0, 6 * 32 + 3] = np.inf  # a value of the first row's first head
  old, beside = (tuple(jnp.zeros((2, 2, S, 32)) for _ in "kv") for S in (64, 8))
  zero_B = jnp.zeros((2,), jnp.int32)
  cos, sin = rope.angles(RopeConfig(), 32, zero_B[:, None])
  args = jnp.asarray(x_BX), old, beside, zero_B, zero_B[:1], cos[:, 0], sin[:, 0], 64, True
  out_BQ, (k_BKSH, v_BKSH) = kernels._attend(*args)
  assert np.isnan(out_BQ[0, :64]).any()
  assert np.isfinite(out_BQ[1]).all()
  assert np.isfinite(v_BKSH).all()
  assert np.isnan(k_BKSH[0, 0, 0]).sum() == 1
  assert np.isfinite(k_BKSH[1]).all()


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_are_those_of_xla(rows, int8):
  rng = np.random.default_rng(rows)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  x_BD, norm_D, old_BX = normal(rows, 96), normal(96), normal(rows, 224)
  ws = [normal(96, n) for n in (128, 32, 64)]
  if int8:
    ws = [quant.quantise("wq_DQ", w) for w in ws]
  product = functools.partial(kernels._product, eps=1e-5, interpret=True)
  near = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)

  def plain(x_BD, ws):
    return jnp.concatenate([linear.dot(x_BD, w) for w in ws], axis=1)

  h_BD = llama.rms_norm(x_BD, norm_D, 1e-5)
  near(product(x_BD, tuple(ws)), plain(x_BD, ws))
  near(product(x_BD, tuple(ws), residual=old_BX), plain(x_BD, ws) + old_BX)
  near(product(x_BD, tuple(ws), norm=norm_D), plain(h_BD, ws))
  gate, up = (linear.dot(h_BD, w) for w in (ws[2], ws[2]))
  gated = product(x_BD, (ws[2], ws[2]), norm=norm_D, gated=True)
  near(gated, jax.nn.silu(gate) * up)


# -- layers and the engine -------------------------------------------------------------------------


@functools.cache
def params(int8=False):
  w = weights.random(SMALL, jnp.float32, seed=4)
  w = w.replace(embed_VD=w.embed_VD * 10.0)
  return quant.weights(SMALL, w) if int8 else w


@pytest.mark.parametrize(
  ("shape", "int8"), [((1, 1), False), ((1, 1), True), ((2, 2), True), ((1, 4), False)], ids=str
)
def test_a_step_is_that_of_xla(interpreted, shape, int8):
  """One token for each of four rows, behind a cache that was filled at random."""
  rng = np.random.default_rng(0)
  mesh = sharding.mesh(MeshConfig(*shape), SMALL)
  w = spread(params(int8), mesh, SMALL) if mesh else params(int8)
  cache = kvcache.init(SMALL, 4, 128, jnp.float32)
  cache = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), cache)
  if int8:
    cache = kvcache.Cache(*(tuple(map(quant.cached, xs)) for xs in (cache.k, cache.v)))
  token_B1, len_B = jnp.asarray([[3], [1], [4], [9]]), jnp.asarray([0, 17, 64, 127])
  recent = kvcache.Recent(jax.tree.map(lambda x: x[:, :, 3:7], cache), jnp.int32(2))

  def step(own_kernels):
    def f(w, cache, recent):
      past = kvcache.Past(len_B, cache, recent)
      x_BTD, past, _ = llama.forward(SMALL, w, token_B1, past, mesh=mesh, own_kernels=own_kernels)
      return llama.unembed(w, x_BTD), past.recent

    return jax.jit(f)(w, cache, recent)

  got, want = step(True), step(False)
  assert len(interpreted) == SMALL.layers
  # A last bit of a key becomes a level of int8, here and there.
  atol = 0.05 if int8 else 2e-4
  np.testing.assert_allclose(got[0], want[0], atol=atol, rtol=1e-4)
  for x, y in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
    np.testing.assert_allclose(x, y, atol=1 if x.dtype == jnp.int8 else 2e-5)


def engine(shape=(1, 1), **changes):
  shape = MeshConfig(*shape)
  mesh = sharding.mesh(shape, SMALL)
  w = spread(params(), mesh, SMALL) if mesh else params()
  config = EngineConfig(4, 128, **{"kernels": "on"} | changes)
  return Engine.create(SMALL, w, tired, config, shape)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
def test_text_is_the_same(interpreted, shape):
  """Prefill, insert and decode, five requests through four slots."""
  prompts = [*PROMPTS[:4], PROMPTS[0]]  # the long one would compile a second prefill
  todo = [Request(ids, 12, seed=i) for i, ids in enumerate(prompts)]
  got = run(engine(shape), todo)
  # All layers but the last, which is measured, in the one window that there is.
  assert len(interpreted) == SMALL.layers - 1
  assert_same(got, run(engine(shape, kernels="off"), todo))
  assert len(interpreted) == SMALL.layers - 1


@pytest.mark.parametrize(("attn_stats", "layers"), [("off", 2), ("last", 1), ("all", 0)])
def test_measured_layers_are_left_to_xla(interpreted, attn_stats, layers):
  engine(attn_stats=attn_stats).lower(Program("decode", steps=1, window=128))
  assert len(interpreted) == layers


def test_a_prompt_is_left_to_xla(interpreted):
  engine().lower(Program("prompt", tokens=64, slots=(64,)))
  assert interpreted == []


@pytest.mark.parametrize(
  ("shape", "rows", "changes", "fits"),
  [
    ((1, 1), 16, {}, True),
    ((1, 1), 17, {}, False),
    ((2, 1), 32, {}, True),
    ((1, 4), 4, {}, True),
    ((1, 4), 4, {"ffn": 64}, False),
    ((1, 1), 4, {"head_dim": 24}, False),
    ((1, 1), 4, {"width": 72}, False),
    ((1, 1), 4, {"attention_bias": True}, False),
    ((1, 1), 4, {"mlp_bias": True}, False),
    ((1, 6), 4, {"kv_heads": 4, "heads": 12, "ffn": 192}, False),  # two heads a chip, for three
  ],
)
def test_other_shapes_are_left_to_xla(shape, rows, changes, fits):
  cfg = dataclasses.replace(SMALL, **changes)
  assert kernels.suit(cfg, sharding.mesh(MeshConfig(*shape), cfg), rows) == fits


def test_auto_is_on_for_gpus():
  """With every jax, also 0.12, which deprecates Triton and compiles it."""
  assert kernels.wanted("on", "cpu")
  assert not kernels.wanted("off", "gpu")
  assert kernels.wanted("auto", "gpu")
  assert not kernels.wanted("auto", "cpu")
  assert not kernels.wanted("auto", "tpu")


def test_without_triton_there_are_no_kernels(monkeypatch):
  monkeypatch.setattr(kernels, "triton", None)
  assert not kernels.suit(SMALL, None, 4)
