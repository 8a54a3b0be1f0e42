"""From a checked body to what the engine is asked: prompts as ids, limits, and who samples with which knobs."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from entropix_jax import decoding, sampling
from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer
from entropix_jax.engine.request import Request
from entropix_jax.engine.setup import STOP_IDS
from entropix_jax.errors import UserError, nearest
from entropix_jax.sampling import calibration, presets, quadrant
from entropix_jax.serve.exchange import Generation
from entropix_jax.serve.schema import (
  KNOBS,
  UNSUPPORTED,
  Chat,
  Completion,
  RequestError,
  Score,
  Texts,
)
from entropix_jax.serve.service import Service
from entropix_jax.session import Session

COMPLETION_TOKENS = 16  # OpenAI's default for completions


class Echo(NamedTuple):
  """What an answer shows of its prompt."""

  text: str = ""
  unseen: int = 0  # ids at the beginning that the text does not show
  # Ids at the beginning that the client did not send: they are in no array and no count.
  hidden: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
  """What a body asks for."""

  generations: list[Generation]
  echoes: list[Echo]  # of each generation
  sampler: str = ""
  seed: int = 0


def chat(session: Session, service: Service, body: Chat) -> Job:
  """The one generation of a chat. Raises RequestError or UserError."""
  ids = messages(session, body.messages)
  return _job(session, service, body, [ids], [Echo()])


def completion(
  session: Session, service: Service, body: Completion, implicit_bos: bool = False
) -> Job:
  """The generations of a completion, one for each prompt. Raises RequestError or UserError.

  Args:
    implicit_bos: prompts of ids get what begins a text, unless they have it, and the answer does not show it.
  """
  tok, prompts, echoes = session.tokenizer, [], []
  for i, prompt in enumerate(body.prompt):
    if isinstance(prompt, str):
      plain = spelt(tok, prompt)
      ids = begun(tok, plain) if body.add_special_tokens else plain
      if not ids:
        raise RequestError("A prompt is empty; give some text.", f"prompt.{i}")
      echoes.append(Echo(prompt, len(ids) - len(plain)))
    else:
      check_ids(session, prompt, "prompt")
      ids = begun(tok, prompt) if implicit_bos else prompt
      text = tok.decode(prompt, True) if body.echo else ""
      echoes.append(Echo(text, hidden=len(ids) - len(prompt)))
    prompts.append(ids)
  return _job(session, service, body, prompts, echoes)


def score(session: Session, body: Score) -> Job:
  """One generation for each item. Raises RequestError or UserError."""
  check_ids(session, body.label_token_ids, "label_token_ids")
  generations = []
  for i, item in enumerate(body.items):
    whole = item + body.prefix if body.item_first else body.prefix + item
    tok = session.tokenizer
    ids = begun(tok, spelt(tok, whole)) if isinstance(whole, str) else whole
    check_ids(session, ids, f"items.{i}")
    _room(session, ids, None, f"items.{i}")
    request = dataclasses.replace(session.request(ids, 1, 0), alternatives=False)
    labels = tuple(body.label_token_ids)
    generations.append(Generation(request, labels=labels, salt=body.cache_salt, generates=False))
  return Job(generations, [])


def branches(body: Texts) -> dict[str, Any]:
  """What /v1/entropix/branches answers. Raises RequestError or UserError."""
  values, sizes = _statistics(body)
  branch = calibration.decided(_numbers(body), values)
  names, ends = [quadrant.BRANCHES[i] for i in branch], np.cumsum(sizes).tolist()
  told = [names[end - size : end] for size, end in zip(sizes, ends, strict=True)]
  return {"branches": told, "shares": calibration.shares(branch)}


def calibrated(body: Texts) -> dict[str, Any]:
  """What /v1/entropix/calibrate answers. Raises RequestError or UserError."""
  values, _ = _statistics(body)
  at = {knob: q for knob, (_, q) in calibration.THRESHOLDS.items()}
  for knob, q in body.quantiles.items():
    if knob not in at:
      raise RequestError(
        f"{knob!r} is no threshold{nearest(knob, at)} They are: {', '.join(at)}.", "quantiles"
      )
    at[knob] = q
  try:
    shares = {knob: sampling.quantile(q) / sampling.WHOLE for knob, q in at.items()}
  except ValueError as error:
    raise RequestError(f"{error}; write q50 for the median.", "quantiles") from None
  found = {knob: float(f"{x:.4g}") for knob, x in calibration.thresholds(values, shares).items()}
  branch = calibration.decided(_numbers(body) | found, values)
  return {
    "knobs": found,
    "shares": calibration.shares(branch),
    "tokens": len(branch),
    "warning": calibration.doubt(branch, values["text"]),
  }


def _numbers(body: Texts) -> dict[str, Any]:
  """The knobs of a body. Raises RequestError where one follows each text."""
  for knob, value in body.params.items():
    if isinstance(value, str):
      raise RequestError(f"The knob {knob!r} must be a number here.", f"params.{knob}")
  return body.params


def _statistics(body: Texts) -> tuple[dict[str, np.ndarray], list[int]]:
  """(signal -> its values along all texts, tokens of each). Raises RequestError."""
  signals = [name for name in calibration.SIGNALS if all(name in text for text in body.texts)]
  sizes = [len(text.get("entropy", ())) for text in body.texts]
  for i, text in enumerate(body.texts):
    for name in ("entropy", "varentropy", *signals):
      if len(text.get(name, ())) != sizes[i] or None in text.get(name, ()):
        raise RequestError(f"Each token needs a number for {name!r}.", f"texts.{i}.{name}")
  if not sum(sizes):
    raise RequestError("The texts have no token.", "texts")
  values = {name: np.concatenate([text[name] for text in body.texts]) for name in signals}
  return values | {"text": np.repeat(np.arange(len(sizes)), sizes)}, sizes


def messages(session: Session, conversation: list[dict[str, str]]) -> list[int]:
  """Ids of a conversation. Raises RequestError where the model has no chat format, UserError where the format refuses it."""
  if session.format is None:
    raise RequestError(
      "This model continues texts and has no chat format; use the route /v1/completions.",
      "messages",
    )
  return session.encode_chat(conversation)


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of a text in which control tokens may be spelled."""
  ids: list[int] = []
  for i, piece in enumerate(tokenizer.spellings.split(text)):
    if piece in tokenizer.special:
      ids.append(tokenizer.special[piece])
    elif piece:
      ids += tokenizer.encode(piece, i == 0)
  return ids


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Ids after what begins a text, such as one BOS, unless they begin with it already."""
  begin = list(tokenizer.prefix)
  return ids if ids[: len(begin)] == begin else [*begin, *ids]


def check_ids(session: Session, ids: Sequence[int], param: str) -> None:
  """Raises RequestError for an id that stands for no token."""
  cfg = session.model.cfg
  if ids and (min(ids) < 0 or max(ids) >= cfg.vocab or not {*cfg.unused}.isdisjoint(ids)):
    wrong = next(i for i in ids if not 0 <= i < cfg.vocab or i in cfg.unused)
    raise RequestError(
      f"Token id {wrong} stands for no token of this model.", param, "invalid_token_id"
    )


def knobs(
  session: Session, offered: Sequence[str], body: Chat | Completion
) -> tuple[str, dict[str, Any]]:
  """(the sampler, its knobs) that a body asks for.

  Without a sampler or a knob of one it is the server's, as configured. Fields such as `temperature` alone
  mean the sampler "plain". Raises RequestError for knobs that the sampler lacks, or of which two are given.
  """
  settings, wanted = session.settings, body.entropix
  given = {name: getattr(body, name) for name in KNOBS if name in body.model_fields_set}
  if wanted.sampler is not None or wanted.params:
    name = wanted.sampler or settings.sampler
    chosen = {**usual(session, name), **wanted.params}
  elif given:
    name, chosen = "plain", {}
  else:
    return settings.sampler, settings.knobs
  if name not in offered:
    param = "entropix.sampler" if wanted.sampler else next(iter(given), "entropix.params")
    raise RequestError(
      f"This server does not offer the sampler {name!r}{nearest(name, offered)} It offers: {', '.join(offered)}.",
      param,
    )
  sampler = sampling.find(name)
  known = sampling.knobs(sampler)
  field_of = {"allowed" if field == "allowed_token_ids" else field: field for field in given}
  for knob, field in field_of.items():
    if knob in wanted.params:
      raise RequestError(
        f"{field!r} and 'entropix.params.{knob}' are both set; set one of them.", field
      )
    if knob in known:
      chosen[knob] = given[field]
    elif given[field] not in KNOBS[field]:
      raise RequestError(
        f"The sampler {name!r} has no knob {knob!r}; leave it out.", field, UNSUPPORTED
      )
  try:
    sampling.configure(sampler, chosen)
  except UserError as error:
    named = (field for knob, field in field_of.items() if repr(knob) in str(error))
    culprit = next(named, "entropix.params")
    raise RequestError(str(error), culprit) from None
  return name, chosen


def usual(session: Session, sampler: str) -> dict[str, Any]:
  """The knobs of a sampler that a request does not set: as configured; of another sampler, those of the preset that
  ships for the model, if it is for that sampler."""
  settings = session.settings
  if sampler == settings.sampler:
    return settings.knobs
  fitting = presets.for_model(session.model.cfg)
  preset = presets.load(fitting) if fitting else None
  return dict(preset.knobs) if preset and preset.sampler == sampler else {}


GROUPS = ("best_of_n", "branch", "cot", "deepconf")  # methods that a server has programs for


def _group(session: Session, body: Chat | Completion, guide: Any) -> tuple[str, Any]:
  """(the method that chooses among several texts, its Config); ("", None) without one. Raises RequestError."""
  wanted = body.entropix.group
  if wanted is None:
    return "", None
  where, method = "entropix.group", wanted.get("method")
  if method not in GROUPS:
    known = ", ".join(GROUPS)
    raise RequestError(f"{where!r} needs a 'method', which is one of: {known}.", where, UNSUPPORTED)
  if body.n > 1 or guide:
    raise RequestError(
      f"{where!r} gives one text, and no grammar guides it; leave out 'n' and the grammar.", where
    )
  try:
    chosen = decoding.configure(method, {k: v for k, v in wanted.items() if k != "method"})
  except UserError as error:
    raise RequestError(str(error).replace("config.decoding.", ""), where) from None
  if getattr(chosen, "confident", False) and not session.settings.engine.confidence:
    raise RequestError(
      "This rule looks at confidence, which this server does not measure; start it with "
      "--config.engine.confidence=20.",
      where,
      UNSUPPORTED,
    )
  return method, chosen


def _guide(
  service: Service, body: Chat | Completion, stop: Sequence[int], chosen: dict[str, Any]
) -> Callable[[], Any] | None:
  """What makes the guide of each text; None where nothing restricts it. Raises RequestError."""
  for field, kind, value, lenient in body.grammars:
    if service.grammars is None:
      raise RequestError(
        f"{field!r} needs the package llguidance at the server; install it there with "
        'pip install "entropix_jax[grammar]" and start the server again.',
        field,
        UNSUPPORTED,
      )
    for knob in ("allowed", "banned"):
      if chosen.get(knob):
        raise RequestError(
          f"The knob {knob!r} could leave no token that {field!r} allows; leave out one of them.",
          field,
        )
    try:
      make = functools.partial(service.grammars.find(kind, value, lenient).guide, stop)
      make().mask()  # stop ids may leave no first token
      return make
    except UserError as error:
      raise RequestError(f"{field!r} cannot be used: {error}.", field) from None
  return None


def _check_forced(session: Session, body: Chat | Completion, guide: Any) -> None:
  """Raises RequestError for ids with which the answer cannot begin."""
  where, forced = "entropix.forced_ids", body.entropix.forced_ids
  if not forced:
    return
  if body.entropix.group or body.most == 0:
    raise RequestError(
      f"{where!r} is for texts that go on; leave out the group, or ask for tokens.", where
    )
  text = StreamDecoder(session.tokenizer, stop=(*session.settings.stop, *body.stop))
  grammar = guide and guide()
  for id in forced:
    text.push(id)
    if grammar:
      try:
        grammar.push(id)
      except UserError as error:
        raise RequestError(f"{where!r} is not what the grammar allows: {error}.", where) from None
  if text.stopped or (grammar and grammar.over):
    raise RequestError(
      f"The text ends within {where!r}; leave out what comes after the end.", where
    )


def _job(
  session: Session,
  service: Service,
  body: Chat | Completion,
  prompts: Sequence[list[int]],
  echoes: list[Echo],
) -> Job:
  sampler, chosen = knobs(session, service.samplers, body)
  check_ids(session, body.allowed_token_ids, "allowed_token_ids")
  check_ids(session, list(body.logit_bias), "logit_bias")
  check_ids(session, body.stop_token_ids, "stop_token_ids")
  forced = body.entropix.forced_ids
  check_ids(session, forced, "entropix.forced_ids")
  seed = secrets.randbits(63) if body.seed is None else body.seed
  own = () if body.ignore_eos else session.stop
  stop = tuple(dict.fromkeys((*own, *body.stop_token_ids)))
  if len(stop) > STOP_IDS:
    raise RequestError(
      f"A request may have {STOP_IDS} stop ids, of which this model uses {len(own)}.",
      "stop_token_ids",
    )
  guide = _guide(service, body, stop, chosen)
  _check_forced(session, body, guide)
  method, options = _group(session, body, guide)
  is_chat, echoed = isinstance(body, Chat), getattr(body, "echo", False)
  scored = echoed and (body.alternatives is not None or body.most == 0)

  def request(ids: list[int]) -> Request:
    limit = _room(session, [*ids, *forced], body.most, body.LIST)
    if body.most is None and not is_chat:
      limit = min(limit, COMPLETION_TOKENS)
    request = session.request(ids, max(limit, 1) + len(forced), seed)
    # Of a guided text all bytes count, and nothing but the grammar decides how it goes on.
    free = {} if guide else request.actions
    return dataclasses.replace(
      request,
      forced_ids=forced,
      stream=request.stream + body.entropix.sample,
      actions=free,
      stop=stop,
      stop_text=tuple(dict.fromkeys((*request.stop_text, *body.stop))),
      knobs=chosen,
      begins=is_chat and not guide,
      sampler=sampler,
      alternatives=bool(body.alternatives or getattr(options, "alternatives", 0)),
      keep_stop=body.include_stop_str_in_output,
      show_control=not body.skip_special_tokens,
    )

  generations = [
    Generation(
      request(ids),
      samples=body.n,
      score=(body.alternatives or 0) if scored else None,
      salt=body.cache_salt,
      generates=body.most != 0,
      guide=guide,
      method=method,
      options=options,
      live=body.entropix.trace == "lines",
    )
    for ids in prompts
  ]
  return Job(generations, echoes, sampler, seed)


def _room(session: Session, ids: Sequence[int], most: int | None, param: str) -> int:
  """The most tokens that an answer may have. Raises RequestError where the prompt leaves less than `most`."""
  context = session.settings.engine.max_seq_len
  room = context - len(ids)
  if room < 1 or (most or 0) > room:
    asked = "" if most is None else f" and {most} for the answer"
    raise RequestError(
      f"This model's context has {context} tokens, and this request needs {len(ids)} for the prompt{asked}; "
      "shorten one of them.",
      param,
      "context_length_exceeded",
    )
  return room if most is None else most
