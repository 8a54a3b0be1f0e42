# ruff: noqa: RUF001 (letters of other scripts)
"""IFEval (arXiv:2311.07911): instructions whose following a program can check.

The checks are written from the paper's table of instructions and from the wording of the prompts. Strict: the text as it is. Loose: any of the
text, the text without asterisks, and each of both without its first line, its last line or both. Prompts that cannot be followed within the
limit are left out: those that ask for more than WORDS words, and those longer than LONGEST characters.

Languages are told by script and, within a script, by letters and function words. This decides all the languages that the
prompts ask for; a text that it cannot decide counts as English in the checks of upper and lower case, and as wrong in the check of another language.
tests/test_study_ifeval.py lists where these checks and those of lm-eval differ.
"""

import json
import re

from study_tasks import Item, read, split

LIMIT, ROOM, SIZES, METRIC, MODEL = 300, 512, (80, 400), "strict", "other"
WORDS, LONGEST = 200, 700


def _compare(count: int, relation: str, n: int) -> bool:
  return count < n if relation == "less than" else count >= n


# -- languages -------------------------------------------------------------------------------------

_SCRIPTS = {
  "kn": "ಀ-೿", "pa": "਀-੿", "gu": "઀-૿", "te": "ఀ-౿", "ta": "஀-௿", "bn": "ঀ-৿", "th": "฀-๿",
  "ko": "가-힣ᄀ-ᇿ", "he": "֐-׿", "ja": "぀-ヿ", "zh": "一-鿿", "el": "Ͱ-Ͽ",
  "deva": "ऀ-ॿ", "arab": "؀-ۿ", "cyrl": "Ѐ-ӿ", "latn": "A-Za-zÀ-ỹ",
}  # fmt: skip
# Words, or letters, that tell the languages of one script apart; the first is taken where none occurs.
_MARKS = {
  "deva": {
    "hi": "है हैं और का की के में से नहीं यह था को", "mr": "आहे आहेत आणि च्या मध्ये नाही होते ची ला हे", "ne": "छ छन् र को मा हो गर्न लाई पनि हुन्छ",
  },
  "arab": {"ar": "في من على إلى هذا التي أن هو", "fa": "است را این که با های می از", "ur": "ہے میں کے کی اور سے ہیں نہیں"},
  "cyrl": {"ru": "и в не на что это как по для", "bg": "и на да се за от е са това че ще"},
  "latn": {
    "en": "the of and to a in is that it for you with on are be this as i not have",
    "de": "der die das und ist nicht ein eine zu den mit auf für ich sie",
    "fr": "le la les et des est une un dans que pour pas vous il du",
    "es": "el la los y de que en es una por con para no se las",
    "it": "il di che e la per non è un sono una con della gli",
    "pt": "o de que e do da em um para não uma os com é as",
    "fi": "ja on ei se että hän oli olen ovat mutta kun niin myös tai",
    "sw": "na ya wa kwa ni katika za la kuwa hii cha sana yako kama",
    "vi": "và của là có không được cho một trong với những người đã để",
  },
}  # fmt: skip


def language(text: str) -> str | None:
  """The text's language as a code of two letters, None where nothing decides it."""
  counts = {name: len(re.findall(f"[{chars}]", text)) for name, chars in _SCRIPTS.items()}
  script = max(counts, key=counts.__getitem__)
  if not counts[script]:
    return None
  if script not in _MARKS:
    return script
  words = re.findall(r"[^\s.,;:!?\"'()\[\]*_।،؟-]+", text.lower())
  found = {lang: sum(w in marks.split() for w in words) for lang, marks in _MARKS[script].items()}
  best = max(found, key=found.__getitem__)
  return best if found[best] else None if script == "latn" else next(iter(_MARKS[script]))


def _english(text: str) -> bool:
  return language(text) in ("en", None)


# -- sentences -------------------------------------------------------------------------------------

_SHORT = "mr mrs ms dr prof st jr sr vs etc e.g i.e inc ltd no u.s p.s p.p.s a.m p.m"
_END = re.compile(r"(\S*?)([.!?]+)[\"'”’)\]*_]*(?=\s+(\S)|\s*\Z)")


def sentences(text: str) -> int:
  """Sentences: parts that end with . ! or ?, and what is left.

  A dot ends none after an abbreviation, an initial or a list's number, nor before a small letter, unless all letters are small.
  """
  count, end = 0, 0
  for match in _END.finditer(text):
    word, mark, then = match[1].lower().strip("\"'“(*"), match[2], match[3] or ""
    dot = mark == "."
    listed = word.isdigit() and not text[: match.start()].rpartition("\n")[2].strip()
    if dot and (
      word in _SHORT.split() or listed or (len(word) == 1 and word.isalpha() and word != "i")
    ):
      continue
    if dot and then.islower() and not text.islower():
      continue
    count, end = count + 1, match.end()
  return count + bool(text[end:].strip())


# -- the instructions ------------------------------------------------------------------------------


def _paragraphs(text, num_paragraphs):
  parts = [p.strip() for p in re.split(r"\s?\*\*\*\s?", text)]
  inner = parts[bool(not parts[0]) : len(parts) - (not parts[-1])]
  return all(inner) and len(inner) == num_paragraphs


def _first_word(text, num_paragraphs, nth_paragraph, first_word):
  parts = [p.strip() for p in text.split("\n\n") if p.strip()]
  if len(parts) != num_paragraphs:
    return False
  word = re.match(r"[\"'“‘]*([^\s.,?!\"'”’]*)", parts[nth_paragraph - 1])[1]
  return word.lower() == first_word.lower()


def _json(text):
  bare = re.sub(r"\A\s*```(?:json|JSON|Json)?|```\s*\Z", "", text).strip()
  try:
    json.loads(bare)
  except (ValueError, RecursionError):
    return False
  return True


def _postscript(text, postscript_marker):
  letters = [c for c in postscript_marker.lower() if c.isalpha()]
  end = r"\." if postscript_marker.endswith(".") else ""
  return bool(re.search(r"\.\s?".join(letters) + end, text.lower()))


def _capitals(text, capital_relation, capital_frequency):
  words = re.findall(r"[^\W_]+(?:[.'’&-][^\W_]+)*", text)
  return _compare(sum(w.isupper() for w in words), capital_relation, capital_frequency)


def _two(text):
  parts = [p.strip() for p in text.split("******")]
  inner = parts[bool(not parts[0]) : len(parts) - (not parts[-1])]
  return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _highlights(text, num_highlights):
  spans = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
  return sum(bool((a or b).strip()) for a, b in spans) >= num_highlights


def _times(text, keyword):
  return text.lower().count(keyword.lower())


CHECKS = {
  "punctuation:no_comma": lambda t: "," not in t,
  "keywords:existence": lambda t, keywords: all(_times(t, k) for k in keywords),
  "keywords:forbidden_words": lambda t, forbidden_words: (
    not any(re.search(rf"\b{re.escape(w)}\b", t, re.IGNORECASE) for w in forbidden_words)
  ),
  "keywords:frequency": lambda t, keyword, frequency, relation: _compare(
    _times(t, keyword), relation, frequency
  ),
  "keywords:letter_frequency": lambda t, letter, let_frequency, let_relation: _compare(
    _times(t, letter), let_relation, let_frequency
  ),
  "language:response_language": lambda t, language: globals()["language"](t) == language,
  "length_constraints:number_words": lambda t, num_words, relation: _compare(
    len(re.findall(r"\w+", t)), relation, num_words
  ),
  "length_constraints:number_sentences": lambda t, num_sentences, relation: _compare(
    sentences(t), relation, num_sentences
  ),
  "length_constraints:number_paragraphs": _paragraphs,
  "length_constraints:nth_paragraph_first_word": _first_word,
  "detectable_format:number_bullet_lists": lambda t, num_bullets: (
    len(re.findall(r"^\s*(?:\*(?!\*)|-).*\S", t, re.MULTILINE)) == num_bullets
  ),
  "detectable_format:number_highlighted_sections": _highlights,
  "detectable_format:multiple_sections": lambda t, section_spliter, num_sections: (
    len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", t)) >= num_sections
  ),
  "detectable_format:title": lambda t: any(x.strip(" <>") for x in re.findall(r"<<([^\n]+?)>>", t)),
  "detectable_format:constrained_response": lambda t: any(
    f"My answer is {x}." in t for x in ("yes", "no", "maybe")
  ),
  "detectable_format:json_format": _json,
  "detectable_content:postscript": _postscript,
  "detectable_content:number_placeholders": lambda t, num_placeholders: (
    len(re.findall(r"\[.*?\]", t)) >= num_placeholders
  ),
  "change_case:capital_word_frequency": _capitals,
  "change_case:english_capital": lambda t: t.isupper() and _english(t),
  "change_case:english_lowercase": lambda t: t.islower() and _english(t),
  "combination:repeat_prompt": lambda t, prompt_to_repeat: (
    t.strip().lower().startswith(prompt_to_repeat.strip().lower())
  ),
  "combination:two_responses": _two,
  "startend:end_checker": lambda t, end_phrase: (
    t.strip().strip('"').lower().endswith(end_phrase.strip().lower())
  ),
  "startend:quotation": lambda t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
}


def loosened(text: str) -> list[str]:
  """The texts of which one must follow an instruction in the loose sense."""
  lines = text.split("\n")
  cut = [text, *("\n".join(x).strip() for x in (lines[1:], lines[:-1], lines[1:-1]))]
  return [*cut, *(x.replace("*", "") for x in cut)]


def followed(name: str, kwargs: dict, text: str, loose: bool = False) -> bool:
  """Whether a text follows an instruction; an empty text follows none."""
  check, texts = CHECKS[name], loosened(text) if loose else [text]
  return any(bool(check(t, **kwargs)) for t in texts if t.strip())


def items(part, n, data):
  """The prompts."""
  raw = read(
    data, "ifeval.jsonl", "github.com/google-research/google-research, instruction_following_eval"
  )
  every = []
  for x in raw:
    asked = list(zip(x["instruction_id_list"], x["kwargs"], strict=True))
    many = any(k.get("num_words", 0) > WORDS and k["relation"] == "at least" for _, k in asked)
    if not many and len(x["prompt"]) <= LONGEST:
      every.append(Item(str(x["key"]), x["prompt"], asked))
  return split(every, "ifeval", part, n, SIZES[0])


def score(item, text):
  """Whether all instructions are followed, strictly and loosely, and the share of those that are."""
  strict, loose = (
    [followed(name, kwargs, text, easy) for name, kwargs in item.want] for easy in (False, True)
  )
  return {
    "strict": float(all(strict)), "loose": float(all(loose)),
    "strict_share": sum(strict) / len(strict), "loose_share": sum(loose) / len(loose),
  }  # fmt: skip
