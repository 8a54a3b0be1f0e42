"""The settings of a run, with every key checked, wherever they come from: config files, flags or keyword arguments.

Why: a setting has one name, one default and one check in all three. A sampler knob that is not set keeps
its preset's value, or else its sampler's default; a knob that the chosen sampler does not have is an error
that names those it has. Flags of all samplers share one namespace, so `knobs` and `options` refuse
a name that means two things.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from entropix_jax import decoding, sampling
from entropix_jax.checkpoints import checkpoint, hub
from entropix_jax.config import PRESETS, EngineConfig, MeshConfig, ModelConfig
from entropix_jax.decoding import joint, mixing
from entropix_jax.errors import UserError, nearest
from entropix_jax.sampling import actions, presets

FORMATS = ("auto", "chat", "plain")
ASSETS = Path(__file__).parent / "assets"
DEFAULT_SAMPLER = "quadrant"  # where neither a name nor a preset says which
AUTO = "auto"  # the preset that ships for the model, if the sampler is the default one
NO_PRESET = ("", "none")
UNFITTED = (
  "The sampler's thresholds were set for another model: scripts/calibrate.py fits them to this one, and "
  "preset=quantile to each text; preset=none keeps them."
)
DEFAULTS = {
  "model": "", "format": "auto", "chat_template": "", "system": "", "template": "{}", "stop": (),
  "heal": False,
}  # fmt: skip
SECTIONS = ("chat", "engine", "mesh", "decoding", "sampler", "actions")

# Knobs that several samplers have with different defaults or ranges, and what each means in all of them.
SAME_KNOBS = {
  "low_ent": "nats of entropy below which the model counts as sure",
  "min_p": "share of the best token's probability that a token needs",
  "top_k": "number of most likely tokens that stay",
  "top_p": "probability that the tokens which stay have together",
}
# The same for options of decoding methods, and for knobs of the ways to mix models.
SAME_OPTIONS = {
  "cut": "share of the best token's probability, under one model, that a token needs",
  "drafter": "what guesses tokens",
  "ent": "nats of the raw law above which the method acts",
  "n": "number of samples",
  "rule": "how texts are judged",
  "window": "tokens over which confidence is averaged",
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """A run's configuration, resolved."""

  checkpoint: str  # folder in Hugging Face layout
  model: str  # key of config.PRESETS: the shape used where there is no checkpoint
  format: str  # "chat", "plain", or "auto": chat when the checkpoint has a template or ends turns as Llama 3
  chat_template: str  # a file, or the name of one of the checkpoint's templates; "": the usual one
  chat: dict[str, Any]  # what the chat template reads besides the messages
  system: str  # system message of a chat; none when empty
  template: str  # what a plain prompt is put into
  stop: tuple[str, ...]  # strings that end a text; it is what stands before
  heal: bool  # a plain prompt may end inside a word (tokens/heal.py)
  engine: EngineConfig
  mesh: MeshConfig
  method: str  # of decoding
  decoding: Any  # the method's Config; None for the plain one
  sampler: str
  preset: str  # name or file of the preset; none when empty; AUTO until `fitted` knows the model
  knobs: dict[str, Any]  # the sampler knobs that were set, by the preset or by themselves
  actions: dict[str, Any]  # the settings of actions.py that were set; `inject` is text here


# -- one namespace -----------------------------------------------------------------------------


def knobs() -> dict[str, Any]:
  """Name -> a default of every knob of every sampler. Raises UserError for a name with two meanings."""
  tables = {f"sampler {name!r}": _facts(sampling.find(name)) for name in sampling.names()}
  return _united("knob", tables, SAME_KNOBS, "SAME_KNOBS")


def quantiles() -> set[str]:
  """Names of the knobs that may be a quantile in some sampler."""
  return {knob for name in sampling.names() for knob in sampling.quantiles(sampling.find(name))}


def options() -> dict[str, Any]:
  """Name -> a default of every option of every method. Raises UserError for a name with two meanings."""
  tables = {}
  for name in decoding.names():
    own = {k: v for k, v in decoding.options(name).items() if name != "joint" or k in joint.OWN}
    tables[f"method {name!r}"] = {k: (type(v), v, None) for k, v in own.items()}
  tables |= {f"mix {name!r}": _facts(mixing.find(name)) for name in mixing.names()}
  return _united("option", tables, SAME_OPTIONS, "SAME_OPTIONS")


def action_knobs() -> dict[str, Any]:
  """Name -> default of every setting of actions.py but `fork_wait`, which only methods can use."""
  return {k: v for k, v in sampling.knobs(actions).items() if k != "fork_wait"}


def _facts(module: ModuleType) -> dict[str, tuple]:
  ranges = getattr(module, "RANGES", {})
  return {k: (type(v), v, ranges.get(k)) for k, v in sampling.knobs(module).items()}


def _united(kind: str, tables: dict[str, dict[str, tuple]], same: Mapping, where: str) -> dict:
  found: dict[str, tuple[str, tuple]] = {}
  for owner, table in tables.items():
    for name, facts in table.items():
      first, before = found.setdefault(name, (owner, facts))
      if facts[0] is not before[0] or (facts != before and name not in same):
        raise UserError(
          f"The {first} and the {owner} both have the {kind} {name!r}, which differs in type, default or "
          f"range; rename one, or describe it in settings.{where} if it means the same in both."
        )
  return {name: facts[1] for name, (_, facts) in found.items()}


# -- resolving ---------------------------------------------------------------------------------


def resolve(values: Mapping[str, Any], ways: bool = True) -> Settings:
  """Settings from nested dictionaries, every value checked. Raises UserError for one that cannot be used.

  Args:
    values: the keys of a config file, of which only `checkpoint` is needed; None is a value not set.
    ways: whether the caller supports `decoding`; otherwise another method than plain is refused.
  """
  known = ("checkpoint", *DEFAULTS, *SECTIONS)
  for key in values:
    if key not in known:
      raise UserError(
        f"The config has the unknown key {key!r}{nearest(key, known)} Known are: {', '.join(known)}."
      )
  values = DEFAULTS | {key: value for key, value in values.items() if value is not None}
  for section in SECTIONS:
    if not isinstance(values.setdefault(section, {}), Mapping):
      raise UserError(f"config.{section} is {values[section]!r}; give it keys and values.")
  if values["format"] not in FORMATS:
    raise UserError(f"config.format is {values['format']!r}; use one of: {', '.join(FORMATS)}.")
  if values["model"] and values["model"] not in PRESETS:
    raise UserError(f"config.model is {values['model']!r}; use one of: {', '.join(PRESETS)}.")
  for name in ("chat_template", "system", "template"):
    if not isinstance(values[name], str):
      raise UserError(f"config.{name} is {values[name]!r}; give it text.")
  if values["template"].count("{}") != 1:
    raise UserError(
      f"config.template is {values['template']!r}; it must hold {{}} once, for the prompt."
    )
  for key, value in values["chat"].items():
    if not isinstance(value, str | bool | int | float):
      raise UserError(f"config.chat.{key} is {value!r}; give it text, a number, true or false.")
  stop = values["stop"]
  if not isinstance(stop, tuple | list) or not all(isinstance(x, str) and x for x in stop):
    raise UserError(f"config.stop is {stop!r}; it is a tuple of strings, none of which is empty.")
  if not isinstance(values["heal"], bool):
    raise UserError(f"config.heal is {values['heal']!r}; it is true or false.")
  method = values["decoding"].get("name") or decoding.PLAIN
  chosen = decoding.configure(method, _set(values["decoding"], "name"))
  if method != decoding.PLAIN and not ways:
    raise UserError("This decodes plainly, and config.decoding would do nothing; leave it out.")
  sampler, preset, set_knobs = _sampler(values["sampler"])
  return Settings(
    **{key: values[key] for key in ("checkpoint", *DEFAULTS) if key != "stop"},
    chat=dict(values["chat"]),
    stop=tuple(stop),
    engine=_section(EngineConfig, values["engine"], "engine"),
    mesh=_section(MeshConfig, values["mesh"], "mesh"),
    method=method,
    decoding=chosen,
    sampler=sampler,
    preset=preset,
    knobs=set_knobs,
    actions=_actions(values["actions"]),
  )


def sampler_name(name: str | None, preset: str) -> str:
  """The sampler that a name, a preset or neither stands for. Raises UserError where they disagree."""
  of_preset = None if preset in (AUTO, *NO_PRESET) else presets.load(preset).sampler
  if name is not None and of_preset not in (None, name):
    raise UserError(
      f"config.sampler.preset={preset} is for the sampler {of_preset!r} and "
      f"config.sampler.name is {name!r}; set one of them."
    )
  return name or of_preset or DEFAULT_SAMPLER


def shape(chosen: Settings) -> tuple[Settings, ModelConfig, str]:
  """(settings that fit the model, the model, its name), without its weights.

  The model is the checkpoint's, or where it is not on this machine that of config.model.
  """
  path = hub.local(chosen.checkpoint)
  if chosen.model and path is None:
    cfg, name = PRESETS[chosen.model], chosen.model
  else:
    cfg = checkpoint.load_config(path or hub.find(chosen.checkpoint))
    name = os.path.basename(os.path.realpath(os.path.expanduser(chosen.checkpoint)))
  return fitted(stored(chosen), cfg)[0], cfg, name


def _set(section: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """What is set of a section, but for these names."""
  return {k: v for k, v in section.items() if k not in names and v is not None}


def _sampler(section: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
  """(name, preset, knobs) that the sampler section stands for, checked."""
  preset = AUTO if section.get("preset") is None else section["preset"]
  name = sampler_name(section.get("name"), preset)
  if preset in NO_PRESET or (preset == AUTO and name != DEFAULT_SAMPLER):
    preset = ""
  of_preset = {} if preset in ("", AUTO) else presets.load(preset).knobs
  chosen = of_preset | _set(section, "name", "preset")
  sampling.configure(sampling.find(name), chosen)
  return name, preset, chosen


def stored(chosen: Settings) -> Settings:
  """Settings as the files of a checkpoint want them: int8 weights stay int8."""
  path = hub.local(chosen.checkpoint)
  if path is None or not checkpoint.stored_int8(path):
    return chosen
  return dataclasses.replace(chosen, engine=dataclasses.replace(chosen.engine, weights="int8"))


def fitted(chosen: Settings, cfg: ModelConfig) -> tuple[Settings, str | None]:
  """Replace AUTO by the shipped preset for this model; knobs that are set win.

  Returns:
    The settings, and a warning or None: there is one if no preset ships and no threshold is set.
  """
  if chosen.preset != AUTO:
    return chosen, None
  name = presets.for_model(cfg)
  if name is None:
    line = None if quantiles() & {*chosen.knobs} else UNFITTED
    return dataclasses.replace(chosen, preset=""), line
  knobs = presets.load(name).knobs | chosen.knobs
  return dataclasses.replace(chosen, preset=name, knobs=knobs), None


def _actions(section: Mapping[str, Any]) -> dict[str, Any]:
  """What is set of it, checked but for the text to inject, which needs a tokenizer."""
  chosen = _set(section)
  sampling.configure(actions, {k: v for k, v in chosen.items() if k != "inject"})
  if not isinstance(chosen.get("inject", ""), str):
    raise UserError(f"config.actions.inject is {chosen['inject']!r}; give it text.")
  if chosen.get("inject_ent") is not None and not chosen.get("inject"):
    raise UserError(
      "config.actions.inject_ent is set but there is no text in config.actions.inject."
    )
  if chosen.get("inject") and chosen.get("inject_ent") is None:
    raise UserError("config.actions.inject needs config.actions.inject_ent: above how many nats.")
  return chosen


def _section(kind, values: Mapping[str, Any], name: str):
  known = [field.name for field in dataclasses.fields(kind)]
  for key in values:
    if key not in known:
      raise UserError(
        f"config.{name} has the unknown key {key!r}{nearest(key, known)} Known are: {', '.join(known)}."
      )
  return kind(**values)
