"""Rotary position embedding: queries and keys turn with their position, so scores see distance.

Why: channel i is paired with channel i + H/2, as Hugging Face checkpoints are laid out; Meta's own
files pair neighbours, and a checkpoint read under the other convention still writes fluent nonsense.
Doubt: which convention a file follows cannot be seen from its shapes [n05].
"""

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Radians per token of each channel pair, float32, shape (H/2,).

  `llama3` (Llama 3.1, arXiv:2407.21783) slows wavelengths longer than the original context by
  `factor`, keeps those much shorter, and blends linearly in 1/wavelength between the two.
  """
  # Every step in float32, as the models were trained: at position 8256 the better rounded float64
  # frequencies move a cosine by up to 4e-4, and logits beyond what parity allows [n05].
  f32 = np.float32
  freq = f32(1) / f32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim))
  if rope.kind == "default":
    return freq
  turns = f32(rope.original_max_position) / (f32(2 * np.pi) / freq)
  low, high = f32(rope.low_freq_factor), f32(rope.high_freq_factor)
  keep = np.clip((turns - low) / (high - low), f32(0), f32(1))
  return (f32(1) - keep) * freq / f32(rope.factor) + keep * freq


def angles(rope: RopeConfig, head_dim: int, pos_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) in float32, each (B, T, H/2), for absolute token positions."""
  freq = jnp.asarray(inverse_frequencies(rope, head_dim))
  angle = pos_BT[..., None].astype(jnp.float32) * freq
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turn each head's channel pairs; computed in float32, returned in the input's dtype."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
