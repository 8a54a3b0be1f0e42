"""Thresholds that are quantiles of recent values: the rule against a slow oracle, and what the engine makes of it."""

import collections
import dataclasses
import functools
from fractions import Fraction

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal
from test_engine import SMALL, requests, run, small_weights
from test_speculative import SpeculativeDecoder, assert_same_text, knowing

from entropix_jax import metrics, sampling
from entropix_jax.config import EngineConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import abstract_state
from entropix_jax.sampling import quadrant

LOW = {"low_ent": "q40", "low_varent": "q90", "ask_ent": "q62.5"}
HIGH = {"high_ent": "q75", "high_varent": "q40"}
ROWS = (  # one with numbers, some with quantiles, some with both
  {"low_ent": 1.0, "low_varent": 1.0, "ask_ent": 1.5, "high_ent": 2.0, "high_varent": 1.0},
  LOW | HIGH,
  LOW | HIGH | {"low_ent": 0.5, "mist_ent": "q30"},
  {"low_ent": "q0", "low_varent": "q100", "ask_ent": "q95", "high_ent": 1.0, "high_varent": "q5"},
  LOW | {"mist_ent": 0.7, "high_ent": "q99.99", "high_varent": "q50"},
  {"low_ent": 1.0},
)


class Oracle:
  """The branches of one row, from the rule in _quantile.py's docstring."""

  def __init__(self, knobs):
    self.knobs = sampling.knobs(quadrant) | knobs
    self.past = {name: collections.deque(maxlen=256) for name in ("ent", "varent")}

  def compare(self, x, signal, knob):
    """(x below the knob, above it, at least at it)."""
    threshold, past = self.knobs[knob], sorted(self.past[signal])
    if isinstance(threshold, str):
      if len(past) < 19:
        return False, False, False
      rank = Fraction(threshold[1:]) / 100 * (len(past) + 1)
      x, threshold = rounded(x), past[min(len(past), max(1, int(rank + Fraction(1, 2)))) - 1]
    return x < threshold, x > threshold, x >= threshold

  def branch(self, ent, varent):
    def is_(x, signal, knob, how):
      return self.compare(x, signal, knob)[how]

    low, high = is_(varent, "varent", "low_varent", 0), is_(varent, "varent", "high_varent", 1)
    late = is_(ent, "ent", "high_ent", 2) or is_(ent, "ent", "mist_ent", 2)
    conditions = {
      "flow": low and is_(ent, "ent", "low_ent", 0),
      "ask": low and is_(ent, "ent", "ask_ent", 1),
      "fork": high and is_(ent, "ent", "high_ent", 0),
      "mist": high and late,
    }
    self.past["ent"].append(rounded(ent))
    self.past["varent"].append(rounded(varent))
    return next((name for name, holds in conditions.items() if holds), "middle")


def rounded(x):
  return float(np.float32(x).astype(jnp.bfloat16))


def arrays(rows):
  """The Config of rows with these knobs."""
  configs = [sampling.arrays(sampling.configure(quadrant, knobs)) for knobs in rows]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *configs)


@jax.jit
def decided(cfg, signal_2TB):
  """branch_TB, by branches and commit alone."""

  def one(state, signal_2B):
    raw = metrics.Spread(signal_2B[0], *signal_2B)
    branch_B = quadrant.branches(cfg, *signal_2B, None, state)
    decision = sampling.Decision(None, branch_B, {}, raw)
    return quadrant.commit(cfg, state, decision, None), branch_B

  state = quadrant.init(cfg, signal_2TB.shape[2])
  return jax.lax.scan(one, state, jnp.moveaxis(signal_2TB, 1, 0))[1]


def test_branches_are_those_of_the_rule():
  """From the first token until long after the ring has gone round, with drift, repetitions and many ties."""
  rng, T = np.random.default_rng(0), 700
  signal_2TB = rng.exponential(size=(2, T, len(ROWS))) * (1 + np.sin(np.arange(T) / 90))[:, None]
  signal_2TB[:, 200:420] = np.round(2 * signal_2TB[:, 200:420]) / 2
  signal_2TB[:, 500:520] = signal_2TB[:, 480:500] * (1 + 1e-6)  # as a text that repeats itself
  signal_2TB = signal_2TB.astype(np.float32)
  branch_TB = np.asarray(decided(arrays(ROWS), signal_2TB))
  for b, knobs in enumerate(ROWS):
    oracle = Oracle(knobs)
    want = [oracle.branch(*signal_2TB[:, t, b].tolist()) for t in range(T)]
    assert [quadrant.BRANCHES[i] for i in branch_TB[:, b]] == want, knobs
    assert len(set(want)) >= 3 or b == 5
  assert set(branch_TB[:19, 1]) == {quadrant.MIDDLE} != set(branch_TB[19:30, 1])


@pytest.mark.parametrize("share", [5, 50, 95])
def test_a_quantile_holds_for_its_share_of_tokens(share):
  """Of independent signals, exactly so in the mean; after 19 of them as after 300."""
  B = 4000
  signal_2TB = np.random.default_rng(1).exponential(size=(2, 301, B)).astype(np.float32)
  cfg = arrays([{"low_ent": f"q{share}", "low_varent": 1e9, "high_varent": 1e9}])
  flow_TB = np.asarray(decided(jax.tree.map(lambda x: jnp.repeat(x, B), cfg), signal_2TB)) == 0
  for t in (19, 300):
    assert abs(flow_TB[t].mean() - share / 100) < 4 * np.sqrt(share * (100 - share) / B) / 100


@functools.cache
def any_engine():
  return Engine(Setup.create(SMALL, quadrant, EngineConfig(5, 256)), small_weights())


def with_knobs(todo):
  return [dataclasses.replace(r, knobs=knobs) for r, knobs in zip(todo, ROWS, strict=False)]


def test_rows_with_numbers_and_rows_with_quantiles_share_a_batch():
  """Each text is what it is alone, and where the engine knows only numbers it is the same, too."""
  todo = with_knobs(requests(new=60))
  want = run(any_engine(), todo)
  for i, one in enumerate(todo):
    assert run(any_engine(), [one])[0] == want[0][i : i + 1]
  numbers = sampling.varying(quadrant, ROWS[0])
  setup = Setup.create(SMALL, quadrant, EngineConfig(5, 256), varying=numbers)
  assert run(Engine(setup, small_weights()), todo[:1])[0] == want[0][:1]
  refusal(["without the knob 'low_ent'"], run, Engine(setup, small_weights()), todo[1:2])


def test_speculation_keeps_the_text():
  first, second, _, third, _ = requests(new=54)
  plain, todo = any_engine(), with_knobs([first, second, third])
  e = SpeculativeDecoder(plain, knowing(todo, run(plain, todo)[0]), always=True)
  tokens = assert_same_text(e, plain, todo)
  assert sum(t.accepted for t in tokens) > len(tokens) / 3
  assert {t.branch for t in tokens if t.position >= 19 and t.prompt == 1} > {"middle"}


def test_what_no_request_sets_costs_nothing():
  def setup(knobs):
    varying = sampling.varying(quadrant, knobs)
    return Setup.create(SMALL, quadrant, EngineConfig(3, 256), varying=varying)

  numbers, quantiles = setup({"low_ent": 0.2}), setup({"low_ent": "q20"})
  assert abstract_state(numbers).sampler_state == ()
  assert {x.shape for x in jax.tree.leaves(abstract_state(quantiles).sampler_state)} == {
    (3, 256),
    (3,),
  }
  obs = contract.observe(np.zeros((3, 160)))

  def text(setup):
    def step(knobs):
      cfg = setup.constants(knobs)
      state = quadrant.init(cfg, 3)
      return quadrant.commit(cfg, state, quadrant.step(cfg, state, obs), obs.token_B)

    knobs = jax.tree.map(jnp.asarray, contract.rows(quadrant.Config(), 3))
    return str(jax.make_jaxpr(step)(knobs))

  assert "3,256]" not in text(numbers)
  assert "3,256]" in text(quantiles)


@pytest.mark.parametrize(
  "value", ["q", "q101", "q100.01", "20q", "qx", "q-1", "Q20", "q1.234", "0.2"]
)
def test_what_is_no_quantile_is_one_sentence(value):
  refusal(
    [f"'low_ent' is {value!r}; give a number, or"], sampling.configure, quadrant, {"low_ent": value}
  )


def test_only_thresholds_may_be_quantiles_and_their_fields_are_no_knobs():
  refusal(["value of type float"], sampling.configure, quadrant, {"temp": "q20"})
  refusal(["no knob 'q_low_ent'"], sampling.configure, quadrant, {"q_low_ent": 2000})
  assert not {*quadrant.FAMILIES[1]} & {*sampling.knobs(quadrant)}
  config = sampling.configure(quadrant, {"low_ent": "q12.5", "ask_ent": 1})
  assert (config.q_low_ent, config.q_ask_ent, config.ask_ent) == (1250, -1, 1.0)
