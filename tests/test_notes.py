"""What the notes in docs/notes claim, each as a test; the docstring begins with the note's id."""

import re
from pathlib import Path

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from entropix_jax import config, metrics, rope, rows, settings
from entropix_jax.sampling import quadrant

NOTES = Path(__file__).parent.parent / "docs" / "notes"
LN2 = np.log(2.0)


# -- n01 ---------------------------------------------------------------------------------------


def test_n01_a_uniform_vocabulary_has_entropy_ln_v():
  """n01: nats, not bits."""
  seen = metrics.spread(jnp.zeros((1, 128_256)))
  np.testing.assert_allclose(seen.ent, np.log(128_256), rtol=1e-6)
  np.testing.assert_allclose(seen.varent, 0.0, atol=1e-6)
  np.testing.assert_allclose(seen.ent[0] / LN2, 16.97, atol=0.01)


def test_n01_converted_thresholds_decide_as_bits_do():
  """n01: the branch is the one that the ancestor's conditions, in bits, would choose."""
  rng = np.random.default_rng(1)
  logits = np.concatenate(
    [
      contract.mixed_observation(rng, 96, vocab=601).logits_BV,
      [contract.case_logits(case["p"], 601) for case in quadrant.CASES.values()],
    ]
  )
  decision, _ = contract.decide(
    quadrant, contract.rows(quadrant.Config(), len(logits)), contract.observe(logits)
  )
  expected = []
  for row in logits:
    ent, varent = oracles.ent_varent(np.exp(oracles.log_softmax(row)))
    ent, varent = ent / LN2, varent / LN2**2
    if varent < 0.1:
      expected.append("flow" if ent < 0.1 else "ask" if ent > 3.0 else "middle")
    else:
      expected.append("middle" if varent <= 5.0 else "fork" if ent < 5.0 else "mist")
  assert [quadrant.BRANCHES[b] for b in decision.branch_B] == expected
  assert set(expected) == set(quadrant.BRANCHES)


# -- n02 ---------------------------------------------------------------------------------------


def dear(x_BV):
  return jnp.sort(x_BV, axis=-1)


def cheap(x_BV):
  return x_BV * 2.0


def chosen(need_B, x_BV):
  return rows.any_row(need_B, dear, cheap, x_BV)


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

  need_B, x_BV = jnp.array([True, False]), jnp.ones((2, 8))
  batched = set(primitives(jax.make_jaxpr(jax.vmap(per_row))(need_B, x_BV).jaxpr))
  assert "cond" not in batched
  assert {"sort", "mul", "select_n"} <= batched
  assert "cond" in set(primitives(jax.make_jaxpr(per_row)(need_B[0], x_BV[0]).jaxpr))


@pytest.mark.parametrize(
  ("platform", "conditions"), [("cpu", 1), ("tpu", 1), ("cuda", 0), ("rocm", 0)]
)
def test_n02_any_row_keeps_one_condition_except_on_gpu(platform, conditions):
  """n02: what is lowered for each platform, compiled here only so that constant cases fold away."""
  need_B, x_BV = jnp.array([True, False]), jnp.ones((2, 8))
  lowered = jax.export.export(
    jax.jit(chosen),
    platforms=(platform,),
    disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
  )(need_B, x_BV)
  compiled = jax.jit(lowered.call).lower(need_B, x_BV).compile().as_text()
  assert len(re.findall(r"\bconditional\(", compiled)) == conditions


@pytest.mark.parametrize("need", [[True, False, True], [False] * 3, [True] * 3])
def test_n02_any_row_picks_row_by_row(need):
  """n02: a row's answer does not depend on what the others need."""
  x_BV = jnp.asarray(np.random.default_rng(2).standard_normal((3, 8)), jnp.float32)
  expected = np.where(np.asarray(need)[:, None], dear(x_BV), cheap(x_BV))
  np.testing.assert_array_equal(jax.jit(chosen)(jnp.asarray(need), x_BV), expected)


# -- n03 ---------------------------------------------------------------------------------------

TO_NATS = {"1": 1.0, "bit": LN2, "bit^2": LN2**2, "/bit": 1 / LN2, "/bit^2": 1 / LN2**2}

# Knob: the ancestor's number and its unit, from fblissjr/entropix-annotated 5aadcf6.
ANCESTOR = {
  "low_ent": (0.1, "bit"),
  "low_varent": (0.1, "bit^2"),
  "ask_ent": (3.0, "bit"),
  "high_ent": (5.0, "bit"),
  "high_varent": (5.0, "bit^2"),
  "temp": (0.666, "1"),
  "top_k": (27, "1"),
  "top_p": (0.9, "1"),
  "min_p": (0.03, "1"),
  "warm_cap": (1.5, "1"),
  "ask_temp": (1.3, "1"),
  "ask_temp_attn_ent": (0.2, "/bit"),
  "fork_temp": (1.2, "1"),
  "fork_temp_score": (0.3, "1"),
  "fork_k_dispersion": (0.5, "1"),
  "mist_temp": (2.0, "1"),
  "mist_temp_spread": (0.5, "/bit^2"),
  "mist_p_attn_ent": (0.2, "/bit"),
  "mist_p_least": (0.5, "1"),
  "mid_temp_ent": (0.3, "/bit"),
  "mid_temp_varent": (0.3, "/bit^2"),
  "mid_temp_attn_ent": (0.2, "/bit"),
  "mid_temp_spread": (0.2, "/bit^2"),
  "mid_temp_agreement": (0.2, "1"),
  "mid_p_spread": (0.1, "/bit^2"),
  "mid_k_score": (0.3, "1"),
  "mid_k_agreement": (0.2, "1"),
  "mid_min_p_ent": (0.5, "/bit"),
  "mid_min_p_varent": (0.5, "/bit^2"),
  "best_of": (5, "1"),
}


def test_n03_every_quadrant_number_is_the_ancestors():
  """n03: code, note and this table say the same, to the four digits that are written."""
  defaults = vars(quadrant.Config())
  here = {name: round(x * TO_NATS[unit], 4) for name, (x, unit) in ANCESTOR.items()}
  assert defaults == here
  text = (NOTES / "n03-thresholds.md").read_text()
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
  decision, _ = contract.decide(quadrant, contract.rows(quadrant.Config(), 1), tie)
  assert quadrant.BRANCHES[int(decision.branch_B[0])] == branch(4.0, 0.0, **torch)


# -- n04 ---------------------------------------------------------------------------------------


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


# -- n05 ---------------------------------------------------------------------------------------

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


def heads():
  rng = np.random.default_rng(5)
  return rng.standard_normal((2, 1, 12, 3, H)), np.arange(12) * 7


def test_n05_the_two_pairings_agree_only_under_the_permutation():
  """n05: the same heads, channels permuted, score alike under the other pairing and not under ours."""
  (q, k), pos = heads()
  ours = scores(turned(q, pos), turned(k, pos))
  other = scores(
    turned_interleaved(q[..., INTERLEAVED], pos), turned_interleaved(k[..., INTERLEAVED], pos)
  )
  np.testing.assert_allclose(other, ours, atol=1e-3)
  misread = scores(turned(q[..., INTERLEAVED], pos), turned(k[..., INTERLEAVED], pos))
  apart = ~np.eye(12, dtype=bool)
  assert np.abs(misread - ours)[..., apart].mean() > 1.0


def test_n05_the_wrong_pairing_is_invisible_at_distance_zero():
  """n05: norms and the score of a token with itself do not tell which pairing was meant."""
  (q, k), pos = heads()
  ours = scores(turned(q, pos), turned(k, pos))
  misread = scores(turned(q[..., INTERLEAVED], pos), turned(k[..., INTERLEAVED], pos))
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


# -- n06 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("backend", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")]
)
def test_n06_auto_is_float32_on_a_cpu_and_bfloat16_elsewhere(monkeypatch, backend, dtype):
  """n06: the rule, whatever device the tests run on; a dtype that is named is kept."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert settings.compute_dtype("auto") == dtype
  assert settings.compute_dtype("float16") == "float16"


# -- n07 ---------------------------------------------------------------------------------------


def two_level(k, t, n):
  """k equal tokens share 1 - t, n equal ones share t."""
  return np.asarray([(1 - t) / k] * k + [t / n] * n)


def zipf(n):
  return 1 / np.arange(1, n + 1) / (1 / np.arange(1, n + 1)).sum()


# As the note writes it: a law and its branch, with entropy and varentropy to the digits written.
LAWS = {
  "exact tie of 2": np.full(2, 1 / 2),
  "exact tie of 8": np.full(8, 1 / 8),
  "exact tie of 16": np.full(16, 1 / 16),
  "two equal tokens, 2 % over 100 ids": two_level(2, 0.02, 100),
  "two equal tokens, 5 % over 100 ids": two_level(2, 0.05, 100),
  "two equal tokens, 10 % over 100 ids": two_level(2, 0.10, 100),
  "one token, 2 % over 100 ids": two_level(1, 0.02, 100),
  "one token, 5 % over 100 ids": two_level(1, 0.05, 100),
  "one token, 10 % over 100 ids": two_level(1, 0.10, 100),
  "0.9 on one, the rest over 128,255 ids": two_level(1, 0.1, 128_255),
  "0.99 on one, the rest over 128,255 ids": two_level(1, 0.01, 128_255),
  "0.999 on one, the rest over 128,255 ids": two_level(1, 0.001, 128_255),
  "0.58 on one, the rest over 128,255 ids": two_level(1, 0.42, 128_255),
  "1/2, 1/4, 1/8, ...": 0.5 ** np.arange(1, 60),
  "Zipf over 128,256 ids": zipf(128_256),
}


def seen_branches(laws, vocab):
  logits = np.stack([contract.case_logits(p, vocab) for p in laws])
  cfg = contract.rows(quadrant.Config(), len(logits))
  decision, _ = contract.decide(quadrant, cfg, contract.observe(logits))
  return [quadrant.BRANCHES[b] for b in decision.branch_B]


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
  assert seen_branches([LAWS["exact tie of 2"], two_level(1, 0.05, 100)], contract.V) == [
    "middle",
    "fork",
  ]


def test_n07_ask_is_all_but_unreachable():
  """n07: sixteen equal tokens ask, but not with one per cent of mass over a thousand others."""
  assert seen_branches([np.full(16, 1 / 16), two_level(16, 0.01, 1000)], 1016) == ["ask", "middle"]
