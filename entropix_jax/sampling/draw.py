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
import numpy as np

from entropix_jax.errors import UserError
from entropix_jax.rowwise import any_row, best_id

# Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): the rotations of two groups of four rounds.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Purpose(enum.IntEnum):
  """What a noise vector is for; two uses never share one."""

  TARGET = 0  # the draw of the emitted token
  AUX = 1  # random choices inside a sampler
  DRAFT = 2  # the draw of a guess that is to be judged by its law
  ACCEPT = 3  # whether such a guess stands
  RESIDUAL = 4  # the draw of what stands in its place


def seed_words(seed: int) -> tuple[int, int]:
  """(high, low) 32-bit words of a 64-bit seed: `jax.random.key` alone drops the high one."""
  if not -(2**63) <= seed < 2**64:
    raise UserError(f"The seed {seed} does not fit 64 bits; use a smaller one.")
  seed %= 2**64
  return seed >> 32, seed & 0xFFFFFFFF


def _threefry(k0, k1, x0, x1) -> tuple[jax.Array, jax.Array]:
  """Two words of a counter under a key of two, all uint32; the same bits on every device.

  They are those of `jax.random`. It runs the rounds as a loop over memory on a CPU; written out, they are
  one loop with what uses the bits, which takes a quarter to a half of the time.
  """
  key = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
  x0, x1 = x0 + k0, x1 + k1
  for i in range(5):
    for r in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r)))
    x0, x1 = x0 + key[(i + 1) % 3], x1 + key[(i + 2) % 3] + np.uint32(i + 1)
  return x0, x1


def row_keys(seed_B2: jax.Array, stream_B: jax.Array, attempt_B: jax.Array) -> jax.Array:
  """key_B2: each row's noise key as uint32 words; fixed for a request until it forks or rewinds."""
  none_B = jnp.zeros(stream_B.shape, jnp.uint32)
  key = none_B, seed_B2[:, 0]
  for word_B in (seed_B2[:, 1], stream_B, attempt_B):
    key = _threefry(*key, none_B, word_B.astype(jnp.uint32))
  return jnp.stack(key, axis=-1)


def _words(key_B2: jax.Array, pos_B: jax.Array, n: int, purpose: Purpose | jax.Array) -> jax.Array:
  """uint32 of shape (B, n), the first of them the same whatever n is."""
  word_B = 8 * pos_B.astype(jnp.uint32) + jnp.asarray(purpose, jnp.uint32)
  k0_B, k1_B = _threefry(key_B2[:, 0], key_B2[:, 1], jnp.zeros_like(word_B), word_B)
  ids = jnp.arange(n, dtype=jnp.uint32)
  x0_BV, x1_BV = _threefry(k0_B[:, None], k1_B[:, None], jnp.zeros_like(ids), ids)
  return x0_BV ^ x1_BV


def gumbel(
  key_B2: jax.Array, pos_B: jax.Array, V: int, purpose: Purpose | jax.Array = Purpose.TARGET
) -> jax.Array:
  """noise_BV: standard Gumbel in [-2.9, 22.9], float32; `purpose` may be one a row, uint32.

  -ln(-ln(1 - v)) with v in (0, 1) read off a 32-bit word keeps its resolution where it matters, in the
  upper tail: the usual form has 59 distinct values among the 165 largest of 2e7 draws.
  """
  bits_BV = _words(key_B2, pos_B, V, purpose)
  v_BV = jnp.minimum((bits_BV.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
  return -jnp.log(-jnp.log1p(-v_BV))


def log_uniform(key_B2: jax.Array, pos_B: jax.Array, purpose: Purpose) -> jax.Array:
  """log u_B, u uniform on (0, 1], float32: P(u <= r) is r within 2^-24 r + 2^-33, also for small r."""
  bits_B = _words(key_B2, pos_B, 1, purpose)[:, 0]
  return jnp.log((bits_B.astype(jnp.float32) + 0.5) * 2.0**-32)


def draw(
  law_BV: jax.Array,
  key_B2: jax.Array,
  pos_B: jax.Array,
  purpose: Purpose | jax.Array = Purpose.TARGET,
) -> jax.Array:
  """token_B ~ exp(law_BV), the same one whoever shares the batch; ties go to the lowest id."""
  sure_B = jnp.max(law_BV, axis=-1) == 0.0  # all the mass on one token: no noise can change it
  return any_row(
    ~sure_B,
    lambda law_BV: best_id(law_BV + gumbel(key_B2, pos_B, law_BV.shape[-1], purpose)),
    best_id,
    law_BV,
  )
