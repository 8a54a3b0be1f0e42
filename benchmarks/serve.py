"""Load on the server: clients that each wait for their answers, and requests that come when they come.

  python benchmarks/serve.py --config=configs/demo.py --clients=1,4 --rates=4
  python benchmarks/serve.py --config=configs/smollm2_135m.py --peer=llama.cpp/build/bin/llama-server \\
      --peer_model=model-f32.gguf --out=results.jsonl

Each server is a process of its own. The last line of stdout is one JSON object, which --out appends to a file.
For each number of clients (closed loop) and each rate of Poisson arrivals per second (open loop):

  tokens_per_s   generated tokens over the time from the first request to the last token
  ttft_*_s       from sending a request to its first text, quantiles over requests
  itl_*_s        between two pieces of text of one answer; ours brings several tokens in one piece
  tpot_p50_s     (last - first text) / (tokens - 1) of an answer, median
  occupancy      answers that are being written at a time, on average, over the rows that there are
  cached_share   of prompt tokens, those whose keys and values were kept from prompts before

host_s is the time of the scheduler's rounds per token, without that of the programs, by the number of rows.

and with --peer the same of llama.cpp's server, with `ratio` ours over its tokens/s and `ttft_ratio` the median times to
first token. At the end tokens_per_s, ttft_p50_s, itl_p99_s and peer_ratio repeat those of the level of --main.

Prompts: questions of prompts_*.csv, put together to lengths with the spread of real ones (log-normal, median 60 words);
half of them follow one system message. Answers have fixed lengths (log-normal, median --tokens), so that both
servers do the same work. llama.cpp's file of float32 weights is made with
  llama-quantize --allow-requantize model.gguf model-f32.gguf F32
"""

import asyncio
import contextlib
import csv
import dataclasses
import functools
import os
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

import decode

from entropix_jax.cli import commands, config_file
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError
from entropix_jax.scheduler import generate
from entropix_jax.session import Model, Session

HERE = pathlib.Path(__file__).resolve().parent
SYSTEM = (
  "You are a helpful assistant. Answer in plain words and in whole sentences. Do not repeat the question. If you do not "
  "know something, say so. Give an example where one helps, and keep it short. Never give more than three paragraphs, and "
  "end with one sentence that sums up what was said before it."
)

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_ROWS = _FLAGS.integer("rows", 32, "Rows of our server, and slots of the peer.", 1)
_CONTEXT = _FLAGS.integer("context", 2048, "Tokens per row.", 256)
_CLIENTS = _FLAGS.strings("clients", ["1", "8", "32"], "Closed loops with so many clients.")
_RATES = _FLAGS.strings("rates", [], "Open loops with so many requests per second.")
_MAIN = _FLAGS.integer("main", 8, "Clients of the level that the result is about.")
_EACH = _FLAGS.integer(
  "each", 4, "Requests of each client; open loops have as many as 8 clients.", 1
)
_TOKENS = _FLAGS.integer("tokens", 64, "Median length of an answer.", 8)
_SAMPLER = _FLAGS.string("sampler", None, "Sampler of ours; unset: plain at temperature 0.7.")
_SEED = _FLAGS.integer("seed", 0, "Of prompts, lengths and arrivals.")
_PEER = _FLAGS.string("peer", None, "The program llama-server of llama.cpp.")
_PEER_MODEL = _FLAGS.string("peer_model", None, "Its GGUF file.")
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")


# -- requests --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ask:
  """A request."""

  messages: list[dict[str, str]]
  tokens: int
  seed: int


def asks(n: int, seed: int) -> list[Ask]:
  """n requests; the same for one seed."""
  rng, texts = random.Random(seed), []
  for path in sorted(HERE.glob("prompts_*.csv")):
    with open(path, newline="", encoding="utf-8") as file:
      texts += [row["prompt"] for row in csv.DictReader(file)]

  def one(i: int) -> Ask:
    words, said = min(rng.lognormvariate(np.log(60), 0.8), 500), []
    while sum(len(text.split()) for text in said) < words:
      said.append(rng.choice(texts))
    messages = [{"role": "system", "content": SYSTEM}] * (i % 2)
    tokens = round(min(max(rng.lognormvariate(np.log(_TOKENS.value), 0.4), 8), 4 * _TOKENS.value))
    return Ask([*messages, {"role": "user", "content": " ".join(said)}], tokens, seed * 1000 + i)

  return [one(i) for i in range(n)]


@dataclasses.dataclass
class Seen:
  """What a client saw of an answer; times by time.perf_counter."""

  sent: float
  pieces: list[float]
  tokens: int
  prompt: int
  cached: int


async def answer(client, server: "Server", ask: Ask) -> Seen:
  """Send a request and read its stream. Raises RuntimeError for an answer that is not complete."""
  import orjson

  body = {"messages": ask.messages, "max_tokens": ask.tokens, "seed": ask.seed, "stream": True}
  body |= {"stream_options": {"include_usage": True}, "ignore_eos": True} | server.sampling
  seen, usage = Seen(time.perf_counter(), [], 0, 0, 0), None
  async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
    if response.status_code != 200:
      raise RuntimeError(f"{server.name} answered {response.status_code}: {await response.aread()}")
    async for line in response.aiter_lines():
      if not line.startswith("data: {"):
        continue
      data = orjson.loads(line[6:])
      usage = data.get("usage") or usage
      if any(choice["delta"].get("content") for choice in data["choices"]):
        seen.pieces.append(time.perf_counter())
  if not usage or not seen.pieces:
    raise RuntimeError(f"{server.name} ended a stream without a text: {usage}")
  seen.tokens, seen.prompt = usage["completion_tokens"], usage["prompt_tokens"]
  seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
  return seen


async def closed(server: "Server", todo: list[Ask], clients: int) -> list[Seen]:
  """So many clients, each of which sends its next request when it has its answer."""
  async with _client() as http:
    seen, queue = [], iter(todo)

    async def one() -> None:
      for ask in queue:
        seen.append(await answer(http, server, ask))

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen


async def opened(server: "Server", todo: list[Ask], rate: float) -> list[Seen]:
  """Requests that come by a Poisson process, whatever has been answered."""
  rng = random.Random(_SEED.value)
  async with _client() as http:

    async def one(ask: Ask, at: float) -> Seen:
      await asyncio.sleep(at)
      return await answer(http, server, ask)

    at = np.cumsum([rng.expovariate(rate) for _ in todo])
    return await asyncio.gather(*(one(*pair) for pair in zip(todo, at, strict=True)))


def _client():
  import httpx

  return httpx.AsyncClient(timeout=1800, limits=httpx.Limits(max_connections=1000))


def figures(seen: list[Seen]) -> dict[str, float]:
  """What a level came to."""
  start, end = min(s.sent for s in seen), max(s.pieces[-1] for s in seen)
  first = [s.pieces[0] - s.sent for s in seen]
  gaps = np.concatenate([np.diff(s.pieces) for s in seen]) if seen else np.zeros(0)
  each = [(s.pieces[-1] - s.pieces[0]) / (s.tokens - 1) for s in seen if s.tokens > 1]
  quantiles = {
    f"{name}_p{q}_s": float(np.percentile(values, q))
    for name, values in (("ttft", first), ("itl", gaps))
    for q in (50, 95, 99)
    if len(values)
  }
  writing = sum(s.pieces[-1] - s.pieces[0] for s in seen) / (end - start)
  return {
    "requests": len(seen),
    "tokens_per_s": sum(s.tokens for s in seen) / (end - start),
    **quantiles,
    "tpot_p50_s": statistics.median(each),
    "occupancy": writing / _ROWS.value,
    "prompt_tokens": sum(s.prompt for s in seen),
    "cached_share": sum(s.cached for s in seen) / sum(s.prompt for s in seen),
  }


# -- servers ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
  """A process that serves."""

  name: str
  url: str
  sampling: dict[str, Any]
  process: subprocess.Popen


@contextlib.contextmanager
def serving(name: str, command: list[str], url: str | None, sampling: dict) -> Iterator[Server]:
  """A server, once it is ready. Raises UserError where it ends before that."""
  with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
      yield Server(name, _ready(name, process, log, url), sampling, process)
    finally:
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
      process.kill()


def _ready(name: str, process: subprocess.Popen, log, url: str | None) -> str:
  import httpx

  while process.poll() is None:
    time.sleep(0.2)
    log.seek(0)
    said = re.search(r"Listening at (http://\S+)/v1", log.read()) if url is None else None
    url = said[1] if said else url
    with contextlib.suppress(httpx.TransportError):
      path = "/health" if name == "llama.cpp" else "/ready"
      answer = httpx.get(url + path, timeout=5) if url else None
      if answer and answer.status_code == 200 and not answer.json().get("compiling"):
        return url
  log.seek(0)
  raise UserError(f"The server of {name} ended: {(log.read().strip().splitlines() or ['?'])[-1]}")


def ours(argv: list[str]) -> contextlib.AbstractContextManager[Server]:
  """Our server, with the config flags of this command line."""
  config = [arg for arg in argv[1:] if re.match(r"--?config[.=]", arg)]
  sampler = _SAMPLER.value or "plain"
  command = [sys.executable, "-m", "entropix_jax.serve", "--port=0", *config]
  command += [f"--config.engine.batch_size={_ROWS.value}", f"--samplers={sampler}"]
  command += [f"--config.engine.max_seq_len={_CONTEXT.value}"]
  if sampler == "plain":
    command += ["--config.sampler.name=plain", "--config.sampler.preset=none"]
  knobs = {"temperature": 0.7} if sampler == "plain" else {"entropix": {"sampler": sampler}}
  return serving("entropix_jax", command, None, knobs)


def peer() -> contextlib.AbstractContextManager[Server]:
  """llama.cpp's server with as many slots and threads."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [_PEER.value, "-m", _PEER_MODEL.value, "--port", str(port), "-np", str(_ROWS.value)]
  command += ["-c", str(_ROWS.value * _CONTEXT.value), "-t", str(os.cpu_count()), "-fa", "on"]
  knobs = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
  return serving("llama.cpp", command, f"http://127.0.0.1:{port}", knobs)


# -- the host --------------------------------------------------------------------------------------


def host_s(rows: int) -> float:
  """Seconds per token that the host takes with so many rows, besides the programs."""
  chosen, clock, waits = config_file.resolve(_CONFIG.value), time.perf_counter, []
  session = Session(Model(chosen), chosen, samplers=("plain",))
  engine = session.model.decoder(session, rows, lambda _: None).engine
  real, ids = engine.run, session.encode("Once upon a time")

  def run(*args):
    start, found = clock(), jax.block_until_ready(real(*args))
    waits.append(clock() - start)
    return found

  engine.run = run
  todo = [dataclasses.replace(session.request(ids, 256, seed), stop=()) for seed in range(rows)]
  events = generate(engine, session.tokenizer, todo)
  next(events)  # all rows have begun
  waits.clear()
  start, tokens = clock(), sum(1 for _ in events)
  return (clock() - start - sum(waits)) / tokens


# -- the run ---------------------------------------------------------------------------------------


def level(server: Server, kind: str, number: float) -> dict[str, float]:
  """The figures of one level."""
  n = _EACH.value * (int(number) if kind == "clients" else 8)
  todo = asks(n, _SEED.value + 1)
  run = closed(server, todo, int(number)) if kind == "clients" else opened(server, todo, number)
  return figures(asyncio.run(run))


def measure(argv: list[str]) -> dict[str, Any]:
  """All levels of all servers."""
  levels = [("clients", float(x)) for x in _CLIENTS.value] + [
    ("rate", float(x)) for x in _RATES.value
  ]
  found: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(ours(argv))]
    servers += [stack.enter_context(peer())] if _PEER.value else []
    for server in servers:  # what both do only once
      asyncio.run(closed(server, asks(2, _SEED.value), 1))
    for kind, number in levels:
      facts = [level(server, kind, number) for server in servers]
      key = f"{number:g} {kind}" if kind == "clients" else f"{number:g} per second"
      found[key] = facts[0]
      if len(facts) > 1:
        found[key] |= {f"peer_{name}": value for name, value in facts[1].items()}
        found[key]["ratio"] = facts[0]["tokens_per_s"] / facts[1]["tokens_per_s"]
        found[key]["ttft_ratio"] = facts[0]["ttft_p50_s"] / facts[1]["ttft_p50_s"]
      shown = " ".join(f"{k} {v:.3g}" for k, v in found[key].items())
      say(f"{key}: {shown}")
  return found


def _check() -> None:
  for flag in (_CLIENTS, _RATES):
    for text in flag.value:
      try:
        right = float(text) > 0 and (flag is _RATES or float(text).is_integer())
      except ValueError:
        right = False
      if not right:
        raise UserError(f"--{flag.name} has {text!r} in it; give positive numbers such as 1,8.")
  if not _CLIENTS.value and not _RATES.value:
    raise UserError("There is nothing to measure; give --clients or --rates.")
  if bool(_PEER.value) != bool(_PEER_MODEL.value):
    raise UserError("--peer and --peer_model go together; give both or neither.")
  for flag in (_PEER, _PEER_MODEL):
    if flag.value and not os.path.isfile(flag.value):
      raise UserError(f"--{flag.name}={flag.value} is not a file.")
  for name in ("httpx", "orjson", "uvicorn"):
    if not _installed(name):
      raise UserError(f'This needs the package {name}; pip install "entropix_jax[serve]" httpx.')


@functools.cache
def _installed(name: str) -> bool:
  from importlib.util import find_spec

  return find_spec(name) is not None


def run(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  _check()
  levels = measure(argv)
  name = f"{_MAIN.value} clients"
  main = levels.get(name, next(iter(levels.values())))
  facts = {
    "benchmark": "serve",
    "levels": levels,
    "model": os.path.basename(_CONFIG.value.checkpoint.rstrip("/")),
    "rows": _ROWS.value,
    "sampler": _SAMPLER.value or "plain",
    **({"peer": "llama.cpp's server"} if _PEER.value else {}),
    **decode.machine(),
    **{key: main[key] for key in ("tokens_per_s", "ttft_p50_s", "itl_p99_s")},
    "peer_ratio": main.get("ratio"),
    "host_s": {str(rows): host_s(rows) for rows in (1, 8, 32)},
  }
  print(commands.keep(out, facts))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
