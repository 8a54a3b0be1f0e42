"""Numbers that are not finite: the text ends with an error, says so, and no other row notices."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from command import CONFIG, MAIN, MODELS, run
from conftest import refusal
from test_engine import ByHand, Words, decoder_of, engine, six, small_weights

from entropix_jax import metrics, scheduler
from entropix_jax.checkpoints import checkpoint
from entropix_jax.decoding import best_of_n, groups
from entropix_jax.decoding.drafters import Ngram
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine import record
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.llm import LLM
from entropix_jax.report import reader
from entropix_jax.sampling import _filters as filters

BAD = 77  # an id whose embedding is not a number
GOOD = [Request(ids, 12, seed=i) for i, ids in enumerate(([3, 1, 4], [9, 2, 6, 5], [7] * 30))]


def broken(e, value=jnp.nan):
  """The same engine over weights with one number that is none."""
  w = small_weights()
  w = w.replace(embed_VD=w.embed_VD.at[BAD, 3].set(value))
  other = Engine(e.setup, w)
  other.compiled = e.compiled
  return other


def events(e, requests):
  found = [[] for _ in requests]
  decoder = decoder_of(e)
  for event in scheduler.generate(decoder.engine, Words(), requests, decoder=decoder):
    found[event.prompt].append(event)
  return found


def drafting(e):
  return SpeculativeDecoder(e, Ngram(), 3, always=True)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("decoder", [decoder_of, drafting])
def test_only_the_row_that_reads_it_ends_and_its_slot_can_be_used_again(decoder, value):
  e = engine(rows=2)
  bad = Request([5, BAD, 4], 12)
  want = [[t.id for t in row] for row in events(e, GOOD)]
  *got, failed, last = events(decoder(broken(e, value)), [*GOOD[:2], bad, GOOD[2]])
  assert [[t.id for t in row] for row in (*got, last)] == want
  (failure,) = failed
  assert (failure.after, failure.finish) == (0, "error")
  assert "prompt 3 ends with an error after 0 tokens" in failure.why
  refusal(["not finite"], list, scheduler.raising(failed))


def test_such_a_row_emits_nothing_and_is_not_live():
  rows = ByHand(broken(engine(rows=2)))
  values = rows.insert(0, Request([5, BAD], 12))
  assert values["flags"].tolist() == [record.BROKEN]
  assert not rows.state.live_B[0]
  assert rows.state.out_B[0] == 0


def test_tokens_before_it_are_kept():
  request = Request([3, 1, 4], 30, actions={"inject": [8, BAD, 9], "inject_ent": -1.0})
  ((*tokens, failure),) = events(broken(engine(rows=2)), [request])
  assert [t.id for t in tokens] == [8, BAD]
  assert failure.after == 2


def test_a_shared_prefix_harms_only_those_that_share_it():
  e = six()
  requests = [Request([5, BAD, *range(100, 200)] * 2, 8), Request([3, 1, 4] * 60, 8, seed=2)]
  todo = lambda: [  # noqa: E731
    best_of_n.Group(r, best_of_n.Config(n=2, rule="mean_logprob"), i)
    for i, r in enumerate(requests)
  ]
  want = [x for x in groups.run(e, Words(), todo()) if isinstance(x, groups.Outcome)]
  got = [x for x in groups.run(broken(e), Words(), todo()) if isinstance(x, groups.Outcome)]
  by_prompt = {x.prompt: x for x in got}
  assert [s.finish for s in by_prompt[0].samples] == ["error"] * 2
  (same,) = [x for x in want if x.prompt == 1]
  assert [s.text for s in by_prompt[1].samples] == [s.text for s in same.samples]
  assert all("after 0 tokens" in s.error for s in by_prompt[0].samples)
  assert "not finite" in by_prompt[0].error
  assert by_prompt[1].error is None


@pytest.mark.parametrize("part", [0, 1])
def test_a_joint_model_fails_where_one_of_its_models_does(part):
  """Whichever model has it; the row beside goes on."""
  from test_joint import pair, request

  e = pair()
  good = request(0, 8)
  (want,) = events(e, [good])
  w = list(e.weights)
  w[part] = w[part].replace(embed_VD=w[part].embed_VD.at[BAD].set(jnp.nan))
  other = Engine(e.setup, tuple(w))
  other.compiled = e.compiled
  bad = request(1, 8) if part == 0 else request(1, 8, beside=[[60, BAD, 61]])
  bad = dataclasses.replace(bad, ids=[5, BAD, 4]) if part == 0 else bad
  got, failed = events(other, [good, bad])
  assert [t.id for t in got] == [t.id for t in want]
  assert [x.finish for x in failed] == ["error"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_shows_in_the_normaliser(value):
  logits_BV = jnp.zeros((2, 50)).at[1, 7].set(value)
  assert jnp.isfinite(metrics.spread(logits_BV).lse).tolist() == [True, False]
  assert not jnp.isfinite(metrics.spread(jnp.full((3,), -jnp.inf)).lse)
  law_BV = filters.delta(logits_BV)
  assert law_BV[0, 0] == 0
  assert not (law_BV[1] == 0).any()


@pytest.fixture
def poisoned(monkeypatch):
  """Every checkpoint that is loaded has a NaN, here in an embedding that is the output head, too."""
  load = checkpoint.load_weights

  def loaded(folder, *args, **kwargs):
    w = load(folder, *args, **kwargs)
    id = LLM.demo().tokenizer.encode(" kite")[0]
    return w.replace(embed_VD=w.embed_VD.at[id].set(jnp.nan))

  monkeypatch.setattr(checkpoint, "load_weights", loaded)
  MODELS.clear()
  yield
  MODELS.clear()


def test_the_command_line_says_it_in_one_sentence(poisoned, tmp_path):
  trace = tmp_path / "t.jsonl"
  code, _, err = run(MAIN, CONFIG, "--prompt=A kite.", f"--trace={trace}", "--max_new_tokens=8")
  assert code == 2
  assert "error: The text of prompt 1 ends with an error after 0 tokens" in err.splitlines()[-1]

  def refuse(name):
    raise AssertionError(name)

  for line in trace.read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  found = reader.read(trace)
  assert found["answers"][0]["samples"][0]["finish"] == "error"
  assert found["summary"]["finish"] == {"error": 1}


def test_a_choice_among_failures_is_a_failure(poisoned):
  how = ["--config.decoding.name=best_of_n", "--config.decoding.n=2"]
  code, _, err = run(MAIN, CONFIG, "--prompt=A kite.", "--max_new_tokens=8", *how)
  assert code == 2
  assert "ends with an error" in err.splitlines()[-1]


def test_a_conversation_goes_on_after_it(poisoned):
  said = "A dog.\nA kite.\n\n"
  code, out, err = run(MAIN, CONFIG, "--chat", "--max_new_tokens=4", stdin=said)
  assert code == 0
  assert out == "\n\n"  # an end of line after each answer
  assert err.count("ends with an error after 0 tokens") == 2


def test_python_gets_a_completion_that_says_so(poisoned):
  llm = LLM.demo(max_seq_len=128)
  _, bad = llm.generate(["A dog.", "A kite."], max_new_tokens=8)
  assert (bad.finish, bad.text, bad.tokens) == ("error", "", ())
  assert "not finite" in bad.error
  assert "finish='error'" in repr(bad)
  best = llm.generate("A kite.", max_new_tokens=8, n=2)
  assert best.finish == "error"
  assert "not finite" in best.error
  assert [s.error for s in best.samples] == [best.error] * 2
  refusal(["not finite"], list, llm.stream("A kite.", max_new_tokens=8))
