"""Which sample is chosen: each rule by hand, where answers stand, and what must never win."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, refusal

from entropix_jax.decoding import select
from entropix_jax.decoding.select import Candidate, GroupConfidence, answerer, choose

NUMBER = answerer()
STATISTICS = ("logprob", "entropy", "self_certainty", "confidence", "gap")


def sample(text, finish="stop", score=None, pieces=None, **numbers):
  """A sample of one token a character; a number stands for one that all tokens have."""
  pieces = tuple(text) if pieces is None else pieces
  T = len(pieces)
  named = {name: np.broadcast_to(np.float64(x), (T,)) for name, x in numbers.items()}
  return Candidate(text, pieces, {"logprob": np.full(T, -1.0)} | named, finish, score)


def same(a, b):
  return np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # nan is nan


# -- answers -----------------------------------------------------------------------------------


ANSWERS = {
  "last_number": [
    ("There are 3 of 12.", "12"),
    ("1,234", "1234"),
    ("1,234,567.50 in all", "1234567.5"),
    ("12,34", "34"),  # a list
    ("1234,567", "567"),
    ("1,2345", "2345"),
    ("-3", "-3"),
    ("\u22123", "-3"),
    ("It is -$1,200.", "-1200"),
    ("5-3", "3"),  # a minus between two things is no sign
    ("(2)-3", "3"),
    ("x = -3", "-3"),
    ("+7", "7"),
    ("3.50", "3.5"),
    ("3.0", "3"),
    ("100", "100"),  # idle zeros stand behind a point
    ("3.", "3"),
    (".5", "0.5"),
    ("1.5.2", "2"),
    ("-0.0", "0"),
    ("007", "7"),
    ("2e3", "2000"),
    ("25e-2", "0.25"),
    ("1e9999", "9999"),  # no number of ten thousand digits is made of it
    ("10000000000000000000000000000000000001", "10000000000000000000000000000000000001"),
    ("50%", "50"),
    ("\u0663", None),  # a digit of another script
    ("none", None),
    ("", None),
    (". , -", None),
  ],
  "boxed": [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {5.0}", "5"),
    (r"\boxed{\boxed{3} + 1}", "3"),  # what begins last
    (r"\boxed{7} but \boxed{8", "7"),  # the last complete one
    (r"\boxed{\{1}", r"\{1"),  # an escaped brace is no brace
    (r"} \boxed{4}", "4"),
    (r"{ \boxed{4}", "4"),
    (r"\boxed{6} \boxed{ }", "6"),
    (r"{6}", None),
    (r"\boxed 6", None),
    ("\\", None),
  ],
  "final": [
    ("2 + 2 = 4\n#### 4", "4"),
    ("The answer is 5. No, the answer is: 6. Done.", "6"),
    ("THE ANSWER IS Paris.", "paris"),
    ("The answer is **$18.50**.\nBye", "18.5"),
    ("The answer is\n\n7", "7"),
    ("The answer is 3.5 apples and 2", "3.5 apples and 2"),
    ("the answer is 9. So the answer is", "9"),  # cut short
    ("The answer issue 5", None),
    ("5", None),
  ],
}


@pytest.mark.parametrize(
  ("spec", "text", "answer"), [(spec, *pair) for spec, pairs in ANSWERS.items() for pair in pairs]
)
def test_the_answer_is_the_last(spec, text, answer):
  assert answerer(spec)(text) == answer


def test_a_pattern():
  assert answerer(r"regex:[AB]")("A or B") == "b"
  assert answerer(r"regex:(?i)is ([A-D])\b(.)?")("It is A. is C") == "c"
  assert answerer(r"regex:x(\d)?")("x1 x") == "1"  # the group took no part in the last match
  assert answerer(r"regex:x(\d)?")("x") is None
  assert answerer(r"regex:\d*")("12 a ") == "12"  # the last that is not empty
  assert answerer("regex:a:b")("a:b") == "a:b"


def test_equal_answers_are_equal_strings_and_others_are_not():
  for alike in (
    [*r"3.50 $3.5 3.5. \$3.50 03.5 3.5% 3.5\% **3.5** \(3.5\)".split(), "$ 3.50$", " 3.5 "],
    "-1,000 -1000 \u22121e3 -$1000".split(),
    'Yes yes. "YES" *yes*'.split(),
    ["New  York", "new\nyork"],
    [r"\Delta", r"$\Delta$"],
    ["2x", "$2x$"],
  ):
    assert len({select.normalise(x) for x in alike}) == 1
  different = [*r"\Delta \delta 2X 2x 5 5! -5 0.5 50 1,5 1/5".split(), "", "5 m"]
  assert len({select.normalise(x) for x in different}) == len(different)


@pytest.mark.parametrize(
  ("spec", "text", "found"),
  [
    ("last_number", "I have -$1,234.50.", "-$1,234.50"),
    ("boxed", r"so \boxed{ 4 2 } then", "4 2"),
    ("final", "The answer is:  6 apples . ", "6 apples"),
    ("final", "#### 3.5.\n", "3.5"),
    ("regex:is (.*)", "it is  blue ", "blue"),
  ],
)
def test_where_the_answer_stands(spec, text, found):
  start, end = answerer(spec).span(text)
  assert text[start:end] == found
  assert answerer(spec)(text) == select.normalise(found)
  assert answerer(spec).span("nothing") is None


@pytest.mark.parametrize("spec", ["last_number", "boxed", "final", "regex:(a+)b"])
def test_a_text_that_repeats_itself_is_read_in_one_go(spec):
  """Quadratic time would be hours."""
  for piece in ("1,111", "\\boxed{", "answer is ", "answer is   ", "{", "}", " "):
    text = piece * (1_000_000 // len(piece))
    assert answerer(spec)(text) in (None, "111", "1111", "answer is", text)


def test_no_such_way_to_find_answers():
  for spec in ("", "last", "boxed:", "regex", "regex:", "regex:(", "regex:a{99999999999999}"):
    refusal([], answerer, spec)


# -- rules without votes -----------------------------------------------------------------------


def test_sum_and_mean_of_logprobs_and_mean_of_self_certainty():
  samples = [
    sample("abcd", logprob=[-0.5, -0.5, -0.5, -0.5]),
    sample("ab", logprob=[-0.75, -1.0]),
    sample("abc", logprob=[-3.0, 0.0, 0.0]),
  ]
  total = choose("logprob", samples, NUMBER)
  assert (total.index, total.scores) == (1, (-2.0, -1.75, -3.0))
  mean = choose("mean_logprob", samples, NUMBER)
  assert (mean.index, mean.scores) == (0, (-0.5, -0.875, -1.0))
  assert total.votes == mean.votes == {}
  assert total.answers == (None,) * 3

  samples = [sample("a1", self_certainty=[4.0, 0.0]), sample("a2b", self_certainty=2.5)]
  choice = choose("self_certainty", samples, NUMBER)
  assert (choice.index, choice.scores, choice.votes) == (1, (2.0, 2.5), {})
  assert choice.answers == ("1", "2")


def test_a_judge():
  samples = [sample("1", score=0.2), sample("2", score=0.9), sample("3"), sample("4", score=0.9)]
  choice = choose("judge", samples, NUMBER)
  assert choice.index == 1
  same(choice.scores, [0.2, 0.9, np.nan, 0.9])
  assert choose("judge", [sample("1", score=math.inf), *samples[:1]], NUMBER).index == 1
  refusal(["judge"], choose, "judge", [sample("1"), sample("2", "pruned", score=1.0)], NUMBER)


# -- votes -------------------------------------------------------------------------------------


def test_majority():
  samples = [sample(x) for x in ("none", "5", "6.0", "5", "6", "6")]
  choice = choose("majority", samples, NUMBER)
  assert choice.index == 2
  assert choice.votes == {"5": 2.0, "6": 3.0}
  assert choice.answers == (None, "5", "6", "5", "6", "6")
  same(choice.scores, [np.nan, 2, 3, 2, 3, 3])


@pytest.mark.parametrize("texts", [("7", "8"), ("8", "7"), ("8", "7", "7", "8"), ("no", "8", "7")])
def test_of_equal_votes_the_answer_of_the_lowest_index(texts):
  choice = choose("majority", [sample(x) for x in texts], NUMBER)
  assert choice.index == texts.index("7" if texts[0] == "7" else "8")


def test_equal_weights_tie_in_any_order():
  """Added one by one, 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1."""
  weights = (0.3, 0.2, 0.1), (0.1, 0.2, 0.3)
  samples = [sample(x, gap=w) for x, ws in zip("12", weights, strict=True) for w in ws]
  choice = choose("cot", samples, NUMBER)
  assert choice.votes["1"] == choice.votes["2"]
  assert choice.index == 0


def sure(*texts):
  return [sample(text, self_certainty=x) for text, x in texts]


def test_borda():
  """Ranks among five, one of which has no answer: votes 5, 4, 3, 2, 1 to the power."""
  samples = sure(("2", 1.0), ("1", 2.0), ("no", 4.0), ("2", 3.0), ("1", 5.0))
  choice = choose("borda", samples, NUMBER, power=1)
  assert choice.votes == {"2": 3.0 + 1.0, "1": 5.0 + 2.0}
  assert choice.index == 4
  assert choice.scores == (1.0, 2.0, 4.0, 3.0, 5.0)
  assert choose("borda", samples, NUMBER).votes == pytest.approx(
    {"2": 3**0.5 + 1, "1": 5**0.5 + 2**0.5}
  )


def test_borda_between_best_of_n_and_majority():
  samples = sure(("1", 9.0), ("2", 1.0), ("2", 2.0), ("2", 3.0), ("3", 4.0))
  majority = choose("majority", samples, NUMBER)
  zero = choose("borda", samples, NUMBER, power=0)
  assert zero.votes == majority.votes
  # Of those who voted for it the surest, where a majority has nothing to go by.
  assert (zero.index, majority.index) == (3, 1)
  assert choose("borda", samples, NUMBER, power=50).index == 0
  assert choose("self_certainty", samples, NUMBER).index == 0


def test_borda_ranks_equals_in_their_order_and_leaves_out_who_has_no_score():
  samples = sure(("1", 1.0), ("2", 1.0), ("1", np.nan))
  assert choose("borda", samples, NUMBER, power=1).votes == {"1": 2.0, "2": 1.0}


# -- CoT-decoding ------------------------------------------------------------------------------


def test_cot_looks_at_the_answers_tokens_alone():
  pieces = ("It", " is", " -1", "", ",2", "34.", "5", ".", "")
  gap = [9, 9, 0.5, 0.25, 0.75, 0.5, 0, 9, 9]
  text = "".join(pieces)
  choice = choose("cot", [sample(text, pieces=pieces, gap=gap)], NUMBER)
  assert choice.answers == ("-1234.5",)
  assert choice.scores == (0.4,)
  assert choice.votes == {"-1234.5": 0.4}


def covering(pieces, start, end):
  """Token by token: its characters, or for one without any the place where it stands."""
  at, seen = 0, []
  for i, piece in enumerate(pieces):
    own = range(at, at + len(piece))
    if any(start <= c < end for c in own) or (not piece and start < at < end):
      seen.append(i)
    at += len(piece)
  return seen


def test_the_tokens_of_a_span_against_a_slow_truth():
  rng = np.random.default_rng(5)
  for _ in range(300):
    pieces = ["abc"[:n] for n in rng.integers(0, 4, 9)]
    total = len("".join(pieces))
    start, end = sorted(rng.integers(0, total + 1, 2))
    if start < end:
      covered = list(range(9))[select._covering(pieces, start, end)]
      assert covered == covering(pieces, start, end), (pieces, start, end)


def test_cot_best_or_sum():
  samples = [sample("5", gap=0.9), sample("6", gap=0.5), sample("6", gap=0.6), sample("x", gap=1.0)]
  best = choose("cot", samples, NUMBER, combine="best")
  assert (best.index, best.votes) == (0, {})
  same(best.scores, [0.9, 0.5, 0.6, np.nan])
  added = choose("cot", samples, NUMBER)
  assert (added.index, added.votes) == (2, {"5": 0.9, "6": 1.1})
  same(added.scores, best.scores)


def test_cot_must_know_where_the_answer_stands():
  refusal(["cot"], choose, "cot", [sample("5", gap=1.0)], lambda text: text)
  assert choose("majority", [sample("5")], lambda text: text + "!").votes == {"5!": 1.0}


# -- DeepConf ----------------------------------------------------------------------------------


def groups_of(c, window):
  return [math.fsum(c[t - window + 1 : t + 1]) / window for t in range(window - 1, len(c))]


@pytest.mark.parametrize("window", [1, 2, 7, 64])
@pytest.mark.parametrize("T", [0, 1, 6, 7, 63, 64, 65, 300])
def test_groups_against_a_slow_truth(window, T):
  c = np.random.default_rng(T).gamma(2.0, 4.0, T)
  groups, seen = GroupConfidence(window), []
  for t, x in enumerate(c):
    got = groups.push(x)
    assert (got is None) == (t + 1 < window)
    seen += [] if got is None else [got]
    assert groups.least == (min(seen) if seen else pytest.approx(np.mean(c[: t + 1]), rel=1e-12))
  np.testing.assert_allclose(seen, groups_of(c, window), rtol=1e-12)
  if not T:
    assert math.isnan(groups.least)


def test_a_group_by_hand():
  groups = GroupConfidence(3)
  assert [groups.push(c) for c in (3, 6, 9, 0, 3, 18, 3)] == [None, None, 6, 5, 4, 7, 8]
  assert groups.least == 4
  refusal(["window"], GroupConfidence, 0)


def test_no_rounding_outlasts_the_window():
  groups = GroupConfidence(4)
  for c in [1e17, 3.0, 1e17, *[0.1] * 4]:
    last = groups.push(c)
  assert last == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_spoils_its_groups_and_the_trace(bad):
  groups = GroupConfidence(2)
  seen = [groups.push(c) for c in (4, 4, bad, 4, 4, 2)]
  same(seen[1:], [4, np.nan, np.nan, 4, 3])
  assert math.isnan(groups.least)
  before = GroupConfidence(5)
  before.push(bad)
  assert math.isnan(before.least)


@pytest.mark.parametrize(
  ("measure", "score"), [("min", 2.0), ("tail", 5.0), ("mean", 62 / 12), ("bottom", 2.0)]
)
def test_measures_by_hand(measure, score):
  """Windows of two over 9 9 1 3 and eight times 5: 9 5 2 4 and seven times 5; the lowest of eleven."""
  window = {} if measure == "mean" else {"window": 2}
  one = sample("is it a 3?!#", confidence=[9, 9, 1, 3, *[5] * 8])
  assert choose("deepconf", [one], NUMBER, measure=measure, **window).scores == (score,)


@pytest.mark.parametrize("T", [3, 10, 11, 20, 29, 30, 300])
def test_bottom_is_the_mean_of_the_lowest_tenth(T):
  c = np.random.default_rng(T).gamma(2.0, 4.0, T)
  text = "1" * T
  for window in (1, 4, 20):
    want = sorted(groups_of(c, window))
    want = np.mean(want[: max(1, len(want) // 10)]) if want else np.mean(c)
    choice = choose("deepconf", [sample(text, confidence=c)], NUMBER, window=window)
    assert choice.scores == pytest.approx((want,), rel=1e-12)


def deep(*traces, **options):
  """Windows of one token, so that "min" is the lowest confidence."""
  samples = [sample(text, confidence=c) for text, c in traces]
  return choose("deepconf", samples, NUMBER, **({"measure": "min", "window": 1} | options))


def test_the_weighted_vote_decides():
  """Trap (a): two unsure traces against one sure one."""
  traces = [("5", 2), ("6", 7), ("5", 3)]
  choice = deep(*traces, keep=100)
  assert (choice.index, choice.votes) == (1, {"5": 5.0, "6": 7.0})
  assert choice.scores == (2.0, 7.0, 3.0)
  samples = [sample(text) for text, *_ in traces]
  assert choose("majority", samples, NUMBER).index == 0


def test_the_best_share_votes():
  traces = [("5", 5), ("6", 6), ("5", 4), ("6", 3), ("7", 10)]
  assert deep(*traces, keep=100).votes == {"5": 9.0, "6": 9.0, "7": 10.0}
  assert deep(*traces, keep=75).votes == {"5": 9.0, "6": 6.0, "7": 10.0}
  assert deep(*traces, keep=50).votes == {"5": 5.0, "6": 6.0, "7": 10.0}
  assert deep(*traces, keep=0).votes == {"7": 10.0}
  assert deep(*traces, keep=100, least=5).votes == {"5": 5.0, "6": 6.0, "7": 10.0}
  # Who has no answer takes nobody's place.
  assert deep(*traces, ("no", 99), keep=75).votes == {"5": 9.0, "6": 6.0, "7": 10.0}
  # Of the winner's traces the best, though it is not the best of all.
  assert deep(("5", 9), ("6", 5), ("6", 6), keep=100).index == 2


def test_a_truncated_law_is_no_confidence():
  """Trap (d): an infinite confidence would outvote everybody."""
  choice = deep(("5", np.inf), ("6", 2))
  assert (choice.index, choice.votes) == (1, {"6": 2.0})
  same(choice.scores, [np.nan, 2.0])
  for measure in ("tail", "bottom", "min"):
    assert deep(("55", [np.inf, 5]), ("6", 2), measure=measure).index == 1


def test_a_short_trace_has_its_mean():
  """Trap (c): the default window fills in a few sentences; one that never does is the mean."""
  c = np.random.default_rng(1).gamma(2.0, 4.0, 200)
  one = [sample("1" * 200, confidence=c)]
  assert choose("deepconf", one, NUMBER).scores != pytest.approx((c.mean(),), rel=1e-3)
  for measure in ("min", "bottom", "tail"):
    long = choose("deepconf", one, NUMBER, measure=measure, window=2048)
    assert long.scores == pytest.approx((c.mean(),), rel=1e-12)


def test_online_and_offline_agree_to_the_last_bit():
  """Trap (b): a trace that passed a bar online must not fail it when votes are weighed."""
  rng = np.random.default_rng(2)
  for T in (5, 40, 1000):
    c = rng.gamma(2.0, 4.0, T).round(3)
    groups = GroupConfidence(32)
    for x in c:
      groups.push(x)
    one = [sample("1" * T, confidence=c)]
    choice = choose("deepconf", one, NUMBER, measure="min", window=32, least=groups.least)
    assert choice.scores == (groups.least,)
    assert choice.votes == {select.normalise("1" * T): groups.least}


def test_a_bar_is_a_percentile():
  scores = [3.0, 1.0, 2.0, 5.0, 4.0]
  assert [select.bar(scores, eta) for eta in (100, 90, 75, 50, 10, 0)] == pytest.approx(
    [1, 1.4, 2, 3, 4.6, 5]
  )
  rng = np.random.default_rng(3)
  for n in (1, 2, 16, 33):
    x = rng.normal(5, 2, n)
    for eta in (0, 10, 33.3, 90, 100):
      assert select.bar(x, eta) == pytest.approx(np.percentile(x, 100 - eta), rel=1e-12)


def test_who_stands_exactly_at_the_bar_reaches_it():
  for n in (76, 101):
    x = np.random.default_rng(n).normal(5, 3, n)
    for eta in range(101):
      if (n - 1) * (100 - eta) % 100 == 0:
        assert sum(x >= select.bar(x, eta)) == n - (n - 1) * (100 - eta) // 100


def test_a_bar_of_nothing_stops_nobody():
  assert select.bar([], 90) == select.bar([np.nan, np.inf], 90) == -math.inf
  assert select.bar([np.nan, 3.0], 90) == 3.0
  for eta in (-1, 101, np.nan):
    refusal(["percent"], select.bar, [1.0], eta)


def test_settled():
  assert select.settled({"1": 19.0, "2": 1.0})  # 0.95 to the bit
  assert not select.settled({"1": 19.0, "2": 1.0, "3": 0.01})
  assert not select.settled({"1": 18.9, "2": 1.0})
  assert select.settled({"2": 1.0, "1": 3.0}, 0.75)
  assert not select.settled({"2": 1.0, "1": 3.0}, 0.76)
  assert select.settled({"1": 0.5}, 1)
  assert not select.settled({})
  assert not select.settled({"1": 0.0})
  for share in (0, 1.1, np.nan):
    refusal(["share"], select.settled, {"1": 1.0}, share)


# -- what holds for all rules ------------------------------------------------------------------

every_rule = pytest.mark.parametrize("rule", select.RULES)


def good(text, x=1.0, finish="stop", **changes):
  """A sample with all statistics, the larger x the better by every rule."""
  return sample(text, finish, **({"score": x} | dict.fromkeys(STATISTICS, x) | changes))


@every_rule
def test_one_sample_is_chosen_and_none_is_an_error(rule):
  choice = choose(rule, [good("5")], NUMBER)
  assert (choice.index, choice.answers) == (0, ("5",))
  assert math.isfinite(choice.scores[0])
  assert all(type(x) is float for x in choice.scores)
  refusal(["at least one"], choose, rule, [], NUMBER)


@every_rule
def test_the_better_sample_is_chosen_and_of_equals_the_first(rule):
  samples = [good("5", 1.0), good("6", 2.0), good("6", 2.0)]
  assert choose(rule, samples, NUMBER).index == 1
  assert choose(rule, [good("5"), good("6"), good("7")], NUMBER).index == 0


@every_rule
@pytest.mark.parametrize("out", ["cancelled", "pruned"])
def test_who_was_stopped_neither_votes_nor_wins(rule, out):
  samples = [good("5", 9.0, out), good("5", 9.0, out), good("6", 2.0), good("7", 1.0, "length")]
  choice = choose(rule, samples, NUMBER)
  assert choice.index == 2
  assert "5" not in choice.votes
  assert all(map(math.isnan, choice.scores[:2]))
  assert choice.answers == ("5", "5", "6", "7")
  unanswered = [good("5", 9.0, out), good("none", 1.0), good("nothing", 2.0)]
  assert choose(rule, unanswered, NUMBER).index in (1, 2)


@every_rule
def test_where_all_were_stopped_they_are_as_good_as_any(rule):
  out = [good("5", 1.0, "cancelled"), good("6", 2.0, "pruned"), good("6", 2.0, "pruned")]
  inside = [dataclasses.replace(x, finish="stop") for x in out]
  assert choose(rule, out, NUMBER) == choose(rule, inside, NUMBER)
  # Stopped while they queued: nothing is there at all.
  none = Candidate("", (), {}, "cancelled")
  assert choose(rule, [none, none], NUMBER).index == 0


@every_rule
def test_without_answers_votes_fall_back_to_the_mean_of_logprobs(rule):
  samples = [good("a", 3.0, logprob=-2.0), good("b", 2.0, logprob=-1.0), good("c", logprob=-3.0)]
  choice = choose(rule, samples, NUMBER)
  votes = rule in ("borda", "majority", "deepconf", "cot")
  assert choice.index == (1 if votes or "logprob" in rule else 0)
  assert choice.votes == {}
  if votes:
    assert choice == choose("mean_logprob", samples, NUMBER)


@every_rule
@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_numbers_that_are_none_never_win(rule, bad):
  worst = good("5", -9.0)
  for broken in (good("5", bad), good("5x", [1.0, bad], score=bad, gap=bad)):
    if rule != "majority":
      choice = choose(rule, [broken, worst], NUMBER)
      assert choice.index == 1
      assert math.isnan(choice.scores[0])
    assert choose(rule, [broken, broken], NUMBER).index == 0


@every_rule
def test_an_empty_text_never_wins(rule):
  """Its sum would be zero, which is more than any text has."""
  empty = good("", score=-99.0)
  choice = choose(rule, [empty, good("5", -9.0)], NUMBER)
  assert choice.index == 1
  assert choose(rule, [empty, empty], NUMBER).index == 0


@every_rule
def test_a_rule_asks_for_what_it_needs(rule):
  """And for nothing else: with these statistics alone it chooses."""
  needs = select.RULES[rule].needs
  assert set(needs) <= set(STATISTICS)
  alone = Candidate("5", ("5",), {name: np.ones(1) for name in needs}, "stop", 1.0)
  assert choose(rule, [alone], NUMBER).index == 0
  for name in needs:
    lacking = dataclasses.replace(alone, numbers={})
    refusal([f"needs {name}"], choose, rule, [alone, lacking], NUMBER)
    assert choose(rule, [alone, dataclasses.replace(lacking, finish="pruned")], NUMBER).index == 0


@every_rule
def test_order_matters_for_ties_alone(rule):
  rng = np.random.default_rng(6)
  samples = []
  for _ in range(7):
    numbers = {name: rng.random(9) for name in STATISTICS}
    samples.append(good("012"[rng.integers(3)] * 9, **numbers, score=rng.random()))
  first = choose(rule, samples, NUMBER)
  if rule == "majority":
    assert max(first.votes.values()) == 4  # no tie to break
  for _ in range(5):
    order = rng.permutation(7)
    again = choose(rule, [samples[i] for i in order], NUMBER)
    assert again.votes == first.votes
    if rule == "majority":
      assert again.answers[again.index] == first.answers[first.index]
    else:
      assert order[again.index] == first.index
      assert again.scores == tuple(first.scores[i] for i in order)


def test_a_sample_is_whole():
  with pytest.raises(ValueError, match="join"):
    Candidate("ab", ("a",), {}, "stop")
  with pytest.raises(ValueError, match="each token"):
    Candidate("ab", ("a", "b"), {"logprob": np.zeros(3)}, "stop")


# -- options -----------------------------------------------------------------------------------


def test_every_option_has_its_range_and_its_default_is_in_it():
  options = [(rule, name) for rule, r in select.RULES.items() for name in r.options]
  assert {name for _, name in options} == set(select.ALLOWED)
  for rule, name in options:
    default = select.RULES[rule].options[name]
    assert select.check_rule(rule, **{name: default})[name] == default
  checked = select.check_rule("deepconf", keep=50, window=np.int64(3))
  assert checked == {"measure": "bottom", "window": 3, "keep": 50, "least": -math.inf}


@pytest.mark.parametrize(
  ("rule", "options", "says"),
  [
    ("best", {}, "logprob, mean_logprob"),
    ("majority", {"power": 1}, "it has none"),
    ("deepconf", {"eta": 1}, "measure, window, keep, least"),
    ("borda", {"power": -0.1}, "0.0 to 50.0"),
    ("borda", {"power": 51}, "0.0 to 50.0"),
    ("borda", {"power": "1"}, "number"),
    ("borda", {"power": np.nan}, "number"),
    ("borda", {"power": True}, "number"),
    ("deepconf", {"window": 0}, "whole number from 1"),
    ("deepconf", {"window": 2.5}, "whole number"),
    ("deepconf", {"window": None}, "whole number"),
    ("deepconf", {"keep": 100.5}, "0.0 to 100.0"),
    ("deepconf", {"least": np.nan}, "number"),
    ("deepconf", {"measure": "max"}, "bottom, min, tail, mean"),
    ("deepconf", {"measure": 1}, "bottom, min, tail, mean"),
    ("deepconf", {"measure": "mean", "window": 64}, "no window"),
    ("cot", {"combine": "mean"}, "sum, best"),
  ],
)
def test_options_that_cannot_be(rule, options, says):
  refusal([says], select.check_rule, rule, **options)
  refusal([says], choose, rule, [good("5")], NUMBER, **options)


def test_it_can_be_read_without_jax():
  """Who scores texts of a file needs no device."""
  code = "import sys, entropix_jax.decoding.select; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
