"""What int8 weights and an int8 cache cost in logits and perplexity, and what they save in bytes.

  python benchmarks/int8.py --out=runs.jsonl
  python benchmarks/int8.py --model=llama3_1b --out=runs.jsonl

Without --model: the demo checkpoints and held-out texts of the demo corpus, every position of every
text, fed through a cache. With --model: random weights of that shape and random ids; its perplexity
means nothing and is left out. One JSON object a model goes to stdout, last; each of the settings in it
has the worst and the mean difference of a logit to float32's, how often the most likely token is the
same, nats of Kullback-Leibler divergence, perplexity, and bytes of weights and of a token's cache.
"""

import datetime
import gc
import json
import math
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))

import decode
import demo_corpus

from entropix_jax import chat, checkpoint, config, kvcache, model, quant, tokenizer, weights
from entropix_jax.errors import UserError

_FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_enum(
  "model", None, list(config.PRESETS), "Random weights of this shape.", flag_values=_FLAGS
)
_TEXTS = flags.DEFINE_integer("texts", 200, "Texts, or rows of random ids.", 1, flag_values=_FLAGS)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens of each, at most.", 2, flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "JSONL file to append to.", flag_values=_FLAGS)

DEMO = pathlib.Path(__file__).resolve().parents[1] / "entropix_jax" / "assets" / "demo"
SETTINGS = {
  "bfloat16": {"weights": jnp.bfloat16},
  "int8 weights": {"weights": jnp.int8},
  "int8 cache": {"cache": jnp.int8},
  "int8 weights and cache": {"weights": jnp.int8, "cache": jnp.int8},
}


def held_out(stage: str, count: int, most: int) -> list[list[int]]:
  """Ids of held-out documents, or of conversations for the instruct model."""
  coder = tokenizer.load(DEMO / stage)
  rng = random.Random("int8")
  if stage == "base":
    texts = [chat.plain(coder, demo_corpus.document(rng, True)) for _ in range(count)]
  else:
    talks = [demo_corpus.chat(rng, True) for _ in range(count)]
    texts = [chat.encode(coder, talk, add_generation_prompt=False) for talk in talks]
  return [ids[:most] for ids in texts]


def logits_of(cfg, params, ids_T: np.ndarray, cache_dtype) -> jax.Array:
  """logits_TV of one text, fed through a cache in two pieces, so that what is cached is read."""
  T = len(ids_T)
  cache = kvcache.init(cfg, 1, T, cache_dtype)
  half, zero = T // 2, jnp.zeros((1,), jnp.int32)
  first, cache, _ = _piece(cfg, params, ids_T[None, :half], cache, zero)
  second, _, _ = _piece(cfg, params, ids_T[None, half:], cache, zero + half)
  return jnp.concatenate([first, second], axis=1)[0]


@jax.jit(static_argnames="cfg")
def _piece(cfg, params, token_BT, cache, len_B):
  x_BTD, cache, seen = model.forward(cfg, params, token_BT, cache=cache, len_B=len_B)
  return model.unembed(params, x_BTD), cache, seen


def changed(cfg, params, kind):
  """The weights of a setting; bfloat16 rounds and computes in float32, so that only storage differs."""
  if kind is None:
    return params
  if kind == jnp.int8:
    return quant.weights(cfg, params)
  return jax.tree.map(lambda x: x.astype(kind).astype(x.dtype), params)


def compare(cfg, params, texts: list[list[int]], scored: bool) -> dict[str, dict]:
  """Setting -> its figures over all positions of all texts."""
  width = max(map(len, texts))
  padded = [np.asarray(ids + [0] * (width - len(ids)), np.int32) for ids in texts]

  def run(params, cache_dtype):
    for ids_T, text in zip(padded, texts, strict=True):
      yield np.asarray(logits_of(cfg, params, ids_T, cache_dtype), np.float64)[: len(text)]

  def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  out = {}
  for name, setting in {"float32": {}, **SETTINGS}.items():
    other = changed(cfg, params, setting.get("weights"))
    cache_dtype = setting.get("cache", jnp.float32)
    worst, total, same, apart, loss, n, scored_n = 0.0, 0.0, 0, 0.0, 0.0, 0, 0
    for text, want, got in zip(
      texts, run(params, jnp.float32), run(other, cache_dtype), strict=True
    ):
      off = np.abs(want - got)
      worst, total, n = max(worst, off.max()), total + off.mean(-1).sum(), n + len(text)
      p, q = log_softmax(want), log_softmax(got)
      same += (p.argmax(-1) == q.argmax(-1)).sum()
      apart += (np.exp(p) * (p - q)).sum()
      loss -= q[np.arange(len(text) - 1), text[1:]].sum()
      scored_n += len(text) - 1
    itemsize = {None: 4, jnp.int8: 1}.get(setting.get("cache"), 4)
    per_head = cfg.head_dim * itemsize + (4 if itemsize == 1 else 0)
    out[name] = {
      "worst_logit": worst,
      "mean_logit": total / n,
      "same_top": same / n,
      "kl_nats": apart / n,
      "weight_bytes": sum(
        x.nbytes // (2 if setting.get("weights") == jnp.bfloat16 else 1)
        for x in jax.tree.leaves(other)
      ),
      "cache_bytes_per_token": 2 * cfg.layers * cfg.kv_heads * per_head,
    }
    if scored:
      out[name]["perplexity"] = math.exp(loss / scored_n)
    del other
    gc.collect()
  return out


def run() -> list[dict]:
  """One line a model."""
  count, most = _TEXTS.value, _TOKENS.value
  facts = {"benchmark": "int8", "jax": jax.__version__, "date": datetime.date.today().isoformat()}
  facts |= decode.machine()
  if _MODEL.value:
    cfg = config.PRESETS[_MODEL.value]
    rng = np.random.default_rng(0)
    texts = rng.integers(0, cfg.vocab, (count, most)).tolist()
    settings = compare(cfg, weights.random(cfg, jnp.float32), texts, scored=False)
    return [facts | {"model": _MODEL.value, "tokens": count * most, "settings": settings}]
  lines = []
  for stage in ("base", "instruct"):
    cfg = checkpoint.load_config(DEMO / stage)
    params = checkpoint.load_weights(DEMO / stage, cfg, jnp.float32)
    texts = held_out(stage, count, most)
    settings = compare(cfg, params, texts, scored=True)
    lines.append(
      facts | {"model": f"demo/{stage}", "tokens": sum(map(len, texts)), "settings": settings}
    )
  return lines


def _entry(argv: list[str]) -> int:
  try:
    if any(arg in ("--help", "-help", "-h") for arg in argv[1:]):
      print(f"{__doc__}\n{_FLAGS.get_help()}")
      return 0
    try:
      rest = _FLAGS(argv)
    except flags.Error as error:
      raise UserError(f"{error} Try --help.") from None
    if len(rest) > 1:
      raise UserError(f"Unexpected argument {rest[1]!r}; see --help.")
    for line in run():
      text = json.dumps(line)
      if _OUT.value:
        with open(_OUT.value, "a", encoding="utf-8") as file:
          file.write(text + "\n")
      print(text)
    return 0
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(_entry(sys.argv))
