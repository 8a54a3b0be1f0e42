"""The placebos of benchmarks/placebo.py, and the methods of benchmarks/study_methods.py."""

import sys

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT

sys.path += [str(ROOT / name) for name in ("benchmarks", "scripts")]
import study_methods as methods

from entropix_jax import metrics, sampling
from entropix_jax.sampling import draw, quadrant


@pytest.fixture(scope="module", autouse=True)
def placebo():
  """Registered for as long as this file's tests run."""
  yield sampling.register(ROOT / "benchmarks" / "placebo.py")
  del sys.modules[f"{sampling.__name__}.placebo"], sampling._registered["placebo"]


B = 48


def walk(sampler, knobs, steps, seed=0, B=B):
  """[(observation, state before, Decision)] of rows whose logits are drawn anew at each step."""
  rng = np.random.default_rng(seed)
  cfg = contract.rows(sampling.configure(sampler, knobs), B)
  state = sampler.init(cfg, B)
  key_B2 = draw.row_keys(
    jnp.zeros((B, 2), jnp.uint32), jnp.arange(B, dtype=jnp.uint32), jnp.zeros((B,), jnp.uint32)
  )
  advance = jax.jit(lambda state, obs: contract.advance(sampler, cfg, state, obs))
  for pos in range(steps):
    logits = rng.standard_normal((B, 64)) * np.exp(rng.uniform(-2, 3, (B, 1)))
    obs = contract.observe(logits, contract.random_attn(rng, B), pos=pos).replace(key_B2=key_B2)
    after, decision, _ = advance(state, obs)
    yield cfg, obs, state, decision
    state = after


@pytest.mark.parametrize("knobs", [{}, methods.preset("quantile"), {"mid_inverse": True}], ids=str)
def test_with_its_knobs_off_a_placebo_is_quadrant_bit_for_bit(placebo, knobs):
  both = zip(walk(placebo, knobs, 30), walk(quadrant, knobs, 30), strict=True)
  for (_, _, _, mine), (_, _, _, theirs) in both:
    np.testing.assert_array_equal(mine.law_BV, theirs.law_BV)
    np.testing.assert_array_equal(mine.branch_B, theirs.branch_B)


@pytest.mark.parametrize(
  "knobs",
  [{"shuffle": True}, {"varent": -2.0}, {"varent": 1.5}, {"shuffle": True, "varent": -2.0}],
  ids=str,
)
def test_the_law_of_a_placebo_given_its_signals_is_quadrants(placebo, knobs):
  past = []
  for pos, (cfg, obs, state, decision) in enumerate(walk(placebo, knobs, 12)):
    seen = placebo.seen(cfg, state, obs)
    np.testing.assert_allclose(
      decision.law_BV, quadrant.step(cfg, (), seen).law_BV, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(seen.logits_BV, obs.logits_BV)
    ent_PB = (
      np.stack([*past, obs.raw.ent]) if not knobs.get("shuffle") or not pos else np.stack(past)
    )
    assert (np.asarray(seen.raw.ent) == ent_PB).any(0).all()
    if knobs.get("shuffle") and pos:
      assert (np.asarray(seen.raw.ent) != obs.raw.ent).all()
    if knobs.get("varent") == 1.5:
      assert (seen.raw.varent == 1.5).all()
    past.append(np.asarray(obs.raw.ent))
  if knobs == {"varent": -2.0}:
    before = [o.raw.varent for _, o, _, _ in walk(placebo, knobs, 11)]
    np.testing.assert_allclose(seen.raw.varent, np.mean(before, 0), rtol=1e-5)


def test_each_earlier_token_is_as_likely_as_another_and_draws_follow_the_law(placebo):
  """Chi-square: the index over rows with other noise, and 50,000 draws from one law."""
  *_, (cfg, obs, state, _) = walk(placebo, {"shuffle": True}, 8, B=4000)
  counts = np.bincount(np.asarray(placebo.chosen(cfg, state, obs)), minlength=7)
  statistic, dof = contract.chi_square(counts, np.full(7, 1 / 7))
  assert statistic < contract.chi_square_limit(dof)
  *_, (cfg, obs, state, decision) = walk(placebo, {"shuffle": True}, 8)
  for b in (0, 20, 40):
    assert contract.misdrawn(draw.draw, decision.law_BV[b]) == []


def test_permuting_keeps_the_shares_of_branches_and_not_their_moments(placebo):
  knobs = {"low_ent": 1.5, "low_varent": 0.8, "ask_ent": 2.5, "high_ent": 2.0, "high_varent": 1.2}
  mine, theirs = (
    np.concatenate([np.asarray(d.branch_B) for _, _, _, d in walk(placebo, knobs | more, 40)])
    for more in ({"shuffle": True}, {})
  )
  for branch in range(5):
    assert abs((mine == branch).mean() - (theirs == branch).mean()) < 0.05
  assert 0.05 < (theirs == 0).mean() < 0.95
  shares = [(theirs == b).mean() for b in range(5)]
  assert (mine == theirs).mean() == pytest.approx(sum(s * s for s in shares), abs=0.06)


def test_rows_of_a_placebo_are_strangers_and_nothing_breaks(placebo):
  assert contract.strangers(placebo) == []
  cfgs = [sampling.configure(placebo, {"shuffle": True, "varent": -2.0})]
  assert contract.endure(placebo, cfgs, 300) == []


def test_placebos_by_knobs_do_what_they_say():
  made = methods.placebos(methods.preset("entropix-2410-server"), 1.0)
  rng = np.random.default_rng(3)
  rows = contract.mixed_observation(rng).logits_BV
  obs = contract.observe(rows, contract.random_attn(rng, len(rows)))
  for branch in ("middle", "ask", "fork", "mist"):
    assert {*contract.branches(quadrant, made[f"only_{branch}"].knobs, obs)} == {branch}
  blind = contract.law(quadrant, made["no_attention"].knobs, obs)
  gone = contract.law(
    quadrant, methods.preset("entropix-2410-server") | methods._GATES, obs.replace(attn=None)
  )
  np.testing.assert_allclose(blind, gone, atol=1e-6)


def test_every_method_has_as_many_settings_and_all_are_valid():
  methods.check()
  every = methods.tried({"low_ent": 0.1})
  assert {len(s) for name, s in every.items() if name != "greedy"} == {methods.SETTINGS}
  assert {*every} == {*methods.SINGLE, *methods.SEVERAL}
  for settings in every.values():
    assert len({str(s) for s in settings}) == len(settings)
  signal = {f"{metrics.AttnStats.__name__}"} | {*methods.BLIND}
  assert not {"temp", "top_k", "min_p"} & signal
