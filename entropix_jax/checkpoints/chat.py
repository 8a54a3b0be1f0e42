"""Prompts as token ids: the Llama 3 chat format, and plain text for base models.

Why: control tokens are placed by id and every word of a message is encoded as ordinary text, so no
message can open or close a turn, and there is exactly one BOS. This is the plain Llama 3 format: no
system message or date is added (the template shipped with Llama 3.1 and later writes one).
"""

from collections.abc import Sequence

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError

ROLES = ("system", "user", "assistant")


def encode(
  tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> list[int]:
  """Ids of a conversation; every message, the last one too, is a closed turn.

  <BOS>, then for each message <start_header> role <end_header> "\\n\\n" content <eot>. The line
  breaks are encoded apart from the content, as in Meta's reference; under Llama 3's split pattern
  that equals encoding them together, since stripped content does not begin with whitespace.

  Args:
    messages: {"role": one of ROLES, "content": text}; whitespace around the text is dropped.
    add_generation_prompt: end with the header of an assistant's turn, for the model to fill.

  Raises:
    UserError: no messages, another role or key, or a tokenizer without the chat tokens.
  """
  try:
    start, end, eot = (
      tokenizer.special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
  except KeyError as error:
    raise UserError(
      f"This checkpoint's tokenizer has no chat token {error}; give a plain prompt and no chat."
    ) from None
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise UserError("A chat needs a list of at least one message with a role and a content.")

  def header(role: str) -> list[int]:
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

  ids = [tokenizer.bos]
  for message in messages:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
      raise UserError(
        f"A chat message must have a role and a content and nothing else: {message!r}."
      )
    if message["role"] not in ROLES:
      raise UserError(f"Unknown chat role {message['role']!r}; use one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
      raise UserError(f"The content of a chat message must be text, not {message['content']!r}.")
    ids += [*header(message["role"]), *tokenizer.encode(message["content"].strip()), eot]
  return ids + header("assistant") if add_generation_prompt else ids


def aside(tokenizer: Tokenizer, text: str, closed: bool) -> list[int]:
  """Ids behind an answer: its end, unless it is `closed`, a user's turn, and the header of a reply."""
  ids = encode(tokenizer, [{"role": "user", "content": text}])[1:]
  return ids if closed else [tokenizer.special["<|eot_id|>"], *ids]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of a text for a base model to continue: BOS once, and the text as it is."""
  return [tokenizer.bos, *tokenizer.encode(text)]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The ids that end an answer (a text, a turn, a message to a tool), in ascending order."""
  ends = (tokenizer.end_of_text, tokenizer.eos, tokenizer.eot, tokenizer.eom)
  return tuple(sorted({id for id in ends if id is not None}))
