"""The tokenizer of a checkpoint, from whichever file it came with.

  tokenizer.json            `tokenizers`, whatever the file describes
  tokenizer.model           tiktoken for Llama 3's ranks, `sentencepiece` for a SentencePiece model
  model.gguf                the metadata as one of these: byte-level BPE or SentencePiece

Why: each file is read by the library that it was made for, from a copy without its control tokens, so
that text cannot spell one. Nothing here splits or merges text by itself. What begins a text (BOS or
nothing) is what the file says, not what the family does.
"""

import base64
import binascii
import copy
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from entropix_jax.checkpoints import gguf_file
from entropix_jax.checkpoints.hf_config import read_json
from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError, first_line

LLAMA3_RANKS = 128_000
# The published pre-tokenisers of Llama 3 and of GPT-2.
LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Longest run of whitespace, or of other characters: tiktoken's regex overflows its stack and panics
# near a million characters, so longer runs are cut, as in Meta's reference.
MAX_RUN = 25_000
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # the regex's \s
_RUNS = re.compile(
  rf"([{_SPACE}]{{{MAX_RUN}}}(?=[{_SPACE}])|[^{_SPACE}]{{{MAX_RUN}}}(?=[^{_SPACE}]))"
  rf"|[{_SPACE}]+|[^{_SPACE}]+"
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The spelling that Unigram gets for control tokens; random, so that no text can contain it.
_UNWRITTEN = f"\uffff{secrets.token_hex(8)}"
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load(path: str | Path, vocab: int | None = None) -> Tokenizer:
  """The tokenizer of a checkpoint: a folder or a .gguf file.

  Args:
    vocab: ids that the model has. Control tokens beyond them, such as a padding token that was added for
      training, are left out.

  Raises:
    UserError: there is none, or the one that is read is damaged, of an unsupported kind or of another model.
  """
  found = _read(Path(path))
  if vocab is not None and not found.cut(vocab):
    raise UserError(
      f"The tokenizer in {path} has {found.vocab} ids but the model only {vocab}; they do not belong together."
    )
  return found


def _read(path: Path) -> Tokenizer:
  try:
    return _found(path)
  except UserError as error:
    raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
  except OSError as error:
    raise UserError(f"The tokenizer in {path} cannot be read ({error.strerror}).") from None
  except BaseException as error:
    # tokenizers and sentencepiece raise nothing more special, and panics of Rust are no Exceptions.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise UserError(
      f"The tokenizer in {path} is damaged or not laid out as usual ({type(error).__name__}: "
      f"{first_line(error)}); download it again."
    ) from None


def _found(path: Path) -> Tokenizer:
  if stored := gguf_file.inside(path):
    return _from_gguf(stored)
  model, file = path / "tokenizer.model", path / "tokenizer.json"
  config = _config(path)
  if model.is_file() and (not file.is_file() or _is_llama3(model)):
    return _from_ranks(model, config) if _has_ranks(model) else _from_sentencepiece(model, config)
  if file.is_file():
    return _library(read_json(file), config)
  raise UserError(
    f"{path} has neither tokenizer.json nor tokenizer.model; download one of them into it."
  )


def _config(folder: Path) -> dict[str, Any]:
  """tokenizer_config.json, with the spellings of older files' special_tokens_map.json."""
  found: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).is_file():
      read = read_json(folder / name)
      if not isinstance(read, dict):
        raise UserError(f"{folder / name} is not a JSON object; download it again.")
      found |= {key: value for key, value in read.items() if value is not None}
  return found


def _spelling(token: Any) -> str:
  """A token of tokenizer_config.json: a dict in older files, a spelling in newer ones."""
  spelling = token["content"] if isinstance(token, dict) else token
  if not isinstance(spelling, str):
    raise TypeError(f"{token!r} is not a token")
  return spelling


def _names(
  config: Mapping[str, Any], special: Mapping[str, int]
) -> tuple[dict[str, str], list[str]]:
  """(name -> spelling, further spellings that end a text) of tokenizer_config.json.

  Names of tokens that there are not are left out, but for BOS and EOS, whose lack is an error.
  """
  named = {key: config[key] for key in _NAMES if config.get(key)}
  ends = named.get("eos_token", [])
  ends = [_spelling(end) for end in ends] if isinstance(ends, list) else []
  named = {key: value[0] if isinstance(value, list) else value for key, value in named.items()}
  spelt = {key: _spelling(value) for key, value in named.items()}
  return {key: name for key, name in spelt.items() if name in special or key in _NAMES[:2]}, ends


# -- tokenizer.json ------------------------------------------------------------------------------


def _library(file: dict[str, Any], config: Mapping[str, Any]) -> Tokenizer:
  added = file["added_tokens"]
  special = {token["content"]: _id(token["id"]) for token in added}
  hidden = {token["content"] for token in added if token.get("special", True)}
  names, ends = _names(config, special)
  vocab = file["model"]["vocab"]
  vocab = vocab if isinstance(vocab, dict) else {pair[0]: i for i, pair in enumerate(vocab)}
  spell, strips, alphabet = _spelled(file)
  tokens = {_id(id): spell(token) for token, id in vocab.items() if token not in special}
  bare = _bare(file, special)
  begun, later = _encoder(bare), None
  scheme = bare.get("pre_tokenizer")
  if any(step.get("prepend_scheme") == "first" for step in _steps(scheme, "pretokenizers")):
    never = copy.deepcopy(bare)
    for step in _steps(never["pre_tokenizer"], "pretokenizers"):
      if step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
    later = functools.cache(lambda: _encoder(never))

  def encode(text: str, begins: bool) -> list[int]:
    encoder = begun if begins or later is None else later()
    return encoder.encode(text, add_special_tokens=False).ids

  prefix = _prefix(file, config, special, names)
  if len(prefix) == 1:
    names.setdefault("bos_token", {id: name for name, id in special.items()}[prefix[0]])
  unknown = vocab.get(file["model"].get("unk_token"), file["model"].get("unk_id"))
  return Tokenizer(
    encode,
    tokens,
    special,
    hidden=hidden,
    names=names,
    ends=ends,
    prefix=prefix,
    strips=strips,
    trims={
      token["id"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
      for token in added
      if token.get("lstrip") or token.get("rstrip")
    },
    unknown=unknown,
    unwritable={b for b, char in alphabet.items() if char not in vocab},
  )


def _id(value: Any) -> int:
  if type(value) is not int or value < 0:
    raise TypeError(f"{value!r} is not a token id")
  return value


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
  """The steps of a normalizer, pre-tokenizer or decoder, which may be nested sequences."""
  if part is None:
    return []
  if part["type"] != "Sequence":
    return [part]
  return [step for inner in part[key] for step in _steps(inner, key)]


def _spelled(file: dict[str, Any]) -> tuple[Callable[[str], bytes], bool, dict[int, str]]:
  """How a token spells its bytes, whether decoding strips a text's first space, and the alphabet of bytes, if any."""
  decoders = _steps(file.get("decoder"), "decoders")
  kinds = {step["type"] for step in decoders}
  before = {step["type"] for step in _steps(file.get("pre_tokenizer"), "pretokenizers")}
  if "ByteLevel" in kinds or (not kinds and "ByteLevel" in before):
    table, alphabet = _alphabet()
    return lambda token: token.translate(table).encode("latin-1"), False, alphabet
  known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
  if not kinds or kinds - known:
    others = ", ".join(sorted(kinds - known)) or "none"
    raise UserError(
      f"The decoder of this tokenizer is not supported ({others}); byte-level and SentencePiece-like ones are."
    )
  space, strips = "\u2581", False
  for step in decoders:
    if step["type"] == "Metaspace":
      space = step.get("replacement", space)
      usual = "always" if step.get("add_prefix_space", True) else "never"
      strips |= step.get("prepend_scheme", usual) != "never"
    strips |= step["type"] == "Strip" and step.get("content") == " " and step.get("start") == 1

  def spell(token: str) -> bytes:
    byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()

  return spell, strips, {}


def _alphabet() -> tuple[dict[int, str], dict[int, str]]:
  """GPT-2's alphabet for bytes, as a table for `str.translate` to Latin-1, and byte -> character.

  Printable Latin-1 characters stand for themselves, and characters from U+0100 on for the other
  bytes. A character outside the alphabet ends up outside Latin-1, so that encoding it fails.
  """
  plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = sorted({*range(0x100)} - plain)
  table = {b: chr(b) if b in plain else "\u0100" for b in range(0x100)}
  table |= {0x100 + i: chr(b) for i, b in enumerate(others)}
  return table, {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _bare(file: dict[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The file without what could turn text into a control token, or add one."""
  bare = {**file, "added_tokens": [], "model": dict(file["model"])}
  bare |= dict.fromkeys(("post_processor", "truncation", "padding"))
  model = bare["model"]
  if isinstance(model["vocab"], list):  # Unigram may choose any entry, and so not these
    model["vocab"] = [
      [f"{_UNWRITTEN}{i}" if t in special else t, score]
      for i, (t, score) in enumerate(model["vocab"])
    ]
  elif model.get("ignore_merges"):  # a piece that is a token is taken whole
    keep = {model.get("unk_token")}
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in special or t in keep}
  return bare


def _encoder(file: dict[str, Any]):
  import tokenizers

  return tokenizers.Tokenizer.from_str(json.dumps(file))


def _prefix(file, config, special: Mapping[str, int], names: Mapping[str, str]) -> list[int]:
  """The ids that begin a text: as tokenizer_config.json says, else as the post-processor does."""
  bos = special.get(names.get("bos_token", ""))
  adds = config.get("add_bos_token")
  if isinstance(adds, bool) and (bos is not None or not adds):
    return [bos] if adds else []
  for step in _steps(file.get("post_processor"), "processors"):
    if step["type"] == "TemplateProcessing":
      ids: list[int] = []
      for part in step["single"]:
        if "SpecialToken" not in part:
          return ids
        ids += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    if step["type"] in ("RobertaProcessing", "BertProcessing"):
      return [step["cls"][1]]
  return []


# -- tokenizer.model: Llama 3's ranks ------------------------------------------------------------


def llama3_special(n: int) -> dict[str, int]:
  """Llama 3's control tokens, spelling -> id, after n ordinary tokens; named as in Llama 3.1 and later.

  Llama 3.0 calls n+4, n+8 and n+10 reserved; every id that a chat uses is the same there.
  """
  names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
  names += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
  names += ["eom_id", "eot_id", "python_tag"]
  names += [f"reserved_special_token_{i}" for i in range(3, 248)]
  return {f"<|{name}|>": n + i for i, name in enumerate(names)}


def _has_ranks(path: Path) -> bool:
  """Whether a tokenizer.model has lines of text; a SentencePiece model begins with the tag of its first piece."""
  with open(path, "rb") as file:
    return file.read(1) != b"\n"


def _is_llama3(path: Path) -> bool:
  return _has_ranks(path) and path.read_bytes().count(b"\n") in (LLAMA3_RANKS - 1, LLAMA3_RANKS)


def _from_ranks(path: Path, config: Mapping[str, Any]) -> Tokenizer:
  import tiktoken

  ranks: dict[bytes, int] = {}
  for i, line in enumerate(path.read_bytes().splitlines()):
    try:
      token, rank = line.split(b" ")
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
      raise UserError(
        f"{path} line {i + 1} is not a base64 token and its rank, as in Llama 3's tokenizer.model; "
        "download it again."
      ) from None
    if rank != b"%d" % i or len(ranks) != i + 1:
      raise UserError(f"{path} line {i + 1} is out of order or repeated; download it again.")
  if len(ranks) != LLAMA3_RANKS:
    raise UserError(
      f"{path} has {len(ranks)} ranks and Llama 3's tokenizer.model has {LLAMA3_RANKS}; download it again, or "
      "put the tokenizer.json of this model beside it."
    )
  special = llama3_special(LLAMA3_RANKS)
  # Some checkpoints give reserved tokens names of their own.
  renamed = {int(id): _spelling(t) for id, t in config.get("added_tokens_decoder", {}).items()}
  special = {renamed.get(id, name): id for name, id in special.items()}
  bpe = tiktoken.Encoding(
    "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
  )

  def encode(text: str, begins: bool) -> list[int]:
    del begins
    return [id for part in _parts(text) for id in bpe.encode_ordinary(part)]

  usual = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
  names, ends = _names(usual | dict(config), special)
  return Tokenizer(encode, {i: t for t, i in ranks.items()}, special, names=names, ends=ends)


def _parts(text: str) -> Iterator[str]:
  """The text in parts: runs longer than MAX_RUN are cut after every MAX_RUN characters."""
  start = 0
  if len(text) > MAX_RUN:
    for run in _RUNS.finditer(text):
      if run[1]:
        yield text[start : run.end()]
        start = run.end()
  yield text[start:]


# -- SentencePiece -------------------------------------------------------------------------------


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2 as sp

  model = sp.ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
  except DecodeError:
    raise UserError(f"{path} is damaged or is no SentencePiece model; download it again.") from None
  if not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
    raise UserError(f"{path} is cut short; download it again.")
  added = {_spelling(t): int(id) for id, t in config.get("added_tokens_decoder", {}).items()}
  if (path.parent / "added_tokens.json").is_file():
    added |= read_json(path.parent / "added_tokens.json")
  return _pieces(model, config, added)


def _pieces(model, config: Mapping[str, Any], added: Mapping[str, int]) -> Tokenizer:
  """The tokenizer of a SentencePiece ModelProto, with these tokens added, spelling -> id."""
  import sentencepiece

  kind = type(model.pieces.add() if not model.pieces else model.pieces[0])
  tokens, special, hidden, unknown = {}, {}, set(), None
  renamed = {_id(id): name for name, id in added.items()}
  for i, piece in enumerate(model.pieces):
    name = renamed.pop(i, None)
    if piece.type == kind.UNKNOWN:
      unknown = i
    if piece.type in (kind.CONTROL, kind.UNKNOWN):
      hidden.add(name or piece.piece)
    if piece.type in (kind.CONTROL, kind.UNKNOWN, kind.USER_DEFINED) or name:
      special[name or piece.piece] = i
      # Else the library would find it in text.
      piece.type = kind.UNKNOWN if i == unknown else kind.CONTROL
    elif piece.type == kind.BYTE:
      tokens[i] = bytes([int(_BYTE.fullmatch(piece.piece)[1], 16)])
    elif piece.type != kind.UNUSED:
      tokens[i] = piece.piece.replace("\u2581", " ").encode()
  decoder = config.get("added_tokens_decoder", {})
  hidden |= {_spelling(t) for t in decoder.values() if t.get("special")}
  special |= {name: id for id, name in renamed.items()}
  names, ends = _names(config, special)
  spec = model.trainer_spec
  ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
  by_id = {id: name for name, id in special.items()}
  names = {key: by_id[id] for key, id in ids.items() if id in by_id} | names
  hidden |= set(names.values())
  whole = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
  spaced, later = model.normalizer_spec.add_dummy_prefix, whole
  # Llama's own tokenizer puts a space before every piece between two control tokens; later ones do not.
  if spaced and config.get("legacy") is False:
    model.normalizer_spec.add_dummy_prefix = False
    later = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

  def encode(text: str, begins: bool) -> list[int]:
    return (whole if begins else later).encode(text)

  return Tokenizer(
    encode,
    tokens,
    special,
    hidden=hidden,
    names=names,
    ends=ends,
    prefix=() if config.get("add_bos_token") is False else None,
    strips=spaced,
    unknown=unknown,
  )


# -- GGUF ----------------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTES = range(1, 7)  # tokenizer.ggml.token_type


def _digits_and_gpt2():
  from tokenizers import pre_tokenizers as pre

  return [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]


def _splits(*patterns: str):
  from tokenizers import Regex
  from tokenizers import pre_tokenizers as pre

  splits = [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
  return [*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)]


# tokenizer.ggml.pre -> the pre-tokeniser. "default" is what llama.cpp does for files that name none.
_PRE: dict[str, Callable[[], list]] = {
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), lambda: _splits(LLAMA3_PATTERN)
  ),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits_and_gpt2),
  **dict.fromkeys(("gpt-2", "phi-2"), lambda: _splits(GPT2_PATTERN)),
  "default": lambda: _splits(
    r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]"
  ),
}


def _from_gguf(path: Path) -> Tokenizer:
  facts = gguf_file.read(path).metadata
  kind = facts.get("tokenizer.ggml.model")
  kinds = {"gpt2": _gguf_bpe, "llama": _gguf_sentencepiece}
  if kind not in [*kinds]:
    raise UserError(
      f"{path} has a tokenizer of the kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' "
      "(SentencePiece) are supported."
    )
  tokens = facts["tokenizer.ggml.tokens"]
  types = [int(t) for t in facts.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
  if len(types) != len(tokens):
    raise ValueError(f"{len(types)} types for {len(tokens)} tokens")
  config: dict[str, Any] = {}
  for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
    id = facts.get(f"tokenizer.ggml.{key}_token_id")
    if type(id) is int and 0 <= id < len(tokens):
      config[f"{ours}_token"] = tokens[id]
      if key in ("bos", "eos"):
        types[id] = _CONTROL
  if "tokenizer.ggml.add_bos_token" in facts:
    config["add_bos_token"] = bool(facts["tokenizer.ggml.add_bos_token"])
  return kinds[kind](facts, tokens, types, config)


def _gguf_bpe(facts, tokens: list[str], types: list[int], config: dict[str, Any]) -> Tokenizer:
  import tokenizers

  pre = facts.get("tokenizer.ggml.pre", "default")
  if pre not in _PRE:
    raise UserError(
      f"The pre-tokenizer {pre!r} is not known; known are: {', '.join(sorted(_PRE))}."
    )
  whole_first = pre in ("llama-bpe", "llama3", "llama-v3")
  config = {"add_bos_token": whole_first} | config
  ordinary = {t: i for i, t in enumerate(tokens) if types[i] == _NORMAL}
  special = {t: i for i, t in enumerate(tokens) if types[i] in (_UNKNOWN, _CONTROL, _USER)}
  merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
  bpe = tokenizers.models.BPE(vocab=ordinary, merges=merges, ignore_merges=whole_first)
  library = tokenizers.Tokenizer(bpe)
  library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(_PRE[pre]())
  table, alphabet = _alphabet()
  names, _ = _names(config, special)

  def encode(text: str, begins: bool) -> list[int]:
    del begins
    return library.encode(text, add_special_tokens=False).ids

  return Tokenizer(
    encode,
    {i: t.translate(table).encode("latin-1") for t, i in ordinary.items()},
    special,
    hidden={t for t, i in special.items() if types[i] != _USER},
    names=names,
    prefix=None if config["add_bos_token"] else (),
    unwritable={b for b, char in alphabet.items() if char not in ordinary},
  )


def _gguf_sentencepiece(facts, tokens, types: list[int], config: dict[str, Any]) -> Tokenizer:
  from sentencepiece import sentencepiece_model_pb2 as sp

  model = sp.ModelProto()
  scores = facts["tokenizer.ggml.scores"]
  for token, score, kind in zip(tokens, scores, types, strict=True):
    model.pieces.add(piece=token, score=float(score), type=kind)
  spec = model.trainer_spec
  spec.model_type, spec.byte_fallback = spec.BPE, _BYTES in types
  spec.unk_id = types.index(_UNKNOWN)
  spec.bos_id = int(facts.get("tokenizer.ggml.bos_token_id", -1))
  spec.eos_id = int(facts.get("tokenizer.ggml.eos_token_id", -1))
  spec.pad_id = -1
  rules = model.normalizer_spec
  rules.name, rules.remove_extra_whitespaces = "identity", False
  rules.add_dummy_prefix = bool(facts.get("tokenizer.ggml.add_space_prefix", True))
  return _pieces(model, config, {})
