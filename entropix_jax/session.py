"""A checkpoint in memory, and sessions with it: what the Python API, the command line and benchmarks share.

  model = Model(settings)
  session = Session(model, settings)
  todo = session.plan([session.request(session.encode("Hello!"), max_new_tokens=64, seed=0)])
  session.ready(todo)
  for event in session.go(todo): ...

Why: a Model owns what is expensive, weights and compiled programs, and a Session what is cheap, the settings
of one call. Sessions with different samplers, decoding methods and batch sizes share one Model's weights.
Weights are read by `ready`, when the prompts are known to fit, while the programs compile.
"""

import contextlib
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import entropix_jax
from entropix_jax import compile_cache, decoding, devices, distributed, sampling
from entropix_jax.checkpoints import chat, checkpoint, hub, vocabulary
from entropix_jax.config import EngineConfig, ModelConfig
from entropix_jax.decoding import groups, joint, mixing, speculative
from entropix_jax.decoding.drafters import DraftModel, Ngram
from entropix_jax.decoding.groups import Group, Outcome
from entropix_jax.engine import preflight
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import compile_all
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.setup import CHEAP_WINDOW, Setup, compute_dtype
from entropix_jax.errors import UserError
from entropix_jax.model import linear, sharding
from entropix_jax.model.weights import Weights
from entropix_jax.rows import Guide, Token
from entropix_jax.sampling import _union, draw
from entropix_jax.scheduler import generate
from entropix_jax.settings import Settings, fitted, stored
from entropix_jax.tokens import heal
from entropix_jax.tokens.laws import EngineLaws
from entropix_jax.tokens.spelling import spelling

# How a server's setup differs: few programs, whatever comes.
_SERVED = {"share_from": None, "least_window": CHEAP_WINDOW}


class Model:
  """A checkpoint, its weights once they are read, and the engines made over them.

  Args:
    settings: says the folder, the mesh and the dtypes; the rest is a Session's.
    peers: the other processes of this run, if any.

  Raises:
    UserError: a folder that cannot be used; every file is checked before any weight is read.
  """

  def __init__(self, settings: Settings, peers: distributed.Peers | None = None):
    self.name, self.mesh = settings.checkpoint, settings.mesh
    self.folder = str(hub.find(self.name))
    self.config = stored(settings).engine
    self.peers = peers or distributed.Peers()
    if self.peers.alone:
      devices.cores(self.mesh)
    compile_cache.enable(self.config.compile_cache)
    self.cfg = checkpoint.load_config(self.folder)
    self.tokenizer = vocabulary.load(self.folder, self.cfg.vocab)
    self.cfg = dataclasses.replace(self.cfg, unused=self.tokenizer.unused(self.cfg.vocab))
    sharding.check_divisible(self.cfg, self.mesh, self.config.batch_size)
    checkpoint.check_files(self.folder, self.cfg)
    own = self._stops(self.folder, self.cfg)
    self.chats = self._chats(self.folder, own)
    self.stop = tuple(dict.fromkeys((*own, *chat.stop_ids(self.tokenizer))))
    self._formats: dict[tuple, chat.Format] = {}
    self._said: set[str] = set()
    if strange := checkpoint.ignored(self.folder):
      self.tell(f"config.json of {self.name} has attributes that are ignored: {', '.join(strange)}")
    self._others: dict[str, ModelConfig] = {}
    self.ends: dict[str, tuple[int, ...]] = {}  # the stop ids of each of them
    self._weights: dict[str, Weights] = {}
    self._engines: dict[tuple, tuple[Engine, tuple[str, ...]]] = {}  # and their folders
    self._decoders: dict[tuple, PlainDecoder] = {}

  def _chats(self, folder: str, stop: Sequence[int]) -> bool:
    """Whether a model with these stop ids answers in turns: it has a template, or ends its turns as Llama 3."""
    eot = self.tokenizer.eot
    return (eot is not None and eot in stop) or bool(chat.templates(folder))

  def format(
    self, folder: str, chosen: str = "", variables: Mapping[str, Any] | None = None
  ) -> chat.Format:
    """The chat format of a folder's model, as `chat.choose` says. Raises UserError where there is none."""
    key = (folder, chosen, repr(sorted((variables or {}).items())))
    if key not in self._formats:
      found = chat.choose(folder, self.tokenizer, chosen, variables or {})
      if found is None:
        raise UserError(
          f"{folder} has no chat template, and its tokenizer lacks Llama 3's chat tokens; give a template with "
          "config.chat_template, or use a plain prompt."
        )
      self._formats[key] = found
    return self._formats[key]

  def tell(self, line: str) -> None:
    """Print a line to stderr, once, on one process."""
    if line not in self._said and self.peers.first:
      print(line, file=sys.stderr, flush=True)
    self._said.add(line)

  def _stops(self, folder: str, cfg: ModelConfig) -> tuple[int, ...]:
    """The ids with which a folder's texts end, but for those that its model cannot emit."""
    able = (id for id in checkpoint.stop_ids(folder) if 0 <= id < cfg.vocab)
    return tuple(id for id in able if id not in cfg.unused)

  def beside(self, name: str, flag: str) -> tuple[str, ModelConfig]:
    """(folder, shape) of another model that decodes together with this one, as a flag names it.

    Raises UserError if it cannot.
    """
    try:
      folder = str(hub.find(name))
      return folder, self._beside(folder)
    except UserError as error:
      raise UserError(str(error).replace("config.checkpoint", flag)) from None

  def _beside(self, folder: str) -> ModelConfig:
    if folder not in self._others:
      if checkpoint.stored_int8(folder) and self.config.weights != "int8":
        raise UserError(
          f"{folder} holds int8 weights and {self.name} does not; set config.engine.weights=int8."
        )
      cfg = checkpoint.load_config(folder)
      cfg = dataclasses.replace(cfg, unused=self.tokenizer.unused(cfg.vocab))
      sharding.check_divisible(cfg, self.mesh, self.config.batch_size)
      if not self.tokenizer.shares_ids(vocabulary.load(folder, cfg.vocab)):
        raise UserError(
          f"The tokenizer in {folder} is not that of {self.name}; models that decode together "
          "must share it."
        )
      checkpoint.check_files(folder, cfg)
      self._others[folder], self.ends[folder] = cfg, self._stops(folder, cfg)
    return self._others[folder]

  def chats_beside(self, folder: str) -> bool:
    """Whether another model answers in turns."""
    return self._chats(folder, self.ends[folder])

  # -- weights -------------------------------------------------------------------------------

  @contextlib.contextmanager
  def reading(self, folders: dict[str, ModelConfig]) -> Iterator[None]:
    """Read the weights of these models that are not there yet, while the body of the context runs.

    An error in the body ends the reading, and an error in the reading is raised after the body.
    """
    todo = {folder: cfg for folder, cfg in folders.items() if folder not in self._weights}
    if not todo:
      yield
      return
    self._claim()
    ended = threading.Event()

    def read() -> dict[str, Weights]:
      return {folder: self._read(folder, cfg, ended) for folder, cfg in todo.items()}

    if jax.process_count() > 1:  # processes must start the same programs in the same order
      self._weights |= read()
      yield
      return
    with ThreadPoolExecutor(1) as pool:
      job = pool.submit(read)
      try:
        yield
        self._weights |= job.result()
      except BaseException:
        ended.set()
        raise

  def _claim(self) -> None:
    """Take the devices. Raises UserError where they cannot be had, or some would be left."""
    if not self._weights:
      devices.claim()
      devices.check_mesh(sharding.mesh(self.mesh, self.cfg))

  def _read(self, folder: str, cfg: ModelConfig, ended: threading.Event) -> Weights:
    mesh, dtype = sharding.mesh(self.mesh, cfg), compute_dtype(self.config.dtype)
    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False, disable=None) as bar:

      def progress(done: int, total: int) -> None:
        if ended.is_set():
          raise CancelledError
        bar.total = total
        bar.update(done - bar.n)

      return checkpoint.load_weights(
        folder,
        cfg,
        dtype,
        sharding=lambda field: sharding.of(mesh, field.rsplit("_", 1)[1]),
        progress=progress,
        quantised=self.config.weights == "int8",
        finish=linear.transposer(dtype, self.mesh.model),
      )

  def _now(self, folder: str, cfg: ModelConfig) -> Weights:
    """The weights of a folder; before they are read, shapes that say where each will live."""
    if folder in self._weights:
      return self._weights[folder]
    dtype, mesh = compute_dtype(self.config.dtype), sharding.mesh(self.mesh, cfg)
    finish = linear.transposer(dtype, self.mesh.model)
    return preflight.abstract_weights(cfg, dtype, mesh, self.config.weights == "int8", finish)

  # -- engines -------------------------------------------------------------------------------

  def setup(self, session: "Session", config: EngineConfig) -> Setup:
    """The setup of a session's engine; needs no weights."""
    self._claim()
    folders = [(self.folder, self.cfg), *session.others]
    create = functools.partial(Setup.create, varying=session.varying)
    setups = [create(cfg, session.sampler, config, self.mesh) for _, cfg in folders]
    if session.serves:
      # A step of fewer rows rounds otherwise [n29], which bfloat16 shows in one text of six and float32 hardly ever.
      varied = {"varied_rows": setups[0].dtype == jnp.float32}
      return dataclasses.replace(setups[0], masks=session.masks, **_SERVED, **varied)
    if session.settings.method != "joint":
      return dataclasses.replace(setups[0], masks=session.masks)
    chosen, tok = session.settings.decoding, self.tokenizer
    control = tok.special.values()
    ends = [self.ends[folder] for folder, _ in session.others]
    return joint.setup(
      setups,
      mixing.find(chosen.mix),
      chosen.knobs,
      stops=[session.stop, *ends],
      banned=[(), *(sorted(set(control) - set(mine)) for mine in ends)],
      canonical=session.end,
      tables=mixing.word_tables(tok, self.cfg.vocab),
    )

  def decoder(
    self, session: "Session", rows: int, compile: Callable[[PlainDecoder], None]
  ) -> PlainDecoder:
    """The decoder of a session with so many rows, after `compile(decoder)`, which runs while weights are read."""
    config = dataclasses.replace(session.settings.engine, batch_size=rows)
    served = (session.sampler, session.serves, session.masks)
    key = (*served, config, session.way, session.varying)
    decoder = self._decoders.get(key) or self._build(session, config)
    with self.reading(dict([(self.folder, self.cfg), *session.others])):
      compile(decoder)
    for engine, folders in self._engines.values():
      if all(folder in self._weights for folder in folders):
        engine.weights = engine.setup.model.join([self._weights[folder] for folder in folders])
    self._decoders[key] = decoder
    return decoder

  def _build(self, session: "Session", config: EngineConfig) -> PlainDecoder:
    """The decoder of a session; no other code makes engines."""
    chosen, joined = session.settings.decoding, session.settings.method == "joint"
    setup = self.setup(session, config)
    main = (self.folder, self.cfg)
    engine = self._engine(session, setup, [main, *session.others] if joined else [main])
    drafter = getattr(chosen, "drafter", "")
    if not drafter:
      return PlainDecoder(engine)
    guesses: Ngram | DraftModel = Ngram()
    if drafter != "ngram":
      folder, cfg = session.others[0]
      small = Setup.create(cfg, session.sampler, config, self.mesh, varying=session.varying)
      bar = getattr(chosen, "bar", speculative.Config.bar)
      guesses = DraftModel(self._engine(session, small, [(folder, cfg)]), bar)
    if joined:
      chosen = speculative.Config()
    # Several processes must send the same programs, and their clocks differ.
    always = chosen.always or jax.process_count() > 1
    return speculative.SpeculativeDecoder(engine, guesses, chosen.length, always, chosen.verify)

  def _engine(self, session: "Session", setup: Setup, folders: list[tuple[str, ModelConfig]]):
    """The engine of these folders' models; those of one setup are one, whatever decodes with them."""
    names = tuple(folder for folder, _ in folders)
    way = session.way if len(names) > 1 else ()
    served = (session.sampler, session.serves, session.masks)
    key = (*served, setup.config, names, way, setup.varying)
    if key not in self._engines:
      weights = [self._now(*folder) for folder in folders]
      self._engines[key] = Engine(setup, setup.model.join(weights)), names
    return self._engines[key][0]


class Session:
  """A model and the settings of one way to answer; cheap to make, reads no weights.

  Args:
    any_knob: compile for requests with any knob of the sampler, so that sessions with other knobs share the
      programs; False: compile only the families of knobs that the settings use.
    samplers: names of the samplers that requests may choose, the configured one first; then one program has
      them all, and rows never share a prefix, so that `programs.any_request` lists all programs.
    masks: rows may have guides, which restrict their tokens (`rows.Guide`); also with config.heal.

  Raises:
    UserError: settings that this model cannot be run with.
  """

  def __init__(
    self,
    model: Model,
    settings: Settings,
    any_knob: bool = False,
    samplers: Sequence[str] = (),
    masks: bool = False,
  ):
    settings, line = fitted(settings, model.cfg)
    if line:
      model.tell(line)
    engine = dataclasses.replace(settings.engine, weights=model.config.weights)
    chosen = settings.decoding
    if getattr(chosen, "confident", False) and not engine.confidence:
      engine = dataclasses.replace(engine, confidence=20)
    if getattr(chosen, "alternatives", 0) > engine.top_logprobs:
      engine = dataclasses.replace(engine, top_logprobs=chosen.alternatives)
    self.model, self.settings = model, dataclasses.replace(settings, engine=engine)
    self.tokenizer, self.peers = model.tokenizer, model.peers
    self.samplers = tuple(dict.fromkeys(samplers)) or (settings.sampler,)
    self.serves, self.masks = bool(samplers), masks or (settings.heal and not samplers)
    self.sampler = _union.union(self.samplers) if samplers else sampling.find(settings.sampler)
    self.varying = None if any_knob or samplers else sampling.varying(self.sampler, settings.knobs)
    injects = ("inject",) if settings.actions.get("inject") else ()
    self.branches = (*self.sampler.BRANCHES, *injects)
    flag = f"config.decoding.{'models' if settings.method == 'joint' else 'checkpoint'}"
    self.others = [model.beside(name, flag) for name in getattr(chosen, "folders", [])]
    self.is_chat = settings.format == "chat" or (
      settings.format == "auto" and (model.chats or bool(settings.chat_template))
    )
    self.format = self._format()
    ends = [] if self.format is None else [self.format.end_of_turn]
    # The ids that end a text, and the one that ends it in this format.
    self.stop = tuple(dict.fromkeys((*model.stop, *filter(None, ends))))
    self.end = next((id for id in (*ends, *self.stop) if id is not None), None)
    # The models beside this one may have another format.
    if settings.method != "joint" and self.is_chat and settings.template != "{}":
      other = "" if settings.format == "chat" else ", or set config.format=plain"
      raise UserError(
        f"config.template is for plain prompts, and this is a chat; leave it out{other}."
      )
    if settings.method != "joint" and settings.system and not self.is_chat:
      raise UserError(
        "config.system is for models that chat, and this one continues texts; leave it out."
      )
    if self.heals:
      self._check_heal()
    special = settings.method == "joint" or getattr(chosen, "drafter", "")
    # Tells engines apart that are more than a sampler; () for those that are not.
    self.way: tuple = (settings.method, repr(chosen), self.is_chat) if special else ()
    # Whether a prompt is continued several ways, of which one is chosen.
    self.chooses = settings.method != decoding.PLAIN and hasattr(
      decoding.find(settings.method), "Group"
    )

  def _check_heal(self) -> None:
    if self.is_chat:
      raise UserError(
        "config.heal is for texts that are continued, and this is a chat; leave it out, or set config.format=plain."
      )
    if self.settings.method != decoding.PLAIN:
      raise UserError(
        f"config.heal does not go with {self.settings.method}; leave out one of them."
      )
    if not self.peers.alone:
      raise UserError("config.heal runs in one process; leave it out, or leave out --distributed.")
    if self.settings.actions.get("inject"):
      raise UserError("config.actions.inject does not go with config.heal; leave out one of them.")
    for knob in ("allowed", "banned"):
      if self.settings.knobs.get(knob):
        raise UserError(
          f"The knob {knob!r} could leave no token that config.heal allows; leave out one of them."
        )

  def _format(self) -> chat.Format | None:
    """The chat format; None for plain text."""
    chosen, variables = self.settings.chat_template, self.settings.chat
    if not self.is_chat:
      for name, value in (("chat_template", chosen), ("chat", variables)):
        if value:
          raise UserError(f"config.{name} is for chats, and this is plain text; leave it out.")
      return None
    return self.model.format(self.model.folder, chosen, variables)

  @property
  def opening(self) -> str:
    """A line that says in which format prompts are put."""
    if self.format is not None:
      return f"format: chat, by {self.format.origin}"
    why = (
      "as config.format says"
      if self.settings.format == "plain"
      else "which this base model continues"
    )
    return f"format: plain text, {why}"

  @property
  def heals(self) -> bool:
    """Whether prompts are rolled back."""
    return self.settings.heal and not self.serves

  @functools.cached_property
  def setup(self) -> Setup:
    """What requests are checked against; with as many rows as the settings say at most."""
    return self.model.setup(self, self.settings.engine)

  # -- prompts -------------------------------------------------------------------------------

  def encode(self, text: str) -> list[int]:
    """The prompt's ids, in the checkpoint's chat format or as plain text."""
    if not text.strip():
      raise UserError("The prompt is empty; give some text.")
    if self.is_chat:
      return self.encode_chat([{"role": "user", "content": text}])
    joint = self.settings.method == "joint"
    template = self.settings.decoding.template if joint else self.settings.template
    return chat.templated(self.tokenizer, template, text)

  def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, after the configured system message."""
    messages = self._with_system(messages)
    # A plain session may score a conversation.
    return (self.format or self.model.format(self.model.folder)).encode(messages)

  def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if self.settings.system and isinstance(messages, list | tuple):
      return [{"role": "system", "content": self.settings.system}, *messages]
    return messages

  def beside(self, messages: list[dict[str, str]]) -> tuple[list[int], ...]:
    """The conversation as each model beside the main one sees it: as a chat, or as plain text."""
    if self.settings.method != "joint":
      return ()
    text = "\n".join(m["content"] for m in messages)
    return tuple(
      self.model.format(folder).encode(self._with_system(messages))
      if self.model.chats_beside(folder)
      else chat.templated(self.tokenizer, self.settings.decoding.template, text)
      for folder, _ in self.others
    )

  def request(self, ids: Sequence[int], max_new_tokens: int, seed: int, beside=()) -> Request:
    """A request with this session's settings. Raises UserError if the engine could not run it."""
    actions = dict(self.settings.actions)
    if "inject" in actions:
      actions["inject"] = self.tokenizer.encode(actions["inject"])
    kept, held = heal.roll_back(spelling(self.tokenizer), ids) if self.heals else (ids, ())
    request = Request(
      kept,
      max_new_tokens,
      seed,
      draw.prompt_stream(ids),
      held=held,
      stop=self.stop,
      stop_text=self.settings.stop,
      knobs=self.settings.knobs,
      actions=actions,
      begins=self.is_chat,
      beside=beside,
    )
    check_request(self.setup, request)
    return request

  def ask(self, prompt: str | list[dict[str, str]], max_new_tokens: int, seed: int) -> Request:
    """The request for a text or a conversation, as each model sees it. Raises UserError as `request`."""
    if isinstance(prompt, str):
      ids, messages = self.encode(prompt), [{"role": "user", "content": prompt}]
    else:
      ids, messages = self.encode_chat(prompt), prompt
    return self.request(ids, max_new_tokens, seed, self.beside(messages))

  def within(self, messages: list[dict[str, str]], max_new_tokens: int) -> list[dict[str, str]]:
    """The latest messages of a conversation that leave room for an answer; the last one stays in any case."""
    room = self.settings.engine.max_seq_len
    room -= min(max_new_tokens, room // 4)
    while len(messages) > 1:
      if max(map(len, (self.encode_chat(messages), *self.beside(messages)))) <= room:
        break
      messages = messages[2:]  # a question and its answer
    return messages

  # -- running -------------------------------------------------------------------------------

  def plan(self, requests: Sequence[Request]) -> list[Request] | list[Group]:
    """What `ready` and `go` take: the requests, or a Group of each where it chooses, checked."""
    if not self.chooses:
      return list(requests)
    method, options = decoding.find(self.settings.method), self.settings.decoding
    extra = ()
    if self.settings.method == "adaptive":
      extra = (self._aside, self._labels(options.good, options.bad))
    todo = [method.Group(request, options, *extra, i) for i, request in enumerate(requests)]
    groups.check_groups(self.setup, todo)
    return todo

  def rows(self, todo: Sequence[Request] | Sequence[Group]) -> int:
    """Rows that a plan can use: a power of two, so that programs are few, up to config.engine.batch_size."""
    most, data = self.settings.engine.batch_size, self.settings.mesh.data
    wanted = sum(max(1, self._width(one)) for one in todo)
    rows = 1 << max(wanted - 1, 0).bit_length()
    return min(most, -(-rows // data) * data)

  def _width(self, one: Request | Group) -> int:
    if isinstance(one, Group) and one.width == 1:
      return getattr(one.config, "n", 1)
    return getattr(one, "width", 1)

  def load(self) -> None:
    """Read the weights now."""
    with self.model.reading(dict([(self.model.folder, self.model.cfg), *self.others])):
      pass

  def ready(self, todo: Sequence[Request] | Sequence[Group]) -> float:
    """Read the weights and compile what a plan needs, with progress bars; seconds spent compiling."""
    self.model.tell(self.opening)
    requests = [one.request if isinstance(one, Group) else one for one in todo]
    seconds = 0.0

    def compile(decoder: PlainDecoder) -> None:
      nonlocal seconds
      start = time.perf_counter()
      jobs = decoder.jobs(requests, several=self.chooses)
      with tqdm(total=len(jobs), desc="compiling", leave=False, disable=None) as bar:

        def begin(n: int) -> None:
          if n and bar.disable and self.peers.first:  # where no bar can be drawn
            print(f"compiling {n} program{'s' * (n > 1)} ...", file=sys.stderr, flush=True)

        compile_all(jobs, bar.update, begin)
      seconds = time.perf_counter() - start

    self.decoder = self.model.decoder(self, self.rows(todo), compile)
    self.engine = self.decoder.engine
    return seconds

  def go(self, todo: Sequence[Request] | Sequence[Group]) -> Iterator[Token | Outcome]:
    """Run a plan that is ready: tokens as they are read; where it chooses, an Outcome after those of a prompt."""
    if self.chooses:
      return groups.run(self.engine, self.tokenizer, todo, decoder=self.decoder)
    guides = [self._guide(request) for request in todo] if self.heals else ()
    return generate(self.engine, self.tokenizer, todo, decoder=self.decoder, guides=guides)

  @functools.cached_property
  def laws(self) -> EngineLaws:
    """Next-token laws of the raw model; after `ready`."""
    return EngineLaws(self.engine)

  def _guide(self, request: Request) -> Callable[[], Guide] | None:
    """What holds an answer to the bytes that were taken from its prompt."""
    if not request.held:
      return None
    return heal.Tree(self.laws, spelling(self.tokenizer), request.ids, request.held).guide

  def _aside(self, closed: bool, text: str) -> list[int]:
    """Ids of a question about a text, after it."""
    if self.is_chat:
      return self.format.aside(text, closed)
    return self.tokenizer.encode(f"\n{text}\n")

  def _labels(self, *words: str) -> list[int]:
    ids = [self.tokenizer.encode(word)[0] for word in words]
    if len(set(ids)) < len(ids):
      raise UserError(
        f"{' and '.join(map(repr, words))} begin with the same token; choose other labels."
      )
    return ids

  def header(self, prompts: list[tuple[str, list[int]]], max_new_tokens: int, seed: int) -> dict:
    """The first line of a trace."""
    knobs = sampling.knobs(sampling.find(self.settings.sampler)) | self.settings.knobs
    return {
      "config": dataclasses.asdict(self.settings),
      "checkpoint": self.settings.checkpoint,
      "format": self.opening.removeprefix("format: "),
      "seed": seed,
      "max_new_tokens": max_new_tokens,
      "sampler": {"name": self.settings.sampler} | knobs,
      "branches": list(self.branches),
      "model": dataclasses.asdict(self.model.cfg),
      "dtype": compute_dtype(self.settings.engine.dtype).name,
      "device": jax.devices()[0].device_kind,
      "versions": {"entropix_jax": entropix_jax.__version__, "jax": jax.__version__},
      "prompts": [{"text": text, "ids": ids} for text, ids in prompts],
    }
