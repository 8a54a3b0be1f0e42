"""The one exception for errors that the user can fix."""


class UserError(ValueError):
  """One plain sentence that names the error and says what to do; printed without a stack trace."""
