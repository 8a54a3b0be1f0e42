"""The trace of a run, with every token's numbers; reading it back; its web page and figures.

Why: a token's colour says how uncertain the model was, and is the same in a terminal, a notebook, a page and a figure.
"""

ENTROPY_STEPS = (0.05, 0.3, 0.8, 1.5, 2.5)  # nats; upper bounds of all colours but the last
# The colours as xterm's 256-colour codes, and how opaque each is behind letters: they stay readable on light
# and dark pages, and the steps darken in order on white paper.
CODES = (33, 37, 71, 178, 208, 160)
_OPACITY = (0.08, 0.25, 0.35, 0.5, 0.5, 0.55)


def step(entropy: float) -> int:
  """The index of the colour for an entropy in nats; that of NaN is the last."""
  return sum(not entropy <= bound for bound in ENTROPY_STEPS)


def rgb(code: int) -> tuple[int, ...]:
  """Red, green and blue, 0 to 255, of an xterm code from 16 to 231."""
  return tuple((0, 95, 135, 175, 215, 255)[(code - 16) // n % 6] for n in (36, 6, 1))


COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*rgb(code)) for code in CODES)
PALE = "#{:02x}{:02x}{:02x}".format(*(round(255 + (x - 255) * _OPACITY[0]) for x in rgb(CODES[0])))
TINTS = tuple(f"rgba{(*rgb(code), opacity)}" for code, opacity in zip(CODES, _OPACITY, strict=True))
