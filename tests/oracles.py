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


def kept(scores, top_k, top_p, min_p, of_all=False):
  """Mask of what survives top-k, then top-p of the rest, then min-p; ties at an edge all stay.

  of_all: top-p of the whole softmax, as in xjdr-alt/entropix, entropix/sampler.py, `_sample`, which compares
  sums of the vocabulary's probabilities with top_p, over what lax.top_k returned.
  """
  scores = np.asarray(scores, np.float64)
  alive = scores > -np.inf
  whole = np.exp(scores - scores.max()).sum()
  if top_k > 0:
    better = alive.sum() - np.searchsorted(np.sort(scores[alive]), scores, side="right")
    alive &= better < top_k
  mass = np.where(alive, np.exp(scores - scores.max()), 0.0)
  if top_p < 1:
    best_first = np.argsort(-scores, kind="stable")
    upto = np.append(0.0, np.cumsum(mass[best_first]))
    better = upto[np.searchsorted(-scores[best_first], -scores, side="left")]
    alive &= (better < top_p * (whole if of_all else mass.sum())) | (scores == scores.max())
  return alive & (mass >= min_p)


def truncated(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, of_all=False):
  """Probabilities of the truncated, renormalised softmax; temperature 0 is the argmax."""
  logits = np.asarray(logits, np.float64)
  if temperature < 1e-4:
    return (np.arange(len(logits)) == np.argmax(logits)).astype(np.float64)
  scores = logits / temperature
  p = np.where(kept(scores, top_k, top_p, min_p, of_all), np.exp(scores - scores.max()), 0.0)
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
  names = "attn_ent", "attn_spread", "score_mag", "agreement"
  a, s, i, g = (attn[name] if attn else 0.0 for name in names)
  apart = 1 - g if attn else 0.0
  calm = narrow = torn = True
  if attn:
    shared = attn["attn_ent"] < c.low_attn_ent and attn["attn_ent_norm"] < c.low_attn_norm
    shared = shared and attn["head_dispersion"] < c.low_dispersion
    calm = shared and s < c.low_spread and i < c.low_score
    narrow = shared and s > c.high_spread and i > c.fork_score
    torn = s > c.high_spread and a > c.high_attn_ent and attn["attn_ent_norm"] > c.high_attn_norm
    torn = torn and attn["head_dispersion"] > c.high_dispersion and i > c.high_score
  if ent < c.low_ent and varent < c.low_varent and calm:
    return "flow", truncated(logits, 0.0)
  if ent > c.ask_ent and varent < c.low_varent and calm:
    t = min(c.warm_cap, c.temp * (c.ask_temp + c.ask_temp_attn_ent * a))
    return "ask", truncated(logits, t, c.top_k, c.top_p, c.min_p, True)
  if ent < c.high_ent and varent > c.high_varent and narrow:
    t = min(c.warm_cap, c.temp * (c.fork_temp + c.fork_temp_score * i))
    k = min(100, max(5, int(np.floor(c.top_k * (1 + c.fork_k_dispersion * apart)))))
    return "fork", truncated(logits, t, k, c.top_p, c.min_p, True)
  if ent >= min(c.high_ent, c.mist_ent) and varent > c.high_varent and torn:
    t = min(c.mist_cap, max(c.mist_floor, c.temp * (c.mist_temp + c.mist_temp_spread * s)))
    p = max(c.mist_p_least, c.top_p - c.mist_p_attn_ent * a)
    return "mist", truncated(logits, t, c.top_k, p, c.min_p, True)
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
  t = min(3.0, t)
  if c.mid_inverse:
    t = np.clip(c.temp * np.sqrt((1.2 * ent + 2) / (ent + 1e-6)), 0.1, 2.0)
  return "middle", best_of(truncated(logits, t, k, p, m, True), c.best_of)


# -- filters and processors, each on scores of one row ---------------------------------------------


def probabilities(scores):
  scores = np.asarray(scores, np.float64)
  p = np.exp(scores - scores.max())
  return p / p.sum()


def top_n_sigma(scores, n):
  live = scores > -np.inf
  return live & (scores >= scores.max() - n * np.std(scores[live]))


def top_h(scores, share):
  """Add tokens from the best down, equals together, while the entropy of what is kept allows."""
  p = probabilities(scores)
  most = share * ent_varent(p)[0]
  keep = scores == scores.max()
  for value in sorted(set(scores[p > 0]), reverse=True):
    more = scores >= value
    if ent_varent(p[more] / p[more].sum())[0] > most:
      break
    keep |= more
  return keep


def p_less(scores):
  p = probabilities(scores)
  return (p >= (p**2).sum()) | (scores == scores.max())


def typical(scores, mass):
  p = probabilities(scores)
  ent = ent_varent(p)[0]
  off = np.where(p > 0, np.abs(-np.log(np.where(p > 0, p, 1.0)) - ent), np.inf)
  return (p > 0) & np.asarray([p[off < x].sum() < mass for x in off])


def epsilon(scores, eps):
  return (probabilities(scores) >= eps) | (scores == scores.max())


def eta(scores, eps):
  ent = ent_varent(probabilities(scores))[0]
  return epsilon(scores, min(eps, np.sqrt(eps) * np.exp(-ent)))


def dynatemp(scores, t, reach, exponent):
  """ggml-org/llama.cpp, src/llama-sampling.cpp, llama_sampler_temp_ext_apply; 0 means greedy, as there."""
  live = (scores > -np.inf).sum()
  if live < 2:
    return t
  ent = ent_varent(probabilities(scores))[0]
  low, high = max(0.0, t - reach), t + reach
  return low + (high - low) * (ent / np.log(live)) ** exponent


def edt(scores, t, theta, base):
  ent = max(1e-6, ent_varent(probabilities(scores))[0])
  return t * base ** (theta / ent)


def heat(scores, t):
  """Scores at a temperature; at 0 (llama_sampler_temp_impl) only the first of the best is left."""
  if t >= 1e-4:
    return scores / t
  return np.where(np.arange(len(scores)) == np.argmax(scores), 0.0, -np.inf)


def dry_penalties(history, V, multiplier, base, allowed, window=0, breakers=()):
  """What DRY subtracts from each id's logit.

  ggml-org/llama.cpp, llama_sampler_dry_apply: the last breaker ends every repetition, lengths are not bounded,
  and an id that is a breaker is spared. oobabooga/text-generation-webui#5677, DRYLogitsProcessor: a window
  of 0 is the whole context, and an id counts only behind a match of at least one token.
  """
  recent = list(history)[-window:] if window else list(history)
  limit = next((i for i, id in enumerate(reversed(recent)) if id in breakers), len(recent))
  longest = {}
  for j in range(1, len(recent)):
    n = 0
    while n < min(limit, j) and recent[j - 1 - n] == recent[-1 - n]:
      n += 1
    if n and n >= allowed and recent[j] not in breakers:
      longest[recent[j]] = max(longest.get(recent[j], 0), n)
  off = np.zeros(V)
  for id, n in longest.items():
    off[id] = multiplier * base ** (n - allowed)
  return off


def without_top_choices(scores, threshold, stop=()):
  """oobabooga/text-generation-webui#6335, XTCLogitsWarper, on tokens that the filters before it left.

  From the most likely on, a token goes if the next one is at least as likely as the threshold, and none goes
  if the end of the text would. Equals go or stay together here; there, sorting decides.
  """
  p = probabilities(scores)
  above = (p >= threshold) & (scores > -np.inf)
  gone = above & (scores > scores[above].min(initial=np.inf))
  return scores if any(gone[id] for id in stop) else np.where(gone, -np.inf, scores)


def mirostat(logits, mu):
  """Probabilities that Mirostat 2.0 draws from, and its surprise of each id, as llama.cpp has it
  (`llama_sampler_mirostat_v2_apply`), in bits as there: in descending order, cut before the first id whose surprise
  is above mu, but never before the first id; the rest normalised again. The surprise that is fed back is
  that of the normalised rest.
  """
  logits = np.asarray(logits, np.float64)
  order = np.argsort(-logits, kind="stable")
  p = np.exp(logits[order] - logits.max())
  p /= p.sum()
  size = next((i for i, q in enumerate(p) if -np.log2(q) > mu), len(p))
  kept = p[: max(size, 1)]
  law = np.zeros(len(logits))
  law[order[: len(kept)]] = kept / kept.sum()
  with np.errstate(divide="ignore"):
    return law, -np.log2(law)


def plain(logits, c, history=(), prompt=0, mean=None, stop=()):
  """Law of the whole chain in its stated order, as probabilities; c holds only the knobs in use."""
  x = np.asarray(logits, np.float64).copy()
  V = len(x)
  for i, bias in c.get("logit_bias", {}).items():
    x[i] += bias
  # A list that would leave nothing to say counts as no list.
  allowed = c.get("allowed") or range(V)
  for lost in ([i for i in range(V) if i not in allowed], c.get("banned", [])):
    left = x.copy()
    left[list(lost)] = -np.inf
    x = left if (left > -np.inf).any() else x
  theta = c.get("repetition_penalty", 1.0)
  for i in set(history):
    x[i] = x[i] / theta if x[i] > 0 else x[i] * theta
  answer = list(history[prompt:])
  for i in set(answer):
    x[i] -= c.get("presence_penalty", 0.0) + c.get("frequency_penalty", 0.0) * answer.count(i)
  if c.get("dry_multiplier", 0.0) > 0:
    knobs = (c.get("dry_base", 1.75), c.get("dry_allowed_length", 2), c.get("dry_window", 0))
    x -= dry_penalties(history, V, c["dry_multiplier"], *knobs, c.get("dry_breakers", ()))

  t = c.get("temperature", 1.0)
  if t < 1e-4:
    return truncated(x, 0.0)

  def only(keep):
    return np.where(keep, x, -np.inf)

  def heated():
    if c.get("dynatemp_range", 0.0) > 0:
      return dynatemp(x, t, c["dynatemp_range"], c.get("dynatemp_exponent", 1.0))
    if c.get("edt_theta", 0.0) > 0:
      return edt(x, t, c["edt_theta"], c.get("edt_base", 0.8))
    return t

  last = c.get("temperature_last", False)
  if c.get("top_n_sigma", 0.0) > 0:
    x = only(top_n_sigma(x, c["top_n_sigma"]))
  if not last:
    x = heat(x, heated())
  x = only(kept(x, c.get("top_k", 0), 1.0, 0.0))
  for name, function in (("typical_p", typical), ("eta", eta), ("epsilon", epsilon)):
    off = 1.0 if name == "typical_p" else 0.0
    if c.get(name, off) != off:
      x = only(function(x, c[name]))
  x = only(kept(x, 0, c.get("top_p", 1.0), 0.0))
  x = only(kept(x, 0, 1.0, c.get("min_p", 0.0)))
  if c.get("p_less"):
    x = only(p_less(x))
  if c.get("top_h", 0.0) > 0:
    x = only(top_h(x, c["top_h"]))

  def end(scores):
    scores = heat(scores, heated()) if last else scores
    p = probabilities(scores)
    if mean is not None:
      aim = np.clip(2 * c["adaptive_p_target"] - mean, 0, 1)
      off = np.abs(p - aim) / 0.3
      return probabilities(np.where(p > 0, 5 - 10 * off**2 / (1 + off), -np.inf))
    return p

  rho = c.get("xtc_probability", 0.0)
  law = end(x)
  if rho > 0:
    struck = without_top_choices(x, c.get("xtc_threshold", 0.1), stop)
    law = (1 - rho) * law + rho * end(struck)
  return law
