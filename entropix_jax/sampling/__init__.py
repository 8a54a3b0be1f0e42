"""The sampler contract, and the registry of samplers: modules of this folder, found by name.

Why: a sampler states a *law*, the normalised log-probabilities that the next token is drawn from, and
never draws; one shared draw does (draw.py). So a text does not depend on other rows of the batch, the law's
log-probabilities are exactly those of the draw, and a test can compare counts of drawn tokens with them.

A module `sampling/NAME.py` has
  BRANCHES   names of its branches; a branch's code is its index
  Config     a flax.struct dataclass of knobs: numbers, `Ids` or `Biases`; traced, one value per row
  init(cfg, B) -> state                          a pytree of arrays with a leading row axis
  step(cfg, state, obs) -> Decision              states a law; changes nothing
  commit(cfg, state, decision, token_B) -> state   after each emitted token
  CASES      branch name -> {"p": next-token probabilities that must reach it, any knob: its value}
  RANGES     optional: knob -> (least, most) that a user may set, both included
  FAMILIES   optional: tuples of all knobs; an engine may be compiled without those that its requests do not set
  QUANTILES  optional: knobs that may also be a quantile such as "q20"; then the field q_KNOB, an int that is
             otherwise -1, holds it in hundredths of a percent. The field is no knob of its own
  USES       optional: dicts of knobs under which knobs without effect by default have one (for tests)
  check      optional: check(config) raises UserError for knobs that contradict each other

Rows take different branches by `where`. `vmap(lax.cond)` runs both sides for every row [n02], so expensive
work goes through one `rowwise.any_row` for the whole batch. README.md in this folder is the how-to.
"""

import importlib
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.struct
import jax
import numpy as np

from entropix_jax.errors import UserError, nearest
from entropix_jax.metrics import AttnStats, Spread

# Modules of this folder that are not samplers.
_SHARED = ("actions", "calibration", "draw", "presets")
WHOLE = 10_000  # quantiles are integers, in hundredths of a percent
LIST = 300  # X: the most entries of a knob that is a list, as in OpenAI's API


@flax.struct.dataclass
class Observation:
  """Everything a sampler may look at."""

  logits_BV: jax.Array  # float32, raw; -inf marks ids that must not be emitted
  raw: Spread  # of logits_BV: lse_B, ent_B, varent_B
  attn: AttnStats | None  # of the query that made the logits; None if the engine measures none
  token_B: jax.Array  # int32; the token that was fed to get the logits
  pos_B: jax.Array  # int32; index of the token to be drawn among the generated ones, from 0
  key_B2: jax.Array  # uint32; noise key of each row, for draw.gumbel(..., Purpose.AUX)
  history_BS: jax.Array  # int32; ids of the prompt and the generated tokens, token_B included
  len_B: jax.Array  # int32; how many entries of history_BS are valid
  stop_BE: jax.Array  # int32; ids that end the row, -1 where unused

  @property
  def prompt_B(self) -> jax.Array:
    """Length of each row's prompt, in tokens."""
    return self.len_B - self.pos_B


@flax.struct.dataclass
class Decision:
  """What a sampler's `step` returns."""

  law_BV: jax.Array  # float32; normalised log-probabilities, -inf where the token is excluded
  branch_B: jax.Array  # int32; index into BRANCHES
  # Numbers for the trace, each (B,) float32, such as the knobs in force; drafters read "temperature" [n26].
  stats: dict[str, jax.Array]
  aux: Any = ()  # arrays with a leading row axis that this sampler's own `commit` needs
  # If the law gives one token probability 1, the scores that chose this token; None: the logits. Drafters
  # see in them how close the runner-up is.
  score_BV: jax.Array | None = None


# -- knobs -------------------------------------------------------------------------------------


@flax.struct.dataclass
class Ids:
  """A knob that is a set of token ids."""

  id_X: Any  # int32, (..., LIST); -1 where unused

  @classmethod
  def parse(cls, value: str | list[int]) -> "Ids":
    """From a list of ids or a string such as "12,7"; raises ValueError for anything else."""
    parts = value.split(",") if isinstance(value, str) else value
    return cls(_ids([int(part) for part in parts if part != ""]))


@flax.struct.dataclass
class Biases:
  """A knob that adds a bias to the logits of some ids."""

  id_X: Any  # int32, (..., LIST); -1 where unused
  bias_X: Any  # float32

  @classmethod
  def parse(cls, value: str | dict[int, float]) -> "Biases":
    """From {id: bias} or a string such as "12:-5,7:2.5"; raises ValueError for anything else."""
    if isinstance(value, str):
      value = dict(pair.split(":") for pair in value.split(",") if pair)
    bias_of = {int(i): float(x) for i, x in value.items()}
    if len(bias_of) < len(value):
      raise EntryError("an id has two biases")
    for i, bias in bias_of.items():
      if not abs(bias) <= float(np.finfo(np.float32).max):
        raise EntryError(f"the bias of id {i} is not a finite float32 number")
    biases = [*bias_of.values(), *[0.0] * (LIST - len(bias_of))]
    return cls(_ids(list(bias_of)), np.asarray(biases, np.float32))


class EntryError(ValueError):
  """What is wrong with a list, as part of a sentence."""


def _ids(ids: list[int]) -> np.ndarray:
  if len(ids) > LIST:
    raise EntryError(f"it has {len(ids)} entries and {LIST} are the most")
  for i in ids:
    if not 0 <= i < 2**31:
      raise EntryError(f"{i} is not a token id")
  return np.asarray([*ids, *[-1] * (LIST - len(ids))], np.int32)


NO_IDS = Ids.parse([])
NO_BIASES = Biases.parse({})


def quantile(text: str) -> int:
  """2000 of "q20": hundredths of a percent. Raises ValueError for anything else."""
  match = re.fullmatch(r"q(\d{1,3}(?:\.\d\d?)?)", text, re.ASCII)
  share = round(100 * float(match[1])) if match else -1
  if not 0 <= share <= WHOLE:
    raise ValueError(f"{text!r} is no quantile")
  return share


def names() -> list[str]:
  """Names of all samplers, sorted."""
  modules = (module.name for module in pkgutil.iter_modules(__path__))
  ours = (name for name in modules if not name.startswith("_") and name not in _SHARED)
  return sorted({*ours, *_registered})


_registered: dict[str, ModuleType] = {}
_PARTS = ("BRANCHES", "Config", "init", "step", "commit")


def register(path: str | Path) -> ModuleType:
  """The sampler in a file NAME.py of your own, which is found by its name from now on.

  Registering a file again replaces what it said before; texts that have begun keep the old one.

  Raises:
    UserError: a file that cannot be read or lacks a part, or a name that is taken.
  """
  path = Path(path).resolve()
  name = path.stem
  taken = name in _SHARED or (name in names() and name not in _registered)
  if taken or name.startswith("_") or not name.isidentifier() or path.suffix != ".py":
    raise UserError(
      f"{path.name!r} cannot be the file of a sampler; give it a free name, as in mine.py."
    )
  module = ModuleType(f"{__name__}.{name}")
  module.__file__ = str(path)
  try:
    code = compile(path.read_text(encoding="utf-8"), path, "exec")
  except (OSError, ValueError, SyntaxError) as error:
    raise UserError(f"The sampler {str(path)!r} cannot be read ({error}).") from None
  sys.modules[module.__name__] = module  # dataclasses and the compile cache look it up
  try:
    exec(code, vars(module))
    if lacks := [part for part in _PARTS if not hasattr(module, part)]:
      raise UserError(
        f"The sampler {str(path)!r} lacks {', '.join(lacks)}; see sampling/README.md."
      )
  except BaseException:
    del sys.modules[module.__name__]
    if name in _registered:
      sys.modules[module.__name__] = _registered[name]
    raise
  _registered[name] = module
  return module


def find(name: str) -> ModuleType:
  """The sampler module of that name. Raises UserError, which lists the names, if there is none."""
  if name not in names():
    raise UserError(f"There is no sampler {name!r}; choose one of: {', '.join(names())}.")
  return _registered.get(name) or importlib.import_module(f"{__name__}.{name}")


def knobs(sampler: ModuleType) -> dict[str, float | int | bool | str]:
  """Name -> default of every knob; the default of a list is the empty string."""
  defaults = {f.name: f.default for f in flax.struct.dataclasses.fields(sampler.Config)}
  for name in quantiles(sampler):
    del defaults[f"q_{name}"]
  return {k: "" if isinstance(v, Ids | Biases) else v for k, v in defaults.items()}


def quantiles(sampler: ModuleType) -> tuple[str, ...]:
  """Names of the knobs that may be a quantile."""
  return getattr(sampler, "QUANTILES", ())


def configure(sampler: ModuleType, settings: dict[str, Any]):
  """The sampler's Config with the knobs of `settings`, the others at their defaults.

  Raises:
    UserError: an unknown knob (the known ones are listed), a value of another type than the default or
      out of range, or knobs that contradict each other.
  """
  fields = {f.name: f.default for f in flax.struct.dataclasses.fields(sampler.Config)}
  values, known = dict(fields), knobs(sampler)
  ranges = getattr(sampler, "RANGES", {})
  for name, value in settings.items():
    if name not in known:
      here = sampler.__name__.rsplit(".", 1)[1]
      raise UserError(
        f"{here!r} has no knob {name!r}{nearest(name, known)} It has: {', '.join(known)}."
      )
    if name in quantiles(sampler) and isinstance(value, str):
      try:
        values[f"q_{name}"] = quantile(value)
      except ValueError:
        raise UserError(
          f"The knob {name!r} is {value!r}; give a number, or a quantile from q0 to q100 such as q20."
        ) from None
      continue
    values[name] = _value(name, value, type(fields[name]))
    low, high = ranges.get(name, (-np.inf, np.inf))
    if name in ranges and not low <= values[name] <= high:
      raise UserError(f"The knob {name!r} is {values[name]}; it must lie in [{low}, {high}].")
  config = sampler.Config(**values)
  if hasattr(sampler, "check"):
    sampler.check(config)
  return config


def changed(sampler: ModuleType, settings: dict[str, Any]) -> list[str]:
  """Names of the Config's fields that these settings change from their defaults."""
  usual, config = configure(sampler, {}), configure(sampler, settings)

  def differs(name: str) -> bool:
    pairs = zip(*(jax.tree.leaves(getattr(c, name)) for c in (usual, config)), strict=True)
    return not all(np.array_equal(a, b) for a, b in pairs)

  return [field.name for field in flax.struct.dataclasses.fields(config) if differs(field.name)]


def kinds(sampler) -> dict[str, ModuleType]:
  """Name -> module of the samplers that rows may use: the only one, or those of a union (_union.py)."""
  name = getattr(sampler, "__name__", "").rpartition(".")[2]
  return getattr(sampler, "modules", None) or {name: sampler}


def kind(sampler, name: str) -> ModuleType:
  """The sampler of that name among `kinds`; "": the first. Raises UserError if there is none."""
  known = kinds(sampler)
  name = name or next(iter(known))
  if name not in known:
    raise UserError(
      f"This engine has no sampler {name!r}; it has: {', '.join(known)}. Name one of them, or none."
    )
  return known[name]


def row_config(sampler, name: str, settings: dict[str, Any]):
  """The Config of a row with the sampler `name`, one of `kinds`, and these knobs; raises as `kind` and `configure`."""
  config = configure(kind(sampler, name), settings)
  return sampler.Config(name, config) if hasattr(sampler, "modules") else config


def varying(sampler: ModuleType, settings: dict[str, Any]) -> tuple[str, ...] | None:
  """Names of the knobs that an engine for requests with these settings needs: the first family of the sampler
  and each of which a knob is set; None: all."""
  families = getattr(sampler, "FAMILIES", None)
  if families is None:
    return None
  used = {*families[0], *changed(sampler, settings)}
  return tuple(name for family in families if used & {*family} for name in family)


def _value(name: str, value: Any, kind: type):
  if kind in (Ids, Biases):
    try:
      return kind.parse(value)
    except EntryError as error:
      raise UserError(f"The knob {name!r} cannot be used, because {error}.") from None
    except (ValueError, TypeError, AttributeError, OverflowError):
      example, shown = "12,7" if kind is Ids else "12:-5,7:2.5", repr(value)
      shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
      raise UserError(f"The knob {name!r} is {shown}; give entries such as {example}.") from None
  if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float):
    raise UserError(f"The knob {name!r} is {value!r}; give a value of type {kind.__name__}.")
  if not np.isfinite(value):
    raise UserError(f"The knob {name!r} is {value!r}; give a finite number.")
  if kind is int and not (isinstance(value, int) or value.is_integer()):
    raise UserError(f"The knob {name!r} is {value!r}; give a whole number.")
  return kind(value)


_DTYPES = {float: np.float32, int: np.int32, bool: np.bool_}


def arrays(config, rows: int = 1):
  """The Config as an engine holds it: every leaf is an array with `rows` equal entries."""

  def spread(leaf):
    leaf = np.asarray(leaf, _DTYPES.get(type(leaf)))
    return np.full((rows, *leaf.shape), leaf)

  return jax.tree.map(spread, config)
