"""Changes to rows between dispatches, as pure functions: insert, fork, steer, restart, replay and force."""

import jax
import jax.numpy as jnp

from entropix_jax.engine.request import unpack_row
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import (
  First,
  Prefix,
  State,
  begin,
  fresh,
  put_row,
  row_at,
  where_rows,
)
from entropix_jax.engine.step import is_past, next_token
from entropix_jax.model import kvcache
from entropix_jax.model.kvcache import Cache
from entropix_jax.sampling import draw

WAKE = 2  # a value of `change["live_B"]` in `steer`: go on from a fork where the row waits


def insert(
  setup: Setup, state: State, prefix: Prefix, history_1S, bits_1X, slot, *, share: bool
) -> State:
  """The State with a row at `slot` that continues `prefix` and has emitted nothing.

  Args:
    bits_1X: the row's request, by `pack_row`.
    share: do not copy the prefix, except for its last token: a rewound row feeds that one again.
  """
  row = begin(setup, unpack_row(setup, bits_1X), history_1S, prefix.len_1, prefix.last_1)
  if share:
    row = row.replace(shared_B=prefix.len_1 - 1)
    last = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, prefix.len_1[0] - 1, 1, axis=2), prefix.cache
    )
    cache = put_row(state.cache, last, slot)
  else:
    # A bucket may be longer than the cache; the slots after the prompt are padding.
    fits = jax.tree.map(lambda x, big: x[:, :, : big.shape[2]], prefix.cache, state.cache)
    cache = put_row(state.cache, fits, slot)
  first = put_row(state.first, First(prefix.logits_1V, prefix.attn), slot)
  return put_row(state.light, row, slot).replace(cache=cache, first=first)


def piece(cache: Cache, start, *, tokens: int) -> Cache:
  """The keys and values of some tokens of a prompt, from `start` on."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, tokens, axis=2), cache)


def put_piece(cache: Cache, piece: Cache, start) -> Cache:
  """The cache of a prompt with a piece at `start`."""
  return jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=2), cache, piece
  )


def fork(state: State, source, target, key) -> State:
  """The State with the row at `source` also at `target`, with another noise key."""
  first = state.first
  state = state.replace(first=None)
  state = put_row(state, row_at(state, source), target)
  key_12 = draw.row_keys(key["seed_B2"], key["stream_B"], key["attempt_B"])
  return state.replace(key_B2=put_row(state.key_B2, key_12, target), first=first)


def steer(state: State, change: dict[str, jax.Array], masks: tuple | None = None) -> State:
  """The State with `live_B`, `limit_B` and the next token changed where a value is not negative.

  Args:
    masks: (rows that get one, bool, `State.allowed_BX`, `lifted_BC` and `lift_BC`); they keep it until they get
      another. One without a bit ends the restriction.
  """

  def chosen(name, old_B):
    return jnp.where(change[name] < 0, old_B, change[name].astype(old_B.dtype))

  if masks is not None:
    new_B, *new = masks
    old = state.masked_B, state.allowed_BX, state.lifted_BC, state.lift_BC
    new = jnp.any(new[0] > 0, axis=1), *new
    names = ("masked_B", "allowed_BX", "lifted_BC", "lift_BC")
    state = state.replace(**dict(zip(names, where_rows(new_B, new, old), strict=True)))
  waiting = state.actions_state
  return state.replace(
    live_B=chosen("live_B", state.live_B),
    limit_B=chosen("limit_B", state.limit_B),
    actions_state=waiting.replace(
      forced_B=chosen("forced_B", waiting.forced_B),
      goes_on_B=waiting.goes_on_B | (change["live_B"] == WAKE),
    ),
  )


def restart(setup: Setup, state: State, slot, key) -> State:
  """The row at `slot` as it was before its first token; its cache and history stay."""
  one = row_at(state.light, slot)
  prompt_1 = one.len_B + 1 - one.out_B
  one = one.replace(
    len_B=prompt_1 - 1,
    token_B=jnp.take_along_axis(one.history_BS, prompt_1[:, None] - 1, axis=1)[:, 0],
    out_B=jnp.zeros_like(one.out_B),
    live_B=jnp.zeros_like(one.live_B),
    key_B2=draw.row_keys(key["seed_B2"], key["stream_B"], key["attempt_B"]),
  )
  return put_row(state.light, fresh(setup, one), slot).with_large(state)


def replay(
  setup: Setup, weights, state: State, slot, n_1, prefix=None, *, tokens: int, window: int
) -> State:
  """The row at `slot`, moved on by the first `n_1` <= `tokens` tokens that its history has after it.

  The tokens are forced through the sampler, so its state is what it was, for every sampler.
  """
  one = row_at(state.replace(first=None), slot)
  row, _ = _through(setup, weights, one, n_1, prefix, tokens, window)
  return put_row(state.light, row, slot).with_large(state)


def force(setup: Setup, weights, state: State, slot, n_1, *, tokens: int, window: int) -> State:
  """The same for tokens whose keys and values are not in the cache yet; they are when it returns."""
  one = row_at(state.replace(first=None), slot)
  row, past = _through(setup, weights, one, n_1, None, tokens, window)

  def merge(past, cache):
    return kvcache.merge(cache, past.recent, one.len_B, n_1)

  cache = jax.tree.map(merge, past, one.cache, is_leaf=is_past)
  return put_row(state.light, row, slot).replace(
    first=state.first, cache=put_row(state.cache, cache, slot)
  )


def _through(setup: Setup, weights, one: State, n_1, prefix, tokens: int, window: int):
  """(the row after the first n_1 tokens of its history that it has not been fed, what it has seen)."""
  last = setup.capacity - 1
  at_1T = jnp.minimum(one.len_B[:, None] + jnp.arange(tokens), last)
  token_1T = jnp.take_along_axis(one.history_BS, at_1T, axis=1)
  next_1T = jnp.take_along_axis(one.history_BS, jnp.minimum(at_1T + 1, last), axis=1)
  past = setup.model.past(one, one.cache, tokens, window, prefix)
  logits, after, attn = setup.model.logits(weights, one, token_1T, past)

  def step(row, at):
    t, next_1, logits, attn = at
    on_1 = t < n_1
    forced = row.actions_state.replace(forced_B=next_1, goes_on_B=jnp.ones_like(on_1))
    now = row.replace(live_B=on_1, actions_state=forced, len_B=row.len_B + on_1.astype(jnp.int32))
    now, *_ = next_token(setup, now, logits, attn)
    return where_rows(on_1, now, row), None

  steps = (jnp.arange(tokens), next_1T.T, *by_step((logits, attn), tokens))
  row, _ = jax.lax.scan(step, one.light, steps)
  return row.replace(live_B=jnp.zeros_like(row.live_B)), after


def by_step(tree, T: int):
  """Arrays (B, T, ...) as (T, B, ...); where T is 1, `LanguageModel.logits` leaves out the axis T."""
  return jax.tree.map(lambda x: x[None] if T == 1 else jnp.moveaxis(x, 1, 0), tree)
