"""The sampler contract, applied to every module in the folder and to planted defects."""

import dataclasses

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import refusal

from entropix_jax import sampling
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import draw, plain, presets, quadrant

ALL = [sampling.find(name) for name in sampling.names()]
every = pytest.mark.parametrize("sampler", ALL, ids=sampling.names())


@every
def test_every_branch_is_reached_by_its_case(sampler):
  assert set(sampler.CASES) == set(sampler.BRANCHES)
  for branch, cfg, logits in contract.cases(sampler):
    assert contract.branches(sampler, cfg, contract.observe(logits[None])) == [branch]


@every
def test_no_dead_knobs(sampler):
  assert contract.dead_knobs(sampler) == []


@every
def test_the_law_is_a_law(sampler):
  """Normalised, no NaN, nothing on excluded ids, never nothing; also on hard rows."""
  rng = np.random.default_rng(1)
  id_V = np.arange(contract.V)
  uniform, one = np.zeros(contract.V), id_V == 7
  half = np.where(id_V % 2, rng.standard_normal(contract.V), -np.inf)
  hard = uniform, np.where(one, 0.0, -np.inf), half, np.full(contract.V, -1e30), one * 1e4
  mixed = contract.mixed_observation(rng).logits_BV
  obs = contract.observe(np.concatenate([mixed, hard]), contract.random_attn(rng, 53))
  for _, cfg, _ in contract.cases(sampler):
    law_BV = contract.law(sampler, cfg, obs)
    np.testing.assert_allclose(law_BV.sum(-1), 1.0, atol=1e-4)
    assert (law_BV[np.isneginf(obs.logits_BV)] == 0).all()


@every
def test_nothing_breaks_in_2000_steps(sampler):
  """Law, statistics and state of every setting, with rows of one live id, ties and spikes among others.

  That the state keeps its shapes and dtypes is what the scan itself demands.
  """
  cfgs = [sampler.Config(), *(cfg for _, cfg, _ in contract.cases(sampler))]
  cfgs += [sampling.configure(sampler, use) for use in getattr(sampler, "USES", ())]
  assert contract.endure(sampler, cfgs, 2000) == []


@every
def test_nothing_breaks_on_a_wide_vocabulary(sampler):
  assert contract.endure(sampler, [sampler.Config()], 6, vocab=128_256) == []


@every
def test_no_branch_freezes_the_state(sampler):
  assert contract.frozen(sampler) == []


@every
def test_rows_are_strangers(sampler):
  """Permuting rows permutes answers, and other neighbours change nothing, bit for bit."""
  assert contract.strangers(sampler) == []


@every
def test_turning_knobs_compiles_nothing(sampler):
  obs = contract.mixed_observation(np.random.default_rng(4), B=4)
  traces = []

  @jax.jit
  def run(cfg):
    traces.append(1)
    return sampler.step(cfg, sampler.init(cfg, 4), obs).law_BV

  for factor in (1.0, 0.5, 2.0):
    cfg = jax.tree.map(
      lambda x: (x * np.asarray(factor, x.dtype)).astype(x.dtype),  # noqa: B023
      contract.rows(sampler.Config(), 4),
    )
    run(cfg)
  assert len(traces) == 1


@every
def test_symmetries(sampler):
  """A constant added to the logits and a padded vocabulary change nothing; permuting it permutes the law."""
  rng = np.random.default_rng(5)
  # Steps of 1/64 below 2^9, so that adding the constant is exact.
  logits = np.round(rng.standard_normal((16, 300)) * 64) / 64
  logits *= np.linspace(1, 6, 16)[:, None].round()
  attn = contract.random_attn(rng, 16)

  def law(logits):
    return contract.law(sampler, {}, contract.observe(logits, attn))

  law_BV, order = law(logits), rng.permutation(300)
  np.testing.assert_allclose(law(logits + 32.0), law_BV, atol=2e-6)
  np.testing.assert_allclose(law(logits[:, order]), law_BV[:, order], atol=2e-6)
  wide = law(np.pad(logits, ((0, 0), (0, 84)), constant_values=-np.inf))
  np.testing.assert_allclose(wide[:, :300], law_BV, atol=2e-6)
  assert (wide[:, 300:] == 0).all()


@every
def test_draws_follow_the_law_in_every_branch(sampler):
  """Chi-square of 50,000 draws through the one draw, at consecutive positions of one seed."""
  for branch, cfg, logits in contract.cases(sampler):
    obs = contract.observe(logits[None], contract.random_attn(np.random.default_rng(7), 1))
    decision = contract.decided(sampler, cfg, obs)
    assert sampler.BRANCHES[int(decision.branch_B[0])] == branch
    assert contract.misdrawn(draw.draw, decision.law_BV[0]) == [], branch


# -- against the slow truth ----------------------------------------------------------------------


def test_plain_agrees_with_the_oracle():
  assert contract.mistruncated(plain) == []


def quadrant_laws(rows, settings, attn=None):
  """[(branch, law)] of the sampler, and the same of the oracle."""
  cfg, obs = sampling.configure(quadrant, settings), contract.observe(rows, attn)
  names, law_BV = contract.branches(quadrant, cfg, obs), contract.law(quadrant, cfg, obs)
  want = []
  for b, row in enumerate(rows):
    a = attn and {f.name: float(getattr(attn, f.name)[b]) for f in dataclasses.fields(attn)}
    want.append(oracles.quadrant(row, a, cfg))
  return list(zip(names, law_BV, strict=True)), want


def assert_laws(got, want):
  for (branch, law), (want_branch, want_law) in zip(got, want, strict=True):
    assert branch == want_branch
    np.testing.assert_allclose(law, want_law, atol=1e-5)


NUMBERS = [use for use in quadrant.USES if not {*map(type, use.values())} & {str}]


@pytest.mark.parametrize("settings", [{}, *NUMBERS, {"mid_inverse": True}], ids=str)
@pytest.mark.parametrize("measured", [True, False], ids=["attention", "logits-only"])
def test_quadrant_agrees_with_the_oracle(measured, settings):
  rng = np.random.default_rng(9)
  logits = contract.oracle_rows(rng)
  cases = [quadrant.CASES[b]["p"] for b in ("flow", "ask", "middle")]
  cases = np.stack([contract.case_logits(p, 160)[:160] for p in cases])
  tail = np.zeros((3, 4096), np.float32)
  tail[:, 11] = [6.0, 7.0, 8.6]
  for rows in (np.concatenate([logits, cases]), tail):
    attn = contract.random_attn(rng, len(rows)) if measured else None
    assert_laws(*quadrant_laws(rows, settings, attn))


@pytest.mark.parametrize(
  "name",
  [n for n in presets.names() if presets.load(n).sampler == "quadrant" and n != "quantile"],
)
def test_a_presets_laws_are_those_of_the_formulas(name):
  rng = np.random.default_rng(13)
  rows = contract.oracle_rows(rng)
  attn = contract.random_attn(rng, len(rows))
  assert_laws(*quadrant_laws(rows, presets.load(name).knobs, attn))


def test_the_servers_middle_passes_top_k_and_top_p_unchanged():
  """xjdr-alt/entropix, branch evals at ae0ebf0, entropix/sampler.py: only temperature and min-p adapt there."""
  rng = np.random.default_rng(14)
  rows = contract.oracle_rows(rng)
  obs = contract.observe(rows, contract.random_attn(rng, len(rows)))
  decision = contract.decided(quadrant, presets.load("entropix-2410-server").knobs, obs)
  middle_B = np.asarray(decision.branch_B) == quadrant.MIDDLE
  assert middle_B.sum() > 5
  assert set(np.asarray(decision.stats["top_k"])[middle_B]) == {40.0}
  np.testing.assert_allclose(np.asarray(decision.stats["top_p"])[middle_B], 0.9)


@pytest.mark.parametrize("V", [1, 2, 128_256])
def test_quadrant_on_vocabularies_of_any_size(V):
  rows = contract.oracle_rows(np.random.default_rng(12), 3, V)
  assert_laws(*quadrant_laws(rows, {}))


def test_best_of_n_is_what_drawing_n_and_keeping_the_likeliest_gives():
  p = np.asarray([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
  rng = np.random.default_rng(10)
  draws = rng.choice(6, (200_000, 3), p=p)
  # argmax keeps the first drawn among equals, which favours no id
  kept = draws[np.arange(len(draws)), np.argmax(p[draws], axis=1)]
  one = jnp.ones((1,))
  law = filters.truncated_best_of(
    jnp.log(jnp.asarray([p], jnp.float32)), one, jnp.asarray([100]), one, one * 0, one * 3, most=128
  )
  law = np.exp(np.asarray(law[0], np.float64))
  np.testing.assert_allclose(law, oracles.best_of(p, 3), atol=1e-6)
  statistic, dof = contract.chi_square(np.bincount(kept, minlength=6), law)
  assert statistic < contract.chi_square_limit(dof)


def test_a_tie_wider_than_the_candidates_is_carried_whole():
  """Uniform over 5000 ids: top-k keeps all of a tie, so the law is uniform and not over 128 ids."""
  law = contract.law(quadrant, {}, contract.observe(np.zeros((1, 5000))))
  np.testing.assert_allclose(law, 1 / 5000, rtol=1e-4)


def test_best_finds_the_largest_in_two_stages():
  rng = np.random.default_rng(11)
  for V in (130, 1000, 5000, 128_256):
    x = jnp.asarray(rng.standard_normal((3, V)), jnp.float32)
    value_BC, id_BC = jax.jit(filters.best, static_argnums=1)(x, 128)
    np.testing.assert_array_equal(value_BC, -np.sort(-np.asarray(x), axis=-1)[:, :128])
    np.testing.assert_array_equal(jnp.take_along_axis(x, id_BC, -1), value_BC)


# -- table rows: probabilities in, probabilities out ---------------------------------------------

TABLE = [
  # p, knobs, law
  ([0.5, 0.3, 0.2], {}, [0.5, 0.3, 0.2]),
  ([0.5, 0.3, 0.2], {"temperature": 0.0}, [1, 0, 0]),
  ([0.5, 0.3, 0.2], {"temperature": 0.5}, [25 / 38, 9 / 38, 4 / 38]),
  ([0.5, 0.3, 0.2], {"top_k": 2}, [5 / 8, 3 / 8, 0]),
  ([0.25, 0.25, 0.25, 0.25], {"top_k": 2}, [0.25] * 4),  # a tie at the k-th stays whole
  ([0.1, 0.2, 0.7], {"top_p": 0.05}, [0, 0, 1]),  # the most likely token always stays
  ([0.1, 0.2, 0.7], {"top_p": 0.75}, [0, 2 / 9, 7 / 9]),  # the token that crosses stays
  ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),  # top-p sees 4/7, 3/7
  ([0.4, 0.3, 0.2, 0.1], {"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
  ([0.4, 0.3, 0.2, 0.1], {"min_p": 1.0}, [1, 0, 0, 0]),
  ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.0}, [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("p", "knobs", "law"), TABLE)
def test_plain_table(p, knobs, law):
  got = contract.law(plain, knobs, contract.observe(np.log([p])))
  np.testing.assert_allclose(got, [law], atol=1e-6)


def test_min_p_really_cuts_and_top_p_keeps_the_best_in_the_quadrant_sampler():
  """The ancestors' two classics: min-p on a copy, top-p summed from the smallest."""
  rng = np.random.default_rng(12)
  obs = contract.mixed_observation(rng)
  B = obs.logits_BV.shape[0]
  for name, value in (("top_p", 1e-3), ("min_p", 1.0)):
    law_BV = contract.law(quadrant, {name: value, "mist_p_least": 0.0}, obs)
    assert (law_BV[np.arange(B), np.argmax(obs.logits_BV, -1)] > 0).all()
  loose, tight = (contract.decided(quadrant, {"min_p": x}, obs) for x in (0.0, 0.5))
  not_middle = np.asarray(loose.branch_B) >= quadrant.ASK
  assert not_middle.any()
  counts = [(np.asarray(d.law_BV) > -np.inf).sum(-1)[not_middle] for d in (loose, tight)]
  assert (counts[1] <= counts[0]).all()
  assert (counts[1] < counts[0]).any()


# -- errors --------------------------------------------------------------------------------------


def test_unknown_names_list_what_there_is():
  refusal(["plain, quadrant"], sampling.find, "nope")
  known = "temperature, top_k, top_p, min_p"
  refusal([known], sampling.configure, plain, {"temprature": 1.0})


@pytest.mark.parametrize(
  "knobs", [{"top_k": 2.5}, {"top_p": 1.5}, {"temperature": -1}, {"min_p": "a"}, {"top_p": True}]
)
def test_bad_values_are_refused(knobs):
  refusal([], sampling.configure, plain, knobs)
