"""A union of samplers: each row of a mixed batch is what it is in an engine with its own sampler alone."""

import functools
import types

import contract
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal
from test_engine import KNOBS, PROMPTS, engine, tokens_of
from test_rows import admitted, drain, ids

from entropix_jax import sampling
from entropix_jax.decoding import adaptive, groups
from entropix_jax.decoding.drafters import Ngram, _with_lead
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine import record
from entropix_jax.engine.request import Request, check_request
from entropix_jax.rows import Token
from entropix_jax.sampling._union import Union, union

ALL = union(sampling.names())
PASSAGE = {"inject": [5, 6, 7], "inject_ent": 0.5}
MIXED = (
  ("quadrant", KNOBS["quadrant"], {}),
  ("plain", KNOBS["plain"], {}),
  ("dslider", {"warm_up": 2, "threshold": 0.2}, {}),
  ("entropy_target", {"steer": True, "w_now": 0.5, "w_mean": 0.3}, PASSAGE),
  ("plain", {"temperature": 0.0}, {}),
  ("plain", {"dry_multiplier": 0.8, "dry_allowed_length": 1, "logit_bias": {3: 4.0}}, PASSAGE),
  ("quadrant", {}, PASSAGE),
  ("dslider", {}, PASSAGE),
  ("plain", {"adaptive_p_target": 0.4, "banned": [1, 4], "presence_penalty": 1.0}, {}),
  ("entropy_target", {}, {}),
)


def requests(mixed=MIXED, new=26):
  """Their prompts, lengths and seeds differ."""
  return [
    Request(PROMPTS[i % 5], new - i, 50 + i, sampler=name, knobs=knobs, actions=actions)
    for i, (name, knobs, actions) in enumerate(mixed)
  ]


def said(tokens, i):
  """(ids, branches, finishes) and the numbers of a request's tokens."""
  mine = [t for t in tokens if t.prompt == i]
  return [(t.id, t.branch, t.finish) for t in mine], [t.numbers for t in mine]


@functools.cache
def alone(i):
  """What request i gives by itself in an engine with its sampler alone."""
  request = requests()[i]
  return said(tokens_of(engine(request.sampler), [request]), 0)


def assert_as_alone(tokens, i):
  texts, numbers = said(tokens, i)
  assert texts == alone(i)[0], MIXED[i]
  for ours, theirs in zip(numbers, alone(i)[1], strict=True):
    assert list(ours) == list(theirs)
    values = list(theirs.values())
    np.testing.assert_allclose(list(ours.values()), values, atol=2e-4, rtol=1e-3)


def test_each_row_of_a_mixed_batch_is_as_alone():
  """Ten requests through five slots, so slots change their sampler, too."""
  tokens = tokens_of(engine(ALL), requests())
  for i in range(len(MIXED)):
    assert_as_alone(tokens, i)
  assert len({t.branch for t in tokens}) >= 8


def test_speculation_over_a_union():
  """Draws of every kind are checked by running that kind."""
  e = SpeculativeDecoder(engine(ALL), Ngram(least=1), always=True)
  tokens = tokens_of(e, requests())
  for i in range(len(MIXED)):
    assert said(tokens, i)[0] == alone(i)[0]
  assert any(t.accepted for t in tokens)


@pytest.mark.parametrize("i", [0, 1, 2, 3])
def test_forks_and_rewinds_of_a_row(i):
  """A fork with the row's noise says the same, and so does the row when it is rewound."""
  request, e = requests()[i], engine(ALL)
  want = [id for id, *_ in alone(i)[0]]
  rows, row = admitted(e, request, limit=9)
  before = drain(rows)
  rows.fork(row, sample=1, stream=0)
  rows.state = e.rewind(rows.state, row.slot, request, 9, attempt=0)
  rows.wake(row)
  events = drain(rows)
  assert ids(before) + ids(events) == ids(before) + ids(events, 1) == want
  for sample in (0, 1):
    mine = [t for t in events if isinstance(t, Token) and t.sample == sample]
    assert [(t.id, t.branch, t.finish) for t in mine] == alone(i)[0][9:]
    assert [list(t.numbers) for t in mine] == [list(x) for x in alone(i)[1][9:]]


# -- laws ------------------------------------------------------------------------------------------


def stacked(configs):
  return jax.tree.map(lambda *x: np.concatenate(x), *map(sampling.arrays, configs))


def mixed_rows(B):
  """(sampler, knobs) of each row: all kinds in turn, each with its defaults, cases and USES in turn."""
  settings = {}
  for name in ALL.kinds:
    module = sampling.find(name)
    cases = [{k: v for k, v in case.items() if k != "p"} for case in module.CASES.values()]
    settings[name] = [{}, *cases, *getattr(module, "USES", ())]
  each = [(ALL.kinds[b % 4], b // 4) for b in range(B)]
  return [(name, settings[name][n % len(settings[name])]) for name, n in each]


def test_laws_and_branches_are_those_of_each_rows_kind():
  """Over some steps, so with their states; a row whose logits are not finite is of no other's concern."""
  B, rng = 32, np.random.default_rng(5)
  rows, obs = mixed_rows(B), contract.mixed_observation(rng, B)
  order = rng.permutation(B)
  obs = jax.tree.map(lambda x: x[order], obs)
  bad = {3: np.nan, 12: np.inf, 21: -np.inf}
  poisoned = obs.replace(
    logits_BV=obs.logits_BV.at[np.array([*bad])].set(np.array([[*bad.values()]]).T)
  )
  poisoned = poisoned.replace(raw=contract.metrics.spread(poisoned.logits_BV))
  cfg = stacked([sampling.row_config(ALL, *row) for row in rows])
  law_TBV, branch_TB, state = contract.play(ALL, cfg, poisoned)
  offset = 0
  for k, name in enumerate(ALL.kinds):
    module = sampling.find(name)
    knobs = [row[1] if row[0] == name else {} for row in rows]
    own = stacked([sampling.configure(module, x) for x in knobs])
    want_TBV, code_TB, after = contract.play(module, own, obs)
    mine = [b for b in range(B) if rows[b][0] == name and b not in bad]
    np.testing.assert_allclose(law_TBV[:, mine], want_TBV[:, mine], atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(branch_TB[:, mine], code_TB[:, mine] + offset)
    for ours, theirs in zip(jax.tree.leaves(state[k]), jax.tree.leaves(after), strict=True):
      np.testing.assert_allclose(ours[np.array(mine)], theirs[np.array(mine)], atol=1e-5, rtol=1e-5)
    offset += len(module.BRANCHES)
  assert offset == len(ALL.BRANCHES)


def test_rows_are_strangers():
  assert contract.strangers(ALL) == []


# -- what is computed ------------------------------------------------------------------------------


@flax.struct.dataclass
class Knob:
  x: float = 1.0


def spy(log, name, own, score):
  """A kind whose state counts its tokens and which records what is computed of it."""

  def step(cfg, state, obs):
    jax.debug.callback(lambda: log.append((name, "step")))
    logits_BV = obs.logits_BV
    stats, aux = {own: cfg.x}, state + 1.0
    score_BV = -logits_BV if score else None
    return sampling.Decision(jax.nn.log_softmax(logits_BV), obs.token_B, stats, aux, score_BV)

  def commit(cfg, state, decision, token_B):
    jax.debug.callback(lambda: log.append((name, "commit")))
    return decision.aux

  parts = {"BRANCHES": (f"{name}0", f"{name}1"), "Config": Knob, "step": step, "commit": commit}
  return types.SimpleNamespace(__name__=f"x.{name}", init=lambda cfg, B: jnp.zeros(B), **parts)


@pytest.fixture
def spies(monkeypatch):
  """(what was computed, a union of two spies)."""
  log = []
  kinds = {"a": spy(log, "a", "first", False), "b": spy(log, "b", "second", True)}
  monkeypatch.setattr(sampling, "find", kinds.get)
  return log, Union(("a", "b"))


@pytest.mark.parametrize("kinds", ["aa", "bb", "ab"])
def test_only_what_some_row_uses_is_computed(spies, kinds):
  log, both = spies
  obs = contract.observe(np.log([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]))
  cfg = stacked([sampling.row_config(both, kind, {"x": 2.0}) for kind in kinds])
  decision, state = contract.decide(both, cfg, obs)
  jax.effects_barrier()
  assert sorted(log) == [(k, verb) for k in sorted({*kinds}) for verb in ("commit", "step")]
  a_B = np.array([kind == "a" for kind in kinds])
  np.testing.assert_array_equal(decision.branch_B, np.where(a_B, 0, 2))
  np.testing.assert_array_equal(decision.stats["first"], np.where(a_B, 2.0, np.nan))
  np.testing.assert_array_equal(decision.stats["second"], np.where(a_B, np.nan, 2.0))
  sign_B1 = np.where(a_B, 1.0, -1.0)[:, None]
  np.testing.assert_array_equal(decision.score_BV, sign_B1 * obs.logits_BV)
  np.testing.assert_array_equal(state, [a_B, ~a_B])


def test_a_drafter_takes_a_kind_without_a_temperature_for_temperature_1():
  obs = contract.observe(np.log([[0.5, 0.3, 0.2]] * 2))
  law_BV = jax.nn.log_softmax(obs.logits_BV)

  def lead(temps):
    stats = {"temperature": jnp.asarray(temps)}
    decision = sampling.Decision(law_BV, obs.token_B, stats, score_BV=obs.logits_BV)
    return np.asarray(_with_lead(decision, obs.key_B2, obs.pos_B)[1])

  np.testing.assert_array_equal(lead([np.nan, 2.0]), lead([1.0, 2.0]))


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("sampler", "change", "words"),
  [
    (ALL, {"sampler": "mirostat"}, ["'mirostat'", "dslider, entropy_target, plain, quadrant"]),
    ("plain", {"sampler": "quadrant"}, ["no sampler 'quadrant'", "it has: plain"]),
    (ALL, {"sampler": "plain", "knobs": {"low_ent": 1.0}}, ["'plain' has no knob 'low_ent'"]),
    (ALL, {"knobs": {"top_k": 3}}, ["'dslider' has no knob 'top_k'"]),
    (ALL, {"sampler": "plain", "knobs": {"banned": [500]}}, ["500 in banned is outside"]),
    (ALL, {"actions": {"inject": [500]}}, ["500 in inject is outside"]),
  ],
)
def test_bad_requests_are_refused(sampler, change, words):
  refusal(words, check_request, engine(sampler).setup, Request([1], **change))


def test_the_sampler_of_an_engine_may_be_named_or_not():
  for name in ("", "plain"):
    check_request(engine("plain").setup, Request([1], sampler=name, knobs={"top_k": 3}))
  first = tokens_of(engine(ALL), [Request([1], 4)])
  named = tokens_of(engine(ALL), [Request([1], 4, sampler=ALL.kinds[0])])
  assert said(first, 0) == said(named, 0)


def test_unions_are_made_once_and_of_known_samplers():
  assert union(["plain", "quadrant"]) is union(("plain", "quadrant"))
  assert union(["plain", "plain"]).kinds == ("plain",)
  refusal(["no sampler 'mirostat'", "plain"], union, ["plain", "mirostat"])
  refusal(["at least one sampler"], union, [])


def test_a_method_asks_the_rows_own_sampler_for_its_knobs():
  def check(sampler):
    request = Request([1], sampler=sampler)
    group = adaptive.Group(request, adaptive.Config(), lambda *_: [], [0, 1])
    groups.check_groups(engine(ALL).setup, [group])

  check("plain")
  refusal(["'quadrant' does not have"], check, "quadrant")


def test_a_single_sampler_costs_the_host_nothing():
  assert record.own(engine("plain").setup, "plain") is None
  rows, row = admitted(engine(ALL), requests()[0])
  assert len(row.own) < len(record.numbers(rows.engine.setup))
