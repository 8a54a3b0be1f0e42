"""Injected passages, the stop of the uncertain, and marks: by their rules, and through an engine."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal
from test_engine import PROMPTS, engine, tokens_of

from entropix_jax import metrics, sampling
from entropix_jax.engine.request import Request
from entropix_jax.sampling import actions

FLAT = np.zeros(16, np.float32)  # entropy ln 16 = 2.77, varentropy 0
SURE = np.where(np.arange(16) == 5, 20.0, 0.0).astype(np.float32)


def walk(settings, logits_NV):
  """The verdicts on a row's tokens, one after another."""
  cfg = contract.rows(sampling.configure(actions, settings), 1)
  state = actions.init(cfg, 1)
  step = jax.jit(lambda state, law: actions.step(cfg, state, metrics.spread(law), law))
  out = []
  for logits in logits_NV:
    verdict, state = step(state, jax.nn.log_softmax(jnp.asarray(logits)[None]))
    law = np.asarray(verdict.law_BV[0])
    forced = int(law.argmax()) if verdict.injected_B[0] else None
    assert not verdict.injected_B[0] or np.array_equal(np.exp(law), np.arange(16) == forced)
    assert not verdict.forced_B[0]
    mark = "waits" if verdict.waits_B[0] else bool(verdict.fork_B[0])
    out.append((forced, bool(verdict.uncertain_B[0]), mark))
  return out


def test_nothing_happens_by_default():
  assert walk({}, [FLAT, SURE] * 20) == [(None, False, False)] * 40


def test_a_passage_is_emitted_whole_then_rests_and_has_a_budget():
  knobs = {"inject": [7, 8, 9], "inject_ent": 1.0, "inject_varent": 0.1}
  budget = {"inject_every": 4, "inject_most": 2}
  forced = [x for x, _, _ in walk(knobs | budget, [SURE, *[FLAT] * 30])]
  assert forced == [None, 7, 8, 9, *[None] * 4, 7, 8, 9, *[None] * 20]


def test_a_passage_goes_on_where_the_model_is_sure():
  knobs = {"inject": [1, 2], "inject_ent": 1.0, "inject_varent": 1.0}
  assert [x for x, _, _ in walk(knobs, [FLAT, SURE])] == [1, 2]


def test_lost_tokens_must_follow_each_other():
  knobs = {"stop_ent": 1.0, "stop_run": 3}
  ends = [x for _, x, _ in walk(knobs, [FLAT, FLAT, SURE, FLAT, FLAT, FLAT])]
  assert ends == [False] * 5 + [True]


def test_marks():
  assert [x for _, _, x in walk({"fork_ent": 1.0}, [SURE, FLAT])] == [False, True]
  assert [x for _, _, x in walk({"fork_ent": 1.0, "fork_varent": 0.5}, [SURE, FLAT])] == [False] * 2


@pytest.mark.parametrize("field", list(sampling.knobs(actions)))
def test_no_dead_settings(field):
  rng = np.random.default_rng(0)
  logits = [rng.standard_normal(16) * rng.uniform(0.1, 4) for _ in range(60)]
  on = {
    "inject": [3, 4], "inject_ent": 1.0, "inject_varent": 1.0, "inject_every": 5, "inject_most": 3,
    "stop_ent": 2.0, "stop_varent": 0.2, "stop_run": 2, "fork_ent": 1.0, "fork_varent": 0.3, "fork_every": 1,
    "fork_wait": False,
  }  # fmt: skip
  other = {
    "inject": [9], "inject_ent": 2.6, "inject_varent": 0.1, "inject_every": 20, "inject_most": 1,
    "stop_ent": 2.6, "stop_varent": 1.0, "stop_run": 4, "fork_ent": 2.0, "fork_varent": 1.0, "fork_every": 3,
    "fork_wait": True,
  }  # fmt: skip
  assert walk(on, logits) != walk(on | {field: other[field]}, logits)


def test_through_an_engine_beside_a_row_without():
  e = engine("plain")
  inject = {"inject": [50, 51, 52], "inject_ent": 0.5, "inject_varent": 1e9}
  each = {}, inject, {"stop_ent": 0.5, "stop_run": 2}, {"fork_ent": 0.5}
  tokens = tokens_of(e, [Request(PROMPTS[0], 24, seed=1, actions=one) for one in each])
  rows = [[t for t in tokens if t.prompt == i] for i in range(4)]
  ids = [[t.id for t in row] for row in rows]
  at = [i for i, t in enumerate(rows[1]) if t.branch == "inject"]
  assert [ids[1][i] for i in at] == [50, 51, 52]
  assert at == list(range(at[0], at[0] + 3))
  assert ids[1][: at[0]] == ids[0][: at[0]]
  assert all(rows[1][i].numbers["logprob_law"] == 0.0 for i in at)
  lost = [t.numbers["entropy"] > 0.5 for t in rows[0]]
  end = next(i for i in range(1, 24) if lost[i] and lost[i - 1])
  assert ids[2] == ids[0][: end + 1]
  assert rows[2][-1].finish == "uncertain"
  assert ids[3] == ids[0]
  assert [t.fork for t in rows[3]] == lost


def test_bad_settings_are_refused():
  e = engine("plain")
  for settings, message in (
    ({"inject": [211]}, "outside the model's vocabulary"),
    ({"stop_run": 0}, "must lie in"),
    ({"heat": 1}, "'actions' has no knob 'heat'"),
  ):
    refusal([message], tokens_of, e, [Request([1], actions=settings)])


def test_alternatives_are_the_likeliest_of_the_raw_model():
  request = Request(PROMPTS[0], 12, seed=3, knobs={"top_k": 2})
  tokens = tokens_of(engine("plain", top_logprobs=4), [request])
  assert [t.id for t in tokens] == [t.id for t in tokens_of(engine("plain"), [request])]
  for token in tokens:
    logprobs = [x for _, _, x in token.top]
    assert logprobs == sorted(logprobs, reverse=True)
    assert all(text == f"{i} " for i, text, _ in token.top)
    mine = [x for i, _, x in token.top if i == token.id]
    np.testing.assert_allclose(mine, token.numbers["logprob"], atol=1e-5)
