"""The statistics of benchmarks/study.py. N prompts, S seeds, R resamples, M tests.

Answers to one prompt depend on one another, so prompts are resampled, and an answer's weight is that of its prompt.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import sweep

RESAMPLES = 10_000
LEVEL = (0.025, 0.975)
FOLDS = 10


def compare(a_N: np.ndarray, b_N: np.ndarray | float = 0.0, resamples: int = RESAMPLES):
  """(mean of a - b, its 95% interval, two-sided p) by the paired bootstrap over prompts; values are means over seeds.

  Where all N are equal there is nothing to resample: then the interval allows for as large a share of prompts that differ by 1 as
  would be missed with probability 0.05 (Clopper and Pearson, doi:10.1093/biomet/26.4.404).
  """
  gain_N = np.asarray(a_N, float) - b_N
  if (gain_N == gain_N[0]).all():
    mean, unseen = float(gain_N[0]), 1 - 0.05 ** (1 / len(gain_N))
    return mean, (mean - unseen, mean + unseen), 1.0 if mean == 0 else 1 / resamples
  mean_R = sweep.resampled(len(gain_N), resamples) @ gain_N
  low, high = np.quantile(mean_R, LEVEL)
  tail = min(np.mean(mean_R <= 1e-12), np.mean(mean_R >= -1e-12))
  p = min(1.0, 2 * (tail * resamples + 1) / (resamples + 1))
  return float(gain_N.mean()), (float(low), float(high)), float(p)


def holm(p_M: Sequence[float]) -> list[float]:
  """Holm's adjusted p (doi:10.2307/4615733): those below a level are rejected together at that level."""
  order, adjusted, worst = np.argsort(p_M), [0.0] * len(p_M), 0.0
  for rank, i in enumerate(order):
    worst = max(worst, min(1.0, (len(p_M) - rank) * p_M[i]))
    adjusted[i] = worst
  return adjusted


def auroc(score_X, bad_X, prompt_X, resamples: int = 1000):
  """(probability that a bad answer has a higher score than a good one, ties half; its 95% interval over prompts).

  None where no answer is bad or none is good.
  """
  score_X, bad_X = np.asarray(score_X, float), np.asarray(bad_X, bool)
  if bad_X.all() or not bad_X.any():
    return None
  prompts, of_X = np.unique(prompt_X, return_inverse=True)
  share_RN = np.concatenate([np.ones((1, len(prompts))), sweep.resampled(len(prompts), resamples)])
  order = np.argsort(score_X, kind="stable")
  first = np.flatnonzero(np.diff(score_X[order], prepend=-np.inf) > 0)
  found = []
  for share_N in share_RN:
    weight_X = share_N[of_X[order]]
    bad = np.add.reduceat(weight_X * bad_X[order], first)
    good = np.add.reduceat(weight_X * ~bad_X[order], first)
    pairs = bad.sum() * good.sum()
    wins = (bad * (np.cumsum(good) - good / 2)).sum()
    found.append(wins / pairs if pairs else np.nan)
  low, high = np.nanquantile(found[1:], LEVEL)
  return float(found[0]), (float(low), float(high))


# -- nested models ---------------------------------------------------------------------------------


def logistic(X, y, ridge: float = 1.0, steps: int = 50) -> np.ndarray:
  """Weights of a logistic model by Newton's method; the first column of X is the constant, which is not shrunk."""
  w, shrink = np.zeros(X.shape[1]), np.full(X.shape[1], ridge)
  shrink[0] = 0.0
  for _ in range(steps):
    p = 1 / (1 + np.exp(-np.clip(X @ w, -30, 30)))
    slope = X.T @ (y - p) - shrink * w
    curve = (X * (p * (1 - p))[:, None]).T @ X + np.diag(shrink + 1e-9)
    step = np.linalg.solve(curve, slope)
    w = w + step
    if np.abs(step).max() < 1e-9:
      break
  return w


def _losses(X, y, group_X, kind: str) -> np.ndarray:
  """The loss of each answer under a model of the other folds; groups are never split."""
  _, of_X = np.unique(group_X, return_inverse=True)
  fold_X = np.random.default_rng(0).permutation(of_X.max() + 1)[of_X] % FOLDS
  loss = np.zeros(len(y))
  for fold in np.unique(fold_X):
    out = fold_X == fold
    mean, sd = X[~out].mean(0), X[~out].std(0) + 1e-9
    Z = np.concatenate([np.ones((len(y), 1)), (X - mean) / sd], 1)
    if kind == "logistic":
      t = np.clip(Z[out] @ logistic(Z[~out], y[~out]), -30, 30)
      loss[out] = np.logaddexp(0, t) - y[out] * t
    else:
      w = np.linalg.lstsq(Z[~out], y[~out], rcond=None)[0]
      loss[out] = (y[out] - Z[out] @ w) ** 2
  return loss


def nested(less, more, y, group_X, kind: str = "logistic"):
  """What columns add: (loss without, loss with, mean gain, its 95% interval, p), cross-validated by groups.

  Args:
    less, more: columns of the smaller model, and those that the larger one has besides.
    kind: "logistic", nats per answer; or "linear", squares.
  """
  y = np.asarray(y, float)
  small = _losses(np.stack(less, 1), y, group_X, kind)
  large = _losses(np.stack([*less, *more], 1), y, group_X, kind)
  prompts, of_X = np.unique(group_X, return_inverse=True)
  # A group's weight is its number of answers.
  gain_N = np.bincount(of_X, small - large) / (len(y) / len(prompts))
  return float(small.mean()), float(large.mean()), *compare(gain_N)


# -- power -----------------------------------------------------------------------------------------


def moments(a_NS, b_NS) -> tuple[float, float, float]:
  """(mean, variance of the prompts' own probabilities, share of it that both methods have in common).

  Args:
    a_NS: 0 or 1, at least two seeds.
    b_NS: of the other method, for the same prompts.
  """
  a_NS, b_NS = np.asarray(a_NS, float), np.asarray(b_NS, float)
  S = a_NS.shape[1]
  mean = a_NS.mean()
  between = max(1e-6, a_NS.mean(1).var(ddof=1) - a_NS.var(axis=1, ddof=1).mean() / S)
  both = np.cov(a_NS.mean(1), b_NS.mean(1))[0, 1]
  return float(mean), float(between), float(np.clip(both / between, 0.0, 1.0))


def power(
  mean, between, common, N: int, S: int, effect: float, level: float, trials: int = 400
) -> float:
  """Share of simulated studies that find an effect: prompts' probabilities are Beta, seeds are draws with these.

  The other method has a prompt's probability with probability `common`, else another one, raised by the effect on average.
  """
  rng = np.random.default_rng(0)
  mean = min(max(mean, 0.01), 0.99)
  size = max(mean * (1 - mean) / between - 1, 0.05)
  p_RN = rng.beta(mean * size, (1 - mean) * size, (trials, N))
  q_RN = np.where(
    rng.random((trials, N)) < common, p_RN, rng.beta(mean * size, (1 - mean) * size, (trials, N))
  )
  q_RN = q_RN + (1 - q_RN) * effect / (1 - mean)
  d_RN = (rng.binomial(S, np.clip(q_RN, 0, 1)) - rng.binomial(S, p_RN)) / S
  z_R = d_RN.mean(1) / (d_RN.std(1, ddof=1) / math.sqrt(N) + 1e-12)
  return float(np.mean(np.abs(z_R) > statistics.NormalDist().inv_cdf(1 - level / 2)))


def detectable(mean, between, common, N: int, S: int, level: float, wanted: float = 0.8) -> float:
  """The least effect that is found with probability `wanted`, to 0.001; at most what is left above the mean."""
  low, high = 0.0, 1 - min(max(mean, 0.01), 0.99)
  while high - low > 1e-3:
    middle = (low + high) / 2
    found = power(mean, between, common, N, S, middle, level) >= wanted
    low, high = (low, middle) if found else (middle, high)
  return high


# -- texts -----------------------------------------------------------------------------------------


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
  """Mean over texts of the geometric mean of the shares of its runs of 1 to n words that some other text has."""
  words = [text.lower().split() for text in texts]
  scores = []
  for i in range(len(words)):
    shares = []
    for k in range(1, n + 1):
      runs = [set(zip(*(w[j:] for j in range(k)), strict=False)) for w in words]
      others = set().union(*runs[:i], *runs[i + 1 :])
      shares.append(sum(r in others for r in runs[i]) / max(1, len(runs[i])))
    scores.append(math.exp(sum(math.log(max(s, 1e-3)) for s in shares) / n))
  return sum(scores) / max(1, len(scores))
