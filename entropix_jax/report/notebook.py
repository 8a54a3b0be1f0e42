"""A text as HTML for notebooks: each token on a background that says how uncertain the model was.

Why: the colours are translucent and the letters keep the page's own colour, so that a text can be read on light and
on dark pages. Every text of a model or a user is escaped.
"""

import html
import math
from collections.abc import Sequence

from entropix_jax.report import ENTROPY_STEPS, TINTS, step
from entropix_jax.rows import Token

_LEGEND = (
  "border:1px solid rgba(128, 128, 128, .4);border-radius:3px;padding:0 .4em;margin-left:.4em"
)


def page(tokens: Sequence[Token], caption: str) -> str:
  """The tokens with their numbers as tooltips, a legend and a caption."""
  words = [*(f"&lt;{bound:g}" for bound in ENTROPY_STEPS), f"&gt;{ENTROPY_STEPS[-1]:g}"]
  legend = "".join(
    f'<span style="background:{code};{_LEGEND}">{word}</span>'
    for code, word in zip(TINTS, words, strict=True)
  )
  return (
    f'<div style="white-space:pre-wrap;line-height:1.6">{"".join(map(_span, tokens))}</div>'
    f'<div style="font-size:85%;opacity:.8;margin-top:.5em">entropy in nats {legend}'
    f'<span style="margin-left:1em">{html.escape(caption)}</span></div>'
  )


def _span(token: Token) -> str:
  numbers = f"entropy {token.entropy:.3g} nats, varentropy {token.varentropy:.3g} nats²"
  likely = [f"{text!r} {math.exp(logprob):.3g}" for _, text, logprob in token.top]
  title = "\n".join([f"{token.branch}, p = {math.exp(token.logprob):.3g}", numbers, *likely])
  title = html.escape(title).replace("\n", "&#10;")
  style = f"background:{TINTS[step(token.entropy)]};border-radius:2px"
  return f'<span style="{style}" title="{title}">{html.escape(token.text)}</span>'
