"""SVAMP (arXiv:2103.07191): one-step and two-step word problems; the last number of the text is the answer."""

from entropix_jax.decoding import select
from study_tasks import Item, read, split

LIMIT, ROOM, SIZES, METRIC, MODEL = 256, 512, (100, 300), "right", "other"
HINT = " Think step by step, and end with the answer as a number."
answer = select.answerer()


def items(part, n, data):
  """The problems."""
  raw = read(data, "svamp.json", "github.com/arkilpatel/SVAMP")
  every = [
    Item(x["ID"], f"{x['Body'].rstrip('. ')}. {x['Question']}{HINT}", x["Answer"]) for x in raw
  ]
  return split(every, "svamp", part, n, SIZES[0])


def score(item, text):
  """Whether the answer is right."""
  return {"right": float(answer(text) == select.normalise(str(item.want)))}
