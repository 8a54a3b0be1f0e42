"""A prefix that rows have in common: nothing of a row depends on whether it has a copy instead."""

import dataclasses
import functools

import numpy as np
import pytest
from test_engine import ENGINES, PROMPTS, Words, assert_live_same, poisoned, run
from test_engine import engine as wide
from test_groups import go, make
from test_rows import request

from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program, compile_all, needed
from entropix_jax.engine.request import Request
from entropix_jax.rows import Rows

LONG = tuple(int(i) for i in np.random.default_rng(0).integers(20, 90, 150))
OTHER = PROMPTS[1]


@functools.cache
def engine(share_from: int | None = 1, **changes):
  """An engine of its own, which shares prompts from so many tokens on."""
  same = wide(**changes)
  e = Engine(dataclasses.replace(same.setup, share_from=share_from), same.weights)
  e.compiled = same.compiled
  return e


def spoiled(x):
  """A State or a Prefix in which all that no row has is NaN among the keys and huge among the values."""
  return poisoned(x, np.nan, 1e30)


def records(e, ids, shares, spoil=False):
  """Four samples of a prompt and, in their midst, a row of another; what was reported of them."""
  state, found = e.init(), []
  todo = [request(ids=ids, stream=i) for i in range(4)]
  prefix = e.prefill(todo[0])
  if spoil:
    prefix = spoiled(prefix)
  # Two first tokens in one dispatch and two by themselves, so that both ways to begin are seen.
  asked_for = dict(zip((0, 1, 3, 4), todo, strict=True))
  for slots in ((0, 3), (1,), (4,)):
    for slot in slots:
      state = e.insert(state, prefix, slot, asked_for[slot], share=shares)
    state, record = e.first(state, slots)
    found.append(e.unpack(np.asarray(record)[list(slots)]))
  alone = request(ids=OTHER)
  state, record = e.first(e.insert(state, e.prefill(alone), 2, alone), [2])
  found.append(e.unpack(np.asarray(record)[[2]]))
  if spoil:
    state = spoiled(state)
  for i in range(2):
    longest = len(OTHER) + 8 * i + 1 if shares else len(ids) + 8 * i + 1
    state, record = e.decode(state, longest, prefix=prefix if shares else None)
    found.append(e.unpack(np.asarray(record)))
  return found


@pytest.mark.parametrize("ids", [LONG, OTHER, (7,)], ids=len)
def test_rows_that_share_are_rows_that_copy(ids):
  shared, copied, spoiled = (
    records(engine(), ids, *how) for how in ((True,), (False,), (True, True))
  )
  for one, two, three in zip(shared, copied, spoiled, strict=True):
    assert_live_same(one, two)
    assert_live_same(one, three, exact=True)


def test_an_int8_prefix_is_shared_as_it_is():
  e = engine(cache="int8")
  for one, two in zip(records(e, LONG, True), records(e, LONG, False), strict=True):
    assert_live_same(one, two)


def test_forks_rewinds_and_scores_know_what_is_shared():
  def found(shares):
    e, r, out = engine(), request(ids=LONG), []
    prefix = e.prefill(r)
    state, _ = e.first(e.insert(e.init(), prefix, 1, r, share=shares), [1])
    how = {"prefix": prefix} if shares else {}
    n = len(LONG) + 1

    def decode(state):
      state, record = e.decode(state, n + 16, **how)
      values = e.unpack(np.asarray(record))
      out.append({k: x[values["flags"] > 0] for k, x in values.items()})
      return state

    state = decode(state)
    state = e.fork(state, 1, 3, r.seed, 8)
    state = decode(state)
    out.append({"score": e.score(state, n + 24, {1: [5, 6], 3: [7]}, [3, 4, 5], **how)[3]})
    for times, count in enumerate((5, 0)):
      state = e.rewind(state, 1, r, count, times + 1, **how)
      state = decode(e.steer(state, live={1: 1, 3: 0}))
    return out

  for one, two in zip(found(True), found(False), strict=True):
    for column in one:
      np.testing.assert_allclose(one[column], two[column], atol=2e-4, rtol=1e-3, err_msg=column)


def test_one_prefix_at_a_time_and_no_short_one():
  e = engine(share_from=100)
  rows = Rows(e, Words())
  ask = [Request(ids, 8, seed=1) for ids in (OTHER, LONG, LONG[::-1])]
  short, first, second = map(rows.engine.prefill, ask)
  assert rows.admit(ask[0], short, several=True).prefix is None  # too short
  assert rows.admit(ask[1], first).prefix is None  # only one row is expected
  a = rows.admit(ask[1], first, several=True)
  b = rows.admit(ask[2], second, several=True)
  assert a.prefix is first
  assert b.prefix is None  # the first is in use
  assert rows.prefix is first
  rows.cancel(a)
  assert rows.prefix is None
  assert rows.admit(ask[2], second, several=True).prefix is second


@pytest.mark.parametrize("ids", [LONG, OTHER], ids=len)
def test_who_is_cancelled_before_it_began_leaves_nothing(ids):
  """Rows of a prompt begin together at the next dispatch; one whose only token is its first among them."""
  e = engine(share_from=100)
  ask = [Request(ids, new, seed=1, stream=i) for i, new in enumerate((9, 9, 12, 1))]
  want = run(e, ask)[0]
  rows, said = Rows(e, Words()), {}
  prefix = rows.engine.prefill(ask[0])
  first, second, _ = (rows.admit(ask[i], prefix, sample=i, several=True) for i in range(3))
  rows.cancel(second)
  last = rows.admit(ask[3], prefix, sample=3, several=True)
  assert last.slot == second.slot
  nobody = rows.admit(ask[2], prefix, sample=4, several=True)
  rows.cancel(nobody)
  while rows.busy:
    for token in rows.step():
      said.setdefault(token.sample, []).append(token.id)
    assert not np.asarray(rows.state.live_B)[nobody.slot]
  assert said == {0: want[0], 2: want[2], 3: want[3]}
  assert rows.free == len(rows.slots)
  rows.admit(ask[3], prefix, sample=3, several=True)
  assert [token.id for token in rows.step()] + [t.id for t in rows.step()] == want[3]
  assert rows.free == len(rows.slots)
  assert first.done


OPTIONS = {
  "best": {"n": 6},
  "deepconf": {"n": 6, "warmup": 2, "window": 4},
  "cot": {"n": 4},
  "branch": {"ways": 2, "beam": 2, "horizon": 4, "ent": 0.5},
  "adaptive": {"n": 6},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_methods_choose_the_same(kind):
  """Two groups at once: the second copies while the first shares, and a third one may share again."""
  prompts = (LONG, LONG[::-1], OTHER)

  def outcomes(share_from):
    todo = [Request(ids, 20, seed=i) for i, ids in enumerate(prompts)]
    made = [make(kind, r, i, **OPTIONS[kind]) for i, r in enumerate(todo)]
    return go(engine(share_from, rows=6, **ENGINES), made)[1]

  with_it, without = outcomes(1), outcomes(None)
  for i in range(len(prompts)):
    one, two = with_it[i], without[i]
    assert [s.text for s in one.samples] == [s.text for s in two.samples]
    assert one.chosen == two.chosen
    assert one.votes == pytest.approx(two.votes, abs=1e-3)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-3)
    assert one.prefix_copies <= two.prefix_copies
  assert with_it[0].prefix_copies == 1


def test_a_group_compiles_nothing_on_its_way():
  e, r = Engine(engine(100).setup, engine(100).weights), Request(LONG, 20)
  need = needed(e.setup, [r], several=True)
  assert "insert" not in [p.verb for p in need]
  decodes = [p for p in need if p.verb == "decode"]
  assert decodes == [Program("decode", steps=8, window=128, prefix=256)]
  begun = []
  compile_all(e.compiled.jobs(need), begin=begun.append)
  compile_all(e.compiled.jobs(need), begin=begun.append)
  assert begun[1] == 0 <= begun[0] <= len(need)
  before = set(e.compiled)
  go(e, [make("best", r, n=5, rule="mean_logprob")])
  assert set(e.compiled) - before <= {Program("steer")}
