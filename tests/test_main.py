"""The command line, run as a user runs it: text, traces, and one sentence for every bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from entropix_jax import sampling, settings
from entropix_jax.checkpoints import hf_config
from entropix_jax.model import weights

ROOT = pathlib.Path(__file__).parents[1]
ENV = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
DEMO = settings.ASSETS / "demo" / "instruct"


def command(*args, stdin=None):
  """(exit code, stdout, stderr) of `python -m entropix_jax.main --config=configs/demo.py ARGS`."""
  if not any(a.startswith("--config=") for a in args):
    args = ("--config=configs/demo.py", *args)
  done = subprocess.run(
    [sys.executable, "-m", "entropix_jax.main", *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    input=stdin,
    env=ENV,
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


def trace_of(path):
  """(header, token lines, summary) of a trace."""
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return lines[0], lines[1:-1], lines[-1]["summary"]


def test_the_demo_writes_text_and_a_trace(tmp_path):
  path = tmp_path / "run.jsonl"
  code, out, err = command(
    "--prompt=Tell me a story about a kite.", "--max_new_tokens=60", "--seed=3", f"--trace={path}"
  )
  assert code == 0, err
  assert len(out.split()) > 15
  assert "\x1b" not in out  # plain when piped
  header, tokens, summary = trace_of(path)
  assert header["seed"] == 3
  assert header["sampler"]["name"] == "quadrant"
  assert header["prompts"][0]["text"] == "Tell me a story about a kite."
  assert header["prompts"][0]["ids"].count(header["prompts"][0]["ids"][0]) == 1  # one BOS
  assert "".join(t["text"] for t in tokens) == out.removesuffix("\n")
  assert [t["position"] for t in tokens] == list(range(len(tokens)))
  need = (
    "prompt position id text logprob entropy varentropy attn_ent attn_varent branch top_k".split()
  )
  assert set(need) <= set(tokens[0])
  assert summary["generated_tokens"] == len(tokens) <= 60
  assert abs(sum(summary["branches"].values()) - 1) < 1e-4
  assert {"ttft_s", "tokens_per_s", "prompt_tokens"} <= set(summary)
  assert f"{summary['generated_tokens']} generated tokens" in err


def test_a_file_of_prompts_is_run_batched_and_as_alone(tmp_path):
  """Six prompts through four slots; the third alone gives the same tokens."""
  rows = [f"Tell me a story about a {x}." for x in ("kite", "dog", "boat", "tree", "hat", "frog")]
  file = tmp_path / "prompts.csv"
  file.write_text("act,prompt\n" + "".join(f"act {i},{row}\n" for i, row in enumerate(rows)))
  many, one = tmp_path / "many.jsonl", tmp_path / "one.jsonl"
  code, out, err = command(
    f"--prompt_file={file}", "--prompt_test", "--max_new_tokens=20", f"--trace={many}"
  )
  assert code == 0, err
  assert [f"[{i + 1}/6] act {i}" in out for i in range(6)] == [True] * 6
  code, _, err = command(f"--prompt={rows[2]}", "--max_new_tokens=20", f"--trace={one}")
  assert code == 0, err
  ids = [t["id"] for t in trace_of(many)[1] if t["prompt"] == 2]
  assert ids == [t["id"] for t in trace_of(one)[1]]


@pytest.mark.parametrize(
  "drafter", [[], ["--config.decoding.drafter=draft", f"--config.decoding.checkpoint={DEMO.parent / 'base'}"]]
)  # fmt: skip
def test_guessing_changes_no_token(tmp_path, drafter):
  """By n-grams, and by the base sibling of the demo model."""
  problem = "Tom has 12 apples. He buys 7 more and gives 5 to Ann. How many apples does Tom have?"
  ask = [f"--prompt={problem}", "--max_new_tokens=60", "--seed=3"]
  guess = ["--config.decoding.name=speculative", "--config.decoding.always=True", *drafter]
  traces = []
  for name, flags in (("plain", []), ("guessed", guess)):
    code, _, err = command(*ask, *flags, f"--trace={tmp_path / name}")
    assert code == 0, err
    traces.append(trace_of(tmp_path / name)[1:])
  (plain, before), (guessed, after) = traces
  assert [t["id"] for t in guessed] == [t["id"] for t in plain]
  assert after["drafted"] >= after["accepted"] == sum("accepted" in t for t in guessed) > 0
  assert after["target_passes"] < before["target_passes"] == before["generated_tokens"]
  assert "guesses right" in err
  assert "guesses" not in command(*ask[:1], "--max_new_tokens=2")[2]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_cores_say_what_one_says(tmp_path):
  """On a CPU each part of `mesh.data` is a core; samples on both are samples on one."""
  runs = []
  for data in (1, 2):
    path = tmp_path / f"{data}.jsonl"
    code, out, err = command(
      "--prompt=Tell me a story about a kite.", "--max_new_tokens=20", f"--trace={path}",
      "--config.decoding.name=best_of_n", "--config.decoding.n=4", f"--config.mesh.data={data}",
    )  # fmt: skip
    assert code == 0, err
    runs.append((out, [line["id"] for line in trace_of(path)[1] if "id" in line]))
  assert runs[0] == runs[1]


def test_only_the_first_prompt_of_a_file_unless_asked(tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "Tell me a story about a dog."}\n{"prompt": "Hello!"}\n')
  code, out, err = command(f"--prompt_file={file}", "--max_new_tokens=5")
  assert code == 0
  assert out.strip()
  assert "first of 2 prompts" in err


def test_a_conversation():
  code, out, err = command("--chat", "--max_new_tokens=12", stdin="Hello!\nWhat is 2 + 3?\n")
  assert code == 0, err
  assert len(out.strip().splitlines()) >= 2


def test_the_base_model_continues_plain_text(tmp_path):
  path = tmp_path / "t.jsonl"
  code, out, err = command(
    f"--config.checkpoint={DEMO.parent / 'base'}",
    "--prompt=One day",
    "--max_new_tokens=12",
    "--config.sampler.name=plain",
    "--config.sampler.temperature=0",
    f"--trace={path}",
  )
  assert code == 0, err
  assert out.startswith("One day")
  header, tokens, _ = trace_of(path)
  knobs = sampling.knobs(sampling.find("plain")) | {"temperature": 0.0}
  assert header["sampler"] == {"name": "plain"} | knobs
  assert {t["branch"] for t in tokens} == {"greedy"}
  assert all(t["logprob_law"] == 0 for t in tokens)


def test_help_is_short_and_needs_no_jax():
  code, out, _ = command("--help")
  assert code == 0
  assert len(out.splitlines()) < 30
  flags = "config prompt prompt_file prompt_test chat max_new_tokens seed stats trace distributed"
  for flag in flags.split():
    assert f"--{flag} " in out


def damaged(tmp_path, name, change):
  """A copy of the demo's folder with one file changed."""
  folder = tmp_path / name
  folder.mkdir()
  for path in DEMO.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  change(folder)
  return f"--config.checkpoint={folder}"


def edit_config(**changes):
  def change(folder):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | changes))

  return change


def truncate(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])


HELLO = "--prompt=Hello!"
BAD = {
  "empty prompt": (lambda t: ["--prompt=  "], "prompt is empty"),
  "prompt longer than the cache": (
    lambda t: ["--prompt=" + "word " * 50, "--config.engine.max_seq_len=32"],
    "leaves no room",
  ),
  "nothing to do": (lambda t: [], "Nothing to do"),
  "two sources": (lambda t: [HELLO, "--chat"], "exclude each other"),
  "unknown flag": (lambda t: [HELLO, "--promt_file=x"], "Unknown command line flag"),
  "unknown key": (
    lambda t: [HELLO, "--config.engine.batch=3"],
    "known here: attn_stats, batch_size",
  ),
  "unknown knob": (
    lambda t: [HELLO, "--config.sampler.lowent=3"],
    "Unknown key config.sampler.lowent",
  ),
  "another sampler's knob": (
    lambda t: [HELLO, "--config.sampler.name=plain", "--config.sampler.low_ent=1"],
    "has no knob 'low_ent'",
  ),
  "unknown sampler": (
    lambda t: [HELLO, "--config.sampler.name=magic"],
    "choose one of: dslider, entropy_target, plain, quadrant",
  ),
  "value of the wrong kind": (lambda t: [HELLO, "--config.sampler.top_k=many"], "top_k"),
  "value out of range": (lambda t: [HELLO, "--config.sampler.top_p=1.5"], "must lie in"),
  "missing config": (lambda t: ["--config=configs/none.py", HELLO], "does not exist"),
  "missing folder": (lambda t: [HELLO, f"--config.checkpoint={t}/none"], "is not a folder"),
  "a folder without a name": (lambda t: [HELLO, "--config.checkpoint="], "holds no *.safetensors"),
  "the root folder": (lambda t: [HELLO, "--config.checkpoint=/"], "holds no *.safetensors"),
  "a trace that is a folder": (lambda t: [HELLO, "--trace=."], "--trace=. is a folder"),
  "truncated safetensors": (
    lambda t: [HELLO, damaged(t, "cut", truncate)],
    "model.safetensors",
  ),
  "wrong shape": (
    lambda t: [HELLO, damaged(t, "shape", edit_config(intermediate_size=96))],
    "mlp",
  ),
  "unsupported architecture": (
    lambda t: [HELLO, damaged(t, "arch", edit_config(architectures=["Qwen2ForCausalLM"]))],
    "Qwen2ForCausalLM",
  ),
  "unsupported rope type": (
    lambda t: [
      HELLO,
      damaged(t, "rope", edit_config(rope_scaling={"rope_type": "yarn", "factor": 2})),
    ],
    "yarn",
  ),
  "CSV without the columns": (
    lambda t: [f"--prompt_file={_file(t, 'p.csv', 'a,b' + chr(10) + '1,2')}"],
    "columns act and prompt",
  ),
  "missing prompt file": (lambda t: [f"--prompt_file={t}/none.csv"], "cannot be read"),
  "JSONL without a prompt": (
    lambda t: [f"--prompt_file={_file(t, 'p.jsonl', '{}')}"],
    'under the key "prompt"',
  ),
  "trace into a missing folder": (
    lambda t: [HELLO, f"--trace={t}/none/x.jsonl"],
    "cannot be written",
  ),
  "mesh without devices": (lambda t: [HELLO, "--config.mesh.model=2"], "devices"),
  "more parts than cores": (
    lambda t: [HELLO, "--config.mesh.data=4096", "--config.engine.batch_size=4096"],
    "devices",
  ),
  "a place in no run": (lambda t: [HELLO, "--process=1"], "--process goes with --distributed"),
  "no patience": (lambda t: [HELLO, "--wait_s=0"], "--wait_s is 0"),
  "half a place": (
    lambda t: [HELLO, "--distributed", "--coordinator=a:1", "--process=0"],
    "--processes is missing",
  ),
  "no cluster": (lambda t: [HELLO, "--distributed"], "neither a TPU pod nor Slurm"),
  "too many new tokens below one": (lambda t: [HELLO, "--max_new_tokens=0"], "at least 1"),
}


def _file(folder, name, text):
  path = folder / name
  path.write_text(text)
  return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path):
  make, words = BAD[name]
  args = make(tmp_path)
  before = sorted(p for p in tmp_path.rglob("*"))
  code, out, err = command(*args)
  assert code == 2
  assert out == ""
  assert "Traceback" not in err
  assert len(err.strip().splitlines()) == 1, err
  assert words in err
  assert sorted(p for p in tmp_path.rglob("*")) == before  # nothing half-written


def test_the_demo_checkpoint_is_small_and_really_trained():
  """At most 12 MB in all, and the recorded held-out accuracy leaves samplers room both ways."""
  total = sum(p.stat().st_size for p in settings.ASSETS.rglob("*") if p.is_file())
  assert total <= 12_000_000
  for name in ("base", "instruct"):
    hf = json.loads((settings.ASSETS / "demo" / name / "config.json").read_text())
    assert weights.count(hf_config.from_hf(hf)) > 1_000_000
