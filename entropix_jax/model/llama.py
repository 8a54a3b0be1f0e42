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
from entropix_jax.model import kernels, kvcache, linear, quant, rope, sharding
from entropix_jax.model.attention import attend
from entropix_jax.model.weights import Layer, Weights


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean x^2 + eps) * scale, in float32, returned in x's dtype (arXiv:1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


def feed_forward(x_BTD: jax.Array, layer: Layer) -> jax.Array:
  """The gated unit: (silu(x gate) * (x up)) down (arXiv:2002.05202)."""
  gate_BTF = linear.dot(x_BTD, layer.wgate_DF, bias=layer.bgate_F)
  up_BTF = linear.dot(x_BTD, layer.wup_DF, bias=layer.bup_F)
  return linear.dot(jax.nn.silu(gate_BTF) * up_BTF, layer.wdown_FD, bias=layer.bdown_D)


def measured_layers(cfg: ModelConfig, attn_stats: str) -> frozenset[int]:
  """The layers whose attention is measured, for EngineConfig.attn_stats."""
  return frozenset({"off": (), "last": (cfg.layers - 1,), "all": range(cfg.layers)}[attn_stats])


def forward(
  cfg: ModelConfig,
  weights: Weights,
  token_BT: jax.Array,
  past: kvcache.Past | None = None,
  *,
  last_B: jax.Array | None = None,
  attn_stats: str = "off",
  mesh: jax.sharding.Mesh | None = None,
  own_kernels: bool = False,
) -> tuple[jax.Array, kvcache.Past, metrics.AttnStats | None]:
  """Feed T tokens to each row.

  Args:
    token_BT: int32 ids. Ids past a row's true length (padding) write slots that must not be read:
      the caller does not count them in `len_B` afterwards.
    past: what each row has seen already; None: the rows are empty.
    last_B: index in T of the query whose attention is measured (the last true token), or of several,
      (B, Q); the statistics then have that shape, too. None measures nothing.
    attn_stats: "off", "last" or "all" layers.
    mesh: the mesh over which the arrays are placed, made by `sharding.mesh`; None for a single device.
    own_kernels: let an NVIDIA GPU run the layers that are not measured with `kernels`, where T is one and
      the token goes to `past.recent`.

  Returns:
    x_BTD after the final norm, the past with these T tokens in its recent buffer or else in its cache
    (`len_B` as it was), and the attention statistics or None.
  """
  B, T = token_BT.shape
  past = past or kvcache.Past(jnp.zeros((B,), jnp.int32))
  lives = past.live(T)
  cos, sin = rope.angles(cfg.rope, cfg.head_dim, past.positions(T), split=mesh is not None)
  measured = frozenset() if last_B is None else measured_layers(cfg, attn_stats)
  written, stats = [], []

  # A prompt that is fed alone has no rows to split over `data`, so its tokens are split instead.
  # Only keys and values are exchanged.
  alone = B == 1 and mesh is not None and T % mesh.shape["data"] == 0

  def place(x, letters):
    letters = letters if B > 1 else letters.replace("B", "_")
    return sharding.constrain(mesh, x, letters if alone else letters.replace("T", "_"))

  def heads(x):
    return x.reshape(B, T, -1, cfg.head_dim)

  def block(x_BTD, layer, seen, last_B=None):
    """One layer: x_BTD, the keys and values written, the scores of query `last_B` if it is given."""
    with jax.named_scope("attention"):
      h_BTD = rms_norm(x_BTD, layer.attn_norm_D, cfg.norm_eps)
      q_BTNH = heads(linear.dot(h_BTD, layer.wq_DQ, bias=layer.bq_Q))
      k_BTKH = heads(linear.dot(h_BTD, layer.wk_DJ, bias=layer.bk_J))
      v_BTKH = heads(linear.dot(h_BTD, layer.wv_DJ, bias=layer.bv_J))
      q_BTNH = place(rope.rotate(q_BTNH, cos, sin), "BTNH")
      # Gather K and V of all tokens on every chip; the cache's sharding is already known.
      k_BTKH, v_BTKH = (place(x, "B_KH") for x in (rope.rotate(k_BTKH, cos, sin), v_BTKH))
      kv, pieces = seen.feed((k_BTKH, v_BTKH))
      pieces = [(*pair, live_BTS) for pair, live_BTS in zip(pieces, lives, strict=True)]
      out_BTNH, score_BNS = attend(q_BTNH, pieces, last_B, past.before)
      out_BTD = linear.dot(out_BTNH.reshape(B, T, -1), layer.wo_QD, bias=layer.bo_D)
      x_BTD = x_BTD + place(out_BTD, "BTD")
    with jax.named_scope("feed_forward"):
      x_BTD = x_BTD + feed_forward(rms_norm(x_BTD, layer.ffn_norm_D, cfg.norm_eps), layer)
    return x_BTD, kv, score_BNS

  def unmeasured(*args):
    return block(*args)[:2]

  step = T == 1 and past.recent is not None and past.prefix is None
  if own_kernels and step and kernels.suit(cfg, mesh, B) and not linear.any_transposed(weights):
    own = functools.partial(kernels.decode, cfg, mesh, cos, sin)
    unmeasured = functools.partial(kernels.choose, own, unmeasured)

  x_BTD = quant.rows_of(weights.embed_VD, token_BT, weights.norm_D.dtype)
  for i, layer in enumerate(weights.layers):
    with jax.named_scope(f"layer_{i}"):
      x_BTD = place(x_BTD, "BTD")
      if i in measured:
        x_BTD, kv, score_BNS = block(x_BTD, layer, past.layer(i), last_B)
        score_BNS = place(score_BNS, "BNS" if score_BNS.ndim == 3 else "B_NS")
        stats.append(sharding.per_row(mesh, metrics.attn_stats, score_BNS))
      else:
        x_BTD, kv = unmeasured(x_BTD, layer, past.layer(i))
      written.append(kv)

  x_BTD = rms_norm(place(x_BTD, "BTD"), weights.norm_D, cfg.norm_eps)
  past = past.fed(kvcache.Cache(*zip(*written, strict=True)), T)
  return x_BTD, past, metrics.mean_stats(stats) if stats else None


@jax.named_scope("head")
def unembed(weights: Weights, x: jax.Array) -> jax.Array:
  """Float32 logits (..., V) of hidden rows (..., D)."""
  if weights.head_DV is None:
    return linear.dot(x, weights.embed_VD, jnp.float32, transposed=True)
  return linear.dot(x, weights.head_DV, jnp.float32)
