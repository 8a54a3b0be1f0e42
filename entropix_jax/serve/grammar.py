"""Grammars that an answer must follow: JSON schemas, regular expressions, choices and context-free grammars.

Why a library: which ids may come next depends on the bytes of all tokens and on the state of a parser. llguidance
finds them in less than a millisecond for most grammars. It is imported only when a request needs it.

A client's grammar is untrusted. llguidance bounds the work for each token. The bounds here keep the construction
short and its recursion shallow: an overflow of its stack would end the process.
"""

import collections
import functools
import importlib.util
import json
import re
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError

# Bytes of a text. The time to build a regular expression grows with the square of its length.
_LONGEST = {"json": 2**16, "choice": 2**16, "regex": 2**13, "grammar": 2**14}
_PATTERNS = 2**13  # bytes of the regular expressions in a schema
_DEEP = 500  # rules of a grammar, and references in a schema
_KEPT = 16  # grammars that are kept
_STATES = 50_000  # of a grammar's lexer; one takes up to 2 KB
_BLANK = " "  # what may stand between two parts of JSON; a model could go on with more for ever


def installed() -> bool:
  """Whether the library is there."""
  return importlib.util.find_spec("llguidance") is not None


class Grammars:
  """The grammars that a model's answers may follow. Methods take time, and any thread may call them."""

  def __init__(self, tokenizer: Tokenizer, vocab: int):
    self._tokenizer, self._vocab = tokenizer, vocab
    self._lock = threading.Lock()
    self._kept: collections.OrderedDict[str, Grammar] = collections.OrderedDict()

  def find(self, kind: str, value: Any, lenient: bool = False) -> "Grammar":
    """A grammar, ready to be followed.

    Args:
      kind: "json": a schema, as an object or as text; "regex"; "choice": a list of texts; "grammar": Lark or GBNF.
      lenient: ignore what a schema asks for and llguidance cannot enforce.

    Raises:
      UserError: it cannot be used; says why, without the name of the field.
    """
    source = _source(kind, value, lenient)
    with self._lock:
      if source not in self._kept or self._kept[source].broken:
        self._kept[source] = Grammar(self._words, self._vocab, source)
        if len(self._kept) > _KEPT:
          self._kept.popitem(last=False)
      self._kept.move_to_end(source)
      return self._kept[source]

  @functools.cached_property
  def _words(self) -> Any:
    import llguidance

    words = _Words(self._tokenizer, self._vocab)
    made = llguidance.LLTokenizer(words)
    words.greedy = made.greedy_tokenize
    return made


class _Words:
  """A vocabulary as llguidance reads it. One id more than the model has stands for the end of the text."""

  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(self, tokenizer: Tokenizer, vocab: int):
    unused = {*tokenizer.unused(vocab)}
    self.tokens = [b"" if i in unused else tokenizer.token_bytes(i) for i in range(vocab)]
    self.tokens.append(b"<end of the text>")
    self.eos_token_id = vocab
    self.special_token_ids = [*tokenizer.special.values(), vocab]
    self._tokenizer, self.greedy = tokenizer, None

  def __call__(self, text: str) -> list[int]:
    """Ids of a text that the grammar leaves no choice about, as a prompt would have them."""
    try:
      ids = self._tokenizer.encode(text, False)
      if self._tokenizer.decode_bytes(ids) == text.encode():
        return ids
    except UserError:
      pass
    return self.greedy(text)  # the tokenizer would change the text


class Grammar:
  """A grammar that some text of the model follows. Raises UserError where there is none, or it is too complex.

  Attributes:
    broken: it became too complex in some text. Its guides share a lexer, which then fails them all.
  """

  def __init__(self, words: Any, vocab: int, source: str):
    import llguidance

    limits = llguidance.LLParserLimits(max_lexer_states=_STATES, verbose_errors=False)
    self.broken = False
    self._matcher = llguidance.LLMatcher(words, source, log_level=0, limits=limits)
    self.vocab, self.first_X = vocab, None
    self.first_X = self.guide(()).words()
    self.guide(()).mask()

  def guide(self, stop: Sequence[int]) -> "Guide":
    """The guide of one text, which may end with one of these ids."""
    return Guide(self, self._matcher.deep_copy(), stop)


class Guide:
  """Where a text is in its grammar; see `rows.Guide`. Ids that end the text are allowed where the grammar may end."""

  free, lifts = False, types.MappingProxyType({})

  def __init__(self, grammar: Grammar, matcher: Any, stop: Sequence[int]):
    self._grammar, self._matcher, self._next_X = grammar, matcher, grammar.first_X
    self._stop_X = np.zeros((-(-grammar.vocab // 32),), np.uint32)
    for id in stop:
      self._stop_X[id // 32] |= np.uint32(1 << id % 32)

  @property
  def over(self) -> bool:
    """Whether the text is complete and nothing may follow."""
    return self._matcher.is_stopped() and self._matcher.is_accepting()

  def push(self, id: int) -> None:
    """The row has emitted a token."""
    self._matcher.consume_token(id)
    self._next_X = None

  def words(self) -> np.ndarray:
    """llguidance's mask of what may come next, in which a bit after those of the model's ids is the end of the text."""
    bits = self._matcher.compute_bitmask()
    if self._matcher.is_error():
      self._grammar.broken = True
      raise UserError(_said(self._matcher.get_error()))
    return np.frombuffer(bits, np.uint32)

  def mask(self) -> np.ndarray:
    """bits_X of the ids that may come next. Raises UserError where there are none."""
    word_X = (self.words() if self._next_X is None else self._next_X).copy()
    word, bit = divmod(self._grammar.vocab, 32)
    end = np.uint32(1 << bit)
    may_end = word_X[word] & end
    word_X[word] &= ~end
    bits_X = word_X[: len(self._stop_X)]
    bits_X = bits_X | self._stop_X if may_end else bits_X & ~self._stop_X
    if not bits_X.any():
      raise UserError("no token of this model can follow")
    return bits_X


def _source(kind: str, value: Any, lenient: bool) -> str:
  """A grammar in llguidance's form. Raises UserError."""
  from llguidance import LLMatcher
  from llguidance.gbnf_to_lark import any_to_lark

  if kind == "json":
    value = _schema(value)
  text = value if isinstance(value, str) else orjson.dumps(value).decode()
  if value in ("", []) or (kind == "choice" and "" in value):
    raise UserError("it is empty")
  if len(text.encode()) > _LONGEST[kind]:
    raise UserError(f"it has more than {_LONGEST[kind]} bytes")
  if kind == "json":
    how = {"whitespace_flexible": True, "whitespace_pattern": _BLANK, "lenient": lenient}
    return LLMatcher.grammar_from_json_schema(text, overrides=how)
  if kind == "regex":
    return LLMatcher.grammar_from_regex(value)
  if kind == "choice":
    texts = (json.dumps(one, ensure_ascii=False) for one in dict.fromkeys(value))
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
  if text.lstrip().startswith("{"):
    raise UserError("it must be in Lark's form or in GBNF")
  try:
    lark = any_to_lark(text)
  except RecursionError:
    raise UserError("it is nested too deeply") from None
  except Exception as error:
    raise UserError(_said(str(error))) from None
  if sum(":" in line for line in lark.splitlines()) > _DEEP:
    raise UserError(f"it has more than {_DEEP} rules")
  return LLMatcher.grammar_from_lark(lark)


def _schema(value: Any) -> dict[str, Any]:
  """A schema as an object. Raises UserError for one that is none, or could take too long."""
  try:
    schema = orjson.loads(value) if isinstance(value, str) else value
    orjson.dumps(schema)
  except orjson.JSONDecodeError:
    raise UserError("it is not JSON") from None
  except orjson.JSONEncodeError:
    raise UserError("it is nested too deeply") from None
  if not isinstance(schema, dict):
    raise UserError("it is not a JSON object")
  names = list(_names(schema))
  if sum(name == "$ref" for name, _ in names) > _DEEP:
    raise UserError(f"it has more than {_DEEP} references")
  patterns = (inner for name, inner in names if name == "pattern" and isinstance(inner, str))
  keys = (
    key
    for name, inner in names
    if name == "patternProperties" and isinstance(inner, dict)
    for key in inner
  )
  if sum(len(x.encode()) for x in (*patterns, *keys)) > _PATTERNS:
    raise UserError(f"its patterns have more than {_PATTERNS} bytes")
  return schema


def _names(value: Any) -> Iterator[tuple[str, Any]]:
  """(key, value) of all objects in a JSON value."""
  if isinstance(value, dict):
    yield from value.items()
  for inner in value.values() if isinstance(value, dict) else value:
    if isinstance(inner, dict | list):
      yield from _names(inner)


def _said(error: str) -> str:
  """The part of llguidance's message that says what is wrong, as part of a sentence."""
  lines = [line.strip() for line in error.replace("<non-verbose/>", "").splitlines()]
  lines = [line for line in lines if line] or [""]
  line = next((line for line in lines if line.startswith("error: ")), lines[0])
  line = re.sub(r"^(error: |at \d+\(\d+\): |\d+\(\d+\): )+", "", line)[:150].rstrip(" .")
  return line if " " in line else "no text of this model follows it"
