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

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys

import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[1] / name) for name in ("", "scripts")]

import decode
import study_methods as methods
import study_tasks as tasks
from study_lines import SIGNALS, Line, choices, dev_tokens, lines, mend, packed, source
from study_methods import Setting
from study_run import Work, open_session, play, score_texts
from study_tasks import ROOT
from tqdm import tqdm

from entropix_jax import sampling
from entropix_jax.cli import commands, config_file
from entropix_jax.errors import UserError
from entropix_jax.session import Model, Session
from entropix_jax.settings import Settings

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_OUT = _FLAGS.strings("out", [], "Folder of the run; for --report several.")
_TASKS = _FLAGS.strings(
  "tasks",
  [],
  f"Of {', '.join(tasks.NAMES)}; default: demo and prose for the demo, else ifeval and prose.",
)
_METHODS = _FLAGS.strings("methods", [], f"Of {', '.join(methods.NAMES)}; default: all.")
_SEEDS = _FLAGS.integer("seeds", 3, "Seeds of the comparison.", 1)
_SETTINGS = _FLAGS.integer("settings", methods.SETTINGS, "Settings of each method to try.", 1)
_LIMIT = _FLAGS.integer(
  "limit",
  None,
  "Prompts of the comparison per task; a quarter as many to choose by. Default: the task's.",
  1,
)
_MAX_NEW_TOKENS = _FLAGS.integer(
  "max_new_tokens", None, "Most tokens per answer; default: the task's.", 1
)
_BATCH = _FLAGS.integer("batch", 32, "Rows.", 1)
_DATA = _FLAGS.string(
  "data", str(ROOT.parent / "shared" / "data"), "Folder of the tasks' data files."
)
_CALIBRATED = _FLAGS.string(
  "calibrated",
  None,
  "Preset with quadrant's thresholds for this model; default: the one that ships.",
)
_FOREIGN = _FLAGS.string(
  "foreign", None, "Preset with those for another model; default: the other one that ships."
)
_VERIFY = _FLAGS.float(
  "verify", None, "Make this share of the answers again, and compare the texts.", 0.0, 1.0
)
_REPORT = _FLAGS.bool("report", False, "Make the report of finished lines; nothing is run.")

SAMPLED = 0  # seed of the choice of answers to verify


# -- what to do ------------------------------------------------------------------------------------


class Study:
  """A run in a folder.

  Args:
    out: the folder.
    resolved: settings of the config file.
  """

  def __init__(self, out: pathlib.Path, resolved: Settings):
    self.out, self.resolved = out, resolved
    demo = pathlib.Path(resolved.checkpoint).parent.name == "demo"
    mine = [
      n for n in tasks.NAMES if getattr(tasks.find(n), "MODEL", "") != ("other" if demo else "demo")
    ]
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
    if {*self.wanted} & {*methods.TRANSFERS, *methods.WARM}:
      self.tried.add("quadrant_calibrated")
    every = [
      x.sampler for m, settings in methods.tried({}).items() for x in settings if m in self.tried
    ]
    made = methods.placebos({}, 0.0)
    every += [x.sampler for m, x in made.items() if {m, f"warm_{m}"} & {*self.wanted}]
    for name in names:
      source(name, names)
    self.samplers = [name for name in methods.SAMPLERS if name in every]
    self.model: Model | None = None
    self.header: Line = {}

  def open(self, room: int) -> Session:
    """A session, and the header of the run, which must be that of the lines there are."""
    session = open_session(self.resolved, self.samplers, _BATCH.value, room, self.model)
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
    """All settings of all methods on the prompts for choosing; none where another task chooses."""
    if source(name, self.names) != name:
      return []
    votes = hasattr(tasks.find(name), "answer")
    works = []
    for method, settings in methods.tried(self.thresholds).items():
      if method not in self.tried:
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
    by = source(name, self.names)
    best = choices(self.out, by, pathlib.Path(_DATA.value))
    # What placebos and transfers are compared with is needed, too.
    controls = {best.get("quadrant")} if {*self.wanted} & {*methods.PLACEBOS} else set()
    controls |= {"quadrant_calibrated"} if {*self.wanted} & {*methods.TRANSFERS} else set()
    chosen = {
      m: (i, every[m][i]) for m, i in best.items() if m in every and m in {*self.wanted, *controls}
    }
    seeds = dict.fromkeys(chosen, _SEEDS.value) | {"greedy": 1} | dict.fromkeys(methods.SEVERAL, 1)
    if name == "prose":
      chosen = {m: x for m, x in chosen.items() if m not in methods.SEVERAL}
    if hasattr(task, "answer"):
      if "temperature" in self.wanted:
        chosen["pool"] = best["pool"], every["temperature"][best["pool"]]
      seeds["pool"] = methods.POOL
    elif name != "prose":
      seeds["temperature"] = max(_SEEDS.value, methods.POOL)
    winner = best.get("quadrant")
    if winner and {*self.wanted} & {*methods.PLACEBOS, *methods.TRANSFERS, *methods.WARM}:
      knobs = every[winner][best[winner]].knobs
      made = methods.placebos(knobs, best["varent"])
      if "quadrant_calibrated" in best:
        knobs = every["quadrant_calibrated"][best["quadrant_calibrated"]].knobs
        own = methods.own_thresholds(dev_tokens(self.out, by, best["temperature"]))
        foreign = {k: v for k, v in self.foreign.items() if k in own}
        made |= methods.transfers(knobs, own, foreign)
        heat = every["temperature"][best["warm_temperature"]]
        made |= methods.warm(every["quadrant_calibrated"][0], heat)
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
      mend(self.out / name)
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
    works.sort(
      key=lambda w: (
        w.seed,
        order[w.item.key],
        methods.NAMES.index(w.method) if w.method in methods.NAMES else 0,
      )
    )
    for work in works:
      name = f"{work.task}/{work.method}/{work.index}"
      if name not in known:
        known.add(name)
        commands.keep(
          self.out / "answers.jsonl", {"setting": name} | dataclasses.asdict(work.setting)
        )
    todo = [work for work in works if work.id not in have]
    with tqdm(total=len(works), initial=len(works) - len(todo), desc=title, disable=None) as bar:
      for work, line, tokens in play(session, todo, limit):
        if work.method in ("temperature", "pool", "greedy"):
          values = [[t.numbers.get(n, 0.0) for t in tokens] for n in SIGNALS]
          commands.keep(
            self.out / "signals.jsonl", {"id": work.id, "x": packed(np.asarray(values))}
          )
        commands.keep(self.out / "answers.jsonl", line)
        bar.update()

  def verify(self, share: float) -> None:
    """Make some answers again; prints how many are the same texts. Raises UserError if one is not."""
    rng = np.random.default_rng(SAMPLED)
    settings, had = {}, {}
    for line in lines(self.out, "answers.jsonl"):
      if "setting" in line:
        name = line.pop("setting")
        settings[name] = Setting(**line)
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
            works.append(
              Work(
                name,
                part,
                item,
                method,
                int(index),
                settings[f"{name}/{method}/{index}"],
                int(seed),
              )
            )
      if not works:
        continue
      works.sort(key=lambda w: w.id)
      some = rng.choice(len(works), max(1, round(share * len(works))), replace=False)
      some = [works[i] for i in some]
      with tqdm(total=len(some), desc=f"{name}, again", disable=None) as bar:
        for work, line, _ in play(session, some, _MAX_NEW_TOKENS.value or tasks.find(name).LIMIT):
          same += all(line[k] == had[work.id][k] for k in ("text", "tokens", "finish"))
          made += 1
          bar.update()
    if not made:
      raise UserError(
        f"{self.out} has no answers to these tasks yet; run it without --verify first."
      )
    print(f"{same} of {made} answers are the same again, of {len(had)}.")
    if same < made:
      raise UserError(
        f"{made - same} answers differ; was the run made on this machine, with these versions?"
      )


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
