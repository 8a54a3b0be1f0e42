"""All ways to write a text in tokens, and how likely the text is over all of them.

A tokenizer writes a text in one way, the canonical one, but a model gives every way a probability. The probability of a
text is their sum, given that the text ends where a token ends:

  P(text | before) = sum over segmentations s of  product over i of  p(s_i | before, s_1 .. s_i-1)

Short texts are enumerated. For longer ones there are thousands of segmentations, and the sum is estimated by importance
sampling: a path is drawn token by token from the model's own law restricted to tokens that the text goes on with, and its
weight is the product of the probabilities c_i of that restriction. The mean of the weights is unbiased (arXiv:2306.17757).
The canonical segmentation is known and counted as it is; only the others are estimated.
In practice it is a lower bound [n35]: segmentations that no draw has found are missing, and the error cannot tell.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from entropix_jax.errors import UserError
from entropix_jax.tokens.laws import Laws
from entropix_jax.tokens.spelling import Spelling

MOST = 512  # segmentations that are enumerated
_WORD = 64  # bytes from which on a word is cut: the time of its merges grows with the square of its length


def count(spelled: Spelling, data: bytes) -> int:
  """The number of segmentations of some bytes."""
  return _ways(spelled, data)[0]


def _ways(spelled: Spelling, data: bytes) -> list[int]:
  """The number of segmentations of what follows the first n bytes, for every n."""
  ways = [0] * len(data) + [1]
  for start in reversed(range(len(data))):
    ends = range(start + 1, min(start + spelled.longest, len(data)) + 1)
    ways[start] = sum(ways[i] * len(spelled.ids.get(data[start:i], ())) for i in ends)
  return ways


def every(spelled: Spelling, data: bytes) -> Iterator[tuple[int, ...]]:
  """All segmentations of some bytes, those with long first tokens first."""
  ways, paths = _ways(spelled, data), [((), 0)]
  while paths:
    path, start = paths.pop()
    if start == len(data):
      yield path
    for end in range(start + 1, min(start + spelled.longest, len(data)) + 1):
      if ways[end]:
        paths += [((*path, id), end) for id in spelled.ids.get(data[start:end], ())]


def sampled(spelled: Spelling, ids: Sequence[int], dropout: float, rng: Any) -> tuple[int, ...]:
  """A segmentation by BPE dropout of what some ids write [n34].

  Merges happen inside words: a boundary of the given segmentation stays unless there is a letter on both of its sides.
  So the segmentation is canonical without dropout wherever the tokenizer's own merges stay inside words.

  Args:
    ids: the canonical segmentation; control tokens stay.
    dropout: 0 to 1; 1 gives single bytes or characters.
    rng: a NumPy generator.
  """
  if not 0 <= dropout <= 1:
    raise UserError(f"dropout is {dropout}; it must be between 0 and 1.")
  found: list[int] = []
  for word in _words(spelled, ids):
    if word[0] not in spelled.rank:
      found += word
      continue
    found += spelled.encode(spelled.merges(spelled.data(word), dropout, rng)[0])
  return tuple(found)


def _words(spelled: Spelling, ids: Sequence[int]) -> list[list[int]]:
  """The ids in groups of which each is a word, or a token that is in none."""
  words: list[list[int]] = []
  for id in ids:
    joins = words and words[-1][-1] in spelled.rank and id in spelled.rank
    if joins:
      sides = spelled.data(words[-1]), spelled.data([id])
      before, after = (side.decode("utf-8", "replace") for side in sides)
      joins = before[-1:].isalpha() and after[:1].isalpha() and len(sides[0]) < _WORD
    if joins:
      words[-1].append(id)
    else:
      words.append([id])
  return words


@dataclasses.dataclass(frozen=True)
class Marginal:
  """How likely a text is over its segmentations, in nats."""

  total: float  # log of the sum over all
  canonical: float  # log p of the canonical one
  error: float  # standard error of `total`; 0 where all were enumerated
  ways: int  # segmentations that there are
  rows: tuple[tuple[tuple[int, ...], float], ...]  # (segmentation, log p), the likeliest first

  @property
  def gap(self) -> float:
    """By how much the canonical segmentation falls short of the text."""
    return self.total - self.canonical


def marginal(
  laws: Laws,
  spelled: Spelling,
  before: Sequence[int],
  ids: Sequence[int],
  draws: int = 64,
  most: int = MOST,
  seed: int = 0,
) -> Marginal:
  """The probability of a text over its segmentations.

  It asks for one row per segmentation, or for one per draw and token.

  Args:
    before: ids that the text comes after, at least one.
    ids: the canonical segmentation of the text, without control tokens.
    draws: for texts with more than `most` segmentations.
  """
  if not before or not ids:
    raise UserError("A text and at least one token before it are needed; give both.")
  data, start, own = spelled.data(ids), len(before), tuple(ids)
  ways = count(spelled, data)
  if ways <= most:
    paths = list(every(spelled, data))
    logps = [x.sum() for x in laws.score([(*before, *path) for path in paths], start)]
    total, error = float(np.logaddexp.reduce(logps)), 0.0
  else:
    rng = np.random.default_rng(seed)
    drawn, weights = _drawn(laws, spelled, before, data, draws, rng)
    paths = list(dict.fromkeys([own, *drawn]))
    logps = [x.sum() for x in laws.score([(*before, *path) for path in paths], start)]
    # The canonical one is known, so draws of it count nothing, and only the others are estimated.
    rest = np.where([path == own for path in drawn], -np.inf, weights)
    total = float(np.logaddexp(logps[0], np.logaddexp.reduce(rest) - math.log(draws)))
    share = np.exp(rest - total)
    error = float(share.std(ddof=1) / math.sqrt(draws))
  rows = sorted(zip(paths, map(float, logps), strict=True), key=lambda row: -row[1])
  return Marginal(total, dict(rows)[own], error, ways, tuple(rows))


def _drawn(laws: Laws, spelled: Spelling, before, data: bytes, draws: int, rng: Any):
  """(paths, log weights) of importance sampling."""
  paths: list[tuple[int, ...]] = [()] * draws
  weights = np.zeros(draws)
  known = functools.cache(lambda path: _next(spelled, data[len(spelled.data(path)) :]))
  while open_ := sorted({path for path in paths if len(spelled.data(path)) < len(data)}):
    laws_NV = laws.after([(*before, *path) for path in open_])
    law = dict(zip(open_, laws_NV, strict=True))
    for i, path in enumerate(paths):
      if path in law:
        ids = known(path)
        logp = law[path][ids]
        c = np.logaddexp.reduce(logp)
        weights[i] += c
        paths[i] = (*path, int(rng.choice(ids, p=np.exp(logp - c))))
  return paths, weights


def _next(spelled: Spelling, rest: bytes) -> np.ndarray:
  """Ids of the tokens that the rest of a text can begin with, the whole rest among them."""
  ids = [id for id, _ in spelled.within(rest)] + list(spelled.ids.get(rest, ()))
  if not ids:
    raise UserError(f"No token of this tokenizer writes {rest[:20]!r}; leave it out.")
  return np.asarray(ids)
