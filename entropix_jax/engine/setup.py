"""The setup of an engine: everything static, from which the shapes of all its programs follow."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from entropix_jax import metrics, sampling
from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.engine.language_model import LanguageModel
from entropix_jax.errors import UserError
from entropix_jax.model import sharding

STOP_IDS = 32  # E: stop ids that a request may have
LIFTS = 32  # C: ids whose logits a mask may change
_PREFILL_LEAST, _WINDOW_LEAST = 64, 128
CHEAP_WINDOW = 512  # reading so many slots costs little beside reading the weights


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """A model, a sampler, and how many rows of which length run in which precision on which devices."""

  model: Any  # a LanguageModel, or an object with its methods (decoding/joint.py)
  sampler: Any  # a module of `entropix_jax.sampling`, or a union of some (sampling/_union.py)
  config: EngineConfig
  mesh_config: MeshConfig
  mesh: jax.sharding.Mesh | None  # None: one device
  dtype: Any  # of weights and activations
  platform: str  # "cpu", "gpu" or "tpu"
  # A prompt that several rows continue is shared from this many tokens on, and copied for each row below: a
  # separate piece of attention costs more than reading a short prompt several times. None: never shared.
  share_from: int | None = _WINDOW_LEAST
  least_window: int = _WINDOW_LEAST  # attention never reads fewer slots
  # Whether a dispatch may leave out the rows of the last slots, and first tokens are drawn one row at a time. It
  # pays where rows come and go, and costs a decode program for each of `row_counts`.
  varied_rows: bool = False
  # Names of the sampler's knobs that requests may set; the others are constants in the programs, and code that
  # they leave idle is not compiled. None: all.
  varying: tuple[str, ...] | None = None
  masks: bool = False  # rows may have a mask of the ids that may come next

  @classmethod
  def create(
    cls,
    cfg: ModelConfig,
    sampler,
    config: EngineConfig,
    mesh_config: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    dtype=None,
    varying: Sequence[str] | None = None,
  ) -> "Setup":
    """The setup of one network.

    Args:
      mesh_config: one device when None.
      devices: to make the mesh of; all devices when None. With devices given, a single device is a mesh,
        too, so that programs can be compiled for a device that is not present.
      dtype: in place of `config.dtype`.
      varying: names of the knobs that requests may set, as `sampling.varying` lists them; None: all.

    Raises:
      UserError: the configuration does not fit the model or the devices.
    """
    mesh_config = mesh_config or MeshConfig()
    if config.max_seq_len > cfg.max_position:
      dynamic = ", beyond which its dynamic rope depends on the length of the text"
      raise UserError(
        f"config.engine.max_seq_len={config.max_seq_len} is beyond the {cfg.max_position} positions "
        f"of this model{dynamic * (cfg.rope.kind == 'dynamic')}; lower it."
      )
    sharding.check_divisible(cfg, mesh_config, config.batch_size)
    mesh = sharding.mesh(mesh_config, cfg, devices)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    dtype = jnp.dtype(dtype) if dtype else compute_dtype(config.dtype, platform)
    cache_dtype = jnp.dtype(jnp.int8) if config.cache == "int8" else dtype
    model = LanguageModel(cfg, config, mesh, cache_dtype, platform)
    varying = varying if varying is None else tuple(sorted(varying))
    return cls(model, sampler, config, mesh_config, mesh, dtype, platform, varying=varying)

  @property
  def cfg(self) -> ModelConfig:
    """The shape of the model; of several models, of the main one."""
    return self.model.networks[0].cfg

  # -- sizes ---------------------------------------------------------------------------------

  @functools.cached_property
  def windows(self) -> tuple[int, ...]:
    """The numbers of cache slots that attention may read: powers of two, and the capacity."""
    least, most, chunk = self.least_window, self.config.max_seq_len, self.config.prefill_chunk
    sizes = []
    size = least
    while size < most:
      sizes.append(size)
      size *= 2
    multiple = chunk if most > chunk else least
    return (*sizes, min(size, -(-most // multiple) * multiple))

  @functools.cached_property
  def row_counts(self) -> tuple[int, ...]:
    """How many rows, from the first slot on, a decode dispatch may have: all, half, a quarter and so on to one."""
    most = self.config.batch_size
    if not self.varied_rows or self.mesh_config.data > 1:
      return (most,)
    return tuple(sorted({-(-most // 2**k) for k in range(most.bit_length() + 1)}))

  @property
  def capacity(self) -> int:
    """S: slots per row."""
    return self.windows[-1]

  def window(self, n: int) -> int:
    """The smallest window that covers n slots."""
    return min(s for s in self.windows if s >= min(n, self.capacity))

  def covers(self, n: int, end: int) -> int:
    """Slots that the window of a dispatch covers for a row of n tokens that may grow to `end`.

    Up to CHEAP_WINDOW it covers the end from the beginning, so that a short text needs one decode program.
    """
    return max(n, min(end, CHEAP_WINDOW))

  def bucket(self, n: int) -> tuple[int, int]:
    """(T, S) of the prefill of an n-token prompt: tokens per call, slots of the prompt's cache."""
    chunk = self.config.prefill_chunk
    if n <= chunk:
      size = min(max(_PREFILL_LEAST, 1 << (n - 1).bit_length()), chunk)
      return size, size
    return chunk, min(s for s in self.windows if s >= n and s % chunk == 0)

  @functools.cached_property
  def pieces(self) -> tuple[int, ...]:
    """The sizes of a prompt's last piece, or of a prompt of one piece."""
    longest = min(self.config.prefill_chunk, self.config.max_seq_len)
    return tuple(sorted({self.bucket(n + 1)[0] for n in range(longest)}))

  def may_share(self, n: int) -> bool:
    """Whether rows share a prompt of n tokens instead of having a copy each."""
    return self.model.shares_prefix and self.share_from is not None and n >= self.share_from

  @property
  def mask_words(self) -> int:
    """Words of 32 bits in a mask."""
    return -(-self.cfg.vocab // 32)

  def limit(self, request) -> int:
    """Tokens that a request can get: its own limit, or what fits after the prompt."""
    return min(request.max_new_tokens, self.config.max_seq_len - request.prompt_tokens)

  # -- the sampler ----------------------------------------------------------------------------

  @property
  def top(self) -> int:
    """Alternatives reported with each token."""
    return min(self.config.top_logprobs, self.cfg.vocab)

  @functools.cached_property
  def sampler_stats(self) -> tuple[str, ...]:
    """Names of the numbers that the sampler reports, sorted; of a union, those of all its kinds."""
    return tuple(sorted(frozenset().union(*self.kind_stats.values())))

  @functools.cached_property
  def kind_stats(self) -> dict[str, frozenset[str]]:
    """Names of the numbers that each of `sampling.kinds` reports."""
    kinds = sampling.kinds(self.sampler).items()
    decide = {name: functools.partial(self._one_decision, kind) for name, kind in kinds}
    return {name: frozenset(jax.eval_shape(one).stats) for name, one in decide.items()}

  def constants(self, knobs):
    """The sampler's Config of some rows, with constants for the knobs that no request may set."""
    if self.varying is None:
      return knobs
    rows = jax.tree.leaves(knobs)[0].shape[0]
    idle = sampling.arrays(sampling.configure(self.sampler, {}), rows)
    return idle.replace(**{name: getattr(knobs, name) for name in self.varying})

  def attn_stats(self, leaf) -> metrics.AttnStats | None:
    """Attention statistics whose every field is `leaf`; None where none are measured."""
    if self.config.attn_stats == "off":
      return None
    names = (field.name for field in dataclasses.fields(metrics.AttnStats))
    return metrics.AttnStats(**dict.fromkeys(names, leaf))

  def _one_decision(self, sampler: ModuleType) -> sampling.Decision:
    cfg = sampling.arrays(sampling.configure(sampler, {}))
    zero, index = jnp.zeros((1,), jnp.float32), jnp.zeros((1,), jnp.int32)
    obs = sampling.Observation(
      logits_BV=jnp.zeros((1, self.cfg.vocab), jnp.float32),
      raw=metrics.Spread(zero, zero, zero),
      attn=self.attn_stats(zero),
      token_B=index,
      pos_B=index,
      key_B2=jnp.zeros((1, 2), jnp.uint32),
      history_BS=jnp.zeros((1, self.capacity), jnp.int32),
      len_B=index,
      stop_BE=jnp.zeros((1, STOP_IDS), jnp.int32),
    )
    return sampler.step(cfg, sampler.init(cfg, 1), obs)


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
  """The dtype that config.engine.dtype stands for; "auto": bfloat16, but float32 on a CPU [n06]."""
  if name == "auto":
    name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
  return jnp.dtype(name)
