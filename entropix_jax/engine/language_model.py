"""A model as an engine sees it: caches, the logits of the next token, and what rows keep for it.

`LanguageModel` is one Llama network. `decoding/joint.py` has another class with the same methods, whose
logits are mixed from several networks; the engine only calls these methods:

  networks                 the LanguageModels whose prompts are prefilled one by one
  parts(tree), join(parts) weights, caches or logits of the whole model <-> a tuple with one entry per network
  prompts(request)         the token ids that each network is fed
  cache(rows, capacity)    an empty cache
  past(rows, ...)          what each row has seen, for `logits`
  logits(...)              feed tokens
  mix(rows, logits)        one vector of logits per row, for the sampler
  finite(logits, lse_B)    whether a row's logits can be used
  request_arrays, begin, restart    the state that a row keeps for the model
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.config import EngineConfig, ModelConfig
from entropix_jax.model import kernels, kvcache, llama, sharding


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """One network: its shape, and how it runs."""

  cfg: ModelConfig
  config: EngineConfig
  mesh: jax.sharding.Mesh | None
  cache_dtype: Any  # of keys and values; int8 means quantised
  platform: str  # "cpu", "gpu" or "tpu"

  shares_prefix: ClassVar[bool] = True  # whether rows can read one copy of a common prompt
  stats: ClassVar[tuple[str, ...]] = ()  # names of the numbers that `mix` reports

  @property
  def networks(self) -> tuple["LanguageModel", ...]:
    """Itself."""
    return (self,)

  def parts(self, tree) -> tuple:
    """The weights, caches or logits of each network."""
    return (tree,)

  def join(self, parts: Sequence) -> Any:
    """The inverse of `parts`."""
    (tree,) = parts
    return tree

  def prompts(self, request) -> tuple[Sequence[int], ...]:
    """The ids that each network is fed."""
    return (request.ids,)

  # -- pure functions ------------------------------------------------------------------------

  def cache(self, rows: int, capacity: int) -> kvcache.Cache:
    """An empty cache."""
    return kvcache.init(self.cfg, rows, capacity, self.cache_dtype)

  def past(self, rows, cache, slots: int, window: int, prefix=None) -> kvcache.Past:
    """What each row has seen, with an empty recent buffer.

    Args:
      rows: the State, for its lengths; its cache is not used.
      slots: tokens per row that the recent buffer can hold.
      window: slots of the cache that attention reads.
      prefix: the cache of the prefix that rows share; None where each row has its own.
    """
    recent = kvcache.Recent.empty(self.cfg, rows.len_B.shape[0], slots, self.cache_dtype)
    shared = None if prefix is None else kvcache.SharedPrefix(prefix, rows.shared_B)
    return kvcache.Past(rows.len_B, cache, recent, shared, window)

  def forward(self, weights, token_BT, past: kvcache.Past, last_B=None):
    """`llama.forward` of this network on its mesh: (x_BTD, past, attention statistics)."""
    return llama.forward(
      self.cfg,
      weights,
      token_BT,
      past,
      last_B=last_B,
      attn_stats=self.config.attn_stats,
      mesh=self.mesh,
      own_kernels=kernels.wanted(self.config.kernels, self.platform),
    )

  def unembed(self, weights, x: jax.Array) -> jax.Array:
    """Float32 logits (B, V) or (B, T, V) of hidden rows."""
    # Without the barrier a compiler may fuse the head into statistics, law and argmax, and read the head's
    # weights three times. Without the constraint it may gather those weights on every chip (1 GB per step
    # for 8B on four), because samplers want whole rows, instead of the logits.
    logits = jax.lax.optimization_barrier(self._of_tokens(llama.unembed(weights, x)))
    rows = "B" if logits.shape[0] > 1 else "_"
    return sharding.constrain(self.mesh, logits, rows + "_" * (logits.ndim - 2) + "V")

  def _of_tokens(self, logits: jax.Array) -> jax.Array:
    """Logits with -inf at ids that stand for no token."""
    if not self.cfg.unused:
      return logits
    token_V = np.ones((self.cfg.vocab,), bool)
    token_V[list(self.cfg.unused)] = False
    n = int(token_V.sum())
    whole = token_V[:n].all()  # padding at the end needs no table
    return jnp.where(jnp.arange(self.cfg.vocab) < n if whole else token_V, logits, -jnp.inf)

  def logits(self, weights, rows, token_BT, past: kvcache.Past):
    """Feed T tokens per row: (logits_BTV, past, attention statistics); without the axis T where T is 1."""
    del rows
    B, T = token_BT.shape
    last = jnp.zeros((B,), jnp.int32) if T == 1 else jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, past, attn = self.forward(weights, token_BT, past, last)
    return self.unembed(weights, x_BTD[:, 0] if T == 1 else x_BTD), past, attn

  def mix(self, rows, logits_BV) -> tuple[jax.Array, dict[str, jax.Array], Callable]:
    """(logits_BV, statistics, commit): commit(token_B) is the rows' model state after that token."""
    return logits_BV, {}, lambda token_B: rows.model_state

  def finite(self, logits_BV: jax.Array, lse_B: jax.Array) -> jax.Array:
    """Whether no logit is NaN or +inf and one is not -inf, from the log-normaliser; (B,) bool."""
    del logits_BV
    return jnp.isfinite(lse_B)

  # -- what a row keeps for the model: nothing -------------------------------------------------

  def request_arrays(self, request) -> Any:
    """What the model must know of a request, as NumPy arrays of one row; None: shapes only."""
    del request
    return ()

  def begin(self, arrays) -> Any:
    """The model state of rows that have emitted nothing, from `request_arrays`."""
    del arrays
    return ()

  def restart(self, model_state) -> Any:
    """The model state of the same rows before their first token."""
    return model_state
