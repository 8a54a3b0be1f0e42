"""A prompt that is fed piece by piece, so that rows may decode in between.

Pieces begin at multiples of config.engine.prefill_chunk [n32]. So a prompt that starts from the kept pieces of another
runs the same programs on the same numbers as one that does not, and its logits are the same bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from entropix_jax.engine.programs import Program
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.state import Prefix, join_prefixes
from entropix_jax.model.kvcache import Cache


class Feeding:
  """A prompt, of which `feed` feeds the next piece until there is a `prefix`.

  Args:
    engine: an Engine.
    known: keys and values of the first pieces, as `kept` of another prompt gave them; fewer than the prompt has.
    scored: also collect how likely each token was, in `scores`.

  Raises:
    UserError: a request that the engine cannot run.
  """

  def __init__(self, engine: Any, request: Request, known: Sequence[Cache] = (), scored=False):
    check_request(engine.setup, request)
    self.engine, self.request, self.known, self.scored = engine, request, known, scored
    self.prefix: Prefix | None = None
    self.scores: list[tuple[jax.Array, ...]] = []  # of each piece; see `step.read`
    self.at = 0  # tokens fed, of the network that is being fed
    self._prompts = [np.asarray(ids, np.int32) for ids in engine.setup.model.prompts(request)]
    self._done: list[Prefix] = []
    self._cache: Cache | None = None

  @property
  def left(self) -> int:
    """Tokens that are not fed yet, of all networks."""
    return sum(map(len, self._prompts[len(self._done) :])) - self.at

  def feed(self) -> int:
    """Feed the next piece, and say how many tokens it had."""
    setup, network = self.engine.setup, len(self._done)
    ids = self._prompts[network]
    T, S = setup.bucket(len(ids))
    where: dict[str, Any] = {"slots": (S,), "network": network}
    whole = len(ids) <= T and not self.scored
    if self._cache is None and not whole:
      self._cache = self.engine.run(Program("cache", **where))
      for piece in self.known:
        args = self._cache, piece, np.asarray(self.at, np.int32)
        self._cache = self._run("put", {"tokens": T, **where}, *args)
        self.at += T
    part = ids[self.at : self.at + T]
    last = self.at + T >= len(ids)
    if last and not whole and not self.scored:
      T = setup.bucket(len(part))[0]
    token_1T = np.zeros((1, T), np.int32)
    token_1T[0, : len(part)] = part
    where["tokens"], at_1, n_1 = T, *(np.asarray([x], np.int32) for x in (self.at, len(part)))
    weights = setup.model.parts(self.engine.weights)[network]
    if self.scored:
      next_1T = np.zeros((1, T), np.int32)
      after = ids[self.at + 1 : self.at + 1 + T]
      next_1T[0, : len(after)] = after
      args = weights, self._cache, token_1T, at_1, n_1, next_1T
      prefix, scores = self._run("read", where, *args)
      self._cache = prefix.cache
      self.scores.append(scores)
    elif whole:
      prefix = self._run("prompt", where, weights, token_1T, n_1)
    elif last:
      prefix = self._run("prefill", where, weights, self._cache, token_1T, at_1, n_1)
    else:
      self._cache = self._run("feed", where, weights, self._cache, token_1T, at_1)
    self.at += len(part)
    if last:
      self._done.append(prefix)
      self._cache, self.at, self.known = None, 0, ()
      if len(self._done) == len(self._prompts):
        self.prefix = join_prefixes(setup, self._done)
    return len(part)

  def kept(self) -> Cache | None:
    """Keys and values of the piece that was fed last, if it was a whole one and not the only one."""
    T = self.engine.setup.config.prefill_chunk
    cache, end = self._cache, self.at
    if self._done and not self.at:
      cache, end = self._done[-1].cache, len(self._prompts[len(self._done) - 1])
    if cache is None or end % T or cache.capacity <= T:
      return None
    sizes = {"tokens": T, "slots": (cache.capacity,)}
    return self._run("keep", sizes, cache, np.asarray(end - T, np.int32))

  def _run(self, verb: str, sizes: dict[str, Any], *args):
    args = [self.engine.put(x) if isinstance(x, np.ndarray) else x for x in args]
    return self.engine.run(Program(verb, **sizes), *args)
