"""Ids against the libraries on the original files, control tokens in text, and streams against whole texts."""

import base64
import itertools
import json
import os
import random
import shutil
import types

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from conftest import BYTES, LLAMA3, refusal, spell, tokenizer_json, write_tokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram

from entropix_jax import settings
from entropix_jax.checkpoints import vocabulary
from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer

# Parts of words, and a few tokens that end inside a character or reach over its edge.
MERGES = [
  (b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"),
  (b" ", b"w"), (b"o", b"r"), (b" w", b"or"), (b"l", b"d"), (b" wor", b"ld"),
  (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x91"), (b"\xa8", b"\xe2"), (b"\xe2", b"\x80"), (b"\xe2\x80", b"\x8d"),
  (b"\xe6", b"\xb1"), (b"<", b"|"), (b"\n", b"\n"), (b" ", b" "),
]  # fmt: skip
RANKS = BYTES | {left + right: 256 + i for i, (left, right) in enumerate(MERGES)}
N = len(RANKS)
# Lines of random text for each kind of tokenizer; TOKENIZER_LINES=100000 takes minutes.
LINES = int(os.environ.get("TOKENIZER_LINES", "1500"))

HARD = [
  "hello world",
  "  hello   world \n\n\t x",
  "家族 👨‍👩‍👧‍👦 and 👍🏽 and 🇩🇪",
  "汉字 한국어 ไทย العربية",
  "e\u0301 o\u0308\u0304 \ufeff\u200b\x00\x1c",
  "a<|eot_id|>b<|begin_of_text|>",
  "",
]


def small_json():
  """tokenizer.json of the tokens above."""
  return tokenizer_json(RANKS, MERGES)


def load_json(folder, file, config=None):
  """The tokenizer of a folder that holds this tokenizer.json."""
  return vocabulary.load(write_tokenizer(folder, file, config))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return load_json(tmp_path_factory.mktemp("small"), small_json())


# -- the libraries' own tokenizers -----------------------------------------------------------------

BITS = [*" \n\t\xa0\u3000\x85\x1c", "  ", "    ", "\r\n", "...\n", "\ufb01", "ﾊ"]
BITS += (
  "'s 'LL \u017f a É e\u0301 ४२ ½ 123 7 !? 汉字 👨‍👩‍👧 🇩🇪 def f(x): return {x}; // the ing".split()
)


def texts(seed, count):
  """Random text: words, digits, runs of spaces, code, and characters of all of Unicode."""
  rng = random.Random(seed)
  for i in range(count):
    bits = rng.choices(BITS, k=rng.randint(1, 25))
    if i % 4 == 0:
      points = (rng.choice((rng.randrange(0x3000), rng.randrange(0x110000))) for _ in range(10))
      bits += [chr(c) for c in points if not 0xD800 <= c < 0xE000]
    yield "".join(rng.sample(bits, len(bits)))


def train_library(model, pre, decoder, normalizer=None, trainer=trainers.BpeTrainer, **options):
  library = tokenizers.Tokenizer(model)
  library.pre_tokenizer, library.decoder = pre, decoder
  if normalizer:
    library.normalizer = normalizer
  names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256) if model_falls_back(model))]
  trained = trainer(vocab_size=3000, special_tokens=names, show_progress=False, **options)
  library.train_from_iterator(texts(0, 400), trained)
  file = json.loads(library.to_str())
  # The trainer takes bytes for special tokens; in published files they are ordinary ones.
  file["added_tokens"] = [t for t in file["added_tokens"] if not t["content"].startswith("<0x")]
  n = len(file["model"]["vocab"])
  extra = [
    added(n, "<|im_start|>"),
    added(n + 1, "<think>", special=False),
    added(n + 2, "zebra", special=False),
  ]
  file["added_tokens"] += extra
  return file


def model_falls_back(model):
  return getattr(model, "byte_fallback", False)


def added(id, content, **flags):
  usual = dict.fromkeys("single_word lstrip rstrip normalized".split(), False) | {"special": True}
  return {"id": id, "content": content} | usual | flags


def byte_level(*steps):
  alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
  pre = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
  return train_library(BPE(), pre, decoders.ByteLevel(), **alphabet)


def plain_bytes():
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
  return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def llama2(pre=None, normalizer=None):
  """Byte-fallback BPE that spells spaces as U+2581."""
  strip = [
    decoders.Replace("\u2581", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ]
  return train_library(
    BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
    pre,
    decoders.Sequence(strip),
    normalizer,
  )


JSON = {
  "llama3": lambda: byte_level(split(vocabulary.LLAMA3_PATTERN), plain_bytes()),
  "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
  "smollm": lambda: byte_level(
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
  ),
  "deepseek": lambda: byte_level(
    split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(r"[一-龥ࠀ-一가-퟿]+"),
    pre_tokenizers.Digits(individual_digits=True), plain_bytes(),
  ),
  "llama2": lambda: llama2(
    None, normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
  ),
  "metaspace": lambda: llama2(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
  "unigram": lambda: train_library(
    Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), normalizers.NFKC(),
    trainers.UnigramTrainer, unk_token="<unk>", initial_alphabet=[chr(c) for c in range(32, 0x500)],
  ),
}  # fmt: skip


@pytest.fixture(scope="module", params=JSON)
def pair(request, tmp_path_factory):
  """(our tokenizer, the library's on the same file)."""
  file = JSON[request.param]()
  tok = load_json(
    tmp_path_factory.mktemp(request.param), file, {"bos_token": "<s>", "eos_token": "</s>"}
  )
  return tok, tokenizers.Tokenizer.from_str(json.dumps(file))


def test_ids_are_the_librarys(pair):
  tok, library = pair
  for text in texts(1, LINES):
    try:
      ids = tok.encode(text)
    except ValueError:  # only the kind without bytes cannot write everything
      assert 0 in library.encode(text, add_special_tokens=False).ids
      continue
    assert ids == library.encode(text, add_special_tokens=False).ids, text
    said = library.decode(ids, skip_special_tokens=True)
    assert tok.decode(ids) == said or "\ufffd" in said, text


def test_added_words_are_text_and_markup_is_not(pair):
  """As in the library, except for what looks like a tag."""
  tok, library = pair
  assert tok.encode("a zebra here") == library.encode("a zebra here", add_special_tokens=False).ids
  mark, think = tok.special["<|im_start|>"], tok.special["<think>"]
  assert think + 1 in tok.encode("a zebra here")
  assert {*tok.special} == {"<unk>", "<s>", "</s>", "<|im_start|>", "<think>"}
  assert tok.decode([think + 1, think, mark]) == "zebra<think>"
  text = "<think>x<|im_start|></s> <s>"
  assert not {*tok.encode(text)} & {*tok.special.values()}
  assert tok.decode(tok.encode(text)) == text
  assert (tok.bos, tok.ends) == (1, (2,))


def test_random_ids_are_decoded_as_by_the_library(pair):
  tok, library = pair
  rng = random.Random(0)
  for _ in range(200):
    ids = [i for i in rng.choices(range(tok.vocab), k=20) if i in tok._bytes]
    theirs = library.decode(ids, skip_special_tokens=True)
    ours = tok.decode(ids)
    # Of bytes that are no character, Python replaces fewer at a time.
    assert ours == theirs or "\ufffd" in theirs
    pushes, rest = stream(tok, ids)
    assert "".join(pushes) + rest == ours


def test_a_piece_after_a_control_token_is_encoded_as_by_the_library(pair):
  tok, library = pair
  for text in ("hello world", " the ing", "123 7"):
    want = library.encode(f"<|im_start|>{text}", add_special_tokens=False).ids
    assert [tok.special["<|im_start|>"], *tok.encode(text, begins=False)] == want


# -- SentencePiece ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
  """A SentencePiece tokenizer.model in a folder of its own, and the library's processor of it."""
  folder = tmp_path_factory.mktemp("pieces")
  with open(folder / "tokenizer.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(line for text in texts(0, 400) for line in text.splitlines()),
      model_writer=file, vocab_size=1500, model_type="bpe", byte_fallback=True,
      normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
      user_defined_symbols=["<|im_start|>", "zebra"], character_coverage=0.98,
    )  # fmt: skip
  return folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def same_pieces(tok, library):
  for text in texts(1, LINES):
    assert tok.encode(text) == library.encode(text), text
    assert tok.decode(tok.encode(text)) == library.decode(library.encode(text)) == text
  rng = random.Random(0)
  for _ in range(200):
    ids = [i for i in rng.choices(range(len(library)), k=20) if i not in tok.control]
    assert tok.decode(ids) == library.decode(ids) or "\ufffd" in tok.decode(ids)
    pushes, rest = stream(tok, ids)
    assert "".join(pushes) + rest == tok.decode(ids)
  assert tok.prefix == (1,)
  assert tok.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_sentencepiece_model_alone(piece_model):
  folder, library = piece_model
  tok = vocabulary.load(folder)
  same_pieces(tok, library)
  mark = tok.special["<|im_start|>"]
  assert mark in library.encode("<|im_start|>")
  assert mark not in tok.encode("<|im_start|>")
  assert library.encode("a zebra") == tok.encode("a zebra")
  assert tok.decode([1, mark, *tok.encode("hello")]) == "<|im_start|> hello"


def test_the_space_after_a_control_token_is_as_tokenizer_config_says(piece_model, tmp_path):
  shutil.copytree(piece_model[0], tmp_path, dirs_exist_ok=True)
  spaced, library = vocabulary.load(tmp_path).encode("the", begins=False), piece_model[1]
  assert spaced == library.encode("the")
  (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "add_bos_token": false}')
  tok = vocabulary.load(tmp_path)
  assert tok.prefix == ()
  assert tok.decode_bytes(tok.encode("the", begins=False)) == b"the"
  assert tok.encode("the") == library.encode("the")


def test_tokens_that_were_added_to_a_sentencepiece_model(piece_model, tmp_path):
  shutil.copytree(piece_model[0], tmp_path, dirs_exist_ok=True)
  names = {"<|im_end|>": 1500, "<pad>": 1501}
  (tmp_path / "added_tokens.json").write_text(json.dumps(names))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
  tok = vocabulary.load(tmp_path, vocab=1501)
  assert tok.ends == (1500,)
  assert tok.special["<|im_end|>"] == 1500
  assert "<pad>" not in tok.special  # the model has no such id
  (tmp_path / "added_tokens.json").unlink()
  config = {
    "added_tokens_decoder": {"700": {"content": "<|end|>", "special": True}},
    "eos_token": "<|end|>",
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tok = vocabulary.load(tmp_path)
  assert (tok.special["<|end|>"], tok.ends) == (700, (700,))
  assert 700 not in {id for text in texts(1, 200) for id in tok.encode(text)}
  (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1500, "<pad>": 1501}))
  refusal(["1502 ids", "do not belong"], vocabulary.load, tmp_path, vocab=500)


# -- GGUF ------------------------------------------------------------------------------------------


def gguf_file(path, model, tokens, types, **facts):
  """A file of metadata only."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  for name, value in facts.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "gpt-2"])
def test_byte_level_bpe_of_a_gguf_file(tmp_path, pre):
  file = JSON[{"llama-bpe": "llama3", "gpt-2": "gpt2"}.get(pre, pre)]()
  library = tokenizers.Tokenizer.from_str(json.dumps(file))
  tokens = sorted(library.get_vocab().items(), key=lambda item: item[1])
  kinds = {t["content"]: 3 if t["special"] else 4 for t in file["added_tokens"]}
  path = gguf_file(
    tmp_path / "m.gguf", "gpt2", [t for t, _ in tokens], [kinds.get(t, 1) for t, _ in tokens],
    tokenizer_pre=pre, token_merges=[" ".join(m) for m in file["model"]["merges"]],
    bos_token_id=1, eos_token_id=2,
  )  # fmt: skip
  tok = vocabulary.load(path)
  assert "pad_token" not in tok.names
  for text in texts(1, LINES):
    assert tok.encode(text) == library.encode(text, add_special_tokens=False).ids, text
  assert tok.prefix == ((1,) if pre == "llama-bpe" else ())
  assert {*tok.special} == {"<unk>", "<s>", "</s>", "<|im_start|>", "<think>"}
  assert tok.encode("zebra") == [tok.special["<think>"] + 1]


def test_sentencepiece_of_a_gguf_file(tmp_path, piece_model):
  library = piece_model[1]
  ids = range(len(library))
  kinds = [
    2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1
    for i in ids
  ]
  for name in ("<|im_start|>", "zebra"):
    kinds[library.piece_to_id(name)] = 4
  path = gguf_file(
    tmp_path / "m.gguf", "llama", [library.id_to_piece(i) for i in ids], kinds,
    token_scores=[library.get_score(i) for i in ids], bos_token_id=1, eos_token_id=2,
  )  # fmt: skip
  same_pieces(vocabulary.load(path), library)


@pytest.mark.parametrize(
  ("facts", "words"),
  [
    ({"tokenizer_pre": "qwen9"}, "pre-tokenizer 'qwen9'"),
    ({"tokenizer_model": "rwkv"}, "'rwkv'"),
    ({"token_merges": ["a b c"]}, "damaged"),
    ({"token_types": [1]}, "1 types for 3 tokens"),
    ({}, "damaged"),
    ({"token_merges": ["a x"]}, "damaged"),
    ({"tokenizer_model": "llama", "token_scores": [0.0] * 3}, "damaged"),
  ],
)
def test_gguf_faults(tmp_path, facts, words):
  usual = {"tokenizer_pre": "smollm"}
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  for name, value in (
    {"tokenizer_model": "gpt2", "token_list": ["a", "b", "c"]} | usual | facts
  ).items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  refusal([words], vocabulary.load, tmp_path / "m.gguf")


@pytest.mark.real
def test_smollm2_known_ids(smollm2):
  """Every digit is a token; ids as the published tokenizer.json gives them."""
  tok = vocabulary.load(smollm2)
  assert tok.encode("Hello 1234 world") == [19556, 216, 33, 34, 35, 36, 905]
  assert (tok.prefix, tok.bos, tok.ends) == ((), 1, (2,))
  refusal(["cannot encode"], tok.encode, "\U00051178")  # it has no token for the byte F1


# -- Llama 3 ---------------------------------------------------------------------------------------


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


def test_llama3_both_files_give_the_same_ids(llama3, tmp_path):
  """tokenizer.json as published: every split of every token is a merge."""
  ranks = {llama3.token_bytes(id): id for id in range(128_000)}
  merges = sorted(
    (id, token[:i], token[i:])
    for token, id in ranks.items()
    for i in range(1, len(token))
    if token[:i] in ranks and token[i:] in ranks
  )
  assert len(merges) == 280_147  # as in the published file
  file = tokenizer_json(ranks, [merge[1:] for merge in merges])
  file["model"]["ignore_merges"] = True
  tok = load_json(tmp_path, file)
  assert (tok.vocab, tok.special, tok.prefix) == (llama3.vocab, llama3.special, llama3.prefix)
  for text in [*HARD, " việc điều každ", "I'll DON'T 12345 ...\r\n  x", *texts(3, 300)]:
    assert tok.encode(text) == llama3.encode(text)


def test_llama3s_ranks_are_preferred_and_others_are_not(llama3, tmp_path):
  shutil.copy(LLAMA3, tmp_path / "tokenizer.model")
  (tmp_path / "tokenizer.json").write_text("{}")
  assert vocabulary.load(tmp_path).vocab == 128_256
  lines = LLAMA3.read_bytes().splitlines(keepends=True)
  (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:100_000]))
  assert load_json(tmp_path, small_json()).vocab == N + 256
  (tmp_path / "tokenizer.json").unlink()
  refusal(["100000 ranks", "128000"], vocabulary.load, tmp_path)


def test_reserved_tokens_may_have_names(llama3, tmp_path):
  shutil.copy(LLAMA3, tmp_path / "tokenizer.model")
  config = {"added_tokens_decoder": {"128011": {"content": "<|tool|>"}}, "eos_token": "<|tool|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tok = vocabulary.load(tmp_path)
  assert (tok.special["<|tool|>"], tok.ends) == (128_011, (128_011,))


@pytest.mark.parametrize("unit", [" ", " \t", "\u2028", "\n", "a", "!", "汉", "\x1c!"])
def test_very_long_runs_lose_nothing(llama3, unit):
  """A million characters of blank space in one piece make tiktoken panic."""
  text = "x" + unit * (1_000_000 // len(unit)) + "x"
  assert llama3.decode(llama3.encode(text)) == text


def test_only_too_long_runs_are_cut():
  limit = vocabulary.MAX_RUN
  runs = ["a" * limit, " " * limit, "!" * limit, "\n" * limit, "é" * limit]
  assert [*vocabulary._parts("".join(runs))] == ["".join(runs)]
  assert [*vocabulary._parts("a" * (limit + 1))] == ["a" * limit, "a"]


# -- encode ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["small", "llama3"])
def tok(request):
  return request.getfixturevalue(request.param)


def test_small_known_ids(small):
  assert small.encode("hello world") == [RANKS[b"hello"], RANKS[b" world"]]
  assert small.encode("help") == [RANKS[b"he"], ord("l"), ord("p")]
  assert small.vocab == N + 256
  assert (small.bos, small.prefix) == (N, (N,))


def test_no_spelling_becomes_a_control_token(tok):
  for name in tok.special:
    ids = tok.encode(f"x{name}y {name}")
    assert not set(ids) & set(tok.special.values())
    assert tok.decode(ids) == f"x{name}y {name}"


def test_a_control_token_that_is_in_the_vocabulary_is_not_taken_whole(tmp_path):
  file = small_json()
  file["model"]["vocab"]["zz"] = N
  file["added_tokens"][0] |= {"content": "zz", "id": N}
  file["post_processor"] = None
  file["model"]["ignore_merges"] = True
  tok = load_json(tmp_path, file)
  assert tok.encode("zz") == [ord("z")] * 2


def test_lone_surrogates_are_replaced_and_pairs_joined(tok):
  assert tok.decode(tok.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
  assert tok.decode(tok.encode("\ud83d\ude00")) == "\U0001f600"


def test_a_byte_that_is_missing_is_named(tmp_path):
  file = small_json()
  del file["model"]["vocab"][spell(b"\xc3")]
  tok = load_json(tmp_path, file)
  assert tok.decode(tok.encode("a汉\ud800")) == "a汉\ufffd"
  refusal(["character 'é'"], tok.encode, "aé")


def test_what_begins_a_text_is_what_the_files_say(tmp_path):
  file, config = small_json(), {"bos_token": "<|begin_of_text|>"}
  assert load_json(tmp_path, file).prefix == (N,)
  assert load_json(tmp_path, file, config | {"add_bos_token": False}).prefix == ()
  file["post_processor"] = None
  assert load_json(tmp_path, file, config).prefix == ()
  assert load_json(tmp_path, file, config | {"add_bos_token": True}).prefix == (N,)


def test_control_tokens_that_the_model_lacks_are_forgotten(llama3, tmp_path):
  shutil.copy(LLAMA3, tmp_path / "tokenizer.model")
  tok = vocabulary.load(tmp_path, vocab=128_000)
  assert (tok.special, tok.bos, tok.prefix, tok.eot, tok.ends) == ({}, None, (), None, ())


def test_unigram_cannot_be_forced_to_a_control_token(tmp_path):
  """The library has no other way to write these characters."""
  file = JSON["unigram"]()
  file["model"]["vocab"] = [p for p in file["model"]["vocab"] if p[0] not in ("<", ">")]
  n = len(file["model"]["vocab"])
  file["added_tokens"] = [*file["added_tokens"][:3], added(n, "<|im_start|>")]
  tok = load_json(tmp_path, file, {"bos_token": "<s>", "eos_token": "</s>"})
  refusal(["cannot encode the character '<'"], tok.encode, "a<s>b")


def test_names_come_from_tokenizer_config(tmp_path):
  file = small_json() | {"post_processor": None}
  file["added_tokens"] = [added(N, "<s>"), added(N + 1, "</s>")]
  tok = load_json(tmp_path, file, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
  assert (tok.bos, tok.ends, tok.end_of_text, tok.eot, tok.eom) == (N, (N + 1,), None, None, None)
  refusal(["no control token '<x>'"], load_json, tmp_path, file, {"eos_token": "<x>"})
  tok = load_json(tmp_path, file, {"eos_token": ["<s>", {"content": "</s>"}]})
  assert tok.ends == (N, N + 1)


# -- decode ----------------------------------------------------------------------------------------


def test_control_tokens_are_hidden_unless_shown(tok):
  ids = [tok.bos, *tok.encode("hello"), tok.eot]
  assert tok.decode(ids) == "hello"
  assert tok.decode(ids, show_control=True) == "<|begin_of_text|>hello<|eot_id|>"
  assert tok.decode_bytes(np.array(ids)) == b"hello"


def test_unknown_ids_are_errors(tok):
  for id in (tok.vocab, -1):
    refusal(["not in the tokenizer"], tok.decode, [id])
    refusal(["not in the tokenizer"], StreamDecoder(tok).push, id)


def test_token_text_is_printable(tok):
  assert tok.token_text(tok.bos) == "<|begin_of_text|>"
  assert tok.token_text(tok.encode("\n")[0]) == "\\n"
  assert tok.token_text(tok.encode(" ")[0]) == " "
  assert "\\x" in tok.token_text(tok.encode("\U0010ffff")[0])
  for id in random.Random(0).sample(range(tok.vocab), 500):
    assert tok.token_text(id).isprintable()


def stream(tok, ids, show_control=False):
  decoder = StreamDecoder(tok, show_control)
  return [decoder.push(id) for id in ids], decoder.flush()


def test_the_space_that_begins_a_text_belongs_to_a_continuation(piece_model):
  tok = vocabulary.load(piece_model[0])
  ids = tok.encode("the zebra")
  for begins, want in ((True, "the zebra"), (False, " the zebra")):
    decoder = StreamDecoder(tok, begins=begins)
    assert "".join(decoder.push(id) for id in [1, *ids]) + decoder.flush() == want


@pytest.mark.parametrize(
  "stop", [("lo w",), ("zz", "hello wo"), ("h",), ("orld!", "o wor"), ("rld",)]
)
def test_a_stop_string_ends_a_text_wherever_tokens_do(small, stop):
  """What is held back is never more than may become one; where none comes, all of it is said."""
  for text in ("hello world", "hello wor", "lo lo world", "hello wo\u00e9"):
    ids = small.encode(text)
    decoder = StreamDecoder(small, stop=stop)
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


# -- what is refused -------------------------------------------------------------------------------

JSON_FAULTS = {
  "another kind of decoder": ({"decoder": {"type": "WordPiece"}}, "decoder"),
  "an unknown model": ({"model": {"type": "Magic"}}, "not laid out"),
  "an unknown pre-tokenizer": ({"pre_tokenizer": {"type": "Magic"}}, "not laid out"),
  "a broken pattern": (
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    "not laid out",
  ),
  "an unlisted result": ({"model": {"merges": ["h i"]}}, "not laid out"),
  "no vocabulary": ({"model": {"vocab": None}}, "not laid out"),
  "no added tokens": ({"added_tokens": None}, "not laid out"),
  "an id used twice": ({"added_tokens": [added(5, "<x>")], "post_processor": None}, "one id to two tokens"),
  "a negative id": ({"added_tokens": [added(-5, "<x>")]}, "is not a token id"),
  "a token outside the alphabet": ({"model": {"vocab": {"hello world": 1}}}, "not laid out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_faults(tmp_path, fault):
  changes, message = JSON_FAULTS[fault]
  file = small_json()
  for key, value in changes.items():
    file[key] = file[key] | value if key == "model" else value
  refusal([message], load_json, tmp_path, file)


CONFIG_FAULTS = [
  {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {"content": "<a>"}}}, {"added_tokens_decoder": {"5": {}}},
  {"bos_token": 7}, {"eos_token": [3]}, {"eos_token": {"x": 1}},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIG_FAULTS, ids=str)
@pytest.mark.parametrize("kind", ["ranks", "pieces"])
def test_faults_beside_a_tokenizer_model(kind, config, request, tmp_path):
  if kind == "ranks":
    request.getfixturevalue("llama3")
    shutil.copy(LLAMA3, tmp_path / "tokenizer.model")
  else:
    shutil.copy(request.getfixturevalue("piece_model")[0] / "tokenizer.model", tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  refusal(["tokenizer"], vocabulary.load, tmp_path)


def test_a_first_id_that_is_no_token_is_refused(tmp_path):
  file = small_json()
  file["added_tokens"] = []
  refusal(["download it again"], load_json, tmp_path, file)


def test_damaged_json(tmp_path):
  refusal(["neither tokenizer.json nor tokenizer.model"], vocabulary.load, tmp_path)
  for text in ('{"model": {', "[]", "version https://git-lfs.github.com/spec/v1\n"):
    (tmp_path / "tokenizer.json").write_text(text)
    refusal(["download it again"], vocabulary.load, tmp_path)


RANK_LINES = [base64.b64encode(token) + b" %d" % id for token, id in RANKS.items()]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "line 1 is not a base64"),
    (b"", "0 ranks"),
    (b"\n".join(RANK_LINES), f"{N} ranks"),
    (b"\n".join([*RANK_LINES[:-1], RANK_LINES[-1][:-1]]), "out of order"),
    (b"\n".join([*RANK_LINES[:-1], RANK_LINES[-1][:2]]), "not a base64"),
    (b"\n".join(RANK_LINES[:5] + RANK_LINES[6:]), "line 6 is out of order"),
    (b"\n".join([*RANK_LINES, RANK_LINES[-1].split()[0] + b" %d" % N]), "repeated"),
    (b"\n".join([*RANK_LINES, b"YW!I= %d" % N]), "not a base64"),
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n", "damaged"),
    (b"\n\x0c\n\x05<unk>\x15\x00\x00\x00\x00", "cut short"),
  ],
)
def test_damaged_model(tmp_path, data, message):
  (tmp_path / "tokenizer.model").write_bytes(data)
  refusal([message], vocabulary.load, tmp_path)


def test_a_sentencepiece_model_that_is_cut_anywhere_is_refused(piece_model, tmp_path):
  data = (piece_model[0] / "tokenizer.model").read_bytes()
  for end in (*range(1, 200, 7), len(data) // 2, len(data) - 30):
    (tmp_path / "tokenizer.model").write_bytes(data[:end])
    refusal(["download it again"], vocabulary.load, tmp_path)


def test_the_demo_tokenizer_is_its_library():
  folder = settings.ASSETS / "demo" / "instruct"
  tok, library = (
    vocabulary.load(folder),
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
  )
  for text in texts(4, LINES):
    assert tok.encode(text) == library.encode(text, add_special_tokens=False).ids
  assert [*tok.prefix] == library.encode("").ids


def test_ids_that_stand_for_no_token():
  tok = Tokenizer(lambda text, begins: [], {0: b"a", 2: b"b"}, {"<x>": 4})
  assert tok.unused(6) == (1, 3, 5)
  assert tok.cut(4)
  assert (tok.vocab, tok.special) == (3, {})
  assert not tok.cut(2)
  assert types.MappingProxyType(tok._bytes) == {0: b"a", 2: b"b"}
