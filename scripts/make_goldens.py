"""Compare the forward pass with Hugging Face transformers and write tests/goldens.

    python scripts/make_goldens.py                    all cases; needs the extra `bench` and 8 GB
    python scripts/make_goldens.py tiny_tied 1b       only these cases

Why: the tests must check against transformers without needing torch. Both sides compute in float32 with
the same weights. A weight is an integer from a bit generator whose stream NumPy guarantees, times one
float32, so every machine makes the same weights, and 1.2 billion take seconds. The scales are chosen to
expose errors: embeddings small enough for eps to matter, attention scores wide enough for distance to
matter, norms away from one.
"""

import dataclasses
import json
import operator
import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "benchmarks")]

import decode

from entropix_jax import config, files
from entropix_jax.checkpoints import hf_config
from entropix_jax.model import kvcache, llama, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
RESULTS = ROOT / "benchmarks" / "results" / "parity.jsonl"
TOLERANCE = 2e-4  # largest absolute difference of a logit


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison; all random values are derived from `name`."""

  name: str
  cfg: config.ModelConfig
  tokens: int  # length of the sequence
  chunk: int  # tokens per piece when fed through the cache
  embed: float  # standard deviation of the embedding; sqrt(norm_eps) is 0.003
  score: float  # standard deviation of attention scores
  positions: int | None = None  # stored positions, half of them the last; all when None
  ids: int | None = None  # stored vocabulary ids; all when None
  rope_scaling: str | None = None  # JSON for transformers' config; None: what `to_hf` writes


def _cases() -> dict[str, Case]:
  def rope(factor):
    return config.RopeConfig(kind="llama3", factor=factor)

  def tiny(vocab, width, ffn, layers, heads, kv_heads, head_dim, **other):
    return config.ModelConfig(vocab, width, ffn, layers, heads, kv_heads, head_dim, **other)

  def scaled(name, **scaling):
    """Rope settings as a file has them; we compute what `from_hf` reads there."""
    text = json.dumps(scaling)
    hf = hf_config.to_hf(tiny(83, 32, 56, 2, 4, 2, 16, max_position=4000))
    cfg = hf_config.from_hf(hf | {"rope_theta": 1e4, "rope_scaling": scaling})
    return Case(name, cfg, 56, 28, 0.02, 2.0, rope_scaling=text)

  # Both sides round frequencies to float32 in the same way; an error in the last bit of one is 1e-4
  # radians at position 8256, and with scores this wide 1e-3 in a logit.
  long = {"tokens": 8256, "chunk": 2064, "embed": 0.01, "score": 2.0, "positions": 64}
  cases = (
    Case("tiny_tied", tiny(211, 48, 80, 3, 6, 2, 8, tied=True), 56, 28, 0.01, 2.0),
    Case("tiny_untied", tiny(199, 64, 104, 2, 8, 2, 8), 56, 28, 0.02, 2.0),
    Case("tiny_head_dim", tiny(193, 48, 72, 2, 6, 3, 12, tied=True), 56, 28, 0.01, 2.0),
    Case("tiny_rope8", tiny(97, 32, 56, 2, 4, 2, 16, max_position=131_072, rope=rope(8.0)), **long),
    Case(
      "tiny_rope32",
      tiny(89, 36, 48, 2, 4, 2, 20, tied=True, max_position=131_072, rope=rope(32.0)),
      **long,
    ),
    Case(
      "tiny_bias",
      tiny(101, 32, 56, 2, 4, 2, 12, attention_bias=True, mlp_bias=True),
      56,
      28,
      0.02,
      2.0,
    ),
    Case("tiny_qkvo_bias", tiny(79, 32, 56, 2, 4, 2, 8, attention_bias=True), 56, 28, 0.02, 2.0),
    scaled("tiny_linear", type="linear", factor=4.0),
    scaled("tiny_dynamic", type="dynamic", factor=2.0),
    scaled("tiny_yarn", type="yarn", factor=4.0, original_max_position_embeddings=1000),
    scaled(
      "tiny_yarn_set",
      rope_type="yarn",
      factor=6.0,
      original_max_position_embeddings=32,
      attention_factor=0.8,
      beta_fast=4.0,
      beta_slow=0.5,
      truncate=False,
    ),
    Case("1b", config.PRESETS["llama3_1b"], 24, 12, 0.02, 2.0, ids=256),
  )
  return {case.name: case for case in cases}


CASES = _cases()


def _raw(case: Case, what: str, words: int) -> np.ndarray:
  return np.random.SFC64(zlib.crc32(f"{case.name}/{what}".encode())).random_raw(words)


def tokens(case: Case) -> np.ndarray:
  """The int32 token ids of a case."""
  return (_raw(case, "tokens", case.tokens) % np.uint64(case.cfg.vocab)).astype(np.int32)


def tensor(case: Case, field: str, name: str) -> np.ndarray:
  """One float32 tensor in Hugging Face layout, uniform with a standard deviation that fits its role."""
  cfg = case.cfg
  shape = weights.hf_shape(cfg, field)
  size = int(np.prod(shape))
  words = _raw(case, name, -(-size // 4)).astype("<u8", copy=False)
  unit = np.sqrt(12) / 2**16
  x = words.view("<i2")[:size].astype(np.float32).reshape(shape)
  if field == "embed_VD":
    scale = case.embed
  elif len(shape) == 1:
    scale = 0.3 if field in weights.BIASES else 0.1
  else:
    scale = shape[1] ** -0.5
    if name.endswith(("q_proj.weight", "k_proj.weight")):
      scale *= case.score**0.5
  x *= np.float32(scale * unit)
  if "norm" in field:
    x += np.float32(1)
  if field == "norm_D":
    # Logits have standard deviation 3, whether the head is tied or not.
    x *= np.float32(3 / (case.embed * cfg.width**0.5) if cfg.tied else 3)
  return x


def our_weights(case: Case, get=tensor) -> weights.Weights:
  """Our weights of a case, from the same tensors that transformers gets."""
  table = weights.sources(case.cfg)

  def make(layer, field):
    return jnp.asarray(weights.hf_order(field, get(case, field, table[layer, field])))

  return weights.assemble(case.cfg, make)


def our_logits(cfg, params, token_T, chunk: int | None = None) -> np.ndarray:
  """Logits (T, V) of one sequence: in one pass, or through the cache in pieces of `chunk` tokens.

  Every call traces anew, so that a test can replace functions that the forward pass calls.
  """
  if chunk is None:
    run = jax.jit(
      lambda params, token_BT: llama.unembed(params, llama.forward(cfg, params, token_BT)[0])
    )
    return np.asarray(run(params, token_T[None])[0])

  @jax.jit(static_argnames="window")
  def feed(params, cache, token_BT, len_B, window):
    past = kvcache.Past(len_B, cache, window=window)
    x_BTD, past, _ = llama.forward(cfg, params, token_BT, past)
    return llama.unembed(params, x_BTD), past.cache

  cache = kvcache.init(cfg, 1, len(token_T), params.embed_VD.dtype)
  rows = []
  for start in range(0, len(token_T), chunk):
    token_BT, len_B = token_T[None, start : start + chunk], np.array([start], np.int32)
    logits_BTV, cache = feed(params, cache, token_BT, len_B, start + token_BT.shape[1])
    rows.append(np.asarray(logits_BTV[0]))
  return np.concatenate(rows)


def stored(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """(positions, ids) that a golden stores."""

  def some(what, count, among):
    return np.sort(np.argsort(_raw(case, what, among), kind="stable")[:count])

  position_P = np.arange(case.tokens)
  if case.positions:
    half = case.positions // 2
    last = case.tokens - half
    position_P = np.concatenate([some("positions", half, last), np.arange(last, case.tokens)])
  vocab = case.cfg.vocab
  return position_P, some("ids", case.ids, vocab) if case.ids else np.arange(vocab)


def extract(case: Case, logits_TV: np.ndarray) -> dict[str, np.ndarray]:
  """The contents of a golden: selected logits, and the mean and log-sum-exp at each selected position."""
  position_P, id_C = stored(case)
  wide_PV = logits_TV[position_P].astype(np.float64)
  return {
    "logits_PC": logits_TV[np.ix_(position_P, id_C)],
    "mean_P": wide_PV.mean(-1),
    "lse_P": scipy.special.logsumexp(wide_PV, axis=-1),
  }


def read_golden(case: Case) -> dict[str, np.ndarray]:
  with np.load(GOLDENS / f"{case.name}.npz") as file:
    return dict(file)


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
  """The largest absolute difference over all stored numbers; NaN when any is NaN."""
  shapes = ({key: value.shape for key, value in golden.items()} for golden in (ours, theirs))
  assert operator.eq(*shapes), "the case has changed since its golden was made"
  return float(np.max([np.abs(ours[key] - theirs[key]).max() for key in theirs]))


# -- functions that need torch -------------------------------------------------------------------


def hf_logits(case: Case, tensors: dict[str, np.ndarray]) -> np.ndarray:
  """Logits (T, V) of transformers' LlamaForCausalLM in float32, on memory shared with `tensors`."""
  import torch

  state = {name: torch.from_numpy(array) for name, array in tensors.items()}
  rope = {"rope_scaling": json.loads(case.rope_scaling)} if case.rope_scaling else {}
  net = decode.hf_net(case.cfg, state, attn_implementation="eager", **rope)
  ids = torch.from_numpy(tokens(case).astype(np.int64))[None]
  with torch.inference_mode():
    return net(input_ids=ids, use_cache=False).logits[0].numpy()


def compare(case: Case) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """The golden of a case, and the largest differences of our logits over all positions and ids."""
  table = weights.sources(case.cfg)
  tensors = {name: tensor(case, field, name) for (_, field), name in table.items()}
  theirs_TV = hf_logits(case, tensors)
  params = our_weights(case, lambda case, field, name: tensors.pop(name))
  figures = {"logit_rms": float(np.sqrt(np.mean(theirs_TV.astype(np.float64) ** 2)))}
  for path, chunk in (("full", None), ("cached", case.chunk)):
    ours_TV = our_logits(case.cfg, params, tokens(case), chunk)
    figures[f"worst_{path}"] = float(np.abs(ours_TV - theirs_TV).max())
  return extract(case, theirs_TV), figures


def write_golden(case: Case, golden: dict[str, np.ndarray]) -> None:
  GOLDENS.mkdir(parents=True, exist_ok=True)
  path = GOLDENS / f"{case.name}.npz"
  with files.whole(path) as file:
    np.savez_compressed(file, **golden)


def main(names: list[str]) -> int:
  import torch
  import transformers

  unknown = sorted(set(names) - set(CASES))
  if unknown:
    print(f"There is no case {unknown[0]!r}; the cases are {', '.join(CASES)}.", file=sys.stderr)
    return 2
  machine = decode.machine()
  facts = {key: machine[key] for key in ("commit", "date", "device", "python", "jax")}
  facts |= {mod.__name__: mod.__version__ for mod in (np, torch, transformers)}
  failed = False
  print(f"{'case':15}{'positions':>10}{'vocab':>8}{'rms':>7}{'full':>12}{'cached':>12}")
  for case in CASES.values() if not names else map(CASES.get, names):
    golden, figures = compare(case)
    far = not all(figures[path] <= TOLERANCE for path in ("worst_full", "worst_cached"))
    failed |= far
    print(
      f"{case.name:15}{case.tokens:10}{case.cfg.vocab:8}{figures['logit_rms']:7.2f}"
      f"{figures['worst_full']:12.2e}{figures['worst_cached']:12.2e}{'  TOO FAR' if far else ''}",
      flush=True,
    )
    if not far:
      write_golden(case, golden)
    line = {"benchmark": "parity", "case": case.name, "positions": case.tokens, **figures, **facts}
    files.append(RESULTS, json.dumps(line))
  return int(failed)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
