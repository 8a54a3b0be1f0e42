"""Mixing methods: the raw logits of several models at one position become one vector of logits.

Why: mixing comes before the sampler, so samplers, penalties, log-probabilities and speculation see one model,
whose law is log_softmax of the mixed logits. As in a sampler, state changes only when a token is committed.

A module `mixing/NAME.py` has
  MODELS     names of its models in order, the main one first; all have the same token ids
  Config     a flax.struct dataclass of knobs, traced, one value per row; `sampling.configure` fills it
  RANGES     knob -> (least, most) that a user may set, both included
  USES       optional: dicts of knobs under which knobs without effect by default have one (for tests)
  check      optional: check(config) raises UserError for knobs that contradict each other
  init(cfg, B) -> state                          a pytree of arrays with a leading row axis
  mix(cfg, state, view) -> Mixed                 changes nothing
  commit(cfg, state, mixed, view, token_B) -> state   after each emitted token

Three rules hold for all of them [n18]. Logits go through `align` first; otherwise a model whose texts end
with another id would have no influence on the end. Each model's logits are normalised before they are mixed,
so a constant added to them does not change the law. Where one model is used alone, its logits stay the same
bit for bit; mixed logits get the level of the models' logits, because some penalties depend on it [n08].
"""

import contextlib
import importlib
import pkgutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import metrics
from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError
from entropix_jax.rowwise import best_id, col


@flax.struct.dataclass
class View:
  """Everything a mixing method may look at."""

  logits: tuple[jax.Array, ...]  # (B, V) of each model, float32, aligned; -inf marks excluded ids
  token_B: jax.Array  # int32; the token that was fed to get the logits
  pos_B: jax.Array  # int32; index of the token to be drawn among the generated ones, from 0
  starts_V: jax.Array  # bool; see `word_tables`
  words_V: jax.Array  # int8; MARK, FUNCTION or CONTENT
  stop_BE: jax.Array  # int32; ids that end the row, -1 where unused


@flax.struct.dataclass
class Mixed:
  """What a method's `mix` returns."""

  logits_BV: jax.Array  # float32; -inf where excluded
  # Numbers for the trace, each (B,) float32. entropy_I is the entropy of model I's own law, in nats; weight
  # is the share of the law that does not come from the main model.
  stats: dict[str, jax.Array]
  aux: Any = ()  # anything that this method's own `commit` needs


def names() -> list[str]:
  """Names of all mixing methods, sorted."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
  """The module of that name. Raises UserError, which lists the names, if there is none."""
  if name not in names():
    raise UserError(f"There is no way to mix models {name!r}; choose one of: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")


def align(
  logits: Sequence[jax.Array],
  stops: Sequence[Sequence[int]],
  banned: Sequence[Sequence[int]],
  canonical: int,
) -> tuple[jax.Array, ...]:
  """The models' logits, changed so that all models end a text with the same id and emit no banned id.

  Args:
    logits: (..., V) of each model.
    stops: ids with which each model ends a text. Their probability moves to `canonical`, and every other id
      that ends a text for any model is excluded. What a model gives to `canonical` itself therefore counts
      only if that is one of its own stops.
    banned: ids that each model must not emit, such as those of a chat template; they are excluded first.
    canonical: the id that ends the text.

  Returns:
    As `logits`, with -inf at excluded ids.

  Raises:
    UserError: an id outside the vocabulary, or the arguments are for different numbers of models.
  """
  if not len(logits) == len(stops) == len(banned):
    raise UserError(f"Give the stop ids and the banned ids of each of the {len(logits)} models.")
  V = logits[0].shape[-1]
  wrong = [i for i in {canonical}.union(*stops, *banned) if not 0 <= i < V]
  if wrong:
    raise UserError(f"The id {wrong[0]} is outside the vocabulary of {V} ids; stop and ban others.")
  every = np.asarray(sorted({canonical}.union(*stops)), np.int32)
  out = []
  for z, mine, never in zip(logits, stops, banned, strict=True):
    z = z.at[..., np.asarray(never, np.int32)].set(-jnp.inf)
    own = np.asarray(sorted({*mine}), np.int32)
    mass = jax.nn.logsumexp(z[..., own], axis=-1) if mine else -jnp.inf
    out.append(z.at[..., every].set(-jnp.inf).at[..., canonical].set(mass))
  return tuple(out)


# -- what methods share ------------------------------------------------------------------------


def spreads(view: View) -> list[metrics.Spread]:
  """Each model's log-normaliser, entropy and varentropy."""
  every = [metrics.spread(z_BV) for z_BV in view.logits]
  # A model that excludes every id must not give NaN.
  return [s.replace(lse=jnp.where(s.lse > -jnp.inf, s.lse, 0.0)) for s in every]


def entropies(seen: list[metrics.Spread]) -> dict[str, jax.Array]:
  """The statistics that every method reports: entropy_I of each model, nats."""
  return {f"entropy_{i}": spread.ent for i, spread in enumerate(seen)}


def normalised(z_BV: jax.Array, seen: metrics.Spread) -> jax.Array:
  """logp_BV of one model, -inf at the ids that it excludes."""
  return z_BV - col(seen.lse)


def surest(z_BV: jax.Array, seen: metrics.Spread) -> tuple[jax.Array, jax.Array]:
  """(id_B, p_B) of a model's most likely token."""
  return best_id(z_BV), jnp.exp(jnp.max(z_BV, axis=-1) - seen.lse)


def plausible(z_BV: jax.Array, cut) -> jax.Array:
  """keep_BV: ids at least `cut` times as likely as the most likely one (arXiv:2210.15097); 0: all live ids."""
  floor_B1 = jnp.max(z_BV, axis=-1, keepdims=True) + jnp.log(col(cut))
  return (z_BV >= floor_B1) & (z_BV > -jnp.inf)


def leaning(logp_BV: jax.Array, other_BV: jax.Array) -> jax.Array:
  """lean_BV: log p - log q, and 0 where either model excludes the id, so that there is no difference."""
  both_BV = (logp_BV > -jnp.inf) & (other_BV > -jnp.inf)
  return jnp.where(both_BV, logp_BV - other_BV, 0.0)


# -- words -------------------------------------------------------------------------------------

MARK, FUNCTION, CONTENT = range(3)

# English function words: the closed word classes, such as articles, pronouns and prepositions.
_FILE = Path(__file__).parents[2] / "assets" / "function_words.txt"
FUNCTION_WORDS = frozenset(_FILE.read_text(encoding="utf-8").split())


def word_tables(tokenizer: Tokenizer, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """(starts_V, words_V) of the ids below `vocab`; they depend only on each id's bytes.

  words_V: int8; MARK for punctuation, white space, control tokens and unknown ids; FUNCTION for English
  function words, with or without a space before; CONTENT for all else, also parts of words and characters.
  starts_V: bool; the id is a MARK or begins with white space. Text without spaces therefore has word
  boundaries only at its punctuation.
  """
  starts_V, words_V = np.ones(vocab, bool), np.full(vocab, MARK, np.int8)
  for id in range(vocab):
    with contextlib.suppress(UserError):  # an id without a token is a MARK, like a control token
      token = tokenizer.decode_bytes([id])
      words_V[id] = _kind(token)
      starts_V[id] = words_V[id] == MARK or token[:1].isspace()
  return starts_V, words_V


def _kind(token: bytes) -> int:
  try:
    text = token.decode().strip().lower()
  except UnicodeDecodeError:
    return CONTENT
  if all(unicodedata.category(char)[0] in "PSZC" for char in text):
    return MARK
  return FUNCTION if text in FUNCTION_WORDS else CONTENT


def boundary(view: View, id_B: jax.Array) -> jax.Array:
  """begins_B: whether the next token would begin a word if it were `id_B`.

  It would at the beginning of an answer, after a MARK, and if `starts_V` says so of the id.
  """
  behind_B = view.words_V[view.token_B] == MARK
  return (view.pos_B == 0) | behind_B | view.starts_V[id_B]
