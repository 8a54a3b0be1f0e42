"""Jobs that come and go: prompts in pieces, kept beginnings, scored prompts, and rows that are always given back."""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
from test_engine import PROMPTS, SMALL, Words, engine, run, small_weights

from entropix_jax.engine.engine import Engine
from entropix_jax.engine.feeding import Feeding
from entropix_jax.engine.programs import any_request
from entropix_jax.engine.request import Request
from entropix_jax.model import llama
from entropix_jax.prefix_store import PrefixStore
from entropix_jax.rows import Rows, Token
from entropix_jax.scheduler import Samples, Scheduler

LONG = tuple(int(i) for i in np.random.default_rng(5).integers(20, 90, 61))
T = 8  # tokens of a piece


@functools.cache
def served():
  """An engine as a server has it: small pieces, no shared prefixes, alternatives."""
  e = engine("plain", rows=4, prefill_chunk=T, top_logprobs=3)
  setup = dataclasses.replace(e.setup, share_from=None, varied_rows=True)
  return Engine(setup, e.weights)


def scheduler(budget=None, most=0):
  store = PrefixStore(T, most) if most else None
  return Scheduler(Rows(served(), Words()), budget, store)


def drained(s, jobs):
  """Submit jobs and run them all: the ids of each (prompt, sample)."""
  for job in jobs:
    s.submit(job)
  found = {}
  while s.busy:
    for _, event in s.step():
      if isinstance(event, Token):
        found.setdefault((event.prompt, event.sample), []).append(event.id)
  return found


def alone(requests):
  return run(served(), requests)[0]


def fed(ids, known=(), scored=False):
  feeding = Feeding(served(), Request(ids), known, scored)
  kept = []
  while feeding.prefix is None:
    feeding.feed()
    kept.append(feeding.kept())
  return feeding, [piece for piece in kept if piece is not None]


# -- prompts in pieces -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 16, 17, 61])
def test_logits_after_kept_pieces_are_the_same_bits(n):
  whole, kept = fed(LONG[:n])
  assert len(kept) == n // T
  for m in range(1, (n - 1) // T + 1):
    part, _ = fed(LONG[:n], kept[:m])
    np.testing.assert_array_equal(part.prefix.logits_1V, whole.prefix.logits_1V)
    assert part.prefix.len_1 == n


def test_pieces_of_another_beginning_would_be_noticed():
  """The test above can fail."""
  whole, _ = fed(LONG[:17])
  _, kept = fed((1, *LONG[1:17]))
  part, _ = fed(LONG[:17], kept[:1])
  assert (part.prefix.logits_1V != whole.prefix.logits_1V).any()


@pytest.mark.parametrize("n", [1, 3, 8, 9, 16, 61])
def test_scores_of_a_prompt_are_those_of_the_forward_pass(n):
  ids = LONG[:n]
  feeding, _ = fed(ids, scored=True)
  w = small_weights()
  x_1TD, *_ = llama.forward(SMALL, w, np.asarray([ids]))
  want_TV = np.asarray(jax.nn.log_softmax(llama.unembed(w, x_1TD)))[0]
  logp_T, logp_TC, id_TC = (np.concatenate(x)[: n - 1] for x in zip(*feeding.scores, strict=True))
  np.testing.assert_allclose(logp_T, want_TV[np.arange(n - 1), ids[1:]], atol=2e-4)
  np.testing.assert_array_equal(id_TC, np.argsort(-want_TV[: n - 1], kind="stable")[:, :3])
  np.testing.assert_allclose(logp_TC, np.take_along_axis(want_TV[: n - 1], id_TC, 1), atol=2e-4)
  plain, _ = fed(ids)
  np.testing.assert_allclose(feeding.prefix.logits_1V, plain.prefix.logits_1V, atol=2e-4)


def test_a_long_prompt_stops_other_rows_for_no_longer_than_a_piece():
  s = scheduler(budget=T)
  want = alone([Request([3, 1, 4], 150, seed=1), Request(LONG, 10, seed=2)])
  s.submit(Samples(Request([3, 1, 4], 150, seed=1), 0))
  events = [[e for _, e in s.step()] for _ in range(3)]
  s.submit(Samples(Request(LONG, 10, seed=2), 1))
  while s.busy:
    events.append([e for _, e in s.step()])
  got = [[e.id for part in events for e in part if e.prompt == i] for i in range(2)]
  assert got == want
  first = next(i for i, part in enumerate(events) if any(e.prompt == 1 for e in part))
  between = [sum(e.prompt == 0 for e in part) for part in events[3:first]]
  assert len(between) >= len(LONG) // T
  assert all(between[: len(LONG) // T])


def test_the_budget_counts_tokens_of_several_prompts():
  s = scheduler(budget=2 * T)
  s.submit(Samples(Request([5], 60), 0))
  list(s.step())
  for i in range(3):
    s.submit(Samples(Request(LONG[i : i + 6], 4), i + 1))
  list(s.step())  # 6 + 6 + 6 > 16, and the third begins below the budget
  assert [job.prompt for job in s.active] == [0, 1, 2, 3]


# -- kept beginnings ---------------------------------------------------------------------------------


def test_prompts_that_begin_alike_are_fed_once_and_say_the_same(monkeypatch):
  todo = [Request(LONG[:n], 8, seed=n) for n in (60, 61, 33, 24, 60)]
  want = alone(todo)
  s = scheduler(most=100)
  jobs = [Samples(r, i) for i, r in enumerate(todo)]
  hashed, keys = [], s.store.keys
  monkeypatch.setattr(s.store, "keys", lambda ids, salt: hashed.append(len(ids)) or keys(ids, salt))
  got = drained(s, jobs)
  assert [got[i, 0] for i in range(5)] == want
  assert hashed == [60, 61, 33, 24, 60]  # once for each prompt, not for each piece
  assert [job.cached for job in jobs] == [0, 56, 32, 16, 56]
  assert (s.store.asked, s.store.found) == (238, 160)


def test_salts_keep_users_apart():
  s = scheduler(most=100)
  jobs = [Samples(Request(LONG, 2), i) for i in range(4)]
  for job, salt in zip(jobs, ("a", "b", "a", ""), strict=True):
    job.salt = salt
  drained(s, jobs)
  assert [job.cached for job in jobs] == [0, 0, 56, 0]


def test_the_store_forgets_ends_before_beginnings_and_old_ones_first():
  store = PrefixStore(2, 3)

  def add(*ids):
    for end in range(2, len(ids) + 1, 2):
      store.add(store.keys(ids[:end]), ids[end - 2 : end])

  def found(*ids):
    return [x for piece in store.find(store.keys(ids), len(ids)) for x in piece]

  add(1, 2, 3, 4, 5, 6)
  assert found(1, 2, 3, 4, 5, 6, 7) == [1, 2, 3, 4, 5, 6]
  assert found(1, 2, 3, 4, 5, 6) == [1, 2, 3, 4]  # the last token is always fed
  assert found(1, 2, 9, 4, 5) == [1, 2]
  assert found(2, 1, 3) == []
  add(8, 9)
  assert found(1, 2, 3, 4, 5, 6, 7) == [1, 2, 3, 4]
  add(7, 7, 6, 6)  # and the next end leaves
  assert found(1, 2, 3, 4, 5) == [1, 2]
  assert len(store) == 3
  store.add(store.keys((5, 5, 4, 4)), "orphan")  # without what is before it nothing finds it
  assert len(store) == 3
  assert PrefixStore(2, 0).keys((1, 2, 3)) == []


# -- jobs that come and go -----------------------------------------------------------------------------


def test_random_jobs_with_random_ends_leave_all_rows_free_and_say_what_they_say_alone():
  random_ = random.Random(0)
  knobs = [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 5}, {"min_p": 0.1}]
  s, live, seen, gone = scheduler(budget=T, most=20), {}, {}, set()
  todo = {}
  for i in range(60):
    start, n = random_.choice((0, 0, 7)), random_.randrange(1, 40)
    ids = LONG[start : start + n]
    todo[i] = Request(ids, random_.randrange(1, 30), i, i, knobs=random_.choice(knobs))
  queue = [*todo]
  while queue or s.busy:
    for _ in range(random_.randrange(3)):
      if queue:
        i = queue.pop(0)
        live[i] = Samples(todo[i], i, n=random_.choice((1, 1, 3)))
        s.submit(live[i])
    for job, event in s.step():
      assert job.prompt not in gone
      seen.setdefault((job.prompt, event.sample), []).append(event.id)
    for job in s.ended:
      del live[job.prompt]
    if live and random_.random() < 0.15:
      job = live.pop(random_.choice([*live]))
      assert s.cancel(job) in ("queued", "prefill", "decode")
      gone.add(job.prompt)
      assert all(row is None or row.prompt != job.prompt for row in s.rows.slots)
  assert s.rows.free == 4
  assert not s.active
  assert not s.rows.busy
  assert s.cancel(job) == "done"
  whole = [key for key in seen if key[0] not in gone]
  assert len(whole) > 40
  assert len(gone) > 5
  asked = [dataclasses.replace(todo[i], stream=todo[i].stream + j) for i, j in whole]
  assert [seen[key] for key in whole] == alone(asked)


def test_a_prompt_that_is_given_up_while_it_is_fed_is_not_fed_further():
  s = scheduler(budget=T)
  s.submit(Samples(Request([5], 60), 0))
  list(s.step())
  job = Samples(Request(LONG, 4), 1)
  s.submit(job)
  list(s.step())
  assert s.feeding[0] is job
  assert s.cancel(job) == "prefill"
  got = drained(s, [Samples(Request(PROMPTS[0], 4, seed=3), 2)])
  assert got[2, 0] == alone([Request(PROMPTS[0], 4, seed=3)])[0]


def test_jobs_without_rows_need_no_free_one_and_overtake_nobody():
  s = scheduler()
  jobs = [
    Samples(Request(LONG[i : i + 5], 30, seed=i), i, n=int(i not in (4, 6))) for i in range(7)
  ]
  jobs[4].score = 3
  for job in jobs:
    s.submit(job)
  list(s.step())
  assert s.ended == [jobs[4]]
  assert len(jobs[4].scores) == 1
  assert [*s.waiting] == jobs[5:]
  assert s.rows.free == 0
  drained(s, [])
  assert all(job.done for job in jobs)


def test_only_rows_that_ask_have_alternatives():
  todo = [Request(PROMPTS[0], 6, seed=1), Request(PROMPTS[1], 6, seed=2, alternatives=False)]
  s = scheduler()
  for i, r in enumerate(todo):
    s.submit(Samples(r, i))
  tokens = []
  while s.busy:
    tokens += [event for _, event in s.step()]
  want = [t for t in tokens if t.prompt == 0]
  assert all(len(t.top) == 3 for t in want)
  assert all(t.top == () for t in tokens if t.prompt == 1)
  assert all(t.top[0][2] >= t.top[1][2] >= t.top[2][2] for t in want)
  assert any(t.top[0][0] == t.id and t.top[0][2] == t.logprob for t in want)


def test_rows_move_to_the_first_slots_so_that_dispatches_have_fewer_rows(monkeypatch):
  todo = [Request(PROMPTS[0], n, seed=n) for n in (4, 12, 60, 8)]
  want, counts = alone(todo), []
  s = Scheduler(Rows(served(), Words(), ahead=0))
  real = s.rows.decoder.decode
  monkeypatch.setattr(
    s.rows.decoder, "decode", lambda *args, rows: counts.append(rows) or real(*args, rows=rows)
  )
  got = drained(s, [Samples(r, i) for i, r in enumerate(todo)])
  assert [got[i, 0] for i in range(4)] == want
  assert counts == [4, 2, *[1] * 6]
  assert s.rows.free == 4


def test_a_server_compiles_everything_before_it_begins():
  """No request of any length, scored or not, with kept pieces or not, needs another program."""
  e = served()
  programs = set(any_request(e.setup))
  used = set()
  original = e.compiled.__getitem__

  class Noted(dict):
    def __getitem__(self, program):
      used.add(program)
      return original(program)

  twin = Engine(e.setup, e.weights)
  twin.compiled = Noted()
  s = Scheduler(Rows(twin, Words()), T, PrefixStore(T, 100))
  lengths = (1, 7, 8, 9, 16, 17, 33, 61)
  jobs = [Samples(Request(LONG[:n], 200), n) for n in lengths]
  scored = [Samples(Request(LONG[:n], 1), 100 + n) for n in lengths]
  for job in scored:
    job.score = 3
  longer = LONG * 4
  jobs += [Samples(Request(longer[:n], 9), 1000 + n) for n in (70, 130, 200, 201, 244)]
  for job in (*jobs, *scored):
    s.submit(job)
  list(s.step())
  s.cancel(jobs[0])
  while s.busy:
    list(s.step())
  assert used <= programs
