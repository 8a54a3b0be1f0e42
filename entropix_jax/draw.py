"""The one draw: a token is argmax(law + noise), with noise fixed by (seed, stream, attempt, position).

Why: noise that depends on nothing but the request makes text repeat in any batch, slot or bucket, and
lets a drafter share it, so that speculation is exact for every sampler. It is indexed by token id and
never by rank: what another filter cuts away cannot move it.

The key chain is key(seed's high word) -> low word -> stream -> attempt -> 8 * position + purpose.
`position` counts the tokens a stream has generated (the first is 0), so it does not depend on how long
the prompt is; siblings of one prompt differ in `stream`, a rewound row in `attempt`.
"""

import enum

import jax
import jax.numpy as jnp

from entropix_jax.errors import UserError
from entropix_jax.rows import any_row, best_id

_IMPL = "threefry2x32"  # the same bits on every device, and a prefix property under padding of V


class Purpose(enum.IntEnum):
  """What a noise vector is for; two uses never share one."""

  TARGET = 0  # the draw of the emitted token
  AUX = 1  # random choices inside a sampler


def seed_words(seed: int) -> tuple[int, int]:
  """(high, low) 32-bit words of a 64-bit seed: `jax.random.key` alone drops the high one."""
  if not -(2**63) <= seed < 2**64:
    raise UserError(f"The seed {seed} does not fit 64 bits; use a smaller one.")
  seed %= 2**64
  return seed >> 32, seed & 0xFFFFFFFF


def row_keys(seed_B2: jax.Array, stream_B: jax.Array, attempt_B: jax.Array) -> jax.Array:
  """key_B2: each row's noise key as uint32 words; fixed for a request until it forks or rewinds."""

  def one(seed_2, stream, attempt):
    key = jax.random.key(seed_2[0], impl=_IMPL)
    for word in (seed_2[1], stream, attempt):
      key = jax.random.fold_in(key, word)
    return jax.random.key_data(key)

  return jax.vmap(one)(seed_B2, stream_B, attempt_B)


def gumbel(key_B2: jax.Array, pos_B: jax.Array, V: int, purpose: Purpose = Purpose.TARGET):
  """noise_BV: standard Gumbel in [-2.9, 22.9], float32.

  -ln(-ln(1 - v)) with v in (0, 1) read off a 32-bit word keeps its resolution where it matters, in the
  upper tail: the usual form has 59 distinct values among the 165 largest of 2e7 draws.
  """

  def one(key_2, pos):
    key = jax.random.wrap_key_data(key_2, impl=_IMPL)
    return jax.random.bits(jax.random.fold_in(key, 8 * pos + int(purpose)), (V,), jnp.uint32)

  bits_BV = jax.vmap(one)(key_B2, pos_B.astype(jnp.uint32))
  v_BV = jnp.minimum((bits_BV.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
  return -jnp.log(-jnp.log1p(-v_BV))


def draw(law_BV: jax.Array, key_B2: jax.Array, pos_B: jax.Array) -> jax.Array:
  """token_B ~ exp(law_BV), the same one whoever shares the batch; ties go to the lowest id."""
  sure_B = jnp.max(law_BV, axis=-1) == 0.0  # all the mass on one token: no noise can change it
  return any_row(
    ~sure_B,
    lambda law_BV: best_id(law_BV + gumbel(key_B2, pos_B, law_BV.shape[-1])),
    best_id,
    law_BV,
  )
