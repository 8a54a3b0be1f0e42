"""Word problems of the demo corpus that no earlier benchmark has used; the answer is a number."""

import itertools

import demo_corpus
import sweep

from study_tasks import Item, split

LIMIT, ROOM, SIZES, METRIC, MODEL = 96, 256, (100, 600), "right", "demo"
USED = 612  # problems that samplers and methods were tuned on before (benchmarks/results)


def items(part, n, data):
  """Held-out problems of all kinds."""
  found = itertools.islice(sweep.held_out(), USED, USED + sum(SIZES))
  every = [Item(f"{USED + i:04}", t.question, t.answer) for i, t in enumerate(found)]
  return split(every, "demo", part, n, SIZES[0])


def answer(text):
  """The number that the text states as its answer."""
  found = demo_corpus.extract_answer(text)
  return None if found is None else str(found)


def score(item, text):
  """Whether the answer is right."""
  return {"right": float(answer(text) == str(item.want))}
