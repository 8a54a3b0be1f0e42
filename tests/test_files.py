"""Files are written whole or not at all, through links, and never in place of anything but a file."""

import os
import resource
import stat

import pytest
from conftest import refusal

from entropix_jax import files, viz
from entropix_jax.errors import UserError
from entropix_jax.report import trace
from entropix_jax.sampling import presets


def whole(path):
  with files.whole(path) as file:
    file.write(b"new " * 9)


def traced(path):
  with trace.Tracer(path, {"text": "new"}, trace.Tally([]).summary) as tracer:
    tracer.close({})


WRITERS = {
  "whole": whole,
  "line": lambda path: files.append(path, "new " * 9),
  "trace": traced,
  "report": lambda path: viz.write({path: b"new " * 9}),
  "preset": lambda path: presets.save(path, presets.Preset("plain", "new", {})),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every_writer
def test_a_link_stays_and_its_target_is_written(tmp_path, write):
  target, link, there = tmp_path / "target", tmp_path / "link", tmp_path / "there"
  there.mkdir()
  link.symlink_to(there / "middle")
  (there / "middle").symlink_to(target)
  for mode in (None, 0o600):
    write(link)
    assert link.is_symlink()
    assert (there / "middle").is_symlink()
    assert "new" in target.read_text()
    assert mode in (None, stat.S_IMODE(target.stat().st_mode))
    target.write_text("old")
    target.chmod(0o600)
  assert {path.name for path in tmp_path.iterdir()} == {"target", "link", "there"}


@every_writer
def test_what_cannot_be_written_is_one_sentence(tmp_path, write):
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  (tmp_path / "astray").symlink_to(tmp_path / "none" / "x")
  (tmp_path / "locked").mkdir(mode=0o500)
  os.mkfifo(tmp_path / "pipe")
  bad = {"loop": "symbolic links", "astray": "none does not exist", "pipe": "no program reads"}
  bad |= {"none/x": "none does not exist", ".": "is a folder", "n" * 300: "name too long"}
  if os.geteuid():
    bad["locked/x"] = "Permission denied"
  before = set(tmp_path.rglob("*"))
  for name, words in bad.items():
    refusal([words], write, tmp_path / name)
  assert set(tmp_path.rglob("*")) == before
  assert (tmp_path / "pipe").is_fifo()


@every_writer
def test_a_disk_that_fills_leaves_what_was_there(tmp_path, write):
  """No file may have more than six bytes."""
  path, limit = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
  for old in (None, "old\n"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))
    try:
      with pytest.raises(UserError, match="File too large"):
        write(path)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.read_text() for p in tmp_path.iterdir()] == [old] * (old is not None)
    path.write_text("old\n")


@every_writer
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_stays_one(write):
  refusal(["No space left on device"], write, "/dev/full")
  write("/dev/null")
  assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
  assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@every_writer
def test_a_pipe_gets_the_contents(tmp_path, write):
  path = tmp_path / "pipe"
  os.mkfifo(path)
  end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  write(path)
  assert b"new" in os.read(end, 999)
  os.close(end)
  assert path.is_fifo()


def test_the_file_that_stdout_goes_to_is_refused(tmp_path):
  path = tmp_path / "out"
  path.write_text("said")
  before = os.dup(1)
  os.dup2(os.open(path, os.O_WRONLY), 1)
  try:
    refusal(["gets what this program prints"], whole, path)
  finally:
    os.dup2(before, 1)
  assert path.read_text() == "said"
