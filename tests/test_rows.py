"""Rows and the verbs that treat them: one prefill for many, forks, waits, limits, rewinds, scores, ends."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from test_engine import (
  KNOBS,
  PROMPTS,
  SMALL,
  Words,
  engine,
  engine_for_knobs,
  run,
  six,
  small_weights,
)

from entropix_jax import errors, metrics, sampling
from entropix_jax.engine import record, state, step
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.model import llama
from entropix_jax.rows import Failure, Pause, Rows, Token


def request(new=24, **changes):
  return dataclasses.replace(Request(PROMPTS[1], new, seed=5), **changes)


def admitted(e, r, ahead=1, **how):
  """(rows, row): the request's row among the rows of an engine."""
  rows = Rows(e, Words(), ahead=ahead)
  return rows, rows.admit(r, rows.engine.prefill(r), **how)


def drain(rows):
  """Every event until nothing moves any more."""
  events = []
  while rows.busy:
    events += rows.step()
  return events


def ids(events, sample=0):
  return [e.id for e in events if isinstance(e, Token) and e.sample == sample]


def pauses(events):
  return [e for e in events if isinstance(e, Pause)]


def test_samples_of_one_prefill_are_those_of_runs_of_their_own():
  e = engine()
  todo = [request(stream=i) for i in range(4)]
  rows = Rows(e, Words())
  prefix = rows.engine.prefill(todo[0])
  for i, r in enumerate(todo):
    rows.admit(r, prefix, sample=i)
  events = drain(rows)
  assert [ids(events, i) for i in range(4)] == run(e, todo)[0]
  assert len({tuple(ids(events, i)) for i in range(4)}) > 2


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_limit_only_pauses(ahead):
  """Whatever it is, and however often: the text is that without one."""
  e = engine()
  want = run(e, [request()])[0][0]
  for limit in (1, 2, 7, 8, 9):
    rows, row = admitted(e, request(), ahead, limit=limit)
    events = drain(rows)
    assert ids(events) == want[:limit]
    assert [p.why for p in pauses(events)] == ["limit"]
    assert row.emitted == limit
    while not row.done:
      rows.wake(row, row.emitted + limit)
      events += drain(rows)
    assert ids(events) == want
    assert [t.finish for t in events if isinstance(t, Token)] == [None] * 23 + ["length"]
    assert rows.free == 5


def test_who_waits_is_undisturbed_by_waiting():
  """Told to go on, it goes on as if it had never been marked; a token before which it waits is not drawn."""
  marked = request(actions={"fork_ent": 0.3, "fork_wait": True, "fork_every": 3})
  rows, row = admitted(engine(), marked)
  events, places = [], []
  while not row.done:
    new = drain(rows)
    events += new
    for pause in pauses(new):
      assert pause.why == "fork"
      assert pause.numbers["entropy"] > 0.3
      places.append(row.emitted)
      rows.wake(row)
  assert ids(events) == run(engine(), [request()])[0][0]
  tokens = [t for t in events if isinstance(t, Token)]
  assert [t.position for t in tokens if t.fork] == places
  assert len(places) > 2
  assert all(b - a >= 3 for a, b in itertools.pairwise(places))


def test_a_fork_of_a_paused_row():
  """With its noise the same text, with other noise another; and the row itself does not notice."""
  want = run(engine(), [request()])[0][0]
  rows, row = admitted(engine(), request(), limit=9)
  before = drain(rows)
  rows.fork(row, sample=1, stream=0)
  rows.fork(row, sample=2, stream=6)
  rows.wake(row)
  events = drain(rows)
  assert ids(before) + ids(events) == ids(before) + ids(events, 1) == want
  assert len(ids(events, 2)) == len(want) - 9
  assert ids(events, 2) != ids(events)
  places = [t.position for t in events if isinstance(t, Token) and t.sample == 2]
  assert places == list(range(9, 24))


def test_forks_at_a_mark_take_the_tokens_they_are_told():
  """As a row would whose text had been so: the model sees the forced token, noise and state go on."""
  marked = request(actions={"fork_ent": 0.5, "fork_wait": True}, knobs={"temperature": 0.0})
  rows, row = admitted(six(), marked, ahead=0)
  (pause,) = pauses(drain(rows))
  best = [i for i, _, _ in pause.top]
  assert len(set(best)) == 4
  at = row.emitted
  for i, id in enumerate(best[1:]):
    rows.fork(row, i + 1, 0, limit=at + 1, forced=id)
  rows.wake(row, limit=at + 1, forced=best[0])
  tokens = [t for t in drain(rows) if isinstance(t, Token)]
  assert sorted((t.sample, t.id) for t in tokens) == list(enumerate(best))
  assert all(t.forced and t.numbers["logprob_law"] == 0.0 for t in tokens)
  for token, (_, _, logprob) in zip(sorted(tokens, key=lambda t: t.sample), pause.top, strict=True):
    assert token.numbers["logprob"] == pytest.approx(logprob, abs=1e-4)


def test_a_forced_first_token():
  """Greedy behind it: what the model says to a prompt that ends with it."""
  greedy = request(knobs={"temperature": 0.0})
  rows, _ = admitted(engine(), greedy, forced=77)
  tokens = drain(rows)
  assert ids(tokens)[0] == 77
  assert [t.forced for t in tokens] == [True] + [False] * 23
  longer = dataclasses.replace(greedy, ids=[*greedy.ids, 77], max_new_tokens=23)
  assert ids(tokens)[1:] == run(engine(), [longer])[0][0]


def rewound(rows, row, r, n, attempt, tokens=8):
  """The tokens that a dispatch gives a row that was rewound to its first n; `rows` stays usable."""
  state = rows.engine.rewind(rows.state, row.slot, r, n, attempt)
  state = rows.engine.steer(state, live={row.slot: True})
  rows.state, record = rows.engine.decode(state, 160, 8)
  return rows.engine.unpack(np.asarray(record))["id"][:tokens, row.slot].tolist()


@pytest.mark.parametrize("sampler", [tired, *sampling.names()])
def test_a_rewind_is_exact(sampler):
  """Every sampler's state, and passages that are being injected: the same noise gives the same text.

  A long one goes in pieces.
  """
  actions = {"inject": [50, 51, 52], "inject_ent": 0.5, "inject_varent": 1e9, "inject_most": 9}
  r = request(150, actions=actions, knobs=KNOBS.get(sampler, {}))
  e = engine_for_knobs(sampler) if isinstance(sampler, str) else engine()
  rows, row = admitted(e, r, limit=140)
  want = ids(drain(rows))
  for n in (131, 13, 1, 0):
    assert rewound(rows, row, r, n, attempt=0, tokens=7) == want[n : n + 7]


@pytest.mark.parametrize("sampler", [tired, *sampling.names()])
def test_a_row_after_forced_ids_goes_on_as_the_row_that_drew_them(sampler):
  """Beside the other row, with every sampler's state; ids that were not drawn are seen, too."""
  actions = {"inject": [50, 51, 52], "inject_ent": 0.5, "inject_varent": 1e9, "inject_most": 9}
  r = request(150, actions=actions, knobs=KNOBS.get(sampler, {}))
  e = engine_for_knobs(sampler) if isinstance(sampler, str) else engine()
  rows, _ = admitted(e, r, limit=140)
  want = ids(drain(rows))
  for n in (131, 13, 1):
    after = dataclasses.replace(r, forced_ids=want[:n], max_new_tokens=140)
    row = rows.admit(after, e.prefill(r), sample=n)
    events = drain(rows)
    assert ids(events, n) == want[n:]
    tokens = [t for t in events if isinstance(t, Token)]
    assert [t.position for t in tokens] == list(range(n, 140))
    assert tokens[-1].finish == "length"
    assert row.emitted == 140


def test_forced_ids_are_seen_by_the_model():
  """Greedy after them: what the model says to a prompt that ends with them."""
  greedy = request(30, knobs={"temperature": 0.0})
  given = [77, 3, 150, 9]
  for known in (given, given * 6):
    n = len(known)
    row = dataclasses.replace(greedy, forced_ids=known, max_new_tokens=n + 5)
    longer = dataclasses.replace(greedy, ids=[*greedy.ids, *known], max_new_tokens=5)
    assert run(engine(), [row])[0][0] == run(engine(), [longer])[0][0]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"forced_ids": [3] * 24}, "no room for more"),
    ({"forced_ids": [3, 10**6]}, "in the forced ids"),
  ],
)
def test_forced_ids_that_cannot_be(change, said):
  with pytest.raises(errors.UserError, match=said):
    engine().prefill(dataclasses.replace(request(24), **change))


def test_another_attempt_draws_anew():
  rows, row = admitted(engine(), request(), limit=20)
  said = {tuple(ids(drain(rows))[6:14])}
  for attempt in range(1, 7):
    said.add(tuple(rewound(rows, row, request(), 6, attempt)))
  assert len(said) > 2


@functools.cache
def full_pass():
  """(ids_1T, n) -> log p_V of what follows the first n ids."""

  @jax.jit
  def logp(token_1T, n):
    x_BTD, _, _ = llama.forward(SMALL, small_weights(), token_1T)
    return jax.nn.log_softmax(llama.unembed(small_weights(), x_BTD[0, n - 1]))

  return logp


def assert_score(found, text):
  """`found` is the log-probabilities of the labels 3 and 4 after a text."""
  logp_V = full_pass()(jnp.asarray([[*text, *[0] * (64 - len(text))]]), len(text))
  np.testing.assert_allclose(found, logp_V[3:5], atol=1e-4)


def test_scores_are_the_models_and_nobody_notices():
  e = engine()
  todo = [request(new=30), dataclasses.replace(request(new=30), ids=PROMPTS[2])]
  want = run(e, todo)
  rows = Rows(e, Words())
  pair = [rows.admit(r, rows.engine.prefill(r), sample=i, limit=10) for i, r in enumerate(todo)]
  events = drain(rows)
  suffixes = {pair[0]: [8, 9, 10], pair[1]: [4]}
  found = rows.score(suffixes, [3, 4])
  for i, row in enumerate(pair):
    assert_score(found[row], [*todo[i].ids, *ids(events, i), *suffixes[row]])
    rows.wake(row)
  events += drain(rows)
  assert [ids(events, i) for i in range(2)] == want[0]


def test_who_has_ended_can_stay_to_be_scored():
  rows, row = admitted(engine(), request(new=5), stays=True)
  drain(rows)
  assert row.done
  assert rows.free == 4
  assert np.isfinite(rows.score({row: [1, 2]}, [3])[row]).all()
  rows.cancel(row)
  assert rows.free == 5


@pytest.mark.parametrize("place", [0, 5, 12])
def test_who_ended_at_a_stop_string_is_scored_there(place):
  """The device has gone on behind it, a dispatch ahead; what it is asked stands behind the text all the same."""
  r = request(new=30)
  free = run(engine(), [r])[0][0]
  stop, text = f"{free[place]} ", itertools.accumulate(f"{i} " for i in free)
  first = next(i for i, said in enumerate(text) if said.endswith(stop))
  ends = dataclasses.replace(r, stop_text=(stop,))
  rows, row = admitted(engine(), ends, stays=True)
  events = drain(rows)
  assert ids(events) == free[: first + 1]
  assert events[-1].finish == "stop"
  found = rows.score({row: [8, 9, 10]}, [3, 4])[row]
  assert_score(found, [*r.ids, *free[: first + 1], 8, 9, 10])
  rows.cancel(row)
  assert rows.free == 5


def test_who_is_cancelled_says_no_more_and_its_slot_is_free_at_once():
  e = engine(rows=2)
  todo = [request(new=60, stream=i) for i in range(3)]
  want = run(e, todo)[0]
  rows = Rows(e, Words())
  prefix = rows.engine.prefill(todo[0])
  first, _ = (rows.admit(todo[i], prefix, sample=i) for i in range(2))
  events = [*rows.step(), *rows.step()]
  assert rows.free == 0
  said = ids(events)
  rows.cancel(first)
  rows.cancel(first)  # once more does nothing
  assert rows.free == 1
  rows.admit(todo[2], prefix, sample=2)
  later = drain(rows)
  assert ids(later) == []
  assert said == want[0][: len(said)]
  assert ids(events + later, 1) == want[1]
  assert ids(later, 2) == want[2]
  assert rows.free == 2
  assert not np.asarray(rows.state.live_B).any()


def test_a_prompts_bytes():
  e, r = engine(), request()
  per_token = 2 * e.setup.cfg.layers * e.setup.cfg.kv_heads * e.setup.cfg.head_dim * 4
  assert Rows(e, Words()).prefix_bytes(r) == per_token * len(r.ids)


@functools.cache
def logits():
  rng = np.random.default_rng(3)
  x = rng.standard_normal((5, 300)).astype(np.float32) * 3
  x[1, 40:] = -np.inf
  x[2] = 1.0
  x[3, 7] = 60.0
  return x


@pytest.mark.parametrize("k", [2, 20])
def test_measures_of_confidence_against_float64(k):
  x = logits()
  lse = jax.nn.logsumexp(jnp.asarray(x), axis=-1)
  got = metrics.confidence(jnp.asarray(x), lse, k)
  for i, row in enumerate(x.astype(np.float64)):
    row = row[np.isfinite(row)]
    logp = np.sort(row - row.max() - np.log(np.exp(row - row.max()).sum()))[::-1]
    want = -np.log(len(row)) - logp.mean(), -logp[:k].mean(), np.exp(logp[0]) - np.exp(logp[1])
    measured = got.self_certainty[i], got.confidence[i], got.gap[i]
    np.testing.assert_allclose(measured, want, rtol=2e-5, atol=2e-5)


def test_confidence_is_reported_with_every_token():
  plain, e = engine(), six()
  assert run(e, [request()])[0] == run(plain, [request()])[0]
  names = set(record.numbers(e.setup)) - set(record.numbers(plain.setup))
  assert names == {"self_certainty", "confidence", "gap"}


# -- masks ---------------------------------------------------------------------------------------


@functools.cache
def masked(sampler="plain"):
  """An engine whose rows may have masks."""
  e = engine(sampler, top_logprobs=4)
  return Engine(dataclasses.replace(e.setup, masks=True, share_from=None), e.weights)


def bits(allowed):
  """bits_X of these ids."""
  bit_X = np.zeros((32 * masked().setup.mask_words,), np.uint8)
  bit_X[list(allowed)] = 1
  return np.packbits(bit_X, bitorder="little").view(np.uint32)


class Steps:
  """A guide: each id is 1 to `most` more than the one before, and the text ends after `n`."""

  free, lifts = False, {}

  def __init__(self, n=10**6, most=5, breaks=10**6):
    self.ids, self.n, self.most, self.breaks = [0], n, most, breaks

  @property
  def over(self):
    return len(self.ids) > self.n

  def push(self, id):
    self.ids.append(id)

  def mask(self):
    if len(self.ids) > self.breaks:
      raise errors.UserError("it is broken")
    return bits((self.ids[-1] + 1 + i) % SMALL.vocab for i in range(self.most))


@pytest.mark.parametrize("sampler", ["plain", "quadrant", "dslider", "entropy_target"])
def test_the_law_of_a_masked_row_is_that_of_masked_logits(sampler):
  """A row without a mask notices nothing, and what is reported is of the raw model."""
  setup = masked(sampler).setup
  B, V = setup.config.batch_size, SMALL.vocab
  logits_BV = jnp.asarray(np.random.default_rng(1).normal(0, 4, (B, V)), jnp.float32)
  allowed = [[3, 70, 71], range(V), [5], range(0, V, 2), range(V)]
  on_B, allowed_BX = (
    jnp.asarray([1, 0, 1, 1, 0], bool),
    jnp.asarray(np.stack([*map(bits, allowed)])),
  )
  keep_BV = np.asarray([np.isin(np.arange(V), [*ids]) for ids in allowed])

  def law(setup, logits_BV, **masks):
    rows = state.blank(setup, B).replace(live_B=jnp.ones((B,), bool), **masks)
    attn = setup.attn_stats(jnp.zeros((B,), jnp.float32))

    def choose(decision, key_B2, pos_B):
      return step.drawn(decision, key_B2, pos_B)[0], decision.law_BV

    _, record_BR, law_BV = jax.jit(
      lambda rows, logits: step.next_token(setup, rows, logits, attn, choose)
    )(rows, logits_BV)
    return np.asarray(law_BV), record.unpack(setup, np.asarray(record_BR))

  got, said = law(setup, logits_BV, masked_B=on_B, allowed_BX=allowed_BX)
  want, _ = law(setup, jnp.where(keep_BV, logits_BV, -jnp.inf))
  free, raw = law(setup, logits_BV)
  np.testing.assert_allclose(free, law(dataclasses.replace(setup, masks=False), logits_BV)[0], 1e-5)
  np.testing.assert_array_equal(got, np.where(np.asarray(on_B)[:, None], want, free))
  assert keep_BV[np.arange(B), said["id"]].all()
  if sampler == "plain":  # the model's own law, restricted and renormalised
    own = np.where(keep_BV, np.exp(np.asarray(jax.nn.log_softmax(logits_BV))), 0)
    np.testing.assert_allclose(np.exp(got), own / own.sum(1, keepdims=True), atol=1e-6)
  logp_BV = np.asarray(jax.nn.log_softmax(logits_BV))
  np.testing.assert_allclose(said["logprob"], logp_BV[np.arange(B), said["id"]], atol=1e-5)
  for name in ("entropy", "varentropy", "top_id_0", "top_logprob_3"):
    np.testing.assert_array_equal(said[name], raw[name])


def test_logits_of_allowed_ids_that_are_all_impossible_break_the_row():
  setup = masked().setup
  B, V = setup.config.batch_size, SMALL.vocab
  rows = state.blank(setup, B).replace(live_B=jnp.ones((B,), bool))
  rows = rows.replace(
    masked_B=jnp.arange(B) < 2, allowed_BX=jnp.asarray(np.tile(bits([7]), (B, 1)))
  )
  logits_BV = jnp.zeros((B, V)).at[:, 7].set(jnp.asarray([-jnp.inf, 0, -jnp.inf, 0, 0]))
  attn = setup.attn_stats(jnp.zeros((B,), jnp.float32))
  _, record_BR, _ = step.next_token(setup, rows, logits_BV, attn)
  flags_B = record.unpack(setup, np.asarray(record_BR))["flags"]
  assert (flags_B & record.BROKEN > 0).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_guided_rows_follow_their_guides_and_leave_the_others_alone(ahead):
  e = masked()
  want = run(engine("plain", top_logprobs=4), [request(24, stream=i) for i in range(2)])[0]
  rows = Rows(e, Words(), ahead=ahead)
  prefix = e.prefill(request())
  for i in range(2):
    rows.admit(request(24, stream=i), prefix, sample=i)
  rows.admit(request(20), prefix, sample=2, guide=Steps())
  rows.admit(request(20), prefix, sample=3, guide=Steps(n=6))
  rows.admit(request(20), prefix, sample=4, guide=Steps(breaks=4))
  events = drain(rows)
  assert [ids(events, i) for i in range(2)] == want
  assert [len(ids(events, i)) for i in (2, 3, 4)] == [20, 6, 4]
  for i in (2, 3, 4):
    path = np.diff([0, *ids(events, i)]) % SMALL.vocab
    assert (path >= 1).all()
    assert (path <= 5).all()
  ends = {e.sample: e.finish for e in events if e.finish}
  assert ends == {0: "length", 1: "length", 2: "length", 3: "stop", 4: "error"}
  (failure,) = (e for e in events if isinstance(e, Failure))
  assert failure.why == "The text cannot go on as it must after 4 tokens: it is broken."
  assert rows.free == 5
  again = Rows(e, Words())  # a slot that had a mask has none for its next row
  row = again.admit(request(3), prefix, guide=Steps())
  drain(again)
  assert row.done
  again.admit(request(24, stream=1), prefix)
  assert ids(drain(again)) == want[1]


def test_guided_rows_alone_waste_no_dispatch():
  e = masked()
  rows = Rows(e, Words())
  rows.admit(request(12), e.prefill(request()), guide=Steps())
  used, events = [], []
  run_, e.run = e.run, lambda p, *args: used.append((p.verb, args)) or run_(p, *args)
  try:
    for _ in range(3):
      events += rows.step()
    rows.admit(request(6), e.prefill(request()), sample=1, guide=Steps())
    events += drain(rows)
    assert [len(ids(events, i)) for i in range(2)] == [12, 6]
  finally:
    del e.run
  assert [int(args[2]) for verb, args in used if verb == "decode"] == [1] * 11


def test_a_cancelled_guided_row_is_free_at_once():
  e = masked()
  rows = Rows(e, Words())
  prefix = e.prefill(request())
  row = rows.admit(request(50), prefix, guide=Steps())
  rows.admit(request(24, stream=1), prefix, sample=1)
  seen = []
  for _ in range(3):
    seen += rows.step()
  rows.cancel(row)
  assert rows.free == 4
  other = rows.admit(request(24, stream=2), prefix, sample=2)
  assert other.slot == row.slot
  seen += drain(rows)
  want = run(engine("plain", top_logprobs=4), [request(24, stream=i) for i in (1, 2)])[0]
  assert [ids(seen, i) for i in (1, 2)] == want
