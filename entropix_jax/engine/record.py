"""The record of a dispatch: one packed int32 array, so that one copy to the host brings everything.

A row of the array is one token of one row of the batch (or no token, where its flags are 0): integers first,
then the bits of float32 numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import metrics
from entropix_jax.engine.setup import Setup

# Flags of a packed row. LATER: from the same forward pass as the token before it. ACCEPTED: it had been
# drafted. FORCED: chosen by the caller, not drawn. WAITS: no token; the row waits for `steer`. BROKEN: no
# token; the row has ended because its logits are not finite. The bits from
# DRAFTED on, at the first token of a pass: how many tokens had been drafted for it.
EMITTED, STOPPED, EXHAUSTED, UNCERTAIN, INJECTED, FORK = 1, 2, 4, 8, 16, 32
LATER, ACCEPTED, FORCED, WAITS, BROKEN, DRAFTED = 64, 128, 256, 512, 1024, 11

HEAD = ("id", "flags", "branch")
_RAW = ("logprob", "logprob_law", "entropy", "varentropy")
CONFIDENCE = tuple(field.name for field in dataclasses.fields(metrics.Confidence))
ATTENTION = tuple(field.name for field in dataclasses.fields(metrics.AttnStats))


def numbers(setup: Setup) -> tuple[str, ...]:
  """Names of the numbers reported per token, in order; alternatives are not among them."""
  attention = ATTENTION if setup.config.attn_stats != "off" else ()
  confidence = CONFIDENCE if setup.config.confidence else ()
  own = (*_RAW, *confidence, *attention, *setup.sampler_stats, *setup.model.stats)
  assert len(set(own) | set(HEAD)) == len(own) + len(HEAD), "a statistic has the name of another"
  return own


def own(setup: Setup, sampler: str) -> tuple[int, ...] | None:
  """Indices into `numbers` of what a row with this sampler of a union reports; None: all."""
  kinds = setup.kind_stats
  if len(kinds) == 1:
    return None
  foreign = {*setup.sampler_stats} - kinds[sampler or next(iter(kinds))]
  return tuple(i for i, name in enumerate(numbers(setup)) if name not in foreign)


def columns(setup: Setup) -> tuple[str, ...]:
  """Names of the columns of a record."""
  ids = (f"top_id_{i}" for i in range(setup.top))
  logprobs = (f"top_logprob_{i}" for i in range(setup.top))
  return (*HEAD, *ids, *numbers(setup), *logprobs)


def pack(ints: list[jax.Array], floats: list[jax.Array]) -> jax.Array:
  """record_BR of the columns, each (B,)."""
  f_BR = jnp.stack([x.astype(jnp.float32) for x in floats], axis=-1)
  i_BR = jnp.stack([x.astype(jnp.int32) for x in ints], axis=-1)
  return jnp.concatenate([i_BR, jax.lax.bitcast_convert_type(f_BR, jnp.int32)], axis=-1)


def unpack(setup: Setup, record: np.ndarray) -> dict[str, np.ndarray]:
  """Column name -> values, of a record array (..., R) fetched from the device."""
  n = len(HEAD) + setup.top
  floats = np.ascontiguousarray(record[..., n:]).view(np.float32)
  values = [*np.moveaxis(record[..., :n], -1, 0), *np.moveaxis(floats, -1, 0)]
  return dict(zip(columns(setup), values, strict=True))
