"""Text in a terminal, coloured by how uncertain the model was.

Why: the foreground ramp runs from blue to red through mid-tones that read on dark and on light
backgrounds; branches differ by style and not by colour, so that both can be seen in one word.
"""

import math
from collections.abc import Sequence

from entropix_jax.generate import Token

# Entropy in nats up to which a colour of the 256-colour palette is used.
RAMP = ((0.05, 33), (0.3, 37), (0.8, 71), (1.5, 178), (2.5, 208), (math.inf, 160))
# SGR codes of the first, second, ... branch of a sampler: plain, underlined, bold underlined, ...
STYLES = ("", "4", "1;4", "7", "1;7", "3", "3;4", "9")


def _sgr(style: str, colour: int, text: str) -> str:
  codes = ";".join(filter(None, (style, f"38;5;{colour}")))
  # A style that spans a line break would paint the rest of the line in some terminals.
  return "\n".join(f"\x1b[{codes}m{part}\x1b[0m" if part else "" for part in text.split("\n"))


def colour(entropy: float) -> int:
  """The palette index for an entropy in nats."""
  return next(code for bound, code in RAMP if entropy <= bound)


def paint(token: Token, branches: Sequence[str]) -> str:
  """The token's text: colour says its entropy, style its branch."""
  if not token.text:
    return ""
  style = STYLES[branches.index(token.branch) % len(STYLES)]
  return _sgr(style, colour(token.numbers["entropy"]), token.text)


def legend(branches: Sequence[str]) -> str:
  """One line that explains the colours and styles."""
  steps = [_sgr("", code, f"<{bound:g}") for bound, code in RAMP[:-1]]
  steps.append(_sgr("", RAMP[-1][1], f">{RAMP[-2][0]:g}"))
  styles = [f"\x1b[{STYLES[i % len(STYLES)]}m{name}\x1b[0m" for i, name in enumerate(branches)]
  return f"entropy in nats: {' '.join(steps)}   branch: {' '.join(styles)}"
