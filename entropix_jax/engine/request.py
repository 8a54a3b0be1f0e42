"""What a user asks for: one prompt and how it is to be continued; its checks, and its arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from entropix_jax import sampling
from entropix_jax.engine.setup import STOP_IDS, Setup
from entropix_jax.errors import UserError
from entropix_jax.model import sharding
from entropix_jax.sampling import Biases, Ids, actions, draw


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how it is to be continued."""

  ids: Sequence[int]  # the prompt, at least one token
  max_new_tokens: int = 256
  seed: int = 0
  stream: int = 0  # noise stream, modulo 2^32: tells prompts, and samples of one prompt, apart
  stop: Sequence[int] = ()  # ids that end the text; the id that ended it is reported
  stop_text: Sequence[str] = ()  # strings that end the text; the text is what stands before them
  sampler: str = ""  # which sampler of a union; "": the engine's only one, and of a union the first
  knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the sampler, by name
  actions: dict[str, Any] = dataclasses.field(default_factory=dict)  # see sampling/actions.py
  begins: bool = False  # the answer is a text of its own, such as a message, and no continuation
  # Report the most likely tokens with each token, config.engine.top_logprobs of them.
  alternatives: bool = True
  keep_stop: bool = False  # the string of `stop_text` that ends the text is part of it
  show_control: bool = False  # the text shows control tokens
  # Ids with which the answer begins, as if they had been drawn; `max_new_tokens` counts them.
  forced_ids: Sequence[int] = ()
  # Ids taken from the end of the prompt: the answer begins with their bytes, which its text leaves out (tokens/heal.py).
  held: Sequence[int] = ()
  # The prompt as each further network of a joint model is fed it (decoding/joint.py).
  beside: Sequence[Sequence[int]] = ()

  @property
  def prompt_tokens(self) -> int:
    """Tokens of the prompt; of several networks, of the longest one."""
    return max(map(len, (self.ids, *self.beside)))


def check_request(setup: Setup, request: Request) -> None:
  """Raises UserError when an engine of this setup cannot run the request; needs no weights."""
  prompts = setup.model.prompts(request)
  n = request.prompt_tokens
  if not all(map(len, prompts)):
    raise UserError("The prompt is empty; give at least one token.")
  if n >= setup.config.max_seq_len:
    raise UserError(
      f"The prompt has {n} tokens and leaves no room for an answer in "
      f"config.engine.max_seq_len={setup.config.max_seq_len}; shorten it or raise that setting."
    )
  if request.max_new_tokens < 1:
    raise UserError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.")
  if setup.limit(request) <= len(request.forced_ids):
    raise UserError(
      f"The answer begins with {len(request.forced_ids)} forced tokens, which leaves no room for more; raise "
      "max_new_tokens or config.engine.max_seq_len, or force fewer."
    )
  if request.forced_ids and len(prompts) > 1:
    raise UserError(
      "Answers of joint models cannot begin with forced tokens; leave out forced_ids."
    )
  if len(request.stop) > STOP_IDS:
    raise UserError(
      f"A request may have {STOP_IDS} stop ids at most; this one has {len(request.stop)}."
    )
  if not all(request.stop_text):
    raise UserError("A stop string is empty and would end every text; leave it out.")
  for ids in prompts:
    _check_ids(setup, ids, "the prompt")
  _check_ids(setup, request.stop, "the stop ids")
  _check_ids(setup, request.forced_ids, "the forced ids")
  row = new_row(setup, request)
  if setup.varying is not None:
    for name in sampling.changed(sampling.kind(setup.sampler, request.sampler), request.knobs):
      if name not in setup.varying:
        name = name if name in request.knobs else name.removeprefix("q_")
        raise UserError(
          f"This engine was compiled without the knob {name!r}; leave it out, or name it in `varying`."
        )
  lists = (row.knobs, row.actions)
  for path, knob in jax.tree.leaves_with_path(lists, is_leaf=lambda x: isinstance(x, Ids | Biases)):
    if isinstance(knob, Ids | Biases):
      _check_ids(setup, knob.id_X[knob.id_X >= 0], path[-1].name)


def _check_ids(setup: Setup, ids: Sequence[int], where: str) -> None:
  """Raises UserError for an id that the model or its tokenizer does not have."""
  vocab = setup.cfg.vocab
  for i in ids:
    if not 0 <= i < vocab:
      raise UserError(f"Token id {i} in {where} is outside the model's vocabulary of {vocab}.")
  id_T = np.asarray(ids)
  for i in id_T[np.isin(id_T, setup.cfg.unused)]:
    raise UserError(f"Token id {i} in {where} stands for no token in the model's tokenizer.")


@struct.dataclass
class NewRow:
  """A request without its prompt, as NumPy arrays of one row."""

  seed_B2: Any  # uint32
  stream_B: Any  # uint32
  limit_B: Any  # int32
  stop_BE: Any  # int32; -1 where unused
  forced_B: Any  # int32; the id of the first token; -1: it is drawn
  knobs: Any  # the sampler's Config
  actions: actions.Config
  alternatives_B: Any  # bool; report the most likely tokens
  model: Any  # see `LanguageModel.request_arrays`


def new_row(setup: Setup, request: Request, forced: int = -1) -> NewRow:
  """The arrays of a request.

  Args:
    forced: the id of the first token; -1: it is drawn.

  Raises:
    UserError: a sampler, a knob, an action or a seed that cannot be used. This is the only place that checks them.
  """
  stop = [*request.stop, *[-1] * (STOP_IDS - len(request.stop))]
  return NewRow(
    **noise_key(request.seed, request.stream),
    limit_B=np.asarray([setup.limit(request)], np.int32),
    stop_BE=np.asarray([stop], np.int32),
    forced_B=np.asarray([forced], np.int32),
    knobs=sampling.arrays(sampling.row_config(setup.sampler, request.sampler, request.knobs)),
    actions=sampling.arrays(sampling.configure(actions, request.actions)),
    alternatives_B=np.asarray([request.alternatives]),
    model=setup.model.request_arrays(request),
  )


def blank_row(setup: Setup) -> NewRow:
  """A row with the shapes, dtypes and tree of every other; default knobs, no token."""
  none = np.zeros((1,), np.int32)
  return NewRow(
    seed_B2=np.zeros((1, 2), np.uint32),
    stream_B=np.zeros((1,), np.uint32),
    limit_B=none,
    stop_BE=np.full((1, STOP_IDS), -1, np.int32),
    forced_B=none - 1,
    knobs=sampling.arrays(sampling.row_config(setup.sampler, "", {})),
    actions=sampling.arrays(sampling.configure(actions, {})),
    alternatives_B=none > 0,
    model=setup.model.request_arrays(None),
  )


def noise_key(seed: int, stream: int, attempt: int | None = None) -> dict[str, np.ndarray]:
  """The words of a row's noise key, by name; see `draw.row_keys`."""
  key = {"seed_B2": np.asarray([draw.seed_words(seed)], np.uint32)}
  key["stream_B"] = np.asarray([stream % 2**32], np.uint32)
  return key if attempt is None else key | {"attempt_B": np.asarray([attempt], np.uint32)}


def pack_row(row: NewRow) -> np.ndarray:
  """bits_1X: one array takes as long to send as each of the fifty that a row consists of."""
  leaves = jax.tree.leaves(row)
  words = (x.astype(np.uint32) if x.dtype == bool else x.view(np.uint32) for x in leaves)
  return np.concatenate([x.ravel() for x in words])[None]


def unpack_row(setup: Setup, bits_1X: jax.Array) -> NewRow:
  """The arrays that `pack_row` packed."""
  leaves, tree = jax.tree.flatten(blank_row(setup))
  pieces = jax.numpy.split(bits_1X, np.cumsum([x.size for x in leaves])[:-1], axis=1)
  return jax.tree.unflatten(
    tree,
    [
      sharding.value(bits.reshape(-1, *x.shape[1:]), x.dtype)
      for bits, x in zip(pieces, leaves, strict=True)
    ],
  )
