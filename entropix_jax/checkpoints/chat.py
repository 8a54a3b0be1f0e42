"""Prompts as token ids: the Llama 3 chat format, and plain text for base models.

Why: control tokens are inserted by id and message text is encoded as ordinary text, so no message can
open or close a turn, and each prompt has exactly one BOS. This is the plain Llama 3 format: it adds no
system message or date, unlike the template that ships with Llama 3.1 and later.
"""

import re
from collections.abc import Sequence

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError

ROLES = ("system", "user", "assistant")


def encode(
  tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> list[int]:
  """Token ids of a conversation; every message, including the last, is a closed turn.

  <BOS>, then for each message <start_header> role <end_header> "\\n\\n" content <eot>. The line
  breaks are encoded separately from the content, as in Meta's reference; with Llama 3's split pattern
  the result is the same as encoding them together, since stripped content never begins with whitespace.

  Args:
    messages: {"role": one of ROLES, "content": text} each; whitespace around the text is removed.
    add_generation_prompt: end with the header of an assistant turn, for the model to complete.

  Raises:
    UserError: no messages, a wrong role, key or content, or a tokenizer without the chat tokens.
  """
  try:
    start, end, eot = (
      tokenizer.special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
  except KeyError as error:
    raise UserError(
      f"This checkpoint's tokenizer has no chat token {error}; use a plain prompt instead of a chat."
    ) from None
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise UserError("A chat must be a list of at least one message with a role and a content.")

  def header(role: str) -> list[int]:
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

  ids = [tokenizer.bos]
  for message in messages:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
      raise UserError(
        f"A chat message must have a role and a content and no other keys, not {message!r}."
      )
    if message["role"] not in ROLES:
      raise UserError(f"Unknown chat role {message['role']!r}; use one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
      raise UserError(f"The content of a chat message must be text, not {message['content']!r}.")
    ids += [*header(message["role"]), *tokenizer.encode(message["content"].strip()), eot]
  return ids + header("assistant") if add_generation_prompt else ids


def aside(tokenizer: Tokenizer, text: str, closed: bool) -> list[int]:
  """Ids that continue an answer: <eot> unless it is `closed`, the user's turn, the reply's header."""
  ids = encode(tokenizer, [{"role": "user", "content": text}])[1:]
  return ids if closed else [tokenizer.special["<|eot_id|>"], *ids]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of a text for a base model to continue: one BOS, then the unchanged text."""
  return [tokenizer.bos, *tokenizer.encode(text)]


def templated(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
  """Ids of a text in the place of {} of a template, after one BOS.

  Control tokens that the template spells are control tokens, because it comes from the config; those that the
  text spells are not.
  """
  control = {name: id for name, id in tokenizer.special.items() if id in tokenizer.control}
  names = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
  ids = []
  for piece in re.split(f"({names})", template):
    ids += [control[piece]] if piece in control else tokenizer.encode(piece.replace("{}", text))
  return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The ids that end an answer (a text, a turn or a message to a tool), in ascending order."""
  ends = (tokenizer.end_of_text, *tokenizer.ends, tokenizer.eot, tokenizer.eom)
  return tuple(sorted({id for id in ends if id is not None}))
