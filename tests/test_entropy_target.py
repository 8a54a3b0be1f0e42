"""The solver against bisection in float64, and the sampler against its own statement."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from entropix_jax import sampling
from entropix_jax.sampling import _temperature as temperature
from entropix_jax.sampling import entropy_target


def entropy_at(scores, t):
  return oracles.ent_varent(oracles.probabilities(np.asarray(scores, np.float64) / t))[0]


def bisected(scores, target, low, high):
  """The temperature by sixty halvings, at the end of the range where it cannot be reached."""
  if target <= entropy_at(scores, low):
    return low
  if target >= entropy_at(scores, high):
    return high
  a, b = np.log(low), np.log(high)
  for _ in range(60):
    middle = (a + b) / 2
    a, b = (middle, b) if entropy_at(scores, np.exp(middle)) < target else (a, middle)
  return float(np.exp(a))


def rows(rng, V):
  out = [rng.standard_normal(V) * s for s in np.geomspace(0.3, 12, 20)]
  for peak in (3.0, 6.0, 12.0):
    spike = rng.standard_normal(V)
    spike[rng.integers(V)] += peak
    out.append(spike)
  two = np.full(V, -7.0)
  two[[1, 5]] = 0.0
  out += [two, np.zeros(V), np.where(np.arange(V) == 2, 0.0, -np.inf)]
  return np.asarray(out, np.float32)


@pytest.mark.parametrize("V", [12, 400, 20_000])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 1.0, 2.0, 3.4, 3.6, 6.5])
def test_the_entropy_is_met(V, target):
  scores = rows(np.random.default_rng(0), V)
  B = len(scores)
  temp_B, clamped_B = jax.jit(temperature.for_entropy, static_argnums=(2, 3))(
    jnp.asarray(scores), jnp.full((B,), target), 0.05, 20.0
  )
  for row, t, clamped in zip(scores, temp_B, clamped_B, strict=True):
    t = float(t)
    least, most = entropy_at(row, 0.05), entropy_at(row, 20.0)
    assert abs(entropy_at(row, t) - np.clip(target, least, most)) < 1e-3
    if most - least > 1e-3:
      assert bool(clamped) == (not least - 1e-4 <= target <= most + 1e-4)


def test_rows_do_not_wait_for_each_other():
  """A row's temperature is the same whoever else still searches, bit for bit."""
  scores = jnp.asarray(rows(np.random.default_rng(1), 300))
  solve = jax.jit(temperature.for_entropy, static_argnums=(2, 3))
  target_B = jnp.linspace(0.05, 5.0, len(scores))
  together = solve(scores, target_B, 0.05, 20.0)[0]
  easy = solve(scores, target_B.at[1:].set(0.0), 0.05, 20.0)[0]
  assert together[0] == easy[0]


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"cap": 0.4},
    {"cap": 0.0},
    {"steer": True, "w_const": 1.0, "w_mean": 0.0, "cap": 9.0},
    {"steer": True, "w_mean": 0.0, "w_now": 0.5, "min_p": 0.0},
  ],
  ids=str,
)
@pytest.mark.parametrize("V", [1, 2, 160, 128_256])
def test_agrees_with_the_oracle(settings, V):
  logits = contract.oracle_rows(np.random.default_rng(2), 200 if V == 160 else 2, V)
  cfg = sampling.configure(entropy_target, settings)
  decision, _ = contract.decide(
    entropy_target, contract.rows(cfg, len(logits)), contract.observe(logits)
  )
  for row, law, temp in zip(
    logits, np.exp(decision.law_BV), decision.stats["temperature"], strict=True
  ):
    ent = oracles.ent_varent(oracles.probabilities(row))[0]
    target = cfg.w_const + cfg.w_mean * ent + cfg.w_now * ent if cfg.steer else ent
    target = max(0.0, min(cfg.cap, target))
    t = np.clip(bisected(row, target, 0.05, 20.0), cfg.temp_least, cfg.temp_most)
    if abs(target - ent) < 1e-4:
      t = 1.0  # the solver may stop anywhere within its tolerance
    elif len(set(row[row > -np.inf])) > 1:
      assert abs(entropy_at(row, t) - entropy_at(row, float(temp))) < 2e-4
    want = oracles.truncated(row, float(temp), min_p=cfg.min_p)
    np.testing.assert_allclose(law, want, atol=1e-5)


def test_the_mean_is_a_running_mean():
  rng = np.random.default_rng(3)
  cfg = contract.rows(sampling.configure(entropy_target, {"steer": True, "decay": 0.7}), 1)
  state, ents = entropy_target.init(cfg, 1), []
  step, commit = jax.jit(entropy_target.step), jax.jit(entropy_target.commit)
  for pos in range(30):
    logits = rng.standard_normal((1, 50)) * rng.uniform(0.2, 3)
    decision = step(cfg, state, contract.observe(logits, pos=pos))
    if ents:
      weights = 0.7 ** np.arange(len(ents))[::-1]
      mean = (weights * ents).sum() / weights.sum()
      assert abs(float(decision.stats["target"][0]) - min(1.5, mean)) < 1e-4
    ents.append(oracles.ent_varent(oracles.probabilities(logits[0]))[0])
    state = commit(cfg, state, decision, jnp.zeros((1,), jnp.int32))
