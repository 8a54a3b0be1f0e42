"""The trace of a run: every token with every number that decided it, as JSON lines.

  line 1         the whole configuration: model, engine, sampler settings, seed, prompts with ids
  then           one line per token: prompt, position, id, text, branch, logprob, entropy, ... settings
                 a number that is not finite is null
  in between     {"error": {"prompt", "sample", "after", "text"}}: a text ended because the model's numbers were
                 not finite, after so many tokens
  then           one line per prompt with samples: {"samples": {"prompt", "method", "rule", "chosen",
                 "samples": [{"sample", "parent", "at", "tokens", "finish", "score", "answer"}, ...]}}
  last line      {"summary": {...}}: tokens, times, branch shares

The samples of a prompt are numbered from 0; a token's line names its sample unless that is 0. `parent` is
a sample with a lower number, and `at` the position in the parent's text where this sample forked, never
before the parent's own first token. A sample's lines begin at `at`; earlier tokens are its parent's.

Why: a claim about a sampler is only as good as the record of what it did. `logprob`, `entropy` (nats)
and `varentropy` (nats²) are the raw model's; `logprob_law` is under the distribution that was sampled.
"""

import collections
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropix_jax.errors import UserError
from entropix_jax.generate import Failure, Token


def _short(x: float) -> float | None:
  """Six digits; None, which JSON has, for NaN and infinity, which it has not."""
  return float(f"{x:.6g}") if math.isfinite(x) else None


class Tracer:
  """Writes a trace; the file gets its name only when it is complete. Raises UserError if it cannot."""

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
    self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

  def token(self, token: Token) -> None:
    """Write one token's line."""
    row = {name: getattr(token, name) for name in ("prompt", "position", "id", "text", "branch")}
    row |= {name: _short(x) for name, x in token.numbers.items()}
    if token.top:
      row["top"] = [[i, text, _short(logprob)] for i, text, logprob in token.top]
    for name in ("sample", "fork", "forced", "drafted", "accepted", "finish"):
      if value := getattr(token, name):
        row[name] = value
    self._write(row)

  def failure(self, failure: Failure) -> None:
    """Write the line of a text that ended with an error."""
    names = ("prompt", "sample", "after", "text")
    self._write({"error": {name: getattr(failure, name) for name in names}})

  def choice(self, samples: dict[str, Any]) -> None:
    """Write the line of one prompt's samples; it comes after all tokens."""
    self._write({"samples": samples})

  def close(self, summary: dict[str, Any]) -> None:
    """Write the summary line and give the file its name."""
    self._write({"summary": summary})
    self._file.close()
    os.replace(self._part, self._path)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    self._part.unlink(missing_ok=True)


class Tally:
  """The figures of a run, collected token by token."""

  def __init__(self, prompt_lengths: Sequence[int]):
    self._lengths = prompt_lengths
    self._branches: collections.Counter[str] = collections.Counter()
    self._entropy: list[float] = []
    self._finish: collections.Counter[str] = collections.Counter()
    self._ends: dict[tuple[int, int], int] = {}  # (prompt, sample) -> tokens of its text
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

  def failure(self, failure: Failure) -> None:
    """Count a text that ended with an error."""
    self._finish[failure.finish] += 1

  def summary(self) -> dict[str, Any]:
    """The figures: tokens, seconds (without loading and compiling), branch shares, finishes.

    `tokens_per_s` leaves out the wait for the first token; `prompt_tokens_per_s` is the rate during that wait, of
    a prompt that is alone.

    If any prompt had several samples, also `samples` of all prompts and `tokens_total`, the summed length
    of their texts, which exceeds `generated_tokens` when samples share the tokens before a fork.
    """
    n = len(self._entropy)
    several = any(sample for _, sample in self._ends)
    since_first = self._last_s - self.ttft_s
    fed = sum(self._lengths)
    # Of one prompt the wait for the first token is the prefill.
    alone = len(self._lengths) == 1 and self.ttft_s > 0
    samples = {"samples": len(self._ends), "tokens_total": sum(self._ends.values())}
    return {
      "prompts": len(self._lengths),
      "prompt_tokens": fed,
      "generated_tokens": n,
      **(samples if several else {}),
      "target_passes": self._passes,
      "drafted": self._drafted,
      "accepted": self._accepted,
      "ttft_s": _short(self.ttft_s),
      "seconds": _short(self._last_s),
      **({"prompt_tokens_per_s": _short(fed / self.ttft_s)} if alone else {}),
      "tokens_per_s": _short((n - 1) / since_first if since_first > 0 else 0.0),
      "mean_entropy": _short(statistics.fmean(self._entropy) if n else 0.0),
      "branches": {name: _short(c / n) for name, c in self._branches.most_common()},
      "finish": dict(self._finish),
    }


def rate(x: float) -> str:
  """A rate for people: three digits, and never as a power of ten."""
  return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def line(summary: dict[str, Any]) -> str:
  """The summary as one line, for the end of a run in the terminal."""
  shares = " ".join(f"{name} {100 * share:.0f}%" for name, share in summary["branches"].items())
  several = f" in {summary['samples']} samples" if "samples" in summary else ""
  guessed = ""
  if summary["drafted"]:
    guessed = (
      f" | {summary['accepted']} of {summary['drafted']} guesses right, "
      f"{summary['generated_tokens'] / summary['target_passes']:.2f} tokens a pass"
    )
  fed = f" ({rate(summary['prompt_tokens_per_s'])}/s)" if "prompt_tokens_per_s" in summary else ""
  after = f", then {rate(summary['tokens_per_s'])} tokens/s" if summary["tokens_per_s"] else ""
  return (
    f"{summary['prompt_tokens']} prompt{fed} + {summary['generated_tokens']} generated tokens{several}"
    f" | first token after {summary['ttft_s']:.3g} s{after}"
    f"{guessed} | mean entropy {summary['mean_entropy']:.2f} nats | {shares or 'no token'}"
  )
