"""Next-token laws of a model after many texts that begin alike, in batches; and how likely their ends are.

Why: healing, segmentations and bytes ask for the laws after dozens of short paths. Their common beginning is fed once,
and each pass feeds only what differs, up to eight texts at a time.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.errors import UserError
from entropix_jax.model import kvcache

ROWS = 8  # texts in a pass
_TOKENS = 4  # the shortest pass
_SHORT = 32  # tokens after the known beginning from which on a longer beginning is fed


class Laws(Protocol):
  """What may be asked of a model. A text is its ids, at least one."""

  def after(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """logp_NV: the law of the next token after each text, in nats; -inf for ids that stand for no token."""

  def score(self, texts: Sequence[Sequence[int]], start: int) -> list[np.ndarray]:
    """Of each text the log-probabilities of its tokens from the index `start` >= 1 on, in nats."""


class EngineLaws:
  """The laws of an engine's raw model; of several models, of the main one.

  Attributes:
    rows: texts that have been asked about.
  """

  def __init__(self, engine: Engine):
    self._engine, self.rows = engine, 0
    self._begin: tuple[int, ...] | None = None
    self._cache: kvcache.Cache | None = None

  def after(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """See Laws."""
    found = []
    for group, n, args in self._passes(texts, min(map(len, texts)) - 1):
      last_B = np.asarray([len(text) - n - 1 for text in group], np.int32)
      found.append(np.asarray(_after(*args, _rows(last_B)))[: len(group)])
    return np.concatenate(found).astype(np.float64)

  def score(self, texts: Sequence[Sequence[int]], start: int) -> list[np.ndarray]:
    """See Laws."""
    found = []
    for group, n, args in self._passes(texts, start - 1):
      next_BT = np.zeros_like(args[-1])
      for i, text in enumerate(group):
        next_BT[i, : len(text) - n - 1] = text[n + 1 :]
      logp_BT = np.asarray(_score(*args, next_BT), np.float64)
      found += [logp_BT[i, start - n - 1 : len(text) - n - 1] for i, text in enumerate(group)]
    return found

  def _passes(self, texts: Sequence[Sequence[int]], most: int):
    """(texts, n, arguments) of each pass; the first n tokens are common to all texts, and n <= `most`."""
    texts = [tuple(text) for text in texts]
    setup, longest = self._engine.setup, max(map(len, texts))
    if longest > setup.config.max_seq_len:
      raise UserError(
        f"The text has {longest} tokens, more than config.engine.max_seq_len={setup.config.max_seq_len}; "
        "shorten it or raise that setting."
      )
    network, weights = setup.model.networks[0], setup.model.parts(self._engine.weights)[0]
    n = self._feed(texts, most)
    self.rows += len(texts)
    for i in range(0, len(texts), ROWS):
      group = texts[i : i + ROWS]
      T = max(_TOKENS, 1 << (max(map(len, group)) - n - 1).bit_length())
      token_BT = np.zeros((1 if len(group) == 1 else ROWS, T), np.int32)
      for row, text in zip(token_BT, group, strict=False):
        row[: len(text) - n] = text[n:]
      yield group, n, (network, weights, self._cache, np.int32(n), token_BT)

  def _feed(self, texts: list[tuple[int, ...]], most: int) -> int:
    """Feed a beginning that all texts share; its length."""
    first, last = min(texts), max(texts)  # what these two share, all share
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    known = self._begin
    begun = known is not None and len(known) <= shared and first[: len(known)] == known
    if begun and (len(known) == shared or max(map(len, texts)) - len(known) <= _SHORT):
      return len(known)
    self._begin = first[:shared]
    if shared:
      self._cache = self._engine.prefill(Request(self._begin)).cache
    else:
      network = self._engine.setup.model.networks[0]
      self._cache = network.cache(1, self._engine.setup.bucket(1)[1])
    return shared


def _rows(x_B: np.ndarray) -> np.ndarray:
  return x_B if len(x_B) == 1 else np.resize(x_B, ROWS)


def _forward(network, weights, cache: kvcache.Cache, n, token_BT):
  """x_BTD of rows that begin with the first n tokens of a cache."""
  B, T = token_BT.shape
  len_B = jnp.full((B,), n)
  past = kvcache.Past(len_B, network.cache(B, T), prefix=kvcache.SharedPrefix(cache, len_B))
  return network.forward(weights, token_BT, past)[0]


@functools.partial(jax.jit, static_argnums=0)
def _after(network, weights, cache, n, token_BT, last_B) -> jax.Array:
  x_BTD = _forward(network, weights, cache, n, token_BT)
  x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
  return jax.nn.log_softmax(network.unembed(weights, x_BD))


@functools.partial(jax.jit, static_argnums=0)
def _score(network, weights, cache, n, token_BT, next_BT) -> jax.Array:
  x_BTD = _forward(network, weights, cache, n, token_BT)
  logp_BTV = jax.nn.log_softmax(network.unembed(weights, x_BTD))
  return jnp.take_along_axis(logp_BTV, next_BT[..., None], axis=-1)[..., 0]
