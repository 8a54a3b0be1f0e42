"""benchmarks/study_stats.py against known answers and slow truths."""

import math
import sys

import numpy as np
import pytest
from command import ROOT

sys.path += [str(ROOT / name) for name in ("benchmarks", "scripts")]
import study_stats as stats


def test_the_bootstrap_has_the_intervals_of_the_normal_law_and_holds_its_level():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
  mean, (low, high), p = stats.compare(a, b)
  error = (a - b).std(ddof=1) / 20
  assert mean == pytest.approx((a - b).mean())
  assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
  assert p == pytest.approx(math.erfc(abs(mean) / error / math.sqrt(2)), abs=0.003)
  rejected = [stats.compare(rng.normal(0, 1, 60), 0.0, 500)[2] < 0.05 for _ in range(400)]
  assert 0.02 < np.mean(rejected) < 0.10
  mean, interval, p = stats.compare(np.zeros(10))  # the truth may be a quarter
  assert (mean, p) == (0.0, 1.0)
  assert interval == pytest.approx((-0.259, 0.259), abs=0.001)


def test_holm():
  assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert stats.holm([0.5, 0.9]) == [1.0, 1.0]


def test_auroc_counts_pairs_and_covers():
  rng = np.random.default_rng(1)
  score, bad = rng.integers(0, 5, 60), rng.random(60) < 0.4
  pairs = [(x > y) + (x == y) / 2 for x in score[bad] for y in score[~bad]]
  found, (low, high) = stats.auroc(score, bad, np.arange(60))
  assert found == pytest.approx(np.mean(pairs))
  assert low < found < high
  assert stats.auroc(score, bad | True, np.arange(60)) is None
  # Two normal laws one standard deviation apart: Phi(1 / sqrt 2); the interval holds it in most studies.
  truth, hits = 0.5 * math.erfc(-0.5), 0
  for _ in range(60):
    bad = np.arange(200) < 100
    _, (low, high) = stats.auroc(rng.normal(bad, 1), bad, np.arange(200), 200)
    hits += low < truth < high
  assert hits >= 50
  # The same answer twice is no more evidence.
  once = stats.auroc(score, np.arange(60) % 3 == 0, np.arange(60))
  twice = stats.auroc(
    np.tile(score, 2), np.tile(np.arange(60) % 3 == 0, 2), np.tile(np.arange(60), 2)
  )
  assert once[0] == pytest.approx(twice[0])
  assert once[1] == pytest.approx(twice[1])


def test_a_logistic_model_of_two_groups_has_their_logits():
  x = np.repeat([0.0, 1.0], 50)
  y = np.concatenate([np.arange(50) < 10, np.arange(50) < 35]).astype(float)
  w = stats.logistic(np.stack([np.ones(100), x], 1), y, ridge=0.0)
  assert w == pytest.approx([math.log(10 / 40), math.log(35 / 15) - math.log(10 / 40)], abs=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "linear"])
def test_nested_models_see_what_helps_and_not_what_does_not(kind):
  rng = np.random.default_rng(2)
  x, z, noise = rng.normal(size=(3, 2000))
  y = x + z + rng.logistic(size=2000)
  y = (y > 0).astype(float) if kind == "logistic" else y
  group = np.arange(2000) // 4
  small, large, gain, (low, high), p = stats.nested([x], [z], y, group, kind)
  assert gain == pytest.approx(small - large)
  assert 0 < low < gain < high
  assert p < 0.001
  _, _, gain, (low, high), _ = stats.nested([x, z], [noise], y, group, kind)
  assert gain < 0.002 * small
  assert low < 0 < high or gain < 0


def test_power_is_that_of_the_z_test_and_grows():
  # No variance between prompts: the difference of two binomials.
  error = math.sqrt(2 * 0.25 / (300 * 3))
  want = 0.5 * math.erfc((1.96 - 0.06 / error) / math.sqrt(2))
  got = stats.power(0.5, 1e-6, 0.0, 300, 3, 0.06, 0.05, 2000)
  assert got == pytest.approx(want, abs=0.04)
  assert stats.power(0.5, 1e-6, 0.0, 300, 3, 0.0, 0.05, 2000) == pytest.approx(0.05, abs=0.02)
  least = [stats.detectable(0.3, 0.1, 0.8, n, 3, 0.05) for n in (100, 400)]
  assert least[0] == pytest.approx(2 * least[1], rel=0.2)
  p = np.random.default_rng(3).beta(1, 2, 4000)
  a, b = (np.random.default_rng(s).binomial(1, np.tile(p, (4, 1)).T) for s in (4, 5))
  mean, between, common = stats.moments(a, b)
  assert (mean, between, common) == pytest.approx((1 / 3, 1 / 18, 1.0), abs=0.05)


def test_self_bleu():
  assert stats.self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(1.0)
  assert stats.self_bleu(["a b c d", "e f g h"]) == pytest.approx(1e-3)
