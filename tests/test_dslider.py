"""dslider against a float64 oracle that decodes the same rows, and its Dirichlet fit against SciPy."""

import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.optimize
import scipy.special
from test_entropy_target import bisected, entropy_at

from entropix_jax import sampling
from entropix_jax.sampling import _dirichlet, dslider

M = dslider.RANKS


# -- the Dirichlet ---------------------------------------------------------------------------------


def targets(rng):
  """Means of several log-probability vectors, from narrow to wide, of 7 and of 65 outcomes."""
  for K in (7, 65):
    for total in (0.5, 3.0, 40.0, 2000.0):
      alpha = rng.dirichlet(np.ones(K)) * total + 1e-3
      p = np.maximum(rng.dirichlet(alpha, 30), np.exp(-12))
      yield np.log(p / p.sum(-1, keepdims=True)).mean(0)


def likelihood(alpha, t):
  g = scipy.special.gammaln
  return g(alpha.sum()) - g(alpha).sum() + ((alpha - 1) * t).sum()


def test_the_fit_is_the_maximum():
  psi = scipy.special.psi
  for mean in targets(np.random.default_rng(0)):
    mean_BM = jnp.asarray(mean[None], jnp.float32)
    t = np.asarray(_dirichlet.reachable(mean_BM)[0][0], np.float64)
    alpha, off = contract.fitted(mean_BM)
    alpha = np.asarray(alpha[0], np.float64)

    def loss(x, t=t):
      a = np.exp(x)
      return -likelihood(a, t), -a * (psi(a.sum()) - psi(a) + t)

    best = scipy.optimize.minimize(loss, np.log(alpha), jac=True, method="BFGS")
    assert likelihood(alpha, t) >= -best.fun - 1e-3
    assert float(off[0]) < 1e-3


def test_the_gradient_and_density_are_right():
  rng = np.random.default_rng(1)
  alpha, p = rng.uniform(0.3, 5, 9), rng.dirichlet(np.ones(9))
  got = _dirichlet.log_density(*(jnp.asarray(x[None], jnp.float32) for x in (p, alpha)))
  assert abs(float(got[0]) - likelihood(alpha, np.log(p))) < 1e-4


def test_a_single_law_is_pushed_inside():
  """The mean of one vector has no maximum; it is moved by SLACK and the fit stays finite."""
  p = np.full((1, 20), 0.05, np.float32)
  t, slack = _dirichlet.reachable(jnp.log(p))
  assert abs(float(slack[0]) - _dirichlet.SLACK) < 1e-6
  np.testing.assert_allclose(np.exp(t).sum(), np.exp(-_dirichlet.SLACK), atol=1e-5)
  alpha, off = contract.fitted(jnp.log(p))
  assert (alpha < 1e4).all()
  assert float(off[0]) < 1e-3


# -- the sampler -----------------------------------------------------------------------------------


class Running:
  def __init__(self):
    self.mean = self.var = 0.0

  def z(self, x):
    return (x - self.mean) / np.sqrt(self.var + 1e-6)

  def add(self, x, rate, first):
    off = x - self.mean
    self.var = 0.0 if first else (1 - rate) * (self.var + rate * off**2)
    self.mean = x if first else self.mean + rate * off


class Oracle:
  """One row in float64, from the description in the module's docstring and in note n11."""

  def __init__(self, c):
    self.c, self.count, self.last, self.threshold = c, 0, 0.0, c.threshold
    self.given = None  # a temperature to take where one solves for the same entropy
    self.r = {n: Running() for n in ("ent", "varent", "few", "ce", "ce_law", "law", "density")}

  def solved(self, scores, goal):
    t = bisected(scores, goal, 0.1, 2.5)
    if self.given is None:
      return t
    assert abs(entropy_at(scores, self.given) - entropy_at(scores, t)) < 2e-4
    return self.given

  def shape(self, logits, t):
    p = np.sort(oracles.probabilities(logits / t))[::-1]
    p = np.concatenate([np.pad(p, (0, M))[:M], [max(0.0, 1 - p[:M].sum())]])
    p = np.maximum(p, np.exp(-12))
    return p / p.sum()

  def step(self, logits):
    c, first = self.c, self.count == 0
    p = oracles.probabilities(logits)
    self.ent, self.varent = oracles.ent_varent(p)
    few = np.sort(p)[::-1][:6]
    self.few = oracles.ent_varent(few / few.sum())[0]
    usual = self.few if first else self.r["few"].mean
    sure = self.few < max(c.calm_least, usual - c.calm_sd * np.sqrt(self.r["few"].var + 1e-6))
    score = 0.0 if first else (
      c.w_ent * self.r["ent"].z(self.ent)
      + c.w_varent * self.r["varent"].z(self.varent)
      + c.w_surprise * self.r["ce"].z(self.last)
    )  # fmt: skip
    self.above = score > self.threshold
    odd = self.above and self.count >= c.warm_up
    flow = self.ent < c.flow_ent and self.varent < c.flow_varent
    ban = not flow and self.ent >= c.ban_ent and self.varent > c.ban_varent
    t = 1.0
    if odd and not flow:
      goal = np.mean([self.r[n].mean for n in ("ce", "ce_law", "law", "ent")])
      t = self.solved(logits, self.ent if first else goal)
    self.tau = self.shape(logits, t)
    if first:
      slack = max(0.02, -np.log(self.tau.sum()))
      self.alpha = M / (2 * slack) * self.tau
    self.density = likelihood(self.alpha, np.log(self.tau)) / (M + 1)
    familiar = (0.0 if first else self.r["density"].z(self.density)) > c.ood_sd
    nu = self.alpha / self.alpha.sum()
    if odd and not flow:
      apart = max(0.0, (nu * np.log(nu / self.tau)).sum())
      pull = 1 - 10 ** (-1 / (apart + 1e-6)) if familiar else 1.0
      law = self.toward(logits, t, nu, pull)
    elif sure or flow:
      law = oracles.truncated(logits, 0.0)
    else:
      six = np.where(logits >= np.sort(logits)[::-1][min(6, len(logits)) - 1], logits, -np.inf)
      law = oracles.truncated(six, self.solved(np.sort(logits)[::-1][:6], usual))
    if ban:
      law = self.second(law)
    names = {"flow": flow, "ban": ban, "mix": odd and familiar, "ood": odd, "concentrated": sure}
    return next((name for name, on in names.items() if on), "dispersed"), law

  def toward(self, logits, t, nu, pull):
    p = oracles.probabilities(logits / t)
    order = np.argsort(-p, kind="stable")
    there = order[: min(M, (p > 0).sum())]
    u = nu[: len(there)].copy()
    rest = nu[-1] if (p > 0).sum() > M else 0.0
    u, rest = u / (u.sum() + rest), rest / (u.sum() + rest)
    law = p * (1 - pull)
    tail = np.setdiff1d(np.arange(len(p)), there)
    if rest:
      law[tail] += pull * rest * p[tail] / self.tau[-1]
    law[there] = pull * u + (1 - pull) * self.tau[: len(there)]
    for value in set(logits[there]):
      same = logits == value
      law[same] = law[same].mean()
    return law / law.sum()

  @staticmethod
  def second(b):
    if b.max() > 1 - 1e-6:
      return b
    odds = b / (1 - b)
    q = b * (odds.sum() - odds)
    return q / q.sum()

  def commit(self, logits, law, token):
    first, rate = self.count == 0, self.c.rate
    surprise = -oracles.log_softmax(logits)[token]
    for name, x in (
      ("ent", self.ent), ("varent", self.varent), ("few", self.few), ("ce", surprise),
      ("ce_law", -np.log(law[token])), ("law", oracles.ent_varent(law)[0]),
    ):  # fmt: skip
      self.r[name].add(x, rate, first)
    density = self.r["density"]
    if self.count <= self.c.warm_up:
      density.var = 0.0 if first else (self.density - density.mean) ** 2
      density.mean = self.density
    else:
      density.add(self.density, rate, False)
    log_tau = np.log(self.tau)
    if first:
      self.mean = log_tau
    else:
      apart = max(0.0, (self.tau * (log_tau - oracles.log_softmax(self.mean))).sum())
      self.mean = self.mean + min(self.c.forget, 4 ** (-3 / (apart + 1e-6))) * (log_tau - self.mean)
    self.last, self.count = surprise, self.count + 1
    self.threshold += self.c.pace * (self.above - self.c.unusual)
    total = np.log(np.exp(self.mean).sum())
    t = self.mean - total - max(0.02, -total)
    for _ in range(40):  # plain Newton in ln alpha, halved until the likelihood grows
      a = self.alpha
      g = a * (scipy.special.psi(a.sum()) - scipy.special.psi(a) + t)
      if np.abs(g / a).max() < 1e-6:
        break
      hessian = scipy.special.polygamma(1, a.sum()) * np.outer(a, a)
      hessian -= np.diag(scipy.special.polygamma(1, a) * a**2)
      step = np.clip(np.linalg.solve(hessian - 1e-12 * np.eye(len(a)), -g), -2, 2)
      size = 1.0
      while likelihood(a * np.exp(size * step), t) < likelihood(a, t) and size > 1e-6:
        size /= 2
      if size < 1e-6:  # rounding is all that is left to gain
        break
      self.alpha = np.clip(a * np.exp(size * step), 1e-6, 1e6)


def texts(rng, V, n):
  """Rows of logits such as a text gives: mostly sure, at times open, a few of odd shape."""
  out = rng.standard_normal((n, V)) * rng.uniform(0.5, 3.0, (n, 1))
  for i in range(n):
    out[i, rng.integers(V)] += rng.choice([0.0, 3.0, 8.0, 14.0])
    if i % 11 == 7:
      out[i] = np.where(np.arange(V) < rng.integers(2, V), out[i] / 4, -9.0)
  return out.astype(np.float32)


STEP, ADVANCE = jax.jit(dslider.step), jax.jit(functools.partial(contract.advance, dslider))
LATER = {"ban_ent": 1.2, "ban_varent": 0.5, "flow_ent": 0.3, "flow_varent": 1.2}


@pytest.mark.parametrize("V", [5, 300])
@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"threshold": 0.0, "unusual": 0.4, "rate": 0.3, "ood_sd": -0.5},
    LATER | {"warm_up": 0, "forget": 0.1},
  ],
  ids=["defaults", "restless", "2411"],
)
def test_agrees_with_the_oracle(V, settings):
  """Step by step; where the two part by more than rounding the state is not carried on, so it fails."""
  config = sampling.configure(dslider, settings)
  cfg = contract.rows(config, 1)
  state, slow = dslider.init(cfg, 1), Oracle(config)
  seen = set()
  for pos, logits in enumerate(texts(np.random.default_rng(V), V, 40)):
    state, decision, token_B = ADVANCE(cfg, state, contract.observe(logits[None], pos=pos))
    branch, law = slow.step(logits.astype(np.float64))
    assert dslider.BRANCHES[int(decision.branch_B[0])] == branch
    np.testing.assert_allclose(np.exp(np.asarray(decision.law_BV[0], np.float64)), law, atol=3e-4)
    seen.add(branch)
    slow.commit(logits.astype(np.float64), law, int(token_B[0]))
  assert len(seen) >= 3


def after(config, n=30):
  """(State, Oracle) of one row after n tokens, the oracle set to the state's own float32 numbers."""
  cfg, rng = contract.rows(config, 1), np.random.default_rng(5)
  state, slow = dslider.init(cfg, 1), Oracle(config)
  for pos, logits in enumerate(texts(rng, 160, n)):
    state, _, _ = ADVANCE(cfg, state, contract.observe(logits[None], pos=pos))
  names = {"ce": "surprise", "ce_law": "law_surprise", "law": "law_ent"}
  for name, slow_one in slow.r.items():
    running = getattr(state, names.get(name, name))
    slow_one.mean, slow_one.var = float(running.mean_B[0]), float(running.var_B[0])
  slow.count, slow.last = n, float(state.last_B[0])
  slow.threshold, slow.alpha = float(state.threshold_B[0]), np.asarray(state.alpha_BM[0], float)
  return state, slow


@pytest.mark.parametrize("V", [1, 2, 160, 128_256])
@pytest.mark.parametrize(
  ("settings", "branches"),
  [
    ({}, ("concentrated", "dispersed", "mix")),
    ({"threshold": -9.0, "ood_sd": -99.0}, ("mix",)),
    ({"threshold": -9.0, "ood_sd": 99.0}, ("ood",)),
    ({"ban_ent": 0.5, "ban_varent": 0.1}, ("ban", "concentrated", "mix")),
  ],
  ids=["defaults", "unusual", "pulled", "ban"],
)
def test_one_law_agrees_with_the_oracle(settings, branches, V):
  """From a given state, at the temperature that was found: that one is held to its entropy."""
  config = sampling.configure(dslider, settings)
  logits = contract.oracle_rows(np.random.default_rng(6), 200 if V == 160 else 1, V)
  state, slow = after(config)
  B = len(logits)
  state = jax.tree.map(lambda x: jnp.repeat(x, B, axis=0), state)
  decision = STEP(contract.rows(config, B), state, contract.observe(logits))
  seen = set()
  for b, row in enumerate(logits):
    slow.given = float(decision.stats["temperature"][b])
    name, want = slow.step(row.astype(np.float64))
    assert dslider.BRANCHES[int(decision.branch_B[b])] == name
    np.testing.assert_allclose(np.exp(decision.law_BV[b]), want, atol=1e-5)
    seen.add(name)
  assert V != 160 or seen == set(branches)


def test_the_second_of_two_draws_is_that():
  rng = np.random.default_rng(3)
  b = np.asarray([0.5, 0.25, 0.15, 0.1])
  got = np.exp(np.asarray(dslider._second(jnp.log(jnp.asarray([b], jnp.float32))), np.float64)[0])
  pairs = [rng.choice(4, 2, replace=False, p=b)[1] for _ in range(20_000)]
  statistic, dof = contract.chi_square(np.bincount(pairs, minlength=4), got)
  assert statistic < contract.chi_square_limit(dof)


def test_about_a_tenth_of_tokens_is_unusual():
  rng = np.random.default_rng(4)
  cfg = contract.rows(dslider.Config(), 16)
  state, odd = dslider.init(cfg, 16), []
  for pos in range(300):
    logits = rng.standard_normal((16, 100)) * rng.gamma(4.0, 0.6, (16, 1))
    state, decision, _ = ADVANCE(cfg, state, contract.observe(logits, pos=pos))
    odd.append(np.asarray(decision.branch_B) >= dslider.MIX)
  share_B = np.mean(odd[50:], axis=0)
  assert 0.05 < share_B.min() <= share_B.max() < 0.15
