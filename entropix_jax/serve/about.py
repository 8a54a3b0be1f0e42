"""What a page needs to know of the server: its samplers and their knobs, presets, methods, units, and the head of a trace.

What a knob means is the comment beside it in the code, so that it is written once.
"""

import functools
import inspect
import re
from typing import Any

from entropix_jax import decoding, sampling
from entropix_jax.decoding import select
from entropix_jax.report.page import ATTENTION, STEPS, UNITS
from entropix_jax.report.reader import THRESHOLDS
from entropix_jax.sampling import presets
from entropix_jax.serve.calls import GROUPS, usual
from entropix_jax.serve.schema import TOP
from entropix_jax.session import Session

_FIELD = re.compile(r"  (\w+): .+? = .+?(?:  # (.+))?$")
_KINDS = {bool: "switch", int: "integer", float: "number", str: "text"}
_HUGE = 1e8  # beyond it a default stands for "no bound"


def info(session: Session, name: str) -> dict[str, Any]:
  """The body of /v1/entropix/info.

  Args:
    name: of the model, for clients.
  """
  settings, offered = session.settings, session.samplers
  head = session.header([], settings.engine.max_seq_len, 0)
  for key in (
    "config",
    "checkpoint",
    "seed",
    "max_new_tokens",
    "prompts",
  ):  # paths, or not known yet
    del head[key]
  fitting = presets.for_model(session.model.cfg)
  return {
    "model": name,
    "chat": session.format is not None,
    "context": settings.engine.max_seq_len,
    "rows": settings.engine.batch_size,
    "top": TOP,
    "sampler": settings.sampler,
    "params": settings.knobs,
    "samplers": {one: _sampler(session, one) for one in offered},
    "presets": {
      one: {"sampler": p.sampler, "about": p.about, "knobs": p.knobs, "fits": one == fitting}
      for one, p in ((one, presets.load(one)) for one in presets.names())
      if p.sampler in offered
    },
    "groups": {one: _method(one) for one in GROUPS},
    "units": UNITS | ATTENTION,
    "attention": list(ATTENTION),
    "steps": STEPS,
    "header": head | {"checkpoint": name},
  }


def meanings(config: type) -> dict[str, str]:
  """Field -> the comment after it, or the one above it, of a dataclass of numbers."""
  found, above = {}, []
  for line in inspect.getsource(config).splitlines():
    if line.startswith("  # "):
      above.append(line.removeprefix("  # "))
      continue
    if field := _FIELD.match(line):
      found[field[1]] = field[2] or " ".join(above)
    above = []
  return found


def _first_sentence(text: str | None) -> str:
  return " ".join((text or "").split("\n\n")[0].split())


def _sampler(session: Session, name: str) -> dict[str, Any]:
  module = sampling.find(name)
  own = usual(session, name)
  defaults, said = sampling.knobs(module), meanings(module.Config)
  ranges, quantiles = getattr(module, "RANGES", {}), sampling.quantiles(module)
  knobs = {}
  for knob, default in defaults.items():
    least, most = ranges.get(knob, (None, None))
    kind = "list" if default == "" else _KINDS[type(default)]
    knobs[knob] = {"kind": kind, "default": default, "least": least, "most": most}
    knobs[knob] |= {"about": said[knob], "quantile": knob in quantiles}
    knobs[knob]["off"] = kind == "number" and abs(default) >= _HUGE
  lines = {axis: [k for k in names if k in knobs] for axis, names in THRESHOLDS.items()}
  return {
    "about": _first_sentence(module.__doc__),
    "branches": list(module.BRANCHES),
    "params": own,
    "knobs": knobs,
    "thresholds": {
      axis: {k: own.get(k, defaults[k]) for k in names} for axis, names in lines.items()
    },
  }


@functools.cache
def _method(name: str) -> dict[str, Any]:
  module = decoding.find(name)
  said = meanings(module.Config)
  options = {}
  for option, default in decoding.options(name).items():
    options[option] = {"kind": _KINDS[type(default)], "default": default, "about": said[option]}
    if option == "rule":
      options[option]["choices"] = sorted(rule for rule in select.RULES if rule != "judge")
  return {"about": _first_sentence(module.__doc__), "options": options}
