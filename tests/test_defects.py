"""Planted defects: what the ancestors did wrong, written small, turns the check of it red.

Why: every check that the shipped samplers pass could pass because it looks at nothing. Beside each defect
stands its correct counterpart, which the same check must let through.
"""

import types

import contract
import flax.struct
import jax
import jax.numpy as jnp
import pytest

from entropix_jax import sampling
from entropix_jax.rowwise import best_id, col
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import draw


def sampler(config, step, commit=lambda cfg, state, decision, token_B: state, **more):
  """A module-like sampler of one branch and no state, where `more` does not say otherwise."""
  parts = {"BRANCHES": ("only",), "CASES": {"only": {"p": [0.5, 0.3, 0.2]}}}
  parts |= {"init": lambda cfg, B: (), "Config": config, "step": step, "commit": commit}
  return types.SimpleNamespace(__name__="x.planted", **parts | more)


def decision(law_BV, branch_B=None, aux=()):
  branch_B = jnp.zeros(law_BV.shape[:1], jnp.int32) if branch_B is None else branch_B
  return sampling.Decision(law_BV=law_BV, branch_B=branch_B, stats={}, aux=aux)


# -- truncation ------------------------------------------------------------------------------------


@flax.struct.dataclass
class Truncation:
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0


def truncating(top_p=filters.top_p, min_p=filters.min_p, after=lambda law_BV, cfg: law_BV):
  """temperature > top-k > top-p > min-p, with some stages given."""

  def step(cfg, state, obs):
    greedy_B1 = col(cfg.temperature < filters.GREEDY_BELOW)
    temp_B1 = jnp.where(greedy_B1, 1.0, col(cfg.temperature))
    score_BV = (obs.logits_BV - filters.top(obs.logits_BV)) / temp_B1
    score_BV = jnp.where(col(cfg.top_k) > 0, filters.top_k(score_BV, cfg.top_k), score_BV)
    score_BV = jnp.where(col(cfg.top_p) < 1, top_p(score_BV, cfg.top_p), score_BV)
    law_BV = after(filters.normalise(min_p(score_BV, cfg.min_p)), cfg)
    return decision(jnp.where(greedy_B1, filters.delta(obs.logits_BV), law_BV))

  return sampler(Truncation, step)


def min_p_on_a_copy(score_BV, m_B):
  jnp.where(score_BV < filters.top(score_BV) + jnp.log(col(m_B)), -jnp.inf, score_BV)
  return score_BV


# Without normalising afterwards.
MIN_P_LATE = {
  "min_p": lambda score_BV, m_B: score_BV,
  "after": lambda law_BV, cfg: filters.min_p(law_BV, cfg.min_p),
}


def top_p_from_the_smallest(score_BV, p_B):
  order_BV = jnp.argsort(score_BV, axis=-1)
  p_BV = jnp.take_along_axis(jax.nn.softmax(score_BV), order_BV, axis=-1)
  within_BV = jnp.cumsum(p_BV, axis=-1) <= col(p_B)
  back_BV = jnp.argsort(order_BV, axis=-1)
  keep_BV = jnp.take_along_axis(within_BV, back_BV, axis=-1)
  return filters.cut(score_BV, keep_BV | ~jnp.any(keep_BV, axis=-1, keepdims=True))


def test_wrong_truncation_is_found_and_right_one_is_not():
  for defect in ({"min_p": min_p_on_a_copy}, MIN_P_LATE, {"top_p": top_p_from_the_smallest}):
    assert contract.mistruncated(truncating(**defect)), defect
  assert contract.mistruncated(truncating()) == []


def test_min_p_on_a_copy_is_a_dead_knob():
  assert contract.dead_knobs(truncating(min_p=min_p_on_a_copy)) == ["min_p"]
  assert contract.dead_knobs(truncating()) == []


# -- the draw --------------------------------------------------------------------------------------

P = [0.5, 0.3, 0.15, 0.05]
LAW = jnp.log(jnp.asarray(P, jnp.float32))


def by_rank(law_BV, key_B2, pos_B):
  """Noise for the best token first, whichever id that is."""
  order_BV = jnp.argsort(-law_BV, axis=-1)
  sorted_BV = jnp.take_along_axis(law_BV, order_BV, axis=-1)
  rank_B = best_id(sorted_BV + draw.gumbel(key_B2, pos_B, law_BV.shape[-1]))
  return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]


def uniform(law_BV, key_B2, pos_B):
  """p / u with u uniform, where it takes an exponential."""
  u_BV = jnp.exp(-jnp.exp(-draw.gumbel(key_B2, pos_B, law_BV.shape[-1])))
  return best_id(law_BV - jnp.log(u_BV))


def one_key(law_BV, key_B2, pos_B):
  """The same noise at every step."""
  return draw.draw(law_BV, key_B2, jnp.zeros_like(pos_B))


def test_noise_by_rank_is_found():
  # It follows the law and is independent from step to step: only what is cut away gives it away.
  assert contract.misdrawn(by_rank, LAW) == []
  assert contract.dependent(by_rank, P) == []
  assert contract.tied_to_rank(by_rank)


@pytest.mark.parametrize("wrong", [uniform, one_key])
def test_uniform_noise_and_a_constant_key_are_found(wrong):
  assert contract.dependent(wrong, P)
  assert contract.misdrawn(wrong, LAW)


def test_the_draw_has_none_of_these():
  assert contract.tied_to_rank(draw.draw) == []
  assert contract.misdrawn(draw.draw, LAW) == []
  assert contract.dependent(draw.draw, P) == []


# -- rows and state --------------------------------------------------------------------------------


@flax.struct.dataclass
class Heat:
  temperature: float = 1.0


def heating(measure):
  """A temperature that follows a measure of the rows' entropies."""

  def step(cfg, state, obs):
    temp_B = cfg.temperature * (0.5 + measure(obs.raw.ent))
    return decision(filters.normalise(obs.logits_BV / col(temp_B)))

  return sampler(Heat, step)


def test_a_mean_over_the_batch_and_dependence_on_the_place_in_it_are_found():
  assert contract.strangers(heating(jnp.mean)) == ["neighbours"]
  assert contract.strangers(heating(lambda ent_B: ent_B)) == []
  by_place = heating(lambda ent_B: jnp.arange(len(ent_B)).astype(jnp.float32))
  assert contract.strangers(by_place) == ["order"]


def averaging(value=lambda logp_B: -logp_B, keep=lambda new_B, old_B, branch_B: new_B):
  """Two branches by entropy, and a running mean of what the chosen tokens surprised by, which heats."""

  def step(cfg, state, obs):
    temp_B = cfg.temperature + jnp.tanh(state)
    law_BV = filters.normalise(obs.logits_BV / col(temp_B))
    return decision(law_BV, (obs.raw.ent > 0.5).astype(jnp.int32))

  def commit(cfg, state, made, token_B):
    logp_B = jnp.take_along_axis(made.law_BV, token_B[:, None], axis=-1)[:, 0]
    return keep(0.9 * state + 0.1 * value(logp_B), state, made.branch_B)

  cases = {"sure": {"p": [0.95, 0.05]}, "open": {"p": P}}
  start = {"BRANCHES": tuple(cases), "CASES": cases, "init": lambda cfg, B: jnp.zeros((B,))}
  return sampler(Heat, step, commit, **start)


def test_the_log_of_a_log_probability_is_found():
  faults = contract.endure(averaging(value=jnp.log), [Heat()], 20)
  assert "the state is not finite, first at step 0" in faults
  assert contract.endure(averaging(), [Heat()], 2000) == []


def test_a_state_that_one_branch_returns_as_it_was_is_found():
  def old_where_sure(new_B, old_B, branch_B):
    return jnp.where(branch_B == 0, old_B, new_B)

  assert contract.frozen(averaging(keep=old_where_sure)) == ["sure"]
  assert contract.frozen(averaging()) == []


def test_a_law_that_forgets_to_normalise_is_found():
  faults = contract.endure(truncating(**MIN_P_LATE), [Truncation(min_p=0.5)], 20)
  assert any(fault.startswith("the law is not normalised") for fault in faults)
  assert contract.endure(truncating(), [Truncation(min_p=0.5)], 20) == []
