"""Does sampling by entropy help? Every method answers the same prompts, and a report says what differs.

  python benchmarks/study.py --config=configs/demo.py --out=study_demo
  python benchmarks/study.py --config=configs/smollm2_135m.py --out=study_smollm2 --data=DATA
  python benchmarks/study.py --config=configs/demo.py --out=FOLDER --tasks=demo --limit=12 --seeds=1 --settings=2
  python benchmarks/study.py --report --out=study_demo,study_smollm2
  python benchmarks/study.py --config=configs/demo.py --out=study_demo --verify=0.05

docs/study.md says what is compared and how. For each task, all settings of all methods answer the prompts for choosing, and then the best setting
of each method answers the prompts of the comparison, with several seeds; quadrant's best also with placebos in place of its
signals. A run that was ended goes on where it was. The folder has

  answers.jsonl   a header; a line per setting; a line per answer: id (task/part/prompt/method/setting/seed), text, tokens of all samples,
                  finish, its share of the batch's seconds, means and extremes of its signals, branches
  signals.jsonl   for temperature and greedy, the signals of each token: base64 of float16, one signal after another (SIGNALS)
  scored.jsonl    ordinary text token by token under the raw model: SCORED in the same form
  report.md       and plots, by --report; files that were compressed with gzip are read, too

Why: rows of one batch carry different methods, so every method sees the same machine, weights and noise, and
a row's text is the same bits beside any neighbours in a batch of this size [n29]. So the size is part of the header.
"""

import base64
import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / name) for name in ("", "scripts", "benchmarks")]

import decode
import study_methods as methods
import study_tasks as tasks
from study_methods import Setting
from tqdm import tqdm

from entropix_jax import metrics, sampling
from entropix_jax.cli import commands, config_file
from entropix_jax.decoding import adaptive, branch, groups
from entropix_jax.errors import UserError
from entropix_jax.model import llama
from entropix_jax.rows import Failure, Rows, Token
from entropix_jax.sampling import presets
from entropix_jax.scheduler import Job, Samples, Scheduler
from entropix_jax.session import Model, Session

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_OUT = _FLAGS.strings("out", [], "Folder of the run; for --report several.")
_TASKS = _FLAGS.strings("tasks", [], f"Of {', '.join(tasks.NAMES)}; default: demo and prose for the demo, else ifeval and prose.")
_METHODS = _FLAGS.strings("methods", [], f"Of {', '.join(methods.NAMES)}; default: all.")
_SEEDS = _FLAGS.integer("seeds", 3, "Seeds of the comparison.", 1)
_SETTINGS = _FLAGS.integer("settings", methods.SETTINGS, "Settings of each method to try.", 1)
_LIMIT = _FLAGS.integer("limit", None, "Prompts of the comparison per task; a quarter as many to choose by. Default: the task's.", 1)
_MAX_NEW_TOKENS = _FLAGS.integer("max_new_tokens", None, "Most tokens per answer; default: the task's.", 1)
_BATCH = _FLAGS.integer("batch", 32, "Rows.", 1)
_DATA = _FLAGS.string("data", str(ROOT.parent / "shared" / "data"), "Folder of the tasks' data files.")
_CALIBRATED = _FLAGS.string("calibrated", None, "Preset with quadrant's thresholds for this model; default: the one that ships.")
_FOREIGN = _FLAGS.string("foreign", None, "Preset with those for another model; default: the other one that ships.")
_VERIFY = _FLAGS.float("verify", None, "Make this share of the answers again, and compare the texts.", 0.0, 1.0)
_REPORT = _FLAGS.bool("report", False, "Make the report of finished lines; nothing is run.")

# What is kept of each token, of each answer (means), and of each token of ordinary text.
SIGNALS = ("entropy", "varentropy", "logprob", "confidence", "gap", "attn_ent")
MEANS = (*SIGNALS, "logprob_law", "self_certainty", "attn_spread", "agreement", "score_mag")
SCORED = ("loss", "entropy", "varentropy", "confidence", "gap", "attn_ent", "attn_spread", "agreement", "right")
WINDOW = 16  # tokens of a group, whose lowest mean confidence is kept
SAMPLED = 0  # seed of the choice of lines to verify
Line = dict[str, Any]


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


# -- files -----------------------------------------------------------------------------------------


def lines(folder: pathlib.Path, name: str) -> Iterator[Line]:
  """The whole lines of a file of a run, compressed or not; a last line that was cut short is left out."""
  path = folder / name
  for path, opener in ((path, open), (path.with_name(f"{name}.gz"), gzip.open)):
    if path.is_file():
      with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
          if line.endswith("\n"):
            yield json.loads(line)


def _mend(path: pathlib.Path) -> None:
  """Remove what follows the last whole line."""
  if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
    path.write_bytes(data[: data.rfind(b"\n") + 1])


def packed(values: np.ndarray) -> str:
  """Numbers as base64 of float16."""
  return base64.b64encode(np.asarray(values, "<f2").tobytes()).decode()


def unpacked(text: str, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Name -> values, of `packed` with one row per name."""
  flat = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)
  return dict(zip(names, flat.reshape(len(names), -1), strict=True))


# -- the model -------------------------------------------------------------------------------------


class Exact(Model):
  """A Model whose dispatches always have all rows and one attention window, so that no neighbour changes a bit."""

  def setup(self, session, config):
    """As `Model.setup`, with one size of everything that the other rows decide."""
    one = super().setup(session, config)
    return dataclasses.replace(one, varied_rows=False, least_window=config.max_seq_len)


def open_session(resolved, samplers: Sequence[str], room: int, model: Model | None = None) -> Session:
  """A session in which requests choose their samplers, for rows of `room` tokens."""
  engine = dataclasses.replace(
    resolved.engine, batch_size=_BATCH.value, max_seq_len=room, confidence=20, top_logprobs=3
  )
  neutral = dataclasses.replace(resolved, sampler="plain", preset="", knobs={}, engine=engine)
  return Session(model or Exact(neutral), neutral, samplers=samplers)


class Reserved(adaptive.Group):
  """Adaptive best of n that reserves its rows, so that rounds do not wait for other texts."""

  def __init__(self, *args):
    super().__init__(*args)
    self.width = self.config.n


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
    return Reserved(request, options, session._aside, labels, number)
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
  found |= {f"{n}_most": float(value[n].max()) for n in ("entropy", "varentropy", "attn_ent") if n in value}
  found |= {f"{n}_least": float(value[n].min()) for n in ("logprob", "gap")}
  return {
    "signals": {n: float(f"{x:.5g}") for n, x in found.items()} | {"group_least": float(f"{group.min():.5g}")},
    "branches": dict(collections.Counter(t.branch for t in tokens).most_common()),
  }


def play(session: Session, works: Sequence[Work], limit: int) -> Iterator[tuple[Work, Line, Sequence[Token]]]:
  """(work, its line, the tokens of its text) of each, as they end."""
  if not works:
    return
  jobs = [job(session, work, limit, i) for i, work in enumerate(works)]
  requests = [j.request for j in jobs]
  # All rows, however little is left to do.
  session.ready(requests + requests[:1] * _BATCH.value)
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
def _scored(cfg, weights, token_BT):
  """SCORED of each place but the last, (X, B, T - 1): signals there, and what the next token cost."""
  B, T = token_BT.shape
  x_BTD, _, attn = llama.forward(
    cfg, weights, token_BT, last_B=jnp.broadcast_to(jnp.arange(T), (B, T)), attn_stats="last"
  )
  logits_BTV = llama.unembed(weights, x_BTD)[:, :-1]
  raw = metrics.spread(logits_BTV)
  next_BT = token_BT[:, 1:]
  chosen_BT = jnp.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
  sure = jax.vmap(lambda l, z: metrics.confidence(l, z, 20), 1, 1)(logits_BTV, raw.lse)
  places = [getattr(attn, name)[:, :-1] for name in SCORED[5:8]]
  right_BT = jnp.argmax(logits_BTV, -1) == next_BT
  return jnp.stack([raw.lse - chosen_BT, raw.ent, raw.varent, sure.confidence, sure.gap, *places, right_BT])


def score_texts(session: Session, out: pathlib.Path, limit: int | None) -> None:
  """Score ordinary texts token by token, each from its beginning; lines that there are stay."""
  have = {line["id"] for line in lines(out, "scored.jsonl")}
  chosen = list(enumerate(tasks.find("prose").texts()))[:limit]
  for i, text in tqdm(chosen, desc="scoring", disable=None):
    name = f"prose/{i}" if i < 8 else f"stories/{i - 8}"
    if name in have:
      continue
    ids = session.tokenizer.encode(text)[:512]
    token_BT = np.zeros((1, 1 << (len(ids) - 1).bit_length()), np.int32)
    token_BT[0, : len(ids)] = ids
    cfg = session.engine.setup.cfg
    value_XBT = _scored(cfg, session.engine.weights, token_BT)
    values = np.asarray(value_XBT[:, 0, : len(ids) - 1], np.float64)
    commands.keep(out / "scored.jsonl", {"id": name, "tokens": len(ids), "x": packed(values)})


# -- what to do ------------------------------------------------------------------------------------


class Study:
  """A run in a folder.

  Args:
    out: the folder.
    resolved: settings of the config file.
  """

  def __init__(self, out: pathlib.Path, resolved):
    self.out, self.resolved = out, resolved
    demo = pathlib.Path(resolved.checkpoint).parent.name == "demo"
    mine = [n for n in tasks.NAMES if getattr(tasks.find(n), "MODEL", "") != ("other" if demo else "demo")]
    names = _TASKS.value or ([mine[0], "prose"] if demo else ["ifeval", "prose"])
    if wrong := [n for n in names if n not in mine]:
      tasks.find(wrong[0])
      raise UserError(f"The task {wrong[0]} is not for this model; choose from: {', '.join(mine)}.")
    self.names, self.wanted = names, _METHODS.value or list(methods.NAMES)
    if wrong := [n for n in self.wanted if n not in methods.NAMES]:
      raise UserError(f"There is no method {wrong[0]!r}; choose from: {', '.join(methods.NAMES)}.")
    shipped = [str(methods.HERE / "study_demo.json"), "smollm2-135m"]
    own, other = shipped if demo else reversed(shipped)
    self.thresholds = methods.preset(_CALIBRATED.value or own)
    self.foreign = methods.preset(_FOREIGN.value or other)
    # Choosing needs more methods than were asked for.
    self.tried = {*self.wanted, "temperature"} & {*methods.tried({})}
    if {*self.wanted} & {*methods.PLACEBOS}:
      self.tried |= {*methods.QUADRANTS}
    if {*self.wanted} & {*methods.TRANSFERS}:
      self.tried.add("quadrant_calibrated")
    every = [x.sampler for m, settings in methods.tried({}).items() for x in settings if m in self.tried]
    every += [x.sampler for m, x in methods.placebos({}, 0.0).items() if m in self.wanted]
    self.samplers = [name for name in methods.SAMPLERS if name in every]
    self.model: Model | None = None
    self.header: Line = {}

  def open(self, room: int) -> Session:
    """A session, and the header of the run, which must be that of the lines there are."""
    session = open_session(self.resolved, self.samplers, room, self.model)
    self.model = session.model
    header = {
      "kind": "header",
      "checkpoint": "/".join(pathlib.Path(self.resolved.checkpoint).parts[-2:]),
      "batch": _BATCH.value,
      "settings": _SETTINGS.value,
      "seeds": _SEEDS.value,
      "limit": _LIMIT.value,
      "max_new_tokens": _MAX_NEW_TOKENS.value,
      "samplers": self.samplers,
      "thresholds": self.thresholds,
    }
    header["digest"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    had = next((x for x in lines(self.out, "answers.jsonl") if x.get("kind") == "header"), None)
    if had and had["digest"] != header["digest"]:
      differ = [k for k in header if header[k] != had.get(k) and k != "digest"]
      raise UserError(
        f"{self.out} holds a run with another {', '.join(differ)}; name another folder with --out, or use the same."
      )
    if not had and not _VERIFY.value:
      place = decode.machine() | {"dtype": session.setup.dtype.name}
      commands.keep(self.out / "answers.jsonl", header | place)
    self.header = had or header
    return session

  def items(self, name: str, part: str) -> list[tasks.Item]:
    """The prompts of a part."""
    task = tasks.find(name)
    n = task.SIZES[part == "test"]
    if _LIMIT.value is not None:
      n = min(n, _LIMIT.value if part == "test" else max(2, _LIMIT.value // 4))
    return task.items(part, n, pathlib.Path(_DATA.value))

  def choosing(self, name: str) -> list[Work]:
    """All settings of all methods on the prompts for choosing."""
    votes = hasattr(tasks.find(name), "answer")
    works = []
    for method, settings in methods.tried(self.thresholds).items():
      if method not in self.tried or (name == "prose" and method in methods.SEVERAL):
        continue
      seeds = methods.POOL if method == "temperature" and votes else 1
      works += [
        Work(name, "dev", item, method, i, setting, seed)
        for i, setting in enumerate(settings[: _SETTINGS.value])
        for item in self.items(name, "dev")
        for seed in range(seeds)
      ]
    return works

  def comparing(self, name: str) -> list[Work]:
    """The best settings on the prompts of the comparison, with placebos and transfers."""
    task, every = tasks.find(name), methods.tried(self.thresholds)
    best = choices(self.out, name)
    chosen = {m: (i, every[m][i]) for m, i in best.items() if m in every and m in self.wanted}
    seeds = dict.fromkeys(chosen, _SEEDS.value) | {"greedy": 1} | dict.fromkeys(methods.SEVERAL, 1)
    if hasattr(task, "answer"):
      if "temperature" in self.wanted:
        chosen["pool"] = best["pool"], every["temperature"][best["pool"]]
      seeds["pool"] = methods.POOL
    elif name != "prose":
      seeds["temperature"] = max(_SEEDS.value, methods.POOL)
    winner = best.get("quadrant")
    if winner and {*self.wanted} & {*methods.PLACEBOS, *methods.TRANSFERS}:
      knobs = every[winner][best[winner]].knobs
      made = methods.placebos(knobs, best["varent"])
      if "quadrant_calibrated" in best:
        knobs = every["quadrant_calibrated"][best["quadrant_calibrated"]].knobs
        own = methods.own_thresholds(dev_tokens(self.out, name, best["temperature"]))
        foreign = {k: v for k, v in self.foreign.items() if k in own}
        made |= methods.transfers(knobs, own, foreign)
      chosen |= {m: (-1, setting) for m, setting in made.items() if m in self.wanted}
    return [
      Work(name, "test", item, method, i, setting, seed)
      for method, (i, setting) in chosen.items()
      for item in self.items(name, "test")
      for seed in range(seeds.get(method, _SEEDS.value))
    ]

  def go(self) -> None:
    """Make all answers that there are not yet."""
    for name in ("answers.jsonl", "signals.jsonl", "scored.jsonl"):
      _mend(self.out / name)
    for name in self.names:
      task = tasks.find(name)
      session = self.open(task.ROOM)
      for part, todo in (("dev", self.choosing), ("test", self.comparing)):
        self._make(session, f"{name}, {part}", todo(name), _MAX_NEW_TOKENS.value or task.LIMIT)
      if name == "prose":
        score_texts(session, self.out, _LIMIT.value and 8 + _LIMIT.value)

  def _make(self, session: Session, title: str, works: list[Work], limit: int) -> None:
    have, known = set(), set()
    for line in lines(self.out, "answers.jsonl"):
      have.add(line.get("id"))
      known.add(line.get("setting"))
    order = {w.item.key: i for i, w in enumerate(works)}
    # All methods of one prompt together: a run that is not complete is not biased, and each prompt is fed once.
    works.sort(key=lambda w: (w.seed, order[w.item.key], methods.NAMES.index(w.method) if w.method in methods.NAMES else 0))
    for work in works:
      name = f"{work.task}/{work.method}/{work.index}"
      if name not in known:
        known.add(name)
        commands.keep(self.out / "answers.jsonl", {"setting": name} | dataclasses.asdict(work.setting))
    todo = [work for work in works if work.id not in have]
    with tqdm(total=len(works), initial=len(works) - len(todo), desc=title, disable=None) as bar:
      for work, line, tokens in play(session, todo, limit):
        if work.method in ("temperature", "pool", "greedy"):
          values = [[t.numbers.get(n, 0.0) for t in tokens] for n in SIGNALS]
          commands.keep(self.out / "signals.jsonl", {"id": work.id, "x": packed(np.asarray(values))})
        commands.keep(self.out / "answers.jsonl", line)
        bar.update()

  def verify(self, share: float) -> None:
    """Make some answers again; prints how many are the same texts. Raises UserError if one is not."""
    rng = np.random.default_rng(SAMPLED)
    settings, had = {}, {}
    for line in lines(self.out, "answers.jsonl"):
      if "setting" in line:
        settings[line.pop("setting")] = Setting(**line)
      elif "id" in line:
        had[line["id"]] = line
    same = made = 0
    for name in self.names:
      session = self.open(tasks.find(name).ROOM)
      works = []
      for part in ("dev", "test"):
        for item in self.items(name, part):
          for id in (x for x in had if x.startswith(f"{name}/{part}/{item.key}/")):
            method, index, seed = id.rsplit("/", 3)[1:]
            works.append(Work(name, part, item, method, int(index), settings[f"{name}/{method}/{index}"], int(seed)))
      works.sort(key=lambda w: w.id)
      some = rng.choice(len(works), max(1, round(share * len(works))), replace=False)
      some = [works[i] for i in some]
      with tqdm(total=len(some), desc=f"{name}, again", disable=None) as bar:
        for work, line, _ in play(session, some, _MAX_NEW_TOKENS.value or tasks.find(name).LIMIT):
          same += all(line[k] == had[work.id][k] for k in ("text", "tokens", "finish"))
          made += 1
          bar.update()
    print(f"{same} of {made} answers are the same again, of {len(had)}.")
    if same < made:
      raise UserError(f"{made - same} answers differ; was the run made on this machine, with these versions?")


# -- choosing --------------------------------------------------------------------------------------


def scores(out: pathlib.Path, name: str, part: str) -> dict[tuple[str, int], dict[tuple[str, int], float]]:
  """(method, setting) -> {(prompt, seed): score} of a task, for choosing."""
  task = tasks.find(name)
  items = {item.key: item for item in task.items(part, 10**6, pathlib.Path(_DATA.value))}
  found = collections.defaultdict(dict)
  for line in lines(out, "answers.jsonl"):
    if line.get("id", "").startswith(f"{name}/{part}/"):
      key, method, index, seed = line["id"].split("/")[2:]
      found[method, int(index)][key, int(seed)] = task.score(items[key], line["text"])[task.METRIC]
  return found


def choices(out: pathlib.Path, name: str) -> Line:
  """Method -> index of its best setting; of equals the first.

  Also "pool", the temperature whose majority of POOL samples is best, "quadrant", the best of the three kinds, and "varent", the
  mean varentropy of its answers.
  """
  found = scores(out, name, "dev")
  mean = {k: np.mean([x for (_, seed), x in v.items() if seed == 0]) for k, v in found.items()}
  best: Line = {}
  for method, index in sorted(mean):
    if method not in best or mean[method, index] > mean[method, best[method]]:
      best[method] = index
  kinds = [m for m in methods.QUADRANTS if m in best]
  if kinds:
    best["quadrant"] = max(kinds, key=lambda m: mean[m, best[m]])
    at = f"/{best['quadrant']}/{best[best['quadrant']]}/"
    some = [x["signals"]["varentropy"] for x in lines(out, "answers.jsonl") if x.get("id", "").startswith(f"{name}/dev/") and at in x["id"]]
    best["varent"] = float(f"{np.mean(some):.4g}")
  task = tasks.find(name)
  if hasattr(task, "answer") and "temperature" in best:
    best["pool"] = _best_pool(out, name)
  return best


def _best_pool(out: pathlib.Path, name: str) -> int:
  task = tasks.find(name)
  items = {item.key: item for item in task.items("dev", 10**6, pathlib.Path(_DATA.value))}
  said = collections.defaultdict(list)
  for line in lines(out, "answers.jsonl"):
    parts = line.get("id", "").split("/")
    if parts[:2] == [name, "dev"] and parts[3] == "temperature":
      said[int(parts[4]), parts[2]].append((int(parts[5]), line["text"]))
  right = collections.defaultdict(list)
  for (index, key), texts in sorted(said.items()):
    votes = collections.Counter(a for _, t in sorted(texts) if (a := task.answer(t)) is not None)
    winner = votes.most_common(1)[0][0] if votes else None
    text = next((t for _, t in sorted(texts) if task.answer(t) == winner), "")
    right[index].append(task.score(items[key], text)[task.METRIC])
  return max(sorted(right), key=lambda i: np.mean(right[i]))


def dev_tokens(out: pathlib.Path, name: str, index: int) -> dict[str, np.ndarray]:
  """Signals of all tokens of the prompts for choosing, by the chosen temperature."""
  at = f"/temperature/{index}/"
  some = [
    unpacked(x["x"], SIGNALS)
    for x in lines(out, "signals.jsonl")
    if x["id"].startswith(f"{name}/dev/") and at in x["id"]
  ]
  return {n: np.concatenate([x[n] for x in some]) for n in SIGNALS}


# -- the run ---------------------------------------------------------------------------------------


def run(argv: list[str]) -> None:
  """Make the answers, or the report of those there are."""
  if any(arg.startswith("--report") for arg in argv) and not any("config" in a for a in argv):
    argv = [*argv, f"--config={ROOT / 'configs' / 'demo.py'}"]  # not used
  commands.parse(argv, _FLAGS, __doc__)
  if not _OUT.value:
    raise UserError("Give the folder of the run with --out.")
  folders = [pathlib.Path(name).expanduser() for name in _OUT.value]
  if _REPORT.value:
    import study_report

    print(study_report.write(folders, pathlib.Path(_DATA.value)))
    return
  if len(folders) > 1:
    raise UserError("Several folders are for --report; give --out one folder.")
  sampling.register(methods.HERE / "placebo.py")
  methods.check()
  resolved = config_file.resolve(_CONFIG.value)
  with contextlib.suppress(FileExistsError):
    folders[0].mkdir()
  study = Study(folders[0], resolved)
  if _VERIFY.value:
    study.verify(_VERIFY.value)
  else:
    study.go()


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
