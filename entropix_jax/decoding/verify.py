"""Checking drafted tokens: one forward pass over several of them, and the sampler at each position.

Why: by shared noise a token is argmax(law + noise of its position), with noise that is known beforehand. So
a drafted token is checked by running the sampler itself and comparing [n14]. By rejection (arXiv:2211.17192,
arXiv:2302.01318) it is accepted with probability min(1, p / q), which keeps the law and not the text [n22].
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from entropix_jax.engine import record, step
from entropix_jax.engine.moves import by_step
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import State
from entropix_jax.rowwise import any_row, while_loop
from entropix_jax.sampling import draw

NONE = -1  # in place of a drafted id: there is none


def verify(
  setup: Setup,
  weights,
  state: State,
  draft_BG: jax.Array,
  count_B: jax.Array,
  *,
  window: int,
  reject: bool = False,
  law_BGV: jax.Array | None = None,
):
  """One forward pass over each row's next token and the tokens drafted after it; emits 1 to G + 1 per row.

  The emitted tokens are those of plain decoding: the sampler runs at every position with the state, noise
  and statistics that it would have there, for as long as it draws what was drafted. The first token that
  differs is the last one.

  Args:
    draft_BG: drafted ids, NONE where there is none.
    count_B: how many of the G drafted ids count; any values are valid.
    reject: accept a drafted token by its law. Then the emitted tokens have the law of plain decoding and
      are another text, and `count_B` must not depend on the ids that it counts.
    law_BGV: what the ids were drawn from; None: they were not drawn.

  Returns:
    The State, its cache unchanged; the past whose recent tokens were fed, of which each row's first (as many
    as len_B grew by) belong into the cache; record_TBR with T = G + 1.
  """
  B, G = draft_BG.shape
  token_BT = jnp.concatenate([state.token_B[:, None], draft_BG], axis=1)
  past = setup.model.past(state, state.cache, G + 1, window)
  logits, recent, attn = _logits(setup, weights, state, token_BT, past)

  def by_law(decision, key_B2, pos_B, draft):
    return accept(decision.law_BV, key_B2, pos_B, draft), ()

  def position(state, on_B, t, draft_B, law_BV, logits_BV, attn):
    now = state.replace(live_B=on_B, len_B=state.len_B + on_B.astype(jnp.int32))
    how = {"choose": by_law, "args": (Draft(draft_B, t < count_B, law_BV),)} if reject else {}
    now, record_BR, _ = step.next_token(setup, now, logits_BV, attn, **how)
    emits_B = now.out_B > state.out_B
    hit_B = emits_B & (t < count_B) & (now.token_B == draft_B)
    first_B = jnp.where(t == 0, count_B << record.DRAFTED, record.LATER)
    flags_B = jnp.where(on_B, first_B + jnp.where(hit_B, record.ACCEPTED, 0), 0)
    record_BR = record_BR.at[:, record.HEAD.index("flags")].add(flags_B)
    live_B = jnp.where(on_B, now.live_B, state.live_B)
    return (now.replace(live_B=live_B), hit_B), record_BR

  draft_TB = jnp.pad(draft_BG, ((0, 0), (0, 1))).T
  law_TBV = None
  if law_BGV is not None:
    law_TBV = jnp.pad(jnp.moveaxis(law_BGV, 1, 0), ((0, 1), (0, 0), (0, 0)))
  every = (draft_TB, law_TBV, *by_step((logits, attn), G + 1))

  def more(carry):
    t, state, agree_B, _ = carry
    # Once no row agrees there is nothing left to do; on a GPU, asking that would wait for the answer [n02].
    return (t <= G) & (jnp.any(state.live_B & agree_B) | (jax.default_backend() == "gpu"))

  def body(carry):
    t, state, agree_B, record_TBR = carry
    at = jax.tree.map(lambda x: x[t], every)
    (state, hit_B), record_BR = position(state, state.live_B & agree_B, t, *at)
    return t + 1, state, hit_B, record_TBR.at[t].set(record_BR)

  none_TBR = jnp.zeros((G + 1, B, len(record.columns(setup))), jnp.int32)
  start = (jnp.int32(0), state.light, state.live_B, none_TBR)
  _, after, _, record_TBR = while_loop(more, body, start)
  return after.with_large(state), step.with_recent(past, recent), record_TBR


def _logits(setup: Setup, weights, state: State, token_BT, past):
  """(logits, recent tokens, attention statistics) of a token and its drafts.

  A pass over fewer tokens is cheaper. So it has only as many as the row with most drafts, and zeros after
  them, except on a GPU, where asking for their number would wait for the host [n02].
  """
  T = token_BT.shape[1]

  def run(token_BT):
    logits, after, attn = setup.model.logits(weights, state, jnp.maximum(token_BT, 0), past)
    return logits, step.recent_of(after), attn

  if jax.default_backend() == "gpu":
    return run(token_BT)

  def first(n):
    logits, recent, attn = run(token_BT[:, : n + 1])
    seen = jax.tree.map(lambda x: x[:, None], (logits, attn)) if n == 0 else (logits, attn)

    def pad(x):
      return jnp.pad(x, ((0, 0), (0, T - n - 1), *[(0, 0)] * (x.ndim - 2)))

    logits, attn = jax.tree.map(pad, seen)
    return logits, recent, attn

  G = T - 1
  sizes = sorted({0, G // 2, G})  # each is another copy of the model to compile
  most = jnp.max(jnp.sum(token_BT != NONE, axis=1)) - 1
  which = jnp.searchsorted(jnp.asarray(sizes), most)
  return jax.lax.switch(which, [functools.partial(first, n) for n in sizes])


# -- accepting a drafted token by its law (arXiv:2211.17192, arXiv:2302.01318) -----------------------


@struct.dataclass
class Draft:
  """A drafted next token of each row."""

  token_B: jax.Array  # int32
  on_B: jax.Array  # bool; False: the row has none
  law_BV: (
    jax.Array | None
  )  # what it was drawn from, with noise of Purpose.DRAFT; None: it was not drawn


def residual(law_BV: jax.Array, draft: Draft) -> jax.Array:
  """log max(p - q, 0) up to a constant: what is left of the law p after a rejection; p where that is empty."""
  if draft.law_BV is None:
    ids = jnp.arange(law_BV.shape[-1])
    left_BV = jnp.where(ids == draft.token_B[:, None], -jnp.inf, law_BV)
  else:
    more_BV = law_BV > draft.law_BV  # so that no difference is of two infinities
    less_BV = jnp.where(more_BV, draft.law_BV - law_BV, 0.0)
    left_BV = law_BV + jnp.log(-jnp.expm1(less_BV))
  # Laws that differ by rounding alone may reject a token and have nothing else to offer.
  return jnp.where(jnp.max(left_BV, axis=-1, keepdims=True) > -jnp.inf, left_BV, law_BV)


def accept(law_BV: jax.Array, key_B2, pos_B, draft: Draft) -> jax.Array:
  """token_B ~ exp(law_BV), equal to the drafted token with the highest possible probability, sum min(p, q).

  A drafted token x is accepted with probability min(1, p(x) / q(x)); otherwise the token is drawn from the
  residual. A row without a draft gets the token of `draw.draw`.
  """

  def at(x_BV):
    return jnp.take_along_axis(x_BV, draft.token_B[:, None], axis=-1)[:, 0]

  q_B = 0.0 if draft.law_BV is None else at(draft.law_BV)
  u_B = draw.log_uniform(key_B2, pos_B, draw.Purpose.ACCEPT)
  accepted_B = draft.on_B & (u_B <= at(law_BV) - q_B)

  def other(law_BV):
    law_BV = jnp.where(draft.on_B[:, None], residual(law_BV, draft), law_BV)
    purposes = jnp.uint32(draw.Purpose.RESIDUAL), jnp.uint32(draw.Purpose.TARGET)
    return draw.draw(law_BV, key_B2, pos_B, jnp.where(draft.on_B, *purposes))

  return any_row(~accepted_B, other, lambda law_BV: draft.token_B, law_BV)
