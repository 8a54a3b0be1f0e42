"""Checkpoints come in whole, to their device and dtype, or are refused in one sentence."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, program, refusal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from entropix_jax import config, memory
from entropix_jax.checkpoints import checkpoint, hf_config, safetensors_file
from entropix_jax.errors import UserError
from entropix_jax.model import llama, quant, weights

CFG = config.ModelConfig(
  vocab=37, width=20, ffn=28, layers=2, heads=6, kv_heads=3, head_dim=10,
  rope=config.RopeConfig(kind="llama3", factor=4.0, original_max_position=16),
)  # fmt: skip
TIED = dataclasses.replace(CFG, tied=True)
KEY = "model.layers.1.self_attn.k_proj.weight"
# Ours and Hugging Face's names, by hand and not from weights.py; theirs are stored transposed.
LAYER = {
  "attn_norm_D": "input_layernorm", "wq_DQ": "self_attn.q_proj", "wk_DJ": "self_attn.k_proj",
  "wv_DJ": "self_attn.v_proj", "wo_QD": "self_attn.o_proj", "wgate_DF": "mlp.gate_proj",
  "ffn_norm_D": "post_attention_layernorm", "wup_DF": "mlp.up_proj", "wdown_FD": "mlp.down_proj",
}  # fmt: skip
BIASES = {
  "bq_Q": "self_attn.q_proj", "bk_J": "self_attn.k_proj", "bv_J": "self_attn.v_proj",
  "bo_D": "self_attn.o_proj", "bgate_F": "mlp.gate_proj", "bup_F": "mlp.up_proj", "bdown_D": "mlp.down_proj",
}  # fmt: skip
each_tying = pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
convert_npy = program("scripts/convert_npy.py")


def run(*arguments):
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def fails(words, *arguments):
  """A program ends with these words and no stack trace."""
  done = run(*arguments)
  assert done.returncode == 2
  assert words in done.stderr
  assert "Traceback" not in done.stderr


def hf_tensors(cfg, dtype=np.float32, seed=0):
  """Random Hugging Face tensors."""
  rng = np.random.default_rng(seed)
  size = {"D": cfg.width, "Q": cfg.heads * cfg.head_dim, "F": cfg.ffn}
  size["J"] = cfg.kv_heads * cfg.head_dim
  shapes = {"model.embed_tokens": (cfg.vocab, cfg.width), "model.norm": (cfg.width,)}
  if not cfg.tied:
    shapes["lm_head"] = (cfg.vocab, cfg.width)
  for i in range(cfg.layers):
    for field, name in LAYER.items():
      axes = field.split("_")[-1]
      shapes[f"model.layers.{i}.{name}"] = tuple(size[axis] for axis in reversed(axes))
  shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
  for i in range(cfg.layers * cfg.mlp_bias):
    for field, name in BIASES.items():
      shapes[f"model.layers.{i}.{name}.bias"] = (size[field.split("_")[-1]],)
  return {name: (rng.normal(size=shape) * 0.3).astype(dtype) for name, shape in shapes.items()}


def put_config(folder, cfg=CFG, **extra):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf_config.to_hf(cfg, **extra)))


def put_folder(folder, cfg, tensors, files=1):
  """A Hugging Face folder as the safetensors library writes it, in several files with an index."""
  put_config(folder, cfg)
  if files == 1:
    safetensors.numpy.save_file(tensors, folder / checkpoint.MODEL)
    return folder
  weight_map = {}
  for i in range(files):
    name = f"model-{i + 1:05}-of-{files:05}.safetensors"
    part = dict(sorted(tensors.items())[i::files])
    safetensors.numpy.save_file(part, folder / name)
    weight_map |= dict.fromkeys(part, name)
  (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return folder


def expected(cfg, tensors):
  """Our arrays by plain NumPy: x @ ours must be x @ theirs.T."""
  names = {ours: f"{theirs}.weight" for ours, theirs in LAYER.items()}
  if cfg.mlp_bias:
    names |= {ours: f"{theirs}.bias" for ours, theirs in BIASES.items()}
  layers = tuple(
    weights.Layer(**{ours: tensors[f"model.layers.{i}.{x}"].T for ours, x in names.items()})
    for i in range(cfg.layers)
  )
  head_DV = None if cfg.tied else tensors["lm_head.weight"].T
  embed_VD, norm_D = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
  return weights.Weights(embed_VD=embed_VD, layers=layers, norm_D=norm_D, head_DV=head_DV)


def params_of(cfg, dtype=jnp.float32, seed=0):
  return jax.tree.map(jnp.asarray, expected(cfg, hf_tensors(cfg, dtype, seed)))


def int8_of(cfg, params, dtype):
  """What a load of these weights as int8 gives: matrices of the bfloat16, norms in `dtype`."""

  def make(layer, field):
    leaf = getattr(params if layer is None else params.layers[layer], field)
    if leaf.ndim == 1:
      return jnp.asarray(leaf, dtype)
    return quant.quantise(field, jnp.asarray(leaf, jnp.bfloat16))

  return weights.assemble(cfg, make)


def assert_same(ours, theirs, dtype=None):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert isinstance(a, jax.Array)
    assert a.dtype == (dtype or b.dtype)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(a.dtype))


def refused(folder, cfg, *words):
  return refusal(words, checkpoint.load_weights, folder, cfg, jnp.float32)


# -- in and out ----------------------------------------------------------------------------------


@each_tying
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_loads_what_the_library_wrote(tmp_path, cfg, files, stored):
  tensors = hf_tensors(cfg, stored)
  put_folder(tmp_path, cfg, tensors, files)
  assert checkpoint.load_config(tmp_path) == cfg
  for dtype in (jnp.float32, jnp.bfloat16):
    assert_same(checkpoint.load_weights(tmp_path, cfg, dtype), expected(cfg, tensors), dtype)


def test_files_without_an_index(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG), files=3)
  (tmp_path / checkpoint.INDEX).unlink()
  assert_same(checkpoint.load_weights(tmp_path, CFG, jnp.float32), expected(CFG, hf_tensors(CFG)))


@each_tying
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load(tmp_path, cfg, dtype):
  params = params_of(cfg, dtype, seed=3)
  folder = tmp_path / "new" / "folder"
  checkpoint.save(folder, cfg, params, dtype, eos_token_id=[3, 5])
  assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
  assert checkpoint.load_config(folder) == cfg
  assert checkpoint.stop_ids(folder) == (3, 5)
  assert_same(checkpoint.load_weights(folder, cfg, dtype), params)
  head = (folder / "model.safetensors").read_bytes()[:8]
  assert int.from_bytes(head, "little") % 8 == 0  # so that mapped tensors are aligned
  by_library = safetensors.numpy.load_file(folder / "model.safetensors")
  assert_same(jax.tree.map(jnp.asarray, expected(cfg, by_library)), params)


def test_save_replaces_but_does_not_mix(tmp_path):
  checkpoint.save(tmp_path, CFG, params_of(CFG), jnp.float32)
  other = params_of(CFG, seed=1)
  checkpoint.save(tmp_path, CFG, other, jnp.float32)
  assert_same(checkpoint.load_weights(tmp_path, CFG, jnp.float32), other)
  put_folder(tmp_path, CFG, hf_tensors(CFG), files=2)
  with pytest.raises(UserError, match="belongs to another checkpoint"):
    checkpoint.save(tmp_path, CFG, other, jnp.float32)


def test_save_leaves_nothing_half_written(tmp_path):
  params = params_of(CFG)
  broken = dataclasses.replace(params, norm_D=jnp.ones(CFG.width + 1))
  checkpoint.save(tmp_path, CFG, params, jnp.float32)
  with pytest.raises(UserError, match=r"model\.norm\.weight"):
    checkpoint.save(tmp_path, CFG, broken, jnp.float32)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
  assert_same(checkpoint.load_weights(tmp_path, CFG, jnp.float32), params)
  (tmp_path / "file").touch()
  for folder, extra, words in (
    (tmp_path, {"rms_norm_eps": 0.5}, "another model"),
    (tmp_path, {"logit_scale": 0.5}, "logit_scale"),
    (tmp_path / "file" / "folder", {}, "cannot be made"),
  ):
    refusal([words], checkpoint.save, folder, CFG, params, jnp.float32, **extra)


def test_progress_ends_at_the_size_of_the_tensors(tmp_path):
  tensors, seen = hf_tensors(CFG, jnp.bfloat16), []
  put_folder(tmp_path, CFG, tensors)
  checkpoint.load_weights(tmp_path, CFG, jnp.float32, progress=lambda *at: seen.append(at))
  total = sum(array.nbytes for array in tensors.values())
  assert seen[-1] == (total, total)
  assert seen == sorted(seen)
  assert len(seen) == 3 + 9 * CFG.layers


def test_weights_outlive_their_file(tmp_path):
  """No leaf may be a window onto the file, which others may cut short or overwrite in place."""
  tensors = hf_tensors(CFG)
  put_folder(tmp_path, CFG, tensors)
  params = checkpoint.load_weights(tmp_path, CFG, jnp.float32)
  path = tmp_path / checkpoint.MODEL
  with open(path, "r+b") as file:
    file.write(b"\xff" * path.stat().st_size)
  assert_same(params, expected(CFG, tensors))


# -- onto a mesh ---------------------------------------------------------------------------------

MESHED = config.ModelConfig(
  vocab=48, width=16, ffn=32, layers=2, heads=8, kv_heads=4, head_dim=6,
  attention_bias=True, mlp_bias=True,
)  # fmt: skip


HEADS = {"Q": "model", "J": "model", "F": "model", "V": "model"}
WIDTH = {"D": ("data", "model"), "2": None}


def placed(data, model, axes=HEADS):
  """A sharding on such a mesh, by field; `axes` maps the letters of arrays to those of the mesh."""
  devices = jax.devices()[: data * model]
  names = ("data", "model")
  mesh = jax.make_mesh((data, model), names, axis_types=(AxisType.Auto,) * 2, devices=devices)
  return lambda field: NamedSharding(mesh, PartitionSpec(*map(axes.get, weights.letters(field))))


def assert_placed(layer, sharding):
  """The int8 matrices of a layer lie as asked for, their scales with the outputs."""
  for field in ("wk_DJ", "wdown_FD"):
    leaf, scale = getattr(layer, field), sharding(f"_{quant.outputs(field)}")
    assert leaf.q.sharding.is_equivalent_to(sharding(field), leaf.q.ndim)
    assert leaf.scale.sharding.is_equivalent_to(scale, leaf.scale.ndim)


@pytest.mark.parametrize(
  "axes",
  [
    {"N": "model", "K": "model", "F": "model", "V": "model"},
    {"D": "data", "V": "model", "2": "model"},
    {"D": ("data", "model")},
    {},
  ],
  ids=["heads", "width and pair", "both", "replicated"],
)
def test_sharded_load_is_the_same(tmp_path, axes):
  tensors = hf_tensors(MESHED)
  put_folder(tmp_path, MESHED, tensors, files=2)
  sharding = placed(4, 2, axes)
  params = checkpoint.load_weights(tmp_path, MESHED, jnp.float32, sharding)
  assert_same(params, expected(MESHED, tensors))
  for field in (*weights.layer_sources(MESHED), *weights.TOP_SOURCES):
    leaf = getattr(params if field in weights.TOP_SOURCES else params.layers[1], field)
    assert leaf.sharding.is_equivalent_to(sharding(field), leaf.ndim)


@pytest.fixture
def reads(monkeypatch):
  """(first byte, bytes) of everything that is read from safetensors files after their headers."""
  seen = []
  real = safetensors_file._fill

  def fill(file, at, into):
    seen.append((at, len(into)))
    return real(file, at, into)

  monkeypatch.setattr(safetensors_file, "_fill", fill)
  return seen


def test_identical_slices_are_read_once(tmp_path, reads):
  put_folder(tmp_path, MESHED, hf_tensors(MESHED))
  checkpoint.load_weights(tmp_path, MESHED, jnp.float32, placed(4, 2, {"F": "model"}))
  assert sum(n for _, n in reads) == 4 * weights.count(MESHED)


def indices(cfg, field, kind):
  """Blocks of a field: those of the devices of a mesh, or some at random."""
  shape = weights.shape(cfg, field)
  if kind == "random":
    rng = np.random.default_rng(len(field))
    for _ in range(8):
      cuts = [np.sort(rng.choice(size + 1, 2, replace=False)).tolist() for size in shape]
      yield tuple(slice(*cut) for cut in cuts)
    return
  place = placed(*kind)(field)
  yield from {str(i): i for i in place.devices_indices_map(shape).values()}.values()


@pytest.mark.parametrize(
  "kind",
  [(1, 2), (2, 4), (1, 1), (2, 4, WIDTH), "random"],
  ids=["1x2", "2x4", "1x1", "width", "random"],
)
@pytest.mark.parametrize("scratch", [1, 100, 1 << 20])
def test_a_block_is_made_of_its_own_bytes(tmp_path, monkeypatch, reads, kind, scratch):
  """It is that of the whole array, and nothing else was read for it, nor anything twice."""
  tensors = hf_tensors(MESHED, jnp.bfloat16)
  stored = checkpoint.check_files(put_folder(tmp_path, MESHED, tensors), MESHED)
  whole = expected(MESHED, tensors)
  monkeypatch.setattr(checkpoint, "SCRATCH", scratch)
  monkeypatch.setattr(checkpoint, "TILE", 3)
  for (layer, field), name in weights.sources(MESHED).items():
    at = stored[name]
    truth = np.asarray(getattr(whole if layer is None else whole.layers[layer], field))
    for index in indices(MESHED, field, kind):
      for dtype in (jnp.bfloat16, jnp.float32):
        reads.clear()
        block = checkpoint._block(
          weights.shape(MESHED, field), field, at, np.dtype(dtype), index, False, memory.Memory()
        )
        np.testing.assert_array_equal(block, truth[index].astype(dtype), err_msg=field)
        assert block.dtype == dtype
        assert block.ctypes.data % 64 == 0
        assert sum(n for _, n in reads) == truth[index].nbytes
        assert all(b + n <= c for (b, n), (c, _) in itertools.pairwise(sorted(reads)))
        assert all(at.begin <= b and b + n <= at.end for b, n in reads)


def test_rows_that_touch_are_read_at_once(tmp_path, reads):
  stored = checkpoint.check_files(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  at = stored["model.layers.0.mlp.up_proj.weight"]
  index = (slice(None), slice(4, 12))
  checkpoint._block(
    (CFG.width, CFG.ffn), "wup_DF", at, np.dtype(np.float32), index, False, memory.Memory()
  )
  assert reads == [(at.begin + 4 * 20 * 4, 8 * 20 * 4)]


def test_the_device_takes_the_memory_over(tmp_path, monkeypatch):
  """On a CPU, no second copy is made: what was read is the array."""
  stored = checkpoint.check_files(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  source = stored[weights.sources(CFG)[0, "wdown_FD"]]
  blocks = []
  real = checkpoint._block
  monkeypatch.setattr(checkpoint, "_block", lambda *args: blocks.append(real(*args)) or blocks[-1])
  leaf = checkpoint.load_field(CFG, "wdown_FD", source, jnp.float32)
  if leaf.device.platform != "cpu":
    pytest.skip("only a CPU shares its memory")
  assert leaf.unsafe_buffer_pointer() == blocks[0].ctypes.data


def test_a_file_cut_short_meanwhile(tmp_path):
  stored = checkpoint.check_files(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  path = tmp_path / checkpoint.MODEL
  last = max(stored.values(), key=lambda at: at.end)
  os.truncate(path, last.end - 1)
  rows, cols = last.shape[0], last.shape[-1] if len(last.shape) > 1 else 1
  with pytest.raises(UserError, match=r"model\.safetensors was cut short"):
    last.read(np.arange(rows), np.arange(cols), np.empty((rows, cols), np.float32))


@pytest.mark.parametrize("place", [None, (2, 4)])
def test_int8_is_that_of_the_bfloat16(tmp_path, place):
  tensors = hf_tensors(MESHED)
  put_folder(tmp_path, MESHED, tensors)
  sharding = place and placed(*place)
  params = checkpoint.load_weights(tmp_path, MESHED, jnp.float32, sharding, quantised=True)
  assert_same(params, int8_of(MESHED, expected(MESHED, tensors), jnp.float32))
  if place:
    assert_placed(params.layers[1], sharding)


def test_a_place_may_be_left_to_the_default(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG))
  params = checkpoint.load_weights(tmp_path, CFG, jnp.float32, lambda field: None)
  assert_same(params, expected(CFG, hf_tensors(CFG)))


# -- FP8 -----------------------------------------------------------------------------------------

BIG = config.ModelConfig(
  vocab=48, width=136, ffn=272, layers=2, heads=8, kv_heads=4, head_dim=34
)  # fmt: skip


def fp8_tensors(cfg, kind, scale_type=np.float32):
  """(what a folder holds, what it stands for): each way in which published folders scale FP8 weights."""
  rng = np.random.default_rng(1)
  stored, truth = {}, hf_tensors(cfg, jnp.bfloat16)
  for name, array in truth.items():
    stored[name] = array
    if "_proj" not in name or (kind == "some rows" and ".0." in name):
      continue
    out, width = array.shape
    blocks = (-(-out // 128), -(-width // 128))
    shapes = {"scalar": (), "one": (1,), "row": (out,), "blocks": blocks}
    scale = rng.uniform(0.001, 0.002, shapes.get(kind, (out, 1))).astype(scale_type)
    stored[name] = (array.astype(np.float32) * 300).clip(-448, 448).astype(jnp.float8_e4m3fn)
    stored[name + ("_scale_inv" if kind == "blocks" else "_scale")] = scale
    each = scale.astype(np.float32)
    if kind == "blocks":
      each = each.repeat(128, 0).repeat(128, 1)[:out, :width]
    truth[name] = stored[name].astype(np.float32) * (each[:, None] if kind == "row" else each)
  return stored, truth


@pytest.mark.parametrize("place", [None, WIDTH, HEADS], ids=["whole", "width", "heads"])
@pytest.mark.parametrize("kind", ["scalar", "one", "rows", "some rows", "row", "blocks"])
def test_fp8_is_weight_times_scale(tmp_path, monkeypatch, kind, place):
  monkeypatch.setattr(checkpoint, "SCRATCH", 1 << 14)
  stored, truth = fp8_tensors(BIG, kind, jnp.bfloat16 if kind == "row" else np.float32)
  unused = {
    "model.layers.0.self_attn.q_proj.input_scale": np.ones(1, np.float32),
    "model.layers.0.self_attn.k_proj.input_scale_ub": np.ones(1, np.float32),
    "model.layers.1.self_attn.k_scale": np.ones((), np.float32),
    "model.layers.1.self_attn.v_proj.output_scale": np.ones(1, np.float32),
  }
  put_folder(tmp_path, BIG, stored | unused, files=2)
  sharding = place and placed(2, 2, place)
  for dtype in (jnp.float32, jnp.bfloat16):
    params = checkpoint.load_weights(tmp_path, BIG, dtype, sharding)
    assert_same(params, expected(BIG, truth), dtype)
  params = checkpoint.load_weights(tmp_path, BIG, jnp.float32, sharding, quantised=True)
  assert_same(params, int8_of(BIG, expected(BIG, truth), jnp.float32))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"_scale": None}, [KEY, "lacks its scale", f"{KEY}_scale"]),
    ({"_scale": np.ones((136, 3), np.float32)}, [KEY, "[136, 3]", "[136, 136]"]),
    ({"_scale": np.ones((1, 1, 1), np.float32)}, [KEY, "[1, 1, 1]"]),
    ({"_scale": np.ones(1, np.int32)}, [f"{KEY}_scale as I32"]),
    ({"_scale_inv": np.ones(1, np.float32)}, [f"{KEY}_scale_inv"]),
    ({"_zero_point": np.ones(1, np.int8)}, [f"{KEY}_zero_point"]),
    ({"": np.ones((136, 136), np.float32)}, [f"{KEY}_scale", "not use"]),
    ({"": np.ones((136, 136), jnp.float8_e5m2)}, [KEY, "F8_E5M2", "F8_E4M3"]),
  ],
)
def test_fp8_without_its_scale_is_refused(tmp_path, change, words):
  stored, _ = fp8_tensors(BIG, "one")
  stored |= {f"{KEY}{end}": array for end, array in change.items()}
  put_folder(tmp_path, BIG, {name: array for name, array in stored.items() if array is not None})
  refused(tmp_path, BIG, tmp_path / checkpoint.MODEL, *words)


# -- where it is ---------------------------------------------------------------------------------


def test_a_hub_cache_that_may_not_be_written(tmp_path):
  """A snapshot of links into blobs, at a path with spaces and letters of other scripts."""
  folder, blobs = tmp_path / "snapshots" / "späces 模型", tmp_path / "blobs"
  folder.parent.mkdir()
  put_folder(folder, CFG, hf_tensors(CFG), files=3)
  blobs.mkdir()
  for i, path in enumerate(sorted(folder.iterdir())):
    path.rename(blobs / str(i))
    path.symlink_to(pathlib.Path("../../blobs") / str(i))
  folder.chmod(0o555)
  cfg = checkpoint.load_config(folder)
  assert_same(checkpoint.load_weights(folder, cfg, jnp.float32), expected(CFG, hf_tensors(CFG)))
  assert not checkpoint.stored_int8(folder)
  folder.chmod(0o755)
  next(iter(blobs.glob("1"))).unlink()  # a link that leads nowhere
  refused(folder, CFG, "model-00001-of-00003.safetensors does not exist", checkpoint.INDEX)


# -- what is refused -----------------------------------------------------------------------------


def test_missing_folder(tmp_path):
  for read in (checkpoint.load_config, checkpoint.stop_ids):
    refusal(["nowhere is not a folder"], read, tmp_path / "nowhere")
  refused(tmp_path / "nowhere", CFG, tmp_path / "nowhere")


@pytest.mark.parametrize(
  ("file", "words"),
  [
    (None, ["no *.safetensors"]),
    ("pytorch_model.bin", ["*.bin", "safetensors"]),
    ("consolidated.00.pth", ["*.pth", "safetensors"]),
    ("norm.weight.npy", ["*.npy", "scripts/convert_npy.py"]),
  ],
)
def test_folder_without_safetensors(tmp_path, file, words):
  if file:
    (tmp_path / file).touch()
  message = refused(tmp_path, CFG, tmp_path, *words)
  assert refusal([], checkpoint.load_config, tmp_path) == message


def test_config_alone_is_enough_for_load_config_which_names_its_file(tmp_path):
  put_config(tmp_path)
  assert checkpoint.load_config(tmp_path) == CFG
  refused(tmp_path, CFG, "no *.safetensors")
  put_config(tmp_path, hidden_act="gelu")
  refusal([tmp_path / "config.json"], checkpoint.load_config, tmp_path)


@pytest.mark.parametrize(
  ("cfg", "tensor", "words"),
  [
    (CFG, {KEY: None}, [KEY, "lacks"]),
    (CFG, {KEY: np.zeros((30, 20), np.int8)}, [KEY, "I8", "BF16"]),
    (TIED, {}, ["lm_head.weight", "does not tie"]),
  ],
  ids=["missing", "unsupported", "no head"],
)
def test_a_tensor_is_named_before_any_is_read(tmp_path, monkeypatch, cfg, tensor, words):
  monkeypatch.setattr(safetensors_file.Stored, "read", lambda at, *_: pytest.fail(f"{at} was read"))
  tensors = hf_tensors(cfg) | tensor
  put_folder(tmp_path, cfg, {name: array for name, array in tensors.items() if array is not None})
  refused(tmp_path, CFG, tmp_path / checkpoint.MODEL, *words)


def test_wrong_shape(tmp_path):
  tensors = hf_tensors(CFG)
  tensors[KEY] = np.ascontiguousarray(tensors[KEY].T)
  put_folder(tmp_path, CFG, tensors, files=2)
  message = refused(tmp_path, CFG, KEY, "[20, 30]", "[30, 20]")
  listed = json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"]
  assert listed[KEY] in message


def test_unexpected_tensor(tmp_path):
  tensors = hf_tensors(CFG) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(60, np.float32)}
  put_folder(tmp_path, CFG, tensors)
  refused(tmp_path, CFG, checkpoint.MODEL, "q_proj.bias")
  put_folder(tmp_path, CFG, hf_tensors(dataclasses.replace(CFG, layers=3)))
  refused(tmp_path, CFG, checkpoint.MODEL, "model.layers.2.")


def test_harmless_extras(tmp_path):
  extra = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32),
    "lm_head.weight": np.zeros((37, 20), np.float32),
  }
  put_folder(tmp_path, TIED, hf_tensors(TIED) | extra)
  params = checkpoint.load_weights(tmp_path, TIED, jnp.float32)
  assert_same(params, expected(TIED, hf_tensors(TIED)))


@pytest.fixture
def one_file(tmp_path):
  """(its path, its bytes, its header, where the header ends) of a whole model.safetensors."""
  put_folder(tmp_path, CFG, hf_tensors(CFG))
  path = tmp_path / checkpoint.MODEL
  whole = path.read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8:start])
  header.pop("__metadata__", None)
  return path, whole, header, start


def test_truncated_anywhere(tmp_path, one_file):
  """At every length the file is refused by name, and by tensor once the header is whole."""
  path, whole, header, start = one_file
  for length in (0, 5, 8, 100, start - 1):
    path.write_bytes(whole[:length])
    refused(tmp_path, CFG, path, "truncated in its header")
  for length in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1):
    path.write_bytes(whole[:length])
    message = refused(tmp_path, CFG, path, "truncated", length)
    assert any(name in message for name in header)


def test_the_tensor_named_is_one_that_was_cut(tmp_path, one_file):
  path, whole, header, _ = one_file
  path.write_bytes(whole[:-1])
  refused(tmp_path, CFG, max(header, key=lambda name: header[name]["data_offsets"][1]))


@pytest.mark.parametrize(
  ("part", "values"),
  [
    ("data_offsets", [None, ["a", "b"], [-8, 0], [8, 0], [0, 8]]),
    ("shape", [None, ["x"]]),
    ("dtype", [None, ["F32"], "F64"]),
  ],
)
def test_bent_header(tmp_path, one_file, part, values):
  path, whole, header, start = one_file
  entries = [header[KEY] | {part: value} for value in values]
  entries.append({k: v for k, v in header[KEY].items() if k != part})
  for entry in entries:
    head = json.dumps(header | {KEY: entry}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + whole[start:])
    refused(tmp_path, CFG, path)


def test_no_safetensors_file_at_all(tmp_path):
  lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
  for content in (lfs, b"\2" + bytes(7) + b"[]"):
    (tmp_path / checkpoint.MODEL).write_bytes(content)
    refused(tmp_path, CFG, tmp_path / checkpoint.MODEL, "not a safetensors file")


def test_index_that_disagrees_with_its_files(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG), files=2)
  index = tmp_path / checkpoint.INDEX
  listed = json.loads(index.read_text())["weight_map"]
  one, two = sorted(set(listed.values()))
  wrong = two if listed[KEY] == one else one
  index.write_text(json.dumps({"weight_map": listed | {KEY: wrong}}))
  refused(tmp_path, CFG, wrong, KEY)
  for content in ("[]", "{}", '{"weight_map": {"a": 1}}', "{"):
    index.write_text(content)
    refused(tmp_path, CFG, index)
  index.write_text(json.dumps({"weight_map": listed}))
  (tmp_path / one).unlink()
  message = refused(tmp_path, CFG, one, checkpoint.INDEX)
  assert any(name in message for name, file in listed.items() if file == one)


def test_one_tensor_in_two_files(tmp_path):
  tensors = hf_tensors(CFG)
  put_folder(tmp_path, CFG, tensors)
  (tmp_path / checkpoint.MODEL).rename(tmp_path / "a.safetensors")
  safetensors.numpy.save_file({KEY: tensors[KEY]}, tmp_path / "b.safetensors")
  refused(tmp_path, CFG, KEY, "a.safetensors", "b.safetensors")


# -- stop ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("generation", "hf", "ids"),
  [
    ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
    ({"eos_token_id": 7}, {}, (7,)),
    ({}, {"eos_token_id": 9}, (9,)),
    (None, {"eos_token_id": [9, 10]}, (9, 10)),
    (None, {}, ()),
  ],
)
def test_stop_ids(tmp_path, generation, hf, ids):
  (tmp_path / "config.json").write_text(json.dumps(hf))
  if generation is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  assert checkpoint.stop_ids(tmp_path) == ids


def test_stop_ids_refuses(tmp_path):
  for wrong in ("</s>", [1, "2"], True, -1, 1.5):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    refusal(["generation_config.json sets eos_token_id"], checkpoint.stop_ids, tmp_path)


# -- memory --------------------------------------------------------------------------------------

PEAK = """
import sys
import jax
import jax.numpy as jnp
from entropix_jax.checkpoints import checkpoint

def kib(name):
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) for line in file if line.startswith(name))

cfg = checkpoint.load_config(sys.argv[1])
jnp.zeros(3).block_until_ready()
with open("/proc/self/clear_refs", "w") as file:
  file.write("5")  # the high-water mark starts again from here
before = kib("VmRSS")
params = checkpoint.load_weights(sys.argv[1], cfg, jnp.float32)
print((kib("VmHWM") - before) * 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc")
def test_peak_memory_is_the_weights_and_little_more(tmp_path):
  """Resident pages, those of the mapped file included: no second copy of the model at any time."""
  cfg = config.ModelConfig(
    vocab=2048, width=512, ffn=1024, layers=16, heads=8, kv_heads=4, head_dim=64
  )  # fmt: skip
  put_folder(tmp_path, cfg, hf_tensors(cfg, jnp.bfloat16))
  done = run("-c", PEAK, tmp_path)
  assert done.returncode == 0, done.stderr
  grown, target = map(int, done.stdout.split())
  assert target > 150e6
  assert grown < target + 40e6


# -- entropix's folders --------------------------------------------------------------------------


def meta_rows(rows, heads):
  """Hugging Face's rotary layout to Meta's by moving single rows: i -> 2i, i + H/2 -> 2i + 1."""
  head_dim = rows.shape[0] // heads
  out = np.empty_like(rows)
  for head in range(heads):
    for i in range(head_dim // 2):
      out[head * head_dim + 2 * i] = rows[head * head_dim + i]
      out[head * head_dim + 2 * i + 1] = rows[head * head_dim + i + head_dim // 2]
  return out


def put_npy(folder, cfg, tensors):
  """What entropix's downloader leaves behind."""
  folder.mkdir()
  names = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
  }  # fmt: skip
  for name, array in tensors.items():
    heads = {"q_proj": cfg.heads, "k_proj": cfg.kv_heads}.get(name.split(".")[-2])
    array = meta_rows(array, heads) if heads else array
    name = name.replace("model.layers.", "layers.")
    for theirs, short in names.items():
      name = name.replace(theirs, short)
    np.save(folder / f"{name}.npy", array)
  return folder


@each_tying
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_npy_comes_back_as_it_was(tmp_path, cfg, dtype):
  tensors = hf_tensors(cfg, dtype)
  head = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if cfg.tied else {}
  source = put_npy(tmp_path / "npy", cfg, tensors | head)
  convert_npy.convert(source, tmp_path / "hf", hf_config.to_hf(cfg))
  found = safetensors.numpy.load_file(tmp_path / "hf" / checkpoint.MODEL)
  assert found.keys() == tensors.keys()
  for name, array in tensors.items():
    assert found[name].dtype == dtype
    np.testing.assert_array_equal(found[name], array, err_msg=name)

  put_folder(tmp_path / "first", cfg, tensors)
  token_BT = jnp.arange(12).reshape(2, 6) % cfg.vocab
  logits = []
  for folder in ("first", "hf"):
    params = checkpoint.load_weights(
      tmp_path / folder, checkpoint.load_config(tmp_path / folder), jnp.float32
    )
    logits.append(llama.unembed(params, llama.forward(cfg, params, token_BT)[0]))
  np.testing.assert_array_equal(*logits)


def npy_refused(tmp_path, words, cfg=CFG, **flags):
  arguments = tmp_path / "npy", tmp_path / "hf", hf_config.to_hf(cfg)
  refusal([words], convert_npy.convert, *arguments, **flags)


def test_npy_refusals(tmp_path):
  npy_refused(tmp_path, "npy is not a folder")
  source = put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  path = source / "layers.1.attention.wk.weight.npy"
  good = path.read_bytes()

  for length in (0, 20, len(good) - 1):
    path.write_bytes(good[:length])
    npy_refused(tmp_path, path)
  for array, words in (
    (np.zeros((20, 30), np.float32), f"{path} has shape [20, 30]"),
    (np.zeros((30, 20), np.float32), f"{path} holds float32"),
    (np.zeros((30, 20), np.int16), f"{path} holds int16"),
    (np.array([{}], object), path),
  ):
    np.save(path, array, allow_pickle=True)
    npy_refused(tmp_path, words)
  path.unlink()
  npy_refused(tmp_path, f"{path} does not exist")
  path.write_bytes(good)

  extra = source / "layers.2.ffn_norm.weight.npy"
  shutil.copy(source / "norm.weight.npy", extra)
  npy_refused(tmp_path, f"{extra} is none of")
  extra.unlink()
  npy_refused(tmp_path, "output.weight.npy is not the embedding", TIED)
  npy_refused(tmp_path, "no biases", MESHED)
  assert not (tmp_path / "hf").exists()


def test_npy_overwrites_only_when_told(tmp_path):
  put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "note.txt").write_text("mine")
  npy_refused(tmp_path, "--overwrite")
  arguments, seen = (tmp_path / "npy", tmp_path / "hf", hf_config.to_hf(CFG)), []
  convert_npy.convert(*arguments, overwrite=True, progress=lambda *at: seen.append(at))
  assert seen[-1][0] == seen[-1][1]
  assert {path.name for path in (tmp_path / "hf").iterdir()} == {
    "note.txt", "config.json", checkpoint.MODEL,
  }  # fmt: skip
  # The folder holds another checkpoint's index now, which a reader would follow.
  put_folder(tmp_path / "hf", CFG, hf_tensors(CFG), files=2)
  npy_refused(tmp_path, "belongs to another", overwrite=True)


def test_npy_command_line(tmp_path):
  source = put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  put_config(tmp_path)
  script = (ROOT / "scripts/convert_npy.py", f"--source={source}", f"--out={tmp_path / 'hf'}")
  done = run(*script, f"--hf_config={tmp_path / 'config.json'}")
  assert done.returncode == 0, done.stderr
  assert checkpoint.load_config(tmp_path / "hf") == CFG
  for wrong, words in {
    ("--shape=llama3_1b", "--overwrite"): "tok_embeddings.weight.npy has shape",
    (): "--shape or as --hf_config",
    ("--hf_config=nowhere.json",): "nowhere.json does not exist",
  }.items():
    fails(words, *script, *wrong)
