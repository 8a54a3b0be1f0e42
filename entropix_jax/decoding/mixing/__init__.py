"""From the raw logits of several models at one position to one vector of logits, before any sampler looks.

Why: samplers, penalties, log-probabilities and speculation see one model, however many there are. A
method looks at all of them, states one vector, and changes its mind only when a token is committed, as
a sampler does; the law it states is log_softmax of that vector.

A module `mixing/NAME.py` has
  MODELS     names of its models in order, the main one first; all read the same ids
  Config     a flax.struct dataclass of knobs, always traced, one a row; `sampling.configure` fills it
  RANGES     knob -> (least, most) that a user may set
  USES       optional: settings under which knobs that idle by default do something
  check      optional: check(config) raises UserError for knobs that contradict each other
  init(cfg, B) -> state                          a pytree of arrays with a leading row axis
  mix(cfg, state, view) -> Mixed                 looks, changes nothing
  commit(cfg, state, mixed, view, token_B) -> state

Three things hold for all of them [n18]. Logits go through `align` first, or a model that ends its texts
by another id has no say about the end. A law does not move with a constant added to a model's logits:
what is mixed is normalised, model by model. And a model that speaks alone speaks by its own logits, bit
for bit; what is mixed lies at the level of the mixed models, since some penalties look at it [n08].
"""

import contextlib
import importlib
import pkgutil
import unicodedata
from collections.abc import Sequence
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
  """All that a method may look at."""

  logits: tuple[jax.Array, ...]  # one (B, V) a model, float32, aligned; -inf marks excluded ids
  token_B: jax.Array  # int32; the token that was fed
  pos_B: jax.Array  # int32; index of the token to be generated in its stream; 0 is the first
  starts_V: jax.Array  # bool; see `word_tables`
  words_V: jax.Array  # int8; MARK, FUNCTION or CONTENT
  stop_BE: jax.Array  # int32; ids that end the row, -1 where unused


@flax.struct.dataclass
class Mixed:
  """What a method answers."""

  logits_BV: jax.Array  # float32; -inf where excluded
  # Worth a trace line, (B,) float32. entropy_I is model I's own, in nats; weight, where models share a
  # law, is the part that is not the main model's.
  stats: dict[str, jax.Array]
  aux: Any = ()  # what this method's commit needs and nobody else


def names() -> list[str]:
  """Every method in the folder."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
  """The method's module. Raises UserError that lists what there is."""
  if name not in names():
    raise UserError(f"There is no way to mix models {name!r}; choose one of: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")


def align(
  logits: Sequence[jax.Array],
  stops: Sequence[Sequence[int]],
  banned: Sequence[Sequence[int]],
  canonical: int,
) -> tuple[jax.Array, ...]:
  """Logits by which all models end a text with the same id and write none that they must not.

  Args:
    logits: one (..., V) a model.
    stops: the ids by which each model ends a text. Their mass moves to `canonical`; all ids that end a
      text for anybody are excluded otherwise.
    banned: ids that each model must not write, such as those of a chat template. They are excluded
      first, so what a model gives to `canonical` itself counts only if that is one of its own stops.
    canonical: the id that will end the text.

  Raises:
    UserError: an id outside the vocabulary, or another number of models.
  """
  if not len(logits) == len(stops) == len(banned):
    raise UserError(f"Give the stop ids and the banned ids of each of the {len(logits)} models.")
  V = logits[0].shape[-1]
  wrong = [i for i in {canonical}.union(*stops, *banned) if not 0 <= i < V]
  if wrong:
    raise UserError(f"The id {wrong[0]} is outside the vocabulary of {V}; stop and ban others.")
  every = np.asarray(sorted({canonical}.union(*stops)), np.int32)
  out = []
  for z, mine, never in zip(logits, stops, banned, strict=True):
    z = z.at[..., np.asarray(never, np.int32)].set(-jnp.inf)
    own = np.asarray(sorted({*mine}), np.int32)
    mass = jax.nn.logsumexp(z[..., own], axis=-1) if mine else -jnp.inf
    out.append(z.at[..., every].set(-jnp.inf).at[..., canonical].set(mass))
  return tuple(out)


# -- what methods share ------------------------------------------------------------------------


def look(view: View) -> list[metrics.Spread]:
  """Each model's log-normaliser, entropy and varentropy."""
  spreads = [metrics.spread(z_BV) for z_BV in view.logits]
  # A model that excludes every id says nothing, and must not say NaN.
  return [s.replace(lse=jnp.where(s.lse > -jnp.inf, s.lse, 0.0)) for s in spreads]


def entropies(seen: list[metrics.Spread]) -> dict[str, jax.Array]:
  """The statistics that every method reports."""
  return {f"entropy_{i}": spread.ent for i, spread in enumerate(seen)}


def normalised(z_BV: jax.Array, seen: metrics.Spread) -> jax.Array:
  """logp_BV of a model, -inf where it excludes."""
  return z_BV - col(seen.lse)


def surest(z_BV: jax.Array, seen: metrics.Spread) -> tuple[jax.Array, jax.Array]:
  """(id_B, p_B) of a model's likeliest token."""
  return best_id(z_BV), jnp.exp(jnp.max(z_BV, axis=-1) - seen.lse)


def plausible(z_BV: jax.Array, cut) -> jax.Array:
  """keep_BV: ids at least `cut` times as likely as the likeliest (arXiv:2210.15097); 0 keeps all."""
  floor_B1 = jnp.max(z_BV, axis=-1, keepdims=True) + jnp.log(col(cut))
  return (z_BV >= floor_B1) & (z_BV > -jnp.inf)


def leaning(logp_BV: jax.Array, other_BV: jax.Array) -> jax.Array:
  """log p - log q; 0, no opinion, where either excludes the id and the difference is no number."""
  both_BV = (logp_BV > -jnp.inf) & (other_BV > -jnp.inf)
  return jnp.where(both_BV, logp_BV - other_BV, 0.0)


# -- words -------------------------------------------------------------------------------------

MARK, FUNCTION, CONTENT = range(3)

# Closed classes of English: what holds a sentence together, and not what it is about.
FUNCTION_WORDS = frozenset(
  """
  a an the this that these those such what which whose whatever whichever each every either neither
  both all any some no none few many much more most less least several enough other another same own
  i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its
  itself we us our ours ourselves they them their theirs themselves one ones who whom whoever someone
  somebody something anyone anybody anything everyone everybody everything nobody nothing
  about above across after against along among around as at before behind below beneath beside besides
  between beyond by despite down during except for from in inside into like near of off on onto out
  outside over past per since than through throughout to toward towards under underneath until up upon
  via with within without
  and but or nor so yet if because although though unless while whereas whether when whenever where
  wherever why how then therefore thus hence however moreover furthermore also too either instead
  otherwise meanwhile still just only even not never very quite rather almost there here
  am is are was were be been being have has had having do does did doing will would shall should can
  could may might must ought need
  's 't 're 've 'm 'll 'd n't
  """.split()
)


def word_tables(tokenizer: Tokenizer, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """(starts_V, words_V) of `vocab` ids, by their bytes alone.

  words_V: MARK for punctuation, white space and control tokens; FUNCTION for English function words,
  with or without the space before; CONTENT for everything else, pieces of words and of characters too.
  starts_V: the id is a MARK or begins with white space. So text that is written without spaces has
  boundaries at its punctuation only.
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
  """begins_B: whether a word would begin here if the token were `id_B`.

  It does at the beginning of an answer, behind a MARK, and where the id itself starts one.
  """
  behind_B = view.words_V[view.token_B] == MARK
  return (view.pos_B == 0) | behind_B | view.starts_V[id_B]
