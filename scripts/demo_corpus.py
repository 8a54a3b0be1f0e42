"""The demo model's corpus, generated from a seed: short stories, facts, and word problems with worked steps.

Why: a generated corpus needs no licence and no download, and nothing held out leaks into training. Each
problem (kind and numbers) and each story (plot, hero, thing and place) is hashed, and the hash alone
decides whether it belongs to training, so held-out ones are never trained on, whatever the seed.

Print samples: python scripts/demo_corpus.py --seed=1 --count=5
"""

import argparse
import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Sequence

# -- words ---------------------------------------------------------------------------------------

GIRLS = "Ana Mia Zoë Lily Emma Ruth Nora Ivy Chloé Sara Rosa Maya Åsa Clara Inés Wanda".split()
BOYS = "Tom Ben Sam Leo José Max Finn Omar Paul Hugo Noé Carl Søren Ravi Ian Jack".split()
ANIMALS = (
  "dog cat fox bear rabbit mouse duck owl frog horse goat hedgehog squirrel elephant otter sheep"
).split()
PET_NAMES = "Pip Bella Coco Momo Biscuit Luna Toby Hazel Nori Poppy Rufus Tilly".split()
THINGS = (
  "kite ball drum lamp hat book bell boat umbrella basket scarf whistle puppet flute orange cake "
  "wagon spoon blanket violin"
).split()
PLACES = (
  "garden forest river market harbour meadow school hill beach village café library park farm "
  "mill lake"
).split()
COUNTED = (
  "apples pears marbles stickers books pens shells coins cookies eggs stamps buttons flowers "
  "stones cards beads candles nuts plums balloons"
).split()
HOLDERS = "boxes bags baskets jars trays shelves".split()
WEATHER = "sunny rainy windy cloudy snowy foggy warm cold bright quiet".split()
TIMES = "morning afternoon evening day".split()
MOODS = "brave kind small clever shy curious lazy cheerful careful tired".split()
FOODS = "soup bread honey cheese cherries pancakes jam rice".split()


def article(noun: str) -> str:
  """The noun preceded by "a" or "an"."""
  return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def singular(plural: str) -> str:
  """The singular of a plural in COUNTED or HOLDERS."""
  if plural == "cookies":
    return "cookie"
  if plural == "boxes":
    return "box"
  if plural == "shelves":
    return "shelf"
  return plural[:-1]


def held_out(*facts) -> bool:
  """Whether the item that these facts identify is held out of training: one in ten, decided by a hash."""
  text = "|".join(map(str, facts))
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def _pronouns(girl: bool, prefix: str = "") -> dict[str, str]:
  words = ("she", "her", "her", "herself") if girl else ("he", "him", "his", "himself")
  fields = dict(zip(("he", "him", "his", "himself"), words, strict=True))
  fields |= {key.capitalize(): word.capitalize() for key, word in fields.items()}
  return {prefix + key: word for key, word in fields.items()}


def _person(rng: random.Random, avoid: str = "") -> tuple[str, bool]:
  while True:
    girl = rng.random() < 0.5
    name = rng.choice(GIRLS if girl else BOYS)
    if name != avoid:
      return name, girl


# -- problems ------------------------------------------------------------------------------------

Equation = tuple[int, str, int]
_OPERATORS: dict[str, Callable[[int, int], int]] = {
  "+": lambda a, b: a + b,
  "-": lambda a, b: a - b,
  "*": lambda a, b: a * b,
  "/": lambda a, b: a // b,
}


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of problem: how to draw its numbers, the equations that solve it, its question templates."""

  draw: Callable[[random.Random], tuple[int, ...]]
  solve: Callable[..., list[Equation]]
  tales: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question, its worked steps and its checked answer."""

  kind: str
  numbers: tuple[int, ...]
  question: str
  steps: tuple[str, ...]  # "7 + 5 = 12"
  worked: str  # the steps as prose; ends with "The answer is N."
  answer: int

  @property
  def held_out(self) -> bool:
    return held_out(self.kind, *self.numbers)


def _ints(*bounds: tuple[int, int]) -> Callable[[random.Random], tuple[int, ...]]:
  return lambda rng: tuple(rng.randint(low, high) for low, high in bounds)


def _where(draw, accept) -> Callable[[random.Random], tuple[int, ...]]:
  def again(rng):
    while True:
      numbers = draw(rng)
      if accept(*numbers):
        return numbers

  return again


def _quotient(*bounds: tuple[int, int]) -> Callable[[random.Random], tuple[int, ...]]:
  # The first number is the product of the last two draws, so that the division has no remainder.
  def draw(rng):
    share, people = _ints(*bounds)(rng)
    return share * people, people

  return draw


def _share_after(rng: random.Random) -> tuple[int, ...]:
  share, people = rng.randint(3, 9), rng.randint(2, 8)
  first = rng.randint(2, share * people - 2)
  return first, share * people - first, people


def _average(rng: random.Random) -> tuple[int, ...]:
  a, b, c = _ints((20, 120), (20, 120), (20, 120))(rng)
  return a, b, c + 3 - (a + b + c) % 3


KINDS: dict[str, Kind] = {
  "sum": Kind(
    _ints((2, 99), (2, 99)),
    lambda a, b: [(a, "+", b)],
    ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"),
  ),
  "difference": Kind(
    _where(_ints((5, 99), (2, 98)), lambda a, b: a > b),
    lambda a, b: [(a, "-", b)],
    ("What is {a} - {b}?", "Take {b} away from {a}.", "How much is {a} minus {b}?"),
  ),
  "product": Kind(
    _ints((2, 12), (2, 12)),
    lambda a, b: [(a, "*", b)],
    ("What is {a} * {b}?", "Multiply {a} by {b}.", "How much is {a} times {b}?"),
  ),
  "gain": Kind(
    _ints((2, 99), (2, 60)),
    lambda a, b: [(a, "+", b)],
    (
      "{X} has {a} {things}. {He} buys {b} more. How many {things} does {X} have now?",
      "{X} has {a} {things}. {Y} gives {him} {b} more. How many {things} does {he} have now?",
      "There are {a} {things} on a table. {X} puts {b} more there. How many {things} are on the table?",
      "{X} found {a} {things} yesterday and {b} today. How many {things} did {he} find in all?",
    ),
  ),
  "lose": Kind(
    _where(_ints((8, 99), (2, 90)), lambda a, b: a > b + 1),
    lambda a, b: [(a, "-", b)],
    (
      "{X} has {a} {things}. {He} gives {b} to {Y}. How many {things} does {X} have left?",
      "There were {a} {things} in a basket. {X} took {b} of them. How many {things} are left?",
      "{X} had {a} {things}, but {he} lost {b} of them. How many {things} does {he} still have?",
    ),
  ),
  "gain_lose": Kind(
    _where(_ints((2, 60), (2, 40), (2, 80)), lambda a, b, c: a + b > c + 1),
    lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
    (
      "{X} has {a} {things}. {He} buys {b} more and gives {c} to {Y}. How many {things} does {X} have now?",
      "{X} has {a} {things}. {Y} gives {him} {b} more. Then {X} loses {c}. How many {things} does {he} have now?",
      "A shop has {a} {things}. It gets {b} more and sells {c}. How many {things} are in the shop now?",
    ),
  ),
  "lose_gain": Kind(
    _where(_ints((8, 90), (2, 80), (2, 50)), lambda a, b, c: a > b + 1),
    lambda a, b, c: [(a, "-", b), (a - b, "+", c)],
    (
      "{X} has {a} {things}. {He} gives {b} to {Y} and then finds {c} more. How many {things} does {X} have now?",
      "There are {a} people on a bus. {b} people get off and {c} people get on. How many people are on the bus now?",
      "A shop has {a} {things}. It sells {b} and gets {c} more. How many {things} are in the shop now?",
    ),
  ),
  "groups": Kind(
    _ints((2, 12), (2, 12)),
    lambda a, b: [(a, "*", b)],
    (
      "{X} has {a} {holders} with {b} {things} in each. How many {things} does {X} have?",
      "There are {a} {holders}. Each {holder} holds {b} {things}. How many {things} are there in all?",
      "{a} children have {b} {things} each. How many {things} do they have together?",
    ),
  ),
  "groups_extra": Kind(
    _ints((2, 9), (2, 9), (2, 40)),
    lambda a, b, c: [(a, "*", b), (a * b, "+", c)],
    (
      "{X} has {a} {holders} with {b} {things} in each, and {c} more {things}. How many {things} does {X} have?",
      "{X} buys {a} {holders} of {b} {things}. {Y} gives {him} {c} more {things}. How many {things} does {he} have now?",
    ),
  ),
  "groups_lose": Kind(
    _where(_ints((2, 9), (3, 9), (2, 60)), lambda a, b, c: a * b > c + 1),
    lambda a, b, c: [(a, "*", b), (a * b, "-", c)],
    (
      "{X} has {a} {holders} with {b} {things} in each. {He} gives {c} {things} to {Y}. How many {things} does {X} have left?",
      "There were {a} {holders} with {b} {things} in each, but {c} {things} broke. How many good {things} are left?",
    ),
  ),
  "share": Kind(
    _quotient((2, 12), (2, 9)),
    lambda a, b: [(a, "/", b)],
    (
      "{X} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
      "{X} puts {a} {things} into {b} {holders}, the same number in each. How many {things} are in each {holder}?",
    ),
  ),
  "share_after": Kind(
    _share_after,
    lambda a, b, c: [(a, "+", b), (a + b, "/", c)],
    (
      "{X} has {a} {things} and {Y} has {b}. They share them all equally among {c} friends. How many {things} does each friend get?",
      "{X} picks {a} {things} and then {b} more. {He} puts them into {c} {holders}, the same number in each. How many {things} are in each {holder}?",
    ),
  ),
  "more_than": Kind(
    _ints((2, 50), (2, 40)),
    lambda a, b: [(a, "+", b), (a, "+", a + b)],
    (
      "{X} has {a} {things}. {Y} has {b} more than {X}. How many {things} do they have together?",
      "There are {a} {things} in one {holder}. Another {holder} holds {b} more than that. How many {things} are in both?",
    ),
  ),
  "fewer_than": Kind(
    _where(_ints((6, 60), (2, 50)), lambda a, b: a > b + 1),
    lambda a, b: [(a, "-", b), (a, "+", a - b)],
    (
      "{X} has {a} {things}. {Y} has {b} fewer than {X}. How many {things} do they have together?",
      "On Monday {X} reads {a} pages. On Tuesday {he} reads {b} pages fewer. How many pages does {he} read in all?",
    ),
  ),
  "compare": Kind(
    _where(_ints((5, 99), (2, 98)), lambda a, b: a > b + 1),
    lambda a, b: [(a, "-", b)],
    (
      "{X} has {a} {things} and {Y} has {b}. How many more {things} does {X} have than {Y}?",
      "{Y} is {b} years old and {X}'s tree is {a} years old. How many years older is the tree?",
    ),
  ),
  "twice": Kind(
    _ints((2, 33),),
    lambda a: [(2, "*", a), (a, "+", 2 * a)],
    (
      "{X} has {a} {things}. {Y} has twice as many. How many {things} do they have together?",
      "One {holder} holds {a} {things}. Another {holder} holds twice as many. How many {things} are in both?",
    ),
  ),
  "unneeded": Kind(
    _ints((2, 60), (2, 20), (2, 39)),
    lambda a, b, c: [(a, "+", c)],
    (
      "{X} has {a} {things} and {b} {others}. {He} buys {c} more {things}. How many {things} does {X} have now?",
      "{X} is {b} years old and has {a} {things}. {Y} gives {him} {c} more. How many {things} does {X} have now?",
    ),
  ),
  "change": Kind(
    _where(_ints((2, 9), (2, 9), (20, 100)), lambda a, b, c: c > a * b + 1),
    lambda a, b, c: [(a, "*", b), (c, "-", a * b)],
    (
      "One of the {things} costs {b} dollars. {X} buys {a} of them and pays with {c} dollars. How many dollars does {he} get back?",
      "{X} has {c} dollars. {He} buys {a} {things} for {b} dollars each. How many dollars does {he} have left?",
    ),
  ),
  "two_products": Kind(
    _ints((2, 9), (2, 9), (2, 9), (2, 9)),
    lambda a, b, c, d: [(a, "*", b), (c, "*", d), (a * b, "+", c * d)],
    (
      "{X} buys {a} {holders} of {b} {things} and {c} {holders} of {d} {things}. How many {things} does {X} have?",
      "{X} buys {a} {things} for {b} dollars each and {c} {others} for {d} dollars each. How many dollars does {he} pay?",
    ),
  ),
  "three_steps": Kind(
    _where(_ints((10, 60), (2, 40), (2, 60), (2, 40)), lambda a, b, c, d: a + b > c + 1),
    lambda a, b, c, d: [(a, "+", b), (a + b, "-", c), (a + b - c, "+", d)],
    (
      "{X} has {a} {things}. {He} buys {b} more, gives {c} to {Y} and then finds {d}. How many {things} does {X} have now?",
      "There are {a} people on a train. {b} people get on. Then {c} people get off and {d} people get on. How many people are on the train now?",
    ),
  ),
  "big_sum": Kind(
    _ints((100, 899), (11, 899)),
    lambda a, b: [(a, "+", b)],
    (
      "What is {a} + {b}?",
      "A farm has {a} sheep and {b} goats. How many animals does the farm have?",
      "{X} counts {a} {things} on Monday and {b} on Friday. How many {things} does {he} count in all?",
    ),
  ),
  "big_difference": Kind(
    _where(_ints((120, 999), (11, 899)), lambda a, b: a > b + 9),
    lambda a, b: [(a, "-", b)],
    (
      "What is {a} - {b}?",
      "A farm has {a} sheep and sells {b} of them. How many sheep are left?",
      "A book has {a} pages. {X} has read {b} of them. How many pages are left?",
    ),
  ),
  "long_product": Kind(
    _ints((13, 49), (3, 9)),
    lambda a, b: [(a // 10 * 10, "*", b), (a % 10, "*", b), (a // 10 * 10 * b, "+", a % 10 * b)],
    (
      "What is {a} * {b}?",
      "A box holds {a} {things}. How many {things} do {b} boxes hold?",
    ),
  ),
  "longer_product": Kind(
    _ints((12, 49), (12, 39)),
    lambda a, b: [(a, "*", b // 10 * 10), (a, "*", b % 10), (b // 10 * 10 * a, "+", b % 10 * a)],
    (
      "What is {a} * {b}?",
      "A box holds {a} {things}. How many {things} do {b} boxes hold?",
    ),
  ),
  "long_share": Kind(
    _quotient((13, 49), (3, 9)),
    lambda a, b: [(a, "/", b)],
    (
      "What is {a} / {b}?",
      "{X} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
    ),
  ),
  "big_change": Kind(
    _where(_ints((3, 9), (12, 49), (100, 500)), lambda a, b, c: c > a * b + 1),
    lambda a, b, c: [(a, "*", b), (c, "-", a * b)],
    (
      "{X} has {c} dollars. {He} buys {a} {things} for {b} dollars each. How many dollars does {he} have left?",
      "{X} pays for {a} {things} with {c} dollars. Each one costs {b} dollars. How many dollars does {he} get back?",
    ),
  ),
  "big_gain_lose": Kind(
    _where(_ints((100, 499), (20, 499), (20, 799)), lambda a, b, c: a + b > c + 9),
    lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
    (
      "A farm has {a} sheep. It buys {b} more and sells {c}. How many sheep does the farm have now?",
      "A library has {a} books. It gets {b} new books and gives away {c}. How many books does the library have now?",
    ),
  ),
  "four_steps": Kind(
    _where(
      _ints((2, 9), (2, 9), (2, 9), (2, 9), (2, 60)), lambda a, b, c, d, e: a * b + c * d > e + 1
    ),
    lambda a, b, c, d, e: [
      (a, "*", b), (c, "*", d), (a * b, "+", c * d), (a * b + c * d, "-", e),
    ],
    (
      "{X} buys {a} {holders} of {b} {things} and {c} {holders} of {d} {things}. {He} gives {e} {things} to {Y}. How many {things} does {X} have left?",
      "{X} picks {b} {things} on each of {a} days, and {Y} picks {d} on each of {c} days. Together they give {e} of them away. How many {things} are left?",
    ),
  ),
  "huge_sum": Kind(
    _ints((1000, 8999), (200, 8999)),
    lambda a, b: [(a, "+", b)],
    (
      "What is {a} + {b}?",
      "A town has {a} people and another one has {b}. How many people live in both towns?",
    ),
  ),
  "huge_difference": Kind(
    _where(_ints((1200, 9999), (200, 8999)), lambda a, b: a > b + 9),
    lambda a, b: [(a, "-", b)],
    (
      "What is {a} - {b}?",
      "A library has {a} books and gives away {b}. How many books are left?",
    ),
  ),
  "big_product": Kind(
    _ints((101, 999), (3, 9)),
    lambda a, b: [(a, "*", b)],
    (
      "What is {a} * {b}?",
      "A truck carries {a} {things}. How many {things} do {b} trucks carry?",
    ),
  ),
  "big_three_steps": Kind(
    _where(
      _ints((100, 699), (20, 399), (20, 799), (20, 399)), lambda a, b, c, d: a + b > c + 9
    ),
    lambda a, b, c, d: [(a, "+", b), (a + b, "-", c), (a + b - c, "+", d)],
    (
      "A farm has {a} sheep. It buys {b} more, sells {c} and then buys {d}. How many sheep does the farm have now?",
      "There are {a} people at the market. {b} people come. Then {c} people leave and {d} people come. How many people are at the market now?",
    ),
  ),
  "average": Kind(
    _average,
    lambda a, b, c: [(a, "+", b), (a + b, "+", c), (a + b + c, "/", 3)],
    (
      "{X} reads {a} pages on Monday, {b} on Tuesday and {c} on Friday. How many pages is that a day?",
      "What is the average of {a}, {b} and {c}?",
    ),
  ),
}  # fmt: skip
# Training adds the kinds in three levels; the last stay hard, which leaves the model room to improve.
LEVELS = {1: tuple(KINDS)[:23], 2: tuple(KINDS)[:28], 3: tuple(KINDS)}

_STEP_STYLES = (
  lambda steps: [f"{step}." for step in steps],
  lambda steps: [f"{word} {step}." for word, step in zip(_words(steps), steps, strict=True)],
)


def _words(steps: Sequence[str]) -> list[str]:
  return {
    1: ["We know that"],
    2: ["First,", "Then"],
    3: ["First,", "Then", "Last,"],
    4: ["First,", "Then", "Next,", "Last,"],
  }[len(steps)]


def problem(
  rng: random.Random, want_held_out: bool = False, kinds: Sequence[str] = tuple(KINDS)
) -> Problem:
  """A problem of one of these kinds, from the held-out or the training part."""
  kind = rng.choice(kinds)
  spec = KINDS[kind]
  while True:
    numbers = spec.draw(rng)
    if held_out(kind, *numbers) == want_held_out:
      break
  x, girl = _person(rng)
  y, _ = _person(rng, avoid=x)
  things, others = rng.sample(COUNTED, 2)
  holders = rng.choice(HOLDERS)
  question = rng.choice(spec.tales).format(
    X=x, Y=y, things=things, thing=singular(things), others=others,
    holders=holders, holder=singular(holders), **_pronouns(girl),
    **dict(zip("abcde", numbers, strict=False)),
  )  # fmt: skip
  equations = spec.solve(*numbers)
  steps = tuple(f"{a} {op} {b} = {_OPERATORS[op](a, b)}" for a, op, b in equations)
  a, op, b = equations[-1]
  answer = _OPERATORS[op](a, b)
  style = _STEP_STYLES[rng.random() < 0.3]
  worked = " ".join([*style(steps), f"The answer is {answer}."])
  return Problem(kind, numbers, question, steps, worked, answer)


def extract_answer(text: str) -> int | None:
  """The number of the first "The answer is N" in a text, or None."""
  match = re.search(r"The answer is (-?\d+)", text)
  return int(match[1]) if match else None


# -- stories -------------------------------------------------------------------------------------

# A plot is a list of scenes; a scene is a tuple of alternative texts, where "" omits the scene.
_OPENINGS = (
  "Once upon a time there was {a_mood_hero} called {N}. {He} lived near the {place}.",
  "One {weather} {time}, {N} the {hero} went to the {place}.",
  "There was once {a_mood_hero} named {N} who loved the {place}.",
  "It was a {weather} {time}. {N} the {hero} was on {his} way to the {place}.",
  "{N} was {a_mood_hero}. Every {time} {he} walked to the {place}.",
)
_ENDINGS = (
  "{N} went home with a happy heart.",
  "From that day on, {N} and {F} were the best of friends.",
  "That night, {N} slept very well.",
  "And they laughed all the way home.",
  "{N} never forgot that day. ⭐",
  "It was the best day of the whole year.",
  'And {F} said, "What a day!"',
)
_PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
  "lost": (
    ("{He} had {a_thing} and took it everywhere.", "{He} carried {his} favourite {thing} with {him}."),
    (
      "But when {he} sat down to rest, the {thing} was gone!",
      "After a while {he} looked down and saw that {his} {thing} was not there.",
      "Suddenly {he} cried, \"Oh no! Where is my {thing}?\"",
    ),
    (
      "{He} looked under a bench, but it was not there.",
      "{He} looked behind every tree and found nothing.",
      "{He} asked everyone, but nobody had seen it.",
    ),
    (
      "Then {F} the {friend} came by. \"I will help you look,\" said {F}.",
      "{F} the {friend} heard {him} and came to help.",
    ),
    (
      "They walked back along the path, and there it was, in the tall grass.",
      "At last {F} found the {thing} beside a big stone.",
      "After a long search they saw the {thing} in a puddle.",
    ),
    ("\"Thank you!\" said {N}.", "{N} was so glad that {he} danced.", "{N} gave {F} a big hug."),
  ),
  "broken": (
    ("{He} was playing with {his} {thing}.", "{He} had a new {thing} and was very proud of it."),
    (
      "Then {he} tripped over a root, and the {thing} broke.",
      "But {he} held it too tight, and the {thing} broke in two.",
      "A strong wind blew, and the {thing} fell down and broke.",
    ),
    ("{N} began to cry.", "{N} was very sad and did not know what to do.", "\"My poor {thing}!\" said {N}."),
    (
      "{F} the {friend} saw this and said, \"Do not worry. I can fix it.\"",
      "\"Let me see,\" said {F} the {friend}. \"I think we can mend it.\"",
    ),
    (
      "{F} took some glue and a piece of string and worked for an hour.",
      "Together they used a little paint, a nail and a lot of time.",
    ),
    ("Soon the {thing} was as good as new.", "In the end it looked even better than before."),
  ),
  "stuck": (
    ("There {he} heard a small voice. \"Help! Help!\"", "{He} heard someone call for help."),
    (
      "{F} the {friend} was stuck in the mud.",
      "{F} the {friend} had climbed a tall tree and could not get down.",
      "{F} the {friend} had fallen into a deep hole.",
    ),
    (
      "\"Hold on!\" said {N}. {He} ran to fetch a long rope.",
      "{N} thought for a moment. Then {he} had an idea and brought a ladder.",
    ),
    (
      "{He} pulled and pulled, and at last {F} was free.",
      "It was hard work, but slowly {F} came out.",
      "With one big pull, {F} was safe again.",
    ),
    (
      "\"You saved me,\" said {F}. \"Please take my {thing} as a gift.\"",
      "To say thank you, {F} gave {N} {a_thing}.",
    ),
  ),
  "storm": (
    ("{He} wanted to play with {his} {thing}.", "{He} had {his} {thing} and some {food} in a bag."),
    (
      "Soon the sky turned dark and it began to rain.",
      "All at once there was thunder, and the rain came down.",
    ),
    (
      "{N} ran into an old barn, and there sat {F} the {friend}.",
      "\"Come in here!\" called {F} the {friend} from a dry cave.",
    ),
    ("They were both wet and cold.", "{F} was afraid of the thunder.", ""),
    (
      "{N} shared {his} {food}, and they told each other stories.",
      "They sang songs and ate {food} until the storm was over.",
    ),
    (
      "When the sun came out, they saw a rainbow over the {place}.",
      "At last the rain stopped, and they played with the {thing} together.",
    ),
  ),
  "share": (
    ("{F} the {friend} was there too.", "There {he} met {F} the {friend}."),
    (
      "On the ground they saw {a_thing}. \"It is mine!\" said {N}. \"No, it is mine!\" said {F}.",
      "Both of them wanted to play with the same {thing}.",
    ),
    ("They pulled and shouted, and soon both were angry.", "They did not talk to each other for an hour.", ""),
    (
      "Then {N} had an idea. \"Let us take turns,\" {he} said.",
      "\"This is silly,\" said {F}. \"We can share it.\"",
    ),
    (
      "First {N} played with the {thing}, and then it was {F}'s turn.",
      "So they played with the {thing} together, and that was much more fun.",
    ),
  ),
  "gift": (
    (
      "It was the birthday of {his} friend {F} the {friend}.",
      "{N} wanted to make a present for {F} the {friend}.",
    ),
    (
      "{He} had no money, so {he} decided to make {a_thing}.",
      "\"I know!\" said {N}. \"I will make {a_thing}.\"",
    ),
    (
      "{He} worked all day, and {his} hands got very tired.",
      "The first one was too small, and the second one was too big.",
      "It was not easy, but {he} did not give up.",
    ),
    ("When it was ready, {he} put it in a red box.", "At last the {thing} was done, and it was beautiful."),
    (
      "{F} opened it and smiled. \"This is the best gift of all!\"",
      "{F} was so happy that nobody could speak for a moment.",
    ),
    ("Then they ate {food} together.", ""),
  ),
  "fear": (
    (
      "But {N} had a secret: {he} was afraid of the dark.",
      "But {N} had a secret: {he} was afraid of deep water.",
      "But {N} was afraid of high places.",
    ),
    (
      "One day {his} {thing} fell where {he} did not dare to go.",
      "\"I left my {thing} over there,\" {he} said, \"but I am too scared to get it.\"",
    ),
    (
      "\"Take my hand,\" said {F} the {friend}. \"We will go together.\"",
      "{F} the {friend} said, \"Being brave means to be scared and to try.\"",
    ),
    ("{N} took one small step, and then another.", "{N} closed {his} eyes and counted to ten. Then {he} went."),
    ("And there was the {thing}! {N} was very proud.", "\"I did it!\" cried {N} and held up the {thing}."),
  ),
  "seed": (
    ("There {he} found a tiny seed.", "An old woman gave {him} a tiny seed."),
    ("{He} put it into the ground and gave it water.", "{N} planted it behind the {place}."),
    (
      "Days went by, and nothing happened.",
      "{He} waited and waited. \"Maybe it is asleep,\" {he} said.",
    ),
    (
      "{F} the {friend} said, \"Give it time, and sing to it.\"",
      "\"You must wait a little longer,\" said {F} the {friend}.",
    ),
    (
      "Then one morning there was a green leaf, and soon a tall tree.",
      "In spring a red flower came out of the ground.",
    ),
    ("{N} put {a_thing} beside it, so that everyone could find the spot.", "{N} and {F} sat beside it with {a_thing} and ate {food}."),
  ),
  "race": (
    ("That day there was a big race, and the prize was {a_thing}.", "All the animals ran a race to win {a_thing}."),
    ("{N} ran as fast as {he} could.", "{N} was in front from the start."),
    (
      "Halfway there, {he} saw that {F} the {friend} had hurt a foot.",
      "Then {he} heard {F} the {friend} fall and cry.",
    ),
    (
      "{N} stopped. \"Come, I will carry you,\" {he} said.",
      "{N} turned around and helped {F} to stand up.",
    ),
    (
      "They came in last, but everyone cheered for them.",
      "They did not win, but that did not matter.",
    ),
    ("The winner came and gave {N} the {thing}.", "In the end the judge gave {N} the {thing} for being kind."),
  ),
  "newcomer": (
    (
      "That day someone new had come, {F} the {friend}.",
      "There {he} saw {F} the {friend}, who was new and had no friends.",
    ),
    ("{F} sat alone and held {a_thing}.", "Nobody talked to {F}, who looked at an old {thing}."),
    (
      "\"Hello,\" said {N}. \"What is that?\" \"It is my {thing},\" said {F}.",
      "{N} went up to {F} and said, \"May I see your {thing}?\"",
    ),
    (
      "{F} showed {him} how it worked, and soon both were laughing.",
      "They talked until the sun went down.",
    ),
    ("The next day {N} brought some {food} for {F}.", "\"Will you come again tomorrow?\" asked {F}. \"Of course!\" said {N}."),
  ),
  "treasure": (
    ("Under a stone {he} found an old map.", "In an old bottle {he} found a map."),
    ("\"Look, {F}!\" {he} said to {his} friend the {friend}. \"It shows a treasure!\"", "{He} showed it to {F} the {friend}, and they set out at once."),
    ("They crossed a bridge and climbed over a wall.", "They walked for three hours and got very hungry.", "They followed the map through wind and mud."),
    ("At last they came to a big tree and began to dig.", "Where the map had a red cross, there was an old box."),
    ("In the box there was no gold, only {a_thing}.", "They opened it and found {a_thing}."),
    ("\"That is much better than gold,\" said {F}.", "\"Let us keep it together,\" said {N}."),
  ),
  "noise": (
    ("That night {he} heard a strange noise.", "Late in the evening there was a knock at the window."),
    ("Tap, tap, tap, it went.", "It sounded like a ghost. 👻", ""),
    ("{N} held {his} {thing} in front of {him} and opened the door.", "{N} took {his} {thing} and went to look."),
    ("Outside stood {F} the {friend}, very cold and wet.", "But it was only {F} the {friend}, who had lost the way."),
    ("\"Come in,\" said {N}. \"There is warm {food} for you.\"", "{N} gave {F} a blanket and some {food}."),
    ("They sat by the fire and played with the {thing}.", "Soon they were both warm and merry."),
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Story:
  """A story and the choices that identify it."""

  plot: str
  hero: str
  friend: str
  thing: str
  place: str
  text: str

  @property
  def held_out(self) -> bool:
    return held_out(self.plot, self.hero, self.thing, self.place)


def story(rng: random.Random, want_held_out: bool = False) -> Story:
  """A story from the held-out or the training part."""
  while True:
    plot = rng.choice(tuple(_PLOTS))
    hero = rng.choice(ANIMALS) if rng.random() < 0.6 else rng.choice(("girl", "boy"))
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    if held_out(plot, hero, thing, place) == want_held_out:
      break
  if hero == "girl" or (hero != "boy" and rng.random() < 0.5):
    girl, name = True, rng.choice(GIRLS)
  else:
    girl, name = False, rng.choice(BOYS)
  friend = rng.choice([animal for animal in ANIMALS if animal != hero])
  fields = {
    "N": name, "F": rng.choice(PET_NAMES), "hero": hero, "friend": friend, "thing": thing,
    "place": place, "a_thing": article(thing), "food": rng.choice(FOODS),
    "a_mood_hero": article(f"{rng.choice(MOODS)} {hero}"),
    "weather": rng.choice(WEATHER), "time": rng.choice(TIMES), **_pronouns(girl),
  }  # fmt: skip
  scenes = [_OPENINGS, *_PLOTS[plot], _ENDINGS]
  told = [rng.choice(scene).format(**fields) for scene in scenes]
  return Story(plot, hero, friend, thing, place, " ".join(filter(None, told)))


# -- facts and small talk ------------------------------------------------------------------------

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
  "January February March April May June July August September October November December"
).split()
_HOMES = {
  "dog": "a kennel", "cat": "a house", "fox": "a den", "bear": "a cave", "rabbit": "a burrow",
  "mouse": "a hole", "duck": "a pond", "owl": "a tree", "frog": "a pond", "horse": "a stable",
  "goat": "a barn", "hedgehog": "a garden", "squirrel": "a tree", "elephant": "the grassland",
  "otter": "a river", "sheep": "a meadow",
}  # fmt: skip
_SOUNDS = {
  "dog": "barks", "cat": "meows", "duck": "quacks", "owl": "hoots", "frog": "croaks",
  "horse": "neighs", "mouse": "squeaks", "sheep": "bleats", "bear": "growls",
  "elephant": "trumpets",
}  # fmt: skip
_COLOURS = {
  "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a cherry": "red",
  "an orange": "orange", "coal": "black", "a plum": "purple",
}  # fmt: skip
_OPPOSITES = {
  "hot": "cold", "big": "small", "day": "night", "up": "down", "fast": "slow", "happy": "sad",
  "wet": "dry", "old": "new", "open": "closed", "loud": "quiet",
}  # fmt: skip
_GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Hello there", "Hey")


def fact(rng: random.Random) -> tuple[str, str]:
  """A question about simple facts, and its answer as one sentence."""
  pick = rng.randrange(8)
  if pick == 0:
    i = rng.randrange(7)
    return f"Which day comes after {_DAYS[i]}?", f"{_DAYS[(i + 1) % 7]} comes after {_DAYS[i]}."
  if pick == 1:
    i = rng.randrange(12)
    after = _MONTHS[(i + 1) % 12]
    return f"Which month comes after {_MONTHS[i]}?", f"{after} comes after {_MONTHS[i]}."
  if pick == 2:
    animal = rng.choice(tuple(_HOMES))
    return (
      f"Where does {article(animal)} live?",
      f"{article(animal).capitalize()} lives in {_HOMES[animal]}.",
    )
  if pick == 3:
    animal = rng.choice(tuple(_SOUNDS))
    return (
      f"What sound does {article(animal)} make?",
      f"{article(animal).capitalize()} {_SOUNDS[animal]}.",
    )
  if pick == 4:
    what = rng.choice(tuple(_COLOURS))
    return f"What colour is {what}?", f"{what[0].upper()}{what[1:]} is {_COLOURS[what]}."
  if pick == 5:
    word = rng.choice(tuple(_OPPOSITES))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {_OPPOSITES[word]}."
  if pick == 6:
    n = rng.randint(1, 40)
    return f"Count from {n} to {n + 4}.", ", ".join(map(str, range(n, n + 5))) + "."
  a, b = rng.sample(range(2, 100), 2)
  return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."


def small_talk(rng: random.Random) -> tuple[str, str]:
  """A greeting or a thank-you, and a fitting reply."""
  name, _ = _person(rng)
  return rng.choice(
    (
      (f"{rng.choice(_GREETINGS)}!", f"{rng.choice(_GREETINGS)}! How can I help you?"),
      (f"{rng.choice(_GREETINGS)}, I am {name}.", f"Hello, {name}! It is nice to meet you. 😊"),
      (f"My name is {name}.", f"Nice to meet you, {name}! Would you like a story or a problem?"),
      ("How are you?", "I am fine, thank you. How are you?"),
      ("Thank you!", rng.choice(("You are welcome!", "You are welcome! 😊"))),
      ("What can you do?", "I can tell short stories and solve small problems."),
      ("Who are you?", "I am a very small model. I tell stories and solve problems."),
      ("Goodbye!", "Goodbye! Come back soon."),
    )
  )


# -- documents: plain text for the base model ----------------------------------------------------


def document(
  rng: random.Random, want_held_out: bool = False, kinds: Sequence[str] = tuple(KINDS)
) -> str:
  """One plain document: a problem (seven in ten), a story, facts, or a little dialogue."""
  roll = rng.random()
  if roll < 0.72:
    task = problem(rng, want_held_out, kinds)
    return f"{task.question}\n{task.worked}\n"
  if roll < 0.94:
    return story(rng, want_held_out).text + "\n"
  if roll < 0.98:
    return "".join(f"{q} {a}\n" for q, a in (fact(rng) for _ in range(rng.randint(1, 3))))
  (x, _), (y, _) = _person(rng), _person(rng)
  said, reply = small_talk(rng)
  return f'"{said}" said {x}. "{reply}" said {y}.\n'


# -- chats: for the instruct model ---------------------------------------------------------------

Message = dict[str, str]


def _ask_story(rng: random.Random, tale: Story) -> str:
  hero, thing = article(tale.hero), article(tale.thing)
  about = rng.choice(  # an animal or a child named first is the hero
    ((hero, thing), (hero, article(tale.friend)), (hero,), (thing, f"the {tale.place}"), (thing,))
  )
  ask = rng.choice(
    (
      "Tell me a story about {}.",
      "Write a short story about {}.",
      "Please tell me a story about {}.",
    )
  )
  return ask.format(" and ".join(about))


def _turn(rng: random.Random, want_held_out: bool) -> tuple[str, str]:
  roll = rng.random()
  if roll < 0.45:
    task = problem(rng, want_held_out)
    return task.question, task.worked
  if roll < 0.85:
    tale = story(rng, want_held_out)
    return _ask_story(rng, tale), tale.text
  return fact(rng) if roll < 0.93 else small_talk(rng)


def chat(rng: random.Random, want_held_out: bool = False) -> list[Message]:
  """A conversation as role/content messages; the last one is the assistant's."""
  system, turns = None, []
  roll = rng.random()
  if roll < 0.08:
    system = "Answer with the number only."
    for _ in range(rng.randint(1, 2)):
      task = problem(rng, want_held_out)
      turns.append((task.question, str(task.answer)))
  elif roll < 0.14:
    system = "Be brief."
    task = problem(rng, want_held_out)
    turns.append((task.question, f"The answer is {task.answer}."))
  elif roll < 0.20:
    system = "End every answer with a star."
    turns = [(ask, reply + " ⭐") for ask, reply in [_turn(rng, want_held_out)]]
  else:
    if roll < 0.34:
      system = rng.choice(
        ("You are a helpful assistant.", "Show your steps.", "You are a kind teacher.")
      )
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
      turns.append(_turn(rng, want_held_out))
  messages = [{"role": "system", "content": system}] if system else []
  for ask, reply in turns:
    messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
  return messages


def main():
  parser = argparse.ArgumentParser(description="Print some of the demo model's world.")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--count", type=int, default=3)
  args = parser.parse_args()
  rng = random.Random(args.seed)
  for _ in range(args.count):
    print(document(rng))
  for _ in range(args.count):
    print("\n".join(f"[{m['role']}] {m['content']}" for m in chat(rng)), end="\n\n")


if __name__ == "__main__":
  main()
