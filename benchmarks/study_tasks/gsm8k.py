"""GSM8K (arXiv:2110.14168): word problems of several steps; the last number of the text is the answer."""

from study_tasks import Item, read, split, svamp

LIMIT, ROOM, SIZES, METRIC, MODEL = 320, 512, (100, 300), "right", "other"
answer, score = svamp.answer, svamp.score


def items(part, n, data):
  """The problems of the test split."""
  raw = read(data, "gsm8k_test.jsonl", "github.com/openai/grade-school-math")
  every = [
    Item(f"{i:04}", x["question"] + svamp.HINT, x["answer"].rsplit("####", 1)[1].strip())
    for i, x in enumerate(raw)
  ]
  return split(every, "gsm8k", part, n, SIZES[0])
