"""benchmarks/evaluate.py: its task files, what it sends and reports, and its server; with lm-eval, a small run."""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import string
import sys
import types

import pytest
import yaml
from command import CONFIG, DEMO, ROOT, is_one_sentence, load, process, run
from conftest import refusal

from entropix_jax import LLM, sampling, settings

SCRIPT = "benchmarks/evaluate.py"
evaluate = load(SCRIPT)
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in evaluate.TASKS.glob("*.yaml")}
SERVER = """
import http.server, signal, sys
class Answer(http.server.BaseHTTPRequestHandler):
  left = 2
  def do_GET(self):
    Answer.left -= 1
    self.send_response(503 if Answer.left > 0 else 200)
    self.end_headers()
  def log_message(self, *_):
    pass
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
print(f"Listening at http://127.0.0.1:{server.server_port}/v1; it starts.", file=sys.stderr, flush=True)
server.serve_forever()
"""


def rows(task):
  """The questions of a task file."""
  (path,) = FILES[task]["dataset_kwargs"]["data_files"].values()
  return [json.loads(line) for line in (ROOT / path).read_text().splitlines()]


def test_task_files_say_what_they_read():
  import sweep

  assert {name: task["task"] for name, task in FILES.items()} == {name: name for name in FILES}
  for doc in rows("facts_choice"):
    assert doc["answer"] in doc["choices"]
    assert len({*doc["choices"]}) == 4
  assert len({doc["question"] for doc in rows("facts_choice")}) == 60
  shown = FILES["facts_short"]["fewshot_config"]["samples"]
  assert not {doc["question"] for doc in shown} & {doc["question"] for doc in rows("facts_short")}
  assert all(doc["text"] for doc in rows("prose"))
  held_out = [(t.question, str(t.answer)) for t in itertools.islice(sweep.held_out(), 60)]
  assert [(doc["question"], doc["answer"]) for doc in rows("problems")] == held_out


@pytest.mark.parametrize("name", sampling.names())
def test_the_server_takes_what_is_sent_for_a_sampler(name):
  """Beside the temperature that lm-eval adds, a sampler has the knobs of the config."""
  calls = pytest.importorskip("entropix_jax.serve.calls", reason="needs the extra serve")
  schema = sys.modules["entropix_jax.serve.schema"]
  knobs = {"temperature": 0.5} if name == "plain" else {}
  chosen = settings.resolve({"checkpoint": str(DEMO), "sampler": {"name": name} | knobs})
  body = {"prompt": "a", "temperature": 0, "seed": 0} | evaluate.extra(chosen, name)
  body, ignored = schema.check(schema.Completion, body)
  session = types.SimpleNamespace(settings=chosen)
  assert calls.knobs(session, sampling.names(), body) == (
    name,
    dict(chosen.knobs) | {k: body.temperature for k in ("temperature",) if name == "plain"},
  )
  assert ignored == ["do_sample"]
  assert evaluate.params(chosen, name) == chosen.knobs
  assert evaluate.extra(chosen, None) == {}


def test_scores_have_intervals_and_answers_in_order():
  sample = {"filter": "none", "metrics": ["acc", "loss"], "acc": 1.0, "loss": 0.5}
  found = {
    "results": {
      "t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.25, "loss,none": 0.5}
      | {"loss_stderr,none": 0.1, "match,short": 2.0, "match_stderr,short": "N/A"}
    },
    "samples": {"t": [sample | {"doc_id": i, "acc": float(i != 1)} for i in (3, 1, 0, 2)]},
  }
  line = evaluate.scores(found)
  assert line["right"] == {"t": {"acc": "1011"}}
  table = line["scores"]["t"]
  assert table["acc"] == {"value": 0.75, "stderr": 0.25, "interval": table["acc"]["interval"]}
  assert table["acc"]["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
  assert table["loss"]["interval"] == pytest.approx([0.304, 0.696])
  assert table["match,short"] == {"value": 2.0, "stderr": None, "interval": None}
  assert "0.3006 to 0.9544" in evaluate.table(line)
  assert evaluate.wilson(1.0, 8) == pytest.approx([0.6756, 1.0], abs=1e-4)


def test_the_servers_command_has_the_config_and_no_other_flag():
  argv = ["--tasks=a", "--config", "x.py", "--config.engine.batch_size=2", "--out", "config.jsonl"]
  evaluate._FLAGS.mark_as_parsed()
  made = evaluate.command(argv, "quadrant", 2048)
  assert made[3:6] == ["--config", "x.py", "--config.engine.batch_size=2"]
  assert "--samplers=plain,quadrant" in made
  assert not any("tasks" in part or "jsonl" in part for part in made)


@pytest.mark.parametrize("ignores", [False, True])
def test_the_server_ends_with_the_block(ignores, monkeypatch, capfd):
  monkeypatch.setattr(evaluate, "STOP_S", 0.3)
  stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nserver.serve_forever()"
  text = SERVER.replace("server.serve_forever()", stubborn) if ignores else SERVER
  with (
    contextlib.suppress(KeyboardInterrupt),
    evaluate.serving([sys.executable, "-c", text]) as url,
  ):
    assert evaluate.ask(f"{url}/ready") == ""
    raise KeyboardInterrupt
  with pytest.raises(OSError, match="refused"):
    evaluate.ask(f"{url}/ready")
  assert "it starts." in capfd.readouterr().err


def test_a_server_that_cannot_start_is_quoted(capfd):
  command = [sys.executable, "-c", "import sys; sys.exit('error: The model is damaged.')"]
  with contextlib.ExitStack() as stack:
    refusal(["The model is damaged."], stack.enter_context, evaluate.serving(command))
  assert capfd.readouterr().err == ""


def test_it_refuses_in_one_sentence(monkeypatch):
  is_one_sentence(run(SCRIPT, CONFIG), "--tasks")
  task = "--tasks=facts_choice"

  def raising(name):
    raise importlib.metadata.PackageNotFoundError(name)

  is_one_sentence(run(SCRIPT, CONFIG, task, "--sampler=greedy"), "no sampler 'greedy'")
  is_one_sentence(run(SCRIPT, CONFIG, task, "--limit=0"), "limit")
  monkeypatch.setattr(importlib.metadata, "version", raising)
  is_one_sentence(run(SCRIPT, CONFIG, task), 'pip install "entropix_jax[serve,eval]"')


# -- with lm-eval ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval():
  try:
    importlib.metadata.version("lm-eval")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('needs lm-eval: pip install ".[serve,eval]"')
  os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_tasks_are_found(lm_eval):
  code, out, err = process(SCRIPT, CONFIG, "--tasks=facts_chioce")
  assert (code, out) == (2, "")
  assert "did you mean 'facts_choice'?" in err.splitlines()[-1]


def test_scores_are_those_of_the_python_api_however_many_requests_run(lm_eval, tmp_path):
  n, out = 6, tmp_path / "scores.jsonl"
  small = [f"--config.engine.{x}" for x in ("max_seq_len=512", "batch_size=4")]
  for concurrency in (1, 64):
    args = f"--tasks=facts_choice,facts_short,prose --limit={n} --concurrency={concurrency}".split()
    code, text, err = process(SCRIPT, CONFIG, *small, *args, f"--out={out}")
    assert code == 0, err
    assert text.splitlines()[-1] == out.read_text().splitlines()[-1]
  one, many = map(json.loads, out.read_text().splitlines())
  assert one["bos"] == "implicit"
  assert one["generation"]["facts_short"]["temperature"] == 0
  for name in ("scores", "right", "prompt_tokens", "fingerprint"):
    assert one[name] == many[name], name
  llm = LLM(DEMO, max_seq_len=512, batch_size=4)
  right = [
    int(doc["choices"][scores.index(max(scores))] == doc["answer"])
    for doc in rows("facts_choice")[:n]
    for scores in [
      llm.score(f"Question: {doc['question']}\nAnswer:", [f" {c}" for c in doc["choices"]])
    ]
  ]
  assert one["right"]["facts_choice"]["acc"] == "".join(map(str, right))
  texts = [doc["text"] for doc in rows("prose")[:n]]
  bits = -sum(llm.score("", texts)) / sum(len(text.encode()) for text in texts) / math.log(2)
  assert one["scores"]["prose"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
  shown = FILES["facts_short"]["fewshot_config"]["samples"]
  head = "".join(f"Question: {doc['question']}\nAnswer: {doc['answer']}\n\n" for doc in shown)
  asks = [f"{head}Question: {doc['question']}\nAnswer:" for doc in rows("facts_short")[:n]]
  how = {"sampler": "plain", "temperature": 0.0, "format": "plain", "stop": "\n"}
  said = [done.text for done in llm.generate(asks, max_new_tokens=24, **how)]
  bare = [text.lower().translate(str.maketrans("", "", string.punctuation)) for text in said]
  want = [doc["answer"].lower() for doc in rows("facts_short")[:n]]
  right = "".join(str(int(a.strip() == b)) for a, b in zip(bare, want, strict=True))
  assert one["right"]["facts_short"]["exact_match,stripped"] == right
