"""The adaptive Dirichlet sampler of entropix, November 2024, with its mathematics corrected.

Why: instead of fixed thresholds, each next-token law is compared with the earlier ones of the same text.
Running means say what is usual for the text, and only unusual tokens get a special treatment:

  flow          low entropy and varentropy (off by default): take the top token
  concentrated  usual, and more certain than usual: take the top token
  dispersed     usual: draw from the top FEW tokens, at the temperature that gives them their usual entropy
  mix           unusual, of a usual shape: bring it to the usual entropy, and mix it with the usual shape
  ood           unusual, of an unusual shape: draw from the usual shape alone
  ban           high entropy and varentropy (off by default): draw two without replacement, keep the second

A shape is the law's probabilities in descending order: RANKS of them, and the sum of the rest. The original
compared probabilities id by id, so its usual law was the frequency of words in any context, and `ood` would
have drawn from that; ranks keep the candidates of the context at hand [n11]. No gamma draws are needed:
to draw p from Dir(alpha) and a token from p is to draw the token from alpha / sum(alpha).
Doubt: every published evaluation of this sampler in fact measured greedy decoding [n11].
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import metrics
from entropix_jax.rowwise import any_row, col
from entropix_jax.sampling import Decision, Observation, _dirichlet
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _temperature as temperature

BRANCHES = ("flow", "concentrated", "dispersed", "mix", "ood", "ban")
FLOW, CONCENTRATED, DISPERSED, MIX, OOD, BAN = range(6)

RANKS = 64  # more ranks make the fitted Dirichlet narrower, so that more shapes count as unusual
FEW = 6  # top tokens whose usual entropy is measured, as in the original
FLOOR = -12.0  # nats; lower log-probabilities are raised to this
TEMP_LEAST, TEMP_MOST = 0.1, 2.5
NEVER = 1e9

RANGES = {
  "rate": (1e-3, 1.0), "forget": (0.0, 0.5), "warm_up": (0, 10_000), "calm_least": (0.0, 20.0),
  "unusual": (0.0, 1.0), "pace": (0.0, 10.0),
}  # fmt: skip


@struct.dataclass
class Config:
  rate: float = 0.1  # weight of the newest token in running means
  forget: float = 0.5  # largest weight of the newest shape in the mean shape
  warm_up: int = 8  # first tokens, which are never unusual
  # A token is unusual if w_ent z(entropy) + w_varent z(varentropy) + w_surprise z(last token's surprise)
  # exceeds a threshold; z is in standard deviations from the running mean.
  w_ent: float = 1.0  # weight of z(entropy)
  w_varent: float = 0.5  # weight of z(varentropy)
  w_surprise: float = 0.5  # weight of z(surprise)
  unusual: float = 0.1  # share of tokens that should be unusual; the threshold adapts to it
  threshold: float = 1.57  # the threshold at the beginning
  pace: float = 0.1  # step of the threshold per token
  # A usual token is certain (branch concentrated) if the entropy of the top FEW is below either bound.
  calm_least: float = 0.05  # nats
  calm_sd: float = 0.5  # standard deviations below the running mean
  ood_sd: float = -2.0  # a shape is unusual if the z of its log-density is not above this
  flow_ent: float = 0.0  # nats; flow if the entropy is below this
  flow_varent: float = 0.0  # nats^2; and the varentropy below this
  ban_ent: float = NEVER  # nats; ban if the entropy is at least this
  ban_varent: float = NEVER  # nats^2; and the varentropy above this


@struct.dataclass
class Running:
  """A running mean and variance of one number per row; the mean starts at the first value."""

  mean_B: jax.Array
  var_B: jax.Array

  def z(self, x_B: jax.Array) -> jax.Array:
    """How many standard deviations x is above the mean."""
    return (x_B - self.mean_B) / self.sd_B

  @property
  def sd_B(self) -> jax.Array:
    """The standard deviation, at least 1e-3: in a text that repeats itself it would be rounding error."""
    return jnp.sqrt(self.var_B + 1e-6)

  def add(self, x_B: jax.Array, rate_B: jax.Array, first_B: jax.Array) -> "Running":
    """Updated with the value x; `rate_B` is its weight, `first_B` says that it is the first."""
    off_B = x_B - self.mean_B
    return Running(
      mean_B=jnp.where(first_B, x_B, self.mean_B + rate_B * off_B),
      var_B=jnp.where(first_B, 0.0, (1.0 - rate_B) * (self.var_B + rate_B * off_B * off_B)),
    )


@struct.dataclass
class State:
  """What is usual for each row."""

  count_B: jax.Array  # int32; tokens so far
  ent: Running  # nats; entropy of the model's raw law
  varent: Running  # nats^2; its varentropy
  few: Running  # nats; entropy of the raw law over its top FEW tokens
  surprise: Running  # nats; of the chosen tokens under the raw law
  law_surprise: Running  # nats; of the chosen tokens under the sampler's law
  law_ent: Running  # nats; entropy of the sampler's law
  density: Running  # nats per outcome; log-density of each shape under the Dirichlet before it
  last_B: jax.Array  # nats; surprise of the last token under the raw law
  threshold_B: jax.Array  # score above which a token is unusual
  mean_BM: jax.Array  # nats; running mean of the shapes' log-probabilities, M = RANKS + 1
  alpha_BM: jax.Array  # parameters of the Dirichlet fitted to that mean


def init(cfg: Config, B: int) -> State:
  zero_B = jnp.zeros((B,))
  none = Running(zero_B, zero_B)
  return State(
    count_B=jnp.zeros((B,), jnp.int32),
    ent=none, varent=none, few=none, surprise=none, law_surprise=none, law_ent=none, density=none,
    last_B=zero_B,
    threshold_B=zero_B + cfg.threshold,
    mean_BM=jnp.zeros((B, RANKS + 1)),
    alpha_BM=jnp.ones((B, RANKS + 1)),
  )  # fmt: skip


def _beyond(logits_BV: jax.Array, value_BC: jax.Array, temp_B, lse_B) -> jax.Array:
  """rest_B: probability of all tokens but the top C. It is summed, because 1 - (sum of the top C) is only
  rounding error where they have nearly everything, and the law divides by it."""
  edge_B1 = value_BC[:, -1:]
  p_BV = jnp.exp(logits_BV / col(temp_B) - col(lse_B))
  below_B = jnp.sum(jnp.where(logits_BV < edge_B1, p_BV, 0.0), axis=-1)
  # Tokens tied with the last of the top C that are not among the C.
  ties_B = jnp.sum(logits_BV == edge_B1, axis=-1) - jnp.sum(value_BC == edge_B1, axis=-1)
  each_B = jnp.exp(edge_B1[:, 0] / temp_B - lse_B)
  return below_B + ties_B.astype(jnp.float32) * each_B


def _shape(value_BC: jax.Array, rest_B: jax.Array, temp_B: jax.Array, lse_B: jax.Array):
  """log_BM: log-probabilities in descending order and that of the rest, floored, normalised again."""
  logp_BC = value_BC / col(temp_B) - col(lse_B)
  logp_BC = jnp.pad(logp_BC, ((0, 0), (0, RANKS - logp_BC.shape[1])), constant_values=-jnp.inf)
  log_BM = jnp.concatenate([logp_BC, jnp.log(rest_B)[:, None]], axis=-1)
  return jax.nn.log_softmax(jnp.maximum(log_BM, FLOOR), axis=-1)


def _toward(logits_BV, value_BC, id_BC, temp_B, lse_B, shape_BM, usual_BM, pull_B):
  """law_BV: pull * (the usual shape, assigned to tokens by rank) + (1 - pull) * (this law).

  Tokens with equal logits share the probability of their ranks equally, so that ids make no difference.
  """
  B, C = value_BC.shape
  p_BC, rest_B = jnp.exp(shape_BM[:, :C]), jnp.exp(shape_BM[:, -1])
  there_BC = value_BC > -jnp.inf
  beyond_B = jnp.sum(logits_BV > -jnp.inf, axis=-1) > C
  u_BC = jnp.where(there_BC, usual_BM[:, :C], 0.0)
  u_rest_B = jnp.where(beyond_B, usual_BM[:, -1], 0.0)
  whole_B1 = (jnp.sum(u_BC, axis=-1) + u_rest_B)[:, None]
  u_BC, u_rest_B = u_BC / whole_B1, u_rest_B / whole_B1[:, 0]
  pull_B1 = col(pull_B)
  mass_BC = jnp.where(there_BC, pull_B1 * u_BC + (1.0 - pull_B1) * p_BC, 0.0)
  scale_B = pull_B * u_rest_B / rest_B + (1.0 - pull_B)

  tail_BV = logits_BV / col(temp_B) - col(lse_B) + jnp.log(col(scale_B))
  equal_BCC = value_BC[:, None, :] == value_BC[:, :, None]
  members_BC = jnp.sum(equal_BCC, axis=-1).astype(jnp.float32)
  group_BC = jnp.sum(jnp.where(equal_BCC, mass_BC[:, None, :], 0.0), axis=-1)
  # Tokens tied with the last rank may lie outside the ranks; their share of the tail joins the group.
  edge_B1 = value_BC[:, -1:]
  size_B1 = jnp.sum(logits_BV == edge_B1, axis=-1, keepdims=True).astype(jnp.float32)
  outside_B1 = jnp.where(edge_B1 > -jnp.inf, size_B1 - members_BC[:, -1:], 0.0)
  each_B1 = jnp.exp(edge_B1 / col(temp_B) - col(lse_B)) * col(scale_B)
  at_edge_BC = value_BC == edge_B1
  group_BC += jnp.where(at_edge_BC, outside_B1 * each_B1, 0.0)
  members_BC += jnp.where(at_edge_BC, outside_B1, 0.0)
  logq_BC = jnp.log(group_BC / members_BC)

  row_B1 = jnp.arange(B)[:, None]
  law_BV = tail_BV.at[row_B1, id_BC].set(
    jnp.where(there_BC, logq_BC, -jnp.inf), mode="drop", unique_indices=True
  )
  law_BV = jnp.where((logits_BV == edge_B1) & (edge_B1 > -jnp.inf), logq_BC[:, -1:], law_BV)
  return filters.normalise(filters.cut(law_BV, logits_BV > -jnp.inf))


def _second(law_BV: jax.Array) -> jax.Array:
  """law_BV of the second of two draws without replacement from b: q(z) = b_z (R - b_z / (1 - b_z)), where
  R is the sum of b / (1 - b). A law with a token above 1 - 1e-6 is left as it is."""
  b_BV = jnp.exp(law_BV)
  sure_B1 = jnp.max(b_BV, axis=-1, keepdims=True) > 1.0 - 1e-6
  odds_BV = b_BV / jnp.maximum(1.0 - b_BV, 1e-6)
  other_BV = jnp.sum(odds_BV, axis=-1, keepdims=True) - odds_BV
  second_BV = law_BV + jnp.log(jnp.maximum(other_BV, 1e-30))
  return filters.normalise(jnp.where(sure_B1, law_BV, second_BV))


def step(cfg: Config, state: State, obs: Observation) -> Decision:
  logits_BV = obs.logits_BV
  B, V = logits_BV.shape
  ent_B, varent_B = obs.raw.ent, obs.raw.varent
  first_B = state.count_B == 0
  value_BC, id_BC = filters.best(logits_BV, min(RANKS, V))

  few_BC = value_BC[:, :FEW]
  few_ent_B = metrics.spread(few_BC).ent
  usual_few_B = jnp.where(first_B, few_ent_B, state.few.mean_B)
  sure_B = few_ent_B < jnp.maximum(cfg.calm_least, usual_few_B - cfg.calm_sd * state.few.sd_B)
  score_B = (
    cfg.w_ent * state.ent.z(ent_B)
    + cfg.w_varent * state.varent.z(varent_B)
    + cfg.w_surprise * state.surprise.z(state.last_B)
  )
  score_B = jnp.where(first_B, 0.0, score_B)
  odd_B = (score_B > state.threshold_B) & (state.count_B >= cfg.warm_up)

  low_B, high_B = cfg.flow_ent, cfg.ban_ent
  flow_B = (ent_B < low_B) & (varent_B < cfg.flow_varent)
  ban_B = ~flow_B & (ent_B >= high_B) & (varent_B > cfg.ban_varent)

  # Temperatures bring the top FEW to their usual entropy, unusual rows to the mean of four running means.
  disperse_B = ~odd_B & ~sure_B & ~flow_B
  target_B = 0.25 * (
    state.surprise.mean_B + state.law_surprise.mean_B + state.law_ent.mean_B + state.ent.mean_B
  )
  target_B = jnp.where(first_B, ent_B, target_B)
  few_temp_B, few_clamped_B = any_row(
    disperse_B,
    lambda x: temperature.for_entropy(x, usual_few_B, TEMP_LEAST, TEMP_MOST),
    lambda x: (jnp.ones((B,)), jnp.zeros((B,), bool)),
    few_BC,
  )

  def solve(logits_BV):
    temp_B, clamped_B = temperature.for_entropy(logits_BV, target_B, TEMP_LEAST, TEMP_MOST)
    return temp_B, clamped_B, jax.nn.logsumexp(logits_BV / col(temp_B), axis=-1)

  odd_temp_B, odd_clamped_B, lse_B = any_row(
    odd_B & ~flow_B,
    solve,
    lambda logits_BV: (jnp.ones((B,)), jnp.zeros((B,), bool), obs.raw.lse),
    logits_BV,
  )

  rest_B = _beyond(logits_BV, value_BC, odd_temp_B, lse_B)
  shape_BM = _shape(value_BC, rest_B, odd_temp_B, lse_B)
  alpha_BM = jnp.where(col(first_B), _dirichlet.start(shape_BM), state.alpha_BM)
  M = RANKS + 1
  density_B = _dirichlet.log_density(jnp.exp(shape_BM), alpha_BM) / M
  familiar_B = jnp.where(first_B, 0.0, state.density.z(density_B)) > cfg.ood_sd
  usual_BM = alpha_BM / jnp.sum(alpha_BM, axis=-1, keepdims=True)
  apart_B = jnp.sum(usual_BM * (jnp.log(usual_BM) - shape_BM), axis=-1)
  # The original's weight: close to 1 where the shape is as usual, small where it is far from that.
  pull_B = 1.0 - 10.0 ** (-1.0 / (jnp.maximum(apart_B, 0.0) + 1e-6))
  pull_B = jnp.where(familiar_B, pull_B, 1.0)

  def unusual(logits_BV):
    return _toward(logits_BV, value_BC, id_BC, odd_temp_B, lse_B, shape_BM, usual_BM, pull_B)

  def usual(logits_BV):
    few_B1 = value_BC[:, min(FEW, V) - 1, None]
    score_BV = (logits_BV - filters.top(logits_BV)) / col(few_temp_B)
    some_BV = filters.normalise(filters.cut(score_BV, logits_BV >= few_B1))
    return jnp.where(col(disperse_B), some_BV, filters.delta(logits_BV))

  law_BV = any_row(odd_B & ~flow_B, unusual, usual, logits_BV)
  law_BV = any_row(ban_B, _second, lambda law_BV: law_BV, law_BV)

  branch_B = jnp.select(
    [flow_B, ban_B, odd_B & familiar_B, odd_B, sure_B],
    [FLOW, BAN, MIX, OOD, CONCENTRATED],
    DISPERSED,
  )
  temp_B = jnp.where(odd_B, odd_temp_B, jnp.where(disperse_B, few_temp_B, 0.0))
  return Decision(
    law_BV=law_BV,
    branch_B=branch_B,
    stats={
      "temperature": jnp.where(flow_B, 0.0, temp_B),
      "target": jnp.where(odd_B, target_B, usual_few_B),
      "unusual": score_B,
      "threshold": state.threshold_B,
      "density": density_B,
      "pull": jnp.where(odd_B, pull_B, 0.0),
      "alpha": jnp.sum(alpha_BM, axis=-1),
      "clamped": jnp.where(odd_B, odd_clamped_B, few_clamped_B).astype(jnp.float32),
    },
    aux={
      "raw": obs.raw,
      "score_B": score_B,
      "logits_BV": logits_BV,
      "few_B": few_ent_B,
      "shape_BM": shape_BM,
      "density_B": density_B,
      "alpha_BM": alpha_BM,
    },
  )


def commit(cfg: Config, state: State, decision: Decision, token_B: jax.Array) -> State:
  aux = decision.aux
  first_B = state.count_B == 0

  def at(x_BV):
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

  surprise_B = aux["raw"].lse - at(aux["logits_BV"])
  shape_BM = aux["shape_BM"]
  # A shape near the mean changes it little, a distant one by `forget` at most (base 4 and exponent 3 are the
  # original's). At a weight of 1 the mean would be a single shape, to which no Dirichlet can be fitted.
  log_mean_BM = jax.nn.log_softmax(state.mean_BM, axis=-1)
  apart_B = jnp.sum(jnp.exp(shape_BM) * (shape_BM - log_mean_BM), axis=-1)
  weight_B = jnp.minimum(cfg.forget, 4.0 ** (-3.0 / (jnp.maximum(apart_B, 0.0) + 1e-6)))
  mixed_BM = state.mean_BM + col(weight_B) * (shape_BM - state.mean_BM)
  mean_BM = jnp.where(col(first_B), shape_BM, mixed_BM)
  alpha_BM, _ = _dirichlet.fit(mean_BM, aux["alpha_BM"])

  # Steps up and down cancel out when a share `unusual` of tokens exceeds the threshold, whatever the
  # correlation of the three signals.
  above_B = (aux["score_B"] > state.threshold_B).astype(jnp.float32)

  def add(running, x_B):
    return running.add(x_B, cfg.rate, first_B)

  # The first Dirichlet is fitted to one shape, and densities under it are far off. A mean that holds one
  # would hide unusual shapes for 100 tokens, so up to warm_up only the last step counts.
  off_B = aux["density_B"] - state.density.mean_B
  fresh = Running(aux["density_B"], jnp.where(first_B, 0.0, off_B * off_B))
  density = jax.tree.map(
    lambda new, old: jnp.where(state.count_B <= cfg.warm_up, new, old),
    fresh,
    add(state.density, aux["density_B"]),
  )
  return State(
    count_B=state.count_B + 1,
    ent=add(state.ent, aux["raw"].ent),
    varent=add(state.varent, aux["raw"].varent),
    few=add(state.few, aux["few_B"]),
    surprise=add(state.surprise, surprise_B),
    law_surprise=add(state.law_surprise, -at(decision.law_BV)),
    law_ent=add(state.law_ent, metrics.spread(decision.law_BV).ent),
    density=density,
    last_B=surprise_B,
    threshold_B=state.threshold_B + cfg.pace * (above_B - cfg.unusual),
    mean_BM=mean_BM,
    alpha_BM=alpha_BM,
  )


_SURE = [0.999, 0.001]
_OPEN = [0.4, 0.3, 0.2, 0.1]
CASES = {
  "flow": {"p": _SURE, "flow_ent": 0.3, "flow_varent": 1.2},
  "concentrated": {"p": _SURE},
  "dispersed": {"p": _OPEN},
  "mix": {"p": _OPEN, "warm_up": 0, "threshold": -9.0},
  "ood": {"p": _OPEN, "warm_up": 0, "threshold": -9.0, "ood_sd": 1.0},
  "ban": {"p": _OPEN, "ban_ent": 0.1, "ban_varent": -1.0},
}
USES = ({"warm_up": 1, "threshold": 0.2, "ban_ent": 3.0, "ban_varent": 0.5},)
