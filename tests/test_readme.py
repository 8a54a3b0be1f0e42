"""The rows of the cookbook do on the demo model what they say; what the pages for readers point to exists."""

import json
import re
import shlex

import pytest
from command import CONFIG, DEMO, MAIN, ROOT, run
from test_house import missing_evidence

from entropix_jax import sampling
from entropix_jax.sampling import quadrant

ROWS = dict(
  re.findall(r"^\| ([^|]+?) \| (.+?) \|$", (ROOT / "docs" / "cookbook.md").read_text(), re.M)
)
KITE = "--prompt=Tell me a story about a kite."
# Row -> what else it needs, and words that its output or its last line must have.
RUN = {
  "talk with it": ([], "Hello"),
  "run a file of prompts, batched": (["--max_new_tokens=8"], "[2/2] b"),
  "see what the sampler saw": ([KITE, "--max_new_tokens=8"], "mean entropy"),
  "keep every number": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "let thresholds follow each text": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "change a sampler's knob": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "use the ordinary samplers": ([KITE, "--max_new_tokens=8"], "sample 100%"),
  "use another version of entropix": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "act on uncertainty": ([KITE, "--max_new_tokens=24"], " One day, "),
  "end a text at a string": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "fewer passes, the same text": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "sample several times, keep one": (["--prompt=What is 2 + 3?"], "'5' holds"),
  "branch where the model is undecided": ([KITE, "--max_new_tokens=8"], "by mean_logprob"),
  "decode with several models": (["--prompt=What is 2 + 3?", "--max_new_tokens=8"], "tokens"),
  "see runs side by side": (["--prompt=What is 2 + 3?", "--max_new_tokens=8"], "joint"),
  "halve the memory": ([KITE, "--max_new_tokens=8"], "8 generated tokens"),
  "know whether it fits before loading": ([], "fits"),
}
# Run by tests of their own, or for machines that are not here.
ELSEWHERE = """
  change how a conversation is written; load a `.gguf` file; load a model by its name on the hub;
  see it as a web page; fit the thresholds to a model; compare settings; compare ways to decode; split a model over devices;
  check it for devices that you do not have; load faster onto many hosts; use several hosts
"""


def test_every_row_is_run_somewhere():
  rows = {
    name for name, text in ROWS.items() if ("`" in text and "scripts/" in text) or "--" in text
  }
  assert rows - {*RUN} == {name.strip() for name in ELSEWHERE.split(";")} & rows
  assert {*RUN} <= {*ROWS}


@pytest.mark.parametrize("row", RUN)
def test_a_row_does_what_it_says(row, tmp_path):
  more, words = RUN[row]
  said = re.findall(r"`(--[^`]+)`", ROWS[row])
  flags = shlex.split(said[-1 if row == "act on uncertainty" else 0])
  if row == "halve the memory":
    flags = said[:2]
  (tmp_path / "prompts.csv").write_text("act,prompt\na,Hello!\nb,What is 2 + 3?\n")
  for name in ("prompts.csv", "run.jsonl"):
    flags = [flag.replace(f"={name}", f"={tmp_path / name}") for flag in flags]
  flags = [flag.replace("=DIR", f"={DEMO.parent / 'base'}") for flag in flags]
  code, out, err = run(MAIN, CONFIG, *more, *flags, stdin="Hello!\n")
  assert code == 0, err
  assert words in out + err
  if row == "keep every number":
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert {"logprob", "entropy", "varentropy", "attn_ent", "branch"} <= set(json.loads(lines[1]))


def test_the_evidence_for_those_who_come_from_entropix_exists():
  text = (ROOT / "docs" / "from_entropix.md").read_text()
  evidence = re.findall(r"`((?:tests|scripts)/\w+\.py(?:::\w+)?)`", text)
  assert len(evidence) > 30
  assert [piece for piece in evidence if missing_evidence(piece)] == []
  table = text.split("knob of `quadrant`")[1].split("\n\n")[0]
  cells = [row.split("|")[2] for row in table.splitlines()[2:]]
  assert {k for cell in cells for k in re.findall(r"`(\w+)`", cell)} <= {*sampling.knobs(quadrant)}
