"""Traces as one web page to look at, and as figures to print.

  python -m entropix_jax.viz TRACE.jsonl [MORE.jsonl ...] -o report.html
  python -m entropix_jax.viz TRACE.jsonl --png PREFIX     PREFIX-scatter.png, PREFIX-timeline.png,
                                                          and PREFIX-tree.png where samples forked

Why: only the command line is here; report/ reads and draws traces. Importing this does not load JAX.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from entropix_jax import files
from entropix_jax.cli import commands
from entropix_jax.errors import UserError
from entropix_jax.report import figure, page, reader


def write(outputs: dict[Path, bytes]) -> None:
  """Write whole files: all are written under temporary names before the first gets its own.

  Raises:
    UserError: a file cannot be written.
  """
  with contextlib.ExitStack() as stack:
    for path, content in outputs.items():
      file = stack.enter_context(files.whole(path))
      file.write(content)
      file.flush()  # else a full disk would be noticed when other files have their names


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(f"{message[:1].upper()}{message[1:]}; try --help.")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="python -m entropix_jax.viz", description=__doc__.split("\n")[0])
  parser.add_argument("traces", nargs="+", metavar="TRACE.jsonl", help="written by --trace=FILE")
  parser.add_argument("-o", "--output", type=Path, metavar="REPORT.html", help="the page to write")
  parser.add_argument(
    "--png",
    metavar="PREFIX",
    help="write PREFIX-scatter.png, PREFIX-timeline.png and, where samples forked, PREFIX-tree.png, 300 dpi",
  )
  parser.add_argument(
    "--prompt", type=int, default=1, metavar="N",
    help="the prompt that the page opens with and that timeline and tree show (default 1)",
  )  # fmt: skip
  return parser


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  if args.output is None and args.png is None:
    raise UserError("Nothing to write: give -o REPORT.html, --png PREFIX or both.")
  runs, titles = [reader.read(path) for path in args.traces], reader.names(args.traces)
  for i, run in enumerate(runs):
    if run["incomplete"]:
      tokens = run["summary"]["generated_tokens"]
      commands.say(
        f"The trace {args.traces[i]} is incomplete: its run ended after {tokens} tokens."
      )
      titles[i] += " (incomplete)"
  groups = reader.match(runs)
  if args.prompt - 1 not in range(len(groups)):
    raise UserError(f"There is no prompt {args.prompt}; the traces have {len(groups)} prompts.")
  outputs: dict[Path, bytes] = {}
  if args.output is not None:
    outputs[args.output] = page.page(runs, titles, args.prompt - 1).encode()
  if args.png is not None:
    figures = {
      "scatter": figure.scatter(runs, titles),
      "timeline": figure.timeline(runs, titles, args.prompt - 1),
      "tree": figure.tree(runs, titles, args.prompt - 1),
    }
    for kind, content in figures.items():
      if content is not None:
        outputs[Path(f"{args.png}-{kind}.png")] = content
  inputs = [os.path.realpath(os.path.expanduser(path)) for path in args.traces]
  taken = [path for path in outputs if os.path.realpath(os.path.expanduser(path)) in inputs]
  if taken:
    raise UserError(f"{taken[0]} is one of the traces; give the report another name.")
  write(outputs)


def _entry(argv: list[str]) -> int:
  return commands.entry(_main, argv)


if __name__ == "__main__":
  sys.exit(_entry(sys.argv[1:]))
