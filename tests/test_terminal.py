"""Texts side by side: every line fits, every character and its colour arrive, nothing moves the cursor."""

import random
import re
import sys

import pytest

from entropix_jax.cli import printer, terminal
from entropix_jax.rows import Token

SGR = re.compile("\x1b\\[[0-9;]*m")
# What takes one place on a screen, and how many columns: said by hand, for a terminal's sake.
WIDTHS = {
  **dict.fromkeys("abcxyz.,;é", 1),
  "e\u0301": 1,  # an accent of its own
  "o\u0302\u0323": 1,
  **dict.fromkeys("你好世界。ガ", 2),
  "한": 2,
  "\u1112\u1161\u11ab": 2,  # the same syllable, spelled
  "👍": 2,
  "👍🏽": 2,
  "👩\u200d👩\u200d👧": 2,
  "🏃\u200d♂️": 2,
  "🇫🇷": 2,
  "❤️": 2,
  "a\u200b": 1,
}
WORDS = ["the", "of", "uncertainty", "in,", "a"]


def plain(text):
  return SGR.sub("", text)


def wide(text):
  """Columns of a text that is made of WIDTHS, by taking the longest piece that fits."""
  columns = 0
  while text:
    piece = next((p for p in sorted(WIDTHS, key=len, reverse=True) if text.startswith(p)), text[0])
    assert piece in WIDTHS or piece in " │─┼" or piece.isascii(), ascii(piece)
    columns += WIDTHS.get(piece, 1)
    text = text[len(piece) :]
  return columns


def jumble(seed):
  draw = random.Random(seed)
  pieces = ["".join(draw.choices(list(WIDTHS), k=draw.randrange(1, 40))) for _ in range(12)]
  pieces += draw.choices(WORDS, k=30)
  draw.shuffle(pieces)
  return "".join(piece + draw.choice([" ", " ", " ", "  ", "\n", "\n\n", ""]) for piece in pieces)


def alone(text, width):
  """The lines of one text without its title."""
  return terminal.columns([""], [text], width).split("\n")[2:]


def test_two_texts_stand_side_by_side():
  text = "The quick brown fox jumps over the lazy dog."
  assert terminal.columns(["one", "two"], [text, "first\n\n  second"], 51).split("\n") == [
    "one                      │ two",
    "─────────────────────────┼" + "─" * 25,
    "The quick brown fox      │ first",
    "jumps over the lazy dog. │",
    "                         │   second",
  ]


def test_too_narrow_for_columns_they_follow_each_other():
  assert terminal.columns(["one", "two"], ["a b", "c"], 50).split("\n") == [
    *("one", "─" * 50, "a b", ""),
    *("two", "─" * 50, "c"),
  ]
  assert "│" in terminal.columns(["one", "two"], ["a b", "c"], 2 * terminal.LEAST + 3)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_line_fits_and_every_character_arrives(n, seed):
  texts = [jumble(100 * seed + i) for i in range(n)]
  width = random.Random(seed).randrange(80, 130)
  lines = terminal.columns(["t"] * n, texts, width).split("\n")
  each = (width - 3 * (n - 1)) // n
  cells = [line.split("│") for line in lines[2:]]
  for row in cells:
    assert len(row) == n
    for i, cell in enumerate(row[:-1]):
      assert wide(cell) == each + (1 if i == 0 else 2)
    assert wide(row[-1].rstrip()) <= each + (n > 1)
  for i, text in enumerate(texts):
    assert "".join("".join(row[i].split()) for row in cells) == "".join(text.split())


def test_lines_break_at_blanks_and_only_a_word_too_long_is_cut():
  lines = ["one two", "three", "fourfivesixs", "eveneight", "nine"]
  assert alone("one two three fourfivesixseveneight nine", 12) == lines
  assert alone("你好世界 你好", 7) == ["你好世", "界 你好"]
  assert alone("abc 한한한 한한", 11) == ["abc 한한한", "한한"]
  assert alone("abcd   \nefgh", 4) == ["abcd", "efgh"]
  family = "👩\u200d👩\u200d👧"
  assert alone(family * 3, 5) == [family * 2, family]


def painted(text):
  """(character, paint) of a painted text, without blanks."""
  paint = ""
  for piece in re.split(f"({SGR.pattern})", text):
    if SGR.fullmatch(piece):
      paint = "" if piece == "\x1b[0m" else paint + piece
    else:
      yield from ((char, paint) for char in piece if not char.isspace())


def test_painted_texts_keep_their_paint_across_lines():
  draw = random.Random(5)
  branches = ["flow", "ask"]
  words = [" the", " uncertain", " Donaudampfschifffahrtsgesellschaft", "你好世界", " 👍🏽", ".\n"]
  text = ""
  for _ in range(80):
    branch, numbers = draw.choice(branches), {"entropy": draw.expovariate(1)}
    token = Token(0, 0, 1, draw.choice(words), branch, numbers, None, 0.0)
    text += terminal.paint(token, branches)
  for width in (9, 30):
    lines = alone(text, width)
    assert [x for line in lines for x in painted(line)] == list(painted(text))
    assert [plain(line) for line in lines] == alone(plain(text), width)
    for line in lines:  # each by itself, since another column follows
      assert "\x1b" not in line or line.endswith("\x1b[0m")
  both = terminal.columns(["", ""], [text, "x"], 63).split("\n")
  assert all("\x1b" not in line.split("│")[1] for line in both[2:])


def test_paints_add_up_until_they_are_taken_back():
  done = alone("a\x1b[1m\x1b[31mb c\x1b[0md\x1b[4me\x1b[mf", 2)
  bold_red = "\x1b[1m\x1b[31m"
  assert done == [f"a{bold_red}b\x1b[0m", f"{bold_red}c\x1b[0md", "\x1b[4me\x1b[0mf"]


def test_a_text_cannot_move_the_cursor():
  lines = ["a\ufffd[2Jb\ufffdc\ufffdd    e\ufffd", "f\ufffd1A"]
  assert alone("a\x1b[2Jb\rc\bd\te\x00\r\nf\x9b1A", 40) == lines


def test_nothing_to_show():
  assert terminal.columns([], [], 80).strip() == ""
  assert terminal.columns(["a"], [""], 80).split("\n") == ["a", "─" * 80, ""]
  with pytest.raises(ValueError, match="zip"):
    terminal.columns(["a", "b", "c"], ["x", "y"], 10)


@pytest.mark.parametrize(
  ("variables", "coloured"),
  [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_may_say_that_it_wants_no_colours(monkeypatch, variables, coloured):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.delenv("NO_COLOR", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  paint, legend = printer.painter(["a"], True)
  assert bool(legend) == coloured
  token = Token(0, 0, 1, "word", "a", {"entropy": 1.0}, None, 0.0)
  assert ("\x1b" in paint(token)) == coloured
