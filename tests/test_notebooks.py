"""Both notebooks run from start to end in a kernel of this interpreter, and print what they promise."""

import json
import os
import sys

import nbformat
import pytest
from command import ROOT
from nbclient import NotebookClient

# Notebook -> what its output must hold, in this order.
PROMISED = {
  "quickstart": """
    1,980,480 parameters|background:rgba|entropy|varentropy|image/png|equal tokens at the beginning: 3
    |'flow': 32|'12' holds|the answer: 7 + 5 = 12|kite
  """,
  "sampler": """
    'quadrant', 'torn'|'pair': 0.95|['sure', 'torn', 'open']|image/png|draws follow the law: True
    |refused: The knob 'pair' is 2.0; it must lie in [0.5, 1.0].|pair_mass|patience 3: One warm evening
  """,
}


def test_notebooks_are_stored_without_outputs_and_all_are_run():
  notebooks = {path.stem: nbformat.read(path, 4) for path in (ROOT / "notebooks").glob("*.ipynb")}
  assert notebooks.keys() == PROMISED.keys()
  for notebook in notebooks.values():
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.filterwarnings("default")  # of the libraries that talk with the kernel
@pytest.mark.parametrize("name", PROMISED)
def test_a_notebook_runs_and_prints_what_it_promises(name, tmp_path, monkeypatch):
  kernel = tmp_path / "kernels" / "here"
  kernel.mkdir(parents=True)
  argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  spec = {"argv": argv, "display_name": "here", "language": "python"}
  (kernel / "kernel.json").write_text(json.dumps(spec))
  for variable in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
    monkeypatch.setenv(variable, str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
  where = {"metadata": {"path": str(tmp_path)}}
  NotebookClient(notebook, timeout=600, kernel_name="here", resources=where).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  said = "\n".join(o["text"] if "text" in o else str(o["data"]) for o in outputs)
  at = 0
  for words in PROMISED[name].split("|"):
    assert words.strip() in said[at:], words
    at += said[at:].index(words.strip())
