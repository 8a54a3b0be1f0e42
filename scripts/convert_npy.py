"""Convert a folder of *.npy files from entropix to a Hugging Face folder.

    python scripts/convert_npy.py --source=weights/1B-Instruct --out=llama3_1b --shape=llama3_1b

Why: entropix's downloader permuted the rows of wq and wk from Hugging Face's rotary layout (channel i
pairs with i + H/2) to Meta's (channel 2i pairs with 2i + 1), which the shapes do not reveal, and stored
bfloat16 as two bytes without a type. This script undoes both; no value changes.
"""

import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from entropix_jax import config
from entropix_jax.checkpoints import checkpoint, hf_config
from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.model import weights

_FLAGS = commands.Flags()
_SOURCE = _FLAGS.string("source", None, "Folder of *.npy files.")
_OUT = _FLAGS.string("out", None, "Folder to write.")
_SHAPE = _FLAGS.enum("shape", None, sorted(config.PRESETS), "The model, by name.")
_HF_CONFIG = _FLAGS.string("hf_config", None, "The model's config.json, in place of --shape.")
_OVERWRITE = _FLAGS.bool("overwrite", False, "Write into a folder that is not empty.")

TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
IN_LAYER = {
  "input_layernorm": "attention_norm",
  "self_attn.q_proj": "attention.wq",
  "self_attn.k_proj": "attention.wk",
  "self_attn.v_proj": "attention.wv",
  "self_attn.o_proj": "attention.wo",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "feed_forward.w1",
  "mlp.down_proj": "feed_forward.w2",
  "mlp.up_proj": "feed_forward.w3",
}


def npy_name(hf_name: str) -> str:
  """The file of a Hugging Face tensor: "lm_head.weight" -> "output.weight.npy"."""
  stem = hf_name.removesuffix(".weight")
  if stem not in TOP:
    layer, stem = stem.removeprefix("model.layers.").split(".", 1)
    return f"layers.{layer}.{IN_LAYER[stem]}.weight.npy"
  return f"{TOP[stem]}.weight.npy"


def read(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """The memory-mapped array of a file; two-byte values without a type become bfloat16."""
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist; the folder is incomplete or --shape is wrong."
    ) from None
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path} cannot be read as a .npy file ({error}).") from None
  if array.dtype == np.dtype("V2"):
    array = array.view(jnp.bfloat16)
  if array.dtype not in checkpoint.DTYPES.values():
    raise UserError(f"{path} holds {array.dtype}; expected bfloat16 or another float type.")
  if shape is not None and array.shape != shape:
    raise UserError(f"{path} has shape {list(array.shape)} where the model has {list(shape)}.")
  return array


def half_split(rows_OD: np.ndarray, head_dim: int) -> np.ndarray:
  """Permute the rows of wq or wk, shape (out, in), from Meta's rotary layout to Hugging Face's, per head.

  Within a head, rows 0, 2, 4, ... (the first of each pair) come first, then rows 1, 3, 5, ...
  """
  pairs = rows_OD.reshape(-1, head_dim // 2, 2, rows_OD.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows_OD.shape)


def convert(source: Path, out: Path, hf: dict, overwrite: bool = False, progress=None) -> None:
  """Write `out` from `source`; `hf` is the model's config.json."""
  cfg = hf_config.from_hf(hf)
  if cfg.attention_bias or cfg.mlp_bias:
    raise UserError(
      "entropix's files hold no biases, but this config.json asks for some; give another."
    )
  if not source.is_dir():
    raise UserError(f"{source} is not a folder; --source is the one with the *.npy files.")
  if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
    raise UserError(f"{out} is not an empty folder; add --overwrite, or choose another.")
  shape_of = {
    npy_name(name): weights.hf_shape(cfg, field)
    for (_, field), name in weights.sources(cfg).items()
  }
  for file, shape in shape_of.items():
    read(source / file, shape)
  embed = read(source / "tok_embeddings.weight.npy")
  dtype = embed.dtype
  for path in sorted(source.glob("*.npy")):
    if path.name == "output.weight.npy" and cfg.tied:
      if not np.array_equal(embed, read(path, embed.shape)):
        raise UserError(f"{path} is not the embedding, yet the model ties the two.")
    elif path.name not in shape_of:
      raise UserError(f"{path} is none of the model's tensors; --shape may be wrong.")
    elif read(path).dtype != dtype:
      raise UserError(f"{path} holds {read(path).dtype} where the embedding is {dtype}.")

  def tensor(layer, field):
    name = weights.sources(cfg)[layer, field]
    array = read(source / npy_name(name))
    rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
    return half_split(array, cfg.head_dim) if rotary else array

  checkpoint.write(out, cfg, hf, dtype, tensor, progress)


def run(argv: list[str]) -> None:
  """Convert the folder given by the flags."""
  commands.parse(argv, _FLAGS, __doc__)
  if not _SOURCE.value or not _OUT.value:
    raise UserError("Give --source=folder and --out=folder.")
  if (_SHAPE.value is None) == (_HF_CONFIG.value is None):
    raise UserError("Give the model either as --shape or as --hf_config.")
  if _SHAPE.value:
    hf = hf_config.to_hf(config.PRESETS[_SHAPE.value])
  elif Path(_HF_CONFIG.value).is_file():
    hf = hf_config.read_json(_HF_CONFIG.value)
  else:
    raise UserError(f"--hf_config={_HF_CONFIG.value} does not exist; give a config.json file.")
  with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:

    def progress(done, total):
      bar.total = total
      bar.update(done - bar.n)

    convert(
      Path(os.path.expanduser(_SOURCE.value)),
      Path(os.path.expanduser(_OUT.value)),
      hf,
      _OVERWRITE.value,
      progress,
    )
  print(commands.loads(_OUT.value))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
