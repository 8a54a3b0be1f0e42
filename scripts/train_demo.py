"""Train the demo checkpoints that ship in entropix_jax/assets/demo: tokenizer, base, instruct.

Why: the demo must use the same code as Llama 3, so it needs a real Llama checkpoint, small enough to ship
and good enough on its corpus (scripts/demo_corpus.py) for a sampler to help or hurt. Training uses the
forward pass of inference. Everything is determined by --seed, and an interrupted run resumes. Needs optax,
which comes with flax. The shipped tokenizer and base model are older than the last change to the corpus's
chats (docs/log.md), so a new run gets a different tokenizer.

  export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
  python scripts/train_demo.py --stage=base --level=1 --steps=2600 --stop=1200
  python scripts/train_demo.py --stage=base --level=2 --steps=2600 --length=320 --batch=14
  python scripts/train_demo.py --stage=base --steps=2800 --cool=0.0715 --lr=1.5e-3 --length=320 --batch=14
  python scripts/train_demo.py --stage=instruct --steps=800 --lr=1e-3 --length=320 --batch=14
  python scripts/train_demo.py --stage=export
  python scripts/train_demo.py --stage=evaluate
"""

import argparse
import contextlib
import functools
import json
import pathlib
import random
import re
import shutil
import time
from collections.abc import Iterable, Sequence

import demo_corpus
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import scipy.stats
import tokenizers
import tqdm

from entropix_jax import config, files, sampling
from entropix_jax.checkpoints import chat, checkpoint, tokenizer, vocabulary
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.model import llama, weights
from entropix_jax.scheduler import generate

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = ROOT / "entropix_jax" / "assets" / "demo"
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("base", "instruct")

# -- the tokenizer -------------------------------------------------------------------------------

RANKS = 768  # 256 bytes and 512 merges; Llama 3's 256 control tokens come after them


def train_tokenizer(texts: Iterable[str], path: pathlib.Path) -> None:
  """Byte-pair encoding with Llama 3's control tokens; writes tokenizer.json.

  Digits and line ends are never merged: numbers are read digit by digit, and a line end at the end of a
  prompt does not change the tokens before it.
  """
  pre = tokenizers.pre_tokenizers
  split = pre.Split(tokenizers.Regex(vocabulary.LLAMA3_PATTERN), "isolated")
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = pre.Sequence(
    [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=RANKS, initial_alphabet=pre.ByteLevel.alphabet()
  )
  pieces = (piece for text in texts for piece, _ in split.pre_tokenize_str(text))
  mergeable = (piece for piece in pieces if not re.search(r"[\d\n]", piece))
  library.train_from_iterator(mergeable, trainer)
  library.add_special_tokens([*vocabulary.llama3_special(RANKS)])
  bos = "<|begin_of_text|>"
  library.post_processor = tokenizers.processors.TemplateProcessing(
    f"{bos} $A", None, [(bos, library.token_to_id(bos))]
  )
  write(path, library.to_str().encode())


def load_tokenizer(run: pathlib.Path, seed: int) -> tokenizer.Tokenizer:
  """The run's tokenizer, which the first call trains."""
  path = run / "tokenizer.json"
  if not path.exists():
    rng = random.Random(f"tokenizer/{seed}")
    texts = [demo_corpus.document(rng, kinds=demo_corpus.LEVELS[1]) for _ in range(30_000)]
    texts += [message["content"] for _ in range(5_000) for message in demo_corpus.chat(rng)]
    train_tokenizer(texts, path)
  return vocabulary.load(run)


@functools.cache
def chat_format(tok: tokenizer.Tokenizer) -> chat.Format:
  """Llama 3's, without a system message."""
  return chat.Format(tok, chat.LLAMA3, "Llama 3's chat format", {})


# -- data ----------------------------------------------------------------------------------------

Tokens = tuple[list[int], list[bool]]  # ids, and whether each is trained on


def dialog(tok: tokenizer.Tokenizer, messages: list[demo_corpus.Message]) -> Tokens:
  """A chat; the tokens to learn are those of the assistant's turns, including their end."""
  ids = chat_format(tok).encode(messages, add_generation_prompt=False)
  learn = [False] * len(ids)
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      begin = len(chat_format(tok).encode(messages[:i]))
      end = len(chat_format(tok).encode(messages[: i + 1], add_generation_prompt=False))
      learn[begin:end] = [True] * (end - begin)
  return ids, learn


def sample(tok, stage: str, rng: random.Random, held_out: bool, kinds: Sequence[str]) -> Tokens:
  """One document or chat."""
  if stage == "instruct":
    return dialog(tok, demo_corpus.chat(rng, held_out))
  ids = [*chat.plain(tok, demo_corpus.document(rng, held_out, kinds)), tok.end_of_text]
  return ids, [True] * len(ids)


def rows(
  tok: tokenizer.Tokenizer,
  stage: str,
  key: str,
  count: int,
  length: int,
  held_out: bool = False,
  kinds: Sequence[str] = tuple(demo_corpus.KINDS),
):
  """(token_BT, learn_BT) of `count` rows of packed documents; the last document of a row is cut off."""
  rng = random.Random(key)
  token = np.zeros((count, length), np.int32)
  learn = np.zeros((count, length), bool)
  for row in range(count):
    ids, flags = [], []
    while len(ids) < length:
      more_ids, more_flags = sample(tok, stage, rng, held_out, kinds)
      ids += more_ids
      flags += more_flags
    token[row], learn[row] = ids[:length], flags[:length]
  return token, learn


# -- training ------------------------------------------------------------------------------------

CFG = config.ModelConfig(
  vocab=RANKS + 256, width=192, ffn=448, layers=5, heads=6, kv_heads=2, head_dim=32, tied=True,
  max_position=2048,
  rope=config.RopeConfig(10_000.0, kind="llama3", factor=8.0, original_max_position=512),
)  # fmt: skip


def loss_sum(cfg, w, token_BT, learn_BT):
  """(summed next-token loss in nats over the tokens to learn, their number)."""
  x_BTD, _, _ = llama.forward(cfg, w, token_BT[:, :-1])
  logp = jax.nn.log_softmax(llama.unembed(w, x_BTD))
  picked_BT = jnp.take_along_axis(logp, token_BT[:, 1:, None], axis=-1)[..., 0]
  learn_BT = learn_BT[:, 1:].astype(jnp.float32)
  return -jnp.sum(picked_BT * learn_BT), jnp.sum(learn_BT)


def mean_loss(cfg, w, token_BT, learn_BT):
  total, count = loss_sum(cfg, w, token_BT, learn_BT)
  return total / jnp.maximum(count, 1.0)


def optimizer(
  peak: float, steps: int, cool: float, warm: int = 100
) -> optax.GradientTransformation:
  """Muon for matrices (scaled as in arXiv:2502.16982, to share AdamW's learning rate), AdamW for the rest.

  The rate warms up over `warm` steps, stays at `peak`, and falls linearly to zero in the last `cool` of the steps.
  """
  cooling = int(steps * cool)
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warm),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, 0.0, cooling),
    ],
    [warm, steps - cooling],
  )
  dims = optax.contrib.MuonDimensionNumbers

  def specs(w: weights.Weights):
    layer = weights.Layer(
      attn_norm_D=None,
      ffn_norm_D=None,
      **{name: dims(0, 1) for name in weights.LAYER_SOURCES if name.startswith("w")},
    )
    return weights.Weights(
      embed_VD=None, layers=(layer,) * len(w.layers), norm_D=None, head_DV=None
    )

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule, muon_weight_dimension_numbers=specs, consistent_rms=0.2, weight_decay=0.1
    ),
  )


def write(path: pathlib.Path, data: bytes):
  """Write a file completely or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    file.write(data)


def train(args, tok):
  stage, cfg = args.stage, CFG
  opt = optimizer(args.lr, args.steps, args.cool)
  w = weights.random(cfg, jnp.float32, args.seed)
  state = {"weights": w, "opt": opt.init(w), "step": 0, "seconds": 0.0}
  path = args.run / f"{stage}.state"
  if path.exists():
    state = flax.serialization.from_bytes(state, path.read_bytes())
  elif stage == "instruct":
    base = flax.serialization.msgpack_restore((args.run / "base.state").read_bytes())
    state["weights"] = flax.serialization.from_state_dict(w, base["weights"])
  state = jax.tree.map(jnp.asarray, state) | {
    "step": int(state["step"]),
    "seconds": float(state["seconds"]),
  }

  # Rows are split over the devices: two single-threaded CPU devices synchronise once per step, but two
  # threads of one device would synchronise at every matrix.
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=whole)
  def update(w, opt_state, token_BT, learn_BT):
    loss, grad = jax.value_and_grad(functools.partial(mean_loss, cfg))(w, token_BT, learn_BT)
    change, opt_state = opt.update(grad, opt_state, w)
    return optax.apply_updates(w, change), opt_state, loss

  held_loss = jax.jit(functools.partial(mean_loss, cfg))
  held = rows(tok, stage, f"held/{args.seed}", 64, args.length + 1, held_out=True)
  tasks = problems(args.seed, 6)
  w, opt_state = jax.device_put((state["weights"], state["opt"]), whole)
  first, last = state["step"], args.stop or args.steps
  began, spent, losses = time.time(), state["seconds"], []
  shard = 32  # steps whose rows are generated together
  bar = tqdm.tqdm(range(first, last), initial=first, total=last, mininterval=10)
  for step in bar:
    if step == first or step % shard == 0:
      key = f"{stage}/{args.seed}/{step // shard}"
      kinds = demo_corpus.LEVELS[args.level]
      token, learn = rows(tok, stage, key, shard * args.batch, args.length + 1, kinds=kinds)
    here = slice(step % shard * args.batch, (step % shard + 1) * args.batch)
    w, opt_state, loss = update(w, opt_state, *jax.device_put((token[here], learn[here]), split))
    losses.append(loss)
    done = step + 1
    if done % args.every == 0 or done == last:
      mean = float(jnp.mean(jnp.stack(losses)))
      losses = []
      seconds = spent + time.time() - began
      solved, _, _ = solve(cfg, w, tok, stage, tasks)
      line = {
        "stage": stage, "step": done, "tokens": done * args.batch * args.length,
        "loss": round(mean, 4), "held_out_loss": round(float(held_loss(w, *held)), 4),
        "held_out_solved": round(float(np.mean(solved)), 4), "seconds": round(seconds),
      }  # fmt: skip
      bar.set_postfix_str(
        f"loss {mean:.3f} held {line['held_out_loss']:.3f} solved {line['held_out_solved']:.2f}"
      )
      files.append(args.run / f"{stage}.jsonl", json.dumps(line))
      state = {"weights": w, "opt": opt_state, "step": done, "seconds": seconds}
      write(path, flax.serialization.to_bytes(state))


# -- evaluation ----------------------------------------------------------------------------------


def problems(seed: int, per_kind: int) -> list[demo_corpus.Problem]:
  """Distinct held-out problems, `per_kind` of each kind where there are as many."""
  found: dict[tuple, demo_corpus.Problem] = {}
  for kind in demo_corpus.KINDS:
    rng = random.Random(f"held-out/{seed}/{kind}")
    mine, tries = {}, 0
    while len(mine) < per_kind and tries < 2_000:
      task = demo_corpus.problem(rng, True, (kind,))
      mine.setdefault((kind, *task.numbers), task)
      tries += 1
    found |= mine
  return list(found.values())


@functools.cache
def engine(cfg) -> Engine:
  """An engine for models of this shape; its weights are set before each use."""
  shapes = config.EngineConfig(batch_size=64, max_seq_len=512, dtype="float32")
  return Engine.create(cfg, weights.random(cfg, jnp.float32), sampling.find("plain"), shapes)


def encode(tok, stage: str, asks: list[str]) -> tuple[list[list[int]], int]:
  """(ids of each plain prompt (base) or user message (instruct), the id that ends an answer)."""
  if stage == "base":
    return [chat.plain(tok, ask) for ask in asks], tok.end_of_text
  return [chat_format(tok).encode([{"role": "user", "content": ask}]) for ask in asks], tok.eot


def complete(cfg, w, tok, stage: str, asks: list[str], room: int) -> tuple[list[str], np.ndarray]:
  """(greedy answers to plain prompts (base) or user messages (instruct), which of them ended)."""
  prompts, stop = encode(tok, stage, asks)
  engine(cfg).weights = jax.device_put(w, jax.devices()[0])
  greedy = {"temperature": 0.0}
  requests = [Request(ids, room, stop=(stop,), knobs=greedy) for ids in prompts]
  said, ended = [""] * len(asks), np.zeros(len(asks), bool)
  for token in generate(engine(cfg), tok, requests):
    said[token.prompt] += token.text
    ended[token.prompt] |= token.finish == "stop"
  return said, ended


def solve(cfg, w, tok, stage: str, tasks) -> tuple[np.ndarray, list[str], np.ndarray]:
  """(which problems are solved, the answers, which answers ended)."""
  asks = [task.prompt(stage == "instruct") for task in tasks]
  said, ended = complete(cfg, w, tok, stage, asks, room=96)
  right = [
    demo_corpus.extract_answer(text) == task.answer for text, task in zip(said, tasks, strict=True)
  ]
  return np.array(right), said, ended


def interval(right: int, total: int) -> list[float]:
  """Wilson's 95 % confidence interval of a proportion."""
  found = scipy.stats.binomtest(right, total).proportion_ci(method="wilson")
  return [round(float(end), 4) for end in (found.low, found.high)]


def evaluate(args, tok):
  """Evaluate the exported checkpoints greedily on held-out problems and stories, and write the results."""
  tasks = problems(args.seed + 1, 24)
  kinds = np.array([task.kind for task in tasks])
  rng = random.Random(f"stories/{args.seed}")
  tales = [demo_corpus.story(rng, want_held_out=True) for _ in range(100)]
  lines = []

  def note(stage: str, what: str, kind: str, hits: np.ndarray):
    count, total = int(hits.sum()), len(hits)
    line = {"stage": stage, "what": what, "kind": kind, "count": count, "of": total}
    lines.append(line | {"share": round(count / total, 4), "interval95": interval(count, total)})
    print(lines[-1])

  for stage in STAGES:
    cfg = checkpoint.load_config(ASSETS / stage)
    w = checkpoint.load_weights(ASSETS / stage, cfg, jnp.float32)
    right, said, ended = solve(cfg, w, tok, stage, tasks)
    note(stage, "solved", "all", right)
    note(stage, "ended by itself", "all", ended)
    for kind in demo_corpus.KINDS:
      note(stage, "solved", kind, right[kinds == kind])
    for wrong in np.flatnonzero(~right)[::12]:
      print(f"  wrong: {tasks[wrong].question} -> {said[wrong].strip()}")
    asks = [tale.prompt(stage == "instruct") for tale in tales]
    told, ended = complete(cfg, w, tok, stage, asks, room=200)
    note(stage, "ended by itself", "story", ended)
    if stage == "instruct":
      kept = [
        tale.hero in text and tale.thing in text for tale, text in zip(tales, told, strict=True)
      ]
      note(stage, "has what was asked for", "story", np.array(kept))
    for ask, text in zip(asks[:4], told, strict=False):
      print(f"--- {ask}\n{text.strip()}")
  write(RESULTS / "demo_heldout.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


# -- checkpoints ---------------------------------------------------------------------------------


def ship(folder: pathlib.Path, cfg, w, stage: str, tok: tokenizer.Tokenizer, source: pathlib.Path):
  """Write a Hugging Face folder in bfloat16, with the tokenizer of the folder `source`, and read it back."""
  w = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), w)
  ends = tok.end_of_text if stage == "base" else [tok.end_of_text, tok.eot]
  marks = {"bos_token_id": tok.bos, "eos_token_id": ends}
  checkpoint.save(folder, cfg, w, jnp.bfloat16, **marks)
  back = checkpoint.load_weights(folder, cfg, jnp.bfloat16)
  for ours, theirs in zip(jax.tree.leaves(w), jax.tree.leaves(back), strict=True):
    assert ours.tobytes() == theirs.tobytes()
  write(folder / "generation_config.json", (json.dumps(marks, indent=2) + "\n").encode())
  known = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
  if stage == "instruct":
    known |= {"eos_token": "<|eot_id|>", "chat_template": chat.LLAMA3}
  write(folder / "tokenizer_config.json", (json.dumps(known, indent=2) + "\n").encode())
  if source.resolve() != folder.resolve():
    shutil.copy(source / "tokenizer.json", folder)


def export(args, tok):
  """Write the Hugging Face folders and the training curve."""
  for stage in STAGES:
    like = weights.random(CFG, jnp.float32)
    saved = flax.serialization.msgpack_restore((args.run / f"{stage}.state").read_bytes())
    w = flax.serialization.from_state_dict(like, saved["weights"])
    ship(ASSETS / stage, CFG, w, stage, tok, args.run)
  curves = [(args.run / f"{stage}.jsonl").read_bytes() for stage in STAGES]
  write(RESULTS / "demo_training.jsonl", b"".join(curves))


def flags(doc: str, stages: Sequence[str], run: str, **defaults: float) -> argparse.ArgumentParser:
  """The flags of a training script, whose files lie in runs/`run`."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("--stage", choices=(*stages, "export", "evaluate"), required=True)
  parser.add_argument("--run", type=pathlib.Path, default=ROOT / "runs" / run)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int)
  parser.add_argument("--stop", type=int, help="pause after this step, to resume with other flags")
  parser.add_argument("--batch", type=int, help="rows per step")
  parser.add_argument("--length", type=int, help="tokens per row")
  parser.add_argument("--lr", type=float, help="peak learning rate")
  parser.add_argument("--cool", type=float, help="fraction of steps with a falling rate")
  parser.add_argument("--every", type=int, help="steps per line of the loss curve")
  parser.set_defaults(**defaults)
  return parser


def main():
  usual = {"steps": 2600, "batch": 28, "length": 160, "lr": 3e-3, "cool": 0.35, "every": 250}
  parser = flags(__doc__, STAGES, "demo", **usual)
  parser.add_argument("--level", type=int, choices=demo_corpus.LEVELS, default=3)
  args = parser.parse_args()
  tok = load_tokenizer(args.run, args.seed)
  if args.stage == "export":
    export(args, tok)
  elif args.stage == "evaluate":
    evaluate(args, tok)
  else:
    with contextlib.suppress(KeyboardInterrupt):
      train(args, tok)


if __name__ == "__main__":
  main()
