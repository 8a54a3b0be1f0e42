"""A text's tokens made visible: boundaries, ids, ranks, merges; and two tokenizers side by side.

Spaces, line breaks and control characters are drawn, digits and control tokens have kinds of their own, and a token that
is only a part of a character shows its bytes.
"""

import dataclasses
from collections.abc import Sequence

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.tokens.spelling import Spelling, spelling

KINDS = ("word", "space", "digit", "sign", "bytes", "control")
_DRAWN = {" ": "\u00b7", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}


@dataclasses.dataclass(frozen=True)
class Piece:
  """One token of a text."""

  id: int
  text: str  # as `visible` draws it
  data: bytes
  start: int  # bytes of the text before it
  kind: str  # one of KINDS
  rank: int | None  # its place in the order of merges; None for control tokens
  merges: tuple[tuple[str, str], ...]  # the pairs that BPE merged to get it, drawn, in order

  @property
  def end(self) -> int:
    """Bytes of the text up to its end."""
    return self.start + len(self.data)


def visible(data: bytes) -> str:
  r"""Bytes as text in which every character is seen; bytes that are no character are \xNN."""
  text = data.decode("utf-8", "backslashreplace")
  text = "".join(_DRAWN.get(char, char) for char in text)
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def look(tokenizer: Tokenizer, text: str, control: bool = False) -> list[Piece]:
  """The tokens of a text.

  Args:
    control: the spelling of a control token in the text stands for that token, as in a prompt of a server.

  Raises:
    UserError: the text has a character that this tokenizer cannot write.
  """
  ids: list[int] = []
  for i, part in enumerate(tokenizer.spellings.split(text) if control else [text]):
    if control and part in tokenizer.special:
      ids.append(tokenizer.special[part])
    elif part:
      ids += tokenizer.encode(part, i == 0)
  return pieces(tokenizer, ids)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
  """Ids as Pieces. Raises UserError for an id that is no token."""
  spelled, found, start = spelling(tokenizer), [], 0
  for id in ids:
    data = tokenizer.token_bytes(id)
    rank = spelled.rank.get(id)
    made = _merges(spelled, data) if rank is not None else ()
    found.append(Piece(id, visible(data), data, start, _kind(data, rank), rank, made))
    start += len(data)
  return found


def _merges(spelled: Spelling, data: bytes) -> tuple[tuple[str, str], ...]:
  return tuple((visible(left), visible(right)) for left, right in spelled.merges(data)[1])


def _kind(data: bytes, rank: int | None) -> str:
  if rank is None:
    return "control"
  try:
    text = data.decode()
  except UnicodeDecodeError:
    return "bytes"
  inner = text.strip()
  if not inner:
    return "space"
  return "digit" if inner.isdigit() else "word" if any(map(str.isalpha, inner)) else "sign"


def beside(left: Sequence[Piece], right: Sequence[Piece]) -> list[tuple[list[Piece], list[Piece]]]:
  """Two tokenizers' pieces of one text, cut wherever both have a boundary.

  Where one of them begins the text with a space of its own, that space is left out of the count.
  """
  sides = [list(left), list(right)]
  extra = sum(len(p.data) for p in left) - sum(len(p.data) for p in right)
  shifts = max(extra, 0), max(-extra, 0)
  ends = [{p.end - shift for p in side} for side, shift in zip(sides, shifts, strict=True)]
  spans = []
  for end in sorted(ends[0] & ends[1]):
    cells = []
    for side, shift in zip(sides, shifts, strict=True):
      n = sum(p.end - shift <= end for p in side)
      cells.append(side[:n])
      del side[:n]
    spans.append((cells[0], cells[1]))
  return [*spans, (sides[0], sides[1])] if any(sides) else spans
