"""What is printed of a run: texts in the order of their prompts, coloured on request in a terminal."""

import os
import sys
from collections.abc import Callable, Sequence

from entropix_jax.cli import terminal
from entropix_jax.decoding.groups import Outcome
from entropix_jax.errors import UserError
from entropix_jax.rows import Failure, Token


def emit(text: str) -> None:
  """Print to stdout, now, whatever the terminal's encoding."""
  try:
    print(text, end="", flush=True)
  except UnicodeEncodeError:  # a terminal that is not UTF-8
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "ascii", "replace"))
    sys.stdout.flush()
  except BrokenPipeError:  # a reader that has enough, such as `head`
    raise
  except OSError as error:
    raise UserError(f"The output cannot be written ({error.strerror}).") from None


def shown(text: str) -> str:
  """A text as stdout gets it: a terminal gets control characters as visible ones, a file or a pipe all as it is."""
  return terminal.visible(text) if sys.stdout.isatty() else text


def painter(branches: Sequence[str], colours: bool) -> tuple[Callable[[Token], str], str]:
  """(token -> what to print for it, the legend to print first): colours only in a terminal that has them and
  is not told otherwise (https://no-color.org)."""
  plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
  if colours and sys.stdout.isatty() and not plain:
    return lambda token: terminal.paint(token, branches), terminal.legend(branches)
  return lambda token: shown(token.text), ""


class Printer:
  """Texts in the order of their prompts, each whole; one that is alone as it comes.

  Where several continuations run, the one that is chosen is printed once it is.

  Args:
    titles: one for each prompt, printed where there are several.
    paint: of `painter`.
    chooses: whether Outcomes will come.
    out: takes each text in place of `emit`, and only whole ones.
    every: print all samples of an Outcome, and say which was chosen.
  """

  def __init__(
    self,
    titles: Sequence[str],
    paint: Callable[[Token], str],
    chooses: bool,
    out: Callable[[str], None] | None = None,
    every: bool = False,
  ):
    self._titles, self._paint, self._out = titles, paint, out or emit
    self._live = len(titles) == 1 and not chooses and not out
    self._chooses, self._every = chooses, every
    self._waiting: dict[int, str] = dict.fromkeys(range(len(titles)), "")
    self._finished: set[int] = set()
    self._turn = 0  # the prompt whose text may be printed now

  def token(self, token: Token) -> None:
    """A token of any prompt."""
    if self._live:
      self._out(self._paint(token))
    elif not self._chooses:
      self._waiting[token.prompt] += self._paint(token)
      if token.finish:
        self._done(token.prompt)

  def failure(self, failure: Failure) -> None:
    """A text that ended with an error; where texts are chosen from, its Outcome comes."""
    if self._live:
      self._out(shown(failure.text))
    elif not self._chooses:
      self._waiting[failure.prompt] += shown(failure.text)
      self._done(failure.prompt)

  def outcome(self, outcome: Outcome) -> None:
    """A choice."""
    texts = ["".join(map(self._paint, sample.tokens)) for sample in outcome.samples]
    if self._every:
      names = [
        f"-- sample {i + 1}, {'chosen' if i == outcome.chosen else sample.finish}"
        for i, sample in enumerate(outcome.samples)
      ]
      self._waiting[outcome.prompt] = "\n".join(map("{}\n{}".format, names, texts))
    else:
      self._waiting[outcome.prompt] = texts[outcome.chosen]
    self._done(outcome.prompt)

  def _done(self, prompt: int) -> None:
    self._finished.add(prompt)
    while self._turn in self._finished:
      text = self._waiting.pop(self._turn)
      if len(self._titles) > 1:
        text = f"{chr(10) * (self._turn > 0)}{shown(self._titles[self._turn])}\n{text}\n"
      self._out(text)
      self._turn += 1
