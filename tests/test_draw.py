"""The noise and the draw: keyed, indexed by token id, and distributed as they should be."""

import hashlib

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entropix_jax import errors
from entropix_jax.decoding import drafters
from entropix_jax.sampling import draw


def keys(seeds, stream=0, attempt=0):
  words = jnp.asarray([draw.seed_words(s) for s in seeds], jnp.uint32)
  n = len(seeds)
  return draw.row_keys(
    words, jnp.full((n,), stream, jnp.uint32), jnp.full((n,), attempt, jnp.int32)
  )


def noise(seeds, pos, V=64, **kwargs):
  return np.asarray(draw.gumbel(keys(seeds, **kwargs), jnp.asarray(pos), V))


def test_noise_depends_on_the_request_and_not_on_the_batch():
  alone = noise([5], [9])
  np.testing.assert_array_equal(noise([1, 5, 2], [3, 9, 9])[1], alone[0])
  np.testing.assert_array_equal(noise([5], [9], V=96)[:, :64], alone)  # a longer vocabulary


@pytest.mark.parametrize(
  "other",
  [
    lambda: noise([6], [9]),
    lambda: noise([5], [10]),
    lambda: noise([5 + 2**32], [9]),  # the high word of the seed counts
    lambda: noise([-5], [9]),
    lambda: noise([5], [9], stream=1),
    lambda: noise([5], [9], attempt=1),
    lambda: np.asarray(draw.gumbel(keys([5]), jnp.asarray([9]), 64, draw.Purpose.AUX)),
  ],
)
def test_every_part_of_the_key_counts(other):
  a, b = noise([5], [9], V=64)[0], other()[0]
  assert (a != b).all()
  assert abs(np.corrcoef(a, b)[0, 1]) < 0.5


def test_noise_is_gumbel_and_fine_in_the_upper_tail():
  x = np.sort(noise(range(16), [0] * 16, V=128_256).ravel().astype(np.float64))
  n = len(x)
  assert x[0] > -2.95
  assert x[-1] < 23
  # Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 / sqrt(n) is exceeded once in a thousand.
  assert np.abs(np.exp(-np.exp(-x)) - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)
  top = x[-200:]
  assert len(np.unique(top)) == 200


def test_bits_are_those_of_the_key_chain_in_jax_random():
  seed, stream, attempt, pos = 2**40 + 3, 5, 2, 11
  key = jax.random.key(seed >> 32, impl="threefry2x32")
  for word in (seed & 0xFFFFFFFF, stream, attempt, 8 * pos + draw.Purpose.AUX):
    key = jax.random.fold_in(key, word)
  ours = draw._words(keys([seed, 1], stream, attempt), jnp.asarray([pos, 0]), 999, draw.Purpose.AUX)
  np.testing.assert_array_equal(ours[0], jax.random.bits(key, (999,), "uint32"))


def test_noise_is_pinned():
  """The bits are part of the contract: a seed must mean the same next year, on every jax."""
  x = np.asarray(draw._words(jnp.asarray([[0, 7]], jnp.uint32), jnp.asarray([0]), 64, 3))
  assert hashlib.sha256(x.tobytes()).hexdigest()[:12] == "41e1901b4b8b"
  got = [round(float(v), 4) for v in noise([7], [3], V=4)[0]]
  assert got == [-0.5762, 0.3126, 2.8291, -0.7296]


def test_a_sure_law_needs_no_noise_and_ties_go_to_the_lowest_id():
  law = jnp.full((2, 8), -jnp.inf).at[0, 5].set(0.0).at[1, 2].set(0.0)
  np.testing.assert_array_equal(draw.draw(law, keys([0, 1]), jnp.zeros(2, jnp.int32)), [5, 2])


def test_the_lead_is_what_another_law_would_have_to_make_up():
  """By hand, and: with as much less of it the next one is drawn, with a little less than that it is not."""
  rng = np.random.default_rng(0)
  B, V, temp = 64, 50, 0.7
  logits_BV = jnp.asarray(rng.normal(0, 2, (B, V)), jnp.float32)
  at = keys(range(B)), jnp.zeros((B,), jnp.int32)

  def law(logits_BV):
    return jax.nn.log_softmax(logits_BV / temp)

  token_B, lead_B = drafters.draw_with_lead(law(logits_BV), logits_BV, jnp.full((B,), temp), *at)
  np.testing.assert_array_equal(token_B, draw.draw(law(logits_BV), *at))
  order_BV = np.sort(np.asarray(logits_BV + temp * draw.gumbel(*at, V)))
  np.testing.assert_allclose(lead_B, order_BV[:, -1] - order_BV[:, -2], rtol=1e-4, atol=1e-5)
  mine_BV = jnp.arange(V) == token_B[:, None]
  for share, stays in ((0.99, True), (1.01, False)):
    less_BV = logits_BV - jnp.where(mine_BV, share * lead_B[:, None], 0.0)
    assert ((draw.draw(law(less_BV), *at) == token_B) == stays).all()


def test_the_lead_of_a_certain_law_is_that_of_its_scores():
  law_BV = jnp.where(jnp.arange(4) == jnp.asarray([1, 1, 2])[:, None], 0.0, -jnp.inf)
  score_BV = jnp.asarray([[1.0, 3.0, 2.5, -9], [-jnp.inf, 3.0, -jnp.inf, -jnp.inf], [1, 3, 2, 0]])
  token_B, lead_B = drafters.draw_with_lead(
    law_BV, score_BV, jnp.zeros((3,)), keys([1, 2, 3]), jnp.zeros((3,), jnp.int32)
  )
  assert token_B.tolist() == [1, 1, 2]
  assert lead_B.tolist() == [0.5, np.inf, 0.0]  # one that others chose is ahead of nothing


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
@pytest.mark.parametrize("p", [[0.7, 0.3], [0.5, 0.3, 0.2], [0.9] + [0.1 / 15] * 15])
def test_draws_follow_the_law(seed, p):
  n = 50_000
  law = jnp.log(jnp.asarray(p, jnp.float32))
  key = jnp.broadcast_to(keys([seed]), (n, 2))
  tokens = draw.draw(jnp.broadcast_to(law, (n, len(p))), key, jnp.arange(n))
  statistic, dof = contract.chi_square(np.bincount(tokens, minlength=len(p)), np.asarray(p))
  assert statistic < contract.chi_square_limit(dof)


def test_seeds_beyond_64_bits_are_refused():
  with pytest.raises(errors.UserError, match="64 bits"):
    draw.seed_words(2**64)
