"""Planted defects apply to the present sources and name tests that exist; nothing is planted here but once."""

import ast

import planted_defects
import pytest

from entropix_jax.errors import UserError


def test_every_defect_applies():
  defects = planted_defects.read()
  assert len(defects) >= 60
  for defect in defects:
    defect.check(planted_defects.ROOT)
    ast.parse(defect.planted(planted_defects.ROOT))
    assert defect.wrong.endswith(".")


@pytest.fixture
def project(tmp_path):
  """project(old) -> the root of a small project with a defect that replaces `old`."""

  def make(old, test="tests/test_x.py::test_x"):
    (tmp_path / "tests" / "defects").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "x.py").write_text("SEEN = 1\nUNSEEN = 1\n")
    (tmp_path / "tests" / "test_x.py").write_text(
      "import x\n\n\ndef test_x():\n  assert x.SEEN == 1\n"
    )
    (tmp_path / "tests" / "defects" / "area.toml").write_text(
      f'[bad]\nwrong = "Two."\nfile = "x.py"\nold = "{old}"\nnew = "Y = 2"\ntests = ["{test}"]\n'
    )
    return tmp_path

  return make


@pytest.mark.parametrize(
  ("old", "test", "words"),
  [
    ("= 1", "tests/test_x.py::test_x", "area/bad does not apply: its old text occurs 2 times"),
    ("NONE", "tests/test_x.py::test_x", "occurs 0 times in x.py"),
    ("UNSEEN", "tests/test_x.py::test", "'tests/test_x.py::test', which does not exist"),
    ("UNSEEN", "tests/test_y.py::test_x", "which does not exist"),
  ],
)
def test_what_does_not_apply_is_named(project, old, test, words):
  root = project(old, test)
  with pytest.raises(UserError, match=words):
    planted_defects.trial(root, planted_defects.read(root), 1, True)


def test_a_defect_that_no_test_sees_is_named(project, capsys):
  root = project("UNSEEN = 1")
  assert planted_defects.trial(root, planted_defects.read(root), 1, True) == ["area/bad"]
  assert "MISSED  area/bad" in capsys.readouterr().err
  assert "UNSEEN = 1" in (root / "x.py").read_text()
