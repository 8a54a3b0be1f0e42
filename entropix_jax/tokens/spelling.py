"""The bytes of a vocabulary, sorted: which tokens begin with some bytes, which are a beginning of them, and which merge.

Why sorted: tokens with a common beginning are neighbours, so a sorted list is a trie, and a node of it is a range.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError


class Spelling:
  """The ordinary tokens of a tokenizer by their bytes.

  Attributes:
    tokens: bytes of the tokens, sorted; `id_X` has their ids.
    ids: bytes -> ids. With byte fallback two ids can have the same byte; the last one is what text encodes to.
    longest: bytes of the longest token.
    rank: id -> its place among the ordinary tokens. Of two merges BPE makes the one of the lower rank first.
  """

  def __init__(self, tokenizer: Tokenizer):
    special = {*tokenizer.special.values(), *tokenizer.unused(tokenizer.vocab)}
    ordinary = [id for id in range(tokenizer.vocab) if id not in special]
    pairs = sorted((tokenizer.token_bytes(id), id) for id in ordinary)
    pairs = [pair for pair in pairs if pair[0]]
    self.tokenizer = tokenizer
    self.tokens = [data for data, _ in pairs]
    self.id_X = np.asarray([id for _, id in pairs], np.int32)
    grouped = itertools.groupby(pairs, key=lambda pair: pair[0])
    self.ids = {data: tuple(id for _, id in group) for data, group in grouped}
    self.longest = max(map(len, self.tokens), default=0)
    self.rank = {id: i for i, id in enumerate(ordinary)}
    # With byte fallback BPE merges characters; bytes stand only for characters without a token.
    self._fallback = len(self.ids) < len(self.tokens)

  def range(self, data: bytes) -> tuple[int, int]:
    """Where in `tokens` those that begin with some bytes begin and end."""
    n = len(data)
    low = bisect.bisect_left(self.tokens, data)
    return low, bisect.bisect_right(self.tokens, data, low, key=lambda token: token[:n])

  def covering(self, data: bytes) -> np.ndarray:
    """Ids of the tokens that begin with some bytes, or are them."""
    return self.id_X[slice(*self.range(data))]

  def extends(self, data: bytes) -> bool:
    """Whether some token begins with these bytes and has more."""
    low, high = self.range(data)
    return high - low > len(self.ids.get(data, ()))

  def within(self, data: bytes) -> Iterator[tuple[int, int]]:
    """(id, its bytes) of the tokens that are a beginning of some bytes and shorter than them."""
    for n in range(1, min(len(data) - 1, self.longest) + 1):
      for id in self.ids.get(data[:n], ()):
        yield id, n

  def data(self, ids: Sequence[int]) -> bytes:
    """The bytes of a path."""
    return b"".join(map(self.tokenizer.token_bytes, ids))

  @functools.cached_property
  def byte_XY(self) -> np.ndarray:
    """uint8: the bytes of `tokens`, zeros after their ends."""
    whole = b"".join(token.ljust(self.longest, b"\0") for token in self.tokens)
    return np.frombuffer(whole, np.uint8).reshape(len(self.tokens), self.longest)

  # -- merges --------------------------------------------------------------------------------

  def units(self, data: bytes) -> list[bytes]:
    """What merging starts from: single bytes, or characters where the vocabulary has byte fallback."""
    if not self._fallback:
      return [data[i : i + 1] for i in range(len(data))]
    units: list[bytes] = []
    for char in data.decode("utf-8", "surrogateescape"):
      one = char.encode("utf-8", "surrogateescape")
      units += [one] if one in self.ids else [one[i : i + 1] for i in range(len(one))]
    return units

  def merges(
    self, data: bytes, dropout: float = 0.0, rng: Any = None
  ) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """(the pieces that are left, the pairs that were merged) when BPE runs on some bytes.

    Args:
      dropout: probability with which a possible merge is passed over in each round (BPE dropout,
        arXiv:1910.13267); 0 gives BPE.
      rng: a NumPy generator, for the dropout.
    """
    parts, made = self.units(data), []
    while True:
      ranks = {}
      for i, pair in enumerate(itertools.pairwise(parts)):
        merged = self.ids.get(pair[0] + pair[1])
        if merged and not (dropout and rng.random() < dropout):
          ranks[i] = self.rank[merged[-1]]
      if not ranks:
        return parts, made
      i = min(ranks, key=ranks.__getitem__)
      made.append((parts[i], parts[i + 1]))
      parts[i : i + 2] = [parts[i] + parts[i + 1]]

  def encode(self, parts: Sequence[bytes]) -> tuple[int, ...]:
    """Ids of pieces that are tokens. Raises UserError for one that is not."""
    for part in parts:
      if part not in self.ids:
        raise UserError(f"No token of this tokenizer has the bytes {part!r}; leave them out.")
    return tuple(self.ids[part][-1] for part in parts)


@functools.lru_cache(maxsize=8)
def spelling(tokenizer: Tokenizer) -> Spelling:
  """The Spelling of a tokenizer, made once; sorting a large vocabulary takes a few tenths of a second."""
  return Spelling(tokenizer)
