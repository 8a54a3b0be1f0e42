"""Presets: JSON files with a sampler's name, its knobs, and where the numbers come from.

  {"sampler": NAME, "about": "what it is, and its source", "knobs": {KNOB: value}, "calibration": {...},
   "model": {"layers": 30, "width": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152, "rope_theta": 1e5}}

Why: thresholds belong to a model, so they are data that can be measured, shared and named in a trace.
`calibration` is optional and may hold anything: what was measured, on what, when. `model` is optional, too: a
model's shape, of which `rope_theta` may be left out. A shipped preset is the default for models of its shape.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from entropix_jax import files, sampling
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError

SHIPPED = Path(__file__).parent
_KEYS = {"sampler": str, "about": str, "knobs": dict, "calibration": dict, "model": dict}
_OPTIONAL = ("calibration", "model")
_SHAPE = ("layers", "width", "ffn", "heads", "kv_heads", "vocab")


@dataclasses.dataclass(frozen=True)
class Preset:
  """A sampler and values of its knobs."""

  sampler: str
  about: str  # one or two sentences: what it is, and where the numbers come from
  knobs: dict[str, float | int | bool | str]
  calibration: dict[str, Any] = dataclasses.field(default_factory=dict)  # empty: not calibrated
  model: dict[str, float | int] = dataclasses.field(default_factory=dict)  # empty: for any


def names() -> list[str]:
  """Names of the presets in this folder, sorted."""
  return sorted(path.stem for path in SHIPPED.glob("*.json"))


def shape(cfg: ModelConfig) -> dict[str, float | int]:
  """What `model` says of a model."""
  return {name: getattr(cfg, name) for name in _SHAPE} | {"rope_theta": cfg.rope.theta}


@functools.cache  # each call of the Python API asks
def for_model(cfg: ModelConfig) -> str | None:
  """Name of the shipped preset for a model, or None."""
  models = {name: load(name).model for name in names()}
  return next((n for n, m in models.items() if m and m.items() <= shape(cfg).items()), None)


def load(name: str) -> Preset:
  """The preset of that name in this folder, or, if the name ends in `.json`, the one in that file.

  Raises:
    UserError: there is no such preset, the file is not as the module docstring says, or its sampler does
      not exist or refuses a knob.
  """
  if not name.endswith(".json") and name not in names():
    raise UserError(
      f"There is no preset {name!r}; choose one of: {', '.join(names())}, or give a .json file."
    )
  path = Path(os.path.expanduser(name)) if name.endswith(".json") else SHIPPED / f"{name}.json"
  try:
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
  except OSError as error:
    raise UserError(f"The preset {path} cannot be read ({error.strerror}).") from None
  except ValueError as error:
    raise UserError(f"The preset {path} is not JSON ({error}).") from None
  if not isinstance(found, dict):
    raise UserError(f"The preset {path} is not a JSON object; it needs: {', '.join(_KEYS)}.")
  for key in found:
    if key not in _KEYS:
      raise UserError(f"The preset {path} has the unknown key {key!r}; known: {', '.join(_KEYS)}.")
  for key, kind in _KEYS.items():
    if not isinstance(found.get(key, {} if key in _OPTIONAL else None), kind):
      raise UserError(f"The preset {path} needs {key!r}, {_WORDS[kind]}.")
  preset = Preset(**found)
  if preset.model and {*preset.model} - {"rope_theta"} != {*_SHAPE}:
    raise UserError(
      f"The preset {path} has a 'model' that is not described by: {', '.join(_SHAPE)} and rope_theta."
    )
  try:
    sampling.configure(sampling.find(preset.sampler), preset.knobs)
  except UserError as error:
    raise UserError(f"The preset {path} cannot be used: {error}") from None
  return preset


_WORDS = {str: "a text", dict: "an object"}


def _refuse(constant: str):
  raise ValueError(f"{constant} is no number")


def save(path: str | Path, preset: Preset) -> None:
  """Write a preset, completely or not at all. Raises UserError if it cannot be written."""
  rows = {key: value for key, value in dataclasses.asdict(preset).items() if value != {}}
  rows["knobs"] = preset.knobs
  with files.whole(path, f"The preset {path}") as file:
    file.write(json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n")
