"""The token tools and healing over HTTP: the numbers are those of Python, other requests go on, mistakes are one sentence."""

import threading

import pytest

pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from test_serve import FOLDER, Server

from entropix_jax import LLM

STORY = "Once upon a time there was a little girl named Lily. She loved to pl"
TEXTS, TOOLS = "/v1/completions", "/v1/entropix/tokens/"
HEAL = {"entropix": {"heal": True}}


@pytest.fixture(scope="module")
def llm():
  return LLM(FOLDER, max_seq_len=512, batch_size=8, prefill_chunk=64)


@pytest.fixture(scope="module")
def server():
  with Server(samplers=("quadrant", "plain"), masks=True) as made:
    yield made
    made.idle()


def test_a_healed_completion_begins_after_the_prompt(server, llm):
  """It equals Python's for the same seed, streams, and leaves the requests beside it as they are."""
  how = {"max_tokens": 12, "seed": 3, "temperature": 1.0}
  texts = {}

  def ask(name, prompt, **more):
    texts[name] = server.post(TEXTS, prompt=prompt, **how, **more)["choices"]

  jobs = [
    ("healed", STORY, HEAL),
    ("usual", STORY, {}),
    ("several", [STORY, "One d"], {"n": 2} | HEAL),
  ]
  threads = [threading.Thread(target=ask, args=job[:2], kwargs=job[2]) for job in jobs]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  plain = {"format": "plain", "sampler": "plain", "seed": 3, "max_new_tokens": 12}
  assert texts["healed"][0]["text"] == llm.generate(STORY, heal=True, **plain).text
  assert texts["usual"][0]["text"] == llm.generate(STORY, **plain).text
  assert texts["several"][0]["text"] == texts["healed"][0]["text"]
  assert len(texts["several"]) == 4
  parts = server.openai.completions.create(
    model="demo", prompt=STORY, stream=True, extra_body=HEAL, **how
  )
  assert "".join(part.choices[0].text for part in parts) == texts["healed"][0]["text"]


@pytest.mark.parametrize(
  ("path", "body", "words"),
  [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | HEAL, "heal"),
    (TEXTS, {"prompt": STORY, "structured_outputs": {"regex": "a+"}} | HEAL, "grammar"),
    (TEXTS, {"prompt": STORY, "echo": True, "logprobs": 1} | HEAL, "scores"),
    (TEXTS, {"prompt": STORY, "allowed_token_ids": [5]} | HEAL, "allowed"),
    (TOOLS + "lens", {"text": ""}, "empty"),
    (TOOLS + "lens", {"text": "a" * 30_000}, "20000 bytes"),
    (TOOLS + "segmentations", {"text": "a", "dropout": 2}, "dropout"),
    (TOOLS + "segmentations", {"text": "a story " * 30, "draws": 32}, "more than 400 texts"),
    (TOOLS + "heal", {"text": "a", "k": 0}, "'k'"),
    (TOOLS + "bytes", {}, "'text' is missing"),
    (TOOLS + "answers", {"text": "word " * 300}, "context"),
  ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(server, path, body, words):
  error = server.post(path, 400, **body)["error"]["message"]
  assert words in error
  assert error.endswith(".")


def test_the_tools_say_over_http_what_they_say_in_python(server, llm):
  def same(got, want):
    if isinstance(want, float):
      assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    elif isinstance(want, dict):
      assert got.keys() == want.keys()
      [same(got[key], want[key]) for key in want]
    elif isinstance(want, list | tuple):
      assert len(got) == len(want)
      [same(*pair) for pair in zip(got, want, strict=True)]
    else:
      assert got == want

  for tool, args in {
    "lens": {"text": "A kite\n12", "control": True},
    "segmentations": {"text": " kite", "before": "She flew her"},
    "bytes": {"text": "She flew her ki", "k": 4},
  }.items():
    want = getattr(llm.tokens, {"bytes": "next_bytes"}.get(tool, tool))(**args)
    same(server.post(TOOLS + tool, **args), want)
  healing = server.post(TOOLS + "heal", text=STORY, k=64)
  assert healing["held"] == "\u00b7pl"
  assert sum(row["p"] for row in healing["rows"]) == pytest.approx(1, abs=1e-3)
  rows = server.post(TOOLS + "answers", text="What is 7 + 5?", k=3, dropout=0.5)["rows"]
  want = llm.tokens.answers("What is 7 + 5?", 3, 0.5)
  assert [row["tokens"] for row in rows] == [row["tokens"] for row in want]
  assert rows[0]["text"] == want[0]["text"]
  assert len({tuple(row["tokens"]) for row in rows}) > 1
  assert all(row["entropies"] for row in rows)
