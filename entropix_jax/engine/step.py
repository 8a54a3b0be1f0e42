"""One token of every row, as pure functions of a Setup: logits, law, draw, commit, stop test.

`next_token` is the only place where a sampler is run. `decode`, the first token, replay after a rewind,
drafts and verification all call it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entropix_jax import metrics, sampling
from entropix_jax.engine import record
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import Prefix, State, first_rows, put_row, row_at, where_rows
from entropix_jax.model import kvcache, sharding
from entropix_jax.rowwise import any_row, best
from entropix_jax.sampling import actions, draw

_PLACES = 64  # of a prompt whose logits are held at a time


def drawn(decision: sampling.Decision, key_B2, pos_B) -> tuple[jax.Array, tuple]:
  """(token_B, ()) from the law and the noise of its position: how tokens are chosen by default."""
  return draw.draw(decision.law_BV, key_B2, pos_B), ()


def next_token(
  setup: Setup, state: State, logits, attn, choose: Callable = drawn, args: tuple = ()
) -> tuple[State, jax.Array, Any]:
  """From logits to the next token of the rows that are live; `len_B` counts the tokens behind the logits.

  Args:
    logits: as `setup.model.logits` returns them for one position.
    attn: attention statistics (B,), or None.
    choose: (Decision, key_B2, position_B, *args) -> (token_B, anything with a leading row axis).
    args: arrays with a leading row axis.

  Returns:
    The State, record_BR, and what `choose` returned besides.
  """

  def decide(rows, logits, attn, *args):
    return _decide(setup, rows, logits, attn, lambda *at: choose(*at, *args))

  rows = state.light
  with jax.named_scope("sampler"):
    changed, record_BR, other = sharding.per_row(setup.mesh, decide, rows, logits, attn, *args)
  history_BS = _write_history(setup, state, record_BR, changed["token_B"])
  return state.replace(history_BS=history_BS, **changed), record_BR, other


def _decide(setup: Setup, rows: State, logits, attn, choose: Callable):
  """(changed fields of the rows, record_BR, what `choose` returned besides)."""
  logits_BV, model_stats, model_commit = setup.model.mix(rows, logits)
  raw = metrics.spread(logits_BV)
  # What is reported is of the raw model; the sampler sees only what may come next.
  seen_BV, seen = logits_BV, raw
  if setup.masks:
    operands = logits_BV, raw, rows.allowed_BX, rows.lifted_BC, rows.lift_BC
    seen_BV, seen = any_row(rows.masked_B, _masked, lambda *x: x[:2], *operands, many_kernels=True)
  obs = sampling.Observation(
    logits_BV=seen_BV,
    raw=seen,
    attn=attn,
    token_B=rows.token_B,
    pos_B=rows.out_B,
    key_B2=rows.key_B2,
    history_BS=rows.history_BS,
    len_B=rows.len_B,
    stop_BE=rows.stop_BE,
  )
  knobs = setup.constants(rows.knobs)
  decision = setup.sampler.step(knobs, rows.sampler_state, obs)
  if decision.score_BV is None:
    decision = decision.replace(score_BV=seen_BV)
  verdict, actions_state = actions.step(rows.actions, rows.actions_state, raw, decision.law_BV)
  decision = decision.replace(law_BV=verdict.law_BV)
  token_B, other = choose(decision, rows.key_B2, rows.out_B)
  sampler_state = setup.sampler.commit(knobs, rows.sampler_state, decision, token_B)

  # A row that is broken or waits emits nothing, so nothing of it changes except that it is not live.
  finite_B = setup.model.finite(logits, raw.lse) & (jnp.isfinite(seen.lse) if setup.masks else True)
  broken_B = rows.live_B & ~finite_B
  waits_B = rows.live_B & verdict.waits_B & ~broken_B
  live_B = rows.live_B & ~waits_B & ~broken_B
  out_B = rows.out_B + live_B.astype(jnp.int32)
  stopped_B = live_B & jnp.any(token_B[:, None] == rows.stop_BE, axis=-1)
  uncertain_B = live_B & ~stopped_B & verdict.uncertain_B
  exhausted_B = live_B & ~stopped_B & ~uncertain_B & (out_B >= rows.limit_B)

  def at(x_BV):
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

  flags = (
    (live_B, record.EMITTED),
    (stopped_B, record.STOPPED),
    (exhausted_B, record.EXHAUSTED),
    (uncertain_B, record.UNCERTAIN),
    (live_B & verdict.injected_B, record.INJECTED),
    (live_B & verdict.fork_B, record.FORK),
    (live_B & verdict.forced_B, record.FORCED),
    (waits_B, record.WAITS),
    (broken_B, record.BROKEN),
  )
  ints = [token_B, sum(jnp.where(on_B, flag, 0) for on_B, flag in flags), decision.branch_B]
  floats = [at(logits_BV) - raw.lse, at(decision.law_BV), raw.ent, raw.varent]
  if setup.config.confidence:
    k = min(setup.config.confidence, setup.cfg.vocab)
    confidence = metrics.confidence(logits_BV, raw.lse, k)
    floats += [getattr(confidence, name) for name in record.CONFIDENCE]
  floats += [getattr(attn, name) for name in record.ATTENTION] if attn is not None else []
  floats += [decision.stats[name] for name in setup.sampler_stats]
  floats += [model_stats[name] for name in setup.model.stats]
  if setup.top:
    value_BC, id_BC = _alternatives(setup, rows.alternatives_B, logits_BV)
    ints += list(id_BC.T)
    floats += list((value_BC - raw.lse[:, None]).T)
  new = (actions_state, sampler_state, model_commit(token_B))
  old = (rows.actions_state, rows.sampler_state, rows.model_state)
  actions_state, sampler_state, model_state = where_rows(live_B, new, old)
  changed = {
    "token_B": jnp.where(live_B, token_B, rows.token_B),
    "len_B": rows.len_B - waits_B.astype(jnp.int32),  # its last token will be fed again
    "out_B": out_B,
    "live_B": live_B & ~stopped_B & ~exhausted_B & ~uncertain_B,
    "actions_state": actions_state,
    "sampler_state": sampler_state,
    "model_state": model_state,
  }
  return changed, record.pack(ints, floats), other


def _masked(
  logits_BV, raw: metrics.Spread, allowed_BX, lifted_BC, lift_BC
) -> tuple[jax.Array, metrics.Spread]:
  """The logits without the ids whose bit is 0, with what is added to some of the others, and their statistics."""
  del raw
  B, V = logits_BV.shape
  bits = allowed_BX[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
  seen_BV = jnp.where(bits.reshape(B, -1)[:, :V] > 0, logits_BV, -jnp.inf)
  at_BC = jnp.where(lifted_BC < 0, V, lifted_BC)
  seen_BV = seen_BV.at[jnp.arange(B)[:, None], at_BC].add(lift_BC, mode="drop")
  return seen_BV, metrics.spread(seen_BV)


def _alternatives(setup: Setup, wanted_B, logits_BV) -> tuple[jax.Array, jax.Array]:
  """(value_BC, id_BC): the most likely tokens of the rows where they are wanted, and zeros in the others."""

  def none(logits_BV):
    shape = logits_BV.shape[0], setup.top
    return jnp.zeros(shape, logits_BV.dtype), jnp.zeros(shape, jnp.int32)

  return any_row(wanted_B, lambda x: best(x, setup.top), none, logits_BV, many_kernels=True)


def _write_history(setup: Setup, state: State, record_BR, token_B) -> jax.Array:
  # A row that emits nothing writes past the end of its history, which drops it.
  emits_B = record_BR[:, record.HEAD.index("flags")] & record.EMITTED > 0
  slot_B = jnp.where(emits_B, state.len_B, setup.capacity)

  def put(history_BS, slot_B, token_B):
    at = history_BS.at[jnp.arange(slot_B.shape[0]), slot_B]
    return at.set(token_B, mode="drop", unique_indices=True)

  if setup.mesh is not None and slot_B.shape[0] > 1:
    # Rows stay on their chip. Without this, each chip asks the others where their rows are written [n24].
    rows = sharding.spec("B")
    put = jax.shard_map(put, mesh=setup.mesh, in_specs=rows, out_specs=rows, check_vma=False)
  return put(state.history_BS, slot_B, token_B)


def first(setup: Setup, state: State, fresh_B) -> tuple[State, jax.Array]:
  """(State, record_BR) with the first token of the rows where `fresh_B` is set; the others stay as they are."""
  rows = state.replace(live_B=fresh_B)
  rows, record_BR, _ = next_token(setup, rows, state.first.logits, state.first.attn)
  return rows.replace(live_B=jnp.where(fresh_B, rows.live_B, state.live_B)), record_BR


def first_of(setup: Setup, state: State, slot) -> tuple[State, jax.Array]:
  """The same for the row at `slot` alone; the other rows of record_BR are empty."""
  one = row_at(state.replace(cache=None), slot)
  now, record_1R = first(setup, one, jnp.ones((1,), bool))
  record_BR = jnp.zeros((setup.config.batch_size, record_1R.shape[1]), record_1R.dtype)
  state = put_row(state.light, now.light, slot).with_large(state)
  return state, put_row(record_BR, record_1R, slot)


def decode(
  setup: Setup,
  weights,
  whole: State,
  *more,
  steps: int,
  window: int,
  rows: int | None = None,
) -> tuple[State, jax.Array]:
  """(State, record_NBR) after N steps for the first B rows.

  Args:
    more: where the setup has masks, how many of the N steps are run, int32, because rows with guides have one step at
      a time; then the cache of the prefix that rows share, if there is one.
    steps: N.
    window: slots of the cache that attention reads.
    rows: B; the others stay as they are. None: all.
  """
  count, prefix = (*more, None)[:2] if setup.masks else (steps, (*more, None)[0])
  state = whole if rows is None else first_rows(whole.replace(first=None), rows)
  past = setup.model.past(state, read_only(setup, state.cache, window), steps, window, prefix)
  start_B = state.len_B

  def step(rows, recent):
    token_B1 = rows.token_B[:, None]
    logits, after, attn = setup.model.logits(weights, rows, token_B1, with_recent(past, recent))
    rows = rows.replace(len_B=rows.len_B + rows.live_B.astype(jnp.int32))
    rows, record_BR, _ = next_token(setup, rows, logits, attn)
    return rows, recent_of(after), record_BR

  begin = state.light, recent_of(past)
  if setup.masks:

    def one(n, carry):
      *now, record_NBR = carry
      *now, record_BR = step(*now)
      return *now, record_NBR.at[n].set(record_BR)

    shape = jax.eval_shape(step, *begin)[-1]
    empty = jnp.zeros((steps, *shape.shape), shape.dtype)
    now, recent, record_NBR = jax.lax.fori_loop(0, count, one, (*begin, empty))
  else:

    def one(carry, _):
      *now, record_BR = step(*carry)
      return tuple(now), record_BR

    (now, recent), record_NBR = jax.lax.scan(one, begin, length=steps)
  cache = merge(setup, whole.cache, with_recent(past, recent), now.len_B - start_B)
  if state is not whole:
    now = put_row(whole.light, now, 0)
  return now.with_large(whole).replace(cache=cache), record_NBR


# -- the recent tokens of one or several networks --------------------------------------------------


def is_past(x) -> bool:
  """Whether a part of a tree is a Past."""
  return isinstance(x, kvcache.Past)


def recent_of(past):
  """The recent buffer of each Past."""
  return jax.tree.map(lambda p: p.recent, past, is_leaf=is_past)


def with_recent(past, recent):
  """Each Past with this recent buffer."""
  return jax.tree.map(lambda p, r: p.replace(recent=r), past, recent, is_leaf=is_past)


def read_only(setup: Setup, cache, window: int):
  """What several steps read of a cache that none of them writes."""
  # XLA:CPU copies a slice of an array to read it; taken here, that is once per dispatch and not once per step.
  # Other backends read it in place, and would have to store the copy.
  return kvcache.window(cache, window) if setup.platform == "cpu" else cache


def merge(setup: Setup, cache, past, count_B):
  """The cache with each row's first `count_B` recent tokens after the tokens that it holds."""

  def one(past, cache):
    if setup.mesh is None:
      return kvcache.merge(cache, past.recent, past.own_B, count_B)
    # Each chip merges its own rows and heads; a loop over rows must not run over all chips' rows.
    spec = sharding.spec
    kv = jax.tree.map(lambda x: spec("BKSH"[: x.ndim]), cache)
    local = jax.shard_map(
      kvcache.merge,
      mesh=setup.mesh,
      in_specs=(kv, kvcache.Recent(kv, spec("")), spec("B"), spec("B")),
      out_specs=kv,
      check_vma=False,
    )
    return local(cache, past.recent, past.own_B, count_B)

  return jax.tree.map(one, past, cache, is_leaf=is_past)


# -- prompts and scores --------------------------------------------------------------------------


def feed(network, weights, cache: kvcache.Cache, token_1T, len_1) -> kvcache.Cache:
  """Feed one full piece of a long prompt to one network: its cache."""
  return network.forward(weights, token_1T, kvcache.Past(len_1, cache))[1].cache


def prompt(network, weights, token_1T, n_1, *, slots: int) -> Prefix:
  """Feed a prompt of one piece, which has n_1 tokens, to one network."""
  return prefill(network, weights, network.cache(1, slots), token_1T, jnp.zeros_like(n_1), n_1)


def prefill(network, weights, cache: kvcache.Cache, token_1T, len_1, n_1) -> Prefix:
  """Feed the last piece of a prompt, which has n_1 tokens, to one network."""
  return _fed(network, weights, cache, token_1T, len_1, n_1)[0]


def _fed(network, weights, cache, token_1T, len_1, n_1) -> tuple[Prefix, jax.Array]:
  """(Prefix, x_1TD) after the first n_1 tokens."""
  x_1TD, past, attn = network.forward(weights, token_1T, kvcache.Past(len_1, cache), n_1 - 1)
  x_1D = jnp.take_along_axis(x_1TD, n_1[:, None, None] - 1, axis=1)[:, 0]
  last_1 = jnp.take_along_axis(token_1T, n_1[:, None] - 1, axis=1)[:, 0]
  logits_1V = network.unembed(weights, x_1D)
  return Prefix(past.cache, len_1 + n_1, last_1, logits_1V, attn), x_1TD


def read(
  network, weights, cache: kvcache.Cache, token_1T, len_1, n_1, next_1T, *, top: int
) -> tuple[Prefix, tuple[jax.Array, ...]]:
  """Feed a piece of a prompt to one network, and say how likely each token made the next one.

  Args:
    next_1T: the tokens that follow; the log-probabilities are theirs.
    top: C, alternatives for each place.

  Returns:
    The Prefix up to here, and (logp_T, logp_TC, id_TC) of the places after each token.
  """
  prefix, x_1TD = _fed(network, weights, cache, token_1T, len_1, n_1)

  def places(x_and_next):
    x_QD, next_Q = x_and_next
    logp_QV = jax.nn.log_softmax(network.unembed(weights, x_QD))
    value_QC, id_QC = best(logp_QV, top) if top else (logp_QV[:, :0], next_Q[:, None][:, :0])
    return jnp.take_along_axis(logp_QV, next_Q[:, None], axis=1)[:, 0], value_QC, id_QC

  # Few places at a time: logits of a whole piece of a large vocabulary take more memory than its activations.
  Q = min(_PLACES, token_1T.shape[1])
  grouped = x_1TD.reshape(-1, Q, x_1TD.shape[-1]), next_1T.reshape(-1, Q)
  scores = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(places, grouped))
  return prefix, scores


def score(
  setup: Setup, weights, state: State, suffix_BT, n_B, label_BY, prefix=None, *, window: int
) -> jax.Array:
  """log p_BY of labels after each row's next token and the first n_B tokens of a suffix.

  Of several networks, the main one scores.
  """
  network = setup.model.networks[0]
  weights, cache = (setup.model.parts(tree)[0] for tree in (weights, state.cache))
  token_BT = jnp.concatenate([state.token_B[:, None], suffix_BT], axis=1)
  past = network.past(state, cache, token_BT.shape[1], window, prefix)
  x_BTD, *_ = network.forward(weights, token_BT, past)
  x_BD = jnp.take_along_axis(x_BTD, n_B[:, None, None], axis=1)[:, 0]
  logp_BV = jax.nn.log_softmax(network.unembed(weights, x_BD))
  return jnp.take_along_axis(logp_BV, label_BY, axis=1)
