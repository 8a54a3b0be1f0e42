"""Keys and values of the beginnings of prompts, for prompts that begin alike: system messages, chats, examples.

Why: a second question of a chat repeats everything that was said. Kept are whole pieces, as `engine.feeding` feeds
them, each under the hash of all ids up to its end; so a beginning is found with one look-up per piece.
"""

import collections
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from entropix_jax.model.kvcache import Cache


class PrefixStore:
  """Pieces of prompts; those that were not used for longest leave first, ends before beginnings.

  Args:
    tokens: T, of a piece.
    most: pieces that it may hold.
  """

  def __init__(self, tokens: int, most: int):
    self.tokens, self.most = tokens, most
    # Tokens of prompts that were looked up, and of those that were found.
    self.asked = self.found = 0
    # The least recently used is first. A beginning is always touched after what continues it, so it stays longer.
    self._pieces: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()

  def __len__(self) -> int:
    return len(self._pieces)

  def __contains__(self, key: bytes) -> bool:
    return key in self._pieces

  def keys(self, ids: Sequence[int], salt: str = "") -> list[bytes]:
    """A key for each whole piece of a prompt: the hash of all ids up to its end. Empty where nothing is kept."""
    digest, T = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16), self.tokens
    id_X, found = np.asarray(ids, "<i4"), []
    for end in range(T, len(id_X) + 1, T) if self.most else ():
      digest.update(id_X[end - T : end].tobytes())
      found.append(digest.digest())
    return found

  def find(self, keys: Sequence[bytes], n: int) -> list[Cache]:
    """The pieces with which a prompt of n tokens begins, but never all of it: the logits of its last token are not kept.

    Args:
      keys: all of the prompt.
    """
    able = keys[: max(n - 1, 0) // self.tokens]
    found = [*itertools.takewhile(self._pieces.__contains__, able)]
    self._touch(found)
    self.asked += n
    self.found += len(found) * self.tokens
    return [self._pieces[key] for key in found]

  def add(self, keys: Sequence[bytes], piece: Cache) -> None:
    """Keep the piece of the last of these keys, if those before it are kept."""
    *before, key = keys
    if all(k in self._pieces for k in before):
      self._pieces[key] = piece
      self._touch([*before, key])
    while len(self._pieces) > self.most:
      self._pieces.popitem(last=False)

  def _touch(self, keys: Sequence[bytes]) -> None:
    for key in reversed(keys):
      self._pieces.move_to_end(key)
