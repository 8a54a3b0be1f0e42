"""A converted folder loads on any mesh as it was, whenever its writing was stopped, or is refused."""

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, program, refusal
from test_checkpoint import (
  MESHED,
  assert_placed,
  assert_same,
  expected,
  fails,
  hf_tensors,
  int8_of,
  placed,
  put_config,
  put_folder,
  run,
)

from entropix_jax.checkpoints import checkpoint, orbax_store
from entropix_jax.model import weights

SCRIPT = ROOT / "scripts/convert_checkpoint.py"
CFG = dataclasses.replace(MESHED, layers=6)
TENSORS = hf_tensors(MESHED)
TRUTH = expected(MESHED, TENSORS)
script = program(SCRIPT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A Hugging Face folder in "hf" and what it was converted to, by type."""
  top = tmp_path_factory.mktemp("folders")
  source = put_folder(top / "hf", MESHED, TENSORS, files=2)
  (source / "tokenizer.model").write_text("tokens")
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
  for dtype in orbax_store.DTYPES:
    script.convert(source, top / dtype, dtype)
  return top


@pytest.fixture
def copied(folders, tmp_path):
  """A bfloat16 folder to spoil."""
  return shutil.copytree(folders / "bfloat16", tmp_path / "model")


def refused(folder, *words, dtype=jnp.bfloat16, cfg=MESHED, **options):
  refusal(words, checkpoint.load_weights, folder, cfg, dtype, **options)


def assert_whole(folder, *placing):
  """The folder holds the tensors of MESHED as bfloat16."""
  assert_same(checkpoint.load_weights(folder, MESHED, jnp.bfloat16, *placing), TRUTH, jnp.bfloat16)


# -- the same again ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [None, (1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_mesh_gets_the_same_bits(folders, dtype, shape):
  sharding = shape and placed(*shape)
  seen = []
  params = checkpoint.load_weights(
    folders / dtype, MESHED, dtype, sharding, lambda *at: seen.append(at)
  )
  assert_same(params, TRUTH, dtype)
  assert seen == sorted(seen)
  assert seen[-1][0] == seen[-1][1]
  assert len(seen) == 3 + MESHED.layers
  for field in weights.layer_sources(MESHED) if sharding else ():
    leaf = getattr(params.layers[1], field)
    assert leaf.sharding.is_equivalent_to(sharding(field), leaf.ndim)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
def test_saved_on_one_device_and_loaded_on_several(folders, tmp_path, monkeypatch, shape):
  monkeypatch.setattr(script, "spread", lambda cfg, field: None)
  script.convert(folders / "hf", tmp_path / "one")
  assert_whole(tmp_path / "one", placed(*shape))


@pytest.mark.parametrize("shape", [None, (2, 4)])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_is_that_of_the_original(folders, shape, kind, dtype):
  """Quantised before or after, the numbers are the same; norms are of the type asked for."""
  sharding = shape and placed(*shape)
  params = checkpoint.load_weights(folders / kind, MESHED, dtype, sharding, quantised=True)
  truth = TRUTH
  if kind == "bfloat16":  # its norms have been rounded already
    truth = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), truth)
  assert_same(params, int8_of(MESHED, truth, dtype))
  if sharding:
    assert_placed(params.layers[1], sharding)


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_any_type_may_be_asked_for(folders, shape):
  """The numbers of the folder, rounded; int8 stays int8, which the folder says by itself."""
  sharding = shape and placed(*shape)
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), TRUTH)
  for kind, truth in (("float32", TRUTH), ("bfloat16", rounded)):
    assert not checkpoint.stored_int8(folders / kind)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      params = checkpoint.load_weights(folders / kind, MESHED, dtype, sharding)
      assert_same(params, truth, dtype)
  assert checkpoint.stored_int8(folders / "int8")
  params = checkpoint.load_weights(folders / "int8", MESHED, jnp.float32, sharding)
  assert_same(params, int8_of(MESHED, TRUTH, jnp.float32))


def test_types_are_changed_before_the_layout_is(folders):
  """Leaves are finished in the type asked for, and int8 ones not at all."""
  seen = []

  def finish(field, leaf):
    seen.append(leaf.dtype)
    return leaf

  for kind in ("bfloat16", "int8"):
    checkpoint.load_weights(folders / kind, MESHED, jnp.float32, finish=finish)
  assert seen == [jnp.float32] * len(jax.tree.leaves(TRUTH))


def test_it_is_a_whole_checkpoint_folder(folders):
  for dtype in orbax_store.DTYPES:
    folder = folders / dtype
    assert checkpoint.load_config(folder) == MESHED
    assert checkpoint.stop_ids(folder) == (7, 9)
    assert checkpoint.check_files(folder, MESHED) == {}
    assert {path.name for path in folder.iterdir()} == {
      "config.json", "generation_config.json", "tokenizer.model", "orbax.json", "arrays",
    }  # fmt: skip
    assert not (folders / f"{dtype}.part").exists()


# -- what is refused -----------------------------------------------------------------------------


def files_of(folder):
  return sorted(path for path in (folder / "arrays").rglob("*") if path.is_file())


def test_a_damaged_file_is_named(copied):
  """One bit of any file, wherever it is."""
  paths = files_of(copied)
  assert len(paths) > 20
  rng = np.random.default_rng(0)
  for path in rng.choice(paths, 12, replace=False):
    good = path.read_bytes()
    bad = bytearray(good)
    bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    refused(copied, path, "is damaged")
    path.write_bytes(good)
  checkpoint.load_weights(copied, MESHED, jnp.bfloat16)


def test_a_file_cut_short_or_missing_is_named(copied):
  path = files_of(copied)[5]
  os.truncate(path, path.stat().st_size - 1)
  refused(copied, path, "of its")
  path.unlink()
  refused(copied, path, "is missing")


def test_a_damaged_manifest_is_named(copied):
  path = copied / "orbax.json"
  good = path.read_text()
  for bad, *words in (
    [good[:-9]],
    [good.replace('"dtype": "bfloat16"', '"dtype": "float8"')],
    [good.replace('"source"', '"origin"')],
    ["[]"],
    [json.dumps(json.loads(good) | {"items": {"norm_D": {"a": 3}}})],
    [json.dumps(json.loads(good) | {"format": 2}), "format 2"],
  ):
    path.write_text(bad)
    refused(copied, path, *words)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"layers": 1}, ["layer_001"]),
    ({"layers": 3}, ["unfinished"]),
    ({"ffn": 64}, ["layer_000", "bgate_F", "bfloat16 [32]", "bfloat16 [64]"]),
    ({"tied": True}, ["head_DV"]),
  ],
)
def test_another_model_is_refused(folders, change, words):
  refused(folders / "bfloat16", *words, cfg=dataclasses.replace(MESHED, **change))


def test_a_type_that_orbax_would_cast_is_refused(folders, copied):
  """The manifest says one type and the arrays have another."""
  shutil.rmtree(copied / "arrays" / "norm_D")
  shutil.copytree(folders / "float32" / "arrays" / "norm_D", copied / "arrays" / "norm_D")
  ours, theirs = (json.loads((each / "orbax.json").read_text()) for each in (copied, folders / "float32"))  # fmt: skip
  ours["items"]["norm_D"] = theirs["items"]["norm_D"]
  (copied / "orbax.json").write_text(json.dumps(ours))
  refused(copied, "norm_D", "float32 [16]", "bfloat16 [16]")


def test_unfinished_folders_are_refused(copied):
  part = copied.with_name("model.part")
  copied.rename(part)
  for folder in (part, copied):
    refused(folder, part, "unfinished", "convert_checkpoint.py")
    for read in (checkpoint.load_config, checkpoint.stop_ids):
      refusal(["unfinished"], read, folder)
  # Renamed by hand before its time, it still lacks something.
  part.rename(copied)
  manifest = json.loads((copied / "orbax.json").read_text())
  del manifest["items"]["layer_001"]
  (copied / "orbax.json").write_text(json.dumps(manifest))
  refused(copied, "unfinished")


def test_only_an_empty_folder_is_written_to(folders, tmp_path):
  def says(words, source="hf", out=tmp_path / "new", dtype="bfloat16"):
    refusal([words], script.convert, folders / source, out, dtype)

  says("not an empty folder", out=folders / "int8")
  says("give the Hugging Face folder", source="int8")
  (tmp_path / "file").touch()
  says("not an empty folder", out=tmp_path / "file")
  says("cannot be written", out=tmp_path / "file" / "new")
  # Two checkpoints or types are never mixed.
  (tmp_path / "new").mkdir()
  shutil.copytree(folders / "int8", tmp_path / "new.part")
  says("another checkpoint or dtype")
  other = shutil.copytree(folders / "hf", tmp_path / "hf")
  (other / "config.json").touch()
  says("another checkpoint or dtype", source=other, dtype="int8")
  shutil.rmtree(tmp_path / "new.part")
  (tmp_path / "new.part").mkdir()
  (tmp_path / "new.part" / "note.txt").touch()
  says("is not an unfinished conversion")


def test_a_link_to_an_empty_folder_stays(folders, tmp_path):
  (tmp_path / "real").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "real")
  script.convert(folders / "hf", tmp_path / "link")
  assert (tmp_path / "link").is_symlink()
  assert_whole(tmp_path / "real")


def test_the_command_line_answers_in_one_sentence(tmp_path):
  fails("--checkpoint=folder", SCRIPT)
  nowhere = f"--checkpoint={tmp_path / 'nowhere'}", f"--out={tmp_path / 'new'}"
  fails("is not a folder", SCRIPT, *nowhere)


def test_a_disk_without_room_is_said_at_once(folders, tmp_path, monkeypatch):
  need = 2 * weights.count(MESHED)
  usage = type(shutil.disk_usage(tmp_path))
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, need - 1))
  refusal(["new.part may need 0.0 GB more"], script.convert, folders / "hf", tmp_path / "new")
  assert not any((tmp_path / "new.part" / "arrays").iterdir())
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, need))
  script.convert(folders / "hf", tmp_path / "new")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_full_disk_is_a_sentence_and_no_end(tmp_path):
  """No file may have more than 64 KiB, which one array has."""
  cfg = dataclasses.replace(MESHED, vocab=8192)
  source = put_folder(tmp_path / "hf", cfg, hf_tensors(cfg))
  limited = (
    "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY)); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
  )
  done = run("-c", limited, SCRIPT, f"--checkpoint={source}", f"--out={tmp_path / 'new'}")
  assert done.returncode == 2, done.stderr
  # Its other threads may complain of what they were about, so the sentence is not always the last.
  assert "embed_VD cannot be written (File too large).\n" in done.stderr
  assert not (tmp_path / "new").exists()
  script.convert(source, tmp_path / "new")
  params = checkpoint.load_weights(tmp_path / "new", cfg, jnp.bfloat16)
  assert_same(params, expected(cfg, hf_tensors(cfg)), jnp.bfloat16)


# -- killed --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_conversion_goes_on(tmp_path):
  """Killed thrice at some moment, it ends with what an unbroken one ends with, nothing done twice."""
  source = put_folder(tmp_path / "hf", CFG, hf_tensors(CFG, jnp.bfloat16))
  (source / "tokenizer.model").write_text("tokens")
  out, part = tmp_path / "out", tmp_path / "out.part"
  command = [sys.executable, SCRIPT, f"--checkpoint={source}", f"--out={out}", "--dtype=int8"]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  rng = random.Random(int.from_bytes(os.urandom(4), "little"))

  def items():
    path = part / "orbax.json"
    return json.loads(path.read_text())["items"] if path.exists() else {}

  kept = {}
  for _ in range(3):
    before, more = len(items()), rng.randrange(3)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and len(items()) < before + more and time.monotonic() < deadline:
      time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    process.kill()
    assert process.wait() == -9, "it ended before it was killed; give it more layers"
    assert not out.exists()
    if part.exists() and (part / "orbax.json").exists():
      refused(part, "unfinished", cfg=CFG, quantised=True)
    assert kept.items() <= items().items()
    kept = items()
  done = run(*command[1:])
  assert done.returncode == 0, done.stderr
  assert f"load it with --config.checkpoint={out}\n" in done.stdout
  assert not part.exists()
  final = json.loads((out / "orbax.json").read_text())["items"]
  assert kept.items() <= final.items()  # names of data files are random: these were written once
  assert (out / "tokenizer.model").read_text() == "tokens"
  assert {path.name for path in (out / "arrays").iterdir()} == set(final)

  script.convert(source, tmp_path / "unbroken", "int8")
  ours, theirs = (
    checkpoint.load_weights(folder, CFG, jnp.bfloat16, quantised=True)
    for folder in (out, tmp_path / "unbroken")
  )
  assert_same(ours, theirs)


def test_what_was_damaged_meanwhile_is_written_again(folders, tmp_path):
  part = shutil.copytree(folders / "bfloat16", tmp_path / "new.part")
  path = max(files_of(part), key=lambda path: path.stat().st_size)
  path.write_bytes(b"\0" * path.stat().st_size)
  half = part / "arrays" / "layer_001.orbax-checkpoint-tmp"
  half.mkdir()
  script.convert(folders / "hf", tmp_path / "new")
  assert not (tmp_path / "new" / "arrays" / half.name).exists()
  assert_whole(tmp_path / "new")


def test_a_conversion_needs_a_folder_it_can_read(folders, tmp_path):
  source = shutil.copytree(folders / "hf", tmp_path / "hf")
  put_config(source, dataclasses.replace(MESHED, layers=3))
  refusal(["lacks the tensor model.layers.2"], script.convert, source, tmp_path / "new")
  assert not (tmp_path / "new.part").exists()


# -- several processes ---------------------------------------------------------------------------

LOAD = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, original, *folders = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from entropix_jax import config, errors
from entropix_jax.checkpoints import checkpoint
from entropix_jax.model import sharding, weights
cfg = checkpoint.load_config(original)
mesh = sharding.mesh(config.MeshConfig(model=2), cfg)
def load(folder):
  place = lambda field: sharding.of(mesh, weights.letters(field))
  return jax.tree.leaves(checkpoint.load_weights(folder, cfg, jnp.bfloat16, place))
truth = jax.tree.leaves(checkpoint.load_weights(original, cfg, jnp.bfloat16))
assert truth[0].is_fully_addressable
for folder in folders:
  try:
    for ours, whole in zip(load(folder), truth, strict=True):
      assert not ours.is_fully_addressable and len(ours.addressable_shards) == 1
      for shard in ours.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole)[shard.index])
    print("the same", flush=True)
  except errors.UserError as error:
    print(error, flush=True)
"""


def test_two_processes_get_their_halves_or_the_same_sentence(folders, copied):
  """Also when only one of them reads the damaged file."""
  names = sorted(json.loads((copied / "orbax.json").read_text())["items"]["layer_001"])
  damaged = {}
  for i in range(2):  # files are shared out in this order
    folder = shutil.copytree(copied, copied.with_name(f"damaged{i}"))
    damaged[folder] = folder / "arrays" / "layer_001" / names[i]
    damaged[folder].write_bytes(b"\0" * damaged[folder].stat().st_size)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  arguments = [str(path) for path in (folders / "hf", folders / "hf", copied, *damaged)]
  environment = os.environ | {
    "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
  }  # fmt: skip
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", LOAD, str(port), str(i), *arguments],
      env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    told = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for out, err in told:
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 4, err
    assert lines[:2] == ["the same"] * 2
    for line, path in zip(lines[2:], damaged.values(), strict=True):
      assert line.startswith(f"{path} is damaged")
