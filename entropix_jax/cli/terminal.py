"""Text in a terminal, coloured by the model's uncertainty, and texts side by side.

Why: the colours run from blue to red through mid-tones that are readable on dark and on light
backgrounds. Branches differ by style, not by colour, so that one word can show both.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from entropix_jax.report import CODES, ENTROPY_STEPS, step
from entropix_jax.rows import Token

# SGR codes of the first, second, ... branch of a sampler: plain, underlined, bold underlined, ...
STYLES = ("", "4", "1;4", "7", "1;7", "3", "3;4", "9")
LEAST = 24  # terminal columns; the least width of a text beside another
# Control characters but tab and line feed -> U+2400 ..., or U+FFFD for those from 0x80 on.
_PICTURES = {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SGR = re.compile("(\x1b\\[[0-9;]*m)")
_JOINER, _AS_EMOJI, _SKINS, _FLAGS = (
  "\u200d",
  "\ufe0f",
  "\U0001f3fb\U0001f3ff",
  "\U0001f1e6\U0001f1ff",
)


def _sgr(style: str, colour: int, text: str) -> str:
  codes = ";".join(filter(None, (style, f"38;5;{colour}")))
  # A style that spans a line break would colour the rest of the line in some terminals.
  return "\n".join(f"\x1b[{codes}m{part}\x1b[0m" if part else "" for part in text.split("\n"))


def visible(text: str) -> str:
  """The text with control characters as pictures, so that a terminal shows them and does not obey them."""
  return text.replace("\r\n", "\n").translate(_PICTURES)


def paint(token: Token, branches: Sequence[str]) -> str:
  """The token's text with SGR codes: the colour shows its entropy, the style its branch."""
  if not token.text:
    return ""
  style = STYLES[branches.index(token.branch) % len(STYLES)]
  return _sgr(style, CODES[step(token.numbers["entropy"])], visible(token.text))


def legend(branches: Sequence[str]) -> str:
  """One line that explains the colours and styles."""
  words = [*(f"<{bound:g}" for bound in ENTROPY_STEPS), f">{ENTROPY_STEPS[-1]:g}"]
  steps = [_sgr("", code, word) for code, word in zip(CODES, words, strict=True)]
  styles = [f"\x1b[{STYLES[i % len(STYLES)]}m{name}\x1b[0m" for i, name in enumerate(branches)]
  return f"entropy in nats: {' '.join(steps)}   branch: {' '.join(styles)}"


# -- texts side by side ------------------------------------------------------------------------


class _Cell(NamedTuple):
  """What a reader sees as one character."""

  text: str
  width: int  # columns of the terminal
  paint: str  # the SGR sequences in force


def _width(char: str) -> int:
  """Columns that a character takes; 0 if it combines with the one before it."""
  if unicodedata.category(char) in ("Mn", "Me", "Cf") and char != "\xad":
    return 0
  if "\u1160" <= char <= "\u11ff":  # vowels and finals of Korean syllables
    return 0
  return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _join(cell: _Cell, char: str) -> _Cell | None:
  """The cell with the character appended, or None if the character begins a cell of its own."""
  pair = len(cell.text) == 1 and all(_FLAGS[0] <= c <= _FLAGS[1] for c in (cell.text, char))
  emoji = cell.width == 2 and (cell.text[-1] == _JOINER or _SKINS[0] <= char <= _SKINS[1])
  if cell.text == "\n" or (_width(char) and not pair and not emoji):
    return None
  width = 2 if pair or char == _AS_EMOJI else cell.width
  return cell._replace(text=cell.text + char, width=width)


def _cells(text: str) -> list[_Cell]:
  paint, cells = "", []
  for piece in _SGR.split(text.replace("\r\n", "\n").replace("\t", "    ")):
    if _SGR.fullmatch(piece):
      paint = "" if piece in ("\x1b[m", "\x1b[0m") else paint + piece
      continue
    for char in piece:
      if unicodedata.category(char) == "Cc" and char != "\n":
        char = "\ufffd"  # else control characters could move the cursor
      joined = _join(cells[-1], char) if cells else None
      cells[-1:] = [joined] if joined else [*cells[-1:], _Cell(char, _width(char), paint)]
  return cells


def _kind(cell: _Cell) -> str:
  wide = cell.width == 2 and not "가" <= cell.text[0] <= "힣"  # Korean puts blanks between words
  return {"\n": "end", " ": "blank"}.get(cell.text, "wide" if wide else "word")


def _wrap(text: str, width: int) -> list[list[_Cell]]:
  """Lines of a text, broken at blanks and beside wide characters; words wider than a line are cut."""
  lines: list[list[_Cell]] = [[]]
  used = 0
  for kind, group in itertools.groupby(_cells(text), _kind):
    for unit in [[cell] for cell in group] if kind in ("end", "wide") else [list(group)]:
      over = used + sum(cell.width for cell in unit) > width
      if kind == "blank" and used and over:
        used = width  # the line break replaces the blank
        continue
      if kind == "end" or (used and over):
        lines.append([])
        used = 0
      for cell in unit if kind != "end" else ():
        if used and used + cell.width > width:
          lines.append([])
          used = 0
        lines[-1].append(cell)
        used += cell.width
  return lines


def _lines(text: str, width: int) -> Iterator[tuple[str, int]]:
  """(line, width in columns) of the wrapped text; each line has its own SGR codes."""
  for line in _wrap(text, width):
    while line and line[-1].text == " ":
      line.pop()
    runs = [
      (p, "".join(c.text for c in cells)) for p, cells in itertools.groupby(line, lambda c: c.paint)
    ]
    painted = "".join(f"{paint}{run}\x1b[0m" if paint else run for paint, run in runs)
    yield painted, sum(cell.width for cell in line)


def columns(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
  """Texts under their titles, side by side in a terminal of `width` columns; SGR codes are kept.

  If a text would get fewer than `LEAST` columns, the texts follow one another instead.
  """
  n = len(texts)
  each = (width - 3 * (n - 1)) // max(n, 1)
  if each < LEAST and n > 1:
    pairs = zip(titles, texts, strict=True)
    return "\n\n".join(columns([title], [text], width) for title, text in pairs)

  def rows(parts: Sequence[str]) -> list[str]:
    blocks = [list(_lines(part, each)) for part in parts]
    return [
      " │ ".join(line + " " * (each - used) for line, used in row).rstrip(" ")
      for row in itertools.zip_longest(*blocks, fillvalue=("", 0))
    ]

  return "\n".join([*rows(titles), "─┼─".join(["─" * each] * n), *rows(texts)])
