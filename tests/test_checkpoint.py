"""Checkpoints come in whole, to their device and dtype, or are refused in one sentence."""

import dataclasses
import importlib.util
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
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from entropix_jax import config
from entropix_jax.checkpoints import checkpoint, hf_config
from entropix_jax.errors import UserError
from entropix_jax.model import llama, quant, weights

ROOT = pathlib.Path(__file__).parents[1]
CFG = config.ModelConfig(
  vocab=37, width=20, ffn=28, layers=2, heads=6, kv_heads=3, head_dim=10,
  rope=config.RopeConfig(kind="llama3", factor=4.0, original_max_position=16),
)  # fmt: skip
TIED = dataclasses.replace(CFG, tied=True)
KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def convert_npy():
  """scripts/convert_npy.py as a module; its flags must not meet those of other programs."""
  spec = importlib.util.spec_from_file_location("convert_npy", ROOT / "scripts/convert_npy.py")
  module = importlib.util.module_from_spec(spec)
  before = set(flags.FLAGS)
  spec.loader.exec_module(module)
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  return module


def run(*arguments):
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def hf_tensors(cfg, dtype=np.float32, seed=0):
  """Random Hugging Face tensors, named and shaped by hand and not by weights.py."""
  rng = np.random.default_rng(seed)
  q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
  shapes = {
    "model.embed_tokens.weight": (cfg.vocab, cfg.width),
    "model.norm.weight": (cfg.width,),
  }
  if not cfg.tied:
    shapes["lm_head.weight"] = (cfg.vocab, cfg.width)
  for i in range(cfg.layers):
    shapes |= {
      f"model.layers.{i}.input_layernorm.weight": (cfg.width,),
      f"model.layers.{i}.post_attention_layernorm.weight": (cfg.width,),
      f"model.layers.{i}.self_attn.q_proj.weight": (q, cfg.width),
      f"model.layers.{i}.self_attn.k_proj.weight": (kv, cfg.width),
      f"model.layers.{i}.self_attn.v_proj.weight": (kv, cfg.width),
      f"model.layers.{i}.self_attn.o_proj.weight": (cfg.width, q),
      f"model.layers.{i}.mlp.gate_proj.weight": (cfg.ffn, cfg.width),
      f"model.layers.{i}.mlp.up_proj.weight": (cfg.ffn, cfg.width),
      f"model.layers.{i}.mlp.down_proj.weight": (cfg.width, cfg.ffn),
    }
  return {name: (rng.normal(size=shape) * 0.3).astype(dtype) for name, shape in shapes.items()}


def put_folder(folder, cfg, tensors, files=1):
  """A Hugging Face folder as the safetensors library writes it, in several files with an index."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf_config.to_hf(cfg)))
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
  layers = []
  for i in range(cfg.layers):
    at = f"model.layers.{i}."
    layers.append(
      weights.Layer(
        attn_norm_D=tensors[f"{at}input_layernorm.weight"],
        wq_DQ=tensors[f"{at}self_attn.q_proj.weight"].T,
        wk_DJ=tensors[f"{at}self_attn.k_proj.weight"].T,
        wv_DJ=tensors[f"{at}self_attn.v_proj.weight"].T,
        wo_QD=tensors[f"{at}self_attn.o_proj.weight"].T,
        ffn_norm_D=tensors[f"{at}post_attention_layernorm.weight"],
        wgate_DF=tensors[f"{at}mlp.gate_proj.weight"].T,
        wup_DF=tensors[f"{at}mlp.up_proj.weight"].T,
        wdown_FD=tensors[f"{at}mlp.down_proj.weight"].T,
      )
    )
  return weights.Weights(
    embed_VD=tensors["model.embed_tokens.weight"],
    layers=tuple(layers),
    norm_D=tensors["model.norm.weight"],
    head_DV=None if cfg.tied else tensors["lm_head.weight"].T,
  )


def params_of(cfg, dtype=jnp.float32, seed=0):
  return jax.tree.map(jnp.asarray, expected(cfg, hf_tensors(cfg, dtype, seed)))


def int8_of(cfg, params, dtype):
  """What a load of these weights as int8 gives: matrices of the bfloat16, norms in `dtype`."""

  def make(layer, field):
    leaf = getattr(params if layer is None else params.layers[layer], field)
    if "norm" in field:
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
  """The one sentence with which load_weights refuses a folder; it holds all the words."""
  with pytest.raises(UserError) as error:
    checkpoint.load_weights(folder, cfg, jnp.float32)
  message = str(error.value)
  assert "\n" not in message
  assert message.endswith(".")
  for word in words:
    assert str(word) in message, message
  return message


# -- in and out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
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


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load(tmp_path, cfg, dtype):
  params = params_of(cfg, dtype, seed=3)
  checkpoint.save(tmp_path / "new" / "folder", cfg, params, dtype, eos_token_id=[3, 5])
  folder = tmp_path / "new" / "folder"
  assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
  assert checkpoint.load_config(folder) == cfg
  assert checkpoint.stop_ids(folder) == (3, 5)
  assert_same(checkpoint.load_weights(folder, cfg, dtype), params)
  head = (folder / "model.safetensors").read_bytes()[:8]
  assert int.from_bytes(head, "little") % 8 == 0  # so that mapped tensors are aligned
  # The library reads it too.
  assert_same(
    jax.tree.map(
      jnp.asarray, expected(cfg, safetensors.numpy.load_file(folder / "model.safetensors"))
    ),
    params,
  )


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
  with pytest.raises(UserError, match="another model"):
    checkpoint.save(tmp_path, CFG, params, jnp.float32, rms_norm_eps=0.5)
  with pytest.raises(UserError, match="logit_scale"):
    checkpoint.save(tmp_path, CFG, params, jnp.float32, logit_scale=0.5)
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be made"):
    checkpoint.save(tmp_path / "file" / "folder", CFG, params, jnp.float32)


def test_progress_ends_at_the_size_of_the_tensors(tmp_path):
  tensors = hf_tensors(CFG, jnp.bfloat16)
  put_folder(tmp_path, CFG, tensors)
  seen = []
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
  vocab=48, width=16, ffn=32, layers=2, heads=8, kv_heads=4, head_dim=6
)  # fmt: skip


def mesh_of(data, model):
  if jax.device_count() < data * model:
    pytest.skip(f"needs {data * model} devices: set JAX_NUM_CPU_DEVICES=8")
  devices = jax.devices()[: data * model]
  return jax.make_mesh(
    (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
  )


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
  mesh = mesh_of(4, 2)
  tensors = hf_tensors(MESHED)
  put_folder(tmp_path, MESHED, tensors, files=2)
  specs = {}

  def sharding(field):
    specs[field] = NamedSharding(mesh, PartitionSpec(*map(axes.get, weights.letters(field))))
    return specs[field]

  params = checkpoint.load_weights(tmp_path, MESHED, jnp.float32, sharding)
  assert_same(params, expected(MESHED, tensors))
  assert specs.keys() == {*weights.LAYER_SOURCES, *weights.TOP_SOURCES}
  for field, place in specs.items():
    leaf = getattr(params if field in weights.TOP_SOURCES else params.layers[1], field)
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.fixture
def reads(monkeypatch):
  """(first byte, bytes) of everything that is read from safetensors files after their headers."""
  seen = []
  real = checkpoint._fill

  def fill(file, at, into):
    seen.append((at, len(into)))
    return real(file, at, into)

  monkeypatch.setattr(checkpoint, "_fill", fill)
  return seen


def test_identical_slices_are_read_once(tmp_path, reads):
  put_folder(tmp_path, MESHED, hf_tensors(MESHED))
  spec = {"F": "model"}
  checkpoint.load_weights(
    tmp_path,
    MESHED,
    jnp.float32,
    lambda field: NamedSharding(
      mesh_of(4, 2), PartitionSpec(*map(spec.get, weights.letters(field)))
    ),
  )
  assert sum(n for _, n in reads) == 4 * weights.count(MESHED)


def indices(cfg, field, kind):
  """Blocks of a field: those of the devices of a mesh, or some at random."""
  letters, shape = weights.letters(field), weights.shape(cfg, field)
  if kind == "random":
    rng = np.random.default_rng(len(field))
    for _ in range(8):
      cuts = [np.sort(rng.choice(size + 1, 2, replace=False)).tolist() for size in shape]
      yield tuple(slice(*cut) for cut in cuts)
    return
  axes, *mesh_shape = kind
  place = NamedSharding(mesh_of(*mesh_shape), PartitionSpec(*map(axes.get, letters)))
  yield from {str(i): i for i in place.devices_indices_map(shape).values()}.values()


HEADS = {"Q": "model", "J": "model", "F": "model", "V": "model"}
WIDTH = {"D": ("data", "model"), "2": None}


@pytest.mark.parametrize(
  "kind",
  [(HEADS, 1, 2), (HEADS, 2, 4), (HEADS, 1, 1), (WIDTH, 2, 4), "random"],
  ids=["1x2", "2x4", "1x1", "width", "random"],
)
@pytest.mark.parametrize("scratch", [1, 100, 1 << 20])
def test_a_block_is_made_of_its_own_bytes(tmp_path, monkeypatch, reads, kind, scratch):
  """It is that of the whole array, and nothing else was read for it, nor anything twice."""
  tensors = hf_tensors(MESHED, jnp.bfloat16)
  stored = checkpoint.check(put_folder(tmp_path, MESHED, tensors), MESHED)
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
          weights.shape(MESHED, field), field, at, np.dtype(dtype), index, False
        )
        np.testing.assert_array_equal(block, truth[index].astype(dtype), err_msg=field)
        assert block.dtype == dtype
        assert block.ctypes.data % 64 == 0
        assert sum(n for _, n in reads) == truth[index].nbytes
        assert all(b + n <= c for (b, n), (c, _) in itertools.pairwise(sorted(reads)))
        assert all(at.begin <= b and b + n <= at.end for b, n in reads)


def test_rows_that_touch_are_read_at_once(tmp_path, reads):
  stored = checkpoint.check(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  at = stored["model.layers.0.mlp.up_proj.weight"]
  index = (slice(None), slice(4, 12))
  checkpoint._block((CFG.width, CFG.ffn), "wup_DF", at, np.dtype(np.float32), index, False)
  assert reads == [(at.begin + 4 * 20 * 4, 8 * 20 * 4)]


def test_the_device_takes_the_memory_over(tmp_path, monkeypatch):
  """On a CPU, no second copy is made: what was read is the array."""
  stored = checkpoint.check(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  source = stored[weights.sources(CFG)[0, "wdown_FD"]]
  blocks = []
  real = checkpoint._block
  monkeypatch.setattr(checkpoint, "_block", lambda *args: blocks.append(real(*args)) or blocks[-1])
  leaf = checkpoint.load_field(CFG, "wdown_FD", source, jnp.float32)
  if leaf.device.platform != "cpu":
    pytest.skip("only a CPU shares its memory")
  assert leaf.unsafe_buffer_pointer() == blocks[0].ctypes.data


def test_a_file_cut_short_meanwhile(tmp_path):
  stored = checkpoint.check(put_folder(tmp_path, CFG, hf_tensors(CFG)), CFG)
  path = tmp_path / checkpoint.MODEL
  last = max(stored.values(), key=lambda at: at.end)
  os.truncate(path, last.end - 1)
  rows, cols = last.shape[0], last.shape[-1] if len(last.shape) > 1 else 1
  with pytest.raises(UserError, match=r"model\.safetensors was cut short"):
    last.read(np.arange(rows), np.arange(cols), np.empty((rows, cols), np.float32))


@pytest.mark.parametrize("place", [None, HEADS])
def test_int8_is_that_of_the_bfloat16(tmp_path, place):
  tensors = hf_tensors(MESHED)
  put_folder(tmp_path, MESHED, tensors)

  def sharding(field):
    axes = map(place.get, weights.letters(field))
    return NamedSharding(mesh_of(2, 4), PartitionSpec(*axes))

  params = checkpoint.load_weights(
    tmp_path, MESHED, jnp.float32, place and sharding, quantised=True
  )
  assert_same(params, int8_of(MESHED, expected(MESHED, tensors), jnp.float32))
  if place:
    layer = params.layers[1]
    for field in ("wk_DJ", "wdown_FD"):
      leaf, scale = getattr(layer, field), sharding(f"_{quant.outputs(field)}")
      assert leaf.q.sharding.is_equivalent_to(sharding(field), leaf.q.ndim)
      assert leaf.scale.sharding.is_equivalent_to(scale, leaf.scale.ndim)


def test_a_place_may_be_left_to_the_default(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG))
  params = checkpoint.load_weights(tmp_path, CFG, jnp.float32, lambda field: None)
  assert_same(params, expected(CFG, hf_tensors(CFG)))


# -- what is refused -----------------------------------------------------------------------------


def test_missing_folder(tmp_path):
  for read in (checkpoint.load_config, checkpoint.stop_ids):
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
      read(tmp_path / "nowhere")
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
  with pytest.raises(UserError) as error:
    checkpoint.load_config(tmp_path)
  assert str(error.value) == message


def test_config_alone_is_enough_for_load_config(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(CFG)))
  assert checkpoint.load_config(tmp_path) == CFG
  refused(tmp_path, CFG, "no *.safetensors")


def test_load_config_names_its_file(tmp_path):
  hf = hf_config.to_hf(CFG, attention_bias=True)
  (tmp_path / "config.json").write_text(json.dumps(hf))
  with pytest.raises(UserError) as error:
    checkpoint.load_config(tmp_path)
  assert str(tmp_path / "config.json") in str(error.value)


def test_missing_tensor(tmp_path):
  tensors = hf_tensors(CFG)
  del tensors[KEY]
  put_folder(tmp_path, CFG, tensors)
  refused(tmp_path, CFG, tmp_path / checkpoint.MODEL, KEY, "lacks")


def test_missing_head_says_tied(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(TIED))
  refused(tmp_path, CFG, "lm_head.weight", "does not tie", checkpoint.MODEL)


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
  assert params.head_DV is None
  assert_same(params, expected(TIED, hf_tensors(TIED)))


def test_unsupported_dtype(tmp_path):
  tensors = hf_tensors(CFG)
  tensors[KEY] = np.zeros((30, 20), np.int8)
  put_folder(tmp_path, CFG, tensors)
  refused(tmp_path, CFG, checkpoint.MODEL, KEY, "I8", "BF16")


def test_truncated_anywhere(tmp_path):
  """At every length the file is refused by name, and by tensor once the header is whole."""
  tensors = hf_tensors(CFG)
  put_folder(tmp_path, CFG, tensors)
  path = tmp_path / checkpoint.MODEL
  whole = path.read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  for length in (0, 5, 8, 100, start - 1):
    path.write_bytes(whole[:length])
    refused(tmp_path, CFG, path, "truncated in its header")
  for length in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1):
    path.write_bytes(whole[:length])
    message = refused(tmp_path, CFG, path, "truncated", length)
    assert any(name in message for name in tensors)
  path.write_bytes(whole)
  checkpoint.load_weights(tmp_path, CFG, jnp.float32)


def test_the_tensor_named_is_one_that_was_cut(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG))
  path = tmp_path / checkpoint.MODEL
  whole = path.read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8:start])
  header.pop("__metadata__", None)
  last = max(header, key=lambda name: header[name]["data_offsets"][1])
  path.write_bytes(whole[:-1])
  refused(tmp_path, CFG, last)


@pytest.mark.parametrize(
  "change",
  [
    lambda entry: entry.pop("dtype"),
    lambda entry: entry.pop("data_offsets"),
    lambda entry: entry.update(data_offsets=["a", "b"]),
    lambda entry: entry.update(data_offsets=[-8, 0]),
    lambda entry: entry.update(data_offsets=[8, 0]),
    lambda entry: entry.update(data_offsets=[0, 8]),
    lambda entry: entry.update(shape=None),
    lambda entry: entry.update(shape=["x"]),
    lambda entry: entry.update(dtype=["F32"]),
    lambda entry: entry.update(dtype="F64"),
  ],
)
def test_bent_header(tmp_path, change):
  put_folder(tmp_path, CFG, hf_tensors(CFG))
  path = tmp_path / checkpoint.MODEL
  whole = path.read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8:start])
  change(header[KEY])
  head = json.dumps(header).encode()
  path.write_bytes(len(head).to_bytes(8, "little") + head + whole[start:])
  refused(tmp_path, CFG, path)


@pytest.mark.parametrize(
  "content",
  [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\2" + bytes(7) + b"[]"],
)
def test_no_safetensors_file_at_all(tmp_path, content):
  (tmp_path / checkpoint.MODEL).write_bytes(content)
  refused(tmp_path, CFG, tmp_path / checkpoint.MODEL, "not a safetensors file")


def test_index_that_names_a_missing_file(tmp_path):
  put_folder(tmp_path, CFG, hf_tensors(CFG), files=3)
  gone = "model-00002-of-00003.safetensors"
  (tmp_path / gone).unlink()
  message = refused(tmp_path, CFG, gone, checkpoint.INDEX)
  listed = json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"]
  assert any(name in message for name, file in listed.items() if file == gone)


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


def test_one_tensor_in_two_files(tmp_path):
  tensors = hf_tensors(CFG)
  put_folder(tmp_path, CFG, tensors)
  (tmp_path / checkpoint.MODEL).rename(tmp_path / "a.safetensors")
  safetensors.numpy.save_file({KEY: tensors[KEY]}, tmp_path / "b.safetensors")
  refused(tmp_path, CFG, KEY, "a.safetensors", "b.safetensors")


def test_nothing_is_allocated_before_the_checks(tmp_path, monkeypatch):
  tensors = hf_tensors(CFG)
  del tensors["model.norm.weight"]
  put_folder(tmp_path, CFG, tensors)
  monkeypatch.setattr(checkpoint.Stored, "read", lambda at, *_: pytest.fail(f"{at} was read"))
  refused(tmp_path, CFG, "model.norm.weight")


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


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], True, -1, 1.5])
def test_stop_ids_refuses(tmp_path, wrong):
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
  with pytest.raises(UserError, match=r"generation_config\.json sets eos_token_id"):
    checkpoint.stop_ids(tmp_path)


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


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_npy_comes_back_as_it_was(tmp_path, convert_npy, cfg, dtype):
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


def npy_refused(convert_npy, tmp_path, cfg=CFG, **flags):
  with pytest.raises(UserError) as error:
    convert_npy.convert(tmp_path / "npy", tmp_path / "hf", hf_config.to_hf(cfg), **flags)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_npy_refusals(tmp_path, convert_npy):
  assert "npy is not a folder" in npy_refused(convert_npy, tmp_path)
  source = put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  path = source / "layers.1.attention.wk.weight.npy"
  good = path.read_bytes()

  for length in (0, 20, len(good) - 1):
    path.write_bytes(good[:length])
    assert str(path) in npy_refused(convert_npy, tmp_path)
  np.save(path, np.zeros((20, 30), np.float32))
  assert f"{path} has shape [20, 30]" in npy_refused(convert_npy, tmp_path)
  np.save(path, np.zeros((30, 20), np.float32))
  assert f"{path} holds float32" in npy_refused(convert_npy, tmp_path)
  np.save(path, np.zeros((30, 20), np.int16))
  assert f"{path} holds int16" in npy_refused(convert_npy, tmp_path)
  np.save(path, np.array([{}], object), allow_pickle=True)
  assert str(path) in npy_refused(convert_npy, tmp_path)
  path.unlink()
  assert f"{path} does not exist" in npy_refused(convert_npy, tmp_path)
  path.write_bytes(good)

  extra = source / "layers.2.ffn_norm.weight.npy"
  shutil.copy(source / "norm.weight.npy", extra)
  assert f"{extra} is none of" in npy_refused(convert_npy, tmp_path)
  extra.unlink()
  assert "output.weight.npy is not the embedding" in npy_refused(convert_npy, tmp_path, TIED)
  assert not (tmp_path / "hf").exists()


def test_npy_overwrites_only_when_told(tmp_path, convert_npy):
  put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "note.txt").write_text("mine")
  assert "--overwrite" in npy_refused(convert_npy, tmp_path)
  seen = []
  convert_npy.convert(
    tmp_path / "npy",
    tmp_path / "hf",
    hf_config.to_hf(CFG),
    overwrite=True,
    progress=lambda *at: seen.append(at),
  )
  assert seen[-1][0] == seen[-1][1]
  assert {path.name for path in (tmp_path / "hf").iterdir()} == {
    "note.txt", "config.json", checkpoint.MODEL,
  }  # fmt: skip
  # The folder holds another checkpoint's index now, which a reader would follow.
  put_folder(tmp_path / "hf", CFG, hf_tensors(CFG), files=2)
  assert "belongs to another" in npy_refused(convert_npy, tmp_path, overwrite=True)


def test_npy_command_line(tmp_path):
  source = put_npy(tmp_path / "npy", CFG, hf_tensors(CFG, jnp.bfloat16))
  (tmp_path / "shape.json").write_text(json.dumps(hf_config.to_hf(CFG)))
  script = (ROOT / "scripts/convert_npy.py", f"--source={source}", f"--out={tmp_path / 'hf'}")
  done = run(*script, f"--hf_config={tmp_path / 'shape.json'}")
  assert done.returncode == 0, done.stderr
  assert checkpoint.load_config(tmp_path / "hf") == CFG
  for wrong, words in {
    ("--shape=llama3_1b", "--overwrite"): "tok_embeddings.weight.npy has shape",
    (): "--shape or as --hf_config",
    ("--hf_config=nowhere.json",): "nowhere.json does not exist",
  }.items():
    done = run(*script, *wrong)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# -- the downloader, as far as it goes without a network -----------------------------------------


def test_download_errors(tmp_path):
  script = ROOT / "scripts/download.py"
  absent = (
    "import runpy, sys; sys.modules['huggingface_hub'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
  )
  for arguments, words in {
    (script, f"--out={tmp_path / 'new'}"): "--repo",
    (
      "-c",
      absent,
      script,
      "--repo=a/b",
      f"--out={tmp_path / 'new'}",
    ): "pip install huggingface_hub",
  }.items():
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
  assert not (tmp_path / "new").exists()


FAKE_HUB = """
import fnmatch, pathlib, shutil, sys, types

hub = pathlib.Path(sys.argv.pop(1))

def take(name, out):
  pathlib.Path(out, name).parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(hub / name, pathlib.Path(out, name))

def some(repo, allow_patterns, ignore_patterns, local_dir, revision, token):
  for path in hub.rglob("*"):
    name = str(path.relative_to(hub))
    allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
    if path.is_file() and allowed and not fnmatch.fnmatch(name, ignore_patterns):
      take(name, local_dir)

sys.modules["huggingface_hub"] = types.SimpleNamespace(
  hf_hub_download=lambda repo, name, local_dir, revision, token: take(name, local_dir),
  snapshot_download=some,
  errors=types.SimpleNamespace(HTTPError=OSError, HFValidationError=KeyError),
)
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_download_takes_what_is_needed(tmp_path):
  hub, out = tmp_path / "hub", tmp_path / "new"
  command = ("-c", FAKE_HUB, hub, ROOT / "scripts/download.py", "--repo=a/b", f"--out={out}")
  put_folder(hub, CFG, hf_tensors(CFG), files=2)
  (hub / "original").mkdir()
  for name in ("tokenizer.model", "consolidated.00.pth", "model.safetensors"):
    (hub / "original" / name).touch()
  (hub / "pytorch_model.bin").touch()
  done = run(*command)
  assert done.returncode == 0, done.stderr
  found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
  shards = {path.name for path in hub.glob("model-*.safetensors")}
  assert found == {"config.json", "tokenizer.model", checkpoint.INDEX, *shards}
  assert_same(checkpoint.load_weights(out, CFG, jnp.float32), expected(CFG, hf_tensors(CFG)))

  shutil.rmtree(out)
  (hub / "config.json").write_text(json.dumps(hf_config.to_hf(CFG, attention_bias=True)))
  done = run(*command)
  assert (done.returncode, "attention_bias" in done.stderr) == (2, True)
  assert [path.name for path in out.iterdir()] == ["config.json"]
