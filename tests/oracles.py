"""Slow truths in float64 NumPy, written from the formulas and not from the package."""

import numpy as np


def log_softmax(x):
  x = np.asarray(x, np.float64)
  top = x.max()
  return x - top - np.log(np.exp(x - top).sum())


def ent_varent(p):
  """Entropy and varentropy of probabilities, in nats and nats^2."""
  p = np.asarray(p, np.float64)
  p = p[p > 0]
  ent = -(p * np.log(p)).sum()
  return ent, (p * (np.log(p) + ent) ** 2).sum()


def kept(scores, top_k, top_p, min_p):
  """Mask of what survives top-k, then top-p of the rest, then min-p; ties at an edge all stay."""
  scores = np.asarray(scores, np.float64)
  alive = scores > -np.inf
  if top_k > 0:
    better = [(scores[alive] > x).sum() for x in scores]
    alive &= np.asarray(better) < top_k
  mass = np.where(alive, np.exp(scores - scores.max()), 0.0)
  if top_p < 1:
    better = np.asarray([mass[scores > x].sum() for x in scores])
    alive &= (better < top_p * mass.sum()) | (scores == scores.max())
  return alive & (mass >= min_p)


def truncated(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
  """Probabilities of the truncated, renormalised softmax; temperature 0 is the argmax."""
  logits = np.asarray(logits, np.float64)
  if temperature < 1e-4:
    return (np.arange(len(logits)) == np.argmax(logits)).astype(np.float64)
  scores = logits / temperature
  p = np.where(kept(scores, top_k, top_p, min_p), np.exp(scores - scores.max()), 0.0)
  return p / p.sum()


def best_of(p, n):
  """Law of the most likely of n draws from p, equals sharing: by groups of equal probability."""
  p = np.asarray(p, np.float64)
  q = np.zeros(len(p))
  for value in set(p[p > 0]):
    group = p == value
    q[group] = (p[p <= value].sum() ** n - p[p < value].sum() ** n) / group.sum()
  return q


def quadrant(logits, attn, c):
  """(branch, law) of the October 2024 sampler with its defects fixed; attn may be None.

  From the table of conditions and formulas, per nat and nat^2: c is the Config.
  """
  ent, varent = ent_varent(np.exp(log_softmax(logits)))
  a = attn["attn_ent"] if attn else 0.0
  s = attn["attn_spread"] if attn else 0.0
  i = attn["score_mag"] if attn else 0.0
  g = attn["agreement"] if attn else 0.0
  apart = 1 - attn["agreement"] if attn else 0.0
  if ent < c.low_ent and varent < c.low_varent:
    return "flow", truncated(logits, 0.0)
  if ent > c.ask_ent and varent < c.low_varent:
    t = min(c.warm_cap, c.temp * (c.ask_temp + c.ask_temp_attn_ent * a))
    return "ask", truncated(logits, t, c.top_k, c.top_p, c.min_p)
  if ent < c.high_ent and varent > c.high_varent:
    t = min(c.warm_cap, c.temp * (c.fork_temp + c.fork_temp_score * i))
    k = min(100, max(5, int(np.floor(c.top_k * (1 + c.fork_k_dispersion * apart)))))
    return "fork", truncated(logits, t, k, c.top_p, c.min_p)
  if varent > c.high_varent:
    t = max(2.0, c.temp * (c.mist_temp + c.mist_temp_spread * s))
    p = max(c.mist_p_least, c.top_p - c.mist_p_attn_ent * a)
    return "mist", truncated(logits, t, c.top_k, p, c.min_p)
  t = c.temp * (
    1
    + c.mid_temp_ent * ent
    + c.mid_temp_varent * varent
    + c.mid_temp_attn_ent * a
    + c.mid_temp_spread * s
    - c.mid_temp_agreement * g
  )
  k = int(np.clip(np.round(c.top_k * (1 + c.mid_k_score * i - c.mid_k_agreement * g)), 1, 100))
  p = np.clip(c.top_p * (1 + c.mid_p_spread * s), 0.1, 1.0)
  m = np.clip(c.min_p * (1 - c.mid_min_p_ent * ent - c.mid_min_p_varent * varent), 0.01, 0.5)
  return "middle", best_of(truncated(logits, min(3.0, t), k, p, m), c.best_of)
