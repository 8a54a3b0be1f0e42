"""Where a checkpoint is: an existing path, the cache of the Hugging Face hub, or the hub itself.

  find("checkpoints/Llama-3.2-1B-Instruct")            an existing path, as it is
  find("HuggingFaceTB/SmolLM2-135M-Instruct")          its folder in the cache, downloaded if necessary
  find("HuggingFaceTB/SmolLM2-135M-Instruct@v1")       the same for a branch, tag or commit

Why: the cache is read without huggingface_hub, so a model that is there loads without that package and
without a network. config.json is downloaded first, so an unsupported model costs no download of weights.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from entropix_jax import files
from entropix_jax.checkpoints import checkpoint, orbax_store, safetensors_file
from entropix_jax.errors import UserError

# What the engine reads of a repository besides weights.
TEXTS = (
  "config.json",
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates/*.jinja",
  "tokenizer.model",
)
FILES = (
  *TEXTS,
  "original/tokenizer.model",  # its place in Meta's own repositories
  "model*.safetensors",
  "model.safetensors.index.json",
)
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # what scripts/get_smollm2.py fetches
_FOLDERS = ("checkpoints", "models")  # names of local folders, never of owners on the hub
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
# Class names of huggingface_hub's errors, most specific first, and the ends of sentences about them.
# Names, because the classes have moved between its versions.
_REASONS = {
  "GatedRepoError": "its terms must be accepted first; do so at https://huggingface.co/{repo} and set HF_TOKEN to an access token of that account",
  "RepositoryNotFoundError": "the hub has no such repository, or HF_TOKEN gives no access to it; check the name and the token",
  "RevisionNotFoundError": "it has no revision {revision!r}; choose one of its branches, tags or commits",
  **dict.fromkeys(
    "LocalEntryNotFoundError OfflineModeIsEnabled RevisionResolutionError ConnectionError Timeout TransportError".split(),
    "the hub cannot be reached; connect to a network, or point config.checkpoint at a folder that holds the model",
  ),
  "EntryNotFoundError": "it has no config.json; choose a repository in Hugging Face's layout, or download its .gguf file and point config.checkpoint at that",
}


def find(name: str | os.PathLike) -> Path:
  """The folder or file of a checkpoint; one on the hub is downloaded into the hub's cache.

  Args:
    name: an existing path, or owner/model or owner/model@revision on the hub.

  Raises:
    UserError: there is no such path or repository, or it cannot be downloaded.
  """
  if path := local(name):
    return path
  name = os.fspath(name)
  path = os.path.expanduser(name).rstrip("/")
  if os.path.isdir(path + files.PART):
    orbax_store.found(Path(path))  # raises if its conversion is unfinished
  if Path(name).name == SMOLLM2:
    raise UserError(f"{name} does not exist; python scripts/get_smollm2.py fetches it.")
  repo, revision = _parsed(name)
  if not repo:
    raise UserError(
      f"{name or repr(name)} does not exist; point config.checkpoint at a folder, a .gguf file or a hub "
      "name such as HuggingFaceTB/SmolLM2-135M-Instruct."
    )
  owner = repo.partition("/")[0]
  if owner in _FOLDERS or os.path.isdir(owner):
    raise UserError(
      f"{name} does not exist, and is not looked up on the hub because {owner} names a local folder; download a model with "
      f"python scripts/download.py --repo=OWNER/MODEL --out={name}"
      ", or set config.checkpoint to OWNER/MODEL."
    )
  return download(repo, revision)


def local(name: str | os.PathLike) -> Path | None:
  """What `find` returns without a download: an existing path or a complete snapshot in the cache, else None."""
  path = os.path.expanduser(os.fspath(name))
  if os.path.exists(path):
    return Path(path)
  repo, revision = _parsed(os.fspath(name))
  with contextlib.suppress(OSError, ValueError):  # what cannot be read is not there
    return repo and _cached(repo, revision)


def cache() -> Path:
  """The folder of the hub's cache, by the environment variables of huggingface_hub."""
  get = os.environ.get
  home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
  found = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
  return Path(os.path.expandvars(os.path.expanduser(found)))


def _parsed(name: str) -> tuple[str | None, str]:
  """(owner/model, revision) of a name on the hub; (None, "main") if it is none."""
  found = _NAME.fullmatch(name)
  # The hub has no "--" in names, and the endings are those of files.
  if not found or ".." in name or "--" in found[1] or name.endswith((".gguf", ".safetensors")):
    return None, "main"
  return found[1], found[2] or "main"


def _cached(repo: str, revision: str) -> Path | None:
  """The complete snapshot of a revision in the cache. Raises OSError or ValueError for what cannot be read."""
  folder = cache() / f"models--{repo.replace('/', '--')}"
  ref = folder / "refs" / revision
  commit = ref.read_text().strip() if ref.is_file() else revision
  if not re.fullmatch("[0-9a-f]{40}", commit):
    return None
  for part in (folder / "blobs").glob("*.incomplete"):
    if not (part.parent / part.name.partition(".")[0]).exists():  # else it was completed since
      return None
  snapshot = folder / "snapshots" / commit
  return snapshot if _complete(snapshot) else None


def _complete(snapshot: Path) -> bool:
  """Whether a folder has config.json, a tokenizer and all shards, and no dangling link."""
  paths = list(snapshot.iterdir())
  names = {path.name for path in paths if path.exists()}
  if len(names) < len(paths) or "config.json" not in names:
    return False
  with contextlib.suppress(UserError):
    paths, listed = safetensors_file.files_of(snapshot)  # raises if a shard is missing
    # Without an index nothing says how many shards there should be.
    whole = bool(listed) or len(paths) == 1
    return whole and bool(names & {"tokenizer.json", "tokenizer.model"})
  return False


def download(repo: str, revision: str | None = None, folder: Path | None = None) -> Path:
  """Download what the engine needs of owner/model, and return the folder that it is in.

  A file gets its name when it is complete, and a second call resumes. An access token comes from HF_TOKEN.

  Args:
    revision: branch, tag or commit; default: the newest.
    folder: to download into; None: the hub's cache.

  Raises:
    UserError: the model is not supported, or the download failed.
  """
  place = folder or f"the cache {cache()}"
  for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
      raise UserError(
        f"{repo} must be downloaded to {place}, but {name} forbids it; unset {name}, or point "
        "config.checkpoint at a folder that holds the model."
      )
  try:
    import huggingface_hub as hub
  except ImportError:
    raise UserError(
      f"{repo} must be downloaded to {place}, which needs huggingface_hub; install it with "
      "`pip install huggingface_hub`."
    ) from None
  where = {"local_dir": folder} if folder else {"cache_dir": cache()}

  def take(call: Callable[..., str], **what) -> Path:
    try:
      return Path(call(repo, revision=revision, **where, **what))
    except Exception as error:  # the only class that all of its errors share
      reason = _reason(error, repo, revision)
      raise UserError(f"{repo} could not be downloaded to {place}: {reason}.") from None

  out = take(hub.hf_hub_download, filename="config.json").parent
  cfg = checkpoint.load_config(out)
  take(hub.snapshot_download, allow_patterns=FILES, ignore_patterns="*/*.safetensors")
  if folder and (folder / "original/tokenizer.model").exists():
    os.replace(folder / "original/tokenizer.model", folder / "tokenizer.model")
  if not any(out.glob("*.safetensors")):
    raise UserError(
      f"{out} holds no *.safetensors; repeat the download, or choose another repository if {repo} has none."
    )
  checkpoint.check_files(out, cfg)  # without a network the library accepts a partial folder
  return out


def _reason(error: Exception, repo: str, revision: str | None) -> str:
  kinds = {kind.__name__ for kind in type(error).__mro__}
  for name, reason in _REASONS.items():
    if name in kinds:
      return reason.format(repo=repo, revision=revision)
  return " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
