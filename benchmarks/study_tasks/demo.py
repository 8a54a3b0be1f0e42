"""Word problems of the demo corpus that no earlier benchmark has used; the answer is a number."""

import itertools

import demo_corpus
import sweep
from study_tasks import Item

LIMIT, ROOM, SIZES, METRIC, MODEL = 96, 256, (100, 600), "right", "demo"
USED = 612  # problems that samplers and methods were tuned on before (benchmarks/results)


def items(split, n, data):
  """Held-out problems in the order of `sweep.held_out`."""
  skip = USED + (SIZES[0] if split == "test" else 0)
  found = itertools.islice(sweep.held_out(), skip, skip + min(n, SIZES[split == "test"]))
  return [Item(str(skip + i), t.question, t.answer) for i, t in enumerate(found)]


def answer(text):
  """The number that the text states as its answer."""
  found = demo_corpus.extract_answer(text)
  return None if found is None else str(found)


def score(item, text):
  """Whether the answer is right."""
  return {"right": float(answer(text) == str(item.want))}
