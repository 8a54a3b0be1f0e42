"""entropix_jax: Llama inference in JAX with a sampler that watches how uncertain the model is.

The letters used in every name, einsum, weight table and mesh rule:

  B rows (batch slots)     N query heads            V vocabulary
  T query tokens           K key/value heads        C candidates kept by a truncation
  S cache positions        G query heads per kv head, N / K
  D width                  H head size              L layers
  F ffn width              Q query channels, N H    J key channels, K H
  E stop ids               R columns of a record    M shapes (Dirichlet support)
                           a digit is an axis of that size

Entropies are in nats, varentropies in nats squared. Start reading at WORKSPACE.md, and running with

  from entropix_jax import LLM
  print(LLM.demo().generate("Tell me a story about a kite."))
"""

import importlib
import os

# XLA logs an alarm, "Very slow compile?", for any large model. What goes wrong is raised as an exception.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "UserError"]
_HOMES = {"LLM": "llm", "Completion": "llm", "UserError": "errors"}


def __getattr__(name: str):
  """What the package has to offer, imported when it is asked for: JAX takes a second."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
