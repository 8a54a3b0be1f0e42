"""The benchmarks run, print the keys that others read, and count bytes as the published figures do.

Why: figures are worth nothing in a test; that a script still runs, and divides by the right number, is.
"""

import importlib.util
import json
import sys

import jax.numpy as jnp
import pytest
from command import CONFIG, DEMO, is_one_sentence, process, run
from conftest import TINY, random_weights

from entropix_jax import config, errors, sampling
from entropix_jax.checkpoints import checkpoint
from entropix_jax.engine import preflight
from entropix_jax.model import weights

SCRIPT = "benchmarks/decode.py"
PEERS = [
  name
  for name, needs in {
    "transformers": ("torch", "transformers"),
    "llama.cpp": ("llama_cpp", "gguf"),
  }.items()
  if all(map(importlib.util.find_spec, needs))
]
PEER = [f"--peer={','.join(PEERS)}"] * bool(PEERS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The flag of a tiny checkpoint."""
  folder = tmp_path_factory.mktemp("tiny")
  checkpoint.save(folder, TINY, random_weights(), jnp.float32)
  return f"--config.checkpoint={folder}"


def test_decode_prints_one_json_line_last(tiny, tmp_path):
  out_file = tmp_path / "runs.jsonl"
  args = [tiny, "--batch=2", "--context=5", "--steps=4", f"--out={out_file}"]
  # Peers are in a process of their own, where their warnings are none of ours.
  code, out, err = (process if PEERS else run)(SCRIPT, CONFIG, *args, *PEER)
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
  for peer in PEERS:
    prefix = {"transformers": "peer", "llama.cpp": "llamacpp"}[peer]
    keys += [f"{prefix}_{key}" for key in ("ratio", "ratio_of_least", "step_ms", "ttft_s")]
    exact = "flash" not in result[prefix]
    assert result[f"{prefix}_logprob_off"] < (1e-4 if exact else 1e-2)
    assert result[f"{prefix}_same_tokens"] == 1 or not exact
  for key in keys:
    assert result[key] > 0, key
  assert {"device", "jax", "commit", "date", "model", "bandwidth_of", "peak_of"} <= set(result)


def test_decode_heeds_int8(tiny):
  """Weights and cache of the engine are int8, and a step's bytes are theirs."""
  int8 = ("--config.engine.weights=int8", "--config.engine.cache=int8")
  shape = ("--batch=1", "--context=5", "--steps=4")
  code, out, err = run(SCRIPT, CONFIG, tiny, *shape, *int8)
  assert code == 0, err
  result = json.loads(out.splitlines()[-1])
  assert (result["weights"], result["cache"], result["dtype"]) == ("int8", "int8", "float32")
  norms = TINY.width * (2 * TINY.layers + 1)
  q, kv = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
  scales = TINY.vocab + TINY.layers * (q + 2 * kv + 2 * TINY.width + 2 * TINY.ffn)
  held = weights.count(TINY) - norms + 4 * (norms + scales)
  token = 2 * TINY.layers * TINY.kv_heads * (TINY.head_dim + 4)
  assert result["bytes_per_step"] == held + token * (5 + 8 + 2.5)


def test_prefill_is_timed_for_each_length(tiny):
  flags = [tiny, "--prefill=3,70", *PEER]
  code, out, err = (process if PEERS else run)(SCRIPT, CONFIG, *flags)
  assert code == 0, err
  by_length = json.loads(out.splitlines()[-1])["prefill"]
  assert list(by_length) == ["3", "70"]
  for figures in by_length.values():
    assert len(figures) == 2 + 4 * len(PEERS)
    assert min(figures.values()) > 0


def test_int8_says_what_is_stored(tmp_path):
  """A line a model; bytes of the demo's weights and of a token's keys and values by hand."""
  out_file = tmp_path / "runs.jsonl"
  code, out, err = run("benchmarks/int8.py", "--texts=2", "--tokens=8", f"--out={out_file}")
  assert code == 0, err
  assert out == out_file.read_text()
  for line, stage in zip(out.splitlines(), ("base", "instruct"), strict=True):
    result = json.loads(line)
    cfg = checkpoint.load_config(DEMO.parent / stage)
    assert result["model"] == f"demo/{stage}"
    by = result["settings"]
    count, numbers = weights.count(cfg), 2 * cfg.layers * cfg.kv_heads * cfg.head_dim
    assert by["float32"]["weight_bytes"] == 2 * by["bfloat16"]["weight_bytes"] == 4 * count
    assert count < by["int8 weights"]["weight_bytes"] < 1.1 * count
    assert by["float32"]["cache_bytes_per_token"] == 4 * numbers
    assert by["int8 cache"]["cache_bytes_per_token"] == numbers + 4 * numbers // cfg.head_dim
    assert by["float32"]["worst_logit"] == 0  # and bfloat16 is what the demo is stored as
    for name in ("int8 weights", "int8 cache", "int8 weights and cache"):
      assert 0 < by[name]["worst_logit"] < 3
      assert by[name]["perplexity"] == pytest.approx(by["float32"]["perplexity"], rel=0.2)


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--peer=llama.cpp,vllm", "vllm is not known; use transformers or llama.cpp"),
    ("--peer=llama.cpp --config.engine.dtype=bfloat16", "compares float32"),
    ("--steps=0", "steps"),
    ("--prefill=512,many", "512,many"),
    ("--random_weights", "config.model"),
    ("--config.sampler.name=plain", "quadrant"),
    ("--config.actions.stop_ent=3", "config.actions"),
    ("--config.mesh.model=2", "one device"),
    ("--peer=transformers --config.engine.weights=int8", "The peer has no int8"),
    ("--peer=transformers --config.engine.cache=int8", "The peer has no int8"),
  ],
)
def test_decode_refuses_in_one_sentence(flag, says):
  is_one_sentence(run(SCRIPT, CONFIG, *flag.split()), says)


def test_weights_beyond_the_memory_are_refused_before_they_are_made():
  import decode

  with pytest.raises(errors.UserError, match=r"take 1128.9 GB and .* are free"):
    decode.random_weights(config.PRESETS["llama3_70b"], jnp.float32, copies=4)


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


def test_a_missing_peer_is_said_in_one_sentence(monkeypatch):
  import decode

  for module in ("llama_cpp", "torch"):
    monkeypatch.setitem(sys.modules, module, None)
  for find, says in ((decode.import_llamacpp, "llama-cpp-python"), (decode.import_peer, "torch")):
    with pytest.raises(errors.UserError, match=says):
      find()
