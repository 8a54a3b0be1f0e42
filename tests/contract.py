"""What every sampler must hold, as functions of a module: the tests apply them to the whole folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import draw, metrics, sampling

V = 512


def random_attn(rng, B):
  """Attention statistics inside their ranges."""
  low_high = {
    "attn_ent": (0.0, 4.0),
    "attn_ent_norm": (0.0, 1.0),
    "attn_varent": (0.0, 3.0),
    "attn_spread": (0.0, 1.5),
    "head_dispersion": (0.0, 0.9),
    "agreement": (0.0, 1.0),
    "score_mag": (0.0, 3.0),
  }
  return metrics.AttnStats(
    **{name: jnp.asarray(rng.uniform(*r, B), jnp.float32) for name, r in low_high.items()}
  )


def observe(logits_BV, attn=None, pos=0, seed=0, history=(), prompt=0):
  """The Observation an engine would make; every row has the same history, `prompt` ids of it given."""
  logits_BV = jnp.asarray(logits_BV, jnp.float32)
  B = logits_BV.shape[0]
  zero_B = jnp.zeros((B,), jnp.int32)
  history = np.asarray(history, np.int32)
  ids_BS = np.zeros((B, max(32, len(history))), np.int32)
  ids_BS[:, : len(history)] = history
  pos = pos or len(history) - prompt
  seed_B2 = jnp.full((B, 2), seed, jnp.uint32)
  return sampling.Observation(
    logits_BV=logits_BV,
    raw=metrics.spread(logits_BV),
    attn=attn,
    token_B=zero_B,
    pos_B=zero_B + pos,
    key_B2=draw.row_keys(seed_B2, zero_B.astype(jnp.uint32), zero_B.astype(jnp.uint32)),
    history_BS=jnp.asarray(ids_BS),
    len_B=zero_B + max(len(history), pos),
    stop_BE=jnp.full((B, 8), -1, jnp.int32),
  )


def case_logits(probabilities, vocab=V):
  """Logits of a case's next-token probabilities over `vocab` ids, or more if it has more."""
  logits = np.full(max(vocab, len(probabilities)), -np.inf, np.float32)
  logits[: len(probabilities)] = np.log(np.asarray(probabilities, np.float64))
  return logits


def cases(sampler):
  """(branch, Config, logits_V) of every case."""
  for branch, case in sampler.CASES.items():
    settings = {k: v for k, v in case.items() if k != "p"}
    yield branch, sampling.configure(sampler, settings), case_logits(case["p"])


def rows(cfg, B):
  """A Config with every knob one value a row, as the engine holds it."""
  return jax.tree.map(jnp.asarray, sampling.arrays(cfg, B))


_compiled = {}


def decide(sampler, cfg, obs):
  """(Decision, committed state) of one step from a fresh state, jitted once a sampler."""

  def run(cfg, obs):
    state = sampler.init(cfg, obs.logits_BV.shape[0])
    decision = sampler.step(cfg, state, obs)
    token_B = draw.draw(decision.law_BV, obs.key_B2, obs.pos_B)
    return decision, sampler.commit(cfg, state, decision, token_B)

  # The module is kept with its program: an id may be used again once its object is gone.
  _, program = _compiled.setdefault(id(sampler), (sampler, jax.jit(run)))
  return program(cfg, obs)


_played = {}
STEPS = 10


def play(sampler, cfg, obs):
  """(laws, branches, last state) of a few steps in which the logits wander over the ids."""

  def run(cfg, obs):
    def one(state, i):
      logits_BV = jnp.roll(obs.logits_BV, 3 * i, axis=-1) * (
        1.0 + 0.3 * jnp.sin(2.0 * i.astype(jnp.float32))
      )
      here = obs.replace(logits_BV=logits_BV, raw=metrics.spread(logits_BV), pos_B=obs.pos_B + i)
      decision = sampler.step(cfg, state, here)
      token_B = draw.draw(decision.law_BV, here.key_B2, here.pos_B)
      state = sampler.commit(cfg, state, decision, token_B)
      return state, (decision.law_BV, decision.branch_B)

    state = sampler.init(cfg, obs.logits_BV.shape[0])
    state, (law, branch) = jax.lax.scan(one, state, jnp.arange(STEPS))
    return law, branch, state

  _, program = _played.setdefault(id(sampler), (sampler, jax.jit(run)))
  return program(cfg, obs)


def mixed_observation(rng, B=48, vocab=V):
  """Rows from nearly sure to nearly uniform, a few exact ties, some two-token rows; random attention."""
  scale = np.geomspace(0.02, 12.0, B)[:, None]
  logits = (rng.standard_normal((B, vocab)) * scale).astype(np.float32)
  logits[::7, 5] = logits[::7, 9] = logits[::7].max(-1)
  logits[1::3] = -30.0
  logits[1::3, 3] = 0.0
  logits[1::3, 4] = np.log(np.geomspace(0.01, 0.2, len(logits[1::3])))
  attn = random_attn(rng, B)
  # Calm attention on the two-token rows: where small corrections to min-p show.
  calm = {"attn_ent": 0.0, "attn_spread": 0.56, "agreement": 1.0}
  attn = attn.replace(**{n: getattr(attn, n).at[1::3].set(x) for n, x in calm.items()})
  return observe(logits, attn, history=PASSAGE, prompt=5)


# "3 4 8 9" comes back, ids recur in prompt and answer, and far back what follows "9" was 40.
PASSAGE = [9, 40, 3, 4, 8, 9, 3, 3, 4, 8, 5, 9, 3, 4, 8]


def _turned(value, low, high):
  """Other values for a knob, inside its range."""
  if isinstance(value, sampling.Ids):
    return [sampling.Ids.parse([3, 8])]
  if isinstance(value, sampling.Biases):
    return [sampling.Biases.parse({3: 2.0, 7: -1.0})]
  if isinstance(value, bool):
    return [not value]
  new = {0.1 * value, 4 * value, value + 0.5, 3}
  if isinstance(value, int):
    new = {round(x) for x in new}
  return [type(value)(min(max(x, low), high)) for x in sorted(new)]


def dead_knobs(sampler):
  """Names of knobs that move no law, branch or state when turned to 0.1x and to 4x.

  The statistics do not count: a knob that is only reported has done nothing.
  """
  rng = np.random.default_rng(0)
  seen = [(sampler.Config(), mixed_observation(rng))]
  for _, cfg, logits in cases(sampler):
    attn = random_attn(rng, 8)
    seen.append((cfg, observe(np.tile(logits, (8, 1)), attn)))
  for use in getattr(sampler, "USES", ()):
    seen.append((sampling.configure(sampler, use), mixed_observation(rng)))
  dead = []
  for field in dataclasses.fields(sampler.Config):
    low, high = getattr(sampler, "RANGES", {}).get(field.name, (-np.inf, np.inf))
    if not any(_moves(sampler, field.name, cfg, obs, low, high) for cfg, obs in seen):
      dead.append(field.name)
  return dead


def _moves(sampler, name, cfg, obs, low, high):
  """Whether turning one knob changes law, branch or state of these rows."""
  B = obs.logits_BV.shape[0]
  before = jax.tree.leaves(play(sampler, rows(cfg, B), obs))
  for new in _turned(getattr(cfg, name), low, high):
    after = jax.tree.leaves(play(sampler, rows(cfg.replace(**{name: new}), B), obs))
    if any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True)):
      return True
  return False


def chi_square(counts, p):
  """(statistic, degrees of freedom) over cells that expect at least five; the rest is pooled."""
  expected = np.asarray(p, np.float64) * counts.sum()
  big = expected >= 5
  cells = [(counts[big], expected[big])]
  if expected[~big].sum() > 0:
    cells.append((counts[~big].sum(keepdims=True), expected[~big].sum(keepdims=True)))
  c, e = (np.concatenate(x) for x in zip(*cells, strict=True))
  return float((((c - e) ** 2) / np.maximum(e, 1e-9)).sum()), len(c) - 1


def chi_square_limit(dof):
  """A bound that a true law exceeds about once in 100,000 tries (Wilson-Hilferty)."""
  z = 4.3
  return dof * (1 - 2 / (9 * dof) + z * np.sqrt(2 / (9 * dof))) ** 3 if dof else 0.0
