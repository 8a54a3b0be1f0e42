"""Calibration on the demo checkpoint: thresholds are quantiles of what was recorded, their shares are checked, and
the file loads."""

import itertools
import re
import shutil

import numpy as np
import pytest
from command import CONFIG, DEMO, is_one_sentence, load, run

from entropix_jax import sampling, settings
from entropix_jax.cli import config_file
from entropix_jax.sampling import calibration, presets

SCRIPT = "scripts/calibrate.py"
LIGHT = (CONFIG, "--batch=4", "--max_new_tokens=12")


def test_each_round_measures_texts_of_the_sampler_with_the_thresholds_so_far(monkeypatch, tmp_path):
  out, file = tmp_path / "mine.json", tmp_path / "p.txt"
  file.write_text("Hello!\nTell me a story about a kite.\nWhat is 2 + 3?\n")
  args = (f"--prompt_file={file}", f"--out={out}", "--low_ent=q20", "--config.sampler.temp=0.5")
  module, calls = load(SCRIPT), []
  measure = module.measure

  def recorded(session, requests, knobs):
    calls.append((requests, knobs, measure(session, requests, knobs)))
    return calls[-1][-1]

  monkeypatch.setattr(module, "measure", recorded)
  code, said, err = run(module, *LIGHT, *args)
  assert code == 0, err
  assert calls[0][1] == {"temp": 0.5}
  for (_, _, before), (_, knobs, values) in itertools.pairwise(calls[:-1]):
    assert set(values) == {*module.SIGNALS, "text", "branch"}
    np.testing.assert_array_equal(values["branch"], module.decided(knobs, values))
    want = {
      "low_ent": np.quantile(before["entropy"], 0.2),
      "low_varent": np.quantile(before["varentropy"], 0.9),
      "ask_ent": np.quantile(before["entropy"], 0.9),
      "high_ent": np.quantile(before["entropy"], 0.95),
      "high_varent": np.quantile(before["varentropy"], 0.95),
      "temp": 0.5,
    }
    assert knobs == pytest.approx(want, rel=1e-5)
  *_, (used, _, kept), (held_out, final, seen) = calls
  assert [len(used), len(held_out)] == [2, 1]
  assert not {r.stream for r in used} & {r.stream for r in held_out}

  preset = presets.load(str(out))
  assert preset.knobs == final
  _, demo, _ = settings.shape(settings.resolve({"checkpoint": str(DEMO)}))
  assert preset.model == presets.shape(demo)
  found = preset.calibration
  assert (found["tokens"], found["rounds"]) == (len(kept["entropy"]), len(calls) - 1)
  assert (found["prompts"], found["prompt_source"]) == (2, "p.txt")
  assert found["checkpoint"] == "demo/instruct"
  assert found["thresholds"]["low_ent"] == "q20 of entropy"
  for signal, row in found["quantiles"].items():
    at = [1, 5, 10, 25, 50, 75, 90, 95, 99]
    assert list(row) == [f"q{p}" for p in at]
    np.testing.assert_allclose(list(row.values()), np.percentile(kept[signal], at), rtol=1e-5)
  assert "attn_spread" in said
  assert found["held_out"]["prompts"] == 1
  for i, (branch, facts) in enumerate(found["held_out"]["branches"].items()):
    assert facts["found"] == pytest.approx(np.mean(seen["branch"] == i), rel=1e-5)
    assert facts["promised"] == found["branches"][branch]
    words = f"{branch} {facts['promised']:.0%} promised and {facts['found']:.0%} found (0% to 100%)"
    assert words in preset.about
    assert re.search(rf"^{branch} .*{facts['found']:.2%}   0.00% to 100.00%$", said, re.MULTILINE)
  assert err.count("warning: ") == len(re.findall("^warning: .*[.]$", err, re.MULTILINE)) >= 1
  assert f"{found['tokens']} tokens are few for these quantiles" in err

  config = config_file.base(checkpoint="x")
  config.sampler.preset = str(out)
  resolved = config_file.resolve(config)
  assert (resolved.sampler, resolved.knobs) == ("quadrant", preset.knobs)


def fake(n, texts, rng, shift=0.0):
  """Measured values of n tokens, spread evenly over the texts."""
  ent = rng.exponential(size=n) + shift
  return {"entropy": ent, "varentropy": rng.exponential(size=n), "text": np.arange(n) % texts}


@pytest.mark.parametrize(("shifts", "rounds", "held"), [((0, 1, 1), 3, True), (range(9), 5, False)])
def test_it_goes_on_until_the_shares_hold(monkeypatch, shifts, rounds, held):
  module, shift = load(SCRIPT), iter(shifts)

  def measure(session, requests, knobs):
    values = fake(2000, 50, np.random.default_rng(0), next(shift))
    return values | {"branch": module.decided(knobs, values)}

  monkeypatch.setattr(module, "measure", measure)
  at = {knob: module.quantile(knob, q) for knob, (_, q) in module.THRESHOLDS.items()}
  knobs, values, promised, *how = module.calibrate(None, [], at, {"temp": 0.5})
  assert how == [rounds, held]
  assert promised == module.shares(module.decided(knobs, values))


def test_shares_that_do_not_hold_on_held_out_prompts_are_named(monkeypatch, tmp_path):
  module = load(SCRIPT)

  def measure(session, requests, knobs):
    values = fake(4000, 200, np.random.default_rng(0), 9.0 * (len(requests) == 2))
    return values | {"branch": module.decided(knobs, values)}

  monkeypatch.setattr(module, "measure", measure)
  code, _, err = run(module, *LIGHT, f"--out={tmp_path / 'o.json'}", "--prompts=10")
  assert code == 0
  assert re.findall("^warning: (.*)$", err, re.MULTILINE) == [
    "The promised share of flow, middle, ask, fork, mist does not hold on the held-out prompts; give more prompts."
  ]


def test_intervals_heed_that_tokens_of_one_text_depend_on_one_another():
  module, rng = calibration, np.random.default_rng(0)
  text = np.repeat(np.arange(100), 20)
  alone = rng.random(2000) < 0.3
  low, high = module.interval(alone, text)
  assert low < np.mean(alone) < high
  assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 2000), rel=0.25)
  together = np.repeat(rng.random(100) < 0.3, 20)  # all tokens of a text: worth 100 tokens
  low, high = module.interval(together, text)
  assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 100), rel=0.25)
  low, high = module.interval(np.zeros(2000, bool), text)
  assert low == 0 < 0.01 < high < 0.05
  assert module.interval(alone[:20], text[:20]) == (0, 1)
  # Of 95% intervals, about 95 in 100 hold the truth; here each text has a share of its own.
  hits = 0
  for _ in range(200):
    p = np.repeat(rng.beta(2, 2, size=25), 20)
    low, high = module.interval(rng.random(500) < p, text[:500])
    hits += low < 0.5 < high
  assert 180 <= hits <= 199


def test_a_small_sample_is_named_with_the_number_of_tokens_that_suffices():
  module, rng = load(SCRIPT), np.random.default_rng(0)

  def said(tokens, branches=5):
    return module.doubt(rng.integers(branches, size=tokens), np.arange(tokens) // 4)

  sentence = said(820, 2)
  assert sentence.startswith("820 tokens are few")
  need = int(re.search(r"about (\d+) tokens", sentence)[1])
  assert 1400 < need < 2000
  assert said(int(1.2 * need), 2) is None
  assert said(820) is not None  # a share of 20% needs 1000
  assert said(1300) is None


def test_branch_shares_are_counted_as_the_sampler_decides():
  values = {
    "entropy": np.array([0.01, 0.01, 3.0, 3.0, 4.0]),
    "varentropy": np.array([0.01, 0.5, 0.01, 3.0, 3.0]),
  }
  module = load(SCRIPT)
  want = dict.fromkeys(("flow", "middle", "ask", "fork", "mist"), 0.2)
  assert module.shares(module.decided({}, values)) == want


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
    ("--config.sampler.preset=quantile", "thresholds that are numbers"),
    ("--config.sampler.mist_ent=q90", "thresholds that are numbers"),
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
