"""The README's diagrams are what the script draws from the code as it is, and name only what exists."""

import inspect
import pkgutil
import re
from xml.etree import ElementTree

import make_diagrams as diagrams
import pytest

from entropix_jax.cli import terminal
from entropix_jax.engine import step
from entropix_jax.engine.engine import Engine
from entropix_jax.llm import LLM
from entropix_jax.sampling import quadrant

FILES = {path.stem: path.read_text() for path in sorted(diagrams.FOLDER.glob("*.svg"))}
TEXTS = {name: ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")] for name, svg in FILES.items()}  # fmt: skip


@pytest.mark.parametrize("name", diagrams.PICTURES)
def test_a_diagram_is_what_the_code_says_today(name):
  assert diagrams.PICTURES[name]() == FILES[name], "run python scripts/make_diagrams.py"
  assert "prefers-color-scheme: dark" in FILES[name]


def test_pictures_are_shown_and_small():
  readme = (diagrams.FOLDER.parents[1] / "README.md").read_text()
  for path in diagrams.FOLDER.iterdir():
    assert f"docs/pictures/{path.name}" in readme
    assert path.stat().st_size < 400_000


def test_every_name_exists():
  symbols = {s for svg in FILES.values() for s in re.findall('data-name="(.*?)"', svg)}
  assert len(symbols) > 20
  for symbol in symbols:
    pkgutil.resolve_name(f"entropix_jax.{symbol}")
  package = "".join(path.read_text() for path in (diagrams.FOLDER.parents[1] / "entropix_jax").rglob("*.py"))  # fmt: skip
  handed_on = [text[2:] for text in TEXTS["flow"] if text.startswith("→")]
  for word in re.findall(r"\w+", " ".join(handed_on)):
    assert re.search(rf"\b{word}\b", package), word


def test_the_verbs_are_the_operations_on_a_state():
  methods = inspect.getmembers(Engine, inspect.isfunction)
  verbs = {name for name, f in methods if [*inspect.signature(f).parameters][1:2] == ["state"]}
  assert verbs | {"prefill"} == {*diagrams.STRIPS} == {*diagrams.verbs()}


def test_the_steps_are_drawn_in_their_order():
  calls = ("metrics.spread(", "sampler.step(", "= choose(", "sampler.commit(")
  at = [inspect.getsource(step._decide).index(call) for call in calls]
  assert at == sorted(at)
  drawn = [symbol.split(".")[-1] for symbol, *_ in diagrams.STEP]
  assert drawn == ["forward", "spread", "step", "draw", "commit"]


def test_the_decision_has_every_branch_once():
  names = [t for t in TEXTS["decision"] if t in quadrant.BRANCHES]
  assert sorted(names) == sorted(2 * quadrant.BRANCHES)


def test_the_terminal_shows_what_the_program_prints():
  done = LLM.demo().generate("Tell me a story about a kite.")
  text = "".join(terminal.paint(token, quadrant.BRANCHES) for token in done.tokens)
  lines = re.findall("<text.*", diagrams.screen(f"{terminal.legend(quadrant.BRANCHES)}\n\n{text}"))
  shown = re.findall("<text.*", FILES["terminal"])
  plain = [re.sub(' y="[0-9]+"', "", line) for line in shown]
  for line in lines:
    assert re.sub(' y="[0-9]+"', "", line) in plain
