"""The example of sampling/README.md is a sampler: found by name, held to the contract, run."""

import re
import sys
from pathlib import Path

import contract
import numpy as np
import oracles
import pytest
import test_sampling
from conftest import refusal
from test_engine import engine, tokens_of

from entropix_jax import sampling
from entropix_jax.cli import config_file
from entropix_jax.engine.request import Request

NAME = "yours"
README = Path(sampling.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
  """The example, registered for as long as this file's tests run."""
  (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  folder = tmp_path_factory.mktemp("sampling")
  (folder / f"{NAME}.py").write_text(example)
  before = sampling.names()
  yield sampling.register(folder / f"{NAME}.py")
  del sys.modules[f"{sampling.__name__}.{NAME}"], sampling._registered[NAME]
  assert sampling.names() == before


def test_registering_again_replaces_and_a_bad_file_changes_nothing(sampler, tmp_path):
  file = tmp_path / f"{NAME}.py"
  for text, words in (
    ("x =", "cannot be read"),
    ("BRANCHES = ()", "lacks Config, init, step, commit"),
  ):
    file.write_text(text)
    refusal([words], sampling.register, file)
  with pytest.raises(ZeroDivisionError):
    sampling.register(file.write_text("1 / 0") and file)
  for taken in ("plain.py", "draw.py", "_x.py", "two words.py", "yours.txt"):
    refusal(["cannot be the file"], sampling.register, tmp_path / taken)
  refusal(["cannot be read"], sampling.register, tmp_path / "absent.py")
  assert sampling.find(NAME) is sampler is sys.modules[sampler.__name__]
  file.write_text(Path(sampler.__file__).read_text().replace("1.5", "2.5"))
  try:
    assert sampling.register(file) is sampling.find(NAME)
    assert sampling.knobs(sampling.find(NAME))["width"] == 2.5
  finally:
    sampling.register(sampler.__file__)
    sys.modules[sampler.__name__] = sampling._registered[NAME] = sampler


def test_it_is_found_and_its_knobs_are_flags(sampler):
  assert NAME in sampling.names()
  config = config_file.base(checkpoint="x")
  config.sampler.update(name=NAME, width=2.0)
  resolved = config_file.resolve(config)
  assert (resolved.sampler, resolved.knobs) == (NAME, {"width": 2.0})


# What the contract's tests run on each sampler of the folder.
CONTRACT = {
  name: check
  for name, check in vars(test_sampling).items()
  if any(mark.args[:1] == ("sampler",) for mark in getattr(check, "pytestmark", []))
}


@pytest.mark.parametrize("name", CONTRACT)
def test_it_holds_the_contract(sampler, name):
  CONTRACT[name](sampler)


def test_the_contract_is_not_empty():
  assert {
    "test_every_branch_is_reached_by_its_case",
    "test_no_dead_knobs",
    "test_the_law_is_a_law",
    "test_rows_are_strangers",
    "test_draws_follow_the_law_in_every_branch",
  } <= set(CONTRACT)


def test_it_keeps_as_many_as_it_says(sampler):
  rng = np.random.default_rng(0)
  logits = (rng.standard_normal((30, 90)) * rng.uniform(0.3, 9, (30, 1))).astype(np.float32)
  cfg = contract.rows(sampler.Config(), 30)
  decision, _ = contract.decide(sampler, cfg, contract.observe(logits))
  branches = set()
  for row, law, k, branch in zip(
    logits, np.exp(decision.law_BV), decision.stats["top_k"], decision.branch_B, strict=True
  ):
    ent = oracles.ent_varent(oracles.probabilities(row))[0]
    want = 1 if ent < 0.1 else int(np.ceil(1.5 * np.exp(ent)))
    assert int(k) == want
    assert sampler.BRANCHES[int(branch)] == ("sure" if ent < 0.1 else "open")
    np.testing.assert_allclose(law, oracles.truncated(row, 1.0, top_k=want), atol=1e-5)
    branches.add(int(branch))
  assert len(branches) == 2


def test_it_runs_and_is_traced(sampler):
  """A few tokens of two rows: numbers and branch are reported, and a row is the same alone."""
  e = engine(sampler)
  requests = [Request([3, 1, 4], 8, seed=1), Request([9, 2], 6, seed=2, knobs={"width": 0.5})]
  tokens = tokens_of(e, requests)
  assert sorted(t.prompt for t in tokens) == [0] * 8 + [1] * 6
  for token in tokens:
    width = (1.5, 0.5)[token.prompt]
    ent = token.numbers["entropy"]
    want = 1 if ent < 0.1 else np.ceil(width * np.exp(np.float32(ent)))
    assert abs(token.numbers["top_k"] - want) <= 1
    assert token.branch == ("sure" if ent < 0.1 else "open")
  alone = tokens_of(e, requests[1:])
  assert [t.id for t in alone] == [t.id for t in tokens if t.prompt == 1]
