"""Look at tokens and tinker with them.

  python -m entropix_jax.tokens lens "Hello, world" [--beside MODEL]     the tokens of a text
  python -m entropix_jax.tokens segmentations "Hello" [--before TEXT]    ways to write it, and how likely it is over all of them
  python -m entropix_jax.tokens heal "The quick bro"                     what healing makes of a prompt
  python -m entropix_jax.tokens bytes "The quick bro" [--write N] [--beside MODEL]    the next byte; with --write N of them, of both
                                                                         models together
  python -m entropix_jax.tokens answers "What is 7 + 5?" [-k 4]          a question in several segmentations, answered side by side

MODEL is a folder, a .gguf file or a name on the hub; the demo model where --model is left out.
"""

import argparse
import json
import shutil
import sys
from typing import Any

from entropix_jax.cli import commands
from entropix_jax.errors import UserError

_TOOLS = ("lens", "segmentations", "heal", "bytes", "answers")


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(f"{message[:1].upper()}{message[1:]}; try --help.")


def _parser() -> argparse.ArgumentParser:
  form = argparse.RawDescriptionHelpFormatter
  parser = _Parser(prog="python -m entropix_jax.tokens", description=__doc__, formatter_class=form)
  parser.add_argument("tool", choices=_TOOLS)
  parser.add_argument("text")
  parser.add_argument("--model", metavar="MODEL", help="whose tokens; the demo model by default")
  parser.add_argument("--beside", metavar="MODEL", help="a second one: for lens and bytes")
  parser.add_argument("--before", default="", metavar="TEXT", help="text before: for segmentations")
  parser.add_argument("--control", action="store_true", help="for lens: read control tokens")
  parser.add_argument("-k", type=int, default=8, help="the most lines to show (default 8)")
  parser.add_argument("--dropout", type=float, default=0.1, help="of BPE dropout (default 0.1)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--write", type=int, default=0, metavar="N", help="for bytes: write N of them"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def _llm(name: str | None) -> Any:
  from entropix_jax.llm import LLM

  return LLM(name, max_seq_len=1024, batch_size=8) if name else LLM.demo(batch_size=8)


def _tokenizer(name: str) -> Any:
  from entropix_jax.checkpoints import hub, vocabulary

  return vocabulary.load(hub.find(name))


def _lens(args) -> tuple[Any, list[list[Any]]]:
  from entropix_jax import settings
  from entropix_jax.tokens.tools import Tools

  def none():
    raise AssertionError("a lens asks no model")

  own = _tokenizer(args.model or str(settings.ASSETS / "demo" / "instruct"))
  beside = _tokenizer(args.beside) if args.beside else None
  found = Tools(own, none).lens(args.text, args.control, beside)
  if beside is not None:
    left, right, rows = iter(found["pieces"]), iter(found["beside"]), [["here", "beside"]]
    for n, m in found["spans"]:
      rows.append(
        ["|".join(next(side)["text"] for _ in range(x)) for side, x in ((left, n), (right, m))]
      )
    return found, rows
  rows = [["id", "bytes", "kind", "rank", "token", "merges"]]
  for p in found["pieces"]:
    merges = " ".join(f"{a}+{b}" for a, b in p["merges"])
    rank = "" if p["rank"] is None else p["rank"]
    rows.append([p["id"], f"{p['start']}-{p['end']}", p["kind"], rank, p["text"], merges])
  return found, rows


def _segmentations(args) -> tuple[Any, list[list[Any]]]:
  tools = _llm(args.model).tokens
  found = tools.segmentations(args.text, args.before, args.k, args.dropout, args.seed)
  rows = [["log p", "tokens"]]
  rows += [[f"{row['logp']:.3f}", "|".join(row["texts"])] for row in found["rows"]]
  error = f" +- {found['error']:.3f}" * (not found["exact"])
  rows.append([f"{found['total']:.3f}", f"all {found['ways']:,} segmentations{error}"])
  rows.append([f"{found['gap']:.3f}", "nats that the canonical one falls short"])
  return found, rows


def _heal(args) -> tuple[Any, list[list[Any]]]:
  found = _llm(args.model).tokens.heal(args.text, args.k)
  rows = [["p", f"held: {found['held']}" if found["held"] else "nothing is held"]]
  rows += [[f"{row['p']:.4f}", "|".join(row["texts"])] for row in found["rows"]]
  rows.append(["p", "next token without healing"])
  rows += [[f"{row['p']:.4f}", row["text"]] for row in found["usual"]]
  return found, rows


def _bytes(args) -> tuple[Any, list[list[Any]]]:
  from entropix_jax.tokens import bytes as by_bytes

  tools = _llm(args.model).tokens
  if not args.write:
    if args.beside:
      raise UserError("--beside goes with --write here; say how many bytes to write.")
    found = tools.next_bytes(args.text, args.k)
    rows = [["p", "next byte"], *([f"{r['p']:.4f}", r["text"]] for r in found["rows"])]
    return found, [*rows, [f"{found['end']:.4f}", "end of the text"]]
  if args.write < 0:
    raise UserError(f"--write is {args.write}; it must be at least 1.")
  walks = [tools.walk(args.text)]
  if args.beside:
    walks.append(_llm(args.beside).tokens.walk(args.text))
  data = by_bytes.written(walks, args.write, seed=args.seed)
  asked = [walk.rows for walk in walks]
  return {"text": data.decode("utf-8", "replace"), "asked": asked}, [
    [args.text + data.decode("utf-8", "replace")]
  ]


def _answers(args) -> tuple[Any, list[list[Any]]]:
  found = _llm(args.model).tokens.answers(args.text, args.k, args.dropout, args.seed)
  rows = [["entropy", "answer", "tokens"]]
  rows += [
    [f"{r['entropy']:.3f}", " ".join(r["text"].split()), "|".join(r["tokens"])] for r in found
  ]
  return found, rows


def _table(rows: list[list[Any]]) -> str:
  """Rows of cells in columns, cut at the width of the terminal."""
  width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
  cells = [[str(cell) for cell in row] for row in rows]
  sizes = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
  lines = ("  ".join(c.ljust(n) for c, n in zip(row, sizes, strict=False)) for row in cells)
  return "\n".join(line.rstrip()[:width] for line in lines)


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv[1:])
  does = {"lens": _lens, "segmentations": _segmentations, "heal": _heal}
  does |= {"bytes": _bytes, "answers": _answers}
  found, rows = does[args.tool](args)
  print(json.dumps(found, ensure_ascii=False) if args.json else _table(rows))


if __name__ == "__main__":
  sys.exit(commands.entry(_main, sys.argv))
