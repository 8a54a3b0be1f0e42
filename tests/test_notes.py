"""What the notes in docs/notes claim, each as a test; the docstring begins with the note's id."""

import dataclasses
import functools
import json
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import contract
import demo_corpus
import hlo
import int8
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import TINY, write_tokenizer
from test_distributed import free_port
from test_engine import Words, engine
from test_scheduler import LONG, fed

from entropix_jax import config, metrics, rowwise, sampling
from entropix_jax.checkpoints import chat, checkpoint, vocabulary
from entropix_jax.decoding import adaptive, drafters, groups, mixing, select, verify
from entropix_jax.engine import setup, state, step
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.model import kvcache, linear, llama, rope, sharding, weights
from entropix_jax.sampling import (
  _dirichlet,
  _quantile,
  draw,
  dslider,
  entropy_target,
  plain,
  presets,
  quadrant,
)
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _temperature as temperature

NOTES = Path(__file__).parent.parent / "docs" / "notes"
LN2 = np.log(2.0)


def test_n01_a_uniform_vocabulary_has_entropy_ln_v():
  """n01: nats, not bits."""
  seen = metrics.spread(jnp.zeros((1, 128_256)))
  np.testing.assert_allclose(seen.ent, np.log(128_256), rtol=1e-6)
  np.testing.assert_allclose(seen.varent, 0.0, atol=1e-6)
  np.testing.assert_allclose(seen.ent[0] / LN2, 16.97, atol=0.01)


def test_n01_converted_thresholds_decide_as_bits_do():
  """n01: the branch is the one that the ancestor's conditions, in bits, would choose."""
  logits = contract.mixed_observation(np.random.default_rng(1), 96, vocab=601).logits_BV
  cases = [contract.case_logits(case["p"], 601) for case in quadrant.CASES.values()]
  logits = np.concatenate([logits, cases])
  expected = []
  for row in logits:
    ent, varent = oracles.ent_varent(np.exp(oracles.log_softmax(row)))
    ent, varent = ent / LN2, varent / LN2**2
    if varent < 0.1:
      expected.append("flow" if ent < 0.1 else "ask" if ent > 3.0 else "middle")
    else:
      expected.append("middle" if varent <= 5.0 else "fork" if ent < 5.0 else "mist")
  assert contract.branches(quadrant, {}, contract.observe(logits)) == expected
  assert set(expected) == set(quadrant.BRANCHES)


def dear(x_BV):
  return jnp.sort(x_BV, axis=-1)


def cheap(x_BV):
  return x_BV * 2.0


NEED_B, ONES_BV = jnp.array([True, False]), jnp.ones((2, 8))


def chosen(need_B, x_BV, **how):
  return rowwise.any_row(need_B, dear, cheap, x_BV, **how)


def primitives(jaxpr):
  """Names of all primitives in a jaxpr and in those it holds."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for value in eqn.params.values():
      for inner in value if isinstance(value, list | tuple) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from primitives(inner)


def test_n02_vmapped_cond_is_no_branch():
  """n02: nothing of the condition is left, and both sides are there."""

  def per_row(need, x_V):
    return jax.lax.cond(need, dear, cheap, x_V)

  batched = set(primitives(jax.make_jaxpr(jax.vmap(per_row))(NEED_B, ONES_BV).jaxpr))
  assert "cond" not in batched
  assert {"sort", "mul", "select_n"} <= batched
  assert "cond" in set(primitives(jax.make_jaxpr(per_row)(NEED_B[0], ONES_BV[0]).jaxpr))


@pytest.mark.parametrize(
  ("platform", "many_kernels", "conditions"),
  [("cpu", 0, 1), ("tpu", 0, 1), ("cuda", 0, 0), ("rocm", 0, 0), ("cuda", 1, 1), ("rocm", 1, 0)],
)
def test_n02_any_row_keeps_one_condition_where_it_pays(platform, many_kernels, conditions):
  """n02: what is lowered for each platform, compiled here only so that constant cases fold away."""
  checks = [jax.export.DisabledSafetyCheck.platform()]
  export = jax.export.export(
    jax.jit(functools.partial(chosen, many_kernels=bool(many_kernels))),
    platforms=(platform,),
    disabled_checks=checks,
  )
  lowered = jax.jit(export(NEED_B, ONES_BV).call).lower(NEED_B, ONES_BV)
  compiled = lowered.compile().as_text()
  assert len(re.findall(r"\bconditional\(", compiled)) == conditions


@pytest.mark.parametrize("need", [[True, False, True], [False] * 3, [True] * 3])
def test_n02_what_is_known_in_advance_is_no_condition(need):
  """n02: a NumPy array says it while the program is traced; then only what is needed is in the program."""
  x_BV = jnp.asarray(np.random.default_rng(2).standard_normal((3, 8)), jnp.float32)
  known = functools.partial(chosen, np.asarray(need))
  found = set(primitives(jax.make_jaxpr(known)(x_BV).jaxpr))
  assert "cond" not in found
  assert ("sort" in found) == any(need)
  expected = jax.jit(chosen)(jnp.asarray(need), x_BV)
  np.testing.assert_array_equal(jax.jit(known)(x_BV), expected)


@pytest.mark.parametrize("need", [[True, False, True], [False] * 3, [True] * 3])
def test_n02_any_row_picks_row_by_row(need):
  """n02: a row's answer does not depend on what the others need."""
  x_BV = jnp.asarray(np.random.default_rng(2).standard_normal((3, 8)), jnp.float32)
  expected = np.where(np.asarray(need)[:, None], dear(x_BV), cheap(x_BV))
  np.testing.assert_array_equal(jax.jit(chosen)(jnp.asarray(need), x_BV), expected)


TO_NATS = {"1": 1.0, "bit": LN2, "bit^2": LN2**2, "/bit": 1 / LN2, "/bit^2": 1 / LN2**2}

# Knob: the ancestor's number and its unit, from fblissjr/entropix-annotated 5aadcf6.
ANCESTOR = {
  "low_ent": (0.1, "bit"), "low_varent": (0.1, "bit^2"), "ask_ent": (3.0, "bit"),
  "high_ent": (5.0, "bit"), "high_varent": (5.0, "bit^2"),
  "temp": (0.666, "1"), "top_k": (27, "1"), "top_p": (0.9, "1"), "min_p": (0.03, "1"),
  "warm_cap": (1.5, "1"), "ask_temp": (1.3, "1"), "ask_temp_attn_ent": (0.2, "/bit"),
  "fork_temp": (1.2, "1"), "fork_temp_score": (0.3, "1"), "fork_k_dispersion": (0.5, "1"),
  "mist_temp": (2.0, "1"), "mist_floor": (2.0, "1"), "mist_temp_spread": (0.5, "/bit^2"),
  "mist_p_attn_ent": (0.2, "/bit"), "mist_p_least": (0.5, "1"),
  "mid_temp_ent": (0.3, "/bit"), "mid_temp_varent": (0.3, "/bit^2"),
  "mid_temp_attn_ent": (0.2, "/bit"), "mid_temp_spread": (0.2, "/bit^2"),
  "mid_temp_agreement": (0.2, "1"), "mid_p_spread": (0.1, "/bit^2"),
  "mid_k_score": (0.3, "1"), "mid_k_agreement": (0.2, "1"),
  "mid_min_p_ent": (0.5, "/bit"), "mid_min_p_varent": (0.5, "/bit^2"), "best_of": (5, "1"),
}  # fmt: skip


# Knobs of later versions, at a default where they do nothing.
IDLE = {
  name: bound
  for bound, names in {
    quadrant.NEVER: "mist_ent low_attn_ent low_attn_norm low_spread low_dispersion low_score",
    -quadrant.NEVER: "fork_score high_attn_ent high_attn_norm high_spread high_dispersion high_score",
    100.0: "mist_cap",
    False: "mid_inverse",
  }.items()
  for name in names.split()
}


def test_n03_every_quadrant_number_is_the_ancestors():
  """n03: code, note and this table say the same, to the four digits that are written; the other
  knobs are idle, and the note names them."""
  defaults = sampling.knobs(quadrant)
  here = {name: round(x * TO_NATS[unit], 4) for name, (x, unit) in ANCESTOR.items()}
  assert defaults == here | IDLE
  text = (NOTES / "n03-thresholds.md").read_text()
  assert [name for name in IDLE if f"`{name}`" not in text] == []
  table = re.findall(r"^\| (\w+) \| ([\d.]+) \| (\S+) \| ([\d.]+) \|$", text, re.MULTILINE)
  assert {name: (float(x), unit) for name, x, unit, _ in table} == ANCESTOR
  assert {name: float(x) for name, _, _, x in table} == here
  assert quadrant.TEMP_MAX == 3.0


def test_n03_the_ancestors_two_tables_disagree_between_three_and_five_bits():
  """n03: with 3 and 5 bits swapped, as in JAX, mist is shadowed by fork and ask starts later."""

  def branch(ent, varent, ask, mist):
    if varent < 0.1:
      return "flow" if ent < 0.1 else "ask" if ent > ask else "middle"
    if varent <= 5.0:
      return "middle"
    return "fork" if ent < 5.0 else "mist" if ent > mist else "middle"

  torch, jax_ = {"ask": 3.0, "mist": 5.0}, {"ask": 5.0, "mist": 3.0}
  assert (branch(4.0, 0.0, **torch), branch(4.0, 0.0, **jax_)) == ("ask", "middle")
  assert branch(4.0, 6.0, **torch) == branch(4.0, 6.0, **jax_) == "fork"
  tie = contract.observe(contract.case_logits([1 / 16] * 16)[None])  # 4 bits, varentropy 0
  assert contract.branches(quadrant, {}, tie) == [branch(4.0, 0.0, **torch)]


def live_scores():
  return np.random.default_rng(0).standard_normal((32, 20)).astype(np.float32)


def mean_entropy_in_bits(score_NS):
  return np.mean([oracles.ent_varent(np.exp(oracles.log_softmax(s)))[0] for s in score_NS]) / LN2


def test_n04_padding_drowns_the_ancestors_attention_entropy():
  """n04: 20 live keys, the unwritten slots at score 0 instead of excluded."""
  live_NS = live_scores()
  padded = [mean_entropy_in_bits(np.pad(live_NS, ((0, 0), (0, S - 20)))) for S in (64, 1024, 4096)]
  np.testing.assert_allclose(padded, [5.7, 10.0, 12.0], atol=0.05)
  np.testing.assert_allclose(mean_entropy_in_bits(live_NS), 3.7, atol=0.05)


def test_n04_attn_stats_do_not_see_padding():
  """n04: any number of dead slots, before or after the live ones, changes no statistic."""
  live_NS = live_scores()
  alone = metrics.attn_stats(jnp.asarray(live_NS)[None])
  np.testing.assert_allclose(alone.attn_ent[0] / LN2, mean_entropy_in_bits(live_NS), rtol=1e-5)
  for before, after in ((0, 44), (0, 4076), (500, 504)):
    padded = np.pad(live_NS, ((0, 0), (before, after)), constant_values=-np.inf)
    seen = metrics.attn_stats(jnp.asarray(padded)[None])
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(seen), strict=True):
      np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)


H = 64
INTERLEAVED = np.arange(H).reshape(2, -1).T.ravel()  # 0, 32, 1, 33, ...: what each place takes


def turned(x_BTNH, pos_T):
  """Half-split pairs, as the package does it."""
  cos, sin = rope.angles(config.RopeConfig(), H, jnp.asarray(pos_T)[None])
  return np.asarray(rope.rotate(jnp.asarray(x_BTNH, jnp.float32), cos, sin))


def turned_interleaved(x_BTNH, pos_T):
  """Neighbours as real and imaginary part, in float64."""
  freq = 500_000.0 ** (-np.arange(0, H, 2) / H)
  spin = np.exp(1j * np.asarray(pos_T)[None, :, None, None] * freq)
  z = (x_BTNH[..., ::2] + 1j * x_BTNH[..., 1::2]) * spin
  return np.stack([z.real, z.imag], -1).reshape(x_BTNH.shape)


def scores(q_BTNH, k_BTNH):
  return np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)


def scores_of_heads():
  """Scores under our pairing, of permuted channels under the other, and of those under ours."""
  heads, pos = np.random.default_rng(5).standard_normal((2, 1, 12, 3, H)), np.arange(12) * 7
  swapped = heads[..., INTERLEAVED]
  ways = (turned, heads), (turned_interleaved, swapped), (turned, swapped)
  return [scores(turn(q, pos), turn(k, pos)) for turn, (q, k) in ways]


def test_n05_the_two_pairings_agree_only_under_the_permutation():
  """n05: the same heads, channels permuted, score alike under the other pairing and not under ours."""
  ours, other, misread = scores_of_heads()
  np.testing.assert_allclose(other, ours, atol=1e-3)
  apart = ~np.eye(12, dtype=bool)
  assert np.abs(misread - ours)[..., apart].mean() > 1.0


def test_n05_the_wrong_pairing_is_invisible_at_distance_zero():
  """n05: norms and the score of a token with itself do not tell which pairing was meant."""
  ours, _, misread = scores_of_heads()
  here = np.arange(12)
  np.testing.assert_allclose(misread[..., here, here], ours[..., here, here], atol=1e-4)


def test_n05_the_scale_factor_moves_only_slow_channels():
  """n05: 8 against 32 is a factor 4 on slow channels, nothing on fast ones; 3.2 models use 32."""
  assert config.PRESETS["llama3_1b"].rope.factor == config.PRESETS["llama3_3b"].rope.factor == 32.0
  assert config.PRESETS["llama3_8b"].rope.factor == config.PRESETS["llama3_70b"].rope.factor == 8.0
  at_8 = rope.inverse_frequencies(config.PRESETS["llama3_8b"].rope, H)
  at_32 = rope.inverse_frequencies(config.PRESETS["llama3_1b"].rope, H)
  ratio = at_8 / at_32
  np.testing.assert_allclose(ratio[[0, -1]], [1.0, 4.0], rtol=1e-6)
  assert (np.diff(ratio) >= -1e-6).all()


def test_n05_rounding_of_frequencies_shows_at_long_range():
  """n05: frequencies made in float32 and float64 ones rounded once differ by 1e-4 or more in a cosine."""
  f32 = np.float32
  exact = (500_000.0 ** (-np.arange(0, H, 2) / H)).astype(f32)
  trained = f32(1) / f32(500_000) ** (np.arange(0, H, 2, dtype=f32) / f32(H))
  pos = np.arange(8257, dtype=f32)[:, None]
  gap = np.abs(np.cos(pos * exact) - np.cos(pos * trained))
  assert 1e-4 < gap.max() < 1e-3
  assert gap[:64].max() < 1e-5


@pytest.mark.parametrize(
  ("backend", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")]
)
def test_n06_auto_is_float32_on_a_cpu_and_bfloat16_elsewhere(monkeypatch, backend, dtype):
  """n06: the rule, whatever device the tests run on; a dtype that is named is kept."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert setup.compute_dtype("auto") == dtype
  assert setup.compute_dtype("float16") == "float16"


def two_level(k, t, n):
  """k equal tokens share 1 - t, n equal ones share t."""
  return np.asarray([(1 - t) / k] * k + [t / n] * n)


def zipf(n):
  return 1 / np.arange(1, n + 1) / (1 / np.arange(1, n + 1)).sum()


# As the note writes it: a law and its branch, with entropy and varentropy to the digits written.
LAWS = {f"exact tie of {n}": np.full(n, 1 / n) for n in (2, 8, 16)}
for k, word in ((2, "two equal tokens"), (1, "one token")):
  LAWS |= {f"{word}, {t} % over 100 ids": two_level(k, t / 100, 100) for t in (2, 5, 10)}
for p in (0.9, 0.99, 0.999, 0.58):
  LAWS[f"{p} on one, the rest over 128,255 ids"] = two_level(1, 1 - p, 128_255)
LAWS |= {"1/2, 1/4, 1/8, ...": 0.5 ** np.arange(1, 60), "Zipf over 128,256 ids": zipf(128_256)}


def seen_branches(laws, vocab):
  logits = np.stack([contract.case_logits(p, vocab) for p in laws])
  return contract.branches(quadrant, {}, contract.observe(logits))


def test_n07_table_of_closed_forms():
  """n07: entropy, varentropy and branch of every row of the note's table."""
  text = (NOTES / "n07-varentropy.md").read_text()
  rows_ = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \| (\w+) \|$", text, re.MULTILINE)
  assert [name for name, *_ in rows_] == list(LAWS)
  logits = np.stack([contract.case_logits(p, 128_256) for p in LAWS.values()])
  seen = metrics.spread(jnp.asarray(logits))
  np.testing.assert_allclose(seen.ent, [float(r[1]) for r in rows_], atol=6e-4)
  np.testing.assert_allclose(seen.varent, [float(r[2]) for r in rows_], atol=6e-3)
  cfg = contract.rows(quadrant.Config(), len(rows_))
  branch_B = jax.jit(quadrant.branches)(cfg, seen.ent, seen.varent)
  # A tie of 8 stands on the edge, 3 bits exactly: float32 may put it on either side.
  branches = [quadrant.BRANCHES[b] for b in branch_B]
  edge = list(LAWS).index("exact tie of 8")
  assert branches[edge] in ("middle", "ask")
  assert branches[:edge] + branches[edge + 1 :] == [r[3] for i, r in enumerate(rows_) if i != edge]


@pytest.mark.parametrize(("k", "t", "n"), [(1, 0.05, 100), (2, 0.1, 7), (5, 0.3, 400), (3, 0.5, 3)])
def test_n07_two_level_laws_have_a_closed_form(k, t, n):
  """n07: varent = t (1 - t) ln^2((1 - t) n / (t k))."""
  seen = metrics.spread(jnp.asarray(np.log(two_level(k, t, n)), jnp.float32))
  expected = t * (1 - t) * np.log((1 - t) * n / (t * k)) ** 2
  np.testing.assert_allclose(seen.varent, expected, rtol=1e-5, atol=1e-6)


def test_n07_a_clean_fork_is_no_fork():
  """n07: two clear camps read middle; one favourite over a thick tail reads fork."""
  laws = [LAWS["exact tie of 2"], two_level(1, 0.05, 100)]
  assert seen_branches(laws, contract.V) == ["middle", "fork"]


def test_n07_ask_is_all_but_unreachable():
  """n07: sixteen equal tokens ask, but not with one per cent of mass over a thousand others."""
  assert seen_branches([np.full(16, 1 / 16), two_level(16, 0.01, 1000)], 1016) == ["ask", "middle"]


def plain_law(knobs, logits, **past):
  """Probabilities that `plain` states with these knobs."""
  return contract.law(plain, knobs, contract.observe(logits, **past))


def made_up_laws(n=40, V=200):
  """Logits of laws from sharp to open."""
  rng = np.random.default_rng(8)
  return (rng.standard_normal((n, V)) * rng.uniform(1.0, 3.5, (n, 1))).astype(np.float32)


def with_rows(rows_):
  """The made-up laws, the first of them replaced: one shape compiles once."""
  logits = made_up_laws()
  for i, row in enumerate(rows_):
    logits[i] = np.pad(row, (0, 200 - len(row)), constant_values=-np.inf)
  return logits


def mean_entropy(p_NV):
  return np.mean([oracles.ent_varent(p)[0] for p in p_NV])


def apart(p_NV, q_NV):
  """Mean total variation."""
  return 0.5 * np.abs(p_NV - q_NV).sum(-1).mean()


def refitted(name, sign, entropy, hot):
  """The filter's number at which the law behind it has this mean entropy, the temperature last."""
  low, high = 0.0, 1.0
  for _ in range(18):
    middle = (low + high) / 2
    law = plain_law({name: middle, **hot}, made_up_laws())
    low, high = (middle, high) if sign * (mean_entropy(law) - entropy) < 0 else (low, middle)
  return law


# Filter: its number, and the two columns of the note. Refitting min-p is exact and so has its own test.
MOVED = {
  "top_k": (20, 0.00, 0.00),
  "top_n_sigma": (1.0, 0.00, 0.00),
  "min_p": (0.1, 0.29, 0.00),
  "top_p": (0.9, 0.20, 0.03),
  "top_h": (0.6, 0.16, 0.09),
  "epsilon": (0.02, 0.13, 0.14),
}


def test_n08_a_filters_number_means_nothing_without_the_order():
  """n08: the note's table, of laws at temperature 1.5 before and behind each filter."""
  text = (NOTES / "n08-plain.md").read_text()
  table = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
  assert {name: tuple(map(float, x)) for name, *x in table} == MOVED
  logits, hot = made_up_laws(), {"temperature": 1.5}
  late = hot | {"temperature_last": True}
  for name, (value, same_number, refit) in MOVED.items():
    first = plain_law({name: value, **hot}, logits)
    assert apart(first, plain_law({name: value, **late}, logits)) == pytest.approx(
      same_number, abs=0.006
    )
    if name in ("top_p", "top_h", "epsilon"):
      sign = -1 if name == "epsilon" else 1
      law = refitted(name, sign, mean_entropy(first), late)
      assert apart(first, law) == pytest.approx(refit, abs=0.006)


@pytest.mark.parametrize("heat", [0.5, 1.5, 3.0])
def test_n08_min_p_behind_the_temperature_is_another_min_p(heat):
  """n08: m after a temperature T cuts what m^T cuts before it."""
  logits = made_up_laws()
  first = plain_law({"min_p": 0.1, "temperature": heat}, logits)
  knobs = {"min_p": 0.1**heat, "temperature": heat, "temperature_last": True}
  np.testing.assert_allclose(first, plain_law(knobs, logits), atol=1e-6)


def test_n08_top_n_sigma_does_not_see_the_temperature():
  """n08: the same tokens are kept at every temperature."""
  logits = made_up_laws()
  kept = [plain_law({"top_n_sigma": 1.0, "temperature": t}, logits) > 0 for t in (0.5, 1.0, 2.0)]
  np.testing.assert_array_equal(kept[0], kept[1])
  np.testing.assert_array_equal(kept[2], kept[1])
  assert 1.0 < kept[1].sum(-1).mean() < 20.0


def top_h_reference(p, share):
  """How many the published code keeps: its partial sum of -p ln p is not renormalised."""
  return int((np.cumsum(-p * np.log(p)) <= share * oracles.ent_varent(p)[0]).sum())


def test_n08_top_h_of_the_paper_is_not_top_h_of_its_code():
  """n08: twelve near equals keep 2 against 4, Zipf over a hundred ids 5 against 10; ours is the paper's."""
  # A tie is kept or left whole, so the twelve are told apart a little.
  laws = [np.full(12, 1 / 12) * (1 - 1e-4 * np.arange(12)), zipf(100)]
  kept = (plain_law({"top_h": 0.4}, with_rows(map(np.log, laws))) > 0).sum(-1)
  for p, ours, paper, code in zip(laws, kept[:2], (2, 5), (4, 10), strict=True):
    prefix = [oracles.ent_varent(p[:r] / p[:r].sum())[0] for r in range(1, len(p) + 1)]
    assert ours == sum(x <= 0.4 * prefix[-1] for x in prefix) == paper
    p = p / p.sum()
    assert top_h_reference(p, 0.4) == code


def test_n08_adaptive_p_needs_a_truncation():
  """n08: three live tokens among 128,256: half of the mass goes to ids that have none."""
  logits = np.full(128_256, -30.0)
  logits[:3] = np.log([0.55, 0.30, 0.15])
  alone = oracles.plain(logits, {"adaptive_p_target": 0.55}, mean=0.55)
  assert alone[3:].sum() == pytest.approx(0.47, abs=0.01)
  cut = oracles.plain(logits, {"adaptive_p_target": 0.55, "min_p": 0.05}, mean=0.55)
  assert cut[3:].sum() == 0.0


def test_n08_mirostat_lets_go_while_the_model_is_sure():
  """n08: twenty sure tokens wind mu up to its cap, where next to nothing is filtered any more."""
  tau, eta = 2.0, 0.5
  sure = with_rows([np.where(np.arange(200) == 7, 30.0, 0.0)] * 40)
  cfg = contract.rows(sampling.configure(plain, {"mirostat_tau": tau, "mirostat_eta": eta}), 40)
  decision, _ = contract.decide(plain, cfg, contract.observe(sure))
  fresh = state = plain.init(cfg, 40)
  commit = jax.jit(plain.commit)
  for _ in range(20):
    state = commit(cfg, state, decision, jnp.full((40,), 7))
  np.testing.assert_allclose(fresh.mu_B, 2 * tau)
  assert 2 * tau + 20 * eta * tau > 2 * np.log(200)  # where mu would be without its cap
  np.testing.assert_allclose(state.mu_B, 2 * np.log(200), rtol=1e-5)
  surprise = -np.asarray(jax.nn.log_softmax(jnp.asarray(made_up_laws()), axis=-1))
  left = [float((np.exp(-surprise) * (surprise > m)).sum(-1).mean()) for m in (4.0, 10.6)]
  assert left[0] > 0.1
  assert left[1] < 0.005


def test_n08_the_repetition_penalty_depends_on_a_constant():
  """n08: adding the same to all logits changes no law, but what this penalty makes of it."""
  logits = made_up_laws()
  past = {"history": list(range(0, 30)), "prompt": 1}

  def moved(knobs):
    return apart(plain_law(knobs, logits, **past), plain_law(knobs, logits + 16, **past))

  assert moved({}) < 1e-5
  assert moved({"presence_penalty": 1.0, "frequency_penalty": 0.5}) < 1e-5
  assert moved({"repetition_penalty": 1.3}) > 0.05


def later_preset(name):
  return sampling.configure(quadrant, presets.load(name).knobs)


def random_signals(B=4000):
  """(ent_B, varent_B, attn): signals drawn so that all conditions of the later versions occur."""
  rng = np.random.default_rng(9)
  low_B = 10 ** rng.uniform(-4, -0.5, B)
  ent_B = np.where(rng.random(B) < 0.4, low_B, rng.uniform(0, 3, B))
  varent_B = np.where(rng.random(B) < 0.5, 10 ** rng.uniform(-4, -0.5, B), rng.uniform(0, 5, B))
  return ent_B, varent_B, contract.random_attn(rng, B)


def chosen_branches(cfg, ent_B, varent_B, attn):
  code_B = quadrant.branches(cfg, jnp.asarray(ent_B, jnp.float32), jnp.asarray(varent_B), attn)
  return [quadrant.BRANCHES[b] for b in code_B]


def test_n09_every_later_number_is_as_the_note_says():
  """n09: the note's table is what the presets hold."""
  text = (NOTES / "n09-later-quadrants.md").read_text()
  head, *lines = re.findall(r"^\| (\w+)" + r" \| (\S+)" * 4 + r" \|$", text, re.MULTILINE)
  assert head[0] == "knob"
  for i, name in enumerate(head[1:], 1):
    table = {line[0]: json.loads(line[i]) for line in lines if line[i] != "-"}
    assert presets.load(name).knobs == table
  assert presets.load("smollm-1.7b").knobs == presets.load("smollm-360m").knobs


def test_n09_the_70b_table_decides_as_six_metrics_do():
  """n09: entropy and varentropy in the version's bits, attention against the preset's own numbers."""
  cfg = later_preset("entropix-2410-70b")
  ent_B, varent_B, attn = random_signals()
  # A third of the rows is put where all of a corner's attention conditions hold.
  rng = np.random.default_rng(10)
  calm, torn = rng.random((2, len(ent_B))) < 0.3
  fork = rng.random(len(ent_B)) < 0.2
  columns = []
  for name, low, high, forking in (
    ("attn_ent_norm", 0.5, 0.8, 0.5), ("attn_spread", 0.1, 0.9, 0.9),
    ("head_dispersion", 0.4, 0.5, 0.4), ("score_mag", 2.0, 3.3, 3.3),
  ):  # fmt: skip
    column = jnp.where(torn, high, jnp.where(calm, low, getattr(attn, name)))
    attn = attn.replace(**{name: jnp.where(fork, forking, column)})
    columns.append(np.asarray(getattr(attn, name), np.float64))
  wanted = []
  for h, v, n, s, d, i in zip(ent_B / LN2, varent_B / LN2**2, *columns, strict=True):
    low_attn = n < cfg.low_attn_norm and d < cfg.low_dispersion
    calm_attn = low_attn and s < cfg.low_spread and i < cfg.low_score
    high_attn = n > cfg.high_attn_norm and s > cfg.high_spread and d > cfg.high_dispersion
    if h < 0.01 and v < 0.05 and calm_attn:
      wanted.append("flow")
    elif h > 2.1 and v < 0.05 and calm_attn:
      wanted.append("ask")
    elif h < 2.1 and v > 5.8 and low_attn and s > cfg.high_spread and i > cfg.fork_score:
      wanted.append("fork")
    elif h > 0.7 and v > 5.8 and high_attn and i > cfg.high_score:
      wanted.append("mist")
    else:
      wanted.append("middle")
  assert agree(chosen_branches(cfg, ent_B, varent_B, attn), wanted) == set(quadrant.BRANCHES)


def agree(got, wanted):
  """The branches that occur; a row or two of thousands may stand within rounding of an edge."""
  assert sum(a != b for a, b in zip(got, wanted, strict=True)) <= 2
  return set(got)


def test_n09_the_server_table_decides_as_the_server_does():
  """n09: everything in the version's bits."""
  cfg = later_preset("entropix-2410-server")
  ent_B, varent_B, attn = random_signals()
  attn_ent_B, spread_B = np.asarray(attn.attn_ent) / LN2, np.asarray(attn.attn_spread) / LN2**2
  wanted = []
  for h, v, a, s in zip(ent_B / LN2, varent_B / LN2**2, attn_ent_B, spread_B, strict=True):
    calm = v < 0.4 and a < 1 and s < 0.3
    if calm and (h < 0.8 or h > 2.5):
      wanted.append("flow" if h < 0.8 else "ask")
    elif h < 2.5 and v > 1.2 and a < 1 and s > 0.8:
      wanted.append("fork")
    else:
      wanted.append("mist" if h > 1.7 and v > 1.2 and a > 2 and s > 0.8 else "middle")
  assert agree(chosen_branches(cfg, ent_B, varent_B, attn), wanted) == set(quadrant.BRANCHES)


def test_n09_gates_are_open_where_nothing_is_measured_and_by_default():
  """n09: attention never moves the default's branch, and without it the gates let everything by."""
  ent_B, varent_B, attn = random_signals(1000)
  plain_one = quadrant.Config()

  def chosen(cfg, attn):
    return chosen_branches(cfg, ent_B, varent_B, attn)

  assert chosen(plain_one, attn) == chosen(plain_one, None)
  gated = later_preset("entropix-2410-70b")
  # With its gates open, fork takes all below high_ent, and mist_ent is idle with them.
  opened = chosen(gated.replace(**IDLE), attn)
  assert chosen(gated, None) == opened != chosen(gated, attn)


def test_n09_the_70b_attention_thresholds_are_a_length():
  """n09: over 4096 padded slots, 11.926 and 11.915 bits are passed between 220 and 280 tokens."""
  live = np.random.default_rng(0).standard_normal((8, 400)).astype(np.float32)
  lengths = np.arange(20, 401, 20)
  ents = [mean_entropy_in_bits(np.pad(live[:, :n], ((0, 0), (0, 4096 - n)))) for n in lengths]
  assert (np.diff(ents) < 0).all()
  high, low = (lengths[np.argmax(np.asarray(ents) < x)] for x in (11.926, 11.915))
  assert (high, low) == (240, 280)


def test_n09_the_server_is_hottest_where_the_model_is_sure():
  """n09: 2.0 up to 0.396 nats, 1.43 at one, 1.09 at three; best of five draws hides it."""
  cfg = later_preset("entropix-2410-server")

  def seen(p):
    attn = contract.random_attn(np.random.default_rng(0), 1)
    attn = attn.replace(attn_ent=jnp.ones((1,)), attn_spread=jnp.zeros((1,)))  # between the gates
    obs = contract.observe(contract.case_logits(p)[None], attn)
    decision = contract.decided(quadrant, cfg, obs)
    assert quadrant.BRANCHES[int(decision.branch_B[0])] == "middle"
    ent = float(obs.raw.ent[0])
    return ent, float(decision.stats["temperature"][0]), np.exp(np.asarray(decision.law_BV[0]))

  def rule(ent):
    return min(2.0, 0.8 * math.sqrt((1.2 * ent + 2) / ent))

  np.testing.assert_allclose([rule(x) for x in (0.396, 1.0, 3.0)], [2.0, 1.43, 1.09], atol=0.005)
  for p in ([0.97] + [0.03 / 8] * 8, [0.4, 0.3, 0.2, 0.1], [0.1] * 10):
    ent, temp, _ = seen(p)
    assert temp == pytest.approx(rule(ent), rel=1e-4)
  sure = [0.97] + [0.03 / 8] * 8
  hot = oracles.truncated(np.log(sure), 2.0, 40, 0.9, 0.05)[0]
  assert hot == pytest.approx(0.67, abs=0.01)
  assert seen(sure)[2][0] == pytest.approx(1 - (1 - hot) ** 5, abs=1e-4)


def heated(scores, temp):
  """(entropy, varentropy, third central moment of ln p) of softmax(scores / temp), float64."""
  logp = oracles.log_softmax(np.asarray(scores, np.float64) / temp)
  p = np.exp(logp)
  ent = -(p * logp).sum()
  return ent, (p * (logp + ent) ** 2).sum(), (p * (logp + ent) ** 3).sum()


def test_n10_entropy_grows_with_ln_temperature_by_the_varentropy():
  """n10: dH/d ln T = V and d2H/d(ln T)^2 = -(mu3 + 2 V), by differences; the ancestor's d2H/dT2 is off."""
  rng = np.random.default_rng(10)
  ancestor_off, other_sign = [], 0
  for _ in range(20):
    scores, temp, e = rng.standard_normal(60) * rng.uniform(0.5, 5), rng.uniform(0.3, 2.0), 1e-4
    (below, *_), (ent, varent, mu3), (above, *_) = (
      heated(scores, temp * math.exp(x)) for x in (-e, 0, e)
    )
    np.testing.assert_allclose((above - below) / (2 * e), varent, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(
      (above - 2 * ent + below) / e**2, -(mu3 + 2 * varent), rtol=1e-4, atol=1e-5
    )
    right, wrong = -(mu3 + 3 * varent) / temp**2, -(2 * mu3 + 3 * varent) / temp**2
    d = 1e-4 * temp
    low, high = (heated(scores, temp + x)[0] for x in (-d, d))
    np.testing.assert_allclose((high - 2 * ent + low) / d**2, right, rtol=1e-4, atol=1e-4)
    ancestor_off.append(abs(wrong / right - 1))
    other_sign += wrong * right < 0
  assert np.median(ancestor_off) > 0.3
  assert other_sign > 0


def steered(logits, **knobs):
  """The sampler's decision on rows that have no past, aimed at a constant."""
  settings = {"steer": True, "w_mean": 0.0, **knobs}
  return contract.decided(entropy_target, settings, contract.observe(logits))


def test_n10_the_entropy_asked_for_is_the_entropy_drawn_from():
  """n10: met to a thousandth of a nat where the range has it, by the temperature that bisection finds."""
  logits = made_up_laws()
  for target in (0.3, 1.5):
    decision = steered(logits, w_const=target, min_p=0.0, temp_least=0.05, temp_most=20.0)
    for row, temp, ent in zip(
      logits, decision.stats["temperature"], decision.stats["law_entropy"], strict=True
    ):
      assert float(ent) == pytest.approx(max(target, heated(row, 0.05)[0]), abs=1e-3)
      low, high = 0.05, 20.0
      for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if heated(row, middle)[0] < target else (low, middle)
      assert float(temp) == pytest.approx(low, rel=2e-3)


def test_n10_a_cap_only_cools():
  """n10: never above temperature one, and a law below the cap is left as it is."""
  logits = made_up_laws()
  decision = contract.decided(entropy_target, {"min_p": 0.0}, contract.observe(logits))
  temp_B, ent_B = decision.stats["temperature"], metrics.spread(jnp.asarray(logits)).ent
  assert (temp_B <= 1.0).all()
  np.testing.assert_array_equal(np.asarray(temp_B) == 1.0, np.asarray(ent_B) <= 1.5)
  np.testing.assert_allclose(decision.stats["law_entropy"], np.minimum(ent_B, 1.5), atol=1e-3)


def test_n10_uncertainty_cannot_be_made_of_one_candidate():
  """n10: 0.99 on one token, steered to 1.5 nats: one draw in ten is junk, or min-p takes it all back."""
  logits = np.log(two_level(1, 0.01, 128_255))[None]
  loose = steered(logits, w_const=1.5, min_p=0.0)
  assert float(jnp.exp(loose.law_BV[0, 0])) == pytest.approx(0.90, abs=0.002)
  assert float(loose.stats["law_entropy"][0]) == pytest.approx(1.5, abs=1e-3)
  cut = steered(logits, w_const=1.5)
  assert float(cut.stats["law_entropy"][0]) == 0.0
  assert float(cut.stats["target"][0]) == 1.5


def test_n10_the_range_answers_where_the_target_is_out_of_reach():
  """n10: equal scores have one entropy at every temperature, and a tie none below ln 2."""
  tie = np.where(np.arange(300) < 2, 0.0, -20.0)[None].astype(np.float32)
  for logits, target, ent in ((np.zeros((1, 300)), 1.0, np.log(300)), (tie, 0.3, np.log(2))):
    temp_B, clamped_B = temperature.for_entropy(
      jnp.asarray(logits, jnp.float32), jnp.asarray([target]), 0.05, 20.0
    )
    assert bool(clamped_B[0])
    assert heated(logits[0], float(temp_B[0]))[0] == pytest.approx(ent, abs=1e-3)


def test_n11_a_logarithm_too_many_makes_the_ancestor_greedy():
  """n11: its running cross-entropy is NaN after one token, and what is compared with NaN is usual."""
  rng = np.random.default_rng(11)
  cross_entropy, outliers = 0.0, []
  for _ in range(6):
    logp = oracles.log_softmax(rng.standard_normal(50) * 2)
    score = 1.3 * cross_entropy**2 + 0.8 * cross_entropy + 1.2 * oracles.ent_varent(np.exp(logp))[0]
    outliers.append(bool(score > 0))
    with np.errstate(invalid="ignore"):
      once_more = -np.log(logp[3])  # of what is a logarithm already
    cross_entropy += 0.65 * (once_more - cross_entropy)
    few = np.sort(np.exp(logp))[-3:]
    # What the evaluated branch asks of a usual token before it takes the best: always true of three.
    assert oracles.ent_varent(few / few.sum())[0] < 5.0
  assert outliers == [True] + [False] * 5
  assert np.isnan(cross_entropy)


def test_n11_ours_stays_finite_where_the_ancestor_did_not():
  """n11: forty tokens, and neither a NaN nor one branch alone."""
  rng = np.random.default_rng(12)
  cfg = contract.rows(dslider.Config(), 8)

  @jax.jit
  def run(state, obs):
    decision = dslider.step(cfg, state, obs)
    return dslider.commit(cfg, state, decision, jnp.argmax(decision.law_BV, -1)), decision.branch_B

  state, seen = dslider.init(cfg, 8), []
  for pos in range(40):
    logits = rng.standard_normal((8, 60)) * rng.uniform(0.5, 6, (8, 1))
    state, branch_B = run(state, contract.observe(logits, pos=pos))
    seen += [dslider.BRANCHES[b] for b in branch_B]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  assert {"concentrated", "dispersed", "mix"} <= set(seen)


def test_n11_everything_was_an_outlier_and_no_target_could_be_met():
  """n11: the score adds what is never negative; the target starts at 8 nats for each row of the batch."""
  rng = np.random.default_rng(13)
  for _ in range(100):
    e, s = rng.exponential(1.0, 4), rng.exponential(1.0, 4)
    ent, varent = rng.exponential(1.0, 2)
    assert 1.3 * np.outer(e, s).sum() + 0.8 * (e.sum() + s.sum()) + 1.2 * (ent + varent) > 0
  rows_ = 6
  assert 8.0 * rows_ == 48.0 > np.log(128_256) > 8.0


def test_n11_the_density_is_one_and_the_ancestors_is_its_inverse():
  """n11: with the signs of the gamma functions turned, a Dirichlet does not integrate to one."""
  alpha = np.asarray([2.0, 3.0])
  p = (np.arange(2000) + 0.5) / 2000
  p_BM = np.stack([p, 1 - p], -1)
  alpha_BM = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), p_BM.shape)
  ours = _dirichlet.log_density(jnp.asarray(p_BM, jnp.float32), alpha_BM)
  assert np.exp(np.asarray(ours, np.float64)).mean() == pytest.approx(1.0, abs=1e-4)
  lgamma = sum(math.lgamma(a) for a in alpha) - math.lgamma(alpha.sum())
  turned = np.exp(lgamma + ((alpha - 1) * np.log(p_BM)).sum(-1))
  assert turned.mean() == pytest.approx(1 / 12**2, rel=1e-3)


def test_n11_a_mean_over_ids_is_the_frequency_of_words():
  """n11: fitted id by id, what `ood` draws from is one law for all contexts; over ranks it is not."""
  rng = np.random.default_rng(14)
  V, contexts = 40, 10
  # Each context has four candidates of its own; some contexts are frequent.
  often = zipf(contexts)
  logits = np.full((contexts, V), -8.0)
  for c in range(contexts):
    logits[c, 4 * c : 4 * c + 4] = np.log([0.4, 0.3, 0.2, 0.1])
  logp = np.stack([oracles.log_softmax(row) for row in logits])
  seen = rng.choice(contexts, 4000, p=often)
  alpha, off = contract.fitted(logp[seen].mean(0)[None])
  usual = np.asarray(alpha[0], np.float64) / float(alpha.sum())
  assert float(off[0]) < 1e-3
  mass = usual.reshape(contexts, 4).sum(-1)
  assert mass[0] == mass.max()
  assert np.corrcoef(np.argsort(np.argsort(mass)), np.argsort(np.argsort(often)))[0, 1] > 0.9
  assert mass[-1] < 0.15  # what a rare context would leave for its own candidates, which had 0.98

  knobs = {name: x for name, x in dslider.CASES["ood"].items() if name != "p"}
  decision = contract.decided(dslider, knobs, contract.observe(logits))
  assert (decision.branch_B == dslider.OOD).all()
  law = np.exp(np.asarray(decision.law_BV, np.float64)).reshape(contexts, contexts, 4).sum(-1)
  assert (np.diag(law) > 0.9).all()


def test_n11_a_draw_through_a_dirichlet_needs_no_gammas():
  """n11: p ~ Dir(alpha), then a token ~ p, is a token ~ alpha / a_0: chi-square of 40,000."""
  rng = np.random.default_rng(15)
  alpha = np.asarray([0.3, 1.0, 2.0, 0.05, 4.0])
  p = rng.dirichlet(alpha, 40_000)
  token = (p.cumsum(-1) < rng.random((40_000, 1))).sum(-1).clip(0, 4)
  statistic, dof = contract.chi_square(np.bincount(token, minlength=5), alpha / alpha.sum())
  assert statistic < contract.chi_square_limit(dof)


def mean_log_density(alpha, mean):
  """Float64 log-likelihood per observation of Dir(alpha), given the mean of ln p."""
  gammas = math.lgamma(alpha.sum()) - sum(math.lgamma(a) for a in alpha)
  return gammas + ((alpha - 1) * mean).sum()


def test_n11_one_law_has_no_fit():
  """n11: ever larger alpha fit a single law ever better; two laws have a best alpha, and it is found."""
  one = np.log([0.5, 0.3, 0.2])
  two = (one + np.log([0.2, 0.5, 0.3])) / 2
  assert np.log(np.exp(one).sum()) == pytest.approx(0.0, abs=1e-12)  # no slack
  scales = 10.0 ** np.arange(1, 8)
  single, mixed = (
    [mean_log_density(s * np.exp(m) / np.exp(m).sum(), m) for s in scales] for m in (one, two)
  )
  assert (np.diff(single) > 0).all()
  assert (np.diff(mixed)[1:] < 0).all()
  alpha_BM, off_B = contract.fitted([one, two])
  assert (off_B < 1e-3).all()
  total_B = np.asarray(alpha_BM.sum(-1))
  # As narrow as SLACK lets: a_0 is (K - 1) / (2 SLACK).
  assert total_B[0] == pytest.approx(1 / _dirichlet.SLACK, rel=0.05)
  nudged = [mean_log_density(np.asarray(alpha_BM[1], np.float64) * x, two) for x in (0.8, 1, 1.25)]
  assert nudged[1] == max(nudged)


def test_n11_more_ranks_are_a_narrower_dirichlet_and_nearly_the_same_draw():
  """n11: from 8 ranks to 256 a_0 grows twentyfold, and the best rank's share by less than 0.03."""
  rng = np.random.default_rng(0)
  slope = rng.uniform(0.8, 2.5, (200, 1))
  scores = -slope * np.log(np.arange(1, 1001)) + rng.standard_normal((200, 1000)) * 0.3
  logp = np.stack([np.sort(oracles.log_softmax(x))[::-1] for x in scores])
  total, head, deviation = [], [], []
  for ranks in (8, 64, 256):
    rest = np.log1p(-np.exp(logp[:, :ranks]).sum(-1))
    shape = np.maximum(np.concatenate([logp[:, :ranks], rest[:, None]], -1), dslider.FLOOR)
    mean = np.mean([oracles.log_softmax(x) for x in shape], 0)
    alpha_BM, _ = contract.fitted(mean[None])
    total.append(float(alpha_BM.sum()))
    head.append(float(alpha_BM[0, 0]) / total[-1])
    deviation.append(math.sqrt(head[-1] * (1 - head[-1]) / (total[-1] + 1)))
  assert total[2] / total[0] == pytest.approx(20, abs=2)
  np.testing.assert_allclose(deviation, [0.12, 0.05, 0.03], atol=0.006)
  assert max(head) - min(head) < 0.03


def demo(folder):
  """(ModelConfig, float32 weights) of a demo model."""
  cfg = checkpoint.load_config(int8.DEMO / folder)
  return cfg, checkpoint.load_weights(int8.DEMO / folder, cfg, jnp.float32)


def test_n12_int8_hardly_moves_the_demo_model():
  """n12: on held-out documents, with int8 weights and cache, through a cache that is read."""
  texts = int8.held_out("base", 8, 100)
  seen = int8.compare(*demo("base"), texts, scored=True)
  exact, both = seen["float32"], seen["int8 weights and cache"]
  assert exact["worst_logit"] == 0
  assert 0 < both["mean_logit"] < 0.05
  assert both["worst_logit"] < 3
  assert both["same_top"] > 0.97
  assert abs(both["perplexity"] / exact["perplexity"] - 1) < 0.01
  assert both["weight_bytes"] < 0.27 * exact["weight_bytes"]


def test_n13_a_layer_is_six_kernels_on_cuda_and_none_elsewhere():
  """n13: and on a CPU no condition is left of the choice (for CUDA, tests/test_aot.py looks)."""
  cfg = config.ModelConfig(64, 64, 192, 1, 4, 2, 32, tied=True)
  cache = jax.eval_shape(lambda: kvcache.init(cfg, 4, 128, jnp.bfloat16))
  int_B1 = jax.ShapeDtypeStruct((4, 1), jnp.int32)

  def step(w, token_B1, cache):
    recent = kvcache.Recent(jax.tree.map(lambda x: x[:, :, :8], cache), token_B1[0, 0])
    past = kvcache.Past(token_B1[:, 0], cache, recent)
    return llama.forward(cfg, w, token_B1, past, own_kernels=True)

  def traced():
    return jax.jit(step).trace(weights.shapes(cfg, jnp.bfloat16), int_B1, cache)

  def lowered(platform):
    return traced().lower(lowering_platforms=(platform,)).as_text()

  # What a GPU can do is asked of the device that is there, unless another is named.
  h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  auto = (jax.sharding.AxisType.Auto,)
  named = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=h100)
  with jax.sharding.use_abstract_mesh(named):
    assert lowered("cuda").count("__gpu$xla.gpu.triton") == 6
  for platform in ("cpu", "tpu", "rocm"):
    assert "triton" not in lowered(platform)
  assert "conditional(" not in traced().lower().compile().as_text()


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_n14_shared_noise_agrees_where_laws_do(spread):
  """n14: by shared noise at least as often as (1 - d) / (1 + d), d the total variation; apart, rarely."""
  rng, V, trials = np.random.default_rng(14), 200, 4000
  target_V = rng.normal(0, 1.5, V)
  p_V, q_V = (oracles.probabilities(x) for x in (target_V, target_V + rng.normal(0, spread, V)))
  key_B2 = draw.row_keys(*(jnp.zeros((trials, *n), jnp.uint32) for n in ((2,), (), ())))
  pos_B = jnp.arange(trials)

  def drawn(p_V):
    law_BV = jnp.broadcast_to(jnp.log(jnp.asarray(p_V, jnp.float32)), (trials, V))
    return np.asarray(draw.draw(law_BV, key_B2, pos_B))

  agree = np.mean(drawn(p_V) == drawn(q_V))
  d = 0.5 * np.abs(p_V - q_V).sum()
  assert (1 - d) / (1 + d) - 3 * 0.5 / np.sqrt(trials) < agree <= 1 - d + 3 * 0.5 / np.sqrt(trials)
  assert agree > 5 * np.sum(p_V * q_V)


def selected(rule, *numbers_T):
  """Which sample a rule selects; one is given by its statistic at each token."""
  name, number = rule
  samples = [
    select.Candidate("x" * len(x), ("x",) * len(x), {number: np.asarray(x)}, "stop")
    for x in numbers_T
  ]
  return select.choose(name, samples, select.answerer()).index


def test_n15_a_sum_prefers_what_ends_sooner():
  """n15: always of two that begin alike; of eight whose lengths tell nothing, by far the most often."""
  rng = np.random.default_rng(15)
  total, mean = ("logprob", "logprob"), ("mean_logprob", "logprob")
  shortest = {total: 0, mean: 0}
  trials = 400
  for _ in range(trials):
    whole = np.log(rng.random(30))
    assert selected(total, whole, whole[: rng.integers(1, 30)]) == 1
    lengths = rng.geometric(1 / 40, 8)
    texts = [-rng.gamma(0.5, 2.0, T) for T in lengths]
    for rule in shortest:
      shortest[rule] += lengths[selected(rule, *texts)] == lengths.min()
  assert shortest[total] / trials == pytest.approx(0.79, abs=0.07)
  assert shortest[mean] / trials == pytest.approx(0.39, abs=0.08)
  assert selected(mean, [-2.0, -1.0, -0.1], [-2.0]) == 0


def test_n15_colder_samples_are_likelier_raw_or_not():
  """n15: the coldest of four nearly always has the best mean; what ignores the token is fair."""
  rng = np.random.default_rng(16)
  V, T, trials = 100, 40, 200
  temp_B = np.asarray([0.3, 0.6, 0.9, 1.2])
  likely, certain = ("mean_logprob", "logprob"), ("self_certainty", "self_certainty")
  coldest = {"law": 0, "raw": 0, "self_certainty": 0}
  for _ in range(trials):
    logits_BTV = rng.normal(0, 2, (4, T, V))
    raw_BTV = oracles.log_softmax(logits_BTV)
    law_BTV = oracles.log_softmax(logits_BTV / temp_B[:, None, None])
    token_BT = np.argmax(law_BTV + rng.gumbel(size=law_BTV.shape), -1)[..., None]
    raw_BT, law_BT = (np.take_along_axis(x, token_BT, -1)[..., 0] for x in (raw_BTV, law_BTV))
    coldest["raw"] += selected(likely, *raw_BT) == 0
    coldest["law"] += selected(likely, *law_BT) == 0
    coldest["self_certainty"] += selected(certain, *(-np.log(V) - raw_BTV.mean(-1))) == 0
  assert coldest["law"] == trials
  assert coldest["raw"] / trials > 0.95
  assert coldest["self_certainty"] / trials == pytest.approx(0.25, abs=0.1)


def test_n15_the_expected_raw_logprob_falls_with_temperature():
  """n15: by the variance of the log-probabilities over T^2; under the law greedy decoding is certain."""
  logp_V = oracles.log_softmax(np.random.default_rng(17).normal(0, 2, 300))

  def law(temp):
    return oracles.log_softmax(logp_V / temp)

  for temp in (0.3, 0.7, 1.0, 1.5):
    p_V, h = np.exp(law(temp)), 1e-5
    slope = (np.exp(law(temp + h)) - np.exp(law(temp - h))) @ logp_V / (2 * h)
    variance = p_V @ logp_V**2 - (p_V @ logp_V) ** 2
    assert slope == pytest.approx(-variance / temp**2, rel=1e-4)
    assert slope < 0
  # The same token: its raw number does not know how it was drawn, the law's does.
  assert law(1e-3)[logp_V.argmax()] == pytest.approx(0.0, abs=1e-12)
  assert logp_V.max() < law(0.7)[logp_V.argmax()] < 0


@functools.cache
def two_minds():
  """(logits_NV, draft's logits_NV, key_N2) in held-out documents of the demo."""
  texts = int8.held_out("base", 24, 100)
  token_BT = np.zeros((len(texts), 100), np.int32)
  for row, ids in zip(token_BT, texts, strict=True):
    row[: len(ids)] = ids
  where = np.arange(100) < np.asarray([len(ids) for ids in texts])[:, None]
  logits = []
  for folder in ("base", "draft_base"):
    cfg, params = demo(folder)
    x_BTD, _, _ = llama.forward(cfg, params, token_BT)
    logits.append(llama.unembed(params, x_BTD)[where])
  n = len(logits[0])
  return *logits, draw.row_keys(*(jnp.zeros((n, *rest), jnp.uint32) for rest in ((2,), (), ())))


def test_n16_a_draft_mostly_draws_what_its_target_draws():
  """n16: on held-out documents, with shared noise, nearly as often as their laws overlap."""
  *logits, key_B2 = two_minds()
  laws = [jax.nn.log_softmax(x) for x in logits]
  token_B, draft_B = (draw.draw(law_BV, key_B2, jnp.arange(len(key_B2))) for law_BV in laws)
  d = 0.5 * float(jnp.mean(jnp.sum(jnp.abs(jnp.exp(laws[0]) - jnp.exp(laws[1])), axis=-1)))
  assert 0 < d < 0.15
  assert abs(np.mean(token_B == draft_B) - (1 - d)) < 0.03 + d / 4


@functools.cache
def demo_answers(count=32):
  """(logits (2, T, B, V) of the demo models, instruct first, mask_TB): held-out right answers, forced."""
  rng, coder = random.Random("joint"), vocabulary.load(int8.DEMO / "base")
  talks = [demo_corpus.chat(rng, True)[:2] for _ in range(count)]
  answers = [coder.encode(answer["content"]) for _, answer in talks]
  prompts = (
    [chat.Format(coder, chat.LLAMA3, "", {}).encode([ask]) for ask, _ in talks],
    [chat.plain(coder, ask["content"] + "\n") for ask, _ in talks],
  )
  T = max(map(len, answers))
  logits = []
  for stage, heads in zip(("instruct", "base"), prompts, strict=True):
    cfg, w = demo(stage)
    ids = [head + answer for head, answer in zip(heads, answers, strict=True)]
    ids_BT = np.asarray([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)
    z_BTV = np.asarray(llama.unembed(w, llama.forward(cfg, w, ids_BT)[0]))
    first = [len(head) - 1 for head in heads]
    cut = [z[i : i + T] for z, i in zip(z_BTV, first, strict=True)]
    logits.append([np.resize(z, (T, z.shape[1])) for z in cut])
  live_BT = np.arange(T) < np.asarray([len(a) for a in answers])[:, None]
  return np.moveaxis(np.asarray(logits), 1, 2), live_BT.T


def test_n17_right_answers_look_dry_too():
  """n17: by the default thresholds half of the longer right answers of the demo model collapse somewhere."""
  logits, live_TB = demo_answers()
  _, T, B, V = logits.shape
  revive = mixing.find("revive")
  cfg = sampling.arrays(revive.Config(), B)
  zero_B, mark_V = jnp.zeros((B,), jnp.int32), jnp.zeros((V,), jnp.int8)

  def step(state, at):
    i, z = at
    view = mixing.View(tuple(z), zero_B, zero_B + i, mark_V == 0, mark_V, zero_B[:, None] - 1)
    mixed = revive.mix(cfg, state, view)
    return revive.commit(cfg, state, mixed, view, zero_B), mixed.stats["collapsed"]

  xs = (jnp.arange(T), jnp.moveaxis(jnp.asarray(logits), 0, 1))
  collapsed_TB = (np.asarray(jax.lax.scan(step, revive.init(cfg, B), xs)[1]) > 0) & live_TB
  long_B = live_TB.sum(0) >= 20
  assert long_B.sum() >= 20
  assert 0.3 < collapsed_TB.any(0)[long_B].mean() < 0.8
  assert 0.05 < collapsed_TB.sum() / live_TB.sum() < 0.2
  ent = np.asarray(metrics.spread(jnp.asarray(logits)).ent)
  assert ent[0][live_TB].mean() > 0.9 * ent[1][live_TB].mean()


def test_n18_a_constant_that_nobody_means_is_of_nats():
  """n18: and would decide whose law a sum of exponentials of raw logits is."""
  logits, live_TB = demo_answers()
  level = np.asarray(metrics.spread(jnp.asarray(logits)).lse, np.float64)
  apart = (level[1] - level[0])[live_TB]
  share = 1 / (1 + np.exp(-apart))  # of base, where half of each was meant
  low, high = np.quantile(share, [0.05, 0.95])
  assert low < 0.1
  assert high > 0.9


def test_n19_a_window_beyond_the_answer_ends_nobody():
  """n19: the confidence of 300 tokens, with a dip in the middle, through windows of 32 and 2048."""
  confidence = [9.0] * 150 + [1.0] * 32 + [9.0] * 118
  short, long = select.GroupConfidence(32), select.GroupConfidence(2048)
  groups = [short.push(c) for c in confidence]
  assert [long.push(c) for c in confidence] == [None] * 300
  below = [i for i, g in enumerate(groups) if g is not None and g < 5.0]
  assert 150 < below[0] < 182
  assert short.least == pytest.approx(1.0)


def test_n20_the_good_label_is_the_one_that_is_called_so():
  """n20: with the labels exchanged the score turns round."""
  from test_groups import ask, request
  from test_rows import engine

  def score(labels):
    group = adaptive.Group(request(), adaptive.Config(n=1), ask, labels)
    *_, outcome = groups.run(engine("plain", rows=8), Words(), [group])
    return outcome.scores[0]

  assert score([3, 4]) + score([4, 3]) == pytest.approx(1.0, abs=1e-5)


def test_n21_a_surprise_at_the_fork_outweighs_a_sure_continuation():
  """n21: over 16 tokens, a way of probability 1 behind a first token of 0.02 loses to 0.85 throughout."""
  surprising = np.log([0.02] + [1.0] * 15)
  usual = np.log([0.85] * 16)
  assert selected(("mean_logprob", "logprob"), surprising, usual) == 1


def test_n22_a_place_keeps_its_law_whatever_came_before():
  """n22: by thrown drafts a place is not touched, if all that they decide is thrown away with them."""
  n, p, q = 40_000, [0.35, 0.65], [[0.8, 0.2], [0.7, 0.3]]
  key_B2 = draw.row_keys(*(jnp.full((n, *rest), 22, jnp.uint32) for rest in ((2,), (), ())))
  place_B = jnp.arange(n)

  def drafted(token):
    law_BV = jnp.log(jnp.broadcast_to(jnp.asarray(q[token]), (n, 2)))
    return draw.draw(law_BV, key_B2, place_B, draw.Purpose.DRAFT), law_BV

  law_BV = jnp.log(jnp.broadcast_to(jnp.asarray(p), (n, 2)))
  thrown_B, _ = drafted(0)  # behind a guess that was refused, for what stands there instead
  again_B, law_q_BV = drafted(1)
  for on_B, kept in ((thrown_B >= 0, True), (thrown_B == 1, False)):
    draft = verify.Draft(again_B, on_B, law_q_BV)
    token_B = np.asarray(verify.accept(law_BV, key_B2, place_B, draft))
    statistic, dof = contract.chi_square(np.bincount(token_B, minlength=2), np.asarray(p))
    assert (statistic < contract.chi_square_limit(dof)) == kept


def test_n23_nothing_has_a_row_axis_beside_the_common_slots():
  """n23: as copies, eight rows' keys of the prompt would be an array of rows x heads x slots x channels."""
  cfg = dataclasses.replace(TINY, max_position=2048)
  w = weights.random(cfg, jnp.float32, seed=3)
  e = Engine.create(cfg, w, sampling.find("plain"), config.EngineConfig(8, 1024))
  rows, prefix = state.abstract_state(e.setup), state.abstract_prefix(e.setup, (512,))
  decode = functools.partial(step.decode, e.setup, steps=1)
  shared = str(jax.make_jaxpr(functools.partial(decode, window=128))(w, rows, prefix.cache))
  wide = str(jax.make_jaxpr(functools.partial(decode, window=512))(w, rows))
  copies = f"f32[8,{cfg.kv_heads},512,{cfg.head_dim}]"
  assert copies in wide
  assert copies not in shared
  assert f"f32[1,{cfg.kv_heads},512,{cfg.head_dim}]" in shared


def test_n24_rows_on_devices_of_their_own_meet_nobody():
  """n24: what samplers say of rows is packed and sent where a row's vocabulary is split, and nowhere else."""
  sent = {}
  for shape in ((4, 1), (2, 2)):
    mesh = sharding.mesh(config.MeshConfig(*shape), dataclasses.replace(TINY, vocab=212))
    law = jax.jit(lambda x_BV, mesh=mesh: sharding.per_row(mesh, jax.nn.log_softmax, x_BV))
    x_BV = jax.ShapeDtypeStruct((4, 212), jnp.float32, sharding=sharding.of(mesh, "BV"))
    sent[shape] = sum(hlo.Program(law.lower(x_BV).compile().as_text()).collectives().values())
  assert sent[4, 1] == 0 < sent[2, 2]


def test_n25_no_step_transposes_a_matrix():
  """n25: a few rows' product reads a transposed matrix as it is stored, tile by tile, and writes none of its size."""
  tiles, wide = 2, 1024
  w = linear.transpose("wq_DQ", jnp.ones((wide, tiles * linear.TILES[0])))
  x = jnp.ones((5, wide))
  text = jax.jit(linear.dot).lower(x, w).compile(linear.NO_DOT_FUSION).as_text()
  size = f"f32[{tiles},{linear.TILES[0]},{wide}]"
  made = re.findall(rf"= {re.escape(size)}\S* (\w[\w-]*)\(", text)
  assert made.count("bitcast") == 1  # of the argument
  assert set(made) <= {"bitcast", "parameter"}
  assert not re.search(rf"= f32\[{wide},{tiles * linear.TILES[0]}\]", text)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_n26_a_lead_tells_which_guesses_stand(temperature):
  """n26: as many do not as foreseen, to a half; where the draft is unsure it tells more than entropy does."""
  logits_BV, draft_BV, key_B2 = two_minds()
  pos_B, temp_B = jnp.arange(len(key_B2)), jnp.full((len(key_B2),), temperature)

  def law(logits_BV):
    return jax.nn.log_softmax(logits_BV / temperature) if temperature else filters.delta(logits_BV)

  token_B = draw.draw(law(logits_BV), key_B2, pos_B)
  guess_B, lead_B = drafters.draw_with_lead(law(draft_BV), draft_BV, temp_B, key_B2, pos_B)
  ent_B = np.asarray(metrics.spread(draft_BV).ent)
  risk_B = np.asarray(drafters.risk(ent_B, lead_B))
  stands_B = np.asarray(guess_B == token_B)
  assert 20 < np.sum(~stands_B) < 1.6 * np.sum(risk_B) < 2.6 * np.sum(~stands_B)
  unsure_B = ent_B > 0.5

  def told(score_B):
    """How often that of a guess that stands is above that of one that does not."""
    good, bad = (score_B[unsure_B & which_B] for which_B in (stands_B, ~stands_B))
    return np.mean(good[:, None] > bad)

  assert told(-risk_B) > max(told(-ent_B), 0.5) + 0.03


# -- n27 ---------------------------------------------------------------------------------------

# Processes 0, 1 and 1 of 3, each with its errors in a file; prints their signals.
TWINS = """
import os, sys
from jax._src.lib import _jax
folder, port, spare = sys.argv[1], *map(int, sys.argv[2:])
children = []
for i, number in enumerate((0, 1, 1)):
  children.append(os.fork())
  if not children[-1]:
    os.dup2(os.open(f"{folder}/{i}", os.O_WRONLY | os.O_CREAT), 2)
    if not number:
      start = _jax.get_distributed_runtime_service
      both = [start(f"[::]:{spare}", 3) for _ in range(2)]  # on one port
      service = start(f"[::]:{port}", 3, cluster_register_timeout=3)
    _jax.get_distributed_runtime_client(f"localhost:{port}", number, init_timeout=20).connect()
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_n27_jax_aborts_and_tells_a_twin_only(tmp_path):
  """n27: of two processes of one number one is told, and the others that a third is missing; all dump a stack."""
  command = [sys.executable, "-W", "ignore", "-c", TWINS, tmp_path, free_port(), free_port()]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
  assert done.stdout.split() == [str(-signal.SIGABRT)] * 3, done.stderr
  errors = [(tmp_path / str(i)).read_text() for i in range(3)]
  assert all("Check failure stack trace" in text for text in errors)
  assert sorted("newer incarnation" in text for text in errors[1:]) == [False, True]
  told = [text for text in errors if "newer incarnation" not in text]
  assert len(told) == 2
  assert all("timed out task names:\n2\n" in text for text in told)


def test_n28_a_carried_condition_is_no_message():
  """n28: over rows of two devices JAX's loop asks them in its condition, and ours carries the answer."""
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  place = jax.NamedSharding(mesh, jax.P("data"))
  x_B = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=place)

  def compiled(loop):
    f = jax.jit(lambda x_B: loop(lambda x_B: jnp.any(x_B > 0), lambda x_B: x_B - 1, x_B))
    return f.lower(x_B).compile()

  theirs, ours = compiled(jax.lax.while_loop), compiled(rowwise.while_loop)
  assert len(contract.conditions_with_messages(theirs.as_text())) == 1
  assert contract.conditions_with_messages(ours.as_text()) == []
  given = jax.device_put(jnp.asarray([3, 0, 5, 1], jnp.int32), place)
  np.testing.assert_array_equal(ours(given), theirs(given))


# -- n29 ---------------------------------------------------------------------------------------


def test_n29_a_batch_size_moves_a_cut_by_rounding_only():
  """n29: rows of ten and a row alone differ by rounding, which a cut turns into one id more at most."""
  rng = np.random.default_rng(29)
  logits = np.log(1.0 / np.arange(1, 128_257) ** 1.05) + rng.normal(0, 0.5, (10, 128_256))
  together = contract.law(plain, {"top_p": 0.99}, contract.observe(logits))
  for b in range(3):
    alone = contract.law(plain, {"top_p": 0.99}, contract.observe(logits[b : b + 1]))[0]
    assert abs(int((alone > 0).sum()) - int((together[b] > 0).sum())) <= 1
    assert 0.5 * np.abs(alone - together[b]).sum() < 1e-4


def test_n30_the_start_is_the_least_number_that_has_both_tails():
  """n30: from 19 values on, the ranks of q5 and q95 are of values that are there, and the share is exact."""
  counts = [n for n in range(1, 100) if 0.95 * (n + 1) <= n and 0.05 * (n + 1) >= 1]
  assert counts[0] == _quantile.LEAST == 19
  rng = np.random.default_rng(0)
  values_XN = np.sort(rng.standard_normal((50_000, 19)))
  new_X = rng.standard_normal(50_000)
  for rank, share in ((1, 0.05), (10, 0.5), (19, 0.95)):
    assert abs(np.mean(new_X < values_XN[:, rank - 1]) - share) < 0.008


def test_n31_words_that_mark_turns_can_be_spelt_and_control_tokens_cannot(tmp_path):
  """n31: a message that spells [/INST] gets the ids of the template's own mark; one that spells <|eot_id|> does not."""
  tok = vocabulary.load(write_tokenizer(tmp_path))
  words = chat.Format(
    tok, "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", "", {}
  )
  turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
  assert words.encode([{"role": "user", "content": "a[/INST][INST]b"}]) == words.encode(turns)
  tokens = chat.Format(tok, chat.LLAMA3, "", {})
  end = tok.special["<|eot_id|>"]
  assert tokens.encode([{"role": "user", "content": "a<|eot_id|>b"}]).count(end) == 1
  assert tokens.encode(turns).count(end) == 2


def test_n32_a_prompt_from_kept_pieces_has_the_same_bits_and_one_that_is_cut_elsewhere_may_not():
  """n32: kept pieces change no bit of the logits; the same prompt in pieces of another size agrees only closely."""
  whole, kept = fed(LONG[:21])
  part, _ = fed(LONG[:21], kept[:2])
  np.testing.assert_array_equal(part.prefix.logits_1V, whole.prefix.logits_1V)
  other = engine("plain", prefill_chunk=16).prefill(Request(LONG[:21]))
  np.testing.assert_allclose(other.logits_1V, whole.prefix.logits_1V, atol=1e-4)


def tokens_measured(task):
  """The lines of the benchmark of tokens on SmolLM2."""
  lines = (NOTES.parents[1] / "benchmarks" / "results" / "tokens.jsonl").read_text().splitlines()
  return [line for line in map(json.loads, lines) if line["task"] == task]


def test_n33_cut_words_are_continued_with_healing_only():
  """n33: the counts of its table, of 200 cut words."""
  off, on = tokens_measured("heal")
  assert (off["heal"], on["heal"], on["held"]) == (False, True, 200)
  assert [line[key].count("1") for line in (off, on) for key in ("right", "known")] == [
    7,
    56,
    158,
    195,
  ]
  assert 5 < on["rows"] / 200 < 6


def test_n34_odd_segmentations_cost_certainty_and_accuracy():
  """n34: with every step of dropout the law is less certain and the author's token less likely."""
  lines = tokens_measured("prompts")
  assert [line["dropout"] for line in lines] == [0.0, 0.1, 0.3, 0.6, 1.0]
  for key in ("entropy", "logp"):
    means = [abs(np.mean(line[key])) for line in lines]
    assert means[:3] == sorted(means[:3])
  right = [line["right"].count("1") for line in lines]
  assert right == sorted(right, reverse=True)
  assert right[0] > 2 * right[3]


def test_n35_the_canonical_segmentation_has_nearly_all_of_the_probability():
  """n35: what it falls short of the sum is never negative, and small for nearly all words."""
  (line,) = tokens_measured("marginal")
  gap = np.subtract(line["total"], line["canonical"])
  assert gap.min() >= -1e-3
  assert np.median(gap) < 0.01


def test_n36_a_byte_costs_about_a_row():
  """n36: rows per byte, and the bits per byte are those by tokens or fewer."""
  rough = tokens_measured("bytes")[0]
  assert 1 <= rough["rows_per_byte"] < 1.1
  assert rough["bits_per_byte"] <= rough["bits_per_byte_by_tokens"] + 1e-4
