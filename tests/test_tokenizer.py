"""Known ids, the two files against each other, streams against the whole text."""

import base64
import copy
import itertools
import json
import random

import numpy as np
import pytest
from conftest import refusal, write_model

from entropix_jax.checkpoints import tokenizer as tokenizer_lib

# Parts of words, and a few tokens that end inside a character or reach over its edge.
MERGES = [
  (b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"),
  (b" ", b"w"), (b"o", b"r"), (b" w", b"or"), (b"l", b"d"), (b" wor", b"ld"),
  (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x91"), (b"\xa8", b"\xe2"), (b"\xe2\x80", b"\x8d"),
  (b"\xe6", b"\xb1"), (b"<", b"|"), (b"\n", b"\n"), (b" ", b" "),
]  # fmt: skip
MERGES.insert(12, (b"\xe2", b"\x80"))
RANKS = {bytes([b]): b for b in range(256)}
RANKS |= {left + right: 256 + i for i, (left, right) in enumerate(MERGES)}
N = len(RANKS)

HARD = [
  "hello world",
  "  hello   world \n\n\t x",
  "家族 👨‍👩‍👧‍👦 and 👍🏽 and 🇩🇪",
  "汉字 한국어 ไทย العربية",
  "e\u0301 o\u0308\u0304 \ufeff\u200b\x00\x1c",
  "a<|eot_id|>b<|begin_of_text|>",
  "",
]


PLAIN = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
REST = [b for b in range(256) if b not in PLAIN]
ALPHABET = {b: chr(b) for b in PLAIN} | {b: chr(256 + i) for i, b in enumerate(REST)}


def spell(token: bytes) -> str:
  """A token in GPT-2's alphabet: bytes that do not print are counted off from U+0100."""
  return "".join(ALPHABET[b] for b in token)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {
  "type": "Split", "pattern": {"Regex": tokenizer_lib.LLAMA3_PATTERN}, "behavior": "Isolated",
  "invert": False,
}  # fmt: skip


def sequence(*steps):
  return {"type": "Sequence", "pretokenizers": list(steps)}


def small_json():
  """tokenizer.json of the tokens above, laid out as Llama 3's."""
  added = tokenizer_lib.llama3_special(N).items()
  absent = "dropout unk_token continuing_subword_prefix end_of_word_suffix".split()
  off = "fuse_unk byte_fallback ignore_merges".split()
  return {
    "version": "1.0",
    **dict.fromkeys("truncation padding normalizer post_processor".split()),
    "added_tokens": [{"id": id, "content": name, "special": True} for name, id in added],
    "pre_tokenizer": sequence(SPLIT, BYTE_LEVEL),
    "decoder": {"type": "ByteLevel"},
    "model": {
      "type": "BPE",
      **dict.fromkeys(absent),
      **dict.fromkeys(off, False),
      "vocab": {spell(token): id for token, id in RANKS.items()},
      "merges": [f"{spell(left)} {spell(right)}" for left, right in MERGES],
    },
  }


def load_json(folder, file, config=None):
  """The tokenizer of a folder that holds this tokenizer.json."""
  (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
  return tokenizer_lib.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return tokenizer_lib.load(write_model(tmp_path_factory.mktemp("model"), RANKS))


@pytest.fixture(scope="module", params=["small", "json", "llama3"])
def tok(request, tmp_path_factory):
  if request.param == "json":
    return load_json(tmp_path_factory.mktemp("json"), small_json())
  return request.getfixturevalue(request.param)


# -- known ids -------------------------------------------------------------------------------------


def test_llama3_known_ids(llama3):
  assert llama3.encode("hello world") == [15339, 1917]
  assert llama3.encode("\n\n") == [271]
  assert llama3.decode([2564]) == " ..."
  assert llama3.vocab == 128_256
  assert (llama3.bos, llama3.end_of_text, llama3.eom, llama3.eot) == (
    128_000, 128_001, 128_008, 128_009,
  )  # fmt: skip
  assert llama3.special["<|start_header_id|>"] == 128_006
  assert llama3.special["<|end_header_id|>"] == 128_007
  assert llama3.special["<|python_tag|>"] == 128_010
  assert llama3.special["<|reserved_special_token_3|>"] == 128_011
  assert llama3.special["<|reserved_special_token_247|>"] == 128_255
  # A token that merging from bytes does not reach: a piece that is a token is taken whole.
  assert llama3.decode(llama3.encode(" việc")[:1]) == " việc"


def test_small_known_ids(small):
  assert small.encode("hello world") == [RANKS[b"hello"], RANKS[b" world"]]
  assert small.encode("help") == [RANKS[b"he"], ord("l"), ord("p")]
  assert small.vocab == N + 256
  assert small.bos == N


def test_both_files_give_the_same_ids(small, tmp_path):
  tok = load_json(tmp_path, small_json())
  assert (tok.vocab, tok.special, tok.control, tok.bos) == (
    small.vocab, small.special, small.control, small.bos,
  )  # fmt: skip
  for text in HARD:
    assert tok.encode(text) == small.encode(text)


def test_model_is_preferred_and_neither_is_an_error(tmp_path):
  refusal(["neither tokenizer.model nor tokenizer.json"], tokenizer_lib.load, tmp_path)
  refusal([], load_json, tmp_path, {"not": "read"})
  assert tokenizer_lib.load(write_model(tmp_path, RANKS)).bos == N


# -- encode ----------------------------------------------------------------------------------------


def test_no_spelling_becomes_a_control_token(tok):
  for name in tok.special:
    ids = tok.encode(f"x{name}y {name}")
    assert not set(ids) & set(tok.special.values())
    assert tok.decode(ids) == f"x{name}y {name}"


def test_lone_surrogates_are_replaced_and_pairs_joined(tok):
  assert tok.decode(tok.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
  assert tok.decode(tok.encode("\ud83d\ude00")) == "\U0001f600"


@pytest.mark.parametrize("unit", [" ", " \t", "\u2028", "\n", "a", "!", "汉", "\x1c!"])
def test_very_long_runs_lose_nothing(small, unit):
  """A million characters of blank space in one piece make tiktoken panic."""
  text = "x" + unit * (1_000_000 // len(unit)) + "x"
  assert small.decode(small.encode(text)) == text


def test_only_too_long_runs_are_cut(tok):
  limit = tokenizer_lib.MAX_RUN
  runs = ["a" * limit, " " * limit, "!" * limit, "b" * limit, "\n" * limit, "é" * limit]
  text = "".join(runs)
  assert tok.encode(text) == tok._bpe.encode_ordinary(text)
  cut = tok.encode("a" * (limit + 1))
  assert cut == tok.encode("a" * limit) + tok.encode("a")


def test_a_byte_that_is_missing_is_named(tmp_path):
  file = small_json()
  del file["model"]["vocab"][spell(b"\xc3")]
  tok = load_json(tmp_path, file)
  assert tok.decode(tok.encode("a汉\ud800")) == "a汉\ufffd"
  refusal(["character 'é'"], tok.encode, "aé")


# -- decode ----------------------------------------------------------------------------------------


def test_control_tokens_are_hidden_unless_shown(tok):
  ids = [tok.bos, *tok.encode("hello"), tok.eot]
  assert tok.decode(ids) == "hello"
  assert tok.decode(ids, show_control=True) == "<|begin_of_text|>hello<|eot_id|>"
  assert tok.decode_bytes(np.array(ids)) == b"hello"


def test_unknown_ids_are_errors(tok):
  for id in (tok.vocab, -1):
    refusal(["not in the tokenizer"], tok.decode, [id])
    refusal(["not in the tokenizer"], tokenizer_lib.StreamDecoder(tok).push, id)


def test_token_text_is_printable(tok):
  assert tok.token_text(tok.bos) == "<|begin_of_text|>"
  assert tok.token_text(tok.encode("\n")[0]) == "\\n"
  assert tok.token_text(tok.encode(" ")[0]) == " "
  assert "\\x" in tok.token_text(tok.encode("\U0010ffff")[0])
  for id in random.Random(0).sample(range(tok.vocab), 500):
    assert tok.token_text(id).isprintable()


def stream(tok, ids, show_control=False):
  decoder = tokenizer_lib.StreamDecoder(tok, show_control)
  return [decoder.push(id) for id in ids], decoder.flush()


@pytest.mark.parametrize(
  "stop", [("lo w",), ("zz", "hello wo"), ("h",), ("orld!", "o wor"), ("rld",)]
)
def test_a_stop_string_ends_a_text_wherever_tokens_do(small, stop):
  """What is held back is never more than may become one; where none comes, all of it is said."""
  for text in ("hello world", "hello wor", "lo lo world", "hello wo\u00e9"):
    ids = small.encode(text)
    decoder = tokenizer_lib.StreamDecoder(small, stop=stop)
    said, held = "", 0
    for n, id in enumerate(ids):
      said += decoder.push(id)
      if decoder.stopped:
        break
      held = max(held, len(small.decode(ids[: n + 1])) - len(said))
      assert not any(s in small.decode(ids[: n + 1]) for s in stop)
    said += decoder.flush()
    places = [text.find(s) for s in stop if s in text]
    assert said == text[: min(places, default=len(text))]
    assert held <= max(map(len, stop))  # a character that is not whole counts, too


def test_stream_prints_whole_characters_as_soon_as_they_are_whole(tok):
  for text in HARD:
    ids = tok.encode(text)
    pushes, rest = stream(tok, ids)
    assert "".join(pushes) == text == tok.decode(ids)
    assert rest == ""
    for i in range(len(ids)):  # what is out after i ids is every character that is complete by then
      sure = tok.decode_bytes(ids[: i + 1]).decode("utf-8", "ignore")
      assert "".join(pushes[: i + 1]) == sure


def test_stream_of_random_ids_is_the_whole(tok):
  rng = random.Random(0)
  for show_control in (False, True):
    for _ in range(300):
      ids = rng.choices(range(tok.vocab), k=30) + rng.choices(range(300), k=10)
      rng.shuffle(ids)
      pushes, rest = stream(tok, ids, show_control)
      assert "".join(pushes) + rest == tok.decode(ids, show_control)


def test_stream_holds_back_only_what_can_become_a_character(small):
  """Byte by byte, which is id by id among the first 256 of the small tokenizer."""
  code_points = [c for c in range(0x80, 0x110000, 64) if not 0xD800 <= c < 0xE000]
  starts = {chr(c).encode()[:k] for c in code_points for k in range(1, len(chr(c).encode()))}
  edges = bytes.fromhex("41 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
  for data in map(bytes, itertools.product(edges, repeat=3)):
    held = next((data[-k:] for k in (3, 2, 1) if data[-k:] in starts), b"")
    pushes, rest = stream(small, data)
    assert "".join(pushes) == data[: len(data) - len(held)].decode("utf-8", "replace")
    assert rest == ("\ufffd" if held else "")


def test_control_token_prints_nothing_and_keeps_what_is_held(tok):
  head, *tail = tok.encode("\U0010ffff")
  assert tail
  pushes, rest = stream(tok, [head, tok.eot, *tail])
  assert pushes[:2] == ["", ""]
  assert "".join(pushes) + rest == "\U0010ffff"
  assert stream(tok, [head, tok.eot]) == (["", ""], "\ufffd")


# -- tokenizer.json --------------------------------------------------------------------------------


def test_real_ranks_as_json_give_the_same_ids(llama3, tmp_path):
  """The conversion that the published tokenizer.json came from: every split of every token."""
  ranks = {llama3.token_bytes(id): id for id in range(128_000)}
  file = small_json()
  merges = sorted(
    (id, ranks[token[:i]], ranks[token[i:]])
    for token, id in ranks.items()
    for i in range(1, len(token))
    if token[:i] in ranks and token[i:] in ranks
  )
  assert len(merges) == 280_147  # as in the published file
  spelt = {id: spell(token) for token, id in ranks.items()}
  file["model"] |= {
    "vocab": {name: id for id, name in spelt.items()},
    "merges": [[spelt[left], spelt[right]] for _, left, right in merges],
    "ignore_merges": True,
  }
  file["added_tokens"] = [{"content": name, "id": id} for name, id in llama3.special.items()]
  tok = load_json(tmp_path, file)
  assert (tok.vocab, tok.special) == (llama3.vocab, llama3.special)
  for text in [*HARD, " việc điều každ", "I'll DON'T 12345 ...\r\n  x"]:
    assert tok.encode(text) == llama3.encode(text)
  file["model"]["ignore_merges"] = False  # " việc" is then not one token any more
  refusal(["which its merges do not make"], load_json, tmp_path, file)


def test_pre_tokenizers(tmp_path):
  def pieces(pre, text):
    file = small_json()
    file["pre_tokenizer"] = pre
    tok = load_json(tmp_path, file)
    return [tok.decode([id]) for id in tok.encode(text)]

  gpt2 = BYTE_LEVEL | {"use_regex": True}
  digits = {"type": "Digits", "individual_digits": True}
  assert pieces(gpt2, "  1") == [" ", " ", "1"]
  assert pieces(sequence(digits, gpt2), "  1") == ["  ", "1"]
  # Letters alone match; what lies between must not be lost.
  letters = sequence(SPLIT | {"pattern": {"Regex": r"\p{L}+"}}, BYTE_LEVEL)
  assert pieces(letters, "hello  <|!hello") == ["hello", "  ", "<|", "!", "hello"]


def test_bos_and_eos_come_from_tokenizer_config(tmp_path):
  file = small_json()
  file["added_tokens"] = [{"id": N, "content": "<s>"}, {"id": N + 1, "content": "</s>"}]
  refusal(["no control token '<|begin_of_text|>'"], load_json, tmp_path, file)
  tok = load_json(tmp_path, file, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
  assert (tok.bos, tok.ends, tok.end_of_text, tok.eot, tok.eom) == (N, (N + 1,), None, None, None)


def test_added_words_are_text_and_control_tokens_are_not(tmp_path):
  file, bos = small_json(), "<|begin_of_text|>"
  file["added_tokens"][-1] |= {"content": "<think>", "special": False}
  file["model"]["vocab"][bos] = N
  tok = load_json(tmp_path, file)
  assert tok.bos == N
  assert tok.decode([tok.bos, tok.special["<think>"]]) == "<think>"
  assert tok.encode("<think>") == [tok.special["<think>"]]
  assert N not in tok.encode(bos)


def test_agrees_with_the_tokenizers_library(tmp_path):
  hf = pytest.importorskip("tokenizers")
  pre = hf.pre_tokenizers
  isolated = pre.Split(hf.Regex(tokenizer_lib.LLAMA3_PATTERN), "isolated")
  rng = random.Random(0)
  bits = [*" \n\t\xa0\u3000\x85\x1c", "  ", "\r\n", "...\n"]
  bits += "'s 'LL \u017f a É e\u0301 ४२ ½ 123 7 !? 汉字 👨‍👩‍👧 🇩🇪 <|eot_id|>".split()
  texts = ["".join(rng.choices(bits, k=rng.randint(1, 25))) for _ in range(3000)]
  for steps in (
    [isolated, pre.ByteLevel(add_prefix_space=False, use_regex=False)],
    [pre.ByteLevel(add_prefix_space=False)],
    [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
  ):
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    trainer = hf.trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=["<|begin_of_text|>", "<|eot_id|>"],
      initial_alphabet=pre.ByteLevel.alphabet(),
      show_progress=False,
    )
    theirs.train_from_iterator(texts[:300], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours = tokenizer_lib.load(tmp_path)
    for text in texts:
      assert ours.encode(text) == theirs.encode(text).ids, text


# -- what is refused -------------------------------------------------------------------------------

JSON_FAULTS = {
  "another kind of model": ({"model": {"type": "Unigram"}}, "model.type"),
  "a normalizer": ({"normalizer": {"type": "NFC"}}, "normalizer"),
  "no pre-tokenizer": ({"pre_tokenizer": None}, "pre-tokenizer"),
  "another pre-tokenizer": ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
  "a leading space": (
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "ByteLevel",
  ),
  "no split": ({"pre_tokenizer": BYTE_LEVEL}, "pre-tokenizer"),
  "split twice": (
    {"pre_tokenizer": sequence(SPLIT, SPLIT, BYTE_LEVEL)},
    "Split + Split + ByteLevel",
  ),
  "removing split": (
    {"pre_tokenizer": sequence(SPLIT | {"behavior": "Removed"}, BYTE_LEVEL)},
    "pre-tokenizer",
  ),
  "a broken pattern": (
    {"pre_tokenizer": sequence(SPLIT | {"pattern": {"Regex": "("}}, BYTE_LEVEL)},
    "tiktoken cannot use",
  ),
  "dropout": ({"model": {"dropout": 0.1}}, "model.dropout"),
  "byte fallback": ({"model": {"byte_fallback": True}}, "model.byte_fallback"),
  "an unknown attribute": ({"model": {"colour": "red"}}, "model.colour"),
  "no merges": ({"model": {"merges": []}}, "which its merges do not make"),
  "unlisted result": ({"model": {"merges": ["h i"]}}, "not laid out"),
  "no vocabulary": ({"model": {"vocab": None}}, "not laid out"),
  "no added tokens": ({"added_tokens": None}, "not laid out"),
  "no BOS": ({"added_tokens": []}, "no control token"),
  "an id used twice": (
    {"added_tokens": [{"content": "<|begin_of_text|>", "id": 5}]},
    "one id to two tokens",
  ),
  "a negative id": (
    {"added_tokens": [{"content": "<|begin_of_text|>", "id": -5}]},
    "is not a token id",
  ),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_faults(tmp_path, fault):
  changes, message = JSON_FAULTS[fault]
  file = small_json()
  for key, value in changes.items():
    file[key] = file[key] | value if key == "model" else value
  refusal([message], load_json, tmp_path, file)


def test_json_merges_that_ids_do_not_follow(tmp_path):
  file = small_json()
  swapped = copy.deepcopy(file)
  merges = swapped["model"]["merges"]
  merges[0], merges[1] = merges[1], merges[0]
  refusal(["another order than the ids"], load_json, tmp_path, swapped)
  # "hel" is listed as h + el, but "he" is merged before, so the library could never make it.
  file["model"]["vocab"] |= {"el": N + 300, "hel": N + 301}
  file["model"]["merges"] += ["e l", "h el"]
  for whole_first in (False, True):
    file["model"]["ignore_merges"] = whole_first
    refusal(["'hel', which its merges do not make"], load_json, tmp_path, file)


def test_json_outside_the_alphabet(tmp_path):
  for name in ("hello world", "\u0150x"):
    file = small_json()
    file["model"]["vocab"][name] = N + 300
    file["model"]["ignore_merges"] = True
    refusal(["not laid out"], load_json, tmp_path, file)


def test_damaged_json(tmp_path):
  for text in ('{"model": {', "[]", "version https://git-lfs.github.com/spec/v1\n"):
    (tmp_path / "tokenizer.json").write_text(text)
    refusal(["download it again"], tokenizer_lib.load, tmp_path)


LINES = [base64.b64encode(token) + b" %d" % id for token, id in RANKS.items()]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n", "SentencePiece"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "line 1 is not a base64"),
    (b"", "lacks one of the 256 single bytes"),
    (b"\n".join(LINES[:200]), "lacks one of the 256 single bytes"),
    (b"\n".join([*LINES[:-1], LINES[-1][:-1]]), "out of order"),
    (b"\n".join([*LINES[:-1], LINES[-1][:2]]), "not a base64"),
    (b"\n".join(LINES[:5] + LINES[6:]), "line 6 is out of order"),
    (b"\n".join([*LINES, LINES[-1].split()[0] + b" %d" % N]), "repeated"),
    (b"\n".join([*LINES, b"YW!I= %d" % N]), "not a base64"),
    (b"\n".join([*LINES, b" %d" % N]), "lacks one of the 256 single bytes"),
  ],
)
def test_damaged_model(tmp_path, data, message):
  (tmp_path / "tokenizer.model").write_bytes(data)
  refusal([message], tokenizer_lib.load, tmp_path)
