"""Ways to decode, from the command line: text, trace, report, runs side by side."""

import json

import pytest
from command import CONFIG, DEMO, MAIN, run

from entropix_jax.cli import config_file
from entropix_jax.errors import UserError
from entropix_jax.report import reader

PROBLEM = (
  "--prompt=Tom has 12 apples. He buys 7 more and gives 5 to Ann. How many apples does Tom have?"
)
WARM = ["--config.sampler.name=plain", "--config.sampler.temperature=1"]
SMALL = "--max_new_tokens=48"


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
  way = f"--config.decoding.name={method}"
  code, out, err = run(MAIN, CONFIG, ask, SMALL, way, *flags, f"--trace={path}")
  assert code == 0, err
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  choice, summary = lines[-2]["samples"], lines[-1]["summary"]
  assert choice["method"] == method
  assert summary["generated_tokens"] == sum(s["tokens"] for s in choice["samples"])
  assert summary["samples"] == len(choice["samples"])
  assert summary["prefix_bytes"] > 0
  assert f"Sample {choice['chosen'] + 1} of {len(choice['samples'])}" in err
  report = reader.read(path)["answers"][0]
  whole = reader.whole(report["samples"], report["chosen"])
  assert "".join(whole["texts"]) == out.removesuffix("\n")
  if method == "branch":
    assert any(s["parent"] is not None for s in choice["samples"])
  else:
    assert summary["prefix_copies"] == 4


def test_runs_side_by_side(tmp_path):
  trace = f"--trace={tmp_path / 'run.jsonl'}"
  code, out, err = run(MAIN, CONFIG, PROBLEM, SMALL, "--compare=base,joint", trace)
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


def test_runs_set_known_keys_only():
  config = config_file.base(checkpoint=str(DEMO))
  config.runs = {"a": {"sampler": {"heat": 1}}, "b": {"engine": {"batch_size": "x"}}, "c": {}}
  with pytest.raises(UserError, match=r"unknown key config\.sampler\.heat"):
    config_file.named(config, "a")
  with pytest.raises(UserError, match="another kind"):
    config_file.named(config, "b")
  assert config_file.resolve(config_file.named(config, "c")) == config_file.resolve(config)
