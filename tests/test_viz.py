"""The report shows the trace: nothing lost, nothing rounded, nothing executed, nothing half-written."""

import bisect
import collections
import dataclasses
import html
import html.parser
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest
from conftest import refusal

from entropix_jax import metrics, viz
from entropix_jax.cli import terminal
from entropix_jax.errors import UserError
from entropix_jax.report import figure, notebook, reader, trace
from entropix_jax.report.page import ASSETS, ATTENTION, STEPS, UNITS, modules, script
from entropix_jax.rows import Token

HOSTILE = [
  "</script><script>document.body.dataset.hacked = 1</script>",
  "<img src=x onerror='document.body.dataset.hacked = 1'>",
  "<!--<script>",
  "&lt;b&gt; \"quoted\" 'too'",
  "{{data}} {{js}} \\g<0>",
  "line\u2028separator\u0085\x00\u202e",
  "\ud83e",  # half of a surrogate pair
  "\n\n",
  "",
]
ENTROPY = {"low_ent": 0.0693, "ask_ent": 2.0794, "high_ent": 3.4657}
VARENTROPY = {"low_varent": 0.048, "high_varent": 2.4023}
QUADRANT = {"name": "quadrant", **ENTROPY, **VARENTROPY}
BRANCHES = ["flow", "middle", "ask"]


def header(prompts=("Hello",), sampler=QUADRANT, branches=BRANCHES):
  return {
    "config": {"engine": {"attn_stats": "last"}},
    "seed": 7,
    "sampler": sampler,
    "branches": branches,
    "model": {"layers": 2},
    "prompts": [{"text": text, "ids": [1, 2, i]} for i, text in enumerate(prompts)],
  }


def rows(n, prompts=1, texts=(" word",), branches=BRANCHES, seed=0, top=True):
  """Tokens of all prompts, interleaved as generation interleaves them."""
  draw = random.Random(seed)
  for position in range(n):
    for prompt in range(prompts):
      row = {"prompt": prompt, "position": position, "id": draw.randrange(128_256)}
      row |= {"text": texts[position % len(texts)], "branch": draw.choice(branches)}
      for name in ("logprob", "logprob_law", "entropy", "varentropy", *ATTENTION, "min_p"):
        row[name] = float(f"{draw.expovariate(1):.6g}")
      if top:
        row["top"] = [[row["id"], row["text"], -0.5], [3, " </script>", -2.25], [4, "é", -9.5]]
      yield row | ({"finish": "stop"} if position == n - 1 else {})


def write(path, head, tokens, *choices):
  """A trace file; returns its tokens."""
  tokens = list(tokens)
  drawn = collections.Counter(row["branch"] for row in tokens)
  shares = {name: n / len(tokens) for name, n in drawn.items()}
  summary = {"generated_tokens": len(tokens), "branches": shares}
  lines = [head, *tokens, *({"samples": choice} for choice in choices), {"summary": summary}]
  # A lone surrogate has no UTF-8, so it can only come escaped.
  texts = [json.dumps(line, ensure_ascii="\\ud" in json.dumps(line)) for line in lines]
  path.write_text("\n".join([*texts, ""]), encoding="utf-8")
  return tokens


def trace_at(tmp_path):
  """A whole trace of five tokens."""
  write(tmp_path / "t.jsonl", header(), rows(5))
  return tmp_path / "t.jsonl"


class Scripts(html.parser.HTMLParser):
  """The page as a browser's parser cuts it: tags in order, the content of each script."""

  def __init__(self, page):
    super().__init__(convert_charrefs=True)
    self.tags, self.scripts = [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "script":
      self.scripts.append("")

  def handle_data(self, data):
    if self.tags and self.tags[-1] == "script":
      self.scripts[-1] += data


def embedded(page):
  return json.loads(Scripts(page).scripts[0])


def report(tmp_path, *paths, options=()):
  """The page that the command line makes of traces."""
  out = tmp_path / "report.html"
  assert viz._entry([*map(str, paths), "-o", str(out), *options]) == 0
  return out.read_text(encoding="utf-8")


def back(run):
  """A run of the page's data as the token lines it came from, by prompt and position."""
  for p, answers in enumerate(run["answers"]):
    (answer,) = answers["samples"]
    for i, token in enumerate(answer["ids"]):
      row = {"prompt": p, "position": i, "id": token, "text": answer["texts"][i]}
      row |= {name: column[i] for name, column in answer["columns"].items()}
      row |= {"branch": answer["branches"][i], "top": answer["tops"][i]}
      if i == len(answer["ids"]) - 1:
        row["finish"] = answer["finish"]
      yield {name: value for name, value in row.items() if value is not None}


def test_every_figure_of_the_trace_is_in_the_page(tmp_path):
  head = header(["one", "two"])
  tokens = write(tmp_path / "t.jsonl", head, rows(50, prompts=2, texts=(" a", "ß", "\n")))
  data = embedded(report(tmp_path, tmp_path / "t.jsonl"))
  (run,) = data["runs"]
  assert list(back(run)) == sorted(tokens, key=lambda row: (row["prompt"], row["position"]))
  assert run["header"] == head
  assert run["thresholds"] == {"entropy": ENTROPY, "varentropy": VARENTROPY}
  drawn = collections.Counter(row["branch"] for row in back(run))
  assert {name: n / 100 for name, n in drawn.items()} == run["summary"]["branches"]
  assert [group["members"] for group in data["groups"]] == [[[0, 0]], [[0, 1]]]


def test_a_trace_of_the_tracer_is_read_whole(tmp_path):
  path = tmp_path / "t.jsonl"
  tally = trace.Tally([3])
  with trace.Tracer(path, header(), tally.summary) as tracer:
    for i, branch in enumerate(["flow", "flow", "ask"]):
      numbers = {"logprob": -0.25, "entropy": 0.5 * i, "varentropy": 1e-9}
      finish = "length" if i == 2 else None
      token = Token(0, i, 5 + i, f" w{i}", branch, numbers, finish, seconds=1.0)
      tracer.token(token)
      tally.token(token)
    tracer.close(tally.summary())
  run = reader.read(path)
  answer = reader.opened(run, 0)
  assert answer["columns"]["entropy"] == [0.0, 0.5, 1.0]
  assert (answer["ids"], answer["finish"]) == ([5, 6, 7], "length")
  assert run["summary"] == json.loads(json.dumps(tally.summary()))


def test_hostile_text_stays_text(tmp_path):
  head = header([HOSTILE[0]], {"name": HOSTILE[1], "low_ent": "1"}, branches=[HOSTILE[2], "b"])
  path = tmp_path / "{{data}}<b>&.jsonl"
  tokens = write(path, head, rows(20, texts=HOSTILE, branches=head["branches"]))
  page = report(tmp_path, path)
  parsed = Scripts(page)
  assert parsed.tags.count("script") == 2
  assert "img" not in parsed.tags
  assert "b" not in parsed.tags
  data = json.loads(parsed.scripts[0])
  assert list(back(data["runs"][0])) == tokens
  assert data["runs"][0]["thresholds"]["entropy"] == {}
  assert parsed.scripts[1].strip() == script("report.js").strip()


def test_the_page_needs_no_network(tmp_path):
  page = report(tmp_path, trace_at(tmp_path))
  addresses = set(re.findall(r"\w+://[^\s\"')]*", page))
  # A name that SVG has and a comment; neither is opened.
  assert addresses == {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}
  assert "default-src 'none'" in page
  assert not {"link", "img", "iframe"} & set(Scripts(page).tags)
  assert "src" not in page.split("<script", 1)[1].split(">")[0]


def test_modules_share_no_name():
  """They become one script."""
  names = collections.Counter()
  for name in modules("report.js"):
    text = (ASSETS / name).read_text()
    names.update(
      re.findall(r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)", text, re.M)
    )
    assert not re.search(r"^(?:const|let) [\[{]|^import (?!\{.*\} from \"\./)", text, re.M)
  assert names.most_common(1)[0][1] == 1


def test_traces_of_one_prompt_stand_side_by_side(tmp_path):
  paths, branches = (tmp_path / "a.jsonl", tmp_path / "b.jsonl"), ["greedy", "sample"]
  write(paths[0], header(["x", "same", "same"]), rows(5, prompts=3))
  head = header(["same", "only b", "same"], {"name": "plain", "temperature": 0.8}, branches)
  write(paths[1], head, rows(9, prompts=3, branches=branches, seed=1))
  data = embedded(report(tmp_path, *paths, options=["--prompt", "2"]))
  assert [run["name"] for run in data["runs"]] == ["a", "b"]
  assert data["first"] == 1
  assert [(group["text"], group["members"]) for group in data["groups"]] == [
    ("x", [[0, 0]]),
    ("same", [[0, 1], [1, 0]]),
    ("same", [[0, 2], [1, 2]]),
    ("only b", [[1, 1]]),
  ]
  assert data["runs"][1]["thresholds"] == {"entropy": {}, "varentropy": {}}
  # Those of one name are told apart.
  assert reader.names(["x/a.jsonl", "y/b.jsonl"]) == ["a", "b"]
  assert reader.names(["x/a.jsonl", "y/a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]


def test_numbers_that_are_missing_or_not_finite(tmp_path):
  tokens = list(rows(4, top=False))
  del tokens[1]["attn_ent"], tokens[0]["min_p"]
  tokens[2]["late"] = 3.5
  tokens[3]["logprob_law"] = -math.inf
  tokens[3]["entropy"] = math.nan
  write(tmp_path / "t.jsonl", header(), tokens)
  (run,) = embedded(report(tmp_path, tmp_path / "t.jsonl"))["runs"]
  (answer,) = run["answers"][0]["samples"]
  columns = answer["columns"]
  assert columns["attn_ent"][1] is None
  assert columns["min_p"][0] is None
  assert columns["late"] == [None, None, 3.5, None]
  assert (columns["logprob_law"][3], columns["entropy"][3]) == ("-Infinity", "NaN")
  assert answer["tops"] == [None] * 4


def test_a_long_trace_stays_small(tmp_path):
  write(tmp_path / "t.jsonl", header(), rows(4000))
  assert len(report(tmp_path, tmp_path / "t.jsonl").encode()) < 3e6


def test_the_words_are_those_of_the_engine():
  assert set(ATTENTION) == {field.name for field in dataclasses.fields(metrics.AttnStats)}
  assert {field.name for field in dataclasses.fields(metrics.Confidence)} <= set(UNITS)
  assert len(figure.COLOURS) == len(figure.MARKERS) == 12


def test_a_token_has_one_colour_in_terminals_notebooks_pages_and_figures(tmp_path):
  shown = report(tmp_path, trace_at(tmp_path))
  xterm = {33: (0, 135, 255), 37: (0, 175, 175), 71: (95, 175, 95), 178: (215, 175, 0),
           208: (255, 135, 0), 160: (215, 0, 0)}  # fmt: skip
  for i, entropy in enumerate((0.05, 0.1, 0.5, 1.0, 2.5, math.nan)):
    token = Token(0, 0, 5, "w", "b", {"entropy": entropy, "varentropy": 0, "logprob": 0}, None, 0)
    rgb = xterm[int(re.search(r"38;5;(\d+)m", terminal.paint(token, ["b"]))[1])]
    behind = "rgba({}, {}, {}, ".format(*rgb)
    assert behind in notebook._span(token)
    assert f"--tint{i}: {behind}" in shown
    assert f"--step{i}: #{bytes(rgb).hex()};" in shown
    assert figure.SHADES[i] == (f"#{bytes(rgb).hex()}" if i else "#ebf5ff")  # the first is pale
    assert f"body[data-colour=entropy] .e{i}," in shown
    assert i == sum(not entropy <= bound for bound in STEPS["entropy"])


def test_it_starts_without_jax():
  code = "import sys, entropix_jax.viz; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- samples -----------------------------------------------------------------------------------

# (parent, at, tokens, finish, score, answer): forks of forks, one where its parent began, two at one place,
# one behind the end, one that emitted nothing.
TREE = [
  (None, 0, 10, "stop", -0.5, "12"),
  (0, 4, 8, "pruned", None, None),
  (None, 0, 6, "length", -2.25, None),
  (1, 7, 5, "stop", -0.125, "7"),
  (3, 7, 0, "cancelled", None, None),
  (1, 7, 4, "budget", -1e-9, HOSTILE[0]),
  (2, 6, 3, "uncertain", math.nan, "12"),
  (0, 8, 2, "stop", None, None),
]
LENGTHS = [10, 12, 6, 12, 7, 11, 9, 10]


def forked(tree=TREE, prompt=0, chosen=3, seed=0, texts=(" word", *HOSTILE)):
  """Token lines of a prompt's samples, as they would be emitted together, and the line that tells of them."""
  tokens = []
  for s, (_, at, n, *_) in enumerate(tree):
    for row in rows(n, texts=texts, seed=100 * seed + s):
      row |= {"prompt": prompt, "position": row["position"] + at}
      tokens.append(row | ({"sample": s} if s else {}))
  tokens.sort(key=lambda row: row["position"])
  fields = ("parent", "at", "tokens", "finish", "score", "answer")
  samples = [{"sample": s} | dict(zip(fields, entry, strict=True)) for s, entry in enumerate(tree)]
  choice = {"prompt": prompt, "method": "branch", "rule": "majority", "chosen": chosen}
  return tokens, choice | {"samples": samples[::-1]}


def spelled_out(tokens, tree, s):
  """The token lines along sample s, position by position."""
  found = {(row.get("sample", 0), row["position"]): row for row in tokens}
  parent, at, n, *_ = tree[s]
  before = spelled_out(tokens, tree, parent)[:at] if parent is not None else []
  return before + [found[s, i] for i in range(at, at + n)]


def test_the_text_of_a_sample_begins_with_its_ancestors(tmp_path):
  tokens, choice = forked()
  tokens[5]["late"] = 3.5  # a number that few tokens have
  more, other = forked(TREE[:3], prompt=2, chosen=0, seed=1)
  alone = [row | {"prompt": 1} for row in rows(3)]
  path = tmp_path / "t.jsonl"
  write(path, header(["a", "b", "c"]), [*tokens, *alone, *more], other, choice)
  (run,) = embedded(report(tmp_path, path))["runs"]
  samples = run["answers"][0]["samples"]
  about = {k: v for k, v in run["answers"][0].items() if k != "samples"}
  assert about == {"method": "branch", "rule": "majority", "chosen": 3}
  for s, (parent, at, n, finish, score, answer) in enumerate(TREE):
    own = samples[s]
    assert (own["parent"], own["at"], own["finish"], own["answer"]) == (parent, at, finish, answer)
    assert own["score"] == ("NaN" if score != score else score)
    assert len(own["ids"]) == n
    along = spelled_out(tokens, TREE, s)
    got = reader.whole(samples, s)
    assert len(along) == LENGTHS[s]
    for one, all_of_them in {
      "id": "ids",
      "text": "texts",
      "branch": "branches",
      "top": "tops",
    }.items():
      assert got[all_of_them] == [row[one] for row in along]
    for name in ("entropy", "attn_ent", "late"):
      assert got["columns"].get(name, [None] * len(along)) == [row.get(name) for row in along]
  assert reader.opened(run, 0)["ids"] == reader.whole(samples, 3)["ids"]
  assert set(run["answers"][1]) == {"chosen", "samples"}
  assert reader.opened(run, 1)["finish"] == "stop"
  assert len(run["answers"][2]["samples"]) == 3


def test_samples_are_placed_so_that_no_lines_cross():
  samples = [{"parent": parent, "at": at} for parent, at, *_ in TREE]
  row = {s: i for i, s in enumerate(figure.rank(samples))}
  assert sorted(row) == list(range(len(TREE)))
  for s, (parent, at, *_) in enumerate(TREE):
    if parent is not None:
      between = [o for o in row if row[parent] < row[o] < row[s]]
      assert row[parent] < row[s]
      assert all(TREE[o][1] >= at for o in between)
  assert row[0] < row[7] < row[1]


def entry(s, **changes):
  def change(choice):
    next(e for e in choice["samples"] if e["sample"] == s).update(changes)

  return change


CHOICES = {
  "no samples": (lambda c: c.update(samples=[]), "lists no samples"),
  "no list": (lambda c: c.update(samples={}), "lists no samples"),
  "no objects": (lambda c: c.update(samples=[1, 2]), "lists no samples"),
  "other prompt": (lambda c: c.update(prompt=1), "is about prompt 1, but the header has 1"),
  "a float": (lambda c: c.update(prompt=0.0), "is about prompt 0.0"),
  "no number": (lambda c: c["samples"][0].pop("sample"), "number its samples from 0 to 7"),
  "twice": (entry(6, sample=5), "number its samples from 0 to 7"),
  "too far": (entry(6, sample=8), "number its samples from 0 to 7"),
  "chosen": (lambda c: c.update(chosen=8), "chose sample 8 of 8"),
  "none chosen": (lambda c: c.update(chosen=None), "chose sample None of 8"),
  "no rule": (lambda c: c.pop("rule"), "lacks rule"),
  "no score": (lambda c: c["samples"][0].pop("score"), "lacks score of sample 7"),
  "score": (entry(2, score="high"), "wrong type of score of sample 2"),
  "answer": (entry(2, answer=12), "wrong type of answer of sample 2"),
  "finish": (entry(2, finish=1), "wrong type of finish of sample 2"),
  "own parent": (entry(2, parent=2), "sample 2 the parent 2, which is not an earlier sample"),
  "loop": (entry(1, parent=3), "sample 1 the parent 3, which is not an earlier sample"),
  "behind": (entry(1, at=11), "sample 1 begin at 11, but its parent covers 0 to 10"),
  "before": (entry(3, at=3), "sample 3 begin at 3, but its parent covers 4 to 12"),
  "late root": (entry(2, at=1), "sample 2 begin at 1, but the text begins"),
  "negative": (entry(2, tokens=-1), "sample 2 -1 tokens"),
  "elsewhere": (entry(1, at=5), "has position 4 instead of 5"),
  "fewer": (entry(2, tokens=5), "begin at 6, but its parent covers 0 to 5"),
  "more": (entry(6, tokens=4), "incomplete .3 of 4 tokens of sample 6 of prompt 0"),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_spoilt_samples_are_refused(tmp_path, kind):
  spoil, says = CHOICES[kind]
  tokens, choice = forked()
  spoil(choice)
  refused(tmp_path / "t.jsonl", says, tokens, choice)


def refused(path, says, tokens, *choices, change=lambda lines: lines):
  write(path, header(), tokens, *choices)
  path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
  with pytest.raises(UserError, match=says) as error:
    reader.read(path)
  assert "\n" not in str(error.value)


def test_samples_that_nobody_tells_of_are_refused(tmp_path):
  tokens, choice = forked()
  path = tmp_path / "t.jsonl"
  refused(path, "belongs to sample 2, but prompt 0 has 1", tokens)
  refused(path, "samples of prompt 0 again", tokens, choice, choice)
  refused(path, "tokens of sample", tokens[:-1], choice)

  def choice_first(lines):
    return [lines[0], lines[-2], *lines[1:-2], lines[-1]]

  refused(path, r"Line 2 .* lacks prompt, position", tokens, choice, change=choice_first)


# -- what can go wrong -------------------------------------------------------------------------


def third(**keys):
  """Damage to the third line of a trace."""

  def damage(lines):
    return [*lines[:2], json.dumps(json.loads(lines[2]) | keys) + "\n", *lines[3:]]

  return damage


DAMAGE = {
  "empty": (lambda lines: [], "not a trace"),
  "headless": (lambda lines: lines[1:], "not a trace"),
  "text": (lambda lines: ["Once upon a time\n"], "not a trace"),
  "hole": (lambda lines: [*lines[:2], *lines[3:]], "Line 3 .* position 2 instead of 1"),
  "last token gone": (lambda lines: [*lines[:-2], lines[-1]], "incomplete .*4 of 5 tokens"),
  "garbage": (lambda lines: [*lines[:2], "[1]\n", *lines[3:]], "Line 3 .* not a JSON object"),
  "two runs": (lambda lines: lines + lines, "Line 7 .* lacks"),
  "no entropy": (third(entropy=None), "Line 3 .* no number for entropy"),
  "no branch": (third(branch="new"), "Line 3 .* branch 'new'"),
  "no prompt": (third(prompt=9), "Line 3 .* prompt 9"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_spoilt_trace_is_refused(tmp_path, capsys, kind):
  damage, says = DAMAGE[kind]
  path = trace_at(tmp_path)
  path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))
  assert viz._entry([str(path), "-o", str(tmp_path / "r.html")]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert re.search(says, error)
  assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_trace_that_is_cut_anywhere_is_read_as_far_as_it_goes(tmp_path, capsys):
  path = tmp_path / "t.jsonl"
  write(path, header(), rows(5, texts=["é"]))
  data = path.read_bytes()
  for end in range(data.index(b"\n"), len(data) - 1):
    path.write_bytes(data[:end])
    run = reader.read(path)
    assert run["incomplete"]
    assert run["summary"]["generated_tokens"] == data[: end + 1].count(b"\n") - 1
  assert embedded(report(tmp_path, path))["runs"][0]["name"] == "t (incomplete)"
  assert f"The trace {path} is incomplete: its run ended after 5 tokens." in capsys.readouterr().err


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["no.jsonl", "-o", "r.html"], "no.jsonl does not exist"),
    ([".", "-o", "r.html"], "cannot be read"),
    (["bin", "-o", "r.html"], "not a trace"),
    (["t.jsonl"], "Nothing to write"),
    ([], "required"),
    (["t.jsonl", "-o", "none/r.html"], "none does not exist"),
    (["t.jsonl", "-o", "."], "is a folder"),
    (["t.jsonl", "-o", "t.jsonl"], "is one of the traces"),
    (["t.jsonl", "-o", "r.html", "--prompt", "2"], "1 prompt"),
    (["t.jsonl", "-o", "r.html", "--prompt", "x"], "invalid int"),
    (["t.jsonl", "-o", "r.html", "--wrong"], "Unrecognized arguments: --wrong"),
  ],
)
def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys, args, says):
  monkeypatch.chdir(tmp_path)
  trace_at(tmp_path)
  (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert viz._entry(args) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.count("\n") == 1
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_all_files_are_written_or_none_and_appear_when_they_are_whole(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  old = tmp_path / "old.html"
  old.write_text("old")
  refusal(["does not exist"], viz.write, {old: b"new", tmp_path / "none" / "x.png": b"new"})
  monkeypatch.setattr(os, "replace", full)
  refusal(["No space left"], viz.write, {old: b"new"})
  assert old.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["old.html"]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  path = trace_at(tmp_path)
  assert viz._entry([str(path), "-o", f"{tmp_path}/r.html", "--png", f"{tmp_path}/f"]) == 2
  assert 'pip install -e ".[viz]"' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


# -- pictures ----------------------------------------------------------------------------------


def test_figures_for_papers(tmp_path):
  pytest.importorskip("matplotlib", reason="matplotlib is not installed")
  plain = {"name": "$plain_$", "temperature": 0.8}
  tokens = list(rows(60, prompts=2))
  tokens[7]["entropy"] = math.nan
  write(tmp_path / "a.jsonl", header(["x", "y"]), tokens)
  write(tmp_path / "b.jsonl", header(["y"], plain, ["b"]), rows(30, branches=["b"]))
  args = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
  assert viz._entry([*args, "--png", str(tmp_path / "fig"), "--prompt", "2"]) == 0
  for kind, pixels in (("scatter", (2160, 1200)), ("timeline", (2160, 1560))):
    content = (tmp_path / f"fig-{kind}.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    size = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert size == pixels
    per_metre = content[content.index(b"pHYs") + 4 :][:4]
    assert round(int.from_bytes(per_metre) * 0.0254) == 300
  assert len(list(tmp_path.iterdir())) == 4


def placed(monkeypatch, draw, *args):
  """(size in inches, axes' boxes with all that belongs to them, names of thresholds) of a figure."""
  agg = pytest.importorskip("matplotlib.backends.backend_agg", reason="matplotlib is not installed")
  kept, png = [], figure._png
  monkeypatch.setattr(figure, "_png", lambda drawing: kept.append(drawing) or png(drawing))
  draw(*args)
  monkeypatch.undo()
  renderer = agg.FigureCanvasAgg(kept[0]).get_renderer()
  boxes = [ax.get_tightbbox(renderer) for ax in kept[0].axes]
  assert all(
    min(b.x0, b.y0) >= 0 and b.x1 <= kept[0].bbox.x1 and b.y1 <= kept[0].bbox.y1 for b in boxes
  )
  names = [
    [(text.get_gid(), text.get_window_extent(renderer)) for text in ax.texts if text.get_gid()]
    for ax in kept[0].axes
  ]
  return kept[0].get_size_inches().tolist(), boxes, names


def apart(boxes):
  """Whether no two boxes overlap by more than a pixel."""
  return not any(
    min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    for i, a in enumerate(boxes)
    for b in boxes[:i]
  )


CLOSE = QUADRANT | {"low_ent": 0.001, "ask_ent": 0.004, "high_ent": 0.005, "low_varent": 2.3}


@pytest.mark.parametrize(
  ("runs", "n", "sizes"),
  [
    (1, 60, ([3.6, 4.0], [7.2, 2.6], [7.2, 2.58])),
    (2, 60, ([7.2, 4.0], [7.2, 5.2], [7.2, 4.46])),
    (2, 500, ([7.2, 4.0], [10.8, 5.2], [7.2, 4.46])),
    (4, 60, ([7.2, 8.0], [10.8, 5.2], [10.8, 4.46])),
    (6, 60, ([10.8, 8.0], [10.8, 7.8], [10.8, 6.34])),
    (7, 30, ([10.8, 12.0], [10.8, 10.4], [10.8, 8.22])),
  ],
)
def test_figures_grow_with_their_traces_and_nothing_overlaps(tmp_path, monkeypatch, runs, n, sizes):
  tokens, choice = forked([(None, 0, n, *TREE[0][3:]), *TREE[1:]], chosen=0)
  write(tmp_path / "t.jsonl", header(sampler=CLOSE), tokens, choice)
  read = [reader.read(tmp_path / "t.jsonl")] * runs
  titles = ["a long folder/of traces with a long name " * 3] * runs
  for draw, size in zip((figure.scatter, figure.timeline, figure.tree), sizes, strict=True):
    found, boxes, names = placed(monkeypatch, draw, read, titles)
    assert found == pytest.approx(size)
    assert len(boxes) == runs * (1 + (draw is figure.timeline))
    assert apart(boxes)
    for own in names:
      assert apart([box for axis, box in own if axis == "y"])
      slanted = sorted(box.x0 for axis, box in own if axis == "x")
      assert all(b - a >= 12 / 72 * 300 for a, b in itertools.pairwise(slanted))
  assert len(names) == runs


def test_a_figure_of_the_tree_where_there_is_one(tmp_path):
  pytest.importorskip("matplotlib", reason="matplotlib is not installed")
  tokens, choice = forked()
  tokens[3]["entropy"] = math.nan
  alone, other = forked([TREE[0], TREE[2]], prompt=1, chosen=1)
  path = tmp_path / "t.jsonl"
  write(path, header(["x", "y"]), [*tokens, *alone], choice, other)
  figures = "scatter", "timeline", "tree"
  for prompt, drawn in ((1, figures), (2, figures[:2])):
    prefix = tmp_path / f"fig{prompt}"
    assert viz._entry([str(path), "--png", str(prefix), "--prompt", str(prompt)]) == 0
    assert {p.name for p in tmp_path.glob(f"fig{prompt}*")} == {
      f"fig{prompt}-{kind}.png" for kind in drawn
    }
  content = (tmp_path / "fig1-tree.png").read_bytes()
  height = (0.6 + 0.16 * len(TREE) + 0.7) * 300
  assert int.from_bytes(content[16:20]) == 2160
  assert abs(int.from_bytes(content[20:24]) - height) <= 1
  assert len(figure._points(reader.read(path))) == LENGTHS[3] + TREE[2][2]  # the chosen samples


NONE = "\N{EN DASH}"
PLOTS = 7  # of a pane: scatter, entropy, varentropy, attention in three units, any other number
ARTEFACTS = pathlib.Path(__file__).parents[1] / "build" / "artefacts"  # pictures of the last run
CHROMES = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()


def browse(tmp_path, page, *options, script=""):
  """What a headless browser prints about a page, which runs a script once it is drawn."""
  text = page.read_text()
  page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
  binary = next(filter(None, map(shutil.which, [*CHROMES, "firefox"])), None)
  if binary is None:
    pytest.skip("no chromium, chrome or firefox on PATH")
  if "firefox" in binary and "--dump-dom" in options:
    pytest.skip("firefox cannot print the drawn page; chromium can")
  profile = tmp_path / "profile"
  profile.mkdir(exist_ok=True)
  own = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
  if "firefox" in binary:
    own = ["--profile", str(profile)]
  command = [binary, "--headless", *own, *options, page.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


def two_traces(tmp_path):
  paths, branches = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ["greedy", "sample"]
  tokens = rows(120, prompts=2, texts=[" w", *HOSTILE])
  write(paths[0], header(["Hi", HOSTILE[0]]), tokens)
  tokens = rows(80, texts=HOSTILE, branches=branches, top=False)
  write(paths[1], header([HOSTILE[0]], {"name": "plain"}, branches), tokens)
  report(tmp_path, *paths, options=["--prompt", "2"])
  return tmp_path / "report.html"


def test_a_browser_takes_a_picture(tmp_path):
  page = two_traces(tmp_path)
  ARTEFACTS.mkdir(parents=True, exist_ok=True)
  shot = ARTEFACTS / "report.png"
  shot.unlink(missing_ok=True)
  browse(tmp_path, page, f"--screenshot={shot}", "--window-size=1400,2400")
  assert shot.stat().st_size > 50_000  # an empty page is a tenth of that


def test_a_browser_draws_every_token_and_runs_no_text(tmp_path):
  dom = browse(tmp_path, two_traces(tmp_path), "--dump-dom")
  body = re.search(r"<body[^>]*>", dom)[0]
  assert 'data-ready="yes"' in body
  assert 'data-tokens="200"' in body
  assert "hacked" not in body
  parsed = Scripts(dom)
  assert parsed.tags.count("canvas") == 2 * PLOTS
  assert "img" not in parsed.tags
  runs = embedded(dom)["runs"]
  answers = [reader.opened(runs[0], 1), reader.opened(runs[1], 0)]
  steps = [
    tuple(bisect.bisect_left(STEPS[name], answer["columns"][name][i]) for name in STEPS)
    for answer in answers
    for i in range(len(answer["ids"]))
  ]
  classes = re.findall(r'<span class="tok e(\d) v(\d) b(\d+)', dom)
  assert [(int(e), int(v)) for e, v, _ in classes] == steps
  branches = [*BRANCHES, "greedy", "sample"]
  drawn = [name for answer in answers for name in answer["branches"]]
  assert [branches[int(b)] for *_, b in classes] == drawn
  shown = re.findall(r'data-branch="(\w+)" data-count="(\d+)"', dom)
  assert {name: int(n) for name, n in shown if n != "0"} == collections.Counter(drawn)


def test_a_browser_shows_all_numbers_of_the_token_under_the_pointer(tmp_path):
  page = two_traces(tmp_path)
  answer = reader.opened(embedded(page.read_text())["runs"][0], 1)
  hover = """
    document.querySelectorAll(".tok")[11].dispatchEvent(
      new PointerEvent("pointermove", {bubbles: true, clientX: 1, clientY: 1}));
  """
  dom = browse(tmp_path, page, "--dump-dom", script=hover)
  tip = re.search(r'<aside id="tip".*?</aside>', dom, re.DOTALL)[0]
  shown = dict(re.findall(r"<dt>(\w+)</dt><dd>([-\d.e]+)", tip))
  assert {name: float(x) for name, x in shown.items()} == {
    name: column[11] for name, column in answer["columns"].items()
  }
  for words in ("token 11", f"id {answer['ids'][11]}", answer["branches"][11], "ask_ent 2.0794"):
    assert words in tip
  assert tip.count("<tr") == len(answer["tops"][11])
  assert len(re.findall(r'class="cursor \w+" style="[^"]*display: block', dom)) == PLOTS


def tree_page(tmp_path):
  tokens, choice = forked()
  write(tmp_path / "t.jsonl", header(), tokens, choice)
  report(tmp_path, tmp_path / "t.jsonl")
  return tmp_path / "report.html", tokens


def classes(row):
  e, v = (bisect.bisect_left(STEPS[name], row[name]) for name in STEPS)
  return f"e{e} v{v} b{BRANCHES.index(row['branch'])}"


def test_a_browser_draws_the_tree_of_samples(tmp_path):
  page, tokens = tree_page(tmp_path)
  dom = browse(tmp_path, page, "--dump-dom")
  assert f'data-tokens="{LENGTHS[3]}"' in dom  # the chosen one's text is open
  assert "hacked" not in re.search(r"<body[^>]*>", dom)[0]
  svg = re.search(r'<div class="tree".*?</svg>', dom, re.DOTALL)[0]
  lines = re.findall(r'<g data-sample="(\d)">(.*?)</g>', svg, re.DOTALL)
  order = [
    int(s)
    for s, _ in sorted(lines, key=lambda p: float(re.search(r"<text[^>]* y=\"([\d.]+)", p[1])[1]))
  ]
  assert order == figure.rank([{"parent": parent, "at": at} for parent, at, *_ in TREE])
  for s, line in lines:
    own = [row for row in tokens if row.get("sample", 0) == int(s)]
    assert set(re.findall(r'class="seg (e\d v\d b\d)', line)) == {classes(row) for row in own}
    thick = re.findall(r'class="rim( on)?" stroke-width="(\d+)"', line)
    # The chosen text: all of 3, and 0 and 1 up to where it left them.
    kinds = {(bool(on), width == "15") for on, width in thick}
    assert kinds == {0: {(True, True), (False, False)}, 1: {(True, True), (False, False)},
                     3: {(True, True)}, 4: set()}.get(int(s), {(False, False)})  # fmt: skip
  assert dom.count('class="joint on" stroke-width="4"') == 2
  ends = [re.search(r'd="([^"]*)" class="(end[^"]*)"', line).groups() for _, line in lines]
  assert len(set(ends)) == 6  # as there are ways to end
  table = re.search(r'<div class="picks">.*?</table>', dom, re.DOTALL)[0]
  cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr")[2:]]
  said = [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]
  assert said[3] == ["4 ✓", "-0.125", "7", "5", "stop", "2 at 7"]
  assert said[4] == ["5", NONE, NONE, "0", "cancelled", "4 at 7"]
  assert said[5][2] == HOSTILE[0].replace("<", "&lt;").replace(">", "&gt;")
  assert said[6][1] == NONE


def test_a_browser_shows_the_sample_that_is_picked(tmp_path):
  page, tokens = tree_page(tmp_path)
  script = """
    const seen = [];
    const look = () => seen.push([panes[0].sample, panes[0].answer.texts, document.activeElement.className]);
    const press = (key) => document.querySelector(".tree").dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const heights = [6, 7, 8].map((i) => panes[0].tree.boxOf(3, i).top); // 6 is its parent's
    document.body.dataset.fork = `${heights[0] !== heights[1]} ${heights[1] === heights[2]}`;
    document.querySelector(".picks tr[data-sample='6'] td").click(); look();
    const radio = document.querySelector(".picks input[value='5']"); radio.focus(); radio.click(); look();
    const box = panes[0].tree.boxOf(1, 11);
    document.querySelector(".tree svg").dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: box.left - 14, clientY: box.top + 14})); look();
    document.querySelector(".tree").focus(); press("End"); press("ArrowDown"); press("Enter"); look();
    document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
  """
  dom = browse(tmp_path, page, "--dump-dom", script=script)
  seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))
  below = figure.rank([{"parent": parent, "at": at} for parent, at, *_ in TREE])
  picked = [6, 5, 1, below[below.index(1) + 1]]
  assert [s for s, *_ in seen] == picked
  for s, texts, _ in seen:
    whole = [row["text"].replace("\ud83e", "\ufffd") for row in spelled_out(tokens, TREE, s)]
    assert texts == whole
  assert 'data-fork="true true"' in dom
  assert seen[3][2] == "tree"  # who walks with the keys can go on


def test_a_browser_tells_of_any_token_of_the_tree(tmp_path):
  page, tokens = tree_page(tmp_path)
  hover = """
    const box = panes[0].tree.boxOf(2, 3);
    document.querySelector(".tree svg").dispatchEvent(
      new PointerEvent("pointermove", {bubbles: true, clientX: box.left - 14, clientY: box.top + 14}));
  """
  dom = browse(tmp_path, page, "--dump-dom", script=hover)
  row = next(row for row in tokens if row.get("sample") == 2 and row["position"] == 3)
  tip = re.search(r'<aside id="tip"[^>]*>.*?</aside>', dom, re.DOTALL)[0]
  assert "hidden" not in tip.split(">")[0]
  assert f"sample 3 · token 3 · id {row['id']}" in tip
  assert f"entropy <b>{json.dumps(row['entropy'])}</b> nats" in tip
  assert html.escape(row["text"].replace(" ", "␣"), quote=False) in tip
  assert "tok on" not in dom  # it is not of the text that is open


@pytest.mark.parametrize(("width", "tops"), [(1480, 1), (500, 4)])
def test_a_browser_sets_runs_side_by_side_where_there_is_room(tmp_path, width, tops):
  paths = [tmp_path / f"{name}.jsonl" for name in "abcd"]
  for i, path in enumerate(paths[:3]):
    write(path, header(), rows(60, seed=i))
  tokens, choice = forked()
  write(paths[3], header(), tokens, choice)
  report(tmp_path, *paths)
  script = """
    document.body.dataset.tops = new Set(panes.map(({node}) => node.offsetTop)).size;
    const under = (box) => box.offsetTop + box.offsetHeight, part = (pane, name) => pane.node.querySelector(`.${name}`);
    document.body.dataset.gap = Math.max(...panes.map((pane) => part(pane, "branches").offsetTop - under(part(pane, "words"))));
    document.body.dataset.wide = document.querySelector("#cards .picks").closest(".pane").offsetWidth / document.getElementById("panes").offsetWidth;
    document.body.dataset.over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    document.querySelector("#cards [data-sample='6'] .num").click();
    document.body.dataset.picked = `${panes[3].sample} ${panes[3].answer.texts.length}`;
  """
  size = f"--window-size={width},1000"
  dom = browse(tmp_path, tmp_path / "report.html", "--dump-dom", size, script=script)
  assert f'data-tops="{tops}"' in dom
  assert 'data-over="0"' in dom
  assert 'data-gap="20"' in dom  # the tree of one leaves no gap in the others
  assert 'data-wide="1"' in dom
  assert f'data-picked="6 {LENGTHS[6]}"' in dom
  assert re.findall(r"<h2>(\w)</h2>", dom) == list("dabcd")  # the tree's card first
