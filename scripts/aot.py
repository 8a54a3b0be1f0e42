"""Compile the engine's programs for devices that are not present, and report memory, traffic and kernels.

  python scripts/aot.py --config=configs/llama3_70b.py --target=v5p:2x2x2
  python scripts/aot.py --config=configs/llama3_70b.py --target=v5e:4x4 --dtype=int8
  python scripts/aot.py --config=configs/llama3_8b.py --target=h100:1 --batch=8 --cache=4096

`--target` is a TPU slice (v5e, v5p or v6e and its topology; v5e:1 is one chip) or a number of H100s. Install the
compilers with `pip install -e ".[aot-tpu]"` or `".[aot-gpu]"`; they need no device and no network.

Prefill and decode are the engine's own programs, with sampler and statistics. config.mesh.data is kept, and
the `model` axis is the number of chips divided by it.
Bytes per chip are the compiler's figures. The rest is counted in the compiled program (`hlo.py`): collectives;
for TPUs, the memory traffic relative to the minimum (this chip's weights and cache window, read once); for
GPUs, the kernels launched. The last line of stdout is a JSON object, which --out appends to a file.
Nothing is timed, and without a device the GPU compiler chooses its matrix kernels without autotuning.
"""

import dataclasses
import datetime
import os
import pathlib
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu looks for a metadata server
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # libtpu warns if these two are unset
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # without devices, none need be locked
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"


ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks"), str(ROOT)]

# ruff: noqa: E402 (the compilers read the environment at import)
import decode
import hlo
import jax
import jax.numpy as jnp
from jax.experimental import topologies

import entropix_jax
from entropix_jax import files, sampling, settings
from entropix_jax.cli import commands, config_file
from entropix_jax.config import MeshConfig
from entropix_jax.engine import preflight
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.state import abstract_state
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file.")
_TARGET = _FLAGS.string("target", None, "v5p:2x2x2, v5e:1, h100:8, ...")
_BATCH = _FLAGS.integer("batch", None, "Rows; default: config.", 1)
_CACHE = _FLAGS.integer("cache", None, "Cache slots; default: config.", 2)
_DTYPE = _FLAGS.enum(
  "dtype",
  None,
  ["bfloat16", "float32", "int8"],
  "Data type; default: config, with auto as bfloat16. int8 applies to the weights only.",
)
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")
_TEXT = _FLAGS.string("text", None, "Folder for the compiled programs.")

GIB = 2**30
MEMORY = {"v5e": 15.75 * GIB, "v5p": 95.7 * GIB, "v6e": 31.25 * GIB, "h100": 84_978_434_048}
ONE_CHIP = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}  # the smallest topology libtpu accepts
H100 = (ROOT / "scripts" / "h100.textproto").read_text()


def devices(target: str) -> list:
  """Descriptions of a target's devices. Raises UserError if the target is unknown or has no compiler."""
  kind, _, size = target.partition(":")
  known = r"[1-9]\d*" if kind == "h100" else r"1|[1-9]\d*(x[1-9]\d*){1,2}"
  if kind not in MEMORY or not re.fullmatch(known, size):
    raise UserError(
      f"--target={target} is unknown; give v5e:4x4, v5p:2x2x2, v6e:2x4, v5e:1, h100:8 or the like."
    )
  if kind == "h100":
    how = {"platform": "cuda", "target_config": H100, "topology": f"1x1x{size}"}
    missing = 'The CUDA compiler is not here; install it with pip install -e ".[aot-gpu]"'
  else:
    how = {"platform": "tpu", "topology_name": f"{kind}:{ONE_CHIP[kind] if size == '1' else size}"}
    missing = (
      f'No compiler for {target}: install it with pip install -e ".[aot-tpu]", or name a slice that '
      "exists"
    )
  try:
    found = topologies.get_topology_desc(**how)
  except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
    raise UserError(f"{missing} ({error}).") from None
  return list(found.devices)[: 1 if size == "1" else None]


def choose():
  """(ModelConfig, its name, Settings) that the flags ask for."""
  resolved, cfg, name = settings.shape(config_file.resolve(_CONFIG.value))
  changes = {"dtype": "bfloat16"} if resolved.engine.dtype == "auto" else {}
  if _DTYPE.value:
    changes["weights" if _DTYPE.value == "int8" else "dtype"] = _DTYPE.value
  if _BATCH.value:
    changes["batch_size"] = _BATCH.value
  if _CACHE.value:
    changes["max_seq_len"] = _CACHE.value
  engine = dataclasses.replace(resolved.engine, **changes)
  return cfg, name, dataclasses.replace(resolved, engine=engine)


def look(engine: Engine, program: Program, gpu: bool, limit: float) -> dict:
  """Compile one program; its memory, traffic and kernels, per decode step or per run of prefill."""
  start = time.perf_counter()
  verb, steps = program.verb, program.steps or 1
  least = preflight.step_bytes(engine, engine.setup.capacity)
  if not preflight.fits(least, limit):
    return {"fits": False, "why": f"weights and cache alone take {least / 1e9:.1f} GB"}
  try:
    compiled = engine.lower(program).compile(engine.compiled.options)
  except jax.errors.JaxRuntimeError as error:
    if not preflight.exhausts(error):
      raise
    return {"fits": False, "why": " ".join(str(error).split())[:300]}
  seconds = time.perf_counter() - start
  text = compiled.as_text()
  if _TEXT.value:
    with files.whole(pathlib.Path(_TEXT.value) / f"{verb}.txt") as file:
      file.write(text.encode())
  found = hlo.Program(text)
  m = compiled.memory_analysis()
  total = m.argument_size_in_bytes + preflight.temporaries(compiled)
  messages = {kind: n / steps for kind, n in found.collectives().items()}
  inside = found.inside_steps() if verb == "decode" else found.entry
  out = {
    "fits": preflight.fits(total, limit),
    "bytes_per_chip": int(total),
    "hbm_bytes_per_chip": int(limit),
    "argument_bytes": m.argument_size_in_bytes,
    "temporary_bytes": m.temp_size_in_bytes,
    "aliased_bytes": m.alias_size_in_bytes,
    "layers": engine.setup.cfg.layers,
    "all_reduces": messages.get("all-reduce", 0.0),
    "collectives": messages,
    "whiles": found.total_of("while", inside),
    "conditionals": found.total_of("conditional", inside),
    "cache_copies": found.copies_of(preflight.per_device(abstract_state(engine.setup).cache.k[0]))
    / steps,
    "compile_s": round(seconds, 1),
  }
  if verb == "decode" and gpu:
    out["kernels"] = found.kernels() / steps
    out["kernels_least"] = found.kernels(min) / steps
    out["kernels_per_layer"] = round(out["kernels"] / engine.setup.cfg.layers, 2)
  elif verb == "decode":
    traffic = found.traffic() / steps
    out["hbm_traffic_bytes"], out["hbm_minimum_bytes"] = round(traffic), round(least)
    out["hbm_traffic_over_minimum"] = round(traffic / least, 4)
  return out


def look_at_all() -> dict:
  """The contents of the last line."""
  cfg, name, chosen = choose()
  found = devices(_TARGET.value)
  data = chosen.mesh.data
  if len(found) % data:
    raise UserError(
      f"config.mesh.data={data} does not divide the {len(found)} chips of the target."
    )
  shape = MeshConfig(data, len(found) // data)
  sampler = sampling.find(chosen.sampler)
  varying = sampling.varying(sampler, chosen.knobs)
  engine = preflight.engine(
    cfg, sampler, chosen.engine, shape, jnp.dtype(chosen.engine.dtype), found, varying
  )
  if _TEXT.value:
    try:
      pathlib.Path(_TEXT.value).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"--text={_TEXT.value} cannot be made ({error.strerror}).") from None
  kind = _TARGET.value.partition(":")[0]
  out = {
    "benchmark": "aot",
    "model": name,
    "target": _TARGET.value,
    "dtype": "int8" if chosen.engine.weights == "int8" else chosen.engine.dtype,
    "batch": chosen.engine.batch_size,
    "cache": engine.setup.capacity,
    "cache_dtype": engine.setup.model.cache_dtype.name,
    "mesh": [shape.data, shape.model],
    "sampler": chosen.sampler,
    "knobs": chosen.knobs,
    "attn_stats": chosen.engine.attn_stats,
  }
  for name, program in zip(("prefill", "decode"), preflight.largest(engine.setup), strict=True):
    print(f"compiling {name} for {_TARGET.value} ...", file=sys.stderr, flush=True)
    out[name] = look(engine, program, kind == "h100", MEMORY[kind])
  out["fits"] = all(out[verb]["fits"] for verb in ("prefill", "decode"))
  out |= {k: v for k, v in out["decode"].items() if k in ("bytes_per_chip", "hbm_bytes_per_chip")}
  out |= {"layers": cfg.layers, "jax": jax.__version__, "version": entropix_jax.__version__}
  out |= {"commit": decode.machine()["commit"], "date": datetime.date.today().isoformat()}
  return out


def table(out: dict) -> str:
  """The figures as readable text."""
  lines = [
    f"{out['model']} {out['dtype']} on {out['target']}, batch {out['batch']}, cache {out['cache']}"
  ]
  for verb in ("prefill", "decode"):
    d = out[verb]
    if "bytes_per_chip" not in d:
      lines.append(f"  {verb:8} does not fit: {d['why']}")
      continue
    room = d["hbm_bytes_per_chip"] - d["bytes_per_chip"]
    lines.append(
      f"  {verb:8} {d['bytes_per_chip'] / 1e9:.2f} GB a chip, {room / 1e9:.2f} GB left; "
      f"{d['all_reduces']:g} all-reduces, all messages {d['collectives']}; {d['whiles']:g} loops and "
      f"{d['conditionals']:g} conditions inside; {d['cache_copies']:g} copies of a cache; "
      f"compiled in {d['compile_s']} s"
    )
    if "kernels" in d:
      lines.append(
        f"           {d['kernels']:g} kernels a step, {d['kernels_per_layer']} a layer; "
        f"{d['kernels_least']:g} where each condition takes its shorter side"
      )
    if "hbm_traffic_bytes" in d:
      lines.append(
        f"           {d['hbm_traffic_bytes'] / 1e9:.3f} GB of memory traffic a step, "
        f"{d['hbm_traffic_over_minimum']:.3f} of the least possible"
      )
  return "\n".join(lines)


def run(argv: list[str]) -> None:
  """Compile what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  if not _TARGET.value:
    raise UserError("Give --target, such as --target=v5e:1 or --target=h100:8.")
  found = look_at_all()
  print(table(found), file=sys.stderr)
  print(commands.keep(out, found))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
