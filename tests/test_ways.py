"""Ways to decode, from the command line: text, trace, report, runs side by side, one sentence for bad input."""

import json

import pytest
from test_main import DEMO, command

from entropix_jax.cli import config_file
from entropix_jax.errors import UserError
from entropix_jax.report import reader

PROBLEM = (
  "--prompt=Tom has 12 apples. He buys 7 more and gives 5 to Ann. How many apples does Tom have?"
)
WARM = ["--config.sampler.name=plain", "--config.sampler.temperature=1"]
SMALL = ["--config.engine.max_seq_len=256", "--max_new_tokens=48"]


@pytest.mark.parametrize(
  ("method", "flags"),
  [
    ("best_of_n", [*WARM, "--config.decoding.n=5"]),
    ("branch", ["--config.engine.batch_size=6", "--config.decoding.ent=0.2"]),
  ],
)
def test_a_choice_is_printed_and_traced(tmp_path, method, flags):
  path = tmp_path / "run.jsonl"
  ask = PROBLEM if method == "best_of_n" else "--prompt=Tell me a story about a kite."
  code, out, err = command(
    ask, *SMALL, f"--config.decoding.name={method}", *flags, f"--trace={path}"
  )
  assert code == 0, err
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  choice, summary = lines[-2]["samples"], lines[-1]["summary"]
  assert choice["method"] == method
  assert summary["generated_tokens"] == sum(s["tokens"] for s in choice["samples"])
  assert summary["samples"] == len(choice["samples"])
  assert summary["prefix_bytes"] > 0
  assert f"Sample {choice['chosen']} of {len(choice['samples'])}" in err
  report = reader.read(path)["answers"][0]
  whole = reader.whole(report["samples"], report["chosen"])
  assert "".join(whole["texts"]) == out.removesuffix("\n")
  if method == "branch":
    assert any(s["parent"] is not None for s in choice["samples"])
  else:
    assert summary["prefix_copies"] == 4


def test_runs_side_by_side(tmp_path):
  code, out, err = command(
    PROBLEM, *SMALL, "--compare=base,joint", f"--trace={tmp_path / 'run.jsonl'}"
  )
  assert code == 0, err
  title, rule, *rows = out.splitlines()
  assert title.split() == ["base", "│", "joint"]
  assert set(rule) == {"─", "┼"}
  assert all("│" in row for row in rows)
  for name in ("base", "joint"):
    trace = reader.read(tmp_path / f"run-{name}.jsonl")
    assert trace["header"]["prompts"][0]["text"] == PROBLEM.removeprefix("--prompt=")
    assert f"{name}: " in err
  assert "entropy_1" in trace["answers"][0]["samples"][0]["columns"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.decoding.name=luck"], "no decoding method 'luck'"),
    (["--config.decoding.n=4"], "choose a method that has it"),
    (["--config.decoding.name=cot", "--config.decoding.ways=4"], "has no option 'ways'"),
    (["--config.decoding.name=adaptive"], "--config.sampler.name=plain"),
    (["--config.decoding.name=branch"], "holds 6 rows at once"),
    (["--config.decoding.name=best_of_n", "--config.decoding.rule=luck"], "no rule 'luck'"),
    (["--config.decoding.name=joint"], "give config.decoding.models=BASE"),
    (["--config.decoding.name=joint", "--config.decoding.models=/nowhere"], "is not a folder"),
    (
      ["--config.decoding.name=speculative", "--config.decoding.drafter=draft",
       "--config.decoding.checkpoint=/nowhere"],
      "is not a folder",
    ),
    (["--compare=base,nobody"], "no run 'nobody'; it has: base, instruct, joint"),
  ],
)  # fmt: skip
def test_mistakes_are_one_sentence(flags, words):
  code, out, err = command(PROBLEM, *flags)
  assert code == 2
  assert words in err
  assert not out
  assert len(err.strip().splitlines()) == 1
  assert "Traceback" not in err


def test_runs_set_known_keys_only():
  config = config_file.base(checkpoint=str(DEMO))
  config.runs = {"a": {"sampler": {"heat": 1}}, "b": {"engine": {"batch_size": "x"}}, "c": {}}
  with pytest.raises(UserError, match=r"unknown key config\.sampler\.heat"):
    config_file.named(config, "a")
  with pytest.raises(UserError, match="another kind"):
    config_file.named(config, "b")
  assert config_file.resolve(config_file.named(config, "c")) == config_file.resolve(config)
