"""Presets: a sampler's name and knobs as a JSON file, with a word on where the numbers come from.

  {"sampler": NAME, "about": "what and whence", "knobs": {KNOB: number}, "calibration": {...}}

Why: thresholds belong to a model, so they are data that can be measured, passed on and named in a
trace. `calibration` is optional and free: what was measured, on what, when.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from entropix_jax import sampling
from entropix_jax.errors import UserError

SHIPPED = Path(__file__).parent
_KEYS = {"sampler": str, "about": str, "knobs": dict, "calibration": dict}


@dataclasses.dataclass(frozen=True)
class Preset:
  """A sampler with knobs that were set together."""

  sampler: str
  about: str  # one or two sentences with provenance
  knobs: dict[str, float | int | bool]
  calibration: dict[str, Any] = dataclasses.field(default_factory=dict)  # empty: none


def names() -> list[str]:
  """Every preset that is shipped."""
  return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load(name: str) -> Preset:
  """The shipped preset of that name, or the one in a file: what ends in `.json`.

  Raises:
    UserError: there is none, or it is not what the module docstring says; its sampler and every knob
      are checked, too.
  """
  if not name.endswith(".json") and name not in names():
    raise UserError(
      f"There is no preset {name!r}; choose one of: {', '.join(names())}, or name a .json file."
    )
  path = Path(name).expanduser() if name.endswith(".json") else SHIPPED / f"{name}.json"
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
    if not isinstance(found.get(key, {} if key == "calibration" else None), kind):
      raise UserError(f"The preset {path} needs {key!r}, {_WORDS[kind]}.")
  preset = Preset(**found)
  try:
    sampling.configure(sampling.find(preset.sampler), preset.knobs)
  except UserError as error:
    raise UserError(f"The preset {path} cannot be used: {error}") from None
  return preset


_WORDS = {str: "a text", dict: "an object"}


def _refuse(constant: str):
  raise ValueError(f"{constant} is no number")


def save(path: str | Path, preset: Preset) -> None:
  """Write a preset whole or not at all. Raises UserError where it cannot be written."""
  path = Path(path).expanduser()
  part = path.with_name(path.name + ".part")
  rows = {key: value for key, value in dataclasses.asdict(preset).items() if value != {}}
  rows["knobs"] = preset.knobs
  try:
    part.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
  except OSError as error:
    part.unlink(missing_ok=True)
    raise UserError(f"The preset {path} cannot be written ({error.strerror}).") from None
