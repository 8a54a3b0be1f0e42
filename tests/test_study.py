"""benchmarks/study.py: a small run on the demo, ended and taken up again, verified and reported."""

import json
import sys

import numpy as np
import pytest
from command import CONFIG, ROOT, run

sys.path += [str(ROOT / name) for name in ("benchmarks", "scripts")]
import study_lines
import study_methods as methods
import study_rules
import study_run
import study_tasks as tasks

from entropix_jax import sampling
from entropix_jax.llm import LLM

SCRIPT = "benchmarks/study.py"
WANTED = "greedy,temperature,quadrant_quantile,permuted"
ARGS = [
  *("--tasks=demo", f"--methods={WANTED}", "--limit=2", "--seeds=1", "--settings=1", "--batch=8"),
  "--max_new_tokens=24",
]


@pytest.fixture
def clean():
  """The samplers there were."""
  yield
  sampling._registered.pop("placebo", None)
  sys.modules.pop(f"{sampling.__name__}.placebo", None)


def study(out, *args):
  code, text, err = run(SCRIPT, CONFIG, f"--out={out}", *ARGS, *args)
  return code, text, err


def by_id(out):
  return {x["id"]: x for x in study_lines.lines(out, "answers.jsonl") if "id" in x}


def test_a_run_goes_on_where_it_was_and_is_the_same_again(tmp_path, clean):
  out = tmp_path / "study"
  code, _, err = study(out)
  assert code == 0, err
  found = by_id(out)
  # Two prompts to choose by, with eight samples of the temperature; two to compare with.
  dev = 2 * (1 + methods.POOL + 3)  # greedy, temperature, the three quadrants
  kinds = {i.split("/")[3] for i in found if "/test/" in i}
  assert kinds >= {*WANTED.split(","), "pool"}  # and the best quadrant, if it is another one
  assert len(found) == dev + 2 * (len(kinds) - 1 + methods.POOL)
  for line in found.values():
    assert 0 < line["tokens"] <= 24
    assert line["seconds"] > 0
    assert sum(line["branches"].values()) == line["tokens"]
    assert line["signals"]["entropy_most"] >= line["signals"]["entropy"] >= 0
  greedy = next(x for i, x in found.items() if "test/" in i and "/greedy/" in i)
  assert greedy["signals"]["logprob_law"] == 0
  for line in study_lines.lines(out, "signals.jsonl"):
    kept = study_lines.unpacked(line["x"], study_lines.SIGNALS)
    mean = found[line["id"]]["signals"]["entropy"]
    assert kept["entropy"].mean() == pytest.approx(mean, rel=2e-3, abs=1e-6)

  # Half of the lines are lost, and one is cut short; other rows run beside what is made again.
  whole = (out / "answers.jsonl").read_text().splitlines()
  (out / "answers.jsonl").write_text("\n".join([*whole[: len(whole) // 2], whole[-1][:40]]))
  code, _, err = study(out)
  assert code == 0, err
  again = by_id(out)
  assert {i: x["text"] for i, x in again.items()} == {i: x["text"] for i, x in found.items()}
  assert {i: x["signals"] for i, x in again.items()} == {i: x["signals"] for i, x in found.items()}
  before = (out / "answers.jsonl").read_text()
  assert study(out)[0] == 0
  assert (out / "answers.jsonl").read_text() == before

  code, text, err = study(out, "--verify=0.2")
  assert code == 0, err
  assert f"{round(0.2 * len(found))} of {round(0.2 * len(found))} answers are the same" in text
  spoiled = before.replace('"text": "', '"text": "x')
  (out / "answers.jsonl").write_text(spoiled)
  code, _, err = study(out, "--verify=0.05")
  assert code == 2
  assert "answers differ" in err
  (out / "answers.jsonl").write_text(before)

  code, _, err = study(out, "--batch=4")
  assert code == 2
  assert "another batch" in err

  pytest.importorskip("matplotlib")
  code, text, err = run(SCRIPT, "--report", f"--out={out}")
  assert code == 0, err
  assert (out / "report.md").read_text() == text.removesuffix("\n")
  for part in ("| permuted | - | 2 | 1 |", "**placebos** against quadrant_", "majority@8"):
    assert part in text
  assert (out / "study_demo_differences.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_done_is_said(tmp_path, clean):
  for args, words in (
    (["--tasks=ifeval"], "not for this model"),
    (["--tasks=x"], "There is no task"),
    (["--methods=x"], "There is no method"),
    (["--tasks=prose"], "takes its settings from another one"),
    (["--report"], "has no answers.jsonl"),
    (["--tasks=demo", "--methods=greedy", "--verify=0.1"], "has no answers to these tasks"),
  ):
    code, out, err = run(SCRIPT, CONFIG, f"--out={tmp_path / 'new'}", *args)
    assert (code, out) == (2, "")
    assert words in err
  code, _, err = run(SCRIPT, CONFIG)
  assert (code, "--out" in err) == (2, True)


def test_parts_of_a_task_are_disjoint_and_new():
  demo = tasks.find("demo")
  dev, test = (demo.items(part, 10**6, None) for part in ("dev", "test"))
  assert (len(dev), len(test)) == demo.SIZES
  keys = [int(item.key) for item in dev + test]
  assert len({*keys}) == sum(demo.SIZES)
  assert min(keys) == demo.USED  # what the sweeps and answers of before had are left out
  for line in (ROOT / "benchmarks" / "results" / "sweep_demo.jsonl").read_text().splitlines():
    skip, count = map(int, json.loads(line)["task"].removeprefix("demo ").split("+"))
    assert skip + count <= demo.USED
  assert demo.score(dev[0], f"So. The answer is {dev[0].want}.") == {"right": 1.0}
  beginnings = tasks.find("prose").items("test", 10**6, None)
  assert len(beginnings) >= tasks.find("prose").SIZES[1]


def test_repetition_is_counted():
  score = tasks.find("prose").score
  assert score(None, "a b c d a b c d")["fresh_4"] == 4 / 5
  assert score(None, "a b")["fresh_4"] == 1.0
  assert score(None, "a a b b")["distinct_1"] == 0.5


class Kept:
  """Samples as the report holds them."""

  def __init__(self, confidence):
    self.signals = {
      i: {"confidence": np.full(10, c), "logprob": np.full(10, -1.0)}
      for i, c in enumerate(confidence)
    }
    self.task = tasks.find("demo")


def test_deepconf_one_sample_after_the_other():
  def lines(*answers):
    return [
      {"id": i, "text": f"The answer is {a}.", "finish": "stop"} for i, a in enumerate(answers)
    ]

  # All agree after the first four: no more are drawn.
  assert study_rules.online(Kept([9.0] * 8), lines(*[5] * 8), 90.0, 4) == (0, 40)
  # They do not agree; a fifth that is less confident ends when its window is full, and has no vote.
  split = lines(5, 5, 6, 6, 7, 5, 5, 5)
  index, tokens = study_rules.online(Kept([9, 9, 8, 8, 1, 9, 9, 9]), split, 90.0, 4)
  assert (index, tokens) == (0, 74)


def test_ordinary_text_is_scored_as_the_package_scores_it(tmp_path):
  llm = LLM.demo()
  study_run.score_texts(llm._session(preset="none"), tmp_path, 9)
  line = {x["id"]: x for x in study_lines.lines(tmp_path, "scored.jsonl")}["stories/0"]
  values = study_lines.unpacked(line["x"], study_lines.SCORED)
  encode, k = llm.tokenizer.encode, 12
  ids = encode(tasks.find("prose").texts()[8])
  begin = llm.tokenizer.decode_bytes(ids[:k], True).decode()
  rest = llm.tokenizer.decode_bytes(ids[k:], True).decode()
  assert encode(begin) + encode(rest) == ids
  loss = values["loss"][len(llm.tokenizer.prefix) + k - 1 :]
  assert loss.sum() == pytest.approx(-llm.score(begin, rest), rel=2e-3)
  assert (values["entropy"] >= 0).all()
  assert values["right"][values["gap"] > 0.9].mean() > 0.8
