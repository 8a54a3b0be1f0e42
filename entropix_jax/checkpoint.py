"""Hugging Face checkpoint folders: read by memory map, one field at a time, and written back.

Why: a safetensors file is eight bytes of header length (little-endian), a JSON header and raw bytes.
Mapping each tensor for itself and letting it go keeps host memory at the weights plus one field, and
reading the header here lets an error name the file and the tensor; the safetensors library copies
what it reads and names no tensor when a file is cut short.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entropix_jax import config, weights
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.weights import Weights

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

# -- what a folder holds -------------------------------------------------------------------------


class Stored(NamedTuple):
  """Where one tensor lies and what its header says of it."""

  path: Path
  dtype: str
  shape: tuple[int, ...]
  begin: int  # bytes from the start of the file
  end: int

  def read(self) -> np.ndarray:
    """A read-only view of the file; its pages go back when the last reference does."""
    return np.memmap(self.path, DTYPES[self.dtype], "r", self.begin, self.shape)


def _existing(folder: str | os.PathLike) -> Path:
  folder = Path(folder).expanduser()
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; point config.checkpoint at a Hugging Face folder.")
  return folder


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
  """The safetensors files of a folder, and the index's tensor name -> file name if it has one."""
  if (folder / INDEX).exists():
    index = config.read_json(folder / INDEX)
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

  Raises:
    UserError: one sentence with file and tensor, for whatever is missing, cut short, misshapen,
      unexpected or of an unsupported type.
  """
  folder = _existing(folder)
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

  wanted = {
    name: weights.hf_shape(cfg, field)
    for (_, field), names in weights.sources(cfg).items()
    for name in names
  }
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
  return config.from_hf(config.read_json(folder / "config.json"), str(folder / "config.json"))


def load_weights(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  dtype: Any,
  sharding: Callable[[str], jax.sharding.Sharding | None] | None = None,
  progress: Progress | None = None,
) -> Weights:
  """Weights from the safetensors files of a folder, each field straight to its device and dtype.

  All of `check` comes before the first allocation. Beside the weights, host memory holds one field
  in `dtype` and the mapped pages of the tensors that make it.

  Args:
    dtype: of every leaf.
    sharding: field name ("wq_DNH") -> where it lives; None, or a None answer, is the default device.
    progress: called after each field with (bytes read, bytes in all), in bytes of the files.

  Raises:
    UserError: whatever `check` refuses.
  """
  stored = check(folder, cfg)
  table = weights.sources(cfg)
  total = sum(at.end - at.begin for at in stored.values())
  done = 0

  def make(layer, field):
    nonlocal done
    sources = [stored[name] for name in table[layer, field]]
    tensors = [at.read() for at in sources]
    blocks = {}

    def block(index):
      # Replicas ask for the same slices once per device.
      key = tuple((cut.start, cut.stop) for cut in index)
      if key not in blocks:
        blocks[key] = weights.from_hf_tensors(cfg, field, tensors, dtype, index)
      return blocks[key]

    place = sharding(field) if sharding else None
    if place is None:
      leaf = jax.device_put(weights.from_hf_tensors(cfg, field, tensors, dtype))
    else:
      leaf = jax.make_array_from_callback(weights.shape(cfg, field), place, block)
    leaf.block_until_ready()  # else host copies of later fields pile up behind the transfer
    done += sum(at.end - at.begin for at in sources)
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
    known = config.read_json(path) if path.exists() else {}
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
  tensors: Callable[[int | None, str], list[np.ndarray]],
  progress: Progress | None = None,
) -> None:
  """Write `model.safetensors`, then `config.json`; one field is in memory at a time.

  Args:
    hf: what config.json will say; must read back as `cfg`.
    dtype: float64, float32, float16 or bfloat16.
    tensors: (layer, field) -> the Hugging Face tensors of `weights.sources`, in their order.

  Raises:
    UserError: the folder holds other weights that a reader would prefer, or cannot be written.
  """
  if config.from_hf(hf) != cfg:
    raise UserError("The keys for config.json describe another model than the weights.")
  folder, dtype = Path(folder).expanduser(), np.dtype(dtype)
  for path in (folder / INDEX, *sorted(folder.glob("*.safetensors"))):
    if path.exists() and path.name != MODEL:
      raise UserError(f"{path} belongs to another checkpoint; write to an empty folder.")
  header, end = {}, 0
  for (_, field), names in weights.sources(cfg).items():
    shape = weights.hf_shape(cfg, field)
    for name in names:
      begin, end = end, end + math.prod(shape) * dtype.itemsize
      kind = next(kind for kind, known in DTYPES.items() if known == dtype)
      header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
  head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
  head += b" " * (-len(head) % 8)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder} cannot be made ({error.strerror}).") from None
  with _whole(folder / MODEL) as file:
    file.write(len(head).to_bytes(8, "little") + head)
    for (layer, field), names in weights.sources(cfg).items():
      for name, tensor in zip(names, tensors(layer, field), strict=True):
        if tensor.shape != header[name]["shape"]:
          raise UserError(f"{name} has shape {tensor.shape}; expected {header[name]['shape']}.")
        file.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8))
        if progress:
          progress(header[name]["data_offsets"][1], end)
  with _whole(folder / "config.json") as file:
    file.write(json.dumps(hf, indent=2).encode() + b"\n")


def save(
  folder: str | os.PathLike, cfg: ModelConfig, params: Weights, dtype: Any, **extra: Any
) -> None:
  """Write weights as a Hugging Face folder; `extra` are more config.json keys (eos_token_id=2)."""

  def tensors(layer, field):
    leaf = getattr(params if layer is None else params.layers[layer], field)
    return weights.to_hf_tensors(field, np.asarray(leaf))

  write(folder, cfg, config.to_hf(cfg, dtype=np.dtype(dtype).name, **extra), dtype, tensors)
