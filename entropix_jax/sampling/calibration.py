"""Thresholds of the quadrant sampler as quantiles of what a model's texts show, and how sure their shares are.

`scripts/calibrate.py` measures with these over many prompts, and the server over the texts of a page.
Values are {signal: its value at each token}, with `text`, the index of each token's text, where intervals are asked for.
"""

import dataclasses
import math
import types
from collections.abc import Mapping

import numpy as np

from entropix_jax import metrics, sampling
from entropix_jax.sampling import quadrant

# Knob -> the signal it is compared with, and the default quantile.
THRESHOLDS = {
  "low_ent": ("entropy", "q50"),
  "low_varent": ("varentropy", "q90"),
  "ask_ent": ("entropy", "q90"),
  "high_ent": ("entropy", "q95"),
  "high_varent": ("varentropy", "q95"),
}
WIDTH = 0.05  # the widest 95% interval of a promised share that passes without a warning
SIGNALS = ("entropy", "varentropy", *(f.name for f in dataclasses.fields(metrics.AttnStats)))
_PAD = 1024  # tokens: branches are computed for multiples of it, so that few sizes are compiled


def thresholds(values: Mapping[str, np.ndarray], at: Mapping[str, float]) -> dict[str, float]:
  """Knob -> the quantile `at`, from 0 to 1, of its signal."""
  return {
    knob: float(np.quantile(values[signal], at[knob])) for knob, (signal, _) in THRESHOLDS.items()
  }


def decided(knobs: dict, values: dict[str, np.ndarray]) -> np.ndarray:
  """The branch that quadrant chooses for each measured token with these knobs."""
  config = sampling.configure(quadrant, knobs)
  n = len(values["entropy"])
  room = (0, -n % _PAD)
  signals = {
    name: np.pad(np.asarray(values[name], np.float32), room) for name in SIGNALS if name in values
  }
  attn = types.SimpleNamespace(**signals) if "attn_ent" in signals else None
  return np.asarray(quadrant.branches(config, signals["entropy"], signals["varentropy"], attn))[:n]


def shares(branch: np.ndarray) -> dict[str, float]:
  """Branch name -> its share of the tokens."""
  return {name: float(np.mean(branch == i)) for i, name in enumerate(quadrant.BRANCHES)}


def interval(hit: np.ndarray, text: np.ndarray) -> tuple[float, float]:
  """Wilson's 95% interval of the share of tokens with `hit`; texts are independent, tokens of one text are not."""
  sizes, hits = (np.bincount(text.astype(int), weights) for weights in (None, hit))
  hits, sizes = hits[sizes > 0], sizes[sizes > 0]
  k, n, p = len(sizes), len(hit), float(np.mean(hit))
  if k < 2:
    return 0.0, 1.0
  spread = k / (k - 1) * float(np.sum((hits - p * sizes) ** 2)) / n**2
  worth = min(n, p * (1 - p) / spread) if spread else k  # independent tokens with the same spread
  z = 1.96 + 2.37 / (k - 1) + 2.82 / (k - 1) ** 2  # Student's, by its expansion
  middle, root = p + z**2 / (2 * worth), math.sqrt(p * (1 - p) / worth + (z / (2 * worth)) ** 2)
  low, high = ((middle + sign * z * root) / (1 + z**2 / worth) for sign in (-1, 1))
  return max(0.0, low), min(1.0, high)


def intervals(branch: np.ndarray, text: np.ndarray) -> dict[str, tuple[float, float]]:
  """Branch name -> the 95% interval of its share."""
  return {name: interval(branch == i, text) for i, name in enumerate(quadrant.BRANCHES)}


def doubt(branch: np.ndarray, text: np.ndarray) -> str | None:
  """One sentence if the sample is small for the shares that it promises."""
  tokens, bounds = len(branch), intervals(branch, text)
  worst = max(bounds, key=lambda name: bounds[name][1] - bounds[name][0])
  low, high = bounds[worst]
  if high - low < WIDTH:
    return None
  need = float(f"{tokens * ((high - low) / WIDTH) ** 2:.2g}")
  return (
    f"{tokens} tokens are few for these quantiles: the 95% interval of the share of {worst} is {low:.0%} to "
    f"{high:.0%}; about {need:.0f} tokens, of more prompts, would make it narrower than {100 * WIDTH:.0f} points."
  )
