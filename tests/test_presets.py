"""Presets: the shipped ones work, files round-trip, flags beat presets, mistakes are one sentence."""

import dataclasses
import itertools
import json
import math

import pytest
from command import DEMO, load
from conftest import ROOT, refusal

from entropix_jax import sampling, settings
from entropix_jax.cli import commands, config_file
from entropix_jax.config import PRESETS
from entropix_jax.llm import LLM
from entropix_jax.sampling import presets


def config(**sampler):
  """A config as a run has it after its flags."""
  made = config_file.base(checkpoint="x")
  made.sampler.update(sampler)
  return made


@pytest.mark.parametrize("name", presets.names())
def test_a_shipped_preset_loads_and_says_whence(name):
  preset = presets.load(name)
  sampling.configure(sampling.find(preset.sampler), preset.knobs)
  assert set(preset.knobs) <= set(sampling.knobs(sampling.find(preset.sampler)))
  assert len(preset.about) > 40
  run = config_file.resolve(config(preset=name))
  assert (run.sampler, run.preset, run.knobs) == (preset.sampler, name, preset.knobs)


def test_entropix_2410_is_the_quadrant_default():
  quadrant = sampling.find("quadrant")
  knobs = presets.load("entropix-2410").knobs
  assert sampling.configure(quadrant, knobs) == quadrant.Config()
  assert len(knobs) >= 30


@pytest.mark.parametrize(
  ("name", "ent_bits", "varent_bits"),
  [
    ("smollm2-360m", (0.5, 2.07), (1.28, 6.08)),
    ("smollm-360m", (0.6, 2.17), (3.28, 6.18)),
    ("smollm-1.7b", (0.6, 2.17), (3.28, 6.18)),
  ],
)
def test_the_forks_thresholds_are_theirs_in_nats(name, ent_bits, varent_bits):
  knobs = presets.load(name).knobs
  assert set(knobs) == {"low_ent", "ask_ent", "high_ent", "low_varent", "high_varent"}
  # The middle entropy threshold parts mist from nothing but where attention gates fork.
  ent = [knobs[k] / math.log(2) for k in ("low_ent", "high_ent")]
  assert knobs["ask_ent"] == knobs["high_ent"]
  varent = [knobs[k] / math.log(2) ** 2 for k in ("low_varent", "high_varent")]
  assert ent == pytest.approx(ent_bits, abs=2e-4)
  assert varent == pytest.approx(varent_bits, abs=2e-4)


def test_what_is_set_beats_the_preset_and_the_preset_beats_the_default():
  low = presets.load("smollm2-360m").knobs["low_ent"]
  resolved = config_file.resolve(config(preset="smollm2-360m", high_ent=9.0, top_k=5))
  assert resolved.knobs["high_ent"] == 9.0
  assert resolved.knobs["low_ent"] == low != sampling.find("quadrant").Config().low_ent
  assert resolved.knobs["top_k"] == 5
  assert "temp" not in resolved.knobs


def test_the_name_comes_from_the_preset_unless_it_was_set(tmp_path):
  file = tmp_path / "mine.json"
  presets.save(file, presets.Preset("plain", "for this test", {"temperature": 0.5}))
  assert config_file.resolve(config()).sampler == "quadrant"
  assert config_file.resolve(config()).preset == "auto"
  assert config_file.resolve(config(name="plain")).preset == ""
  assert config_file.resolve(config(preset=str(file))).sampler == "plain"
  assert config_file.resolve(config(preset=str(file), name="plain")).knobs == {"temperature": 0.5}
  # The default's name is a choice like any other once it was made.
  words = ["'plain' and config.sampler.name is 'quadrant'"]
  refusal(words, config_file.resolve, config(preset=str(file), name="quadrant"))


def test_no_two_shipped_presets_are_for_one_model():
  models = [model for name in presets.names() if (model := presets.load(name).model)]
  for a, b in itertools.combinations(models, 2):
    assert any(a[key] != b[key] for key in {*a} & {*b}), (a, b)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
  """The only shipped preset, `mine`, is for llama3_1b."""
  model = presets.shape(PRESETS["llama3_1b"])
  file = tmp_path / "mine.json"
  knobs = {"low_ent": 0.3, "high_varent": "q95"}
  presets.save(file, presets.Preset("quadrant", "for this test", knobs, model=model))
  monkeypatch.setattr(presets, "SHIPPED", tmp_path)
  presets.for_model.cache_clear()
  yield PRESETS["llama3_1b"]
  presets.for_model.cache_clear()


def test_auto_is_the_preset_of_this_model(shipped):
  def fitted(cfg=shipped, **sampler):
    found, line = settings.fitted(config_file.resolve(config(**sampler)), cfg)
    return found.preset, found.knobs, line

  knobs = {"low_ent": 0.3, "high_varent": "q95"}
  assert fitted() == ("mine", knobs, None)
  assert fitted(low_ent=0.5, temp=0.7) == ("mine", knobs | {"low_ent": 0.5, "temp": 0.7}, None)
  for none in ("", "none"):
    assert fitted(preset=none, temp=0.7) == ("", {"temp": 0.7}, None)
  assert fitted(name="plain") == ("", {}, None)
  other = dataclasses.replace(shipped, rope=dataclasses.replace(shipped.rope, theta=1e4))
  for cfg in (other, dataclasses.replace(shipped, layers=17), PRESETS["llama3_8b"]):
    preset, knobs, line = fitted(cfg, temp=0.7)
    assert (preset, knobs) == ("", {"temp": 0.7})
    assert "scripts/calibrate.py" in line
    assert "preset=quantile" in line
    assert fitted(cfg, high_ent="q90") == ("", {"high_ent": "q90"}, None)


def test_sessions_say_once_that_nothing_fits(shipped, capsys):
  """From Python as from the command line; `shipped` has no preset for the demo model."""
  llm = LLM.demo()
  for how in ({"sampler": "plain"}, {"preset": "none"}, {"preset": "mine"}, {"low_ent": "q20"}):
    llm._session(**how)
  assert capsys.readouterr().err == ""
  by_flags = config_file.base(checkpoint=str(DEMO))
  sessions = [llm._session(), llm._session(), llm.session(config_file.resolve(by_flags))]
  assert capsys.readouterr().err == f"{settings.UNFITTED}\n"
  assert {s.settings.preset for s in sessions} == {""}
  assert llm._session(preset="mine").header([], 1, 0)["sampler"]["high_varent"] == "q95"


def test_the_demo_keeps_the_original_thresholds():
  _, cfg, _ = settings.shape(
    settings.resolve({"checkpoint": str(settings.ASSETS / "demo/instruct")})
  )
  assert presets.for_model(cfg) == "demo"
  assert presets.load("demo").knobs == {}


def test_quantile_has_the_shares_of_the_calibration():
  shares = {knob: share for knob, (_, share) in load("scripts/calibrate.py").THRESHOLDS.items()}
  assert presets.load("quantile").knobs == shares


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize("value", ["q20", 0.2, 1, "q99.5"])
def test_a_threshold_is_a_number_or_a_quantile_in_flags_files_and_runs(value, monkeypatch):
  made = config()
  made.runs = {"one": {"sampler": {"low_ent": value}}}
  assert config_file.resolve(config_file.named(made, "one")).knobs == {"low_ent": value}
  made.sampler.low_ent = value
  assert config_file.resolve(made).knobs == {"low_ent": value}
  flags = commands.Flags()
  flags.config_file("")
  argv = ["x", f"--config={ROOT}/configs/demo.py", f"--config.sampler.low_ent={value}"]
  monkeypatch.setattr("sys.argv", argv)  # which ml_collections reads
  commands.parse(argv, flags, "")
  assert config_file.resolve(flags.config).knobs == {"low_ent": value}


def test_a_preset_comes_back_from_its_file(tmp_path):
  file = tmp_path / "é.json"
  kept = presets.Preset("quadrant", "mesuré à la main", {"top_k": 3, "temp": 0.7}, {"tokens": 12})
  presets.save(file, kept)
  assert presets.load(str(file)) == kept
  model = {**presets.shape(PRESETS["llama3_1b"])}
  presets.save(tmp_path / "é.json", fitting := dataclasses.replace(kept, model=model))
  assert presets.load(str(file)) == fitting
  presets.save(file, kept)
  keys = list(json.loads(file.read_text(encoding="utf-8")))
  assert keys == ["sampler", "about", "knobs", "calibration"]
  bare = presets.Preset("plain", "nothing is set", {})
  presets.save(file, bare)
  assert presets.load(str(file)) == bare
  assert [p.name for p in tmp_path.iterdir()] == ["é.json"]


GOOD = {"sampler": "plain", "about": "a", "knobs": {}}
BAD = {
  "no JSON": ("{", "is not JSON"),
  "not a number": ('{"sampler": "plain", "about": "a", "knobs": {"min_p": NaN}}', "NaN"),
  "a list": ("[]", "not a JSON object"),
  "unknown key": (json.dumps(GOOD | {"knob": {}}), "unknown key 'knob'"),
  "no sampler": (json.dumps({"about": "a", "knobs": {}}), "needs 'sampler', a text"),
  "knobs of the wrong kind": (json.dumps(GOOD | {"knobs": []}), "needs 'knobs', an object"),
  "unknown sampler": (json.dumps(GOOD | {"sampler": "x"}), "no sampler 'x'"),
  "unknown knob": (json.dumps(GOOD | {"knobs": {"low_ent": 1}}), "no knob 'low_ent'"),
  "half a model": (json.dumps(GOOD | {"model": {"layers": 2}}), "not described by: layers, width"),
  "out of range": (json.dumps(GOOD | {"knobs": {"min_p": 2.0}}), "must lie in"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_sentence(what, tmp_path):
  text, says = BAD[what]
  file = tmp_path / "bad.json"
  file.write_text(text)
  refusal([says, "bad.json"], config_file.resolve, config(preset=str(file)))


def test_what_is_not_there_is_named():
  refusal(["choose one of: demo, entropix-2410, ", "smollm-360m"], presets.load, "entropix")
  file, empty = "no/such/file.json", presets.Preset("plain", "", {})
  refusal(["cannot be read"], presets.load, file)
  refusal(["cannot be written"], presets.save, file, empty)
