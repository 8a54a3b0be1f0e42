"""Actions: what a row may do besides drawing a token from its sampler's law, with any sampler.

  inject  emit a passage that the user gave ("Let me think.") at high entropy and low varentropy
  stop    end the text with the finish reason "uncertain" after `stop_run` uncertain tokens in a row
  fork    mark a token as a good place to try several continuations; with `fork_wait`, pause the row before
          this token is drawn, until the decoding method resumes it (Engine.steer)
  force   emit a token that the decoding method has chosen; it has no settings

Why: the original entropix had these inside its samplers, with one token id of one tokenizer. Here they
are off by default, take ids of the model's own tokenizer, and report the true law: an injected or forced
token has probability one, and the sampler's state is updated as after any token.
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
  """Settings of a row's actions; by default no action ever happens.

  An action needs both of its conditions, on entropy and on varentropy of the raw logits.
  """

  inject: Ids = NO_IDS  # the passage; empty: never inject
  inject_ent: float = NEVER  # nats; inject if the entropy is above this
  inject_varent: float = NEVER  # nats^2; and the varentropy below this
  inject_every: int = 64  # fewest tokens between the end of a passage and the next one
  inject_most: int = 1  # most passages in one text

  stop_ent: float = NEVER  # nats; a token is uncertain if the entropy is above this
  stop_varent: float = -NEVER  # nats^2; and the varentropy above this
  stop_run: int = 3  # uncertain tokens in a row that end the text

  fork_ent: float = NEVER  # nats; mark a token if the entropy is above this
  fork_varent: float = -NEVER  # nats^2; and the varentropy above this
  fork_every: int = 1  # fewest tokens from one mark to the next
  fork_wait: bool = False  # pause the row before a marked token


@struct.dataclass
class State:
  """Where each row is in its passage, and which actions it may still take."""

  cursor_B: jax.Array  # int32; index of the passage's next token; -1: no passage is being emitted
  wait_B: jax.Array  # int32; tokens until a passage may begin
  left_B: jax.Array  # int32; passages that may still begin
  lost_B: jax.Array  # int32; uncertain tokens in a row so far
  calm_B: jax.Array  # int32; tokens until one may be marked
  goes_on_B: jax.Array  # bool; resumed from a pause, so it does not pause at this token again
  forced_B: jax.Array  # int32; id of the next token if the decoding method has chosen it, else -1


@struct.dataclass
class Verdict:
  """What happens to the token that is about to be drawn."""

  law_BV: jax.Array  # the law to draw it from
  injected_B: jax.Array  # bool; it belongs to the passage
  uncertain_B: jax.Array  # bool; it is the text's last, finish reason "uncertain"
  fork_B: jax.Array  # bool; it is marked
  waits_B: jax.Array  # bool; the row pauses before it, and it is not drawn yet
  forced_B: jax.Array  # bool; the decoding method has chosen it


def init(cfg: Config, B: int) -> State:
  """The state of B rows that have emitted nothing."""
  zero_B = jnp.zeros((B,), jnp.int32)
  left_B = jnp.broadcast_to(cfg.inject_most, (B,)) + zero_B
  return State(zero_B - 1, zero_B, left_B, zero_B, zero_B, zero_B > 0, zero_B - 1)


def step(cfg: Config, state: State, raw: Spread, law_BV: jax.Array) -> tuple[Verdict, State]:
  """The verdict on a law, from entropy and varentropy of the raw logits, and the state after it."""
  length_B = jnp.sum(cfg.inject.id_X >= 0, axis=-1)
  forced_B = state.forced_B >= 0
  begins_B = (raw.ent > cfg.inject_ent) & (raw.varent < cfg.inject_varent) & (length_B > 0)
  begins_B &= (state.cursor_B < 0) & (state.wait_B == 0) & (state.left_B > 0)
  # A rewound row replays its tokens as forced ones; a passage among them counts as a passage again.
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
