"""How long it takes from the command to the first token: the first time, and once programs are kept.

  python benchmarks/startup.py --out=runs.jsonl
  python benchmarks/startup.py --model=demo --rounds=1

Each start is a process of its own that runs `entropix_jax.main`, cold with an empty cache folder and then
warm with what the cold one left there. Shapes of config.PRESETS are read from a temporary checkpoint of
random bfloat16 weights. The last line of stdout is one JSON object, which --out appends to a file; every
figure is the median of --rounds, the demo's are at the top and those of other models under their names:

  cold_s, warm_s, warm_over_cold
  programs, warm_programs   how many were compiled in a cold and in a warm start
  cold, warm                the parts: imports (with the interpreter's start), config, weights, compile (with
                            tracing, and reading kept programs), first_token (prefill and the first draw);
                            weights are read while programs compile, so the parts add up to more
  cache_bytes               what a cold start leaves in the cache folder
  speculative               the demo with drafts by its draft model

Why: a user waits for all of it, and a cache that misses shows nowhere else. Weights are read from the
kernel's page cache in both kinds of start.
"""

import functools
import importlib
import io
import json
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

from entropix_jax import config
from entropix_jax.cli import commands
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT = "--prompt=Tell me a story about a kite."
DEMO = ROOT / "entropix_jax" / "assets" / "demo" / "instruct"
COMMANDS = {"demo": ["--config=configs/demo.py"]}
COMMANDS["speculative"] = [*COMMANDS["demo"], "--config.decoding.name=speculative"]
PARTS = ("imports", "config", "weights", "compile", "first_token")

_FLAGS = commands.Flags()
_MODEL = _FLAGS.multi_enum(
  "model", ["demo", "speculative", "llama3_1b"], [*COMMANDS, *config.PRESETS], "What to start."
)
_ROUNDS = _FLAGS.integer("rounds", 3, "Pairs of starts of each.", 1)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_CHILD = _FLAGS.string(
  "child", None, "Time and arguments of a start; set by the run for its own processes."
)


# -- one start -------------------------------------------------------------------------------------


def child(since: float, argv: list[str]) -> None:
  """Run the command line until its first token, then say how long each part took and exit."""
  for name in ("cli.config_file", "cli.printer", "llm", "report.trace"):
    importlib.import_module(f"entropix_jax.{name}")
  import jax

  from entropix_jax import session
  from entropix_jax.checkpoints import checkpoint
  from entropix_jax.engine.feeding import Feeding

  events: list[str] = []
  jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
  began = {"imported": time.time()}
  spent: dict[str, float] = {}

  def timed(name: str, f):
    """`f`, which notes when it began first and how long it took last."""

    @functools.wraps(f)
    def run(*args, **kwargs):
      start = time.time()
      began.setdefault(name, start)
      result = f(*args, **kwargs)
      spent[name] = time.time() - start
      return result

    return run

  checkpoint.load_weights = timed("weights", checkpoint.load_weights)
  session.compile_all = timed("compile", session.compile_all)
  Feeding.feed = timed("prefill", Feeding.feed)

  class Out(io.TextIOBase):
    """What the command line prints to; a plain prompt comes before its prefill, tokens after it."""

    def write(self, text: str) -> int:
      if "prefill" in began:
        ready = min(began["weights"], began["compile"])
        parts = began["imported"] - since, ready - began["imported"]
        parts += spent["weights"], spent["compile"], time.time() - began["prefill"]
        asked = events.count("/jax/compilation_cache/compile_requests_use_cache")
        programs = asked - events.count("/jax/compilation_cache/cache_hits")
        result = dict(zip(PARTS, parts, strict=True))
        result |= {"total": time.time() - since, "programs": programs}
        print(json.dumps(result), file=sys.__stdout__, flush=True)
        os._exit(0)
      return len(text)

  sys.argv[1:], sys.stdout = argv, Out()
  runpy.run_module("entropix_jax.main", run_name="__main__", alter_sys=True)


def start(cache: pathlib.Path, argv: list[str]) -> dict[str, Any]:
  """What a process says that keeps its programs in a folder."""
  kept = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
  environment = kept | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
  command = [sys.executable, __file__, f"--child={json.dumps([time.time(), [PROMPT, *argv]])}"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
  said = done.stdout.splitlines()
  if done.returncode or not said:
    raise UserError(f"A start failed: {(done.stderr.splitlines() or ['nothing was said'])[-1]}")
  return json.loads(said[-1])


# -- all of them -----------------------------------------------------------------------------------


def write_random(folder: pathlib.Path, name: str) -> list[str]:
  """A checkpoint of that shape, its tokenizer the demo's and filled up; the arguments that start it."""
  import load

  say(f"{name}: writing random weights ...")
  cfg = config.PRESETS[name]
  load.write_random(folder, cfg)
  file = json.loads((DEMO / "tokenizer.json").read_text())
  vocab = file["model"]["vocab"]
  added = {token["id"] for token in file["added_tokens"]}
  vocab |= {f"unused{id}": id for id in range(cfg.vocab) if id not in added and id >= len(vocab)}
  (folder / "tokenizer.json").write_text(json.dumps(file))
  return [f"--config=configs/{name}.py", f"--config.checkpoint={folder}", "--config.format=plain"]


def measure(name: str, argv: list[str]) -> dict[str, Any]:
  """The figures of one model."""
  told: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
  for _ in range(_ROUNDS.value):
    with tempfile.TemporaryDirectory() as cache:
      for kind, starts in told.items():
        starts.append(start(pathlib.Path(cache), argv))
        say(f"{name}, {kind}: {starts[-1]['total']:.2f} s")
      size = sum(p.stat().st_size for p in pathlib.Path(cache).rglob("*") if p.is_file())

  def median(kind: str, part: str = "total") -> float:
    return statistics.median(one[part] for one in told[kind])

  cold_s, warm_s = median("cold"), median("warm")
  return {
    "cold_s": cold_s,
    "warm_s": warm_s,
    "warm_over_cold": warm_s / cold_s,
    "programs": told["cold"][-1]["programs"],
    "warm_programs": max(one["programs"] for one in told["warm"]),
    **{kind: {part: median(kind, part) for part in PARTS} for kind in told},
    "cache_bytes": size,
  }


def table(results: dict[str, dict[str, Any]]) -> str:
  """The figures for people."""
  lines = [f"{'seconds':18}{'all':>8}" + "".join(f"{part:>13}" for part in PARTS)]
  for name, one in results.items():
    for kind in ("cold", "warm"):
      cells = "".join(f"{one[kind][part]:13.2f}" for part in PARTS)
      lines.append(f"{name + ', ' + kind:18}{one[f'{kind}_s']:8.2f}{cells}")
    lines.append(
      f"{'':18}{one['warm_over_cold']:8.3f} of the cold start; {one['programs']} programs, "
      f"{one['cache_bytes'] / 1e6:.1f} MB; compiled anew: {one['warm_programs']}"
    )
  return "\n".join(lines)


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  if _CHILD.value:
    try:
      since, args = json.loads(_CHILD.value)
    except (TypeError, ValueError):
      raise UserError("--child is set by the run for its own processes; leave it out.") from None
    child(since, args)
    return
  import decode

  results = {}
  for name in dict.fromkeys(_MODEL.value):
    with tempfile.TemporaryDirectory() as folder:
      args = COMMANDS.get(name) or write_random(pathlib.Path(folder), name)
      results[name] = measure(name, args)
  print(table(results))
  facts = {"benchmark": "startup", "rounds": _ROUNDS.value}
  top = results.pop("demo", {})
  print(commands.keep(out, facts | top | results | decode.machine()), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
