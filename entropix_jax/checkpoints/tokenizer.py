"""Text to token ids and back, and a stream of ids to text; `vocabulary.py` reads the files.

Why: all text is ordinary text. The libraries that encode it are given no control token to look for, so the
spelling of one never becomes its id, and control ids come only from code and from chat templates (chat.py).
"""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from entropix_jax.errors import UserError

# What begins and ends like a tag and has a word in it: markup, not text, whatever a file says.
_MARKUP = re.compile(r"\s*[<\[|\uff5c].*\w.*[>\]|\uff5c]\s*", re.DOTALL)


class Tokenizer:
  """Encodes ordinary text to ids, decodes ids to bytes, and knows the control tokens by name.

  Attributes:
    vocab: the largest id plus one.
    special: control tokens and other markup, spelling -> id; text never encodes to these ids.
    control: those of their ids that decoding leaves out.
    names: what chat templates call some of them: {"bos_token": "<s>", "eos_token": ...}.
    prefix: ids that begin a text, as the tokenizer's file says; often one BOS, or none.
    ends: ids that end a text according to the tokenizer's files.
    strips: whether decoding leaves out the space that begins a text, as SentencePiece does.
    trims: ids of control tokens -> whether they take the whitespace (before, after) them with them.
  """

  def __init__(
    self,
    encode: Callable[[str, bool], list[int]],
    tokens: Mapping[int, bytes],
    special: Mapping[str, int],
    *,
    hidden: Iterable[str] | None = None,
    names: Mapping[str, str] | None = None,
    ends: Sequence[str] = (),
    prefix: Sequence[int] | None = None,
    strips: bool = False,
    trims: Mapping[int, tuple[bool, bool]] | None = None,
    unknown: int | None = None,
    unwritable: Iterable[int] = (),
  ):
    """Args:
    encode: (text, whether it begins a whole text) -> ids of the ordinary text.
    tokens: ordinary tokens, id -> bytes.
    special: control and added tokens, spelling -> id.
    hidden: spellings of those that are control tokens; None: all. The others are text if they do not look
      like markup: they are matched in text, and decoding prints them.
    ends: spellings of the tokens that end a text, besides names["eos_token"].
    prefix: None: the BOS.
    unknown: id that `encode` gives for a character that it cannot write.
    unwritable: bytes that no token can write.
    Raises UserError when an id is used twice, or for a name or a prefix that is not a token.
    """
    hidden = set(special) if hidden is None else set(hidden)
    self.names = dict(names or {})
    words = {n for n in special if n not in hidden and not _MARKUP.fullmatch(n)}
    words -= {*self.names.values(), *ends}
    self._bytes = {**tokens, **{id: name.encode() for name, id in special.items()}}
    if len(self._bytes) != len(tokens) + len(special) or len({*special.values()}) != len(special):
      raise UserError("The tokenizer gives one id to two tokens; download the tokenizer again.")
    self.special = {name: id for name, id in special.items() if name not in words}
    self.control = frozenset(self.special[name] for name in self.special if name in hidden)
    self._words = {name: special[name] for name in words}
    self._split = _any_of(words) if words else None
    for name in (*self.names.values(), *ends):
      if name not in self.special:
        raise UserError(
          f"The tokenizer has no control token {name!r}, which tokenizer_config.json names; download both "
          "files again."
        )
    self.vocab = max(self._bytes, default=-1) + 1
    eos = self.names.get("eos_token")
    self.ends = tuple(dict.fromkeys(self.special[x] for x in (*filter(None, [eos]), *ends)))
    begin = () if self.bos is None else (self.bos,)
    self.prefix = begin if prefix is None else tuple(prefix)
    for id in self.prefix:
      self.token_bytes(id)
    self.strips, self.trims = strips, dict(trims or {})
    self._encode, self._unknown = encode, unknown
    self._unwritable = frozenset(unwritable)

  @functools.cached_property
  def spellings(self) -> re.Pattern:
    """What matches the spelling of a special token; the match is a group, for `split`."""
    return _any_of(self.special)

  @property
  def bos(self) -> int | None:
    """The id that is called bos_token; None where there is none."""
    return self.special.get(self.names.get("bos_token", ""))

  @property
  def end_of_text(self) -> int | None:
    """Llama 3's id that ends a text; None where the tokenizer lacks it."""
    return self.special.get("<|end_of_text|>")

  @property
  def eot(self) -> int | None:
    """Llama 3's id that ends a turn."""
    return self.special.get("<|eot_id|>")

  @property
  def eom(self) -> int | None:
    """Llama 3's id that ends a message to a tool."""
    return self.special.get("<|eom_id|>")

  def cut(self, vocab: int) -> bool:
    """Leave out control tokens whose ids are `vocab` or more; False if other tokens have such ids."""
    beyond = {name: id for name, id in self.special.items() if id >= vocab}
    if any(id >= vocab for id in self._bytes.keys() - beyond.values()):
      return False
    gone = set(beyond.values())
    self.__dict__.pop("spellings", None)
    self.special = {name: id for name, id in self.special.items() if id not in gone}
    self._bytes = {id: token for id, token in self._bytes.items() if id not in gone}
    self.names = {key: name for key, name in self.names.items() if name not in beyond}
    self.control -= gone
    self.ends, self.prefix = (
      tuple(id for id in ids if id not in gone) for ids in (self.ends, self.prefix)
    )
    self.vocab = max(self._bytes, default=-1) + 1
    return True

  def unused(self, vocab: int) -> tuple[int, ...]:
    """The ids below `vocab` that stand for no token."""
    return tuple(id for id in range(vocab) if id not in self._bytes)

  def shares_ids(self, other: "Tokenizer") -> bool:
    """Whether every id stands for the same token in both tokenizers."""
    return self._bytes == other._bytes

  def encode(self, text: str, begins: bool = True) -> list[int]:
    """Ids of `text` as ordinary text: without `prefix`, and never a control id; added words have ids of their own.

    A lone surrogate, which UTF-8 cannot encode, is read as U+FFFD.

    Args:
      begins: whether it begins a whole text; some tokenizers then put a space before it.

    Raises:
      UserError: the text has a character that this tokenizer cannot write.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if self._unwritable:
      for char in set(text):
        if self._unwritable & set(char.encode()):
          raise _unwritten(char)
    pieces = self._split.split(text) if self._split else [text]
    ids = []
    for i, piece in enumerate(pieces):
      if i % 2:
        ids.append(self._words[piece])
      elif piece:
        ids += self._encode(piece, begins and i == 0)
    if self._unknown is not None and self._unknown in ids:
      unknown = (c for c in dict.fromkeys(text) if self._unknown in self._encode(c, False))
      raise _unwritten(next(unknown, text[:20]))
    return ids

  def token_bytes(self, id: int) -> bytes:
    """The bytes of one token; for a control token, its spelling.

    Raises:
      UserError: no token has this id.
    """
    try:
      return self._bytes[int(id)]
    except KeyError:
      raise UserError(
        f"Token id {id} is not in the tokenizer, which has {len(self._bytes)} tokens; use the "
        "tokenizer that belongs to this checkpoint."
      ) from None

  def token_text(self, id: int) -> str:
    """One token in printable characters, for traces; invalid bytes and line breaks become escapes."""
    text = self.token_bytes(id).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

  def decode_bytes(self, ids: Iterable[int], show_control: bool = False) -> bytes:
    """The bytes of a sequence of ids, without control tokens unless `show_control`."""
    return b"".join(self.token_bytes(id) for id in ids if show_control or id not in self.control)

  def decode(self, ids: Iterable[int], show_control: bool = False) -> str:
    """The text of a sequence of ids, from its beginning; bytes that are not UTF-8 become U+FFFD."""
    data = self.decode_bytes(ids, show_control)
    return data.removeprefix(b" " * self.strips).decode("utf-8", "replace")


def _any_of(names: Iterable[str]) -> re.Pattern:
  """What matches any of these, the longest of those that begin at one place, as in `tokenizers`."""
  longest = sorted(names, key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest))})" if longest else "((?!))")


def _unwritten(char: str) -> UserError:
  return UserError(f"This tokenizer cannot encode the character {char!r}; leave it out.")


class StreamDecoder:
  """Decodes one row id by id: the pushes and the flush together equal `Tokenizer.decode`.

  It holds back up to three bytes, which may still become one character, and the characters that may
  still become a stop string. A complete stop string ends the text before it.

  Args:
    stop: strings that end the text; they need not begin or end at a token boundary.
    keep_stop: the string that ends the text is part of it.
    begins: whether the first id begins a text; otherwise its space belongs to the text.
    skip: bytes at the beginning that are left out.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    show_control: bool = False,
    stop: Sequence[str] = (),
    begins: bool = True,
    keep_stop: bool = False,
    skip: int = 0,
  ):
    self._tokenizer, self._skip = tokenizer, skip
    self._show_control = show_control
    self._stop, self._keep_stop = tuple(stop), keep_stop
    self._begins = begins and tokenizer.strips
    self._strips = self._begins
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._held = ""
    self.stopped = False  # a stop string was found: later pushes give no text

  def __copy__(self) -> "StreamDecoder":
    """An independent decoder in the same state."""
    twin = StreamDecoder(
      self._tokenizer, self._show_control, self._stop, self._begins, self._keep_stop
    )
    twin._utf8.setstate(self._utf8.getstate())
    twin._held, twin.stopped, twin._strips = self._held, self.stopped, self._strips
    twin._skip = self._skip
    return twin

  def push(self, id: int) -> str:
    """The text that this id completes; "" inside a character and for a hidden control token."""
    data = self._tokenizer.decode_bytes([id], self._show_control)
    if self._strips and data:
      data, self._strips = data.removeprefix(b" "), False
    if self._skip:
      data, self._skip = data[self._skip :], max(self._skip - len(data), 0)
    text = self._utf8.decode(data)
    # CPython waits for the last byte of an encoded surrogate, although it is never a character.
    held = self._utf8.getstate()[0]
    if held[:1] == b"\xed" and held[1:] >= b"\xa0":
      text += self._utf8.decode(b"", final=True)
    return self._before_stop(text) if self._stop else text

  def flush(self) -> str:
    """The text still held back at the end of a row, bytes as U+FFFD; then resets the decoder.

    Text after a stop string is dropped.
    """
    text = self._held + self._utf8.decode(b"", final=True)
    text, self._held, self.stopped = "" if self.stopped else text, "", False
    self._strips = self._begins
    return text

  def _before_stop(self, new: str) -> str:
    text, self._held = self._held + new, ""
    ends = [(text.find(stop), len(stop) * self._keep_stop) for stop in self._stop if stop in text]
    self.stopped |= bool(ends)
    if self.stopped:
      return text[: sum(min(ends, default=(0, 0)))]
    begun = (n for n in range(min(len(text), max(map(len, self._stop)) - 1), 0, -1))
    keep = next((n for n in begun if any(s.startswith(text[-n:]) for s in self._stop)), 0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]
