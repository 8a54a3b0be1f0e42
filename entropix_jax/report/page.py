"""The web page of traces: one HTML document that holds every number of the traces as JSON.

Why: the browser draws from these numbers alone: no network is needed, nothing unmeasured can appear.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from entropix_jax.report import COLOURS, ENTROPY_STEPS, TINTS
from entropix_jax.report.reader import match

ASSETS = Path(__file__).parent / "assets"

# Upper bounds of all colour steps but the last.
STEPS = {"entropy": ENTROPY_STEPS, "varentropy": (0.05, 0.3, 1.0, 2.5, 5.0)}
UNITS = {
  "logprob": "nats",
  "logprob_law": "nats",
  "entropy": "nats",
  "varentropy": "nats²",
  "self_certainty": "nats",
  "confidence": "nats",
  "gap": "0 to 1",
}
ATTENTION = {
  "attn_ent": "nats",
  "score_mag": "nats",
  "attn_varent": "nats²",
  "attn_spread": "nats²",
  "attn_ent_norm": "0 to 1",
  "head_dispersion": "0 to 1",
  "agreement": "0 to 1",
}


def _text(name: str) -> str:
  return (ASSETS / name).read_text(encoding="utf-8")


def styles(*more: str) -> str:
  """The style sheet that reports and the live page share, with the colours of the steps, and further sheets after it."""
  ramp = "".join(
    f"--step{i}: {colour}; --tint{i}: {tint}; "
    for i, (colour, tint) in enumerate(zip(COLOURS, TINTS, strict=True))
  )
  sheets = map(_text, ("vendor/uPlot.min.css", "report.css", *more))
  return "\n".join([f":root {{ {ramp}}}", *sheets])


def modules(entry: str) -> list[str]:
  """A module of the assets after all that it imports, each once."""
  found: dict[str, None] = {}
  for name in re.findall(r'^import .*? from "\./(.*?)";$', _text(entry), re.MULTILINE):
    found |= dict.fromkeys(modules(name))
  return [*found, entry]


def script(entry: str) -> str:
  """A module and all that it imports as one script, for a document that needs no other file."""
  licence = f"/*\n{_text('vendor/uPlot.LICENSE')}*/\n"
  parts = [
    re.sub(r"^import .*\n|^export ", "", _text(name), flags=re.MULTILINE) for name in modules(entry)
  ]
  return "\n".join(['"use strict";', licence + _text("vendor/uPlot.iife.min.js"), *parts])


def page(runs: Sequence[dict], titles: Sequence[str], prompt: int = 0) -> str:
  """One HTML document of traces from `reader.read`, opened at the prompt of that index in `match`."""
  data = {
    "runs": [{"name": title} | run for title, run in zip(titles, runs, strict=True)],
    "groups": match(runs),
    "first": prompt,
    "steps": STEPS,
    "units": UNITS | ATTENTION,
    "attention": list(ATTENTION),
  }
  parts = {
    "title": html.escape(f"Trace of {', '.join(titles)}"),
    "css": styles(),
    "js": script("report.js"),
    # A `<` in a trace must not be able to end the element that holds the data.
    "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
  }
  template = (ASSETS / "report.html").read_text(encoding="utf-8")
  return re.sub(r"\{\{(\w+)\}\}", lambda hole: parts[hole[1]], template)
