"""What a row may do besides emitting a token from its sampler's law, whatever the sampler.

  inject  emit a passage the user gave ("Let me think.") where the model is open and undecided
  stop    end the text, finish reason "uncertain", after several lost tokens in a row
  fork    mark a token as a good place to try several continuations; who decodes may act on it

Why: the ancestors wrote these into samplers, with one token id of one tokenizer. Here they are off by
default, take ids that the model's own tokenizer made, and keep the law honest: an injected token's law
is certainty, and the sampler's state goes on as after any token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.metrics import Spread
from entropix_jax.rows import any_row
from entropix_jax.sampling import LIST, NO_IDS, Ids

NEVER = 1e9
RANGES = {"inject_every": (0, 2**31 - 1), "inject_most": (0, 2**31 - 1), "stop_run": (1, 2**31 - 1)}


@struct.dataclass
class Config:
  """Settings of a row; as they come, nothing ever happens."""

  inject: Ids = NO_IDS  # the passage; none: never injected
  inject_ent: float = NEVER  # nats; above, with inject_varent: inject
  inject_varent: float = NEVER  # nats^2; below
  inject_every: int = 64  # tokens between the end of a passage and the next, at least
  inject_most: int = 1  # passages in one text

  stop_ent: float = NEVER  # nats; above, with stop_varent: a lost token
  stop_varent: float = -NEVER  # nats^2; above
  stop_run: int = 3  # lost tokens in a row that end the text

  fork_ent: float = NEVER  # nats; above, with fork_varent: marked
  fork_varent: float = -NEVER  # nats^2; above


@struct.dataclass
class State:
  """Where a row is in a passage, and what it may still do."""

  cursor_B: jax.Array  # int32; index of the next token of the passage; -1 while none is emitted
  wait_B: jax.Array  # int32; tokens until a passage may begin
  left_B: jax.Array  # int32; passages that may still begin
  lost_B: jax.Array  # int32; lost tokens in a row


@struct.dataclass
class Verdict:
  """What becomes of the token that is about to be drawn."""

  law_BV: jax.Array
  injected_B: jax.Array  # bool; it is of the passage
  uncertain_B: jax.Array  # bool; it is the last one
  fork_B: jax.Array  # bool; it is marked


def init(cfg: Config, B: int) -> State:
  """The state of B rows that have emitted nothing."""
  zero_B = jnp.zeros((B,), jnp.int32)
  return State(zero_B - 1, zero_B, jnp.broadcast_to(cfg.inject_most, (B,)) + zero_B, zero_B)


def step(cfg: Config, state: State, raw: Spread, law_BV: jax.Array) -> tuple[Verdict, State]:
  """The verdict on a law, from the raw model's entropy and varentropy, and the state after it."""
  length_B = jnp.sum(cfg.inject.id_X >= 0, axis=-1)
  begins_B = (raw.ent > cfg.inject_ent) & (raw.varent < cfg.inject_varent) & (length_B > 0)
  begins_B &= (state.cursor_B < 0) & (state.wait_B == 0) & (state.left_B > 0)
  cursor_B = jnp.where(begins_B, 0, state.cursor_B)
  injected_B = cursor_B >= 0
  next_B = jnp.take_along_axis(cfg.inject.id_X, jnp.clip(cursor_B, 0, LIST - 1)[:, None], axis=-1)

  def certain(law_BV):
    return jnp.where(jnp.arange(law_BV.shape[-1]) == next_B, 0.0, -jnp.inf)

  law_BV = any_row(injected_B, certain, lambda law_BV: law_BV, law_BV)
  ends_B = injected_B & (cursor_B + 1 >= length_B)
  lost_B = (raw.ent > cfg.stop_ent) & (raw.varent > cfg.stop_varent)
  lost_B = jnp.where(lost_B, state.lost_B + 1, 0)
  verdict = Verdict(
    law_BV=law_BV,
    injected_B=injected_B,
    uncertain_B=lost_B >= cfg.stop_run,
    fork_B=(raw.ent > cfg.fork_ent) & (raw.varent > cfg.fork_varent) & ~injected_B,
  )
  return verdict, State(
    cursor_B=jnp.where(injected_B & ~ends_B, cursor_B + 1, -1),
    wait_B=jnp.where(ends_B, cfg.inject_every, jnp.maximum(state.wait_B - 1, 0)),
    left_B=state.left_B - begins_B.astype(jnp.int32),
    lost_B=lost_B,
  )
