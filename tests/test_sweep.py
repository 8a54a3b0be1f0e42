"""The sweep on the demo checkpoint: one program for all settings, resumable, honest about its figures."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest
from command import CONFIG, DEMO, is_one_sentence, load, run

from entropix_jax import compile_cache, sampling
from entropix_jax.cli import config_file
from entropix_jax.engine.engine import Engine
from entropix_jax.errors import UserError
from entropix_jax.llm import LLM

SCRIPT = "benchmarks/sweep.py"
FEW = ("--task=demo", "--problems=4", "--batch=4", "--max_new_tokens=48")


def sweep(*args):
  """(stdout, stderr) of a sweep that goes well."""
  code, out, err = run(SCRIPT, CONFIG, *args)
  assert code == 0, err
  return out, err


def lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_three_settings_of_four_problems_and_none_twice(tmp_path):
  out = tmp_path / "runs.jsonl"
  args = (*FEW, "--sampler=plain", f"--out={out}")
  _, err = sweep(*args, "--grid=temperature=0,1", "--grid=min_p=0.1")
  assert "2 runs of 4 prompts" in err
  first = lines(out)
  assert [line["knobs"] for line in first] == [
    {"temperature": 0.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 0.1},
  ]
  for line in first:
    assert len(line["right"]) == line["of"] == 4
    assert line["count"] == line["right"].count("1") == 4 * line["accuracy"]
    assert sum(line["branches"].values()) == pytest.approx(1)
    assert 0 < line["distinct_1"] < line["distinct_2"] <= 1
    assert line["tokens"] > 40
    assert line["seconds"] > 0
    assert line["mean_entropy"] > 0
    assert {"commit", "date", "device", "dtype", "digest", "ended"} <= set(line)
  greedy, warm = first
  assert greedy["law_entropy"] == 0 < warm["law_entropy"]
  assert greedy["branches"] == {"greedy": 1.0}

  # A line that was cut short is made again; what is whole is not, and stays byte for byte.
  text = out.read_text()
  out.write_text(text + text.splitlines()[0][:50])
  said, err = sweep(*args, "--grid=temperature=0,1,0.5", "--grid=min_p=0.1", "--grid=top_p=1.0")
  assert "1 runs of 4 prompts" in err
  assert out.read_text().startswith(text)
  assert [line["knobs"]["temperature"] for line in lines(out)] == [0.0, 1.0, 0.5]
  table = said.splitlines()
  assert len(table) == 4
  assert "over greedy" in table[0]
  assert "plain temperature=" in table[1]
  assert "min_p" not in said  # it does not differ

  _, err = sweep(*args, "--grid=temperature=0,1", "--grid=min_p=0.1", "--seeds=2")
  assert "2 runs of 4 prompts" in err
  assert [line["seed"] for line in lines(out)] == [0, 0, 0, 1, 1]
  # Greedy text has no seed; other text has.
  assert lines(out)[3]["right"] == greedy["right"]
  assert lines(out)[3]["tokens"] == greedy["tokens"]
  assert lines(out)[4]["tokens"] != warm["tokens"]


def test_any_knob_of_plain_can_be_swept(tmp_path):
  """Those of families that the config does not set, too."""
  out = tmp_path / "s.jsonl"
  grids = ("--grid=top_k=1,40", "--grid=presence_penalty=0.5")
  sweep(*FEW, "--sampler=plain", "--max_new_tokens=6", *grids, f"--out={out}")
  assert [line["knobs"]["top_k"] for line in lines(out)] == [1, 40]


def test_a_setting_gets_in_a_crowd_what_it_gets_alone(tmp_path):
  """Quadrant and its neighbours' thresholds: figures do not depend on who shares the batch."""
  crowd, alone = tmp_path / "crowd.jsonl", tmp_path / "alone.jsonl"
  args = (*FEW, "--sampler=quadrant", "--max_new_tokens=24")
  sweep(*args, "--grid=low_ent=0,0.5", "--grid=temp=0.3,3", f"--out={crowd}")
  sweep(*args, "--grid=low_ent=0", "--grid=temp=3", f"--out={alone}")
  [mine] = [x for x in lines(crowd) if x["knobs"] == {"low_ent": 0.0, "temp": 3.0}]
  [same] = lines(alone)
  for name in ("right", "tokens", "branches", "distinct_2"):
    assert mine[name] == same[name]
  assert mine["mean_entropy"] == pytest.approx(same["mean_entropy"], abs=1e-4)
  assert len({json.dumps(x["branches"]) for x in lines(crowd)}) > 1


def test_all_settings_share_each_program(monkeypatch):
  """Every program is compiled once, before the first token; settings compile nothing."""
  module = load(SCRIPT)
  config = config_file.base(checkpoint=str(DEMO), max_seq_len=1024, batch_size=4)
  resolved = config_file.resolve(config)
  session = LLM.of(resolved).session(resolved)
  problems = list(itertools.islice(module.held_out(), 4))
  task = module.Task("x", tuple(p.question for p in problems), tuple(p.answer for p in problems))
  known = sampling.knobs(session.sampler)
  ranges = ["low_ent=0.001:1:log", "high_varent=0.1:4", "top_k=1:40", "temp=0.1:3:log"]

  def go(count, seed):
    runs = [
      module.Run(knobs, 0, task) for knobs in module.draws(ranges, known, count, sample_seed + seed)
    ]
    return list(module.play(session, task, runs, 12))

  sample_seed, made, compiled = 3, [], []
  monkeypatch.setattr(compile_cache, "load", lambda *_: None)
  lower = Engine.lower
  monkeypatch.setattr(
    Engine, "lower", lambda engine, program: (made.append(program), lower(engine, program))[1]
  )

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    assert len(go(1, 0)) == 1
    assert len(made) == len(set(made)) == len(session.engine.compiled) >= 4
    assert len(compiled) >= len(made)  # the counter can count
    programs = len(made)
    compiled.clear()
    found = go(3, 1)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len({json.dumps(line["knobs"]) for line in found}) == 3
  assert len(made) == programs
  assert compiled == []


def test_a_preset_is_the_start_and_prompts_need_no_answers(tmp_path):
  out, file = tmp_path / "texts.jsonl", tmp_path / "p.txt"
  file.write_text("Tell me a story about a kite.\nHello!\n" * 2)
  said, _ = sweep(
    "--batch=4", "--max_new_tokens=16", f"--prompt_file={file}",
    "--preset=smollm2-360m", "--grid=temp=0.5", f"--out={out}",
  )  # fmt: skip
  [line] = lines(out)
  assert (line["sampler"], line["preset"], line["prompts"]) == ("quadrant", "smollm2-360m", 4)
  assert line["knobs"]["low_ent"] == 0.3466
  assert line["knobs"]["temp"] == 0.5
  assert "accuracy" not in line
  assert "accuracy" not in said
  assert "quadrant" in said


def test_problems_are_held_out_in_one_order_and_never_twice():
  module = load(SCRIPT)
  some = list(itertools.islice(module.held_out(), 400))
  assert all(p.held_out for p in some)
  assert len({(p.kind, p.numbers) for p in some}) == 400
  assert len({p.kind for p in some[:30]}) == 30
  assert some[:50] == list(itertools.islice(module.held_out(), 50))


def test_grids_and_draws():
  module = load(SCRIPT)
  known = {"temperature": 1.0, "top_k": 0, "min_p": 0.0}
  assert module.grid([], known) == [{}]
  assert module.grid(["temperature=0.5,1", "top_k=3,4"], known) == [
    {"temperature": t, "top_k": k} for t in (0.5, 1.0) for k in (3, 4)
  ]
  ranges = ["temperature=0.01:10:log", "top_k=1:3", "min_p=0:0.5"]
  assert module.grid(["low_ent=q5,0.2"], {"low_ent": 0.1}) == [{"low_ent": "q5"}, {"low_ent": 0.2}]
  some = module.draws(["low_ent=q5:q95"], {"low_ent": 0.1}, 50, 0)
  assert all(500 <= sampling.quantile(point["low_ent"]) <= 9500 for point in some)
  many = module.draws(ranges, known, 2000, 7)
  assert many[:5] == module.draws(ranges, known, 5, 7) != module.draws(ranges, known, 5, 8)
  temperature, top_k, min_p = (np.array([x[k] for x in many]) for k in known)
  # Log-uniform: each factor of ten gets a third; whole numbers get a third each, ends included.
  assert np.histogram(np.log10(temperature), [-2, -1, 0, 1])[0] == pytest.approx(2000 / 3, rel=0.15)
  assert np.bincount(top_k)[1:] == pytest.approx(2000 / 3, rel=0.15)
  assert all(type(x["top_k"]) is int for x in many)
  assert 0 <= min_p.min() < 0.01 < 0.49 < min_p.max() <= 0.5


def test_intervals_are_those_of_the_paired_bootstrap():
  """Two settings that err together differ by little, whatever each one's own interval is."""
  module = load(SCRIPT)
  rng = np.random.default_rng(1)
  a = rng.random(200) < 0.7
  b = a.copy()
  b[np.flatnonzero(~a)[:6]] = True

  def line(right, temperature, surprise):
    return {
      "sampler": "plain", "knobs": {"temperature": temperature}, "seed": 0, "prompts": 200,
      "right": "".join("01"[int(x)] for x in right), "law_entropy": surprise,
      "mean_entropy": 0.1, "tokens": 4000, "distinct_2": 0.5,
    }  # fmt: skip

  rows = module.compare([line(a, 0.0, 0.0), line(b, 0.7, 0.1)])
  best, greedy = rows
  assert (best.accuracy, greedy.accuracy) == (b.mean(), a.mean())
  assert greedy.gain == (0, 0, 0)
  half = 1.96 * np.sqrt(a.mean() * (1 - a.mean()) / 200)
  assert greedy.interval == pytest.approx((a.mean() - half, a.mean() + half), abs=0.01)
  d = 6 / 200
  half = 1.96 * np.sqrt(d * (1 - d) / 200)
  assert best.gain == pytest.approx((d, d - half, d + half), abs=0.01)
  assert best.gain[1] > 0
  # Seeds of one setting are one row, and a seed more does not narrow what problems leave open.
  [row] = module.compare([line(a, 0.7, 0.1), line(a, 0.7, 0.1) | {"seed": 1}])
  assert (len(row.lines), row.accuracy) == (2, a.mean())
  assert row.interval == pytest.approx(greedy.interval)
  assert "over the first" in module.table([row])


def test_the_plot_is_a_picture(tmp_path):
  pytest.importorskip("matplotlib")
  out, png = tmp_path / "runs.jsonl", tmp_path / "sweep.png"
  args = (*FEW, "--sampler=plain", "--max_new_tokens=8", f"--out={out}", f"--plot={png}")
  sweep(*args, "--grid=temperature=0,1")
  assert png.read_bytes().startswith(b"\x89PNG")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.jsonl", "sweep.png"]


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(UserError, match=r"\[viz\]"):
    load(SCRIPT).import_figure()


GRID = "--grid=temperature=1"
BAD = {
  "no such knob": (["--grid=heat=1"], "temperature, top_k"),
  "no values": (["--grid=temperature"], "KNOB="),
  "not a number": (["--grid=temperature=hot"], "'hot' is not a number"),
  "a quantile of what has none": (["--grid=temperature=q50"], "'temperature' is 'q50'"),
  "half a range of quantiles": (["--random=temperature=q5:1"], "two quantiles such as q5:q50"),
  "not whole": (["--grid=top_k=1.5"], "whole number"),
  "out of range": (["--grid=top_p=2"], "must lie in"),
  "backwards": (["--random=temperature=2:1"], "LEAST < MOST"),
  "log of zero": (["--random=temperature=0:1:log"], "LEAST > 0"),
  "no range": (["--random=temperature=1"], "range of numbers"),
  "both kinds": ([GRID, "--random=top_p=0:1"], "exclude each other"),
  "set and swept": ([GRID, "--config.sampler.temperature=1"], "cannot be swept"),
  "two samplers": ([GRID, "--config.sampler.name=quadrant"], "set twice"),
  "another's preset": ([GRID, "--preset=smollm2-360m"], "for the sampler 'quadrant'"),
  "two sources": ([GRID, "--prompt_file=x.csv"], "either"),
  "strange file": ([GRID, "--out=pyproject.toml"], "something else"),
  "no text": ([GRID, "--out=entropix_jax/assets/demo/base/model.safetensors"], "something else"),
  "seed below zero": (["--random=top_p=0:1", "--sample_seed=-1"], "--sample_seed=-1"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_are_named(what, tmp_path):
  flags, says = BAD[what]
  args = (*FEW, "--sampler=plain", f"--out={tmp_path / 'o.jsonl'}")
  is_one_sentence(run(SCRIPT, CONFIG, *args, *flags), says)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["a note", '{"a": 1}', "{"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, text):
  """Even where its last line has no end, as that of a run that was cut short."""
  path = tmp_path / "notes"
  path.write_text(text)
  if text == "{":  # as a run's line begins
    assert load(SCRIPT).read(path) == []
    return
  with pytest.raises(UserError, match="something else"):
    load(SCRIPT).read(path)
  assert path.read_text() == text
