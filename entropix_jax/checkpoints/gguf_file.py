"""GGUF files: metadata, the model that they describe, and their tensors under Hugging Face's names.

  read(path).metadata["tokenizer.ggml.tokens"]
  cfg = config(path)
  tensors(path, cfg)["model.norm.weight"].read(rows_X, cols_Y, into_XY)

Why: the gguf library takes seconds to parse a vocabulary, copies whole tensors, and does not say what is
wrong with a file, so the header is parsed here. The library dequantises the rows that are asked for.
"""

import dataclasses
import functools
import importlib
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from entropix_jax.checkpoints import hf_config, safetensors_file
from entropix_jax.config import ModelConfig, RopeConfig
from entropix_jax.errors import UserError
from entropix_jax.model import rope, weights

SUFFIX = ".gguf"
TOKENIZER = "tokenizer.gguf"  # a file's metadata in a folder that was converted from it
LIMIT = 1 << 24  # counts and lengths in a header; larger ones are damage
LONGEST = 128  # characters of a name
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# A tensor type's number in the file, its name, the weights of a block, and the bytes that hold them.
_KINDS = {
  number: (name, block, size)
  for number, name, block, size in (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2),
    (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56),
  )
}  # fmt: skip
# Metadata types as struct spells them.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Hugging Face's names, of which the files have short forms.
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}  # fmt: skip
_KEYS = {
  "block_count": "num_hidden_layers",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "context_length": "max_position_embeddings",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "rope.freq_base": "rope_theta",
  "attention.sliding_window": "sliding_window",
}
_NEEDED = list(_KEYS)[:6]
# Used below, or known not to change what is computed.
_HANDLED = {
  *_KEYS, "attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count",
  "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
  "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size",
  "tensor_data_layout",
}  # fmt: skip
_FACTORS = "rope_freqs.weight"


class Entry(NamedTuple):
  """A tensor as a header lists it."""

  kind: str  # "Q4_K"; "type 39" if it is not supported
  shape: tuple[int, ...]  # rows first, as Hugging Face has it
  begin: int  # bytes from the start of the file
  end: int


class File(NamedTuple):
  """The header of a GGUF file; not to be changed, since it is shared."""

  path: Path
  metadata: dict[str, Any]  # scalars, strings, and lists of them
  tensors: dict[str, Entry]
  end: int  # of the metadata, in bytes from the start of the file


# -- the header --------------------------------------------------------------------------------


def find(path: str | os.PathLike) -> Path | None:
  """The GGUF file that a path stands for: itself, or the only one in a folder without config.json.

  Raises:
    UserError: there are several.
  """
  path = Path(os.path.expanduser(path))
  if path.suffix == SUFFIX and path.is_file():
    return path
  if not path.is_dir() or (path / "config.json").exists():
    return None
  found = sorted(path.glob(f"*{SUFFIX}"))
  if len(found) > 1:
    names = ", ".join(file.name for file in found)
    raise UserError(f"{path} holds {names}; point config.checkpoint at the file to use.")
  return found[0] if found else None


def inside(path: str | os.PathLike) -> Path | None:
  """The GGUF file whose metadata has a checkpoint's tokenizer: that of `find`, or a converted folder's."""
  path = Path(os.path.expanduser(path))
  return path / TOKENIZER if (path / TOKENIZER).is_file() else find(path)


def read(path: str | os.PathLike) -> File:
  """The header of a GGUF file; kept until the file changes.

  Raises:
    UserError: the file cannot be read, is truncated or damaged, or is not of a kind that is supported.
  """
  try:
    status = os.stat(path)
    return _read(Path(path), status.st_size, status.st_mtime_ns)
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None


class _Header:
  """Values of a file, one after the other; never more than the file can hold."""

  def __init__(self, path: Path, file: BinaryIO, size: int):
    self.path, self.file, self.size, self.at = path, file, size, 0

  def damaged(self, what: str) -> UserError:
    return UserError(f"{self.path} {what}; download it again.")

  def take(self, n: int) -> bytes:
    self.at += n
    data = self.file.read(n) if self.at <= self.size else b""
    if len(data) < n:
      raise self.damaged("is truncated in its header")
    return data

  def number(self, kind: str) -> Any:
    """A scalar; a float32 as the shortest decimal that it rounds from (1e-05)."""
    (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
    return float(str(np.float32(value))) if kind == "f" else value

  def count(self, least: int, kind: str = "Q") -> int:
    """A number of things that take at least so many bytes each."""
    n = self.number(kind)
    if n > LIMIT or n * least > self.size - self.at:
      raise self.damaged(
        f"is truncated or damaged: it says {n} at byte {self.at}, which it cannot hold"
      )
    return n

  def text(self) -> str:
    data = self.take(self.count(1))
    try:
      return data.decode()
    except UnicodeDecodeError:
      raise self.damaged(f"has text that is not UTF-8 before byte {self.at}") from None

  def value(self, key: str) -> Any:
    kind = self.number("I")
    if kind == _STRING:
      return self.text()
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    inner = self.number("I") if kind == _ARRAY else kind
    if inner == _STRING:
      return [self.text() for _ in range(self.count(8))]
    if inner not in _SCALARS or kind != _ARRAY:
      raise self.damaged(f"stores {key} as the unknown type {inner}")
    dtype = np.dtype(_SCALARS[inner]).newbyteorder("<")
    return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()


@functools.lru_cache(4)
def _read(path: Path, size: int, mtime: int) -> File:
  del mtime  # part of the key
  with open(path, "rb") as file:
    head = _Header(path, file, size)
    if head.take(4) != b"GGUF":
      raise head.damaged("is not a GGUF file")
    version = head.number("I")
    if version and version % 65536 == 0:
      raise UserError(
        f"{path} is a big-endian GGUF file; only little-endian ones are supported, so use one of those."
      )
    if version not in (2, 3):
      raise UserError(f"{path} has GGUF version {version}; only versions 2 and 3 are supported.")
    tensors, pairs = head.count(24), head.count(13)
    metadata = _unique(head, pairs, "key", lambda head, name: head.value(name))
    end = head.at
    listed = _unique(head, tensors, "tensor", _entry)
  align = metadata.get("general.alignment", 32)
  if type(align) is not int or align < 1 or align & (align - 1):
    raise head.damaged(f"sets general.alignment to {align!r:.60}, which is not a power of two")
  start, found = -(-head.at // align) * align, {}
  for name, (number, shape, offset) in listed.items():
    kind, block, each = _KINDS.get(number, (f"type {number}", 1, 0))
    if shape[-1] % block:
      raise head.damaged(f"has {name} of shape {list(shape)}, which {kind} cannot store")
    begin = start + offset
    found[name] = Entry(kind, shape, begin, begin + math.prod(shape) // block * each)
    if found[name].end > size:
      raise UserError(
        f"{path} is truncated: {name} is at bytes {begin} to {found[name].end} of {size}; "
        "download it again."
      )
  return File(path, metadata, found, end)


def _unique(head: _Header, n: int, what: str, value) -> dict[str, Any]:
  """`n` names, each with what `value` reads after it."""
  pairs: dict[str, Any] = {}
  for _ in range(n):
    name = head.text()
    if not name.isprintable() or len(name) > LONGEST:
      raise head.damaged(f"has a name before byte {head.at} that cannot be printed")
    if name in pairs:
      raise head.damaged(f"has the {what} {name} twice")
    pairs[name] = value(head, name)
  return pairs


def _entry(head: _Header, name: str) -> tuple[int, tuple[int, ...], int]:
  """(type, shape, offset from the first tensor) of a tensor."""
  axes = head.count(8, "I")
  if not 1 <= axes <= 4:
    raise head.damaged(f"gives {name} {axes} axes")
  shape = tuple(head.number("Q") for _ in range(axes))[::-1]
  return head.number("I"), shape, head.number("Q")


def header(path: Path) -> bytes:
  """A GGUF file with the same metadata and no tensors."""
  file = read(path)
  with open(path, "rb") as whole:
    head = whole.read(file.end)
  return head[:8] + bytes(8) + head[16:]


# -- the model ---------------------------------------------------------------------------------


def config(path: Path) -> ModelConfig:
  """The model that a file's metadata describes.

  Raises:
    UserError: it is part of a split file, not a Llama model, or has a setting that is not supported.
  """
  file = read(path)
  known = file.metadata
  parts = known.get("split.count", 1)
  if parts not in (0, 1):
    raise UserError(
      f"{path} is one of {parts!r:.60} parts; merge them with llama.cpp's `llama-gguf-split --merge` first."
    )
  if known.get("general.architecture") != "llama":
    raise UserError(
      f"{path} describes the architecture {known.get('general.architecture')!r:.60}; only llama is supported."
    )
  given = {key[6:]: value for key, value in known.items() if key.startswith("llama.")}
  if given.get("expert_count"):
    raise UserError(
      f"{path} has {given['expert_count']!r:.60} experts per layer; only models without experts are "
      "supported, so use one of those."
    )
  for key in sorted(given.keys() - _HANDLED):
    raise UserError(
      f"{path} sets llama.{key}, which this engine does not know; use a plain Llama model."
    )
  hf: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
  for key, name in _KEYS.items():
    if key not in given and key in _NEEDED:
      raise UserError(f"{path} lacks llama.{key}; download it again.")
    if key in given and type(given[key]) not in (int, float):
      raise UserError(f"{path} does not set llama.{key} to one number, which is not supported.")
    hf[name] = given.get(key)
  if given["block_count"] > len(file.tensors):
    raise UserError(
      f"{path} sets llama.block_count to {given['block_count']} but has only {len(file.tensors)} tensors; "
      "download it again."
    )
  embedding = file.tensors.get("token_embd.weight")
  if embedding is None:
    raise UserError(f"{path} lacks the tensor token_embd.weight; download it again.")
  hf["vocab_size"] = embedding.shape[0]
  hf["tie_word_embeddings"] = "output.weight" not in file.tensors
  for key, part in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
    if f"blk.0.{part}.bias" in file.tensors:
      hf[key] = True
  hf["rope_scaling"] = _scaling(path, given)
  cfg = hf_config.from_hf(hf, str(path))
  for key in ("attention.value_length", "rope.dimension_count"):
    if given.get(key, cfg.head_dim) != cfg.head_dim:
      raise UserError(
        f"{path} sets llama.{key} to {given[key]!r:.60}, but only {cfg.head_dim}, the size of a head, is "
        "supported; use a plain Llama model."
      )
  if _FACTORS not in file.tensors:
    return cfg
  if hf["rope_scaling"]:
    raise UserError(
      f"{path} has {_FACTORS} and llama.rope.scaling.type, but only one of them is supported; use a plain "
      "Llama model."
    )
  return dataclasses.replace(cfg, rope=_llama3(file, cfg))


def _scaling(path: Path, given: dict[str, Any]) -> dict[str, Any] | None:
  """Hugging Face's `rope_scaling`; llama.cpp multiplies yarn's own attention factor by attn_factor."""
  kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
  factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
  if kind == "none" or (kind == "linear" and factor == 1):
    return None
  scaling = {"rope_type": kind, "factor": factor}
  original, attention = (
    given.get(f"rope.scaling.{key}") for key in ("original_context_length", "attn_factor")
  )
  if kind == "yarn":
    if original:
      scaling["original_max_position_embeddings"] = original
    if attention not in (None, 1):
      own = 1 + 0.1 * math.log(factor) if isinstance(factor, float) and factor > 1 else 1
      scaling["attention_factor"] = attention * own if isinstance(attention, float) else attention
  elif attention not in (None, 1):
    raise UserError(f"{path} sets llama.rope.scaling.attn_factor, which only yarn has.")
  return scaling


def _llama3(file: File, cfg: ModelConfig) -> RopeConfig:
  """Llama 3's scaling, whose formula gives the divisors of frequencies that a file has."""
  at, size = file.tensors[_FACTORS], cfg.head_dim // 2
  if at.kind != "F32" or at.shape != (size,):
    raise UserError(
      f"{file.path} has {_FACTORS} as {at.kind} {list(at.shape)}; it must be F32 {[size]}."
    )
  divisors = np.empty(size, np.float32)
  _source(file, _FACTORS).read(np.arange(size), np.zeros(1, int), divisors[:, None])
  best = RopeConfig(cfg.rope.theta, "llama3", float(str(divisors.max())), 1.0, 4.0, 8192)
  with np.errstate(all="ignore"):
    plain, scaled = (rope.inverse_frequencies(each, cfg.head_dim) for each in (cfg.rope, best))
    same = np.allclose(scaled * divisors, plain, rtol=1e-6, atol=0)
  if not same:
    raise UserError(
      f"{file.path} has a {_FACTORS} that is not Llama 3's scaling, which is not supported."
    )
  return best


def stop_ids(path: Path) -> tuple[int, ...]:
  """The ids that end a text, a turn or a message. Raises UserError if one is not a token id."""
  ids = {}
  for name in ("eos", "eot", "eom"):
    key = f"tokenizer.ggml.{name}_token_id"
    id = read(path).metadata.get(key)
    if id is not None and (type(id) is not int or id < 0):
      raise UserError(f"{path} sets {key} to {id!r:.60}; it must be a token id.")
    ids[id] = None
  return tuple(id for id in ids if id is not None)


# -- tensors -----------------------------------------------------------------------------------


class Packed(NamedTuple):
  """A tensor of the file in Hugging Face's order of rows; types that NumPy lacks are read as float32."""

  path: Path
  kind: str
  shape: tuple[int, ...]
  begin: int
  end: int
  heads: int = 0  # whose rows the file interleaves for rotary embedding; 0: the tensor has none

  @property
  def dtype(self) -> str:
    """The dtype that `read` gives."""
    return self.kind if self.kind in PLAIN else "F32"

  def read(self, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
    """Fill `into_XY`, of `dtype`, with these rows and adjacent columns.

    Raises:
      UserError: the file is shorter than its header says, or cannot be read.
    """
    block, size = next(each[1:] for each in _KINDS.values() if each[0] == self.kind)
    width = self.shape[-1] // block if len(self.shape) > 1 else 1
    cells = np.arange(cols_Y[0] // block, cols_Y[-1] // block + 1)
    cells, first = (cols_Y, 0) if block == 1 else (cells, cols_Y[0] - cells[0] * block)
    order = slice(None)
    if self.heads:
      half = self.shape[0] // self.heads // 2
      head, inside = np.divmod(rows_X, 2 * half)
      rows_X = head * 2 * half + inside % half * 2 + inside // half
      order = np.argsort(rows_X)  # adjacent rows are one read
      rows_X = rows_X[order]
    packed = np.empty((len(rows_X), len(cells) * size), np.uint8)
    safetensors_file.read_cells(self.path, self.begin, size, width, rows_X, cells, packed)
    into_XY[order] = _unpack(self.kind, packed)[:, first : first + len(cols_Y)]


def _unpack(kind: str, packed: np.ndarray) -> np.ndarray:
  if kind in PLAIN:
    return packed.view(PLAIN[kind])
  types, quants = _library()
  with np.errstate(all="ignore"):  # scales that overflow give weights that are not finite
    return quants.dequantize(packed, types.GGMLQuantizationType[kind])


@functools.cache
def _library() -> tuple[Any, Any]:
  """The modules of gguf that hold its types and dequantise; importing them takes a quarter of a second."""
  try:
    return importlib.import_module("gguf"), importlib.import_module("gguf.quants")
  except ImportError:
    raise UserError(
      'Quantised GGUF files need the library gguf; install it with `pip install -e ".[gguf]"`.'
    ) from None


def _source(file: File, name: str, heads: int = 0) -> Packed:
  return Packed(file.path, *file.tensors[name], heads)


def _short(hf_name: str) -> str:
  """The file's name of a Hugging Face tensor."""
  stem, _, what = hf_name.rpartition(".")
  if stem in _TOP:
    return f"{_TOP[stem]}.{what}"
  _, _, layer, part = stem.split(".", 3)
  return f"blk.{layer}.{_LAYER[part]}.{what}"


def tensors(path: Path, cfg: ModelConfig) -> dict[str, Packed]:
  """Every tensor that `cfg` needs, by Hugging Face's name, after all checks that need no tensor data.

  Raises:
    UserError: names the tensor that is missing, of the wrong shape, unexpected or of an unsupported
      type; or the gguf library is needed and missing.
  """
  file = read(path)
  found, sources = file.tensors, {}
  for (_, field), hf_name in weights.sources(cfg).items():
    name, shape = _short(hf_name), weights.hf_shape(cfg, field)
    if name not in found:
      raise UserError(f"{path} lacks the tensor {name}; download it again.")
    kinds = [kind for kind, block, _ in _KINDS.values() if block == 1 or len(shape) > 1]
    if found[name].kind not in kinds:
      raise UserError(
        f"{path} stores {name} as {found[name].kind}, but only {', '.join(kinds)} are supported; use a "
        "file of another quantisation."
      )
    if found[name].shape != shape:
      raise UserError(
        f"{path} has {name} of shape {list(found[name].shape)}, but its metadata asks for {list(shape)}; "
        "download it again."
      )
    part = hf_name.split(".")[-2]
    heads = {"q_proj": cfg.heads, "k_proj": cfg.kv_heads}.get(part, 0)
    sources[hf_name] = _source(file, name, heads)
  extra = sorted(found.keys() - set(map(_short, sources)) - {_FACTORS})
  if extra:
    names = ", ".join(extra[:3]) + f" and {len(extra) - 3} more" * (len(extra) > 3)
    raise UserError(
      f"{path} has {names}, which a Llama model with this metadata does not use; use a plain Llama model."
    )
  if any(source.kind not in PLAIN for source in sources.values()):
    _library()
  return sources
