"""What every sampler must hold, as functions of a module: the tests apply them to the whole folder.

Why: a check that has never found anything may be unable to; as functions, they are applied to planted
defects, too. Those that look for faults answer with a list, empty where there is none.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from entropix_jax import metrics, sampling
from entropix_jax.sampling import _dirichlet, draw

V = 512


def random_attn(rng, B):
  """Attention statistics inside their ranges."""
  most = {"attn_ent": 4.0, "attn_ent_norm": 1.0, "attn_varent": 3.0, "attn_spread": 1.5}
  most |= {"head_dispersion": 0.9, "agreement": 1.0, "score_mag": 3.0}
  draws = {name: jnp.asarray(rng.uniform(0.0, x, B), jnp.float32) for name, x in most.items()}
  return metrics.AttnStats(**draws)


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
  return sampling.arrays(cfg, B)


_compiled = {}


def advance(sampler, cfg, state, obs):
  """(state after the step, Decision, token_B) of one step of the sampler."""
  decision = sampler.step(cfg, state, obs)
  token_B = draw.draw(decision.law_BV, obs.key_B2, obs.pos_B)
  return sampler.commit(cfg, state, decision, token_B), decision, token_B


def decide(sampler, cfg, obs):
  """(Decision, committed state) of one step from a fresh state, jitted once a sampler."""

  def run(cfg, obs):
    state = sampler.init(cfg, obs.logits_BV.shape[0])
    state, decision, _ = advance(sampler, cfg, state, obs)
    return decision, state

  # The module is kept with its program: an id may be used again once its object is gone.
  _, program = _compiled.setdefault(id(sampler), (sampler, jax.jit(run)))
  return program(cfg, obs)


def decided(sampler, settings, obs):
  """The Decision of one step from a fresh state, by a Config or settings that all rows have."""
  if isinstance(settings, dict):
    settings = sampling.configure(sampler, settings)
  return decide(sampler, rows(settings, len(obs.logits_BV)), obs)[0]


def law(sampler, settings, obs):
  """Probabilities of that decision, in float64."""
  return np.exp(np.asarray(decided(sampler, settings, obs).law_BV, np.float64))


def branches(sampler, settings, obs):
  return [sampler.BRANCHES[b] for b in decided(sampler, settings, obs).branch_B]


_played = {}
STEPS = 24  # more than quantiles need to begin


def play(sampler, cfg, obs):
  """(laws, branches, last state) of a few steps in which the logits wander over the ids."""

  def run(cfg, obs):
    def one(state, i):
      logits_BV = jnp.roll(obs.logits_BV, 3 * i, axis=-1) * (
        1.0 + 0.3 * jnp.sin(2.0 * i.astype(jnp.float32))
      )
      here = obs.replace(logits_BV=logits_BV, raw=metrics.spread(logits_BV), pos_B=obs.pos_B + i)
      state, decision, _ = advance(sampler, cfg, state, here)
      return state, (decision.law_BV, decision.branch_B)

    state = sampler.init(cfg, obs.logits_BV.shape[0])
    steps = STEPS if jax.tree.leaves(state) else 1
    state, (law, branch) = jax.lax.scan(one, state, jnp.arange(steps))
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
    seen.append((cfg, observe(np.tile(logits, (8, 1)), random_attn(rng, 8))))
  for use in getattr(sampler, "USES", ()):
    seen.append((sampling.configure(sampler, use), mixed_observation(rng)))
  return unmoved(sampler, seen, functools.partial(outcome, sampler))


def unmoved(module, seen, outcome):
  """Names of knobs of which no value changes outcome(cfg, obs), for each (cfg, obs) seen."""
  before = [outcome(cfg, obs) for cfg, obs in seen]

  def moves(name):
    low, high = getattr(module, "RANGES", {}).get(name, (-np.inf, np.inf))
    return any(
      outcome(cfg.replace(**{name: new}), obs) != was
      for (cfg, obs), was in zip(seen, before, strict=True)
      for new in _turned(getattr(cfg, name), low, high)
    )

  return [field.name for field in dataclasses.fields(module.Config) if not moves(field.name)]


def outcome(sampler, cfg, obs):
  """Bits of all that `play` gives; equal for equal laws, branches and states."""
  leaves = jax.tree.leaves(play(sampler, rows(cfg, obs.logits_BV.shape[0]), obs))
  return [np.asarray(x + 0).tobytes() for x in leaves]


def strangers(sampler):
  """Faults: permuting rows does not permute laws, or other neighbours change a law, bit for bit."""
  rng = np.random.default_rng(3)
  obs, other = mixed_observation(rng, B=12), mixed_observation(rng, B=12)
  order = rng.permutation(12)
  cfg = rows(sampler.Config(), 12)

  def law(obs):
    return np.asarray(decide(sampler, cfg, obs)[0].law_BV)

  law_BV = law(obs)
  shuffled = law(jax.tree.map(lambda x: x[order], obs))
  mixed = law(jax.tree.map(lambda x, y: x.at[6:].set(y[6:]), obs, other))
  moved = {"order": (shuffled, law_BV[order]), "neighbours": (mixed[:6], law_BV[:6])}
  return [name for name, pair in moved.items() if not np.array_equal(*pair)]


def frozen(sampler):
  """Branches after whose first token the state is what it was, where another branch changes it."""
  still, moves = [], False
  for branch, cfg, logits in cases(sampler):
    cfg = rows(cfg, 1)
    _, after = decide(sampler, cfg, observe(logits[None]))
    before = sampler.init(jax.tree.map(jnp.asarray, cfg), 1)  # as under jit
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    if all(np.array_equal(x, y) for x, y in pairs):
      still.append(branch)
    else:
      moves = True
  return still if moves else []


HARD = ("random", "one live id", "all equal", "wide", "spike")  # kinds of rows in `endure`


def endure(sampler, cfgs, steps, vocab=160):
  """Faults of a long run: a row for each Config whose logits are of another kind at every step, and for
  the first Config also one for each kind alone."""
  B = len(cfgs) + len(HARD)
  kind_B = jnp.asarray([-1] * len(cfgs) + list(range(len(HARD))))
  cfgs = [*cfgs, *[cfgs[0]] * len(HARD)]
  cfg = jax.tree.map(lambda *x: jnp.concatenate(x), *(rows(c, 1) for c in cfgs))
  start = observe(jnp.zeros((B, vocab)), random_attn(np.random.default_rng(0), B), history=PASSAGE)
  S, row_B = start.history_BS.shape[1], jnp.arange(B)

  def logits_at(key):
    any_kind, live, scale, normal = jax.random.split(key, 4)
    here_B = jnp.where(kind_B < 0, jax.random.randint(any_kind, (B,), 0, len(HARD)), kind_B)
    scale_B1 = jnp.exp(jax.random.uniform(scale, (B, 1), minval=-4.0, maxval=2.5))
    random_BV = scale_B1 * jax.random.normal(normal, (B, vocab))
    live_BV = jnp.arange(vocab) == jax.random.randint(live, (B, 1), 0, vocab)
    kinds = (
      random_BV,
      jnp.where(live_BV, random_BV, -jnp.inf),
      jnp.zeros((B, vocab)) + scale_B1,
      1e-3 * random_BV,
      jnp.where(live_BV, 1e4, random_BV),
    )
    return jnp.select([here_B[:, None] == i for i in range(len(kinds))], kinds)

  def infinite(tree):
    return ~jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))

  def one(carry, i):
    state, history_BS = carry
    logits_BV = logits_at(jax.random.fold_in(jax.random.key(1), i))
    obs = start.replace(
      logits_BV=logits_BV,
      raw=metrics.spread(logits_BV),
      pos_B=start.pos_B + i,
      history_BS=history_BS,
      len_B=jnp.full((B,), S),
    )
    state, decision, token_B = advance(sampler, cfg, state, obs)
    law_BV = decision.law_BV
    bad = {
      "the state is not finite": infinite(state),
      "the law is NaN": jnp.any(jnp.isnan(law_BV)),
      "the law is not normalised": jnp.any(jnp.abs(jax.nn.logsumexp(law_BV, axis=-1)) > 1e-4),
      "an excluded id has mass": jnp.any((logits_BV == -jnp.inf) & (law_BV > -jnp.inf)),
      "a number is not finite": infinite(decision.stats),
    }
    return (state, history_BS.at[row_B, i % S].set(token_B)), bad

  @jax.jit
  def run():
    state = sampler.init(cfg, B)
    return jax.lax.scan(one, (state, start.history_BS), jnp.arange(steps))[1]

  bad = {name: np.asarray(at) for name, at in run().items()}
  return [f"{name}, first at step {at.argmax()}" for name, at in bad.items() if at.any()]


# -- draws -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _draws(draw_fn, law_V, key_N2, pos_N):
  return draw_fn(jnp.broadcast_to(law_V, (len(pos_N), len(law_V))), key_N2, pos_N)


def keys(n):
  """key_N2 of n seeds."""
  zero_N = jnp.zeros((n,), jnp.uint32)
  return draw.row_keys(jnp.stack([zero_N, jnp.arange(n, dtype=jnp.uint32)], -1), zero_N, zero_N)


def fitted(mean_BM):
  """(alpha_BM, residual_B) of the Dirichlet fit from its own start."""
  mean_BM = jnp.asarray(mean_BM, jnp.float32)
  return _dirichlet.fit(mean_BM, _dirichlet.start(mean_BM))


def misdrawn(draw_fn, law_V, n=50_000):
  """Faults of n draws at consecutive positions of one seed, by chi-square against the law."""
  p = np.exp(np.asarray(law_V, np.float64))
  # Padding changes no noise, so the excluded end of the vocabulary can be left out.
  live = np.flatnonzero(p)[-1] + 1
  block = 10_000
  key_N2 = jnp.broadcast_to(keys(1), (block, 2))
  tokens = [
    _draws(draw_fn, law_V[:live], key_N2, start + jnp.arange(block)) for start in range(0, n, block)
  ]
  counts = np.bincount(np.concatenate(tokens), minlength=len(p))
  statistic, dof = chi_square(counts, p / p.sum())
  excluded = counts[p == 0].sum()
  return [f"{excluded} draws of excluded ids"] * bool(excluded) + [
    f"chi-square {statistic:.1f} at {dof} degrees of freedom"
  ] * int(statistic > chi_square_limit(dof))


def dependent(draw_fn, p, n=50_000):
  """Faults of the pairs that n seeds draw at positions 0 and 1, by chi-square against independence."""
  law_V = jnp.log(jnp.asarray(p, jnp.float32))
  key_N2 = keys(n)
  first, second = (_draws(draw_fn, law_V, key_N2, jnp.full((n,), pos)) for pos in (0, 1))
  pair = np.asarray(first) * len(p) + np.asarray(second)
  statistic, dof = chi_square(np.bincount(pair, minlength=len(p) ** 2), np.outer(p, p).ravel())
  return [f"chi-square {statistic:.1f}"] * int(statistic > chi_square_limit(dof))


def tied_to_rank(draw_fn, vocab=50, n=2000):
  """Faults: how often cutting other tokens away moved the token, one seed a row."""
  rng = np.random.default_rng(0)
  logits_NV = jnp.asarray(rng.standard_normal((n, vocab)) * 2, jnp.float32)
  key_N2, pos_N = keys(n), jnp.zeros((n,), jnp.int32)
  token_N = np.asarray(draw_fn(jax.nn.log_softmax(logits_NV), key_N2, pos_N))
  keep_NV = rng.random((n, vocab)) < 0.5
  keep_NV[np.arange(n), token_N] = True
  cut_NV = jax.nn.log_softmax(jnp.where(keep_NV, logits_NV, -jnp.inf))
  moved = int((np.asarray(draw_fn(cut_NV, key_N2, pos_N)) != token_N).sum())
  return [f"{moved} of {n} tokens moved"] * bool(moved)


# -- truncation, against the slow truth --------------------------------------------------------------


def oracle_rows(rng, n=200, V=160):
  """Random rows from flat to sharp, and the edges: uniform, one-hot, two peaks, spikes, excluded ids,
  many exact ties."""
  rows = [rng.standard_normal(V) * s for s in np.geomspace(0.05, 10, n)]
  two, spike = np.full(V, -9.0), np.zeros(V)
  two[[4 % V, 9 % V]], spike[17 % V] = 0.0, 7.0
  rows += [np.zeros(V), np.where(np.arange(V) == 3 % V, 0.0, -np.inf), two, spike]
  rows += [np.where(np.arange(V) % 3 == 0, rng.standard_normal(V), -np.inf)]
  rows += [np.round(rng.standard_normal(V) * 2) / 2 for _ in range(5)]
  rows += [np.log(np.asarray([0.4] + [0.6 / max(V - 1, 1)] * (V - 1)))]
  return np.asarray(rows, np.float32)


def mistruncated(sampler):
  """Faults: rows and knobs where temperature, top_k, top_p and min_p do not give the oracle's law."""
  rng = np.random.default_rng(8)
  logits = oracle_rows(rng)
  B = len(logits)
  faults = []
  for _ in range(6):
    t = rng.choice([0.0, 0.3, 0.7, 1.0, 1.8], B)
    k = rng.choice([0, 1, 2, 5, 40, 1000], B)
    p = rng.choice([1.0, 0.95, 0.9, 0.5, 0.05, 0.0], B)
    m = rng.choice([0.0, 0.02, 0.1, 0.9, 1.0], B)
    values = zip(("temperature", "top_k", "top_p", "min_p"), (t, k, p, m), "fiff", strict=True)
    cfg = rows(sampler.Config(), B).replace(**{n: jnp.asarray(x, d) for n, x, d in values})
    got = np.exp(decide(sampler, cfg, observe(logits))[0].law_BV)
    for b in range(B):
      want = oracles.truncated(logits[b], t[b], k[b], p[b], m[b])
      # One ulp may move a token across a probability edge; anything else is a defect.
      off = not abs(got[b] - want).max() <= 1e-5
      if off and not _on_an_edge(logits[b], t[b], p[b], m[b]):
        faults.append((b, t[b], k[b], p[b], m[b]))
  return faults


def _on_an_edge(logits, t, p, m):
  q = oracles.truncated(logits, t)
  q = np.sort(q)[::-1]
  near_p = np.abs(np.cumsum(q) - p).min() < 1e-6
  return near_p or np.abs(q / q[0] - m).min() < 1e-6


# -- statistics --------------------------------------------------------------------------------------


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


def conditions_with_messages(text):
  """Loops of a compiled program whose condition is a message between devices [n28]."""
  parts = {part.split(" ", 1)[0]: part for part in re.split(r"\n(?=%)", text)}
  found = re.findall(r" while\(.*condition=(%[\w.\-]+)", text)
  assert found
  return [name for name in found if re.search(r" all-[a-z]+\(", parts[name])]
