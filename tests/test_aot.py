"""Reading compiled programs, and compiling for devices that are not here."""

import importlib.util
import json
import subprocess
import sys

import hlo
import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from entropix_jax.checkpoints.hf_config import to_hf
from entropix_jax.config import ModelConfig

# A loop of eight steps, cut down from a program for a TPU. Main memory has no S(n); sizes in bytes:
# weight 2048, cache 4096, its slice 64.
TEXT = """
HloModule jit_f, is_scheduled=true

%inner (param_0.1: bf16[32,32], param_1.1: bf16[1,32]) -> bf16[1,32] {
  %param_0.1 = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[1,32]{1,0:S(1)} parameter(1)
  ROOT %convolution.1 = bf16[1,32]{1,0} convolution(%param_1.1, %param_0.1), dim_labels=bf_io->bf
}

%write (param_0.2: bf16[64,32], param_1.2: bf16[1,32], param_2.2: s32[]) -> bf16[64,32] {
  %param_0.2 = bf16[64,32]{1,0} parameter(0)
  %param_1.2 = bf16[1,32]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[64,32]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %zero)
}

%body (arg: (s32[], bf16[64,32], bf16[32,32])) -> (s32[], bf16[64,32], bf16[32,32]) {
  %arg = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %cache = bf16[64,32]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[32,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %x = bf16[1,32]{1,0:S(1)} dynamic-slice(%cache, %i, %i), dynamic_slice_sizes={1,32}
  %y = bf16[1,32]{1,0:S(1)} fusion(%w, %x), kind=kOutput, calls=%inner
  %start = (bf16[32,32]{1,0:S(1)}, bf16[32,32]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %done = bf16[32,32]{1,0:S(1)} copy-done(%start)
  %sum = bf16[1,32]{1,0:S(1)} all-reduce(%y), to_apply=%add
  %new = bf16[64,32]{1,0} fusion(%cache, %sum, %i), kind=kLoop, calls=%write
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) tuple(%i, %new, %w)
}

%test (arg.1: (s32[], bf16[64,32], bf16[32,32])) -> pred[] {
  %arg.1 = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %most = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[] compare(%j, %most), direction=LT
}

ENTRY %main (p0: s32[], p1: bf16[64,32], p2: bf16[32,32]) -> (s32[], bf16[64,32], bf16[32,32]) {
  %p0 = s32[] parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  %p2 = bf16[32,32]{1,0} parameter(2)
  %relaid = bf16[64,32]{0,1} copy(%p1)
  %all = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) tuple(%p0, %relaid, %p2)
  ROOT %loop = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) while(%all), condition=%test, body=%body
}
"""


def test_traffic_is_counted_by_hand():
  program = hlo.Program(TEXT)
  # A step: the slice read; the weight read by a product and once more on its way to the chip; the
  # slice written from the chip, with its index of four bytes twice. Once: a copy in and out.
  step = 64 + 2 * 4 + 2048 + 2048 + 64 + 4
  assert program.traffic() == 8 * step + 2 * 4096


def test_messages_kernels_and_copies_are_counted():
  program = hlo.Program(TEXT)
  assert program.collectives() == {"all-reduce": 8.0}
  assert program.inside_steps() == "body"
  assert program.copies_of(4096) == 1
  assert program.copies_of(2048) == 1 + 8
  # A step: the slice, two fusions and a copy; once: the copy.
  assert program.kernels() == 8 * 4 + 1


# What the loop above has not: a condition, messages and copies in two halves, a scatter, and a fusion
# that reads one row of 32 bytes.
OTHERS = """
HloModule jit_g, is_scheduled=true

%cheap (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%a)
}

%dear (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %exp = f32[8]{0} exponential(%b)
  ROOT %tanh = f32[8]{0} tanh(%exp)
}

%part (param_0.3: f32[64,8], param_1.3: s32[]) -> f32[8] {
  %param_0.3 = f32[64,8]{1,0} parameter(0)
  %param_1.3 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  %slice = f32[1,8]{1,0} dynamic-slice(%param_0.3, %param_1.3, %zero.3), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%slice)
}

ENTRY %main.2 (p: pred[], i: s32[], t: f32[64,8], at: s32[2,1], new: f32[2,8]) -> (f32[8], f32[64,8]) {
  %p = pred[] parameter(0)
  %i = s32[] parameter(1)
  %t = f32[64,8]{1,0} parameter(2)
  %at = s32[2,1]{1,0} parameter(3)
  %new = f32[2,8]{1,0} parameter(4)
  %row = f32[8]{0} fusion(%t, %i), kind=kLoop, calls=%part
  %sent = (f32[8]{0}, f32[32]{0}) all-gather-start(%row), dimensions={0}
  %got = f32[32]{0} all-gather-done(%sent)
  %begun = (f32[64,8]{1,0}, f32[1,8]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%t), slice={[0:1], [0:8]}
  %ended = f32[1,8]{1,0:S(1)} slice-done(%begun)
  %told = f32[8]{0} conditional(%p, %row, %row), branch_computations={%cheap, %dear}
  %put = f32[64,8]{1,0} scatter(%t, %at, %new), to_apply=%set
  ROOT %both = (f32[8]{0}, f32[64,8]{1,0}) tuple(%told, %put)
}
"""


def test_the_dearer_branch_and_each_pair_once():
  program = hlo.Program(OTHERS)
  row = 32 + 4 + 32  # one row of the table and the index in, the row out
  gathered, begun = 32 + 128, 32
  branch = 4 * 32  # the dear one: two instructions, in and out
  scattered = 8 + 64 + 64  # the places, and the new rows in and out
  assert program.traffic() == row + gathered + begun + branch + scattered
  assert program.kernels() == 1 + 1 + 2 + 1
  assert program.kernels(min) == 1 + 1 + 1 + 1
  assert program.collectives() == {"all-gather": 1.0}
  assert program.total_of("conditional", program.inside_steps()) == 1


def test_a_real_program_can_be_read():
  """What this machine's own compiler writes: a loop with a known trip count and a product in it."""

  def f(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

  text = jax.jit(f).lower(jnp.ones((4, 64)), jnp.ones((64, 64))).compile().as_text()
  program = hlo.Program(text)
  assert program.kernels() >= 5
  assert program.traffic() >= 5 * 64 * 64 * 4


def command(*flags):
  return subprocess.run(
    [sys.executable, "scripts/aot.py", "--config=configs/demo.py", *flags],
    capture_output=True, text=True, cwd=ROOT, timeout=400, check=False,
  )  # fmt: skip


def figures(target, *flags):
  """What the program writes of a device, for which there must be a compiler."""
  tpu = target.startswith("v")
  if not importlib.util.find_spec("libtpu" if tpu else "jax_cuda13_plugin"):
    extra = "aot-tpu" if tpu else "aot-gpu"
    pytest.skip(f'no compiler for {target}; pip install -e ".[{extra}]" brings it')
  done = command(f"--target={target}", *flags)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  ("target", "data", "figure", "most"),
  [  # the demo's two key/value heads are for two chips of a model axis
    ("v5e:2x2", 2, "hbm_traffic_over_minimum", 1.5),
    ("h100:2", 1, "kernels_per_layer", 60),
  ],
)
def test_the_demo_compiles_for_devices_that_are_not_here(target, data, figure, most):
  out = figures(target, f"--config.mesh.data={data}")
  assert out["fits"]
  assert out["decode"]["all_reduces"] <= 2 * out["layers"] + 4
  assert 0 < out["decode"][figure] < most
  assert out["prefill"]["bytes_per_chip"] < out["hbm_bytes_per_chip"]


@pytest.mark.parametrize(
  ("target", "dtype", "most"),
  [("h100:1", "bfloat16", 12), ("h100:2", "int8", 13)],  # two sums more a layer are messages' own
)
def test_a_layer_is_few_kernels_on_a_gpu(tmp_path, target, dtype, most):
  """A decode step of sixteen layers, as many as the smallest Llama 3 has, sampler included."""
  cfg = ModelConfig(512, 256, 512, 16, 8, 2, 64, tied=True)
  (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
  flags = f"--config.checkpoint={tmp_path}", f"--dtype={dtype}", f"--text={tmp_path}"
  decode = figures(target, *flags)["decode"]
  assert decode["kernels_per_layer"] <= most
  assert decode["cache_copies"] == decode["whiles"] == decode["conditionals"] == 0
  text = (tmp_path / "decode.txt").read_text()
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 6 * 15  # one is measured


@pytest.mark.parametrize(
  "knobs", [("temperature=0",), ("top_p=0.9", "min_p=0.1", "repetition_penalty=1.1")]
)
def test_plain_is_few_kernels_on_a_gpu(tmp_path, knobs):
  """The same step, where the compiler is here: hardly more than with quadrant."""
  cfg = ModelConfig(2048, 256, 512, 16, 8, 2, 64, tied=True)
  (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
  flags = [f"--config.sampler.{knob}" for knob in ("name=plain", *knobs)]
  decode = figures("h100:1", f"--config.checkpoint={tmp_path}", *flags)["decode"]
  assert decode["whiles"] == 0
  assert decode["kernels_least"] <= 200
  assert decode["kernels"] <= 230


def recorded():
  text = (ROOT / "benchmarks/results/aot.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def versions(lines):
  return {".".join(x["jax"].split(".")[:2]) for x in lines}


def test_recorded_idle_knobs_cost_a_gpu_nothing():
  """Recorded counts of `plain` at the 1B shape, for each jax that is supported."""
  lines = [x for x in recorded() if x["sampler"] == "plain" and x["model"] == "llama3_1b"]
  assert versions(lines) >= {"0.10", "0.11", "0.12"}
  for x in lines:
    assert x["decode"]["whiles"] == 0
    assert x["decode"]["kernels_least"] <= 200
    assert x["decode"]["kernels"] <= 230
    assert x["target"] == "h100:1"


def test_recorded_layers_are_few_kernels_with_every_jax():
  """Recorded counts of the default sampler; jax 0.12 deprecates the Triton backend and compiles it."""
  lines = [x for x in recorded() if x["target"] == "h100:1"]
  assert versions(lines) >= {"0.10", "0.11", "0.12"}
  assert {x["model"] for x in lines} >= {"llama3_1b", "llama3_8b"}
  assert all(x["decode"]["kernels_per_layer"] <= 14.5 for x in lines)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--target=z9:8"], "--target=z9:8 is unknown"),
    (["--target=h100:0"], "--target=h100:0 is unknown"),
    (["--target=v5e:0x0"], "--target=v5e:0x0 is unknown"),
    (["--target=v5e:"], "--target=v5e: is unknown"),
    ([], "Give --target"),
    (["--target=v5e:1", "--config.checkpoint=none"], "none does not exist"),
    (["--target=v5e:1", "--batch=0"], "--batch"),
    (["--target=v5e:1", "--cache=1"], "--cache"),
  ],
  ids=str,
)
def test_a_mistake_is_one_sentence(args, words):
  done = command(*args)
  assert done.returncode == 2
  assert words in done.stderr
  assert done.stderr.count("\n") == 1
