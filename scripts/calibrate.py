"""Measure the quantiles of a model's entropy and varentropy, and write a quadrant preset with thresholds from them.

  python scripts/calibrate.py --config=configs/demo.py --out=demo.json
  python scripts/calibrate.py --config=configs/llama3_1b.py --prompt_file=prompts.csv --out=mine.json --low_ent=q40 --high_ent=q99
  python -m entropix_jax.main --config=configs/demo.py --config.sampler.preset=demo.json --prompt="Hello!"

Each threshold becomes a quantile of its signal over all generated tokens; `q50` is the median. The texts come
from the sampler that is calibrated. Its thresholds change the texts, so it generates them anew with each set
of thresholds until every branch has its promised share within 2 points, or for 5 rounds. Every fifth prompt is
held out; the final thresholds are checked on texts of these. The preset also stores what --config.sampler
sets besides, the quantiles of every signal, the shares that were promised and found, and the model's shape: moved
into entropix_jax/sampling/presets, it is the default for that model.

How many tokens: tokens of one text depend on one another, so the 95% interval of a share comes from its spread
over the texts. A warning names the number of tokens that would make every interval narrower than 5 points.
Use at least 200 prompts that resemble your own, but not those you will test with.

Why these quantiles: an instruct model is certain of most tokens, so `flow` may take the more certain half
(low_ent=q50). Entropy and varentropy rank tokens almost equally (rank correlation 0.997 on the demo model),
so `ask` (high entropy, low varentropy) can only occur where the two ranges overlap: low_varent=q90 with
ask_ent=q90. Fork and mist share the tokens above high_varent=q95, separated at high_ent=q95. The printed
table shows the resulting share of each branch.
"""

import dataclasses
import pathlib
import random
import sys
from collections.abc import Sequence

import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "benchmarks")]

import decode
import demo_corpus
from tqdm import tqdm

from entropix_jax import sampling, settings
from entropix_jax.cli import commands, config_file, prompts
from entropix_jax.cli.commands import short
from entropix_jax.engine import record
from entropix_jax.engine.request import Request
from entropix_jax.errors import UserError
from entropix_jax.llm import LLM
from entropix_jax.sampling import presets, quadrant
from entropix_jax.sampling.calibration import (
  SIGNALS,
  THRESHOLDS,
  decided,
  doubt,
  intervals,
  shares,
  thresholds,
)
from entropix_jax.scheduler import raising
from entropix_jax.session import Session

HOLDS = 0.02  # the most by which a share may differ from its promise on the prompts that it was measured on
ROUNDS = 5  # of texts, at most
PERCENT = (1, 5, 10, 25, 50, 75, 90, 95, 99)

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_PROMPT_FILE = _FLAGS.string(
  "prompt_file", None, "CSV, JSONL or text file; not needed for the demo model."
)
_PROMPTS = _FLAGS.integer("prompts", 256, "Number of generated prompts for the demo model.", 1)
_OUT = _FLAGS.string("out", None, "Preset file to write; ends in .json.")
_MAX_NEW_TOKENS = _FLAGS.integer("max_new_tokens", 256, "Most new tokens per prompt.", 1)
_SEED = _FLAGS.integer("seed", 0, "Seed of texts and generated prompts.", 0)
_BATCH = _FLAGS.integer("batch", 32, "Rows; replaces config.engine.batch_size.", 1)
_QUANTILES = {
  knob: _FLAGS.string(knob, q, f"Quantile of {signal}.") for knob, (signal, q) in THRESHOLDS.items()
}


def quantile(flag: str, text: str) -> float:
  """0.5 of "q50"."""
  try:
    return sampling.quantile(text) / sampling.WHOLE
  except ValueError:
    raise UserError(f"--{flag}={text} is no quantile; write q50 for the median.") from None


def demo_prompts(count: int, seed: int, is_chat: bool) -> list[str]:
  """Alternating problems and stories from the training part of the demo corpus."""
  rng = random.Random(f"calibrate/{seed}")
  makers = (demo_corpus.problem, demo_corpus.story)
  return [makers[i % 2](rng).prompt(is_chat) for i in range(count)]


def measure(session: Session, requests: Sequence[Request], knobs: dict) -> dict[str, np.ndarray]:
  """Generate with these knobs; signal -> its float64 value at each token, and `text` and `branch`, two indices."""
  signals = [name for name in SIGNALS if name in record.columns(session.engine.setup)]
  rows = []
  with tqdm(total=len(requests), desc="prompts", disable=None) as bar:
    for token in raising(session.go([dataclasses.replace(r, knobs=knobs) for r in requests])):
      if token.branch in quadrant.BRANCHES:  # not an injected token
        branch = quadrant.BRANCHES.index(token.branch)
        rows.append([*(token.numbers[name] for name in signals), token.prompt, branch])
      bar.update(token.finish is not None)
  if not rows:
    raise UserError("No token counts, since all were injected; raise --max_new_tokens.")
  return dict(zip((*signals, "text", "branch"), np.asarray(rows, np.float64).T, strict=True))


def calibrate(session: Session, requests: Sequence[Request], at: dict[str, float], fixed: dict):
  """Generate and set thresholds in turn until the shares hold, for ROUNDS at most.

  Returns: knobs, the values that they are quantiles of, the promised shares, the number of rounds, whether the shares held.
  """
  knobs, promised, values = fixed, None, {}
  for rounds in range(1, ROUNDS + 1):
    before, values = values, measure(session, requests, knobs)
    found = shares(values["branch"])
    if promised and all(abs(found[name] - promised[name]) <= HOLDS for name in found):
      return knobs, before, promised, rounds, True
    knobs = fixed | {name: short(x) for name, x in thresholds(values, at).items()}
    promised = shares(decided(knobs, values))
  return knobs, values, promised, rounds, False


def run(argv: list[str]) -> None:
  """Measure, write the preset, and print the resulting shares of the branches."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT, whole=True)
  if out is None or out.suffix != ".json":
    raise UserError("Give the preset to write as --out=FILE.json.")
  at = {knob: quantile(knob, flag.value) for knob, flag in _QUANTILES.items()}
  resolved = config_file.resolve(_CONFIG.value)
  if resolved.sampler != "quadrant":
    raise UserError("This calibrates the quadrant sampler; leave config.sampler.name alone.")
  for knob in at:
    if _CONFIG.value.sampler[knob] is not None:
      raise UserError(f"config.sampler.{knob} is what is calibrated; leave it out.")
  if any(isinstance(value, str) for value in resolved.knobs.values()):
    raise UserError(
      "This measures thresholds that are numbers; leave out the preset or the knob with quantiles."
    )

  engine = dataclasses.replace(resolved.engine, batch_size=_BATCH.value)
  # Without a preset the first round has the original thresholds, not those that ship for the model.
  preset = "" if resolved.preset == settings.AUTO else resolved.preset
  resolved = dataclasses.replace(resolved, engine=engine, preset=preset)
  session = LLM.of(resolved).session(resolved)
  checkpoint = pathlib.Path(resolved.checkpoint).resolve()
  if _PROMPT_FILE.value:
    source = pathlib.Path(_PROMPT_FILE.value).name
    texts = [prompt.text for prompt in prompts.read(_PROMPT_FILE.value)]
  elif checkpoint.is_relative_to(settings.ASSETS.resolve() / "demo"):
    source = "scripts/demo_corpus.py, problems and stories of the training side in turn"
    texts = demo_prompts(_PROMPTS.value, _SEED.value, session.is_chat)
  else:
    raise UserError("Give prompts with --prompt_file; only the demo model has some of its own.")

  requests = [session.ask(text, _MAX_NEW_TOKENS.value, _SEED.value) for text in texts]
  session.ready(requests)
  places = range(len(requests))
  held_out = places[4::5] or places[1:][-1:]  # an only prompt cannot be held out
  kept = [requests[i] for i in held_out]
  used = [requests[i] for i in places if i not in held_out]
  knobs, values, promised, rounds, settled = calibrate(session, used, at, resolved.knobs)
  tokens, name = len(values["entropy"]), "/".join(checkpoint.parts[-2:])
  branch, text = decided(knobs, values), values["text"]
  warnings = [doubt(branch, text)]
  if not settled:
    warnings.append(f"The shares did not settle in {ROUNDS} rounds; give more prompts.")
  checked, facts = {}, "No prompt was held out."
  if kept:
    seen = measure(session, kept, knobs)
    mine, spans = intervals(branch, text), intervals(seen["branch"], seen["text"])
    checked = {
      b: {"promised": promised[b], "found": share, "low": spans[b][0], "high": spans[b][1]}
      for b, share in shares(seen["branch"]).items()
    }
    facts = ", ".join(
      f"{b} {x['promised']:.0%} promised and {x['found']:.0%} found ({x['low']:.0%} to {x['high']:.0%})"
      for b, x in checked.items()
    )
    facts = f"Shares on {len(kept)} held-out prompts, with 95% intervals: {facts}."
    wrong = [b for b in spans if spans[b][0] > mine[b][1] or spans[b][1] < mine[b][0]]
    if wrong:
      words = f"The promised share of {', '.join(wrong)} does not hold on the held-out prompts"
      warnings.append(f"{words}; give more prompts.")
  table = {
    signal: {f"q{p}": short(float(np.quantile(x, p / 100))) for p in PERCENT}
    for signal, x in values.items()
    if signal in SIGNALS
  }
  calibration = {
    "checkpoint": name,
    "prompts": len(used),
    "prompt_source": source,
    "tokens": tokens,
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "rounds": rounds,
    "seed": _SEED.value,
    "dtype": session.engine.setup.dtype.name,
    "attn_stats": resolved.engine.attn_stats,
    **{key: decode.machine()[key] for key in ("date", "commit")},
    "thresholds": {
      knob: f"{_QUANTILES[knob].value} of {signal}" for knob, (signal, _) in THRESHOLDS.items()
    },
    "branches": short(promised),
    "held_out": {"prompts": len(kept), "branches": short(checked)},
    "quantiles": table,
  }
  about = (
    f"Thresholds of quadrant as quantiles over {tokens} tokens that it generated with {name}; calibration says "
    f"which. Entropy in nats, varentropy in nats^2. {facts}"
  )
  model = presets.shape(session.model.cfg)
  presets.save(out, presets.Preset("quadrant", about, knobs, calibration, model))

  print(f"{tokens} tokens of {len(used)} prompts, {name}; texts generated {rounds} times")
  print(f"{'':16}" + "".join(f"{f'q{p}':>10}" for p in PERCENT))
  for signal, row in table.items():
    print(f"{signal:16}" + "".join(f"{x:>10.4g}" for x in row.values()))
  before = shares(decided(resolved.knobs, values))
  print(f"{'branch':12}{'without it':>12}{'promised':>12}{'held out':>12}   95% interval")
  for b in quadrant.BRANCHES:
    x = checked.get(b)
    tail = f"{x['found']:>12.2%}   {x['low']:.2%} to {x['high']:.2%}" if x else f"{'none':>12}"
    print(f"{b:12}{before[b]:>12.2%}{promised[b]:>12.2%}{tail}")
  for warning in filter(None, warnings):
    commands.say(f"warning: {warning}")
  print(f"wrote {out}; use it with --config.sampler.preset={out}", flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
