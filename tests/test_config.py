"""hf_config.from_hf reads what Hugging Face writes, and refuses by name what it cannot compute."""

import dataclasses
import math

import pytest
from conftest import ROOT, refusal

from entropix_jax import config, decoding
from entropix_jax.checkpoints import hf_config
from entropix_jax.cli import config_file
from entropix_jax.model import weights

LLAMA3 = {
  "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}  # fmt: skip
OLD_LLAMA3 = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
# Llama 3.2 1B as published (transformers 4.45).
HF_1B = {
  "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
  "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
  "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
PARAMETERS = {
  "smollm2_135m": 134_515_008,
  "llama3_1b": 1_235_814_400, "llama3_3b": 3_212_749_824, "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
}  # fmt: skip


# Real files, c01 to c52 (each name has width x layers - vocabulary); the words with which some are refused.
CONFIGS = ROOT.parent / "shared" / "data" / "configs"
PUBLISHED = dict.fromkeys(range(1, 53), "") | {
  1: "gptq with 4 bits", 3: "bitsandbytes with 8 bits", 11: "draft_vocab_size to 32000",
  12: "bitsandbytes with 4 bits", 24: "ladder_layers to 16", 25: "ladder_layers to 20",
  48: "gptq with 4 bits",
}  # fmt: skip
FP8 = {"format": "float-quantized", "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}}  # fmt: skip
INT8 = {"format": "int-quantized", "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}}}}  # fmt: skip


def changed(**keys):
  """HF_1B with keys set, or left out where the value is `...`."""
  return {key: value for key, value in (HF_1B | keys).items() if value is not ...}


def test_published_config_is_the_preset():
  assert hf_config.from_hf(HF_1B) == config.PRESETS["llama3_1b"]


@pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"no published config.json files in {CONFIGS}")
def test_published_files():
  paths = sorted(CONFIGS.glob("*.json"))
  for path, (number, words) in zip(paths, PUBLISHED.items(), strict=True):
    hf = hf_config.read_json(path)
    if words:
      refusal([path, words], hf_config.from_hf, hf, path)
      continue
    cfg = hf_config.from_hf(hf)
    vocab = cfg.vocab if "vocab_size" in hf else None
    assert path.stem == f"c{number:02}-{cfg.width}x{cfg.layers}-v{vocab}"
    assert hf_config.from_hf(hf_config.to_hf(cfg)) == cfg
    assert hf_config.unknown(hf) == ["auto_map (its code is not run)"] * (number == 42)


def test_presets_have_the_published_sizes():
  assert {name: weights.count(cfg) for name, cfg in config.PRESETS.items()} == PARAMETERS


@pytest.mark.parametrize("name", config.PRESETS)
def test_to_hf_reads_back(name):
  cfg = config.PRESETS[name]
  plain = dataclasses.replace(
    cfg, rope=config.RopeConfig(theta=1e4), tied=not cfg.tied, norm_eps=1e-6, head_dim=48
  )
  for one in (cfg, plain):
    assert hf_config.from_hf(hf_config.to_hf(one)) == one
    assert hf_config.from_hf(hf_config.to_hf(one, eos_token_id=2)) == one


def test_every_model_field_reaches_config_json():
  """A field that to_hf forgot would come back as its default."""
  cfg = config.PRESETS["llama3_8b"]
  twisted = []
  for name, value in vars(cfg).items():
    if name == "rope":
      for kind, parts in hf_config._SCALING.items():
        rope = config.RopeConfig(kind=kind)
        for part in ("theta", *(key.removesuffix("_embeddings") for key in parts)):
          x = getattr(rope, part)
          x = (not x) if isinstance(x, bool) else x * 2
          twisted.append({"rope": dataclasses.replace(rope, **{part: x})})
    elif name == "kv_heads":
      twisted.append({name: value // 2})
    else:
      twisted.append({name: (not value) if isinstance(value, bool) else value * 2})
  for change in twisted:
    other = dataclasses.replace(cfg, **change)
    assert hf_config.from_hf(hf_config.to_hf(other)) == other


def test_heads_and_their_size_have_defaults():
  for absent in (..., None):
    assert hf_config.from_hf(changed(head_dim=absent)).head_dim == 2048 // 32
  assert hf_config.from_hf(changed(head_dim=128)).head_dim == 128
  assert hf_config.from_hf(changed(num_key_value_heads=...)).kv_heads == 32


def test_missing_keys_have_the_defaults_of_transformers():
  want = config.ModelConfig(
    32_000, 4096, 11_008, 32, 32, 32, 128, 1e-6, max_position=2048, rope=config.RopeConfig(1e4)
  )
  for kind in ({"architectures": ["LLaMAForCausalLM"]}, {"model_type": "llama"}):
    assert hf_config.from_hf(kind | {"hidden_size": 4096}) == want
  refusal(["none of a model's sizes"], hf_config.from_hf, {"model_type": "llama", "vocab": 5})


def test_biases():
  for keys, want in (
    ({"bias": False}, (False, False)),
    ({"bias": True}, (True, False)),  # InternLM's
    ({"attention_bias": True, "bias": None}, (True, False)),
    ({"mlp_bias": True}, (False, True)),
  ):
    cfg = hf_config.from_hf(changed(**keys))
    assert (cfg.attention_bias, cfg.mlp_bias) == want


def test_what_is_ignored_is_named():
  assert hf_config.unknown(HF_1B) == []
  rope = LLAMA3 | {"beta_fast": 32, "finetuned": True}
  hf = changed(auto_map={"AutoConfig": "x.Y"}, nothing=None, of_ours=1, top_k=50, rope_scaling=rope)
  assert hf_config.from_hf(hf) == config.PRESETS["llama3_1b"]
  names = ["auto_map (its code is not run)", "of_ours", "rope_scaling.beta_fast"]
  assert hf_config.unknown(hf) == names
  yarn = {"type": "yarn", "factor": 2.0, "mscale": 1.0}
  assert hf_config.unknown(changed(rope_scaling=yarn)) == []


@pytest.mark.parametrize("key", hf_config._ONLY)
def test_a_key_that_would_change_the_answer(key):
  allowed, meaning = hf_config._ONLY[key]
  for value in allowed:
    hf_config.from_hf(changed(**{key: value}))
  for value in (7.5, "x" * 1000, {"a": 1}):
    refusal([f"sets {key} to", meaning], hf_config.from_hf, changed(**{key: value}))


@pytest.mark.parametrize(
  "given",
  [
    {"quant_method": "compressed-tensors", **FP8},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
  ],
)
def test_fp8_is_read(given):
  assert hf_config.from_hf(changed(quantization_config=given)) == config.PRESETS["llama3_1b"]
  refusal(["e5m2"], hf_config.from_hf, changed(quantization_config=given | {"fmt": "e5m2"}))


@pytest.mark.parametrize(
  ("scaling", "fields"),
  [
    ({"factor": 4.0}, {"attention_factor": 0.1 * math.log(4) + 1}),
    ({"factor": 0.5}, {"attention_factor": 1.0}),
    ({}, {"factor": 16.0, "attention_factor": 0.1 * math.log(16) + 1}),  # 131072 over 8192 tokens
    (
      {"factor": 4.0, "mscale": 0.5, "mscale_all_dim": 2.0},
      {"attention_factor": (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)},
    ),
    ({"factor": 4.0, "mscale": 0.5}, {"attention_factor": 0.1 * math.log(4) + 1}),
    (
      {"factor": 4.0, "attention_factor": 0.8, "beta_fast": 16, "beta_slow": 2, "truncate": False},
      {"attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ),
  ],
)
def test_yarn(scaling, fields):
  given = {"type": "yarn", "original_max_position_embeddings": 8192} | scaling
  want = {"theta": 5e5, "kind": "yarn", "factor": scaling.get("factor")} | fields
  assert hf_config.from_hf(changed(rope_scaling=given)).rope == config.RopeConfig(**want)
  beside = changed(rope_scaling=given, original_max_position_embeddings=4096)
  assert hf_config.from_hf(beside).rope.original_max_position == 4096


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    {"rope_theta": 500_000, "rope_scaling": OLD_LLAMA3},
  ],
)
def test_rope_spellings_agree(rope):
  cfg = hf_config.from_hf(changed(rope_theta=..., rope_scaling=...) | rope)
  assert cfg == config.PRESETS["llama3_1b"]


@pytest.mark.parametrize(
  ("rope", "theta"),
  [
    ({}, 1e4),
    ({"rope_theta": 2e4}, 2e4),
    ({"rope_theta": 2e4, "rope_scaling": None}, 2e4),
    ({"rope_theta": 2e4, "rope_scaling": {"type": "default", "factor": 2.0}}, 2e4),
    ({"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, 2e4),
  ],
)
def test_plain_rope(rope, theta):
  cfg = hf_config.from_hf(changed(rope_theta=..., rope_scaling=...) | rope)
  assert cfg.rope == config.RopeConfig(theta=theta)


@pytest.mark.parametrize(
  ("keys", "words"),
  [
    ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
    ({"architectures": ..., "model_type": "gpt2"}, ["gpt2"]),
    ({"architectures": 3}, ["architecture 3"]),
    ({"attention_bias": "no"}, ["attention_bias", "true or false"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings"]),
    ({"sliding_window": 4096}, ["sliding_window", "131072"]),
    ({"sliding_window": "wide"}, ["sliding_window"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    ({"layer_types": 3}, ["layer_types"]),
    ({"quantization_config": {"bits": 4}}, ["an unknown method with 4 bits", "FP8"]),
    ({"quantization_config": "gptq"}, ["an unknown method"]),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["awq with 4 bits"]),
    ({"quantization_config": {"quant_method": "compressed-tensors"} | INT8}, ["(int-quantized)"]),
    (
      {"quantization_config": {"quant_method": "compressed-tensors"} | FP8 | {"config_groups": {}}},
      ["compressed-tensors"],
    ),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small"]),
    ({"num_attention_heads": 0, "head_dim": ...}, ["num_attention_heads"]),
    ({"num_attention_heads": 32.0}, ["num_attention_heads"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers"]),
    ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
    ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
    ({"num_key_value_heads": 5}, ["num_key_value_heads"]),
    ({"hidden_size": 2050, "head_dim": ...}, ["head_dim", "2050"]),
    ({"head_dim": 63}, ["head_dim", "63"]),
    ({"rope_theta": -1.0}, ["rope_theta"]),
    ({"rope_scaling": "llama3"}, ["rope", "llama3"]),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope", "yarn"]),
    ({"rope_scaling": {"type": ["linear"]}}, ["linear"]),
    ({"rope_scaling": {"type": "linear"}}, ["factor"]),
    ({"rope_scaling": {"type": "dynamic", "factor": -2.0}}, ["factor"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 32}}, ["beta_fast"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, ["truncate"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, ["rope_theta"]),
    ({"rope_scaling": LLAMA3 | {"factor": None}}, ["factor"]),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor"]),
    ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, ["part of each head"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"rope_scaling": LLAMA3 | {"type": "linear"}}, ["rope_type", "linear"]),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["factor", "8.0", "32.0"]),
  ],
)
def test_refuses_by_name(keys, words):
  refusal(words, hf_config.from_hf, changed(**keys), "folder/config.json")


def test_what_is_no_object_is_refused(tmp_path):
  refusal(["JSON object"], hf_config.from_hf, [1, 2])
  path = tmp_path / "config.json"
  refusal(["does not exist"], hf_config.read_json, path)
  for data in (b'{"a": ', b"\xff\xfe\x00"):
    path.write_bytes(data)
    refusal(["JSON"], hf_config.read_json, path)


def test_axis_sizes():
  cfg = config.PRESETS["llama3_70b"]
  assert math.prod(cfg.size(axis) for axis in "KG") == cfg.size("N") == 64
  assert cfg.size("2") == 2


@pytest.mark.parametrize(
  ("kind", "keys"),
  [
    (config.EngineConfig, {"batch_size": 0}),
    (config.EngineConfig, {"max_seq_len": 1}),
    (config.EngineConfig, {"prefill_chunk": 100}),
    (config.EngineConfig, {"dtype": "int8"}),
    (config.EngineConfig, {"attn_stats": "first"}),
    (config.EngineConfig, {"kernels": "yes"}),
    (config.EngineConfig, {"compile_cache": ""}),
    (config.EngineConfig, {"steps_per_dispatch": True}),
    (config.MeshConfig, {"model": 0}),
    (config.MeshConfig, {"data": 1.5}),
  ],
)
def test_engine_and_mesh_refuse(kind, keys):
  refusal(keys, kind, **keys)


def test_who_decodes_plainly_refuses_to_guess():
  wanted = config_file.base(checkpoint="x")
  wanted.decoding.name = "speculative"
  refusal(["config.decoding would do nothing"], config_file.resolve, wanted)
  assert config_file.resolve(wanted, ways=True).method == "speculative"


@pytest.mark.parametrize(
  ("name", "values", "words"),
  [
    ("fast", {}, "no decoding method 'fast'; choose one of: plain, adaptive"),
    ("speculative", {"drafter": "dice"}, "use 'ngram' or 'draft'"),
    ("speculative", {"length": 0}, "from 1 to 32"),
    ("speculative", {"length": 2.5}, "of type int"),
    ("speculative", {"bar": 0.7}, "leave it out"),
    ("speculative", {"drafter": "draft"}, "go together"),
    ("speculative", {"checkpoint": "draft"}, "go together"),
    ("speculative", {"ways": 3}, "has no option 'ways'; it has: drafter"),
    ("plain", {"length": 8}, "choose a method that has it with config.decoding.name: speculative"),
    ("plain", {"banana": 8}, "has no option 'banana'; it has: none"),
  ],
)
def test_decoding_options_are_checked(name, values, words):
  refusal([words], decoding.configure, name, values)
