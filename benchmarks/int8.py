"""Measure what int8 weights and an int8 cache change in logits and perplexity, and the bytes they save.

  python benchmarks/int8.py --out=runs.jsonl
  python benchmarks/int8.py --model=llama3_1b --out=runs.jsonl

Without --model: the demo checkpoints and held-out texts of the demo corpus, every position of every
text, fed through a cache. With --model: random weights of that shape and random ids, without perplexity,
which would mean nothing. Prints one JSON object per model. For each setting it has the largest and the mean
difference of a logit from float32's, how often the most likely token is the same, the Kullback-Leibler
divergence in nats, perplexity, and the bytes of the weights and of one token in the cache.
"""

import gc
import math
import pathlib
import random
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import decode
import demo_corpus

from entropix_jax import config
from entropix_jax.checkpoints import chat, checkpoint, vocabulary
from entropix_jax.cli import commands
from entropix_jax.model import kvcache, llama, quant

_FLAGS = commands.Flags()
_MODEL = _FLAGS.enum("model", None, list(config.PRESETS), "Shape of random weights.")
_TEXTS = _FLAGS.integer("texts", 200, "Texts, or rows of random ids.", 1)
_TOKENS = _FLAGS.integer("tokens", 128, "Most tokens per text.", 2)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")

DEMO = pathlib.Path(__file__).resolve().parents[1] / "entropix_jax" / "assets" / "demo"
SETTINGS = {  # types of weights and cache; all arithmetic is in float32
  "float32": (jnp.float32, jnp.float32),
  "bfloat16": (jnp.bfloat16, jnp.float32),
  "int8 weights": (jnp.int8, jnp.float32),
  "int8 cache": (jnp.float32, jnp.int8),
  "int8 weights and cache": (jnp.int8, jnp.int8),
}


def held_out(stage: str, count: int, most: int) -> list[list[int]]:
  """Ids of held-out documents (base) or conversations (instruct)."""
  coder = vocabulary.load(DEMO / stage)
  rng = random.Random("int8")
  if stage == "base":
    texts = [chat.plain(coder, demo_corpus.document(rng, True)) for _ in range(count)]
  else:
    talks = [demo_corpus.chat(rng, True) for _ in range(count)]
    form = chat.choose(DEMO / stage, coder)
    texts = [form.encode(talk, add_generation_prompt=False) for talk in talks]
  return [ids[:most] for ids in texts]


def logits_of(cfg, params, ids_T: np.ndarray, cache_dtype) -> jax.Array:
  """logits_TV of one text, fed in two pieces, so that the second reads the first from the cache."""
  T = len(ids_T)
  cache = kvcache.init(cfg, 1, T, cache_dtype)
  half, zero = T // 2, jnp.zeros((1,), jnp.int32)
  first, cache, _ = _piece(cfg, params, ids_T[None, :half], cache, zero)
  second, _, _ = _piece(cfg, params, ids_T[None, half:], cache, zero + half)
  return jnp.concatenate([first, second], axis=1)[0]


@jax.jit(static_argnames="cfg")
def _piece(cfg, params, token_BT, cache, len_B):
  x_BTD, past, seen = llama.forward(cfg, params, token_BT, kvcache.Past(len_B, cache))
  return llama.unembed(params, x_BTD), past.cache, seen


def changed(cfg, params, kind):
  """(weights that give the results of weights stored as `kind`, bytes of the stored weights)."""
  if kind == jnp.int8:
    params = quant.weights(cfg, params)
    return params, size(params)
  stored = jax.tree.map(lambda x: x.astype(kind), params)
  return jax.tree.map(lambda x: x.astype(jnp.float32), stored), size(stored)


def size(tree) -> int:
  """Bytes of all arrays."""
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def compare(cfg, params, texts: list[list[int]], scored: bool) -> dict[str, dict]:
  """Setting -> its results over all positions of all texts."""
  width = max(map(len, texts))
  padded = [np.asarray(ids + [0] * (width - len(ids)), np.int32) for ids in texts]

  def run(params, cache_dtype):
    for ids_T, text in zip(padded, texts, strict=True):
      yield np.asarray(logits_of(cfg, params, ids_T, cache_dtype), np.float64)[: len(text)]

  out = {}
  for name, (kind, cache_dtype) in SETTINGS.items():
    other, stored = changed(cfg, params, kind)
    worst, total, same, apart, loss, n, scored_n = 0.0, 0.0, 0, 0.0, 0.0, 0, 0
    for text, want, got in zip(
      texts, run(params, jnp.float32), run(other, cache_dtype), strict=True
    ):
      off = np.abs(want - got)
      worst, total, n = max(worst, off.max()), total + off.mean(-1).sum(), n + len(text)
      p, q = (scipy.special.log_softmax(x, axis=-1) for x in (want, got))
      same += (p.argmax(-1) == q.argmax(-1)).sum()
      apart += (np.exp(p) * (p - q)).sum()
      loss -= q[np.arange(len(text) - 1), text[1:]].sum()
      scored_n += len(text) - 1
    out[name] = {
      "worst_logit": worst,
      "mean_logit": total / n,
      "same_top": same / n,
      "kl_nats": apart / n,
      "weight_bytes": stored,
      "cache_bytes_per_token": size(kvcache.init(cfg, 1, 1, cache_dtype)),
    }
    if scored:
      out[name]["perplexity"] = math.exp(loss / scored_n)
    del other
    gc.collect()
  return out


def measure() -> Iterator[dict]:
  """One line per model."""
  count, most = _TEXTS.value, _TOKENS.value
  facts = {"benchmark": "int8"} | decode.machine()
  if _MODEL.value:
    cfg = config.PRESETS[_MODEL.value]
    rng = np.random.default_rng(0)
    texts = rng.integers(0, cfg.vocab, (count, most)).tolist()
    settings = compare(cfg, decode.random_weights(cfg, jnp.float32, copies=2), texts, scored=False)
    yield facts | {"model": _MODEL.value, "tokens": count * most, "settings": settings}
    return
  for stage in ("base", "instruct"):
    cfg = checkpoint.load_config(DEMO / stage)
    params = checkpoint.load_weights(DEMO / stage, cfg, jnp.float32)
    texts = held_out(stage, count, most)
    settings = compare(cfg, params, texts, scored=True)
    yield facts | {"model": f"demo/{stage}", "tokens": sum(map(len, texts)), "settings": settings}


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  for line in measure():
    print(commands.keep(out, line), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
