"""Faults that users of other engines met, each with the right value; its siblings are in the same test."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
import tired
from conftest import TINY, random_weights, refusal
from test_engine import Words

from entropix_jax import rows, scheduler
from entropix_jax.checkpoints.tokenizer import StreamDecoder, Tokenizer
from entropix_jax.cli import printer, prompts, terminal
from entropix_jax.config import EngineConfig
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request, check_request
from entropix_jax.llm import LLM
from entropix_jax.sampling import plain
from entropix_jax.settings import ASSETS


def plain_engine(cfg=TINY):
  return Engine.create(cfg, random_weights(), plain, EngineConfig(2, 64))


# -- lists of ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("knobs", "words"),
  [
    ({"logit_bias": "5:1e39"}, ["bias of id 5", "float32"]),
    ({"logit_bias": {5: float("nan")}}, ["bias of id 5"]),
    ({"logit_bias": {5: float("inf")}}, ["bias of id 5"]),
    ({"logit_bias": "2147483648:1"}, ["2147483648", "not a token id"]),
    ({"logit_bias": "5:1,05:2"}, ["two biases"]),
    ({"banned": [2**70]}, [str(2**70), "not a token id"]),
    ({"logit_bias": {211: 1.0}}, ["211", "logit_bias", "vocabulary of 211"]),
    ({"banned": [999]}, ["999", "banned"]),
    ({"allowed": "5,211"}, ["211", "allowed"]),
    ({"dry_breakers": [400]}, ["400", "dry_breakers"]),
    ({"banned": list(range(301))}, ["301 entries", "300"]),
  ],
)
def test_an_id_that_cannot_be_used_is_named(knobs, words):
  message = refusal(words, check_request, plain_engine().setup, Request([1], knobs=knobs))
  assert len(message) < 300


@pytest.mark.parametrize(
  ("request_", "where"),
  [
    (Request([1, 205]), "the prompt"),
    (Request([1, 2**70]), "the prompt"),
    (Request([1], stop=[205]), "the stop ids"),
    (Request([1], knobs={"banned": [205]}), "banned"),
    (Request([1], actions={"inject": [205], "inject_ent": 1.0}), "inject"),
  ],
)
def test_an_id_that_is_no_token_is_named(request_, where):
  """It lies below the size of the vocabulary, which is padded."""
  setup = plain_engine(dataclasses.replace(TINY, unused=tuple(range(200, 211)))).setup
  words = ["205", "stands for no token"] if 2**70 not in request_.ids else [str(2**70), "outside"]
  refusal([*words, where], check_request, setup, request_)


def test_lists_have_room_for_three_hundred():
  cfg = dataclasses.replace(TINY, vocab=400)
  setup = plain_engine().setup
  setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, cfg=cfg))
  ids = list(range(300))
  for name, value in (("banned", ids), ("allowed", ids), ("logit_bias", dict.fromkeys(ids, 1.0))):
    check_request(setup, Request([1], knobs={name: value}))


def test_an_id_that_stands_for_no_token_is_never_drawn():
  """At the end of the vocabulary, as padding, and inside it."""
  for unused in ((209, 210), (7, 100, 210)):
    cfg = dataclasses.replace(TINY, unused=unused)
    e = Engine.create(cfg, random_weights(), tired, EngineConfig(2, 64))
    many = [Request([3, i], 40, seed=i, knobs={"temperature": 50.0}) for i in range(6)]
    drawn = [t.id for t in scheduler.generate(e, Words(), many)]
    assert not {*drawn} & {*unused}
    assert len({*drawn}) > 60
    asked = Request([1], knobs={"allowed": [1, unused[1]]})
    refusal([unused[1], "allowed"], check_request, plain_engine(cfg).setup, asked)
  law = e.prefill(Request([3, 1])).logits_1V
  assert np.isneginf(np.asarray(law)[0, list(unused)]).all()


# -- text ----------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_though_a_character_has_begun():
  tok = Tokenizer(None, {b: bytes([b]) for b in range(256)} | {256: b" \xf0\x9f"}, {})
  for ids in ([ord("a"), 256], [ord("a"), 256, 0x98, 0x80]):
    stream = StreamDecoder(tok, stop=[" "])
    assert "".join(map(stream.push, ids)) + stream.flush() == "a"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_ends_end_a_line_of_prompts(tmp_path, name, char):
  text = f"one{char}two"
  line = json.dumps({"prompt": text}, ensure_ascii=False) if name.endswith("jsonl") else text
  for end in ("\n", "\r\n"):
    (tmp_path / name).write_bytes(f"{line}{end}{line}{end}".encode())
    assert [p.text for p in prompts.read(tmp_path / name)] == [text, text]


def test_a_template_may_hold_other_braces():
  llm = LLM.demo(max_seq_len=128)
  for template, want in (("{a}: {}", "{a}: x"), ("{{}}", "{x}"), ("{0} {} }{", "{0} x }{")):
    ids = llm._session(template=template, format="plain").encode("x")
    assert llm.tokenizer.decode(ids) == want
  for template in ("", "{}{}", "{ }", "{0}"):
    refusal(["must hold {} once"], llm.generate, "x", template=template, format="plain")


def test_a_terminal_shows_escapes_and_does_not_obey_them():
  text = "a\x1b[2Jb\x07\r\x7f\x9b31mc\td\r\ne"
  shown = terminal.visible(text)
  assert shown == "a\u241b[2Jb\u2407\u240d\u2421\ufffd31mc\td\ne"
  token = rows.Token(0, 0, 1, text, "only", {"entropy": 1.0}, None, 0.0)
  assert "\x1b[2J" not in terminal.paint(token, ["only"])


@pytest.mark.parametrize("tty", [True, False])
def test_a_file_or_a_pipe_gets_the_text_as_it_is(monkeypatch, tty):
  monkeypatch.setattr("sys.stdout", types.SimpleNamespace(isatty=lambda: tty))
  assert printer.shown("a\x1b[2J") == ("a\u241b[2J" if tty else "a\x1b[2J")
  paint, _ = printer.painter(["only"], colours=False)
  token = rows.Token(0, 0, 1, "\x07", "only", {}, None, 0.0)
  assert paint(token) == ("\u2407" if tty else "\x07")


# -- checkpoints -----------------------------------------------------------------------------------


def test_ends_that_the_model_cannot_emit_are_left_out(tmp_path):
  """They come from generation_config.json, not from the user."""
  folder = tmp_path / "demo"
  shutil.copytree(ASSETS / "demo" / "instruct", folder)
  path = folder / "generation_config.json"
  known = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(known | {"eos_token_id": [777, 99999]}))
  llm = LLM(folder, max_seq_len=128)
  assert 99999 not in llm._model.stop
  assert 777 in llm._model.stop
  llm._plan(["Hello!"], max_new_tokens=1)


def test_many_ends_of_text_may_be_declared():
  check_request(plain_engine().setup, Request([1], stop=list(range(32))))
  refusal(["32 stop ids"], check_request, plain_engine().setup, Request([1], stop=list(range(33))))


def test_a_missing_folder_is_blamed_on_the_flag_that_names_it():
  llm = LLM.demo(max_seq_len=128)
  how = {"max_new_tokens": 1}
  words = ["no/such", "decoding.checkpoint"]
  with pytest.raises(ValueError, match="no/such") as error:
    llm._model.beside("no/such", "config.decoding.checkpoint")
  assert all(word in str(error.value) for word in words)
  assert "config.checkpoint" not in str(error.value)
  said = refusal(
    ["no/such"], llm.generate, "x", decoding={"name": "joint", "models": "no/such"}, **how
  )
  assert "models" in said
