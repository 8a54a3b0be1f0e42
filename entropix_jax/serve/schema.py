"""What a client may send, checked: the bodies of OpenAI's API and the extra fields of vLLM's.

A null is a field that is not there. Types are strict: true is no number and "5" is none. A field that would change
the answer and is not supported is refused; any other field that is not declared here is ignored, and reported.
"""

import functools
import reprlib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import pydantic.json_schema
from pydantic import ConfigDict, FailFast, Field

from entropix_jax.checkpoints import chat
from entropix_jax.sampling import LIST

UNSUPPORTED = "unsupported_parameter"
TOP = 20  # the most alternatives per token
# Fields of a body that are knobs of samplers -> values with which they do nothing.
KNOBS = {
  "temperature": (1,), "top_p": (1,), "top_k": (0,), "min_p": (0,), "frequency_penalty": (0,),
  "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "allowed_token_ids": ([],),
}  # fmt: skip
# Fields that clients often send and that change nothing here; the only ones that a metric counts by name.
UNUSED = frozenset(
  "metadata parallel_tool_calls prediction priority prompt_cache_key prompt_cache_retention reasoning_effort "
  "request_id safety_identifier service_tier store user verbosity".split()
)
# Fields that are not supported -> values with which they do nothing.
_REFUSED = {
  "add_generation_prompt": (True,), "audio": (), "bad_words": ([],), "chat_template": ("",),
  "chat_template_kwargs": ({},), "continue_final_message": (False,), "documents": ([],),
  "function_call": ("none",), "functions": ([],), "guided_choice": ([],), "guided_grammar": ("",),
  "guided_json": (), "guided_regex": ("",), "logprob_token_ids": ([],), "min_tokens": (0,),
  "modalities": (["text"],), "prompt_logprobs": (), "suffix": ("",), "tools": ([],),
  "truncate_prompt_tokens": (), "use_beam_search": (False,), "web_search_options": (),
}  # fmt: skip
_INT64 = {"ge": -(2**63), "le": 2**63 - 1}
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring = 2, 60


class RequestError(Exception):
  """Why a request gets an error instead of an answer.

  Args:
    param: the field that is wrong; None where there is none.
    code: what programs tell errors apart by.
  """

  def __init__(
    self, message: str, param: str | None = None, code: str | None = None, status: int = 400
  ):
    super().__init__(message)
    self.message, self.param, self.code, self.status = message, param, code, status


Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], FailFast()]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Body(pydantic.BaseModel):
  model_config = ConfigDict(strict=True, extra="allow")

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_nulls(cls, values):
    if isinstance(values, dict):
      return {name: value for name, value in values.items() if value is not None}
    return values


class StreamOptions(_Body):
  """What chunks carry besides text."""

  include_usage: bool = False  # one more chunk at the end, with the usage
  continuous_usage_stats: bool = False  # the usage so far in each chunk


class Entropix(_Body):
  """The fields that only this server has."""

  model_config = ConfigDict(extra="forbid")
  sampler: str | None = None
  params: dict[str, Any] = {}  # knobs of the sampler
  trace: Literal["none", "metrics", "full", "lines"] = "none"  # lines: as in a trace file
  # Ids with which the answer begins, as if they had been drawn; it holds what comes after them.
  forced_ids: Annotated[list[Id], FailFast()] = []
  sample: int = Field(
    0, ge=0, lt=2**31
  )  # whose noise the first text has, among samples of a prompt
  group: dict[str, Any] | None = None  # {"method": a method of decoding/, its options}
  heal: bool | None = (
    None  # the prompt of a completion may end inside a word; None: as config.heal says
  )


class JsonSchema(_Body):
  """A schema that the answer must follow."""

  model_config = ConfigDict(extra="forbid")
  name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
  description: str = ""
  schema_: dict[str, Any] = Field(alias="schema")
  strict: bool = True  # False: what cannot be enforced is ignored


class ResponseFormat(_Body):
  """OpenAI's way to say what the answer must be."""

  type: Literal["text", "json_object", "json_schema"]
  json_schema: JsonSchema | None = None

  @pydantic.model_validator(mode="after")
  def _has_schema(self):
    if (self.type == "json_schema") != (self.json_schema is not None):
      raise RequestError(
        "'response_format.json_schema' belongs to the type \"json_schema\", which needs it.",
        "response_format.json_schema",
      )
    return self


class StructuredOutputs(_Body):
  """The way of vLLM's server; one of these."""

  model_config = ConfigDict(extra="forbid")
  regex: str = ""
  choice: Annotated[list[str], FailFast()] = []
  grammar: str = ""
  json_: dict[str, Any] | str = Field("", alias="json")


class _Generation(_Body):
  """What chats and completions share."""

  model: str | None = None
  n: int = Field(1, ge=1)
  seed: int | None = Field(None, **_INT64)
  stop: Annotated[list[str], FailFast()] = []
  stream: bool = False
  stream_options: StreamOptions | None = None
  max_tokens: int | None = Field(None, ge=0, lt=2**31)
  entropix: Entropix = Entropix()
  response_format: ResponseFormat | None = None
  structured_outputs: StructuredOutputs | None = None
  # Knobs; whether they are set is in `model_fields_set`.
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, ge=0, le=1)
  top_k: int = Field(0, ge=-1, lt=2**31)
  min_p: float = Field(0.0, ge=0, le=1)
  frequency_penalty: float = Field(0.0, ge=-2, le=2)
  presence_penalty: float = Field(0.0, ge=-2, le=2)
  repetition_penalty: float = Field(1.0, ge=0.01, le=100)
  logit_bias: dict[str, Bias] = Field({}, max_length=LIST)
  allowed_token_ids: Ids = Field([], max_length=LIST)
  # Fields of vLLM's server.
  stop_token_ids: Ids = []
  ignore_eos: bool = False
  include_stop_str_in_output: bool = False
  skip_special_tokens: bool = True
  return_token_ids: bool = False
  return_tokens_as_token_ids: bool = False
  cache_salt: str = ""

  @pydantic.field_validator("stop", mode="before")
  @classmethod
  def _one_stop(cls, value):
    return [value] if isinstance(value, str) else value

  @pydantic.field_validator("top_k")
  @classmethod
  def _all_are_zero(cls, value):
    return max(value, 0)

  @pydantic.field_validator("logit_bias", mode="after")
  @classmethod
  def _bias_of_ids(cls, biases):
    for key in biases:
      if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise RequestError(
          f"The key {_shown(key)} in 'logit_bias' is not a token id.",
          "logit_bias",
          "invalid_token_id",
        )
    return {int(key): bias for key, bias in biases.items()}

  @pydantic.model_validator(mode="after")
  def _agrees(self):
    if "" in self.stop:
      raise RequestError("A stop string is empty and would end every text; leave it out.", "stop")
    if self.stream_options and not self.stream:
      raise RequestError("'stream_options' needs 'stream': true.", "stream_options")
    if len(self.grammars) > 1:
      raise RequestError(
        "Only one thing may restrict the answer; leave out 'response_format' or all but one of 'structured_outputs'.",
        "structured_outputs",
      )
    return self

  @property
  def grammars(self) -> list[tuple[str, str, Any, bool]]:
    """(field, kind, value, whether lenient) of what the answer must follow, as `grammar.Grammars.find` takes them."""
    form, given = self.response_format, self.structured_outputs
    values = given.model_dump(by_alias=True, exclude_unset=True) if given else {}
    found = [(f"structured_outputs.{kind}", kind, x, False) for kind, x in values.items()]
    if form and form.type == "json_object":
      found.append(("response_format", "json", {"type": "object"}, False))
    if form and form.json_schema:
      schema = form.json_schema
      found.append(
        ("response_format.json_schema.schema", "json", schema.schema_, not schema.strict)
      )
    return found


class Chat(_Generation):
  """POST /v1/chat/completions."""

  LIST: ClassVar[str] = "messages"  # the field that holds the prompt
  messages: Any
  max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
  logprobs: bool = False
  top_logprobs: int = Field(0, ge=0, le=TOP)

  @pydantic.field_validator("messages")
  @classmethod
  def _are_messages(cls, value):
    return conversation(value)

  @pydantic.model_validator(mode="after")
  def _has_logprobs(self):
    if self.top_logprobs and not self.logprobs:
      raise RequestError("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if self.max_tokens == 0:
      raise RequestError("'max_tokens' must be at least 1.", "max_tokens")
    return self

  @property
  def alternatives(self) -> int | None:
    """The number of alternatives asked per token; None: no log-probabilities."""
    return self.top_logprobs if self.logprobs else None

  @property
  def most(self) -> int | None:
    """The most tokens to generate; None: not said."""
    return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Completion(_Generation):
  """POST /v1/completions."""

  LIST: ClassVar[str] = "prompt"
  prompt: Any
  echo: bool = False
  best_of: int | None = None
  logprobs: int | None = Field(None, ge=0, le=TOP)
  add_special_tokens: bool = True

  @pydantic.field_validator("prompt")
  @classmethod
  def _are_prompts(cls, value):
    return prompts(value)

  @pydantic.model_validator(mode="after")
  def _can_be_done(self):
    if self.best_of not in (None, self.n):
      raise RequestError("'best_of' is supported only where it equals 'n'.", "best_of", UNSUPPORTED)
    if self.max_tokens == 0 and not self.echo:
      raise RequestError(
        "'max_tokens' is 0, which needs 'echo': true; set it to 1 at least.", "max_tokens"
      )
    return self

  @property
  def alternatives(self) -> int | None:
    """The number of alternatives asked per token; None: no log-probabilities."""
    return self.logprobs

  @property
  def most(self) -> int | None:
    """The most tokens to generate; None: not said."""
    return self.max_tokens


class Tokenize(_Body):
  """POST /tokenize: a text or a conversation."""

  model: str | None = None
  prompt: str | None = None
  messages: Any = None
  add_special_tokens: bool = True
  return_token_strs: bool = False

  @pydantic.model_validator(mode="after")
  def _has_one(self):
    if (self.prompt is None) == (self.messages is None):
      raise RequestError("Give either 'prompt' or 'messages'.", "prompt")
    if self.messages is not None:
      self.messages = conversation(self.messages)
    return self


class Texts(_Body):
  """POST /v1/entropix/branches and /v1/entropix/calibrate: statistics of the tokens of some texts."""

  model: str | None = None
  params: dict[str, Any] = {}  # knobs of the sampler quadrant
  quantiles: dict[str, str] = {}  # knob -> a quantile such as "q50", for calibrate
  texts: Annotated[
    list[dict[str, list[float | int | None]]], Field(min_length=1, max_length=10_000)
  ]


class Detokenize(_Body):
  """POST /detokenize."""

  model: str | None = None
  tokens: Ids


class Score(_Body):
  """POST /v1/entropix/score: how likely each label is after a prefix and an item."""

  LIST: ClassVar[str] = "items"
  model: str | None = None
  prefix: Any  # a text or token ids; the items are of the same kind
  items: Annotated[list[Any], Field(min_length=1)]
  label_token_ids: Annotated[Ids, Field(min_length=1, max_length=1000)]
  apply_softmax: bool = False  # report probabilities among the labels, too
  item_first: bool = False  # the item stands before the prefix
  cache_salt: str = ""

  @pydantic.model_validator(mode="after")
  def _are_of_one_kind(self):
    for i, part in enumerate((*self.items, self.prefix)):
      where = f"items.{i}" if i < len(self.items) else "prefix"
      if isinstance(part, str) != isinstance(self.prefix, str) or not (
        isinstance(part, str) or _are_ids(part)
      ):
        raise RequestError(
          "'prefix' and 'items' must all be texts, or all be lists of token ids.", where
        )
    return self


def _shown(value: Any) -> str:
  """A client's value in an error, short whatever it is."""
  return _repr.repr(value)[:100]


Kind = TypeVar("Kind", bound=_Body)


def check(kind: type[Kind], values: Any) -> tuple[Kind, list[str]]:
  """(the body, names of its fields that are ignored). Raises RequestError for one that cannot be used."""
  if not isinstance(values, dict):
    raise RequestError(
      f"The body must be a JSON object, not {_shown(values)}.", code="invalid_json"
    )
  for name, neutral in _REFUSED.items():
    value = values.get(name)
    if value is not None and value not in neutral and name not in kind.model_fields:
      if name == "tools" and values.get("tool_choice") == "none":
        continue
      raise RequestError(f"{name!r} is not supported; leave it out.", name, UNSUPPORTED)
  entropix = values.get("entropix")
  if isinstance(entropix, dict):
    for name in ("speculative", "joint", "stream_id"):
      if entropix.get(name) is not None:
        raise RequestError(
          f"'entropix.{name}' is not supported yet.", f"entropix.{name}", UNSUPPORTED
        )
  try:
    body = kind.model_validate(values)
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"]))[:200]
    if first["type"] == "missing":
      raise RequestError(f"{param!r} is missing.", param) from None
    if first["type"] == "extra_forbidden":
      raise RequestError(f"There is no field {param!r}.", param) from None
    said = first["msg"][:1].lower() + first["msg"][1:]
    raise RequestError(f"{param!r} is {_shown(first['input'])}: {said}.", param) from None
  known = ("tools", "tool_choice", *_REFUSED)
  return body, [name for name in body.model_extra if name not in known]


@functools.cache
def document(version: str) -> dict[str, Any]:
  """An OpenAPI document of the routes that take a body."""
  bodies = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/entropix/score": Score,
    "/v1/entropix/branches": Texts,
    "/v1/entropix/calibrate": Texts,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
  }
  _, found = pydantic.json_schema.models_json_schema(
    [(kind, "validation") for kind in bodies.values()],
    ref_template="#/components/schemas/{model}",
  )
  answers = {"200": {"description": "The answer."}, "default": {"description": "An error."}}

  def post(kind: type[_Body]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    body = {"required": True, "content": content}
    return {"post": {"summary": kind.__doc__, "requestBody": body, "responses": answers}}

  return {
    "openapi": "3.1.0",
    "info": {"title": "entropix_jax", "version": version},
    "paths": {path: post(kind) for path, kind in bodies.items()},
    "components": {"schemas": found["$defs"]},
  }


def conversation(value: Any) -> list[dict[str, str]]:
  """Messages as `chat.Format.encode` takes them. Raises RequestError for what is no conversation."""
  if not isinstance(value, list) or not value:
    raise RequestError("'messages' must be a list of at least one message.", "messages")
  messages = []
  for i, message in enumerate(value):
    where = f"messages.{i}"
    if not isinstance(message, dict):
      raise RequestError("A message must be an object with a role and a content.", where)
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if role not in chat.ROLES:
      code = UNSUPPORTED if role in ("tool", "function") else None
      raise RequestError(
        f"The role {_shown(role)} is not supported; use developer, system, user or assistant.",
        f"{where}.role",
        code,
      )
    for name in ("tool_calls", "function_call", "audio"):
      if message.get(name):
        raise RequestError(
          f"{name!r} in a message is not supported.", f"{where}.{name}", UNSUPPORTED
        )
    if content is None and role == "assistant":
      content = ""
    if isinstance(content, list):
      content = "".join(_text_of(part, f"{where}.content.{j}") for j, part in enumerate(content))
    if not isinstance(content, str):
      raise RequestError("The content of a message must be text.", f"{where}.content")
    messages.append({"role": role, "content": content})
  return messages


def _text_of(part: Any, where: str) -> str:
  """The text of a part of a message."""
  if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
    return part["text"]
  kind = part.get("type") if isinstance(part, dict) else part
  code = UNSUPPORTED if isinstance(kind, str) and kind != "text" else None
  raise RequestError(
    f"The part {_shown(kind)} of a message is not supported; use text.", where, code
  )


def prompts(value: Any) -> list[str | list[int]]:
  """The prompts of the four forms that a prompt may have. Raises RequestError for anything else."""
  if isinstance(value, str) or _are_ids(value):
    return [value]
  texts = isinstance(value, list) and all(isinstance(x, str) for x in value)
  if value and (texts or (isinstance(value, list) and all(map(_are_ids, value)))):
    return value
  raise RequestError(
    "'prompt' must be a text, a list of texts, a list of token ids, or a list of such lists, none of them empty.",
    "prompt",
  )


def _are_ids(value: Any) -> bool:
  """Whether it is a list of integers, none of them a boolean."""
  return isinstance(value, list) and {*map(type, value)} == {int}
