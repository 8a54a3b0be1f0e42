"""The benchmarks run, print the keys that others read, and count bytes as the published figures do.

Why: figures are worth nothing in a test; that a script still runs, and divides by the right number, is.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from conftest import TINY, random_weights

from entropix_jax import checkpoint, config, preflight, sampling, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def decode(*args):
  """(exit code, stdout, stderr) of `python benchmarks/decode.py --config=configs/demo.py ARGS`."""
  done = subprocess.run(
    [sys.executable, "benchmarks/decode.py", "--config=configs/demo.py", *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


def test_decode_prints_one_json_line_last(tmp_path):
  checkpoint.save(tmp_path / "model", TINY, random_weights(), jnp.float32)
  out_file = tmp_path / "runs.jsonl"
  code, out, err = decode(
    f"--config.checkpoint={tmp_path / 'model'}",
    *("--batch=2", "--context=5", "--steps=4", f"--out={out_file}"),
    *(["--peer=transformers"] if TORCH else []),
  )
  assert code == 0, err
  line = out.splitlines()[-1]
  assert out_file.read_text(encoding="utf-8") == line + "\n"
  result = json.loads(line)
  assert result["dtype"] == "float32"
  assert result["parameters"] == weights.count(TINY)
  assert (result["batch"], result["context"], result["steps"]) == (2, 5, 4)
  assert sum(result["branches"].values()) == 2 * 4
  # 5 of the prompt, 2 dispatches of 4 before, then 1 to 4 more, in each row.
  kv = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 2 * (5 + 8 + 2.5)
  assert result["bytes_per_step"] == 4 * (weights.count(TINY) + kv)
  keys = """
    decode_tokens_per_s step_ms roofline_share ttft_s adaptive_over_greedy adaptive_tokens_per_s
    adaptive_step_ms bandwidth_gb_s compile_s adaptive_compile_s peak_bytes threads
  """.split()
  if TORCH:
    keys += ["peer_ratio", "peer_ratio_of_least", "peer_step_ms", "peer_ttft_s"]
    assert result["peer_logprob_off"] < 1e-4
    assert result["peer_same_tokens"] == 1
  for key in keys:
    assert result[key] > 0, key
  assert {"device", "jax", "commit", "date", "model", "bandwidth_of", "peak_of"} <= set(result)


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--peer=vllm", "transformers"),
    ("--steps=0", "steps"),
    ("--random_weights", "config.model"),
    ("--config.sampler.name=plain", "quadrant"),
    ("--config.engine.batchsize=3", "batch_size"),
    ("--out=no/such/folder/runs.jsonl", "--out"),
    ("stray", "stray"),
  ],
)
def test_decode_refuses_in_one_sentence(flag, says):
  code, out, err = decode(flag)
  assert code == 2
  assert not out
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert says in err


@pytest.mark.parametrize(
  ("name", "batch", "length", "gigabytes"),
  [
    ("llama3_1b", 1, 0, 2.47),  # tied: the embedding is the head and is read whole
    ("llama3_8b", 1, 0, 15.01),  # not tied: one row of it
    ("llama3_8b", 32, 4096, 15.01 + 32 * 0.537),
  ],
)
def test_step_bytes(name, batch, length, gigabytes):
  shapes = config.EngineConfig(batch_size=batch, max_seq_len=4096)
  sampler, one = sampling.find("plain"), config.MeshConfig()
  engine = preflight.engine(config.PRESETS[name], sampler, shapes, one, jnp.bfloat16)
  needed = preflight.step_bytes(engine, length)
  assert needed / 1e9 == pytest.approx(gigabytes, abs=0.01)
