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

from entropix_jax import metrics, sampling
from entropix_jax.engine import record
from entropix_jax.engine.request import Request
from entropix_jax.model import llama
from entropix_jax.rows import Pause, Rows, Token


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
