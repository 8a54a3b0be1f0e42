"""The one exception for what a user can put right."""


class UserError(ValueError):
  """One plain sentence that names the fault and says what to do; printed without a stack trace."""
