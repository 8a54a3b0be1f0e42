"""The exceptions that end a program without a stack trace."""


class UserError(ValueError):
  """One plain sentence that names the error and says what to do; printed without a stack trace."""


class Terminated(KeyboardInterrupt):
  """SIGTERM: it ends a program as Ctrl-C does, with another exit code."""

  code = 143
