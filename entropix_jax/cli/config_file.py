"""Config files: every key at its default, runs that set some of them, and the way to checked Settings.

Why: `--config=configs/X.py --config.sampler.low_ent=0.2` is how people drive a run, so each key is
listed once, here, with the default of the code that uses it.
"""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict

from entropix_jax import settings
from entropix_jax.config import EngineConfig, MeshConfig
from entropix_jax.errors import UserError


def base(*, checkpoint: str, model: str = "", **engine: Any) -> ml_collections.ConfigDict:
  """Every key that a config file may set, at its default; what config files start from.

  Args:
    engine: keys of config.engine.
  """

  def unset(defaults: dict[str, Any]) -> dict[str, Any]:
    # A name left alone is told from one that was set: a preset may set it, but not against the user.
    return {key: config_dict.placeholder(type(value)) for key, value in defaults.items()}

  return ml_collections.ConfigDict(
    {
      "checkpoint": checkpoint,
      **settings.DEFAULTS,
      "model": model,
      "chat": {},  # what the chat template reads: any key
      "engine": dataclasses.asdict(EngineConfig(**engine)),
      "mesh": dataclasses.asdict(MeshConfig()),
      "decoding": unset({"name": ""} | settings.options()),
      "sampler": {
        **unset({"name": ""}),
        "preset": settings.AUTO,
        **unset(settings.knobs()),
        **{key: config_dict.placeholder(object) for key in settings.quantiles()},  # or "q20"
      },
      "actions": unset(settings.action_knobs()),
      "runs": {},  # name -> keys, as in here, that a run sets; for --compare and benchmarks
    }
  )


def resolve(config: ml_collections.ConfigDict, ways: bool = False) -> settings.Settings:
  """Settings from a config, every value checked. Raises UserError for one that cannot be used.

  Args:
    ways: whether the caller heeds config.decoding; others refuse it.
  """
  return settings.resolve({k: v for k, v in config.to_dict().items() if k != "runs"}, ways)


def named(config: ml_collections.ConfigDict, run: str) -> ml_collections.ConfigDict:
  """The config with the keys of one of its runs set. Raises UserError that lists the runs."""
  if run not in config.runs:
    known = ", ".join(config.runs) or "none; a config file sets them, see configs/demo.py"
    raise UserError(f"The config has no run {run!r}; it has: {known}.")
  out = config.copy_and_resolve_references()
  out.chat.unlock()

  def put(at: ml_collections.ConfigDict, values: ml_collections.ConfigDict, path: str) -> None:
    for key, value in values.items():
      if path == "config.chat.":
        at[key] = value
        continue
      if key not in at:
        raise UserError(f"The run {run!r} sets the unknown key {path}{key}.")
      if isinstance(at[key], ml_collections.ConfigDict):
        put(at[key], value, f"{path}{key}.")
        continue
      try:
        at[key] = value
      except TypeError:
        raise UserError(
          f"The run {run!r} sets {path}{key} to {value!r}, which is of another kind."
        ) from None

  put(out, config.runs[run], "config.")
  return out
