"""What a row may do besides emitting a token from its sampler's law, whatever the sampler.

  inject  emit a passage the user gave ("Let me think.") where the model is open and undecided
  stop    end the text, finish reason "uncertain", after several lost tokens in a row
  fork    mark a token as a good place to try several continuations, or wait there, before it is drawn,
          for whoever decodes to say how to go on (Engine.steer)
  force   a token that whoever decodes has chosen

Why: the ancestors wrote these into samplers, with one token id of one tokenizer. Here they are off by
default, take ids that the model's own tokenizer made, and keep the law honest: an injected token's law
is certainty, and the sampler's state goes on as after any token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.metrics import Spread
from entropix_jax.rowwise import any_row
from entropix_jax.sampling import LIST, NO_IDS, Ids

NEVER = 1e9
_MANY = 2**31 - 1
RANGES = {"inject_every": (0, _MANY), "inject_most": (0, _MANY)}
RANGES |= {"stop_run": (1, _MANY), "fork_every": (1, _MANY)}


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
  fork_every: int = 1  # tokens from one mark to the next, at least
  fork_wait: bool = False  # wait there


@struct.dataclass
class State:
  """Where a row is in a passage, and what it may still do."""

  cursor_B: jax.Array  # int32; index of the next token of the passage; -1 while none is emitted
  wait_B: jax.Array  # int32; tokens until a passage may begin
  left_B: jax.Array  # int32; passages that may still begin
  lost_B: jax.Array  # int32; lost tokens in a row
  calm_B: jax.Array  # int32; tokens until one may be marked
  goes_on_B: jax.Array  # bool; it has been told to go on from a wait: not to wait there again
  forced_B: jax.Array  # int32; the next token, where it has been chosen; else -1


@struct.dataclass
class Verdict:
  """What becomes of the token that is about to be drawn."""

  law_BV: jax.Array
  injected_B: jax.Array  # bool; it is of the passage
  uncertain_B: jax.Array  # bool; it is the last one
  fork_B: jax.Array  # bool; it is marked
  waits_B: jax.Array  # bool; it is not to be drawn yet
  forced_B: jax.Array  # bool; it has been chosen by who decodes


def init(cfg: Config, B: int) -> State:
  """The state of B rows that have emitted nothing."""
  zero_B = jnp.zeros((B,), jnp.int32)
  left_B = jnp.broadcast_to(cfg.inject_most, (B,)) + zero_B
  return State(zero_B - 1, zero_B, left_B, zero_B, zero_B, zero_B > 0, zero_B - 1)


def step(cfg: Config, state: State, raw: Spread, law_BV: jax.Array) -> tuple[Verdict, State]:
  """The verdict on a law, from the raw model's entropy and varentropy, and the state after it."""
  length_B = jnp.sum(cfg.inject.id_X >= 0, axis=-1)
  forced_B = state.forced_B >= 0
  begins_B = (raw.ent > cfg.inject_ent) & (raw.varent < cfg.inject_varent) & (length_B > 0)
  begins_B &= (state.cursor_B < 0) & (state.wait_B == 0) & (state.left_B > 0)
  # A row that goes through its text again is forced along its own passages.
  begins_B &= ~forced_B | (state.forced_B == cfg.inject.id_X[:, 0])
  cursor_B = jnp.where(begins_B, 0, state.cursor_B)
  injected_B = cursor_B >= 0
  next_B1 = jnp.take_along_axis(cfg.inject.id_X, jnp.clip(cursor_B, 0, LIST - 1)[:, None], axis=-1)
  next_B1 = jnp.where(forced_B[:, None], state.forced_B[:, None], next_B1)

  def certain(law_BV):
    return jnp.where(jnp.arange(law_BV.shape[-1]) == next_B1, 0.0, -jnp.inf)

  law_BV = any_row(injected_B | forced_B, certain, lambda law_BV: law_BV, law_BV)
  ends_B = injected_B & (cursor_B + 1 >= length_B)
  lost_B = (raw.ent > cfg.stop_ent) & (raw.varent > cfg.stop_varent)
  lost_B = jnp.where(lost_B, state.lost_B + 1, 0)
  fork_B = (raw.ent > cfg.fork_ent) & (raw.varent > cfg.fork_varent) & ~injected_B
  fork_B &= state.calm_B == 0
  verdict = Verdict(
    law_BV=law_BV,
    injected_B=injected_B,
    uncertain_B=lost_B >= cfg.stop_run,
    fork_B=fork_B,
    waits_B=fork_B & cfg.fork_wait & ~state.goes_on_B,
    forced_B=forced_B,
  )
  return verdict, State(
    cursor_B=jnp.where(injected_B & ~ends_B, cursor_B + 1, -1),
    wait_B=jnp.where(ends_B, cfg.inject_every, jnp.maximum(state.wait_B - 1, 0)),
    left_B=state.left_B - begins_B.astype(jnp.int32),
    lost_B=lost_B,
    calm_B=jnp.where(fork_B, cfg.fork_every - 1, jnp.maximum(state.calm_B - 1, 0)),
    goes_on_B=jnp.zeros_like(state.goes_on_B),
    forced_B=jnp.full_like(state.forced_B, -1),
  )
