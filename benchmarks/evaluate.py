"""Score a model on lm-eval's tasks through the server, with any sampler.

  pip install "entropix_jax[serve,eval]"
  python benchmarks/evaluate.py --config=configs/smollm2_135m.py --tasks=facts_choice,facts_short,prose
  python benchmarks/evaluate.py --config=configs/demo.py --tasks=problems --chat --sampler=quadrant --out=scores.jsonl

It starts a server of its own, asks it what lm-eval asks, and stops it. Tasks are lm-eval's and those of
benchmarks/lm_eval, which read local files only; with HF_HUB_OFFLINE=1 nothing asks the network. The last line
of stdout is one JSON object, which --out appends to a file:

  scores     per task and metric: the value, its standard error and the 95% interval, which is Wilson's for shares
             and 1.96 errors to both sides for others; null where lm-eval estimates no error
  right      per task and metric with values 0 and 1: those of all questions in order, to compare runs by question
  sampler    that of generation tasks; scores of log-likelihood tasks are those of the raw model
  params     its knobs that the config, or the preset for this model, sets; the others are at their defaults
  generation what lm-eval sends with each prompt of a generation task
  bos        implicit: the server begins prompts with BOS; as sent: without it, as lm-eval's remote tokenizer
             gives them; none: texts of this model begin with none; template: the chat template decides
  template   a hash of the chat template; null without --chat

Why: published scores are lm-eval's, so they are comparable only if its own client asked, and only a server that
is started here is known to have the settings that the line names.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

import decode

from entropix_jax import sampling, settings
from entropix_jax.cli import commands, config_file
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError, first_line, nearest
from entropix_jax.settings import Settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ROOT / "benchmarks" / "lm_eval"
PATIENCE_S = 3600  # for one request, which may wait for others
STOP_S = 10  # after each of two signals
ANSWER = 256  # tokens of an answer, where the task does not say

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py; its settings are the server's.")
_TASKS = _FLAGS.strings("tasks", [], "Names of lm-eval's tasks, or of those in benchmarks/lm_eval.")
_SAMPLER = _FLAGS.string(
  "sampler",
  None,
  "Sampler of generation tasks, with its knobs from the config; greedy, or as the task says, when unset.",
)
_CHAT = _FLAGS.bool("chat", False, "Ask by the chat route; generation tasks only.")
_LIMIT = _FLAGS.integer("limit", None, "Questions of each task; all when unset.", 1)
_SHOTS = _FLAGS.integer(
  "num_fewshot", None, "Examples before each question; default: the task's.", 0
)
_CONCURRENCY = _FLAGS.integer("concurrency", 16, "Requests at a time.", 1)
_SEED = _FLAGS.integer("seed", 0, "Seed of all requests.", 0)
_BOS = _FLAGS.bool("implicit_bos", True, "Let the server begin prompts with BOS where texts do.")
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# -- the server ------------------------------------------------------------------------------------


def ask(url: str, body: Any = None) -> Any:
  """The answer of a route: JSON, or text where it is none."""
  data = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(url, data, {"content-type": "application/json"})
  with _OPENER.open(request, timeout=PATIENCE_S) as answer:
    text = answer.read().decode()
  return json.loads(text) if text.startswith("{") else text


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[str]:
  """The address of a server, from when it is ready; it ends with the block, however that ends.

  Raises:
    UserError: it ended before it was ready.
  """
  path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
  environment.pop("ENTROPIX_API_KEY", None)  # only this process knows the address
  process = subprocess.Popen(
    command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
  )  # fmt: skip
  said: list[str] = []
  started = threading.Event()

  def listen() -> None:
    with process.stderr as lines:
      for line in lines:
        said.append(line.strip())
        if started.is_set() or not line.startswith("error: "):  # else it is raised
          say(said[-1])

  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  try:
    url = _ready(process, said, listener)
    started.set()
    yield url
  finally:
    _end(process)
    listener.join(STOP_S)


def _ready(process: subprocess.Popen, said: list[str], listener: threading.Thread) -> str:
  while process.poll() is None:
    found = next(filter(None, (re.search(r"(http://\S+)/v1", line) for line in said)), None)
    if found:
      with contextlib.suppress(OSError):  # refused, or 503
        ask(f"{found[1]}/ready")
        return found[1]
    time.sleep(0.1)
  listener.join(STOP_S)
  last = said[-1].removeprefix("error: ") if said else "it said nothing."
  raise UserError(f"The server ended before it was ready: {last}")


def _end(process: subprocess.Popen) -> None:
  """End the server; the second signal ends its running requests, too."""
  try:
    for _ in range(2):
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
        return
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()


def command(argv: Sequence[str], sampler: str | None, context: int) -> list[str]:
  """The command that starts the server, with the arguments that set its config.

  Args:
    argv: the arguments of this program.
    context: tokens of the longest row.
  """
  at = [i for i, arg in enumerate(argv) if re.match(r"--?config\b", arg)]
  own = [part for i in at for part in argv[i : i + 1 + ("=" not in argv[i])]]
  limits = {
    "port": 0,
    "samplers": ",".join(dict.fromkeys(filter(None, ("plain", sampler)))),
    "queue": max(256, _CONCURRENCY.value),
    "queue_tokens": max(131_072, _CONCURRENCY.value * context),
    "deadline_s": PATIENCE_S,
    "drain_s": 2,
    "implicit_bos": str(_BOS.value).lower(),
  }
  server = [sys.executable, "-m", "entropix_jax.serve"]
  return [*server, *own, *(f"--{name}={value}" for name, value in limits.items())]


# -- lm-eval ---------------------------------------------------------------------------------------


def extra(chosen: Settings, sampler: str | None) -> dict[str, Any]:
  """What generation requests carry besides what the task says.

  lm-eval always sends a temperature; 1 means nothing to a sampler that has no such knob.
  """
  if sampler is None:
    return {}
  heat = params(chosen, sampler).get("temperature", 1)
  return {"do_sample": True, "temperature": heat, "entropix": {"sampler": sampler}}


def params(chosen: Settings, sampler: str) -> dict[str, Any]:
  """A sampler's knobs that the config or its preset sets."""
  return dict(chosen.knobs) if sampler == chosen.sampler else {}


def manager(names: Sequence[str]) -> Any:
  """lm-eval's TaskManager. Raises UserError for a task that there is not."""
  from lm_eval.tasks import TaskManager

  for more in (False, True):  # finding lm-eval's own tasks takes seconds
    made = TaskManager(include_path=str(TASKS), include_defaults=more)
    missing = [name for name in names if name not in made.all_tasks]
    if not missing:
      return made
  own = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
  raise UserError(
    f"There is no task {missing[0]!r}{nearest(missing[0], made.all_tasks)} benchmarks/lm_eval has: {own}."
  )


def evaluate(
  url: str, card: dict[str, Any], tasks: Any, generation: dict[str, Any]
) -> dict[str, Any]:
  """What lm-eval found. Raises UserError where it cannot.

  Args:
    url: of the server.
    card: the model as the server describes it.
    tasks: lm-eval's TaskManager.
    generation: what generation requests carry besides what their task says.
  """
  from lm_eval import simple_evaluate

  logging.getLogger(
    "asyncio"
  ).disabled = True  # lists every request that a failed one leaves behind
  context = card["max_model_len"] - card["begin"]
  kind = "chat-completions" if _CHAT.value else "completions"
  how = {
    "model": card["id"],
    "base_url": f"{url}/v1/{kind.replace('-', '/')}",
    "tokenizer_backend": None if _CHAT.value else "remote",
    "num_concurrent": _CONCURRENCY.value,
    "max_length": context,
    "max_gen_toks": min(ANSWER, context // 2),
    "seed": _SEED.value,
    "timeout": PATIENCE_S,
  }
  try:
    with contextlib.chdir(ROOT):  # paths in task files begin there
      return simple_evaluate(
        f"local-{kind}", how, _TASKS.value, num_fewshot=_SHOTS.value, limit=_LIMIT.value,
        gen_kwargs=generation, task_manager=tasks, apply_chat_template=_CHAT.value,
      )  # fmt: skip
  except Exception as error:  # of a library, its tasks and the network
    raise UserError(f"lm-eval failed with {type(error).__name__}: {first_line(error)}.") from error


def scores(found: dict[str, Any]) -> dict[str, Any]:
  """`scores` and `right` of a line, from what lm-eval found."""
  right: dict[str, dict[str, str]] = {}
  for task, samples in found["samples"].items():
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
      for metric in sample["metrics"]:
        values.setdefault(_name(metric, sample["filter"]), []).append(sample[metric])
    bits = {k: "".join(str(int(x)) for x in v) for k, v in values.items() if {*v} <= {0, 1}}
    right |= {task: bits} if bits else {}
  table: dict[str, dict[str, Any]] = {}
  for task, values in found["results"].items():
    table[task] = {}
    for key, value in values.items():
      metric, _, filtered = key.partition(",")
      if not filtered or metric.endswith("_stderr"):
        continue
      name, error = _name(metric, filtered), values.get(f"{metric}_stderr,{filtered}")
      error = error if isinstance(error, float) and error == error else None
      interval = None if error is None else [value - 1.96 * error, value + 1.96 * error]
      if name in right.get(task, {}):
        interval = wilson(value, len(right[task][name]))
      interval = interval and [*map(commands.short, interval)]
      table[task][name] = {"value": value, "stderr": error, "interval": interval}
  return {"scores": table, "right": right}


def _name(metric: str, filtered: str) -> str:
  return metric if filtered == "none" else f"{metric},{filtered}"


def wilson(share: float, n: int) -> list[float]:
  """The 95% interval of a share of n, by Wilson's score: sound also where all or none are right."""
  z = 1.96**2 / n
  middle, half = share + z / 2, (z * (share * (1 - share) + z / 4)) ** 0.5
  return [(middle - half) / (1 + z), (middle + half) / (1 + z)]


def table(line: dict[str, Any]) -> str:
  """The scores for people."""
  out = [f"{'task':24}{'metric':28}{'value':>10}  95%"]
  for task, metrics in line["scores"].items():
    for metric, one in metrics.items():
      interval = "{:.4f} to {:.4f}".format(*one["interval"]) if one["interval"] else ""
      out.append(f"{task:24}{metric:28}{one['value']:10.4f}  {interval}".rstrip())
  return "\n".join(out)


# -- all of it -------------------------------------------------------------------------------------


def measure(url: str, tasks: Any, chosen: Settings) -> dict[str, Any]:
  """The line, but for the machine."""
  sampler = _SAMPLER.value
  card = ask(f"{url}/v1/models")["data"][0]
  told = ask(f"{url}/tokenize", {"prompt": "a"}), ask(f"{url}/tokenizer_info")
  bare = ask(f"{url}/tokenize", {"prompt": "a", "add_special_tokens": False})
  begin = told[0]["count"] - bare["count"]
  card["begin"] = begin if _BOS.value else 0
  bos = (
    "template" if _CHAT.value else "implicit" if card["begin"] else "as sent" if begin else "none"
  )
  template = told[1]["chat_template"] or ""
  if _CHAT.value and not template:
    raise UserError("This model has no chat format; leave --chat out.")
  start = time.perf_counter()
  found = evaluate(url, card, tasks, extra(chosen, sampler))
  seconds = time.perf_counter() - start
  metrics = ask(f"{url}/metrics")

  def tokens(kind: str) -> int:
    values = re.findall(rf"^entropix_{kind}_tokens_total(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
    return int(sum(map(float, values)))

  one = ask(f"{url}/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 0})
  configs = found["configs"].items()
  return {
    "benchmark": "evaluate",
    "model": card["id"],
    "tasks": _TASKS.value,
    "limit": _LIMIT.value,
    "shots": found["n-shot"],
    **scores(found),
    "sampler": sampler or "plain",
    "params": params(chosen, sampler) if sampler else {},
    "generation": {
      task: {"temperature": 0} | config["generation_kwargs"]  # which lm-eval adds
      for task, config in configs
      if config["output_type"] == "generate_until"
    },
    "seed": _SEED.value,
    "bos": bos,
    "template": hashlib.sha256(template.encode()).hexdigest()[:16] if _CHAT.value else None,
    "max_seq_len": card["max_model_len"],
    "concurrency": _CONCURRENCY.value,
    "prompt_tokens": tokens("prompt"),
    "generated_tokens": tokens("generation"),
    "seconds": seconds,
    "fingerprint": one["system_fingerprint"],
    "lm_eval": found["lm_eval_version"],
  }


def run(argv: list[str]) -> None:
  """Evaluate what the flags name and print the scores."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  if not _TASKS.value:
    raise UserError("Name the tasks with --tasks, such as --tasks=facts_choice,prose.")
  chosen, *_ = settings.shape(config_file.resolve(_CONFIG.value))
  if _SAMPLER.value is not None:
    sampling.find(_SAMPLER.value)
  try:
    for package in ("lm-eval", "aiohttp", "tenacity"):
      importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    raise UserError(
      'Evaluations need lm-eval; install it with pip install "entropix_jax[serve,eval]".'
    ) from None
  tasks = manager(_TASKS.value)
  with serving(command(argv[1:], _SAMPLER.value, chosen.engine.max_seq_len)) as url:
    line = measure(url, tasks, chosen)
  line |= decode.machine()  # after the server, which may have had the device to itself
  print(table(line))
  print(commands.keep(out, line), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
