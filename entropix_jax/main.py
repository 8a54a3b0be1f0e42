"""Write text with a Llama model and a sampler that watches how uncertain the model is.

  python -m entropix_jax.main --config=configs/demo.py --prompt="Tell me a story about a kite." --stats
  python -m entropix_jax.main --config=configs/llama3_1b.py --chat
  python -m entropix_jax.main --config=configs/demo.py --prompt_file=prompts.csv --prompt_test

Any setting of the config file is a flag: --config.sampler.name=plain --config.sampler.temperature=0.7
--config.engine.max_seq_len=8192 --config.checkpoint=DIR --config.mesh.model=8.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import config_flags

from entropix_jax.cli import commands
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError

_FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=_FLAGS)
_number = functools.partial(flags.DEFINE_integer, flag_values=_FLAGS)
_switch = functools.partial(flags.DEFINE_bool, default=False, flag_values=_FLAGS)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/demo.py.", flag_values=_FLAGS
)
_PROMPT = _text("prompt", None, "Text to answer (chat models) or to continue.")
_PROMPT_FILE = _text(
  "prompt_file", None, "CSV (columns act,prompt), JSONL or text file; its first prompt is run."
)
_PROMPT_TEST = _switch("prompt_test", help="Run every prompt of --prompt_file, batched.")
_CHAT = _switch("chat", help="Talk with the model; an empty line or Ctrl-D ends.")
_MAX_NEW_TOKENS = _number("max_new_tokens", 256, "Most tokens to generate per prompt.")
_SEED = _number("seed", 0, "The same seed gives the same text, in any batch.")
_STATS = _switch("stats", help="Colour each token by its entropy, style it by its branch.")
_TRACE = _text("trace", None, "Write every token's numbers to this JSONL file.")
_COMPARE = _text(
  "compare",
  None,
  "Runs of the config, such as base,instruct,joint: answers to --prompt side by side.",
)
_PREFLIGHT = _switch(
  "preflight", help="Say whether the model fits its devices, and what would; reads no weights."
)
_DISTRIBUTED = _switch(
  "distributed", help="One of several processes; a TPU pod or Slurm says which."
)
_COORDINATOR = _text("coordinator", None, "Elsewhere: HOST:PORT of process 0,")
_PROCESSES = _number("processes", None, "how many processes there are,")
_PROCESS = _number("process", None, "and which one this is, counted from 0.")
_WAIT_S = _number("wait_s", 120, "Seconds to wait for all processes to come.")
# The config is compared key by key; the others may differ between the processes of a run.
_APART = ("config", "stats", "trace", "coordinator", "process", "wait_s")
_ALIKE = [name for name in _FLAGS if name not in _APART]


class Session:
  """A checkpoint and its settings; `load` reads the weights once the prompts are known to fit."""

  def __init__(self, settings, peers=None):
    # Imported here so that --help and a mistyped flag answer at once.
    from entropix_jax import distributed, sampling
    from entropix_jax.checkpoints import chat, checkpoint, tokenizer
    from entropix_jax.model import sharding

    engine, chosen = settings.engine, settings.decoding
    if getattr(chosen, "confident", False) and not engine.confidence:
      engine = dataclasses.replace(engine, confidence=20)
    if getattr(chosen, "alternatives", 0) > engine.top_logprobs:
      engine = dataclasses.replace(engine, top_logprobs=chosen.alternatives)
    settings = dataclasses.replace(settings, engine=engine)
    self.settings, self.peers = settings, peers or distributed.Peers()
    if self.peers.alone:
      distributed.cores(settings.mesh)
    self.cfg = checkpoint.load_config(settings.checkpoint)
    self.sampler = sampling.find(settings.sampler)
    injects = ("inject",) if settings.actions.get("inject") else ()
    self.branches = (*self.sampler.BRANCHES, *injects)
    self.tokenizer = tokenizer.load(settings.checkpoint)
    if self.tokenizer.vocab > self.cfg.vocab:
      raise UserError(
        f"The tokenizer in {settings.checkpoint} has {self.tokenizer.vocab} ids but the model only "
        f"{self.cfg.vocab}; they do not belong together."
      )
    sharding.check(self.cfg, settings.mesh, settings.engine.batch_size)
    folders = getattr(chosen, "folders", [])
    self.others = [(folder, checkpoint.load_config(folder)) for folder in folders]
    self.setup = self._setup()
    for folder, cfg in self.others:
      sharding.check(cfg, settings.mesh, settings.engine.batch_size)
      if not self.tokenizer.shares_ids(tokenizer.load(folder)):
        raise UserError(
          f"The tokenizer in {folder} is not that of {settings.checkpoint}; models that decode together "
          "must share it."
        )
    stop = checkpoint.stop_ids(settings.checkpoint)
    self.is_chat = settings.format == "chat" or (settings.format == "auto" and self._chats(stop))
    self.stop = tuple(dict.fromkeys((*stop, *chat.stop_ids(self.tokenizer))))

  def _setup(self):
    """What requests are checked against: of several models, of all."""
    from entropix_jax.engine.setup import Setup

    return Setup.create(self.cfg, self.sampler, self.settings.engine, self.settings.mesh)

  def _chats(self, stop: Sequence[int]) -> bool:
    """Whether a model with these stop ids ends its turns by itself."""
    return self.tokenizer.eot is not None and self.tokenizer.eot in stop

  def load(self) -> None:
    """Read the weights onto their devices, with a progress bar, and make the engine."""
    import jax

    from entropix_jax import compile_cache, distributed
    from entropix_jax.checkpoints import checkpoint
    from entropix_jax.decoding import joint, mixing, speculative
    from entropix_jax.decoding.drafters import DraftModel, Ngram
    from entropix_jax.engine.decoder import PlainDecoder
    from entropix_jax.engine.engine import Engine
    from entropix_jax.model import sharding

    chosen = self.settings.decoding
    compile_cache.enable(self.settings.engine.compile_cache)
    distributed.claim()
    distributed.check_mesh(sharding.mesh(self.settings.mesh, self.cfg))
    self.engine = self._engine(self.settings.checkpoint, self.cfg)
    others = [self._engine(folder, cfg) for folder, cfg in self.others]
    self.decoder = None
    if self.settings.method == "joint":
      ends = [checkpoint.stop_ids(folder) for folder, _ in self.others]
      tok, control = self.tokenizer, set(self.tokenizer.special.values())
      setup = joint.setup(
        [e.setup for e in (self.engine, *others)],
        mixing.find(chosen.mix),
        chosen.knobs,
        stops=[self.stop, *ends],
        banned=[(), *(sorted(control - set(mine)) for mine in ends)],
        canonical=tok.eot if self.is_chat else self.stop[0],
        tables=mixing.word_tables(tok, self.cfg.vocab),
      )
      self.engine = Engine(setup, (self.engine.weights, *(e.weights for e in others)))
    drafter = getattr(chosen, "drafter", "")
    if drafter:
      bar = getattr(chosen, "bar", speculative.Config.bar)
      guesses = Ngram() if drafter == "ngram" else DraftModel(others[0], bar)
      if self.settings.method == "joint":
        chosen = speculative.Config()
      # Several processes must send the same programs, and their clocks differ.
      always = chosen.always or jax.process_count() > 1
      how = chosen.length, always, chosen.verify
      self.decoder = speculative.SpeculativeDecoder(self.engine, guesses, *how)
    self.decoder = self.decoder or PlainDecoder(self.engine)

  def _engine(self, folder: str, cfg):
    """The engine of one checkpoint."""
    from tqdm import tqdm

    from entropix_jax.checkpoints import checkpoint
    from entropix_jax.engine.engine import Engine
    from entropix_jax.engine.setup import Setup, compute_dtype
    from entropix_jax.model import products, sharding

    settings = self.settings
    mesh, dtype = sharding.mesh(settings.mesh, cfg), compute_dtype(settings.engine.dtype)
    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False, disable=None) as bar:

      def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

      weights = checkpoint.load_weights(
        folder,
        cfg,
        dtype,
        sharding=lambda field: sharding.of(mesh, field.rsplit("_", 1)[1]),
        progress=progress,
        quantised=settings.engine.weights == "int8",
        finish=products.flips(dtype, settings.mesh.model),
      )
    return Engine(Setup.create(cfg, self.sampler, settings.engine, settings.mesh), weights)

  def encode(self, text: str) -> list[int]:
    """The prompt's ids, in the checkpoint's chat format or as plain text."""
    from entropix_jax.checkpoints import chat

    if not text.strip():
      raise UserError("The prompt is empty; give some text with --prompt or --prompt_file.")
    if self.settings.method == "joint" and not self.is_chat:
      return chat.plain(self.tokenizer, self.settings.decoding.template.format(text))
    if not self.is_chat:
      return chat.plain(self.tokenizer, self.settings.template.format(text))
    return self.encode_chat([{"role": "user", "content": text}])

  def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, after the configured system message."""
    from entropix_jax.checkpoints import chat

    if self.settings.system:
      messages = [{"role": "system", "content": self.settings.system}, *messages]
    return chat.encode(self.tokenizer, messages)

  def beside(self, messages: list[dict[str, str]]) -> tuple[list[int], ...]:
    """The conversation as each model beside the main one sees it: as a chat, or as plain text."""
    from entropix_jax.checkpoints import chat, checkpoint

    if self.settings.method != "joint":
      return ()
    text = self.settings.decoding.template.format("\n".join(m["content"] for m in messages))
    return tuple(
      self.encode_chat(messages)
      if self._chats(checkpoint.stop_ids(folder))
      else chat.plain(self.tokenizer, text)
      for folder, _ in self.others
    )

  def request(self, ids: Sequence[int], max_new_tokens: int, seed: int, beside=()):
    """A request with this run's settings, checked."""
    from entropix_jax.engine.request import Request, check_request

    actions = dict(self.settings.actions)
    if "inject" in actions:
      actions["inject"] = self.tokenizer.encode(actions["inject"])
    request = Request(
      ids,
      max_new_tokens,
      seed,
      stop=self.stop,
      stop_text=self.settings.stop,
      knobs=self.settings.knobs,
      actions=actions,
      beside=beside,
    )
    check_request(self.setup, request)
    return request

  @property
  def chooses(self) -> bool:
    """Whether a prompt is continued several ways, of which one is chosen."""
    from entropix_jax import decoding

    method = self.settings.method
    return method != decoding.PLAIN and hasattr(decoding.find(method), "Group")

  def plan(self, requests) -> list:
    """What is to be run: the requests, or where it chooses a Group of each, checked."""
    from entropix_jax import decoding
    from entropix_jax.decoding import groups

    if not self.chooses:
      return list(requests)
    method, options = decoding.find(self.settings.method), self.settings.decoding
    extra = ()
    if self.settings.method == "adaptive":
      extra = (self._aside, self._labels(options.good, options.bad))
    todo = [method.Group(request, options, *extra, i) for i, request in enumerate(requests)]
    groups.check_groups(self.setup, todo)
    return todo

  def go(self, todo) -> Iterator:
    """Run a plan: tokens as they are read; where it chooses, an Outcome behind those of a prompt."""
    from entropix_jax.decoding import groups
    from entropix_jax.generate import generate

    run = groups.run if self.chooses else generate
    return run(self.engine, self.tokenizer, todo, decoder=self.decoder)

  def _aside(self, closed: bool, text: str) -> list[int]:
    """Ids of a question about a text, behind it."""
    from entropix_jax.checkpoints import chat

    if self.is_chat:
      return chat.aside(self.tokenizer, text, closed)
    return self.tokenizer.encode(f"\n{text}\n")

  def _labels(self, *words: str) -> list[int]:
    ids = [self.tokenizer.encode(word)[0] for word in words]
    if len(set(ids)) < len(ids):
      raise UserError(
        f"{' and '.join(map(repr, words))} begin with the same token; choose other labels."
      )
    return ids

  def compile(self, requests) -> None:
    """Compile what these requests need, with a progress bar."""
    from tqdm import tqdm

    need = self.decoder.needed(requests, several=self.chooses)
    todo = [program for program in need if program not in self.engine.compiled]
    with tqdm(total=len(todo), desc="compiling", leave=False, disable=None) as bar:
      self.decoder.compile(todo, bar.update)

  def header(self, prompts: list[tuple[str, list[int]]], max_new_tokens: int, seed: int) -> dict:
    """The first line of a trace."""
    import jax

    import entropix_jax
    from entropix_jax import sampling
    from entropix_jax.engine.setup import compute_dtype

    knobs = sampling.knobs(self.sampler) | self.settings.knobs
    return {
      "config": dataclasses.asdict(self.settings),
      "checkpoint": self.settings.checkpoint,
      "seed": seed,
      "max_new_tokens": max_new_tokens,
      "sampler": {"name": self.settings.sampler} | knobs,
      "branches": list(self.branches),
      "model": dataclasses.asdict(self.cfg),
      "dtype": compute_dtype(self.settings.engine.dtype).name,
      "device": jax.devices()[0].device_kind,
      "versions": {"entropix_jax": entropix_jax.__version__, "jax": jax.__version__},
      "prompts": [{"text": text, "ids": ids} for text, ids in prompts],
    }


def _emit(text: str) -> None:
  try:
    print(text, end="", flush=True)
  except UnicodeEncodeError:  # a terminal that is not UTF-8
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "ascii", "replace"))
    sys.stdout.flush()


def _painter(session: Session):
  """Token -> what to print for it, and the legend to print first ("" without colours)."""
  from entropix_jax.cli import terminal

  branches = session.branches
  if _STATS.value and sys.stdout.isatty():
    return lambda token: terminal.paint(token, branches), terminal.legend(branches)
  return lambda token: token.text, ""


class _Printer:
  """Texts in the order of their prompts, each whole; one that is alone as it comes.

  Where several continuations run, the one that is chosen is printed once it is.
  """

  def __init__(self, titles: Sequence[str], paint, chooses: bool, out=None):
    self._titles, self._paint, self._out = titles, paint, out or _emit
    self._live = len(titles) == 1 and not chooses and not out
    self._chooses = chooses
    self._waiting: dict[int, str] = dict.fromkeys(range(len(titles)), "")
    self._finished: set[int] = set()
    self._turn = 0  # the prompt whose text may be printed now

  def token(self, token) -> None:
    """A token of any prompt."""
    if self._live:
      self._out(self._paint(token))
    elif not self._chooses:
      self._waiting[token.prompt] += self._paint(token)
      if token.finish:
        self._done(token.prompt)

  def outcome(self, outcome) -> None:
    """A choice."""
    tokens = outcome.streams[outcome.chosen].tokens
    self._waiting[outcome.prompt] = "".join(map(self._paint, tokens))
    self._done(outcome.prompt)

  def _done(self, prompt: int) -> None:
    self._finished.add(prompt)
    while self._turn in self._finished:
      text = self._waiting.pop(self._turn)
      if len(self._titles) > 1:
        text = f"{chr(10) * (self._turn > 0)}{self._titles[self._turn]}\n{text}\n"
      self._out(text)
      self._turn += 1


def _play(session: Session, texts: Sequence[str], printer: _Printer, path: str | None, begin):
  """Answer prompts and trace it; (summary, Outcomes). `begin()` is called before the first token."""
  from entropix_jax.generate import Token
  from entropix_jax.report import trace

  coded = [(text, session.encode(text)) for text in texts]
  limit, seed = _MAX_NEW_TOKENS.value, _SEED.value
  requests = [
    session.request(ids, limit, seed, session.beside([{"role": "user", "content": text}]))
    for text, ids in coded
  ]
  todo = session.plan(requests)
  tally = trace.Tally([len(ids) for _, ids in coded])
  outcomes = []
  with contextlib.ExitStack() as stack:
    tracer = None
    if path and session.peers.first:
      tracer = stack.enter_context(trace.Tracer(path, session.header(coded, limit, seed)))
      session.peers.at_end(lambda: tracer.__exit__())
    session.load()
    compiling = time.perf_counter()
    session.compile(requests)
    compiling = time.perf_counter() - compiling
    begin()
    for event in session.go(todo):
      if not isinstance(event, Token):
        printer.outcome(event)
        outcomes.append(event)
        continue
      tally.token(event)
      if tracer:
        tracer.token(event)
      printer.token(event)
    summary = tally.summary() | {"compile_s": round(compiling, 3)}
    if outcomes:
      summary["prefix_bytes"] = sum(o.prefix_bytes for o in outcomes)
      summary["prefix_copies"] = max(o.prefix_copies for o in outcomes)
    if tracer:
      for outcome in outcomes:
        tracer.choice(outcome.line())
      tracer.close(summary)
  return summary, outcomes


def _run(session: Session, prompts) -> None:
  """Answer prompts and print: one streams as it is made, several follow each other whole."""
  from entropix_jax.report import trace

  paint, legend = _painter(session)
  one = len(prompts) == 1
  names = [p.name or " ".join(p.text.split())[:60] for p in prompts]
  titles = [f"[{i + 1}/{len(prompts)}] {name}" for i, name in enumerate(names)]

  def begin():
    if legend:
      _emit(legend + "\n\n")
    if one and not session.is_chat and session.settings.method != "joint":
      _emit(prompts[0].text)

  printer = _Printer(titles, paint, session.chooses)
  texts = [p.text for p in prompts]
  summary, outcomes = _play(session, texts, printer, _TRACE.value, begin)
  if one:
    _emit("\n")
  sys.stdout.flush()
  if one and outcomes:
    say(outcomes[0].why)
  say(trace.line(summary))


def _compare(config, names: Sequence[str], text: str, peers) -> None:
  """Answer a prompt by several runs of the config, one after another, and print them side by side."""
  import shutil

  from entropix_jax.cli import settings, terminal
  from entropix_jax.report import trace

  chosen = [settings.resolve(settings.named(config, name), ways=True) for name in names]
  sessions = [Session(one, peers) for one in chosen]
  said, lines = [], []
  for name, session in zip(names, sessions, strict=True):
    parts: list[str] = []
    printer = _Printer([name], _painter(session)[0], session.chooses, parts.append)
    path = _TRACE.value and _named(_TRACE.value, name)
    summary, outcomes = _play(session, [text], printer, path, lambda: None)
    said.append("".join(parts))
    lines += [f"{name}: {trace.line(summary)}", *(o.why for o in outcomes)]
    del session.engine  # the next one needs the memory
  _emit(terminal.columns(names, said, shutil.get_terminal_size().columns) + "\n")
  say("\n".join(lines))


def _named(path: str, run: str) -> str:
  """The trace file of a run: story.jsonl -> story-joint.jsonl."""
  root, dot, ending = path.rpartition(".")
  return f"{root}-{run}.{ending}" if dot else f"{path}-{run}"


def _line() -> str:
  try:
    return input("> " if sys.stdin.isatty() else "")
  except EOFError:
    return ""


def _talk(session: Session) -> None:
  """A conversation; the whole of it is fed again each turn."""
  from entropix_jax.generate import Token
  from entropix_jax.report import trace

  session.encode_chat([{"role": "user", "content": "?"}])  # no chat tokens: say so before loading
  session.load()
  messages: list[dict[str, str]] = []
  paint, legend = _painter(session)
  if legend:
    _emit(legend + "\n")
  while True:
    text = session.peers.share(_line)
    if not text.strip():
      return
    turn = [*messages, {"role": "user", "content": text}]
    try:
      request = session.request(
        session.encode_chat(turn),
        _MAX_NEW_TOKENS.value,
        _SEED.value + len(messages) // 2,
        session.beside(turn),
      )
    except UserError as error:
      say(f"{error}" if not messages else f"{error} The conversation begins anew.")
      messages = []
      continue
    todo = session.plan([request])
    session.compile([request])
    answer, tally = "", trace.Tally([len(request.ids)])
    printer = _Printer([""], paint, session.chooses)
    for event in session.go(todo):
      if isinstance(event, Token):
        answer += event.text
        tally.token(event)
        printer.token(event)
      else:
        answer = event.text
        printer.outcome(event)
    _emit("\n")
    if _STATS.value:
      say(trace.line(tally.summary()))
    messages = [*turn, {"role": "assistant", "content": answer}]


def _preflight(settings) -> None:
  """Print what the run would take of each device. Raises UserError where it does not fit."""
  from entropix_jax import distributed, sampling
  from entropix_jax.cli.settings import shape
  from entropix_jax.engine import preflight
  from entropix_jax.engine.setup import compute_dtype

  distributed.cores(settings.mesh)
  distributed.claim()
  cfg, name = shape(settings)
  if getattr(settings.decoding, "folders", []):
    raise UserError(
      "--preflight counts one model; leave config.decoding out, and add what the same says of the other "
      "models' checkpoints."
    )
  sampler, dtype = sampling.find(settings.sampler), compute_dtype(settings.engine.dtype)
  engine = preflight.engine(cfg, sampler, settings.engine, settings.mesh, dtype)
  say(f"Looking at prefill and decode of {name} at full length ...")
  limit = preflight.least_memory(engine)
  fits, text = preflight.report(engine, preflight.need(engine, limit), limit)
  _emit(text + "\n")
  if not fits:
    raise UserError("This does not fit; the last line above says what would.")


def _check_flags() -> None:
  """Raises UserError for flags that cannot go together, before anything is loaded."""
  sources = [name for name in ("prompt", "prompt_file", "chat") if _FLAGS[name].value]
  if _PROMPT.value is not None and not _PROMPT.value.strip():
    raise UserError("The prompt is empty; give some text with --prompt.")
  if _PREFLIGHT.value and sources:
    raise UserError(f"--preflight and --{sources[0]} exclude each other; give one of them.")
  if not sources and not _PREFLIGHT.value:
    raise UserError(
      "Nothing to do: give --prompt, --prompt_file, --chat or --preflight (see --help)."
    )
  if len(sources) > 1:
    raise UserError(f"--{sources[0]} and --{sources[1]} exclude each other; give one of them.")
  if _PROMPT_TEST.value and not _PROMPT_FILE.value:
    raise UserError("--prompt_test runs every prompt of a file; give the file with --prompt_file.")
  if _TRACE.value is not None and not _TRACE.value:
    raise UserError("--trace needs a file name.")
  if _COMPARE.value is not None and not _PROMPT.value:
    raise UserError("--compare answers one prompt by several runs; give it with --prompt.")
  if _CHAT.value and _TRACE.value:
    raise UserError("--trace goes with --prompt or --prompt_file, not with --chat.")
  if _MAX_NEW_TOKENS.value < 1:
    raise UserError(f"--max_new_tokens is {_MAX_NEW_TOKENS.value}; it must be at least 1.")
  for flag in (_COORDINATOR, _PROCESSES, _PROCESS):
    if flag.value is not None and not _DISTRIBUTED.value:
      raise UserError(f"--{flag.name} goes with --distributed.")
  if _WAIT_S.value < 1:
    raise UserError(f"--wait_s is {_WAIT_S.value}; it must be at least 1.")


def _main(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  _check_flags()
  from entropix_jax import distributed

  at = None
  if _DISTRIBUTED.value:
    at = distributed.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _WAIT_S.value)
  with distributed.join(at, _WAIT_S.value) as peers:
    _start(peers)


def _start(peers) -> None:
  """What each process of a run does, all in the same order."""
  from entropix_jax.cli import prompts, settings

  resolved = settings.resolve(_CONFIG.value, ways=True)
  todo = []
  if _PROMPT.value:
    todo = [prompts.Prompt(_PROMPT.value)]
  elif _PROMPT_FILE.value:
    todo = prompts.read(_PROMPT_FILE.value)
    if not _PROMPT_TEST.value and len(todo) > 1:
      say(f"Running the first of {len(todo)} prompts; --prompt_test runs them all.")
      todo = todo[:1]
  alike = {f"--{name}": _FLAGS[name].value for name in _ALIKE}
  texts = [prompt.text for prompt in todo]
  config = _CONFIG.value.to_dict()
  peers.agree(resolved.checkpoint, alike | {"config": config, "the text of the prompts": texts})
  if _PREFLIGHT.value:
    return _preflight(resolved)
  if _COMPARE.value is not None:
    names = list(dict.fromkeys(name.strip() for name in _COMPARE.value.split(",")))
    return _compare(_CONFIG.value, names, todo[0].text, peers)
  if _CHAT.value:
    return _talk(Session(dataclasses.replace(resolved, format="chat"), peers))
  _run(Session(resolved, peers), todo)


if __name__ == "__main__":
  sys.exit(commands.entry(_main, sys.argv))
