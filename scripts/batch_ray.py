"""A file of prompts over many machines, by Ray Data.

  pip install -e ".[ray]"
  python scripts/batch_ray.py --config=configs/demo.py --prompt_file=prompts.csv --out=answers.jsonl --workers=2

Each worker is a process with a model of its own and answers blocks of prompts. The text of a prompt depends on the prompt
and the seed only, so it is the same for any number of workers. Lines of --out: prompt, text, finish, tokens,
mean log-probability, entropy and varentropy, in the order of the prompts.
"""

import json
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from entropix_jax import files
from entropix_jax.cli import commands, config_file, prompts
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_PROMPT_FILE = _FLAGS.string("prompt_file", None, "CSV, JSONL or text file of prompts.")
_OUT = _FLAGS.string("out", None, "JSONL file to write.")
_WORKERS = _FLAGS.integer("workers", 2, "Processes with a model each.", 1)
_BLOCK = _FLAGS.integer("block", 64, "Prompts that a worker takes at a time.", 1)
_CPUS = _FLAGS.float("cpus", 1, "CPU cores that Ray reserves for a worker.", 0)
_GPUS = _FLAGS.float("gpus", 0, "GPUs that a worker has.", 0)
_MAX_NEW_TOKENS = _FLAGS.integer("max_new_tokens", 256, "Most tokens per prompt.", 1)
_SEED = _FLAGS.integer("seed", 0, "The same seed and prompt give the same text.")
_ADDRESS = _FLAGS.string("address", None, "Of a Ray cluster; a local one is started when unset.")


_MEANS = ("logprob", "entropy", "varentropy")


class Worker:
  """A model, and how it answers a block of prompts."""

  def __init__(self, chosen, tokens: int, seed: int):
    from entropix_jax.llm import LLM

    self.session = LLM.of(chosen).session(chosen)
    self.tokens, self.seed = tokens, seed

  def __call__(self, block: dict) -> dict:
    """{column: values} of the answers to {column: values} of prompts."""
    from entropix_jax.rows import Failure

    session, texts = self.session, [str(text) for text in block["prompt"]]
    todo = session.plan([session.ask(text, self.tokens, self.seed) for text in texts])
    session.ready(todo)
    found = [{"text": "", "finish": "", "tokens": 0, **dict.fromkeys(_MEANS, 0.0)} for _ in texts]
    for event in session.go(todo):
      row = found[event.prompt]
      row["text"] += event.text
      row["finish"] = event.finish or ""
      if not isinstance(event, Failure):
        row["tokens"] += 1
        for name in _MEANS:
          row[name] += event.numbers[name]
    for row in found:
      for name in _MEANS:
        row[name] /= max(row["tokens"], 1)
    columns = {name: [row[name] for row in found] for name in found[0]} if found else {}
    return {"number": block["number"], "prompt": block["prompt"], **columns}


def run(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  if not _PROMPT_FILE.value or not _OUT.value:
    raise UserError("Give the prompts with --prompt_file and the file to write with --out.")
  out = commands.ready(_OUT, whole=True)
  chosen = config_file.resolve(_CONFIG.value)
  todo = [prompt.text for prompt in prompts.read(_PROMPT_FILE.value)]
  try:
    import ray
    import ray.data
  except ModuleNotFoundError as error:
    raise UserError(
      f'This needs the package {error.name}; install it with pip install -e ".[ray]".'
    ) from None
  ray.init(address=_ADDRESS.value, log_to_driver=False, configure_logging=False)
  rows = [{"number": i, "prompt": text} for i, text in enumerate(todo)]
  blocks = max(1, -(-len(rows) // _BLOCK.value))
  answers = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
    Worker,
    fn_constructor_args=(chosen, _MAX_NEW_TOKENS.value, _SEED.value),
    batch_size=_BLOCK.value,
    concurrency=min(_WORKERS.value, blocks),
    num_cpus=_CPUS.value,
    num_gpus=_GPUS.value,
  )
  found = sorted(answers.take_all(), key=lambda row: row["number"])
  with files.whole(out) as file:
    for row in found:
      del row["number"]
      file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
  print(json.dumps({"prompts": len(found), "tokens": sum(row["tokens"] for row in found)}))
  ray.shutdown()


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
