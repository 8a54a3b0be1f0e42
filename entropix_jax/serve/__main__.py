"""Serve a model by OpenAI's API, with continuous batching and any sampler per request.

  python -m entropix_jax.serve --config=configs/demo.py --port=8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

Any setting of the config file is a flag, as for entropix_jax.main: --config.engine.batch_size=32
--config.engine.max_seq_len=8192 --config.sampler.name=plain. docs/serving.md says what clients may send.
"""

import os
import signal
import sys

from entropix_jax.cli import commands
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_HOST = _FLAGS.string(
  "host", "127.0.0.1", "Address to listen at; 0.0.0.0 is every one of the machine."
)
_PORT = _FLAGS.integer("port", 8000, "Port to listen at; 0 takes a free one.")
_NAME = _FLAGS.string(
  "name", None, "What clients call the model; the checkpoint's name when unset."
)
_SAMPLERS = _FLAGS.strings(
  "samplers", None, "Samplers that requests may choose besides the configured one; all when unset."
)
_PIECE = _FLAGS.integer(
  "piece",
  128,
  "Prompt tokens that are fed at a time, a power of two; beginnings of prompts are kept in such pieces.",
)
_BUDGET = _FLAGS.integer(
  "budget",
  512,
  "Prompt tokens that are fed between two decode dispatches, while texts are written; up to four times as many where "
  "several prompts wait and rows are free.",
)
_STORE = _FLAGS.float(
  "store", 0.5, "Memory for kept beginnings of prompts, as a share of the rows' cache; 0: none."
)
_QUEUE = _FLAGS.integer("queue", 256, "Continuations that may wait or run; more are refused.")
_QUEUE_TOKENS = _FLAGS.integer("queue_tokens", 131072, "Prompt tokens that may wait to be fed.")
_DEADLINE_S = _FLAGS.float("deadline_s", 300, "Seconds that a request may wait for a free place.")
_DRAIN_S = _FLAGS.float("drain_s", 30, "Seconds that running requests have to end after SIGTERM.")
_KEYS_FILE = _FLAGS.string(
  "keys_file", None, "File with an API key per line; ENTROPIX_API_KEY holds a single one."
)
_IMPLICIT_BOS = _FLAGS.bool(
  "implicit_bos",
  False,
  "Begin prompts of token ids that lack it with what begins a text, such as BOS, and leave that out of answers "
  "and counts. For lm-eval, whose remote tokenizer gives ids without it.",
)
_ORIGINS = _FLAGS.strings("origins", [], "Origins of web pages that may call the server (CORS).")
_PLACE = commands.Place(_FLAGS)  # flags of a run of several processes
_ALIKE = ("samplers", "piece", "budget", "store")  # what all processes of a run must have in common


def _keys() -> tuple[str, ...]:
  """The API keys that clients need; empty: none is needed."""
  if _KEYS_FILE.value is None:
    key = os.environ.get("ENTROPIX_API_KEY", "").strip()
    return (key,) if key else ()
  try:
    with open(os.path.expanduser(_KEYS_FILE.value), encoding="utf-8") as file:
      keys = tuple(filter(None, map(str.strip, file)))
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is not text"
    raise UserError(f"--keys_file={_KEYS_FILE.value} cannot be read ({reason}).") from None
  if not keys:
    raise UserError(f"--keys_file={_KEYS_FILE.value} holds no key; write one on each line.")
  return keys


def _check_flags() -> None:
  for flag, least in ((_PORT, 0), (_BUDGET, 1), (_QUEUE, 1), (_QUEUE_TOKENS, 1)):
    if flag.value < least:
      raise UserError(f"--{flag.name} is {flag.value}; it must be at least {least}.")
  if _PORT.value > 65535:
    raise UserError(f"--port is {_PORT.value}; the largest is 65535.")
  for flag in (_STORE, _DEADLINE_S, _DRAIN_S):
    if not 0 <= flag.value < float("inf"):
      raise UserError(f"--{flag.name} is {flag.value}; give a finite number that is not negative.")


def _main(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  _check_flags()
  _PLACE.check()
  keys = _keys()
  try:
    from entropix_jax.serve import build, run
  except ModuleNotFoundError as error:
    raise UserError(
      f'The server needs the package {error.name}; install it with pip install "entropix_jax[serve]".'
    ) from None
  from entropix_jax import distributed
  from entropix_jax.cli import config_file
  from entropix_jax.serve.exchange import Limits

  chosen = config_file.resolve(_CONFIG.value, ways=True)
  options = build.Options(
    name=_NAME.value,
    samplers=_SAMPLERS.value,
    piece=_PIECE.value,
    budget=_BUDGET.value,
    store=_STORE.value,
    limits=Limits(_QUEUE.value, _QUEUE_TOKENS.value, deadline_s=_DEADLINE_S.value),
    keys=keys,
    origins=tuple(_ORIGINS.value),
    implicit_bos=_IMPLICIT_BOS.value,
  )
  with distributed.join(_PLACE.get(), _PLACE.wait_s) as peers:
    alike = {f"--{name}": _FLAGS[name].value for name in _ALIKE}
    peers.agree(chosen.checkpoint, alike | {"config": _CONFIG.value.to_dict()})
    web, service = build.server(chosen, options, peers)
    peers.handles_signals = True
    if not peers.first:
      # Process 0 says when to end, after its running requests.
      for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
      return service.follow()
    run.run(web, service, _HOST.value, _PORT.value, _DRAIN_S.value, say)


if __name__ == "__main__":
  sys.exit(commands.entry(_main, sys.argv))
