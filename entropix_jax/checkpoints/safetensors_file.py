"""Safetensors files: which tensors a folder holds, and any block of one, read from its own bytes.

Why: a safetensors file is a header length (eight bytes, little-endian), a JSON header and raw bytes.
Parsing the header here lets an error name the file and the tensor, and reading rows and columns lets each
process read only what its devices hold. FP8 weights become float32 as they are read, times their scale.
"""

import json
import math
import os
import re
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from entropix_jax.checkpoints import hf_config
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.model import weights

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
FP8 = "F8_E4M3"
BLOCK = 128  # rows and columns that share a scale where scales are given by block
# The value of each FP8 code; looking it up is faster than converting.
_VALUES = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
# Scales of what is computed, not of weights: activations and the KV cache.
_UNUSED_SCALE = re.compile(r"\.(input|output|q|k|v|kv|prob|prob_output)_scale$|_scale_ub$")


def _fill(file: RawIOBase, at: int, into: memoryview) -> int:
  """Read from offset `at` until `into` is full or the file ends; returns the number of bytes read."""
  file.seek(at)
  done = 0
  while got := file.readinto(into[done:]):
    done += got
  return done


def read_cells(
  path: Path,
  start: int,
  size: int,
  width: int,
  rows_X: np.ndarray,
  cols_Y: np.ndarray,
  into_XY: np.ndarray,
) -> None:
  """Fill `into_XY` with rows and columns of a table in a file; adjacent cells are one read.

  Args:
    start: offset of the table in bytes.
    size: bytes per cell.
    width: cells per row.
    into_XY: any contiguous array of X * Y * `size` bytes.

  Raises:
    UserError: the file is shorter than its header says, or cannot be read.
  """
  first = np.flatnonzero(np.diff(cols_Y, prepend=-2) != 1)  # start of each run of columns
  begin = (rows_X[:, None] * width + cols_Y[first]).ravel()
  length = np.tile(np.diff(first, append=len(cols_Y)), len(rows_X))
  first = np.flatnonzero(np.append(True, begin[1:] != begin[:-1] + length[:-1]))
  begins = (start + begin[first] * size).tolist()
  lengths = (np.add.reduceat(length, first) * size).tolist()
  into = memoryview(into_XY.reshape(-1).view(np.uint8))
  try:
    with open(path, "rb", buffering=0) as file:
      if len(begins) > 1 and hasattr(os, "posix_fadvise"):
        # The kernel reads ahead only in sequence; without this, scattered disk reads took 3x as long.
        for at, n in zip(begins, lengths, strict=True):
          os.posix_fadvise(file.fileno(), at, n, os.POSIX_FADV_WILLNEED)
      for at, n in zip(begins, lengths, strict=True):
        if _fill(file, at, into[:n]) < n:
          raise UserError(f"{path} was cut short while it was read; download it again.")
        into = into[n:]
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None


class Stored(NamedTuple):
  """Where one tensor is stored, with its dtype and shape as the file's header gives them."""

  path: Path
  dtype: str
  shape: tuple[int, ...]
  begin: int  # bytes from the start of the file
  end: int

  def read(self, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
    """Fill `into_XY`, of the tensor's dtype, with these rows and columns. Raises as `read_cells`."""
    width = self.shape[-1] if len(self.shape) > 1 else 1
    read_cells(self.path, self.begin, _size(self.dtype), width, rows_X, cols_Y, into_XY)


class Scaled(NamedTuple):
  """An FP8 tensor and its scales, read as their product in float32."""

  codes: Stored
  scale: Stored  # one, one per row, one per BLOCK x BLOCK, or a mixture of these

  path = property(lambda self: self.codes.path)
  dtype = property(lambda self: "F32")
  shape = property(lambda self: self.codes.shape)
  begin = property(lambda self: self.codes.begin)
  end = property(lambda self: self.codes.end)

  def read(self, rows_X: np.ndarray, cols_Y: np.ndarray, into_XY: np.ndarray) -> None:
    """Fill `into_XY`, float32, with these rows and columns. Raises as `read_cells`."""
    codes_XY = np.empty(into_XY.shape, np.uint8)
    self.codes.read(rows_X, cols_Y, codes_XY)
    (rows, r), (cols, c) = (
      np.unique(at if n == size else at // BLOCK if n > 1 else at * 0, return_inverse=True)
      for at, n, size in zip((rows_X, cols_Y), _table(self.scale), _table(self.codes), strict=True)
    )
    scale = np.empty((len(rows), len(cols)), DTYPES[self.scale.dtype])
    self.scale.read(rows, cols, scale)
    scale = scale.astype(np.float32)[r]
    np.multiply(_VALUES.take(codes_XY), scale[:, c] if len(cols) > 1 else scale, out=into_XY)


Source = Stored | Scaled


def _size(dtype: str) -> int:
  return 1 if dtype == FP8 else DTYPES[dtype].itemsize


def _table(at: Stored) -> tuple[int, ...]:
  """Rows and columns of a tensor of at most two axes."""
  return (*at.shape, 1, 1)[: max(2, len(at.shape))]


def files_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
  """The safetensors files of a folder, and tensor name -> file name (empty without an index file)."""
  if (folder / INDEX).exists():
    index = hf_config.read_json(folder / INDEX)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
      raise UserError(f"{folder / INDEX} has no weight_map of file names; download it again.")
    for name, file in listed.items():
      if not (folder / file).is_file():
        raise UserError(
          f"{folder / file} does not exist, but {INDEX} says it holds {name}; download it again."
        )
    return [folder / file for file in sorted(set(listed.values()))], listed
  paths = [folder / MODEL] if (folder / MODEL).exists() else sorted(folder.glob("*.safetensors"))
  if not paths:
    check_folder(folder)
  return paths, {}


def check_folder(folder: Path) -> None:
  """Raises UserError if a folder holds no safetensors file, and says what it holds instead."""
  there = sorted(path.name for path in folder.iterdir())
  endings = {Path(name).suffix for name in there}
  if endings & {".safetensors"} or INDEX in there:
    return
  if ".npy" in endings:
    raise UserError(f"{folder} holds *.npy files; convert them with scripts/convert_npy.py first.")
  if ".gguf" in endings:
    names = ", ".join(name for name in there if name.endswith(".gguf"))
    raise UserError(f"{folder} holds {names}; point config.checkpoint at the file to use.")
  for ending in sorted(endings & {".bin", ".pth", ".pt"}):
    raise UserError(f"{folder} holds *{ending} but no *.safetensors; convert it to safetensors.")
  raise UserError(f"{folder} holds no *.safetensors; the download may be incomplete, so repeat it.")


def _header(path: Path) -> dict[str, Stored]:
  """The tensors of one safetensors file by name; each is checked to lie within the file."""
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
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
    raise UserError(
      f"{path} is truncated in its header or is not a safetensors file; download it again."
    ) from None
  for name, at in tensors.items():
    if not start <= at.begin <= at.end <= size:
      raise UserError(
        f"{path} is truncated: {name} is at bytes {at.begin} to {at.end} of {size}; "
        "download it again."
      )
  return tensors


def _check_type(name: str, at: Stored, codes: bool) -> None:
  """Raises UserError unless a tensor's type is supported and fits its size in bytes."""
  if at.dtype not in DTYPES and not (codes and at.dtype == FP8):
    raise UserError(
      f"{at.path} stores {name} as {at.dtype}, but only {', '.join(DTYPES)}{f' and {FP8}' * codes} are "
      "supported; use a checkpoint that is not quantized."
    )
  if at.end - at.begin != math.prod(at.shape) * _size(at.dtype):
    raise UserError(
      f"{at.path} stores {name} in {at.end - at.begin} bytes, which is not the size of "
      f"{at.dtype} {list(at.shape)}; download it again."
    )


def _scale(name: str, found: dict[str, Stored]) -> str:
  """The name of the tensor that scales an FP8 tensor, after all checks."""
  at = found[name]
  scale = next((n for n in (f"{name}_scale", f"{name}_scale_inv") if n in found), None)
  if scale is None:
    raise UserError(
      f"{at.path} stores {name} as {FP8} but lacks its scale {name}_scale; download it again."
    )
  _check_type(scale, found[scale], codes=False)
  parts = _table(found[scale])
  if len(parts) > 2 or any(
    n not in (1, size, -(-size // BLOCK)) for n, size in zip(parts, _table(at), strict=True)
  ):
    raise UserError(
      f"{found[scale].path} has {scale} of shape {list(found[scale].shape)}, which does not fit {name} of "
      f"shape {list(at.shape)}; scales are per tensor, per row or per block of {BLOCK} x {BLOCK}."
    )
  return scale


def tensors(folder: Path, cfg: ModelConfig) -> dict[str, Source]:
  """Every tensor that `cfg` needs, by name, after all checks that need no tensor data.

  Raises:
    UserError: names the file and the tensor that is missing, truncated, of the wrong shape,
      unexpected, of an unsupported type or without its scale.
  """
  paths, listed = files_of(folder)
  found: dict[str, Stored] = {}
  for path in paths:
    for name, at in _header(path).items():
      if name in found:
        raise UserError(f"{name} is in both {found[name].path} and {path}; remove one of the two.")
      found[name] = at
  for name, file in listed.items():
    if name not in found or found[name].path != folder / file:
      raise UserError(f"{folder / file} lacks {name}, which {INDEX} lists; download it again.")

  wanted = {name: weights.hf_shape(cfg, field) for (_, field), name in weights.sources(cfg).items()}
  where = folder / INDEX if listed else paths[0] if len(paths) == 1 else folder
  sources: dict[str, Source] = {}
  scales = set()
  for name, shape in wanted.items():
    if name not in found:
      untied = " and config.json does not tie it to the embedding" * (name == "lm_head.weight")
      raise UserError(f"{where} lacks the tensor {name}{untied}; download the checkpoint again.")
    at = sources[name] = found[name]
    if at.shape != shape:
      raise UserError(
        f"{at.path} has {name} of shape {list(at.shape)}, but config.json asks for {list(shape)}; "
        "use files of one checkpoint."
      )
    _check_type(name, at, codes=True)
    if at.dtype == FP8:
      scale = _scale(name, found)
      sources[name] = Scaled(at, found[scale])
      scales.add(scale)
  for name in sorted(found.keys() - wanted.keys() - scales):
    # Old exports store rope frequencies; some tied models store the embedding again as the head.
    harmless = name.endswith(".rotary_emb.inv_freq") or _UNUSED_SCALE.search(name)
    if not harmless and not (name.startswith("lm_head.weight") and cfg.tied):
      raise UserError(
        f"{found[name].path} has the tensor {name}, which a Llama model with this config.json does "
        "not use; use a plain Llama checkpoint."
      )
  return sources
