"""The pod script against a gcloud that writes down what it is asked and runs it on this machine."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "tpu_pod.sh"
WHERE = ("--name=pod", "--zone=us-east5-b")
PIECES = ("plain", "It's $HOME", 'a "b" `c`', "back\\slash", "*", "")

# Two workers: one argument a line goes to `calls`; a --command runs in a home folder of its own.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> "$FAKE/calls"
case "$4" in
  describe) echo 2 ;;
  ssh) for arg in "$@"; do case $arg in --command=*)
      mkdir -p "$FAKE/home"; cd "$FAKE/home"; HOME=$FAKE/home sh -c "${arg#--command=}" ;; esac; done ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
  """(run the script, the calls it made) with that gcloud first on PATH."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
  (tmp_path / "bin" / "gcloud").chmod(0o755)

  def call(*args, path=None):
    path = path or f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "FAKE": str(tmp_path)}
    return subprocess.run(
      [shutil.which("bash"), SCRIPT, *args], capture_output=True, text=True, env=env, cwd=tmp_path
    )

  def calls():
    log = tmp_path / "calls"
    text = log.read_text() if log.exists() else ""
    return [one.strip().split("\n") for one in text.split("\nEND\n") if one.strip()]

  return call, calls, tmp_path


@pytest.fixture
def pod(fake):
  """The same, with a Python in the home folder that shows its arguments."""
  python = fake[2] / "home" / "entropix_jax" / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text("#!/bin/sh\nfor arg; do printf '<%s>\\n' \"$arg\"; done\nexit ${RC:-0}\n")
  python.chmod(0o755)
  return fake


def test_run_hands_every_argument_over_as_it_is(pod):
  call, calls, folder = pod
  done = call("run", *WHERE, "--project=mine", "--", *PIECES)
  assert done.returncode == 0, done.stderr
  shown = ["-m", "entropix_jax.main", "--distributed", *PIECES]
  assert done.stdout.splitlines() == [f"<{piece}>" for piece in shown]
  [logged] = (folder / "home" / "entropix_jax" / "runs").iterdir()
  assert logged.read_text() == done.stdout
  [made] = calls()
  assert made[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
  assert {"--zone=us-east5-b", "--project=mine", "--worker=all"} <= set(made)


def test_a_failure_on_a_worker_is_the_scripts(pod, monkeypatch):
  monkeypatch.setenv("RC", "3")
  assert pod[0]("run", *WHERE, "--", "--prompt=x").returncode == 3


def test_a_dry_run_prints_commands_that_do_the_same(pod):
  """What it prints is shell: run by hand, it makes the calls that the script makes."""
  call, calls, _ = pod
  dry = call("run", *WHERE, "--dry_run", "--", *PIECES)
  assert dry.returncode == 0
  assert calls() == []
  [line] = dry.stderr.strip().split("\n+ ")
  words = shlex.split(line.removeprefix("+ "))
  call("run", *WHERE, "--", *PIECES)
  assert [words[1:]] == calls()


@pytest.mark.parametrize("verb", ["install", "run", "collect"])
def test_a_dry_run_needs_no_gcloud_and_does_nothing(verb, fake):
  call, _, folder = fake
  tools = folder / "tools"
  tools.mkdir()
  for tool in ("dirname", "sed"):
    (tools / tool).symlink_to(shutil.which(tool))
  before = sorted(folder.rglob("*"))
  last = ("--", "--prompt=x") if verb == "run" else ()
  done = call(verb, *WHERE, "--dry_run", *last, path=str(tools))
  assert done.returncode == 0, done.stderr
  assert "gcloud compute tpus tpu-vm" in done.stderr
  assert sorted(folder.rglob("*")) == before
  done = call(verb, *WHERE, *last, path=str(tools))
  assert done.returncode == 2
  assert "gcloud is not installed" in done.stderr


def test_install_copies_the_commit_and_says_what_is_missing(fake):
  if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
    pytest.skip("not a git checkout")
  call, calls, _ = fake
  done = call("install", *WHERE, "--python=python0.1")
  assert done.returncode == 2
  assert "has no python0.1" in done.stderr
  scp, _ = calls()
  assert scp[3] == "scp"
  assert scp[4].endswith("/entropix_jax.tar.gz")
  assert scp[5] == "pod:"
  assert not Path(scp[4]).exists()  # the scratch folder is gone


def test_collect_asks_each_worker_in_turn(fake):
  call, calls, folder = fake
  done = call("collect", *WHERE, "--out=here")
  assert done.returncode == 0, done.stderr
  describe, *copies = calls()
  assert describe[3] == "describe"
  for i, copy in enumerate(copies):
    assert copy[3:6] == ["scp", "--recurse", "pod:entropix_jax/runs"]
    assert copy[6] == f"here/worker{i}"
    assert f"--worker={i}" in copy
  assert len(copies) == 2
  assert (folder / "here" / "worker1").is_dir()


def test_nothing_is_ever_created_or_deleted():
  code = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#")]
  assert not [line for line in code for word in (" create ", " delete ", "sudo") if word in line]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ((), "say install, run or collect"),
    (("destroy",), "unknown command destroy"),
    (("run", "--zone=z"), "--name=NAME"),
    (("run", "--name=n"), "--zone=ZONE"),
    (("run", *WHERE), "nothing to run"),
    (("install", *WHERE, "--nmae=x"), "unknown argument --nmae=x"),
    (("install", *WHERE, "--", "x"), "only run takes arguments"),
  ],
)
def test_bad_use_is_one_sentence(args, words, fake):
  done = fake[0](*args)
  assert done.returncode == 2
  assert len(done.stderr.strip().splitlines()) == 1
  assert words in done.stderr
