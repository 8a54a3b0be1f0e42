"""The benchmark of loading runs, prints what others read, and refuses in one sentence."""

import json
import sys

import jax.numpy as jnp
import pytest
from command import is_one_sentence, run
from test_checkpoint import MESHED

from entropix_jax.checkpoints import checkpoint
from entropix_jax.model import weights

SCRIPT = "benchmarks/load.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_prints_one_json_line_last(tmp_path):
  params = weights.random(MESHED, jnp.bfloat16)
  checkpoint.save(tmp_path / "tiny", MESHED, params, jnp.bfloat16)
  out_file = tmp_path / "runs.jsonl"
  args = (f"--checkpoint={tmp_path / 'tiny'}", "--processes=2", "--rounds=1", f"--out={out_file}")
  code, out, err = run(SCRIPT, *args)
  assert code == 0, err
  line = out.splitlines()[-1]
  assert out_file.read_text(encoding="utf-8") == line + "\n"
  result = json.loads(line)
  assert result["parameters"] == weights.count(MESHED)
  assert result["bytes"] == (tmp_path / "tiny" / checkpoint.MODEL).stat().st_size
  assert result["dd_gb_s"] > 0
  # Norms, and the biases of sums, are everywhere; all else is split.
  norms = 2 * MESHED.width * (4 * MESHED.layers + 1)
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
  for argument, says in {
    f"--checkpoint={tmp_path / 'wide'}": "bfloat16",
    "--rounds=0": "rounds",
    "--place=x": "leave it out",
  }.items():
    is_one_sentence(run(SCRIPT, argument), says)
