"""Rotary position embedding: rotates queries and keys by position, so scores depend on distance.

Why: channel i is paired with channel i + H/2, as in Hugging Face checkpoints. Meta's own files pair
neighbouring channels, and a checkpoint read under the wrong convention still writes fluent nonsense.
Doubt: the shapes of a file do not show which convention it follows [n05].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Radians per token of each channel pair, float32, shape (H/2,).

  `linear` divides all frequencies by `factor`. `dynamic` changes them only beyond max_position, where an
  Engine does not go. `llama3` (Llama 3.1, arXiv:2407.21783) divides frequencies by `factor` for wavelengths
  beyond original_max_position / low_freq_factor, keeps those below original_max_position /
  high_freq_factor, and blends linearly in 1/wavelength in between. `yarn` (arXiv:2309.00071) keeps
  frequencies that turn more than `beta_fast` times in original_max_position tokens, divides those that
  turn less than `beta_slow` times, and blends linearly in the channel; `truncate` rounds these channels.
  """
  # Every step is float32, as in training: frequencies computed in float64 and rounded once would
  # change a cosine at position 8256 by up to 4e-4, and logits beyond what parity allows [n05].
  f32 = np.float32
  freq = f32(1) / f32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim))
  if rope.kind in ("default", "dynamic"):
    return freq
  keep = f32(0)
  if rope.kind == "llama3":
    turns = f32(rope.original_max_position) / (f32(2 * np.pi) / freq)
    low, high = f32(rope.low_freq_factor), f32(rope.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), f32(0), f32(1))
  elif rope.kind == "yarn":
    first, last = (_channel(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=f32) - f32(first)) / f32(last - first or 0.001)
    keep = f32(1) - np.clip(ramp, f32(0), f32(1))
  return (f32(1) - keep) * freq / f32(rope.factor) + keep * freq


def _channel(rope: RopeConfig, head_dim: int, turns: float) -> float:
  """The channel pair, as a real number, that turns so often in the original context."""
  wavelength = rope.original_max_position / turns
  return head_dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta)


def angles(
  rope: RopeConfig, head_dim: int, pos_BT: jax.Array, split: bool = False
) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of the rotation angles at absolute positions, times `rope.attention_factor`; each float32
  of shape (B, T, H/2).

  Args:
    split: B or T is split over devices.
  """
  freq = jnp.asarray(inverse_frequencies(rope, head_dim))

  def of(pos_BT):
    angle = pos_BT[..., None].astype(jnp.float32) * freq
    pair = jnp.cos(angle), jnp.sin(angle)
    return pair if rope.attention_factor == 1 else tuple(x * rope.attention_factor for x in pair)

  def in_a_loop(pos_BT):
    pos_2BT = jnp.stack(jnp.split(pos_BT, 2, axis=1))
    return tuple(jnp.concatenate(tuple(x), axis=1) for x in jax.lax.map(of, pos_2BT))

  # XLA:CPU fuses what is outside of a loop into every layer, where it computes both for each entry of q and k.
  ways = {} if split or pos_BT.shape[1] % 2 else {"cpu": in_a_loop}
  return jax.lax.platform_dependent(pos_BT, default=of, **ways)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotate each head's channel pairs by `angles`; computed in float32, returned in x's dtype."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
