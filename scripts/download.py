"""Download the files of a Hugging Face model that this engine needs into a folder.

    pip install huggingface_hub
    HF_TOKEN=... python scripts/download.py --repo=meta-llama/Llama-3.2-1B-Instruct --out=llama3_1b

Why: config.json is downloaded and checked first, so an unsupported model is rejected before its weights
are downloaded. A file gets its final name only when it is complete; a second run resumes. Without a folder
of your own, --config.checkpoint=OWNER/MODEL downloads into the hub's cache.
"""

import os
import sys
from pathlib import Path

from entropix_jax.checkpoints import hub
from entropix_jax.cli import commands
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_REPO = _FLAGS.string("repo", None, "Name on the hub, owner/model.")
_OUT = _FLAGS.string("out", None, "Folder to download into.")
_REVISION = _FLAGS.string("revision", None, "Branch, tag or commit; default: the newest.")


def run(argv: list[str]) -> None:
  """Download the repository given by the flags."""
  commands.parse(argv, _FLAGS, __doc__)
  if not _REPO.value or not _OUT.value:
    raise UserError("Give --repo=owner/model and --out=folder.")
  hub.download(_REPO.value, _REVISION.value, Path(os.path.expanduser(_OUT.value)))
  print(commands.loads(_OUT.value))


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
