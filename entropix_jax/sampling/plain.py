"""The common sampling methods in one sampler: greedy, temperature, and the usual filters and penalties.

Why: this is the control that every adaptive sampler must beat, and what most people need. The default is
temperature 1 with all else off; every knob may differ from row to row. The order matters to every
probability threshold, so it is fixed, and each step sees what the steps before it left:

  logit_bias, banned, allowed > repetition, presence, frequency > DRY > top-n-sigma > temperature, dynatemp
  or EDT > top-k > typical > eta > epsilon > top-p > min-p > p-less > top-H > XTC > adaptive-p or mirostat

`temperature_last` applies the temperature after top-H and XTC, which is llama.cpp's order.
docs/notes/n08-plain.md has what each method is said to do and what we measured [n08].
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import metrics, rowwise
from entropix_jax.errors import UserError
from entropix_jax.rowwise import col
from entropix_jax.sampling import NO_BIASES, NO_IDS, Biases, Decision, Ids, Observation
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _history as history

BRANCHES = ("greedy", "sample")
RANGES = {
  "temperature": (0.0, 1e4), "top_k": (0, 2**31 - 1), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
  "top_n_sigma": (0.0, 1e4), "top_h": (0.0, 1.0), "typical_p": (0.0, 1.0),
  "epsilon": (0.0, 1.0), "eta": (0.0, 1.0),
  "dynatemp_range": (0.0, 1e4), "dynatemp_exponent": (0.0, 100.0),
  "edt_theta": (0.0, 1e3), "edt_base": (1e-3, 1.0),
  "xtc_probability": (0.0, 1.0), "xtc_threshold": (0.0, 1.0),
  "dry_multiplier": (0.0, 1e3), "dry_base": (1.0, 8.0), "dry_allowed_length": (0, 10_000),
  "dry_window": (0, 2**31 - 1),
  "repetition_penalty": (1e-2, 100.0), "presence_penalty": (-100.0, 100.0),
  "frequency_penalty": (-100.0, 100.0),
  "mirostat_tau": (0.0, 100.0), "mirostat_eta": (0.0, 10.0),
  "adaptive_p_target": (-1.0, 1.0), "adaptive_p_decay": (0.0, 0.999),
}  # fmt: skip
FAMILIES = (  # the first is part of every engine
  ("temperature", "top_p", "min_p"),
  ("top_k",),
  ("top_n_sigma", "top_h", "p_less", "typical_p", "epsilon", "eta"),
  ("dynatemp_range", "dynatemp_exponent", "edt_theta", "edt_base"),
  ("temperature_last",),
  ("xtc_probability", "xtc_threshold"),
  ("mirostat_tau", "mirostat_eta"),
  ("adaptive_p_target", "adaptive_p_decay"),
  ("repetition_penalty", "presence_penalty", "frequency_penalty"),
  ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_window", "dry_breakers"),
  ("logit_bias", "banned", "allowed"),
)


@struct.dataclass
class Config:
  temperature: float = 1.0  # larger is flatter; below 1e-4: greedy
  top_k: int = 0  # keep the top k tokens; 0: all
  top_p: float = 1.0  # keep the smallest set of top tokens with this probability in all; 1: all
  min_p: float = 0.0  # keep tokens with this share of the top token's probability; 0: all

  top_n_sigma: float = 0.0  # keep logits within this many standard deviations of the best; 0: all
  top_h: float = 0.0  # keep top tokens with at most this share of the entropy; 0: all; paper: 0.4
  p_less: bool = False  # keep tokens at least as likely as two draws are to be equal
  typical_p: float = 1.0  # keep the most typical tokens with this probability in all; 1: all
  epsilon: float = 0.0  # keep tokens of at least this probability; 0: all
  eta: float = 0.0  # the same, with a threshold that falls as entropy grows; 0: all

  dynatemp_range: float = 0.0  # temperature +- this, growing with entropy; 0: off
  dynatemp_exponent: float = 1.0  # of (entropy / largest possible entropy) in dynatemp
  edt_theta: float = 0.0  # nats; EDT: temperature * edt_base^(edt_theta / entropy); 0: off
  edt_base: float = 0.8  # of that power
  temperature_last: bool = False  # apply the temperature after the filters, not before them

  xtc_probability: float = 0.0  # how often XTC drops the top choices; 0: off
  xtc_threshold: float = 0.1  # probability from which a token is a top choice
  mirostat_tau: float = 0.0  # nats; mean surprise to hold; 0: off; llama.cpp's 5 bits are 3.466
  mirostat_eta: float = 0.1  # share of the error in surprise that is corrected per token
  adaptive_p_target: float = -1.0  # mean probability of the chosen tokens to hold; below 0: off
  adaptive_p_decay: float = 0.9  # of that running mean, per token

  repetition_penalty: float = 1.0  # divides positive logits of seen ids, multiplies others; 1: off
  presence_penalty: float = 0.0  # logits; subtracted once from each id in the answer
  frequency_penalty: float = 0.0  # logits; subtracted per occurrence of the id in the answer
  dry_multiplier: float = 0.0  # logits; DRY penalty for repeating a passage; 0: off
  dry_base: float = 1.75  # growth of that penalty per token beyond dry_allowed_length
  dry_allowed_length: int = 2  # shortest passage, in tokens, whose repetition is penalised
  dry_window: int = 0  # tokens to look back; 0: all
  dry_breakers: Ids = NO_IDS  # ids that no passage may contain
  logit_bias: Biases = NO_BIASES  # logits; added to these ids
  banned: Ids = NO_IDS  # ids that are never emitted
  allowed: Ids = NO_IDS  # the only ids that may be emitted; empty: all


@struct.dataclass
class State:
  """What mirostat and adaptive-p carry from token to token; float32."""

  mu_B: jax.Array  # nats; mirostat: largest surprise that a token may have
  sum_B: jax.Array  # adaptive-p: weighted sum of the chosen tokens' probabilities
  weight_B: jax.Array  # adaptive-p: sum of the weights


def check(cfg: Config) -> None:
  """Raises UserError for knobs that contradict each other."""
  allowed, banned = ({*knob.id_X.tolist()} - {-1} for knob in (cfg.allowed, cfg.banned))
  if allowed and allowed <= banned:
    raise UserError(
      "Every id in allowed is also in banned, which leaves no token; change one of them."
    )
  if cfg.dynatemp_range > 0 and cfg.edt_theta > 0:
    raise UserError("dynatemp_range and edt_theta both set the temperature; use one of them.")
  if cfg.mirostat_tau > 0 and cfg.adaptive_p_target >= 0:
    raise UserError("mirostat_tau and adaptive_p_target both end the chain; use one of them.")
  if cfg.temperature < filters.GREEDY_BELOW:
    for name, on in (
      ("xtc_probability", cfg.xtc_probability > 0),
      ("mirostat_tau", cfg.mirostat_tau > 0),
      ("adaptive_p_target", cfg.adaptive_p_target >= 0),
      ("dynatemp_range", cfg.dynatemp_range > 0),
    ):
      if on:
        raise UserError(f"{name} does nothing at temperature 0; raise the temperature.")


def init(cfg: Config, B: int) -> State:
  def knob(x):
    return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (B,))

  left_B = 1.0 - knob(cfg.adaptive_p_decay)
  return State(
    mu_B=2.0 * knob(cfg.mirostat_tau),
    sum_B=jnp.maximum(knob(cfg.adaptive_p_target), 0.0) / left_B,
    weight_B=1.0 / left_B,
  )


any_row = functools.partial(rowwise.any_row, many_kernels=True)


def _same(x_BV: jax.Array) -> jax.Array:
  return x_BV


def _processed(cfg: Config, obs: Observation) -> jax.Array:
  """Logits after the steps that depend on ids and history: lists, penalties and DRY."""
  V = obs.logits_BV.shape[-1]

  def lists(logits_BV):
    logits_BV = history.add_biases(logits_BV, cfg.logit_bias)
    # A list that leaves no id at all is ignored.
    allowed_BV = history.marked(cfg.allowed, V) & (logits_BV > -jnp.inf)
    allowed_BV |= ~jnp.any(allowed_BV, axis=-1, keepdims=True)
    left_BV = filters.cut(logits_BV, allowed_BV)
    final_BV = filters.cut(left_BV, ~history.marked(cfg.banned, V))
    return jnp.where(jnp.any(final_BV > -jnp.inf, axis=-1, keepdims=True), final_BV, left_BV)

  def penalties(logits_BV):
    knobs = (cfg.repetition_penalty, cfg.presence_penalty, cfg.frequency_penalty)
    return history.penalise(logits_BV, obs, *knobs)

  def dry(logits_BV):
    return history.dry(
      logits_BV, obs, cfg.dry_multiplier, cfg.dry_base, cfg.dry_allowed_length, cfg.dry_window,
      cfg.dry_breakers,
    )  # fmt: skip

  listed = (cfg.logit_bias.id_X, cfg.banned.id_X, cfg.allowed.id_X)
  listed_B = functools.reduce(operator.or_, [(x >= 0).any(axis=-1) for x in listed])
  bent_B = cfg.repetition_penalty != 1.0
  bent_B |= (cfg.presence_penalty != 0.0) | (cfg.frequency_penalty != 0.0)
  logits_BV = any_row(listed_B, lists, _same, obs.logits_BV)
  logits_BV = any_row(bent_B, penalties, _same, logits_BV)
  return any_row(cfg.dry_multiplier > 0.0, dry, _same, logits_BV)


def _divided(score_BV: jax.Array, temp_B: jax.Array) -> jax.Array:
  """Scores divided by a temperature; where it is 0, only the best one is left."""
  sure_B1 = col(temp_B < filters.GREEDY_BELOW)
  heated_BV = score_BV / col(jnp.maximum(temp_B, filters.GREEDY_BELOW))
  return jnp.where(sure_B1, filters.delta(score_BV), heated_BV)


def _heated(cfg: Config, score_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(score_BV, temp_B): scores divided by their temperature, which is constant, or by dynatemp or EDT from
  their entropy."""

  def varying(score_BV):
    ent_B = metrics.spread(score_BV).ent
    live_B = jnp.sum(score_BV > -jnp.inf, axis=-1).astype(jnp.float32)
    share_B = ent_B / jnp.log(jnp.maximum(live_B, 2.0))
    low_B = jnp.maximum(cfg.temperature - cfg.dynatemp_range, 0.0)
    high_B = cfg.temperature + cfg.dynatemp_range
    dynamic_B = low_B + (high_B - low_B) * share_B**cfg.dynatemp_exponent
    edt_B = cfg.temperature * cfg.edt_base ** (cfg.edt_theta / jnp.maximum(ent_B, 1e-6))
    temp_B = jnp.where(cfg.edt_theta > 0.0, edt_B, dynamic_B)
    return _divided(score_BV, temp_B), temp_B

  def constant(score_BV):
    return score_BV / col(cfg.temperature), cfg.temperature + 0.0

  varies_B = (cfg.dynatemp_range > 0.0) | (cfg.edt_theta > 0.0)
  return any_row(varies_B, varying, constant, score_BV)


def _filtered(cfg: Config, score_BV: jax.Array) -> jax.Array:
  """Scores after the filters between the temperature and XTC."""
  stages = (
    (cfg.top_k > 0, lambda x: filters.top_k(x, cfg.top_k)),
    (cfg.typical_p < 1.0, lambda x: filters.typical(x, cfg.typical_p)),
    (cfg.eta > 0.0, lambda x: filters.eta(x, cfg.eta)),
    (cfg.epsilon > 0.0, lambda x: filters.epsilon(x, cfg.epsilon)),
    (cfg.top_p < 1.0, lambda x: filters.top_p(x, cfg.top_p)),
    (cfg.min_p > 0.0, lambda x: filters.min_p(x, cfg.min_p)),
    (cfg.p_less, filters.p_less),
    (cfg.top_h > 0.0, lambda x: filters.top_h(x, cfg.top_h)),
  )
  for need_B, stage in stages:
    score_BV = any_row(need_B, stage, _same, score_BV)
  return score_BV


def _aim(cfg: Config, state: State) -> jax.Array:
  """aim_B: the probability that adaptive-p favours for this token, to bring the mean to the target."""
  mean_B = state.sum_B / state.weight_B
  return jnp.clip(2.0 * cfg.adaptive_p_target - mean_B, 0.0, 1.0)


def _last(cfg: Config, state: State, score_BV: jax.Array) -> jax.Array:
  """law_BV of the scores, after mirostat (arXiv:2007.14966) or adaptive-p (ggml-org/llama.cpp#17927) in
  the rows that use it."""

  def mirostat(score_BV):
    logp_BV = filters.normalise(score_BV)
    return filters.cut(
      score_BV, (-logp_BV <= col(state.mu_B)) | (score_BV == filters.top(score_BV))
    )

  def adaptive(score_BV):
    p_BV = jnp.exp(filters.normalise(score_BV))
    off_BV = jnp.abs(p_BV - col(_aim(cfg, state))) / 0.3
    return filters.cut(5.0 - 10.0 * off_BV * off_BV / (1.0 + off_BV), score_BV > -jnp.inf)

  score_BV = any_row(cfg.mirostat_tau > 0.0, mirostat, _same, score_BV)
  score_BV = any_row(cfg.adaptive_p_target >= 0.0, adaptive, _same, score_BV)
  return filters.normalise(score_BV)


def step(cfg: Config, state: State, obs: Observation) -> Decision:
  B, V = obs.logits_BV.shape
  cfg = cfg.replace(temperature=jnp.broadcast_to(cfg.temperature, (B,)))
  greedy_B = cfg.temperature < filters.GREEDY_BELOW
  cfg = cfg.replace(temperature=jnp.where(greedy_B, 1.0, cfg.temperature))
  logits_BV = _processed(cfg, obs)

  def sample(logits_BV: jax.Array):
    score_BV = any_row(
      cfg.top_n_sigma > 0.0,
      lambda x: filters.top_n_sigma(x, cfg.top_n_sigma),
      _same,
      logits_BV - filters.top(logits_BV),
    )
    last_B, heat = cfg.temperature_last, functools.partial(_heated, cfg)
    score_BV, early_B = any_row(~last_B, heat, lambda x: (x, jnp.ones((B,))), score_BV)
    score_BV = _filtered(cfg, score_BV)
    # The filters lower the entropy, so a temperature that comes last is computed from what they left.
    heated_BV, temp_B = any_row(last_B, heat, lambda x: (x, early_B), score_BV)

    def whole(score_BV):
      del score_BV
      return _last(cfg, state, heated_BV)

    def mixed(score_BV):
      spare_BV = history.marked(Ids(obs.stop_BE), V)
      struck_BV = filters.without_top_choices(score_BV, cfg.xtc_threshold, spare_BV)
      struck_BV = _divided(struck_BV, jnp.where(last_B, temp_B, 1.0))
      rho_B1 = col(cfg.xtc_probability)
      struck_law_BV = _last(cfg, state, struck_BV)
      return jnp.logaddexp(whole(score_BV) + jnp.log1p(-rho_B1), struck_law_BV + jnp.log(rho_B1))

    law_BV = any_row(cfg.xtc_probability > 0.0, mixed, whole, score_BV)
    return law_BV, heated_BV, temp_B

  def greedy(logits_BV: jax.Array):
    return filters.delta(logits_BV), logits_BV, jnp.zeros((B,))

  law_BV, score_BV, temp_B = any_row(~greedy_B, sample, greedy, logits_BV)
  return Decision(
    law_BV=law_BV,
    branch_B=jnp.where(greedy_B, 0, 1),
    stats={
      "temperature": temp_B,
      "top_k": jnp.broadcast_to(cfg.top_k, (B,)).astype(jnp.float32),
      "top_p": jnp.broadcast_to(cfg.top_p, (B,)),
      "min_p": jnp.broadcast_to(cfg.min_p, (B,)),
      "kept": jnp.sum(law_BV > -jnp.inf, axis=-1).astype(jnp.float32),
    },
    score_BV=score_BV,
  )


def commit(cfg: Config, state: State, decision: Decision, token_B: jax.Array) -> State:
  V = decision.law_BV.shape[-1]

  def at(x_BV):
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

  # Surprise of the chosen token under the law it was drawn from.
  surprise_B = -at(decision.law_BV)
  mu_B = state.mu_B - cfg.mirostat_eta * (surprise_B - cfg.mirostat_tau)
  mu_B = jnp.clip(mu_B, 0.1, 2.0 * jnp.log(jnp.float32(max(V, 2))))
  # Its probability before adaptive-p changed the law, or the mean would track adaptive-p's own changes.
  p_B = any_row(
    cfg.adaptive_p_target >= 0.0,
    lambda score_BV: jnp.exp(at(filters.normalise(score_BV))),
    lambda score_BV: jnp.zeros(score_BV.shape[:1]),
    decision.score_BV,
  )
  return State(
    mu_B=jnp.where(cfg.mirostat_tau > 0.0, mu_B, state.mu_B),
    sum_B=p_B + cfg.adaptive_p_decay * state.sum_B,
    weight_B=1.0 + cfg.adaptive_p_decay * state.weight_B,
  )


CASES = {"greedy": {"p": [0.5, 0.3, 0.2], "temperature": 0.0}, "sample": {"p": [0.5, 0.3, 0.2]}}
USES = (
  {"dynatemp_range": 0.5, "dynatemp_exponent": 1.5},
  {"edt_theta": 1.0, "temperature": 0.8},
  {"xtc_probability": 0.5, "xtc_threshold": 0.05},
  {"mirostat_tau": 1.0, "mirostat_eta": 0.5},
  {"adaptive_p_target": 0.3, "adaptive_p_decay": 0.8, "min_p": 0.05},
  {"dry_multiplier": 0.8, "dry_allowed_length": 1},
  {"temperature": 0.7, "min_p": 0.1},
)
