"""Random input: every knob on every sampler, every kind of file that is read, stop strings in any text.

Nothing raises anything but UserError, and no law has a NaN.
"""

import copy
import csv
import dataclasses
import json
import math
import pathlib

import contract
import jax
import numpy as np
import pytest
from command import DEMO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import small_json

from entropix_jax import sampling
from entropix_jax.checkpoints import chat, checkpoint, hf_config, vocabulary
from entropix_jax.checkpoints.tokenizer import StreamDecoder
from entropix_jax.cli import prompts
from entropix_jax.errors import UserError
from entropix_jax.model.rope import inverse_frequencies
from entropix_jax.report import reader
from entropix_jax.sampling import presets

few = settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)


def refused_or(call, *args):
  """What a call returns; None where it refuses with one sentence."""
  try:
    return call(*args)
  except UserError as error:
    message = str(error)
  assert "\n" not in message
  assert message.endswith(".")
  return None


# -- samplers --------------------------------------------------------------------------------------

V = 40
WILD = [
  np.zeros(V),
  np.where(np.arange(V) == 7, 0.0, -np.inf),
  np.where(np.arange(V) < 2, [1e30] * V, -1e30),
  np.linspace(-3e4, 3e4, V),
  np.where(np.arange(V) % 3 == 0, -np.inf, np.random.default_rng(0).normal(0, 3, V)),
  np.full(V, -3e38),
  np.random.default_rng(1).normal(0, 1e-6, V),
  np.log(np.r_[0.9, np.full(V - 1, 0.1 / (V - 1))]),
]
OBSERVED = contract.observe(np.asarray(WILD), history=[3, 1, 4, 1, 5, 3, 1, 4], prompt=2)


def extreme(sampler, name, default):
  """Values of a knob: its ends, values just inside, and anything between."""
  if isinstance(default, bool):
    return st.booleans()
  if isinstance(default, sampling.Ids):
    return st.lists(st.integers(0, V - 1), max_size=V)
  if isinstance(default, sampling.Biases):
    return st.dictionaries(st.integers(0, V - 1), st.floats(width=32, allow_nan=False), max_size=4)
  low, high = getattr(sampler, "RANGES", {}).get(name, (-1e6, 1e6))
  if isinstance(default, int):
    return st.sampled_from([low, low + 1, high, default]) | st.integers(low, high)
  near = [low, high, default, low + 1e-6, math.nextafter(high, low), 1e-30]
  return st.sampled_from([x for x in near if low <= x <= high]) | st.floats(low, high)


def some_knobs(sampler):
  """A dict of one to three knobs."""
  defaults = {field.name: field.default for field in dataclasses.fields(sampler.Config)}
  one = st.sampled_from(sorted(defaults)).flatmap(
    lambda name: st.tuples(st.just(name), extreme(sampler, name, defaults[name]))
  )
  return st.lists(one, min_size=1, max_size=3).map(dict)


@pytest.mark.parametrize("name", sampling.names())
def test_a_law_is_a_law_whatever_the_knobs_are(name):
  sampler = sampling.find(name)

  @settings(few, max_examples=150)
  @given(some_knobs(sampler))
  def check(knobs):
    cfg = refused_or(sampling.configure, sampler, knobs)
    if cfg is None:
      return
    decision, state = contract.decide(sampler, contract.rows(cfg, len(WILD)), OBSERVED)
    law_BV = np.asarray(decision.law_BV, np.float64)
    assert not np.isnan(law_BV).any()
    assert not (law_BV == np.inf).any()
    np.testing.assert_allclose(np.exp(law_BV).sum(-1), 1.0, atol=1e-4)
    for leaf in jax.tree.leaves(state):
      assert not np.isnan(np.asarray(leaf, np.float64)).any()

  check()


# -- files -----------------------------------------------------------------------------------------

scalars = (
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text(max_size=8)
  | st.sampled_from(["", "0", -1, 0, 1, 1e400, float("nan")])
)
values = st.recursive(
  scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)
)


def places(tree, path=()):
  """Paths to all values in a JSON tree."""
  yield path
  items = (
    tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  )
  for key, value in items:
    yield from places(value, (*path, key))


def changed(tree, path, value):
  """The tree with another value at a path."""
  if not path:
    return value
  tree = copy.copy(tree)
  tree[path[0]] = changed(tree[path[0]], path[1:], value)
  return tree


def mutated(tree):
  """The tree with one value replaced, or text that is hardly JSON."""
  paths = list(places(tree))
  one = st.tuples(st.sampled_from(paths), values).map(lambda c: json.dumps(changed(tree, *c)))
  whole = json.dumps(tree)
  cut = st.integers(0, len(whole)).map(lambda n: whole[:n])
  return one | cut | st.text(max_size=30)


TRACE = [
  {
    "config": {},
    "sampler": {"name": "plain"},
    "branches": ["a"],
    "prompts": [{"text": "x", "ids": [1]}],
  },
  {
    "prompt": 0,
    "position": 0,
    "id": 1,
    "text": "x",
    "branch": "a",
    "entropy": 1.0,
    "varentropy": 0.0,
  },
  {"error": {"prompt": 0, "sample": 0, "after": 1, "text": ""}},
  {"summary": {"generated_tokens": 1}},
]
CONFIG = json.loads((DEMO / "config.json").read_text())
PRESET = {"sampler": "plain", "about": "a", "knobs": {"min_p": 0.1, "banned": "1,2"}}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}


def shape(folder):
  """All that is asked of a folder before its weights are read."""
  cfg = checkpoint.load_config(folder)
  checkpoint.stop_ids(folder)
  chat.templates(folder)
  checkpoint.check_files(folder, cfg)


JSON = {
  "config.json": (CONFIG, shape),
  "generation_config.json": ({"eos_token_id": [1, 2]}, shape),
  "model.safetensors.index.json": (INDEX, shape),
  "tokenizer_config.json": ({"bos_token": "a", "chat_template": "x"}, shape),
  "preset.json": (PRESET, lambda folder: presets.load(str(folder / "preset.json"))),
  "tokenizer.json": (small_json(), vocabulary.load),
}


@pytest.mark.parametrize("name", JSON)
def test_files_of_json_are_read_or_refused(tmp_path, name):
  tree, read = JSON[name]
  (tmp_path / "model.safetensors").write_bytes(b"")
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))

  @settings(few, max_examples=150)
  @given(mutated(tree))
  def check(text):
    (tmp_path / name).write_text(text, encoding="utf-8", errors="replace")
    refused_or(read, tmp_path)

  check()


def test_traces_are_read_or_refused(tmp_path):
  file = tmp_path / "t.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in TRACE))
  assert refused_or(reader.read, file)

  @settings(few, max_examples=200)
  @given(st.integers(0, len(TRACE) - 1).flatmap(lambda i: st.tuples(st.just(i), mutated(TRACE[i]))))
  def check(change):
    i, text = change
    lines = [json.dumps(row) for row in TRACE]
    lines[i] = text
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    refused_or(reader.read, file)

  check()


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "tokenizer.model"])
def test_files_of_bytes_are_read_or_refused(tmp_path, name):
  model = b"IQ== 0\nIg== 1\nIw== 2\n"
  good = {"p.csv": b"act,prompt\na,b\n", "p.jsonl": b'{"prompt": "a"}\n', "p.txt": b"a\n"}
  whole = good.get(name, model)

  def spliced(parts):
    at, length, new = parts
    return whole[:at] + new + whole[at + length :]

  byte = st.binary(max_size=6) | st.sampled_from([b"\n", b"\r\n", b'"', b",", b"\x00", b"\xff\xfe"])
  places = st.integers(0, len(whole)), st.integers(0, 8), byte

  @settings(few, max_examples=150)
  @given(st.tuples(*places).map(spliced) | st.binary(max_size=40))
  def check(data):
    (tmp_path / name).write_bytes(data)
    refused_or(
      vocabulary.load if name == "tokenizer.model" else prompts.read,
      tmp_path / ("" if name == "tokenizer.model" else name),
    )

  check()


@few
@given(st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=3), max_size=5))
def test_every_row_of_a_csv_file_is_a_prompt(tmp_path_factory, rows):
  """What Python's own writer makes of any text comes back, but for rows without a prompt; ends of lines are \\n."""
  path = tmp_path_factory.getbasetemp() / "rows.csv"
  with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
    csv.writer(file).writerows([["act", "prompt"], *rows])

  def read(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")

  want = [(read(row[1]), read(row[0])) for row in rows if row[1].strip()]
  got = refused_or(prompts.read, path)
  if got is not None:
    assert [(p.text, p.name) for p in got] == want
  else:
    assert not want or any("\x1f" in x or "\0" in x for row in rows for x in row)


@few
@given(values)
def test_a_config_of_any_shape_is_read_or_refused(tree):
  refused_or(hf_config.from_hf, tree)


ROPE = ["rope_type", "type", "mscale", "mscale_all_dim", *hf_config._SCALING["yarn"]]
KINDS = st.fixed_dictionaries({"type": st.sampled_from([*hf_config._SCALING, "longrope"])})
NUMBERS = st.floats(width=64) | st.integers(-2, 10**400) | values
ANY_ROPE = st.builds(
  dict.__or__, st.dictionaries(st.sampled_from(ROPE), NUMBERS, max_size=4), KINDS
)


@settings(few, max_examples=300)
@given(
  st.dictionaries(
    st.sampled_from(sorted(hf_config._HANDLED | set(hf_config._ONLY))), NUMBERS, max_size=3
  ),
  ANY_ROPE | values,
)
def test_a_config_with_any_values_is_read_or_refused(changes, rope):
  """What is read is read back from what is written, and has finite frequencies."""
  hf = {"model_type": "llama", "hidden_size": 64, "head_dim": 8, "rope_scaling": rope} | changes
  cfg = refused_or(hf_config.from_hf, hf)
  if cfg is not None:
    assert hf_config.from_hf(hf_config.to_hf(cfg)) == cfg
    assert isinstance(hf_config.unknown(hf), list)
    assert cfg.head_dim > 1000 or np.isfinite(inverse_frequencies(cfg.rope, cfg.head_dim)).all()


# -- text ------------------------------------------------------------------------------------------

TOK = vocabulary.load(pathlib.Path(DEMO))


@settings(few, max_examples=300)
@given(
  st.text(max_size=40) | st.text("ab \U0001f600é", max_size=40),
  st.lists(
    st.text(min_size=1, max_size=4) | st.text("ab \U0001f600é", min_size=1, max_size=4), max_size=3
  ),
)
def test_a_stream_gives_the_text_before_its_first_stop_string(text, stop):
  ids = TOK.encode(text)
  whole = TOK.decode(ids)
  stream, said = StreamDecoder(TOK, stop=stop), ""
  for id in ids:
    said += stream.push(id)
    if stream.stopped:
      break
  said += stream.flush()
  # A stop string is found in the first text of whole tokens that has one; of several in it, the earliest counts.
  parts = (TOK.decode(ids[:n]) for n in range(len(ids) + 1))
  first = next((part for part in parts if any(s in part for s in stop)), whole)
  assert said == first[: min((first.find(s) for s in stop if s in first), default=len(first))]
