"""benchmarks/answers.py: its figures against counting by hand, and a small run."""

import numpy as np
import pytest
from command import load, run

SCRIPT = "benchmarks/answers.py"
answers = load(SCRIPT)


def test_gains_are_over_the_curve_at_as_many_tokens():
  curve = [
    {"n": 1, "right": "1000", "tokens": 10.0},
    {"n": 2, "right": "1100", "tokens": 20.0},
    {"n": 4, "right": "1110", "tokens": 40.0},
  ]
  lines = [
    {"run": "majority", "right": "1110", "tokens": 40.0, "curve": curve},
    {"run": "other", "right": "0111", "tokens": 30.0, "samples": 3},
    {"run": "cheap", "right": "1111", "tokens": 5.0, "samples": 1},
  ]
  rows = {row["run"]: row for row in answers.figures(lines)}
  assert [rows[f"majority@{n}"]["accuracy"] for n in (1, 2, 4)] == [0.25, 0.5, 0.75]
  # Between two and four samples: (1, 1, 0, 0) and (1, 1, 1, 0), half each, against (0, 1, 1, 1).
  assert rows["other"]["gain"] == pytest.approx(0.75 - 0.625)
  assert not rows["other"]["beyond"]
  assert rows["cheap"]["beyond"]
  assert rows["cheap"]["interval"] == (1.0, 1.0)
  low, high = rows["other"]["gain_interval"]
  assert low < 0.125 < high
  assert "(outside the curve)" in answers.table(list(rows.values()))


def test_auroc_counts_pairs():
  rng = np.random.default_rng(0)
  scores, right = rng.integers(0, 5, 30).tolist(), (rng.random(30) < 0.6).tolist()
  pairs = [
    1.0 if a > b else 0.5 if a == b else 0.0
    for a, x in zip(scores, right, strict=True)
    if x
    for b, y in zip(scores, right, strict=True)
    if not y
  ]
  assert answers.auroc(scores, right) == pytest.approx(np.mean(pairs), abs=1e-4)
  assert answers.auroc([1.0, 2.0], [True, True]) is None


def test_a_small_run_gives_every_way_a_line(tmp_path):
  out = tmp_path / "answers.jsonl"
  # The programs of configs/demo.py for four rows of `plain`.
  small = "batch_size=4 max_seq_len=1024 confidence=0 top_logprobs=0".split()
  args = [
    *("--config=configs/demo_ways.py", "--runs=greedy,majority", "--problems=4"),
    *("--max_new_tokens=48", f"--out={out}"),
    *(f"--config.engine.{setting}" for setting in small),
  ]
  code, text, err = run(SCRIPT, *args)
  assert code == 0, err
  assert "majority, 2 of 2, about 0 minutes left ..." in err
  lines = answers.read(out)
  assert [line["run"] for line in lines] == ["greedy", "majority"]
  assert [point["n"] for point in lines[1]["curve"]] == [1, 2, 4, 8, 16]
  assert all(len(line["right"]) == 4 for line in lines)
  assert lines[1]["samples"] == 16
  assert lines[1]["tokens"] == lines[1]["curve"][-1]["tokens"]
  assert "majority@16" in text
  before = out.read_text()
  assert run(SCRIPT, *args)[1] == text
  assert out.read_text() == before
