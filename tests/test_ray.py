"""Two replicas behind one address, and a file of prompts over two workers; both need Ray, which is large."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from command import CONFIG, ENV, ROOT

from entropix_jax.llm import LLM

pytest.importorskip("ray", reason='install Ray: pip install ".[serve,ray]"')
httpx = pytest.importorskip("httpx")
SMALL = "--config.engine.max_seq_len=256"
QUESTION = "Tell me a story about a kite."


def test_two_replicas_answer_as_one_model_does(tmp_path):
  command = [sys.executable, "scripts/serve_ray.py", CONFIG, SMALL, "--replicas=2", "--port=8321"]
  command += ["--cpus=0.5", "--samplers=plain"]
  with (
    open(tmp_path / "log", "w+", encoding="utf-8") as log,
    subprocess.Popen(command, cwd=ROOT, env=os.environ | ENV, stderr=subprocess.PIPE, stdout=log, text=True) as run,
  ):  # fmt: skip
    try:
      while not (said := re.search(r"Ready: (\S+)/v1", line := run.stderr.readline())):
        assert line
      body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16, "seed": 2}
      want = LLM.demo(max_seq_len=256).generate(QUESTION, seed=2, max_new_tokens=16).text
      for _ in range(6):
        answer = httpx.post(f"{said[1]}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == want
    finally:
      run.send_signal(signal.SIGINT)
      run.wait(60)


def test_a_file_of_prompts_has_the_texts_of_one_process(tmp_path):
  prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
  texts = [QUESTION, "What is 2 + 3?", "Who is Ruth?"]
  prompts.write_text("\n".join(texts))
  command = [sys.executable, "scripts/batch_ray.py", CONFIG, SMALL, f"--prompt_file={prompts}"]
  command += [f"--out={out}", "--block=2", "--max_new_tokens=12", "--cpus=0.5"]
  subprocess.run(command, cwd=ROOT, env=os.environ | ENV, check=True, timeout=300)
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  want = LLM.demo(max_seq_len=256).generate(texts, max_new_tokens=12)
  assert [(row["prompt"], row["text"]) for row in rows] == list(
    zip(texts, [done.text for done in want], strict=True)
  )
