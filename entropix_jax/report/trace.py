"""The trace: every token with every number that decided it, as JSON lines.

  line 1         the whole configuration: model, engine, sampler and its knobs, seed, prompts with ids
  then           one line a token: prompt, position, id, text, logprob, entropy, ... branch, knobs
  then           one line a prompt that had samples: {"samples": {"prompt", "method", "rule", "chosen",
                 "samples": [{"sample", "parent", "at", "tokens", "finish", "score", "answer"}, ...]}}
  last line      {"summary": {...}}: tokens, times, branch shares

Samples of a prompt are numbered from 0; their tokens' lines say which, but for 0. A `parent` is a sample of a
lower number, and `at` the position in its text where this one parted: not before its own first token.
The lines of a sample begin there; what came before is its parent's.

Why: a claim about a sampler is only as good as the record of what it did. `logprob`, `entropy` and
`varentropy` are the raw model's (nats); `logprob_law` is under the law that was drawn from.
"""

import collections
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropix_jax.errors import UserError
from entropix_jax.generate import Token


def _short(x: float) -> float:
  return float(f"{x:.6g}")


class Tracer:
  """Writes a trace; it appears under its name only when it is complete."""

  def __init__(self, path: str | Path, header: dict[str, Any]):
    self._path = Path(path).expanduser()
    if self._path.is_dir():
      raise UserError(f"--trace={path} is a folder; name a file in it.")
    self._part = self._path.with_name(self._path.name + ".part")
    try:
      self._file = open(self._part, "w", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
    except OSError as error:
      raise UserError(f"--trace={path} cannot be written ({error.strerror}).") from None
    self._write(header)

  def _write(self, row: dict[str, Any]) -> None:
    self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

  def token(self, token: Token) -> None:
    """Add one token's line."""
    row = {
      "prompt": token.prompt,
      "position": token.position,
      "id": token.id,
      "text": token.text,
      "branch": token.branch,
    }
    row |= {name: _short(x) for name, x in token.numbers.items()}
    if token.top:
      row["top"] = [[i, text, _short(logprob)] for i, text, logprob in token.top]
    row |= {"sample": token.sample} if token.sample else {}
    row |= {"fork": True} if token.fork else {}
    row |= {"forced": True} if token.forced else {}
    row |= {"drafted": token.drafted} if token.drafted else {}
    row |= {"accepted": True} if token.accepted else {}
    row |= {"finish": token.finish} if token.finish else {}
    self._write(row)

  def choice(self, samples: dict[str, Any]) -> None:
    """Add the line of one prompt's samples, after all tokens."""
    self._write({"samples": samples})

  def close(self, summary: dict[str, Any]) -> None:
    """Add the last line and put the file in its place."""
    self._write({"summary": summary})
    self._file.close()
    os.replace(self._part, self._path)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    self._part.unlink(missing_ok=True)


class Tally:
  """A run's figures, gathered token by token."""

  def __init__(self, prompt_lengths: Sequence[int]):
    self._lengths = prompt_lengths
    self._branches: collections.Counter[str] = collections.Counter()
    self._entropy: list[float] = []
    self._finish: collections.Counter[str] = collections.Counter()
    self._ends: dict[tuple[int, int], int] = {}  # how long the text of each sample is
    self._passes = self._drafted = self._accepted = 0
    self.ttft_s = 0.0
    self._last_s = 0.0

  def token(self, token: Token) -> None:
    """Count one token."""
    if not self._entropy:
      self.ttft_s = token.seconds
    self._last_s = token.seconds
    self._branches[token.branch] += 1
    self._entropy.append(token.numbers["entropy"])
    self._ends[token.prompt, token.sample] = token.position + 1
    self._passes += token.new_pass
    self._drafted += token.drafted
    self._accepted += token.accepted
    if token.finish:
      self._finish[token.finish] += 1

  def summary(self) -> dict[str, Any]:
    """The figures: tokens, seconds (loading and compiling not included), shares.

    Where a prompt had several samples also `samples`, of all prompts, and `tokens_total`, the length of all their
    texts: more than were generated if samples share what came before they parted.
    """
    n = len(self._entropy)
    several = any(sample for _, sample in self._ends)
    samples = {"samples": len(self._ends), "tokens_total": sum(self._ends.values())}
    return {
      "prompts": len(self._lengths),
      "prompt_tokens": sum(self._lengths),
      "generated_tokens": n,
      **(samples if several else {}),
      "target_passes": self._passes,
      "drafted": self._drafted,
      "accepted": self._accepted,
      "ttft_s": _short(self.ttft_s),
      "seconds": _short(self._last_s),
      "tokens_per_s": _short(n / self._last_s if self._last_s else 0.0),
      "mean_entropy": _short(statistics.fmean(self._entropy) if n else 0.0),
      "branches": {name: _short(c / n) for name, c in self._branches.most_common()},
      "finish": dict(self._finish),
    }


def line(summary: dict[str, Any]) -> str:
  """The summary as the one line that ends a run in the terminal."""
  shares = " ".join(f"{name} {100 * share:.0f}%" for name, share in summary["branches"].items())
  several = f" in {summary['samples']} samples" if "samples" in summary else ""
  guessed = ""
  if summary["drafted"]:
    guessed = (
      f" | {summary['accepted']} of {summary['drafted']} guesses right, "
      f"{summary['generated_tokens'] / summary['target_passes']:.2f} tokens a pass"
    )
  return (
    f"{summary['prompt_tokens']} prompt + {summary['generated_tokens']} generated tokens{several}"
    f" | first token {summary['ttft_s']:.3g} s | {summary['tokens_per_s']:.3g} tokens/s"
    f"{guessed} | mean entropy {summary['mean_entropy']:.2f} nats | {shares or 'no token'}"
  )
