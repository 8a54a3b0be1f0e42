"""The Python API on the demo model: texts, numbers, samples, scores, and one sentence for each mistake."""

import dataclasses
import itertools
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import flax.struct
import pytest

from entropix_jax import LLM, UserError, decoding, sampling, session, settings
from entropix_jax.checkpoints import checkpoint
from entropix_jax.config import MeshConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.session import Session

KITE, SUM = "Tell me a story about a kite.", "What is 7 + 5?"
GREEDY = {"sampler": "plain", "temperature": 0.0}


@pytest.fixture(scope="module")
def llm():
  return LLM.demo(max_seq_len=128, batch_size=4)


def ids(done):
  return [token.id for token in done.tokens]


def test_a_text_its_numbers_and_nothing_compiled_twice(llm, monkeypatch):
  done = llm.generate(KITE, seed=1, max_new_tokens=12)
  assert done.finish == "length"
  assert done.text == "".join(token.text for token in done.tokens) == str(done)
  first = done.tokens[0]
  assert first.entropy == first.numbers["entropy"] > 0
  assert first.branch in sampling.find("quadrant").BRANCHES
  likely = [logprob for _, _, logprob in first.top]
  assert likely == sorted(likely, reverse=True)
  assert len(likely) == 5
  assert {"entropy", "attn_ent", "top_k"} <= set(dir(first))
  with pytest.raises(AttributeError, match="no number 'heat'; it has: logprob"):
    _ = first.heat
  records = done.records()
  assert [row["id"] for row in records] == ids(done)
  assert {"position", "text", "branch", "entropy", "logprob_law", "top", "finish"} <= set(
    records[0]
  )
  assert "12 tokens, finish='length'" in repr(done)
  lowered = []
  lower = Engine.lower
  monkeypatch.setattr(Engine, "lower", lambda *args: (lowered.append(args), lower(*args))[1])
  assert ids(llm.generate(KITE, seed=1, max_new_tokens=12)) == ids(done)
  assert ids(llm.generate(KITE, seed=2, max_new_tokens=12)) != ids(done)
  assert lowered == []


def test_a_list_comes_back_in_order_and_as_alone(llm):
  prompts = [KITE, "Hello!", SUM, KITE, "What is 2 + 3?"]
  together = llm.generate(prompts, seed=1, max_new_tokens=12)
  assert [done.prompt for done in together] == prompts
  assert ids(together[0]) == ids(together[3]) == ids(llm.generate(KITE, seed=1, max_new_tokens=12))
  assert llm.generate([]) == []
  turn = [{"role": "user", "content": "Hello!"}]
  talks = llm.chat([turn, [*turn, together[1].message, *turn]], seed=1, max_new_tokens=12)
  assert ids(talks[0]) == ids(together[1])
  assert len(talks) == 2


def test_a_text_goes_on_from_any_of_its_tokens(llm):
  how = {"seed": 1, "sampler": "plain", "temperature": 0.9}
  done = llm.generate(KITE, max_new_tokens=24, **how)
  for at in (1, 9):
    rest = llm.generate(KITE, max_new_tokens=24 - at, forced=ids(done)[:at], **how)
    assert ids(rest) == ids(done)[at:]
    assert rest.tokens[0].position == at
  other = next(id for id, _, _ in done.tokens[9].top if id != done.tokens[9].id)
  fork = llm.generate(KITE, max_new_tokens=14, forced=[*ids(done)[:9], other], **how)
  assert len(fork.tokens) == 14
  assert [t.id for t in llm.stream(KITE, max_new_tokens=15, forced=ids(done)[:9], **how)] == ids(
    done
  )[9:]


def test_a_stream_may_be_left(llm):
  whole = ids(llm.generate(KITE, max_new_tokens=12))
  stream = llm.stream(KITE, max_new_tokens=12)
  assert [token.id for token in itertools.islice(stream, 3)] == whole[:3]
  del stream
  assert [token.id for token in llm.stream(KITE, max_new_tokens=12)] == whole


def test_samples_and_the_choice_among_them(llm):
  turn = [{"role": "user", "content": SUM}]
  done = llm.chat(turn, n=4, rule="majority", max_new_tokens=40)
  assert len(done.samples) == len(done.outcome.samples) == 4
  assert done.text == done.samples[done.outcome.chosen].text
  assert sum(done.outcome.votes.values()) == 4
  assert f"Sample {done.outcome.chosen + 1} of 4, by majority" in repr(done)
  assert ids(llm.chat(turn, max_new_tokens=40)) == ids(done.samples[0])


def test_scores_are_what_the_model_says_of_its_own_text(llm):
  """Of one token, and of more than a passage that is injected may have."""
  done = llm.generate("Once upon a", format="plain", **GREEDY, max_new_tokens=sampling.LIST + 6)
  first, more = done.tokens[0], done.text
  assert llm.tokenizer.encode(more) == ids(done)
  short, long, other = llm.score("Once upon a", [first.text, more, " kite"])
  assert short == pytest.approx(first.logprob, abs=1e-5)
  assert long == pytest.approx(sum(token.logprob for token in done.tokens), abs=1e-3)
  assert other < short
  assert llm.score("Once upon a", " kite") == pytest.approx(other, abs=1e-4)
  assert llm.score(KITE, []) == []
  turn = [{"role": "user", "content": KITE}]
  answer = llm.chat(turn, **GREEDY, max_new_tokens=1)
  assert llm.score(turn, answer.text) == pytest.approx(answer.tokens[0].logprob, abs=1e-4)
  engines = [engine for engine, _ in llm._model._engines.values()]
  assert len({id(e.weights) for e in engines}) == 1 < len({e.setup.sampler for e in engines})


def test_a_notebook_shows_colours_and_no_hostile_text(llm):
  done = llm.generate(KITE, max_new_tokens=4)
  hostile = dataclasses.replace(done.tokens[0], text='<script>"&', top=((1, "<b>", -0.1),))
  page = dataclasses.replace(done, tokens=(hostile, *done.tokens[1:]))._repr_html_()
  assert "entropy in nats" in page
  assert "&lt;script&gt;&quot;&amp;</span>" in page
  assert "<script>" not in page
  assert "<b>" not in page
  assert page.count("<span") == page.count("</span>") == 4 + 6 + 1


TALK = [{"role": "user", "content": "x"}]
MISTAKES = {
  "a setting that no sampler has": (lambda m: m.generate("x", temperatur=1), "every call has: max"),
  "a near miss": (lambda m: m.generate("x", **GREEDY, min_pp=1), "did you mean 'min_p'?"),
  "another sampler's": (lambda m: m.generate("x", temperature=1), 'sampler="plain" would have it'),
  "another method's": (lambda m: m.generate("x", ways=3), 'decoding="branch" would have it'),
  "a name of two": (
    lambda m: m.generate("x", decoding="joint", low_ent=1),
    'say whose it is: sampler={"name": "quadrant", "low_ent": 1}',
  ),
  "no such sampler": (lambda m: m.generate("x", sampler="magic"), "choose one of: dslider"),
  "no such method": (lambda m: m.generate("x", decoding="luck"), "no decoding method 'luck'"),
  "no such preset": (lambda m: m.generate("x", preset="luck"), "no preset 'luck'"),
  "a section without a name": (lambda m: m.generate("x", decoding={"n": 2}), "give it a name"),
  "out of range": (lambda m: m.generate("x", top_p=2.0), "must lie in"),
  "an empty prompt": (lambda m: m.generate(" "), "The prompt is empty"),
  "one of several": (lambda m: m.generate(["x", ""]), "The prompt is empty"),
  "a prompt too long": (lambda m: m.generate("word " * 200), "leaves no room for an answer in max_seq_len=128"),
  "no text": (lambda m: m.generate(3), "give text, or a list"),
  "messages": (lambda m: m.generate(TALK), "not of the kind str"),
  "no messages": (lambda m: m.chat("x"), "use generate for a text"),
  "no list": (lambda m: m.chat(None), "use generate for a text"),
  "no prompt": (lambda m: m.stream(3, system="x"), "at least one message"),
  "no message": (lambda m: m.chat([]), "at least one message"),
  "no such role": (lambda m: m.chat([{"role": "x", "content": "x"}]), "Unknown chat role 'x'"),
  "a chat's format": (lambda m: m.chat(TALK, format="plain"), "A chat has no format"),
  "a template for a chat": (lambda m: m.generate("x", template="{}."), 'format=plain'),
  "a system for none": (lambda m: m.generate("x", format="plain", system="x"), "leave it out"),
  "no token": (lambda m: m.generate("x", max_new_tokens=0), "must be at least 1"),
  "half a token": (lambda m: m.generate("x", max_new_tokens=0.5), "a whole number"),
  "forced samples": (lambda m: m.generate("x", n=2, forced=[5]), "leave out `forced`"),
  "forced text": (lambda m: m.generate("x", forced="abc"), "not of the kind int"),
  "a forced token that is none": (lambda m: m.generate("x", forced=[10**6]), "in the forced ids"),
  "a stream of a choice": (lambda m: m.stream("x", n=2), "use generate in place of stream"),
  "too many rows": (lambda m: m.generate("x", decoding="branch"), "batch_size is 4"),
  "nothing to score": (lambda m: m.score("x", [""]), "continuation is empty"),
  "too much to score": (lambda m: m.score("x", "word " * 200), "more than max_seq_len=128"),
  "no folder": (lambda m: LLM("no/such"), "no/such"),
  "no path": (lambda m: LLM(None), "give it as text or a Path"),
  "no such key": (lambda m: LLM.demo(batch=2), "did you mean 'batch_size'?"),
  "no such value": (lambda m: LLM.demo(attn_stats="x"), "attn_stats is 'x'; use"),
  "a mesh that does not divide": (lambda m: LLM.demo(data=3), "data=3 does not divide batch_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_about_keywords(llm, name):
  call, words = MISTAKES[name]
  with pytest.raises(UserError, match=re.escape(words)) as error:
    call(llm)
  assert "config." not in str(error.value)
  assert "--" not in str(error.value)


def test_a_call_has_the_rows_that_its_prompts_need(llm):
  """A power of two, a multiple of the mesh's data, and never more than the batch."""

  def rows(prompts, batch_size, data=1, **decode):
    chosen = settings.resolve({"checkpoint": llm._model.folder, "decoding": decode})
    engine = dataclasses.replace(llm.config, batch_size=batch_size)
    chosen = dataclasses.replace(chosen, engine=engine, mesh=MeshConfig(data=data))
    session = Session(llm._model, chosen)
    return session.rows(session.plan([Request((1,))] * prompts))

  assert [rows(n, 6) for n in (1, 2, 3, 5, 9)] == [1, 2, 4, 6, 6]
  assert [rows(n, 6, data=3) for n in (1, 2, 5)] == [3, 3, 6]
  assert rows(1, 16, name="best_of_n", n=5) == 8
  assert rows(2, 32, name="branch") == 16
  assert rows(1, 32, name="deepconf") == 16


# -- weights and programs at once --------------------------------------------------------------


def test_an_error_on_either_side_ends_both_and_leaves_the_model_usable(monkeypatch):
  fresh = LLM.demo(max_seq_len=128)
  ended = threading.Event()

  def endless(*args, progress, **kwargs):
    try:
      while True:
        progress(1, 2)
        time.sleep(0.01)
    finally:
      ended.set()

  def interrupted(*args):
    raise KeyboardInterrupt

  def damaged(*args, **kwargs):
    raise UserError("The file was cut short.")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "load_weights", endless)
    patch.setattr(session, "compile_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
      fresh.generate(KITE)
    assert ended.is_set()
    patch.setattr(checkpoint, "load_weights", damaged)
    patch.setattr(session, "compile_all", lambda *args: None)
    with pytest.raises(UserError, match="cut short"):
      fresh.generate(KITE)
  fresh.load()
  assert list(fresh._model._weights) == [fresh._model.folder]


# -- the package and its one namespace ---------------------------------------------------------


def test_importing_the_package_starts_no_jax():
  light = "import sys, entropix_jax; entropix_jax.UserError; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", light], check=True)


def test_the_example_of_the_readme_runs(llm, monkeypatch, capsys):
  text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
  (example,) = re.findall(r"<!-- python -->\n```python\n(.*?)```", text, re.DOTALL)
  monkeypatch.setattr(LLM, "demo", lambda: llm)
  names = {}
  exec(example, names)
  assert names["done"].text in capsys.readouterr().out
  assert len(names["best"].samples) == 4
  assert len(names["rows"]) > 10


@pytest.mark.parametrize(
  ("default", "ranges"), [(0.7, {}), (1.0, {"temperature": (0.0, 1.0)}), (1, {})]
)
def test_one_name_for_two_things_is_refused(monkeypatch, default, ranges):
  """A sampler's knob and a method's option of a name that another has, with another default, range or type."""

  @flax.struct.dataclass
  class Config:
    temperature: type(default) = default

  strange = types.SimpleNamespace(Config=Config, RANGES=ranges)
  names, find = sampling.names(), sampling.find
  settings.knobs()
  monkeypatch.setattr(sampling, "names", lambda: [*names, "strange"])
  monkeypatch.setattr(sampling, "find", lambda n: strange if n == "strange" else find(n))
  with pytest.raises(UserError, match="'plain' and the sampler 'strange' both have the knob 'temp"):
    settings.knobs()
  options = decoding.options
  settings.options()
  monkeypatch.setattr(
    decoding, "options", lambda n: options(n) | ({"keep": 0.5} if n == "adaptive" else {})
  )
  with pytest.raises(UserError, match="both have the option 'keep'"):
    settings.options()
