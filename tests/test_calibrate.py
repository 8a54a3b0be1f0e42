"""Calibration on the demo checkpoint: thresholds are quantiles of what was recorded, and the file loads."""

import shutil

import numpy as np
import pytest
from command import CONFIG, DEMO, is_one_sentence, load, run

from entropix_jax import sampling
from entropix_jax.cli import config_file
from entropix_jax.sampling import presets

SCRIPT = "scripts/calibrate.py"
LIGHT = (CONFIG, "--batch=4", "--max_new_tokens=12")


def test_thresholds_are_quantiles_of_the_recorded_signals(monkeypatch, tmp_path):
  out, file = tmp_path / "mine.json", tmp_path / "p.txt"
  file.write_text("Hello!\nTell me a story about a kite.\nWhat is 2 + 3?\n")
  args = (f"--prompt_file={file}", f"--out={out}", "--low_ent=q20", "--config.sampler.temp=0.5")
  module, kept = load(SCRIPT), {}
  measure = module.measure

  def recorded(*args):
    kept.update(measure(*args))
    return kept

  monkeypatch.setattr(module, "measure", recorded)
  code, said, err = run(module, *LIGHT, *args)
  assert code == 0, err
  assert tuple(kept) == module.SIGNALS
  assert 12 < len(kept["entropy"]) <= 36

  preset = presets.load(str(out))
  want = {
    "low_ent": np.quantile(kept["entropy"], 0.2),
    "low_varent": np.quantile(kept["varentropy"], 0.9),
    "ask_ent": np.quantile(kept["entropy"], 0.9),
    "high_ent": np.quantile(kept["entropy"], 0.95),
    "high_varent": np.quantile(kept["varentropy"], 0.95),
    "temp": 0.5,
  }
  assert preset.knobs == pytest.approx(want, rel=1e-5)
  found = preset.calibration
  assert found["tokens"] == len(kept["entropy"])
  assert (found["prompts"], found["prompt_source"]) == (3, "p.txt")
  assert found["checkpoint"] == "demo/instruct"
  assert found["thresholds"]["low_ent"] == "q20 of entropy"
  for signal, row in found["quantiles"].items():
    at = [1, 5, 10, 25, 50, 75, 90, 95, 99]
    assert list(row) == [f"q{p}" for p in at]
    np.testing.assert_allclose(list(row.values()), np.percentile(kept[signal], at), rtol=1e-5)
  assert "attn_spread" in said
  assert all(branch in said for branch in found["branches"])

  config = config_file.base(checkpoint="x")
  config.sampler.preset = str(out)
  resolved = config_file.resolve(config)
  assert (resolved.sampler, resolved.knobs) == ("quadrant", preset.knobs)


def test_branch_shares_are_counted_as_the_sampler_decides():
  values = {
    "entropy": np.array([0.01, 0.01, 3.0, 3.0, 4.0]),
    "varentropy": np.array([0.01, 0.5, 0.01, 3.0, 3.0]),
  }
  assert load(SCRIPT).shares({}, values) == dict.fromkeys(
    ("flow", "middle", "ask", "fork", "mist"), 0.2
  )


def test_the_demo_prompts_are_of_the_training_side(monkeypatch):
  module = load(SCRIPT)
  found = module.demo_prompts(60, 0, True)
  assert found == module.demo_prompts(60, 0, True) != module.demo_prompts(60, 1, True)
  assert sum(text.startswith("Tell me a story about ") for text in found) == 30
  drawn = []
  for name in ("problem", "story"):
    make = getattr(module.demo_corpus, name)

    def spy(*args, make=make, **kwargs):
      drawn.append(make(*args, **kwargs))
      return drawn[-1]

    monkeypatch.setattr(module.demo_corpus, name, spy)
  module.demo_prompts(60, 0, False)
  assert [thing.held_out for thing in drawn] == [False] * 60


def test_demo_run_needs_no_prompts(tmp_path):
  out = tmp_path / "demo.json"
  args = (f"--out={out}", "--prompts=3", "--config.engine.attn_stats=off")
  assert run(SCRIPT, *LIGHT, *args)[0] == 0
  preset = presets.load(str(out))
  assert set(preset.calibration["quantiles"]) == {"entropy", "varentropy"}
  assert set(preset.knobs) < set(sampling.knobs(sampling.find("quadrant")))
  assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--out=x.txt", "--out=FILE.json"),
    ("--low_ent=0.3", "write q50"),
    ("--high_ent=q101", "no quantile"),
    ("--config.sampler.name=plain", "quadrant"),
    ("--config.sampler.low_ent=0.1", "leave it out"),
    ("--config.checkpoint=entropix_jax", "safetensors"),
    ("--prompt_file=no.csv", "cannot be read"),
  ],
)
def test_mistakes_are_named(flag, says, tmp_path):
  is_one_sentence(run(SCRIPT, CONFIG, f"--out={tmp_path / 'o.json'}", flag), says)
  assert list(tmp_path.iterdir()) == []


def test_another_model_needs_a_prompt_file(tmp_path):
  shutil.copytree(DEMO, tmp_path / "other")
  args = (f"--out={tmp_path / 'o.json'}", f"--config.checkpoint={tmp_path / 'other'}")
  is_one_sentence(run(SCRIPT, CONFIG, *args), "--prompt_file")
