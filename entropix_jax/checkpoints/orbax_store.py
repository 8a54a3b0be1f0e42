"""Checkpoint folders of orbax arrays: written item by item, read straight into shards.

Why: each layer, and each array outside the layers, is an orbax item of its own. So a conversion that
was killed resumes with the next item, and host memory holds one item at a time. A manifest lists every
file with its size and checksum, because orbax reads changed bytes without an error and casts to any
dtype it is asked for. Until the last item is written the folder has another name, and nothing loads it.

    FOLDER/config.json, tokenizer files    copied from the source; from a GGUF file, tokenizer.gguf
    FOLDER/orbax.json                      the manifest
    FOLDER/arrays/embed_VD, layer_000, ... the items: field -> array, or field -> {q, scale} if int8
"""

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from entropix_jax.checkpoints import hf_config
from entropix_jax.config import ModelConfig
from entropix_jax.errors import UserError
from entropix_jax.files import PART, whole
from entropix_jax.model import quant, weights
from entropix_jax.model.weights import Weights

MANIFEST = "orbax.json"
ARRAYS = "arrays"
FORMAT = 1
DTYPES = ("bfloat16", "float32", "int8")
CHUNK = 8 << 20  # bytes; arrays are stored in chunks of at most this size, which are read whole
AGAIN = "convert the checkpoint again"


def item_name(layer: int | None, field: str) -> str:
  """The name of the item that holds a field; `layer` is None outside the layers."""
  return field if layer is None else f"layer_{layer:03}"


def stored_dtype(dtype: str, field: str) -> np.dtype:
  """The dtype of a field before quantisation; in an int8 model, norms and biases are float32 and stay so."""
  if dtype == "int8":
    return np.dtype(jnp.bfloat16 if quant.inputs(field) else np.float32)
  return np.dtype(dtype)


def _fields(cfg: ModelConfig) -> dict[str, list[tuple[int | None, str]]]:
  """Item name -> the (layer, field) pairs it holds, in the order in which weights are read."""
  items: dict[str, list[tuple[int | None, str]]] = {}
  order: list[tuple[int | None, str]] = []
  weights.assemble(cfg, lambda layer, field: order.append((layer, field)))
  for key in order:
    items.setdefault(item_name(*key), []).append(key)
  return items


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
  import orbax.checkpoint as ocp  # takes half a second, which Hugging Face folders are spared

  with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
    yield checkpointer


# -- the manifest ----------------------------------------------------------------------------------


def found(folder: Path) -> bool:
  """Whether the folder holds orbax arrays. Raises UserError when its conversion is unfinished."""
  part = folder if folder.name.endswith(PART) else _part(folder)
  if (part / MANIFEST).exists() and (part == folder or not (folder / "config.json").exists()):
    raise _unfinished(part)
  return (folder / MANIFEST).exists()


def _part(folder: Path) -> Path:
  """The folder's name until it is complete, beside the folder itself and not beside a link to it."""
  folder = folder.resolve()
  return folder.parent / (folder.name + PART)  # with_name() fails on "/"


def _unfinished(part: Path) -> UserError:
  return UserError(
    f"{part} is an unfinished conversion; run scripts/convert_checkpoint.py again with the same "
    "flags to complete it."
  )


def _read(folder: Path) -> dict[str, Any]:
  path = folder / MANIFEST
  manifest = hf_config.read_json(path)
  try:
    if manifest["format"] != FORMAT:
      raise UserError(f"{path} has the unknown format {manifest['format']!r}; {AGAIN}.")
    good = manifest["dtype"] in DTYPES and isinstance(manifest["source"], str)
    for files in manifest["items"].values():
      good &= all(type(n) is int for pair in files.values() for n in pair)
  except (KeyError, TypeError, AttributeError):
    good = False
  if not good:
    raise UserError(f"{path} is damaged; {AGAIN}.")
  return manifest


def dtype(folder: Path) -> str:
  """The type of a folder's weights, one of DTYPES. Raises UserError if its manifest is damaged."""
  return _read(folder)["dtype"]


def _facts(path: Path) -> list[int] | None:
  """[size in bytes, CRC-32] of a file; None if it cannot be read."""
  buffer = memoryview(bytearray(1 << 20))
  size = crc = 0
  try:
    with open(path, "rb", buffering=0) as file:
      while n := file.readinto(buffer):
        size, crc = size + n, zlib.crc32(buffer[:n], crc)
  except OSError:
    return None
  return [size, crc]


def _damage(folder: Path, item: str, files: dict[str, list[int]]) -> Path | None:
  """The first file of an item that is not as written, or None; each process reads a share of them."""
  n = jax.process_count()
  bad = len(files)
  for i, (name, facts) in enumerate(sorted(files.items())):
    if i % n == jax.process_index() and facts != _facts(folder / ARRAYS / item / name):
      bad = i
      break
  if n > 1:
    from jax.experimental import multihost_utils

    # All processes must stop together, or the others would wait forever for the one that stopped.
    bad = int(multihost_utils.process_allgather(np.int32(bad)).min())
  return None if bad == len(files) else folder / ARRAYS / item / sorted(files)[bad]


def check_files(folder: Path, cfg: ModelConfig) -> dict[str, Any]:
  """The manifest of a folder, after checking that all items of `cfg` are there with full file sizes.

  Raises:
    UserError: names the file that is missing, truncated or not of this model.
  """
  manifest = _read(folder)
  wanted = _fields(cfg)
  for item in wanted:
    if item not in manifest["items"]:
      raise _unfinished(folder)
  for item, files in manifest["items"].items():
    if item not in wanted:
      raise UserError(
        f"{folder} holds {item}, which the model of its config.json does not have; {AGAIN}."
      )
    for name, (size, _) in files.items():
      path = folder / ARRAYS / item / name
      if not path.is_file():
        raise UserError(f"{path} is missing; {AGAIN}.")
      if path.stat().st_size != size:
        raise UserError(f"{path} has {path.stat().st_size} of its {size} bytes; {AGAIN}.")
  return manifest


# -- reading -----------------------------------------------------------------------------------


def _abstract(cfg: ModelConfig, dtype: str, field: str, place: jax.sharding.Sharding | None) -> Any:
  """A field as orbax stores it: ShapeDtypeStructs with shape, dtype and target sharding."""
  place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  letters, shape = weights.letters(field), weights.shape(cfg, field)
  if dtype != "int8" or not quant.inputs(field):
    return jax.ShapeDtypeStruct(shape, stored_dtype(dtype, field), sharding=place)
  out = quant.outputs(field)
  spread = place
  if isinstance(place, NamedSharding):
    spec = dict(zip(letters, place.spec, strict=False))
    spread = NamedSharding(place.mesh, PartitionSpec(*map(spec.get, out)))
  return {
    "q": jax.ShapeDtypeStruct(shape, jnp.int8, sharding=place),
    "scale": jax.ShapeDtypeStruct(tuple(map(cfg.size, out)), jnp.float32, sharding=spread),
  }


def _restore(checkpointer: Any, path: Path, tree: dict[str, Any]) -> dict[str, Any]:
  import orbax.checkpoint as ocp

  def facts(arrays):
    return {
      jax.tree_util.keystr(at, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
      for at, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }

  wanted, there = facts(tree), facts(checkpointer.metadata(path).item_metadata.tree)
  for name in sorted(wanted.keys() | there.keys()):
    if wanted.get(name) != there.get(name):
      ours, theirs = (
        f"{each[name][1]} {list(each[name][0])}" if name in each else "nothing"
        for each in (wanted, there)
      )
      raise UserError(f"{path} holds {theirs} as {name}, but the model has {ours}; {AGAIN}.")
  args = ocp.checkpoint_utils.construct_restore_args(tree)
  return checkpointer.restore(path, args=ocp.args.PyTreeRestore(tree, restore_args=args))


def load(
  folder: Path,
  cfg: ModelConfig,
  dtype: Any,
  sharding: Callable[[str], jax.sharding.Sharding | None] | None = None,
  progress: Callable[[int, int], None] | None = None,
  quantised: bool = False,
  finish: Callable | None = None,
) -> Weights:
  """Load weights into any sharding, one item at a time; arguments as in `checkpoint.load_weights`.

  Raises:
    UserError: anything `check_files` refuses, or a damaged file.
  """
  manifest = check_files(folder, cfg)
  kind, dtype = manifest["dtype"], np.dtype(dtype)
  quantised = quantised or kind == "int8"
  sizes = {
    item: sum(size for size, _ in files.values()) for item, files in manifest["items"].items()
  }
  total, done = sum(sizes.values()), 0
  fields, items = _fields(cfg), {}

  def leaf(field, array):
    if isinstance(array, dict):
      return quant.Int8(**array)
    if not quantised:
      array = array.astype(dtype)
      return finish(field, array) if finish else array
    if not quant.inputs(field):
      return array.astype(dtype)
    return jax.block_until_ready(quant.quantise(field, array.astype(jnp.bfloat16)))

  def make(layer, field):
    nonlocal done
    item = item_name(layer, field)
    if item not in items:
      items.clear()
      damaged = _damage(folder, item, manifest["items"][item])
      if damaged:
        raise UserError(f"{damaged} is damaged; {AGAIN}.")
      tree = {
        name: _abstract(cfg, kind, name, sharding(name) if sharding else None)
        for _, name in fields[item]
      }
      items[item] = _restore(checkpointer, folder / ARRAYS / item, tree)
      done += sizes[item]
      if progress:
        progress(done, total)
    return leaf(field, items[item].pop(field))

  with _checkpointer() as checkpointer:
    return weights.assemble(cfg, make)


# -- writing -------------------------------------------------------------------------------------


def write(
  folder: Path,
  cfg: ModelConfig,
  dtype: str,
  source: str,
  make: Callable[[int | None, str], Any],
  files: dict[str, Path | bytes],
  progress: Callable[[int, int], None] | None = None,
) -> None:
  """Write a folder, or resume one whose writing was interrupted.

  Args:
    dtype: one of DTYPES.
    source: identifies the checkpoint that is converted, so that two are never mixed.
    make: (layer, field) -> array of `stored_dtype`, quantised if dtype is int8.
    files: file name -> what to copy into the folder.
    progress: called with (parameters written, total parameters) after each item.

  Raises:
    UserError: the folder exists and is not empty, an unfinished one has another source or dtype,
      the disk may be too small, or a file cannot be written.
  """
  part = _part(folder)
  try:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
      raise UserError(f"{folder} exists and is not an empty folder; choose another or delete it.")
    part.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT, "dtype": dtype, "source": source, "items": {}}
    if (part / MANIFEST).exists():
      begun = _read(part)
      if {**begun, "items": {}} != manifest:
        raise UserError(f"{part} was begun from another checkpoint or dtype; finish or delete it.")
      manifest["items"] = {
        item: written
        for item, written in begun["items"].items()
        if not _damage(part, item, written)
      }
    elif {path.name for path in part.iterdir()} - {MANIFEST + PART}:
      raise UserError(f"{part} is in the way and is not an unfinished conversion; delete it.")
    _put(part / MANIFEST, manifest)
    for name, content in files.items():
      (part / name).parent.mkdir(exist_ok=True)
      if isinstance(content, bytes):
        (part / name).write_bytes(content)
      else:
        shutil.copyfile(content, part / name)
    (part / ARRAYS).mkdir(exist_ok=True)
    for path in (part / ARRAYS).iterdir():  # items whose writing was interrupted
      if path.name not in manifest["items"]:
        shutil.rmtree(path)
    _write_items(part, cfg, manifest, make, progress)
    os.replace(part, folder.resolve())
  except OSError as error:
    raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from None


def _put(path: Path, manifest: dict[str, Any]) -> None:
  with whole(path) as file:
    file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def _write_items(part, cfg, manifest, make, progress) -> None:
  import orbax.checkpoint as ocp

  fields = _fields(cfg)
  sizes = {
    item: sum(math.prod(weights.shape(cfg, field)) for _, field in keys)
    for item, keys in fields.items()
  }
  total, done = sum(sizes.values()), 0
  # An upper bound, since arrays may compress; orbax's own message for a full disk is long and late.
  need = np.dtype(manifest["dtype"]).itemsize * sum(
    size for item, size in sizes.items() if item not in manifest["items"]
  )
  free = shutil.disk_usage(part).free
  if need > free:
    raise UserError(
      f"{part} may need {need / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB; free some space."
    )
  with _checkpointer() as checkpointer:
    for item, keys in fields.items():
      if item not in manifest["items"]:
        tree = {}
        for layer, field in keys:
          leaf = make(layer, field)
          tree[field] = dict(vars(leaf)) if isinstance(leaf, quant.Int8) else leaf
        args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree)
        path = part / ARRAYS / item
        try:
          checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=args))
        except ValueError as error:  # from tensorstore, e.g. a full disk; the cause comes last
          cause = str(error).rsplit(": ", 1)[-1].split(" [")[0]
          raise UserError(f"{path} cannot be written ({cause}).") from None
        manifest["items"][item] = {
          file.relative_to(path).as_posix(): _facts(file)
          for file in sorted(path.rglob("*"))
          if file.is_file()
        }
        _put(part / MANIFEST, manifest)
      done += sizes[item]
      if progress:
        progress(done, total)
