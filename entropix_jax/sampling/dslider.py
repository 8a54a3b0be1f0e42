"""The adaptive Dirichlet sampler of November 2024, with its mathematics right.

Why: instead of fixed thresholds, compare each next-token law with those this text has had. Running means
say what is usual here; only tokens that stand out are treated specially:

  flow          the quadrant gate of the November version, shut by default: take the best token
  concentrated  usual, and surer than usual: take the best token
  dispersed     usual: the few best tokens, at the temperature that gives them their usual entropy
  mix           unusual, of a usual shape: usual entropy, and drawn towards the usual shape
  ood           unusual, of an unusual shape: the usual shape alone
  ban           the other gate, shut by default: draw twice without replacement, keep the second

A shape is the law's probabilities sorted from the best down, RANKS of them and the rest in one. The
ancestor compared probabilities id by id over the vocabulary, where the usual law is the frequency of words
whatever the context, so that `ood` would draw from that; ranks keep the context's own candidates [n11].
No gamma draws are needed: drawing p from Dir(alpha) and a token from p is drawing from alpha / a_0.
Doubt: no evaluation of this sampler has ever been published that did not measure greedy decoding [n11].
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

RANKS = 64  # M; the fitted Dirichlet grows narrower with it, so that more shapes count as unusual
FEW = 6  # tokens that the usual entropy is measured over, as in the ancestor
FLOOR = -12.0  # nats; log-probabilities below count as this
TEMP_LEAST, TEMP_MOST = 0.1, 2.5
NEVER = 1e9

RANGES = {
  "rate": (1e-3, 1.0), "forget": (0.0, 0.5), "warm_up": (0, 10_000), "calm_least": (0.0, 20.0),
  "unusual": (0.0, 1.0), "pace": (0.0, 10.0),
}  # fmt: skip


@struct.dataclass
class Config:
  rate: float = 0.1  # weight of the newest token in running means
  forget: float = 0.5  # most weight of the newest law in the running shape
  warm_up: int = 8  # tokens before anything is unusual
  w_ent: float = 1.0  # per standard deviation of entropy
  w_varent: float = 0.5  # per standard deviation of varentropy
  w_surprise: float = 0.5  # per standard deviation of the last token's surprise
  unusual: float = 0.1  # share of tokens that shall be unusual
  threshold: float = 1.57  # sum of the three above which a token is unusual, to begin with
  pace: float = 0.1  # how far a token moves the threshold towards that share
  calm_least: float = 0.05  # nats; entropy of the few best below which a usual token is sure
  calm_sd: float = 0.5  # standard deviations below its mean that make it sure, too
  ood_sd: float = -2.0  # standard deviations of the log-density below which a shape is unusual
  flow_ent: float = 0.0  # nats; with flow_varent, below: flow
  flow_varent: float = 0.0  # nats^2
  ban_ent: float = NEVER  # nats; with ban_varent, from here on: ban
  ban_varent: float = NEVER  # nats^2


@struct.dataclass
class Running:
  """A running mean and variance; the first value is taken whole."""

  mean_B: jax.Array
  var_B: jax.Array

  def z(self, x_B: jax.Array) -> jax.Array:
    """Standard deviations of x from the mean."""
    return (x_B - self.mean_B) / self.sd_B

  @property
  def sd_B(self) -> jax.Array:
    """The standard deviation, at least 1e-3: below, a text that repeats itself leaves only rounding."""
    return jnp.sqrt(self.var_B + 1e-6)

  def add(self, x_B: jax.Array, rate_B: jax.Array, first_B: jax.Array) -> "Running":
    """With one more value."""
    off_B = x_B - self.mean_B
    return Running(
      mean_B=jnp.where(first_B, x_B, self.mean_B + rate_B * off_B),
      var_B=jnp.where(first_B, 0.0, (1.0 - rate_B) * (self.var_B + rate_B * off_B * off_B)),
    )


@struct.dataclass
class State:
  """What is usual for each row."""

  count_B: jax.Array  # int32; tokens seen
  ent: Running  # nats, of the model's law
  varent: Running  # nats^2
  few: Running  # nats, of the FEW best tokens' law
  surprise: Running  # nats, of the chosen tokens under the model's law
  law_surprise: Running  # the same under the sampler's law
  law_ent: Running  # nats, of the sampler's law
  density: Running  # nats per outcome, of each shape under the Dirichlet before it
  last_B: jax.Array  # nats; surprise of the last token
  threshold_B: jax.Array  # above: unusual
  mean_BK: jax.Array  # running mean of the shape's log-probabilities, K = RANKS + 1
  alpha_BK: jax.Array  # the Dirichlet fitted to it


def init(cfg: Config, B: int) -> State:
  zero_B = jnp.zeros((B,))
  none = Running(zero_B, zero_B)
  return State(
    count_B=jnp.zeros((B,), jnp.int32),
    ent=none, varent=none, few=none, surprise=none, law_surprise=none, law_ent=none, density=none,
    last_B=zero_B,
    threshold_B=zero_B + cfg.threshold,
    mean_BK=jnp.zeros((B, RANKS + 1)),
    alpha_BK=jnp.ones((B, RANKS + 1)),
  )  # fmt: skip


def _beyond(logits_BV: jax.Array, value_BC: jax.Array, temp_B, lse_B) -> jax.Array:
  """rest_B: probability of all but the C best. Summed, since 1 - the others' sum is rounding where the
  best have nearly everything, and the law divides by it."""
  edge_B1 = value_BC[:, -1:]
  p_BV = jnp.exp(logits_BV / col(temp_B) - col(lse_B))
  below_B = jnp.sum(jnp.where(logits_BV < edge_B1, p_BV, 0.0), axis=-1)
  # Of a tie at the last rank, those that found no place among the C.
  ties_B = jnp.sum(logits_BV == edge_B1, axis=-1) - jnp.sum(value_BC == edge_B1, axis=-1)
  each_B = jnp.exp(edge_B1[:, 0] / temp_B - lse_B)
  return below_B + ties_B.astype(jnp.float32) * each_B


def _shape(value_BC: jax.Array, rest_B: jax.Array, temp_B: jax.Array, lse_B: jax.Array):
  """log_BK: sorted log-probabilities and the rest's, floored and normalised again."""
  logp_BC = value_BC / col(temp_B) - col(lse_B)
  logp_BC = jnp.pad(logp_BC, ((0, 0), (0, RANKS - logp_BC.shape[1])), constant_values=-jnp.inf)
  log_BK = jnp.concatenate([logp_BC, jnp.log(rest_B)[:, None]], axis=-1)
  return jax.nn.log_softmax(jnp.maximum(log_BK, FLOOR), axis=-1)


def _toward(logits_BV, value_BC, id_BC, temp_B, lse_B, shape_BK, usual_BK, pull_B):
  """law_BV: pull * (the usual shape put on this law's ranks) + (1 - pull) * this law.

  Tokens with equal logits share what their ranks get, so that the law knows no ids.
  """
  B, C = value_BC.shape
  p_BC, rest_B = jnp.exp(shape_BK[:, :C]), jnp.exp(shape_BK[:, -1])
  there_BC = value_BC > -jnp.inf
  beyond_B = jnp.sum(logits_BV > -jnp.inf, axis=-1) > C
  u_BC = jnp.where(there_BC, usual_BK[:, :C], 0.0)
  u_rest_B = jnp.where(beyond_B, usual_BK[:, -1], 0.0)
  whole_B1 = (jnp.sum(u_BC, axis=-1) + u_rest_B)[:, None]
  u_BC, u_rest_B = u_BC / whole_B1, u_rest_B / whole_B1[:, 0]
  pull_B1 = col(pull_B)
  mass_BC = jnp.where(there_BC, pull_B1 * u_BC + (1.0 - pull_B1) * p_BC, 0.0)
  scale_B = pull_B * u_rest_B / rest_B + (1.0 - pull_B)

  tail_BV = logits_BV / col(temp_B) - col(lse_B) + jnp.log(col(scale_B))
  equal_BCC = value_BC[:, None, :] == value_BC[:, :, None]
  members_BC = jnp.sum(equal_BCC, axis=-1).astype(jnp.float32)
  group_BC = jnp.sum(jnp.where(equal_BCC, mass_BC[:, None, :], 0.0), axis=-1)
  # The last rank's tie may go on beyond the ranks; those outside bring the tail's share along.
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
  """law_BV of the second of two draws without replacement: q(z) = b_z (R - b_z / (1 - b_z)), where
  R sums b / (1 - b). A token that is all but certain has no second, and stays."""
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

  # Temperatures: of the few best to their usual entropy, of an odd row to what texts are used to.
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
  shape_BK = _shape(value_BC, rest_B, odd_temp_B, lse_B)
  alpha_BK = jnp.where(col(first_B), _dirichlet.start(shape_BK), state.alpha_BK)
  K = RANKS + 1
  density_B = _dirichlet.log_density(jnp.exp(shape_BK), alpha_BK) / K
  familiar_B = jnp.where(first_B, 0.0, state.density.z(density_B)) > cfg.ood_sd
  usual_BK = alpha_BK / jnp.sum(alpha_BK, axis=-1, keepdims=True)
  apart_B = jnp.sum(usual_BK * (jnp.log(usual_BK) - shape_BK), axis=-1)
  # Close to one where the shape is as usual, small where it is far: how the ancestor weighs the two.
  pull_B = 1.0 - 10.0 ** (-1.0 / (jnp.maximum(apart_B, 0.0) + 1e-6))
  pull_B = jnp.where(familiar_B, pull_B, 1.0)

  def unusual(logits_BV):
    return _toward(logits_BV, value_BC, id_BC, odd_temp_B, lse_B, shape_BK, usual_BK, pull_B)

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
      "alpha": jnp.sum(alpha_BK, axis=-1),
      "clamped": jnp.where(odd_B, odd_clamped_B, few_clamped_B).astype(jnp.float32),
    },
    aux={
      "raw": obs.raw,
      "score_B": score_B,
      "logits_BV": logits_BV,
      "few_B": few_ent_B,
      "shape_BK": shape_BK,
      "density_B": density_B,
      "alpha_BK": alpha_BK,
    },
  )


def commit(cfg: Config, state: State, decision: Decision, token_B: jax.Array) -> State:
  aux = decision.aux
  first_B = state.count_B == 0

  def at(x_BV):
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

  surprise_B = aux["raw"].lse - at(aux["logits_BV"])
  shape_BK = aux["shape_BK"]
  # A law like the mean changes it little and an unlike one at most by `forget` (base 4, exponent 3: the
  # ancestor's); at one, the mean would be a single law, to which no Dirichlet fits.
  log_mean_BK = jax.nn.log_softmax(state.mean_BK, axis=-1)
  apart_B = jnp.sum(jnp.exp(shape_BK) * (shape_BK - log_mean_BK), axis=-1)
  weight_B = jnp.minimum(cfg.forget, 4.0 ** (-3.0 / (jnp.maximum(apart_B, 0.0) + 1e-6)))
  mixed_BK = state.mean_BK + col(weight_B) * (shape_BK - state.mean_BK)
  mean_BK = jnp.where(col(first_B), shape_BK, mixed_BK)
  alpha_BK, _ = _dirichlet.fit(mean_BK, aux["alpha_BK"])

  # Steps up and down balance where the share is `unusual`, however the three signals hang together.
  above_B = (aux["score_B"] > state.threshold_B).astype(jnp.float32)

  def add(running, x_B):
    return running.add(x_B, cfg.rate, first_B)

  # The first Dirichlet is fitted to one law, and densities under it are far off: until the text is
  # warm only the last difference is kept, or one such density would blind the rule for 100 tokens.
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
    mean_BK=mean_BK,
    alpha_BK=alpha_BK,
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
