"""Several models, one text: at every token all models look, and one mixed law is drawn from.

  python -m entropix_jax.main --config=configs/demo.py --prompt="..." --config.decoding.name=joint \\
      --config.decoding.mix=revive --config.decoding.models=entropix_jax/assets/demo/base

Why: this is what the ancestors' diagram shows, a base model and an instruct model side by side. Each model
has its own prompt (a chat for the one, a plain text for the other), its own cache and its own
positions; tokens, noise, sampler and history are one. What is mixed, and how, is in mixing/: `Joint`
only runs the models and asks. Samplers, statistics and speculation see one model with the mixed logits;
each model's own entropy is in the trace as entropy_0, entropy_1, ...
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax import sampling
from entropix_jax.decoding import mixing
from entropix_jax.engine.engine import Engine, Prefix, Request, State
from entropix_jax.errors import UserError
from entropix_jax.model import kvcache


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method; of the knobs those of the way to mix, see mixing/NAME.py."""

  mix: str = "revive"  # a module of mixing/
  models: str = ""  # folders of the models beside config.checkpoint, separated by commas
  template: str = "{}\n"  # the prompt of a model that does not chat
  drafter: str = ""  # who guesses, as in speculative.py: "ngram" or "beside", the first of `models`
  knobs: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    roles = mixing.find(self.mix).MODELS[1:]
    given = [folder for folder in self.models.split(",") if folder.strip()]
    if len(given) != len(roles):
      raise UserError(
        f"The way {self.mix!r} to mix models needs {len(roles)} beside config.checkpoint, which is the "
        f"{mixing.find(self.mix).MODELS[0]}; give config.decoding.models={','.join(r.upper() for r in roles)}."
      )
    if self.drafter not in ("", "ngram", "beside"):
      raise UserError(f"config.decoding.drafter is {self.drafter!r}; use 'ngram' or 'beside'.")
    if self.template.count("{}") != 1:
      raise UserError(
        f"config.decoding.template is {self.template!r}; it must hold {{}} once, for the prompt."
      )
    sampling.configure(mixing.find(self.mix), self.knobs)

  @property
  def folders(self) -> list[str]:
    """Of the models beside the main one, in the order of the way's MODELS."""
    return [folder.strip() for folder in self.models.split(",")]


OWN = ("mix", "models", "template", "drafter")


def options() -> dict[str, Any]:
  """Name -> default of every option, the knobs of all ways to mix among them."""
  found = {name: getattr(Config, name) for name in OWN}
  for name in mixing.names():
    found |= sampling.knobs(mixing.find(name))
  return found


def configure(values: dict[str, Any]) -> Config:
  """The Config of options by name."""
  own = {name: value for name, value in values.items() if name in OWN}
  return Config(**own, knobs={name: x for name, x in values.items() if name not in own})


@struct.dataclass
class Mixing:
  """What a row keeps for the models beside the main one, each a tuple with an entry a model."""

  ahead: tuple[jax.Array, ...]  # int32; how much longer its prompt is than the main model's
  last: tuple[jax.Array, ...]  # int32; the last id of its prompt
  state: Any  # the way's


class Joint(Engine):
  """An Engine whose logits are mixed from those of several models.

  Args:
    engines: of the models, the main one first, with one sampler, EngineConfig and mesh.
    way: a module of mixing/.
    knobs: its settings.
    stops, banned, canonical: see mixing.align.
    tables: mixing.word_tables of the tokenizer.
  """

  common_from = None

  def __init__(
    self,
    engines: Sequence[Engine],
    way,
    knobs: dict[str, Any],
    stops: Sequence[Sequence[int]],
    banned: Sequence[Sequence[int]],
    canonical: int,
    tables: tuple[np.ndarray, np.ndarray],
  ):
    main = engines[0]
    if len({e.cfg.vocab for e in engines}) > 1:
      sizes = ", ".join(str(e.cfg.vocab) for e in engines)
      raise UserError(
        f"Models that write one text must share a vocabulary; these have {sizes} ids."
      )
    self.engines, self.way, self.knobs = tuple(engines), way, sampling.configure(way, knobs)
    self._align = functools.partial(mixing.align, stops=stops, banned=banned, canonical=canonical)
    self._tables = tables
    self._own: tuple[str, ...] = ()
    devices = None if main.mesh is None else list(main.mesh.devices.flat)
    super().__init__(main.cfg, main.weights, main.sampler, main.config, main.shape, devices)
    self.weights = tuple(e.weights for e in engines)
    zeros = tuple(jax.ShapeDtypeStruct((1, self.cfg.vocab), jnp.float32) for _ in engines)
    one = jax.eval_shape(lambda: self._blank(1, self.capacity))
    self._own = tuple(sorted(jax.eval_shape(lambda z, r: self._mix(z, r)[0].stats, zeros, one)))
    self.numbers += self._own
    self.columns += self._own
    self._reach = 0

  # -- pure functions --------------------------------------------------------------------------

  def lengths(self, rows: State):
    """Each model's."""
    return (rows.len_B, *(rows.len_B + ahead_B for ahead_B in rows.mixing.ahead))

  def look(self, weights, rows: State, token_BT, cache, base, recent, window: int):
    """Every model's logits; the main model's attention."""
    ids = [token_BT]
    for last_B in rows.mixing.last:
      # Before the first token the last one of the prompt may be fed again: each model's own.
      first_B = jnp.where(rows.out_B == 0, last_B, token_BT[:, 0])
      ids.append(token_BT.at[:, 0].set(first_B))
    seen = [
      e.look(w, rows, token_BT, c, base_B, r, window)
      for e, w, token_BT, c, base_B, r in zip(
        self.engines, weights, ids, cache, base, recent, strict=True
      )
    ]
    logits, recent, attn = zip(*seen, strict=True)
    return logits, recent, attn[0]

  def room(self, rows: int, slots: int):
    """Beside every model's cache."""
    return tuple(e.room(rows, slots) for e in self.engines)

  def merge(self, cache, recent, base, count_B):
    """Every model's."""
    each = zip(self.engines, cache, recent, base, strict=True)
    return tuple(e.merge(c, r, base_B, count_B) for e, c, r, base_B in each)

  def _mix(self, logits, rows: State):
    starts_V, words_V = map(jnp.asarray, self._tables)
    view = mixing.View(
      self._align(logits), rows.token_B, rows.out_B, starts_V, words_V, rows.stop_BE
    )
    knobs = sampling.arrays(self.knobs, rows.token_B.shape[0])
    mixed = self.way.mix(knobs, rows.mixing.state, view)
    return mixed, functools.partial(self.way.commit, knobs, rows.mixing.state, mixed, view)

  def _decide(self, rows: State, logits, attn, *choose: Callable):
    mixed, commit = self._mix(logits, rows)
    changed, record_BR = super()._decide(rows, mixed.logits_BV, attn, *choose)
    emits_B = changed["out_B"] > rows.out_B

    def pick(new, old):
      return jnp.where(emits_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    state = jax.tree.map(pick, commit(changed["token_B"]), rows.mixing.state)
    changed["mixing"] = rows.mixing.replace(state=state)
    stats_BR = jnp.stack([mixed.stats[name].astype(jnp.float32) for name in self._own], axis=-1)
    bits_BR = jax.lax.bitcast_convert_type(stats_BR, jnp.int32)
    return changed, jnp.concatenate([record_BR, bits_BR], axis=-1)

  def _fresh(self, rows: State) -> State:
    B = rows.len_B.shape[0]
    state = self.way.init(sampling.arrays(self.knobs, B), B)
    if not rows.mixing:
      none = tuple(jnp.zeros((B,), jnp.int32) for _ in self.engines[1:])
      rows = rows.replace(mixing=Mixing(none, none, None))
    return super()._fresh(rows).replace(mixing=rows.mixing.replace(state=state))

  def _begin(self, len_B, last_B, history_1S, row) -> State:
    one = super()._begin(len_B, last_B, history_1S, row)
    return one.replace(mixing=one.mixing.replace(ahead=row["ahead"], last=row["last"]))

  def _score(self, weights, state: State, *args, window: int):
    """By the main model."""
    own = state.replace(cache=state.cache[0])
    return self.engines[0]._score(weights[0], own, *args, window=window)

  def _caches(self, rows: int, capacity: int):
    return tuple(kvcache.init(e.cfg, rows, capacity, e.cache_dtype) for e in self.engines)

  # -- compiling and verbs ---------------------------------------------------------------------

  def abstract_prefix(self, S: Sequence[int]) -> Prefix:
    """Every model's cache and logits; lengths, ids and attention are the main model's."""
    return _together([e.abstract_prefix((s,)) for e, s in zip(self.engines, S, strict=True)])

  def programs(self, requests: Sequence[Request]) -> list[tuple]:
    """Of rows whose prompts are as long as their longest; prompts are fed by each model's own engine."""
    prompts = [self._prompts(r) for r in requests]
    longest = [
      dataclasses.replace(r, ids=max(ids, key=len), beside=())
      for r, ids in zip(requests, prompts, strict=True)
    ]
    need = [key for key in super().programs(longest) if key[0] in ("init", "decode")]
    for ids in prompts:
      need.append(
        ("insert", tuple(e.bucket(len(i))[1] for e, i in zip(self.engines, ids, strict=True)))
      )
    for i, e in enumerate(self.engines):
      mine = [
        dataclasses.replace(r, ids=ids[i], beside=())
        for r, ids in zip(requests, prompts, strict=True)
      ]
      need += [("of", i, key) for key in e.programs(mine) if key[0] in ("cache", "prefill", "feed")]
    return list(dict.fromkeys(need))

  def compile(self, programs: Sequence[tuple], done: Callable[[], None] = lambda: None) -> None:
    """Compile these programs now, and those of single models among them."""
    super().compile([key for key in programs if key[0] != "of"], done)
    for i, e in enumerate(self.engines):
      e.compile([key[2] for key in programs if key[:2] == ("of", i)], done)
    self.compiled |= {key: None for key in programs if key[0] == "of"}

  def _prompts(self, request: Request) -> tuple[Sequence[int], ...]:
    """Each model's; the main model's where there is one for all."""
    beside = request.beside or (request.ids,) * (len(self.engines) - 1)
    if len(beside) != len(self.engines) - 1:
      raise UserError(
        f"A request to {len(self.engines)} models brings {len(beside) + 1} prompts; give one for each in "
        "`beside`, or one for all."
      )
    return (request.ids, *beside)

  def _row(self, request: Request, forced: int = -1) -> dict[str, Any]:
    _, *beside = self._prompts(request)
    self._reach = max(self._reach, *(len(ids) - len(request.ids) for ids in beside))
    ahead = tuple(np.asarray([len(ids) - len(request.ids)], np.int32) for ids in beside)
    last = tuple(np.asarray([ids[-1]], np.int32) for ids in beside)
    return super()._row(request, forced) | {"ahead": ahead, "last": last}

  def prefill(self, request: Request) -> Prefix:
    """Every model's prompt, fed."""
    each = zip(self.engines, self._prompts(request), strict=True)
    return _together([e.prefill(dataclasses.replace(request, ids=i, beside=())) for e, i in each])

  def likeliest(self, prefix: Prefix, n: int) -> list[int]:
    """Of the main model."""
    return super().likeliest(prefix.replace(logits_1V=prefix.logits_1V[0]), n)

  def window(self, n: int) -> int:
    """Covers the longest prompt of any model."""
    return super().window(n + self._reach)


def _together(prefixes: Sequence[Prefix]) -> Prefix:
  return prefixes[0].replace(
    cache=tuple(p.cache for p in prefixes), logits_1V=tuple(p.logits_1V for p in prefixes)
  )
