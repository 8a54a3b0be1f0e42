"""The exceptions that end a program without a stack trace."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """One plain sentence that names the error and says what to do; printed without a stack trace."""


class Terminated(KeyboardInterrupt):
  """SIGTERM: it ends a program as Ctrl-C does, with another exit code."""

  code = 143


def nearest(name: str, names: Iterable[str]) -> str:
  """The end of a sentence about an unknown name: asks for the most similar one, or is a full stop."""
  near = difflib.get_close_matches(name, list(names), 1)
  return f"; did you mean {near[0]!r}?" if near else "."


def first_line(error: Exception) -> str:
  """The first line of what a library says, as part of a sentence."""
  return (str(error).splitlines() or [""])[0].rstrip(".: ")
