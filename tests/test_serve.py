"""The server over the demo model: its texts equal the command line's under any load, and no row or memory stays in use."""

import asyncio
import collections
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orjson
import pytest
from command import ENV, ROOT
from test_distributed import free_port

from entropix_jax import errors, sampling, settings
from entropix_jax.llm import LLM
from entropix_jax.model import llama

NEEDS = 'install the extras that the server needs: pip install ".[serve,test]"'
httpx, openai, uvicorn = (
  pytest.importorskip(n, reason=NEEDS) for n in ("httpx", "openai", "uvicorn")
)

from entropix_jax.serve import app, exchange, metrics, run, service  # noqa: E402
from entropix_jax.session import Model, Session  # noqa: E402

FOLDER = str(settings.ASSETS / "demo" / "instruct")
ENGINE = {"batch_size": 8, "max_seq_len": 512, "prefill_chunk": 64, "top_logprobs": 20}
SAMPLERS = ("quadrant", "plain", "dslider")
QUESTION = "Tell me a story about a kite."
CHAT = "/v1/chat/completions"


class Server:
  """A server in a thread of this process, at a free port."""

  def __init__(self, folder=FOLDER, samplers=SAMPLERS, masks=False, staged=False, **limits):
    chosen = settings.resolve({"checkpoint": str(folder), "engine": ENGINE})
    self.session = Session(Model(chosen), chosen, samplers=samplers, masks=masks)
    self.metrics = metrics.Metrics("demo")
    self.service = service.Service(
      self.session, exchange.Limits(**limits), budget=128, metrics=self.metrics, staged=staged
    )
    web = app.app(self.service, self.session, "demo", metrics=self.metrics)
    sock = run.bound("127.0.0.1", 0)
    config = uvicorn.Config(web, log_level="error", lifespan="off")
    self._server = uvicorn.Server(config)
    self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    self._thread = threading.Thread(target=self._server.run, args=([sock],), daemon=True)

  def __enter__(self):
    self.service.start()
    self._thread.start()
    self.service.wait()
    self.http = httpx.Client(base_url=self.url, timeout=60)
    self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
    return self

  def __exit__(self, *_):
    self.http.close()
    self.openai.close()
    self._server.should_exit = True
    self._thread.join(20)
    self.service.stop()

  def post(self, path, status=200, **body):
    answer = self.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()

  def chat(self, text=QUESTION, status=200, **more):
    messages = [{"role": "user", "content": text}]
    return self.post(CHAT, status, messages=messages, **{"max_tokens": 24, "seed": 0} | more)

  def value(self, name):
    """The sum of a metric over its labels."""
    lines = self.http.get("/metrics").text.splitlines()
    found = [line.split()[-1] for line in lines if re.match(rf"entropix_{name}(\{{.*)? ", line)]
    return sum(map(float, found))

  def idle(self):
    """Wait until nothing runs, and check that nothing is left."""
    end = time.monotonic() + 20
    while time.monotonic() < end and (self.service._sinks or self.service.scheduler.busy):
      time.sleep(0.02)
    time.sleep(0.3)  # the round that notes it
    s = self.service
    assert (s._rows, s._tokens, s._tasks) == (0, 0, {})
    assert s.scheduler.rows.free == ENGINE["batch_size"]
    assert self.value("num_requests_running") == self.value("num_requests_waiting") == 0
    assert self.value("kv_cache_usage_perc") == 0
    assert s.late_compiles == 0


@pytest.fixture(scope="module")
def server():
  with Server() as made:
    yield made


@pytest.fixture
def idle(server):
  """The server, which has nothing left to do afterwards."""
  yield server
  server.idle()


@pytest.fixture(scope="module")
def alone():
  """A text as the Python API and the command line give it."""
  llm = LLM(FOLDER, max_seq_len=512)

  def text(prompt, seed, sampler=None, max_new_tokens=24, **knobs):
    how = {"sampler": sampler, **knobs} if sampler else {}
    return llm.generate(prompt, seed=seed, max_new_tokens=max_new_tokens, **how).text

  return text


def test_a_server_answers_before_all_is_compiled(alone, monkeypatch):
  """With larger programs, and the same texts; what is compiled meanwhile is not late."""
  go, real = threading.Event(), service.compile_all

  def later(jobs):
    if threading.current_thread().name == "compiler":
      go.wait(60)
    real(jobs)

  monkeypatch.setattr(service, "compile_all", later)
  with Server(samplers=("quadrant",), staged=True) as server:
    waits = server.http.get("/ready").json()["compiling"]
    assert waits >= 5
    compiled = server.service.scheduler.rows.engine.compiled
    assert sum(p.verb == "decode" for p in compiled) == 1
    want = alone(QUESTION, 3)
    assert server.chat(seed=3)["choices"][0]["message"]["content"] == want
    assert server.http.get("/ready").json()["compiling"] == waits
    go.set()
    end = time.monotonic() + 100
    while server.service.compiling and time.monotonic() < end:
      time.sleep(0.1)
    assert sum(p.verb == "decode" for p in compiled) == 4
    assert server.chat(seed=3)["choices"][0]["message"]["content"] == want
    assert server.service.late_compiles == 0


# -- forks, and what a page asks -------------------------------------------------------------------


def lines_of(answer):
  return answer["choices"][0]["entropix"]["lines"]


WAYS = [
  {},
  {"sampler": "plain", "params": {"temperature": 0.9, "frequency_penalty": 0.7}},
  {"sampler": "plain", "params": {"mirostat_tau": 2.0}},
  {"sampler": "dslider"},
  {"sampler": "quadrant", "params": {"low_ent": "q20"}},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_fork_without_a_change_goes_on_with_the_same_text(idle, way):
  whole = idle.chat(entropix=way | {"trace": "lines"}, max_tokens=40)
  said = lines_of(whole)
  assert [line["position"] for line in said] == list(range(40))
  assert "".join(line["text"] for line in said) == whole["choices"][0]["message"]["content"]
  for at in (1, 17):
    forced = [line["id"] for line in said[:at]]
    fork = way | {"trace": "lines", "forced_ids": forced}
    rest = idle.chat(entropix=fork, max_tokens=40 - at)
    # dslider's running means amplify rounding [n29], which may move a token from one branch to the next.
    names = ("position", "id", "text", *(["branch"] if way.get("sampler") != "dslider" else []))
    assert [[x[name] for name in names] for x in lines_of(rest)] == [
      [x[name] for name in names] for x in said[at:]
    ]
    for ours, theirs in zip(lines_of(rest), said[at:], strict=True):
      assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-4)
    assert rest["usage"]["completion_tokens"] == 40 - at


def test_another_token_leads_to_another_text(idle):
  """What follows is what the model says after it: greedy, as a longer prompt would be continued."""
  how = {"temperature": 0, "logprobs": 3, "max_tokens": 12}
  first = idle.post("/v1/completions", prompt="Once upon a", entropix={"trace": "lines"}, **how)
  said = lines_of(first)
  assert all(len(line["top"]) == 3 for line in said)
  other = said[4]["top"][1][0]
  forced = [*(line["id"] for line in said[:4]), other]
  fork = {"trace": "lines", "forced_ids": forced}
  rest = idle.post("/v1/completions", prompt="Once upon a", entropix=fork, **how)
  ids = first["entropix"]["prompt_ids"][0]
  longer = idle.post("/v1/completions", prompt=[*ids, *forced], entropix={"trace": "lines"}, **how)
  assert [x["id"] for x in lines_of(rest)] == [x["id"] for x in lines_of(longer)]


def test_forks_of_samples_and_of_streams(idle):
  """Sample j of n has the noise of sample j alone, and a fork's stream has the text of its answer."""
  both = idle.chat(n=2, entropix={"trace": "lines"})["choices"]
  one = idle.chat(entropix={"trace": "lines", "sample": 1})
  ids = [line["id"] for line in lines_of(one)]
  assert ids == [line["id"] for line in both[1]["entropix"]["lines"]]
  fork = {"trace": "lines", "sample": 1, "forced_ids": ids[:5]}
  told, text = [], ""
  with idle.http.stream("POST", CHAT, json={
    "messages": [{"role": "user", "content": QUESTION}], "seed": 0, "max_tokens": 19,
    "stream": True, "entropix": fork,
  }) as answer:  # fmt: skip
    for line in answer.iter_lines():
      if line.startswith("data: {"):
        (choice,) = orjson.loads(line[6:])["choices"]
        told += choice.get("entropix", {}).get("lines", [])
        text += choice["delta"].get("content", "")
  assert [x["id"] for x in told] == ids[5:]
  assert text == "".join(x["text"] for x in told)


@pytest.mark.parametrize(
  ("body", "param"),
  [
    ({"entropix": {"forced_ids": [10**6]}}, "entropix.forced_ids"),
    ({"entropix": {"forced_ids": [-1]}}, "entropix.forced_ids.0"),
    ({"entropix": {"forced_ids": [5] * 600}}, "messages"),
    ({"entropix": {"forced_ids": [5], "group": {"method": "best_of_n"}}}, "entropix.forced_ids"),
    ({"stop": ["a"], "entropix": {"forced_ids": list(range(300, 420))}}, "entropix.forced_ids"),
  ],
)
def test_forks_that_cannot_be(idle, body, param):
  assert idle.chat(status=400, **body)["error"]["param"] == param


def test_a_group_tells_its_tokens_as_they_come(idle):
  group = {"method": "branch", "ways": 2, "horizon": 4, "ent": 0.3}
  answer = idle.chat(entropix={"trace": "lines", "group": group}, max_tokens=24)
  (choice,) = answer["choices"]
  told, made = choice["entropix"]["lines"], choice["entropix"]["group"]
  own = collections.Counter(line.get("sample", 0) for line in told)
  assert own == {s["sample"]: s["tokens"] for s in made["samples"] if s["tokens"]}
  assert len(made["samples"]) > 1
  # The chosen text is its ancestors' tokens up to each fork, then its own.
  by = {s["sample"]: s for s in made["samples"]}
  ids, s, end = [], made["chosen"], 10**9
  while s is not None:
    mine = [x for x in told if x.get("sample", 0) == s and x["position"] < end]
    ids, end, s = [*mine, *ids], by[s]["at"], by[s]["parent"]
  assert "".join(x["text"] for x in ids) == choice["message"]["content"]
  votes = idle.chat(entropix={"trace": "lines", "group": {"method": "best_of_n", "n": 2}})
  assert "votes" in votes["choices"][0]["entropix"]["group"]


def test_what_a_page_is_told(idle):
  told = idle.http.get("/v1/entropix/info").json()
  assert set(told["samplers"]) == set(SAMPLERS)
  for name, about in told["samplers"].items():
    assert about["branches"] == list(sampling.find(name).BRANCHES)
    assert set(about["knobs"]) == set(sampling.knobs(sampling.find(name)))
    assert all(knob["about"] for knob in about["knobs"].values()), name
    for knob, facts in about["knobs"].items():
      for edge in ("least", "most"):
        if facts[edge] is not None:
          sampling.configure(sampling.find(name), {knob: facts[edge]})
  assert told["samplers"]["quadrant"]["thresholds"]["entropy"].keys() == {
    "low_ent",
    "ask_ent",
    "high_ent",
  }
  assert all(o["about"] for g in told["groups"].values() for o in g["options"].values())
  assert FOLDER not in str(told)
  assert told["header"]["branches"]


def test_branches_and_thresholds_of_texts(idle):
  """What quadrant would choose is what it chose, and calibrated shares are those of the branches."""
  said = lines_of(idle.chat(entropix={"trace": "lines"}, max_tokens=60))
  names = [
    n
    for n in said[0]
    if n in ("entropy", "varentropy") or n.startswith(("attn", "head", "score", "agree"))
  ]
  text = {name: [line[name] for line in said] for name in names}
  params = idle.service.session.settings.knobs
  told = idle.post("/v1/entropix/branches", texts=[text, text], params=params)
  assert told["branches"] == [[line["branch"] for line in said]] * 2
  fit = idle.post("/v1/entropix/calibrate", texts=[text] * 3, quantiles={"low_ent": "q25"})
  assert fit["knobs"]["low_ent"] == pytest.approx(np.quantile(text["entropy"], 0.25), rel=1e-3)
  assert fit["tokens"] == 180
  assert sum(fit["shares"].values()) == pytest.approx(1)
  assert "tokens are few" in fit["warning"]
  again = idle.post("/v1/entropix/branches", texts=[text], params=fit["knobs"])
  assert again["shares"] == pytest.approx(fit["shares"])


@pytest.mark.parametrize(
  ("route", "body", "param"),
  [
    ("branches", {"texts": []}, "texts"),
    ("branches", {"texts": [{}]}, "texts"),
    ("branches", {"texts": [{"entropy": [1.0], "varentropy": []}]}, "texts.0.varentropy"),
    ("branches", {"texts": [{"entropy": [None], "varentropy": [1.0]}]}, "texts.0.entropy"),
    ("branches", {"texts": [{"entropy": [1], "varentropy": [1]}], "params": {"low_ent": "q5"}}, "params.low_ent"),
    ("calibrate", {"texts": [{"entropy": [1], "varentropy": [1]}], "quantiles": {"temp": "q5"}}, "quantiles"),
    ("calibrate", {"texts": [{"entropy": [1], "varentropy": [1]}], "quantiles": {"low_ent": "5"}}, "quantiles"),
  ],
)  # fmt: skip
def test_texts_that_cannot_be_used(idle, route, body, param):
  assert idle.post(f"/v1/entropix/{route}", 400, **body)["error"]["param"] == param


# -- the same texts --------------------------------------------------------------------------------


def test_a_text_is_the_one_of_the_command_line(idle, alone):
  said = idle.chat(seed=3)["choices"][0]
  assert said["message"]["content"] == alone(QUESTION, 3)
  assert said["finish_reason"] == "length"


def test_texts_of_all_samplers_among_31_others_are_those_alone(idle, alone):
  wishes = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"entropix": {"sampler": "dslider"}},
    {"temperature": 1.2, "frequency_penalty": 0.5},
    {"entropix": {"params": {"temp": 0.9, "low_ent": "q20"}}},
  ]
  todo = [
    (f"Tell me about {x} and {i} kites.", i, wishes[i % len(wishes)])
    for i, x in enumerate(["a fox", "the sea", "Ruth", "music"] * 8)
  ]

  async def ask(client, text, seed, wish):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "seed": seed} | wish
    answer = await client.post(CHAT, json=body)
    return answer.json()["choices"][0]["message"]["content"]

  async def whole():
    async with httpx.AsyncClient(base_url=idle.url, timeout=60) as client:
      return await asyncio.gather(*(ask(client, *one) for one in todo))

  got = asyncio.run(whole())
  for (text, seed, wish), said in zip(todo, got, strict=True):
    if "entropix" in wish:
      name, knobs = wish["entropix"].get("sampler", "quadrant"), wish["entropix"].get("params", {})
    else:
      name, knobs = ("plain" if wish else None), wish
    how = {"preset": "auto"} if knobs and name == "quadrant" else {}
    assert said == alone(text, seed, name, **knobs, **how), wish


def test_openais_client_streams_what_it_gets_whole(idle):
  how = {"model": "demo", "max_tokens": 40, "seed": 5, "n": 4, "temperature": 0.9}
  how |= {"messages": [{"role": "user", "content": QUESTION}], "logprobs": True, "top_logprobs": 3}
  whole = idle.openai.chat.completions.create(**how)
  texts, logprobs, ends = collections.Counter(), collections.defaultdict(list), {}
  texts = collections.defaultdict(str)
  for chunk in idle.openai.chat.completions.create(**how, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ""
      logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
      ends[choice.index] = choice.finish_reason or ends.get(choice.index)
  assert [texts[i] for i in range(4)] == [c.message.content for c in whole.choices]
  assert [ends[i] for i in range(4)] == [c.finish_reason for c in whole.choices]
  assert len(set(texts.values())) > 1
  for choice in whole.choices:
    assert logprobs[choice.index] == choice.logprobs.content
    assert sum(map(len, (t.bytes for t in choice.logprobs.content))) >= len(choice.message.content)
  assert whole.usage.completion_tokens == sum(len(c.logprobs.content) for c in whole.choices)


def test_samples_are_those_of_streams_that_follow(idle, alone):
  said = [c["message"]["content"] for c in idle.chat(n=3, seed=7)["choices"]]
  assert said[0] == alone(QUESTION, 7)
  assert said == [c["message"]["content"] for c in idle.chat(n=3, seed=7)["choices"]]


def test_a_stop_string_over_borders_of_tokens_ends_the_text(idle):
  whole = idle.chat(max_tokens=60, temperature=0)["choices"][0]["message"]["content"]
  stop = whole[17:24]
  said = idle.chat(max_tokens=60, temperature=0, stop=[stop])["choices"][0]
  assert said["message"]["content"] == whole[: whole.index(stop)]
  assert said["finish_reason"] == "stop"
  kept = idle.chat(max_tokens=60, temperature=0, stop=stop, include_stop_str_in_output=True)
  assert kept["choices"][0]["message"]["content"] == whole[: whole.index(stop) + len(stop)]


def test_logprobs_are_those_of_the_raw_model(idle):
  """Echoed, scored in pieces, and of generated tokens; the oracle is the forward pass."""
  body = {"prompt": "Once upon a time there was a fox. " * 6, "max_tokens": 8, "seed": 1}
  how = {"echo": True, "logprobs": 2, "temperature": 1.7, "return_tokens_as_token_ids": True}
  found = idle.post("/v1/completions", **body, **how)["choices"][0]["logprobs"]
  ids = [int(t.removeprefix("token_id:")) for t in found["tokens"]]
  assert len(ids) > 64  # more than one piece
  session = idle.session
  weights = idle.service.scheduler.rows.engine.weights
  x_1TD, *_ = llama.forward(session.model.cfg, weights, np.asarray([ids]))
  logp_TV = np.asarray(jax.nn.log_softmax(llama.unembed(weights, x_1TD)))[0]
  want = logp_TV[np.arange(len(ids) - 1), ids[1:]]
  assert found["token_logprobs"][0] is None
  np.testing.assert_allclose(found["token_logprobs"][1:], want, atol=1e-3)
  for top, logp_V, id in zip(found["top_logprobs"][1:], logp_TV, ids[1:], strict=False):
    assert f"token_id:{id}" in top
    np.testing.assert_allclose(sorted(top.values())[-2:], np.sort(logp_V)[-2:], atol=1e-3)


def test_labels_after_a_prompt(idle):
  items, labels = [" The answer is", " It is"], [5, 40, 300]
  found = idle.post("/v1/entropix/score", prefix="Is it?", items=items, label_token_ids=labels)
  for item, one in zip(items, found["data"], strict=True):
    text = idle.post(
      "/v1/completions", prompt=f"Is it?{item}", max_tokens=1, echo=True, logprobs=20
    )
    top = text["choices"][0]["logprobs"]["top_logprobs"][-1]
    known = {
      idle.session.tokenizer.decode([i], True): x
      for i, x in zip(labels, one["logprobs"], strict=True)
    }
    for name in known.keys() & top.keys():
      assert known[name] == pytest.approx(top[name], abs=1e-3)


def test_a_second_turn_is_fed_from_where_the_first_one_ended(idle):
  long = [{"role": "user", "content": "A kite flew over the sea. " * 40 + "What did it see?"}]
  first = idle.post(CHAT, messages=long, max_tokens=8, seed=1, cache_salt="mine")
  answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
  turns = [*long, answer, {"role": "user", "content": "And then?"}]
  second = idle.post(CHAT, messages=turns, max_tokens=8, seed=1, cache_salt="mine")
  cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
  assert 0 <= first["usage"]["prompt_tokens"] - cached < 64
  other = idle.post(CHAT, messages=turns, max_tokens=8, seed=1, cache_salt="another's")
  assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
  assert other["choices"] == second["choices"]


def test_a_group_of_texts_answers_with_the_one_that_it_chose(idle, alone):
  group = {"method": "best_of_n", "n": 12, "rule": "majority"}
  body = {"text": "What is 7 + 5?", "max_tokens": 30, "seed": 2, "temperature": 1.2}
  found = idle.chat(**body, entropix={"group": group})
  choice = found["choices"][0]
  facts = choice["entropix"]["group"]
  assert len(facts["samples"]) == 12
  first = alone(body["text"], 2, "plain", 30, temperature=1.2)
  same = LLM(FOLDER, max_seq_len=512, batch_size=8).generate(
    body["text"], seed=2, max_new_tokens=30, sampler="plain", temperature=1.2, n=12, rule="majority"
  )
  assert next(one.text for one in same.samples) == first
  assert choice["message"]["content"] == same.text
  assert facts["chosen"] == same.outcome.chosen
  assert found["usage"]["completion_tokens"] == same.outcome.tokens_total
  branch = {"method": "branch", "ent": 1.0}
  assert idle.chat(entropix={"group": branch})["choices"][0]["message"]["content"]
  for wrong in (
    {"method": "adaptive"},
    {"method": "best_of_n", "m": 2},
    {"method": "deepconf"},
    {},
  ):
    idle.chat(entropix={"group": wrong}, status=400)
  idle.chat(entropix={"group": group}, n=2, status=400)


def resident():
  """Megabytes of this process."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


# -- many at once ----------------------------------------------------------------------------------


def test_soak(idle, alone):
  """Random requests, a third given up at random moments: nothing is left, and texts are those alone.

  SOAK=2000 in the environment runs as many, and looks at the memory of the process, too.
  """
  many = int(os.environ.get("SOAK", "150"))
  random_ = random.Random(1)
  before = idle.value("cancelled_total")

  def wish(i):
    body = {
      "messages": [{"role": "user", "content": "What is a kite? " * random_.choice((1, 1, 1, 20))}]
    }
    body |= {"seed": i, "max_tokens": random_.randrange(1, 40), "n": random_.choice((1, 1, 1, 3))}
    body |= random_.choice(({}, {"temperature": 0.7}, {"entropix": {"sampler": "dslider"}}))
    return body | random_.choice(({}, {"stop": ["e", "\n"]}, {"stream": True}, {"logprobs": True}))

  async def one(client, i, turn, said):
    body, patience = wish(i), random_.uniform(0.0, 0.4) if random_.random() < 0.3 else 60.0
    async with turn:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience), client.stream("POST", CHAT, json=body) as answer:
          assert answer.status_code == 200, await answer.aread()
          await answer.aread()
          if not body.get("stream"):
            said.append((body, answer.json()))

  async def whole():
    said, turn = [], asyncio.Semaphore(24)  # more wait than there are rows
    async with httpx.AsyncClient(base_url=idle.url, timeout=60) as client:
      for start in range(0, many, many // 2):
        await asyncio.gather(*(one(client, start + i, turn, said) for i in range(many // 2)))
        held.append(resident())
    return said

  held = []
  said = asyncio.run(whole())
  idle.idle()
  assert idle.value("cancelled_total") > before + 5
  print(
    f"{many} requests, {idle.value('cancelled_total') - before:g} given up, MB half-way and at the end: {held}"
  )
  assert many < 1000 or held[1] < held[0] + 50
  short = [(b, a) for b, a in said if not b.get("stop") and "temperature" in b]
  assert len(short) > 10
  for body, answer in short[: max(25, many // 20)]:
    want = alone(
      body["messages"][0]["content"], body["seed"], "plain", body["max_tokens"], temperature=0.7
    )
    assert answer["choices"][0]["message"]["content"] == want


def test_a_client_that_goes_frees_its_rows_in_every_phase(idle):
  s = idle.service
  filler = {"max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}
  filler["messages"] = [{"role": "user", "content": QUESTION}]
  phases = lambda: idle.http.get("/metrics").text.count("entropix_cancelled_total{")  # noqa: E731
  with idle.http.stream("POST", CHAT, json=filler) as answer:
    parts = answer.iter_text()  # dropping it would close the stream
    next(parts)  # decoding, all rows are taken
    with pytest.raises(httpx.ReadTimeout):
      idle.http.post(CHAT, json=filler | {"stream": False}, timeout=0.3)  # queued
    end = time.monotonic() + 5
    while len(s._tasks) > 1 and time.monotonic() < end:
      time.sleep(0.01)
    assert len(s._tasks) == 1
  idle.idle()
  assert phases() >= 2


# -- faults ----------------------------------------------------------------------------------------


def test_a_full_queue_and_a_late_request_are_refused_with_a_time_to_come_again(server):
  limits = server.service.limits
  filler = {"max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}
  filler["messages"] = [{"role": "user", "content": QUESTION}]
  try:
    server.service.limits = exchange.Limits(queued_requests=10, deadline_s=0.2)
    with server.http.stream("POST", CHAT, json=filler) as answer:
      parts = answer.iter_text()
      next(parts)
      full = server.http.post(CHAT, json=filler | {"n": 3})
      assert (full.status_code, full.json()["error"]["code"]) == (503, "engine_overloaded")
      assert 0 < float(full.headers["retry-after"]) <= 120
      late = server.http.post(CHAT, json=filler | {"n": 2, "stream": False})
      assert late.text, late
      assert (late.status_code, late.json()["error"]["code"]) == (408, "queue_timeout")
  finally:
    server.service.limits = limits
  server.idle()


def test_a_dispatch_that_fails_ends_its_requests_and_no_others(server, monkeypatch, capfd):
  engine = server.service.scheduler.rows.engine
  real, failing, held = engine.run, threading.Event(), []

  def sometimes(program, *args):
    if failing.is_set() and program.verb == "decode":
      failing.clear()
      held.extend(jax.tree.leaves(args[1]))
      raise RuntimeError("the device is lost: /secret/path")
    # A device may not have the memory for two caches.
    assert program.verb != "init" or all(array.is_deleted() for array in held)
    return real(program, *args)

  monkeypatch.setattr(engine, "run", sometimes)
  failing.set()
  answer = server.http.post(
    CHAT, json={"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 30}
  )
  assert answer.status_code == 500
  assert answer.json()["error"]["type"] == "server_error"
  assert "secret" not in answer.text
  assert server.chat()["choices"][0]["message"]["content"]
  assert "the device is lost" in capfd.readouterr().err  # the log has the reason
  assert held
  server.idle()


def test_requests_that_come_while_the_engine_dies_are_refused(monkeypatch, capfd):
  with Server() as own:
    dying, command, thread = threading.Event(), own.service.command, own.service._thread

    def run(*_):
      assert dying.wait(20)
      raise SystemExit("the engine is lost")

    def last(*what):  # it dies after the second request was found to be in time
      command(*what)
      if what[0] == "begin" and len(own.service._sinks) == 2:
        dying.set()
        thread.join(20)

    monkeypatch.setattr(own.service.scheduler.rows.engine, "run", run)
    monkeypatch.setattr(own.service, "command", last)
    first = threading.Thread(target=lambda: said.append(own.chat(status=503)))
    said = []
    first.start()
    while not own.service._sinks:
      time.sleep(0.01)
    said += [own.chat(status=503), own.chat(status=503)]
    first.join(20)
    assert [answer["error"]["code"] for answer in said] == ["engine_dead"] * 3
    assert own.service._sinks == {}
  assert "the engine is lost" in capfd.readouterr().err


def test_a_slow_reader_is_dropped(server, monkeypatch):
  monkeypatch.setattr(service, "_SLOW", 16)
  monkeypatch.setattr(service, "_SLOW_S", 0.0)
  session = server.session

  async def whole():
    request = session.ask(QUESTION, 200, 0)
    stream = server.service.submit([exchange.Generation(request)])
    await asyncio.sleep(1.0)
    with pytest.raises(exchange.ServiceError, match="did not read"):
      async for _ in stream:
        pass

  asyncio.run(whole())
  server.idle()


def test_what_cannot_be_run_is_refused_before_it_waits(server):
  session = server.session
  request = session.ask(QUESTION, 4, 0)

  async def whole():
    import dataclasses

    for change, words in (
      ({"ids": [5, 10**6]}, "outside the model's vocabulary"),
      ({"ids": []}, "empty"),
      ({"knobs": {"nothing": 1}}, "no knob"),
      ({"sampler": "entropy_target"}, "entropy_target"),
      ({"stop": [1] * 33}, "stop ids"),
    ):
      with pytest.raises(errors.UserError, match=words):
        server.service.submit([exchange.Generation(dataclasses.replace(request, **change))])

  asyncio.run(whole())
  server.idle()
  assert sampling.find("entropy_target")


# -- the process -------------------------------------------------------------------------------------


def test_answers_do_not_wait_for_acknowledgements():
  """asyncio sets TCP_NODELAY only for sockets that name their protocol."""
  with run.bound("127.0.0.1", 0) as sock:
    assert sock.proto == socket.IPPROTO_TCP
    socket.create_connection(sock.getsockname(), 5).close()  # it listens, as the server then says


@contextlib.contextmanager
def process(*args):
  """(a server of the demo in a process of its own, its address once it is ready; None of one that follows)."""
  small = ("--config.engine.max_seq_len=512", "--config.engine.batch_size=2", "--samplers=plain")
  args = ("--config=configs/demo.py", "--port=0", "--config.sampler.name=plain", *small, *args)
  with subprocess.Popen(
    [sys.executable, "-m", "entropix_jax.serve", *args],
    cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True,
  ) as run:  # fmt: skip
    try:
      url = None
      while "--process=1" not in args and "Ready after" not in (line := run.stderr.readline()):
        assert line, "it has ended"
        url = re.search(r"(http://\S+)/v1", line)[1] if "http" in line else url
      yield run, url
    finally:
      run.kill()


# More texts than rows, so that they take a while.
ONCE = {"prompt": "Once", "max_tokens": 400, "n": 8, "stream": True, "ignore_eos": True}


@pytest.mark.parametrize("twice", [False, True])
def test_sigterm_lets_running_streams_end_and_a_second_one_ends_them(twice):
  with process() as (run, url):
    with httpx.stream("POST", f"{url}/v1/completions", json=ONCE, timeout=60) as answer:
      lines = answer.iter_lines()
      next(lines)
      run.send_signal(signal.SIGTERM)
      time.sleep(0.1)
      if twice:
        run.send_signal(signal.SIGTERM)
      rest = list(lines)
    assert run.wait(20) == 0
    said = run.stderr.read()
  assert "Ending" in said
  assert "Traceback" not in said
  if twice:
    assert any("engine_draining" in line for line in rest)
  else:
    assert any('"finish_reason":"length"' in line for line in rest)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_sigterm_while_it_compiles_ends_it_at_once(tmp_path):
  args = ["--config=configs/demo.py", "--port=0", "--samplers=plain"]
  with subprocess.Popen(
    [sys.executable, "-m", "entropix_jax.serve", *args],
    cwd=ROOT,
    env=ENV | {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""},
    stderr=subprocess.PIPE,
    text=True,
  ) as run:
    assert "being loaded" in run.stderr.readline()
    time.sleep(1.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(10) == 0


def test_two_processes_serve_as_one(alone):
  where = ("--distributed", f"--coordinator=localhost:{free_port()}", "--processes=2")
  where += ("--config.mesh.data=2",)
  with process("--process=1", *where) as (other, _), process("--process=0", *where) as (run, url):
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "seed": 4}
    for _ in range(2):
      said = httpx.post(f"{url}{CHAT}", json=body, timeout=60).json()
      assert said["choices"][0]["message"]["content"] == alone(QUESTION, 4, "plain")
    score = {"prefix": "Once", "items": [" upon"], "label_token_ids": [5]}
    assert httpx.post(f"{url}/v1/entropix/score", json=score, timeout=60).status_code == 200
    run.send_signal(signal.SIGTERM)
    assert [run.wait(30), other.wait(30)] == [0, 0]
    assert run.stderr.read().count("\n") == 1
    assert other.stderr.read() == ""
