"""Prompt files: CSV with a column prompt and perhaps act, JSON lines, or plain text, one prompt per line."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

from entropix_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt and its name (the column or key act)."""

  text: str
  name: str = ""


def read(path: str | Path) -> list[Prompt]:
  """The prompts of a file, by its suffix: .csv, .jsonl or .json, else one prompt per non-empty line.

  Raises:
    UserError: the file cannot be read, lacks the column or key prompt, or holds no prompt.
  """
  path = Path(os.path.expanduser(path))
  try:
    text = path.read_text(encoding="utf-8-sig")
  except OSError as error:
    raise UserError(f"The prompt file {path} cannot be read ({error.strerror}).") from None
  except UnicodeDecodeError:
    raise UserError(f"The prompt file {path} is not UTF-8 text; convert it first.") from None
  kind = path.suffix.lower()
  if kind == ".csv":
    prompts = _csv(path, text)
  elif kind in (".jsonl", ".json"):
    prompts = _json_lines(path, text)
  else:
    prompts = [Prompt(line) for line in text.split("\n") if line.strip()]
  prompts = [p for p in prompts if p.text.strip()]
  if not prompts:
    raise UserError(f"The prompt file {path} holds no prompt; add at least one.")
  return prompts


_END = "\x1f"  # added as the last row, which only an unclosed quotation mark can swallow


def _csv(path: Path, text: str) -> list[Prompt]:
  # Not strict: published lists of prompts have stray quotation marks inside a field.
  try:
    *rows, last = csv.reader(io.StringIO(f"{text}\n{_END}\n", newline=""))
  except csv.Error as error:
    raise UserError(f"The prompt file {path} is not valid CSV ({error}).") from None
  if last != [_END]:
    raise UserError(f"The prompt file {path} has a quotation mark that is never closed; close it.")
  rows = [row for row in rows if row]
  if not rows:
    return []
  head, *rows = rows
  if "prompt" not in head:
    columns = ", ".join(head)
    raise UserError(
      f"The prompt file {path} needs a column prompt (and may have act); it has: {columns}."
    )
  named = [dict(zip(head, row, strict=False)) for row in rows]
  return [Prompt(row.get("prompt", ""), row.get("act", "")) for row in named]


def _json_lines(path: Path, text: str) -> list[Prompt]:
  prompts = []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      raise UserError(f"Line {number} of {path} is not JSON; write one object per line.") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
      raise UserError(f'Line {number} of {path} needs a text under the key "prompt".')
    prompts.append(Prompt(row["prompt"], str(row.get("act", ""))))
  return prompts
