"""The house rules that a reader would otherwise have to check by eye: notes, layers, suffixes, words."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import entropix_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "entropix_jax"
SOURCES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
  for path in sorted(PACKAGE.rglob("*.py"))
}
every_module = pytest.mark.parametrize("name", SOURCES)


# -- notes -------------------------------------------------------------------------------------

NOTES = {path.name[:3]: path for path in sorted((ROOT / "docs" / "notes").glob("*.md"))}
CITATION = re.compile(r"\[(n\d\d(?:, n\d\d)*)\]")


def header(path):
  """The `name: value` lines between the first two `---`."""
  _, block, _ = path.read_text().split("---\n", 2)
  return dict(line.split(": ", 1) for line in block.splitlines())


def cited(text):
  return {note for ids in CITATION.findall(text) for note in ids.split(", ")}


def resolve(symbol):
  """The object of a dotted name; raises AttributeError or ImportError."""
  parts = symbol.split(".")
  for n in range(len(parts), 0, -1):
    try:
      found = importlib.import_module(".".join(parts[:n]))
    except ModuleNotFoundError:
      continue
    for part in parts[n:]:
      found = getattr(found, part)
    return found
  raise ImportError(symbol)


def missing_evidence(piece):
  """What is wrong with `path` or `path::name`, or None."""
  path, _, name = piece.partition("::")
  if not (ROOT / path).is_file():
    return f"{path} does not exist"
  text = (ROOT / path).read_text()
  if path.endswith(".py"):
    defined = {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
  else:
    defined = set(re.findall(r"#+ (.*?)(?: \(negative\))?$", text, re.MULTILINE))
  return f"{path} does not hold {name!r}" if name and name not in defined else None


def test_notes_and_citations_are_the_same_set():
  names = [path.name for path in (ROOT / "docs" / "notes").glob("*")]
  assert all(re.fullmatch(r"n\d\d-[a-z0-9-]+\.md", name) for name in names)
  assert len({name[:3] for name in names}) == len(names)
  assert set().union(*(cited(text) for text in SOURCES.values())) == set(NOTES)


def test_documents_cite_notes_that_exist():
  for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").glob("*.py")]:
    assert cited(path.read_text()) <= set(NOTES), path.name


@pytest.mark.parametrize("note", NOTES)
def test_a_note_is_tied_to_code_and_to_evidence(note):
  fields = header(NOTES[note])
  assert list(fields) == ["claim", "status", "since", "author", "touches", "evidence"]
  assert fields["status"] in ("open", "held", "refuted", "fixed")
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", fields["since"])
  assert fields["author"] == "entropix_jax"
  for symbol in fields["touches"].split(", "):
    resolve(symbol)
  evidence = fields["evidence"].split(", ")
  assert [e for e in evidence if missing_evidence(e)] == []
  assert any(e.startswith("tests/test_notes.py::") for e in evidence)


def test_every_test_of_the_notes_is_evidence_of_its_note():
  text = (ROOT / "tests" / "test_notes.py").read_text()
  for function in ast.parse(text).body:
    if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
      note = function.name.split("_")[1]
      assert ast.get_docstring(function).startswith(f"{note}: ")
      assert f"tests/test_notes.py::{function.name}" in header(NOTES[note])["evidence"]


def test_what_is_not_there_is_found():
  with pytest.raises((AttributeError, ImportError)):
    resolve("entropix_jax.metrics.no_such_name")
  assert missing_evidence("tests/test_house.py::no_such_test")
  assert missing_evidence("tests/no_such_file.py")
  assert missing_evidence("docs/log.md::no such entry")


# -- layers ------------------------------------------------------------------------------------

# From the ground up. A module imports from lower lines only, so modules of one line are strangers.
# A folder stands for all of its modules that have no line of their own.
LAYERS = """
  __init__
  errors
  config compile_cache files memory
  rowwise model.rope model.weights model.sharding
  metrics model.quant
  model.kvcache model.linear sampling.draw
  model.attention model.kernels
  model sampling
  sampling.actions sampling.calibration sampling.presets
  engine engine.language_model
  engine.setup
  engine.request engine.record
  engine.state
  engine.step
  engine.moves
  engine.programs
  engine.feeding
  engine.engine
  engine.decoder engine.preflight engine.warm
  checkpoints.hf_config
  checkpoints.safetensors_file
  checkpoints.gguf_file
  checkpoints.orbax_store checkpoints.tokenizer
  checkpoints
  checkpoints.hub
  tokens.spelling
  tokens.lens tokens.laws
  tokens.heal tokens.segmentations tokens.bytes
  tokens
  rows distributed devices prefix_store
  scheduler
  decoding decoding.mixing decoding.race decoding.select decoding.verify
  decoding.drafters decoding.groups
  decoding.adaptive decoding.best_of_n decoding.branch decoding.cot decoding.deepconf
  decoding.joint decoding.speculative
  report
  report.notebook report.reader report.trace
  report.page
  report.figure
  settings
  session
  tokens.tools
  llm
  serve.exchange serve.grammar
  serve.task
  serve.service
  serve.schema serve.metrics
  serve.calls
  serve.bodies
  serve.about serve.around
  serve.page serve.token_routes
  serve.app
  serve
  cli.terminal cli.prompts cli
  cli.printer
  cli.config_file
  cli.commands
  main viz serve.__main__ tokens.__main__
"""
RANK = {module: i for i, line in enumerate(LAYERS.split("\n")) for module in line.split()}
# What a sampler may know: never weights, cache or the model's shape.
SAMPLERS_SEE = ("errors", "metrics", "rowwise", "sampling", "sampling.draw")


def imports(name, text):
  """(full name, whether it may be a module's attribute) of everything a module imports anywhere."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{name} imports relatively; write the full name"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in SOURCES else node.module


def layer(name):
  """The line of LAYERS that a module stands in: its own or its folder's."""
  inside = name.removeprefix("entropix_jax").removeprefix(".") or "__init__"
  while inside not in RANK and "." in inside:
    inside = inside.rpartition(".")[0]
  return inside


def wrong_imports(name, text):
  """Imports that do not point down."""
  own = [i for i in imports(name, text) if i.split(".")[0] == "entropix_jax"]
  wrong, here = [], layer(name)
  for other in own:
    there = layer(other)
    if here == there == "sampling":
      # A sampler knows the contract and the shared pieces, never another sampler.
      inside = other == "entropix_jax.sampling" or other.split(".")[-1].startswith("_")
      up = not inside or name == "entropix_jax.sampling"
    elif here == there == "decoding.mixing":
      up = other != "entropix_jax.decoding.mixing"
    else:
      up = RANK[there] >= RANK[here] or (here == "sampling" and there not in SAMPLERS_SEE)
    wrong += [other] * up
  return wrong


@every_module
def test_imports_point_down(name):
  assert layer(name) in RANK, f"give {name} or its folder a line in LAYERS"
  assert wrong_imports(name, SOURCES[name]) == []


@every_module
def test_flags_and_config_files_stay_at_the_door(name):
  roots = {i.split(".")[0] for i in imports(name, SOURCES[name])}
  if layer(name) not in ("cli.commands", "cli.config_file"):
    assert "ml_collections" not in roots
  if layer(name) != "cli.commands":
    assert "absl" not in roots


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("model.llama", "from entropix_jax import sampling"),
    ("sampling.plain", "from entropix_jax.model import llama"),
    ("sampling.plain", "def f():\n  from entropix_jax.model.kvcache import Cache"),
    ("sampling.plain", "from entropix_jax.sampling import quadrant"),
    ("sampling.plain", "from entropix_jax.config import ModelConfig"),
    ("metrics", "import entropix_jax.engine.engine"),
    ("sampling.draw", "from entropix_jax.model import attention"),
    ("engine.engine", "from entropix_jax.rows import Token"),
    ("engine.step", "from entropix_jax.decoding import groups"),
  ],
)
def test_an_import_that_points_up_is_found(name, text):
  assert len(wrong_imports(f"entropix_jax.{name}", text)) == 1


# -- axis letters ------------------------------------------------------------------------------

LETTERS = set(re.findall(r"(?:^| )([A-Z]) (?=[a-z(/])", entropix_jax.__doc__, re.MULTILINE))
# Axes made on the spot: merged, cut in blocks, and a digit's axis in an einsum.
MADE = {"X", "Y", "U"}
# Rows of a matrix unit's tile, parts of a row's slots.
LOCAL = {"entropix_jax.model.kernels": {"R", "P"}}
SUFFIXED = re.compile(r"[a-z]\w*_([A-Z0-9]+)")


def suffix(node):
  """The axis letters of a name or attribute, or None."""
  name = getattr(node, "id", None) or getattr(node, "attr", None)
  match = SUFFIXED.fullmatch(name or "")
  return match and match[1]


def is_einsum(node):
  return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "einsum"


def spells(letters, slot):
  """Whether a suffix names the axes of an einsum slot, where U stands for the axis of a digit."""
  return len(letters) == len(slot) and all(
    a == b or (a.isdigit() and b == "U") for a, b in zip(letters, slot, strict=True)
  )


def wrong_einsums(text):
  """Einsums whose operands, or the name they are assigned to, spell other axes."""
  wrong = []
  tree = ast.parse(text)
  for call in filter(is_einsum, ast.walk(tree)):
    spec = call.args[0]
    if not (isinstance(spec, ast.Constant) and isinstance(spec.value, str)):
      wrong.append(ast.unparse(call))
      continue
    slots = spec.value.split("->")[0].split(",")
    if len(slots) != len(call.args) - 1:
      wrong.append(ast.unparse(call))
    for slot, operand in zip(slots, call.args[1:], strict=False):
      letters = suffix(operand)
      if letters and not spells(letters, slot):
        wrong.append(f"{ast.unparse(operand)} is not {slot}")
  for node in ast.walk(tree):
    if not isinstance(node, ast.Assign):
      continue
    terms = [node.value]
    while terms:
      term = terms.pop()
      if isinstance(term, ast.BinOp):  # scaling and adding keep the axes
        terms += [term.left, term.right]
      elif is_einsum(term) and isinstance(term.args[0], ast.Constant):
        letters, out = suffix(node.targets[0]), term.args[0].value.split("->")[1]
        if letters and not spells(letters, out):
          wrong.append(f"{ast.unparse(node.targets[0])} is not {out}")
  return wrong


@every_module
def test_einsums_spell_the_axes_of_their_operands(name):
  assert wrong_einsums(SOURCES[name]) == []


@every_module
def test_suffixes_are_in_the_alphabet(name):
  known = LETTERS | MADE | LOCAL.get(name, set()) | set("0123456789")
  names = {
    node.id if isinstance(node, ast.Name) else node.arg
    for node in ast.walk(ast.parse(SOURCES[name]))
    if isinstance(node, ast.Name | ast.arg)
  }
  matches = filter(None, map(SUFFIXED.fullmatch, names))
  assert [match[0] for match in matches if not set(match[1]) <= known] == []


def test_the_alphabet_is_the_one_in_the_package_docstring():
  assert set("BTSDFNKGHVCLEQJRM") == LETTERS


@pytest.mark.parametrize(
  "text",
  [
    'y_BTF = jnp.einsum("BTD,DF->BTF", x_BTF, w.up_DF)',
    'y_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w.up_FD)',
    'y_BFT = jnp.einsum("BTD,DF->BTF", x_BTD, w.up_DF)',
    'y_BFT = x_BFT + jnp.einsum("BTD,DF->BTF", x_BTD, w.up_DF) * 2',
    'y = jnp.einsum("BTD,DUF->BTUF", x_BTD, w.up_D2)',
    "y = jnp.einsum(spec, x_BTD)",
  ],
)
def test_a_misnamed_einsum_is_found(text):
  assert len(wrong_einsums(text)) == 1


# -- words -------------------------------------------------------------------------------------

# In pieces, so that this file does not hold what it looks for.
FORBIDDEN = (
  "TO" + "DO",
  "FIX" + "ME",
  "allow_pickle" + "=True",
  "import p" + "db",
  "break" + "point()",
)
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:home|root|work|tmp|Users|mnt|opt|usr)/")
PLACES = "*.md *.toml entropix_jax/**/*.py configs/*.py scripts/*.py benchmarks/*.py docs/**/*.md"
TEXTS = sorted(path for pattern in PLACES.split() for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_must_not_occur(path):
  text = path.read_text()
  assert [word for word in FORBIDDEN if word in text] == []
  assert MACHINE_PATH.findall(text) == []
  if path.is_relative_to(PACKAGE):
    assert "time." + "sleep" not in text


def undocumented(name, text):
  """Public modules, classes, functions and methods without a docstring."""
  tree = ast.parse(text)
  # The contract in sampling/__init__.py documents these for every sampler.
  is_sampler = layer(name) == "sampling" and not name.split(".")[-1].startswith(("_", "sampling"))
  contract = {"Config", "init", "step", "commit"} if is_sampler else set()
  wanted = {"": tree}
  for node in tree.body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in contract:
      wanted[node.name] = node
    if isinstance(node, ast.ClassDef):
      methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
      wanted |= {f"{node.name}.{m.name}": m for m in methods}
  return [
    f"{name}.{what}"
    for what, node in wanted.items()
    if not any(part.startswith("_") for part in what.split(".")) and not ast.get_docstring(node)
  ]


@every_module
def test_what_is_public_is_documented(name):
  assert undocumented(name, SOURCES[name]) == []


def test_what_is_undocumented_is_found():
  text = '"""M."""\ndef f(): ...\ndef _g(): ...\nclass C:\n  """C."""\n  def m(self): ...\n'
  assert undocumented("entropix_jax.x", text) == ["entropix_jax.x.f", "entropix_jax.x.C.m"]
  assert undocumented("entropix_jax.sampling.x", '"""M."""\ndef step(): ...') == []


# -- documents ---------------------------------------------------------------------------------

TOP = "entropix_jax|configs|scripts|tests|docs|benchmarks|\\.ci"
PATH = re.compile(rf"(?<![\w/.])(?:(?:{TOP})/[\w./*-]*[\w/*]|[A-Z]{{4,}}\.md)")


def absent(text):
  """Repository paths in a document that lead nowhere; `nNN` and `NAME` stand for anything."""
  mentioned = {re.sub(r"nNN|NAME", "*", path) for path in PATH.findall(text)}
  return sorted(path for path in mentioned if not any(ROOT.glob(path.rstrip("/"))))


@pytest.mark.parametrize(
  "document",
  ["README", "WORKSPACE", *(f"docs/{x}" for x in ("cookbook", "from_entropix", "hardware"))],
)
def test_paths_in_documents_exist(document):
  path = ROOT / f"{document}.md"
  text = path.read_text()
  assert absent(text) == []
  links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
  assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_path_that_leads_nowhere_is_found():
  there = "`tests/test_house.py`, `docs/notes/nNN-*.md`"
  text = f"see {there}, `docs/no_such.md`, scripts/no.py, NONE.md"
  assert absent(text) == ["NONE.md", "docs/no_such.md", "scripts/no.py"]
