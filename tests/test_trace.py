"""What the tracer writes of samples, and what the figures of a run count."""

import json
import signal
import subprocess
import sys
import time
import types

import pytest
from command import CONFIG, ENV, ROOT

from entropix_jax import files
from entropix_jax.report import reader, trace
from entropix_jax.rows import Token

HEADER = {
  "sampler": {"name": "plain"},
  "branches": ["greedy"],
  "prompts": [{"text": "one", "ids": [1, 2]}, {"text": "two", "ids": [3]}],
}
# Sample 1 of the first prompt parts from sample 0 behind its second token.
PATHS = [(0, 0, range(3)), (0, 1, range(2, 5)), (1, 0, range(2))]


def tokens(paths):
  for prompt, sample, positions in paths:
    for i in positions:
      numbers = {"entropy": 0.5, "varentropy": 0.25}
      finish = "stop" if i == positions[-1] else None
      own = {"sample": sample, "forced": sample == 1 and i == 2}
      id, text = 10 * sample + i, f" {sample}{i}"
      yield Token(prompt, i, id, text, "greedy", numbers, finish, 1.0 + i, **own)


def write(path, paths, *choices, last=None):
  """(lines, summary) of a trace; Ctrl-C comes after so many tokens, if any."""
  tally = trace.Tally([2, 1])
  outcomes = [types.SimpleNamespace(line=lambda row=row: row) for row in choices]
  with trace.Tracer(path, HEADER, tally.summary, outcomes) as tracer:
    for i, token in enumerate(tokens(paths)):
      if i == last:
        raise KeyboardInterrupt
      tracer.token(token)
      tally.token(token)
    tracer.close(tally.summary())
  return [json.loads(line) for line in path.read_text().splitlines()], tally.summary()


def choice():
  entry = {"finish": "stop", "score": -0.5, "answer": None, "tokens": 3}
  forks = (0, None, 0), (1, 0, 2)
  samples = [entry | {"sample": i, "parent": parent, "at": at} for i, parent, at in forks]
  return {"prompt": 0, "method": "branch", "rule": "score", "chosen": 1, "samples": samples}


def test_samples_are_written_and_read(tmp_path):
  lines, summary = write(tmp_path / "t.jsonl", PATHS, choice())
  assert [line.get("sample") for line in lines[1:9]] == [None] * 3 + [1] * 3 + [None] * 2
  assert [line.get("forced") for line in lines[1:9]] == [None] * 3 + [True] + [None] * 4
  assert lines[9:] == [{"samples": choice()}, {"summary": summary}]
  run = reader.read(tmp_path / "t.jsonl")
  assert reader.opened(run, 0)["texts"] == [" 00", " 01", " 12", " 13", " 14"]
  assert reader.opened(run, 0)["columns"]["forced"] == [None, None, True, None, None]
  assert reader.opened(run, 1)["texts"] == [" 00", " 01"]


def test_a_shared_beginning_counts_once_and_in_the_total_for_each(tmp_path):
  _, summary = write(tmp_path / "t.jsonl", PATHS, choice())
  counted = {"generated_tokens": 8, "samples": 3, "tokens_total": 10}
  assert counted.items() <= summary.items()
  assert "3 prompt + 8 generated tokens in 3 samples |" in trace.line(summary)


def test_one_sample_a_prompt_is_not_worth_a_word(tmp_path):
  lines, summary = write(tmp_path / "t.jsonl", PATHS[::2])
  assert not {"samples", "tokens_total"} & set(summary)
  assert "5 generated tokens | first" in trace.line(summary)
  assert not any("sample" in line or "forced" in line for line in lines)


def test_rates_leave_out_the_wait_for_the_first_token():
  tally = trace.Tally([100])
  for i, seconds in enumerate((2.0, 2.25, 2.25, 2.5)):
    tally.token(Token(0, i, 1, "a", "x", {"entropy": 1.0}, None, seconds))
  summary = tally.summary()
  assert (summary["prompt_tokens_per_s"], summary["tokens_per_s"]) == (50, 6)
  said = trace.line(summary)
  assert said.startswith(
    "100 prompt (50/s) + 4 generated tokens | first token after 2 s, then 6 tokens/s | "
  )
  assert [trace.rate(x) for x in (1090.4, 123456.0, 99.96, 0.5)] == [
    "1,090",
    "123,456",
    "100",
    "0.5",
  ]
  several = trace.Tally([1] * 8)
  for i in range(16):
    several.token(Token(i % 8, i // 8, 1, "a", "x", {"entropy": 1.0}, None, 1.0 + i // 8))
  assert several.summary()["tokens_per_s"] == 8
  alone = trace.Tally([1])
  assert "then" not in trace.line(alone.summary())


def test_a_run_that_fails_leaves_no_trace(tmp_path):
  with (
    pytest.raises(RuntimeError),
    trace.Tracer(tmp_path / "t.jsonl", HEADER, trace.Tally([]).summary),
  ):
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


# -- runs that do not end ------------------------------------------------------------------------


def test_an_interrupt_keeps_what_has_a_token(tmp_path):
  path = tmp_path / "t.jsonl"
  path.write_text("old")
  with pytest.raises(KeyboardInterrupt):
    write(path, PATHS, last=0)
  assert path.read_text() == "old"
  with pytest.raises(KeyboardInterrupt, match="holds the 5 tokens"):
    write(path, PATHS, last=5)
  assert list(tmp_path.iterdir()) == [path]
  run = reader.read(path)
  assert (run["incomplete"], run["summary"]["interrupted"]) == (True, True)
  assert run["summary"]["generated_tokens"] == 5
  # The choice that would say where a sample came from is missing.
  assert [(s["at"], s["texts"]) for s in run["answers"][0]["samples"]] == [
    (0, [" 00", " 01", " 02"]),
    (2, [" 12", " 13"]),
  ]


def test_a_killed_run_leaves_whole_dispatches(tmp_path):
  tally = trace.Tally([2, 1])
  with trace.Tracer(tmp_path / "t.jsonl", HEADER, tally.summary) as tracer:
    for i, token in enumerate(tokens(PATHS[:1])):
      tracer.token(token)
      run = reader.read(tmp_path / "t.jsonl.part")
      assert (run["incomplete"], run["summary"]["generated_tokens"]) == (True, i)


@pytest.mark.parametrize("part", ["before", "amid", "after"])
def test_an_interrupt_of_a_write_repeats_and_loses_nothing(tmp_path, monkeypatch, part):
  real = files.Draft.write

  def interrupted(self, begin, data):
    if data.count(b"\n") > 1:
      monkeypatch.undo()
      real(self, begin, {"before": b"", "amid": data[:99], "after": data}[part])
      raise KeyboardInterrupt
    return real(self, begin, data)

  monkeypatch.setattr(files.Draft, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "t.jsonl", PATHS, choice())
  run = reader.read(tmp_path / "t.jsonl")
  assert [s["texts"] for s in run["answers"][0]["samples"]] == [[" 00", " 01", " 02"], [" 12"]]
  assert (run["answers"][0]["method"], run["summary"]["generated_tokens"]) == ("branch", 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_whole_lines(tmp_path, interruptible, number):
  path, part, prompts = (tmp_path / name for name in ("t.jsonl", "t.jsonl.part", "prompts.txt"))
  prompts.write_text("".join(f"Tell me a story about {i} kites.\n" for i in range(50)))
  args = (CONFIG, f"--prompt_file={prompts}", "--prompt_test", f"--trace={path}")
  command = [sys.executable, "-m", "entropix_jax.main", *args]
  pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
  run = subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=ENV)
  while run.poll() is None and not (part.exists() and part.stat().st_size > 60_000):
    time.sleep(0.01)
  run.send_signal(number)
  _, err = run.communicate(timeout=60)
  assert run.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
  left = part if number == signal.SIGKILL else path
  assert set(tmp_path.iterdir()) == {left, prompts}
  found = [json.loads(line) for line in left.read_text().splitlines()]
  n = sum("id" in line for line in found)
  run = reader.read(left)
  assert (run["incomplete"], run["summary"]["generated_tokens"]) == (True, n)
  if left == path:
    assert err.endswith(f"\nstopped. {path} holds the {n} tokens that were generated.\n")
