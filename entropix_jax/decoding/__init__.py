"""Decoding methods that use several paths or several models; the folder is their registry.

A method `decoding/NAME.py` has
  Config   a frozen dataclass of options that checks itself; they are the keys of config.decoding
           (functions `options` and `configure` instead where options depend on one another, see joint.py)
and one of
  Group        several continuations of one request and the choice of one (groups.py has the contract)
  a decoder    another way to get the next tokens of rows (speculative.py), which any Group can use
  a model      other logits (joint.py), with which every decoder and Group works

  engine = Engine(setup, weights)
  group = best_of_n.Group(Request(ids), best_of_n.Config(n=8))
  *tokens, outcome = groups.run(engine, tokenizer, [group])

Why: search and voting only call public methods of an engine, so the engine does not depend on them. A method
never imports another method; what methods share is in the modules of _SHARED.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from entropix_jax.errors import UserError

PLAIN = "plain"  # one path, one forward pass per token; it has no module
_SHARED = ("drafters", "groups", "mixing", "race", "select", "verify")


def names() -> list[str]:
  """Names of all methods, the plain one first."""
  return [PLAIN, *sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)]


def find(name: str) -> ModuleType:
  """The module of a method other than the plain one. Raises UserError, which lists the names, if none."""
  if name not in names()[1:]:
    raise UserError(f"There is no decoding method {name!r}; choose one of: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")


def options(name: str) -> dict[str, Any]:
  """Name -> default of every option of a method. Raises UserError as `find`."""
  if name == PLAIN:
    return {}
  module = find(name)
  if hasattr(module, "options"):
    return module.options()
  return {field.name: field.default for field in dataclasses.fields(module.Config)}


def configure(name: str, values: dict[str, Any]) -> Any:
  """The method's Config with the options of `values`, the others at their defaults; None for the plain one.

  Raises:
    UserError: no such method, an option that it does not have, or a value that it cannot use.
  """
  known = options(name)
  for key, value in values.items():
    if key not in known:
      others = ", ".join(method for method in names() if key in options(method))
      if name == PLAIN and others:
        raise UserError(
          f"config.decoding.{key} needs a decoding method; choose a method that has it with "
          f"config.decoding.name: {others}."
        )
      has = ", ".join(known) or "none"
      raise UserError(f"The decoding method {name!r} has no option {key!r}; it has: {has}.")
    kind = type(known[key])
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not good or (isinstance(value, bool) and kind is not bool):
      raise UserError(f"config.decoding.{key} is {value!r}; give a value of type {kind.__name__}.")
  if name == PLAIN:
    return None
  module = find(name)
  return module.configure(values) if hasattr(module, "configure") else module.Config(**values)
