"""The trace of a run: every token with every number that decided it, as JSON lines.

  line 1         the whole configuration: model, engine, sampler settings, seed, prompts with ids
  then           one line per token: prompt, position, id, text, branch, logprob, entropy, ... settings
                 a number that is not finite is null
  in between     {"error": {"prompt", "sample", "after", "text"}}: a text ended because the model's numbers were
                 not finite, after so many tokens
  then           one line per prompt with samples: {"samples": {"prompt", "method", "rule", "chosen",
                 "samples": [{"sample", "parent", "at", "tokens", "finish", "score", "answer"}, ...]}}
  last line      {"summary": {...}}: tokens, times, branch shares; "interrupted": true where Ctrl-C, SIGTERM or
                 a closed pipe ended the run, and then prompts that were not finished have no line of samples

Until the last line is there the file is called FILE.part. After every dispatch it holds whole lines, so that
what a killed process leaves can be read, too.

The samples of a prompt are numbered from 0; a token's line names its sample unless that is 0. `parent` is
a sample with a lower number, and `at` the position in the parent's text where this sample forked, never
before the parent's own first token. A sample's lines begin at `at`; earlier tokens are its parent's.

Why: a claim about a sampler is only as good as the record of what it did. `logprob`, `entropy` (nats)
and `varentropy` (nats²) are the raw model's; `logprob_law` is under the distribution that was sampled.
"""

import collections
import json
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entropix_jax import files
from entropix_jax.decoding.groups import Outcome
from entropix_jax.rows import Failure, Token


def _short(x: float) -> float | None:
  """Six digits; None, which JSON has, for NaN and infinity, which it has not."""
  return float(f"{x:.6g}") if math.isfinite(x) else None


def _json(row: dict[str, Any]) -> str:
  return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def token_line(token: Token) -> dict[str, Any]:
  """A token's line, but for its prompt."""
  row: dict[str, Any] = {
    name: getattr(token, name) for name in ("position", "id", "text", "branch")
  }
  row |= {name: _short(x) for name, x in token.numbers.items()}
  if token.top:
    row["top"] = [[i, text, _short(logprob)] for i, text, logprob in token.top]
  for name in ("sample", "fork", "forced", "drafted", "accepted", "finish"):
    if value := getattr(token, name):
      row[name] = value
  return row


class Tracer:
  """Writes a trace; the file gets its name when it is complete or interrupted. Raises UserError if it cannot.

  Args:
    header: the first line.
    summary: returns the summary of the tokens so far, for a run that is interrupted.
    outcomes: the choices so far, which are written after the tokens.
  """

  def __init__(
    self,
    path: str | Path,
    header: dict[str, Any],
    summary: Callable[[], dict[str, Any]],
    outcomes: Sequence[Outcome] = (),
  ):
    self._path, self._summary, self._outcomes, self._stopped = path, summary, outcomes, ""
    self._draft = files.Draft(path, f"--trace={path}")
    # What the file holds, in bytes, and the lines to write after it. Ctrl-C may come amid a write, and where there
    # are several processes another thread may call `end`.
    self._end, self._lines, self._lock = 0, [], threading.Lock()
    self._seconds = 0.0  # of the last token
    self._write(header)
    self._flush()

  def _write(self, row: dict[str, Any]) -> None:
    with self._lock:
      self._lines.append(_json(row))

  def _flush(self, *last: str) -> None:
    end = self._draft.write(
      self._end, "".join([*self._lines, *last]).encode(errors="backslashreplace")
    )
    self._end, self._lines = end, []

  def token(self, token: Token) -> None:
    """Write one token's line."""
    if token.seconds != self._seconds:  # the first of its dispatch
      with self._lock:
        self._flush()
      self._seconds = token.seconds
    self._write({"prompt": token.prompt} | token_line(token))

  def failure(self, failure: Failure) -> None:
    """Write the line of a text that ended with an error."""
    names = ("prompt", "sample", "after", "text")
    self._write({"error": {name: getattr(failure, name) for name in names}})

  def close(self, summary: dict[str, Any]) -> None:
    """Write the lines of samples, then the summary line, and give the file its name."""
    with self._lock:
      if not self._draft.kept:
        rows = [{"samples": outcome.line()} for outcome in self._outcomes] + [{"summary": summary}]
        self._flush(*map(_json, rows))
        self._draft.keep()

  def end(self, code: int) -> str:
    """End early with this exit code; after an interrupt, keep a trace that holds a token.

    Returns: a sentence that says where it is, or an empty text.
    """
    try:
      summary = self._summary()
      n = summary["generated_tokens"]
      if code > 128 and n and not self._draft.kept:
        self.close(summary | {"interrupted": True})
        self._stopped = f"{self._path} holds the {n} tokens that were generated."
    finally:
      with self._lock:
        self._draft.drop()
    return self._stopped

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    interrupted = isinstance(error, KeyboardInterrupt | BrokenPipeError)
    said = self.end(129 if interrupted else 1)
    if interrupted and said:
      error.args = (said,)


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
    self._later = 0  # tokens that came after those that came first

  def token(self, token: Token) -> None:
    """Count one token."""
    if not self._entropy:
      self.ttft_s = token.seconds
    self._last_s = token.seconds
    self._later += token.seconds > self.ttft_s
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
    ends = dict(self._ends)  # another thread may ask, while this one counts
    several = any(sample for _, sample in ends)
    since_first = self._last_s - self.ttft_s
    fed = sum(self._lengths)
    # Of one prompt the wait for the first token is the prefill.
    alone = len(self._lengths) == 1 and self.ttft_s > 0
    samples = {"samples": len(ends), "tokens_total": sum(ends.values())}
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
      "tokens_per_s": _short(self._later / since_first if since_first > 0 else 0.0),
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
