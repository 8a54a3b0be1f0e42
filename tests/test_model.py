"""The forward pass against its own laws and against a float64 forward written from the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ent_varent, log_softmax

from entropix_jax import config, metrics
from entropix_jax.model import attention, kvcache, llama, quant, rope, weights

# Pairwise different sizes, an eps that counts, and a rope whose three bands all meet in 13 tokens.
CFG = config.ModelConfig(
  vocab=37, width=24, ffn=28, layers=2, heads=8, kv_heads=2, head_dim=10,
  rope=config.RopeConfig(theta=100.0, kind="llama3", factor=8.0, original_max_position=40),
)  # fmt: skip
BIASED = dataclasses.replace(CFG, attention_bias=True, mlp_bias=True)
B, T = 3, 13
TOKEN_BT = np.random.default_rng(5).integers(0, CFG.vocab, (B, T)).astype(np.int32)


def each(x):
  """One int32 for each row."""
  return np.full(B, x, np.int32)


@functools.cache
def random_weights(cfg=CFG, seed=0):
  """Every norm away from one, embeddings near sqrt(eps), scores and logits some units wide."""
  rng = np.random.default_rng(seed)

  def make(layer, field):
    shape = tuple(cfg.size(axis) for axis in weights.letters(field))
    x = rng.standard_normal(shape)
    if field in weights.BIASES:
      x = 0.3 * x
    elif len(shape) == 1:
      x = (1 + 0.2 * x) * ((60 if cfg.tied else 3) if field == "norm_D" else 1)
    elif field == "embed_VD":
      x = 0.01 * x
    else:
      x = x * shape[0] ** -0.5 * (1.5 if field == "wq_DQ" else 1)
    return jnp.asarray(x, jnp.float32)

  return weights.assemble(cfg, make)


@jax.jit(static_argnames=("cfg", "window", "attn_stats"))
def run(
  cfg, params, token_BT, cache=None, len_B=None, last_B=None, recent=None, *,
  window=None, attn_stats="all",
):  # fmt: skip
  """(logits_BTV, cache, statistics) of one call."""
  past = None if cache is None else kvcache.Past(jnp.asarray(len_B), cache, recent, window=window)
  x_BTD, past, stats = llama.forward(
    cfg, params, token_BT, past, last_B=last_B, attn_stats=attn_stats
  )
  return llama.unembed(params, x_BTD), past.recent or past.cache, stats


@functools.cache
def full(cfg=CFG):
  """Logits (B, T, V) of one pass without a cache, and the statistics of each position."""
  stats = []
  for t in range(T):
    logits_BTV, _, seen = run(cfg, random_weights(cfg), TOKEN_BT, last_B=each(t))
    stats.append(seen)
  return np.asarray(logits_BTV), stats


def close(a, b, atol=2e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), a, b)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def row(stats, b):
  return jax.tree.map(lambda x_B: x_B[b], stats)


def fill(capacity, k, v):
  """A cache of nothing but k and v."""
  empty = kvcache.init(CFG, B, capacity, jnp.float32)
  return kvcache.Cache(
    k=tuple(jnp.full_like(x, k) for x in empty.k), v=tuple(jnp.full_like(x, v) for x in empty.v)
  )


# -- one pass, or piece by piece -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("sizes", "capacity", "tight"),
  [
    ([13], 13, False),
    ([13], 64, True),
    ([1] * 13, 16, False),
    ([6] + [1] * 7, 40, True),
    ([5, 5, 3], 13, True),
  ],
)
def test_pieces_equal_one_pass(sizes, capacity, tight):
  logits_BTV, stats = full()
  cache, start = kvcache.init(CFG, B, capacity, jnp.float32), 0
  for size in sizes:
    end = start + size
    window = min(capacity, 1 << (end - 1).bit_length()) if tight else None
    piece_BT, len_B, last_B = TOKEN_BT[:, start:end], each(start), each(size - 1)
    got_BTV, cache, seen = run(CFG, random_weights(), piece_BT, cache, len_B, last_B, window=window)
    close(got_BTV, logits_BTV[:, start:end])
    close(seen, stats[end - 1])
    start = end
  assert cache.capacity == capacity


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("before", [0, 3, 4, 5, 11])
def test_blocks_are_one_pass(monkeypatch, before, dtype):
  """A CPU's blocks of four slots, from the first to the last; one row is shorter, and dead slots hold anything."""
  monkeypatch.setattr(attention, "BLOCK", 4)
  rng, S, queries = np.random.default_rng(0), 16, 5
  q_BTNH, k_BSKH, v_BSKH = (
    jnp.asarray(rng.standard_normal((2, *shape, 6)) * 3, jnp.float32)
    for shape in ((queries, 4), (S, 2), (S, 2))
  )
  own_B = jnp.asarray([before, before // 2])
  live_BTS = kvcache.readable(own_B[:, None] + jnp.arange(queries), S)
  dead_BSKH = ~live_BTS[:, -1, :, None, None]
  k_BSKH = jnp.where(dead_BSKH & (dtype == "float32"), jnp.nan, k_BSKH)
  v_BSKH = jnp.where(dead_BSKH, 1e30, v_BSKH)
  store = quant.cached if dtype == "int8" else lambda x: x
  k, v = (jax.tree.map(lambda x: x.swapaxes(1, 2), store(x)) for x in (k_BSKH, v_BSKH))
  last_BQ = jnp.asarray([[4, 1], [2, 0]])
  args = q_BTNH, [(k, v, live_BTS)], last_BQ
  close(attention.attend(*args, jnp.max(own_B)), attention.attend(*args))


@pytest.mark.parametrize("sizes", [[4, 4, 4, 1], [3, 6, 4], [8, 5], [13]])
def test_pieces_read_in_blocks_equal_one_pass(monkeypatch, sizes):
  """Of pieces that end on the edges of blocks and beside them."""
  monkeypatch.setattr(attention, "BLOCK", 4)
  cache, start = fill(20, np.nan, 1e30), 0
  for size in sizes:
    piece_BT, lens = TOKEN_BT[:, start : start + size], (each(start), each(size - 1))
    got_BTV, cache, seen = run(CFG, random_weights(), piece_BT, cache, *lens)
    close(got_BTV, full()[0][:, start : start + size])
    close(seen, full()[1][start + size - 1])
    start += size


def test_rows_of_other_lengths_and_their_padding_change_nothing():
  logits_BTV, stats = full()
  len_B = np.array([4, 1, 7], np.int32)
  fed_BT = np.where(np.arange(9) < len_B[:, None], TOKEN_BT[:, :9], 36)
  at_B, cache, before_B = len_B - 1, kvcache.init(CFG, B, 16, jnp.float32), each(0)
  for _ in range(T - max(len_B)):
    got_BTV, cache, seen = run(CFG, random_weights(), fed_BT, cache, before_B, at_B)
    for b, n in enumerate(len_B):
      close(got_BTV[b, at_B[b]], logits_BTV[b, n - 1])
      close(row(seen, b), row(stats[n - 1], b))
    fed_BT = np.take_along_axis(TOKEN_BT, len_B[:, None], 1)
    at_B, before_B, len_B = each(0), len_B, len_B + 1


@pytest.mark.parametrize(
  ("steps", "cfg"), [(1, CFG), (3, CFG), (5, CFG), (3, BIASED)], ids=["1", "3", "5", "biased"]
)
def test_steps_beside_the_cache_equal_one_pass(steps, cfg):
  """Rows of other lengths decode in dispatches that only read the cache, then write it once."""
  logits_BTV, stats = full(cfg)
  len_B = np.array([4, 1, 7], np.int32)
  cache = run(cfg, random_weights(cfg), TOKEN_BT[:, :9], fill(16, 0.0, 0.0), each(0), each(0))[1]
  # What was prefilled beyond a row's length is not read.
  dead_BKSH = (np.arange(16) >= len_B[:, None])[:, None, :, None]
  cache = kvcache.Cache(
    tuple(jnp.where(dead_BKSH, np.nan, k) for k in cache.k),
    tuple(jnp.where(dead_BKSH, 1e30, v) for v in cache.v),
  )
  while max(len_B) + steps <= T:
    recent = kvcache.Recent(kvcache.init(CFG, B, steps, jnp.float32), jnp.int32(0))
    for n in range(steps):
      fed_B1 = np.take_along_axis(TOKEN_BT, len_B[:, None] + n, 1)
      window = int(max(len_B))
      got_BTV, recent, seen = run(
        cfg, random_weights(cfg), fed_B1, cache, len_B, each(0), recent, window=window
      )
      for b in range(B):
        close(got_BTV[b, 0], logits_BTV[b, len_B[b] + n])
        close(row(seen, b), row(stats[len_B[b] + n], b))
    assert int(recent.n) == steps
    cache = kvcache.merge(cache, recent, jnp.asarray(len_B), each(steps))
    len_B = len_B + steps


def test_padding_beyond_the_capacity_is_dropped():
  logits_BTV, _ = full()
  first = run(CFG, random_weights(), TOKEN_BT[:, :10], fill(T, 0.0, 0.0), each(0), each(0))[1]
  padded_BT = np.pad(TOKEN_BT[:, 10:], ((0, 0), (0, 5)))
  got_BTV, after, _ = run(CFG, random_weights(), padded_BT, first, each(10), each(0))
  close(got_BTV[:, :3], logits_BTV[:, 10:])
  same([x[:, :, :10] for x in (*after.k, *after.v)], [x[:, :, :10] for x in (*first.k, *first.v)])


def test_a_row_does_not_see_its_neighbours():
  logits_BTV, stats = full()
  for b in range(B):
    got_BTV, _, seen = run(CFG, random_weights(), TOKEN_BT[b : b + 1], last_B=each(T - 1)[:1])
    close(got_BTV[0], logits_BTV[b])
    close(row(seen, 0), row(stats[-1], b))


# -- what lies in slots that were not written ----------------------------------------------------


@pytest.mark.parametrize(
  ("k", "v"),
  [(np.nan, 0.0), (np.inf, 1e30), (-np.inf, -1e30), (1e30, 1e30), (-1e30, 1e30), (3e38, -3e38)],
)
def test_unwritten_slots_may_hold_anything(k, v):
  def two_steps(cache):
    first = run(CFG, random_weights(), TOKEN_BT[:, :6], cache, each(0), each(5))
    second = run(CFG, random_weights(), TOKEN_BT[:, 6:7], first[1], each(6), each(0))
    return first[0], first[2], second[0], second[2]

  same(two_steps(fill(16, k, v)), two_steps(fill(16, 0.0, 0.0)))


def test_slots_of_a_former_longer_request_change_nothing():
  empty = fill(16, 0.0, 0.0)
  stale = run(CFG, random_weights(), TOKEN_BT[:, ::-1], empty, each(0), each(0))[1]
  was, now = (
    run(CFG, random_weights(), TOKEN_BT[:, :6], cache, each(0), each(5)) for cache in (empty, stale)
  )
  same((was[0], was[2]), (now[0], now[2]))


# -- a float64 forward from the formulas ---------------------------------------------------------


def slow_frequencies(r, head_dim):
  """Radians per token; of llama3 by its three bands of wavelengths, of yarn by channels."""

  def channel(turns):
    """Where a channel pair turns so often in the original context."""
    return head_dim / 2 * np.log(r.original_max_position / (2 * np.pi * turns)) / np.log(r.theta)

  out = []
  for i in range(head_dim // 2):
    freq = 1 / r.theta ** (2 * i / head_dim)
    wavelength = 2 * np.pi / freq
    if r.kind == "yarn":
      first, last = channel(r.beta_fast), channel(r.beta_slow)
      if r.truncate:
        first, last = np.floor(first), np.ceil(last)
      first, last = max(first, 0), min(last, head_dim - 1)
      divided = np.clip((i - first) / (last - first), 0, 1) if last > first else float(i > first)
      out.append(divided * freq / r.factor + (1 - divided) * freq)
    elif r.kind == "linear":
      out.append(freq / r.factor)
    elif (
      r.kind in ("default", "dynamic") or wavelength < r.original_max_position / r.high_freq_factor
    ):
      out.append(freq)
    elif wavelength > r.original_max_position / r.low_freq_factor:
      out.append(freq / r.factor)
    else:
      smooth = r.original_max_position / wavelength - r.low_freq_factor
      smooth /= r.high_freq_factor - r.low_freq_factor
      out.append((1 - smooth) * freq / r.factor + smooth * freq)
  return np.array(out)


def slow_forward(cfg, params, token_T):
  """Logits (T, V) and, for each layer and query, the scores (N, t + 1) of what it may see."""
  w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  freq, half = slow_frequencies(cfg.rope, cfg.head_dim), cfg.head_dim // 2
  # A model without biases has biases of zero.
  zero = {field: np.zeros(weights.shape(cfg, field)) for field in weights.BIASES}

  def norm(x, scale):
    return x / np.sqrt((x * x).mean() + cfg.norm_eps) * scale

  def turn(x, t):
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * freq) * cfg.rope.attention_factor
    return np.concatenate([z.real, z.imag])

  x_T = [w.embed_VD[token] for token in token_T]
  scores = []
  for layer in w.layers:
    layer = layer.replace(
      **{field: x for field, x in zero.items() if getattr(layer, field) is None}
    )
    h_T = [norm(x, layer.attn_norm_D) for x in x_T]
    seen = [np.zeros((cfg.heads, t + 1)) for t in range(len(x_T))]
    for n in range(cfg.heads):
      H = cfg.head_dim
      at_q, kv = slice(n * H, (n + 1) * H), n // (cfg.heads // cfg.kv_heads)
      at_kv = slice(kv * H, (kv + 1) * H)
      k = [turn(h @ layer.wk_DJ[:, at_kv] + layer.bk_J[at_kv], t) for t, h in enumerate(h_T)]
      v = [h @ layer.wv_DJ[:, at_kv] + layer.bv_J[at_kv] for h in h_T]
      for t, h in enumerate(h_T):
        q = turn(h @ layer.wq_DQ[:, at_q] + layer.bq_Q[at_q], t)
        seen[t][n] = [q @ k[s] / np.sqrt(cfg.head_dim) for s in range(t + 1)]
        p = np.exp(log_softmax(seen[t][n]))
        out = sum(p[s] * v[s] for s in range(t + 1))
        x_T[t] = x_T[t] + out @ layer.wo_QD[at_q] + layer.bo_D / cfg.heads
    scores.append(seen)
    for t, x in enumerate(x_T):
      h = norm(x, layer.ffn_norm_D)
      gate, up = h @ layer.wgate_DF + layer.bgate_F, h @ layer.wup_DF + layer.bup_F
      x_T[t] = x + (gate / (1 + np.exp(-gate)) * up) @ layer.wdown_FD + layer.bdown_D
  head = w.embed_VD.T if w.head_DV is None else w.head_DV
  return np.stack([norm(x, w.norm_D) @ head for x in x_T]), scores


def slow_stats(score_NS):
  """The statistics of one layer's attention for one query, from their definitions."""
  N, keys = score_NS.shape
  p_NS = np.stack([np.exp(log_softmax(row)) for row in score_NS])
  ent_N, varent_N = np.array([ent_varent(p) for p in p_NS]).T
  apart = np.mean([0.5 * np.abs(p - p_NS.mean(0)).sum() for p in p_NS])
  return {
    "attn_ent": ent_N.mean(),
    "attn_ent_norm": ent_N.mean() / np.log(keys) if keys > 1 else 0.0,
    "attn_varent": varent_N.mean(),
    "attn_spread": ((ent_N - ent_N.mean()) ** 2).mean(),
    "head_dispersion": apart,
    "agreement": 1 - apart / (1 - 1 / N) if N > 1 else 1.0,
    "score_mag": np.abs(score_NS).mean(),
  }


@pytest.mark.parametrize(
  ("kind", "tied", "measured"),
  [("llama3", False, "all"), ("default", True, "last"), ("llama3", True, "last")],
)
def test_forward_agrees_with_float64(kind, tied, measured):
  cfg = dataclasses.replace(CFG, tied=tied, rope=dataclasses.replace(CFG.rope, kind=kind))
  params = random_weights(cfg)
  true_TV, scores = slow_forward(cfg, params, TOKEN_BT[0])
  assert 1 < true_TV.std() < 10
  for last in (0, 1, T - 1):
    logits_BTV, _, seen = run(cfg, params, TOKEN_BT, last_B=each(last), attn_stats=measured)
    np.testing.assert_allclose(logits_BTV[0], true_TV, rtol=0, atol=1e-4)
    rows = [slow_stats(layer[last]) for layer in scores[0 if measured == "all" else -1 :]]
    for name in rows[0]:
      true = np.mean([row[name] for row in rows])
      np.testing.assert_allclose(getattr(seen, name)[0], true, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("names", [("attention_bias",), ("mlp_bias",)])
def test_biases_and_yarn_agree_with_float64(names):
  rope = config.RopeConfig(100.0, "yarn", 4.0, original_max_position=20, attention_factor=1.2)
  cfg = dataclasses.replace(CFG, rope=rope, **dict.fromkeys(names, True))
  logits_BTV = run(cfg, random_weights(cfg), TOKEN_BT)[0]
  true_TV = slow_forward(cfg, random_weights(cfg), TOKEN_BT[0])[0]
  np.testing.assert_allclose(logits_BTV[0], true_TV, rtol=0, atol=1e-4)


def test_random_biases_are_not_zero_and_change_no_matrix():
  plain, biased = (weights.random(cfg, jnp.float32) for cfg in (CFG, BIASED))
  none = dict.fromkeys(weights.BIASES)
  same(plain.layers, tuple(layer.replace(**none) for layer in biased.layers))
  sizes = {field: np.asarray(getattr(biased.layers[0], field)).std() for field in none}
  assert min(sizes.values()) > 0.03
  assert len(set(sizes.values())) == 7


def test_nothing_is_measured_when_off():
  off = functools.partial(run, CFG, attn_stats="off")
  assert jax.eval_shape(off, random_weights(), TOKEN_BT)[2] is None


def test_bfloat16_is_near():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_weights())
  near_BTV, cache, seen = run(CFG, params, TOKEN_BT, last_B=each(T - 1))
  logits_BTV, stats = full()
  assert near_BTV.dtype == jnp.float32
  assert cache.k[0].dtype == cache.v[0].dtype == jnp.bfloat16
  error_BTV = near_BTV - logits_BTV
  assert 1e-4 < error_BTV.std() < 0.03 * logits_BTV.std()
  assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype(jnp.float32)}
  close(seen, stats[-1], atol=0.05)


# -- rope ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
@pytest.mark.parametrize(
  "r",
  [
    config.RopeConfig(),
    config.RopeConfig(theta=10_000.0),
    config.RopeConfig(kind="llama3", factor=8.0),
    config.RopeConfig(kind="llama3", factor=32.0),
    config.RopeConfig(kind="linear", factor=3.0),
    config.RopeConfig(kind="dynamic", factor=3.0),
    config.RopeConfig(1e4, kind="yarn", factor=16.0, original_max_position=4096),
    config.RopeConfig(kind="yarn", factor=5.0, beta_fast=9.0, beta_slow=0.5, truncate=False),
    config.RopeConfig(
      kind="llama3",
      factor=4.0,
      low_freq_factor=2.0,
      high_freq_factor=3.0,
      original_max_position=512,
    ),
  ],
)
def test_inverse_frequencies(r, head_dim):
  got = rope.inverse_frequencies(r, head_dim)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, slow_frequencies(r, head_dim), rtol=2e-6)


# -- spread and attention statistics -------------------------------------------------------------


def spike(p, rest):
  return np.log(np.concatenate([[p], np.full(rest, (1 - p) / rest)]))


@pytest.mark.parametrize(
  ("score", "ent", "varent", "atol"),
  [
    *((np.full(k, 3.0), np.log(k), 0.0, 1e-6) for k in (1, 2, 4, 8, 32, 128_256)),
    ([0.0, -np.inf, -np.inf], 0.0, 0.0, 0.0),  # one-hot
    ([0.0, -1e30, np.finfo(np.float32).min], 0.0, 0.0, 0.0),  # finite masks
    ([-np.inf, 5.0, -np.inf, 5.0, 5.0], np.log(3), 0.0, 1e-6),  # dead entries count for nothing
    ([-np.inf] * 4, 0.0, 0.0, 0.0),
    (-np.log(2) * np.arange(1, 60), 1.386, 0.961, 5e-4),  # halves: 2 ln 2 and 2 (ln 2)^2
    (spike(0.9, 128_255), 1.501, 17.54, 5e-3),
  ],
)
def test_spread_in_closed_form(score, ent, varent, atol):
  for shift in (0.0, 100.0):
    got = jax.jit(metrics.spread)(jnp.asarray(score, jnp.float32) + jnp.float32(shift))
    np.testing.assert_allclose([got.ent, got.varent], [ent, varent], rtol=0, atol=atol)


def test_spread_of_a_dead_row_has_no_normaliser():
  assert metrics.spread(jnp.full((2, 3), -jnp.inf)).lse.tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("size", [2, 100, 128_256])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
def test_spread_agrees_with_float64(size, scale):
  rng = np.random.default_rng(size)
  score = (scale * rng.standard_normal((4, size)) + 20).astype(np.float32)
  score[1:, 1::3] = -np.inf
  got = jax.jit(metrics.spread)(score)
  for i, row in enumerate(score):
    logp = log_softmax(row)
    ent, varent = ent_varent(np.exp(logp))
    np.testing.assert_allclose(got.lse[i], row[0] - logp[0], rtol=1e-6)
    np.testing.assert_allclose([got.ent[i], got.varent[i]], [ent, varent], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("heads", [1, 2, 7])
def test_attn_stats_agree_with_float64(heads):
  rng = np.random.default_rng(heads)
  keys_B = [1, 2, 9, 16]
  score_BNS = (2 * rng.standard_normal((4, heads, 16))).astype(np.float32)
  masked_BNS = np.where(np.arange(16) < np.array(keys_B)[:, None, None], score_BNS, -np.inf)
  got = jax.jit(metrics.attn_stats)(masked_BNS.astype(np.float32))
  for b, keys in enumerate(keys_B):
    for name, true in slow_stats(score_BNS[b, :, :keys].astype(np.float64)).items():
      np.testing.assert_allclose(getattr(got, name)[b], true, rtol=0, atol=5e-6, err_msg=name)


def test_heads_that_look_alike_agree_and_heads_apart_do_not():
  alike_BNS = np.zeros((1, 4, 8), np.float32)
  apart_BNS = np.where(np.eye(4, 8, dtype=bool), 0, -1e4).astype(np.float32)[None]
  alike, apart = (jax.jit(metrics.attn_stats)(x) for x in (alike_BNS, apart_BNS))
  np.testing.assert_allclose([alike.agreement[0], apart.agreement[0]], [1, 0], atol=1e-6)
  np.testing.assert_allclose(
    [alike.head_dispersion[0], apart.head_dispersion[0]], [0, 0.75], atol=1e-6
  )
