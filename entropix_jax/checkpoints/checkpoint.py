"""Checkpoints: Hugging Face's folders and GGUF files read straight into device shards; orbax's loaded.

Why: each process reads only the bytes of its own devices' blocks, a megabyte at a time, into memory that
the device takes over without a copy where it can. So nothing is held twice, and no pages of a mapped
file count as the process's memory.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import files, memory
from entropix_jax.checkpoints import gguf_file, hf_config, orbax_store, safetensors_file
from entropix_jax.checkpoints.safetensors_file import DTYPES, INDEX, MODEL
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.model import linear, quant, weights
from entropix_jax.model.weights import Weights

SCRATCH = 1 << 20  # bytes per read; they stay in a core's cache while they are transposed
THREADS = min(8, os.cpu_count() or 1)  # each reads and transposes
TILE = 16  # rows per copy; more rows, a power of two apart, would evict each other from the cache
Progress = Callable[[int, int], None]  # (bytes done, total bytes)
Place = Callable[[str], jax.sharding.Sharding | None]  # field name -> its sharding
Source = safetensors_file.Source | gguf_file.Packed

# -- what there is -------------------------------------------------------------------------------


def _existing(path: str | os.PathLike) -> Path:
  """The folder, or the GGUF file, that a path stands for."""
  path = Path(os.path.expanduser(path))
  orbax_store.found(path)  # raises if the folder is unfinished
  if file := gguf_file.find(path):
    return file
  if not path.is_dir():
    raise UserError(
      f"{path} is not a folder; point config.checkpoint at a Hugging Face folder or a .gguf file."
    )
  return path


def check_files(path: str | os.PathLike, cfg: ModelConfig) -> dict[str, Source]:
  """Every tensor that `cfg` needs, by Hugging Face's name, after all checks that need no tensor data.

  An orbax folder is checked by `orbax_store.check_files`; the result is then empty.

  Raises:
    UserError: names the file and the tensor that is missing, truncated, of the wrong shape,
      unexpected or of an unsupported type.
  """
  path = _existing(path)
  if path.is_file():
    return gguf_file.tensors(path, cfg)
  if orbax_store.found(path):
    orbax_store.check_files(path, cfg)
    return {}
  return safetensors_file.tensors(path, cfg)


def stored_int8(path: str | os.PathLike) -> bool:
  """Whether a checkpoint's matrices are stored in int8, so that they load as `quant.Int8` only."""
  path = _existing(path)
  return orbax_store.found(path) and orbax_store.dtype(path) == "int8"


def ignored(path: str | os.PathLike) -> list[str]:
  """Attributes of a checkpoint's config.json that are not known here and not heeded, sorted."""
  path = _existing(path)
  if path.is_file() or not (path / "config.json").exists():
    return []
  return hf_config.unknown(hf_config.read_json(path / "config.json"))


# -- reading -------------------------------------------------------------------------------------


def load_config(folder: str | os.PathLike) -> ModelConfig:
  """The model that a folder's `config.json`, or a GGUF file's metadata, describes.

  Raises:
    UserError: no such folder or file, or an attribute that this engine does not support.
  """
  folder = _existing(folder)
  if folder.is_file():
    return gguf_file.config(folder)
  if not (folder / "config.json").exists():
    safetensors_file.check_folder(folder)  # raises a better message if the folder holds other files
  return hf_config.from_hf(hf_config.read_json(folder / "config.json"), str(folder / "config.json"))


def _block(
  shape: tuple[int, ...],
  field: str,
  source: Source,
  dtype: np.dtype,
  index: tuple[slice, ...],
  transposed: bool,
  room: memory.Memory,
) -> np.ndarray:
  """One block of a field, read from exactly the bytes that make it."""
  cuts = [np.arange(*piece.indices(n)) for piece, n in zip(index, shape, strict=True)]
  block = room.array(tuple(map(len, cuts)), dtype)
  # In Hugging Face's axis order a block is a table that is read row by row; a norm has one column.
  if block.ndim == 1:
    table_XY, rows_X, cols_Y = block[:, None], *cuts, np.zeros(1, int)
  else:
    table_XY = block if transposed else weights.hf_order(field, block)
    rows_X, cols_Y = cuts if table_XY is block else cuts[::-1]
  step = max(TILE, SCRATCH // (len(cols_Y) * DTYPES[source.dtype].itemsize))
  jobs = [
    _pool().submit(_move, source, rows_X[r : r + step], cols_Y, table_XY[r : r + step])
    for r in range(0, len(rows_X), step)
  ]
  for job in jobs:
    job.result()
  return block


@functools.cache
def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(THREADS)


def _move(at: Source, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
  """Read rows and columns into an array of any dtype, which may be a transposed view."""
  stored = DTYPES[at.dtype]
  if stored == into_XY.dtype and into_XY.flags.c_contiguous:
    at.read(rows_X, cols_Y, into_XY)
    return
  from_XY = np.empty(into_XY.shape, stored)
  at.read(rows_X, cols_Y, from_XY)
  # NumPy copies unsigned integers faster than the float types of ml_dtypes.
  bits = np.dtype(f"u{into_XY.itemsize}")
  from_XY = from_XY.astype(into_XY.dtype, copy=False).view(bits)
  into_XY = into_XY.view(bits)
  for r in range(0, len(rows_X), TILE):
    into_XY[r : r + TILE] = from_XY[r : r + TILE]


def load_field(
  cfg: ModelConfig,
  field: str,
  source: Source,
  dtype: Any,
  place: jax.sharding.Sharding | None = None,
  transposed: bool = False,
  room: memory.Memory | None = None,
) -> jax.Array:
  """Load one field as an array of `dtype`, straight to `place` (None: the default device).

  Host memory holds each block of this process's devices once; a CPU device takes it over uncopied.

  Args:
    transposed: outputs first, as `linear.Transposed` holds it.
    room: where blocks are put; None: each into an allocation of its own.
  """
  room = room or memory.Memory()
  shape = (weights.hf_shape if transposed else weights.shape)(cfg, field)
  blocks: dict[tuple, np.ndarray] = {}

  def block(index):
    # JAX asks once per device, and replicas ask for the same slices.
    key = tuple((cut.start, cut.stop) for cut in index)
    if key not in blocks:
      blocks[key] = _block(shape, field, source, np.dtype(dtype), index, transposed, room)
    return blocks[key]

  if place is None:
    leaf = jax.device_put(block((slice(None),) * len(shape)))
  else:
    leaf = jax.make_array_from_callback(shape, place, block)
  return leaf.block_until_ready()  # else host copies of later fields pile up during the transfer


def load_weights(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  dtype: Any,
  sharding: Place | None = None,
  progress: Progress | None = None,
  quantised: bool = False,
  finish: Callable | None = None,
) -> Weights:
  """Load the weights of a folder or a GGUF file, each field straight to its devices and in its dtype.

  `check_files` runs before the first allocation. Besides the weights, host memory holds at most one field
  (one layer of an orbax folder), and only the blocks of this process's devices.

  Args:
    dtype: of every leaf that is not quantised.
    sharding: field name ("wq_DQ") -> its sharding; None, or a None result, is the default device.
    progress: called with (bytes read, total bytes) of the files after each field (orbax: each item).
    quantised: make every matrix a `quant.Int8`, quantised from bfloat16, field by field; what is
      stored in int8 (`stored_int8`) stays so in any case.
    finish: (field name, array on its devices) -> the leaf, for leaves that are not quantised; for
      example `linear.transpose`.

  Raises:
    UserError: anything `check_files` refuses; for an orbax folder also a damaged file.
  """
  folder = _existing(folder)
  if orbax_store.found(folder):
    return orbax_store.load(folder, cfg, dtype, sharding, progress, quantised, finish)
  stored = check_files(folder, cfg)
  table = weights.sources(cfg)
  total = sum(at.end - at.begin for at in stored.values())
  done, room = 0, memory.Memory(memory.PIECE)

  def make(layer, field):
    nonlocal done
    source = stored[table[layer, field]]
    place = sharding(field) if sharding else None
    if quantised and quant.inputs(field):
      whole = load_field(cfg, field, source, jnp.bfloat16, place, room=room)
      leaf = jax.block_until_ready(quant.quantise(field, whole))
    else:
      # A matrix that is stored outputs first has Hugging Face's order, so it need not be transposed twice.
      whole = jax.ShapeDtypeStruct(weights.shape(cfg, field), dtype)
      transposed = finish is not None and isinstance(finish(field, whole), linear.Transposed)
      leaf = load_field(cfg, field, source, dtype, place, transposed, room)
      leaf = linear.Transposed(leaf) if transposed else finish(field, leaf) if finish else leaf
    done += source.end - source.begin
    if progress:
      progress(done, total)
    return leaf

  return weights.assemble(cfg, make)


def stop_ids(folder: str | os.PathLike) -> tuple[int, ...]:
  """The ids that end an answer: `eos_token_id` of generation_config.json, else of config.json.

  Of a GGUF file: its ids for the end of a text, a turn and a message. Empty when there are none.

  Raises:
    UserError: the value is not a token id or a list of them.
  """
  folder = _existing(folder)
  if folder.is_file():
    return gguf_file.stop_ids(folder)
  for path in (folder / "generation_config.json", folder / "config.json"):
    known = hf_config.read_json(path) if path.exists() else {}
    ids = known.get("eos_token_id") if isinstance(known, dict) else known
    if ids is None:
      continue
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
      raise UserError(f"{path} sets eos_token_id to {ids!r}; it must be token ids.")
    return tuple(ids)
  return ()


# -- writing -------------------------------------------------------------------------------------


def write(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  hf: dict[str, Any],
  dtype: Any,
  tensor: Callable[[int | None, str], np.ndarray],
  progress: Progress | None = None,
) -> None:
  """Write `model.safetensors`, then `config.json`, holding one field in memory at a time.

  Args:
    hf: the contents of config.json; must read back as `cfg`.
    dtype: float64, float32, float16 or bfloat16.
    tensor: (layer, field) -> array of shape `weights.hf_shape`, in Hugging Face's axis order.
    progress: called with (bytes written, total bytes) after each field.

  Raises:
    UserError: `hf` describes another model, a tensor has the wrong shape, the folder holds other
      weights that a reader would prefer, or a file cannot be written.
  """
  if hf_config.from_hf(hf) != cfg:
    raise UserError("The keys for config.json describe another model; give those of these weights.")
  folder, dtype = Path(os.path.expanduser(folder)), np.dtype(dtype)
  for path in (folder / INDEX, *sorted(folder.glob("*.safetensors"))):
    if path.exists() and path.name != MODEL:
      raise UserError(f"{path} belongs to another checkpoint; write to an empty folder.")
  header, end = {}, 0
  kind = next(kind for kind, known in DTYPES.items() if known == dtype)
  for (_, field), name in weights.sources(cfg).items():
    shape = weights.hf_shape(cfg, field)
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
  head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
  head += b" " * (-len(head) % 8)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder} cannot be made ({error.strerror}).") from None
  with files.whole(folder / MODEL) as file:
    file.write(len(head).to_bytes(8, "little") + head)
    for (layer, field), name in weights.sources(cfg).items():
      array = tensor(layer, field)
      if array.shape != header[name]["shape"]:
        raise UserError(f"{name} has shape {array.shape}; it must be {header[name]['shape']}.")
      file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8))
      if progress:
        progress(header[name]["data_offsets"][1], end)
  with files.whole(folder / "config.json") as file:
    file.write(json.dumps(hf, indent=2).encode() + b"\n")


def save(
  folder: str | os.PathLike, cfg: ModelConfig, params: Weights, dtype: Any, **extra: Any
) -> None:
  """Write weights as a Hugging Face folder; `extra` adds keys to config.json (eos_token_id=2)."""

  def tensor(layer, field):
    leaf = getattr(params if layer is None else params.layers[layer], field)
    return weights.hf_order(field, np.asarray(leaf))

  write(folder, cfg, hf_config.to_hf(cfg, dtype=np.dtype(dtype).name, **extra), dtype, tensor)
