"""Several models, one text: at every token all models give logits, and the token is drawn from their mixture.

  python -m entropix_jax.main --config=configs/demo.py --prompt="..." --config.decoding.name=joint \\
      --config.decoding.mix=revive --config.decoding.models=entropix_jax/assets/demo/base

Why: this is what the ancestors' diagram shows, a base model and an instruct model side by side. Each model
has its own prompt (a chat for one, plain text for the other), its own cache and its own positions; tokens,
noise, sampler and history are shared. The modules of mixing/ say how logits are mixed; `JointModel` runs the
models and calls them. Samplers, statistics and speculation see one model with the mixed logits; each
model's own entropy is in the trace as entropy_0, entropy_1, ...
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from entropix_jax import sampling
from entropix_jax.decoding import mixing
from entropix_jax.engine.language_model import LanguageModel
from entropix_jax.engine.setup import STOP_IDS, Setup
from entropix_jax.errors import UserError
from entropix_jax.model import kvcache


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the method; of the knobs those of the way to mix, see mixing/NAME.py."""

  mix: str = "revive"  # a module of mixing/
  models: str = ""  # folders of the further models, separated by commas
  template: str = "{}\n"  # the prompt of a model that does not chat
  drafter: str = ""  # "ngram" or "beside", the first of `models`; none when empty
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
    """Of the further models, in the order of the mixing method's MODELS."""
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
  """What a row keeps for joint decoding; tuples have an entry for each further model."""

  ahead: tuple[jax.Array, ...]  # int32; how much longer its prompt is than the main model's
  last: tuple[jax.Array, ...]  # int32; the last id of its prompt
  state: Any  # of the mixing method


@dataclasses.dataclass(frozen=True, eq=False)
class JointModel:
  """A model whose logits are mixed from those of several networks; see `LanguageModel` for its methods.

  Of everything with an entry for each network (weights, caches, logits, pasts) it makes a tuple, the main
  network's first.
  """

  networks: tuple[LanguageModel, ...]
  method: ModuleType  # of mixing/
  config: Any  # its Config
  stops: Sequence[Sequence[int]]  # see mixing.align
  banned: Sequence[Sequence[int]]
  canonical: int
  tables: tuple[np.ndarray, np.ndarray]  # mixing.word_tables of the tokenizer

  shares_prefix: ClassVar[bool] = False

  def __post_init__(self):
    sizes = [network.cfg.vocab for network in self.networks]
    if len(set(sizes)) > 1:
      raise UserError(
        "Models that write one text must share a vocabulary; these have "
        f"{', '.join(map(str, sizes))} ids."
      )

  @functools.cached_property
  def stats(self) -> tuple[str, ...]:
    """Names of the numbers that the mixing method reports, sorted."""

    def one():
      vocab = self.networks[0].cfg.vocab
      logits = tuple(jnp.zeros((1, vocab), jnp.float32) for _ in self.networks)
      zero_B, stop_BE = jnp.zeros((1,), jnp.int32), jnp.zeros((1, STOP_IDS), jnp.int32)
      state = self.begin(self.request_arrays(None)).state
      return self._mixed(logits, zero_B, zero_B, stop_BE, state)[0].stats

    return tuple(sorted(jax.eval_shape(one)))

  def parts(self, tree: tuple) -> tuple:
    """The entry of each network."""
    return tree

  def join(self, parts: Sequence) -> tuple:
    """The entries of the networks as one tree."""
    return tuple(parts)

  def prompts(self, request) -> tuple[Sequence[int], ...]:
    """The ids that each network is fed; the main network's where there is one prompt for all."""
    further = request.beside or (request.ids,) * (len(self.networks) - 1)
    if len(further) != len(self.networks) - 1:
      raise UserError(
        f"A request to {len(self.networks)} models brings {len(further) + 1} prompts; give one for each in "
        "`beside`, or one for all."
      )
    return (request.ids, *further)

  # -- pure functions ------------------------------------------------------------------------

  def cache(self, rows: int, capacity: int) -> tuple[kvcache.Cache, ...]:
    """An empty cache of each network."""
    return tuple(network.cache(rows, capacity) for network in self.networks)

  def past(self, rows, cache, slots: int, window: int, prefix=None) -> tuple[kvcache.Past, ...]:
    """The past of each network; their lengths differ by what the prompts differ."""
    assert prefix is None, "rows of a joint model do not share a prefix"
    lengths = rows.len_B, *(rows.len_B + ahead_B for ahead_B in rows.model_state.ahead)
    each = zip(self.networks, cache, lengths, strict=True)
    return tuple(n.past(rows.replace(len_B=len_B), c, slots, window) for n, c, len_B in each)

  def logits(self, weights, rows, token_BT, past):
    """Feed every network: (each one's logits, their pasts, the main network's attention statistics)."""
    ids = [token_BT]
    for last_B in rows.model_state.last:
      # Before the first token, the last token of the prompt may be fed again: each network its own.
      first_B = jnp.where(rows.out_B == 0, last_B, token_BT[:, 0])
      ids.append(token_BT.at[:, 0].set(first_B))
    each = zip(self.networks, weights, ids, past, strict=True)
    logits, past, attn = zip(*(n.logits(w, rows, i, p) for n, w, i, p in each), strict=True)
    return logits, past, attn[0]

  def mix(self, rows, logits) -> tuple[jax.Array, dict[str, jax.Array], Callable]:
    """(logits_BV, statistics, commit): commit(token_B) is the rows' model state after that token."""
    at = rows.token_B, rows.out_B, rows.stop_BE, rows.model_state.state
    mixed, commit = self._mixed(logits, *at)
    stats = {name: x.astype(jnp.float32) for name, x in mixed.stats.items()}
    return mixed.logits_BV, stats, lambda token_B: rows.model_state.replace(state=commit(token_B))

  def _mixed(self, logits, token_B, out_B, stop_BE, state):
    starts_V, words_V = map(jnp.asarray, self.tables)
    aligned = mixing.align(logits, self.stops, self.banned, self.canonical)
    view = mixing.View(aligned, token_B, out_B, starts_V, words_V, stop_BE)
    knobs = sampling.arrays(self.config, token_B.shape[0])
    mixed = self.method.mix(knobs, state, view)
    return mixed, functools.partial(self.method.commit, knobs, state, mixed, view)

  def finite(self, logits, lse_B: jax.Array) -> jax.Array:
    """Whether the mixed logits and those of each network can be used; (B,) bool."""
    for part_BV in logits:
      most_B = jnp.max(part_BV, axis=-1)  # -inf: it excludes every id, which mixing allows
      lse_B += 0.0 * jnp.where(most_B == -jnp.inf, 0.0, most_B)
    return jnp.isfinite(lse_B)

  # -- what a row keeps for the model ----------------------------------------------------------

  def request_arrays(self, request) -> dict[str, tuple[np.ndarray, ...]]:
    """How much longer the prompts of the further networks are, and their last ids."""
    if request is None:
      none = tuple(np.zeros((1,), np.int32) for _ in self.networks[1:])
      return {"ahead": none, "last": none}
    main, *further = self.prompts(request)
    ahead = tuple(np.asarray([len(ids) - len(main)], np.int32) for ids in further)
    return {"ahead": ahead, "last": tuple(np.asarray([ids[-1]], np.int32) for ids in further)}

  def begin(self, arrays) -> Mixing:
    """The model state of rows that have emitted nothing."""
    ahead, last = (jax.tree.map(jnp.asarray, arrays[name]) for name in ("ahead", "last"))
    return self.restart(Mixing(ahead, last, None))

  def restart(self, model_state: Mixing) -> Mixing:
    """The model state of the same rows before their first token."""
    B = model_state.ahead[0].shape[0]
    return model_state.replace(state=self.method.init(sampling.arrays(self.config, B), B))


def setup(
  setups: Sequence[Setup], method: ModuleType, knobs: dict[str, Any], **align: Any
) -> Setup:
  """The Setup of a joint engine.

  Args:
    setups: of the single models, the main one first, with one sampler, EngineConfig and mesh shape.
    method: a module of mixing/.
    knobs: its settings.
    align: `stops`, `banned`, `canonical` and `tables` of JointModel.

  Raises:
    UserError: the models do not share a vocabulary, or a knob cannot be used.
  """
  networks = tuple(one.model for one in setups)
  model = JointModel(networks, method, sampling.configure(method, knobs), **align)
  return dataclasses.replace(setups[0], model=model)
