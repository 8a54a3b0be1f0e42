"""Measure the quantiles of a model's entropy and varentropy, and write a quadrant preset with thresholds from them.

  python scripts/calibrate.py --config=configs/demo.py --out=demo.json
  python scripts/calibrate.py --config=configs/llama3_1b.py --prompt_file=prompts.csv --out=mine.json --low_ent=q40 --high_ent=q99
  python -m entropix_jax.main --config=configs/demo.py --config.sampler.preset=demo.json --prompt="Hello!"

Prompts run at temperature 1 without filters, so that the text comes from the unmodified model. Each
threshold becomes a quantile of its signal over all generated tokens; `q50` is the median. The preset also
stores what --config.sampler sets besides, and the quantiles of every signal. Use at least 200 prompts that
resemble your own, but not those you will test with.

Why these quantiles: an instruct model is certain of most tokens, so `flow` may take the more certain half
(low_ent=q50). Entropy and varentropy rank tokens almost equally (rank correlation 0.997 on the demo model),
so `ask` (high entropy, low varentropy) can only occur where the two ranges overlap: low_varent=q90 with
ask_ent=q90. Fork and mist share the tokens above high_varent=q95, separated at high_ent=q95. The printed
table shows the resulting share of each branch.
"""

import dataclasses
import datetime
import pathlib
import random
import re
import sys
from collections.abc import Sequence

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # if the package is not installed

import demo_corpus
from tqdm import tqdm

from entropix_jax import metrics, sampling, settings
from entropix_jax.cli import commands, config_file, prompts
from entropix_jax.cli.commands import short
from entropix_jax.engine import record
from entropix_jax.errors import UserError
from entropix_jax.generate import raising
from entropix_jax.llm import LLM
from entropix_jax.sampling import presets, quadrant
from entropix_jax.session import Session

# Knob -> the signal it is compared with, and the default quantile.
THRESHOLDS = {
  "low_ent": ("entropy", "q50"),
  "low_varent": ("varentropy", "q90"),
  "ask_ent": ("entropy", "q90"),
  "high_ent": ("entropy", "q95"),
  "high_varent": ("varentropy", "q95"),
}
PERCENT = (1, 5, 10, 25, 50, 75, 90, 95, 99)
SIGNALS = ("entropy", "varentropy", *(f.name for f in dataclasses.fields(metrics.AttnStats)))

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
  match = re.fullmatch(r"q(\d+(?:\.\d+)?)", text)
  if not match or float(match[1]) > 100:
    raise UserError(f"--{flag}={text} is no quantile; write q50 for the median.")
  return float(match[1]) / 100


def demo_prompts(count: int, seed: int, is_chat: bool) -> list[str]:
  """Alternating problems and stories from the training part of the demo corpus."""
  rng = random.Random(f"calibrate/{seed}")
  makers = (demo_corpus.problem, demo_corpus.story)
  return [makers[i % 2](rng).prompt(is_chat) for i in range(count)]


def measure(session: Session, texts: Sequence[str], limit: int, seed: int):
  """Signal -> its float64 values over all tokens of the answers."""
  requests = [
    dataclasses.replace(session.ask(text, limit, seed), stream=i) for i, text in enumerate(texts)
  ]
  session.ready(requests)
  signals = [name for name in SIGNALS if name in record.columns(session.engine.setup)]
  rows = []
  with tqdm(total=len(requests), desc="prompts", disable=None) as bar:
    for token in raising(session.go(requests)):
      rows.append([token.numbers[name] for name in signals])
      bar.update(token.finish is not None)
  return dict(zip(signals, np.asarray(rows, np.float64).T, strict=True))


def shares(knobs: dict, values: dict[str, np.ndarray]) -> dict[str, float]:
  """Branch -> share of the tokens for which quadrant chooses it with these knobs."""
  config = sampling.configure(quadrant, knobs)
  ent, varent = (values[name].astype(np.float32) for name in ("entropy", "varentropy"))
  branch = np.asarray(quadrant.branches(config, ent, varent))
  count = np.bincount(branch, minlength=len(quadrant.BRANCHES))
  return {name: float(n / len(ent)) for name, n in zip(quadrant.BRANCHES, count, strict=True)}


def run(argv: list[str]) -> None:
  """Measure, write the preset, and print the resulting shares of the branches."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  if out is None or out.suffix != ".json":
    raise UserError("Give the preset to write as --out=FILE.json.")
  at = {knob: quantile(knob, flag.value) for knob, flag in _QUANTILES.items()}
  resolved = config_file.resolve(_CONFIG.value)
  if resolved.sampler != "quadrant":
    raise UserError("This calibrates the quadrant sampler; leave config.sampler.name alone.")
  for knob in at:
    if _CONFIG.value.sampler[knob] is not None:
      raise UserError(f"config.sampler.{knob} is what is calibrated; leave it out.")

  plain = dataclasses.replace(
    resolved,
    sampler="plain",
    knobs={"temperature": 1.0},
    engine=dataclasses.replace(resolved.engine, batch_size=_BATCH.value),
  )
  session = LLM.of(plain).session(plain)
  checkpoint = pathlib.Path(resolved.checkpoint).resolve()
  if _PROMPT_FILE.value:
    source = pathlib.Path(_PROMPT_FILE.value).name
    texts = [prompt.text for prompt in prompts.read(_PROMPT_FILE.value)]
  elif checkpoint.is_relative_to(settings.ASSETS.resolve() / "demo"):
    source = "scripts/demo_corpus.py, problems and stories of the training side in turn"
    texts = demo_prompts(_PROMPTS.value, _SEED.value, session.is_chat)
  else:
    raise UserError("Give prompts with --prompt_file; only the demo model has some of its own.")

  values = measure(session, texts, _MAX_NEW_TOKENS.value, _SEED.value)
  table = {
    name: {f"q{p}": short(np.quantile(x, p / 100)) for p in PERCENT} for name, x in values.items()
  }
  thresholds = {
    knob: short(np.quantile(values[signal], at[knob])) for knob, (signal, _) in THRESHOLDS.items()
  }
  knobs = resolved.knobs | thresholds
  tokens, name = len(values["entropy"]), "/".join(checkpoint.parts[-2:])
  became = shares(knobs, values)
  calibration = {
    "checkpoint": name,
    "prompts": len(texts),
    "prompt_source": source,
    "tokens": tokens,
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "temperature": 1.0,
    "seed": _SEED.value,
    "dtype": session.engine.setup.dtype.name,
    "attn_stats": resolved.engine.attn_stats,
    "date": datetime.date.today().isoformat(),
    "thresholds": {
      knob: f"{_QUANTILES[knob].value} of {signal}" for knob, (signal, _) in THRESHOLDS.items()
    },
    "branches": {branch: short(share) for branch, share in became.items()},
    "quantiles": table,
  }
  about = (
    f"Thresholds of quadrant as quantiles over {tokens} tokens of {name} at temperature 1; "
    f"calibration says which. Entropy in nats, varentropy in nats^2."
  )
  presets.save(out, presets.Preset("quadrant", about, knobs, calibration))

  print(f"{tokens} tokens of {len(texts)} prompts, {name}")
  print(f"{'':16}" + "".join(f"{f'q{p}':>10}" for p in PERCENT))
  for signal, row in table.items():
    print(f"{signal:16}" + "".join(f"{x:>10.4g}" for x in row.values()))
  before = shares(resolved.knobs, values)
  print(f"{'branch':16}{'this preset':>13}{'without it':>13}")
  for branch in quadrant.BRANCHES:
    print(f"{branch:16}{became[branch]:>13.2%}{before[branch]:>13.2%}")
  print(f"wrote {out}; use it with --config.sampler.preset={out}", flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
