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
from collections.abc import Sequence

from entropix_jax.cli import commands
from entropix_jax.cli.commands import say
from entropix_jax.errors import Terminated, UserError

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_PROMPT = _FLAGS.string("prompt", None, "Text to answer (chat models) or to continue.")
_PROMPT_FILE = _FLAGS.string(
  "prompt_file",
  None,
  "CSV (column prompt, perhaps act), JSONL or text file; its first prompt is run.",
)
_PROMPT_TEST = _FLAGS.bool("prompt_test", False, "Run every prompt of --prompt_file, batched.")
_CHAT = _FLAGS.bool(
  "chat", False, "Talk with the model; Ctrl-C stops an answer, Ctrl-D ends the conversation."
)
_SHOW = _FLAGS.enum(
  "show",
  "chosen",
  ["chosen", "all"],
  "Of several samples of a prompt: the chosen one, or all, numbered from 1.",
)
_MAX_NEW_TOKENS = _FLAGS.integer("max_new_tokens", 256, "Most tokens to generate per prompt.")
_SEED = _FLAGS.integer(
  "seed", 0, "The same seed and prompt give the same text, in any batch or file."
)
_STATS = _FLAGS.bool("stats", False, "Colour each token by its entropy, style it by its branch.")
_TRACE = _FLAGS.string("trace", None, "Write every token's numbers to this JSONL file.")
_COMPARE = _FLAGS.string(
  "compare",
  None,
  "Runs of the config, such as base,instruct,joint: answers to --prompt side by side.",
)
_PREFLIGHT = _FLAGS.bool(
  "preflight", False, "Say whether the model fits its devices, and what would; reads no weights."
)
_PLACE = commands.Place(_FLAGS)
# The config is compared key by key; the others may differ between the processes of a run.
_APART = ("config", "stats", "trace", "coordinator", "process", "wait_s")
_ALIKE = [name for name in _FLAGS if name not in _APART]


def _session_of(resolved, peers):
  """A session with a model of its own."""
  # Imported here, as elsewhere below, so that --help and a mistyped flag answer at once.
  from entropix_jax.llm import LLM

  return LLM.of(resolved, peers).session(resolved)


def _play(session, texts: Sequence[str], printer, path: str | None, begin):
  """Answer prompts and trace it: (what was done in a line, Outcomes, Failures). `begin()` is called before the first
  token."""
  from entropix_jax.cli.endings import Endings
  from entropix_jax.decoding.groups import Outcome
  from entropix_jax.report import trace
  from entropix_jax.rows import Failure

  limit, seed = _MAX_NEW_TOKENS.value, _SEED.value
  requests = [session.ask(text, limit, seed) for text in texts]
  coded = [(text, list(request.ids)) for text, request in zip(texts, requests, strict=True)]
  todo = session.plan(requests)
  tally = trace.Tally([len(ids) for _, ids in coded])
  endings = Endings(session.setup, requests, session.chooses)
  outcomes, failures = [], []
  with contextlib.ExitStack() as stack:
    tracer = None
    if path and session.peers.first:
      header = session.header(coded, limit, seed)
      tracer = stack.enter_context(trace.Tracer(path, header, tally.summary, outcomes))
      session.peers.at_end(tracer.end)
    compiling = session.ready(todo)
    begin()
    for event in session.go(todo):
      if isinstance(event, Outcome):
        printer.outcome(event)
        endings.outcome(event)
        outcomes.append(event)
        continue
      if isinstance(event, Failure):
        for keep in (tally, printer, *filter(None, [tracer])):
          keep.failure(event)
        failures.append(event)
        continue
      for keep in (*filter(None, [tracer]), tally, printer, endings):
        keep.token(event)
    summary = tally.summary() | {"compile_s": round(compiling, 3)}
    if outcomes:
      summary["prefix_bytes"] = sum(o.prefix_bytes for o in outcomes)
      summary["prefix_copies"] = max(o.prefix_copies for o in outcomes)
    if tracer:
      tracer.close(summary)
  return trace.line(summary) + endings.line(), outcomes, failures


def _answer(session, prompts) -> None:
  """Answer prompts and print: one streams as it is made, several follow each other whole."""
  from entropix_jax.cli import printer

  paint, legend = printer.painter(session.branches, _STATS.value)
  one = len(prompts) == 1
  names = [p.name or " ".join(p.text.split())[:60] for p in prompts]
  titles = [f"[{i + 1}/{len(prompts)}] {name}" for i, name in enumerate(names)]

  def begin():
    if legend:
      printer.emit(legend + "\n\n")
    if one and not session.is_chat and session.settings.method != "joint":
      printer.emit(printer.shown(prompts[0].text) + "\n" * (_SHOW.value == "all"))

  out = printer.Printer(titles, paint, session.chooses, every=_SHOW.value == "all")
  play = _play(session, [p.text for p in prompts], out, _TRACE.value, begin)
  line, outcomes, failures = play
  if one:
    printer.emit("\n")
  sys.stdout.flush()
  if one and outcomes:
    say(outcomes[0].why)
  say(line)
  errors = [failure.why for failure in failures] + [o.error for o in outcomes if o.error]
  if errors:
    raise UserError(errors[0] + f" {len(errors) - 1} more do the same." * bool(errors[1:]))


def _compare(config, names: Sequence[str], text: str, peers) -> None:
  """Answer a prompt by several runs of the config, one after another, and print them side by side."""
  import shutil

  from entropix_jax.cli import config_file, printer, terminal

  chosen = [config_file.resolve(config_file.named(config, name), ways=True) for name in names]
  sessions = [_session_of(one, peers) for one in chosen]
  said, lines, errors, legends = [], [], [], []
  for name in names:
    session = sessions.pop(0)  # its weights are freed before the next one's are read
    parts: list[str] = []
    paint, legend = printer.painter(session.branches, _STATS.value)
    legends.append(legend)
    out = printer.Printer([name], paint, session.chooses, parts.append)
    path = _TRACE.value and _named(_TRACE.value, name)
    line, outcomes, failures = _play(session, [text], out, path, lambda: None)
    said.append("".join(parts))
    errors += [f"{name}: {x.why}" for x in failures]
    errors += [f"{name}: {o.error}" for o in outcomes if o.error]
    lines += [f"{name}: {line}", *(o.why for o in outcomes)]
    del session
  printer.emit("".join(f"{legend}\n" for legend in dict.fromkeys(filter(None, legends))))
  printer.emit(terminal.columns(names, said, shutil.get_terminal_size().columns) + "\n")
  say("\n".join(lines))
  if errors:
    raise UserError(" ".join(errors))


def _named(path: str, run: str) -> str:
  """The trace file of a run: story.jsonl -> story-joint.jsonl."""
  root, dot, ending = path.rpartition(".")
  return f"{root}-{run}.{ending}" if dot else f"{path}-{run}"


_END = "\x04"  # what Ctrl-D types


def _line(alone: bool) -> str:
  """What was typed; _END at the end of the input. Ctrl-C drops the line, if this process is alone."""
  try:
    return input("> " if sys.stdin.isatty() else "")
  except EOFError:
    return _END
  except KeyboardInterrupt as error:
    if isinstance(error, Terminated) or not alone or not sys.stdin.isatty():
      raise
    say("\nCtrl-D ends the conversation.")
    return ""


def _teller(session):
  """`say`, on one of several processes."""
  return say if session.peers.first else lambda text: None


def _talk(session) -> None:
  """A conversation; the whole of it is fed again each turn."""
  from entropix_jax.cli import printer

  tell = _teller(session)
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (input() then edits lines and keeps a history)
  limit = _MAX_NEW_TOKENS.value
  hello = session.ask([{"role": "user", "content": "Hello!"}], limit, 0)
  if not session.model.chats:
    tell(
      "This looks like a base model: it continues texts, and was hardly taught to end its turns."
    )
  session.ready(session.plan([hello]))
  messages: list[dict[str, str]] = []
  paint, legend = printer.painter(session.branches, _STATS.value)
  if legend:
    printer.emit(legend + "\n")
  read = functools.partial(_line, session.peers.alone)
  while (text := session.peers.share(read)) != _END:
    if not text.strip():
      continue
    whole = [*messages, {"role": "user", "content": text}]
    turn = session.within(whole, limit)
    try:
      request = session.ask(turn, limit, _SEED.value)
    except UserError as error:
      tell(f"{error} The message was not sent.")
      continue
    if gone := len(whole) - len(turn):
      tell(
        f"The oldest {gone} messages left the conversation, which must fit "
        f"config.engine.max_seq_len={session.settings.engine.max_seq_len}."
      )
    answer = _turn(session, request, printer.Printer([""], paint, session.chooses))
    messages = [*turn, {"role": "assistant", "content": answer}]
    if not answer.strip():
      tell("There is no answer, so the message left the conversation.")
      messages = turn[:-1]


def _turn(session, request, out) -> str:
  """Answer one message, and return the answer, or what there was of it when it was interrupted."""
  from entropix_jax.cli import printer
  from entropix_jax.cli.endings import Endings
  from entropix_jax.report import trace
  from entropix_jax.rows import Failure, Token

  tell, todo = _teller(session), session.plan([request])
  answer, tally = "", trace.Tally([len(request.ids)])
  endings = Endings(session.setup, [request], session.chooses)
  try:
    session.ready(todo)
    for event in session.go(todo):
      if isinstance(event, Token):
        answer += event.text
        for keep in (tally, endings, out):
          keep.token(event)
      elif isinstance(event, Failure):
        answer += event.text
        tally.failure(event)
        out.failure(event)
        tell(event.why)
      else:
        answer = event.text
        endings.outcome(event)
        out.outcome(event)
        if event.error:
          tell(event.error)
  except KeyboardInterrupt as error:
    if isinstance(error, Terminated) or not session.peers.alone:
      raise
    answer = "" if session.chooses else answer
    tell(" (stopped)")
  printer.emit("\n")
  if _STATS.value:
    tell(trace.line(tally.summary()) + endings.line())
  elif endings.line():
    tell(endings.line().removeprefix(" | ").capitalize() + ".")
  return answer


def _preflight(resolved) -> None:
  """Print what the run would take of each device. Raises UserError where it does not fit."""
  from entropix_jax import devices, sampling, settings
  from entropix_jax.cli import printer
  from entropix_jax.engine import preflight
  from entropix_jax.engine.setup import compute_dtype

  devices.cores(resolved.mesh)
  devices.claim()
  resolved, cfg, name = settings.shape(resolved)
  if getattr(resolved.decoding, "folders", []):
    raise UserError(
      "--preflight counts one model; leave config.decoding out, and add what the same says of the other "
      "models' checkpoints."
    )
  sampler, dtype = sampling.find(resolved.sampler), compute_dtype(resolved.engine.dtype)
  varying = sampling.varying(sampler, resolved.knobs)
  engine = preflight.engine(cfg, sampler, resolved.engine, resolved.mesh, dtype, varying=varying)
  say(f"Looking at prefill and decode of {name} at full length ...")
  limit = preflight.least_memory(engine)
  fits, text = preflight.report(engine, preflight.need(engine, limit), limit)
  printer.emit(text + "\n")
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
  if _SHOW.value == "all" and (_CHAT.value or _COMPARE.value):
    raise UserError("--show=all goes with --prompt or --prompt_file, without --compare.")
  if _CHAT.value and _TRACE.value:
    raise UserError("--trace goes with --prompt or --prompt_file, not with --chat.")
  if _MAX_NEW_TOKENS.value < 1:
    raise UserError(f"--max_new_tokens is {_MAX_NEW_TOKENS.value}; it must be at least 1.")
  _PLACE.check()


def _main(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  _check_flags()
  from entropix_jax import distributed

  with distributed.join(_PLACE.get(), _PLACE.wait_s) as peers:
    _start(peers)


def _start(peers) -> None:
  """What each process of a run does, all in the same order."""
  from entropix_jax.cli import config_file, prompts

  resolved = config_file.resolve(_CONFIG.value, ways=True)
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
    return _talk(_session_of(dataclasses.replace(resolved, format="chat"), peers))
  _answer(_session_of(resolved, peers), todo)


if __name__ == "__main__":
  sys.exit(commands.entry(_main, sys.argv))
