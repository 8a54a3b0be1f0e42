"""Convert a Hugging Face folder or a GGUF file to orbax arrays that load onto any mesh, optionally in int8.

    python scripts/convert_checkpoint.py --checkpoint=llama3_70b --out=llama3_70b_int8 --dtype=int8

The result is a complete checkpoint folder for --config.checkpoint=OUT. If the conversion is stopped, the
same command resumes it; until it is complete the data is in OUT.part, which cannot be loaded by mistake.
Host memory holds one layer at a time, and no accelerator is used.
"""

import json
import math
import os
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from entropix_jax import config
from entropix_jax.checkpoints import checkpoint, gguf_file, hf_config, hub, orbax_store
from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.model import quant, sharding, weights

_FLAGS = commands.Flags()
_CHECKPOINT = _FLAGS.string("checkpoint", None, "Hugging Face folder or .gguf file.")
_OUT = _FLAGS.string("out", None, "Folder to write.")
_DTYPE = _FLAGS.enum("dtype", "bfloat16", orbax_store.DTYPES, "Type of the weights.")


def spread(cfg: config.ModelConfig, field: str) -> NamedSharding | None:
  """A sharding of the field over this host's devices, along the axis that a mesh would split.

  orbax never puts two devices' parts into one chunk, so a device of a later mesh reads only its own chunks.
  """
  shape = weights.shape(cfg, field)
  spec = sharding.spec(weights.letters(field))
  axis = next((i for i, axes in enumerate(spec) if axes), None)
  if axis is None:
    return None
  devices = jax.devices()
  mesh = Mesh(np.array(devices[: math.gcd(len(devices), shape[axis])]), ("part",))
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "part"))


def convert(source: Path, out: Path, dtype: str = "bfloat16", progress=None) -> None:
  """Write `out` from `source`, or resume an interrupted conversion."""
  if orbax_store.found(source):
    raise UserError(f"{source} is a converted folder; give the Hugging Face folder it came from.")
  cfg = checkpoint.load_config(source)
  stored = checkpoint.check_files(source, cfg)
  table = weights.sources(cfg)
  paths = {at.path for at in stored.values()}
  if file := gguf_file.find(source):
    ends = {"eos_token_id": list(gguf_file.stop_ids(file))}
    written = {"config.json": hf_config.to_hf(cfg), "generation_config.json": ends}
    files = {name: json.dumps(value, indent=2).encode() for name, value in written.items()}
    files[gguf_file.TOKENIZER] = gguf_file.header(file)
  else:
    paths.add(source / "config.json")
    found = [path for pattern in hub.TEXTS for path in sorted(source.glob(pattern))]
    files = {path.relative_to(source).as_posix(): path for path in found if path.is_file()}
  # Cheap and specific enough; hashing the contents would take as long as converting.
  identity = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]

  def make(layer, field):
    kind, source_of = orbax_store.stored_dtype(dtype, field), stored[table[layer, field]]
    leaf = checkpoint.load_field(cfg, field, source_of, kind, spread(cfg, field))
    return quant.quantise(field, leaf) if dtype == "int8" else leaf

  orbax_store.write(
    out,
    cfg,
    dtype,
    f"{zlib.crc32(json.dumps(identity).encode()):08x}",
    make,
    files,
    progress,
  )


def run(argv: list[str]) -> None:
  """Convert the folder given by the flags."""
  commands.parse(argv, _FLAGS, __doc__)
  if not _CHECKPOINT.value or not _OUT.value:
    raise UserError("Give --checkpoint=folder and --out=folder.")
  # orbax logs twenty lines per item, and stack traces of errors that we catch
  logging.set_verbosity(logging.FATAL)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  with tqdm(unit="", unit_scale=True, desc="parameters", leave=False, disable=None) as bar:

    def progress(done, total):
      bar.total = total
      bar.update(done - bar.n)

    convert(
      Path(os.path.expanduser(_CHECKPOINT.value)),
      Path(os.path.expanduser(_OUT.value)),
      _DTYPE.value,
      progress,
    )
  print(commands.loads(_OUT.value))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
