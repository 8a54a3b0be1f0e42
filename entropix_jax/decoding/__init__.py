"""Decoding with more than one path, or more than one model; the folder is the registry of methods.

A method `decoding/NAME.py` has
  Config   a frozen dataclass of options that checks itself; they are the keys of config.decoding
           (`options` and `configure` where they depend on one another, as in joint.py)
and either
  Group    several continuations of one request, and a choice among them (groups.py says what it may do)
or an Engine that comes by its tokens in another way (speculative.py, joint.py), which any Group can use.

  engine = Engine(...)
  group = best_of_n.Group(Request(ids), best_of_n.Config(n=8))
  *tokens, outcome = groups.run(engine, tokenizer, [group])

Why: search and voting are controllers over an engine's verbs. drafters.py, groups.py, mixing/ and select.py
are shared; a method never imports another one.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from entropix_jax.errors import UserError

PLAIN = "plain"  # one path, one pass a token; no module
_SHARED = ("drafters", "groups", "mixing", "race", "select", "verify")


def names() -> list[str]:
  """Every method, the plain one first."""
  return [PLAIN, *sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)]


def find(name: str) -> ModuleType:
  """The module of a method that is not the plain one. Raises UserError that lists what there is."""
  if name not in names()[1:]:
    raise UserError(f"There is no decoding method {name!r}; choose one of: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")


def options(name: str) -> dict[str, Any]:
  """Name -> default of every option of a method."""
  if name == PLAIN:
    return {}
  module = find(name)
  if hasattr(module, "options"):
    return module.options()
  return {field.name: field.default for field in dataclasses.fields(module.Config)}


def configure(name: str, values: dict[str, Any]) -> Any:
  """The method's Config with some options set; None for the plain one.

  Raises:
    UserError: no such method, an option it does not have, or a value it cannot use.
  """
  known = options(name)
  for key, value in values.items():
    if key not in known:
      others = ", ".join(method for method in names() if key in options(method))
      if name == PLAIN and others:
        raise UserError(
          f"config.decoding.{key} does nothing alone; choose a method that has it with "
          f"config.decoding.name: {others}."
        )
      has = ", ".join(known) or "none"
      raise UserError(f"The decoding method {name!r} has no option {key!r}; it has: {has}.")
    kind = type(known[key])
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not good or (isinstance(value, bool) and kind is not bool):
      raise UserError(
        f"config.decoding.{key} is {value!r}; give it a value of the kind {kind.__name__}."
      )
  if name == PLAIN:
    return None
  module = find(name)
  return module.configure(values) if hasattr(module, "configure") else module.Config(**values)
