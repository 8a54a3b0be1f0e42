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
import math
import operator
import pathlib
import random
import re
from collections.abc import Sequence

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

  def prompt(self, is_chat: bool) -> str:
    """The question; a base model continues after its line."""
    return self.question + ("" if is_chat else "\n")


# Kind -> "draw", the range of each number; "steps", the equations that solve it; "questions". A step names
# the numbers a, b, ..., their tens and ones, and the results of earlier steps. With "least", numbers are
# drawn again until every difference is larger than that.
KINDS = DATA["kinds"]
# Training adds the kinds in three levels; the last stay hard, which leaves the model room to improve.
LEVELS = {1: tuple(KINDS)[:23], 2: tuple(KINDS)[:28], 3: tuple(KINDS)}


def _draw(rng: random.Random, kind: str) -> tuple[int, ...]:
  numbers = [rng.randint(*map(int, ends.split(".."))) for ends in KINDS[kind]["draw"].split()]
  # No division leaves a remainder.
  if kind in ("share", "long_share"):
    share, people = numbers
    return share * people, people
  if kind == "share_after":
    share, people = numbers
    first = rng.randint(2, share * people - 2)
    return first, share * people - first, people
  if kind == "average":
    numbers[2] += 3 - sum(numbers) % 3
  return tuple(numbers)


def _solve(kind: str, numbers: tuple[int, ...]) -> list[tuple[int, str, int, int]]:
  """(left, operator, right, result) of each step."""
  known: dict[str, int] = {}
  for name, number in zip("abcde", numbers, strict=False):
    known |= {name: number, f"{name}_tens": number // 10 * 10, f"{name}_ones": number % 10}
  solved = []
  for i, step in enumerate(KINDS[kind]["steps"], 1):
    left, sign, right = step.split()
    a, b = (known[name] if name in known else int(name) for name in (left, right))
    known[f"step{i}"] = _OPERATORS[sign](a, b)
    solved.append((a, sign, b, known[f"step{i}"]))
  return solved


def _numbers(rng: random.Random, kind: str, want_held_out: bool) -> tuple[int, ...]:
  least = KINDS[kind].get("least", -math.inf)
  while True:
    numbers = _draw(rng, kind)
    fits = all(result > least for _, sign, _, result in _solve(kind, numbers) if sign == "-")
    if fits and held_out(kind, *numbers) == want_held_out:
      return numbers


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
  numbers = _numbers(rng, kind, want_held_out)
  x, girl = _person(rng)
  y, _ = _person(rng, avoid=x)
  things, others = rng.sample(WORDS["counted"], 2)
  holders = rng.choice(WORDS["holders"])
  question = rng.choice(KINDS[kind]["questions"]).format(
    X=x, Y=y, things=things, thing=singular(things), others=others,
    holders=holders, holder=singular(holders), **_pronouns(girl),
    **dict(zip("abcde", numbers, strict=False)),
  )  # fmt: skip
  solved = _solve(kind, numbers)
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

  def prompt(self, is_chat: bool) -> str:
    """A request for the story, or for a base model its first six words."""
    if not is_chat:
      return " ".join(self.text.split()[:6])
    return f"Tell me a story about {article(self.hero)} and {article(self.thing)}."


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
  greet = [rng.choice(DATA["greetings"]) for _ in range(3)]
  welcome = rng.choice(DATA["welcomes"])
  ask, reply = rng.choice(DATA["small_talk"])
  facts = {"name": name, "greet": greet, "welcome": welcome}
  return ask.format(**facts), reply.format(**facts)


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
  return rng.choice(DATA["story_requests"]).format(" and ".join(about))


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
