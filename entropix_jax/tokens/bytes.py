"""The next byte instead of the next token, exactly; and models with different tokenizers mixed byte by byte.

The law. Let k be the ids before and u the bytes that were written since. The next byte b has the probability

  P(b | k, u) = sum over paths p of w(p) * P(next token begins with rest(p) + b | k, p)  /  the same sum over all b

over the paths p whose bytes are a beginning of u; w(p) is the probability of the path, and rest(p) what u has after it. A
path counts as long as some token begins with its rest and goes beyond it. This is the law over all segmentations, so models
with different tokenizers can be compared, and mixed, with no alignment of their tokens.

The cost [n36]. A byte costs one row of the model for every new path that ends just at it. There are as many as segmentations of the
last bytes, so at each byte the least likely ones are dropped, as long as together they have at most a share `tolerance` of the
probability. The likeliest one stays in any case, so that every byte stays possible. The law of a text of n bytes that a walk writes is within 1 - (1 - tolerance)^n of the exact one in total
variation. `Walk.missing` bounds the error of the next byte's law after one given text. It is cautious, since it assumes that all
that was dropped would have gone on with just these bytes. With tolerance 0 only paths of probability 0 are dropped.

A sum over a vocabulary and a byte is a sum over a range of the sorted vocabulary; see spelling.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from entropix_jax.errors import UserError
from entropix_jax.tokens.laws import Laws
from entropix_jax.tokens.spelling import Spelling

END = 256  # the outcome that the text ends here
TOLERANCE = 1e-4


@dataclasses.dataclass
class _Path:
  ids: tuple[int, ...]
  size: int  # bytes that it writes
  weight: float  # its probability; over the mass of `Walk` where it was scaled
  p_X: np.ndarray  # the law after it, in the order of Spelling.tokens
  ends: float  # the probability that the text ends after it


class Walk:
  """A text of one model, byte by byte.

  Args:
    before: ids that the text comes after, at least one.
    ends: ids that end the text; other control tokens have no bytes, and are left out of the law.
    tolerance: see above.

  Attributes:
    data: the bytes so far.
    logp: log of the probability that the text begins with them, in nats; a lower bound where paths were dropped.
    missing: bound on the error of `law`, in total variation.
    rows: texts that the model was asked about.
  """

  def __init__(
    self,
    laws: Laws,
    spelled: Spelling,
    before: Sequence[int],
    ends: Sequence[int] = (),
    tolerance: float = TOLERANCE,
  ):
    if not before:
      raise UserError("Bytes need at least one token before them; give a prompt.")
    self._laws, self._spelled, self._before = laws, spelled, tuple(before)
    self._ends, self._tolerance = list(ends), tolerance
    self.data, self.rows, self._dropped, self._scaled = b"", 0, 0.0, 0.0
    self._paths: list[_Path] = []
    self._add([((), 1.0)])

  @property
  def paths(self) -> int:
    """Paths that are kept."""
    return len(self._paths)

  @property
  def logp(self) -> float:
    """See above."""
    return float(np.log(self._mass.sum()) - self._scaled)

  @property
  def missing(self) -> float:
    """See above."""
    return float(self._dropped / (self._dropped + self._mass.sum()))

  @property
  def law(self) -> np.ndarray:
    """p_X, 257 numbers: the probabilities of the next byte, and at END that the text ends."""
    return self._mass / self._mass.sum()

  def push(self, byte: int) -> None:
    """The text goes on with a byte.

    Raises:
      UserError: no path of tokens writes it.
    """
    if not 0 <= byte < END or not self._mass[byte] > 0:
      raise UserError(f"The model cannot go on with the byte {byte!r}; choose one of its law.")
    self.data += bytes([byte])
    found: dict[tuple[int, ...], float] = {}
    for path in self._paths:
      rest = self.data[path.size :]
      low, _ = self._spelled.range(rest)
      for at in range(low, low + len(self._spelled.ids.get(rest, ()))):
        share = path.weight * path.p_X[at]
        if share > 0:
          found[(*path.ids, int(self._spelled.id_X[at]))] = share
    self._paths = [path for path in self._paths if self._beyond(path) > 0]
    self._add(self._kept(found))
    self._rescale()

  def _kept(self, found: dict[tuple[int, ...], float]) -> list[tuple[tuple[int, ...], float]]:
    """The paths without the least likely ones."""
    ranked = sorted(found.items(), key=lambda one: one[1])
    beyond = sum(self._beyond(path) for path in self._paths)
    allowed = self._tolerance * (beyond + sum(share for _, share in ranked))
    while len(ranked) > 1 and ranked[0][1] <= allowed:
      allowed -= ranked[0][1]
      self._dropped += ranked.pop(0)[1]
    return ranked

  def _beyond(self, path: _Path) -> float:
    """The mass of a path whose next token goes beyond the text."""
    low, high = self._spelled.range(self.data[path.size :])
    low += len(self._spelled.ids.get(self.data[path.size :], ()))
    return path.weight * path.p_X[low:high].sum()

  def _add(self, found: Sequence[tuple[tuple[int, ...], float]]) -> None:
    """Ask for the laws after new paths, which end where the text does."""
    if found:
      laws_NV = self._laws.after([(*self._before, *ids) for ids, _ in found])
      self.rows += len(found)
      for (ids, share), logp_V in zip(found, laws_NV, strict=True):
        p_V = np.exp(logp_V)
        ends = float(p_V[self._ends].sum())
        path = _Path(ids, len(self.data), share, p_V[self._spelled.id_X], ends)
        self._paths.append(path)
    self._mass = sum(map(self._next, self._paths), np.zeros(END + 1))

  def _next(self, path: _Path) -> np.ndarray:
    """257 numbers: how much of the mass of a path goes on with each byte."""
    rest = self.data[path.size :]
    low, high = self._spelled.range(rest)
    low += len(self._spelled.ids.get(rest, ()))
    byte_X = self._spelled.byte_XY[low:high, len(rest)] if high > low else np.zeros(0, np.uint8)
    mass = np.bincount(byte_X, weights=path.p_X[low:high], minlength=END + 1)
    mass[END] = 0.0 if rest else path.ends
    return path.weight * mass

  def _rescale(self) -> None:
    """Keep the numbers of long texts away from underflow; ratios do not change."""
    scale = 1.0 / self._mass.sum()
    self._scaled += float(np.log(scale))
    self._mass = self._mass * scale
    self._dropped *= scale
    for path in self._paths:
      path.weight *= scale


def mixed(laws: Sequence[np.ndarray], shares: Sequence[float], rule: str = "mean") -> np.ndarray:
  """One law of the next byte from several.

  Args:
    laws: of each model, as `Walk.law`.
    shares: of the models, not negative, one of them at least positive.
    rule: "mean": the weighted mean of the laws; "product": their weighted geometric mean, normalised.

  Raises:
    UserError: another rule, shares that cannot be used, or laws that have no byte in common.
  """
  share = np.asarray(shares, np.float64)
  if len(share) != len(laws) or (share < 0).any() or not 0 < share.sum() < np.inf:
    raise UserError(f"The shares are {list(shares)!r}; give one that is not negative per model.")
  share = share / share.sum()
  if rule == "mean":
    return share @ np.stack(laws)
  if rule != "product":
    raise UserError(f"The rule is {rule!r}; use mean or product.")
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = [s * np.log(law) if s else 0.0 * law for s, law in zip(share, laws, strict=True)]
  total = sum(terms)
  if not np.isfinite(total.max()):
    raise UserError("The models have no next byte in common; use the rule mean.")
  mix = np.exp(total - total.max())
  return mix / mix.sum()


def written(
  walks: Sequence[Walk],
  most: int,
  shares: Sequence[float] | None = None,
  rule: str = "mean",
  seed: int = 0,
  temperature: float = 1.0,
) -> bytes:
  """Bytes that several models write together; each byte is drawn from their mixed law and given to all.

  Args:
    most: bytes at most.
    shares: of the models; None: equal ones.
    temperature: of the mixed law; 0 takes the likeliest byte.
  """
  rng, found = np.random.default_rng(seed), b""
  while len(found) < most:
    law = mixed([walk.law for walk in walks], shares or [1.0] * len(walks), rule)
    # A byte that some model gives no probability would end its walk.
    law = law * np.all([walk.law > 0 for walk in walks], axis=0)
    if not law.any():
      break
    if temperature:
      law = np.exp(
        (np.log(law, where=law > 0, out=np.full_like(law, -np.inf)) - np.log(law.max()))
        / temperature
      )
      byte = int(rng.choice(END + 1, p=law / law.sum()))
    else:
      byte = int(law.argmax())
    if byte == END:
      break
    for walk in walks:
      walk.push(byte)
    found += bytes([byte])
  return found
