# ruff: noqa: RUF001 (letters of other scripts)
"""The checks of benchmarks/study_tasks/ifeval.py: by hand, and beside lm-eval's where it is installed."""

import json
import random
import sys

import pytest
from command import ROOT

sys.path += [str(ROOT / name) for name in ("benchmarks", "scripts")]
from study_tasks import ifeval

D, L, F, K, S = "detectable_", "length_constraints:", "format:", "keywords:", "startend:"
N = "number_"
FOUR = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"}
# instruction, its arguments, texts that follow it, texts that do not
TABLE = [
  ("punctuation:no_comma", {}, ["A; b."], ["A, b."]),
  (K + "existence", {"keywords": ["mom", "Elm"]}, ["MOM under an elm"], ["mom"]),
  (K + "forbidden_words", {"forbidden_words": ["rock"]}, ["rocks"], ["Rock!", "a rock."]),
  (K + "frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, ["war, War"], ["war"]),
  (K + "frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war"], ["war war"]),
  (K + "letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["Qq"], ["q"]),
  (L + "number_words", {"num_words": 3, "relation": "at least"}, ["a b c"], ["a b"]),
  (L + "number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["it's me"]),
  (L + "number_sentences", {"num_sentences": 3, "relation": "less than"}, ["Dr. A. Smith left. Why?", "One. 2.5 is two", "see fig. x a.m. then. "], ["A! Be it. C d"]),
  (L + "number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb\n***"], ["a", "a\n***\n\n***\nb"]),
  (L + "nth_paragraph_first_word", FOUR, ["a\n\nWeekend, b", 'a\n\n\n\n"weekend" c'], ["a\n\nThe weekend", "weekend", "a\n\nweekend\n\nc"]),
  (D + F + "number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", "x\n  * a\n* b"], ["* a", "* a\n* b\n* c", "**a**\n* b"]),
  (D + F + "number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b c**"], ["*a*", "* *b", "*a\nb* *c*"]),
  (D + F + "multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}, ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1", "Section 1 Section 2"]),
  (D + F + "title", {}, ["<<a>>\nb"], ["<a>", "<< >>", "<<a\nb>>"]),
  (D + F + "constrained_response", {}, ["Well, My answer is no."], ["My answer is no", "yes"]),
  (D + F + "json_format", {}, ['{"a": 1}', '```json\n{"a": [1]}\n```'], ["{a: 1}", 'So: {"a": 1}']),
  (D + "content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s. c"], ["PS b"]),
  (D + "content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S b"], ["P.S. b"]),
  (D + "content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[a] (b)"]),
  ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, ["NASA I go"], ["NASA Is"]),
  ("change_case:english_capital", {}, ["THE CAT IS OUT 7"], ["THE cAT", "ПРИВЕТ И НА"]),
  ("change_case:english_lowercase", {}, ["the cat is out"], ["The cat", "привет и не на"]),
  ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, [" say HI. hi"], ["I say hi."]),
  ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a\n******\na", "a******b******c"]),
  (S + "end_checker", {"end_phrase": "The end."}, ['x the end."'], ["The end. x"]),
  (S + "quotation", {}, [' "a b"\n'], ['"a', '"']),
]  # fmt: skip
SAYS = {
  "hi": "यह एक अच्छा दिन है", "mr": "हा एक चांगला दिवस आहे आणि", "ne": "यो राम्रो दिन हो र म खुसी छु", "kn": "ಇದು ಒಳ್ಳೆಯ ದಿನ",
  "pa": "ਇਹ ਇੱਕ ਚੰਗਾ ਦਿਨ", "gu": "આ એક સારો દિવસ", "te": "ఇది మంచి రోజు", "ta": "இது ஒரு நல்ல நாள்", "bn": "এটি একটি ভাল দিন",
  "th": "วันนี้เป็นวันที่ดี", "ko": "오늘은 좋은 날", "ar": "هذا يوم جميل في المدينة", "fa": "امروز روز خوبی است", "ur": "یہ ایک اچھا دن ہے",
  "ru": "это хороший день и не так", "bg": "днес е хубав ден и ще се видим", "de": "das ist ein guter Tag", "it": "questa è una bella giornata",
  "pt": "hoje é um dia muito bom e não chove", "fi": "tänään on hyvä päivä ja olen iloinen", "sw": "leo ni siku nzuri kwa ajili ya watu wa hapa",
  "vi": "hôm nay là một ngày đẹp", "en": "this is a good day",
}  # fmt: skip


@pytest.mark.parametrize(
  ("name", "kwargs", "good", "bad"), TABLE, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_follows_an_instruction_and_what_does_not(name, kwargs, good, bad):
  assert [t for t in good if not ifeval.followed(name, kwargs, t)] == []
  assert [t for t in bad if ifeval.followed(name, kwargs, t)] == []


def test_every_instruction_is_in_the_table_and_every_language_is_told():
  assert {*ifeval.CHECKS} == {row[0] for row in TABLE} | {"language:response_language"}
  for code, text in SAYS.items():
    assert ifeval.language(text) == code
    assert ifeval.followed("language:response_language", {"language": code}, text)
  assert ifeval.language("123") is None


def test_loose_forgives_a_first_or_last_line_and_asterisks_and_nothing_else():
  end = ("startend:end_checker", {"end_phrase": "Bye."})
  assert not ifeval.followed(*end, "Bye.\nHope this helps")
  assert ifeval.followed(*end, "Bye.\nHope this helps", loose=True)
  assert ifeval.followed("startend:quotation", {}, 'Sure:\n**"a"**', loose=True)
  assert not ifeval.followed("punctuation:no_comma", {}, "a\nb,\nc", loose=True)
  assert not ifeval.followed("punctuation:no_comma", {}, " \n", loose=True)


def changed(rng, text, asked):
  """A text changed by one to three things that make checks true or false."""
  for _ in range(rng.randint(1, 3)):
    name, kwargs = rng.choice(asked)
    good, bad = next(((g, b) for n, _, g, b in TABLE if n == name), (["a"], ["b"]))
    known = [str(x) for v in kwargs.values() for x in (v if isinstance(v, list) else [v])]
    lines = text.split("\n")
    text = rng.choice([
      text.upper(), text.lower(), text.replace(",", ""), f'"{text}"', f"{text} {' '.join(known)}", "\n".join(lines[1:]),
      f"{rng.choice(good + bad)}\n{text}", f"{text}\n\n{rng.choice(good + bad)}", " ".join(text.split()[: rng.randint(1, 80)]),
      "\n\n".join(lines), "\n***\n".join(lines[: rng.randint(1, 6)]), "\n".join(f"* {x}" for x in lines[: rng.randint(1, 6)]), text.replace(". ", "! "),
    ])  # fmt: skip
  return text


def test_the_checks_agree_with_lm_evals():
  """On 2,000 changed texts; the differences are those that docs/study.md lists."""
  utils, nltk = map(pytest.importorskip, ("lm_eval.tasks.ifeval.utils", "nltk"))
  try:
    nltk.sent_tokenize("A. B.")
  except LookupError:
    pytest.skip("NLTK's punkt_tab is not there")
  data = ROOT.parent / "shared" / "data" / "ifeval.jsonl"
  if not data.is_file():
    pytest.skip("ifeval.jsonl is not there")
  rng, prompts = random.Random(0), [json.loads(x) for x in data.read_text().splitlines()]
  same = made = 0
  for _ in range(2000):
    x = rng.choice(prompts)
    asked = list(zip(x["instruction_id_list"], x["kwargs"], strict=True))
    text = changed(rng, rng.choice(prompts)["prompt"], asked)
    for name, kwargs in asked:
      if name == "keywords:letter_frequency" and not kwargs["letter"].isalpha():
        continue  # lm-eval draws a letter of its own then
      one = utils.InputExample(0, [name], x["prompt"], [dict(kwargs)])
      theirs = utils.test_instruction_following_strict(one, text).follow_instruction_list[0]
      same, made = same + (theirs == ifeval.followed(name, kwargs, text)), made + 1
  assert same / made > 0.995
