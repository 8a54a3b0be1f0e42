"""The draw that all samplers share: argmax(law + Gumbel noise), noise fixed by the request and position.

Why: the noise depends on (seed, stream, attempt, position) only. So a request gives the same text in any
batch, slot or bucket, and a drafter can use the target's noise, which makes speculation exact for every
sampler. Noise is indexed by token id, not by rank, so that a filter cannot move it to another token.

The key chain is key(seed's high word) -> low word -> stream -> attempt -> 8 * position + purpose.
`position` counts the tokens that the stream has generated (the first is 0) and so does not depend on the
prompt's length. Samples of one prompt differ in `stream`; each rewind of a row has another `attempt`.
Prompts differ in it, too (`prompt_stream`): with the same noise, hot texts of a file would all begin alike.
"""

import enum
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.errors import UserError
from entropix_jax.rowwise import any_row, best_id

# Rotations of Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), in two alternating groups of four.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Purpose(enum.IntEnum):
  """What a noise vector is for; each purpose has its own noise. The last three serve `judge`."""

  TARGET = 0  # the draw of the emitted token
  AUX = 1  # random choices inside a sampler
  DRAFT = 2  # the draw of a guess from the drafter's law
  ACCEPT = 3  # whether the guess is accepted
  RESIDUAL = 4  # the draw that replaces a rejected guess


def seed_words(seed: int) -> tuple[int, int]:
  """(high, low) 32-bit words of a seed; `jax.random.key` drops the high one. UserError above 64 bits."""
  if not -(2**63) <= seed < 2**64:
    raise UserError(f"The seed {seed} does not fit in 64 bits; use a smaller one.")
  seed %= 2**64
  return seed >> 32, seed & 0xFFFFFFFF


def prompt_stream(ids: Sequence[int]) -> int:
  """The stream of a prompt's first sample, 32 bits; it depends only on the token ids."""
  return zlib.crc32(np.asarray(ids, "<i4").tobytes())


@jax.jit  # so that its 200 operations are traced once for each shape
def _threefry(k0, k1, x0, x1) -> tuple[jax.Array, jax.Array]:
  """Two random words for the counter (x0, x1) under the key (k0, k1), all uint32; equal on every device.

  The bits are those of `jax.random`. On a CPU, that runs the rounds as a loop over memory. Unrolled here,
  they are fused with the code that uses the bits, which takes a quarter to a half of the time.
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
  """key_B2: each row's noise key, uint32; it stays the same until the row is forked or rewound."""
  none_B = jnp.zeros(stream_B.shape, jnp.uint32)
  key = none_B, seed_B2[:, 0]
  for word_B in (seed_B2[:, 1], stream_B, attempt_B):
    key = _threefry(*key, none_B, word_B.astype(jnp.uint32))
  return jnp.stack(key, axis=-1)


def _words(key_B2: jax.Array, pos_B: jax.Array, n: int, purpose: Purpose | jax.Array) -> jax.Array:
  """uint32 of shape (B, n); a larger n appends words and leaves the first ones as they are."""
  word_B = 8 * pos_B.astype(jnp.uint32) + jnp.asarray(purpose, jnp.uint32)
  k0_B, k1_B = _threefry(key_B2[:, 0], key_B2[:, 1], jnp.zeros_like(word_B), word_B)
  ids = jnp.arange(n, dtype=jnp.uint32)
  x0_BV, x1_BV = _threefry(k0_B[:, None], k1_B[:, None], jnp.zeros_like(ids), ids)
  return x0_BV ^ x1_BV


def gumbel(
  key_B2: jax.Array, pos_B: jax.Array, V: int, purpose: Purpose | jax.Array = Purpose.TARGET
) -> jax.Array:
  """noise_BV: standard Gumbel noise in [-2.9, 22.9], float32; `purpose` may be uint32, one per row.

  -ln(-ln(1 - v)), with v in (0, 1) from a 32-bit word, keeps its resolution in the upper tail, where it
  matters: the usual form -ln(-ln(v)) has 59 distinct values among the 165 largest of 2e7 draws.
  """
  bits_BV = _words(key_B2, pos_B, V, purpose)
  v_BV = jnp.minimum((bits_BV.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
  return -jnp.log(-jnp.log1p(-v_BV))


def log_uniform(key_B2: jax.Array, pos_B: jax.Array, purpose: Purpose) -> jax.Array:
  """log u_B, float32, u uniform on (0, 1]: P(u <= r) is r within 2^-24 r + 2^-33, also for small r."""
  bits_B = _words(key_B2, pos_B, 1, purpose)[:, 0]
  return jnp.log((bits_B.astype(jnp.float32) + 0.5) * 2.0**-32)


def draw(
  law_BV: jax.Array,
  key_B2: jax.Array,
  pos_B: jax.Array,
  purpose: Purpose | jax.Array = Purpose.TARGET,
) -> jax.Array:
  """token_B ~ exp(law_BV), int32, independent of the other rows; ties go to the lowest id."""
  sure_B = jnp.max(law_BV, axis=-1) == 0.0  # one token has probability 1: noise cannot change it
  return any_row(
    ~sure_B,
    lambda law_BV: best_id(law_BV + gumbel(key_B2, pos_B, law_BV.shape[-1], purpose)),
    best_id,
    law_BV,
  )
