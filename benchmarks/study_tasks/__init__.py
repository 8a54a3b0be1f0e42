"""The tasks of benchmarks/study.py; a task is one file of this folder.

A module NAME.py has
  LIMIT            most new tokens of an answer
  ROOM             tokens of prompt and answer together
  SIZES            prompts for choosing settings, prompts for the comparison
  METRIC           name of the score that comparisons are about
  items(split, n, data) -> [Item]   the first n of "dev" or "test"; `data` is the folder of data files
  score(item, text) -> {name: number}    of one answer
  answer(text) -> str or None       optional: the answer that samples vote with
  MODEL            optional: "demo" or "other", the only models it is for
"""

import dataclasses
import importlib
import json
import pathlib
import random
from types import ModuleType
from typing import Any

from entropix_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("demo", "ifeval", "svamp", "gsm8k", "prose")


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt, and what its answers are scored by."""

  key: str  # tells it from the others of its task
  ask: str
  want: Any = None


def find(name: str) -> ModuleType:
  """The task of that name. Raises UserError, which lists the names, if there is none."""
  if name not in NAMES:
    raise UserError(f"There is no task {name!r}; choose from: {', '.join(NAMES)}.")
  return importlib.import_module(f"study_tasks.{name}")


def read(data: pathlib.Path, name: str, source: str) -> Any:
  """The JSON of a data file, a list for .jsonl. Raises UserError if it is not there."""
  try:
    text = (data / name).read_text(encoding="utf-8")
  except OSError:
    raise UserError(
      f"{name} is not in the folder {data}; get it from {source}, and give its folder with --data."
    ) from None
  return (
    [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
  )


def split(items: list[Item], name: str, part: str, n: int, dev: int) -> list[Item]:
  """n items of a part, in an order that depends only on the task: "dev" has the first `dev` of it, "test" the others."""
  shuffled = sorted(items, key=lambda item: item.key)
  random.Random(f"study/{name}").shuffle(shuffled)
  return (shuffled[:dev] if part == "dev" else shuffled[dev:])[:n]
