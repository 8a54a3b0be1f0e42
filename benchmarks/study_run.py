"""How benchmarks/study.py makes answers: one engine for all methods, and what is kept of each answer.

Why: a row's text is the same bits beside any neighbours only in dispatches of one size [n29], so rows, window and
pieces never depend on what else runs.
"""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import study_tasks as tasks
from study_lines import MEANS, SCORED, WINDOW, Line, lines, packed
from study_methods import Setting
from tqdm import tqdm

from entropix_jax import metrics, sampling
from entropix_jax.checkpoints import chat
from entropix_jax.cli import commands
from entropix_jax.decoding import adaptive, branch, groups
from entropix_jax.errors import UserError
from entropix_jax.model import llama
from entropix_jax.rows import Failure, Rows, Token
from entropix_jax.scheduler import Job, Samples, Scheduler
from entropix_jax.session import Model, Session
from entropix_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Work:
  """One answer to make."""

  task: str
  part: str
  item: tasks.Item
  method: str
  index: int  # of the setting among those of the method; -1: made from others
  setting: Setting
  seed: int

  @property
  def id(self) -> str:
    """What tells it from all others of a run."""
    return f"{self.task}/{self.part}/{self.item.key}/{self.method}/{self.index}/{self.seed}"


class Exact(Model):
  """A Model whose dispatches always have all rows and one attention window, so that no neighbour changes a bit."""

  def setup(self, session, config):
    """As `Model.setup`, with one size of everything that the other rows decide."""
    one = super().setup(session, config)
    return dataclasses.replace(one, varied_rows=False, least_window=config.max_seq_len)


def open_session(
  resolved: Settings, samplers: Sequence[str], batch: int, room: int, model: Model | None = None
) -> Session:
  """A session in which requests choose their samplers, for rows of `room` tokens."""
  engine = dataclasses.replace(
    resolved.engine, batch_size=batch, max_seq_len=room, confidence=20, top_logprobs=3
  )
  neutral = dataclasses.replace(resolved, sampler="plain", preset="", knobs={}, engine=engine)
  return Session(model or Exact(neutral), neutral, samplers=samplers)


def job(session: Session, work: Work, limit: int, number: int) -> Job:
  """What the scheduler runs for an answer."""
  setting = work.setting
  ids = session.encode(work.item.ask + ("" if session.is_chat else "\n"))
  request = session.request(ids, limit, work.seed)
  request = dataclasses.replace(request, sampler=setting.sampler, knobs=setting.knobs)
  sampling.configure(sampling.find(setting.sampler), setting.knobs)
  if setting.method == "adaptive":
    options = adaptive.Config(**setting.options)
    labels = session._labels(options.good, options.bad)
    return adaptive.Group(request, options, session._aside, labels, number)
  if setting.method == "branch":
    return branch.Group(request, branch.Config(**setting.options), number)
  return Samples(request, number)


def facts(tokens: Sequence[Token]) -> Line:
  """Means and extremes of an answer's signals, and how often each branch was taken."""
  value = {n: np.asarray([t.numbers[n] for t in tokens]) for n in MEANS if n in tokens[0].numbers}
  confidence = value["confidence"]
  width = min(WINDOW, len(confidence))
  group = np.convolve(confidence, np.ones(width) / width, "valid")
  found = {n: float(x.mean()) for n, x in value.items()}
  found |= {
    f"{n}_most": float(value[n].max()) for n in ("entropy", "varentropy", "attn_ent") if n in value
  }
  found |= {f"{n}_least": float(value[n].min()) for n in ("logprob", "gap")}
  return {
    "signals": {n: float(f"{x:.5g}") for n, x in found.items()}
    | {"group_least": float(f"{group.min():.5g}")},
    "branches": dict(collections.Counter(t.branch for t in tokens).most_common()),
  }


def play(
  session: Session, works: Sequence[Work], limit: int
) -> Iterator[tuple[Work, Line, Sequence[Token]]]:
  """(work, its line, the tokens of its text) of each, as they end."""
  if not works:
    return
  jobs = [job(session, work, limit, i) for i, work in enumerate(works)]
  requests = [j.request for j in jobs]
  # All rows, however little is left to do.
  session.ready(requests + requests[:1] * session.settings.engine.batch_size)
  groups.check_groups(session.engine.setup, [j for j in jobs if isinstance(j, groups.Group)])
  rows = Rows(session.engine, session.tokenizer, decoder=session.decoder)
  scheduler = Scheduler(rows)
  for one in jobs:
    scheduler.submit(one)
  spent, said = collections.Counter(), collections.defaultdict(list)
  before = time.perf_counter()
  while scheduler.busy:
    events = [event for _, event in scheduler.step()]
    now = time.perf_counter()
    counts = collections.Counter(e.prompt for e in events if isinstance(e, Token))
    for i, n in counts.items():
      spent[i] += (now - before) * n / counts.total()
    before = now if events else before
    for event in events:
      if isinstance(event, Failure):
        raise UserError(event.why)
      if isinstance(event, Token) and isinstance(jobs[event.prompt], Samples):
        said[event.prompt].append(event)
    for one in scheduler.ended:
      i = one.prompt
      outcome = getattr(one, "outcome", None)
      tokens = outcome.samples[outcome.chosen].tokens if outcome else said.pop(i)
      line = {
        "id": works[i].id,
        "text": "".join(t.text for t in tokens),
        "tokens": outcome.tokens_total if outcome else len(tokens),
        "finish": tokens[-1].finish or outcome.samples[outcome.chosen].finish,
        "seconds": round(spent.pop(i), 4),
        **facts(tokens),
      }
      if outcome:
        line["samples"] = [
          {"answer": a, "tokens": s.own, "score": None if x != x else float(f"{x:.5g}")}
          for a, s, x in zip(outcome.answers, outcome.samples, outcome.scores, strict=True)
        ]
        line |= {k: v for k, v in outcome.facts.items() if k in ("judged_tokens", "forks")}
      yield works[i], line, tokens


@functools.partial(jax.jit, static_argnums=0)
def _scored(model, weights, token_BT):
  """SCORED of each place but the last, (X, B, T - 1): signals there, and what the next token cost."""
  B, T = token_BT.shape
  x_BTD, _, attn = llama.forward(
    model.cfg, weights, token_BT, last_B=jnp.broadcast_to(jnp.arange(T), (B, T)), attn_stats="last"
  )
  logits_BTV = model.unembed(weights, x_BTD)[:, :-1]
  raw = metrics.spread(logits_BTV)
  next_BT = token_BT[:, 1:]
  chosen_BT = jnp.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
  sure = jax.vmap(lambda logits_BV, lse_B: metrics.confidence(logits_BV, lse_B, 20), 1, 1)(
    logits_BTV, raw.lse
  )
  places = [getattr(attn, name)[:, :-1] for name in SCORED[5:8]]
  right_BT = (jnp.argmax(logits_BTV, -1) == next_BT).astype(jnp.float32)
  return jnp.stack(
    [raw.lse - chosen_BT, raw.ent, raw.varent, sure.confidence, sure.gap, *places, right_BT]
  )


def score_texts(session: Session, out: pathlib.Path, limit: int | None) -> None:
  """Score ordinary texts token by token, each from its beginning; lines that there are stay."""
  have = {line["id"] for line in lines(out, "scored.jsonl")}
  texts = list(enumerate(tasks.find("prose").texts()))[:limit]
  named = {f"prose/{i}" if i < 8 else f"stories/{i - 8}": text for i, text in texts}
  if named.keys() <= have:
    return
  session.ready([session.ask("A text.", 1, 0)])
  for name in tqdm(sorted(named.keys() - have), desc="scoring", disable=None):
    text = named[name]
    ids = chat.plain(session.tokenizer, text)[:512]
    token_BT = np.zeros((1, 1 << (len(ids) - 1).bit_length()), np.int32)
    token_BT[0, : len(ids)] = ids
    value_XBT = _scored(session.engine.setup.model, session.engine.weights, token_BT)
    values = np.asarray(value_XBT[:, 0, : len(ids) - 1], np.float64)
    commands.keep(out / "scored.jsonl", {"id": name, "tokens": len(ids), "x": packed(values)})
