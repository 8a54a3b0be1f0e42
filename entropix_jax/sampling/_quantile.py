"""Thresholds that are quantiles of a row's own recent values.

The rule: of the latest n values (KEPT at most) the threshold q20 is the r-th smallest, where r is 0.20 (n + 1)
rounded half up, at least 1 and at most n. With fewer than LEAST values there is no threshold, and no comparison
with it holds. A new value that is exchangeable with the n others, without ties, is below the r-th smallest
with probability r / (n + 1). Values are remembered and compared as rounded to bfloat16: in a text that repeats
itself they would otherwise be equal but for the rounding of sums, which differs between passes [n29, n30].

Why: comparisons with the r-th smallest are counts of smaller values, so nothing is sorted. Counts and ranks
are integers, so every device decides alike.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.rowwise import col
from entropix_jax.sampling import WHOLE

KEPT = 256  # values; q5 and q95 then have 12 values beyond them
LEAST = (
  19  # values: the least n for which 0.95 (n + 1) is at most n, so that q95 can hold its share
)


@struct.dataclass
class Recent:
  """The latest values of a signal in each row."""

  value_BX: jax.Array  # float32, rounded to bfloat16; a ring of KEPT values
  count_B: jax.Array  # int32; values so far

  def add(self, x_B: jax.Array) -> "Recent":
    """With one value more, in place of the oldest once the ring is full."""
    newest_BX = jnp.arange(KEPT) == col(self.count_B % KEPT)
    value_BX = jnp.where(newest_BX, col(_rounded(x_B)), self.value_BX)
    return Recent(value_BX, self.count_B + 1)


def _rounded(x_B: jax.Array) -> jax.Array:
  """Float32 rounded to bfloat16; two conversions would not do, because XLA may leave them out."""
  return jax.lax.reduce_precision(x_B, exponent_bits=8, mantissa_bits=7)


def empty(B: int) -> Recent:
  """No values."""
  return Recent(jnp.zeros((B, KEPT), jnp.float32), jnp.zeros((B,), jnp.int32))


def against(x_B: jax.Array, recent: Recent | None) -> Callable[..., tuple[jax.Array, ...]]:
  """A comparison of x: (number_B, quantile_B) -> (x < threshold, x > threshold, x >= threshold), each (B,).

  Args:
    recent: earlier values of the signal; None: no threshold is a quantile.
  """
  if recent is None:
    return lambda number_B, quantile_B: (x_B < number_B, x_B > number_B, x_B >= number_B)
  n_B = jnp.minimum(recent.count_B, KEPT)
  there_BX, value_BX = jnp.arange(KEPT) < col(n_B), recent.value_BX
  here_B1 = col(_rounded(x_B))
  under_B = jnp.sum(there_BX & (value_BX < here_B1), axis=-1)
  not_over_B = jnp.sum(there_BX & (value_BX <= here_B1), axis=-1)

  def compare(number_B, quantile_B):
    rank_B = (quantile_B * (n_B + 1) + WHOLE // 2) // WHOLE
    rank_B = jnp.maximum(1, jnp.minimum(rank_B, n_B))
    fixed_B, known_B = quantile_B < 0, n_B >= LEAST
    return (
      jnp.where(fixed_B, x_B < number_B, known_B & (not_over_B < rank_B)),
      jnp.where(fixed_B, x_B > number_B, known_B & (under_B >= rank_B)),
      jnp.where(fixed_B, x_B >= number_B, known_B & (not_over_B >= rank_B)),
    )

  return compare
