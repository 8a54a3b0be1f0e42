"""The demo model's corpus, generated from a seed: short stories, facts, and word problems with worked steps.

Why: a generated corpus needs no licence and no download, and nothing held out leaks into training. Each
problem (kind and numbers) and each story (plot, hero, thing and place) is hashed, and the hash alone
decides whether it belongs to training, so held-out ones are never trained on, whatever the seed.

The words and the texts with gaps are in demo_corpus.json.

Print samples: python scripts/demo_corpus.py --seed=1 --count=5
"""

import argparse
import dataclasses
import hashlib
import json
import operator
import pathlib
import random
import re
from collections.abc import Callable, Sequence

DATA = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS = {name: words.split() for name, words in DATA["words"].items()}


def article(noun: str) -> str:
  """The noun preceded by "a" or "an"."""
  return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def singular(plural: str) -> str:
  """The singular of a plural in the words "counted" or "holders"."""
  return {"boxes": "box", "shelves": "shelf"}.get(plural, plural[:-1])


def held_out(*facts) -> bool:
  """Whether the item that these facts identify is held out of training: one in ten, decided by a hash."""
  text = "|".join(map(str, facts))
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def _pronouns(girl: bool) -> dict[str, str]:
  words = ("she", "her", "her", "herself") if girl else ("he", "him", "his", "himself")
  fields = dict(zip(("he", "him", "his", "himself"), words, strict=True))
  return fields | {key.capitalize(): word.capitalize() for key, word in fields.items()}


def _person(rng: random.Random, avoid: str = "") -> tuple[str, bool]:
  while True:
    girl = rng.random() < 0.5
    name = rng.choice(WORDS["girls" if girl else "boys"])
    if name != avoid:
      return name, girl


# -- problems ------------------------------------------------------------------------------------

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


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


def _ints(*bounds: tuple[int, int], where: Callable[..., bool] = lambda *_: True) -> Callable:
  """A function from a generator to whole numbers within the bounds, drawn until `where` accepts them."""

  def draw(rng: random.Random) -> tuple[int, ...]:
    while not where(*(numbers := tuple(rng.randint(*ends) for ends in bounds))):
      pass
    return numbers

  return draw


def _quotient(*bounds: tuple[int, int]) -> Callable:
  # The first number is the product of the two draws, so that the division has no remainder.
  def draw(rng: random.Random) -> tuple[int, ...]:
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


# Kind -> (how to draw its numbers, the equations that solve it).
KINDS: dict[str, tuple[Callable, Callable]] = {
  "sum": (_ints((2, 99), (2, 99)), lambda a, b: [(a, "+", b)]),
  "difference": (_ints((5, 99), (2, 98), where=lambda a, b: a > b), lambda a, b: [(a, "-", b)]),
  "product": (_ints((2, 12), (2, 12)), lambda a, b: [(a, "*", b)]),
  "gain": (_ints((2, 99), (2, 60)), lambda a, b: [(a, "+", b)]),
  "lose": (_ints((8, 99), (2, 90), where=lambda a, b: a > b + 1), lambda a, b: [(a, "-", b)]),
  "gain_lose": (
    _ints((2, 60), (2, 40), (2, 80), where=lambda a, b, c: a + b > c + 1),
    lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
  ),
  "lose_gain": (
    _ints((8, 90), (2, 80), (2, 50), where=lambda a, b, c: a > b + 1),
    lambda a, b, c: [(a, "-", b), (a - b, "+", c)],
  ),
  "groups": (_ints((2, 12), (2, 12)), lambda a, b: [(a, "*", b)]),
  "groups_extra": (_ints((2, 9), (2, 9), (2, 40)), lambda a, b, c: [(a, "*", b), (a * b, "+", c)]),
  "groups_lose": (
    _ints((2, 9), (3, 9), (2, 60), where=lambda a, b, c: a * b > c + 1),
    lambda a, b, c: [(a, "*", b), (a * b, "-", c)],
  ),
  "share": (_quotient((2, 12), (2, 9)), lambda a, b: [(a, "/", b)]),
  "share_after": (_share_after, lambda a, b, c: [(a, "+", b), (a + b, "/", c)]),
  "more_than": (_ints((2, 50), (2, 40)), lambda a, b: [(a, "+", b), (a, "+", a + b)]),
  "fewer_than": (
    _ints((6, 60), (2, 50), where=lambda a, b: a > b + 1),
    lambda a, b: [(a, "-", b), (a, "+", a - b)],
  ),
  "compare": (_ints((5, 99), (2, 98), where=lambda a, b: a > b + 1), lambda a, b: [(a, "-", b)]),
  "twice": (_ints((2, 33)), lambda a: [(2, "*", a), (a, "+", 2 * a)]),
  "unneeded": (_ints((2, 60), (2, 20), (2, 39)), lambda a, b, c: [(a, "+", c)]),
  "change": (
    _ints((2, 9), (2, 9), (20, 100), where=lambda a, b, c: c > a * b + 1),
    lambda a, b, c: [(a, "*", b), (c, "-", a * b)],
  ),
  "two_products": (
    _ints((2, 9), (2, 9), (2, 9), (2, 9)),
    lambda a, b, c, d: [(a, "*", b), (c, "*", d), (a * b, "+", c * d)],
  ),
  "three_steps": (
    _ints((10, 60), (2, 40), (2, 60), (2, 40), where=lambda a, b, c, d: a + b > c + 1),
    lambda a, b, c, d: [(a, "+", b), (a + b, "-", c), (a + b - c, "+", d)],
  ),
  "big_sum": (_ints((100, 899), (11, 899)), lambda a, b: [(a, "+", b)]),
  "big_difference": (
    _ints((120, 999), (11, 899), where=lambda a, b: a > b + 9),
    lambda a, b: [(a, "-", b)],
  ),
  "long_product": (
    _ints((13, 49), (3, 9)),
    lambda a, b: [(a // 10 * 10, "*", b), (a % 10, "*", b), (a // 10 * 10 * b, "+", a % 10 * b)],
  ),
  "longer_product": (
    _ints((12, 49), (12, 39)),
    lambda a, b: [(a, "*", b // 10 * 10), (a, "*", b % 10), (b // 10 * 10 * a, "+", b % 10 * a)],
  ),
  "long_share": (_quotient((13, 49), (3, 9)), lambda a, b: [(a, "/", b)]),
  "big_change": (
    _ints((3, 9), (12, 49), (100, 500), where=lambda a, b, c: c > a * b + 1),
    lambda a, b, c: [(a, "*", b), (c, "-", a * b)],
  ),
  "big_gain_lose": (
    _ints((100, 499), (20, 499), (20, 799), where=lambda a, b, c: a + b > c + 9),
    lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
  ),
  "four_steps": (
    _ints(
      (2, 9), (2, 9), (2, 9), (2, 9), (2, 60), where=lambda a, b, c, d, e: a * b + c * d > e + 1
    ),
    lambda a, b, c, d, e: [(a, "*", b), (c, "*", d), (a * b, "+", c * d), (a * b + c * d, "-", e)],
  ),
  "huge_sum": (_ints((1000, 8999), (200, 8999)), lambda a, b: [(a, "+", b)]),
  "huge_difference": (
    _ints((1200, 9999), (200, 8999), where=lambda a, b: a > b + 9),
    lambda a, b: [(a, "-", b)],
  ),
  "big_product": (_ints((101, 999), (3, 9)), lambda a, b: [(a, "*", b)]),
  "big_three_steps": (
    _ints((100, 699), (20, 399), (20, 799), (20, 399), where=lambda a, b, c, d: a + b > c + 9),
    lambda a, b, c, d: [(a, "+", b), (a + b, "-", c), (a + b - c, "+", d)],
  ),
  "average": (_average, lambda a, b, c: [(a, "+", b), (a + b, "+", c), (a + b + c, "/", 3)]),
}
# Training adds the kinds in three levels; the last stay hard, which leaves the model room to improve.
LEVELS = {1: tuple(KINDS)[:23], 2: tuple(KINDS)[:28], 3: tuple(KINDS)}

_LEADS = (
  ("We know that",),
  ("First,", "Then"),
  ("First,", "Then", "Last,"),
  ("First,", "Then", "Next,", "Last,"),
)  # fmt: skip


def problem(
  rng: random.Random, want_held_out: bool = False, kinds: Sequence[str] = tuple(KINDS)
) -> Problem:
  """A problem of one of these kinds, from the held-out or the training part."""
  kind = rng.choice(kinds)
  draw, solve = KINDS[kind]
  while held_out(kind, *(numbers := draw(rng))) != want_held_out:
    pass
  x, girl = _person(rng)
  y, _ = _person(rng, avoid=x)
  things, others = rng.sample(WORDS["counted"], 2)
  holders = rng.choice(WORDS["holders"])
  question = rng.choice(DATA["questions"][kind]).format(
    X=x, Y=y, things=things, thing=singular(things), others=others,
    holders=holders, holder=singular(holders), **_pronouns(girl),
    **dict(zip("abcde", numbers, strict=False)),
  )  # fmt: skip
  solved = [(a, op, b, _OPERATORS[op](a, b)) for a, op, b in solve(*numbers)]
  steps = tuple("{} {} {} = {}".format(*step) for step in solved)
  answer = solved[-1][-1]
  told = [f"{step}." for step in steps]
  if rng.random() < 0.3:
    told = map(" ".join, zip(_LEADS[len(steps) - 1], told, strict=True))
  worked = " ".join([*told, f"The answer is {answer}."])
  return Problem(kind, numbers, question, steps, worked, answer)


def extract_answer(text: str) -> int | None:
  """The number of the first "The answer is N" in a text, or None."""
  match = re.search(r"The answer is (-?\d+)", text)
  return int(match[1]) if match else None


# -- stories -------------------------------------------------------------------------------------


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
  plots, animals = DATA["plots"], WORDS["animals"]
  while True:
    plot = rng.choice(tuple(plots))
    hero = rng.choice(animals) if rng.random() < 0.6 else rng.choice(("girl", "boy"))
    thing, place = rng.choice(WORDS["things"]), rng.choice(WORDS["places"])
    if held_out(plot, hero, thing, place) == want_held_out:
      break
  girl = hero == "girl" or (hero != "boy" and rng.random() < 0.5)
  name = rng.choice(WORDS["girls" if girl else "boys"])
  friend = rng.choice([animal for animal in animals if animal != hero])
  fields = {
    "N": name, "F": rng.choice(WORDS["pet_names"]), "hero": hero, "friend": friend, "thing": thing,
    "place": place, "a_thing": article(thing), "food": rng.choice(WORDS["foods"]),
    "a_mood_hero": article(f"{rng.choice(WORDS['moods'])} {hero}"),
    "weather": rng.choice(WORDS["weather"]), "time": rng.choice(WORDS["times"]), **_pronouns(girl),
  }  # fmt: skip
  # A plot is a list of scenes; a scene is a list of alternative texts, where "" omits the scene.
  scenes = [DATA["openings"], *plots[plot], DATA["endings"]]
  told = [rng.choice(scene).format(**fields) for scene in scenes]
  return Story(plot, hero, friend, thing, place, " ".join(filter(None, told)))


# -- facts and small talk ------------------------------------------------------------------------

_GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Hello there", "Hey")


def fact(rng: random.Random) -> tuple[str, str]:
  """A question about simple facts, and its answer as one sentence."""
  pick = rng.randrange(8)
  if pick < 2:
    unit, names = ("day", WORDS["days"]) if pick == 0 else ("month", WORDS["months"])
    i = rng.randrange(len(names))
    after = names[(i + 1) % len(names)]
    return f"Which {unit} comes after {names[i]}?", f"{after} comes after {names[i]}."
  if pick < 6:
    table = DATA["facts"][pick - 2]
    what = rng.choice(tuple(table["known"]))
    answer = table["answer"].format(what, table["known"][what])
    return table["question"].format(what), answer[0].upper() + answer[1:]
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
