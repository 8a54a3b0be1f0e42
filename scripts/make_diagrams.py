"""Draw the pictures of the README from the code: python scripts/make_diagrams.py

Why: every name, threshold, field and caption below is looked up in the package, so a picture cannot say what the
code does not. tests/test_diagrams.py draws them again and compares. SVG is written as text; colours follow the
reader's light or dark scheme.
"""

import contextlib
import dataclasses
import html
import itertools
import os
import pkgutil
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp

from entropix_jax.engine import engine, state
from entropix_jax.report import CODES, COLOURS
from entropix_jax.sampling import quadrant

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH = 860  # of all pictures; the README's column is about as wide

# The branches' colours are those of report/assets/report.css.
_STYLE = """
svg { --paper: #ffffff; --card: #f6f8fa; --line: #d1d9e0; --ink: #1f2328; --soft: #59636e; --new: #d55e00;
  --c0: #0072b2; --c1: #c98a00; --c2: #009e73; --c3: #d55e00; --c4: #b8578f; --fill: .2; }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --card: #161b22; --line: #3d444d; --ink: #e6edf3;
  --soft: #9198a1; --new: #f58345; --c0: #58aeea; --c1: #f0b030; --c2: #2fc79b; --c3: #f58345; --c4: #e59ac4; --fill: .3; } }
text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.name, .code, .file { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.name { font-weight: 600; font-size: 13px; } .code { font-size: 11px; } .file { font-size: 10px; }
.file, .soft { fill: var(--soft); } .small { font-size: 11px; } text.c0 { fill: var(--c0); }
.paper { fill: var(--paper); stroke: var(--line); } .card { fill: var(--card); stroke: var(--line); }
.lane { fill: none; stroke: var(--line); stroke-dasharray: 4 4; } .edge { stroke: var(--line); }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.4; } .head { fill: var(--soft); }
.fed { fill: var(--soft); fill-opacity: .45; stroke: var(--soft); } .won { fill: var(--c0); stroke: var(--c0); }
.fed.new, .won.new { fill: var(--new); stroke: var(--new); } .ghost { fill: none; stroke: var(--soft); stroke-dasharray: 2 2; }
"""


class Drawing:
  """SVG text, written shape by shape."""

  def __init__(self, height: int, title: str, style: str = _STYLE):
    self._parts, self._size, self._title, self._style = [], (WIDTH, height), title, style
    self.box(0.5, 0.5, WIDTH - 1, height - 1, "paper", 12)

  def add(self, part: str) -> None:
    """Any element."""
    self._parts.append(part)

  def box(self, x, y, w, h, style: str, radius=8, more="") -> None:
    """A rectangle of a class."""
    self.add(
      f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" class="{style}"{more}/>'
    )

  def text(self, x, y, text: str, style="", middle=False, symbol="") -> None:
    """A line; `symbol` is the dotted name of what it speaks of, which must exist."""
    anchor = ' text-anchor="middle"' * middle + f' data-name="{symbol}"' * bool(symbol)
    self.add(f'<text x="{x:g}" y="{y:g}" class="{style}"{anchor}>{html.escape(text)}</text>')

  def lines(self, x, y, text: str, width: int, style="small", middle=False, step=14) -> None:
    """A text in lines of at most so many characters."""
    for i, line in enumerate(textwrap.wrap(text, width)):
      self.text(x, y + i * step, line, style, middle)

  def arrow(self, *points) -> None:
    """A line through the points with a head at the last, to which it runs straight."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    path = " L".join(f"{a:g} {b:g}" for a, b in [*points[:-1], (x - 4 * dx, y - 4 * dy)])
    base = [(x - 7 * dx + 4 * s * dy, y - 7 * dy + 4 * s * dx) for s in (1, -1)]
    head = " L".join(f"{a:g} {b:g}" for a, b in [(x, y), *base])
    self.add(f'<path d="M{path}" class="arrow"/><path d="M{head}Z" class="head"/>')

  def svg(self) -> str:
    """The file's text."""
    w, h = self._size
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">'
    head += f"\n<title>{html.escape(self._title)}</title>\n<style>{self._style}</style>\n"
    return head + "\n".join(self._parts) + "\n</svg>\n"


# -- from a prompt to a text -------------------------------------------------------------------

# Dotted name, what it does, what it hands on.
HOST = (
  ("checkpoints.chat.Format", "the checkpoint's own template and tokenizer", "ids"),
  ("scheduler.Scheduler", "which prompt is fed, which row begins when", "Request"),
  ("rows.Rows", "reads a dispatch while the next runs", "Token"),
  ("checkpoints.tokenizer.StreamDecoder", "ids to text, id by id", "text"),
)
DEVICE = (
  ("engine.engine.Engine.prefill", "feeds a prompt, alone", "Prefix"),
  ("engine.engine.Engine.insert", "puts it into a slot", "State"),
)
STEP = (
  ("model.llama.forward", "Llama over keys and values", "logits_BV"),
  ("metrics.spread", "how uncertain is the model?", "ent, varent"),
  ("sampling.quadrant.step", "a sampler states a law", "law_BV"),
  ("sampling.draw.draw", "argmax of law plus noise", "token_B"),
  ("sampling.quadrant.commit", "what the sampler remembers", "State"),
)


def _station(d: Drawing, x, y, w, symbol: str, what: str, out: str) -> None:
  found, middle = pkgutil.resolve_name(f"entropix_jax.{symbol}"), x + w / 2
  d.box(x, y, w, 92, "card")
  d.text(middle, y + 20, symbol.split(".")[-1], "name", True, symbol)
  d.text(middle, y + 34, found.__module__.split(".")[-1] + ".py", "file", True)
  d.lines(middle, y + 51, what, int(w / 6.1), middle=True, step=13)
  d.text(middle, y + 84, f"→ {out}", "code c0", True)


def flow() -> str:
  """From a prompt to a text."""
  d = Drawing(376, "From a prompt to a text: the host and the device")
  d.text(20, 26, "host: Python", "small soft")
  d.box(12, 36, 836, 116, "lane", 10)
  places = (112, 262, 448, 598)
  for x, text in ((58, "prompt"), (802, "text")):
    d.text(x, 98, text, "name", True)
  for x, station in zip(places, HOST, strict=True):
    _station(d, x, 48, 138, *station)
  for x0, x1 in ((90, 112), (250, 262), (586, 598), (736, 776)):
    d.arrow((x0, 94), (x1, 94))
  d.text(24, 352, "device: operations on one State", "small soft")
  d.box(12, 188, 836, 176, "lane", 10)
  for x, station in zip((24, 140), DEVICE, strict=True):
    _station(d, x, 232, 102, *station)
  d.box(260, 200, 576, 134, "lane", 8)
  d.text(272, 219, "next_token", "name", symbol="engine.step.next_token")
  d.text(362, 219, "every row its own thresholds, seed and limit", "small soft")
  for i, station in enumerate(STEP):
    _station(d, 270 + i * 112, 232, 104, *station)
    if i:
      d.arrow((262 + i * 112, 278), (270 + i * 112, 278))
  d.arrow((126, 278), (140, 278))
  d.arrow((242, 278), (270, 278))
  d.arrow((331, 140), (331, 170), (75, 170), (75, 232))
  d.arrow((770, 324), (770, 350), (322, 350), (322, 324))
  d.text(546, 346, "N tokens per dispatch of Engine.decode", "small soft", True)
  d.arrow((770, 232), (770, 170), (517, 170), (517, 140))
  d.text(640, 166, "record_NBR: every number of every token", "small soft", True)
  return d.svg()


# -- the engine's verbs ------------------------------------------------------------------------

# What each verb does to a Prefix (the first strip) and to three slots. p prompt, g generated; capitals are
# what the verb writes, o what it takes away or only tries, | an end.
STRIPS = {
  "prefill": ("PPPPP", "ppppggg", "", "ppggggg"),
  "insert": ("ppppp", "ppppggg", "PPPPP", "ppggggg"),
  "first": ("", "ppppggg", "pppppG", "ppggggg"),
  "decode": ("", "ppppgggGGGG", "pppppgGGGG", "ppgggggGGGG"),
  "steer": ("", "ppppggggggg", "pppppggggg", "ppggggggggg|"),
  "fork": ("", "ppppggg", "PPPPGGG", "ppggggg"),
  "rewind": ("", "ppppggg", "pppppgoooo", "ppggggg"),
  "resume": ("ppppp", "ppppggg", "PPPPPGGG", "ppggggg"),
  "score": ("", "ppppgggooo", "pppppgooo", "ppggggg"),
}


def verbs() -> dict[str, str]:
  """Verb -> what it does, from the engine's docstring."""
  return dict(re.findall(r"^  (\w+) {2,}(.+)$", engine.__doc__, re.M))


_CELLS = {"p": "fed", "P": "fed new", "g": "won", "G": "won new", "o": "ghost", "|": "won new"}


def _strip(d: Drawing, x, y, cells: str) -> None:
  for i, cell in enumerate(cells):
    w, h = (3, 13) if cell == "|" else (9, 9)
    d.box(x + 12 * i, y + (9 - h) / 2, w, h, _CELLS[cell], 2)


def state_picture() -> str:
  """The engine's verbs over one State."""
  fields = [field.name for field in dataclasses.fields(state.State)]
  listed = textwrap.wrap(", ".join(fields), 114)
  said = verbs()
  d = Drawing(422 + 17 * len(listed), "The engine's verbs over one State")
  for i, (verb, (prefix, *slots)) in enumerate(STRIPS.items()):
    x, y = 12 + i % 3 * 281, 12 + i // 3 * 124
    d.box(x, y, 274, 116, "card")
    d.text(x + 12, y + 22, verb, "name", symbol=f"engine.engine.Engine.{verb}")
    d.lines(x + 12, y + 40, said[verb].replace("->", "→"), 46)
    if prefix:
      d.text(x + 160, y + 21, "Prefix", "file")
      _strip(d, x + 202, y + 13, prefix)
    for row, cells in enumerate(slots):
      top = y + 65 + 16 * row
      d.text(x + 12, top + 8, str(row), "file")
      d.add(f'<path d="M{x + 24} {top + 12.5}H{x + 262}" class="edge"/>')
      _strip(d, x + 26, top, cells)
  y = 402
  d.text(12, y, "State", "name", symbol="engine.state.State")
  d.text(62, y, "has one row per slot:", "small soft")
  for x, cell, text in (
    (210, "p", "prompt"),
    (290, "g", "generated"),
    (390, "G", "what the verb writes"),
    (546, "o", "what it takes back, or only tries"),
  ):
    _strip(d, x, y - 9, cell)
    d.text(x + 15, y, text, "small soft")
  for i, line in enumerate(listed):
    d.text(12, y + 20 + 17 * i, line, "code")
  return d.svg()


# -- the sampler's decision --------------------------------------------------------------------

_ROW = re.compile(r"^  (\w+) +([LH]E[LH]V)? +(\S.*?) {2,}(.+)$", re.M)


def decisions() -> dict[str, tuple[str, str, str]]:
  """Branch -> letters, when, what, from the sampler's docstring."""
  return {
    name: (letters, when, what) for name, letters, when, what in _ROW.findall(quadrant.__doc__)
  }


def plane() -> tuple[list[str], list[str], list[list[str]]]:
  """Knobs on the axes of entropy and varentropy, in order, and the branch of each cell between them."""
  cfg, never = quadrant.Config(), quadrant.NEVER
  axes = []
  for ending in ("_ent", "_varent"):
    names = [name for name in quadrant.QUANTILES if name.endswith(ending)]
    axes.append(
      sorted((n for n in names if getattr(cfg, n) < never), key=lambda n: getattr(cfg, n))
    )
  middles = []
  for names in axes:
    at = [0.0, *(getattr(cfg, name) for name in names)]
    middles.append([(a + b) / 2 for a, b in itertools.pairwise([*at, 3 * at[-1]])])
  grid = jnp.meshgrid(*map(jnp.asarray, middles), indexing="xy")
  found = quadrant.branches(cfg, *grid)
  return *axes, [[quadrant.BRANCHES[int(i)] for i in row] for row in found]


def decision() -> str:
  """The sampler's decision with its thresholds."""
  ents, varents, cells = plane()
  cfg, said = quadrant.Config(), decisions()
  lefts, bottoms = [92, 160, 288, 376, 464], [330, 256, 146, 58]
  d = Drawing(404, "The decision of the quadrant sampler, with its thresholds")
  where: dict[str, list] = {}
  for row, names in enumerate(cells):
    for column, name in enumerate(names):
      x, y = lefts[column], bottoms[row + 1]
      w, h = lefts[column + 1] - x, bottoms[row] - y
      fill = f' style="fill:var(--c{quadrant.BRANCHES.index(name)});fill-opacity:var(--fill)"'
      d.box(x, y, w, h, "", 0, fill)
      where.setdefault(name, []).append((x, y, w, h))
  for name, boxes in where.items():
    x, y, w, h = max(boxes, key=lambda box: box[2:])
    d.text(x + w / 2, y + h / 2 + 5, name, "name", True, f"sampling.quadrant.{name.upper()}")
  for name, x in zip(ents, lefts[1:], strict=False):
    d.add(f'<path d="M{x} {bottoms[-1]}V{bottoms[0] + 6}" class="edge"/>')
    d.text(x, bottoms[0] + 20, f"{getattr(cfg, name):g}", "code", True)
    d.text(x, bottoms[0] + 34, name, "file", True)
  for name, y in zip(varents, bottoms[1:], strict=False):
    d.add(f'<path d="M{lefts[0] - 6} {y}H{lefts[-1]}" class="edge"/>')
    d.text(50, y - 1, f"{getattr(cfg, name):g}", "code", True)
    d.text(50, y + 12, name, "file", True)
  d.arrow((92, 330), (92, 44))
  d.arrow((92, 330), (478, 330))
  d.text(20, 30, "varentropy, nats²: how unevenly log p is spread", "small soft")
  d.text(285, 388, "entropy, nats: how uncertain the next token is", "small soft", True)
  y = 58
  for name, (letters, when, what) in said.items():
    d.box(496, y - 11, 12, 12, "", 3, f' style="fill:var(--c{quadrant.BRANCHES.index(name)})"')
    d.text(516, y, name, "name")
    d.text(572, y, letters, "file")
    d.text(608, y, when, "small")
    d.lines(516, y + 16, what, 54, "small soft")
    y += 54 if len(what) > 54 else 44
  d.box(496, 300, 344, 92, "card")
  d.text(508, 320, "then, for every row", "small soft")
  d.text(508, 340, "logits_BV → temperature → top_k, top_p, min_p", "code")
  d.text(508, 357, "→ law_BV → draw", "code")
  base = ", ".join(f"{k} {getattr(cfg, k):g}" for k in ("temp", "top_k", "top_p", "min_p"))
  d.text(508, 380, f"from {base}", "code c0")
  return d.svg()


# -- a terminal --------------------------------------------------------------------------------

PROGRAM = "python -m entropix_jax.main --config=configs/demo.py".split()
PROGRAM += ["--prompt=Tell me a story about a kite.", "--stats"]
_COLUMNS, _CELL, _LINE = 104, 8, 20  # of the terminal, and the size of a character in pixels
_TERMINAL = """
rect { fill: #16181d; stroke: #3d444d; } text { fill: #d7dae0; white-space: pre;
  font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.u { text-decoration: underline; } .b { font-weight: bold; } .r { fill: #16181d; } .soft { fill: #8b929c; }
""" + "".join(
  f".c{code} {{ fill: {colour}; }} " for code, colour in zip(CODES, COLOURS, strict=True)
)


def printed() -> str:
  """What PROGRAM prints in a terminal, now."""
  ours, its = pty.openpty()
  done, out = subprocess.Popen([sys.executable, *PROGRAM[1:]], stdout=its, stderr=its), b""
  os.close(its)
  with contextlib.suppress(OSError):  # the end of a terminal on Linux
    while more := os.read(ours, 65536):
      out += more
  done.wait()
  return out.decode().replace("\r\n", "\n")


def _cells(text: str) -> list[tuple[str, str]]:
  """(character, its classes) of a text with SGR codes."""
  cells, style = [], ""
  for piece in re.split("(\x1b\\[[0-9;]*m)", text):
    if not piece.startswith("\x1b"):
      cells += [(char, style) for char in piece]
      continue
    codes = piece[2:-1].replace("38;5;", "c").split(";")
    style = " ".join({"0": "", "1": "b", "4": "u", "7": "r"}.get(code, code) for code in codes)
  return cells


def _rows(cells: list) -> list[list]:
  """Lines of at most _COLUMNS cells, broken at blanks."""
  rows = [[]]
  for blank, group in itertools.groupby(cells, lambda cell: cell[0] if cell[0] in " \n" else ""):
    word = list(group)
    if blank == "\n":
      rows += [[] for _ in word]
    elif len(rows[-1]) + len(word) > _COLUMNS:
      rows.append([] if blank else word)
    else:
      rows[-1] += word
  return rows


def screen(text: str) -> str:
  """A picture of a terminal in which a program printed this text, which may have SGR codes."""
  command = " ".join(PROGRAM).replace("=Tell", '="Tell').replace("kite.", 'kite."')
  rows = _rows([(char, "soft") for char in f"$ {command}\n"] + _cells(text.strip("\n")))
  d = Drawing(36 + _LINE * len(rows), "A text in the terminal, coloured by entropy", _TERMINAL)
  for i, row in enumerate(rows):
    x, y, line = (WIDTH - _CELL * _COLUMNS) / 2, 34 + _LINE * i, ""
    for style, group in itertools.groupby(row, lambda cell: cell[1]):
      run = "".join(char for char, _ in group)
      if "r" in style.split():
        d.box(x, y - 13, len(run) * _CELL, 17, "", 0, ' style="fill:#d7dae0"')
      line += f'<tspan class="{style}">{html.escape(run)}</tspan>' if style else html.escape(run)
      x += len(run) * _CELL
    if row:
      x -= len(row) * _CELL
      d.add(f'<text x="{x:g}" y="{y}" textLength="{len(row) * _CELL}">{line}</text>')
  return d.svg()


PICTURES = {"flow": flow, "verbs": state_picture, "decision": decision}

if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for name, draw in PICTURES.items():
    (FOLDER / f"{name}.svg").write_text(draw())
  (FOLDER / "terminal.svg").write_text(screen(printed()))
