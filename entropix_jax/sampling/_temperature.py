"""The temperature at which a softmax has a given entropy.

Why: a target entropy means the same for every model; a temperature does not. Entropy increases strictly
with temperature unless all scores are equal, so the answer is unique. A target out of reach is clamped to
the entropies at the ends of the range.

H is the entropy and V the varentropy at temperature T. dH/dT = V / T, so dH / d ln T = V and, with
beta = 1 / T, d ln H / d beta = -T V / H. ln H is nearly linear in beta where a softmax is peaked.
"""

import jax
import jax.numpy as jnp

from entropix_jax import metrics
from entropix_jax.rowwise import col

EVALUATIONS = 20  # passes over the row, two of them at the ends; most rows need six
TOLERANCE = 1e-4  # nats
_PEAKED = 3.5  # nats; up to this target Newton steps solve for ln H in beta, above for H in ln T


def for_entropy(score_BV: jax.Array, target_B: jax.Array, low: float, high: float):
  """(temp_B, clamped_B): the temperature in [low, high] whose softmax has the target entropy, and whether
  the target is out of reach, so that `temp_B` is an end of the range.

  Safeguarded Newton: a step that leaves the bracket, or is longer than half of the step before, is replaced
  by a bisection in ln T. A row within TOLERANCE takes one more step and then stays as it is.

  Args:
    score_BV: float32 scores, -inf where excluded.
    target_B: nats.
  """
  score_BV = score_BV - jnp.max(score_BV, axis=-1, keepdims=True)
  B = target_B.shape[0]

  def at(log_B):
    heat = metrics.spread(score_BV / col(jnp.exp(log_B)))
    return heat.ent, heat.varent

  low_B, high_B = jnp.full((B,), jnp.log(low)), jnp.full((B,), jnp.log(high))
  least_B, most_B = at(low_B)[0], at(high_B)[0]
  goal_B = jnp.clip(target_B, least_B, most_B)
  clamped_B = jnp.abs(goal_B - target_B) > TOLERANCE
  end_B = jnp.where(goal_B <= least_B, low_B, high_B)
  ended_B = (goal_B <= least_B) | (goal_B >= most_B)
  start_B = jnp.clip(jnp.zeros((B,)), low_B, high_B)

  def propose(log_B, ent_B, varent_B):
    temp_B, slope_B = jnp.exp(log_B), jnp.maximum(varent_B, 1e-12)
    floor_B = jnp.maximum(ent_B, 1e-6)
    off_B = jnp.log(floor_B) - jnp.log(jnp.maximum(goal_B, 1e-6))
    beta_B = 1.0 / temp_B + off_B * floor_B / (temp_B * slope_B)
    by_beta_B = -jnp.log(jnp.maximum(beta_B, 1e-12))
    return jnp.where(goal_B <= _PEAKED, by_beta_B, log_B - (ent_B - goal_B) / slope_B)

  def go_on(carry):
    return (carry["n"] < EVALUATIONS - 2) & ~jnp.all(carry["done_B"])

  def improve(carry):
    log_B, done_B = carry["log_B"], carry["done_B"]
    ent_B, varent_B = at(log_B)
    over_B = ent_B > goal_B
    left_B = jnp.where(over_B, carry["left_B"], log_B)
    right_B = jnp.where(over_B, log_B, carry["right_B"])
    new_B = propose(log_B, ent_B, varent_B)
    near_B = jnp.abs(ent_B - goal_B) < TOLERANCE
    shrinks_B = jnp.abs(new_B - log_B) <= 0.5 * carry["moved_B"]
    sound_B = (new_B > left_B) & (new_B < right_B) & shrinks_B
    new_B = jnp.where(sound_B, new_B, jnp.where(near_B, log_B, 0.5 * (left_B + right_B)))
    return {
      "n": carry["n"] + 1,
      "log_B": jnp.where(done_B, log_B, new_B),
      "left_B": left_B,
      "right_B": right_B,
      "moved_B": jnp.abs(new_B - log_B),
      "done_B": done_B | near_B,
    }

  carry = {
    "n": jnp.int32(0),
    "log_B": jnp.where(ended_B, end_B, start_B),
    "left_B": low_B,
    "right_B": high_B,
    "moved_B": high_B - low_B,
    "done_B": ended_B,
  }
  return jnp.exp(jax.lax.while_loop(go_on, improve, carry)["log_B"]), clamped_B
