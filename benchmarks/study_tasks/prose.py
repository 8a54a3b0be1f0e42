"""Continuation of ordinary text: how much answers repeat themselves and one another.

The beginnings are sentences of benchmarks/lm_eval/prose.jsonl and of held-out stories of the demo corpus, both part of this project and
under its licence. Settings are those that the run's other task chose. The report adds self-BLEU and perplexity under the raw model.
"""

import itertools
import random
import re

import demo_corpus

from study_tasks import ROOT, Item, read, split

LIMIT, ROOM, SIZES, METRIC = 192, 512, (0, 48), "fresh_4"


def texts():
  """Whole texts: eight of prose and 200 stories."""
  rng = random.Random("study/stories")
  stories = [demo_corpus.story(rng, want_held_out=True).text for _ in range(200)]
  return [x["text"] for x in read(ROOT / "benchmarks" / "lm_eval", "prose.jsonl", "")] + stories


def items(part, n, data):
  """Requests to continue a sentence: every sentence of prose that is long enough, and beginnings of stories."""
  sentences = itertools.chain.from_iterable(re.split(r"(?<=[.!?]) ", t) for t in texts()[:8])
  beginnings = [s for s in sentences if len(s.split()) >= 8]
  beginnings += [" ".join(t.split()[:20]) for t in texts()[8:48]]
  every = [Item(f"{i:03}", f"Continue this story: {s}") for i, s in enumerate(beginnings)]
  return split(every, "prose", part, n, SIZES[0])


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
  """All runs of n successive words."""
  return list(zip(*(words[i:] for i in range(n)), strict=False))


def score(item, text):
  """Shares of distinct runs of one, two and four words within the answer; 1 where there is none."""
  words = text.lower().split()
  runs = {n: grams(words, n) for n in (1, 2, 4)}
  share = {n: len(set(g)) / len(g) if g else 1.0 for n, g in runs.items()}
  return {
    "fresh_4": share[4],
    "distinct_1": share[1],
    "distinct_2": share[2],
    "words": float(len(words)),
  }
