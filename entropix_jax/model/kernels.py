"""One decoder layer for one token per row, as six kernels of our own for NVIDIA GPUs.

Why: a decode step on a GPU waits for kernel launches, and XLA makes eighteen per layer. A product with
few rows streams a matrix from memory, so a norm before it, and a gate or a sum after it, are free:

  norm, q k v | rope, write, attend | combine | out, residual | norm, gate, up, silu | down, residual

Attention splits a row's live slots over many programs, since a GPU has more processors than rows times
heads. Each program keeps a maximum, a sum and a weighted value, and `combine` merges these.
Doubt: compiled for an H100 and run in an interpreter on a CPU; no GPU has run or timed it [n13].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from entropix_jax.config import ModelConfig
from entropix_jax.model import kvcache, quant, sharding
from entropix_jax.model.weights import LAYER_SOURCES, Layer, letters

try:
  from jax.experimental.pallas import triton
except ImportError:  # a future jax without this backend of Pallas [n13]: XLA runs everything
  triton = None

ROWS = 16  # R: rows of a matrix unit's tile; larger batches are left to XLA
INTERPRET = False  # for tests: run the kernels on any backend, in Pallas' interpreter
_PROCESSORS = 132  # of an H100
_MOST_PARTS = 64  # that a row's slots are split into
_BLOCK_BYTES = 16_384  # of keys or of values per read; two such pairs are in flight
_STEP_BYTES = 24_576  # of matrices and x per read; three are in flight, in under 100 kB


def wanted(setting: str, platform: str) -> bool:
  """Whether EngineConfig.kernels asks for them; "auto": on a GPU."""
  return setting == "on" or (setting == "auto" and platform not in ("cpu", "tpu"))


def suit(cfg: ModelConfig, mesh: jax.sharding.Mesh | None, rows: int) -> bool:
  """Whether the kernels support these shapes and this many rows, and no biases; XLA runs all others."""
  data, kv, rep = (1, 1, 1) if mesh is None else (mesh.shape[name] for name in sharding.NAMES)
  H, K = cfg.head_dim, cfg.kv_heads // kv
  sizes = [cfg.width, cfg.ffn // (kv * rep), cfg.heads * H // (kv * rep), K * H]
  # A chip has all queries of its key/value heads, or some of the queries of a single one.
  whole = rep == 1 or K == 1
  rows = -(-rows // data)
  few = rows <= ROWS and cfg.groups // rep <= ROWS
  fits = H in (32, 64, 128, 256) and all(n % 32 == 0 for n in sizes)
  plain = not (cfg.attention_bias or cfg.mlp_bias)
  return triton is not None and whole and few and fits and plain


def choose(own, xla, *args):
  """`own(*args)` in a program compiled for an NVIDIA GPU, else `xla(*args)`."""
  if INTERPRET:
    return own(*args)
  return jax.lax.platform_dependent(*args, cuda=own, default=xla)


def decode(
  cfg: ModelConfig,
  mesh: jax.sharding.Mesh | None,
  cos: jax.Array,
  sin: jax.Array,
  x_BTD: jax.Array,
  layer: Layer,
  seen: kvcache.Past,
):
  """(x_BTD, (k_BKSH, v_BKSH)): one layer's output, and its recent buffer with the token added; T is 1.

  Args:
    cos, sin: from `rope.angles`.
    seen: the layer's past, with a recent buffer and no shared prefix. The token is written to the recent
      buffer, in place where that buffer may be donated.
  """
  old, recent = seen.cache, seen.recent.kv
  S = seen.window or jax.tree.leaves(old)[0].shape[2]
  run = functools.partial(_layer, cfg.norm_eps, S, INTERPRET)
  args = (x_BTD[:, 0], layer, old, recent, seen.len_B, seen.n[None], cos[:, 0], sin[:, 0])
  if mesh is None:
    x_BD, now = run((), *args)
  else:
    B = "B" if x_BTD.shape[0] > 1 else "_"
    cache = jax.tree.map(lambda x: sharding.spec((B + "KSH")[: x.ndim]), old)
    row = sharding.spec(B)
    names = tuple(name for name in sharding.MODEL if mesh.shape[name] > 1)
    x_BD, now = jax.shard_map(
      functools.partial(run, names),
      mesh=mesh,
      in_specs=(row, _specs(layer), cache, cache, row, sharding.spec("_"), row, row),
      out_specs=(row, cache),
      check_vma=False,
    )(*args)
  return x_BD[:, None], now


def _specs(layer: Layer) -> Layer:
  """The PartitionSpec of each array of a layer, by the axis letters of weights.py."""

  def spec(field):
    leaf = getattr(layer, field)
    whole = sharding.spec(letters(field))
    if isinstance(leaf, quant.Int8):
      return quant.Int8(whole, sharding.spec(quant.outputs(field)))
    return whole

  return Layer(**{field: spec(field) for field in LAYER_SOURCES})


def _layer(eps, S, interpret, names, x_BD, layer: Layer, old, beside, len_B, n_1, cos, sin):
  """The layer on one chip, with its share of heads and ffn; sums are added over mesh axes `names`."""
  product = functools.partial(_product, eps=eps, interpret=interpret)

  def add(x_BD, y, w):
    if not names:
      return product(y, (w,), residual=x_BD)
    return x_BD + jax.lax.psum(product(y, (w,)), names)

  qkv = product(x_BD, (layer.wq_DQ, layer.wk_DJ, layer.wv_DJ), norm=layer.attn_norm_D)
  out_BQ, now = _attend(qkv, old, beside, len_B, n_1, cos, sin, S, interpret)
  x_BD = add(x_BD, out_BQ, layer.wo_QD)
  gate_up = (layer.wgate_DF, layer.wup_DF)
  y_BF = product(x_BD, gate_up, norm=layer.ffn_norm_D, gated=True)
  return add(x_BD, y_BF, layer.wdown_FD), now


def _power(n: int) -> int:
  """The largest power of two up to n."""
  return 1 << (n.bit_length() - 1)


# -- products with few rows ------------------------------------------------------------------------


def _dot(a, b):
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("eps", "gated", "interpret"))
def _product(x_BD, weights, *, norm=None, residual=None, gated=False, eps, interpret):
  """rms_norm(x) @ [w, ...] + residual, products side by side; if gated, silu(x @ w0) * (x @ w1)."""
  (B, D), dtype = x_BD.shape, x_BD.dtype
  sizes = [jax.tree.leaves(w)[0].shape[1] for w in weights]
  columns = sizes[0] if gated else sum(sizes)
  bytes_each = jax.tree.leaves(weights)[0].dtype.itemsize
  # The widest tile that leaves few processors idle; memory is read in pieces of at least 32 bytes.
  fits = [n for n in (64, 32, 16) if n * bytes_each >= 32 and not any(size % n for size in sizes)]
  tile = next((n for n in fits if columns // n >= _PROCESSORS * 3 // 4), min(fits))
  width = tile * bytes_each * (2 if gated else 1) + ROWS * dtype.itemsize
  depth = math.gcd(D, _power(_STEP_BYTES // width))
  body = functools.partial(
    _product_kernel, sizes=sizes, tile=tile, depth=depth, gated=gated, eps=eps
  )
  return pl.pallas_call(
    body,
    grid=(columns // tile,),
    out_shape=jax.ShapeDtypeStruct((B, columns), dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name="product",
  )(x_BD, weights, norm, residual)


def _product_kernel(x_BD, weights, norm_D, residual_BD, out_BX, *, sizes, tile, depth, gated, eps):
  """One program's tile of the columns of all products, or of both sides of a gate."""
  B, D = x_BD.shape
  place = pl.program_id(0)
  row_R1, tile_X = jnp.arange(ROWS)[:, None], jnp.arange(tile)

  def rows(x, at):
    """Columns `at` of ROWS rows of x; rows from B on are zeros."""
    mask = jnp.broadcast_to(row_R1 < B, (ROWS, at.shape[0]))
    return triton.load(x.at[row_R1, at[None]], mask=mask, other=0.0)

  def columns(ws, at):
    """Float32 x @ w for each w, over `tile` columns from `at`, with the norm's factor per row."""
    wide = pl.ds(at, tile)

    def step(i, carry):
      sums, squares = carry
      deep = pl.ds(i * depth, depth)
      x = rows(x_BD, i * depth + jnp.arange(depth))
      if norm_D is not None:
        x32 = x.astype(jnp.float32)
        squares += x32 * x32
        x = (x32 * norm_D[deep].astype(jnp.float32)[None]).astype(x.dtype)
      tiles = ((w.q if isinstance(w, quant.Int8) else w)[deep, wide] for w in ws)
      return [s + _dot(x, w.astype(x.dtype)) for s, w in zip(sums, tiles, strict=True)], squares

    zeros = [jnp.zeros((ROWS, tile), jnp.float32) for _ in ws]
    sums, squares = jax.lax.fori_loop(
      0, D // depth, step, (zeros, jnp.zeros((ROWS, depth), jnp.float32))
    )
    if norm_D is not None:
      factor = jax.lax.rsqrt(jnp.sum(squares, axis=1) / D + eps)[:, None]
      sums = [s * factor for s in sums]
    return [
      s * w.scale[wide][None] if isinstance(w, quant.Int8) else s
      for s, w in zip(sums, ws, strict=True)
    ]

  def put(y):
    at = place * tile + tile_X
    if residual_BD is not None:
      # As in XLA, the product is rounded before it is added.
      y = y.astype(out_BX.dtype) + rows(residual_BD, at)
    mask = jnp.broadcast_to(row_R1 < B, y.shape)
    triton.store(out_BX.at[row_R1, at[None]], y.astype(out_BX.dtype), mask=mask)

  if gated:
    gate, up = columns(weights, place * tile)
    put(gate * jax.nn.sigmoid(gate) * up)
    return
  first = 0
  for w, size in zip(weights, sizes, strict=True):
    mine = (place >= first) & (place < first + size // tile)

    @pl.when(mine)
    def _(w=w, first=first):
      put(*columns([w], (place - first) * tile))

    first += size // tile


# -- attention ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(7, 8))
def _attend(qkv_BX, old, beside, len_B, n_1, cos, sin, S, interpret):
  """Write each row's token beside the cache and attend over both; returns (out_BQ, written beside).

  Args:
    qkv_BX: queries, keys and values side by side, not yet rotated.
    S: slots of the cache that may be read.
  """
  B, K, _, H = jax.tree.leaves(old)[0].shape
  N = qkv_BX.shape[1] // H - 2 * K
  leaves = jax.tree.leaves(old)
  block = max(16, min(64, _power(_BLOCK_BYTES // (H * leaves[0].dtype.itemsize))))
  # Two programs per processor, if there is enough work.
  parts = _power(max(1, min(_MOST_PARTS, S // block, -(-2 * _PROCESSORS // (B * K)))))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  part = (shape((B, N, parts, H)), shape((B, N, parts)), shape((B, N, parts)))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), beside)
  *part, now = pl.pallas_call(
    functools.partial(_attend_kernel, N=N, K=K, S=S, block=block),
    grid=(parts, K, B),
    out_shape=(*part, like),
    input_output_aliases={5 + len(leaves) + i: 3 + i for i in range(len(leaves))},
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="attend",
  )(qkv_BX, cos, sin, len_B, n_1, old, beside)
  out_BQ = pl.pallas_call(
    _combine_kernel,
    grid=(N, B),
    out_shape=jax.ShapeDtypeStruct((B, N * H), qkv_BX.dtype),
    compiler_params=triton.CompilerParams(num_warps=4),
    interpret=interpret,
    name="combine",
  )(*part)
  return out_BQ, now


def _attend_kernel(
  qkv_BX, cos, sin, len_B, n_1, old, beside, out_BNPH, top_BNP, sum_BNP, now, *, N, K, S, block
):
  """One part of the slots of one row and key/value head; part 0 also does the slots beside the cache.

  No program reads the slot that is written, since the new token comes from the inputs, so the order in
  which programs run does not matter.
  """
  part, k, b = (pl.program_id(i) for i in range(3))
  parts, H = out_BNPH.shape[2:]
  G = N // K
  dtype = qkv_BX.dtype
  j = jnp.arange(H)
  swapped = jnp.where(j < H // 2, j + H // 2, j - H // 2)
  angle = jnp.where(j < H // 2, j, j - H // 2)
  cos_H = cos[b, angle]
  sin_H = jnp.where(j < H // 2, -sin[b, angle], sin[b, angle])

  def rotated(start, mask=None):
    """The heads that begin at columns `start`, rotated."""
    x, y = (
      triton.load(qkv_BX.at[b, start + i], mask=mask, other=None if mask is None else 0.0)
      for i in (j, swapped)
    )
    return (x.astype(jnp.float32) * cos_H + y.astype(jnp.float32) * sin_H).astype(dtype)

  g = jnp.arange(ROWS)
  real = g < G
  head_R1 = (k * G + g)[:, None]
  q_RH = rotated(head_R1 * H, jnp.broadcast_to(real[:, None], (ROWS, H)))
  k_H = rotated((N + k) * H)
  v_H = qkv_BX[b, (N + K + k) * H + j]
  # As in `kvcache._masking`: what is stored may be read where it is masked, and 0 times NaN is NaN.
  sound_H = jnp.abs(v_H.astype(jnp.float32)) < jnp.inf
  k_H, v_H = jnp.where(sound_H, k_H, jnp.nan), jnp.where(sound_H, v_H, 0)

  n = n_1[0]
  first = part == 0
  k_H, k_scale = _write(now[0], k_H, b, k, n, first)
  v_H, v_scale = _write(now[1], v_H, b, k, n, first)
  score_R = jnp.sum(q_RH.astype(jnp.float32) * k_H[None], axis=1) * (k_scale * H**-0.5)
  top_R = jnp.where(first, score_R, -jnp.inf)
  sum_R = jnp.where(first, jnp.ones((ROWS,), jnp.float32), 0.0)
  sum_RH = jnp.where(first, jnp.broadcast_to((v_H * v_scale)[None], (ROWS, H)), 0.0)

  def over(kv, size, end, i, carry):
    """Add a block of `size` slots, live before slot `end`, to the running softmax in `carry`."""
    top_R, sum_R, sum_RH = carry
    at = i * size
    live_S = at + jnp.arange(size) < end
    k_SH, k_scale_S = _read(kv[0], b, k, at, live_S, dtype)
    v_SH, v_scale_S = _read(kv[1], b, k, at, live_S, dtype)
    score_RS = _dot(q_RH, k_SH.T) * (H**-0.5)
    if k_scale_S is not None:
      score_RS *= k_scale_S[None]
    score_RS = jnp.where(live_S[None], score_RS, -jnp.inf)
    new_R = jnp.maximum(top_R, jnp.max(score_RS, axis=1))
    fade_R = jnp.exp(top_R - new_R)
    e_RS = jnp.exp(score_RS - new_R[:, None]).astype(dtype)
    # As in `attention.attend`, the sum is over the rounded weights, before the values' scales.
    sum_R = sum_R * fade_R + jnp.sum(e_RS.astype(jnp.float32), axis=1)
    if v_scale_S is not None:
      e_RS = (e_RS.astype(jnp.float32) * v_scale_S[None]).astype(dtype)
    return new_R, sum_R, sum_RH * fade_R[:, None] + _dot(e_RS, v_SH)

  carry = (top_R, sum_R, sum_RH)
  near = functools.partial(over, beside, 16, n)
  carry = jax.lax.fori_loop(0, jnp.where(first, pl.cdiv(n, 16), 0), near, carry)
  end = jnp.minimum(len_B[b], S)
  blocks = pl.cdiv(end, block)
  each = pl.cdiv(blocks, parts)
  last = jnp.minimum((part + 1) * each, blocks)
  far = functools.partial(over, old, block, end)
  top_R, sum_R, sum_RH = jax.lax.fori_loop(part * each, last, far, carry)
  at_R = (b, k * G + g, part)
  triton.store(top_BNP.at[at_R], top_R, mask=real)
  triton.store(sum_BNP.at[at_R], sum_R, mask=real)
  wide = jnp.broadcast_to(real[:, None], (ROWS, H))
  triton.store(out_BNPH.at[b, head_R1, part, j[None]], sum_RH, mask=wide)


def _write(out, x_H, b, k, slot, keep):
  """Store a token's key or value if `keep`; returns what a reader would find, float32, and its scale."""
  H = x_H.shape[0]
  j = jnp.arange(H)

  def put(ref, x):
    triton.store(ref.at[b, k, slot, j], x.astype(ref.dtype), mask=jnp.broadcast_to(keep, (H,)))

  x32 = x_H.astype(jnp.float32)
  if not isinstance(out, quant.Int8):
    put(out, x_H)
    return x_H.astype(out.dtype).astype(jnp.float32), jnp.float32(1.0)
  most = jnp.max(jnp.abs(x32))
  scale = jnp.where(most > 0, most / quant.LEVELS, 1.0)
  # Rounds to nearest like quant._scaled, except for ties: this backend cannot round half to even.
  q32 = jnp.floor(x32 / scale + 0.5)
  put(out.q, q32)
  triton.store(out.scale.at[b, k, slot], scale, mask=keep)
  return q32, scale


def _read(x, b, k, at, live_S, dtype):
  """(x_SH, scale_S or None) of a block of slots; a dead slot reads as exact zeros whatever it holds."""
  q = x.q if isinstance(x, quant.Int8) else x
  H = q.shape[3]
  slots = pl.ds(at, live_S.shape[0])
  live_SH = jnp.broadcast_to(live_S[:, None], (live_S.shape[0], H))
  zero = jnp.zeros((), q.dtype)
  x_SH = triton.load(q.at[b, k, slots, pl.ds(0, H)], mask=live_SH, other=zero).astype(dtype)
  if not isinstance(x, quant.Int8):
    return x_SH, None
  return x_SH, triton.load(x.scale.at[b, k, slots], mask=live_S, other=0.0)


def _combine_kernel(part_BNPH, top_BNP, sum_BNP, out_BQ):
  """Merge the parts of one row and head, each weighted by exp(its maximum - the largest)."""
  n, b = pl.program_id(0), pl.program_id(1)
  _, _, P, H = part_BNPH.shape
  p, j = jnp.arange(P), jnp.arange(H)
  top_P = top_BNP[b, n, p]
  weight_P = jnp.exp(top_P - jnp.max(top_P))
  total = jnp.sum(sum_BNP[b, n, p] * weight_P)
  out_H = jnp.sum(part_BNPH[b, n, p[:, None], j[None]] * weight_P[:, None], axis=0) / total
  out_BQ[b, n * H + j] = out_H.astype(out_BQ.dtype)
