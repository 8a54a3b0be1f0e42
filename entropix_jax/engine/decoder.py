"""How rows get their next tokens: the plain way, one forward pass per token.

`PlainDecoder` has every method that `rows.Rows` calls on a decoder. decoding/speculative.py has another one.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Job, compile_all, needed
from entropix_jax.engine.request import Request
from entropix_jax.engine.state import Prefix, State


class PlainDecoder:
  """One forward pass per token."""

  shares_prefix: ClassVar[bool] = True  # whether rows may share a prefix
  resumes: ClassVar[bool] = True  # whether rows may begin with forced ids

  def __init__(self, engine: Engine):
    self.engine = engine

  @property
  def per_dispatch(self) -> tuple[int, int]:
    """(expected, most) tokens that the next dispatch gives a live row."""
    steps = self.engine.setup.config.steps_per_dispatch
    return steps, steps

  def jobs(self, requests: Sequence[Request], several: bool = False) -> list[Job]:
    """What these requests need and is not compiled yet, for `compile_all`; see `programs.needed`."""
    return self.engine.compiled.jobs(needed(self.engine.setup, requests, several))

  def compile(self, requests: Sequence[Request], several: bool = False) -> None:
    """Compile what these requests need."""
    compile_all(self.jobs(requests, several))

  def decode(
    self,
    state: State,
    longest: int,
    prefix: Prefix | None = None,
    rows: int | None = None,
    steps: int | None = None,
  ) -> tuple[State, jax.Array]:
    """(State, record_NBR) of one dispatch; see `Engine.decode`."""
    return self.engine.decode(state, longest, steps, prefix, rows)

  # -- what happens to rows ----------------------------------------------------------------------

  def begin(self) -> None:
    """All slots are free."""

  def inserted(self, slot: int, request: Request) -> None:
    """A row of this request is in that slot."""

  def first(self) -> None:
    """First tokens are drawn by a dispatch of their own."""

  def forked(self, source: int, target: int) -> None:
    """The row at `source` is now also at `target`."""

  def rewound(self, state: State) -> None:
    """Rows have become shorter."""

  def read(self, values: dict[str, np.ndarray]) -> None:
    """The host has read the oldest record that was unread; of a `decode` or a `first`."""
