"""The benchmark of several paths runs, counts passes and prompts, and refuses what it cannot measure.

Why: no time is asserted; that its figures are of one text, and of the passes it says, is.
"""

import json

import pytest
from command import is_one_sentence, run
from conftest import TINY

from entropix_jax import config

SCRIPT = "benchmarks/paths.py"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """A shape small enough for a test."""
  monkeypatch.setitem(config.PRESETS, "tiny", TINY)


def lines_of(tmp_path, *args):
  """What a run appends to its file, which is what it prints before the table."""
  file = tmp_path / "lines.jsonl"
  code, out, err = run(SCRIPT, f"--out={file}", "--rounds=1", *args)
  assert code == 0, err
  text = file.read_text(encoding="utf-8")
  assert out.startswith(text)
  return [json.loads(line) for line in text.splitlines()]


def test_speculation_on_random_weights(tmp_path):
  lines = lines_of(
    tmp_path, "--target=random", "--model=tiny", "--tokens=24", "--calls=2",
    "--batch=2", "--drafter=draft", "--length=2", "--way=2", "--way=race", "--text=free",
    "--keep=2", "--echo=0.01",
  )  # fmt: skip
  assert [line["way"] for line in lines] == ["2", "race"]
  for line in lines:
    assert line["tokens"] == 2 * 2 * 24
    assert line["same_text"]
    assert 1 <= line["tokens_per_pass"] <= line["length"] + 1
    assert 0 <= line["drafted"] <= line["length"]
    for key in ("ratio", "cpu_ratio", "decode_ratio", "plain_tokens_per_s", "tokens_per_s"):
      assert line[key] > 0, key
    assert {"device", "date", "commit", "jax", "threads", "load"} <= set(line)
  always, race = lines
  assert (always["always"], race["always"]) == (True, False)
  assert always["drafting"] > 0.9
  assert 0.5 < always["acceptance"] <= 1
  # A pass gives what it keeps and one more, but the last one of a text, which may end within.
  gives = 1 + always["drafted"] * always["acceptance"]
  assert always["tokens_per_pass"] == pytest.approx(gives, rel=0.05)


def test_samples_of_the_demo_share_one_prefill(tmp_path):
  lines = lines_of(tmp_path, "--part=samples", "--tokens=8", "--calls=1", "--data=2")
  assert [line["data"] for line in lines] == [2] * 3
  short, talk, long = (line["prompt"] for line in lines)
  assert short == 32
  assert long == 4 * talk
  # The talk, a story of 8 tokens among it, is copied; four times as much is shared.
  assert [line["prefix_copies"] for line in lines] == [8, 8, 1]
  for line in lines:
    assert line["samples"] == 8
    assert line["prefills"] == 1
    assert line["tokens"] == 8 * 8
    # Keys and values in float32 of 5 layers with 2 heads of 32.
    assert line["prefix_bytes"] == line["prompt"] * 2 * 5 * 2 * 32 * 4
    assert line["ratio"] > 0
    assert line["limit"] > 0


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (("--target=random", "--part=samples"), "Samples are measured with the demo"),
    (("--target=random", "--model=llama9"), "no model 'llama9'"),
    (("--target=random", "--model=tiny", "--keep=3"), "none of 3 layers"),
  ],
)
def test_mistakes_are_one_sentence(args, says):
  is_one_sentence(run(SCRIPT, *args), says)
