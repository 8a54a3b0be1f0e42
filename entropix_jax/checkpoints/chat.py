"""Conversations as token ids, in the checkpoint's own chat template; and plain texts for base models.

Why: a template is a Jinja program that returns one string. To keep the law that no message can open or close
a turn, the spellings of control tokens in messages are broken by a character that occurs nowhere, the string
is cut at the control tokens that the template itself wrote, and what is between them is encoded as text.

Doubt: where a template marks turns with ordinary text, as Llama 2's [INST] does, a message can spell it, and no
encoding helps [n31].
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropix_jax.checkpoints import gguf_file
from entropix_jax.checkpoints.hf_config import read_json
from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError, first_line, nearest

ROLES = ("system", "user", "assistant")
# For checkpoints that have Llama 3's control tokens and no template: without a date or a system message of
# its own, which the templates of Llama 3.1 and later add.
LLAMA3 = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content.strip() }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
_KEY = "tokenizer.chat_template"  # in GGUF files; further ones have ".NAME" after it
_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_HERE = (
  "\u2063answer\u2063"  # stands for an answer; templates do not touch the invisible separators
)
# What `Format.encode` sets; every other name that a template reads can be set by config.chat.
_GIVEN = frozenset(("messages", "add_generation_prompt"))


# -- templates of a checkpoint -------------------------------------------------------------------


def templates(path: str | Path) -> dict[str, str]:
  """The chat templates of a checkpoint, a folder or a .gguf file, by name; the usual one is "default".

  Raises:
    UserError: a file that holds templates cannot be read.
  """
  path = Path(path)
  if stored := gguf_file.inside(path):
    facts = gguf_file.read(stored).metadata
    keys = {
      "default": _KEY,
      **{key.removeprefix(f"{_KEY}."): key for key in facts if key.startswith(f"{_KEY}.")},
    }
    return _checked({name: facts[key] for name, key in keys.items() if key in facts}, stored)
  found: dict[str, Any] = {}
  for name in ("tokenizer_config.json", "chat_template.json"):
    if (path / name).is_file():
      known = read_json(path / name)
      known = known.get("chat_template") if isinstance(known, dict) else None
      if isinstance(known, list):
        known = {
          t["name"]: t["template"]
          for t in known
          if isinstance(t, dict) and {*t} >= {"name", "template"}
        }
        found |= known
      elif known is not None:
        found["default"] = known
  files = [path / "chat_template.jinja", *sorted(path.glob("additional_chat_templates/*.jinja"))]
  for file in files:
    if file.is_file():
      found["default" if file is files[0] else file.stem] = read(file)
  return _checked(found, path)


def _checked(found: dict[str, Any], where: Path) -> dict[str, str]:
  for name, text in found.items():
    if not isinstance(text, str):
      raise UserError(f"The chat template {name!r} of {where} is not text; download it again.")
  return {name: text for name, text in found.items() if text.strip()}


def read(path: str | Path) -> str:
  """A template in a file. Raises UserError if it cannot be read."""
  try:
    return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(f"The chat template {path} cannot be read ({error.strerror}).") from None
  except UnicodeDecodeError:
    raise UserError(f"The chat template {path} is not UTF-8 text.") from None


def choose(
  path: str | Path,
  tokenizer: Tokenizer,
  chosen: str = "",
  variables: Mapping[str, Any] | None = None,
) -> "Format | None":
  """The Format of a checkpoint; None where it has no template and lacks Llama 3's control tokens.

  Args:
    chosen: config.chat_template: a file, the name of one of the checkpoint's templates, or "".
    variables: config.chat: what the template may read besides the messages.

  Raises:
    UserError: a template that cannot be used, or a variable that it does not read.
  """
  own = templates(path)
  if chosen and chosen in own:
    source, origin = own[chosen], f"the checkpoint's chat template {chosen!r}"
  elif chosen:
    if not os.path.isfile(os.path.expanduser(chosen)) and own:
      raise UserError(
        f"config.chat_template is {chosen!r}, which is neither a file nor a template of this checkpoint; it "
        f"has: {', '.join(own)}."
      )
    source, origin = read(chosen), f"the chat template {chosen}"
  elif "default" in own:
    source, origin = own["default"], "the checkpoint's chat template"
  elif own:
    raise UserError(
      f"This checkpoint has several chat templates; choose one with config.chat_template: {', '.join(own)}."
    )
  elif all(name in tokenizer.special for name in _LLAMA3_TOKENS):
    source, origin = LLAMA3, "Llama 3's chat format, since the checkpoint has no template"
  else:
    return None
  return Format(tokenizer, source, origin, variables or {})


# -- a chat format -------------------------------------------------------------------------------


@functools.cache
def _environment():
  """Jinja2's sandbox with what templates expect, as in transformers' documentation of chat templates."""
  from jinja2 import ext, nodes, sandbox

  class Generation(ext.Extension):
    """{% generation %} marks what a trainer learns; here it changes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  def raise_exception(message):
    raise UserError(f"The chat template refuses this conversation: {str(message).rstrip('.')}.")

  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment


class Format:
  """A chat template over a tokenizer.

  Attributes:
    origin: where the template comes from, in words.
  """

  def __init__(self, tokenizer: Tokenizer, source: str, origin: str, variables: Mapping[str, Any]):
    """Args:
    variables: what the template may read besides the messages, such as a date.
    Raises UserError for a text that is no template, or a variable that it does not read.
    """
    from jinja2 import TemplateError, meta

    self.tokenizer, self.source, self.origin = tokenizer, source, origin
    self.variables = dict(variables)
    try:
      known = meta.find_undeclared_variables(_environment().parse(source))
      self._template = _environment().from_string(source)
    except (TemplateError, RecursionError) as error:
      raise UserError(f"{_capital(origin)} is no Jinja template ({first_line(error)}).") from None
    free = sorted(known - _GIVEN - _environment().globals.keys() - tokenizer.names.keys())
    for name in self.variables:
      if name not in free:
        has = ", ".join(free) or "nothing else"
        raise UserError(
          f"config.chat.{name} is nothing that {origin} reads{nearest(name, free)} It reads: {has}."
        )

  def encode(
    self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
  ) -> list[int]:
    """Token ids of a conversation. No message can add a control token.

    Args:
      messages: {"role": one of ROLES, "content": text} each.
      add_generation_prompt: end with the beginning of the assistant's turn, for the model to complete.

    Raises:
      UserError: no messages, a wrong role, key or content, or a conversation that the template refuses.
    """
    _check(messages)
    text, gap = self._render(messages, add_generation_prompt)
    return self._ids(text, gap)

  def aside(self, text: str, closed: bool) -> list[int]:
    """Ids that continue an answer: its end of turn unless it is `closed`, the user's turn, the reply's beginning."""
    turns = [("user", "?"), ("assistant", _HERE), ("user", text)]
    rendered, gap = self._render([{"role": r, "content": c} for r, c in turns], True)
    ids = self._ids(rendered.partition(_HERE)[2], gap, begins=False)
    return ids[ids.index(self.end_of_turn) + 1 :] if closed and self.end_of_turn in ids else ids

  @functools.cached_property
  def end_of_turn(self) -> int | None:
    """The control token that the template writes after an answer, perhaps after a space; None if it writes none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _HERE}]
    try:
      text, _ = self._render(turns, False)
    except UserError:
      return None
    first = self.tokenizer.spellings.match(text.partition(_HERE)[2].lstrip())
    return self.tokenizer.special[first[0]] if first else None

  def _render(self, messages: Sequence[Mapping[str, str]], more: bool) -> tuple[str, str]:
    """(the conversation as the template writes it, the character that breaks spellings in its messages)."""
    contents = [message["content"] for message in messages]
    everything = {*self.source, *"".join(contents), *str(self.variables)}
    private = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
    gap = next(chr(c) for c in private if chr(c) not in everything)
    broken = [self._broken(content, gap) for content in contents]
    text = self._written(messages, broken, more)
    # Reasoning templates look for markup such as </think> in answers, and cut them there.
    special, control = self.tokenizer.special, self.tokenizer.control
    marks = [name for name in special if special[name] not in control]
    for i, message in enumerate(messages):
      for mark in marks if message["role"] == "assistant" else ():
        content = broken[i].replace(mark[0] + gap + mark[1:], mark)
        if content != broken[i]:
          spared = [*broken[:i], content, *broken[i + 1 :]]
          other = self._written(messages, spared, more)
          if other.replace(gap, "") != text.replace(gap, ""):
            broken, text = spared, other
    return text, gap

  def _written(self, messages, contents: Sequence[str], more: bool) -> str:
    said = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
    values = self.tokenizer.names | self.variables
    try:
      return self._template.render(messages=said, add_generation_prompt=more, **values)
    except UserError:
      raise
    except Exception as error:  # whatever goes wrong in a template is an error of the template
      raise UserError(f"{_capital(self.origin)} fails ({first_line(error)}).") from None

  @functools.cached_property
  def _begun(self) -> frozenset[str]:
    """All proper beginnings of spellings of special tokens."""
    return frozenset(name[:n] for name in self.tokenizer.special for n in range(1, len(name)))

  @functools.cached_property
  def _starts(self) -> re.Pattern:
    """What matches the first character of every spelling of a special token, of overlapping ones, too."""
    return re.compile(rf"(?s)(?={self.tokenizer.spellings.pattern})(.)")

  def _broken(self, content: str, gap: str) -> str:
    """The content with `gap` in each spelling of a special token, and in the beginning of one at its end."""
    special, begun = self.tokenizer.special, self._begun
    if not {name[0] for name in special} & set(content):
      return content
    # A spelling of one character has no inside that could be broken, so the gap stands before it.
    content = self._starts.sub(
      lambda found: gap + found[2] if found[2] in special else found[2] + gap, content
    )
    end = content.rstrip()
    for n in range(min(len(end), max(map(len, begun), default=0)), 0, -1):
      if end[-n:] in begun:
        at = len(end) - n + 1
        return content[:at] + gap + content[at:]
    return content

  def _ids(self, text: str, gap: str, begins: bool = True) -> list[int]:
    """Ids of a rendered text: its control tokens, and what is between them as ordinary text."""
    tok, ids, at = self.tokenizer, [], 0
    before: tuple[bool, bool] = (False, False)
    spelt = self.tokenizer.spellings.finditer(text)
    own = (m for m in spelt if len(m[0]) > 1 or text[m.start() - 1 : m.start()] != gap)
    for found in (*own, None):
      piece = text[at : found.start() if found else None]
      trims = tok.trims.get(tok.special[found[0]], (False, False)) if found else (False, False)
      piece = piece.lstrip() if before[1] else piece
      piece = piece.rstrip() if trims[0] else piece
      if piece := piece.replace(gap, ""):
        ids += tok.encode(piece, begins and at == 0)
      if found:
        ids.append(tok.special[found[0]])
        at, before = found.end(), trims
    return ids


def _capital(text: str) -> str:
  return text[0].upper() + text[1:]


def _check(messages: Any) -> None:
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise UserError("A chat must be a list of at least one message with a role and a content.")
  for message in messages:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
      raise UserError(
        f"A chat message must have a role and a content and no other keys, not {message!r}."
      )
    if message["role"] not in ROLES:
      raise UserError(f"Unknown chat role {message['role']!r}; use one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
      raise UserError(f"The content of a chat message must be text, not {message['content']!r}.")


# -- plain text ----------------------------------------------------------------------------------


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of a text for a base model to continue: what begins a text, such as one BOS, then the unchanged text."""
  return [*tokenizer.prefix, *tokenizer.encode(text)]


def templated(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
  """Ids of a text in the place of {} of a template, after what begins a text.

  Control tokens that the template spells are control tokens, because it comes from the config; those that the
  text spells are not.
  """
  ids: list[int] = []
  for i, piece in enumerate(tokenizer.spellings.split(template)):
    if piece in tokenizer.special:
      ids.append(tokenizer.special[piece])
    elif piece:
      ids += tokenizer.encode(piece.replace("{}", text), i == 0)
  begin = list(tokenizer.prefix)
  return ids if ids[: len(begin)] == begin else [*begin, *ids]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The ids that end an answer (a text, a turn or a message to a tool), in ascending order."""
  ends = (tokenizer.end_of_text, *tokenizer.ends, tokenizer.eot, tokenizer.eom)
  return tuple(sorted({id for id in ends if id is not None}))
