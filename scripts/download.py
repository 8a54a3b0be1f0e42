"""Download the files of a Hugging Face model that this engine needs into a folder.

    pip install huggingface_hub
    HF_TOKEN=... python scripts/download.py --repo=meta-llama/Llama-3.2-1B-Instruct --out=llama3_1b

Why: config.json is downloaded and checked first, so an unsupported model is rejected before its weights
are downloaded. A file gets its final name only when it is complete; a second run resumes.
"""

import os
import sys
from pathlib import Path

from entropix_jax.checkpoints import checkpoint
from entropix_jax.cli import commands
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_REPO = _FLAGS.string("repo", None, "Name on the hub, owner/model.")
_OUT = _FLAGS.string("out", None, "Folder to download into.")
_REVISION = _FLAGS.string("revision", None, "Branch, tag or commit; default: the newest.")

FILES = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "original/tokenizer.model",  # its place in Meta's own repositories
  "model*.safetensors",
  "model.safetensors.index.json",
)


def download(repo: str, out: Path, revision: str | None = None) -> None:
  """Download `repo` into `out`; an access token, if needed, comes from HF_TOKEN."""
  try:
    import huggingface_hub as hub
  except ImportError:
    raise UserError(
      "This script needs huggingface_hub; install it with `pip install huggingface_hub`."
    ) from None
  where = {"local_dir": out, "revision": revision, "token": os.environ.get("HF_TOKEN")}
  try:
    hub.hf_hub_download(repo, "config.json", **where)
    cfg = checkpoint.load_config(out)
    hub.snapshot_download(repo, allow_patterns=FILES, ignore_patterns="*/*.safetensors", **where)
  except (OSError, hub.errors.HTTPError, hub.errors.HFValidationError) as error:
    reason = " ".join(str(error).split())
    raise UserError(f"{repo} could not be downloaded to {out}: {reason}") from None
  if (out / "original/tokenizer.model").exists():
    os.replace(out / "original/tokenizer.model", out / "tokenizer.model")
  checkpoint.check_files(
    out, cfg
  )  # without a network the library treats a partial folder as complete


def run(argv: list[str]) -> None:
  """Download the repository given by the flags."""
  commands.parse(argv, _FLAGS, __doc__)
  if not _REPO.value or not _OUT.value:
    raise UserError("Give --repo=owner/model and --out=folder.")
  download(_REPO.value, Path(os.path.expanduser(_OUT.value)), _REVISION.value)
  print(commands.loads(_OUT.value))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
