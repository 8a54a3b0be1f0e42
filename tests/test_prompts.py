"""Prompt files: three formats, forgiving about quotation marks, plain about what is missing."""

from pathlib import Path

import pytest

from entropix_jax import errors
from entropix_jax.cli import prompts

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "prompts.csv"


def read(tmp_path, name, text):
  path = tmp_path / name
  path.write_bytes(text.encode())
  return [(p.name, p.text) for p in prompts.read(path)]


@pytest.mark.parametrize(
  ("name", "text", "expected"),
  [
    ("a.csv", 'act,prompt\nPoet,"Write, please"\n', [("Poet", "Write, please")]),
    ("a.csv", '\ufeff"prompt","act","more"\r\n"two\r\nlines","A",1\r\n', [("A", "two\nlines")]),
    ("a.csv", 'act,prompt\nA,"say ""hi"""\n\nB,b', [("A", 'say "hi"'), ("B", "b")]),
    ("a.csv", 'act,prompt\nA,"the first is "Taco Truck""\nB,b\n', [("A", 'the first is Taco Truck""'), ("B", "b")]),
    ("a.csv", "act,prompt\nA\nB,b\n", [("B", "b")]),
    ("a.jsonl", '{"prompt": "x", "act": "A"}\n\n{"prompt": "y"}\n', [("A", "x"), ("", "y")]),
    ("a.txt", "one\n\n  two\n", [("", "one"), ("", "  two")]),
  ],
)  # fmt: skip
def test_formats(tmp_path, name, text, expected):
  assert read(tmp_path, name, text) == expected


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.csv", "", "holds no prompt"),
    ("a.csv", "act,prompt\n", "holds no prompt"),
    ("a.csv", "act;prompt\nA;b\n", "needs a column prompt"),
    ("a.csv", 'act,prompt\nA,"never closed\nB,b\n', "never closed"),
    ("a.jsonl", "{\n", "Line 1 .* is not JSON"),
    ("a.jsonl", '{"text": "x"}\n', 'under the key "prompt"'),
    ("a.txt", "\n \n", "holds no prompt"),
  ],
)
def test_what_is_wrong_is_said(tmp_path, name, text, message):
  with pytest.raises(errors.UserError, match=message):
    read(tmp_path, name, text)


@pytest.mark.skipif(not SHARED.exists(), reason="the collection of 170 prompts is not here")
def test_a_collection_as_people_share_it():
  found = prompts.read(SHARED)
  assert len(found) == 170
  assert all(p.name and p.text for p in found)
