"""Compare SmolLM2-135M-Instruct with Hugging Face transformers on six texts and write tests/goldens/smollm2.npz.

    python scripts/get_smollm2.py
    python scripts/make_smollm2_golden.py checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf

Why: random weights (make_goldens.py) show that sums are right; a real file shows that its tensors, its tokenizer
and its template are read as others read them. transformers reads the file by itself, tokens excepted.
For each text the golden has its ids, and at each position the log-sum-exp and the best id with its logit; all logits
of a few positions; and 100 tokens of greedy text. The log-likelihoods of 200 continuations are in it, too. Needs the
extra `bench`.
"""

import pathlib
import random
import sys

import jax.numpy as jnp
import numpy as np
import scipy.special

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import demo_corpus
import make_goldens

from entropix_jax.checkpoints import chat, checkpoint, vocabulary
from entropix_jax.cli import prompts

GREEDY = 100  # tokens
CODE = """\
def primes(limit):
  sieve = [True] * (limit + 1)
  for n in range(2, int(limit**0.5) + 1):
    if sieve[n]:
      sieve[n * n :: n] = [False] * len(sieve[n * n :: n])
  return [n for n in range(2, limit + 1) if sieve[n]]
"""
ENGLISH = """\
The ferry left the harbour before dawn, with eleven passengers and a crate of oranges. Nobody spoke until the lighthouse \
was behind them. Then an old man took out a harmonica and played a slow tune that most of them knew, and by the time the \
sun came up over the islands they were all singing."""
MESSAGES = [
  {"role": "system", "content": "You are a helpful assistant who answers in one sentence."},
  {"role": "user", "content": "What is the capital of Portugal?"},
  {"role": "assistant", "content": "The capital of Portugal is Lisbon."},
  {"role": "user", "content": "And what is it known for?"},
]


def texts(path) -> dict[str, list[int]]:
  """Name -> ids of the six texts."""
  tok = vocabulary.load(path)
  rng = random.Random("smollm2")
  long = " ".join(demo_corpus.document(rng).replace("\n", " ") for _ in range(60))
  plain = {
    "english": ENGLISH,
    "code": CODE,
    "numbers": "3.14159 2.71828; 1,234,567 - 89 = 1,234,478. 2^10 = 1024, 17 x 23 = 391, 100/8 = 12.5, 0.001 < 0.01",
    "chinese": "今天天气很好，我们去公园散步吧。🌞🚶‍♀️ 你想喝茶还是咖啡？☕ 価格は1,200円です。",  # noqa: RUF001
    "long": long,
  }
  ids = {name: tok.encode(text) for name, text in plain.items()}
  ids["long"] = ids["long"][:1500]
  return ids | {"chat": chat.choose(path, tok).encode(MESSAGES)}


def pairs(path) -> list[tuple[list[int], int]]:
  """(ids, how many of them are context) of 200 continuations, cut as lm-eval cuts them; some contexts are long."""
  tok, folder = vocabulary.load(path), make_goldens.ROOT / "benchmarks"
  asks, more = (
    [prompt.text for prompt in prompts.read(str(folder / f"prompts_{name}.csv"))]
    for name in ("questions", "calibration")
  )
  found = []
  for i, text in enumerate(more):
    context = " ".join(asks[i - 24 : i + 1] if i % 25 == 24 else asks[i : i + 1])
    found.append((tok.encode(f"{context} {text}"), len(tok.encode(context))))
  return found


def positions(n: int) -> np.ndarray:
  """Those whose logits are stored whole, or almost: see `some_ids`."""
  return np.unique(np.linspace(0, n - 1, 8).round().astype(int))


def some_ids(vocab: int) -> np.ndarray:
  """The ids whose logits are stored."""
  return np.arange(7, vocab, 997)


def extract(logits_TV: np.ndarray) -> dict[str, np.ndarray]:
  """What a golden has of the logits of a text."""
  wide_TV = logits_TV.astype(np.float64)
  best_T = logits_TV.argmax(-1)
  return {
    "lse_T": scipy.special.logsumexp(wide_TV, axis=-1).astype(np.float32),
    "best_T": best_T.astype(np.int32),
    "logit_T": logits_TV[np.arange(len(best_T)), best_T],
    "logits_PC": logits_TV[np.ix_(positions(len(best_T)), some_ids(logits_TV.shape[1]))],
  }


def main(argv: list[str]) -> int:
  import torch
  import transformers

  path = pathlib.Path(argv[0])
  cfg = checkpoint.load_config(path)
  ours = checkpoint.load_weights(path, cfg, jnp.float32)
  net = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  golden: dict[str, np.ndarray] = {}
  far = False
  for name, ids in texts(path).items():
    token_T = np.asarray(ids, np.int32)
    batch = torch.from_numpy(token_T.astype(np.int64))[None]
    with torch.inference_mode():
      theirs_TV = net(input_ids=batch, use_cache=False).logits[0].numpy()
      said = net.generate(
        batch, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0
      )
    worst = float(np.abs(make_goldens.our_logits(cfg, ours, token_T) - theirs_TV).max())
    far |= not worst <= make_goldens.TOLERANCE
    print(f"{name:10}{len(ids):6} positions, worst difference of a logit {worst:.2e}", flush=True)
    found = {"ids": token_T, "greedy": said[0, len(ids) :].numpy().astype(np.int32)}
    golden |= {f"{name}/{key}": x for key, x in (found | extract(theirs_TV)).items()}
  sums = []
  for ids, context in pairs(path):
    batch = torch.tensor([ids])
    with torch.inference_mode():
      logits_TV = net(input_ids=batch, use_cache=False).logits[0, context - 1 : -1].double()
    logp_TV = torch.log_softmax(logits_TV, -1)
    sums.append(logp_TV.gather(1, batch[0, context:, None]).sum().item())
  golden["pairs"] = np.asarray(sums)
  if not far:
    with make_goldens.files.whole(make_goldens.GOLDENS / "smollm2.npz") as file:
      np.savez_compressed(file, **golden)
  return int(far)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
