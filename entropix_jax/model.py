"""The forward pass of a Llama decoder, as pure functions of weights, cache and tokens.

Why: one function serves prefill, decode, scoring, training and speculative verification; they differ
only in T, in whether a cache comes in, and in how many of its slots are looked at.
See: WORKSPACE.md, "the life of a token".
"""

import jax
import jax.numpy as jnp

from entropix_jax import kvcache, metrics, quant, rope, sharding
from entropix_jax.attention import attend
from entropix_jax.config import ModelConfig
from entropix_jax.weights import Layer, Weights


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean x^2 + eps) * scale, in float32, returned in x's dtype (arXiv:1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


def feed_forward(x_BTD: jax.Array, layer: Layer) -> jax.Array:
  """The gated unit: (silu(x gate) * (x up)) down (arXiv:2002.05202)."""
  gate_BTF = quant.product(x_BTD, layer.wgate_DF)
  up_BTF = quant.product(x_BTD, layer.wup_DF)
  return quant.product(jax.nn.silu(gate_BTF) * up_BTF, layer.wdown_FD)


def measured_layers(cfg: ModelConfig, attn_stats: str) -> frozenset[int]:
  """The layers whose attention is measured, for EngineConfig.attn_stats."""
  return frozenset({"off": (), "last": (cfg.layers - 1,), "all": range(cfg.layers)}[attn_stats])


def forward(
  cfg: ModelConfig,
  weights: Weights,
  token_BT: jax.Array,
  *,
  cache: kvcache.Cache | None = None,
  len_B: jax.Array | None = None,
  window: int | None = None,
  last_B: jax.Array | None = None,
  attn_stats: str = "off",
  recent: kvcache.Cache | None = None,
  n: jax.Array | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, kvcache.Cache, metrics.AttnStats | None]:
  """Feed T tokens to each row.

  Args:
    token_BT: int32 ids. Ids past a row's true length (padding) write slots that nobody may read:
      the caller does not count them in `len_B` afterwards.
    cache, len_B: what each row has seen already; without them the rows start empty.
    window: how many slots attention reads (static); all of them when None. The caller keeps
      `window >= len_B + T` for every row whose answer matters.
    last_B: index in T of the query whose attention is measured (the last true token).
    attn_stats: "off", "last" or "all" layers.
    mesh: where the arrays lie, one of `sharding.mesh`; None for a single device.

  Returns:
    x_BTD after the final norm, the cache with T more slots written (S = T when none came in), and
    the attention statistics or None.
  """
  B, T = token_BT.shape
  if len_B is None:
    len_B = jnp.zeros((B,), jnp.int32)
  here_T = jnp.arange(T, dtype=jnp.int32) + (0 if n is None else n)
  pos_BT = len_B[:, None] + here_T
  S = T if cache is None else (window or cache.capacity)
  if recent is None:
    live_BTS = kvcache.readable(pos_BT, S)
  else:
    live_BTS = kvcache.readable(jnp.broadcast_to(len_B[:, None] - 1, (B, T)), S)
    recent_BTN = kvcache.readable(jnp.broadcast_to(here_T, (B, T)), recent.capacity)
  cos, sin = rope.angles(cfg.rope, cfg.head_dim, pos_BT)
  measured = measured_layers(cfg, attn_stats)
  ks, vs, stats = [], [], []

  def place(x, letters):
    return sharding.constrain(mesh, x, letters if B > 1 else letters.replace("B", "_"))

  def heads(x):
    return x.reshape(B, T, -1, cfg.head_dim)

  x_BTD = quant.rows_of(weights.embed_VD, token_BT, weights.norm_D.dtype)
  for i, layer in enumerate(weights.layers):
    x_BTD = place(x_BTD, "BTD")
    h_BTD = rms_norm(x_BTD, layer.attn_norm_D, cfg.norm_eps)
    q_BTNH = heads(quant.product(h_BTD, layer.wq_DQ))
    k_BTKH = heads(quant.product(h_BTD, layer.wk_DJ))
    v_BTKH = heads(quant.product(h_BTD, layer.wv_DJ))
    q_BTNH = place(rope.rotate(q_BTNH, cos, sin), "BTNH")
    k_BTKH = rope.rotate(k_BTKH, cos, sin)
    if recent is not None:
      k_BKNH = kvcache.extend(recent.k[i], k_BTKH, n)
      v_BKNH = kvcache.extend(recent.v[i], v_BTKH, n)
      ks.append(k_BKNH)
      vs.append(v_BKNH)
      k_BKSH, v_BKSH = kvcache.window(cache.k[i], S), kvcache.window(cache.v[i], S)
      pieces = [(k_BKSH, v_BKSH, live_BTS), (k_BKNH, v_BKNH, recent_BTN)]
    else:
      if cache is None:
        k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
      else:
        k_BKSH = kvcache.append(cache.k[i], k_BTKH, len_B)
        v_BKSH = kvcache.append(cache.v[i], v_BTKH, len_B)
      ks.append(k_BKSH)
      vs.append(v_BKSH)
      pieces = [(kvcache.window(k_BKSH, S), kvcache.window(v_BKSH, S), live_BTS)]
    out_BTNH, score_BNS = attend(q_BTNH, pieces, last_B if i in measured else None)
    if score_BNS is not None:
      stats.append(sharding.per_row(mesh, metrics.attn_stats, place(score_BNS, "BNS")))
    out_BTQ = out_BTNH.reshape(B, T, -1)
    x_BTD = x_BTD + place(quant.product(out_BTQ, layer.wo_QD), "BTD")
    x_BTD = x_BTD + feed_forward(rms_norm(x_BTD, layer.ffn_norm_D, cfg.norm_eps), layer)

  x_BTD = rms_norm(place(x_BTD, "BTD"), weights.norm_D, cfg.norm_eps)
  return x_BTD, kvcache.Cache(tuple(ks), tuple(vs)), metrics.mean_stats(stats) if stats else None


def unembed(weights: Weights, x: jax.Array) -> jax.Array:
  """Float32 logits (..., V) of hidden rows (..., D)."""
  if weights.head_DV is None:
    return quant.product(x, weights.embed_VD, jnp.float32, transposed=True)
  return quant.product(x, weights.head_DV, jnp.float32)
