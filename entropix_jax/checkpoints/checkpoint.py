"""Checkpoint folders: Hugging Face's read straight into shards and written back, orbax's found.

Why: a safetensors file is eight bytes of header length (little-endian), a JSON header and raw bytes.
A process reads the bytes of its devices' blocks and no others, a megabyte at a time, into memory that
the device takes over as it is where it can: nothing is held twice, and no pages of a mapped file count
as ours. Reading the header here lets an error name the file and the tensor.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax.checkpoints import hf_config, orbax_store
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.model import quant, weights
from entropix_jax.model.weights import Weights

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
SCRATCH = 1 << 20  # bytes; what is read at once stays in a core's cache while it is transposed
THREADS = min(8, os.cpu_count() or 1)  # that read and transpose
TILE = 16  # rows; more, a power of two apart, would push each other out of the cache
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Place = Callable[[str], jax.sharding.Sharding | None]  # field -> where it lives

# -- what a folder holds -------------------------------------------------------------------------


def _fill(file: RawIOBase, at: int, into: memoryview) -> int:
  """Read from this place on until the memory is full; how many bytes there were."""
  file.seek(at)
  done = 0
  while got := file.readinto(into[done:]):
    done += got
  return done


class Stored(NamedTuple):
  """Where one tensor lies and what its header says of it."""

  path: Path
  dtype: str
  shape: tuple[int, ...]
  begin: int  # bytes from the start of the file
  end: int

  def read(self, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
    """Fill an array with these rows and columns, in one read for all that lie side by side.

    Raises:
      UserError: the file has become shorter or cannot be read.
    """
    size = DTYPES[self.dtype].itemsize
    width = self.shape[-1] if len(self.shape) > 1 else 1
    first = np.flatnonzero(np.diff(cols_Y, prepend=-2) != 1)  # of every run of columns
    begin = (rows_X[:, None] * width + cols_Y[first]).ravel()
    length = np.tile(np.diff(first, append=len(cols_Y)), len(rows_X))
    first = np.flatnonzero(np.append(True, begin[1:] != begin[:-1] + length[:-1]))
    begins = (self.begin + begin[first] * size).tolist()
    lengths = (np.add.reduceat(length, first) * size).tolist()
    into = memoryview(into_XY.reshape(-1).view(np.uint8))
    try:
      with open(self.path, "rb", buffering=0) as file:
        if len(begins) > 1 and hasattr(os, "posix_fadvise"):
          # The kernel reads ahead only what lies in a row: pieces came three times slower from disk.
          for at, n in zip(begins, lengths, strict=True):
            os.posix_fadvise(file.fileno(), at, n, os.POSIX_FADV_WILLNEED)
        for at, n in zip(begins, lengths, strict=True):
          if _fill(file, at, into[:n]) < n:
            raise UserError(f"{self.path} was cut short while it was read; download it again.")
          into = into[n:]
    except OSError as error:
      raise UserError(f"{self.path} cannot be read ({error.strerror}).") from None


def _existing(folder: str | os.PathLike) -> Path:
  folder = Path(folder).expanduser()
  orbax_store.found(folder)  # refuses one that is unfinished
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; point config.checkpoint at a Hugging Face folder.")
  return folder


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
  """The safetensors files of a folder, and the index's tensor name -> file name if it has one."""
  if (folder / INDEX).exists():
    index = hf_config.read_json(folder / INDEX)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
      raise UserError(f"{folder / INDEX} has no weight_map of file names; download it again.")
    for name, file in listed.items():
      if not (folder / file).is_file():
        raise UserError(
          f"{folder / file} does not exist, yet {INDEX} puts {name} there; download it again."
        )
    return [folder / file for file in sorted(set(listed.values()))], listed
  paths = [folder / MODEL] if (folder / MODEL).exists() else sorted(folder.glob("*.safetensors"))
  if paths:
    return paths, {}
  endings = {path.suffix for path in folder.iterdir()}
  if ".npy" in endings:
    raise UserError(f"{folder} holds *.npy files; convert them with scripts/convert_npy.py first.")
  for ending in sorted(endings & {".bin", ".pth", ".pt"}):
    raise UserError(f"{folder} holds *{ending} but no *.safetensors; convert it to safetensors.")
  raise UserError(f"{folder} holds no *.safetensors; the download may be incomplete.")


def _header(path: Path) -> dict[str, Stored]:
  """The tensors of one safetensors file, each known to lie within it."""
  try:
    size = path.stat().st_size
    with open(path, "rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(start - 8) if start <= size else "")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
      begin, end = (start + int(offset) for offset in entry["data_offsets"])
      shape = tuple(map(int, entry["shape"]))
      tensors[name] = Stored(path, str(entry["dtype"]), shape, begin, end)
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None
  except (ValueError, TypeError, KeyError, AttributeError):
    raise UserError(
      f"{path} is truncated in its header or is no safetensors file; download it again."
    ) from None
  for name, at in tensors.items():
    if not start <= at.begin <= at.end <= size:
      raise UserError(
        f"{path} is truncated: {name} lies at bytes {at.begin} to {at.end} of {size}; "
        "download it again."
      )
  return tensors


def check(folder: str | os.PathLike, cfg: ModelConfig) -> dict[str, Stored]:
  """Every tensor that `cfg` needs, by name, after all that can be said without reading one.

  Empty for an orbax folder, whose checks are `orbax_store.check`.

  Raises:
    UserError: one sentence with file and tensor, for whatever is missing, cut short, misshapen,
      unexpected or of an unsupported type.
  """
  folder = _existing(folder)
  if orbax_store.found(folder):
    orbax_store.check(folder, cfg)
    return {}
  paths, listed = _files(folder)
  found: dict[str, Stored] = {}
  for path in paths:
    for name, at in _header(path).items():
      if name in found:
        raise UserError(f"{name} is in both {found[name].path} and {path}; remove one of the two.")
      found[name] = at
  for name, file in listed.items():
    if name not in found or found[name].path != folder / file:
      raise UserError(f"{folder / file} lacks {name}, which {INDEX} puts there; download it again.")

  wanted = {name: weights.hf_shape(cfg, field) for (_, field), name in weights.sources(cfg).items()}
  where = folder / INDEX if listed else paths[0] if len(paths) == 1 else folder
  for name, shape in wanted.items():
    if name not in found:
      untied = " and config.json does not tie it to the embedding" * (name == "lm_head.weight")
      raise UserError(f"{where} lacks the tensor {name}{untied}; the download may be incomplete.")
    at = found[name]
    if at.dtype not in DTYPES:
      raise UserError(
        f"{at.path} stores {name} as {at.dtype}; supported are {', '.join(DTYPES)}, "
        "so use a checkpoint that is not quantized."
      )
    if at.shape != shape:
      raise UserError(
        f"{at.path} has {name} of shape {list(at.shape)} where config.json asks for {list(shape)}."
      )
    if at.end - at.begin != math.prod(shape) * DTYPES[at.dtype].itemsize:
      raise UserError(
        f"{at.path} gives {name} {at.end - at.begin} bytes, which is not what {at.dtype} "
        f"{list(shape)} takes; download it again."
      )
  for name in sorted(found.keys() - wanted.keys()):
    # Old exports store the rope table; some tied ones store the embedding a second time as head.
    if not name.endswith(".rotary_emb.inv_freq") and not (name == "lm_head.weight" and cfg.tied):
      raise UserError(
        f"{found[name].path} has the tensor {name}, which a Llama of this config.json does not use."
      )
  return {name: found[name] for name in wanted}


# -- reading -------------------------------------------------------------------------------------


def load_config(folder: str | os.PathLike) -> ModelConfig:
  """The model that a folder's `config.json` describes.

  Raises:
    UserError: no such folder or file, or an attribute that this engine does not support.
  """
  folder = _existing(folder)
  if not (folder / "config.json").exists():
    _files(folder)  # says more precisely what else lies there
  return hf_config.from_hf(hf_config.read_json(folder / "config.json"), str(folder / "config.json"))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory that a CPU device can take over without a copy: its buffers start at multiples of 64."""
  size = math.prod(shape) * dtype.itemsize
  space = np.empty(size + 64, np.uint8)
  start = -space.ctypes.data % 64
  return space[start : start + size].view(dtype).reshape(shape)


def _block(
  cfg: ModelConfig, field: str, source: Stored, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
  """A block of a field from the bytes that make it and no others."""
  cuts = [
    np.arange(*piece.indices(n)) for piece, n in zip(index, weights.shape(cfg, field), strict=True)
  ]
  block = _aligned(tuple(map(len, cuts)), dtype)
  # In Hugging Face's order a block is a table whose rows are reads; a norm is one of one column.
  if block.ndim == 1:
    table_XY, rows_X, cols_Y = block[:, None], *cuts, np.zeros(1, int)
  else:
    table_XY = weights.hf_order(field, block)
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


def _move(at: Stored, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
  """Read rows and columns into an array of any type that may lie transposed."""
  stored = DTYPES[at.dtype]
  if stored == into_XY.dtype and into_XY.flags.c_contiguous:
    at.read(rows_X, cols_Y, into_XY)
    return
  from_XY = np.empty(into_XY.shape, stored)
  at.read(rows_X, cols_Y, from_XY)
  # As plain bits NumPy moves numbers faster than as the float types it borrows.
  bits = np.dtype(f"u{into_XY.itemsize}")
  from_XY = from_XY.astype(into_XY.dtype, copy=False).view(bits)
  into_XY = into_XY.view(bits)
  for r in range(0, len(rows_X), TILE):
    into_XY[r : r + TILE] = from_XY[r : r + TILE]


def load_field(
  cfg: ModelConfig,
  field: str,
  source: Stored,
  dtype: Any,
  place: jax.sharding.Sharding | None = None,
) -> jax.Array:
  """One array from the tensor of `weights.sources`, straight to where it lives.

  Host memory holds the blocks of this process's devices once, and not beside a CPU device's.
  """
  shape, blocks = weights.shape(cfg, field), {}

  def block(index):
    # Replicas ask for the same slices once per device.
    key = tuple((cut.start, cut.stop) for cut in index)
    if key not in blocks:
      blocks[key] = _block(cfg, field, source, np.dtype(dtype), index)
    return blocks[key]

  if place is None:
    leaf = jax.device_put(block((slice(None),) * len(shape)))
  else:
    leaf = jax.make_array_from_callback(shape, place, block)
  return leaf.block_until_ready()  # else host copies of later fields pile up behind the transfer


def load_weights(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  dtype: Any,
  sharding: Place | None = None,
  progress: Progress | None = None,
  quantised: bool = False,
  finish: Callable | None = None,
) -> Weights:
  """Weights from the files of a folder, each field straight to its devices and dtype.

  All of `check` comes before the first allocation. Beside the weights, host memory holds one field
  at most (of an orbax folder one layer), and of everything only the blocks of this process's devices.

  Args:
    dtype: of every leaf that is not quantised.
    sharding: field name ("wq_DQ") -> where it lives; None, or a None answer, is the default device.
    progress: called after each field with (bytes read, bytes in all), in bytes of the files.
    quantised: make every matrix a `quant.Int8` of its bfloat16, field by field.
    finish: (field name, array) -> the leaf, of what is not quantised, on its devices; `products.flip`
      is one.

  Raises:
    UserError: whatever `check` refuses; of an orbax folder also a damaged file or another dtype.
  """
  folder = _existing(folder)
  if orbax_store.found(folder):
    return orbax_store.load(folder, cfg, dtype, sharding, progress, quantised, finish)
  stored = check(folder, cfg)
  table = weights.sources(cfg)
  total = sum(at.end - at.begin for at in stored.values())
  done = 0

  def make(layer, field):
    nonlocal done
    source = stored[table[layer, field]]
    place = sharding(field) if sharding else None
    if quantised and quant.inputs(field):
      whole = load_field(cfg, field, source, jnp.bfloat16, place)
      leaf = jax.block_until_ready(quant.quantise(field, whole))
    else:
      leaf = load_field(cfg, field, source, dtype, place)
      leaf = finish(field, leaf) if finish else leaf
    done += source.end - source.begin
    if progress:
      progress(done, total)
    return leaf

  return weights.assemble(cfg, make)


def stop_ids(folder: str | os.PathLike) -> tuple[int, ...]:
  """The ids that end an answer: `eos_token_id` of generation_config.json, else of config.json.

  Empty when neither file names one.
  """
  folder = _existing(folder)
  for path in (folder / "generation_config.json", folder / "config.json"):
    known = hf_config.read_json(path) if path.exists() else {}
    ids = known.get("eos_token_id") if isinstance(known, dict) else known
    if ids is None:
      continue
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
      raise UserError(f"{path} sets eos_token_id to {ids!r}; expected token ids.")
    return tuple(ids)
  return ()


# -- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
  """A file that appears under its name only once it is complete."""
  part = path.with_name(path.name + ".part")
  try:
    with open(part, "wb") as file:
      yield file
    os.replace(part, path)
  except OSError as error:
    raise UserError(f"{path} cannot be written ({error.strerror}).") from None
  finally:
    part.unlink(missing_ok=True)


def write(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  hf: dict[str, Any],
  dtype: Any,
  tensor: Callable[[int | None, str], np.ndarray],
  progress: Progress | None = None,
) -> None:
  """Write `model.safetensors`, then `config.json`; one field is in memory at a time.

  Args:
    hf: what config.json will say; must read back as `cfg`.
    dtype: float64, float32, float16 or bfloat16.
    tensor: (layer, field) -> the Hugging Face tensor of `weights.sources`.

  Raises:
    UserError: the folder holds other weights that a reader would prefer, or cannot be written.
  """
  if hf_config.from_hf(hf) != cfg:
    raise UserError("The keys for config.json describe another model than the weights.")
  folder, dtype = Path(folder).expanduser(), np.dtype(dtype)
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
  with _whole(folder / MODEL) as file:
    file.write(len(head).to_bytes(8, "little") + head)
    for (layer, field), name in weights.sources(cfg).items():
      array = tensor(layer, field)
      if array.shape != header[name]["shape"]:
        raise UserError(f"{name} has shape {array.shape}; expected {header[name]['shape']}.")
      file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8))
      if progress:
        progress(header[name]["data_offsets"][1], end)
  with _whole(folder / "config.json") as file:
    file.write(json.dumps(hf, indent=2).encode() + b"\n")


def save(
  folder: str | os.PathLike, cfg: ModelConfig, params: Weights, dtype: Any, **extra: Any
) -> None:
  """Write weights as a Hugging Face folder; `extra` are more config.json keys (eos_token_id=2)."""

  def tensor(layer, field):
    leaf = getattr(params if layer is None else params.layers[layer], field)
    return weights.hf_order(field, np.asarray(leaf))

  write(folder, cfg, hf_config.to_hf(cfg, dtype=np.dtype(dtype).name, **extra), dtype, tensor)
