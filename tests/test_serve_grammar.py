"""Answers that must follow a grammar, over the demo model: each does, in any company, and bad grammars are refused."""

import asyncio
import json
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NEEDS = 'install what the tests of grammars need: pip install ".[test]"'
httpx, jsonschema, _ = (
  pytest.importorskip(n, reason=NEEDS) for n in ("httpx", "jsonschema", "llguidance")
)

from test_serve import CHAT, QUESTION, Server  # noqa: E402

from entropix_jax import errors  # noqa: E402
from entropix_jax.model import llama  # noqa: E402
from entropix_jax.serve.grammar import Grammars  # noqa: E402

SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 12},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["red", "green", "é\n"]}, "maxItems": 3},
  },
  "required": ["name", "age", "tags"],
  "additionalProperties": False,
}
TEXTS = "/v1/completions"
HOT = {"temperature": 1.0, "max_tokens": 150}


def by_schema(schema=SCHEMA, **more):
  return {
    "response_format": {
      "type": "json_schema",
      "json_schema": {"name": "person", "schema": schema} | more,
    }
  }


def so(**what):
  return {"structured_outputs": what}


@pytest.fixture(scope="module")
def server():
  with Server(samplers=("quadrant", "plain"), masks=True) as made:
    yield made


@pytest.fixture
def idle(server):
  """The server, which has nothing left to do afterwards."""
  yield server
  server.idle()


def said(answer):
  return [c["message"]["content"] for c in answer["choices"]]


def test_answers_follow_a_schema_and_are_cut_only_by_their_limit(idle):
  answers = [idle.chat(n=8, seed=i, **HOT, **by_schema())["choices"] for i in range(3)]
  answers += [idle.chat(n=8, seed=i, max_tokens=150, **by_schema())["choices"] for i in range(2)]
  choices = [choice for part in answers for choice in part]
  assert len(choices) == 40
  assert len({c["message"]["content"] for c in choices}) > 30
  for choice in choices:
    assert choice["finish_reason"] == "stop", choice
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
  whole = said(idle.chat(seed=3, **HOT, **by_schema()))[0]
  cut = idle.chat(seed=3, **HOT | {"max_tokens": 9}, **by_schema())["choices"][0]
  assert cut["finish_reason"] == "length"
  assert whole.startswith(cut["message"]["content"])
  strict = by_schema(strict=True)
  assert said(idle.chat(seed=3, **HOT, **strict)) == [whole]
  assert said(idle.chat(seed=3, **HOT, **so(json=json.dumps(SCHEMA)))) == [whole]


def test_any_json_object(idle):
  answers = idle.chat(
    n=8, seed=1, temperature=1.0, max_tokens=300, response_format={"type": "json_object"}
  )
  for choice in answers["choices"]:
    text = choice["message"]["content"]
    assert text.startswith("{")
    assert not re.search(r"\s\s", re.sub(r'"([^"\\]|\\.)*"?', '""', text))
    if choice["finish_reason"] == "stop":
      assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
  ("how", "pattern"),
  [
    (so(regex=r"[A-C]{2}-\d{3}(x|yz)?"), r"[A-C]{2}-\d{3}(x|yz)?"),
    (so(choice=["yes", "no", "yes, but", 'a "b"\n\\c']), r'yes|no|yes, but|a "b"\n\\c'),
    (so(grammar='start: "(" start ")" | /[ab]/'), r"\(*[ab]\)*"),
    (so(grammar='root ::= "x" root | "y"'), "x*y"),
    (so(regex="<\\|im_end\\|>"), "<\\|im_end\\|>"),  # ordinary text that spells a control token
  ],
)
def test_answers_match(idle, how, pattern):
  chats = said(idle.chat(n=8, seed=2, temperature=1.5, max_tokens=100, **how))
  chats += said(idle.chat(n=4, seed=3, max_tokens=100, ignore_eos=True, **how))
  body = {"prompt": ["Once", "It is"], "n": 2, "max_tokens": 100, "seed": 5} | how
  texts = [c["text"] for c in idle.post(TEXTS, **body)["choices"]]
  for text in (*chats, *texts):
    assert re.fullmatch(pattern, text), text
  if "choice" in how["structured_outputs"]:
    assert len({*chats}) > 1


def test_a_stop_id_is_allowed_exactly_where_the_grammar_may_end(idle):
  tok = idle.session.tokenizer
  (a,) = tok.encode("a", False)
  how = {"temperature": 1.5, "n": 8, "max_tokens": 60, "return_token_ids": True}
  free = idle.chat(seed=1, **how, **so(regex="[ab]{3,5}"))["choices"]
  for choice in free:
    ids, text = choice["token_ids"], choice["message"]["content"]
    # The longest texts end with their last letter, shorter ones with a token that ends them.
    assert (ids[-1] in idle.session.stop) == (len(text) < 5), (ids, text)
    assert choice["finish_reason"] == "stop"
  # A letter that ends the text may come only after the first three, and is not shown.
  own = idle.chat(seed=1, **how, **so(regex="[ab]{3,5}"), stop_token_ids=[a], ignore_eos=True)
  for text in said(own):
    assert re.fullmatch("b{3,5}", text), text


def test_stop_ids_that_leave_no_first_token_are_refused(idle):
  stop = idle.session.tokenizer.encode("a", False)
  error = idle.chat(status=400, stop_token_ids=stop, **so(regex="a"))["error"]
  assert error["param"] == "structured_outputs.regex"
  assert "no token of this model can follow" in error["message"]


def test_other_texts_do_not_notice(idle):
  alone = [said(idle.chat(seed=i, max_tokens=60))[0] for i in range(3)]
  plain = [said(idle.chat(seed=i, max_tokens=60, temperature=0.9))[0] for i in range(3)]

  async def whole():
    async with httpx.AsyncClient(base_url=idle.url, timeout=60) as client:

      async def ask(**body):
        body |= {"messages": [{"role": "user", "content": QUESTION}]}
        return said((await client.post(CHAT, json=body)).json())[0]

      guided = [ask(seed=i, **HOT, **by_schema()) for i in range(3)]
      others = [ask(seed=i, max_tokens=60) for i in range(3)]
      others += [ask(seed=i, max_tokens=60, temperature=0.9) for i in range(3)]
      return await asyncio.gather(*guided, *others)

  got = asyncio.run(whole())
  assert got[3:] == alone + plain
  assert got[:3] == [said(idle.chat(seed=i, **HOT, **by_schema()))[0] for i in range(3)]


def test_logprobs_are_those_of_the_raw_model(idle):
  how = so(regex="[0-9]{12}") | {"logprobs": 2, "return_tokens_as_token_ids": True}
  prompt = "Once upon a time"
  body = {"prompt": prompt, "max_tokens": 20, "seed": 1, "temperature": 1.3, "echo": True}
  found = idle.post(TEXTS, **body, **how)["choices"][0]["logprobs"]
  ids = [int(t.removeprefix("token_id:")) for t in found["tokens"]]
  weights, cfg = idle.service.scheduler.rows.engine.weights, idle.session.model.cfg
  x_1TD, *_ = llama.forward(cfg, weights, jnp.asarray([ids]))
  logp_TV = np.asarray(jax.nn.log_softmax(llama.unembed(weights, x_1TD)))[0]
  want = logp_TV[np.arange(len(ids) - 1), ids[1:]]
  np.testing.assert_allclose(found["token_logprobs"][1:], want, atol=1e-3)
  assert min(want[-12:]) < -4  # the model would not have said digits


def test_a_stream_is_the_whole_answer(idle):
  how = {"model": "demo", "seed": 5, "n": 3, "temperature": 0.9, "max_tokens": 150}
  how |= {"messages": [{"role": "user", "content": QUESTION}], **by_schema()}
  whole = idle.openai.chat.completions.create(**how)
  texts, ends = ["", "", ""], ["", "", ""]
  for chunk in idle.openai.chat.completions.create(**how, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ""
      ends[choice.index] = choice.finish_reason or ends[choice.index]
  assert texts == [c.message.content for c in whole.choices]
  assert ends == [c.finish_reason for c in whole.choices] == ["stop"] * 3


def test_a_client_that_goes_frees_its_guided_rows(idle):
  body = {"max_tokens": 400, "n": 8, "stream": True, **so(regex="a{5000}")}
  body["messages"] = [{"role": "user", "content": QUESTION}]
  with idle.http.stream("POST", CHAT, json=body) as answer:
    next(answer.iter_text())
  idle.idle()


@pytest.mark.parametrize(
  ("how", "field", "words"),
  [
    (so(regex="("), "regex", "unclosed group"),
    (so(regex="(?=a)b"), "regex", "look-around"),
    (so(regex="a?" * 5000), "regex", "8192 bytes"),
    (so(regex=""), "regex", "empty"),
    (so(choice=[]), "choice", "empty"),
    (so(choice=["a", ""]), "choice", "empty"),
    (so(choice=["a" * 70_000]), "choice", "65536 bytes"),
    (so(grammar="start: foo"), "grammar", "unknown name"),
    (so(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "grammar", "nested too deeply"),
    (so(grammar="start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(600))), "grammar", "500 rules"),
    (so(grammar='{"grammars": []}'), "grammar", "Lark"),
    (so(json="{"), "json", "not JSON"),
    (so(json="3"), "json", "not a JSON object"),
    (so(json={"type": "person"}), "json", "person"),
    (so(json={"not": {}}), "json", "not"),
    (so(json={"$ref": "#"}), "json", ""),
    (so(json={"$defs": {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(600)}}), "json", "500 references"),
    (so(json={"type": "string", "pattern": "a?" * 5000}), "json", "patterns"),
    (so(json=json.loads('{"items":' * 300 + "{}" + "}" * 300)), "json", "deep"),
    (so(json={"allOf": [{"type": "string"}, {"type": "integer"}]}), "json", "nsatisfiable"),
  ],
)  # fmt: skip
def test_grammars_that_cannot_be_used(idle, how, field, words):
  body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3}
  answer = idle.http.post(CHAT, json=body | how)
  error = answer.json()["error"]
  assert (answer.status_code, error["param"]) == (400, f"structured_outputs.{field}")
  assert words in error["message"]
  assert re.fullmatch(r"[^\n]{10,300}\.", error["message"]), error["message"]


def test_what_a_schema_asks_for_in_vain_is_refused_unless_it_is_not_strict(idle):
  schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
  for strict in ({}, {"strict": True}):
    error = idle.chat(status=400, **by_schema(schema, **strict))["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "uniqueItems" in error["message"]
  assert isinstance(
    json.loads(said(idle.chat(max_tokens=99, **by_schema(schema, strict=False)))[0]), list
  )
  error = idle.chat(status=400, allowed_token_ids=[5], **by_schema())["error"]
  assert error["param"] == "response_format.json_schema.schema"
  assert "'allowed'" in error["message"]


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(idle):
  alone = said(idle.chat(seed=1))
  done = threading.Thread(target=lambda: alone.extend(said(idle.chat(seed=1))))
  done.start()
  how = so(regex="((a{1,1000}){1,1000}){500,1000}")
  error = idle.chat(status=400, max_tokens=400, **how)["error"]
  done.join()
  assert error["code"] == "grammar_error"
  assert "too many expressions" in error["message"]
  assert alone[0] == alone[1]
  again = idle.http.post(
    CHAT, json={"messages": [{"role": "user", "content": QUESTION}], **how, "max_tokens": 1}
  )
  assert again.status_code == 200, again.text


def test_without_the_package_a_request_is_told_what_to_install(server, monkeypatch):
  monkeypatch.setattr(server.service, "grammars", None)
  for how in (by_schema(), so(regex="a"), {"response_format": {"type": "json_object"}}):
    error = server.chat(status=400, **how)["error"]
    assert error["code"] == "unsupported_parameter"
    assert 'pip install "entropix_jax[grammar]"' in error["message"]
  server.chat(max_tokens=1, response_format={"type": "text"}, structured_outputs={})


def test_grammars_are_kept_and_only_a_few(server, monkeypatch):
  monkeypatch.setattr("entropix_jax.serve.grammar._KEPT", 2)
  grammars = Grammars(server.session.tokenizer, server.session.model.cfg.vocab)
  first = grammars.find("regex", "a")
  grammars.find("regex", "b")
  assert grammars.find("regex", "a") is first
  grammars.find("regex", "c")
  assert grammars.find("regex", "a") is first
  assert len(grammars._kept) == 2
  with pytest.raises(errors.UserError, match="unclosed"):
    grammars.find("regex", "(")
  assert "llguidance" in sys.modules
