"""The plots of benchmarks/study.py's report."""

import pathlib
from collections.abc import Sequence

import sweep

from entropix_jax import files


def forest(plotted: list, path: pathlib.Path, title: str) -> None:
  """Differences with intervals, one line each; families by colour."""
  figure = sweep.import_figure()(figsize=(8, 0.32 * len(plotted) + 1.2), layout="constrained")
  axes = figure.subplots()
  families = list(dict.fromkeys(p[0] for p in plotted))
  for y, (family, _, gain, (low, high)) in enumerate(reversed(plotted)):
    axes.plot([low, high], [y, y], color=f"C{families.index(family)}", lw=2)
    axes.plot(gain, y, "o", color=f"C{families.index(family)}")
  axes.axvline(0, color="grey", lw=0.8)
  axes.set_yticks(range(len(plotted)), [p[1] for p in reversed(plotted)])
  axes.set_xlabel(title)
  _save(figure, path)


def dots(rows: list, path: pathlib.Path, x: int, y: int, titles: Sequence[str]) -> None:
  """Named points of a table's columns, with the interval after y."""
  figure = sweep.import_figure()(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  for row in rows:
    low, high = row[y + 1][:2]
    axes.errorbar(row[x], row[y], [[row[y] - low], [high - row[y]]], fmt="o", lw=0.8)
    axes.annotate(row[0], (row[x], row[y]), fontsize=7, xytext=(4, 3), textcoords="offset points")
  axes.set_xlabel(titles[0])
  axes.set_ylabel(titles[1])
  _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
  with files.whole(path) as file:
    figure.savefig(file, format="png", dpi=150)
