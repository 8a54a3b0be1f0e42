"""Runs every program of an engine once, with arguments that mean nothing.

Why: the first run of a program on a CPU takes up to half a second longer than the next, because its machine code is
linked then, and its memory is new. A server does that before it is ready.
"""

from collections.abc import Sequence

import jax
import numpy as np

from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.request import Request


def run_once(engine: Engine, programs: Sequence[Program]) -> None:
  """Run these programs of `programs.any_request`; whatever they leave is dropped.

  Of decode programs only those of the smallest window: one of the whole window takes as long as it does for texts.
  """
  state = engine.init()
  one, request = np.ones((1,), np.int32), Request([0], 1)
  weights = engine.setup.model.parts(engine.weights)[0]
  caches = {p.slots: engine.run(p) for p in programs if p.verb == "cache"}
  prefixes = {}
  pieces = {}

  def run(p: Program, *args):
    return engine.run(p, *(engine.put(x) if isinstance(x, np.ndarray) else x for x in args))

  for p in sorted(programs, key=lambda p: _ORDER.index(p.verb)):
    token_1T = np.zeros((1, p.tokens), np.int32)
    if p.verb == "prompt":
      prefixes[p.slots] = run(p, weights, token_1T, one)
    elif p.verb == "feed":
      caches[p.slots] = run(p, weights, caches[p.slots], token_1T, 0 * one)
    elif p.verb == "keep":
      pieces[p.slots] = run(p, caches[p.slots], 0 * one[0])
    elif p.verb == "put":
      caches[p.slots] = run(p, caches[p.slots], pieces[p.slots], 0 * one[0])
    elif p.verb == "read":
      prefix, _ = run(p, weights, caches[p.slots], token_1T, 0 * one, one, token_1T)
      caches[p.slots] = prefix.cache
    elif p.verb == "prefill":
      prefixes[p.slots] = run(p, weights, caches[p.slots], token_1T, 0 * one, one)
      caches[p.slots] = prefixes[p.slots].cache
    elif p.verb == "insert":
      state = engine.insert(state, prefixes[p.slots], 0, request)
    elif p.verb == "first":
      state, _ = engine.first(state, [0])
    elif p.verb == "decode" and p.window == engine.setup.windows[0]:
      state, _ = engine.decode(state, 1, rows=p.rows)
    elif p.verb == "steer":
      state = engine.steer(state)
    elif p.verb == "mask":
      state = engine.steer(state, masks={0: np.zeros((engine.setup.mask_words,), np.uint32)})
    elif p.verb == "force":
      state = run(p, engine.weights, state, 0 * one[0], one)
    elif p.verb == "fork":
      state = engine.fork(state, 0, 0, 0, 0)
    jax.block_until_ready((state, prefixes))  # so that few results exist at a time


_ORDER = ("init", "cache", "prompt", "feed", "keep", "put", "read", "prefill", "insert", "first", "decode", "steer", "mask", "force", "fork")  # fmt: skip
