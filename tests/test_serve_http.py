"""The HTTP layer of the server over an engine whose next token is arithmetic of the prefix, in one process and over a socket."""

import asyncio
import collections
import contextlib
import json
import math
import socket
import threading
import types

import jinja2
import numpy as np
import pytest

from entropix_jax import settings
from entropix_jax.checkpoints.tokenizer import StreamDecoder
from entropix_jax.rows import Failure, Token
from entropix_jax.serve.exchange import Event, Labels, Limits, PromptScores, ServiceError
from entropix_jax.session import Model, Session

NEEDS = 'install the extras that the server needs: pip install ".[serve,test]"'
httpx, openai, uvicorn, parser, http = (
  pytest.importorskip(name, reason=NEEDS)
  for name in ("httpx", "openai", "uvicorn", "prometheus_client.parser", "entropix_jax.serve.app")
)
bodies = http.bodies
around = pytest.importorskip("entropix_jax.serve.around", reason=NEEDS)

NAME = "demo/instruct"
CONTEXT = 128
END = "(the end)"  # a configured stop string
CHAT = "/v1/chat/completions"
TEXTS = "/v1/completions"
SCORE = "/v1/entropix/score"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
ONCE = {"prompt": "Once upon a time"}


def session_of(which):
  values = {"checkpoint": str(settings.ASSETS / "demo" / which)}
  values["engine"] = {"max_seq_len": CONTEXT, "top_logprobs": 20}
  values |= {"sampler": {"temp": 0.7}, "stop": (END,)}
  chosen = settings.resolve(values)
  return Session(Model(chosen), chosen, samplers=("quadrant", "plain"))


@pytest.fixture(scope="module")
def session():
  return session_of("instruct")


@pytest.fixture(scope="module")
def base():
  return session_of("base")


def law(ids):
  """The model: log-probabilities after a prefix; control tokens are unlikely."""
  heat = (np.arange(1024) < 768) * (np.arange(1024) * 37 + sum(ids) * 11 + len(ids) * 5) % 101 / 10
  return (heat - np.log(np.exp(heat).sum())).tolist()


def likely(logp, k):
  order = sorted(range(len(logp)), key=lambda i: (-logp[i], i))[:k]
  return tuple((i, logp[i]) for i in order)


class FakeStream:
  def __init__(self, service, generations):
    self.service, self.generations = service, generations
    self.cached_tokens, self.late, self.cancelled = 3, 0.001, False
    self.rows = sum(g.samples for g in generations)
    service.rows += self.rows

  async def __aiter__(self):
    service = self.service
    try:
      if service.before:
        await service.before()
      texts = []
      for call, g in enumerate(self.generations):
        ids = list(g.request.ids)
        if g.labels:
          logp = law(ids)
          yield Event(call, 0, Labels(tuple(logp[i] for i in g.labels)))
          continue
        if g.score is not None:
          laws = [law(ids[:i]) for i in range(1, len(ids))]
          chosen = (None, *(x[i] for x, i in zip(laws, ids[1:], strict=True)))
          yield Event(call, 0, PromptScores(chosen, (None, *(likely(x, g.score) for x in laws))))
        if g.generates:
          texts += [service.text(g.request, call, sample) for sample in range(g.samples)]
      while texts:  # the choices interleave
        for text in list(texts):
          if (event := next(text, None)) is None:
            texts.remove(text)
            continue
          if service.between:
            await service.between()
          yield event
    finally:
      self.cancel()

  def cancel(self):
    if not self.cancelled:
      self.cancelled = True
      self.service.rows -= self.rows


class Fake:
  """A service without an engine."""

  def __init__(self, session, **limits):
    self.session, self.limits = session, Limits(**limits)
    self.state, self.healthy, self.fingerprint = "ready", True, "fp_test"
    self.compiling = 0
    self.samplers, self.grammars = session.samplers, None
    self.seen, self.streams, self.rows, self.most = [], [], 0, 0
    self.before = self.between = None  # coroutines that the first, and every, event waits for
    self.script = ()  # ids to emit in place of arithmetic
    self.breaks = None  # after so many tokens the numbers are not finite

  def submit(self, generations):
    if self.rows + sum(g.samples for g in generations) > self.limits.queued_requests:
      raise ServiceError(503, "engine_overloaded", "The queue is full.", 1.4)
    self.seen += generations
    self.streams.append(FakeStream(self, generations))
    self.most = max(self.most, self.rows)
    return self.streams[-1]

  def text(self, request, call, sample):
    tok, ids = self.session.tokenizer, list(request.ids)
    decoder = StreamDecoder(
      tok, request.show_control, request.stop_text, request.begins, request.keep_stop
    )
    for n in range(request.max_new_tokens):
      if n == self.breaks:
        yield Event(call, sample, Failure(call, sample, n, decoder.flush(), 0.0))
        return
      logp = law(ids)
      top = likely(logp, 20)
      id = (sum(ids) * 31 + request.seed * 17 + (request.stream + sample) * 7 + n) % 768
      id = top[0][0] if request.knobs.get("temperature") == 0 else id
      id = self.script[n] if n < len(self.script) else id
      value = logp[id] if id != self.session.stop[0] else -math.inf
      finish = "stop" if id in request.stop else None
      text = "" if finish else decoder.push(id)
      finish = "stop" if decoder.stopped else finish
      finish = "length" if finish is None and n + 1 == request.max_new_tokens else finish
      text += decoder.flush() if finish else ""
      numbers = {"logprob": value, "logprob_law": 0.0, "entropy": 1.5, "varentropy": math.nan}
      tops = tuple((i, "", x) for i, x in top) if request.alternatives else ()
      kind = {"branch": "flow", "numbers": numbers, "finish": finish, "seconds": 0.0, "top": tops}
      yield Event(call, sample, Token(0, n, id, text, sample=sample, **kind))
      if finish:
        return
      ids.append(id)


class Server:
  """An application over a fake service, asked in this process."""

  def __init__(self, session, keys=(), origins=(), **limits):
    self.service = Fake(session, **limits)
    self.app = http.app(self.service, session, NAME, keys, origins)
    self.metrics = self.app.state.metrics

  def __call__(self, route, body=None, method=None, **options):
    """The answer to one request; a dictionary is sent as JSON."""
    if isinstance(body, bytes):
      options |= {"content": body}
      options["headers"] = {"content-type": "application/json"} | options.get("headers", {})
    elif body is not None:
      options["json"] = body
    return asyncio.run(self.ask(route, method or ("GET" if body is None else "POST"), options))

  async def ask(self, route, method, options):
    transport = httpx.ASGITransport(app=self.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
      return await client.request(method, route, **options)

  def ok(self, route, body=None, **options):
    answer = self(route, body, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()

  def events(self, route, body):
    """The chunks of a streamed answer."""
    answer = self(route, body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return chunks(answer.text)

  def value(self, name, **labels):
    """The present value of a metric."""
    for family in parser.text_string_to_metric_families(self("/metrics").text):
      for sample in family.samples:
        if sample.name == f"entropix_{name}" and labels.items() <= sample.labels.items():
          return sample.value
    return 0


@pytest.fixture
def server(session):
  return Server(session)


def chunks(text):
  parts = text.split("\n\n")
  assert parts[-2:] == ["data: [DONE]", ""]
  lines = [part for part in parts[:-2] if not part.startswith(":")]
  assert all(line.startswith("data: ") for line in lines)
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(answer, status, param=None, code=None):
  """The message of an answer that must be an error in the one form that all errors have."""
  assert answer.status_code == status, answer.text
  error = answer.json()["error"]
  assert error.keys() == {"message", "type", "param", "code"}
  assert isinstance(error["message"], str)
  assert len(error["message"]) <= 1000
  assert "Traceback" not in answer.text
  assert "assets" not in answer.text
  assert answer.headers["x-request-id"]
  assert (error["param"], error["code"]) == (param, code), error
  assert error["type"] == bodies._KINDS.get(status, "server_error")
  return error["message"]


# -- completions and chats ---------------------------------------------------------------------


def test_the_four_forms_of_prompts(server, session):
  tok = session.tokenizer
  a, b = tok.encode("One kite"), tok.encode("Two")
  for prompt, ids in (
    ("One kite", [[tok.bos, *a]]),
    (["One kite", "Two"], [[tok.bos, *a], [tok.bos, *b]]),
    (a, [a]),
    ([a, b, a], [a, b, a]),
    ("<|begin_of_text|>One kite", [[tok.bos, *a]]),
    ("Two<|eot_id|>", [[tok.bos, *b, tok.eot]]),
  ):
    server.service.seen.clear()
    answer = server.ok(TEXTS, {"prompt": prompt, "max_tokens": 3})
    seen = [list(g.request.ids) for g in server.service.seen]
    assert seen == ids
    assert not any(g.request.begins for g in server.service.seen)
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(ids))]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 3 * len(ids)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
  server.ok(TEXTS, {"prompt": "Two", "add_special_tokens": False})
  assert server.service.seen[-1].request.ids == b
  assert server.service.seen[-1].request.max_new_tokens == 16


@pytest.mark.parametrize("k", [None, 0, 1, 5])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_echo_with_log_probabilities(server, session, k, most):
  ids = session.tokenizer.encode("One 🎈 kite")
  body = {"prompt": [ids], "max_tokens": most, "logprobs": k, "echo": True, "temperature": 0}
  answer = server.ok(TEXTS, body)
  choice = answer["choices"][0]
  assert choice["text"].startswith("One 🎈 kite")
  assert choice["finish_reason"] == "length"
  assert answer["usage"]["completion_tokens"] == most
  if k is None:
    assert choice["logprobs"] is None
    return
  found = choice["logprobs"]
  assert {len(values) for values in found.values()} == {len(ids) + most}
  assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
  seen = server.service.text(server.service.seen[0].request, 0, 0)
  whole = ids + [event.what.id for event in seen][:most]
  for i, offset in list(enumerate(found["text_offset"]))[1:]:
    before = session.tokenizer.decode_bytes(whole[:i], True).decode("utf-8", "ignore")
    assert offset == len(before)
    name, top = found["tokens"][i], found["top_logprobs"][i]
    assert top[name] == found["token_logprobs"][i] == law(whole[:i])[whole[i]]
    assert 1 <= len(top) <= k + 1
    if i >= len(ids):
      assert top[name] == max(top.values())


def test_what_an_evaluation_harness_sends(server, session):
  """The trailing token is there even if it ends the text, so that [context:-1] are the scored ones."""
  ids = session.tokenizer.encode("One kite and two")
  server.service.script = (session.stop[0],)
  body = {"model": NAME, "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1}
  choice = server.ok(TEXTS, body | {"seed": 1234, "echo": True})["choices"][0]
  values = choice["logprobs"]["token_logprobs"]
  assert choice["finish_reason"] == "stop"
  assert values[3:-1] == [law(ids[:i])[ids[i]] for i in range(3, len(ids))]
  assert values[-1] == bodies.NEVER
  assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
  stops = [".", "!", "?", "\n\n", "Q:", "</s>", "<|eot_id|>"]
  body = {"prompt": [ids], "model": NAME, "max_tokens": 4, "temperature": 0, "stop": stops}
  server.ok(TEXTS, body | {"seed": 1234})
  assert server.service.seen[-1].request.stop_text == (END, *stops)


def test_an_implicit_bos_is_fed_and_not_seen(server, session):
  server.app = http.app(server.service, session, NAME, implicit_bos=True)
  ids = session.tokenizer.encode("One 🎈 kite")
  begun = [session.tokenizer.bos, *ids]
  how = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "return_token_ids": True}
  answer = server.ok(TEXTS, {"prompt": [ids, begun]} | how)
  assert [g.request.ids for g in server.service.seen] == [begun, begun]
  assert answer["usage"]["prompt_tokens"] == len(ids) + len(begun)
  bare, sent = answer["choices"]
  assert (bare["prompt_token_ids"], sent["prompt_token_ids"]) == (ids, begun)
  assert sent["text"] == "<|begin_of_text|>" + bare["text"]
  for name in ("tokens", "token_logprobs", "top_logprobs"):
    assert bare["logprobs"][name] == sent["logprobs"][name][1:]
  shift = len("<|begin_of_text|>")
  assert [x + shift for x in bare["logprobs"]["text_offset"]] == sent["logprobs"]["text_offset"][1:]


def test_a_chat_and_its_log_probabilities(server, session):
  server.service.script = tuple(session.tokenizer.encode("Hi 🎈漢字!")) + session.stop[:1]
  answer = server.ok(CHAT, HELLO | {"logprobs": True, "top_logprobs": 2, "seed": 5})
  assert answer["object"] == "chat.completion"
  assert answer["system_fingerprint"] == "fp_test"
  assert "entropix" not in answer
  choice = answer["choices"][0]
  assert choice["message"] == {"role": "assistant", "content": "Hi 🎈漢字!", "refusal": None}
  entries = choice["logprobs"]["content"]
  assert len(entries) == answer["usage"]["completion_tokens"] == len(server.service.script)
  data = bytes(byte for entry in entries for byte in entry["bytes"])
  assert data.decode() == "Hi 🎈漢字!" + entries[-1]["token"]
  assert all(entry["token"] in [t["token"] for t in entry["top_logprobs"]] for entry in entries)
  assert all(2 <= len(entry["top_logprobs"]) <= 3 for entry in entries)
  request = server.service.seen[0].request
  assert request.seed == 5
  assert request.begins
  assert request.max_new_tokens == CONTEXT - len(request.ids)
  plain = server.ok(CHAT, HELLO | {"logprobs": True})
  assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
  server.ok(CHAT, HELLO)
  assert [g.request.alternatives for g in server.service.seen] == [True, False, False]
  named = server.ok(TEXTS, ONCE | {"logprobs": 1, "return_tokens_as_token_ids": True})
  assert named["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")


def test_messages_of_all_kinds(server, session):
  parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
  turns = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": parts, "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "user", "content": "<|eot_id|>"},
  ]
  body = {"messages": turns, "max_tokens": 7, "max_completion_tokens": 3, "tools": [{"x": 1}]}
  server.ok(CHAT, body | {"tool_choice": "none", "response_format": {"type": "text"}})
  said = [("system", "Be brief."), ("user", "Hello!"), ("assistant", ""), ("user", "<|eot_id|>")]
  expected = session.encode_chat([{"role": r, "content": c} for r, c in said])
  request = server.service.seen[0].request
  assert request.ids == expected
  assert request.ids.count(session.tokenizer.eot) == 4
  assert request.max_new_tokens == 3


def test_samples_are_numbered_by_prompt_and_reproducible(server):
  body = {"prompt": ["One", "Two"], "n": 3, "seed": 11, "max_tokens": 6, "return_token_ids": True}
  answer = server.ok(TEXTS, body)
  texts = [choice["token_ids"] for choice in answer["choices"]]
  assert [choice["index"] for choice in answer["choices"]] == [*range(6)]
  assert len({*map(tuple, texts)}) == 6
  assert [choice["token_ids"] for choice in server.ok(TEXTS, body)["choices"]] == texts
  alone = server.ok(TEXTS, body | {"prompt": "Two"})
  assert [choice["token_ids"] for choice in alone["choices"]] == texts[3:]
  prompts = sum(len(g.request.ids) for g in server.service.seen[:2])
  assert answer["usage"] | {"prompt_tokens": prompts, "completion_tokens": 36} == answer["usage"]
  for _ in range(2):
    server.ok(TEXTS, {"prompt": "One"})
  seeds = [g.request.seed for g in server.service.seen[-2:]]
  assert seeds[0] != seeds[1]


@pytest.mark.parametrize("route", [CHAT, TEXTS])
@pytest.mark.parametrize(
  "extra",
  [{}, {"logprobs": 3}, {"logprobs": 2, "echo": True}, {"echo": True, "max_tokens": 0, "logprobs": 0}],
)  # fmt: skip
def test_a_stream_says_the_same(session, route, extra):
  server = Server(session)
  server.service.script = tuple(
    session.tokenizer.encode("A 🎈 is a kite, said ST and STO and STOP!")
  )
  body = dict(ONCE, **extra) if route == TEXTS else HELLO | {"logprobs": bool(extra)}
  body |= {"n": 2, "stop": ["STOP", "nothing"], "seed": 1, "entropix": {"trace": "metrics"}}
  body = {"max_tokens": 60} | body
  whole = server.ok(route, body)
  joined = collections.defaultdict(lambda: collections.defaultdict(list))
  ends, heads = {}, set()
  for chunk in server.events(route, body):
    heads.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
    (choice,) = chunk["choices"]
    index = choice["index"]
    assert index not in ends
    assert "usage" not in chunk
    assert chunk["entropix"] == {"sampler": "quadrant", "seed": 1}
    mine = joined[index]
    mine["text"].append(choice["text"] if route == TEXTS else choice["delta"].get("content", ""))
    for name, values in (choice["logprobs"] or {}).items():
      mine[name] += values
    mine["entropy"] += choice.get("entropix", {}).get("entropy", [])
    if choice["finish_reason"]:
      ends[index] = choice["finish_reason"]
  assert len(heads) == 1
  assert heads.pop()[3] == ("text_completion" if route == TEXTS else "chat.completion.chunk")
  for choice in whole["choices"]:
    mine = joined[choice["index"]]
    text = choice["text"] if route == TEXTS else choice["message"]["content"]
    assert "".join(mine.pop("text")) == text
    assert (extra.get("max_tokens") == 0) or text.endswith("and STO and ")
    assert mine.pop("entropy") == choice["entropix"]["entropy"]
    assert dict(mine) == (choice["logprobs"] or {})
    assert ends[choice["index"]] == choice["finish_reason"]


def test_the_chunks_of_a_stream(server):
  found = server.events(CHAT, HELLO | {"n": 2, "max_tokens": 4})
  for index in range(2):
    mine = [c["choices"][0] for c in found if c["choices"][0]["index"] == index]
    assert mine[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in mine[1:])
    assert [c["finish_reason"] for c in mine].count("length") == 1
    assert mine[-1]["finish_reason"] == "length"
  asked = {"max_tokens": 4, "stream_options": {"include_usage": True}}
  *most, last = server.events(TEXTS, ONCE | asked)
  assert all(chunk["usage"] is None and chunk["choices"] for chunk in most)
  assert last["choices"] == []
  assert last["usage"]["completion_tokens"] == 4
  asked["stream_options"]["continuous_usage_stats"] = True
  *most, last = server.events(TEXTS, ONCE | asked)
  assert [chunk["usage"]["completion_tokens"] for chunk in most][-1] == 4
  assert sum(not chunk["choices"] for chunk in (*most, last)) == 1


def test_traces_are_there_when_asked(server):
  body = ONCE | {"max_tokens": 3, "seed": 9, "temperature": 0.5}
  answer = server.ok(TEXTS, body | {"entropix": {"trace": "metrics"}})
  assert answer["entropix"] == {"sampler": "plain", "seed": 9}
  assert answer["choices"][0]["entropix"] == {
    "entropy": [1.5] * 3, "varentropy": [None] * 3, "action": ["flow"] * 3,
  }  # fmt: skip
  answer = server.ok(TEXTS, body | {"entropix": {"trace": "full"}})
  assert answer["choices"][0]["entropix"]["logprob_law"] == [0.0] * 3
  assert "entropix" not in server.ok(TEXTS, body)["choices"][0]


# -- samplers ----------------------------------------------------------------------------------


def configured(session):
  return session.settings.knobs


@pytest.mark.parametrize(
  ("body", "sampler", "knobs"),
  [
    ({}, "quadrant", configured),
    ({"temperature": None, "top_p": None}, "quadrant", configured),
    ({"temperature": 0.7}, "plain", {"temperature": 0.7}),
    ({"temperature": 1}, "plain", {"temperature": 1.0}),
    (
      {"top_k": -1, "min_p": 0.1, "logit_bias": {"7": -5, "9": 3}, "allowed_token_ids": [7, 9]},
      "plain",
      {"top_k": 0, "min_p": 0.1, "logit_bias": {7: -5.0, 9: 3.0}, "allowed": [7, 9]},
    ),
    ({"entropix": {"sampler": "quadrant"}}, "quadrant", configured),
    ({"entropix": {"sampler": "plain"}}, "plain", {}),
    ({"entropix": {"params": {"top_k": 5}}}, "quadrant", lambda s: configured(s) | {"top_k": 5}),
    ({"entropix": {"params": {"top_k": 5}}, "temperature": 1, "top_p": 0.5}, "quadrant", lambda s: configured(s) | {"top_k": 5, "top_p": 0.5}),
    ({"entropix": {"sampler": "plain", "params": {"typical_p": 0.5}}, "temperature": 0}, "plain", {"typical_p": 0.5, "temperature": 0.0}),
  ],
)  # fmt: skip
def test_who_samples_and_how(server, session, body, sampler, knobs):
  server.ok(CHAT, HELLO | body)
  request = server.service.seen[0].request
  assert request.sampler == sampler
  assert request.knobs == (knobs(session) if callable(knobs) else knobs)


def test_another_sampler_has_the_preset_that_ships_for_the_model(monkeypatch):
  from entropix_jax.serve import calls

  monkeypatch.setattr(calls.presets, "for_model", lambda cfg: "smollm2-135m")
  chosen = types.SimpleNamespace(sampler="plain", knobs={"temperature": 0.2})
  served = types.SimpleNamespace(settings=chosen, model=types.SimpleNamespace(cfg=None))
  preset = calls.presets.load("smollm2-135m")
  assert calls.usual(served, "quadrant") == preset.knobs != {}
  assert calls.usual(served, "plain") == chosen.knobs
  assert calls.usual(served, "dslider") == {}


def test_what_ends_a_text(server, session):
  request = lambda **body: (server.ok(TEXTS, ONCE | body), server.service.seen[-1].request)[1]  # noqa: E731
  assert request().stop == session.stop
  assert request(stop_token_ids=[5, 6]).stop == (*session.stop, 5, 6)
  assert request(stop_token_ids=[5], ignore_eos=True).stop == (5,)
  assert request(stop=["x", END]).stop_text == (END, "x")
  assert request(stop=[]).stop_text == request(stop=None).stop_text == (END,)
  assert not request().show_control
  assert request(skip_special_tokens=False).show_control
  assert request(include_stop_str_in_output=True).keep_stop
  request(cache_salt="pepper")
  assert server.service.seen[-1].salt == "pepper"


# -- what is refused ---------------------------------------------------------------------------

NO = "unsupported_parameter"
BAD_ID = "invalid_token_id"
LONG = "context_length_exceeded"


@pytest.mark.parametrize(
  ("body", "param", "code"),
  [
    ({"temperature": True}, "temperature", None),
    ({"temperature": "1"}, "temperature", None),
    ({"temperature": 2.1}, "temperature", None),
    ({"top_p": -0.1}, "top_p", None),
    ({"n": 0}, "n", None),
    ({"n": 1.0}, "n", None),
    ({"n": True}, "n", None),
    ({"n": 33}, "n", None),
    ({"n": 10**30}, "n", None),
    ({"seed": 2**63}, "seed", None),
    ({"max_tokens": -1}, "max_tokens", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": CONTEXT}, None, LONG),
    ({"stop": ["a"] * 65}, "stop", None),
    ({"stop": ""}, "stop", None),
    ({"stop": [1]}, "stop.0", None),
    ({"stream": 1}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", BAD_ID),
    ({"logit_bias": {"5000": 1}}, "logit_bias", BAD_ID),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", None),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", None),
    ({"allowed_token_ids": list(range(301))}, "allowed_token_ids", None),
    ({"allowed_token_ids": [5000]}, "allowed_token_ids", BAD_ID),
    ({"stop_token_ids": [5000]}, "stop_token_ids", BAD_ID),
    ({"stop_token_ids": list(range(30))}, "stop_token_ids", None),
    ({"stop_token_ids": [True]}, "stop_token_ids.0", None),
    ({"min_tokens": 1}, "min_tokens", NO),
    ({"prompt_logprobs": 0}, "prompt_logprobs", NO),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", NO),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", None),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", None),
    ({"structured_outputs": {"pattern": "a"}}, "structured_outputs.pattern", None),
    ({"guided_json": {}}, "guided_json", NO),
    ({"response_format": {"type": "json_object"}}, "response_format", NO),
    ({"response_format": {"type": "xml"}}, "response_format.type", None),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", None),
    ({"suffix": "x"}, "suffix", NO),
    ({"tools": [{}]}, "tools", NO),
    ({"tools": [{}], "tool_choice": "auto"}, "tools", NO),
    ({"entropix": {"x": 1}}, "entropix.x", None),
    ({"entropix": {"group": {"n": 3}}}, "entropix.group", NO),
    ({"entropix": {"trace": "some"}}, "entropix.trace", None),
    ({"entropix": 3}, "entropix", None),
    ({"entropix": {"sampler": "dslider"}}, "entropix.sampler", None),
    ({"entropix": {"sampler": "../plain"}}, "entropix.sampler", None),
    ({"entropix": {"sampler": "plain", "params": {"heat": 1}}}, "entropix.params", None),
    ({"entropix": {"sampler": "plain", "params": {"top_p": "much"}}}, "entropix.params", None),
    ({"entropix": {"sampler": "quadrant"}, "temperature": 0.5}, "temperature", NO),
    ({"entropix": {"params": {"top_k": 5}}, "top_k": 6}, "top_k", None),
  ],
)  # fmt: skip
def test_fields_that_cannot_be_used(server, body, param, code):
  for route, rest, prompt in ((CHAT, HELLO, "messages"), (TEXTS, ONCE, "prompt")):
    refused(server(route, rest | body), 400, param or prompt, code)
  assert server.service.seen == []


@pytest.mark.parametrize(
  ("route", "body", "param", "code"),
  [
    (TEXTS, {}, "prompt", None),
    (TEXTS, {"prompt": []}, "prompt", None),
    (TEXTS, {"prompt": [[]]}, "prompt", None),
    (TEXTS, {"prompt": ["a", 1]}, "prompt", None),
    (TEXTS, {"prompt": [True]}, "prompt", None),
    (TEXTS, {"prompt": {"a": 1}}, "prompt", None),
    (TEXTS, {"prompt": ["a"] * 65}, "prompt", None),
    (TEXTS, {"prompt": "", "add_special_tokens": False}, "prompt.0", None),
    (TEXTS, {"prompt": [1, 1024]}, "prompt", BAD_ID),
    (TEXTS, {"prompt": [-1]}, "prompt", BAD_ID),
    (TEXTS, {"prompt": [2**64 - 1]}, "prompt", BAD_ID),
    (TEXTS, {"prompt": [1] * CONTEXT}, "prompt", LONG),
    (TEXTS, {"prompt": [1] * 100, "max_tokens": 29}, "prompt", LONG),
    (TEXTS, ONCE | {"logprobs": 21}, "logprobs", None),
    (TEXTS, ONCE | {"logprobs": True}, "logprobs", None),
    (TEXTS, ONCE | {"best_of": 2}, "best_of", NO),
    (TEXTS, {"prompt": ["a"] * 60, "n": 5}, "n", None),
    (CHAT, {"messages": []}, "messages", None),
    (CHAT, {"messages": "hi"}, "messages", None),
    (CHAT, {"messages": ["hi"]}, "messages.0", None),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", NO),
    (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role", None),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls", NO),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", NO),
    (CHAT, HELLO | {"top_logprobs": 2}, "top_logprobs", None),
    (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    (CHAT, HELLO | {"logprobs": 1}, "logprobs", None),
    (CHAT, HELLO | {"max_completion_tokens": 0}, "max_completion_tokens", None),
    (CHAT, HELLO | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", NO),
    (CHAT, HELLO | {"add_generation_prompt": False}, "add_generation_prompt", NO),
    (CHAT, HELLO | {"continue_final_message": True}, "continue_final_message", NO),
    ("/tokenize", {}, "prompt", None),
    ("/tokenize", {"prompt": 3}, "prompt", None),
    ("/detokenize", {"tokens": [5000]}, "tokens", BAD_ID),
    (SCORE, {"prefix": "a", "items": [[1]], "label_token_ids": [1]}, "items.0", None),
    (SCORE, {"prefix": "a", "items": ["b"], "label_token_ids": [5000]}, "label_token_ids", BAD_ID),
    (SCORE, {"prefix": "a", "items": [], "label_token_ids": [1]}, "items", None),
    (SCORE, {"prefix": "a", "items": ["b"] * 65, "label_token_ids": [1]}, "items", None),
  ],
)  # fmt: skip
def test_bodies_that_cannot_be_used(server, route, body, param, code):
  message = refused(server(route, body), 400, param, code)
  assert message.endswith((".", "?"))
  assert server.service.seen == []


@pytest.mark.parametrize(
  "body",
  [
    b"", b"{", b"[]", b"3", b'"x"', b"null", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b"[" * 100_000,
    b'{"prompt": "\\ud800"}', b"\xff\xfe", b'{"a": "\xff"}', b"\xef\xbb\xbf{}", b"1" * 5000,
  ],
)  # fmt: skip
def test_what_is_no_json_object(server, body):
  refused(server(TEXTS, body), 400, None, "invalid_json")


def test_other_errors_have_the_same_form(server, session):
  refused(server("/v1/embeddings", {}), 404)
  refused(server("/v1/models/"), 404, "model", "model_not_found")
  refused(server("/v1/models/other"), 404, "model", "model_not_found")
  refused(server(CHAT, HELLO | {"model": "other"}), 404, "model", "model_not_found")
  answer = server(CHAT)
  refused(answer, 405)
  assert answer.headers["allow"] == "POST"
  for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
    answer = server(TEXTS, json.dumps(ONCE).encode(), headers={"content-type": kind})
    refused(answer, 400, None, "invalid_json")
  assert server(
    TEXTS, json.dumps(ONCE).encode(), headers={"content-type": "Application/JSON; charset=utf-8"}
  ).is_success
  small = Server(session, body_bytes=100)
  big = json.dumps({"prompt": "x" * 100}).encode()
  refused(small(TEXTS, big), 413, None, "body_too_large")

  sent = 0

  async def pieces():
    nonlocal sent
    for _ in range(200):
      sent += 1
      yield b"x"

  answer = small(
    TEXTS, method="POST", content=pieces(), headers={"content-type": "application/json"}
  )
  refused(answer, 413, None, "body_too_large")
  assert sent <= 101  # the rest is not read
  assert server("/v1/completions/", ONCE).status_code == 404
  assert server.value("http_requests_total", route=CHAT, status="405") == 1
  assert server.value("http_requests_total", route="other", status="404") >= 2


def test_a_defect_of_the_server_tells_nothing(server, caplog):
  server.service.submit = lambda _: 1 / 0
  refused(server(CHAT, HELLO, headers={"x-request-id": "mine-1"}), 500, None, "internal_error")
  assert "mine-1" in caplog.text
  assert "ZeroDivisionError" in caplog.text
  assert server.value("http_requests_total", route=CHAT, status="500") == 1


def test_ignored_fields_are_listed_and_counted(server):
  body = HELLO | {
    "user": "ann",
    "store": True,
    "a,b\r\nü": 1,
    "custom": {},
    "reasoning_effort": None,
  }
  answer = server(CHAT, body)
  assert answer.headers["x-entropix-ignored"] == "user,store,a%2Cb%0D%0A%C3%BC,custom"
  assert server(CHAT, body | {"stream": True}).headers["x-entropix-ignored"]
  assert server.value("ignored_fields_total", field="user") == 2
  assert server.value("ignored_fields_total", field="other") == 4
  assert "x-entropix-ignored" not in server(CHAT, HELLO).headers
  neutral = {"tools": [], "min_tokens": 0, "suffix": None, "best_of": 1, "unknown": None}
  assert "x-entropix-ignored" not in server(TEXTS, ONCE | neutral).headers


# -- keys and origins --------------------------------------------------------------------------


def test_keys(session):
  server = Server(session, keys=("first", "second"))
  for header in (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic first", "first", "Bearer ü"):
    headers = {} if header is None else {"authorization": header.encode()}
    answer = server(CHAT, HELLO, headers=headers)
    refused(answer, 401, None, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "wrong" not in answer.text.replace("missing or wrong", "")
  for route in ("/v1/models", "/tokenizer_info", "/no/such/route"):
    refused(server(route), 401, None, "invalid_api_key")
  for key in ("first", "second"):
    server.ok(CHAT, HELLO, headers={"authorization": f"bearer {key}"})
  assert all(server(route).is_success for route in around.OPEN)


def test_origins(session, server):
  headers = {"origin": "https://ui", "access-control-request-method": "POST"}
  refused(server(CHAT, method="OPTIONS", headers=headers), 405)
  assert "access-control-allow-origin" not in server(CHAT, HELLO, headers=headers).headers
  server = Server(session, keys=("k",), origins=("https://ui",))
  answer = server(CHAT, method="OPTIONS", headers=headers)
  assert answer.status_code == 200
  assert answer.headers["access-control-allow-origin"] == "https://ui"
  answer = server(CHAT, HELLO, headers=headers)
  assert answer.status_code == 401
  assert answer.headers["access-control-allow-origin"] == "https://ui"
  answer = server(CHAT, method="OPTIONS", headers=headers | {"origin": "https://evil"})
  assert answer.status_code == 400
  assert answer.json()["error"]["type"] == "invalid_request_error"


# -- admission, failures, clients that go -----------------------------------------------------


def test_a_full_queue_and_states(session):
  server = Server(session, queued_requests=4)
  server.ok(TEXTS, ONCE | {"n": 4})
  answer = server(TEXTS, ONCE | {"n": 5})
  refused(answer, 400, "n")
  server.service.rows = 1
  answer = server(TEXTS, ONCE | {"n": 4, "stream": True})
  refused(answer, 503, None, "engine_overloaded")
  assert answer.headers["retry-after"] == "1"
  assert server.value("admission_rejections_total", reason="engine_overloaded") == 1
  assert server.value("request_errors_total", code="engine_overloaded") == 1
  for state, code in (
    ("starting", "not_ready"),
    ("draining", "engine_draining"),
    ("dead", "engine_dead"),
  ):
    server.service.state = state
    answer = server(CHAT, HELLO)
    refused(answer, 503, None, code)
    assert answer.headers.get("x-should-retry") == ("false" if state == "dead" else None)
    assert answer.headers.get("retry-after") == (None if state == "dead" else "2")
    refused(server("/ready"), 503, None, code)
    assert server("/health").status_code == (503 if state == "dead" else 200)
    assert server("/v1/models").is_success
  server.service.state, server.service.healthy = "ready", False
  refused(server("/health"), 503, None, "engine_dead")
  assert server("/ready").is_success


def test_racers_never_exceed_the_limit(session):
  server = Server(session, queued_requests=8)
  server.service.between = lambda: asyncio.sleep(0)

  async def race():
    body = {"json": ONCE | {"n": 3, "max_tokens": 4}}
    return await asyncio.gather(*(server.ask(TEXTS, "POST", body) for _ in range(50)))

  found = collections.Counter(answer.status_code for answer in asyncio.run(race()))
  assert {*found} <= {200, 503}
  assert found[200] >= 2
  assert server.service.most <= 8
  assert server.service.rows == 0
  assert server.value("admission_rejections_total", reason="engine_overloaded") == found[503]


def test_errors_before_the_first_token_are_plain_ones(server):
  async def late():
    raise ServiceError(408, "queue_timeout", "The request has waited too long.", 900)

  server.service.before = late
  for stream in (False, True):
    answer = server(CHAT, HELLO | {"stream": stream})
    refused(answer, 408, None, "queue_timeout")
    assert answer.headers["retry-after"] == "120"
  server.service.before, server.service.breaks = None, 0
  for stream in (False, True):
    refused(server(CHAT, HELLO | {"stream": stream}), 500, None, "model_error")
  assert server.service.rows == 0


def test_errors_after_it_are_events(server, caplog):
  async def slowly():
    await asyncio.sleep(0.002)

  server.service.between, server.service.breaks = slowly, 4
  *most, last = server.events(CHAT, HELLO)
  assert last["error"]["code"] == "model_error"
  assert last["error"]["type"] == "server_error"
  assert most[-1]["choices"][0]["finish_reason"] is None
  refused(server(CHAT, HELLO), 500, None, "model_error")
  tokens = iter(range(5))

  async def broken():
    await slowly()
    if next(tokens) == 3:
      raise KeyError("secret")

  server.service.between, server.service.breaks = broken, None
  last = server.events(TEXTS, ONCE)[-1]
  assert last["error"]["code"] == "internal_error"
  assert "secret" not in json.dumps(last)
  assert "secret" in caplog.text
  assert server.value("request_errors_total", code="model_error") == 2


def test_a_long_wait_is_filled_with_comments(server, monkeypatch):
  monkeypatch.setattr(http, "PING_S", 0.01)
  server.service.before = lambda: asyncio.sleep(0.05)
  text = server(CHAT, HELLO | {"stream": True, "max_tokens": 2}).text
  assert text.count(": ping\n\n") >= 2
  assert text.index('"role":"assistant"') < text.index(": ping") < text.index('"length"')
  assert chunks(text)[-1]["choices"][0]["finish_reason"] == "length"
  server.ok(CHAT, HELLO | {"max_tokens": 2})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "decoding"])
def test_a_client_that_goes(server, stream, phase):
  """Its request is given up at once, whatever it waits for."""
  service = server.service
  body = json.dumps(HELLO | {"stream": stream}).encode()
  scope = {
    "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "root_path": "",
    "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "server": ("test", 80),
  }  # fmt: skip

  async def visit():
    gone, steps = asyncio.Event(), 0
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def wait():
      nonlocal steps
      steps += 1
      if steps > 3 or phase == "queued":
        gone.set()
        await asyncio.Event().wait()

    async def receive():
      if messages:
        return messages.pop()
      await gone.wait()
      return {"type": "http.disconnect"}

    sent = []

    async def send(message):
      sent.append(message)

    service.before, service.between = (wait, None) if phase == "queued" else (None, wait)
    await asyncio.wait_for(server.app(scope, receive, send), 5)
    return sent

  sent = asyncio.run(visit())
  assert service.streams[0].cancelled
  assert service.rows == 0
  assert bool(sent) == (stream and phase == "decoding")
  service.before = service.between = None
  server.ok(CHAT, HELLO)


# -- the other routes --------------------------------------------------------------------------


def test_models_and_version(server):
  card = server.ok("/v1/models")["data"][0]
  assert card["id"] == NAME
  assert card["max_model_len"] == CONTEXT
  assert server.ok(f"/v1/models/{NAME}") == card
  assert server.ok("/health") == {"status": "ok"}
  assert "version" in server.ok("/version")


def test_the_tokenizer_over_http(server, session):
  tok = session.tokenizer
  text = "<|begin_of_text|>A 🎈<|eot_id|>"
  ids = [tok.bos, *tok.encode("A 🎈"), tok.eot]
  answer = server.ok("/tokenize", {"prompt": text, "add_special_tokens": False})
  assert answer == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
  assert server.ok("/detokenize", {"tokens": ids}) == {"prompt": text}
  answer = server.ok("/tokenize", {"prompt": "A", "return_token_strs": True})
  assert answer["token_strs"] == ["<|begin_of_text|>", "A"]
  turns = HELLO["messages"]
  assert server.ok("/tokenize", HELLO)["tokens"] == session.encode_chat(turns)
  info = server.ok("/tokenizer_info")
  assert (info["bos_token"], info["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
  strict = jinja2.Environment(undefined=jinja2.StrictUndefined)
  template = strict.from_string(info["chat_template"])
  text = template.render(messages=turns, add_generation_prompt=True)
  answer = server.ok("/tokenize", {"prompt": text, "add_special_tokens": False})
  assert answer["tokens"] == session.encode_chat(turns)


def test_a_model_that_only_continues_texts(base):
  server = Server(base)
  assert server.ok("/tokenizer_info")["chat_template"] is None
  for route in (CHAT, "/tokenize"):
    assert "/v1/completions" in refused(server(route, HELLO), 400, "messages")
  server.ok(TEXTS, ONCE)


def test_scores_of_items(server, session):
  tok = session.tokenizer
  body = {"prefix": "Is it so? ", "items": ["yes", "no 🎈"], "label_token_ids": [5, 900]}
  answer = server.ok(SCORE, body | {"apply_softmax": True})
  for i, item in enumerate(body["items"]):
    ids = [tok.bos, *tok.encode(body["prefix"] + item)]
    logp = law(ids)
    row = answer["data"][i]
    assert row["logprobs"] == [logp[5], logp[900]]
    shares = np.exp(row["logprobs"]) / np.exp(row["logprobs"]).sum()
    assert row["probabilities"] == pytest.approx(shares.tolist())
  assert server.service.seen[0].labels == (5, 900)
  body = {"prefix": [1, 2], "items": [[3], [4]], "label_token_ids": [5], "item_first": True}
  answer = server.ok(SCORE, body)
  assert [row["logprobs"] for row in answer["data"]] == [[law([i, 1, 2])[5]] for i in (3, 4)]
  assert [g.request.ids for g in server.service.seen[2:]] == [[3, 1, 2], [4, 1, 2]]
  assert answer["usage"]["prompt_tokens"] == 6


def test_metrics_count_what_happened(server):
  server.ok(TEXTS, ONCE | {"n": 2, "max_tokens": 5})
  server.events(CHAT, HELLO | {"max_tokens": 3})
  prompts = sum(len(g.request.ids) for g in server.service.seen)
  for name, value in (
    ("prompt_tokens_total", prompts), ("generation_tokens_total", 13), ("time_to_first_token_seconds_count", 2),
    ("e2e_request_latency_seconds_count", 2), ("request_params_n_sum", 3), ("request_decode_time_seconds_count", 3),
    ("request_queue_time_seconds_count", 2), ("request_generation_tokens_sum", 13),
    ("num_requests_running", 0), ("engine_up", 0), ("prefix_cache_hits_total", 0),
  ):  # fmt: skip
    assert server.value(name, model=NAME) == value, name
  assert server.value("request_success_total", finished_reason="length") == 3
  assert server.value("http_requests_total", route=TEXTS, status="200") == 1


def test_what_the_engine_reports():
  metrics = http.Metrics("m")
  metrics.tally("token_entropy", [0.005, 0.2, 0.2, 3.0, 99.0, math.nan])
  metrics.tally("token_entropy", np.float32([[0.2]]))
  metrics.set("kv_cache_usage_perc", 0.5)
  metrics.count("sampler_action", 7, "flow")
  metrics.count("compilations", label="decode")
  families = parser.text_string_to_metric_families(metrics.exposition().decode())
  found = {
    (s.name.removeprefix("entropix_"), *(v for k, v in sorted(s.labels.items()) if k != "model")): s.value
    for family in families
    for s in family.samples
  }  # fmt: skip
  assert found["token_entropy_bucket", "0.01"] == 1
  assert found["token_entropy_bucket", "0.25"] == 4
  assert found["token_entropy_bucket", "12.0"] == 5
  assert found["token_entropy_bucket", "+Inf"] == found["token_entropy_count",] == 6
  assert found["token_entropy_sum",] == pytest.approx(102.605)
  assert found["kv_cache_usage_perc",] == 0.5
  assert found["sampler_action_total", "flow"] == 7
  assert found["compilations_total", "decode"] == 1


# -- the client that people use, over a socket ----------------------------------------------


@pytest.fixture(scope="class")
def live(session):
  """(server, client of openai) over a socket."""
  server = Server(session, keys=("key",), queued_requests=40)
  with socket.socket() as bound:
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(server.app, log_level="warning", lifespan="off", ws="none")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, args=([bound],))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    with openai.OpenAI(api_key="key", base_url=url, max_retries=0) as client:
      yield server, client
    runner.should_exit = True
    thread.join()


@pytest.fixture
def calm(live):
  live[0].service.before = live[0].service.between = live[0].service.breaks = None
  return live


class TestClient:
  def test_chat(self, calm):
    _, client = calm
    asked = {"model": NAME, "messages": HELLO["messages"], "seed": 3, "max_completion_tokens": 9}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) == 9
    options = {"include_usage": True}
    found = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert found[-1].usage.completion_tokens == 9
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found[:-1])
    assert text == whole.choices[0].message.content
    extra = {"entropix": {"sampler": "plain", "trace": "metrics"}}
    traced = client.chat.completions.create(**asked, extra_body=extra)
    assert traced.model_extra["entropix"] == {"sampler": "plain", "seed": 3}
    assert len(traced.choices[0].model_extra["entropix"]["entropy"]) == 9

  def test_completions_and_models(self, calm):
    _, client = calm
    asked = {
      "model": NAME,
      "prompt": ["One", "Two"],
      "n": 2,
      "seed": 3,
      "logprobs": 2,
      "echo": True,
    }
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    streamed = collections.defaultdict(str)
    for chunk in client.completions.create(**asked, stream=True):
      streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [streamed[i] for i in range(4)] == [choice.text for choice in whole.choices]
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME

  def test_errors(self, calm):
    server, client = calm
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
      chat(model="gpt-0", messages=HELLO["messages"])
    assert error.value.code == "model_not_found"
    assert error.value.request_id
    with pytest.raises(openai.BadRequestError) as error:
      chat(model=NAME, messages=HELLO["messages"], max_tokens=CONTEXT)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
      client.with_options(api_key="other").models.list()
    with pytest.raises(openai.BadRequestError):
      chat(
        model=NAME,
        messages=HELLO["messages"],
        tools=[{"type": "function", "function": {"name": "f"}}],
      )
    server.service.breaks = 0
    with pytest.raises(openai.InternalServerError) as error:
      chat(model=NAME, messages=HELLO["messages"], stream=True)
    assert error.value.code == "model_error"
    server.service.breaks, server.service.between = 3, lambda: asyncio.sleep(0.01)
    stream = chat(model=NAME, messages=HELLO["messages"], stream=True)
    with pytest.raises(openai.APIError, match="not finite"):
      list(stream)

  @pytest.mark.parametrize("told", [False, True])
  def test_a_body_that_is_too_large(self, calm, told):
    _, client = calm
    headers = {"authorization": "Bearer key", "content-type": "application/json"}
    parts = [b" " * 10**6] * 10
    content = b"".join(parts) if told else iter(parts)  # without its length it is sent in chunks
    answer = httpx.post(f"{client.base_url}completions", content=content, headers=headers)
    assert "more than 4194304 bytes" in refused(answer, 413, None, "body_too_large")

  def test_a_full_server_is_asked_again(self, calm):
    server, client = calm
    held = threading.Event()

    async def wait():
      while not held.is_set():
        await asyncio.sleep(0.01)

    server.service.before = wait

    def ask(n, **more):
      return client.with_options(**more).completions.create(model=NAME, prompt="a", n=n)

    first = threading.Thread(target=ask, args=(32,))
    first.start()
    self._until(lambda: server.service.rows == 32)
    with pytest.raises(openai.InternalServerError) as error:
      ask(9)
    assert error.value.code == "engine_overloaded"
    assert error.value.response.headers["retry-after"] == "1"
    threading.Timer(0.2, held.set).start()
    assert len(ask(9, max_retries=2).choices) == 9
    first.join()
    assert server.service.rows == 0

  def test_streams_that_are_left_and_timeouts(self, calm):
    server, client = calm
    server.service.between = lambda: asyncio.sleep(0.01)
    asked = {"model": NAME, "messages": HELLO["messages"]}
    stream = client.chat.completions.create(**asked, stream=True, n=8)
    next(iter(stream))
    assert server.service.rows == 8
    stream.close()
    self._until(lambda: server.service.rows == 0)
    server.service.between = lambda: asyncio.sleep(60)
    clients = [
      threading.Thread(target=self._timeout, args=(client, asked, stream))
      for stream in [False, True] * 10
    ]
    for thread in clients:
      thread.start()
    for thread in clients:
      thread.join()
    self._until(lambda: server.service.rows == 0)
    server.service.between = None
    assert client.chat.completions.create(**asked, timeout=5).choices

  def _timeout(self, client, asked, stream):
    with contextlib.suppress(openai.APITimeoutError):
      client.with_options(timeout=0.5).chat.completions.create(**asked, stream=stream)
      raise AssertionError("the client did not time out")

  def _until(self, what, seconds=5.0):
    for _ in range(int(seconds / 0.01)):
      if what():
        return
      threading.Event().wait(0.01)
    raise AssertionError("it did not happen in time")
