"""Hugging Face's `config.json`, read into a ModelConfig and written from one.

Why: a key that changes what a model computes and is silently dropped gives a model that answers wrongly,
so such a key is computed or refused by name. Published files also hold dozens of keys that change nothing,
and keys of other programs: `unknown` lists what is neither computed, refused nor known to be harmless.
transformers' LlamaForCausalLM ignores those, too.
"""

import json
import math
from typing import Any

from entropix_jax.config import ModelConfig, RopeConfig
from entropix_jax.errors import UserError

# Keys that do not change what inference computes: bookkeeping, training, text generation, other programs.
_HARMLESS = frozenset(
  """
  _name_or_path _model_name_or_path architectures model_type dtype torch_dtype transformers_version
  initializer_range use_cache is_llama_config unsloth_fixed unsloth_version transformers.js_config internal_version
  _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation
  _flash_attn_2_enabled use_flash_attention context_window_size prefill_chunk_size pretraining_tp
  selective_checkpoint_enabled sequence_parallel_enabled move_model_to_device gradient_checkpointing
  max_sequence_length max_seq_len seq_length n_positions model_max_length tokenizer_model_max_length
  attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout dropout use_sliding_window max_window_layers
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
  decoder_start_token_id tokenizer tokenizer_class prefix begin_suppress_tokens suppress_tokens
  return_dict return_dict_in_generate output_attentions output_hidden_states output_scores torchscript
  use_bfloat16 tf_legacy_loss is_decoder tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
  id2label label2id num_labels problem_type finetuning_task task_specific_params
  max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
  temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values forced_bos_token_id
  forced_eos_token_id exponential_decay_length_penalty
  """.split()
)
# Keys that are accepted with these values only, and what any other value asks for.
_OFF = (False, None)
_ONE = (1, None)
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
  "hidden_act": (("silu", "swish", None), "another activation"),
  "is_encoder_decoder": (_OFF, "an encoder"),
  "add_cross_attention": (_OFF, "attention to another text"),
  "pruned_heads": (({}, [], None), "layers with fewer heads"),
  "partial_rotary_factor": (_ONE, "rotation of part of each head"),
  "rotary_pct": (_ONE, "rotation of part of each head"),
  "rope_interleaved": (_OFF, "rotary pairs of neighbouring channels"),
  "position_embedding_type": (("rope", "rotary", None), "another kind of position"),
  "alibi": (_OFF, "another kind of position"),
  "no_rope_layers": (([], None), "layers without rotary embedding"),
  "use_qk_norm": (_OFF, "norms of queries and keys"),
  "qk_norm": (_OFF, "norms of queries and keys"),
  "qk_layernorm": (_OFF, "norms of queries and keys"),
  "use_parallel_residual": (_OFF, "attention and feed-forward side by side"),
  "ladder_layers": ((0, None), "layers that run beside each other"),
  "draft_vocab_size": (
    (None,),
    "a draft head for speculative decoding, which is no model by itself",
  ),
  "num_experts": ((0, 1, None), "a mixture of experts"),
  "num_local_experts": ((0, 1, None), "a mixture of experts"),
  "n_routed_experts": ((0, None), "a mixture of experts"),
  "attn_logit_softcapping": ((None,), "scores with a cap"),
  "final_logit_softcapping": ((None,), "logits with a cap"),
  "query_pre_attn_scalar": ((None,), "another scale of scores"),
  "attention_multiplier": ((None,), "another scale of scores"),
  "embedding_multiplier": (_ONE, "a scaled embedding"),
  "scale_emb": (_ONE, "a scaled embedding"),
  "residual_multiplier": (_ONE, "scaled layers"),
  "logits_scaling": (_ONE, "scaled logits"),
  "logit_scale": (_ONE, "scaled logits"),
  "compression_config": ((None,), "weights in an old format of compressed-tensors"),
}
# Fields of ModelConfig, their keys in the file and the values that stand for a missing key.
_SIZES = {
  "vocab": ("vocab_size", 32_000),
  "width": ("hidden_size", 4096),
  "ffn": ("intermediate_size", 11_008),
  "layers": ("num_hidden_layers", 32),
  "heads": ("num_attention_heads", 32),
  "kv_heads": ("num_key_value_heads", None),
  "head_dim": ("head_dim", None),
  "max_position": ("max_position_embeddings", 2048),
}
_ORIGINAL = "original_max_position_embeddings"
# Rope kind -> keys in the rope settings, named like RopeConfig's fields, but for "_embeddings".
_SCALING: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
  "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", _ORIGINAL),
}
_ROPE = ("rope_parameters", "rope_scaling")
_BOOLS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "bias")
_HANDLED = {
  *(key for key, _ in _SIZES.values()), *_ROPE, *_BOOLS, _ORIGINAL, "rms_norm_eps", "rope_theta",
  "sliding_window", "layer_types", "quantization_config",
}  # fmt: skip


def unknown(hf: dict[str, Any]) -> list[str]:
  """Attributes of a dictionary that `from_hf` reads but ignores without knowing what they mean, sorted."""
  names = {name for name, value in hf.items() if value is not None}
  names -= _HANDLED | _HARMLESS | set(_ONLY) | {"auto_map"}
  for where in _ROPE:
    given = hf.get(where) or {}
    harmless = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned"}
    kind = given.get("rope_type") or given.get("type") or "default"
    harmless |= set(_SCALING[kind])
    harmless |= {"mscale", "mscale_all_dim"} if kind == "yarn" else {_ORIGINAL}
    names |= {f"{where}.{key}" for key in given if given[key] is not None and key not in harmless}
  return sorted(names | ({"auto_map (its code is not run)"} if hf.get("auto_map") else set()))


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
  """A ModelConfig from a Hugging Face `config.json` dictionary; error messages call it `where`.

  Missing keys have the values that transformers' LlamaConfig gives them. See `unknown` for keys that are
  ignored.

  Raises:
    UserError: not a LlamaForCausalLM, no sizes at all, or a value that is wrong or asks for a computation
      that this engine does not have.
  """
  if not isinstance(hf, dict):
    raise UserError(
      f"{where} is not a JSON object; point config.checkpoint at a Hugging Face folder."
    )
  kinds = hf.get("architectures") or ()
  kinds = [str(kind) for kind in kinds] if isinstance(kinds, list | tuple) else [str(kinds)]
  llama = {"LlamaForCausalLM", "LLaMAForCausalLM"} & set(kinds)
  if not llama and (kinds or hf.get("model_type") != "llama"):
    found = ", ".join(kinds) or str(hf.get("model_type", "none"))
    raise UserError(
      f"{where} describes the architecture {found}; only LlamaForCausalLM checkpoints are supported."
    )
  if all(hf.get(key) is None for key, _ in _SIZES.values()):
    raise UserError(
      f"{where} has none of a model's sizes, such as hidden_size; the download may be incomplete, so "
      "repeat it."
    )
  for key, (allowed, meaning) in _ONLY.items():
    if key in hf and hf[key] not in allowed:
      raise UserError(
        f"{where} sets {key} to {_short(hf[key])}, which asks for {meaning}; this engine does not "
        "support that, so use another checkpoint."
      )
  _check_quantisation(hf.get("quantization_config"), where)
  for key in _BOOLS:
    if hf.get(key) not in (False, True, None):
      raise UserError(f"{where} sets {key} to {_short(hf[key])}; it must be true or false.")

  sizes = {key: _positive(hf, key, where, int, usual) for key, usual in _SIZES.values() if usual}
  heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
  if hf.get("head_dim") is None and width % heads:
    raise UserError(
      f"{where} has no head_dim, and hidden_size {width} is not a multiple of {heads} heads; "
      "add head_dim."
    )
  sizes["num_key_value_heads"] = _positive(hf, "num_key_value_heads", where, int, heads)
  sizes["head_dim"] = _positive(hf, "head_dim", where, int, width // heads)
  max_position = sizes["max_position_embeddings"]
  _check_attention(hf, max_position, where)
  return ModelConfig(
    **{name: sizes[key] for name, (key, _) in _SIZES.items()},
    norm_eps=_positive(hf, "rms_norm_eps", where, default=1e-6),
    tied=bool(hf.get("tie_word_embeddings")),
    rope=_rope_from_hf(hf, max_position, where),
    # `bias` is InternLM's name for attention_bias. Where it is wrong, tensors are missing or left over.
    attention_bias=bool(hf.get("attention_bias") or hf.get("bias")),
    mlp_bias=bool(hf.get("mlp_bias")),
  )


def _short(value: Any) -> str:
  """A value in a message."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:56]} ..."


def _positive(given: dict[str, Any], key: str, where: str, kind=float, default=None) -> Any:
  value = default if given.get(key) is None else given[key]
  if value is None:
    raise UserError(f"{where} lacks {key}; the download may be incomplete, so repeat it.")
  number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  if not number or not 1e-30 < value < 1e30:
    noun = "whole number" if kind is int else "number"
    raise UserError(f"{where} sets {key} to {_short(value)}; it must be a positive {noun}.")
  return kind(value)


def _check_attention(hf: dict[str, Any], max_position: int, where: str) -> None:
  """Raises UserError where some layers see less than the whole text before a token."""
  window = None if hf.get("use_sliding_window") is False else hf.get("sliding_window")
  if window not in _OFF and _positive(hf, "sliding_window", where, int) < max_position:
    raise UserError(
      f"{where} sets sliding_window to {window}, below its {max_position} positions; this engine attends "
      "to whole texts only, so use another checkpoint."
    )
  layers = hf.get("layer_types") or []
  if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
    raise UserError(
      f"{where} sets layer_types to {_short(layers)}; all layers must have 'full_attention'."
    )


def _check_quantisation(given: Any, where: str) -> None:
  """Raises UserError unless weights are unquantised, or FP8 in a form that `checkpoint` reads."""
  if given in ({}, None):
    return
  given = given if isinstance(given, dict) else {}
  method = given.get("quant_method")
  kind, good = str(method or "an unknown method"), method in ("fbgemm_fp8", "fp8")
  groups = given.get("config_groups")
  if method == "compressed-tensors":
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups]
    good = bool(weights) and given.get("format") == "float-quantized"
    good &= not (given.get("transform_config") or given.get("sparsity_config"))
    good &= all(
      isinstance(w, dict) and (w.get("num_bits"), w.get("type")) == (8, "float") for w in weights
    )
    kind += f" ({given.get('format', 'without a format')})"
  bits = given.get("bits") or (
    4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else 0
  )
  kind += f" with {bits} bits" if bits else ""
  if (given.get("fmt") or "e4m3") != "e4m3":
    kind, good = f"{kind} in the format {given['fmt']}", False
  if not good:
    raise UserError(
      f"{where} describes weights quantised by {_short(kind)}; use a checkpoint in bfloat16, float16, "
      "float32 or FP8 (fp8, fbgemm_fp8, or compressed-tensors with format float-quantized)."
    )


def _rope_from_hf(hf: dict[str, Any], max_position: int, where: str) -> RopeConfig:
  # transformers 5 writes one `rope_parameters`; earlier versions write `rope_theta` and
  # `rope_scaling`, with the kind under `type`, `rope_type` or both.
  rope: dict[str, Any] = {}
  for given in (*((hf.get(key) or {}) for key in _ROPE), {"rope_theta": hf.get("rope_theta")}):
    if not isinstance(given, dict):
      raise UserError(f"{where} has the rope settings {_short(given)}; they must be a JSON object.")
    for key, value in given.items():
      key = "rope_type" if key == "type" else key
      if isinstance(value, dict):
        raise UserError(
          f"{where} has rope settings for some layers ({key}), which is not supported."
        )
      if value is not None and rope.setdefault(key, value) != value:
        raise UserError(
          f"{where} gives {key} as {_short(rope[key])} and as {_short(value)}; keep one of them."
        )
  kind = rope.get("rope_type", "default")
  theta = _positive(rope, "rope_theta", where, default=10_000.0)
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise UserError(f"{where} rotates only part of each head, which is not supported.")
  if not isinstance(kind, str) or kind not in _SCALING:
    raise UserError(
      f"{where} sets the rope type to {_short(kind)}; it must be one of: {', '.join(_SCALING)}."
    )
  if kind == "default":
    return RopeConfig(theta)
  if kind in ("linear", "dynamic"):
    return RopeConfig(theta, kind, _positive(rope, "factor", where))
  # Beside the rope settings, this key takes precedence, as in transformers.
  holder = rope if hf.get(_ORIGINAL) is None else hf
  original = _positive(holder, _ORIGINAL, where, int, max_position)
  if kind == "yarn":
    return _yarn(rope, theta, original, max_position, where)
  factor, low, high = (_positive(rope, key, where) for key in _SCALING["llama3"][:3])
  if low >= high:
    raise UserError(f"{where} sets low_freq_factor to {low}; it must be below high_freq_factor.")
  return RopeConfig(theta, kind, factor, low, high, original)


def _yarn(rope: dict[str, Any], theta, original, max_position: int, where: str) -> RopeConfig:
  """arXiv:2309.00071, with the defaults of transformers."""
  factor = _positive(rope, "factor", where, default=max_position / original)
  fast = _positive(rope, "beta_fast", where, default=32.0)
  slow = _positive(rope, "beta_slow", where, default=1.0)
  truncate = rope.get("truncate", True)
  if theta <= 1 or fast <= slow or not isinstance(truncate, bool):
    raise UserError(
      f"{where} has rope settings that yarn cannot use; rope_theta must be above 1, beta_fast above "
      "beta_slow, and truncate true or false."
    )

  def mscale(weight):
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

  scale = mscale(1.0)
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    over, under = (mscale(_positive(rope, key, where)) for key in ("mscale", "mscale_all_dim"))
    scale = over / under
  scale = _positive(rope, "attention_factor", where, default=scale)
  return RopeConfig(
    theta, "yarn", factor, original_max_position=original, beta_fast=fast, beta_slow=slow,
    truncate=truncate, attention_factor=scale,
  )  # fmt: skip


def to_hf(cfg: ModelConfig, **extra: Any) -> dict[str, Any]:
  """The `config.json` dictionary that `from_hf` reads back as `cfg`, with `extra` keys added."""
  hf: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{key: getattr(cfg, name) for name, (key, _) in _SIZES.items()},
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "tie_word_embeddings": cfg.tied,
    "attention_bias": cfg.attention_bias,
    "mlp_bias": cfg.mlp_bias,
    "rope_theta": cfg.rope.theta,
    "rope_scaling": None,
  }
  kind = cfg.rope.kind
  if kind != "default":
    scaling = {key: getattr(cfg.rope, key.removesuffix("_embeddings")) for key in _SCALING[kind]}
    hf["rope_scaling"] = {"rope_type": kind} | scaling
  return hf | extra


def read_json(path) -> Any:
  """The JSON value in a file. Raises UserError when the file is missing or is not JSON."""
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist; point config.checkpoint at a Hugging Face folder."
    ) from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}); download it again.") from None
