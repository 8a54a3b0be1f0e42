"""Measure speculative decoding, and several samples of one prompt in a batch, against plain decoding.

  python benchmarks/paths.py --target=demo --out=benchmarks/results/paths.jsonl
  python benchmarks/paths.py --target=random --model=llama3_1b --text=free --drafter=draft --rounds=3

Part `speculation` decodes the same requests plainly and with drafts. Part `samples` (demo only) compares
eight samples of a prompt in one batch with one sample on an engine with a single row. The eight rows are on one
device, or split over --data devices, which on a CPU are its cores. stdout ends with one JSON object per way
(also appended to --out) and a table:

  tokens_per_pass  generated tokens after the first, per forward pass of the target
  acceptance       share of the drafted tokens that were accepted; `drafted`: drafted tokens per pass
  ratio            tokens/s relative to plain decoding, over whole calls of `generate`, prompts included
  cpu_ratio        the same per second of processor time (all threads), which is robust on a busy machine
  decode_ratio     as ratio, but from a text's first token to its last, without dispatches after its end
  drafting         share of the passes that had a draft
  same_text        whether every token equals that of plain decoding, as it must, up to rounding
  prefills         prompts fed; 1 for any number of samples
  limit            as ratio, for the matrix products of 8 rows alone: an upper bound
  prefix_bytes     bytes of the prompt's keys and values; prefix_copies: how often they are stored

Ways: `1` to `8` always draft that many tokens. `7, bar 0.65` ends a draft by the risk of its tokens. `race` is
the default of config.decoding.name=speculative, which chooses by timing, and `race, new` is the same on an
engine without earlier texts. `plain` is plain decoding against itself and shows the noise.

Why: on a shared machine only adjacent turns are comparable, so each turn of a way follows a turn of plain
decoding, and a ratio is a ratio of medians. Everything is compiled, and each way has run once, before timing.
Random weights have no smaller draft model, so we build one: the layers after the first --keep have their
output scaled by --echo, and the drafter is those first layers with the same embedding. The final norm is
multiplied by SHARP to give distributions with a few likely tokens (about 1.6 nats), as a trained model has.
Its repetitive text is greedy and restricted to ECHOES ids, so that it repeats.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

import decode

from entropix_jax import config, devices, sampling, settings
from entropix_jax.checkpoints import chat, checkpoint, vocabulary
from entropix_jax.cli import commands
from entropix_jax.decoding import best_of_n, groups, speculative
from entropix_jax.decoding.drafters import DraftModel, Ngram
from entropix_jax.decoding.race import Race
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.request import Request
from entropix_jax.errors import UserError
from entropix_jax.model import linear, sharding, weights
from entropix_jax.rows import Token
from entropix_jax.scheduler import generate

DEMO = settings.ASSETS / "demo"
TEXTS = ("repetitive", "free")
DRAFTERS = ("ngram", "draft", "base", "arbitrary")
SAMPLES = 8
# Prompts of the samples: the first SHORT tokens of a conversation, all of it, and LONG repetitions of it.
SHORT, LONG = 32, 4
SHARP, ECHOES = 5.0, 24

_FLAGS = commands.Flags()
_TARGET = _FLAGS.enum("target", "demo", ["demo", "random"], "Model that writes the text.")
_MODEL = _FLAGS.string("model", "llama3_1b", "Model shape of --target=random.")
_PART = _FLAGS.multi_enum(
  "part", ["speculation", "samples"], ["speculation", "samples"], "What to measure."
)
_DRAFTER = _FLAGS.multi_enum(
  "drafter",
  DRAFTERS,
  DRAFTERS,
  "Drafters; `arbitrary` is always wrong, `base` is the demo's base model.",
)
_TEXT = _FLAGS.multi_enum("text", TEXTS, TEXTS, "Kinds of text.")
_LENGTH = _FLAGS.multi_integer("length", [1, 2, 4, 8], "Tokens per draft.", 1, 32)
_WAY = _FLAGS.multi_string("way", [], "Measure only these ways.")
_BATCH = _FLAGS.integer("batch", 1, "Rows.", 1)
_CALLS = _FLAGS.integer("calls", 4, "Calls of generate per turn, each with --batch requests.", 1)
_TOKENS = _FLAGS.integer("tokens", 96, "Most tokens per answer.", 8)
_ROUNDS = _FLAGS.integer("rounds", 9, "Turns per way.", 1)
_KEEP = _FLAGS.integer("keep", 2, "Layers of the random target's drafter.", 1)
_ECHO = _FLAGS.float("echo", 0.04, "Output scale of the layers after --keep.", 0.0, 1.0)
_DATA = _FLAGS.multi_integer(
  "data", [1, 2], "Devices that the samples' rows are split over.", 1, SAMPLES
)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")

# -- targets and texts -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
  """A target model, its drafters and its requests."""

  name: str
  engine: Engine
  tokenizer: Any
  drafters: dict[str, Any]  # name -> function from a bar to a drafter
  texts: dict[str, list[list[Request]]]  # kind -> the requests of each call


class Ids:
  """A tokenizer that writes each id as its number."""

  def decode_bytes(self, ids: Sequence[int], show_control: bool = False) -> bytes:
    """The ids as text, separated by spaces."""
    del show_control
    return "".join(f"{i} " for i in ids).encode()


@dataclasses.dataclass(frozen=True)
class Arbitrary(Ngram):
  """Always drafts the maximum length, with ids unrelated to the text."""

  vocab: int = 1

  def draft(self, weights, memory, state, G: int, window: int):
    """(memory, draft_BG, count_B): a hash of the row's length."""
    del weights, window
    x_BG = (state.len_B[:, None] + jnp.arange(G)) * 7919 % 104_729
    return memory, x_BG % self.vocab, jnp.full_like(state.len_B, G)


def _common(cfg: config.ModelConfig) -> dict[str, Any]:
  return {
    "ngram": lambda bar: Ngram(),
    "arbitrary": lambda bar: Arbitrary(vocab=cfg.vocab),
  }


def demo() -> Target:
  """The instruct model; its repetitive text is its own first story, requested again."""
  shapes = config.EngineConfig(_BATCH.value, 256, "float32")

  def engine(stage: str) -> Engine:
    cfg = checkpoint.load_config(DEMO / stage)
    params = checkpoint.load_weights(DEMO / stage, cfg, jnp.float32)
    return Engine.create(cfg, params, sampling.find("plain"), shapes)

  target, coder = engine("instruct"), vocabulary.load(DEMO / "instruct")
  drafters = _common(target.setup.cfg)
  for name in ("draft", "base"):
    if name in _DRAFTER.value:
      drafters[name] = functools.partial(DraftModel, engine(name))
  form, stop = chat.choose(DEMO / "instruct", coder), checkpoint.stop_ids(DEMO / "instruct")
  animals = "cat dog owl fox duck hen bear mouse otter sheep".split()

  def request(talk: list[str], temperature: float, seed: int) -> Request:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)]
    knobs = {"temperature": temperature}
    return Request(form.encode(turns), _TOKENS.value, seed, stop=stop, knobs=knobs)

  def story(ask: str) -> str:
    told = generate(target, coder, [request([ask], 0.0, 0)])
    return "".join(token.text for token in told if token.id not in stop)

  # Both kinds begin with the same exchange, so that one attention window fits both.
  texts: dict[str, list[list[Request]]] = {kind: [] for kind in TEXTS}
  for call in range(_CALLS.value):
    ask = f"Tell me a story about a {animals[call % len(animals)]}."
    talk = [ask, story(ask)]
    seeds = range(call * _BATCH.value, (call + 1) * _BATCH.value)
    texts["repetitive"].append([request([*talk, ask], 0.0, seed) for seed in seeds])
    texts["free"].append([request([*talk, "Tell me another story."], 1.0, seed) for seed in seeds])
  return Target("demo", target, coder, drafters, texts)


def shallow(params: weights.Weights, keep: int, echo: float) -> weights.Weights:
  """The same weights with the outputs of the layers after the first `keep` scaled by `echo`."""
  quiet = functools.partial(jax.tree.map, lambda w: w * echo)
  behind = tuple(
    layer.replace(wo_QD=quiet(layer.wo_QD), wdown_FD=quiet(layer.wdown_FD))
    for layer in params.layers[keep:]
  )
  return params.replace(layers=params.layers[:keep] + behind, norm_D=params.norm_D * SHARP)


def drawn() -> Target:
  """Random weights of --model's shape; the drafter is the first layers of the same arrays."""
  if _MODEL.value not in config.PRESETS:
    raise UserError(
      f"There is no model {_MODEL.value!r}; --model is one of: {', '.join(config.PRESETS)}."
    )
  cfg, keep = config.PRESETS[_MODEL.value], _KEEP.value
  if keep >= cfg.layers:
    raise UserError(f"--keep={keep} leaves none of {cfg.layers} layers to disturb; lower it.")
  prompt = 32
  shapes = config.EngineConfig(_BATCH.value, prompt + _TOKENS.value, "float32")
  params = decode.random_weights(cfg, jnp.float32, finish=linear.transposer(jnp.float32))
  params = shallow(params, keep, _ECHO.value)
  target = Engine.create(cfg, params, sampling.find("plain"), shapes)
  drafters = _common(cfg)
  if "draft" in _DRAFTER.value:
    few = dataclasses.replace(cfg, layers=keep)
    first = params.replace(layers=params.layers[:keep])
    drafters["draft"] = functools.partial(
      DraftModel, Engine.create(few, first, target.setup.sampler, shapes)
    )
  rng = np.random.default_rng(0)
  ids = rng.choice(cfg.vocab, ECHOES, replace=False).tolist()
  kinds = {
    "repetitive": (ids, {"temperature": 0.0, "allowed": tuple(ids)}),
    "free": (range(cfg.vocab), {"temperature": 1.0}),
  }

  def request(kind: str, seed: int) -> Request:
    said, knobs = kinds[kind]
    return Request(rng.choice(said, prompt).tolist(), _TOKENS.value, seed, knobs=knobs)

  texts = {
    kind: [
      [request(kind, call * _BATCH.value + i) for i in range(_BATCH.value)]
      for call in range(_CALLS.value)
    ]
    for kind in TEXTS
  }
  return Target(_MODEL.value, target, Ids(), drafters, texts)


# -- turns -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
  """The tokens of some calls of `generate`, and how fast they came."""

  tokens: list[Token]
  rate: float  # tokens/s, prompts included
  cpu_rate: float  # tokens per second of processor time, of all threads of this process
  decode_rate: float  # tokens/s, after every row of the call has its first one


class Way:
  """One way to decode; `turn` runs it once."""

  def __init__(
    self, target: Target, decoder: PlainDecoder, always: bool | None = None, new: bool = False
  ):
    self.target, self.decoder, self.new = target, decoder, new
    self.always = always
    self.race = None if always is None else self._race()

  def _race(self) -> Race:
    race = self.decoder.race
    return Race(self.always, time.perf_counter, race.catches_up, race.first)

  def turn(self, calls: Sequence[Sequence[Request]]) -> Turn:
    """Run the requests of each call, one call after the other."""
    if self.new:
      self.race = self._race()
    if self.race:
      self.decoder.race = self.race
    every: list[Token] = []
    decoded, decode_s = 0, 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for requests in calls:
      engine, tokenizer = self.decoder.engine, self.target.tokenizer
      tokens = list(generate(engine, tokenizer, requests, decoder=self.decoder))
      begin = max(token.seconds for token in tokens if token.position == 0)
      decoded += sum(token.seconds > begin for token in tokens)
      decode_s += tokens[-1].seconds - begin
      every += tokens
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return Turn(every, len(every) / seconds, len(every) / cpu_s, decoded / decode_s)


def ways(target: Target, drafter: str, requests: list[Request]) -> dict[str, tuple[Way, dict]]:
  """Name -> (way, its settings), compiled for the requests."""
  make = target.drafters[drafter]
  model = drafter in ("draft", "base")
  default = speculative.Config()
  usual = (default.length, default.bar if model else 0.0)
  wanted = {str(length): (length, 0.0, True) for length in _LENGTH.value}
  if model:
    wanted[f"{default.length}, bar {default.bar}"] = (default.length, default.bar, True)
  wanted["race"] = wanted["race, new"] = (*usual, False)
  wanted["plain"] = (0, 0.0, None)
  if drafter == "arbitrary":
    wanted = {name: how for name, how in wanted.items() if how[:2] in (usual, (0, 0.0))}
  if _WAY.value:
    wanted = {name: how for name, how in wanted.items() if name in _WAY.value}
  if not wanted:
    raise UserError(f"--way names none of the ways that {drafter} goes; leave it out to see them.")
  decoders: dict[tuple[int, float], PlainDecoder] = {(0, 0.0): PlainDecoder(target.engine)}
  found = {}
  for name, (length, bar, always) in wanted.items():
    if (length, bar) not in decoders:
      always_here = (length, bar) != usual
      decoder = SpeculativeDecoder(target.engine, make(bar), length, always=always_here)
      decoder.compile(requests)
      decoders[length, bar] = decoder
    facts = {"length": length, "bar": bar if model and length else None, "always": always}
    found[name] = Way(target, decoders[length, bar], always, name == "race, new"), facts
  return found


def passes(tokens: Sequence[Token]) -> dict[str, float | None]:
  """Statistics of drafted and accepted tokens; prefill passes do not count."""
  later = [token for token in tokens if token.position > 0]
  count = sum(token.new_pass for token in later)
  drafted, kept = (sum(getattr(token, of) for token in later) for of in ("drafted", "accepted"))
  return {
    "passes": count,
    "tokens_per_pass": len(later) / max(count, 1),
    "drafted": drafted / max(count, 1),
    "acceptance": kept / drafted if drafted else None,
    "drafting": sum(token.drafted > 0 for token in later) / max(count, 1),
  }


def middle(turns: Sequence[Turn], of: str) -> float:
  """The median of a property of the turns."""
  return float(np.median([getattr(turn, of) for turn in turns]))


def speculation(target: Target) -> Iterator[dict[str, Any]]:
  """One line per drafter, text and way."""
  plain = Way(target, PlainDecoder(target.engine))
  for drafter in (name for name in _DRAFTER.value if name in target.drafters):
    chain = itertools.chain.from_iterable
    first = list(chain(chain(target.texts[kind] for kind in _TEXT.value)))
    PlainDecoder(target.engine).compile(first)
    contest = ways(target, drafter, first)
    for kind in _TEXT.value:
      calls = target.texts[kind]
      want = sorted((t.prompt, t.position, t.id) for t in plain.turn(calls).tokens)
      for way, _ in contest.values():
        way.turn(calls)
      turns: dict[str, list[tuple[Turn, Turn]]] = {name: [] for name in contest}
      for _ in range(_ROUNDS.value):
        for name, (way, _) in contest.items():
          turns[name].append((plain.turn(calls), way.turn(calls)))
      for name, (_, facts) in contest.items():
        theirs, ours = map(list, zip(*turns[name], strict=True))
        got = sorted((t.prompt, t.position, t.id) for t in ours[-1].tokens)
        yield {
          "part": "speculation",
          "target": target.name,
          "drafter": drafter,
          "text": kind,
          "way": name,
          **facts,
          **passes([token for turn in ours for token in turn.tokens]),
          "ratio": middle(ours, "rate") / middle(theirs, "rate"),
          "cpu_ratio": middle(ours, "cpu_rate") / middle(theirs, "cpu_rate"),
          "decode_ratio": middle(ours, "decode_rate") / middle(theirs, "decode_rate"),
          "plain_tokens_per_s": middle(theirs, "rate"),
          "tokens_per_s": middle(ours, "rate"),
          "same_text": got == want,
          "tokens": len(want),
          "calls": len(calls),
          "batch": _BATCH.value,
          "rounds": _ROUNDS.value,
          **({"keep": _KEEP.value, "echo": _ECHO.value} if target.name != "demo" else {}),
        }


# -- samples ---------------------------------------------------------------------------------------


class Counting(Engine):
  """An engine that counts its prefills."""

  fed = 0

  def run(self, program: Program, *args):
    """As `Engine.run`."""
    self.fed += program.verb in ("prompt", "prefill")
    return super().run(program, *args)


def limit(params: weights.Weights, rows: int) -> float:
  """Upper bound on the tokens/s of `rows` rows over those of one, from the matrix products alone."""
  matrices = [w for w in jax.tree.leaves(params) if w.ndim == 2]

  @jax.jit
  def products(x, matrices):
    return [x[:, : w.shape[0]] @ w for w in matrices]

  def seconds(n: int) -> float:
    x = jnp.ones((n, max(w.shape[0] for w in matrices)))
    spent = []
    for _ in range(200):
      start = time.perf_counter()
      jax.block_until_ready(products(x, matrices))
      spent.append(time.perf_counter() - start)
    return float(np.median(spent))

  return rows * seconds(1) / seconds(rows)


def samples(target: Target) -> Iterator[dict[str, Any]]:
  """One line per prompt and number of devices: SAMPLES samples in one batch against a single one."""
  # Without stop ids, so that both decode equally long and no row is idle after its end.
  request = dataclasses.replace(target.texts["free"][0][0], stop=())
  talk = tuple(request.ids)
  devices = [data for data in _DATA.value if data <= jax.device_count()]
  for ids in (talk[:SHORT], talk, talk * LONG):
    for data in devices:
      yield _samples(target, dataclasses.replace(request, ids=ids), data)


def _samples(target: Target, request: Request, data: int) -> dict[str, Any]:
  e, shape = target.engine, config.MeshConfig(data=data)
  # The cache size of configs/demo.py.
  shapes = dataclasses.replace(e.setup.config, batch_size=SAMPLES, max_seq_len=1024)
  mesh = sharding.mesh(shape, e.setup.cfg)
  params = e.weights if mesh is None else jax.device_put(e.weights, sharding.of(mesh, ""))
  many = Counting.create(e.setup.cfg, params, e.setup.sampler, shapes, shape)
  one = Engine.create(
    e.setup.cfg, e.weights, e.setup.sampler, dataclasses.replace(shapes, batch_size=1)
  )
  PlainDecoder(many).compile([request], several=True)
  PlainDecoder(one).compile([request])
  how = best_of_n.Config(n=SAMPLES, rule="logprob")

  def together() -> tuple[float, groups.Outcome]:
    start = time.perf_counter()
    *_, outcome = groups.run(many, target.tokenizer, [best_of_n.Group(request, how)])
    return outcome.tokens_total / (time.perf_counter() - start), outcome

  alone = Way(dataclasses.replace(target, engine=one), PlainDecoder(one))
  together(), alone.turn([[request]])
  before, turns = many.fed, []
  for _ in range(_ROUNDS.value):
    rate, outcome = together()
    turns.append((alone.turn([[request]]).rate, rate))
  single, total = np.median(turns, axis=0)
  return {
    "part": "samples",
    "target": target.name,
    "samples": SAMPLES,
    "data": data,
    "prompt": len(request.ids),
    "tokens": outcome.tokens_total,
    "prefills": (many.fed - before) / _ROUNDS.value,
    "ratio": float(total / single),
    "limit": limit(e.weights, SAMPLES),
    "plain_tokens_per_s": float(single),
    "tokens_per_s": float(total),
    "prefix_bytes": outcome.prefix_bytes,
    "prefix_copies": outcome.prefix_copies,
    "rounds": _ROUNDS.value,
  }


# -- the run ---------------------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]]) -> str:
  """The figures as readable text."""
  out = []
  found = [line for line in lines if line["part"] == "speculation"]
  if found:
    titles = {
      "tokens/pass": "tokens_per_pass", "kept": "acceptance", "drafted": "drafted",
      "drafting": "drafting", "ratio": "ratio", "cpu": "cpu_ratio", "decoding": "decode_ratio",
    }  # fmt: skip
    out.append(
      f"{'target':10} {'drafter':9} {'text':10} {'way':10}" + "".join(map("{:>12}".format, titles))
    )
  for line in found:
    cells = ["-" if line[key] is None else f"{line[key]:.2f}" for key in titles.values()]
    out.append(
      "{target:10} {drafter:9} {text:10} {way:10}".format(**line)
      + "".join(map("{:>12}".format, cells))
      + ("" if line["same_text"] else "  another text")
    )
  out += [
    "{samples} samples of a prompt of {prompt} tokens on {data} devices, {prefills:g} prefill: {ratio:.2f} times "
    "the tokens/s of one, {limit:.2f} times is what the products alone allow on one; it takes {prefix_bytes} "
    "bytes, {prefix_copies} times".format(**line)
    for line in lines
    if line["part"] == "samples"
  ]
  return "\n".join(out)


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  parts = [part for part in _PART.value if part == "speculation" or _TARGET.value == "demo"]
  if not parts:
    raise UserError("Samples are measured with the demo; leave --target=random out.")
  if "samples" in parts:
    devices.cores(config.MeshConfig(data=max(_DATA.value)))
  target = demo() if _TARGET.value == "demo" else drawn()
  # Taken now, so that later edits of the checkout do not change the recorded commit.
  place = decode.machine()
  lines = []
  for part in parts:
    for line in {"speculation": speculation, "samples": samples}[part](target):
      lines.append(line)
      facts = {"benchmark": "paths"} | line | {"dtype": target.engine.setup.dtype.name}
      print(commands.keep(out, facts | {"load": os.getloadavg()[0]} | place), flush=True)
  print(table(lines))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
