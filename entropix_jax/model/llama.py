"""The forward pass of a Llama decoder, as pure functions of weights, cache and tokens.

Why: one function serves prefill, decode, scoring, training and speculative verification; they differ
only in T, in whether a cache comes in, and in how many of its slots are looked at.
See: WORKSPACE.md, "the life of a token".
"""

import functools

import jax
import jax.numpy as jnp

from entropix_jax import metrics
from entropix_jax.config import ModelConfig
from entropix_jax.model import kernels, kvcache, products, quant, rope, sharding
from entropix_jax.model.attention import attend
from entropix_jax.model.weights import Layer, Weights


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean x^2 + eps) * scale, in float32, returned in x's dtype (arXiv:1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


def feed_forward(x_BTD: jax.Array, layer: Layer) -> jax.Array:
  """The gated unit: (silu(x gate) * (x up)) down (arXiv:2002.05202)."""
  gate_BTF = products.product(x_BTD, layer.wgate_DF)
  up_BTF = products.product(x_BTD, layer.wup_DF)
  return products.product(jax.nn.silu(gate_BTF) * up_BTF, layer.wdown_FD)


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
  recent: kvcache.Recent | None = None,
  common: kvcache.Common | None = None,
  mesh: jax.sharding.Mesh | None = None,
  own_kernels: bool = False,
) -> tuple[jax.Array, kvcache.Cache | kvcache.Recent, metrics.AttnStats | None]:
  """Feed T tokens to each row.

  Args:
    token_BT: int32 ids. Ids past a row's true length (padding) write slots that nobody may read:
      the caller does not count them in `len_B` afterwards.
    cache, len_B: what each row has seen already; without them the rows start empty.
    recent: tokens fed since, whose number counts as length, too; then the cache is only read.
    common: what rows have in common of what they have seen: the first of the `len_B` tokens, which are not
      in `cache`.
    window: how many slots of the cache attention reads (static); all of them when None. The caller keeps
      `window >= len_B + T` (with `recent`, `len_B`; less what is common) for every row whose answer matters.
    last_B: index in T of the query whose attention is measured (the last true token), or of several,
      (B, Q), and so are the statistics then.
    attn_stats: "off", "last" or "all" layers.
    mesh: where the arrays lie, one of `sharding.mesh`; None for a single device.
    own_kernels: let an NVIDIA GPU run layers that nobody measures by `kernels`, where T is one and the
      token goes to `recent`.

  Returns:
    x_BTD after the final norm, the cache (`recent` where it came in) with T more slots written (S = T
    when none came in), and the attention statistics or None.
  """
  B, T = token_BT.shape
  if len_B is None:
    len_B = jnp.zeros((B,), jnp.int32)
  S = T if cache is None else (window or cache.capacity)
  own_B = len_B if common is None else len_B - common.held_B
  lives = kvcache.live(recent, own_B, T, S)
  if common is not None:
    lives.append(kvcache.common_live(common, T))
  n = jnp.int32(0) if recent is None else recent.n
  pos_BT = len_B[:, None] + n + jnp.arange(T, dtype=jnp.int32)
  cos, sin = rope.angles(cfg.rope, cfg.head_dim, pos_BT)
  measured = frozenset() if last_B is None else measured_layers(cfg, attn_stats)
  held, stats = [], []

  # Each part of the mesh that holds rows takes some of a lone row's tokens; only keys and values meet.
  alone = B == 1 and mesh is not None and T % mesh.shape["data"] == 0

  def place(x, letters):
    letters = letters if B > 1 else letters.replace("B", "_")
    return sharding.constrain(mesh, x, letters if alone else letters.replace("T", "_"))

  def heads(x):
    return x.reshape(B, T, -1, cfg.head_dim)

  def block(x_BTD, layer, old, beside, last_B=None, first=None):
    """One layer: x_BTD, the keys and values it holds now, the scores of query `last_B` if there is one."""
    h_BTD = rms_norm(x_BTD, layer.attn_norm_D, cfg.norm_eps)
    q_BTNH = heads(products.product(h_BTD, layer.wq_DQ))
    k_BTKH = heads(products.product(h_BTD, layer.wk_DJ))
    v_BTKH = heads(products.product(h_BTD, layer.wv_DJ))
    q_BTNH = place(rope.rotate(q_BTNH, cos, sin), "BTNH")
    # All tokens' on every chip, and nothing but they: where they go it knows.
    k_BTKH, v_BTKH = (place(x, "B_KH") for x in (rope.rotate(k_BTKH, cos, sin), v_BTKH))
    now, pieces = kvcache.write(old, beside, (k_BTKH, v_BTKH), own_B, n, S)
    pieces = pieces if first is None else [*pieces, first]
    pieces = [(*kv, live_BTS) for kv, live_BTS in zip(pieces, lives, strict=True)]
    out_BTNH, score_BNS = attend(q_BTNH, pieces, last_B)
    x_BTD = x_BTD + place(products.product(out_BTNH.reshape(B, T, -1), layer.wo_QD), "BTD")
    x_BTD = x_BTD + feed_forward(rms_norm(x_BTD, layer.ffn_norm_D, cfg.norm_eps), layer)
    return x_BTD, now, score_BNS

  def unmeasured(*args, **kwargs):
    return block(*args, **kwargs)[:2]

  step = T == 1 and recent is not None and common is None
  if own_kernels and step and kernels.suit(cfg, mesh, B) and not products.flipped(weights):
    own = functools.partial(kernels.decode, cfg, mesh, S, cos, sin, len_B, n)
    unmeasured = functools.partial(kernels.choose, own, unmeasured)

  x_BTD = quant.rows_of(weights.embed_VD, token_BT, weights.norm_D.dtype)
  for i, layer in enumerate(weights.layers):
    x_BTD = place(x_BTD, "BTD")
    old = None if cache is None else (cache.k[i], cache.v[i])
    beside = None if recent is None else (recent.held.k[i], recent.held.v[i])
    first = {} if common is None else {"first": (common.cache.k[i], common.cache.v[i])}
    if i in measured:
      x_BTD, now, score_BNS = block(x_BTD, layer, old, beside, last_B, **first)
      score_BNS = place(score_BNS, "BNS" if score_BNS.ndim == 3 else "B_NS")
      stats.append(sharding.per_row(mesh, metrics.attn_stats, score_BNS))
    else:
      x_BTD, now = unmeasured(x_BTD, layer, old, beside, **first)
    held.append(now)

  x_BTD = rms_norm(place(x_BTD, "BTD"), weights.norm_D, cfg.norm_eps)
  now = kvcache.Cache(*zip(*held, strict=True))
  if recent is not None:
    now = kvcache.Recent(now, n + T)
  return x_BTD, now, metrics.mean_stats(stats) if stats else None


def unembed(weights: Weights, x: jax.Array) -> jax.Array:
  """Float32 logits (..., V) of hidden rows (..., D)."""
  if weights.head_DV is None:
    return products.product(x, weights.embed_VD, jnp.float32, transposed=True)
  return products.product(x, weights.head_DV, jnp.float32)
