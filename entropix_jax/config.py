"""Static configuration of a model, an engine and a mesh, as frozen, hashable dataclasses.

Why: these settings decide array shapes and programs, so they are static under `jit`. Values that may
change while the engine runs (thresholds, temperatures, seeds, limits) are arrays instead, in the
sampler's Config or in engine.Request.
"""

import dataclasses

from entropix_jax.errors import UserError

# -- the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; each kind uses the fields that `rope.inverse_frequencies` names [n05]."""

  theta: float = 500_000.0
  kind: str = "default"  # or "linear", "dynamic", "llama3", "yarn"
  factor: float = 8.0  # stretches wavelengths
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192  # tokens; the context length before scaling
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0  # multiplies cos and sin, and thus scores by its square; yarn only


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shape of a Llama-architecture decoder."""

  vocab: int
  width: int
  ffn: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  norm_eps: float = 1e-5
  tied: bool = False  # the output head is the transposed embedding
  max_position: int = 8192  # tokens; the context length that the checkpoint declares
  rope: RopeConfig = RopeConfig()
  unused: tuple[int, ...] = ()  # ids that stand for no token, such as padding; they are never drawn
  attention_bias: bool = False  # q, k, v and o have biases
  mlp_bias: bool = False  # gate, up and down have biases

  def __post_init__(self):
    for field in ("vocab", "width", "ffn", "layers", "heads", "kv_heads", "head_dim"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"Model field {field} is {value!r}; it must be a positive whole number.")
    if self.heads % self.kv_heads:
      raise UserError(
        f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
        "num_attention_heads must be a multiple of num_key_value_heads."
      )
    if self.head_dim % 2:
      raise UserError(
        f"head_dim is {self.head_dim}; rotary embedding pairs channels, so it must be even."
      )

  @property
  def groups(self) -> int:
    """G: query heads per key/value head."""
    return self.heads // self.kv_heads

  def size(self, letter: str) -> int:
    """The size of an axis by its letter in the package docstring, for letters that the model fixes."""
    if letter.isdigit():
      return int(letter)
    return {
      "V": self.vocab, "D": self.width, "F": self.ffn, "L": self.layers,
      "N": self.heads, "K": self.kv_heads, "G": self.groups, "H": self.head_dim,
      "Q": self.heads * self.head_dim, "J": self.kv_heads * self.head_dim,
    }[letter]  # fmt: skip


_LLAMA31_ROPE = RopeConfig(kind="llama3", factor=8.0)
_LLAMA32_ROPE = RopeConfig(kind="llama3", factor=32.0)

# Shapes as published in each model's config.json; a checkpoint's own config.json takes precedence.
PRESETS: dict[str, ModelConfig] = {
  "smollm2_135m": ModelConfig(
    49_152, 576, 1536, 30, 9, 3, 64, tied=True, max_position=8192, rope=RopeConfig(theta=100_000.0)
  ),
  "llama3_1b": ModelConfig(
    128_256, 2048, 8192, 16, 32, 8, 64, tied=True, max_position=131_072, rope=_LLAMA32_ROPE
  ),
  "llama3_3b": ModelConfig(
    128_256, 3072, 8192, 28, 24, 8, 128, tied=True, max_position=131_072, rope=_LLAMA32_ROPE
  ),
  "llama3_8b": ModelConfig(
    128_256, 4096, 14_336, 32, 32, 8, 128, max_position=131_072, rope=_LLAMA31_ROPE
  ),
  "llama3_70b": ModelConfig(
    128_256, 8192, 28_672, 80, 64, 8, 128, max_position=131_072, rope=_LLAMA31_ROPE
  ),
}


# -- the engine and the mesh ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How many rows run together, how long they may become, and in which precision."""

  batch_size: int = 4  # rows (slots) that decode together
  max_seq_len: int = 2048  # tokens per row, prompt and answer together
  dtype: str = "auto"  # "auto": bfloat16 on TPU and GPU, float32 on CPU [n06]
  steps_per_dispatch: int = 8  # decode steps that the device runs before the host reads results
  prefill_chunk: int = 512  # tokens; longer prompts are fed in chunks of this size
  attn_stats: str = "last"  # "last", "all" or "off": the layers whose attention is measured
  top_logprobs: int = 0  # number of most likely tokens reported with each token
  confidence: int = 0  # number of most likely tokens for confidence measures (usually 20); 0: off
  # "auto": as dtype; "int8": matrices with one scale per output channel [n12]
  weights: str = "auto"
  # "auto": as dtype; "int8": keys and values with one scale per token and head [n12]
  cache: str = "auto"
  # "auto": our kernels on NVIDIA GPUs for few rows; "on": on any device, for tests; "off": XLA's [n13]
  kernels: str = "auto"
  # what an NVIDIA GPU runs as a graph of kernels; "auto": what XLA chooses; "loops": loops, too [n02]
  graphs: str = "auto"
  # folder of compiled programs; "auto": JAX's setting, else in the user's cache folder; "off": none
  compile_cache: str = "auto"

  def __post_init__(self):
    for field in ("batch_size", "max_seq_len", "steps_per_dispatch", "prefill_chunk"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.engine.{field} is {value!r}; it must be a positive whole number.")
    if self.max_seq_len < 2:
      raise UserError(
        "config.engine.max_seq_len must be at least 2: one prompt token and one new token."
      )
    if self.prefill_chunk & (self.prefill_chunk - 1):
      raise UserError(f"config.engine.prefill_chunk is {self.prefill_chunk}; use a power of two.")
    if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
      raise UserError(
        f"config.engine.dtype is {self.dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float16'."
      )
    if self.top_logprobs not in range(33):
      raise UserError(
        f"config.engine.top_logprobs is {self.top_logprobs!r}; use a whole number from 0 to 32."
      )
    if self.confidence not in (0, *range(2, 129)):
      raise UserError(
        f"config.engine.confidence is {self.confidence!r}; use 0 or a whole number from 2 to 128."
      )
    for field in ("weights", "cache"):
      if getattr(self, field) not in ("auto", "int8"):
        raise UserError(f"config.engine.{field} is {getattr(self, field)!r}; use 'auto' or 'int8'.")
    if self.kernels not in ("auto", "on", "off"):
      raise UserError(f"config.engine.kernels is {self.kernels!r}; use 'auto', 'on' or 'off'.")
    if self.graphs not in ("auto", "loops"):
      raise UserError(f"config.engine.graphs is {self.graphs!r}; use 'auto' or 'loops'.")
    if not isinstance(self.compile_cache, str) or not self.compile_cache.strip():
      raise UserError(
        f"config.engine.compile_cache is {self.compile_cache!r}; use 'auto', 'off' or a folder."
      )
    if self.attn_stats not in ("last", "all", "off"):
      raise UserError(
        f"config.engine.attn_stats is {self.attn_stats!r}; use 'last', 'all' or 'off'."
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis: `data` splits rows; `model` splits heads, ffn and vocabulary."""

  data: int = 1
  model: int = 1

  def __post_init__(self):
    for field in ("data", "model"):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.mesh.{field} is {value!r}; it must be a positive whole number.")
