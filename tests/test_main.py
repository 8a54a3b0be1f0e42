"""The command line: text, traces, and one sentence for every bad input."""

import json
import os
import re
import shutil

import pytest
from command import CONFIG, DEMO, MAIN, is_one_sentence, process, run

from entropix_jax import sampling, settings
from entropix_jax.checkpoints import hf_config, vocabulary
from entropix_jax.model import weights

BASE = DEMO.parent / "base"
KITE = "--prompt=Tell me a story about a kite."
SUM = (
  "--prompt=Tom has 12 apples. He buys 7 more and gives 5 to Ann. How many apples does Tom have?"
)
HELLO = "--prompt=Hello!"
REAL = ("-m", "entropix_jax.main", CONFIG)  # in a process of its own


def answer(*args, stdin=""):
  """(stdout, stderr) of the command line with the demo's config, in this process."""
  code, out, err = run(MAIN, CONFIG, *args, stdin=stdin)
  assert code == 0, err
  return out, err


def trace_of(path):
  """(header, token lines, summary) of a trace."""
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return lines[0], [line for line in lines[1:-1] if "id" in line], lines[-1]["summary"]


def test_the_demo_writes_text_and_a_trace(tmp_path):
  path = tmp_path / "run.jsonl"
  args = (KITE, "--max_new_tokens=60", "--seed=3", "--stats", f"--trace={path}")
  code, out, err = process(*REAL, *args)
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
  short = "--max_new_tokens=20"
  out, _ = answer(f"--prompt_file={file}", "--prompt_test", short, f"--trace={many}")
  assert [f"[{i + 1}/6] act {i}" in out for i in range(6)] == [True] * 6
  answer(f"--prompt={rows[2]}", short, f"--trace={one}")
  ids = [t["id"] for t in trace_of(many)[1] if t["prompt"] == 2]
  assert ids == [t["id"] for t in trace_of(one)[1]]
  out, err = answer(f"--prompt_file={file}", short)
  assert "".join(t["text"] for t in trace_of(many)[1] if t["prompt"] == 0) == out.removesuffix("\n")
  assert "first of 6 prompts" in err


@pytest.mark.parametrize(
  "drafter", [[], ["--config.decoding.drafter=draft", f"--config.decoding.checkpoint={BASE}"]]
)
def test_guessing_changes_no_token(tmp_path, drafter):
  """By n-grams, and by the base sibling of the demo model."""
  guess = ["--config.decoding.name=speculative", "--config.decoding.always=True", *drafter]
  traces, said = [], []
  for name, flags in (("plain", []), ("guessed", guess)):
    path = tmp_path / name
    said.append(answer(SUM, "--max_new_tokens=60", "--seed=3", *flags, f"--trace={path}")[1])
    traces.append(trace_of(path)[1:])
  (plain, before), (guessed, after) = traces
  assert [t["id"] for t in guessed] == [t["id"] for t in plain]
  assert after["drafted"] >= after["accepted"] == sum("accepted" in t for t in guessed) > 0
  assert after["target_passes"] < before["target_passes"] == before["generated_tokens"]
  assert ["guesses right" in err for err in said] == [False, True]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_cores_say_what_one_says(tmp_path):
  """On a CPU each part of `mesh.data` is a core; samples on both are samples on one."""
  ask = (KITE, "--max_new_tokens=20", "--config.decoding.name=best_of_n", "--config.decoding.n=4")
  paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
  out, _ = answer(*ask, f"--trace={paths[0]}")
  code, again, err = process(*REAL, *ask, f"--trace={paths[1]}", "--config.mesh.data=2")
  assert code == 0, err
  one, two = ([t["id"] for t in trace_of(path)[1]] for path in paths)
  assert (again, two) == (out, one)


@pytest.mark.parametrize(
  "flags", [[], ["--config.decoding.name=best_of_n", "--config.decoding.n=4"]]
)
def test_a_conversation(flags):
  """An answer to each message, of which the second needs the first; an empty line does nothing, and a message that
  is too long is not sent."""
  said = "Hello!\n\nWhat is 2 + 3?\n" + "word " * 2000 + "\nHello!\n"
  out, err = answer("--chat", "--max_new_tokens=12", "--stats", *flags, stdin=said)
  first, second, third = out.splitlines()
  assert second not in (first, third)
  assert "leaves no room" in err
  assert "The message was not sent." in err
  assert err.count(" generated tokens") == 3


def test_the_oldest_turns_leave_a_conversation_that_is_full():
  said = "Tell me a story about a kite.\n" * 4
  room = ("--config.engine.max_seq_len=128", "--max_new_tokens=40", "--config.decoding.name=plain")
  out, err = answer("--chat", *room, stdin=said)
  assert len(out.split("\n")) >= 4
  assert "The oldest 2 messages left the conversation" in err
  assert "not sent" not in err


def test_an_interrupt_stops_the_answer_and_not_the_conversation(monkeypatch):
  """Ctrl-C in the midst of the first answer; the second message is answered."""
  from entropix_jax.cli import printer

  token, seen = printer.Printer.token, []

  def interrupted(self, event):
    seen.append(event)
    if len(seen) == 3:
      raise KeyboardInterrupt
    token(self, event)

  monkeypatch.setattr(printer.Printer, "token", interrupted)
  out, err = answer("--chat", "--max_new_tokens=12", stdin="Hello!\nWhat is 2 + 3?\n")
  assert "(stopped)" in err
  assert len(seen) > 6
  assert len(out.splitlines()) == 2


def test_a_base_model_is_said_to_be_one():
  _, err = answer("--chat", f"--config.checkpoint={BASE}", "--max_new_tokens=4", stdin="Hello!\n")
  assert "looks like a base model" in err


def test_each_prompt_of_a_file_has_noise_of_its_own(tmp_path):
  """At a high temperature texts with one noise all begin alike; and a text does not depend on its place."""
  rows = [f"Tell me a story about a {x}." for x in ("kite", "dog", "boat", "tree")]
  (tmp_path / "a.csv").write_text("prompt\n" + "\n".join(rows))  # no other column is needed
  (tmp_path / "b.txt").write_text("\n".join(rows[::-1]))
  hot = ("--config.sampler.name=plain", "--config.sampler.temperature=30", "--max_new_tokens=6")
  texts = {}
  for name in ("a.csv", "b.txt"):
    path = tmp_path / f"{name}.jsonl"
    answer(f"--prompt_file={tmp_path / name}", "--prompt_test", *hot, f"--trace={path}")
    header, tokens, _ = trace_of(path)
    texts[name] = {
      header["prompts"][i]["text"]: [t["id"] for t in tokens if t["prompt"] == i] for i in range(4)
    }
  assert texts["a.csv"] == texts["b.txt"]
  assert len({ids[0] for ids in texts["a.csv"].values()}) >= 3


ENDINGS = [
  ([KITE, "--max_new_tokens=5"], "ended at the limit of 5 new tokens (--max_new_tokens)"),
  ([KITE, "--config.engine.max_seq_len=64"], "ended where the context of 64 tokens is full"),
  ([KITE, '--config.stop=(" ",)'], "ended at a stop string"),
  ([KITE, "--config.actions.stop_ent=0.1", "--config.actions.stop_run=1"], "ended where the model was too uncertain"),
  ([KITE, "--config.decoding.name=branch", "--config.engine.batch_size=6", "--config.decoding.ent=0.1",
    "--config.decoding.budget=20"], "ended by the budget of 20 tokens"),
  (["--prompt_file=AT", "--prompt_test", "--max_new_tokens=5"], "ended 2 of 2 at the limit of 5 new tokens"),
  ([KITE, "--config.sampler.name=plain", "--config.sampler.allowed=EOT"], "ended at once, with an empty text"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "words"), ENDINGS)
def test_the_last_line_says_why_a_text_ended(tmp_path, args, words):
  file = tmp_path / "p.txt"
  file.write_text("Hello!\nTell me a story.\n")
  eot = str(vocabulary.load(DEMO).eot)
  args = [a.replace("AT", str(file)) if "file" in a else a.replace("EOT", eot) for a in args]
  assert words in answer(*args)[1].splitlines()[-1]


def test_a_text_that_ended_by_itself_is_not_explained():
  _, err = answer(
    "--prompt=What is 2 + 3?", "--config.sampler.name=plain", "--config.sampler.temperature=0"
  )
  assert " | ended" not in err


def test_all_samples_can_be_shown():
  ask = (
    "--config.decoding.name=best_of_n",
    "--config.decoding.n=3",
    "--max_new_tokens=6",
    "--show=all",
  )
  out, err = answer(KITE, *ask, "--config.decoding.rule=majority")
  chosen = int(re.search(r"Sample (\d) of 3", err)[1])
  assert re.findall(r"-- sample (\d), (\w+)", out)[chosen - 1] == (str(chosen), "chosen")
  assert len(out.splitlines()) >= 6
  assert "by mean_logprob, because majority found nothing to choose by" in err


def test_the_base_model_continues_plain_text(tmp_path):
  path = tmp_path / "t.jsonl"
  greedy = ("--config.sampler.name=plain", "--config.sampler.temperature=0")
  ask = (f"--config.checkpoint={BASE}", "--prompt=One day", "--max_new_tokens=12")
  out, _ = answer(*ask, *greedy, f"--trace={path}")
  assert out.startswith("One day")
  header, tokens, _ = trace_of(path)
  knobs = sampling.knobs(sampling.find("plain")) | {"temperature": 0.0}
  assert header["sampler"] == {"name": "plain"} | knobs
  assert {t["branch"] for t in tokens} == {"greedy"}
  assert all(t["logprob_law"] == 0 for t in tokens)


def test_help_is_short_and_needs_no_jax():
  light = "import sys; from entropix_jax import main; main._main(['main', '--help'])"
  code, out, err = process("-c", f"try:\n  {light}\nfinally:\n  assert 'jax' not in sys.modules")
  assert code == 0, err
  assert len(out.splitlines()) < 30
  flags = "config prompt prompt_file prompt_test chat max_new_tokens seed stats trace distributed"
  for flag in flags.split():
    assert f"--{flag} " in out


def edited(folder, **changes):
  """A copy of the demo's folder with other values in its config.json."""
  shutil.copytree(DEMO, folder)
  hf = json.loads((DEMO / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(hf | changes))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder of inputs of which each has one thing wrong."""
  at = tmp_path_factory.mktemp("files")
  edited(at / "shape", intermediate_size=96)
  edited(at / "arch", architectures=["Qwen2ForCausalLM"])
  edited(at / "rope", rope_scaling={"rope_type": "longrope", "factor": 2})
  edited(at / "cut")
  (at / "cut" / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes()[:-100])
  (at / "p.csv").write_text("a,b\n1,2")
  (at / "p.jsonl").write_text("{}")
  return at


NAME = "--config.decoding.name"
# AT stands for the folder of `files`.
BAD = [
  (["--prompt=  "], "prompt is empty"),
  (["--prompt=" + "word " * 50, "--config.engine.max_seq_len=32"], "leaves no room"),
  ([], "Nothing to do"),
  ([HELLO, "--chat"], "exclude each other"),
  ([HELLO, "--preflight"], "--preflight and --prompt exclude each other"),
  ([HELLO, "--prompt_test"], "give the file with --prompt_file"),
  (["--chat", "--compare=base"], "give it with --prompt"),
  (["--chat", "--trace=x"], "not with --chat"),
  (["--chat", "--show=all"], "--show=all goes with"),
  ([HELLO, "--compare=base", "--show=all"], "--show=all goes with"),
  (["--chat", "--config.template=Q: {}"], "this is a chat; leave it out."),
  ([HELLO, "--trace="], "--trace needs a file name"),
  ([HELLO, "--promt_file=x"], "Unknown command line flag"),
  ([HELLO, "--config.engine.batch=3"], "Known here: attn_stats, batch_size"),
  ([HELLO, "--config.sampler.lowent=3"], "Unknown key config.sampler.lowent"),
  ([HELLO, "--config.sampler.name=plain", "--config.sampler.low_ent=1"], "has no knob 'low_ent'"),
  ([HELLO, "--config.sampler.name=magic"], "choose one of: dslider, entropy_target, plain, quad"),
  ([HELLO, "--config.sampler.top_k=many"], "top_k"),
  ([HELLO, "--config.sampler.top_p=1.5"], "must lie in"),
  ([HELLO, "--config.checkpoint=AT/none"], "does not exist"),
  ([HELLO, "--config.checkpoint=~nosuchuser/x"], "does not exist"),
  (["--prompt_file=~nosuchuser/x.csv"], "cannot be read"),
  ([HELLO, "--config.engine.graphs=all"], "use 'auto' or 'loops'"),
  ([HELLO, "--config.checkpoint="], "does not exist"),
  ([HELLO, "--config.checkpoint=/"], "holds no *.safetensors"),
  ([HELLO, "--trace=."], "--trace=. is a folder"),
  ([HELLO, "--trace=AT/none/x.jsonl"], "cannot be written"),
  ([HELLO, "--config.checkpoint=AT/cut"], "model.safetensors"),
  ([HELLO, "--config.checkpoint=AT/shape"], "mlp"),
  ([HELLO, "--config.checkpoint=AT/arch"], "Qwen2ForCausalLM"),
  ([HELLO, "--config.checkpoint=AT/rope"], "longrope"),
  (["--prompt_file=AT/p.csv"], "needs a column prompt"),
  ([HELLO, "--config.template=Q: {}"], "or set config.format=plain"),
  ([HELLO, "--config.system=x", "--config.format=plain"], "this one continues texts"),
  ([HELLO, "--config.sampler.name=plain", "--config.sampler.min_pp=1"], "did you mean 'min_p'?"),
  ([HELLO, f"{NAME}=branch", "--config.engine.batch_size=6", "--config.actions.fork_ent=1"], "branch sets config.actions.fork_ent"),
  (["--prompt_file=AT/none.csv"], "cannot be read"),
  (["--prompt_file=AT/p.jsonl"], 'under the key "prompt"'),
  ([HELLO, "--config.mesh.model=3"], "does not divide this model"),
  ([HELLO, "--process=1"], "--process goes with --distributed"),
  ([HELLO, "--wait_s=0"], "--wait_s is 0"),
  ([HELLO, "--distributed", "--coordinator=a:1", "--process=0"], "--processes is missing"),
  ([HELLO, "--distributed"], "neither a TPU pod nor Slurm"),
  ([HELLO, "--max_new_tokens=0"], "at least 1"),
  ([HELLO, "--config.format=x"], "use one of: auto, chat, plain"),
  ([HELLO, "--config.model=x"], "use one of: smollm2_135m"),
  ([HELLO, "--config.template=x"], "must hold {} once"),
  ([HELLO, "--config.actions.inject=x"], "needs config.actions.inject_ent"),
  ([HELLO, "--config.actions.inject_ent=1"], "no text in config.actions.inject"),
  (["--preflight", f"{NAME}=joint", "--config.decoding.models=AT/none"], "counts one model"),
  ([HELLO, f"{NAME}=luck"], "no decoding method 'luck'"),
  ([HELLO, "--config.decoding.n=4"], "choose a method that has it"),
  ([HELLO, f"{NAME}=cot", "--config.decoding.ways=4"], "has no option 'ways'"),
  ([HELLO, f"{NAME}=adaptive"], "--config.sampler.name=plain"),
  ([HELLO, f"{NAME}=branch"], "holds 6 rows at once"),
  ([HELLO, f"{NAME}=best_of_n", "--config.decoding.rule=luck"], "no rule 'luck'"),
  ([HELLO, f"{NAME}=joint"], "give config.decoding.models=BASE"),
  ([HELLO, f"{NAME}=joint", "--config.decoding.models=AT/none"], "does not exist"),
  ([HELLO, f"{NAME}=speculative", "--config.decoding.drafter=draft", "--config.decoding.checkpoint=AT/none"], "does not exist"),
  ([HELLO, "--compare=base,nobody"], "no run 'nobody'; it has: base, instruct, joint"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "words"), BAD)
def test_bad_input_is_one_sentence(files, args, words):
  before = sorted(files.rglob("*"))
  is_one_sentence(run(MAIN, CONFIG, *(a.replace("AT", str(files)) for a in args)), words)
  assert sorted(files.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize(
  "args",
  [
    ["--config.mesh.model=2", "--config.mesh.data=4096", "--config.engine.batch_size=4096"],
    ["--config.mesh.data=4096", "--config.engine.batch_size=4096"],
  ],
)
def test_a_process_has_as_many_devices_as_its_machine(args):
  is_one_sentence(process(*REAL, HELLO, *args), "devices")


def test_the_demo_checkpoint_is_small_and_really_trained():
  """At most 12 MB in all, and the recorded held-out accuracy leaves samplers room both ways."""
  total = sum(p.stat().st_size for p in settings.ASSETS.rglob("*") if p.is_file())
  assert total <= 12_000_000
  for name in ("base", "instruct"):
    hf = json.loads((settings.ASSETS / "demo" / name / "config.json").read_text())
    assert weights.count(hf_config.from_hf(hf)) > 1_000_000
