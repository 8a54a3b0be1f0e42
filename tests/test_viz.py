"""The report shows the trace: nothing lost, nothing rounded, nothing executed, nothing half-written."""

import bisect
import collections
import dataclasses
import html.parser
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from entropix_jax import metrics, terminal, trace, viz
from entropix_jax.errors import UserError
from entropix_jax.generate import Token

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
QUADRANT = {
  "name": "quadrant",
  "low_ent": 0.0693,
  "low_varent": 0.048,
  "ask_ent": 2.0794,
  "high_ent": 3.4657,
  "high_varent": 2.4023,
}
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
      row = {
        "prompt": prompt,
        "position": position,
        "id": draw.randrange(128_256),
        "text": texts[position % len(texts)],
        "branch": draw.choice(branches),
      }
      row |= {
        name: float(f"{draw.expovariate(1):.6g}")
        for name in ("logprob", "logprob_law", "entropy", "varentropy", *viz.ATTENTION, "min_p")
      }
      if top:
        row["top"] = [[row["id"], row["text"], -0.5], [3, " </script>", -2.25], [4, "é", -9.5]]
      yield row | ({"finish": "stop"} if position == n - 1 else {})


def write(path, head, tokens):
  """A trace file; returns its tokens."""
  tokens = list(tokens)
  shares = collections.Counter(row["branch"] for row in tokens)
  summary = {
    "generated_tokens": len(tokens),
    "branches": {name: n / len(tokens) for name, n in shares.items()},
  }
  lines = [head, *tokens, {"summary": summary}]
  # A lone surrogate has no UTF-8, so it can only come escaped.
  path.write_bytes(
    b"".join(
      json.dumps(line, ensure_ascii="\\ud" in json.dumps(line)).encode() + b"\n" for line in lines
    )
  )
  return tokens


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
  for p, answer in enumerate(run["answers"]):
    for i, token in enumerate(answer["ids"]):
      row = {
        "prompt": p,
        "position": i,
        "id": token,
        "text": answer["texts"][i],
        "branch": answer["branches"][i],
      }
      row |= {
        name: column[i] for name, column in answer["columns"].items() if column[i] is not None
      }
      if answer["tops"][i] is not None:
        row["top"] = answer["tops"][i]
      if i == len(answer["ids"]) - 1 and answer["finish"]:
        row["finish"] = answer["finish"]
      yield row


def in_order(tokens):
  return sorted(tokens, key=lambda row: (row["prompt"], row["position"]))


def test_every_figure_of_the_trace_is_in_the_page(tmp_path):
  head = header(["one", "two"])
  tokens = write(tmp_path / "t.jsonl", head, rows(50, prompts=2, texts=(" a", "ß", "\n")))
  data = embedded(report(tmp_path, tmp_path / "t.jsonl"))
  (run,) = data["runs"]
  assert list(back(run)) == in_order(tokens)
  assert run["header"] == head
  assert run["thresholds"] == {
    "entropy": {"low_ent": 0.0693, "ask_ent": 2.0794, "high_ent": 3.4657},
    "varentropy": {"low_varent": 0.048, "high_varent": 2.4023},
  }
  drawn = collections.Counter(name for answer in run["answers"] for name in answer["branches"])
  assert {name: n / 100 for name, n in drawn.items()} == run["summary"]["branches"]
  assert data["groups"] == [
    {"text": "one", "members": [[0, 0]]},
    {"text": "two", "members": [[0, 1]]},
  ]


def test_a_trace_of_the_tracer_is_read_whole(tmp_path):
  path = tmp_path / "t.jsonl"
  tally = trace.Tally([3])
  written = []
  with trace.Tracer(path, header()) as tracer:
    for i, branch in enumerate(["flow", "flow", "ask"]):
      values = {
        "prompt": 0,
        "position": i,
        "id": 5 + i,
        "text": f" w{i}",
        "branch": branch,
        "numbers": {"logprob": -0.25, "entropy": 0.5 * i, "varentropy": 1e-9},
        "finish": "length" if i == 2 else None,
        "seconds": 1.0,
      }
      token = Token(**values)
      tracer.token(token)
      tally.token(token)
      written.append(token)
    tracer.close(tally.summary())
  run = viz.read(path)
  (answer,) = run["answers"]
  assert answer["columns"]["entropy"] == [token.numbers["entropy"] for token in written]
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
  assert parsed.scripts[1].strip() == (viz.ASSETS / "report.js").read_text().strip()


def test_the_page_needs_no_network(tmp_path):
  write(tmp_path / "t.jsonl", header(), rows(3))
  page = report(tmp_path, tmp_path / "t.jsonl")
  addresses = set(re.findall(r"\w+://[^\s\"')]*", page))
  assert addresses == {"http://www.w3.org/2000/svg"}  # a name that SVG has, never opened
  assert "default-src 'none'" in page
  assert not {"link", "img", "iframe"} & set(Scripts(page).tags)
  assert "src" not in page.split("<script", 1)[1].split(">")[0]


def test_traces_of_one_prompt_stand_side_by_side(tmp_path):
  plain = {"name": "plain", "temperature": 0.8}
  write(tmp_path / "a.jsonl", header(["x", "same", "same"]), rows(5, prompts=3))
  write(
    tmp_path / "b.jsonl",
    header(["same", "only b", "same"], plain, ["greedy", "sample"]),
    rows(9, prompts=3, branches=["greedy", "sample"], seed=1),
  )
  data = embedded(
    report(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl", options=["--prompt", "2"])
  )
  assert [run["name"] for run in data["runs"]] == ["a", "b"]
  assert data["first"] == 1
  assert [(group["text"], group["members"]) for group in data["groups"]] == [
    ("x", [[0, 0]]),
    ("same", [[0, 1], [1, 0]]),
    ("same", [[0, 2], [1, 2]]),
    ("only b", [[1, 1]]),
  ]
  assert data["runs"][1]["thresholds"] == {"entropy": {}, "varentropy": {}}


def test_traces_of_one_name_are_told_apart():
  assert viz.names(["x/a.jsonl", "y/b.jsonl"]) == ["a", "b"]
  assert viz.names(["x/a.jsonl", "y/a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]


def test_numbers_that_are_missing_or_not_finite(tmp_path):
  tokens = list(rows(4, top=False))
  del tokens[1]["attn_ent"], tokens[0]["min_p"]
  tokens[2]["late"] = 3.5
  tokens[3]["logprob_law"] = -math.inf
  tokens[3]["entropy"] = math.nan
  write(tmp_path / "t.jsonl", header(), tokens)
  (run,) = embedded(report(tmp_path, tmp_path / "t.jsonl"))["runs"]
  columns = run["answers"][0]["columns"]
  assert columns["attn_ent"][1] is None
  assert columns["min_p"][0] is None
  assert columns["late"] == [None, None, 3.5, None]
  assert (columns["logprob_law"][3], columns["entropy"][3]) == ("-Infinity", "NaN")
  assert run["answers"][0]["tops"] == [None] * 4


def test_a_long_trace_stays_small(tmp_path):
  write(tmp_path / "t.jsonl", header(), rows(4000))
  page = report(tmp_path, tmp_path / "t.jsonl")
  assert len(page.encode()) < 3e6
  assert len(embedded(page)["runs"][0]["answers"][0]["ids"]) == 4000


def test_the_words_are_those_of_the_engine():
  assert set(viz.ATTENTION) == {field.name for field in dataclasses.fields(metrics.AttnStats)}
  assert viz.STEPS["entropy"] == tuple(bound for bound, _ in terminal.RAMP[:-1])
  assert len(viz.COLOURS) == len(viz.MARKERS) == 12


def test_it_starts_without_jax():
  code = "import sys, entropix_jax.viz; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what can go wrong -------------------------------------------------------------------------


def lines_of(path):
  return path.read_text().splitlines(keepends=True)


def damage(kind, path):
  """Spoil a whole trace in one way."""
  lines = lines_of(path)
  row = json.loads(lines[2])
  change = {
    "empty": lambda: [],
    "headless": lambda: lines[1:],
    "text": lambda: ["Once upon a time\n"],
    "cut": lambda: lines[:-1],
    "cut inside": lambda: [*lines[:-2], lines[-2][:20]],
    "hole": lambda: [*lines[:2], *lines[3:]],
    "last token gone": lambda: [*lines[:-2], lines[-1]],
    "garbage": lambda: [*lines[:2], "[1]\n", *lines[3:]],
    "two runs": lambda: lines + lines,
    "no entropy": lambda: [*lines[:2], json.dumps(row | {"entropy": None}) + "\n", *lines[3:]],
    "no branch": lambda: [*lines[:2], json.dumps(row | {"branch": "new"}) + "\n", *lines[3:]],
    "no prompt": lambda: [*lines[:2], json.dumps(row | {"prompt": 9}) + "\n", *lines[3:]],
  }
  path.write_text("".join(change[kind]()))


@pytest.mark.parametrize(
  ("kind", "says"),
  [
    ("empty", "not a trace"),
    ("headless", "not a trace"),
    ("text", "not a trace"),
    ("cut", "incomplete"),
    ("cut inside", "incomplete"),
    ("hole", "Line 3 .* position 2 where 1 is due"),
    ("last token gone", "incomplete .*4 of 5 tokens"),
    ("garbage", "Line 3 .* not a JSON object"),
    ("two runs", "Line 7 .* lacks"),
    ("no entropy", "Line 3 .* no number for entropy"),
    ("no branch", "Line 3 .* branch 'new'"),
    ("no prompt", "Line 3 .* prompt 9"),
  ],
)
def test_a_spoilt_trace_is_refused(tmp_path, capsys, kind, says):
  path = tmp_path / "t.jsonl"
  write(path, header(), rows(5))
  damage(kind, path)
  assert viz._entry([str(path), "-o", str(tmp_path / "r.html")]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert re.search(says, error)
  assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["no.jsonl", "-o", "r.html"], "no.jsonl does not exist"),
    ([".", "-o", "r.html"], "cannot be read"),
    (["bin", "-o", "r.html"], "not a trace"),
    (["t.jsonl"], "Nothing to write"),
    ([], "required"),
    (["t.jsonl", "-o", "none/r.html"], "folder none does not exist"),
    (["t.jsonl", "-o", "."], "is a folder"),
    (["t.jsonl", "-o", "t.jsonl"], "is one of the traces"),
    (["t.jsonl", "-o", "r.html", "--prompt", "2"], "1 prompt"),
    (["t.jsonl", "-o", "r.html", "--prompt", "x"], "invalid int"),
    (["t.jsonl", "-o", "r.html", "--wrong"], "Unrecognized arguments: --wrong"),
  ],
)
def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys, args, says):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "t.jsonl", header(), rows(5))
  (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert viz._entry(args) == 2
  error = capsys.readouterr().err
  assert says in error
  assert error.count("\n") == 1
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_all_files_are_written_or_none(tmp_path):
  (tmp_path / "old.html").write_text("old")
  with pytest.raises(UserError, match="does not exist"):
    viz.write({tmp_path / "old.html": b"new", tmp_path / "none" / "x.png": b"new"})
  assert (tmp_path / "old.html").read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["old.html"]


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  (tmp_path / "old.html").write_text("old")
  monkeypatch.setattr(viz.os, "replace", full)
  with pytest.raises(UserError, match="No space left"):
    viz.write({tmp_path / "old.html": b"new"})
  assert (tmp_path / "old.html").read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["old.html"]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  write(tmp_path / "t.jsonl", header(), rows(5))
  args = [str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "f")]
  assert viz._entry(args) == 2
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


PLOTS = 7  # of a pane: scatter, entropy, varentropy, attention in three units, any other number
ARTEFACTS = (
  pathlib.Path(__file__).parents[1] / "build" / "artefacts"
)  # pictures of the last test run
CHROMES = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()


def browse(tmp_path, page, *options):
  """What a headless browser prints about a page."""
  binary = next(filter(None, map(shutil.which, [*CHROMES, "firefox"])), None)
  if binary is None:
    pytest.skip("no chromium, chrome or firefox on PATH")
  if "firefox" in binary and "--dump-dom" in options:
    pytest.skip("firefox cannot print the drawn page; chromium can")
  profile = tmp_path / "profile"
  profile.mkdir(exist_ok=True)
  own = (
    ["--profile", str(profile)]
    if "firefox" in binary
    else ["--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
  )
  command = [binary, "--headless", *own, *options, page.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


def two_traces(tmp_path):
  write(
    tmp_path / "a.jsonl", header(["Hi", HOSTILE[0]]), rows(120, prompts=2, texts=[" w", *HOSTILE])
  )
  write(
    tmp_path / "b.jsonl",
    header([HOSTILE[0]], {"name": "plain"}, ["greedy", "sample"]),
    rows(80, texts=HOSTILE, branches=["greedy", "sample"], top=False),
  )
  report(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl", options=["--prompt", "2"])
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
  answers = [runs[0]["answers"][1], runs[1]["answers"][0]]
  steps = [
    tuple(bisect.bisect_left(viz.STEPS[name], answer["columns"][name][i]) for name in viz.STEPS)
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
  answer = embedded(page.read_text())["runs"][0]["answers"][1]
  hover = """<script>
    document.querySelectorAll(".tok")[11].dispatchEvent(
      new PointerEvent("pointermove", {bubbles: true, clientX: 1, clientY: 1}));
  </script></body>"""
  page.write_text(page.read_text().replace("</body>", hover))
  dom = browse(tmp_path, page, "--dump-dom")
  tip = re.search(r'<aside id="tip".*?</aside>', dom, re.DOTALL)[0]
  shown = dict(re.findall(r"<dt>(\w+)</dt><dd>([-\d.e]+)", tip))
  assert {name: float(x) for name, x in shown.items()} == {
    name: column[11] for name, column in answer["columns"].items()
  }
  for words in ("token 11", f"id {answer['ids'][11]}", answer["branches"][11], "ask_ent 2.0794"):
    assert words in tip
  assert tip.count("<tr") == len(answer["tops"][11])
  assert len(re.findall(r'class="cursor \w+" style="[^"]*display: block', dom)) == PLOTS
