"""The benchmark of loading runs, prints what others read, and refuses in one sentence."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
from test_checkpoint import MESHED, ROOT

from entropix_jax.checkpoints import checkpoint
from entropix_jax.model import weights


def load(*arguments):
  """(exit code, stdout, stderr) of `python benchmarks/load.py ARGUMENTS`."""
  done = subprocess.run(
    [sys.executable, "benchmarks/load.py", *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_prints_one_json_line_last(tmp_path):
  params = weights.random(MESHED, jnp.bfloat16)
  checkpoint.save(tmp_path / "tiny", MESHED, params, jnp.bfloat16)
  out_file = tmp_path / "runs.jsonl"
  code, out, err = load(
    f"--checkpoint={tmp_path / 'tiny'}", "--processes=2", "--rounds=1",
    f"--out={out_file}",
  )  # fmt: skip
  assert code == 0, err
  line = out.splitlines()[-1]
  assert out_file.read_text(encoding="utf-8") == line + "\n"
  result = json.loads(line)
  assert result["parameters"] == weights.count(MESHED)
  assert result["bytes"] == (tmp_path / "tiny" / checkpoint.MODEL).stat().st_size
  assert result["dd_gb_s"] > 0
  norms = 2 * MESHED.width * (2 * MESHED.layers + 1)  # everywhere; all else is split
  for kind in ("safetensors", "orbax"):
    assert list(result[kind]) == ["2"]
    row = result[kind]["2"]
    assert len(row["peak"]) == 2
    assert row["within"] is True
    assert row["largest"] == 2 * MESHED.width * max(MESHED.ffn, MESHED.vocab) // 2
    assert row["share"] == (2 * weights.count(MESHED) + norms) // 2
    assert row["gb_s"] / result["dd_gb_s"] == pytest.approx(row["over_dd"], rel=1e-3)
  assert {"device", "jax", "commit", "date", "model"} <= set(result)


def test_it_refuses_in_one_sentence(tmp_path):
  params = weights.random(MESHED, jnp.float32)
  checkpoint.save(tmp_path / "wide", MESHED, params, jnp.float32)
  for arguments, says in {
    (f"--checkpoint={tmp_path / 'wide'}",): "bfloat16",
    ("--rounds=0",): "rounds",
    ("--place=x",): "leave it out",
  }.items():
    code, out, err = load(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
