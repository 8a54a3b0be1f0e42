"""GGUF files give the model, the weights and the stop ids that they hold, or are refused in one sentence."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import program, refusal
from test_checkpoint import (
  CFG,
  HEADS,
  PEAK,
  WIDTH,
  assert_same,
  each_tying,
  expected,
  hf_tensors,
  int8_of,
  placed,
  put_config,
  run,
)

from entropix_jax import config
from entropix_jax.checkpoints import checkpoint, gguf_file, hf_config
from entropix_jax.errors import UserError
from entropix_jax.model import rope, weights

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
script = program("scripts/convert_checkpoint.py")

FACTORS = "rope_freqs.weight"
PLAIN_ROPE = config.RopeConfig(10_000.0)
PLAIN = dataclasses.replace(CFG, rope=PLAIN_ROPE)
# Every row is a whole number of blocks of 256.
WIDE = config.ModelConfig(
  vocab=48, width=256, ffn=512, layers=2, heads=8, kv_heads=4, head_dim=64, rope=PLAIN_ROPE
)  # fmt: skip
SHORT = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip


def permuted(rows, heads):
  """What llama.cpp's converter does to the rows of q and k."""
  shape = rows.shape
  rows = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
  return rows.swapaxes(1, 2).reshape(shape)


def in_file(cfg, tensors):
  """The tensors of a file, by its names, of Hugging Face's."""
  found = {}
  for name, array in tensors.items():
    heads = {"q_proj": cfg.heads, "k_proj": cfg.kv_heads}.get(name.split(".")[-2])
    for theirs, short in SHORT.items():
      name = name.replace(theirs, short)
    found[name] = permuted(array, heads) if heads else array
  return found


def facts_of(cfg):
  return {
    "block_count": cfg.layers, "context_length": cfg.max_position, "embedding_length": cfg.width,
    "feed_forward_length": cfg.ffn, "attention.head_count": cfg.heads,
    "attention.head_count_kv": cfg.kv_heads, "attention.layer_norm_rms_epsilon": cfg.norm_eps,
    "attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim,
    "rope.freq_base": cfg.rope.theta, "rope.dimension_count": cfg.head_dim,
  }  # fmt: skip


def put(path, cfg=PLAIN, tensors=None, facts=None, kind=None, plain=None, extra=None, arch="llama"):
  """A file as the gguf library writes it.

  Args:
    tensors: by Hugging Face's names, in Hugging Face's order; packed as bytes if of the type `kind`.
    facts: `llama.` keys that differ; None removes one.
    plain: other metadata.
    extra: tensors by the file's names; None removes one.
  """
  writer = gguf.GGUFWriter(path, arch)
  facts = {f"{arch}.{key}": value for key, value in (facts_of(cfg) | (facts or {})).items()}
  for key, value in (facts | (plain or {})).items():
    if value is not None:
      kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
      getattr(writer, f"add_{kinds[type(value)]}")(key, value)
  tensors = in_file(cfg, hf_tensors(cfg) if tensors is None else tensors) | (extra or {})
  for name, array in tensors.items():
    if array is not None:
      raw = kind if array.dtype == np.uint8 else None
      writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  gguf_file._read.cache_clear()  # a clock's tick may be longer than the time between two files
  return path


def overwrite(path, data):
  path.write_bytes(data)
  gguf_file._read.cache_clear()


def refused(path, *words):
  """The file is refused with these words, by its metadata or by its tensors."""
  return refusal(
    words, lambda: checkpoint.load_weights(path, checkpoint.load_config(path), jnp.float32)
  )


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


# -- what is read ------------------------------------------------------------------------------


@each_tying
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_types_come_back_as_they_were(path, cfg, kind, dtype):
  cfg = dataclasses.replace(cfg, rope=PLAIN_ROPE)
  stored = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind]
  tensors = hf_tensors(cfg, stored)
  packed = {k: v.view(np.uint8) if kind == "BF16" else v for k, v in tensors.items()}
  put(path, cfg, packed, kind=Kind[kind])
  assert checkpoint.load_config(path) == cfg
  assert not checkpoint.stored_int8(path)
  assert_same(checkpoint.load_weights(path, cfg, dtype), expected(cfg, tensors), dtype)


def packed_tensors(cfg, kind):
  """(packed bytes, what they stand for), by Hugging Face's names; norms are float32."""
  packed, truth = {}, {}
  rng = np.random.default_rng(0)
  for name, array in hf_tensors(cfg).items():
    packed[name] = truth[name] = array
    if array.ndim > 1:
      shape = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
      try:
        packed[name] = gguf.quants.quantize(array, kind)
      except NotImplementedError:  # any bytes are valid, and these make no scale infinite
        packed[name] = rng.integers(0, 256, shape, np.uint8) & np.uint8(0xBF)
      assert packed[name].shape == shape
      truth[name] = gguf.quants.dequantize(packed[name], kind)
  return packed, truth


QUANTISED = [name for name, *_ in gguf_file._KINDS.values() if name not in gguf_file.PLAIN]


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_types_are_what_the_library_makes_of_them(path, kind):
  packed, truth = packed_tensors(WIDE, Kind[kind])
  put(path, WIDE, packed, kind=Kind[kind])
  assert {entry.kind for entry in gguf_file.read(path).tensors.values()} == {kind, "F32"}
  assert_same(checkpoint.load_weights(path, WIDE, jnp.float32), expected(WIDE, truth))


@pytest.fixture
def q4(path):
  packed, truth = packed_tensors(WIDE, Kind.Q4_1)
  put(path, WIDE, packed, kind=Kind.Q4_1)
  return expected(WIDE, truth)


@pytest.mark.parametrize("scratch", [1, 1 << 20])
@pytest.mark.parametrize("axes", [HEADS, WIDTH], ids=["heads", "width"])
def test_a_mesh_gets_the_same(path, q4, monkeypatch, axes, scratch):
  monkeypatch.setattr(checkpoint, "SCRATCH", scratch)
  monkeypatch.setattr(checkpoint, "TILE", 5)
  assert_same(checkpoint.load_weights(path, WIDE, jnp.float32, placed(4, 2, axes)), q4)


def test_int8_is_that_of_the_bfloat16(path, q4):
  params = checkpoint.load_weights(path, WIDE, jnp.float32, quantised=True)
  assert_same(params, int8_of(WIDE, q4, jnp.float32))


def test_any_rows_and_columns(path, q4):
  """Rows in any order, of part of a block."""
  source = gguf_file.tensors(path, WIDE)["model.layers.1.self_attn.k_proj.weight"]
  rows, cols = np.array([70, 3, 200, 4, 33]), np.arange(37, 100)
  into = np.zeros((5, 63), np.float32)
  source.read(rows, cols, into)
  np.testing.assert_array_equal(into, q4.layers[1].wk_DJ.T[rows][:, cols])


def test_metadata(path):
  tokens = ["a", "é", "<|end|>"]
  plain = {
    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 1, 3], "a.flag": True,
    "tokenizer.ggml.scores": [0.5, -1.0, 0.0],
  }  # fmt: skip
  file = gguf_file.read(put(path, plain=plain))
  assert file.metadata["tokenizer.ggml.tokens"] == tokens
  assert file.metadata["a.flag"] is True
  assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
  for name in ("token_type", "scores"):
    key = f"tokenizer.ggml.{name}"
    assert file.metadata[key] == plain[key]
  assert file.tensors["blk.1.attn_k.weight"].shape == (30, 20)
  assert gguf_file.read(str(path)) is file
  put(path, plain={"a.flag": False})
  assert gguf_file.read(path).metadata["a.flag"] is False


def test_what_may_be_left_out(path):
  """Keys that have a usual value."""
  cfg = dataclasses.replace(PLAIN, heads=2, kv_heads=2)
  absent = "attention.head_count_kv attention.key_length attention.value_length rope.freq_base rope.dimension_count"  # fmt: skip
  put(path, cfg, facts=dict.fromkeys(absent.split()) | {"rope.scaling.type": "none"})
  assert checkpoint.load_config(path) == cfg


@pytest.mark.parametrize(
  ("plain", "ids"),
  [
    ({"eos": 7}, (7,)),
    ({"eos": 7, "eot": 9, "eom": 8}, (7, 9, 8)),
    ({"eos": 7, "eot": 7}, (7,)),
    ({}, ()),
  ],
)
def test_stop_ids(path, plain, ids):
  put(path, plain={f"tokenizer.ggml.{name}_token_id": id for name, id in plain.items()})
  assert checkpoint.stop_ids(path) == ids


def test_a_stop_id_that_is_none(path):
  put(path, plain={"tokenizer.ggml.eos_token_id": "x"})
  refusal([path, "eos_token_id", "'x'"], checkpoint.stop_ids, path)


# -- rotary embedding --------------------------------------------------------------------------


def llama3_divisors(cfg):
  """What llama.cpp's converter stores."""
  r = cfg.rope
  freq = 1.0 / (r.theta ** (np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim))
  wave = 2 * np.pi / freq
  smooth = (r.original_max_position / wave - r.low_freq_factor) / (
    r.high_freq_factor - r.low_freq_factor
  )
  return (1 / ((1 - smooth.clip(0, 1)) / r.factor + smooth.clip(0, 1))).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again(path, factor):
  cfg = dataclasses.replace(WIDE, rope=config.RopeConfig(kind="llama3", factor=factor))
  divisors = llama3_divisors(cfg)
  assert len(set(divisors.tolist())) > 4
  put(path, cfg, extra={FACTORS: divisors})
  assert checkpoint.load_config(path) == cfg
  assert_same(checkpoint.load_weights(path, cfg, jnp.float32), expected(cfg, hf_tensors(cfg)))
  put(path, cfg, extra={FACTORS: np.ones_like(divisors)})
  assert np.array_equal(
    rope.inverse_frequencies(checkpoint.load_config(path).rope, 64),
    rope.inverse_frequencies(dataclasses.replace(cfg.rope, kind="default"), 64),
  )


def test_another_scaling_is_refused(path):
  cfg = dataclasses.replace(WIDE, rope=config.RopeConfig(kind="llama3"))
  good = llama3_divisors(cfg)
  wrong = good.copy()
  wrong[15] *= 1 + 3e-6
  zero, nan = good * 0, good * np.float32(np.nan)
  for divisors in (wrong, 2 * good, zero, nan, -good, good.astype(np.float16), good[1:]):
    put(path, cfg, extra={FACTORS: divisors})
    refused(path, path, FACTORS)
  linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
  put(path, cfg, facts=linear, extra={FACTORS: good})
  refused(path, path)


@pytest.mark.parametrize(
  ("facts", "scaling"),
  [
    ({"type": "none"}, None),
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"type": "linear", "factor": 1.0}, None),
    (
      {"type": "yarn", "factor": 4.0, "original_context_length": 4096, "attn_factor": 1.0},
      {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    (
      {"type": "yarn", "factor": 4.0, "attn_factor": 2.0},
      {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2 * (1 + 0.1 * np.log(4))},
    ),
  ],
)
def test_scaling_is_that_of_hugging_face(path, monkeypatch, facts, scaling):
  put(path, facts={f"rope.scaling.{key}": value for key, value in facts.items()})
  seen = []
  real = hf_config.from_hf
  plain = {"rope_scaling": None}
  monkeypatch.setattr(
    hf_config, "from_hf", lambda hf, *at: seen.append(hf) or real(hf | plain, *at)
  )
  checkpoint.load_config(path)
  assert seen[0]["rope_scaling"] == scaling


# -- where it is -------------------------------------------------------------------------------


def test_a_folder_with_one_file_stands_for_it(tmp_path, path):
  put(path)
  assert checkpoint.load_config(tmp_path) == PLAIN
  assert_same(
    checkpoint.load_weights(tmp_path, PLAIN, jnp.float32), expected(PLAIN, hf_tensors(PLAIN))
  )
  put(tmp_path / "other.gguf")
  refused(tmp_path, tmp_path, "model.gguf, other.gguf", "config.checkpoint")
  put_config(tmp_path)
  refused(tmp_path, "model.gguf, other.gguf", "config.checkpoint")
  assert gguf_file.find(tmp_path) is None
  refused(tmp_path / "none.gguf", "none.gguf", "config.checkpoint")


def test_any_path(tmp_path):
  """Spaces, letters of other scripts, links into another folder, and no right to write."""
  folder = tmp_path / "snapshots" / "with späces 模型"
  folder.mkdir(parents=True)
  (folder / "m.gguf").symlink_to(put(tmp_path / "blob.gguf"))
  folder.chmod(0o555)
  for path in (folder, folder / "m.gguf", str(folder / "m.gguf")):
    params = checkpoint.load_weights(path, PLAIN, jnp.float32)
    assert_same(params, expected(PLAIN, hf_tensors(PLAIN)))
  folder.chmod(0o755)


# -- what is refused ---------------------------------------------------------------------------


def test_truncated_anywhere(path):
  """At every length of the header, and at some of what follows; tensors are named."""
  whole = put(path, plain={"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
  entries = gguf_file.read(path).tensors
  start = min(entry.begin for entry in entries.values())
  for length in range(start):
    overwrite(path, whole[:length])
    refused(path, path, "truncated" if length > 3 else "")
  for length in (start, start + 1, (start + len(whole)) // 2):
    overwrite(path, whole[:length])
    message = refused(path, path, "truncated", length)
    assert any(name in message for name in entries)
  last = max(entries, key=lambda name: entries[name].end)
  overwrite(path, whole[: entries[last].end])
  checkpoint.load_weights(path, PLAIN, jnp.float32)
  stored = checkpoint.check_files(path, PLAIN)["model.norm.weight"]._replace(begin=len(whole) - 8)
  overwrite(path, whole[: entries[last].end - 1])
  refused(path, path, "truncated", last)
  refusal(
    ["cut short"], stored.read, np.arange(20), np.zeros(1, int), np.empty((20, 1), np.float32)
  )


def test_a_damaged_header_is_refused_at_once(path):
  """Any byte of it may be wrong: the file still loads, or is refused in a sentence."""
  whole = put(path, plain={"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
  start = min(entry.begin for entry in gguf_file.read(path).tensors.values())
  rng, messages = np.random.default_rng(0), []
  for at in range(start):
    data = bytearray(whole)
    data[at] = rng.choice([0, 255, data[at] ^ 1 << rng.integers(8)])
    overwrite(path, data)
    try:
      checkpoint.check_files(path, checkpoint.load_config(path))
      messages.append("fine.")
    except UserError as error:
      messages.append(str(error))
  assert all(text.endswith(".") and "\n" not in text and len(text) < 400 for text in messages)
  assert 100 < messages.count("fine.") < len(messages) - 100


def number(n, size=8):
  return n.to_bytes(size, "little")


@pytest.mark.parametrize(
  ("old", "new", "words"),
  [
    (b"GGUF", b"GGML", ["is not a GGUF file"]),
    (b"GGUF" + number(3, 4), b"GGUF" + number(3, 4)[::-1], ["big-endian"]),
    (b"GGUF" + number(3, 4), b"GGUF" + number(1, 4), ["version 1", "2 and 3"]),
    (b"GGUF" + number(3, 4), b"GGUF" + number(3, 4) + number(1 << 62), [f"says {1 << 62}"]),
    (number(2) + b"ab", number(1 << 40) + b"ab", [f"says {1 << 40}"]),
    (number(9, 4) + number(8, 4) + number(2), number(9, 4) + number(8, 4) + number(1 << 23), ["says"]),
    (number(9, 4) + number(8, 4) + number(2), number(9, 4) + number(9, 4) + number(2), ["type 9"]),
    (number(9, 4) + number(8, 4) + number(2), number(77, 4) + number(8, 4) + number(2), ["type 77"]),
    (b"ab", b"\xe9b", ["UTF-8"]),
    (b"block_count", b"block_cou\n\t", ["cannot be printed"]),
    (b"blk.0.attn_q.weight", b"blk.1.attn_q.weight", ["tensor blk.1.attn_q.weight twice"]),
    (b"blk.0.attn_q.weight" + number(2, 4), b"blk.0.attn_q.weight" + number(5, 4), ["5 axes"]),
  ],
)  # fmt: skip
def test_a_header_that_cannot_be(path, old, new, words):
  whole = put(path, plain={"tokenizer.ggml.tokens": ["ab", "c"]}).read_bytes()
  assert whole.count(old) >= 1
  overwrite(path, whole.replace(old, new, 1))
  refused(path, path, *words)


@pytest.mark.parametrize(
  ("words", "given"),
  [
    (["architecture 'gemma'", "llama"], {"arch": "gemma"}),
    (["8 experts"], {"facts": {"expert_count": 8}}),
    (["one of 3 parts", "llama-gguf-split --merge"], {"plain": {"split.count": 3}}),
    (["llama.logit_scale"], {"facts": {"logit_scale": 0.5}}),
    (["llama.attention.head_count_kv"], {"facts": {"attention.head_count_kv": [3, 3]}}),
    (["llama.attention.value_length", "8"], {"facts": {"attention.value_length": 8}}),
    (["llama.rope.dimension_count", "4"], {"facts": {"rope.dimension_count": 4}}),
    (["llama.rope.scaling.attn_factor"], {"facts": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 2.0}}),
    (["'longrope'"], {"facts": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}),
    (["llama.block_count", "4000000000"], {"facts": {"block_count": 4_000_000_000}}),
    (["blk.2.attn_norm.weight"], {"facts": {"block_count": 3}}),
    (["lacks llama.context_length"], {"facts": {"context_length": None}}),
    (["general.alignment", "48"], {"plain": {"general.alignment": 48}}),
    (["lacks the tensor token_embd.weight"], {"extra": {"token_embd.weight": None}}),
    (["lacks the tensor blk.1.attn_k.weight"], {"extra": {"blk.1.attn_k.weight": None}}),
    (["blk.1.attn_k.weight", "[20, 30]", "[30, 20]"], {"extra": {"blk.1.attn_k.weight": np.zeros((20, 30), np.float32)}}),
    (["blk.1.attn_k.weight as type 28", "Q4_K"], {"extra": {"blk.1.attn_k.weight": np.zeros((30, 20))}}),
    (["blk.1.attn_norm.weight as Q4_0", "F32, F16, BF16 are"], {"extra": {"blk.1.attn_norm.weight": np.zeros(18, np.uint8)}, "kind": Kind.Q4_0}),
    (["sliding_window"], {"facts": {"attention.sliding_window": 4}}),
    (["a.weight, b.weight, blk.2.attn_q.weight and 1 more"], {"extra": dict.fromkeys(["blk.3.x", "b.weight", "a.weight", "blk.2.attn_q.weight"], np.zeros(3, np.float32))}),
  ],
)  # fmt: skip
def test_another_model_is_refused(path, words, given):
  refused(put(path, **given), path, *words)


def test_without_the_library(path, q4, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  gguf_file._library.cache_clear()
  refused(path, 'install it with `pip install -e ".[gguf]"`')
  put(path)
  assert_same(checkpoint.load_weights(path, PLAIN, jnp.float32), expected(PLAIN, hf_tensors(PLAIN)))


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc")
def test_peak_memory_is_the_weights_and_little_more(path):
  cfg = dataclasses.replace(WIDE, vocab=2048, width=512, ffn=1024, layers=16)
  tensors = hf_tensors(cfg, np.float16)
  packed = {
    name: array.astype(np.float32) if array.ndim == 1 else np.zeros((len(array), array.shape[1] // 32 * 34), np.uint8)
    for name, array in tensors.items()
  }  # fmt: skip
  done = run("-c", PEAK, put(path, cfg, packed, kind=Kind.Q8_0))
  assert done.returncode == 0, done.stderr
  grown, target = map(int, done.stdout.split())
  assert target > 150e6
  assert grown < target + 40e6


# -- converted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_converted_to_arrays(tmp_path, path, q4, dtype):
  whole = path.read_bytes()
  script.convert(path, tmp_path / "out", dtype)
  out = tmp_path / "out"
  assert {file.name for file in out.iterdir()} == {
    "config.json", "generation_config.json", "tokenizer.gguf", "orbax.json", "arrays",
  }  # fmt: skip
  assert checkpoint.load_config(out) == WIDE
  assert checkpoint.stored_int8(out) == (dtype == "int8")
  params = checkpoint.load_weights(out, WIDE, jnp.bfloat16)
  truth = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), q4)
  assert_same(params, truth if dtype == "bfloat16" else int8_of(WIDE, q4, jnp.bfloat16))
  assert gguf_file.inside(out) == out / "tokenizer.gguf"
  assert gguf_file.inside(path) == path
  kept = gguf_file.read(out / "tokenizer.gguf")
  assert kept.tensors == {}
  assert kept.metadata == gguf_file.read(path).metadata
  assert kept.end == (out / "tokenizer.gguf").stat().st_size
  assert path.read_bytes() == whole


def test_stop_ids_of_what_was_converted(tmp_path, path):
  put(path, plain={"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9})
  script.convert(tmp_path, tmp_path / "out")  # the folder that holds the file
  assert checkpoint.stop_ids(tmp_path / "out") == (7, 9)
  assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == PLAIN.width
  put(path, plain={})
  script.convert(path, tmp_path / "none")
  assert checkpoint.stop_ids(tmp_path / "none") == ()


# -- biases, and a real model ------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(config.ModelConfig, "mlp_bias"), reason="has no biases")
def test_biases(path):
  cfg = dataclasses.replace(PLAIN, attention_bias=True, mlp_bias=True)
  rng = np.random.default_rng(0)
  shapes = {
    name: weights.hf_shape(cfg, field)
    for (_, field), name in weights.sources(cfg).items()
    if name.endswith(".bias")
  }
  assert len(shapes) == 7 * cfg.layers
  biases = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  put(path, cfg, hf_tensors(cfg) | biases)
  assert checkpoint.load_config(path) == cfg
  params = checkpoint.load_weights(path, cfg, jnp.float32)
  for (layer, field), name in weights.sources(cfg).items():
    if name in biases:
      np.testing.assert_array_equal(getattr(params.layers[layer], field), biases[name])


@pytest.mark.real
def test_a_real_file_is_what_the_library_reads(smollm2):
  """All tensors of SmolLM2, bit for bit, but for the order of q's and k's rows."""
  cfg = checkpoint.load_config(smollm2)
  params = checkpoint.load_weights(smollm2, cfg, jnp.float32)
  ours = {
    name: weights.hf_order(field, np.asarray(getattr(params if layer is None else params.layers[layer], field)))
    for (layer, field), name in weights.sources(cfg).items()
  }  # fmt: skip
  ours = in_file(cfg, ours)
  theirs = gguf.GGUFReader(smollm2).tensors
  assert len(theirs) == len(ours) == 272
  for tensor in theirs:
    truth = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(ours[tensor.name], truth, err_msg=tensor.name)
  assert checkpoint.stop_ids(smollm2) == (2,)
