"""Healing: a prompt that ends inside a word goes on as if it had not been cut there.

Why: "The quick bro" ends with tokens that rarely stand before "wn" in texts, since " brown" is a token of its own. So the
prompt is rolled back to where tokens could have gone on, and what follows is held to the bytes that stood there.

The law. Let k be the ids that are kept and h the held bytes. Healing samples from the exact conditional law

  P(x_1, x_2, ... | k, bytes(x_1 x_2 ...) begin with h)

of the model. This is not the law of masking step by step. A token x that writes only a part of h must be weighed by the
probability that the text goes on with the rest r of it. So after a path p the next token has the law

  p(x | k, p) * v(p + x) / v(p)       v(p) = sum over x of p(x | k, p) * v(p + x)

where v is 1 for a path whose bytes begin with h. The sampler is given this law in place of the model's. With a sampler
that draws from what it is given, such as plain at temperature 1, tokens have exactly the conditional law. Any other one,
adaptive samplers among them, does with the conditioned model what it does with the model: greedy decoding takes the
likeliest token at each step, and thresholds see the entropy of the conditioned law.

v needs the model's laws after the paths that write a part of h. They are a tree, whose likeliest nodes are expanded first,
until what is not expanded has at most a share of `tolerance` of the probability, or the tree has `most` nodes. Those nodes
count as impossible, which moves the law of the text by at most `Tree.missing` in total variation.

What it is conditioned on. The kept ids stay as the tokenizer made them: healing is exact given those tokens, not over all
segmentations of the whole prompt. The pair of the last kept token and a covering one may be one that the tokenizer would
not make of these bytes [n33]. It has the probability that the model gives it, which is small in trained models.

How far back: to the start of the longest end of the prompt that some token begins with and goes beyond, and from there to
the token boundary at or before it. Where there is no such end, nothing can bridge the end of the prompt and healing
changes nothing. Control tokens stay, and so does the first token of the prompt.
"""

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from entropix_jax.engine.setup import LIFTS
from entropix_jax.tokens.laws import ROWS, Laws
from entropix_jax.tokens.spelling import Spelling

TOLERANCE, NODES = 1e-4, 64


def roll_back(spelled: Spelling, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(ids that are kept, ids whose bytes are held) of a prompt; none are held where nothing can bridge its end."""
  end, tail, sizes = len(ids), b"", []
  while end > 1 and len(tail) < spelled.longest and ids[end - 1] in spelled.rank:
    end -= 1
    data = spelled.data([ids[end]])
    tail, sizes = data + tail, [len(data), *sizes]
  longest = min(len(tail), spelled.longest)
  reach = next((n for n in range(longest, 0, -1) if spelled.extends(tail[-n:])), 0)
  kept = len(ids)
  while reach > 0:
    kept -= 1
    reach -= sizes.pop()
  return tuple(ids[:kept]), tuple(ids[kept:])


@dataclasses.dataclass
class Node:
  """A path that writes a part of the held bytes."""

  rest: bytes  # what is left of them
  share: float  # probability of the path
  covering: np.ndarray  # ids that write all of the rest
  covered: float  # their probability
  within: dict[int, float]  # id -> probability of those that write only a part of it
  value: float = 0.0  # v of the path


class Tree:
  """The paths that write a part of the held bytes, as far as they are expanded.

  Args:
    kept: ids before, at least one.
    held: ids whose bytes are held, at least one.
    tolerance: share of the probability that may be left out.
    most: nodes, besides those of `held` itself.

  Attributes:
    nodes: path -> Node.
    vocab: ids of the model.
    missing: bound on the distance in total variation between the law that is followed and the exact one.
  """

  def __init__(
    self,
    laws: Laws,
    spelled: Spelling,
    kept: Sequence[int],
    held: Sequence[int],
    tolerance: float = TOLERANCE,
    most: int = NODES,
  ):
    self.spelled, self.kept, self.held = spelled, tuple(kept), tuple(held)
    self.data = spelled.data(held)
    self.nodes: dict[tuple[int, ...], Node] = {}
    self._frontier: list[tuple[float, tuple[int, ...], bytes]] = []
    # The held ids themselves are a way to go on, so v is not 0.
    own = [(self.held[:i], spelled.data(self.held[i:])) for i in range(len(held))]
    self._expand(laws, own, [1.0] * len(own))
    while self._frontier and len(self.nodes) < most:
      left = -sum(share for share, *_ in self._frontier)
      covered = sum(node.share * node.covered for node in self.nodes.values())
      if left <= tolerance * (left + covered):
        break
      best = [heapq.heappop(self._frontier) for _ in range(min(ROWS, len(self._frontier)))]
      self._expand(laws, [(path, rest) for _, path, rest in best], [-share for share, *_ in best])
    dropped = self._values() - sum(share for share, *_ in self._frontier)
    whole = dropped + self.nodes[()].value
    self.missing = dropped / whole if whole else 1.0

  def _expand(self, laws: Laws, paths: list[tuple[tuple[int, ...], bytes]], shares) -> None:
    laws_NV = laws.after([(*self.kept, *path) for path, _ in paths])
    self.vocab = laws_NV.shape[1]
    for (path, rest), share, logp_V in zip(paths, shares, laws_NV, strict=True):
      if path:  # the share of a node of `held` is known only now
        parent = self.nodes[path[:-1]]
        share = parent.share * parent.within[path[-1]]
      covering = self.spelled.covering(rest)
      within = {id: float(np.exp(logp_V[id])) for id, _ in self.spelled.within(rest)}
      covered = float(np.exp(logp_V[covering]).sum())
      self.nodes[path] = Node(rest, share, covering, covered, within)
      for id, p in within.items():
        if p > 0 and (*path, id) != self.held[: len(path) + 1]:
          left = rest[len(self.spelled.data([id])) :]
          heapq.heappush(self._frontier, (-share * p, (*path, id), left))

  def _values(self) -> float:
    """Set v of every node, from the longest paths on; the probability of what has no place among the lifts."""
    dropped = 0.0
    for path in sorted(self.nodes, key=len, reverse=True):
      node = self.nodes[path]
      worth = {
        id: p * self.nodes[(*path, id)].value
        for id, p in node.within.items()
        if (*path, id) in self.nodes
      }
      best = sorted(worth, key=worth.__getitem__, reverse=True)
      dropped += node.share * sum(worth[id] for id in best[LIFTS:])
      node.within = {id: node.within[id] for id in best[:LIFTS] if worth[id] > 0}
      node.value = node.covered + sum(worth[id] for id in node.within)
    return dropped

  def paths(self, laws: Laws) -> list[tuple[tuple[int, ...], float]]:
    """(path, its probability given the held bytes) of all ways to write the held bytes, up to the token that covers them."""
    nodes = list(self.nodes.items())
    laws_NV = laws.after([(*self.kept, *path) for path, _ in nodes])
    whole = self.nodes[()].value
    return [
      ((*path, int(id)), node.share * float(np.exp(logp_V[id])) / whole)
      for (path, node), logp_V in zip(nodes, laws_NV, strict=True)
      for id in node.covering
    ]

  def lifts(self, path: tuple[int, ...]) -> dict[int, float]:
    """log v of the next paths, for the ids that may come next and write only a part of what is left."""
    return {id: float(np.log(self.nodes[(*path, id)].value)) for id in self.nodes[path].within}

  def guide(self) -> "Guide":
    """What holds one text to the bytes."""
    return Guide(self)


class Guide:
  """Where a text is in the held bytes; see `rows.Guide`. It is free when they have been written."""

  over = False

  def __init__(self, tree: Tree):
    self._tree, self._path = tree, ()

  @property
  def free(self) -> bool:
    """Whether the held bytes have been written, and anything may follow."""
    return self._path not in self._tree.nodes

  @property
  def lifts(self) -> dict[int, float]:
    """Nats to add to the logits of some ids."""
    return self._tree.lifts(self._path)

  def push(self, id: int) -> None:
    """The row has emitted a token."""
    self._path = (*self._path, id)

  def mask(self) -> np.ndarray:
    """bits_X of the ids that may come next."""
    node = self._tree.nodes[self._path]
    bit_V = np.zeros((-(-self._tree.vocab // 32) * 32,), bool)
    bit_V[node.covering] = True
    bit_V[list(node.within)] = True
    return np.packbits(bit_V, bitorder="little").view("<u4").astype(np.uint32)
