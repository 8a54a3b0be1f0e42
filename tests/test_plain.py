"""The chain of `plain` against a float64 oracle, knob by knob and many at once."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import refusal

from entropix_jax import sampling
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _history as history
from entropix_jax.sampling import plain

PASSAGE = [7, 1, 2, 3, 9, 4, 1, 2, 3, 9, 5, 7, 1, 2, 3]
KNOBS = {
  "temperature": [0.0, 0.4, 0.9, 1.7], "top_k": [1, 3, 40], "top_p": [0.0, 0.3, 0.9],
  "min_p": [0.02, 0.3, 1.0], "top_n_sigma": [0.5, 1.0, 2.0], "top_h": [0.1, 0.4, 0.9],
  "p_less": [True], "typical_p": [0.2, 0.9], "epsilon": [3e-4, 0.05], "eta": [2e-3, 0.2],
  "dynatemp_range": [0.3, 0.9], "edt_theta": [0.5, 1.5], "temperature_last": [True],
  "xtc_probability": [0.5, 1.0], "repetition_penalty": [1.3], "presence_penalty": [0.7],
  "frequency_penalty": [0.4], "dry_multiplier": [0.8], "logit_bias": [{3: 2.0, 11: -3.0}],
  "banned": [[0, 3]], "allowed": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]],
}  # fmt: skip
ONE = [{name: value} for name, values in KNOBS.items() for value in values]
PAIRED = [
  {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0, "top_k": 20},
  {"edt_theta": 1.0, "edt_base": 0.6, "temperature": 0.7},
  {"xtc_probability": 0.3, "xtc_threshold": 0.02, "temperature": 0.8, "temperature_last": True},
  {"dry_multiplier": 0.5, "dry_base": 1.3, "dry_allowed_length": 1, "dry_window": 9},
  {"dry_multiplier": 0.5, "dry_breakers": [2], "dry_allowed_length": 0},
  {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature_last": True},
  {"temperature": 0.7, "typical_p": 0.9, "top_p": 0.8, "top_h": 0.5},
  {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 1.5, "eta": 0.01},
  {"logit_bias": {5: 4.0}, "banned": [5], "p_less": True},
  {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {2: 1.0}},
]


def laws(settings, logits, history=PASSAGE, prompt=5):
  return contract.law(plain, settings, contract.observe(logits, history=history, prompt=prompt))


def near_an_edge(logits, settings):
  """Whether a few units in the last place of the logits change the oracle's own answer."""
  rng = np.random.default_rng(1)
  want = oracles.plain(logits, settings, PASSAGE, 5)
  for _ in range(8):
    moved = logits + rng.uniform(-4e-7, 4e-7, logits.shape) * np.maximum(1.0, np.abs(logits))
    if np.abs(oracles.plain(moved, settings, PASSAGE, 5) - want).max() > 1e-4:
      return True
  return False


@pytest.mark.parametrize("settings", ONE + PAIRED, ids=str)
def test_agrees_with_the_oracle(settings):
  logits = contract.oracle_rows(np.random.default_rng(0))
  got = laws(settings, logits)
  edges = 0
  for row, law in zip(logits, got, strict=True):
    want = oracles.plain(row, settings, PASSAGE, 5)
    if np.abs(law - want).max() > 1e-5:
      assert near_an_edge(row.astype(np.float64), settings)
      edges += 1
  assert edges <= 4


@pytest.mark.parametrize("V", [1, 2, 128_256])
def test_vocabularies_of_any_size(V):
  rng = np.random.default_rng(2)
  logits = (rng.standard_normal((2, V)) * 3).astype(np.float32)
  for settings in (
    {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    {"top_h": 0.4},
    {"p_less": True},
    {"top_n_sigma": 1.0, "typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.01},
  ):
    got = laws(settings, logits, history=[0], prompt=1)
    np.testing.assert_allclose(got, [fast_plain(row, settings) for row in logits], atol=1e-5)


def fast_plain(row, settings):
  """The oracle on the best thousand ids where the rest cannot matter; its loops are quadratic."""
  if len(row) <= 2:
    return oracles.plain(row, settings, [0], 1)
  order = np.argsort(-row, kind="stable")
  x = row[order].astype(np.float64)
  if "top_n_sigma" in settings:
    x[~oracles.top_n_sigma(x, settings["top_n_sigma"])] = -np.inf
  n = 1000 if "top_h" not in settings else 0
  law = np.zeros(len(row))
  if n and not ("typical_p" in settings and np.isfinite(x[n:]).any()):
    rest = np.logaddexp.reduce(x[n:]) if "p_less" in settings else -np.inf
    p = np.exp(x[:n] - np.logaddexp(np.logaddexp.reduce(x[:n]), rest))
    if "p_less" in settings:
      keep = p >= (np.exp(x - np.logaddexp.reduce(x)) ** 2).sum()
      law[order[:n]] = np.where(keep, p, 0) / p[keep].sum()
    else:
      rest = {k: v for k, v in settings.items() if k != "top_n_sigma"}
      law[order[:n]] = oracles.plain(x[:n], rest, [0], 1)
    return law
  p = np.exp(x - x.max())
  s, a = np.cumsum(p), np.cumsum(p * (x - x.max()))
  keep = np.log(s) - a / s <= settings["top_h"] * (np.log(s[-1]) - a[-1] / s[-1])
  keep[0] = True
  law[order] = np.where(keep, p, 0) / p[keep].sum()
  return law


def test_no_filter_of_the_common_kind_drops_the_best_token():
  logits = contract.oracle_rows(np.random.default_rng(3))
  most = {"top_p": 1e-6, "min_p": 1.0, "top_n_sigma": 1e-6, "top_h": 1e-6, "epsilon": 1.0}
  for name, value in most.items():
    law = laws({name: value}, logits)
    assert (law[np.arange(len(law)), logits.argmax(-1)] > 0).all(), name


def test_off_is_off():
  """Every filter at the end of its range that keeps everything leaves the softmax as it was."""
  logits = contract.oracle_rows(np.random.default_rng(4))
  off = {"top_k": 2**31 - 1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon": 0.0}
  np.testing.assert_allclose(laws(off | {"top_n_sigma": 1e4}, logits), laws({}, logits), atol=1e-7)


def test_repeats_agrees_with_counting():
  rng = np.random.default_rng(5)
  for n in (0, 1, 2, 20, 60):
    text = rng.integers(0, 4, n).tolist()
    obs = contract.observe(np.zeros((1, 16)), history=text)
    for breakers, window in (((), 0), ((2,), 0), ((), 7), ((0, 1), 30)):
      ids = jax.tree.map(lambda x: jnp.asarray(x)[None], sampling.Ids.parse(list(breakers)))
      knobs = [jnp.asarray([x]) for x in (0.8, 1.75, 2, window)]
      got = -history.dry(obs.logits_BV, obs, *knobs, ids)[0]
      want = oracles.dry_penalties(text, 16, 0.8, 1.75, 2, window, breakers)
      np.testing.assert_allclose(got, want, rtol=1e-5)


def penalty(text, id, **knobs):
  """What DRY subtracts from the logit of an id after a text."""
  obs = contract.observe(np.zeros((1, 300)), history=text)
  law = contract.law(plain, {"dry_multiplier": 0.8} | knobs, obs)[0]
  return np.log(law[299]) - np.log(law[id])


def test_dry_spares_its_breakers():
  text = [5, 1, 2, 9, 5, 1, 2]
  assert penalty(text, 9) == pytest.approx(0.8 * 1.75, abs=1e-4)
  assert penalty(text, 9, dry_breakers=[9]) == pytest.approx(0.0, abs=1e-5)


def test_dry_counts_as_far_as_llama_cpp():
  passage = list(range(60))
  text = [*passage, 99, *passage]
  assert penalty(text, 99, dry_base=1.05) == pytest.approx(13.55, abs=0.01)
  assert np.isfinite(
    contract.law(
      plain,
      {"dry_multiplier": 1e3, "dry_base": 8.0},
      contract.observe(np.zeros((1, 300)), history=text),
    )
  ).all()


def test_dynatemp_reaches_zero_as_in_llama_cpp():
  two = np.full((1, 9), -np.inf)
  two[0, 3:5] = 0.1, 0.0
  law = contract.law(plain, {"temperature": 1e-3, "dynatemp_range": 1e-3}, contract.observe(two))
  np.testing.assert_allclose(law[0, 3:5], [1, 0], atol=1e-6)
  even = {"temperature": 1.0, "dynatemp_range": 1.0, "dynatemp_exponent": 100.0}
  peak = np.asarray([[9.0, 5.0, 0.0, 0.0]])
  np.testing.assert_allclose(contract.law(plain, even, contract.observe(peak))[0], [1, 0, 0, 0])


@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"min_p": 0.1}, {"banned": [0]}])
def test_xtc_at_threshold_zero_keeps_one_of_the_live(others):
  logits = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32))
  knobs = {"xtc_probability": 1.0, "xtc_threshold": 0.0} | others
  law = contract.law(plain, knobs, contract.observe(logits))[0]
  last = 2 if others.keys() & {"top_k", "min_p"} and "banned" not in others else 3
  last = 3 if others == {"min_p": 0.1} else last
  np.testing.assert_allclose(law, np.arange(4) == last, atol=1e-6)


def test_xtc_drops_nothing_where_it_would_drop_a_stop_id():
  logits = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32))
  obs, strike = contract.observe(logits), {"xtc_probability": 1.0}
  np.testing.assert_allclose(contract.law(plain, strike, obs), [[0, 0, 0.75, 0.25]], atol=1e-6)
  obs = obs.replace(stop_BE=obs.stop_BE.at[0, 0].set(0))
  np.testing.assert_allclose(contract.law(plain, strike, obs), np.exp(logits), atol=1e-6)


def test_a_threshold_is_the_same_however_many_bits_are_settled_at_once(monkeypatch):
  """GPUs settle four bits in a pass and other devices one."""
  logits = jnp.asarray(contract.oracle_rows(np.random.default_rng(3)))
  rows = logits.shape[0]
  calls = [
    (filters.top_k, jnp.arange(rows) + 1),
    (filters.top_p, jnp.linspace(0.0, 0.999, rows)),
    (filters.typical, jnp.linspace(0.05, 0.95, rows)),
    (filters.top_h, jnp.linspace(0.05, 0.95, rows)),
  ]
  want = [np.asarray(jax.jit(f)(logits, knob)) > -np.inf for f, knob in calls]
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, cuda, **others: cuda(*xs))
  for (f, knob), keep in zip(calls, want, strict=True):
    got = np.asarray(jax.jit(lambda x, k, f=f: f(x, k))(logits, knob)) > -np.inf
    np.testing.assert_array_equal(got, keep)
    assert 0 < keep.sum() < keep.size


def run(settings, logits_NV):
  """(state, law, token) of each step of one row that decodes N given rows of logits."""
  cfg = contract.rows(sampling.configure(plain, settings), 1)
  state, out = plain.init(cfg, 1), []
  step = jax.jit(lambda state, obs: contract.advance(plain, cfg, state, obs))
  for pos, logits in enumerate(logits_NV):
    before = state
    state, decision, token_B = step(state, contract.observe(logits[None], pos=pos))
    out.append((before, np.exp(np.asarray(decision.law_BV[0], np.float64)), int(token_B[0])))
  return out


def test_mirostat_follows_its_rule():
  rng = np.random.default_rng(6)
  logits = (rng.standard_normal((200, 300)) * 2).astype(np.float32)
  tau, eta = 1.5, 0.3  # nats
  bit = np.log(2)
  mu = 2 * tau / bit  # where llama.cpp begins
  surprises = []
  for row, (state, law, token) in zip(
    logits, run({"mirostat_tau": tau, "mirostat_eta": eta}, logits), strict=True
  ):
    assert abs(float(state.mu_B[0]) - mu * bit) < 1e-3
    want, surprise = oracles.mirostat(row, float(state.mu_B[0]) / bit)
    np.testing.assert_allclose(law, want, atol=1e-5)
    surprises.append(surprise[token])
    mu -= eta * (surprises[-1] - tau / bit)
  assert abs(np.mean(surprises) - tau / bit) < 0.1 / bit


def test_mirostat_does_not_wind_up_where_the_model_is_sure():
  logits = np.zeros((300, 50), np.float32)
  logits[:, 7] = 30.0
  state = run({"mirostat_tau": 3.0, "mirostat_eta": 1.0}, logits)[-1][0]
  assert float(state.mu_B[0]) <= 2 * np.log(50) + 1e-4


def test_adaptive_p_follows_its_rule():
  rng = np.random.default_rng(7)
  logits = (rng.standard_normal((100, 40)) * 2).astype(np.float32)
  target, rho = 0.3, 0.8
  total, weight = target / (1 - rho), 1 / (1 - rho)
  knobs = {"adaptive_p_target": target, "adaptive_p_decay": rho, "min_p": 0.05}
  for row, (_, law, token) in zip(logits, run(knobs, logits), strict=True):
    np.testing.assert_allclose(law, oracles.plain(row, knobs, mean=total / weight), atol=2e-5)
    p = oracles.plain(row, {"min_p": 0.05})[token]
    total, weight = p + rho * total, 1 + rho * weight


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"dynatemp_range": 0.1, "edt_theta": 1.0}, "both set the temperature"),
    ({"mirostat_tau": 1.0, "adaptive_p_target": 0.5}, "both end the chain"),
    ({"temperature": 0.0, "xtc_probability": 0.5}, "nothing at temperature 0"),
    ({"logit_bias": "12"}, "12:-5,7:2.5"),
    ({"logit_bias": {-1: 2.0}}, "-1 is not a token id"),
    ({"banned": list(range(301))}, "300 are the most"),
    ({"banned": "a"}, "12,7"),
    ({"temperature": float("nan")}, "finite"),
  ],
)
def test_contradictions_and_nonsense_are_refused(knobs, message):
  refusal([message], sampling.configure, plain, knobs)


def test_lists_may_be_text():
  a = sampling.configure(plain, {"logit_bias": "12:-5,7:2.5", "banned": "3,4", "allowed": ""})
  b = sampling.configure(plain, {"logit_bias": {12: -5, 7: 2.5}, "banned": [3, 4]})
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_a_ban_of_everything_allowed_is_refused():
  refusal(["leaves no token"], sampling.configure, plain, {"allowed": [3], "banned": [3, 4]})
