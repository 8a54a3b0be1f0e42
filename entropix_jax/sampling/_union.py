"""A union of samplers: each row of a batch uses one of several, in one engine and one program.

Why: requests with different samplers can then share a batch, so they share each read of the weights. Each sampler's
`step` and `commit` run behind one condition for the whole batch, so a sampler that no row uses costs nothing.
A sampler that some row uses is computed for all rows and kept for its own [n02].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax import sampling
from entropix_jax.errors import UserError
from entropix_jax.rowwise import any_row
from entropix_jax.sampling import Decision, Observation


@struct.dataclass
class Choice:
  """The Config of a union: which sampler each row uses, and a Config of every sampler."""

  kind: Any  # int32, (B,); index into `Union.kinds`
  parts: tuple  # of each kind its Config; in rows of another kind with default knobs


@dataclasses.dataclass(frozen=True)
class Union:
  """Several samplers as one. It has what engines use of a sampler module; make it with `union`."""

  kinds: tuple[str, ...]  # names of the samplers; requests that name none use the first

  @functools.cached_property
  def modules(self) -> dict[str, ModuleType]:
    """Name -> module of each kind, in order."""
    return {name: sampling.find(name) for name in self.kinds}

  @functools.cached_property
  def BRANCHES(self) -> tuple[str, ...]:
    """The branches of all kinds, one kind after another; a name may occur several times."""
    return tuple(branch for module in self.modules.values() for branch in module.BRANCHES)

  def Config(self, kind: str = "", own: Any = None) -> Choice:
    """The Choice of a row.

    Args:
      kind: the row's sampler; "": the first.
      own: that sampler's Config; its defaults when None.
    """
    parts = {name: module.Config() for name, module in self.modules.items()}
    kind = kind or self.kinds[0]
    if own is not None:
      parts[kind] = own
    return Choice(self.kinds.index(kind), tuple(parts.values()))

  def init(self, cfg: Choice, B: int) -> tuple:
    """The state of every kind."""
    modules = self.modules.values()
    return tuple(module.init(part, B) for module, part in zip(modules, cfg.parts, strict=True))

  def step(self, cfg: Choice, state: tuple, obs: Observation) -> Decision:
    """Each row's Decision by its own kind; numbers that this kind does not report are NaN.

    `aux` is a tuple with the aux of every kind.
    """
    absent_B = jnp.full_like(obs.raw.ent, jnp.nan)
    said = Decision(obs.logits_BV, jnp.zeros_like(obs.token_B), {}, (), obs.logits_BV)
    for k, offset, module, part, own in self._each(cfg, state):
      # As `any_row` traces it again, jit keeps what is traced here.
      step = jax.jit(functools.partial(_step, module, offset))
      shape = jax.eval_shape(step, part, own, obs)
      before = said.replace(
        stats={name: said.stats.get(name, absent_B) for name in shape.stats},
        aux=(),
        score_BV=None if shape.score_BV is None else said.score_BV,
      )
      decide = functools.partial(_decide, step)
      keep = functools.partial(_keep, shape.aux)
      after = any_row(cfg.kind == k, decide, keep, before, part, own, obs, many_kernels=True)
      said = after.replace(
        stats=said.stats | after.stats,
        aux=(*said.aux, after.aux),
        score_BV=said.score_BV if after.score_BV is None else after.score_BV,
      )
    return said

  def commit(self, cfg: Choice, state: tuple, decision: Decision, token_B: jax.Array) -> tuple:
    """The states after a token; a row changes only the state of its own kind."""
    states = []
    for k, offset, module, part, own in self._each(cfg, state):
      if jax.tree.leaves(own):
        mine = decision.replace(branch_B=decision.branch_B - offset, aux=decision.aux[k])
        args = part, own, mine, token_B
        own = any_row(cfg.kind == k, module.commit, _same, *args, many_kernels=True)
      states.append(own)
    return tuple(states)

  def _each(self, cfg: Choice, state: tuple):
    """(index, code of its first branch, module, Config, state) of each kind."""
    offset = 0
    for k, (module, *mine) in enumerate(zip(self.modules.values(), cfg.parts, state, strict=True)):
      yield k, offset, module, *mine
      offset += len(module.BRANCHES)


def _step(module: ModuleType, offset: int, *args) -> Decision:
  decision = module.step(*args)
  return decision.replace(branch_B=decision.branch_B + offset)


def _decide(step: Callable, before: Decision, *args) -> Decision:
  return step(*args)


def _keep(aux, before: Decision, *_) -> Decision:
  return before.replace(aux=jax.tree.map(jnp.zeros_like, aux))


def _same(part, own, *_):
  return own


def union(names: Sequence[str]) -> Union:
  """The union of these samplers; the same object for the same names.

  Raises:
    UserError: no name, or one that is no sampler's.
  """
  return _union(tuple(dict.fromkeys(names)))


@functools.cache
def _union(names: tuple[str, ...]) -> Union:
  if not names:
    raise UserError("A union needs at least one sampler; name it.")
  several = Union(names)
  _ = several.modules  # raises for unknown names
  return several
