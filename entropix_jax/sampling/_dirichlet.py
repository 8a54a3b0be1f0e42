"""Dirichlet distributions over a few outcomes: log-density and a maximum-likelihood fit.

Why: the dslider sampler needs to know how usual a next-token law is among the earlier ones. A Dirichlet
fitted to the running mean of log-probabilities tells, and over a few outcomes it costs microseconds. The
original's fit over the vocabulary took seconds and said nothing about the tokens that matter.

The log-likelihood per observation, with t_i the mean of ln p_i and a_0 the sum of alpha, is concave:
  L = lnG(a_0) - sum lnG(alpha_i) + sum (alpha_i - 1) t_i,    dL/dalpha_i = psi(a_0) - psi(alpha_i) + t_i
Source: T. Minka, Estimating a Dirichlet distribution, 2000.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln, polygamma

SLACK = 0.02  # nats; least value of -ln sum exp t: at 0, alpha would grow without bound
ITERATIONS = 12  # at most; two are usual when they start from the last token's alpha
TOLERANCE = 1e-4  # nats; largest component of the gradient at which the fit stops
LEAST, MOST = 1e-6, 1e6  # bounds of each alpha


def log_density(p_BM: jax.Array, alpha_BM: jax.Array) -> jax.Array:
  """ln Dir(p | alpha), (B,)."""
  return (
    gammaln(jnp.sum(alpha_BM, axis=-1))
    - jnp.sum(gammaln(alpha_BM), axis=-1)
    + jnp.sum((alpha_BM - 1.0) * jnp.log(p_BM), axis=-1)
  )


def reachable(mean_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(t_BM, slack_B): `mean_BM`, lowered so that its slack -ln sum exp t is at least SLACK; the slack."""
  total_B1 = jax.nn.logsumexp(mean_BM, axis=-1, keepdims=True)
  slack_B1 = jnp.maximum(-total_B1, SLACK)
  return mean_BM - total_B1 - slack_B1, slack_B1[:, 0]


def start(mean_BM: jax.Array) -> jax.Array:
  """alpha_BM to start a fit from: exact for large a_0 = sum alpha, elsewhere within a factor of two."""
  t_BM, slack_B = reachable(mean_BM)
  total_B = (mean_BM.shape[-1] - 1) / (2.0 * slack_B)
  return jnp.clip(total_B[:, None] * jax.nn.softmax(t_BM, axis=-1), LEAST, MOST)


def fit(mean_BM: jax.Array, alpha_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(alpha_BM, off_B): the fit to a mean of ln p, by Newton steps in ln alpha from `alpha_BM`, and the
  largest absolute component of the gradient that is left."""
  t_BM, _ = reachable(mean_BM)

  def gradient(alpha_BM):
    total_B1 = jnp.sum(alpha_BM, axis=-1, keepdims=True)
    return digamma(total_B1) - digamma(alpha_BM) + t_BM

  def go_on(carry):
    n, _, off_B = carry
    return (n < ITERATIONS) & jnp.any(off_B > TOLERANCE)

  def improve(carry):
    n, alpha_BM, off_B = carry
    g_BM = gradient(alpha_BM)
    curve_BM = polygamma(1, alpha_BM) * alpha_BM**2
    full_BM = alpha_BM * g_BM - curve_BM
    d_BM = jnp.where(full_BM < 0, full_BM, -curve_BM)
    # (diag(d) + c alpha alpha') step = -alpha g, solved by the Sherman-Morrison formula.
    c_B1 = polygamma(1, jnp.sum(alpha_BM, axis=-1, keepdims=True))
    r_BM, s_BM = -alpha_BM * g_BM / d_BM, alpha_BM / d_BM
    share_B1 = jnp.sum(alpha_BM * r_BM, axis=-1, keepdims=True)
    share_B1 = share_B1 * c_B1 / (1.0 + c_B1 * jnp.sum(alpha_BM * s_BM, axis=-1, keepdims=True))
    step_BM = jnp.clip(r_BM - s_BM * share_B1, -2.0, 2.0)
    new_BM = jnp.clip(alpha_BM * jnp.exp(step_BM), LEAST, MOST)
    new_BM = jnp.where((off_B > TOLERANCE)[:, None], new_BM, alpha_BM)
    return n + 1, new_BM, jnp.max(jnp.abs(gradient(new_BM)), axis=-1)

  off_B = jnp.max(jnp.abs(gradient(alpha_BM)), axis=-1)
  _, alpha_BM, off_B = jax.lax.while_loop(go_on, improve, (jnp.int32(0), alpha_BM, off_B))
  return alpha_BM, off_B
