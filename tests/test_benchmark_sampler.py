"""The benchmark of samplers runs, prints the keys that others read, and sees a sort where there is one.

Why: figures are worth nothing in a test; that no shipped sampler sorts a whole vocabulary is.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import is_one_sentence, load, run

from entropix_jax import sampling

SCRIPT = "benchmarks/sampler.py"
benchmark = load(SCRIPT)


def test_it_prints_one_json_line_a_batch_last(tmp_path):
  out_file = tmp_path / "runs.jsonl"
  cases = ("top_p", "quadrant_fork")
  code, out, err = run(
    *(SCRIPT, "--vocab=2048", "--history=40", "--rounds=2", f"--out={out_file}"),
    *("--batch=1", "--step_ms=2", "--batch=3", "--step_ms=4"),
    *(f"--only={name}" for name in cases),
  )
  assert code == 0, err
  lines = out.splitlines()[-2:]
  assert out_file.read_text(encoding="utf-8").splitlines() == lines
  for line, batch, step_ms in zip(lines, (1, 3), (2.0, 4.0), strict=True):
    result = json.loads(line)
    assert (result["benchmark"], result["vocab"], result["history"]) == ("sampler", 2048, 40)
    assert (result["batch"], result["step_ms"], result["step_given"]) == (batch, step_ms, True)
    for key in ("step_us", "extra_us", "ratio", "sorts", "branches"):
      assert list(result[key]) == ["greedy", *cases]
    assert all(us > 0 for us in result["step_us"].values())
    assert result["extra_us"]["greedy"] == 0
    for name, us in result["extra_us"].items():
      assert result["ratio"][name] == pytest.approx(1 + us / 1e3 / step_ms, rel=1e-4)
    assert result["branches"]["quadrant_fork"] == {"fork": batch * benchmark.STEPS}
    assert {"device", "jax", "commit", "date", "model", "context", "rounds"} <= set(result)


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["--only=top_q"], "top_k, top_p"),
    (["--step_ms=1", "--batch=1", "--batch=2"], "2 batches"),
    (["--step_ms=0", "--batch=1"], "--step_ms"),
    (["--step_ms=nan", "--batch=1"], "--step_ms"),
    (["--step_ms=1", "--batch=1000000000"], "No batch fits"),
    (["--model=llama3_70b", "--vocab=1000000000"], "are free; take a smaller one"),
    (["--vocab=10"], "1024"),
    (["--model=llama9"], "llama3_1b"),
    (["--context=1000000"], "--context"),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_it_refuses(args, says):
  code, out, err = run(SCRIPT, *args)
  is_one_sentence((code, out, err.splitlines(keepends=True)[-1]), says)  # after those left out


@pytest.mark.parametrize("name", sampling.names())
@pytest.mark.parametrize("batch", [1, 8])
def test_no_sampler_sorts_a_whole_vocabulary(name, batch):
  assert benchmark.sorts_of(sampling.find(name), batch, 128_256, 1024) == 0


def test_a_planted_sort_is_found():
  V = 500

  def planted(x_BV):
    def one(x_BV):
      few = jnp.sort(x_BV[:, : V - 1])  # not the whole
      return jnp.sort(x_BV)[:, :1] + jax.lax.top_k(x_BV, 3)[0][:, :1] + few[:, :1]

    return jax.lax.cond(
      x_BV[0, 0] > 0,
      jax.jit(one),
      lambda x_BV: jnp.argsort(x_BV, 1)[:, :1].astype(jnp.float32),
      x_BV,
    )

  x_BV = jnp.zeros((2, V))
  assert benchmark.sorts(jax.make_jaxpr(planted)(x_BV), V) == 3
  assert benchmark.sorts(jax.make_jaxpr(lambda x: jnp.sort(x, axis=0))(x_BV), V) == 0
  assert benchmark.sorts(jax.make_jaxpr(lambda x: jnp.sort(x.T, axis=0))(x_BV), V) == 1


@pytest.mark.parametrize("name", benchmark.CASES)
def test_every_case_can_be_set(name):
  case = benchmark.CASES[name]
  sampler = sampling.find(case.sampler)
  sampling.configure(sampler, case.knobs)
  assert name == "quadrant" or not name.startswith("quadrant_") or case.p


def test_logits_of_a_case_have_its_probabilities():
  p = (0.5, 0.3, 0.2)
  logits = benchmark.likely(np.random.default_rng(0), 3, 2000, p)
  assert logits.shape == (benchmark.STEPS, 3, 2000)
  got = np.sort(np.asarray(jax.nn.softmax(jnp.asarray(logits))), axis=-1)[..., ::-1]
  np.testing.assert_allclose(got[..., :3], np.broadcast_to(p, (benchmark.STEPS, 3, 3)), atol=1e-5)
