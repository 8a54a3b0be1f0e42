"""Hugging Face's `config.json`, read into a ModelConfig and written from one.

Why: every key is used, known to be harmless, or refused by name. A key that is silently dropped gives
a model that answers wrongly.
"""

import json
from typing import Any

from entropix_jax.config import ModelConfig, RopeConfig
from entropix_jax.errors import UserError

# Keys that do not change what inference computes.
_IGNORED = frozenset(
  """
  _name_or_path architectures attention_dropout auto_map bos_token_id dtype eos_token_id
  initializer_range model_type pad_token_id torch_dtype transformers_version use_cache
  is_llama_config unsloth_fixed unsloth_version transformers.js_config _attn_implementation_autoset
  """.split()
)
# Keys that are accepted with these values only; other values need code that does not exist here.
_ONLY: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "tie_word_embeddings": (False, True, None),
  "pretraining_tp": (1, None),
  "quantization_config": (None,),
  "sliding_window": (None,),
  "rope_interleaved": (False, None),
  "partial_rotary_factor": (1.0, None),
}
# Fields of ModelConfig and of RopeConfig's scaling, and their keys in the file.
_SIZES = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "ffn": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "max_position": "max_position_embeddings",
}
_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position": "original_max_position_embeddings",
}
_HANDLED = {*_SIZES.values(), "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
  """A ModelConfig from a Hugging Face `config.json` dictionary; error messages call it `where`.

  Raises:
    UserError: not a LlamaForCausalLM, a missing key, or a key or value that is not supported.
  """
  if not isinstance(hf, dict):
    raise UserError(
      f"{where} is not a JSON object; point config.checkpoint at a Hugging Face folder."
    )
  kinds = hf.get("architectures") or []
  if "LlamaForCausalLM" not in kinds:
    found = ", ".join(map(str, kinds)) or str(hf.get("model_type", "none"))
    raise UserError(
      f"{where} describes the architecture {found}; only LlamaForCausalLM checkpoints are supported."
    )
  for key, allowed in _ONLY.items():
    if key in hf and hf[key] not in allowed:
      raise UserError(
        f"{where} sets {key} to {hf[key]!r}, which is not supported; it must be {allowed[0]!r}."
      )
  unknown = sorted(set(hf) - _HANDLED - _IGNORED - set(_ONLY))
  if unknown:
    raise UserError(
      f"{where} has the attribute {unknown[0]!r}, which this engine does not know; "
      "use a plain Llama checkpoint, or add support in entropix_jax/checkpoints/hf_config.py."
    )

  heads = _positive(hf, "num_attention_heads", where, int)
  width = _positive(hf, "hidden_size", where, int)
  if hf.get("head_dim") is None and width % heads:
    raise UserError(
      f"{where} has no head_dim, and hidden_size {width} is not a multiple of {heads} heads; "
      "add head_dim."
    )
  usual = {"kv_heads": heads, "head_dim": width // heads}
  return ModelConfig(
    **{name: _positive(hf, key, where, int, usual.get(name)) for name, key in _SIZES.items()},
    norm_eps=_positive(hf, "rms_norm_eps", where),
    tied=bool(hf.get("tie_word_embeddings")),
    rope=_rope_from_hf(hf, where),
  )


def _positive(given: dict[str, Any], key: str, where: str, kind=float, default=None) -> Any:
  value = default if given.get(key) is None else given[key]
  if value is None:
    raise UserError(f"{where} lacks {key}; the download may be incomplete, so repeat it.")
  number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  if not number or not 0 < value < float("inf"):
    noun = "whole number" if kind is int else "number"
    raise UserError(f"{where} sets {key} to {value!r}; it must be a positive {noun}.")
  return kind(value)


def _rope_from_hf(hf: dict[str, Any], where: str) -> RopeConfig:
  # transformers 5 writes one `rope_parameters`; earlier versions write `rope_theta` and
  # `rope_scaling`, with the kind under `type`, `rope_type` or both.
  rope: dict[str, Any] = {}
  for given in (
    hf.get("rope_parameters") or {},
    hf.get("rope_scaling") or {},
    {"rope_theta": hf.get("rope_theta")},
  ):
    if not isinstance(given, dict):
      raise UserError(f"{where} has the rope settings {given!r}; they must be a JSON object.")
    for key, value in given.items():
      key = "rope_type" if key == "type" else key
      if value is not None and rope.setdefault(key, value) != value:
        raise UserError(f"{where} gives {key} as {rope[key]!r} and as {value!r}; keep one of them.")
  kind = rope.pop("rope_type", "default")
  theta = _positive(rope, "rope_theta", where, default=10_000.0)
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise UserError(f"{where} rotates only part of each head, which is not supported.")
  if kind not in ("default", "llama3"):
    raise UserError(f"{where} sets the rope type to {kind!r}; it must be 'default' or 'llama3'.")
  known = {"rope_theta", "partial_rotary_factor"}
  known |= set(_SCALING.values()) if kind == "llama3" else set()
  unknown = sorted(set(rope) - known)
  if unknown:
    raise UserError(f"{where} has {unknown[0]!r}, which rope type {kind!r} lacks; remove it.")
  if kind == "default":
    return RopeConfig(theta=theta)
  factor, low, high, original = (_positive(rope, key, where) for key in _SCALING.values())
  if low >= high:
    raise UserError(f"{where} sets low_freq_factor to {low}; it must be below high_freq_factor.")
  return RopeConfig(theta, kind, factor, low, high, int(original))


def to_hf(cfg: ModelConfig, **extra: Any) -> dict[str, Any]:
  """The `config.json` dictionary that `from_hf` reads back as `cfg`, with `extra` keys added."""
  hf: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{key: getattr(cfg, name) for name, key in _SIZES.items()},
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "tie_word_embeddings": cfg.tied,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": cfg.rope.theta,
    "rope_scaling": None,
  }
  if cfg.rope.kind == "llama3":
    scaling = {key: getattr(cfg.rope, name) for name, key in _SCALING.items()}
    hf["rope_scaling"] = {"rope_type": "llama3"} | scaling
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
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}); download it again.") from None
