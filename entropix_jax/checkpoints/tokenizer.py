"""Text to token ids and back with tiktoken, from `tokenizer.model` or a byte-level `tokenizer.json`.

Why: one encoder serves both files, so a checkpoint gives the same ids whichever file it came with.
tiktoken merges by token id, while tokenizer.json lists its merges in order; a file for which the two
could differ is refused. All text is ordinary text: the spelling of a control token never encodes to
its id, so control ids come only from code (chat.py).
"""

import base64
import binascii
import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from entropix_jax.checkpoints.hf_config import read_json
from entropix_jax.errors import UserError

# The published pre-tokenisers of Llama 3 and of GPT-2. The third is GPT-2's on text in which every
# digit was split off first, so a digit also ends a run of spaces.
LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Longest run of whitespace, or of other characters: tiktoken's regex overflows its stack and panics
# near a million characters, so longer runs are cut, as in Meta's reference.
MAX_RUN = 25_000
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # the regex's \s
_RUNS = re.compile(
  rf"([{_SPACE}]{{{MAX_RUN}}}(?=[{_SPACE}])|[^{_SPACE}]{{{MAX_RUN}}}(?=[^{_SPACE}]))"
  rf"|[{_SPACE}]+|[^{_SPACE}]+"
)

# Spellings of role markers and ends of turns: control tokens, whatever a file says.
_CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_ALL_BYTES = frozenset(bytes([b]) for b in range(256))


class Tokenizer:
  """Encodes ordinary text to ids, decodes ids to bytes, and knows the control tokens by name.

  Attributes:
    vocab: the largest id plus one.
    special: control and added tokens, spelling -> id.
    control: ids of the special tokens that decoding leaves out.
    bos: id that begins a text.
    ends: ids that end a text according to tokenizer_config.json.
    end_of_text, eot, eom: Llama 3's ids that end a text, a turn and a message to a tool; None where
      the tokenizer lacks one.
  """

  def __init__(
    self,
    ranks: dict[bytes, int],
    special: dict[str, int],
    pattern: str,
    *,
    bos: str = "<|begin_of_text|>",
    eos: Sequence[str] = (),
    visible: Iterable[str] = (),
  ):
    """Args:
    ranks: ordinary tokens, bytes -> id; lower ids merge first.
    special: control and added tokens, spelling -> id.
    pattern: regex that cuts text into pieces; tokens are merged only within a piece.
    bos: spelling of the token that begins a text.
    eos: spellings of the tokens that are declared to end a text.
    visible: spellings in `special` that are text: they are matched in text, and decoding prints them.
    Raises UserError when an id is used twice, bos or eos is missing, or tiktoken refuses the rest.
    """
    self._bytes = {id: token for token, id in ranks.items()}
    self._bytes |= {id: name.encode() for name, id in special.items()}
    if len(self._bytes) != len(ranks) + len(special):
      raise UserError("The tokenizer gives one id to two tokens; download the tokenizer again.")
    for name in (bos, *eos):
      if name not in special:
        raise UserError(
          f"The tokenizer has no control token {name!r} to begin or end a text with; set the right "
          "bos_token and eos_token in tokenizer_config.json."
        )
    self.vocab = max(self._bytes) + 1
    self.special = dict(special)
    words = [name for name in visible if not _CONTROL.fullmatch(name) and name not in (bos, *eos)]
    self.control = frozenset(special.values()) - {special[name] for name in words}
    # The longest of those that begin at one place, as in `tokenizers`.
    longest = sorted(words, key=len, reverse=True)
    self._words = re.compile(f"({'|'.join(map(re.escape, longest))})") if words else None
    self.bos = special[bos]
    self.ends = tuple(special[name] for name in eos)
    self.end_of_text = special.get("<|end_of_text|>")
    self.eot = special.get("<|eot_id|>")
    self.eom = special.get("<|eom_id|>")
    self._unwritable = {token[0] for token in _ALL_BYTES - ranks.keys()}
    try:
      self._bpe = tiktoken.Encoding(
        "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
      )
    except (ValueError, OverflowError) as error:
      raise UserError(f"tiktoken cannot use this tokenizer ({error}); download it again.") from None

  def unused(self, vocab: int) -> tuple[int, ...]:
    """The ids below `vocab` that stand for no token."""
    return tuple(id for id in range(vocab) if id not in self._bytes)

  def shares_ids(self, other: "Tokenizer") -> bool:
    """Whether every id stands for the same token in both tokenizers."""
    return self._bytes == other._bytes

  def encode(self, text: str) -> list[int]:
    """Ids of `text` as ordinary text: no BOS and never a control id; added words have ids of their own.

    A lone surrogate, which UTF-8 cannot encode, is read as U+FFFD.

    Raises:
      UserError: the text has a character whose bytes this tokenizer lacks.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if self._unwritable:
      for char in set(text):
        if self._unwritable & set(char.encode()):
          raise UserError(f"This tokenizer cannot encode the character {char!r}; leave it out.")
    pieces = self._words.split(text) if self._words else [text]
    ids = []
    for i, piece in enumerate(pieces):
      if i % 2:
        ids.append(self.special[piece])
      else:
        ids += [id for part in _parts(piece) for id in self._bpe.encode_ordinary(part)]
    return ids

  def token_bytes(self, id: int) -> bytes:
    """The bytes of one token; for a control token, its spelling.

    Raises:
      UserError: no token has this id.
    """
    try:
      return self._bytes[int(id)]
    except KeyError:
      raise UserError(
        f"Token id {id} is not in the tokenizer, which has {len(self._bytes)} tokens; use the "
        "tokenizer that belongs to this checkpoint."
      ) from None

  def token_text(self, id: int) -> str:
    """One token in printable characters, for traces; invalid bytes and line breaks become escapes."""
    text = self.token_bytes(id).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

  def decode_bytes(self, ids: Iterable[int], show_control: bool = False) -> bytes:
    """The bytes of a sequence of ids, without control tokens unless `show_control`."""
    return b"".join(self.token_bytes(id) for id in ids if show_control or id not in self.control)

  def decode(self, ids: Iterable[int], show_control: bool = False) -> str:
    """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
    return self.decode_bytes(ids, show_control).decode("utf-8", "replace")


class StreamDecoder:
  """Decodes one row id by id: the pushes and the flush together equal `Tokenizer.decode`.

  It holds back up to three bytes, which may still become one character, and the characters that may
  still become a stop string. A complete stop string ends the text before it.

  Args:
    stop: strings that end the text; they need not begin or end at a token boundary.
  """

  def __init__(self, tokenizer: Tokenizer, show_control: bool = False, stop: Sequence[str] = ()):
    self._tokenizer = tokenizer
    self._show_control = show_control
    self._stop = tuple(stop)
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._held = ""
    self.stopped = False  # a stop string was found: later pushes give no text

  def __copy__(self) -> "StreamDecoder":
    """An independent decoder in the same state."""
    twin = StreamDecoder(self._tokenizer, self._show_control, self._stop)
    twin._utf8.setstate(self._utf8.getstate())
    twin._held, twin.stopped = self._held, self.stopped
    return twin

  def push(self, id: int) -> str:
    """The text that this id completes; "" inside a character and for a hidden control token."""
    text = self._utf8.decode(self._tokenizer.decode_bytes([id], self._show_control))
    # CPython waits for the last byte of an encoded surrogate, although it is never a character.
    held = self._utf8.getstate()[0]
    if held[:1] == b"\xed" and held[1:] >= b"\xa0":
      text += self._utf8.decode(b"", final=True)
    return self._before_stop(text) if self._stop else text

  def flush(self) -> str:
    """The text still held back at the end of a row, bytes as U+FFFD; then resets the decoder.

    What came with a stop string is no text.
    """
    text = self._held + self._utf8.decode(b"", final=True)
    text, self._held, self.stopped = "" if self.stopped else text, "", False
    return text

  def _before_stop(self, new: str) -> str:
    text, self._held = self._held + new, ""
    ends = [text.find(stop) for stop in self._stop if stop in text]
    self.stopped |= bool(ends)
    if self.stopped:
      return text[: min(ends, default=0)]
    begun = (n for n in range(min(len(text), max(map(len, self._stop)) - 1), 0, -1))
    keep = next((n for n in begun if any(s.startswith(text[-n:]) for s in self._stop)), 0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def _parts(text: str) -> Iterator[str]:
  """The text in parts: runs longer than MAX_RUN are cut after every MAX_RUN characters."""
  start = 0
  if len(text) > MAX_RUN:
    for run in _RUNS.finditer(text):
      if run[1]:
        yield text[start : run.end()]
        start = run.end()
  yield text[start:]


# -- files -----------------------------------------------------------------------------------------


def load(folder: str | Path) -> Tokenizer:
  """The tokenizer of a checkpoint folder, from tokenizer.model if it is there, else tokenizer.json.

  Raises:
    UserError: neither file exists, or the one that is read is damaged or of an unsupported kind.
  """
  folder = Path(folder)
  if (folder / "tokenizer.model").is_file():
    return _from_model(folder / "tokenizer.model")
  if (folder / "tokenizer.json").is_file():
    return _from_json(folder / "tokenizer.json")
  raise UserError(
    f"{folder} has neither tokenizer.model nor tokenizer.json; download one of them into it."
  )


def llama3_special(n: int) -> dict[str, int]:
  """Llama 3's control tokens, spelling -> id, after n ordinary tokens; named as in Llama 3.1 and later.

  Llama 3.0 calls n+4, n+8 and n+10 reserved; every id that a chat uses is the same there.
  """
  names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
  names += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
  names += ["eom_id", "eot_id", "python_tag"]
  names += [f"reserved_special_token_{i}" for i in range(3, 248)]
  return {f"<|{name}|>": n + i for i, name in enumerate(names)}


def _from_model(path: Path) -> Tokenizer:
  ranks: dict[bytes, int] = {}
  for i, line in enumerate(path.read_bytes().splitlines()):
    try:
      token, rank = line.split(b" ")
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
      raise UserError(
        f"{path} line {i + 1} is not a base64 token and its rank, as in Llama 3's tokenizer.model "
        "(SentencePiece files are not supported); use a Llama 3 checkpoint or download it again."
      ) from None
    if rank != b"%d" % i or len(ranks) != i + 1:
      raise UserError(f"{path} line {i + 1} is out of order or repeated; download it again.")
  if not ranks.keys() >= _ALL_BYTES or b"" in ranks:
    raise UserError(
      f"{path} lacks one of the 256 single bytes or has an empty token; download it again."
    )
  return Tokenizer(ranks, llama3_special(len(ranks)), LLAMA3_PATTERN)


# Keys of tokenizer.json's model, with the only values that mean plain byte-level BPE.
_MODEL_ONLY: dict[str, tuple[Any, ...]] = {
  "type": ("BPE",),
  "dropout": (None, 0),
  "continuing_subword_prefix": (None, ""),
  "end_of_word_suffix": (None, ""),
  "byte_fallback": (None, False),
  "ignore_merges": (None, False, True),
}
_MODEL_OTHER = {"vocab", "merges", "unk_token", "fuse_unk"}


def _from_json(path: Path) -> Tokenizer:
  """Read tokenizer.json, except post_processor (chat.py adds BOS), decoder, truncation and padding."""
  file, config = read_json(path), {}
  if path.with_name("tokenizer_config.json").is_file():
    config = read_json(path.with_name("tokenizer_config.json"))
  try:
    added = file["added_tokens"]
    special = {token["content"]: _id(token["id"]) for token in added}
    if not all(isinstance(name, str) for name in special):
      raise TypeError("the content of an added token is not text")
    if file.get("normalizer") is not None:
      raise UserError("has a normalizer")
    bos, eos = (_spellings(config.get(name)) for name in ("bos_token", "eos_token"))
    pattern = _json_pattern(file["pre_tokenizer"] or {"type": "none"})
    ranks = _json_ranks(file["model"], special)
  except UserError as error:
    raise UserError(
      f"{path} {error}; only byte-level BPE such as Llama 3's tokenizer.json is supported."
    ) from None
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"{path} or the tokenizer_config.json beside it is not laid out as Hugging Face writes it "
      f"({type(error).__name__}: {error}); download it again."
    ) from None
  return Tokenizer(
    ranks,
    special,
    pattern,
    bos=bos[0] if bos else "<|begin_of_text|>",
    eos=eos,
    visible=[token["content"] for token in added if not token.get("special", True)],
  )


def _spellings(token: Any) -> list[str]:
  """A token of tokenizer_config.json: a dict in older files, a spelling in newer ones, or a list of them."""
  tokens = [] if token is None else token if isinstance(token, list) else [token]
  found = [token["content"] if isinstance(token, dict) else token for token in tokens]
  if not all(isinstance(token, str) for token in found):
    raise TypeError(f"{token!r} is not a token")
  return found


def _id(value: Any) -> int:
  if type(value) is not int or value < 0:
    raise TypeError(f"{value!r} is not a token id")
  return value


def _json_pattern(pre: dict[str, Any]) -> str:
  steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
  kinds = [step["type"] for step in steps]
  if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space", True):
    use_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
      return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and use_regex and steps[0]["individual_digits"]:
      return DIGITS_PATTERN
    split = steps[0]
    if kinds == ["Split", "ByteLevel"] and not use_regex and split["behavior"] == "Isolated":
      pattern = split["pattern"].get("Regex")
      if pattern in (LLAMA3_PATTERN, GPT2_PATTERN):
        return pattern
      # tiktoken drops text between two matches; tokenizer.json makes it a piece of its own.
      if pattern:
        return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"
  raise UserError(f"has a pre-tokenizer of the unsupported form {' + '.join(kinds)}")


def _json_ranks(model: dict[str, Any], special: dict[str, int]) -> dict[bytes, int]:
  for key, value in model.items():
    if key not in _MODEL_OTHER and value not in _MODEL_ONLY.get(key, ()):
      raise UserError(f"sets model.{key} to {value!r}")
  vocab = {token: _id(id) for token, id in model["vocab"].items() if token not in special}
  merges = [
    tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
  ]
  _check_merges(vocab, merges, bool(model.get("ignore_merges")))
  table = _byte_of_char()
  return {token.translate(table).encode("latin-1"): id for token, id in vocab.items()}


def _byte_of_char() -> dict[int, str]:
  """GPT-2's alphabet for bytes, as a table for `str.translate` to Latin-1.

  Printable Latin-1 characters stand for themselves, and characters from U+0100 on for the other
  bytes. A character outside the alphabet ends up outside Latin-1, so that encoding it fails.
  """
  plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = sorted({*range(0x100)} - plain)
  table = {b: chr(b) if b in plain else "\u0100" for b in range(0x100)}
  return table | {0x100 + i: chr(b) for i, b in enumerate(others)}


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, ...]], whole_first: bool) -> None:
  """Refuse a list of merges for which merging by the id of the result could give other tokens.

  Both methods agree if ids increase along the list and no two adjacent tokens spell a token without
  being a listed pair. The second condition holds for a token when all its splits are listed, or when
  the listed merges rebuild it from its bytes: then the last of these merges is the only pair that
  ever forms it. With `whole_first` (ignore_merges) a piece that is a token is taken whole; without
  it, every token must be rebuilt.
  """
  order = {merge: i for i, merge in enumerate(merges)}
  made = [vocab[left + right] for left, right in merges]
  if any(after < before for before, after in pairwise(made)):
    raise UserError("lists merges in another order than the ids of the tokens they make")
  for token in vocab:
    if whole_first:
      splits = [(token[:i], token[i:]) for i in range(1, len(token))]
      if all(split in order for split in splits if split[0] in vocab and split[1] in vocab):
        continue
    if _merged(token, order) != [token]:
      raise UserError(f"has the token {token!r}, which its merges do not make")


def _merged(text: str, order: dict[tuple[str, ...], int]) -> list[str]:
  """Textbook byte-pair encoding: merge the first listed pair, leftmost first, until none is left."""
  parts = list(text)
  while len(parts) > 1:
    rank, i = min((order.get(pair, len(order)), i) for i, pair in enumerate(pairwise(parts)))
    if rank == len(order):
      break
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  return parts
