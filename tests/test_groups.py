"""Methods that continue a prompt several ways: what they run, what they keep, and that no row is lost."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from test_engine import ENGINES, PROMPTS, Words, decoder_of, engine, run, six

from entropix_jax import errors
from entropix_jax.decoding import adaptive, best_of_n, branch, cot, deepconf, groups, select
from entropix_jax.decoding.drafters import Ngram
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.request import Request
from entropix_jax.rows import Rows, Token

GREEDY = {"temperature": 0.0}


def request(i=1, new=24, **changes):
  return dataclasses.replace(Request(PROMPTS[i], new, seed=5), **changes)


def ask(ended, question):
  return [9, 8] if ended else [7, 9, 8]


def make(kind, r, prompt=0, **options):
  module = {"best": best_of_n, "deepconf": deepconf, "cot": cot, "branch": branch}.get(kind)
  if module:
    return module.Group(r, module.Config(**options), prompt)
  return adaptive.Group(r, adaptive.Config(**options), ask, [3, 4], prompt)


def go(e, made):
  """(tokens, outcomes by prompt) of groups; what was cancelled says nothing afterwards."""
  tokens, outcomes = [], {}
  decoder = decoder_of(e)
  for event in groups.run(decoder.engine, Words(), made, decoder=decoder):
    if isinstance(event, Token):
      assert event.prompt not in outcomes, "a token after the outcome"
      tokens.append(event)
    else:
      outcomes[event.prompt] = event
  for outcome in outcomes.values():
    mine = [t for t in tokens if t.prompt == outcome.prompt]
    assert outcome.tokens_total == len(mine)
    for s in outcome.samples:
      own = [t for t in mine if t.sample == s.index]
      assert own == s.tokens[s.at :]
      assert [t.position for t in s.tokens] == list(range(len(s.tokens)))
      assert s.finish is not None
  return tokens, outcomes


@pytest.mark.parametrize("rows", [8, 3])
def test_eight_samples_are_eight_runs_of_their_own_and_one_prefill(rows, monkeypatch):
  e = engine(rows=rows)
  r = request()
  fed = []
  run_program = e.run
  monkeypatch.setattr(e, "run", lambda p, *args: fed.append(p.verb) or run_program(p, *args))
  _, outcomes = go(e, [make("best", r, n=8, rule="mean_logprob")])
  outcome = outcomes[0]
  assert fed.count("prompt") == 1
  want = run(e, [dataclasses.replace(r, stream=i) for i in range(8)])[0]
  assert [[t.id for t in s.tokens] for s in outcome.samples] == want
  assert outcome.prefix_copies == rows  # so short a prompt is copied
  assert outcome.prefix_bytes == Rows(e, Words()).prefix_bytes(r)
  mean = [np.mean([t.numbers["logprob"] for t in s.tokens]) for s in outcome.samples]
  np.testing.assert_allclose(outcome.scores, mean)
  assert outcome.chosen == int(np.argmax(mean))


@pytest.mark.parametrize("rule", list(select.RULES))
def test_every_rule_chooses(rule):
  e = six()
  if rule == "judge":
    with pytest.raises(errors.UserError, match="adaptive"):
      make("best", request(), rule=rule)
    return
  group = make("best", request(), n=4, rule=rule)
  outcome = go(e, [group])[1][0]
  made = select.choose(rule, group.candidates(), group.answer, **group.config.options)
  assert (outcome.chosen, outcome.answers) == (made.index, made.answers)
  # Words are numbers, so that a text's last word is its answer.
  assert outcome.answer == outcome.text.split()[-1]


@pytest.mark.parametrize("kind", ["best", "cot", "adaptive", "branch", "deepconf"])
def test_prompts_side_by_side_are_as_alone(kind):
  """Each method's samples, choice and facts, whoever shares the rows; and more prompts than rows."""
  e = six()
  options = {
    "best": {"n": 3},
    "cot": {"n": 4},
    "adaptive": {"n": 4, "half": 6},
    "branch": {"ways": 3, "beam": 1, "horizon": 4},
    "deepconf": {"n": 6, "warmup": 3, "window": 4, "eta": 50.0},
  }[kind]
  todo = [request(i, seed=i) for i in range(4)]
  _, together = go(e, [make(kind, r, i, **options) for i, r in enumerate(todo)])
  for i, r in enumerate(todo):
    alone = go(e, [make(kind, r, **options)])[1][0]
    said = together[i]
    assert said.chosen == alone.chosen
    # When a row is pruned depends on when its neighbours end; what it had said does not.
    for a, b in zip(said.samples, alone.samples, strict=False):
      assert all(x.id == y.id for x, y in zip(a.tokens, b.tokens, strict=False))
    assert [s.finish for s in said.samples] == [
      s.finish for s in alone.samples
    ] or kind == "deepconf"


def test_first_tokens_of_cot_decoding_are_the_likeliest():
  e = six()
  r = request(knobs=GREEDY)
  outcome = go(e, [make("cot", r, n=5)])[1][0]
  likely = e.most_likely(e.prefill(r), 5)
  assert [s.tokens[0].id for s in outcome.samples] == likely
  assert [id for id, _, _ in outcome.samples[0].tokens[0].top] == likely[:4]
  assert [t.id for t in outcome.samples[0].tokens] == run(e, [r])[0][0]


# -- DeepConf --------------------------------------------------------------------------------------


def test_deepconf_ends_who_sinks_below_the_bar():
  e = engine(rows=4, **ENGINES)
  options = {"n": 10, "warmup": 4, "window": 4, "eta": 25.0, "share": 1.0}
  r = request(new=40, seed=8)
  group = make("deepconf", r, **options)
  outcome = go(e, [group])[1][0]
  full = run(e, [dataclasses.replace(r, stream=i) for i in range(10)])[0]
  trace = [[t.numbers["confidence"] for t in s.tokens] for s in outcome.samples]
  least = [min(np.mean(c[i : i + 4]) for i in range(len(c) - 3)) for c in trace]
  bar = np.percentile(least[:4], 75)
  assert outcome.facts["bar"] == pytest.approx(bar, rel=1e-4)
  pruned = [s for s in outcome.samples if s.finish == "pruned"]
  assert pruned
  assert {s.index for s in outcome.samples[:4]} & {s.index for s in pruned} == set()
  for s, c, low in zip(outcome.samples[4:], trace[4:], least[4:], strict=True):
    assert (s.finish == "pruned") == (low < bar)
    if s.finish == "pruned":  # at its first group below the bar, and at once
      assert np.mean(c[-4:]) < bar
      assert all(np.mean(c[i : i + 4]) >= bar for i in range(len(c) - 4))
      assert len(c) < 40
    assert [t.id for t in s.tokens] == full[s.index][: len(s.tokens)]
  assert outcome.samples[outcome.chosen].finish != "pruned"


def test_deepconf_stops_when_the_vote_is_settled():
  """Everybody says the same: after the warm-up one more sample settles it, and nobody else begins."""
  e = engine(rows=4, **ENGINES)
  sure = request(knobs=GREEDY)
  outcome = go(e, [make("deepconf", sure, n=40, warmup=3, window=4)])[1][0]
  assert 3 < len(outcome.samples) <= 8
  assert len(set(outcome.answers)) == 1


# -- self-evaluation -------------------------------------------------------------------------------


def test_adaptive_rounds_heat_and_judgement():
  e = engine(rows=8)
  r = request()
  group = make("adaptive", r, n=8, enough=1.0, heat=2.0)
  outcome = go(e, [group])[1][0]
  heat = [0.0, 1.0, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375]
  each = [dataclasses.replace(r, stream=i, knobs={"temperature": t}) for i, t in enumerate(heat)]
  assert [[t.id for t in s.tokens] for s in outcome.samples] == run(e, each)[0]
  # The judgement is the model's, on the text and the suffix.
  rows = Rows(e, Words())
  row = rows.admit(each[0], rows.engine.prefill(each[0]), stays=True)
  while rows.busy:
    list(rows.step())
  good, bad = rows.score({row: ask(False, "")}, [3, 4])[row]
  assert outcome.scores[0] == pytest.approx(1 / (1 + np.exp(bad - good)), abs=1e-4)
  assert outcome.chosen == int(np.argmax(outcome.scores))
  assert outcome.facts["judged_tokens"] == 8 * 3


def test_adaptive_stops_when_one_is_good_enough():
  e = engine(rows=8)
  everything = go(e, [make("adaptive", request(), n=8, enough=1.0)])[1][0]
  scores = everything.scores
  ends = [1, 2, 4, 8]  # samples after each round
  for enough in sorted(scores)[1::2]:
    n = next(k for k in ends if max(scores[:k]) >= enough)
    outcome = go(e, [make("adaptive", request(), n=8, enough=enough * (1 - 1e-6))])[1][0]
    assert len(outcome.samples) == n
    np.testing.assert_allclose(outcome.scores, scores[:n], atol=1e-5)


def test_adaptive_prunes_half_way():
  e = engine(rows=8)
  outcome = go(e, [make("adaptive", request(), n=8, enough=1.0, half=6, half_keep=0.5)])[1][0]
  rounds = [range(1), range(1, 2), range(2, 4), range(4, 8)]
  for r in rounds:
    pruned = [s for s in r if outcome.samples[s].finish == "pruned"]
    assert len(pruned) == len(r) // 2
    assert all(len(outcome.samples[s].tokens) == 6 for s in pruned)
  assert outcome.samples[outcome.chosen].finish != "pruned"


# -- branching -------------------------------------------------------------------------------------


def tree(r, **options):
  """(tokens, outcome) of one branching group."""
  tokens, outcomes = go(six(), [make("branch", r, **options)])
  return tokens, outcomes[0]


OPTIONS = {"ways": 3, "beam": 2, "horizon": 5, "ent": 0.3}


@functools.cache
def grown():
  return tree(request(new=40, knobs=GREEDY), budget=10_000, **OPTIONS)[1]


def test_forks_stand_where_the_model_is_uncertain_and_go_the_likeliest_ways():
  outcome = grown()
  assert outcome.facts["forks"] > 2
  children = [s for s in outcome.samples if s.parent is not None]
  assert len(children) == 2 * outcome.facts["forks"]
  for s in children:
    parent = outcome.samples[s.parent]
    token, there = s.tokens[s.at], parent.tokens[s.at]
    assert token.numbers["entropy"] > OPTIONS["ent"]
    assert token.fork
    assert token.forced
    assert there.forced
    assert [t.id for t in s.tokens[: s.at]] == [t.id for t in parent.tokens[: s.at]]
    likely = [id for id, _, _ in there.top[:3]]
    assert there.id == likely[0]
    assert token.id in likely[1:]


def test_a_branch_is_what_the_model_says_after_its_prefix():
  """Every token of a greedy tree that was not forced is the model's choice there."""
  for s in grown().samples[:8]:
    forced = [t.position for t in s.tokens if t.forced]
    start = forced[-1] + 1 if forced else 0
    prompt = [*PROMPTS[1], *(t.id for t in s.tokens[:start])]
    n = len(s.tokens) - start
    if n:
      after = Request(prompt, n, seed=5, knobs=GREEDY)
      assert [t.id for t in s.tokens[start:]] == run(six(), [after])[0][0]


def test_losers_are_pruned_at_the_horizon():
  outcome = grown()
  pruned = [s for s in outcome.samples if s.finish == "pruned"]
  assert pruned
  horizon = OPTIONS["horizon"]
  for s in pruned:
    assert s.own >= horizon
    assert s.tokens[-horizon].forced
    n = len(s.tokens) - horizon
    kept = [t for t in outcome.samples if len(t.tokens) > len(s.tokens)]
    kept = [t for t in kept if all(t.tokens[i].id == s.tokens[i].id for i in range(n))]
    mean, *others = (
      np.mean([x.numbers["logprob"] for x in t.tokens[n:][:horizon]]) for t in (s, *kept)
    )
    assert all(other >= mean for other in others)
  assert any(s.finish == "length" for s in outcome.samples)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20, 33, 50, 64, 100])
def test_the_budget_is_kept_exactly(budget, monkeypatch):
  """On the device, too: no row emits a token that is not counted."""
  e = six()
  emitted = []
  unpack = e.unpack

  def spy(record):
    values = unpack(record)
    emitted.append(int((values["flags"] & 1).sum()))
    return values

  monkeypatch.setattr(e, "unpack", spy)
  tokens, outcome = tree(request(new=40), budget=budget, **OPTIONS)
  assert len(tokens) == outcome.tokens_total == sum(emitted)
  assert outcome.tokens_total == budget or all(
    s.finish in ("length", "stop", "pruned") for s in outcome.samples
  )
  assert outcome.tokens_total <= budget
  if budget <= 33:
    assert outcome.tokens_total == budget


@pytest.mark.parametrize("budget", [40, 45, 60, 80, 0])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_way_may_always_end(budget, seed):
  """A budget that is at least one text's limit is not what ends the chosen text."""
  r = dataclasses.replace(request(new=40), seed=seed)
  _, outcome = tree(r, budget=budget, **OPTIONS)
  assert outcome.samples[outcome.chosen].finish in ("length", "stop")
  assert outcome.tokens_total <= (budget or 80 + 30)
  assert outcome.facts["forks"] or 0 < budget < 60


@pytest.mark.parametrize("beam", [1, 2])
def test_by_default_there_is_room_for_a_round(beam):
  """However short the text: a limit below the horizon of all ways."""
  _, outcome = tree(request(new=12), ways=3, beam=beam, horizon=5, ent=0.3)
  assert outcome.facts["forks"]
  assert outcome.samples[outcome.chosen].finish in ("length", "stop")


@pytest.mark.parametrize(
  ("votes", "answers", "words"),
  [
    ({"4": 2.0, "5": 1.0}, ("4", "5", "4"), "majority: '4' holds 67% of the votes."),
    ({"4": 1.0, "5": 1.0}, ("4", "5", None), "a tie of '4', '5', each with 50% of the votes"),
    ({}, (None,) * 3, "by mean_logprob, because majority found nothing to choose by (-0.5)."),
  ],
)
def test_why_a_sample_was_chosen_is_said_of_ties_and_without_votes(votes, answers, words):
  judge = "majority" if votes else "mean_logprob"
  facts = ((-0.5, -1.0, -2.0), answers, votes, 0, 0)
  outcome = groups.Outcome(0, "best_of_n", "majority", judge, 0, (None,) * 3, *facts)
  assert outcome.why.startswith("Sample 1 of 3, by ")
  assert words in outcome.why


def test_without_a_fork_it_is_plain_decoding():
  _, outcome = tree(request(new=40), ways=3, beam=2, ent=90.0)
  assert [[t.id for t in s.tokens] for s in outcome.samples] == run(six(), [request(new=40)])[0]
  assert outcome.facts["forks"] == 0


# -- who drafts does not matter, and nothing is lost -----------------------------------------------


@pytest.mark.parametrize("kind", ["best", "branch"])
def test_methods_above_a_drafter(kind):
  e = six()
  fast = SpeculativeDecoder(e, Ngram(least=1), always=True)
  options = {"n": 8} if kind == "best" else OPTIONS
  outcomes = [go(x, [make(kind, request(new=40), **options)])[1][0] for x in (e, fast)]
  a, b = ([[t.id for t in s.tokens] for s in o.samples] for o in outcomes)
  assert a == b
  assert outcomes[0].chosen == outcomes[1].chosen


def test_two_thousand_random_requests_leave_no_row_behind():
  """Admitted, paused, forked, woken and cancelled at random: every text is a prefix of its own run's."""
  e = engine(rows=8)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 211, n).tolist() for n in (1, 5, 20, 40)]
  rows = Rows(e, Words())
  prefixes = [rows.engine.prefill(Request(ids)) for ids in prompts]
  said, live, begun = {}, [], itertools.count()
  requests = {}
  ended = cancelled = forked = 0
  while ended + cancelled < 2000:
    while rows.free and len(live) < 8:
      i, p = next(begun), int(rng.integers(4))
      new = int(rng.integers(1, 25))
      requests[i] = Request(prompts[p], new, seed=int(rng.integers(50)))
      limit = int(rng.integers(1, new + 1)) if rng.random() < 0.3 else None
      live.append(rows.admit(requests[i], prefixes[p], i, limit=limit))
      said[i] = []
    for event in rows.step():
      if isinstance(event, Token):
        said[event.prompt].append(event.id)
        continue
      if rows.free and rng.random() < 0.5:
        i = next(begun)
        twin = rows.fork(event.row, 0, 0)
        twin.prompt, said[i], requests[i] = i, list(said[event.row.prompt]), event.row.request
        live.append(twin)
        forked += 1
      if rng.random() < 0.8:
        rows.wake(event.row)
      else:
        rows.cancel(event.row)
        cancelled += 1
    ended += sum(row.done for row in live if not row.waits)
    for row in live:
      if not row.done and rng.random() < 0.02:
        rows.cancel(row)
        cancelled += 1
    live = [row for row in live if not row.done]
  for row in live:
    rows.cancel(row)
  while rows.busy:
    assert not list(rows.step())
  assert rows.free == 8
  rows._flush()
  assert not np.asarray(rows.state.live_B).any()
  assert forked > 30
  assert cancelled > 100
  some = [i for i in sorted(said) if said[i]][:: len(said) // 12]
  for i in some:
    assert run(e, [requests[i]])[0][0][: len(said[i])] == said[i]


@pytest.mark.parametrize(
  ("kind", "options", "words"),
  [
    ("best", {"n": 0}, "at least 1"),
    ("best", {"rule": "luck"}, "no rule 'luck'"),
    ("best", {"rule": "majority", "window": 3}, "not for the rule majority"),
    ("deepconf", {"warmup": 20}, "between 1 and"),
    ("cot", {"combine": "max"}, "one of sum, best"),
    ("adaptive", {"enough": 1.5}, "up to 1"),
    ("adaptive", {"question": " "}, "not be empty"),
    ("branch", {"ways": 1}, "at least 2"),
    ("branch", {"rule": "majority"}, "has no answer yet"),
    ("best", {"answer": "regex:("}, "no regular expression"),
  ],
)
def test_bad_options_are_refused(kind, options, words):
  with pytest.raises(errors.UserError, match=words):
    make(kind, request(), **options)


def test_more_ways_than_rows_are_refused():
  with pytest.raises(errors.UserError, match="holds 6 rows at once"):
    go(engine(rows=4, **ENGINES), [make("branch", request(), **OPTIONS)])
