"""Distil the demo's draft models, entropix_jax/assets/demo/draft and draft_base, from its two models.

Why: a drafter that shares the target's noise is right wherever its distribution equals the target's, so it
is trained on that distribution (KL divergence from the target's to its own) and not on the text. The
contexts are training texts of the corpus, as in scripts/train_demo.py, and the forward pass is that of
inference. Several sizes can train together on one pass of the target, which is half of the work, without
affecting each other. Everything is determined by --seed, and an interrupted run resumes.

  export XLA_FLAGS="--xla_cpu_multi_thread_eigen=false"
  python scripts/train_draft.py --stage=instruct --size small deep
  python scripts/train_draft.py --stage=instruct --steps=2600 --cool=0.27 --lr=2e-3
  python scripts/train_draft.py --stage=base --steps=2200 --cool=0.75
  python scripts/train_draft.py --stage=export
  python scripts/train_draft.py --stage=evaluate
"""

import contextlib
import dataclasses
import functools
import pathlib
import random
import sys
import time

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
import tqdm

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "benchmarks")]
import decode
import demo_corpus
import train_demo

from entropix_jax import sampling
from entropix_jax.checkpoints import checkpoint, vocabulary
from entropix_jax.cli import commands
from entropix_jax.config import EngineConfig
from entropix_jax.decoding.drafters import DraftModel
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.model import llama, weights
from entropix_jax.scheduler import generate

ROOT, ASSETS = train_demo.ROOT, train_demo.ASSETS
FOLDERS = {"instruct": "draft", "base": "draft_base"}
SIZES = {
  name: dataclasses.replace(
    train_demo.CFG, width=width, ffn=ffn, layers=layers, heads=width // 32, kv_heads=1
  )
  for name, width, ffn, layers in (("small", 96, 224, 2), ("deep", 96, 256, 3))
}

# -- training ------------------------------------------------------------------------------------


def logp(cfg, w, token_BT):
  """logp_BTV: log-probabilities of the token that follows each token."""
  x_BTD, _, _ = llama.forward(cfg, w, token_BT)
  return jax.nn.log_softmax(llama.unembed(w, x_BTD))


def mean(x_BT, learn_BT):
  """The mean of x_BT over the positions whose next token is to be learned."""
  learn_BT = learn_BT[:, 1:].astype(jnp.float32)
  return jnp.sum(x_BT * learn_BT) / jnp.maximum(jnp.sum(learn_BT), 1.0)


def divergence(cfg, w, law_BTV, token_BT, learn_BT):
  """Mean KL divergence (nats) from the target's distribution to this model's."""
  logp_BTV = logp(cfg, w, token_BT[:, :-1])
  return mean(jnp.sum(jnp.exp(law_BTV) * (law_BTV - logp_BTV), axis=-1), learn_BT)


def compare(cfg, w, law_BTV, token_BT, learn_BT):
  """Means over a batch: KL in nats, total variation, how often the most likely token is the same."""
  logp_BTV = logp(cfg, w, token_BT[:, :-1])
  apart_BT = 0.5 * jnp.sum(jnp.abs(jnp.exp(law_BTV) - jnp.exp(logp_BTV)), axis=-1)
  same_BT = jnp.argmax(law_BTV, axis=-1) == jnp.argmax(logp_BTV, axis=-1)
  return {
    "kl": divergence(cfg, w, law_BTV, token_BT, learn_BT),
    "tv": mean(apart_BT, learn_BT),
    "same_top": mean(same_BT.astype(jnp.float32), learn_BT),
  }


def load(folder: str):
  """(ModelConfig, Weights in float32) of a demo checkpoint."""
  cfg = checkpoint.load_config(ASSETS / folder)
  return cfg, checkpoint.load_weights(ASSETS / folder, cfg, jnp.float32)


def begin(cfg, target_w, seed: int):
  """Initial weights: random, except for the target's embedding projected on its first principal axes."""
  u_VD, scale_D, _ = jnp.linalg.svd(target_w.embed_VD, full_matrices=False)
  embed_VD = (u_VD * scale_D)[:, : cfg.width]
  return weights.random(cfg, jnp.float32, seed).replace(embed_VD=embed_VD)


def train(args):
  tok = vocabulary.load(ASSETS / args.stage)
  target, target_w = load(args.stage)
  opt = train_demo.optimizer(args.lr, args.steps, args.cool, warm=50)
  paths = {size: args.run / f"{args.stage}_{size}" for size in args.size}
  states = {}
  for size, path in paths.items():
    w = begin(SIZES[size], target_w, args.seed)
    state = {"weights": w, "opt": opt.init(w), "step": 0, "seconds": 0.0}
    if path.with_suffix(".state").exists():
      state = flax.serialization.from_bytes(state, path.with_suffix(".state").read_bytes())
    states[size] = jax.tree.map(jnp.asarray, state)
  first = int(states[args.size[0]]["step"])
  if any(int(state["step"]) != first for state in states.values()):
    sys.exit("These sizes stand at different steps; train them one by one.")

  @functools.partial(jax.jit, donate_argnums=0)
  def update(drafts, target_w, token_BT, learn_BT):
    law_BTV = logp(target, target_w, token_BT[:, :-1])
    out, losses = {}, {}
    for size, (w, opt_state) in drafts.items():
      loss = functools.partial(divergence, SIZES[size])
      losses[size], grad = jax.value_and_grad(loss)(w, law_BTV, token_BT, learn_BT)
      change, opt_state = opt.update(grad, opt_state, w)
      out[size] = optax.apply_updates(w, change), opt_state
    return out, losses

  held = train_demo.rows(tok, args.stage, f"held/{args.seed}", 16, args.length + 1, held_out=True)
  held_law = jax.jit(functools.partial(logp, target))(target_w, held[0][:, :-1])
  look = {size: jax.jit(functools.partial(compare, SIZES[size])) for size in args.size}
  drafts = {size: (state["weights"], state["opt"]) for size, state in states.items()}
  began, spent = time.time(), max(float(state["seconds"]) for state in states.values())
  shard, losses = 32, []  # steps whose rows are generated together
  last = args.stop or args.steps
  bar = tqdm.tqdm(range(first, last), initial=first, total=last, mininterval=30)
  for step in bar:
    if step == first or step % shard == 0:
      key = f"draft/{args.stage}/{args.seed}/{step // shard}"
      token, learn = train_demo.rows(tok, args.stage, key, shard * args.batch, args.length + 1)
    here = slice(step % shard * args.batch, (step % shard + 1) * args.batch)
    drafts, loss = update(drafts, target_w, token[here], learn[here])
    losses.append(loss)
    done = step + 1
    if done % args.every == 0 or done == last:
      seconds = spent + time.time() - began
      for size, path in paths.items():
        line = {
          "stage": args.stage, "size": size, "step": done,
          "tokens": done * args.batch * args.length,
          "loss": float(np.mean([float(loss[size]) for loss in losses])), "seconds": seconds,
        }  # fmt: skip
        seen = look[size](drafts[size][0], held_law, *held)
        line |= {f"held_out_{name}": float(value) for name, value in seen.items()}
        print(commands.keep(path.with_suffix(".jsonl"), line))
        state = dict(zip(("weights", "opt"), drafts[size], strict=True))
        state |= {"step": done, "seconds": seconds}
        train_demo.write(path.with_suffix(".state"), flax.serialization.to_bytes(state))
      losses = []


def export(args):
  """Write the Hugging Face folders."""
  size = args.size[0]
  for stage, folder in FOLDERS.items():
    like = weights.random(SIZES[size], jnp.float32)
    saved = flax.serialization.msgpack_restore((args.run / f"{stage}_{size}.state").read_bytes())
    w = flax.serialization.from_state_dict(like, saved["weights"])
    tok = vocabulary.load(ASSETS / stage)
    train_demo.ship(ASSETS / folder, SIZES[size], w, stage, tok, ASSETS / stage)


# -- evaluation ----------------------------------------------------------------------------------

TEMPERATURES = (0.0, 0.7, 1.0)
LENGTH = 4  # tokens drafted per pass
DRAWS = 16  # draws of the noise per position


def prompts(tok, stage: str, seed: int) -> dict[str, tuple[list[list[int]], int]]:
  """Kind -> (prompt ids of held-out problems or stories, the most tokens to generate)."""
  tasks = train_demo.problems(seed + 1, 2)
  rng = random.Random(f"stories/{seed}")
  tales = [demo_corpus.story(rng, want_held_out=True) for _ in range(30)]

  def coded(items) -> list[list[int]]:
    return train_demo.encode(tok, stage, [item.prompt(stage == "instruct") for item in items])[0]

  return {"problem": (coded(tasks), 96), "story": (coded(tales), 200)}


def laws(cfg, w, prompts: list[list[int]], said: list[list[int]]) -> np.ndarray:
  """Raw float64 log-probabilities (X, V) of the model at every generated token."""
  out = []
  for ids, more in zip(prompts, said, strict=True):
    token_1T = np.zeros((1, 512), np.int32)
    token_1T[0, : len(ids) + len(more)] = ids + more
    logp_TV = np.asarray(_logp(cfg, w, token_1T)[0], np.float64)
    out.append(logp_TV[len(ids) - 1 : len(ids) + len(more) - 1])
  return np.concatenate(out)


_logp = jax.jit(logp, static_argnums=0)


def tempered(logp_XV: np.ndarray, temperature: float) -> np.ndarray:
  """Log-probabilities at a temperature; at 0 all the probability is on the most likely token."""
  if temperature == 0.0:
    best_X1 = np.argmax(logp_XV, axis=-1)[:, None]
    return np.where(np.arange(logp_XV.shape[1]) == best_X1, 0.0, -np.inf)
  return scipy.special.log_softmax(logp_XV / temperature, axis=-1)


def agreement(law_XV: np.ndarray, other_XV: np.ndarray, rng: np.random.Generator) -> float:
  """How often two distributions draw the same token with the same noise, averaged over all rows."""
  hits = 0.0
  for law_V, other_V in zip(law_XV, other_XV, strict=True):
    noise_NV = rng.gumbel(size=(DRAWS, len(law_V)))
    same_N = np.argmax(law_V + noise_NV, axis=-1) == np.argmax(other_V + noise_NV, axis=-1)
    hits += np.mean(same_N)
  return hits / len(law_XV)


def decoded(both: SpeculativeDecoder, tok, todo: list[Request]) -> dict:
  """The ids of each text, the numbers of drafted and accepted tokens, and tokens per pass."""
  tokens = list(generate(both.engine, tok, todo, decoder=both))
  said = [[] for _ in todo]
  for token in tokens:
    said[token.prompt].append(token.id)
  later = [token for token in tokens if token.position > 0]  # the prompt's pass gives the first
  return {
    "said": said,
    "drafted": sum(token.drafted for token in tokens),
    "accepted": sum(token.accepted for token in tokens),
    "tokens_per_pass": len(later) / sum(token.new_pass for token in later),
  }


def evaluate(args):
  """Measure the shipped drafts on texts that their targets write, and append the results."""
  shape = EngineConfig(batch_size=4, max_seq_len=512, dtype="float32")
  for stage, folder in FOLDERS.items():
    tok = vocabulary.load(ASSETS / stage)
    models = {name: load(name) for name in (stage, folder)}
    plain, draft = (Engine.create(*pair, sampling.find("plain"), shape) for pair in models.values())
    both = SpeculativeDecoder(plain, DraftModel(draft), LENGTH, always=True)
    facts = {
      "benchmark": "demo_draft", "target": f"demo/{stage}", "draft": f"demo/{folder}",
      "width": draft.setup.cfg.width, "layers": draft.setup.cfg.layers,
      "parameters": weights.count(draft.setup.cfg), "target_parameters": weights.count(plain.setup.cfg),
      "bytes": sum(path.stat().st_size for path in (ASSETS / folder).iterdir()),
      "length": LENGTH,
    } | decode.machine()  # fmt: skip
    for kind, (ids, room) in prompts(tok, stage, args.seed).items():
      for temperature in TEMPERATURES:
        knobs = {"temperature": temperature}
        stop = (tok.end_of_text, tok.eot)
        todo = [Request(p, room, seed=i, stop=stop, knobs=knobs) for i, p in enumerate(ids)]
        seen = decoded(both, tok, todo)
        said = seen.pop("said")
        law_XV, other_XV = (
          tempered(laws(cfg, w, ids, said), temperature) for cfg, w in models.values()
        )
        line = facts | {
          "kind": kind, "temperature": temperature, "texts": len(ids), "tokens": len(law_XV),
          "total_variation": 0.5 * np.abs(np.exp(law_XV) - np.exp(other_XV)).sum(axis=-1).mean(),
          "agreement": agreement(law_XV, other_XV, np.random.default_rng(args.seed)),
        }  # fmt: skip
        print(commands.keep(train_demo.RESULTS / "demo_draft.jsonl", line | seen), flush=True)


def main():
  usual = {"steps": 1900, "batch": 4, "length": 320, "lr": 4e-3, "cool": 0.4, "every": 100}
  parser = train_demo.flags(__doc__, FOLDERS, "draft", **usual)
  parser.add_argument("--size", choices=SIZES, nargs="+", default=["small"])
  args = parser.parse_args()
  args.run.mkdir(parents=True, exist_ok=True)
  if args.stage == "export" and len(args.size) > 1:
    parser.error("one size can be shipped; give one --size")
  if args.stage in FOLDERS:
    with contextlib.suppress(KeyboardInterrupt):
      train(args)
  else:
    {"export": export, "evaluate": evaluate}[args.stage](args)


if __name__ == "__main__":
  main()
