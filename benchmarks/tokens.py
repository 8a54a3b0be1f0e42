"""Measure what tokens do to a model: cut words, odd segmentations, the probability of a text, bytes.

  python benchmarks/tokens.py --checkpoint=FOLDER --out=tokens.jsonl
  python benchmarks/tokens.py --checkpoint=FOLDER --out=tokens.jsonl --tasks=heal,prompts

The texts are paragraphs of the docstrings of Python's standard library, as this Python has them. Tasks:

  heal       prompts that end inside a word, continued greedily, without healing and with it. `right`: the word is the
             author's; `known`: it is a word of the library's files at all; 0 or 1 per prompt, in order
  prompts    prompts that end with a word, written by BPE dropout: the law of the next token. `right`: the author's token
             is the likeliest; `logp`: its log-probability; `entropy` of the law, in nats
  marginal   words of at most 6 letters after a prompt: log p of the canonical segmentation and of all
  bytes      100 bytes after a prompt, byte by byte: rows of the model per byte, bits per byte by tokens and by bytes
  mix        stories of the demo corpus: bits per byte of the model, of the demo's base model, and of the mean of their laws
"""

import ast
import collections
import math
import pathlib
import random
import re
import sys
import sysconfig
import time

import numpy as np
from tqdm import tqdm

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import decode
import demo_corpus

from entropix_jax import settings
from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.llm import LLM
from entropix_jax.scheduler import raising
from entropix_jax.tokens import bytes as by_bytes
from entropix_jax.tokens import segmentations
from entropix_jax.tokens.spelling import spelling

TASKS = ("heal", "prompts", "marginal", "bytes", "mix")
_FLAGS = commands.Flags()
_CHECKPOINT = _FLAGS.string("checkpoint", str(settings.ASSETS / "demo" / "base"), "The model.")
_TASKS = _FLAGS.strings("tasks", [*TASKS], f"Some of: {', '.join(TASKS)}.")
_TEXTS = _FLAGS.integer("texts", 200, "Prompts of the first two tasks; the others take a part.", 1)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_DROPOUTS = (0.0, 0.1, 0.3, 0.6, 1.0)
_LONGEST = 600  # bytes of a prompt


def files() -> list[pathlib.Path]:
  """The modules of the standard library that are one file."""
  return sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))


def paragraphs() -> list[str]:
  """Paragraphs of prose of the docstrings, each once, shuffled by a fixed seed."""
  found = {}
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  for path in files():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      text = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
      for part in text.split("\n\n"):
        part = " ".join(part.split())
        prose = sum(c.isalpha() or c in " ,." for c in part) >= 0.97 * len(part)
        if prose and len(part.split()) >= 25 and part.endswith("."):
          found[part[:_LONGEST]] = None
  texts = [*found]
  random.Random("tokens").shuffle(texts)
  return texts


def words() -> set[str]:
  """Words that the library's files have at least twice, in lower case."""
  counts: collections.Counter[str] = collections.Counter()
  for path in files():
    counts.update(re.findall(r"[A-Za-z]+", path.read_text(encoding="utf-8").lower()))
  return {word for word, n in counts.items() if n > 1}


def cut(text: str, rng: random.Random, inside: bool, most: int = 100) -> tuple[str, str] | None:
  """(prompt, word) of a text, cut inside a word of at least five letters, or before a space and a shorter one."""
  spots = [
    m
    for m in re.finditer(r"(?<= )[a-z]+(?=[ ,.])", text)
    if m.start() > 80 and (len(m[0]) >= 5 if inside else len(m[0]) <= most)
  ]
  if not spots:
    return None
  spot = rng.choice(spots)
  at = spot.start() + rng.randrange(2, len(spot[0]) - 1) if inside else spot.start() - 1
  return text[:at], spot[0]


def _cuts(inside: bool, count: int, most: int = 100) -> list[tuple[str, str]]:
  rng = random.Random(f"cut {inside}")
  found = [one for text in paragraphs() if (one := cut(text, rng, inside, most))]
  if len(found) < count:
    raise UserError(f"There are {len(found)} prompts of this kind; ask for fewer with --texts.")
  return found[:count]


def _bits(values) -> str:
  return "".join(str(int(value)) for value in values)


def healing(llm: LLM):
  """Cut words, without healing and with it."""
  cuts, known = _cuts(True, _TEXTS.value), words()
  for heals in (False, True):
    session = llm._session(
      sampler="plain", temperature=0.0, preset="none", format="plain", heal=heals
    )
    todo = [session.ask(prompt, 8, 0) for prompt, _ in cuts]
    session.ready(todo)
    start, texts, entropy = time.perf_counter(), [""] * len(cuts), [0.0] * len(cuts)
    for token in tqdm(raising(session.go(todo)), leave=False, disable=None):
      texts[token.prompt] += token.text
      if not token.position:
        entropy[token.prompt] = token.entropy
    ends = [re.search(r"[A-Za-z]+$", prompt)[0] for prompt, _ in cuts]
    made = [e + re.match(r"[A-Za-z]*", t)[0] for e, t in zip(ends, texts, strict=True)]
    yield {
      "heal": heals,
      "right": _bits(m == word for m, (_, word) in zip(made, cuts, strict=True)),
      "known": _bits(m.lower() in known for m in made),
      "entropy": float(np.mean(entropy)),
      "rows": session.laws.rows if heals else 0,
      "held": sum(len(request.held) > 0 for request in todo),
      "seconds": time.perf_counter() - start,
      "words": made,
    }


def _session(llm: LLM):
  """A session whose laws can be asked for."""
  session = llm._session(sampler="plain", preset="none", format="plain")
  session.ready([session.ask("x" * 4, 1, 0)])
  return session


def odd_prompts(llm: LLM):
  """Prompts by BPE dropout."""
  session, tok = _session(llm), llm.tokenizer
  laws, spelled = session.laws, spelling(tok)
  for dropout in _DROPOUTS:
    rng, right, logp, entropy, longer = np.random.default_rng(0), [], [], [], []
    for prompt, word in tqdm(_cuts(False, _TEXTS.value), leave=False, disable=None):
      ids, follows = tok.encode(prompt), tok.encode(f" {word}", False)[0]
      path = segmentations.sampled(spelled, ids, dropout, rng)
      logp_V = laws.after([(*tok.prefix, *path)])[0]
      right.append(logp_V.argmax() == follows)
      logp.append(float(logp_V[follows]))
      entropy.append(float(-(np.exp(logp_V) * np.maximum(logp_V, -1e9)).sum()))
      longer.append(len(path) / len(ids))
    yield {
      "dropout": dropout,
      "right": _bits(right),
      "logp": [round(x, 3) for x in logp],
      "entropy": [round(x, 3) for x in entropy],
      "tokens": float(np.mean(longer)),
    }


def marginals(llm: LLM):
  """Words over all their segmentations."""
  session, tok = _session(llm), llm.tokenizer
  found = []
  for prompt, word in tqdm(_cuts(False, max(_TEXTS.value // 4, 1), 6), leave=False, disable=None):
    before, ids = [*tok.prefix, *tok.encode(prompt)], tok.encode(f" {word}", False)
    one = segmentations.marginal(session.laws, spelling(tok), before, ids)
    found.append((one.canonical, one.total, one.ways))
  canonical, total, ways = zip(*found, strict=True)
  yield {
    "canonical": [round(x, 4) for x in canonical],
    "total": [round(x, 4) for x in total],
    "ways": ways,
  }


def _pieces(count: int) -> list[tuple[str, str]]:
  """(prompt, what follows, about 100 bytes)."""
  found = []
  for text in paragraphs():
    start = text.find(" ", 100)
    end = text.find(" ", start + 100)
    if 0 < start < end:
      found.append((text[:start], text[start:end]))
  return found[:count]


def in_bytes(llm: LLM):
  """Texts byte by byte."""
  session, tok = _session(llm), llm.tokenizer
  for tolerance in (1e-2, 1e-3):
    rows, tokens, logps, own, missing, start = 0, 0, [], [], [], time.perf_counter()
    pieces = _pieces(max(_TEXTS.value // 25, 1))
    for prompt, text in tqdm(pieces, leave=False, disable=None):
      before, ids = [*tok.prefix, *tok.encode(prompt)], tok.encode(text, False)
      walk = by_bytes.Walk(session.laws, spelling(tok), before, tok.ends, tolerance)
      begun = walk.logp
      for byte in text.encode():
        walk.push(byte)
      rows, tokens = rows + walk.rows, tokens + len(ids)
      logps.append(walk.logp - begun)
      own.append(float(session.laws.score([(*before, *ids)], len(before))[0].sum()))
      missing.append(walk.missing)
    size = sum(len(text.encode()) for _, text in pieces)
    yield {
      "tolerance": tolerance,
      "bytes": size,
      "tokens": tokens,
      "rows_per_byte": rows / size,
      "seconds_per_byte": (time.perf_counter() - start) / size,
      "bits_per_byte": -sum(logps) / size / math.log(2),
      "bits_per_byte_by_tokens": -sum(own) / size / math.log(2),
    }


def mixes(llm: LLM):
  """Two models with different tokenizers, on stories."""
  demo = LLM(settings.ASSETS / "demo" / "base", max_seq_len=512, batch_size=1)
  rng, texts = random.Random("tokens mix"), []
  while len(texts) < max(_TEXTS.value // 25, 1):
    text = demo_corpus.document(rng, True)
    if len(text) > 220:
      texts.append((text[:60].rpartition(" ")[0], text))
  models = [(_session(one).laws, one.tokenizer) for one in (llm, demo)]
  bits, size = collections.defaultdict(float), 0
  for prompt, text in tqdm(texts, leave=False, disable=None):
    walks = [
      by_bytes.Walk(laws, spelling(tok), [*tok.prefix, *tok.encode(prompt)], tok.ends, 1e-2)
      for laws, tok in models
    ]
    data = text[len(prompt) : len(prompt) + 120].encode()
    for byte in data:
      laws = [walk.law for walk in walks]
      mean = by_bytes.mixed(laws, [1, 1])
      for name, law in zip(("model", "demo", "mean"), (*laws, mean), strict=True):
        bits[name] -= math.log2(law[byte])
      for walk in walks:
        walk.push(byte)
    size += len(data)
  yield {"bytes": size} | {f"bits_per_byte_{name}": x / size for name, x in bits.items()}


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  does = dict(zip(TASKS, (healing, odd_prompts, marginals, in_bytes, mixes), strict=True))
  for task in _TASKS.value:
    if task not in does:
      raise UserError(f"There is no task {task!r}; use some of: {', '.join(TASKS)}.")
  llm = LLM(_CHECKPOINT.value, max_seq_len=1024, batch_size=8)
  model = pathlib.Path(_CHECKPOINT.value).stem
  for task in _TASKS.value:
    facts = {"benchmark": "tokens", "task": task, "model": model, "texts": _TEXTS.value}
    for line in does[task](llm):
      print(commands.keep(out, facts | line | decode.machine()), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
