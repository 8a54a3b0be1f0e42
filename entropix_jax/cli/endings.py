"""Why texts ended, in words, unless a text ended by itself."""

import collections
from collections.abc import Sequence

from entropix_jax.decoding.groups import Outcome
from entropix_jax.engine.request import Request
from entropix_jax.engine.setup import Setup
from entropix_jax.rows import Token


class Endings:
  """The endings of a run, collected token by token.

  Args:
    requests: one for each prompt.
    chooses: whether Outcomes will come; then only the chosen texts count.
  """

  def __init__(self, setup: Setup, requests: Sequence[Request], chooses: bool):
    self._setup, self._requests, self._chooses = setup, requests, chooses
    self._spoke: set[int] = set()  # prompts whose text is not empty
    self._why: collections.Counter[str] = collections.Counter()

  def token(self, token: Token) -> None:
    """Any token."""
    if self._chooses:
      return
    if token.text:
      self._spoke.add(token.prompt)
    if token.finish:
      self._end(token.prompt, token.finish, token)

  def outcome(self, outcome: Outcome) -> None:
    """A choice."""
    sample = outcome.samples[outcome.chosen]
    if sample.text:
      self._spoke.add(outcome.prompt)
    if sample.tokens:
      self._end(outcome.prompt, sample.finish, sample.tokens[-1], outcome.facts.get("budget"))

  def _end(self, prompt: int, finish: str | None, last: Token, budget: int | None = None) -> None:
    request = self._requests[prompt]
    why = {
      "length": f"at the limit of {request.max_new_tokens} new tokens (--max_new_tokens)",
      "uncertain": "where the model was too uncertain (config.actions.stop_ent)",
      "budget": f"by the budget of {budget} tokens (config.decoding.budget)",
    }.get(finish or "", "")
    if finish == "length" and last.position + 1 < request.max_new_tokens:
      room = self._setup.config.max_seq_len
      why = f"where the context of {room} tokens is full (config.engine.max_seq_len)"
    elif finish == "stop" and last.id not in request.stop:
      why = "at a stop string (config.stop)"
    elif finish == "stop" and prompt not in self._spoke:
      why = "at once, with an empty text"
    if why:
      self._why[why] += 1

  def line(self) -> str:
    """What follows the figures of a run; empty if every text ended by itself."""
    n = len(self._requests)
    said = [why if n == 1 else f"{count} of {n} {why}" for why, count in self._why.items()]
    return f" | ended {', '.join(said)}" if said else ""
