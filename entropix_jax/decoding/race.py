"""The race between plain decoding and drafting: which way the next dispatch goes.

Why by time and not by acceptance: what a pass over several tokens and a draft cost is a fact of the
machine, and a clock knows it. What drafts would have given lately only says when to look again.
"""

import collections
import statistics
from collections.abc import Callable

# Dispatches before the other way is tried: at first, at least, then at least and at most.
FIRST, AGAIN, LONGEST = 4, 16, 128
LOST = 0.05  # of the time before the first try, on it
TRY = 2  # passes of a dispatch that tries drafting
RECENT = 8  # dispatches that a way is judged by
MARGIN = 1.1  # by how much drafting must be faster: a few dispatches of it say less than as many plain ones
HALFWAY = 1.05  # by so much it may be faster after all: the next try comes soon
SPENT = 0.02  # of the time, on tries that were lost
# What a pass over several tokens takes, in plain steps, before one was timed.
PASS = 1.5


class Race:
  """Which way the next dispatch goes: True drafts.

  Why by time and not by acceptance: what a pass over G + 1 tokens and a draft cost is a fact of the
  machine, and a clock knows it. What a try that was lost has cost says when the next one may be; one that was
  won, but not by MARGIN, is repeated soon, and so is one when the text begins to repeat itself (`would`).

  Args:
    catches_up: the drafter reads what it has missed, so its first dispatch does not count and a try has
      two of them.
    first: plain dispatches before drafting is tried.
  """

  def __init__(
    self, always: bool, clock: Callable[[], float], catches_up: bool = True, first: int = FIRST
  ):
    self.always, self.clock, self.catches_up, self.first = always, clock, catches_up, first
    self.way, self.calm, self.since = always, first, 0
    # Whether the present try has no verdict yet, and whether the one before was cut off by a text's end.
    self.open = self.cut = False
    # (tokens a row, seconds, tokens a pass) of dispatches
    self.seen = {way: collections.deque(maxlen=RECENT) for way in (True, False)}
    self.begin()

  def begin(self) -> None:
    """Forget what was sent; what was learned stays."""
    if self.open and not self.cut:
      self.since = self.calm  # once: texts may all be as short
    self.cut, self.open = self.open, False
    self.sent: list[tuple[bool, bool] | None] = []  # not read yet: (way, counts); None is a prompt
    self.last: bool | None = None  # the way that was sent last
    self.tries = 0  # dispatches of the other way that the present try still sends
    self.last_s: float | None = None
    self.lost_s = 0.0  # by the present try
    # Mean tokens per pass that n-gram drafts would have given recently; None if unknown.
    self.would: float | None = None

  @property
  def cost(self) -> float:
    """Seconds of a pass that drafts, in those of a plain step."""
    plain, seen = self.rate(False), self.seen[True]
    if not plain or not seen:
      return PASS
    return statistics.median(s * n / each for each, s, n in seen) * plain

  @property
  def promising(self) -> bool:
    """Whether the other way would be faster by what drafting would have given lately."""
    if self.would is None:
      return False
    return self.would < self.cost / MARGIN if self.way else self.would > self.cost * MARGIN

  @property
  def per_pass(self) -> float:
    """Tokens of a pass that drafts, in the mean; 0 where none was read."""
    return statistics.fmean(n for *_, n in self.seen[True]) if self.seen[True] else 0.0

  def rate(self, way: bool) -> float:
    """Tokens/s of a row, in the mean of the last dispatches but the slowest: a machine may stall."""
    seen = sorted(self.seen[way], key=lambda sample: sample[0] / sample[1])
    seen = seen[len(seen) > 2 :]
    return sum(n for n, *_ in seen) / sum(s for _, s, _ in seen) if seen else 0.0

  @property
  def trying(self) -> bool:
    """Whether the next dispatch goes the other way, to try it."""
    calm = FIRST if self.promising else self.calm
    due = self.since >= calm and all(x is None or x[0] == self.way for x in self.sent)
    return not self.always and (self.tries > 0 or due)

  @property
  def warms(self) -> bool:
    """Whether the next dispatch would begin to draft after others, and so not count."""
    return self.catches_up and not self.last

  @property
  def drafts(self) -> bool:
    """The way of the next dispatch."""
    return self.way != self.trying

  def next(self, counts: bool = True) -> bool:
    """The way of a dispatch that is sent now.

    Args:
      counts: False where it has more to do than others; a try then has another dispatch.
    """
    way, trying = self.drafts, self.trying
    if not trying:
      self.since += 1
    elif self.tries:
      self.tries -= 1
    else:
      self.since, self.calm = 0, max(self.calm, AGAIN)
      self.tries = int(not counts or (way and self.catches_up))
      self.lost_s, self.open = 0.0, True
    if not counts:
      self.disturb()
    self.sent.append((way, counts and not (way and self.warms)))
    self.last = way
    return way

  def prompt(self) -> None:
    """A prompt is sent now."""
    self.disturb()
    self.sent.append(None)

  def disturb(self) -> None:
    """The host has other work before it can read what was sent, so its time says nothing."""
    self.sent = [sent and (sent[0], False) for sent in self.sent]

  def read(self, tokens: int, passes: int, rows: int) -> None:
    """The oldest unread dispatch has given so many tokens to so many rows, in so many passes in all."""
    if not self.sent:
      return
    now, sent, before = self.clock(), self.sent.pop(0), self.last_s
    self.last_s = now
    if sent is None or before is None or not rows:
      return
    (way, counts), spent, each = sent, max(now - before, 1e-9), tokens / rows
    tried, mine = way != self.way, self.rate(self.way)
    if tried and mine:
      self.lost_s += spent - each / mine
    if not counts:
      return
    self.seen[way].append((each, spent, tokens / passes))
    if tried:
      self.open = self.cut = False
    if self.always:
      return
    bar = 1.0 if self.way else MARGIN
    if self.rate(not self.way) > bar * self.rate(self.way) > 0:
      self.calm = self.first if self.way else FIRST
      self.way, self.since, self.tries = not self.way, 0, 0
    elif tried and self.rate(way) > HALFWAY * mine > 0:
      self.calm = FIRST  # too little seen to go over, and nothing lost by looking again
    elif tried and mine:
      usual = statistics.fmean(s for _, s, _ in self.seen[self.way])
      self.calm = int(min(max(self.lost_s / (SPENT * usual), AGAIN), LONGEST))
