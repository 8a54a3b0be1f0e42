"""The entropix sampler of October 2024, made to work: four quadrants of entropy and varentropy, and a middle.

Why: entropy measures how uncertain the next token is, varentropy how unevenly the log-probabilities are
spread, and each quadrant has its own policy. They are tested in the order of this table. The letters are
the original's: (L)ow or (H)igh (E)ntropy, then (L)ow or (H)igh (V)arentropy.

  flow    LELV  certain of one token             take it
  ask     HELV  many equally likely tokens       temperature rises with attention entropy
  fork    LEHV  one favourite over a heavy tail  temperature rises with attention scores, top-k with heads' dispersion
  mist    HEHV  lost                             high temperature, top-p falls with attention entropy
  middle        none of these                    all knobs follow the signals; best of five draws

A threshold is a number, or a quantile of the row's own last 256 entropies or varentropies: low_ent="q20" holds
for entropies below the 20% quantile. Until 19 tokens are remembered no condition with a quantile holds, so a
row is in the middle unless conditions with numbers alone say otherwise [n30]. `_quantile.py` has the exact rule.

Doubt: the thresholds were set by eye on one 1B model and a few prompts [n03]. A clean two-way fork has
*low* varentropy, so `fork` does not mean what its name says, and `ask` is almost unreachable [n07].
docs/notes/n03-thresholds.md has the unit and the source of every number below.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax.rowwise import any_row
from entropix_jax.sampling import Decision, Observation
from entropix_jax.sampling import _filters as filters
from entropix_jax.sampling import _quantile as quantile

BRANCHES = ("flow", "middle", "ask", "fork", "mist")
FLOW, MIDDLE, ASK, FORK, MIST = range(5)

# Limits on what the formulas give: the original's, except TEMP_MAX, which its middle does not have.
TEMP_MAX = 3.0  # the original's inputs were held in place by padding [n04]
K_MOST = 100
P_LEAST, MIN_P_LEAST, MIN_P_MOST = 0.1, 0.01, 0.5
NEVER = 1e9  # a bound that is never reached

QUANTILES = ("low_ent", "low_varent", "ask_ent", "high_ent", "mist_ent", "high_varent")
RANGES = {
  "temp": (1e-3, 100.0),
  "top_k": (1, K_MOST),
  "top_p": (0.0, 1.0),
  "min_p": (0.0, 1.0),
  "best_of": (1, 10_000),
}


@struct.dataclass
class Config:
  """Thresholds and coefficients in nats and nats^2; the original's bits in brackets [n01, n03].

  "+ x temp per y" means that the formula adds x * temp * y; "-" that it subtracts.
  """

  low_ent: float = 0.0693  # nats; below it, with low_varent: flow (0.1 bit)
  low_varent: float = 0.0480  # nats^2; below it: flow or ask (0.1 bit^2)
  ask_ent: float = 2.0794  # nats; above it, with low_varent: ask (3 bits)
  high_ent: float = 3.4657  # nats; with high_varent, below it: fork, from it on: mist (5 bits)
  mist_ent: float = NEVER  # nats; mist begins here if this is below high_ent
  high_varent: float = 2.4023  # nats^2; above it: fork or mist (5 bits^2)

  # Further conditions on attention, always met by default; later versions of the original have them [n09].
  low_attn_ent: float = NEVER  # nats; flow, ask and fork need a lower attn_ent
  low_attn_norm: float = NEVER  # flow, ask and fork need a lower attn_ent_norm
  low_spread: float = NEVER  # nats^2; flow and ask need a lower attn_spread
  low_dispersion: float = NEVER  # flow, ask and fork need a lower head_dispersion
  low_score: float = NEVER  # nats; flow and ask need a lower score_mag
  fork_score: float = -NEVER  # nats; fork needs a higher score_mag
  high_attn_ent: float = -NEVER  # nats; mist needs a higher attn_ent
  high_attn_norm: float = -NEVER  # mist needs a higher attn_ent_norm
  high_spread: float = -NEVER  # nats^2; fork and mist need a higher attn_spread
  high_dispersion: float = -NEVER  # mist needs a higher head_dispersion
  high_score: float = -NEVER  # nats; mist needs a higher score_mag

  temp: float = 0.666  # base temperature of all formulas
  top_k: int = 27  # tokens
  top_p: float = 0.90  # probability
  min_p: float = 0.03  # share of the top token's probability
  warm_cap: float = 1.5  # highest temperature of ask and fork

  ask_temp: float = 1.3  # times temp
  ask_temp_attn_ent: float = 0.2885  # + x temp per nat of attn_ent (0.2 per bit)

  fork_temp: float = 1.2  # times temp
  fork_temp_score: float = 0.3  # + x temp per nat of score_mag
  fork_k_dispersion: float = 0.5  # + x top_k per (1 - agreement)

  mist_temp: float = 2.0  # times temp
  mist_floor: float = 2.0  # lowest temperature of mist
  mist_cap: float = 100.0  # highest temperature of mist
  mist_temp_spread: float = 1.0407  # + x temp per nat^2 of attn_spread (0.5 per bit^2)
  mist_p_attn_ent: float = 0.2885  # subtracted from top_p per nat of attn_ent (0.2 per bit)
  mist_p_least: float = 0.5  # probability; lowest top_p of mist

  mid_temp_ent: float = 0.4328  # + x temp per nat of entropy (0.3 per bit)
  mid_temp_varent: float = 0.6244  # + x temp per nat^2 of varentropy (0.3 per bit^2)
  mid_temp_attn_ent: float = 0.2885  # + x temp per nat of attn_ent (0.2 per bit)
  mid_temp_spread: float = 0.4163  # + x temp per nat^2 of attn_spread (0.2 per bit^2)
  mid_temp_agreement: float = 0.2  # - x temp per agreement
  mid_p_spread: float = 0.2081  # + x top_p per nat^2 of attn_spread (0.1 per bit^2)
  mid_k_score: float = 0.3  # + x top_k per nat of score_mag
  mid_k_agreement: float = 0.2  # - x top_k per agreement
  mid_min_p_ent: float = 0.7213  # - x min_p per nat of entropy (0.5 per bit)
  mid_min_p_varent: float = 1.0407  # - x min_p per nat^2 of varentropy (0.5 per bit^2)
  mid_inverse: bool = False  # server version's rule: hottest where the model is certain [n09]
  best_of: int = 5  # draws in the middle, of which the most likely token is kept

  # The quantile that a threshold is, in hundredths of a percent; -1: it is the number above.
  q_low_ent: int = -1
  q_low_varent: int = -1
  q_ask_ent: int = -1
  q_high_ent: int = -1
  q_mist_ent: int = -1
  q_high_varent: int = -1


_QUANTILE_FIELDS = tuple(f"q_{name}" for name in QUANTILES)
RANGES |= dict.fromkeys(_QUANTILE_FIELDS, (-1, quantile.WHOLE))
FAMILIES = (
  tuple(f.name for f in dataclasses.fields(Config) if f.name not in _QUANTILE_FIELDS),
  _QUANTILE_FIELDS,
)


@struct.dataclass
class State:
  """What a row remembers if thresholds may be quantiles; otherwise the state is ()."""

  ent: quantile.Recent  # nats; of the raw law at emitted tokens
  varent: quantile.Recent  # nats^2


def init(cfg: Config, B: int) -> State | tuple:
  given = [getattr(cfg, name) for name in _QUANTILE_FIELDS]
  if any(isinstance(x, jax.Array) or np.any(np.asarray(x) >= 0) for x in given):
    return State(quantile.empty(B), quantile.empty(B))
  return ()


def branches(
  cfg: Config, ent_B: jax.Array, varent_B: jax.Array, attn=None, state: State | tuple = ()
) -> jax.Array:
  """branch_B: the index of each row's branch; conditions on attention are met if `attn` is None."""
  ent = quantile.against(ent_B, state.ent if state else None)
  varent = quantile.against(varent_B, state.varent if state else None)
  low_B, _, _ = varent(cfg.low_varent, cfg.q_low_varent)
  _, high_B, _ = varent(cfg.high_varent, cfg.q_high_varent)
  sure_B, _, _ = ent(cfg.low_ent, cfg.q_low_ent)
  _, open_B, _ = ent(cfg.ask_ent, cfg.q_ask_ent)
  before_B, _, from_B = ent(cfg.high_ent, cfg.q_high_ent)
  _, _, early_B = ent(cfg.mist_ent, cfg.q_mist_ent)
  calm_B = narrow_B = torn_B = True
  if attn is not None:
    narrow_B = (
      (attn.attn_ent < cfg.low_attn_ent)
      & (attn.attn_ent_norm < cfg.low_attn_norm)
      & (attn.head_dispersion < cfg.low_dispersion)
    )
    calm_B = narrow_B & (attn.attn_spread < cfg.low_spread) & (attn.score_mag < cfg.low_score)
    apart_B = attn.attn_spread > cfg.high_spread
    narrow_B &= apart_B & (attn.score_mag > cfg.fork_score)
    torn_B = (
      apart_B
      & (attn.attn_ent > cfg.high_attn_ent)
      & (attn.attn_ent_norm > cfg.high_attn_norm)
      & (attn.head_dispersion > cfg.high_dispersion)
      & (attn.score_mag > cfg.high_score)
    )
  return jnp.select(
    [
      sure_B & low_B & calm_B,
      open_B & low_B & calm_B,
      before_B & high_B & narrow_B,
      (from_B | early_B) & high_B & torn_B,
    ],
    [FLOW, ASK, FORK, MIST],
    MIDDLE,
  )


def _settings(cfg: Config, branch_B: jax.Array, obs: Observation) -> dict[str, jax.Array]:
  """Temperature, top_k, top_p, min_p and number of draws of each row, by its branch; each (B,) float32."""
  ent_B, varent_B = obs.raw.ent, obs.raw.varent
  top_k_B = jnp.asarray(cfg.top_k).astype(jnp.float32)
  zero_B = jnp.zeros_like(ent_B)
  # Without measured attention, every attention term drops out of its formula.
  attn = obs.attn
  attn_ent_B = attn.attn_ent if attn else zero_B
  spread_B = attn.attn_spread if attn else zero_B
  score_B = attn.score_mag if attn else zero_B
  agreement_B = attn.agreement if attn else zero_B
  apart_B = 1.0 - attn.agreement if attn else zero_B

  def by_branch(middle, ask, fork, mist):
    return jnp.select(
      [branch_B == ASK, branch_B == FORK, branch_B == MIST], [ask, fork, mist], middle
    )

  linear_B = cfg.temp * (
    1.0
    + cfg.mid_temp_ent * ent_B
    + cfg.mid_temp_varent * varent_B
    + cfg.mid_temp_attn_ent * attn_ent_B
    + cfg.mid_temp_spread * spread_B
    - cfg.mid_temp_agreement * agreement_B
  )
  inverse_B = cfg.temp * jnp.sqrt((1.2 * ent_B + 2.0) / (ent_B + 1e-6))
  mist_B = cfg.temp * (cfg.mist_temp + cfg.mist_temp_spread * spread_B)
  temp_B = by_branch(
    jnp.where(cfg.mid_inverse, jnp.clip(inverse_B, 0.1, 2.0), jnp.minimum(TEMP_MAX, linear_B)),
    jnp.minimum(cfg.warm_cap, cfg.temp * (cfg.ask_temp + cfg.ask_temp_attn_ent * attn_ent_B)),
    jnp.minimum(cfg.warm_cap, cfg.temp * (cfg.fork_temp + cfg.fork_temp_score * score_B)),
    jnp.minimum(cfg.mist_cap, jnp.maximum(cfg.mist_floor, mist_B)),
  )
  k_B = by_branch(
    jnp.round(top_k_B * (1.0 + cfg.mid_k_score * score_B - cfg.mid_k_agreement * agreement_B)),
    top_k_B + zero_B,
    jnp.maximum(5.0, jnp.floor(top_k_B * (1.0 + cfg.fork_k_dispersion * apart_B))),
    top_k_B + zero_B,
  )
  top_p_B = by_branch(
    jnp.clip(cfg.top_p * (1.0 + cfg.mid_p_spread * spread_B), P_LEAST, 1.0),
    cfg.top_p + zero_B,
    cfg.top_p + zero_B,
    jnp.maximum(cfg.mist_p_least, cfg.top_p - cfg.mist_p_attn_ent * attn_ent_B),
  )
  min_p_B = by_branch(
    jnp.clip(
      cfg.min_p * (1.0 - cfg.mid_min_p_ent * ent_B - cfg.mid_min_p_varent * varent_B),
      MIN_P_LEAST,
      MIN_P_MOST,
    ),
    cfg.min_p + zero_B,
    cfg.min_p + zero_B,
    cfg.min_p + zero_B,
  )
  return {
    "temperature": jnp.maximum(temp_B, filters.GREEDY_BELOW),
    "top_k": jnp.clip(k_B, 1.0, float(K_MOST)),
    "top_p": top_p_B,
    "min_p": min_p_B,
    "draws": jnp.where(branch_B == MIDDLE, cfg.best_of, 1).astype(jnp.float32),
  }


def step(cfg: Config, state: State | tuple, obs: Observation) -> Decision:
  branch_B = branches(cfg, obs.raw.ent, obs.raw.varent, obs.attn, state)
  s = _settings(cfg, branch_B, obs)

  def sample(logits_BV: jax.Array) -> jax.Array:
    return filters.truncated_best_of(
      logits_BV,
      s["temperature"],
      s["top_k"].astype(jnp.int32),
      s["top_p"],
      s["min_p"],
      s["draws"],
      most=K_MOST + 28,
    )

  flow_B = branch_B == FLOW
  return Decision(
    law_BV=any_row(~flow_B, sample, filters.delta, obs.logits_BV),
    branch_B=branch_B,
    stats={
      name: jnp.where(flow_B, float(name in ("top_k", "top_p", "draws")), s[name]) for name in s
    },
    aux=obs.raw,
  )


def commit(
  cfg: Config, state: State | tuple, decision: Decision, token_B: jax.Array
) -> State | tuple:
  raw = decision.aux
  return state and State(state.ent.add(raw.ent), state.varent.add(raw.varent))


# One likely token over a long flat tail has high varentropy; the heavier the tail, the higher the entropy.
CASES = {
  "flow": {"p": [0.999, 0.001]},
  "ask": {"p": [1 / 16] * 16},
  "fork": {"p": [0.88] + [0.12 / 400] * 400},
  "mist": {"p": [0.3] + [0.7 / 600] * 600},
  "middle": {"p": [0.4, 0.3, 0.2, 0.1]},
}
USES = (
  {
    "low_attn_norm": 0.5,
    "low_spread": 0.7,
    "low_dispersion": 0.5,
    "low_score": 1.5,
    "low_attn_ent": 2.0,
  },
  {
    "high_attn_norm": 0.5,
    "high_attn_ent": 2.0,
    "high_spread": 0.7,
    "high_dispersion": 0.4,
    "high_score": 1.5,
  },
  {"fork_score": 1.5, "high_varent": 0.5, "mist_cap": 2.5, "mist_ent": 0.5},
  {"high_varent": 0.5, "top_p": 1.0},
  {"low_ent": "q50", "low_varent": "q90", "ask_ent": "q60"},
  {"high_ent": "q60", "mist_ent": "q50", "high_varent": "q40"},
)
