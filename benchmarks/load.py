"""Measure how fast weights load and how much host memory that takes, in one process and in several.

  python benchmarks/load.py --out=runs.jsonl
  python benchmarks/load.py --checkpoint=checkpoints/Llama-3.2-1B --processes=1 --format=safetensors

Without --checkpoint it writes a random checkpoint of --model's shape, in bfloat16, to a temporary folder. For
each count, that many processes run on this machine, with one CPU device each, on a mesh that splits the
model among them. The last line of stdout is one JSON object, which --out appends to a file:

  dd_gb_s      rate at which `dd` reads the safetensors files, each into a buffer of its size; the median
  gb_s         bytes of all weights over the seconds of the slowest process; the median of --rounds
  over_dd      gb_s / dd_gb_s
  cold_*       the same, once, after the files were dropped from the page cache
  peak         per process: the high-water mark of resident memory, minus the resident memory before
  share        bytes of the weights that a process holds; largest: bytes of its largest array
  within       whether every peak is at most share + largest + 1 GB

Why: a loader that holds a whole tensor where its device needs a slice, or a file's pages in addition to
the weights, fails only for models too large to test here. Both rates are measured alternately in one run,
because shared machines drift. dd reads into a buffer because memory is slow when it is first touched, as
the memory of the weights is.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

import decode

from entropix_jax import config
from entropix_jax.checkpoints import checkpoint, hf_config
from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.model import sharding, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORMATS = ("safetensors", "orbax")
SLACK = 10**9  # bytes that a process may use in addition to its share and its largest array
LIMIT_S = 900  # per group of processes

_FLAGS = commands.Flags()
_CHECKPOINT = _FLAGS.string(
  "checkpoint", None, "Hugging Face folder in bfloat16; default: random weights."
)
_MODEL = _FLAGS.enum("model", "llama3_1b", list(config.PRESETS), "Shape of random weights.")
_PROCESSES = _FLAGS.multi_integer("processes", [1, 2, 4], "Counts.", 1)
_FORMAT = _FLAGS.multi_enum("format", FORMATS, FORMATS, "Checkpoint formats.")
_ROUNDS = _FLAGS.integer("rounds", 3, "Timed loads after the cold one.", 1)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_PLACE = _FLAGS.string("place", None, "port:count:index; internal, set for child processes.")


def drop(folder: pathlib.Path) -> None:
  """Drop a folder's files from the page cache, so that the next read comes from the disk."""
  for path in filter(pathlib.Path.is_file, folder.rglob("*")):
    with open(path, "rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- one process of a group ------------------------------------------------------------------------


def resident(name: str) -> int:
  """Bytes of VmRSS (now) or VmHWM (the maximum since `clear`)."""
  with open("/proc/self/status", encoding="ascii") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def clear() -> None:
  """Reset the high-water mark of resident memory."""
  with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
    file.write("5")


def held(leaf: jax.Array) -> int:
  """Bytes of an array that this process holds."""
  return sum(shard.data.nbytes for shard in leaf.addressable_shards)


def work(folder: pathlib.Path, place: str) -> None:
  """Load --rounds times in step with the other processes, and print the results as the last line."""
  port, count, index = map(int, place.split(":"))
  if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  import orbax.checkpoint  # noqa: F401 (so that importing is not timed as part of a load)
  from jax.experimental import multihost_utils

  cfg = checkpoint.load_config(folder)
  mesh = sharding.mesh(config.MeshConfig(model=count), cfg)
  multihost_utils.sync_global_devices("ready")
  clear()
  before = resident("VmRSS")
  seconds = []
  for i in range(1 + _ROUNDS.value):
    if i == 0 and index == 0:
      drop(folder)
    multihost_utils.sync_global_devices(f"round {i}")
    start = time.perf_counter()
    params = checkpoint.load_weights(
      folder, cfg, jnp.bfloat16, lambda field: sharding.of(mesh, weights.letters(field))
    )
    jax.block_until_ready(params)
    seconds.append(time.perf_counter() - start)
    leaves = list(map(held, jax.tree.leaves(params)))
    del params
  result = {
    "seconds": seconds,
    "peak": resident("VmHWM") - before,
    "share": sum(leaves),
    "largest": max(leaves),
  }
  multihost_utils.sync_global_devices("done")
  print(json.dumps(result), flush=True)


def group(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
  """The results of each of `count` processes."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, __file__, f"--checkpoint={folder}", f"--rounds={_ROUNDS.value}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

  def start(i: int) -> subprocess.CompletedProcess | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      place = f"--place={port}:{count}:{i}"
      return subprocess.run(
        [*command, place], capture_output=True, text=True, env=environment, timeout=LIMIT_S
      )

  with ThreadPoolExecutor(count) as pool:
    ended = list(pool.map(start, range(count)))
  for process in filter(None, ended):
    if process.returncode:
      last = (process.stderr.splitlines() or ["nothing"])[-1]
      raise UserError(f"A process of {count} ended with {process.returncode}; it said: {last}")
  if None in ended:
    raise UserError(f"{count} processes were not done after {LIMIT_S} s.")
  return [json.loads(process.stdout.splitlines()[-1]) for process in ended]


# -- all of them -----------------------------------------------------------------------------------


def write_random(folder: pathlib.Path, cfg: config.ModelConfig) -> None:
  """A Hugging Face folder of normally distributed numbers, which compress as weights do."""
  rng = np.random.default_rng(0)

  def tensor(layer, field):
    del layer
    return rng.standard_normal(weights.hf_shape(cfg, field), np.float32).astype(jnp.bfloat16)

  hf = hf_config.to_hf(cfg, dtype="bfloat16")
  checkpoint.write(folder, cfg, hf, jnp.bfloat16, tensor)


def dd(folder: pathlib.Path) -> float:
  """Seconds that dd takes to read the safetensors files, each into one buffer."""
  seconds = 0.0
  for path in sorted(folder.glob("*.safetensors")):
    size = path.stat().st_size
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={size}", "count=1", "iflag=fullblock"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds += time.perf_counter() - start
  return seconds


def measure(source: pathlib.Path, cfg: config.ModelConfig, temporary: pathlib.Path):
  """The measured contents of the last line."""
  folders = {"safetensors": source}
  if "orbax" in _FORMAT.value:
    folders["orbax"] = temporary / "orbax"
    command = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py")]
    command += [f"--checkpoint={source}", f"--out={folders['orbax']}"]
    start = time.perf_counter()
    done = subprocess.run(
      command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
      raise UserError(f"The conversion failed: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    convert_s = time.perf_counter() - start

  files = sum(path.stat().st_size for path in source.glob("*.safetensors"))
  drop(source)
  cold_dd, warm_dd = [dd(source)], [dd(source)]
  groups: dict[str, dict[str, Any]] = {name: {} for name in _FORMAT.value}
  for count in _PROCESSES.value:
    for name in _FORMAT.value:
      told = group(folders[name], count)
      groups[name][str(count)] = told
      drop(source)
      cold_dd.append(dd(source))
      warm_dd.append(dd(source))

  result: dict[str, Any] = {
    "bytes": files,
    "dd_gb_s": files / np.median(warm_dd) / 1e9,
    "dd_gb_s_best": files / min(warm_dd) / 1e9,
    "dd_cold_gb_s": files / np.median(cold_dd) / 1e9,
  }
  if "orbax" in folders:
    result["convert_s"] = convert_s
  whole = weights.count(cfg) * 2
  for name, counts in groups.items():
    result[name] = {}
    for count, told in counts.items():
      cold, *warm = np.max([each["seconds"] for each in told], axis=0)
      rate, cold_rate = whole / np.median(warm) / 1e9, whole / cold / 1e9
      result[name][count] = {
        "gb_s": rate,
        "over_dd": rate / result["dd_gb_s"],
        "cold_gb_s": cold_rate,
        "cold_over_dd": cold_rate / result["dd_cold_gb_s"],
        "peak": [each["peak"] for each in told],
        "share": max(each["share"] for each in told),
        "largest": max(each["largest"] for each in told),
        "within": all(each["peak"] <= each["share"] + each["largest"] + SLACK for each in told),
      }
  return result


def table(result: dict[str, Any]) -> str:
  """The figures as readable text."""
  lines = [
    f"{result['model']}, {result['bytes'] / 1e9:.2f} GB; dd {result['dd_gb_s']:.2f} GB/s, "
    f"cold {result['dd_cold_gb_s']:.2f} GB/s",
    f"{'':14}{'processes':>10}{'GB/s':>8}{'of dd':>8}{'cold':>8}{'of dd':>8}"
    f"{'peak GB':>9}{'share':>8}{'largest':>9}{'within':>8}",
  ]
  for name in FORMATS:
    for count, row in result.get(name, {}).items():
      lines.append(
        f"{name:14}{count:>10}{row['gb_s']:8.2f}{row['over_dd']:8.2f}{row['cold_gb_s']:8.2f}"
        f"{row['cold_over_dd']:8.2f}{max(row['peak']) / 1e9:9.2f}{row['share'] / 1e9:8.2f}"
        f"{row['largest'] / 1e9:9.2f}{'yes' if row['within'] else 'no':>8}"
      )
  return "\n".join(lines)


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  if not pathlib.Path("/proc/self/clear_refs").exists():
    raise UserError("This benchmark reads memory figures that only Linux has.")
  if _PLACE.value:
    if not _CHECKPOINT.value or not re.fullmatch(r"\d+:\d+:\d+", _PLACE.value):
      raise UserError("--place is set by the run for its own processes; leave it out.")
    work(pathlib.Path(_CHECKPOINT.value), _PLACE.value)
    return
  with tempfile.TemporaryDirectory() as name:
    temporary = pathlib.Path(name)
    if _CHECKPOINT.value:
      source = pathlib.Path(_CHECKPOINT.value)
      cfg = checkpoint.load_config(source)
      if any(at.dtype != "BF16" for at in checkpoint.check_files(source, cfg).values()):
        raise UserError(f"{source} is not bfloat16, whose bytes this benchmark counts.")
    else:
      source, cfg = temporary / "hf", config.PRESETS[_MODEL.value]
      write_random(source, cfg)
    for count in _PROCESSES.value:
      sharding.check_divisible(cfg, config.MeshConfig(model=count), 1)
    facts = {
      "benchmark": "load",
      "model": source.name if _CHECKPOINT.value else _MODEL.value,
      "parameters": weights.count(cfg),
      "dtype": "bfloat16",
      "rounds": _ROUNDS.value,
    }
    result = facts | measure(source, cfg, temporary) | decode.machine()
  print(table(result))
  print(commands.keep(out, result), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
