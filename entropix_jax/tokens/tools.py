"""The tools for one model, with answers of numbers and texts only: for Python (`llm.tokens`), the command line and the server.

llm.tokens.lens("a text")                the tokens of a text
llm.tokens.segmentations("a text")       ways to write it, and how likely it is over all of them
llm.tokens.heal("The quick bro")         what healing does to a prompt
llm.tokens.next_bytes("The quick bro")   the law of the next byte
llm.tokens.walk("The quick bro")         the same, to go on byte by byte; `bytes.written` mixes several
llm.tokens.answers("Why?", k=4)          one question in several segmentations, answered side by side
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.errors import UserError
from entropix_jax.tokens import bytes as by_bytes
from entropix_jax.tokens import heal, lens, segmentations
from entropix_jax.tokens.laws import Laws
from entropix_jax.tokens.spelling import Spelling, spelling

LONGEST = {"lens": 20_000, "segmentations": 300, "prompt": 20_000}  # bytes of a text


def checked(what: str, text: Any, longest: int) -> str:
  """A text that is not empty and not too long. Raises UserError for any other."""
  if not isinstance(text, str) or not text:
    raise UserError(f"The {what} is empty; give some text.")
  if len(text.encode("utf-8", "replace")) > longest:
    raise UserError(f"The {what} has more than {longest} bytes; shorten it.")
  return text


class Tools:
  """The tools for a tokenizer and its model.

  Args:
    laws: the model's, made when a tool needs them.
    ends: ids that end a text.
    most: segmentations that are enumerated, and texts that the model is asked about at most for an estimate.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    laws: Callable[[], Laws],
    ends: Sequence[int] = (),
    most: int = segmentations.MOST,
  ):
    self.tokenizer, self._laws, self._ends, self._most = tokenizer, laws, tuple(ends), most

  @property
  def spelled(self) -> Spelling:
    """The bytes of the vocabulary."""
    return spelling(self.tokenizer)

  def prompt(self, text: str) -> list[int]:
    """Ids of a text that is continued. A text with nothing at all before it comes after what begins or ends texts."""
    tok = self.tokenizer
    nothing = [tok.bos] if tok.bos is not None else [*self._ends, 0][:1]
    return [*tok.prefix, *tok.encode(text)] or nothing

  def texts(self, ids: Sequence[int]) -> list[str]:
    """Tokens as `lens.visible` draws them."""
    return [lens.visible(self.tokenizer.token_bytes(id)) for id in ids]

  # -- tools -----------------------------------------------------------------------------------

  def lens(
    self, text: str, control: bool = False, beside: Tokenizer | None = None
  ) -> dict[str, Any]:
    """The tokens of a text; with another tokenizer also its tokens, and `spans` of (left, right) tokens that belong
    together. See lens.py."""
    checked("text", text, LONGEST["lens"])
    left = lens.look(self.tokenizer, text, control)
    found = {"tokens": len(left), "bytes": len(text.encode()), "pieces": [*map(_piece, left)]}
    if beside is not None:
      right = lens.look(beside, text, control)
      found["beside"] = [*map(_piece, right)]
      found["spans"] = [[len(a), len(b)] for a, b in lens.beside(left, right)]
    return found

  def segmentations(
    self, text: str, before: str = "", k: int = 8, dropout: float = 0.1, seed: int = 0,
    draws: int = 32, scored: bool = True,
  ) -> dict[str, Any]:  # fmt: skip
    """Ways to write a text, the likeliest first: all where they are few, else some of BPE dropout.

    Args:
      before: text that it comes after.
      k: the most to show.
      scored: also ask the model how likely they are and the text over all of them; log p in nats.
    """
    _within("k", k, 1, 1000)
    _within("draws", draws, 2, 1000)
    checked("text", text, LONGEST["segmentations"])
    own = tuple(self.tokenizer.encode(text, not before))
    data, rng = self.spelled.data(own), np.random.default_rng(seed)
    ways = segmentations.count(self.spelled, data)
    found: dict[str, Any] = {"ways": ways if ways < 2**53 else float(ways), "canonical": [*own]}
    sampled = [segmentations.sampled(self.spelled, own, dropout, rng) for _ in range(k)]
    if not scored:
      paths = [*segmentations.every(self.spelled, data)] if ways <= k else [own, *sampled]
      return found | {"rows": [self._row(path) for path in dict.fromkeys(paths)][:k]}
    one = segmentations.marginal(
      self._laws(), self.spelled, self.prompt(before), own, draws, self._most, seed
    )
    rows = [self._row(path) | {"logp": logp} for path, logp in one.rows[:k]]
    facts = {"logp": one.canonical, "total": one.total, "error": one.error, "gap": one.gap}
    return found | facts | {"exact": ways <= self._most, "rows": rows}

  def _row(self, path: Sequence[int]) -> dict[str, Any]:
    return {"ids": [*path], "texts": self.texts(path)}

  def heal(self, text: str, k: int = 12) -> dict[str, Any]:
    """What healing makes of a prompt: the bytes that are held, and the likeliest ways to write them and go on.

    `p` is the probability of a way given the bytes; `usual` are the likeliest next tokens without healing.
    """
    _within("k", k, 1, 1000)
    ids = self.prompt(checked("prompt", text, LONGEST["prompt"]))
    kept, held = heal.roll_back(self.spelled, ids)
    usual_V = self._laws().after([ids])[0]
    usual = [_p(self.texts([i])[0], usual_V[i]) for i in np.argsort(-usual_V, kind="stable")[:k]]
    found = {"held": lens.visible(self.spelled.data(held)), "tokens": [*held], "usual": usual}
    if not held:
      return found | {"rows": [], "missing": 0.0, "nodes": 0}
    tree = heal.Tree(self._laws(), self.spelled, kept, held)
    paths = sorted(tree.paths(self._laws()), key=lambda one: -one[1])[:k]
    rows = [self._row(path) | {"p": p} for path, p in paths]
    return found | {"rows": rows, "missing": tree.missing, "nodes": len(tree.nodes)}

  def walk(self, text: str, tolerance: float = by_bytes.TOLERANCE) -> by_bytes.Walk:
    """The text that follows a prompt, byte by byte. The prompt is rolled back as for healing, so it may end anywhere."""
    ids = self.prompt(checked("prompt", text, LONGEST["prompt"]))
    kept, held = heal.roll_back(self.spelled, ids)
    walk = by_bytes.Walk(self._laws(), self.spelled, kept, self._ends, tolerance)
    for byte in self.spelled.data(held):
      walk.push(byte)
    return walk

  def next_bytes(self, text: str, k: int = 16) -> dict[str, Any]:
    """The likeliest next bytes, the probability that the text ends, and what it took."""
    _within("k", k, 1, 256)
    walk = self.walk(text)
    law = walk.law
    order = np.argsort(-law[: by_bytes.END], kind="stable")[:k]
    rows = [
      {"byte": int(b), "text": lens.visible(bytes([b])), "p": float(law[b])}
      for b in order
      if law[b] > 0
    ]
    facts = {"end": float(law[by_bytes.END]), "missing": walk.missing}
    return {"rows": rows} | facts | {"paths": walk.paths, "asked": walk.rows}

  def variants(
    self, ids: Sequence[int], text: str, k: int, dropout: float, seed: int
  ) -> list[list[int]]:
    """A prompt in k segmentations, the first of them as it is; only the tokens of `text` in it change."""
    _within("k", k, 1, 64)
    own = self.tokenizer.encode(text, False)
    places = [i for i in range(len(ids)) if [*ids[i : i + len(own)]] == own]
    start, end = (places[-1], places[-1] + len(own)) if places else (0, len(ids))
    rng, found = np.random.default_rng(seed), [[*ids]]
    for _ in range(k - 1):
      other = segmentations.sampled(self.spelled, ids[start:end], dropout, rng)
      found.append([*ids[:start], *other, *ids[end:]])
    return found


class LLMTools(Tools):
  """The tools for an `LLM`."""

  def __init__(self, llm: Any):
    self._llm = llm
    super().__init__(llm.tokenizer, self._engine_laws, llm._model.stop)

  def _engine_laws(self) -> Laws:
    return self._session.laws

  @functools.cached_property
  def _session(self):
    session = self._llm._session(sampler="plain", preset="none", format="plain")
    session.ready([session.request(self.prompt("a"), 1, 0)])
    return session

  def answers(
    self, question: str, k: int = 4, dropout: float = 0.1, seed: int = 0, **how: Any
  ) -> list[dict[str, Any]]:
    """A question in k segmentations, answered with the same noise.

    Args:
      how: as in `LLM.generate`, but for `decoding` and `heal`.

    Returns:
      For each: the question's `tokens`, as they are drawn, the `text` of the answer and its mean `entropy` in nats.
    """
    limit = how.pop("max_new_tokens", 64)
    session = self._llm._session(**how)
    if session.chooses or session.heals or session.settings.method == "joint":
      raise UserError("Answers side by side are decoded plainly; leave out decoding and heal.")
    first = session.ask(question, limit, seed)
    todo = [
      dataclasses.replace(session.request(ids, limit, seed), stream=first.stream)
      for ids in self.variants(first.ids, question, k, dropout, seed)
    ]
    session.ready(todo)
    made: list[list[Any]] = [[] for _ in todo]
    for event in session.go(todo):
      made[event.prompt].append(event)
    return [
      {
        "tokens": self.texts(request.ids),
        "text": "".join(event.text for event in events),
        "entropy": float(np.mean([e.entropy for e in events if hasattr(e, "id")] or [np.nan])),
      }
      for request, events in zip(todo, made, strict=True)
    ]


def _piece(piece: lens.Piece) -> dict[str, Any]:
  return dataclasses.asdict(piece) | {"data": piece.data.hex(), "end": piece.end}


def _p(text: str, logp: float) -> dict[str, Any]:
  return {"text": text, "p": float(np.exp(logp))}


def _within(name: str, value: Any, least: int, most: int) -> None:
  if type(value) is not int or not least <= value <= most:
    raise UserError(f"{name} is {value!r}; it must be a whole number from {least} to {most}.")
