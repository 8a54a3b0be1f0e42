"""A generation as a job of the scheduler."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from entropix_jax.decoding.groups import Outcome
from entropix_jax.engine.state import Prefix
from entropix_jax.rows import Failure, Pause, Rows, Token
from entropix_jax.scheduler import Job
from entropix_jax.serve.exchange import Generation, Labels, PromptScores


class Task(Job):
  """One generation of a submission, as the scheduler knows it.

  Args:
    stream: number of the submission.
    call: index of the generation in it.
    prompt: as of a Job.
  """

  def __init__(self, stream: int, call: int, generation: Generation, prompt: int):
    super().__init__(generation.request, prompt)
    self.stream, self.call, self.generation = stream, call, generation
    self.salt, self.score, self.n = generation.salt, generation.score, generation.rows
    self.inner = generation.job(prompt)
    self.width = self.inner.width
    self.begun = self.told = self.counted = False
    self._logits: Any = None

  @property
  def done(self) -> bool:
    """Whether the prompt has been fed and all samples have ended."""
    return self.begun and self.inner.done

  def begin(self, prefix: Prefix) -> None:
    """The prompt has been fed."""
    self.inner.begin(prefix)
    self.begun = True
    if self.generation.labels:
      self._logits = prefix.logits_1V
      if jax.process_count() > 1:  # each has a part of the vocabulary
        self._logits = multihost_utils.process_allgather(self._logits, tiled=True)

  def start(self, rows: Rows) -> None:
    """Begin what can begin."""
    self.inner.start(rows)

  def see(self, rows: Rows, event: Token | Pause | Failure) -> None:
    """Something happened to one of its rows."""
    self.inner.see(rows, event)

  def cancel(self, rows: Rows) -> None:
    """End all of its rows."""
    self.inner.cancel(rows)

  def chosen(self) -> list[Token | Outcome]:
    """The tokens of the text that a group has chosen, and why."""
    outcome = getattr(self.inner, "outcome", None)
    return [*outcome.samples[outcome.chosen].tokens, outcome] if outcome else []

  def results(self) -> list[PromptScores | Labels]:
    """What is known of the prompt; once."""
    if self.told or not self.begun:
      return []
    self.told, found = True, []
    if self.scores:
      found.append(self._prompt_scores())
    if self.generation.labels:
      logit_V = np.asarray(self._logits, np.float64)[0]
      top = logit_V.max()
      lse = top + np.log(np.exp(logit_V - top).sum())
      found.append(Labels(tuple(float(logit_V[i] - lse) for i in self.generation.labels)))
    self.scores, self._logits = (), None
    return found

  def _prompt_scores(self) -> PromptScores:
    n, few = len(self.request.ids) - 1, self.generation.score or 0
    logp_T, logp_TC, id_TC = (np.concatenate(x)[:n] for x in zip(*self.scores, strict=True))
    pairs = zip(id_TC[:, :few].tolist(), logp_TC[:, :few].tolist(), strict=True)
    tops = (tuple(zip(ids, logps, strict=True)) for ids, logps in pairs)
    return PromptScores((None, *logp_T.tolist()), (None, *tops))
