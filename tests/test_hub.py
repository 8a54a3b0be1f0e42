"""Names of checkpoints lead to the right folder: paths, the hub's cache, and a hub that stands for the real one."""

import errno
import fnmatch
import json
import pathlib
import shutil
import sys
import types

import jax.numpy as jnp
import pytest
from command import is_one_sentence, run
from conftest import refusal
from test_checkpoint import CFG, assert_same, expected, hf_tensors, put_config, put_folder

from entropix_jax.checkpoints import checkpoint, hub

NAME = "owner/model-1.5"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """An empty cache, and no hub but one that a test makes."""
  for name in "HF_HOME HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE".split():
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "cache"


def put_snapshot(cache, commit=OLD, refs=("main",), shards=1, name=NAME):
  """A snapshot of small files in the cache, laid out as the hub's library does; weights are empty."""
  folder = cache / f"models--{name.replace('/', '--')}"
  snapshot = folder / "snapshots" / commit
  texts = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}
  if shards > 1:
    del texts["model.safetensors"]
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    texts |= dict.fromkeys(names, "")
    texts["model.safetensors.index.json"] = json.dumps({"weight_map": dict(enumerate(names))})
  for path in (snapshot, folder / "blobs", folder / "refs"):
    path.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    blob = folder / "blobs" / f"{commit}{name.replace('.', '')}"
    blob.write_text(text)
    (snapshot / name).symlink_to(pathlib.Path("../../blobs") / blob.name)
  for ref in refs:
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
  return snapshot


# -- paths -------------------------------------------------------------------------------------


def test_an_existing_path_wins(cache, tmp_path, monkeypatch):
  put_snapshot(cache)
  pathlib.Path(NAME).mkdir(parents=True)
  assert hub.find(NAME) == hub.local(NAME) == pathlib.Path(NAME)
  file = tmp_path / "model.gguf"
  file.touch()
  monkeypatch.setenv("HOME", str(tmp_path))
  assert hub.find(file) == hub.find("~/model.gguf") == file


@pytest.mark.parametrize(
  "name", ["", "none", "./a/b", "a/b/c", "a/b.gguf", "a/../b", "a--b/c", "a/b@", "a/b@../c", "x" * 5000]
)  # fmt: skip
def test_a_name_that_is_neither_path_nor_on_the_hub(name):
  refusal(["does not exist; point config.checkpoint at a folder"], hub.find, name)
  assert hub.local(name) is None


def test_a_missing_folder_is_not_looked_up_on_the_hub(monkeypatch):
  pathlib.Path("mine").mkdir()
  for name in ("checkpoints/Llama-3.2-1B-Instruct", "models/x", "mine/x"):
    refusal([f"{name} does not exist", f"--out={name}"], hub.find, name)
  refusal(["get_smollm2.py"], hub.find, f"checkpoints/{hub.SMOLLM2}")


# -- the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("variables", "place"),
  [
    ({}, ".cache/huggingface/hub"),
    ({"XDG_CACHE_HOME": "{}/x"}, "x/huggingface/hub"),
    ({"XDG_CACHE_HOME": "{}/x", "HF_HOME": "~/h"}, "h/hub"),
    ({"HF_HOME": "{}/h", "HUGGINGFACE_HUB_CACHE": "{}/u"}, "u"),
    ({"HUGGINGFACE_HUB_CACHE": "{}/u", "HF_HUB_CACHE": "$HOME/c"}, "c"),
  ],
)
def test_where_the_cache_is(tmp_path, monkeypatch, variables, place):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("XDG_CACHE_HOME", "HF_HUB_CACHE"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value.format(tmp_path))
  snapshot = put_snapshot(tmp_path / place)
  assert hub.find(NAME) == snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_revisions_are_found(cache, shards):
  old = put_snapshot(cache, OLD, ["v1", "refs/pr/1"], shards)
  new = put_snapshot(cache, NEW, ["main"], shards)
  for revision in ("v1", "refs/pr/1", OLD):
    assert hub.find(f"{NAME}@{revision}") == old
  assert hub.find(NAME) == hub.find(f"{NAME}@{NEW}") == new
  assert hub.local(f"{NAME}@v2") is None
  assert hub.local("owner/other") is None


def damage(name):
  def do(snapshot):
    (snapshot / name).unlink()

  return do


@pytest.mark.parametrize(
  "harm",
  [
    damage("config.json"),
    damage("tokenizer.json"),
    damage("model-00002-of-00003.safetensors"),
    damage("model.safetensors.index.json"),
    lambda at: (at / "model-00001-of-00003.safetensors").resolve().unlink(),
    lambda at: (at / "tokenizer_config.json").symlink_to("../../blobs/none"),
    lambda at: (at / "../../blobs/abc.incomplete").touch(),
    lambda at: (at / "../../blobs/abc.12345678.incomplete").touch(),
    lambda at: (at / "model.safetensors.index.json").write_text("{"),
    lambda at: (at / "../../refs/main").write_text("../../.."),
    lambda at: (at / "../../refs/main").write_bytes(b"\xff"),
    shutil.rmtree,
  ],
)
def test_an_incomplete_snapshot_is_not_used(cache, harm):
  snapshot = put_snapshot(cache, shards=3)
  assert hub.local(NAME)
  harm(snapshot)
  assert hub.local(NAME) is None
  refusal([NAME, cache, "pip install huggingface_hub"], hub.find, NAME)


def test_what_an_interrupted_download_left_does_not_matter_once_the_file_is_there(cache):
  snapshot = put_snapshot(cache)
  blobs = cache / "models--owner--model-1.5" / "blobs"
  (blobs / "abc").touch()
  (blobs / "abc.12345678.incomplete").touch()
  assert hub.find(NAME) == snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(cache, monkeypatch, variable):
  monkeypatch.setenv(variable, "1")
  refusal([NAME, cache, variable], hub.find, NAME)
  snapshot = put_snapshot(cache)
  assert hub.find(NAME) == snapshot


# -- downloads ---------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, monkeypatch):
  """A folder that stands for a repository on the hub; `asked` counts what is asked of it."""
  source, asked = tmp_path / "remote", []

  def take(name, out):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / name, out / name)

  def place(repo, revision, cache_dir=None, local_dir=None):
    asked.append((repo, revision))
    return local_dir or cache_dir / f"models--{repo.replace('/', '--')}" / "snapshots" / NEW

  def one(repo, filename, **where):
    take(filename, place(repo, **where))
    return str(place(repo, **where) / filename)

  def some(repo, allow_patterns, ignore_patterns, **where):
    for path in source.rglob("*"):
      name = str(path.relative_to(source))
      allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
      if path.is_file() and allowed and not fnmatch.fnmatch(name, ignore_patterns):
        take(name, place(repo, **where))
    return str(place(repo, **where))

  module = types.SimpleNamespace(hf_hub_download=one, snapshot_download=some)
  monkeypatch.setitem(sys.modules, "huggingface_hub", module)
  put_folder(source, CFG, hf_tensors(CFG), files=2)
  (source / "original").mkdir()
  (source / "onnx").mkdir()
  for name in """
    original/tokenizer.model original/consolidated.00.pth original/model.safetensors pytorch_model.bin
    consolidated.safetensors onnx/model.onnx tokenizer.json chat_template.jinja README.md
  """.split():
    (source / name).touch()
  return types.SimpleNamespace(folder=source, asked=asked, module=module)


SMALL = {"config.json", "tokenizer.json", "chat_template.jinja", checkpoint.INDEX}


def held(folder):
  return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_cache_is_filled_with_what_is_needed(cache, remote):
  found = hub.find(f"{NAME}@v1")
  assert {*remote.asked} == {(NAME, "v1")}
  shards = {path.name for path in remote.folder.glob("model-*.safetensors")}
  assert held(found) == SMALL | shards | {"original/tokenizer.model"}
  assert_same(checkpoint.load_weights(found, CFG, jnp.float32), expected(CFG, hf_tensors(CFG)))
  asked = len(remote.asked)
  assert hub.find(f"{NAME}@{NEW}") == found
  assert len(remote.asked) == asked


def test_the_script_fills_a_folder(tmp_path, remote):
  out = tmp_path / "new"
  command = ("scripts/download.py", f"--repo={NAME}", f"--out={out}")
  assert run(*command) == (0, f"Wrote {out}; load it with --config.checkpoint={out}\n", "")
  shards = {path.name for path in remote.folder.glob("model-*.safetensors")}
  assert held(out) == SMALL | shards | {"tokenizer.model"}

  shutil.rmtree(out)
  put_config(remote.folder, attention_dropout=0.0, num_local_experts=2)
  is_one_sentence(run(*command), "num_local_experts")
  assert held(out) == {"config.json"}


def test_what_a_download_may_lack(remote):
  for path in remote.folder.glob("model-00002*"):
    path.unlink()
  refusal(["model-00002-of-00002.safetensors does not exist"], hub.find, NAME)
  for path in remote.folder.glob("model*"):
    path.unlink()
  refusal(["no *.safetensors", "if owner/other has none"], hub.find, "owner/other")


@pytest.mark.parametrize(
  ("kinds", "words"),
  [
    (["GatedRepoError", "RepositoryNotFoundError"], f"https://huggingface.co/{NAME}"),
    (["RepositoryNotFoundError"], "no such repository"),
    (["RevisionNotFoundError"], "no revision 'v1'"),
    (["LocalEntryNotFoundError", "EntryNotFoundError"], "cannot be reached"),
    (["ConnectError", "TransportError"], "cannot be reached"),
    (["RemoteEntryNotFoundError", "EntryNotFoundError"], "no config.json"),
    (["HfHubHTTPError"], "one two"),
  ],
)
def test_why_a_download_failed(remote, kinds, words):
  kind = Exception
  for name in reversed(kinds):
    kind = type(name, (kind,), {})

  def fails(*args, **options):
    raise kind("one\ntwo.")

  remote.module.hf_hub_download = fails
  refusal([f"{NAME} could not be downloaded", words], hub.find, f"{NAME}@v1")


def test_a_full_disk(remote, cache):
  def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device", "x")

  remote.module.snapshot_download = full
  refusal([cache, "No space left on device"], hub.find, NAME)


def test_the_script_without_its_flags_or_the_library(tmp_path):
  out = f"--out={tmp_path / 'new'}"
  is_one_sentence(run("scripts/download.py", out), "--repo")
  is_one_sentence(run("scripts/download.py", f"--repo={NAME}", out), "pip install huggingface_hub")
  assert not (tmp_path / "new").exists()
