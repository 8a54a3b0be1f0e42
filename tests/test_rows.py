"""Rows and the verbs that treat them: one prefill for many, forks, waits, limits, rewinds, scores, ends."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_engine import PROMPTS, SAMPLERS, Words, run

from entropix_jax import metrics, sampling
from entropix_jax.config import EngineConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.generate import Pause, Rows, Token
from entropix_jax.model import llama, weights

STATEFUL = ("plain", "entropy_target", "dslider")
MIROSTAT = {
  "mirostat_tau": 1.5,
  "repetition_penalty": 1.2,
}  # `plain` with a state, and one that counts


@functools.cache
def engine(sampler="plain", rows=5, **changes):
  """Of a model that does not repeat itself, as a tied one with random weights does."""
  cfg = dataclasses.replace(TINY, tied=False)
  w = weights.random(cfg, jnp.float32, seed=3)
  w = w.replace(head_DV=w.head_DV * 15.0)
  return Engine.create(cfg, w, sampling.find(sampler), EngineConfig(rows, 256, **changes))


def request(sampler="plain", new=24, **changes):
  knobs = MIROSTAT if sampler == "plain" else SAMPLERS.get(sampler, {})
  return dataclasses.replace(Request(PROMPTS[1], new, seed=5, knobs=knobs), **changes)


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


@pytest.mark.parametrize("sampler", STATEFUL)
def test_samples_of_one_prefill_are_those_of_runs_of_their_own(sampler):
  e = engine(sampler)
  todo = [request(sampler, stream=i) for i in range(4)]
  rows = Rows(e, Words())
  prefix = rows.prefill(todo[0])
  for i, r in enumerate(todo):
    rows.admit(r, prefix, sample=i)
  events = drain(rows)
  assert rows.prefills == 1
  assert [ids(events, i) for i in range(4)] == run(e, todo)[0]
  assert len({tuple(ids(events, i)) for i in range(4)}) > 2


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_limit_only_pauses(ahead):
  """Whatever it is, and however often: the text is that without one."""
  e = engine()
  want = run(e, [request()])[0][0]
  for limit in (1, 2, 7, 8, 9):
    rows = Rows(e, Words(), ahead=ahead)
    row = rows.admit(request(), rows.prefill(request()), limit=limit)
    events = drain(rows)
    assert ids(events) == want[:limit]
    assert [p.why for p in pauses(events)] == ["limit"]
    assert row.emitted == limit
    while not row.done:
      rows.wake(row, row.emitted + limit)
      events += drain(rows)
    assert ids(events) == want
    assert [t.finish for t in events if isinstance(t, Token)] == [None] * 23 + ["length"]
    assert rows.free == e.setup.config.batch_size


@pytest.mark.parametrize("sampler", STATEFUL)
def test_who_waits_is_undisturbed_by_waiting(sampler):
  """Told to go on, it goes on as if it had never been marked; a token before which it waits is not drawn."""
  e = engine(sampler)
  plain = run(e, [request(sampler)])[0][0]
  marked = request(sampler, actions={"fork_ent": 0.3, "fork_wait": True, "fork_every": 3})
  rows = Rows(e, Words())
  row = rows.admit(marked, rows.prefill(marked))
  events, places = [], []
  while not row.done:
    new = drain(rows)
    events += new
    for pause in pauses(new):
      assert pause.why == "fork"
      assert pause.numbers["entropy"] > 0.3
      places.append(row.emitted)
      rows.wake(row)
  assert ids(events) == plain
  tokens = [t for t in events if isinstance(t, Token)]
  assert [t.position for t in tokens if t.fork] == places
  assert len(places) > 2
  assert all(b - a >= 3 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("sampler", STATEFUL)
def test_a_fork_of_a_paused_row(sampler):
  """With its noise the same text, with other noise another; and the row itself does not notice."""
  e = engine(sampler)
  r = request(sampler)
  want = run(e, [r])[0][0]
  rows = Rows(e, Words())
  row = rows.admit(r, rows.prefill(r), limit=9)
  before = drain(rows)
  rows.fork(row, sample=1, stream=0)
  rows.fork(row, sample=2, stream=6)
  rows.wake(row)
  events = drain(rows)
  assert ids(before) + ids(events) == ids(before) + ids(events, 1) == want
  assert len(ids(events, 2)) == len(want) - 9
  assert ids(events, 2) != ids(events)
  assert [t.position for t in events if isinstance(t, Token) and t.sample == 2] == list(
    range(9, 24)
  )


def test_forks_at_a_mark_take_the_tokens_they_are_told():
  """As a row would whose text had been so: the model sees the forced token, noise and state go on."""
  e = engine("plain", top_logprobs=3)
  marked = request(actions={"fork_ent": 0.5, "fork_wait": True}, knobs={"temperature": 0.0})
  rows = Rows(e, Words(), ahead=0)
  row = rows.admit(marked, rows.prefill(marked))
  (pause,) = pauses(drain(rows))
  best = [i for i, _, _ in pause.top]
  assert len(set(best)) == 3
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
  e = engine("plain")
  greedy = request(knobs={"temperature": 0.0})
  rows = Rows(e, Words())
  rows.admit(greedy, rows.prefill(greedy), forced=77)
  tokens = drain(rows)
  assert ids(tokens)[0] == 77
  assert [t.forced for t in tokens] == [True] + [False] * 23
  longer = dataclasses.replace(greedy, ids=[*greedy.ids, 77], max_new_tokens=23)
  assert ids(tokens)[1:] == run(e, [longer])[0][0]


@pytest.mark.parametrize("sampler", sampling.names())
@pytest.mark.parametrize("n", [0, 1, 13])
def test_a_rewind_is_exact(sampler, n):
  """Every sampler's state, and passages that are being injected: the same noise gives the same text."""
  e = engine(sampler)
  r = request(sampler, 80 if n else 24)
  r = dataclasses.replace(
    r, actions={"inject": [50, 51, 52], "inject_ent": 0.5, "inject_varent": 1e9, "inject_most": 9}
  )
  rows = Rows(e, Words())
  row = rows.admit(r, rows.prefill(r), limit=20)
  want = ids(drain(rows))
  state = e.rewind(rows.state, row.slot, r, n, attempt=0)
  again = e.steer(state, live={row.slot: True})
  _, record = e.decode(again, 64, 8)
  assert e.unpack(np.asarray(record))["id"][:7, row.slot].tolist() == want[n : n + 7]


def test_another_attempt_draws_anew():
  e, r = engine("plain"), request(knobs={})
  rows = Rows(e, Words())
  row = rows.admit(r, rows.prefill(r), limit=20)
  want = ids(drain(rows))
  said = {tuple(want[6:14])}
  for attempt in range(1, 7):
    state = e.rewind(rows.state, row.slot, r, 6, attempt)
    rows.state, record = e.decode(e.steer(state, live={row.slot: True}), 64, 8)
    said.add(tuple(e.unpack(np.asarray(record))["id"][:, row.slot].tolist()))
  assert len(said) > 2


def test_a_long_rewind_goes_in_pieces():
  e, r = engine("plain"), request(new=150)
  rows = Rows(e, Words())
  row = rows.admit(r, rows.prefill(r), limit=140)
  want = ids(drain(rows))
  state = e.steer(e.rewind(rows.state, row.slot, r, 131, 0), live={row.slot: True})
  _, record = e.decode(state, 160, 8)
  assert e.unpack(np.asarray(record))["id"][:, row.slot].tolist()[:7] == want[131:138]


def test_scores_are_the_models_and_nobody_notices():
  e = engine()
  todo = [request(new=30), dataclasses.replace(request(new=30), ids=PROMPTS[2])]
  want = run(e, todo)
  rows = Rows(e, Words())
  pair = [rows.admit(r, rows.prefill(r), sample=i, limit=10) for i, r in enumerate(todo)]
  events = drain(rows)
  suffixes = {pair[0]: [8, 9, 10], pair[1]: [4]}
  found = rows.score(suffixes, [3, 4])
  for i, row in enumerate(pair):
    text = [*todo[i].ids, *ids(events, i), *suffixes[row]]
    x_BTD, _, _ = llama.forward(e.setup.cfg, e.weights, jnp.asarray([text]))
    logp = jax.nn.log_softmax(llama.unembed(e.weights, x_BTD)[0, -1])
    np.testing.assert_allclose(found[row], logp[np.array([3, 4])], atol=1e-4)
    rows.wake(row)
  events += drain(rows)
  assert [ids(events, i) for i in range(2)] == want[0]


def test_who_has_ended_can_stay_to_be_scored():
  e, r = engine(), request(new=5)
  rows = Rows(e, Words())
  row = rows.admit(r, rows.prefill(r), stays=True)
  drain(rows)
  assert row.done
  assert rows.free == e.setup.config.batch_size - 1
  assert np.isfinite(rows.score({row: [1, 2]}, [3])[row]).all()
  rows.cancel(row)
  assert rows.free == e.setup.config.batch_size


@pytest.mark.parametrize("place", [0, 5, 12])
def test_who_ended_at_a_stop_string_is_scored_there(place):
  """The device has gone on behind it, a dispatch ahead; what it is asked stands behind the text all the same."""
  e, r = engine(), request(new=30)
  free = run(e, [r])[0][0]
  first = free.index(free[place])
  rows = Rows(e, Words())
  ends = dataclasses.replace(r, stop_text=(f"{free[place]} ",))
  row = rows.admit(ends, rows.prefill(ends), stays=True)
  events = drain(rows)
  assert ids(events) == free[: first + 1]
  assert events[-1].finish == "stop"
  found = rows.score({row: [8, 9, 10]}, [3, 4])[row]
  x_BTD, _, _ = llama.forward(
    e.setup.cfg, e.weights, jnp.asarray([[*r.ids, *free[: first + 1], 8, 9, 10]])
  )
  logp = jax.nn.log_softmax(llama.unembed(e.weights, x_BTD)[0, -1])
  np.testing.assert_allclose(found, logp[np.array([3, 4])], atol=1e-4)
  rows.cancel(row)
  assert rows.free == e.setup.config.batch_size


def test_who_is_cancelled_says_no_more_and_its_slot_is_free_at_once():
  e = engine(rows=2)
  todo = [request(new=60, stream=i) for i in range(3)]
  want = run(e, todo)[0]
  rows = Rows(e, Words())
  prefix = rows.prefill(todo[0])
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
  plain, e = engine("plain"), engine("plain", confidence=20)
  assert run(e, [request()])[0] == run(plain, [request()])[0]
  assert set(e.numbers) - set(plain.numbers) == {"self_certainty", "confidence", "gap"}
