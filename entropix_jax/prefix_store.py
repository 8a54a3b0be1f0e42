"""Keys and values of the beginnings of prompts, for prompts that begin alike: system messages, chats, examples.

Why: a second question of a chat repeats everything that was said. Kept are whole pieces, as `engine.feeding` feeds
them, each under the hash of all ids up to its end; so a beginning is found with one look-up per piece.
"""

import collections
import hashlib
from collections.abc import Iterator, Sequence

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
    self.asked = self.found = (
      0  # tokens of prompts that were looked up, and of those that were found
    )
    # The least recently used is first. A beginning is always touched after what continues it, so it stays longer.
    self._pieces: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()

  def __len__(self) -> int:
    return len(self._pieces)

  def find(self, ids: Sequence[int], salt: str = "") -> list[Cache]:
    """The pieces with which a prompt begins, but never all of it: the logits of its last token are not kept."""
    found: list[bytes] = []
    for key in self._keys(ids[: max(len(ids) - 1, 0)], salt):
      if key not in self._pieces:
        break
      found.append(key)
    self._touch(found)
    self.asked += len(ids)
    self.found += len(found) * self.tokens
    return [self._pieces[key] for key in found]

  def add(self, ids: Sequence[int], piece: Cache, salt: str = "") -> None:
    """Keep the last piece of `ids`, which is a whole number of them, if those before it are kept."""
    if not self.most:
      return
    *before, key = self._keys(ids, salt)
    if all(k in self._pieces for k in before):
      self._pieces[key] = piece
      self._touch([*before, key])
    while len(self._pieces) > self.most:
      self._pieces.popitem(last=False)

  def has(self, ids: Sequence[int], salt: str = "") -> bool:
    """Whether the last piece of `ids` is kept."""
    *_, key = self._keys(ids, salt)
    return key in self._pieces

  def _touch(self, keys: Sequence[bytes]) -> None:
    for key in reversed(keys):
      self._pieces.move_to_end(key)

  def _keys(self, ids: Sequence[int], salt: str) -> Iterator[bytes]:
    digest, T = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16), self.tokens
    id_X = np.asarray(ids, "<i4")
    for end in range(T, len(id_X) + 1, T):
      digest.update(id_X[end - T : end].tobytes())
      yield digest.digest()
