"""From a config file and flags to the facts a run needs, with every key checked.

Why: `--config=configs/X.py --config.sampler.low_ent=0.2` is how people drive a run, so each key is
listed once, here, with the default of the code that uses it. A sampler knob left alone keeps its
preset's value or else its sampler's default; a knob the chosen sampler does not have is an error that
names those it has.
"""

import dataclasses
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from entropix_jax import decoding, sampling
from entropix_jax.checkpoints import checkpoint
from entropix_jax.config import PRESETS, EngineConfig, MeshConfig, ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.sampling import actions, presets

FORMATS = ("auto", "chat", "plain")
ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT_SAMPLER = "quadrant"  # where neither a name nor a preset says which


@dataclasses.dataclass(frozen=True)
class Settings:
  """A run's configuration, resolved."""

  checkpoint: str  # folder in Hugging Face layout
  model: str  # key of config.PRESETS: the shape used where there is no checkpoint
  format: str  # "chat", "plain", or "auto": chat when the checkpoint ends its turns by itself
  system: str  # system message of a chat; none when empty
  template: str  # what a plain prompt is put into
  stop: tuple[str, ...]  # strings that end a text; it is what stands before
  engine: EngineConfig
  mesh: MeshConfig
  method: str  # of decoding
  decoding: Any  # the method's Config; None for the plain one
  sampler: str
  preset: str  # name or file of the preset; none when empty
  knobs: dict[str, Any]  # the sampler knobs that were set, by the preset or by themselves
  actions: dict[str, Any]  # the settings of actions.py that were set; `inject` is text here


def base(*, checkpoint: str, model: str = "", **engine: Any) -> ml_collections.ConfigDict:
  """Every key a config file may set, at its default; what config files start from."""
  # A name left alone is told from one that was set: a preset may set it, but not against the user.
  knobs: dict[str, Any] = {"name": config_dict.placeholder(str), "preset": ""}
  for name in sampling.names():
    for knob, default in sampling.knobs(sampling.find(name)).items():
      flag = knobs.setdefault(knob, config_dict.placeholder(type(default)))
      if flag.get_type() is not type(default):
        raise UserError(
          f"The knob {knob!r} of the sampler {name!r} is a {type(default).__name__} and another "
          "sampler's is not; rename it."
        )
  ways: dict[str, Any] = {"name": config_dict.placeholder(str)}
  for name in decoding.names():
    for option, default in decoding.options(name).items():
      flag = ways.setdefault(option, config_dict.placeholder(type(default)))
      if flag.get_type() is not type(default):
        raise UserError(
          f"The option {option!r} of the decoding method {name!r} is a {type(default).__name__} and "
          "another method's is not; rename it."
        )
  return ml_collections.ConfigDict(
    {
      "checkpoint": checkpoint,
      "model": model,
      "format": "auto",
      "system": "",
      "template": "{}",
      "stop": (),
      "engine": dataclasses.asdict(EngineConfig(**engine)),
      "mesh": dataclasses.asdict(MeshConfig()),
      "decoding": ways,
      "sampler": knobs,
      "actions": {
        knob: config_dict.placeholder(type(default))
        for knob, default in sampling.knobs(actions).items()
        if knob != "fork_wait"  # of no use but to who decodes
      },
      "runs": {},  # name -> keys, as in here, that a run sets; for --compare and benchmarks
    }
  )


def resolve(config: ml_collections.ConfigDict, ways: bool = False) -> Settings:
  """Settings from a config, every value checked. Raises UserError for one that cannot be used.

  Args:
    ways: whether the caller heeds config.decoding; others refuse it.
  """
  known = base(checkpoint="")
  for key in config:
    if key not in known:
      raise UserError(f"The config has the unknown key {key!r}; known are: {', '.join(known)}.")
  if config.format not in FORMATS:
    raise UserError(f"config.format is {config.format!r}; use one of: {', '.join(FORMATS)}.")
  if config.model and config.model not in PRESETS:
    raise UserError(f"config.model is {config.model!r}; use one of: {', '.join(PRESETS)}.")
  if config.template.count("{}") != 1:
    raise UserError(
      f"config.template is {config.template!r}; it must hold {{}} once, for the prompt."
    )
  if not all(isinstance(text, str) and text for text in config.stop):
    raise UserError(
      f"config.stop is {tuple(config.stop)!r}; it is a tuple of strings, none of which is empty."
    )
  method, options = _method(config.decoding)
  if method != decoding.PLAIN and not ways:
    raise UserError("This decodes plainly, and config.decoding would do nothing; leave it out.")
  sampler, knobs = _sampler(config.sampler)
  return Settings(
    checkpoint=config.checkpoint,
    model=config.model,
    format=config.format,
    system=config.system,
    template=config.template,
    stop=tuple(config.stop),
    engine=_section(EngineConfig, config.engine, "engine"),
    mesh=_section(MeshConfig, config.mesh, "mesh"),
    method=method,
    decoding=options,
    sampler=sampler,
    preset=config.sampler.preset,
    knobs=knobs,
    actions=_actions(config.actions),
  )


def named(config: ml_collections.ConfigDict, run: str) -> ml_collections.ConfigDict:
  """The config with the keys of one of its runs set. Raises UserError that lists the runs."""
  if run not in config.runs:
    known = ", ".join(config.runs) or "none; a config file sets them, see configs/demo.py"
    raise UserError(f"The config has no run {run!r}; it has: {known}.")
  out = config.copy_and_resolve_references()

  def put(at: ml_collections.ConfigDict, values: ml_collections.ConfigDict, path: str) -> None:
    for key, value in values.items():
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


def shape(chosen: Settings) -> tuple[ModelConfig, str]:
  """(the model, its name): the checkpoint's, or where there is no such folder that of config.model."""
  folder = Path(chosen.checkpoint).expanduser()
  if chosen.model and not folder.is_dir():
    return PRESETS[chosen.model], chosen.model
  return checkpoint.load_config(folder), folder.resolve().name


def _method(section: ml_collections.ConfigDict) -> tuple[str, Any]:
  """(name, its Config) that the decoding section stands for, checked."""
  chosen = {k: v for k, v in section.items() if k != "name" and v is not None}
  name = section.name or decoding.PLAIN
  return name, decoding.configure(name, chosen)


def _sampler(section: ml_collections.ConfigDict) -> tuple[str, dict[str, Any]]:
  """(name, knobs) that the sampler section stands for, checked."""
  name, preset = section.name, section.preset
  knobs = {k: v for k, v in section.items() if k not in ("name", "preset") and v is not None}
  if preset:
    found = presets.load(preset)
    if name not in (None, found.sampler):
      raise UserError(
        f"config.sampler.preset={preset} is for the sampler {found.sampler!r} and "
        f"config.sampler.name is {name!r}; set one of them."
      )
    name, knobs = found.sampler, found.knobs | knobs
  name = DEFAULT_SAMPLER if name is None else name
  sampling.configure(sampling.find(name), knobs)
  return name, knobs


def _actions(section: ml_collections.ConfigDict) -> dict[str, Any]:
  """What is set of it, checked but for the text to inject, which needs a tokenizer."""
  chosen = {k: v for k, v in section.items() if v is not None}
  sampling.configure(actions, {k: v for k, v in chosen.items() if k != "inject"})
  if chosen.get("inject_ent") is not None and not chosen.get("inject"):
    raise UserError(
      "config.actions.inject_ent is set but there is no text in config.actions.inject."
    )
  if chosen.get("inject") and chosen.get("inject_ent") is None:
    raise UserError("config.actions.inject needs config.actions.inject_ent: above how many nats.")
  return chosen


def _section(kind, values: ml_collections.ConfigDict, name: str):
  known = [field.name for field in dataclasses.fields(kind)]
  for key in values:
    if key not in known:
      raise UserError(f"config.{name} has the unknown key {key!r}; known are: {', '.join(known)}.")
  return kind(**values.to_dict())
