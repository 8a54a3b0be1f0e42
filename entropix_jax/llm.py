"""The Python API: a checkpoint that writes, chats and scores, and says how uncertain it was at each token.

  from entropix_jax import LLM
  llm = LLM("checkpoints/Llama-3.2-1B-Instruct", max_seq_len=4096, batch_size=8)  # or LLM.demo()
  done = llm.generate("Why is the sky blue?", sampler="quadrant", seed=1, max_new_tokens=64)
  done.text, done.finish, done.tokens[0].entropy, done.tokens[0].branch, done.tokens[0].top
  llm.generate(["...", "..."], sampler="plain", temperature=0.7, min_p=0.05)
  llm.chat([{"role": "user", "content": "..."}], n=8, decoding="best_of_n", rule="majority")
  for token in llm.stream("..."): print(token.text, end="")
  llm.score("The capital of France is", [" Paris", " Rome"])

Settings have the names of the flags: those of config.engine and config.mesh in `LLM(...)`; in a call the knobs of
its sampler, the options of its decoding method and the actions. Every mistake is a UserError of one sentence.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from entropix_jax import decoding, sampling, settings
from entropix_jax.checkpoints import chat as chat_format
from entropix_jax.checkpoints import checkpoint, hub
from entropix_jax.config import EngineConfig
from entropix_jax.decoding.groups import Outcome
from entropix_jax.engine import preflight
from entropix_jax.engine.request import Request, check_request
from entropix_jax.errors import UserError, nearest
from entropix_jax.model import weights
from entropix_jax.report import notebook
from entropix_jax.rows import Failure, Token
from entropix_jax.scheduler import raising
from entropix_jax.session import Model, Session
from entropix_jax.tokens.tools import LLMTools

# Keywords of every call.
CALL = (
  "max_new_tokens seed forced sampler preset decoding stop heal system template format chat_template chat"
).split()
Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "..."}, ...]

# -- what comes back ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Completion:
  """A text that a prompt was continued with. Notebooks show it coloured by entropy."""

  prompt: str | Messages
  tokens: tuple[Token, ...]
  # "stop", "length" or "uncertain"; "error", see `error`; of a sample also why it was ended early.
  finish: str | None
  outcome: Outcome | None = None  # of several samples: votes, scores, answers and why
  error: str | None = None  # one sentence, where the model gave numbers that are not finite

  @property
  def text(self) -> str:
    """The text."""
    return "".join(token.text for token in self.tokens)

  @property
  def message(self) -> dict[str, str]:
    """The text as the next message of a chat."""
    return {"role": "assistant", "content": self.text}

  @property
  def entropy(self) -> float:
    """The mean entropy of the model's next-token law, in nats."""
    return statistics.fmean(token.entropy for token in self.tokens) if self.tokens else math.nan

  @property
  def samples(self) -> list["Completion"]:
    """Every sample of the prompt, the chosen one among them; one that forked begins with its parent's tokens."""
    if self.outcome is None:
      return [self]
    return [
      Completion(self.prompt, tuple(s.tokens), s.finish, error=s.error and _reworded(s.error))
      for s in self.outcome.samples
    ]

  def records(self) -> list[dict[str, Any]]:
    """One dictionary per token, with every number under its name; pandas.DataFrame(done.records())."""
    names = [field.name for field in dataclasses.fields(Token) if field.name != "numbers"]
    return [{name: getattr(t, name) for name in names} | t.numbers for t in self.tokens]

  def __str__(self):
    return self.text

  def __repr__(self):
    text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
    return f"Completion({text!r}, {self._caption})"

  @property
  def _caption(self) -> str:
    said = f"{len(self.tokens)} tokens, finish={self.finish!r}, entropy={self.entropy:.2f}"
    return f"{said}. {self.outcome.why}" if self.outcome else said

  def _repr_html_(self) -> str:
    return notebook.page(self.tokens, self._caption)


# -- words -------------------------------------------------------------------------------------

_NAMES = re.compile(
  r"(?:--)?config\.(?!json)(?:(?P<choice>sampler|decoding)\.name(?:=(?P<value>\w+))?"
  r"|(?:(?:engine|mesh|sampler|decoding|actions)\.)?(?P<key>\w+))"
)


def _keyword(flag: re.Match) -> str:
  if flag["choice"]:
    return flag["choice"] + (f'="{flag["value"]}"' if flag["value"] else "")
  return "the checkpoint" if flag[0].endswith("config.checkpoint") else flag["key"]


def _reworded(text: str) -> str:
  """A sentence that names keyword arguments where it named flags of the command line."""
  return _NAMES.sub(_keyword, text)


@contextlib.contextmanager
def _keywords() -> Iterator[None]:
  """Name keyword arguments where an error names the flags of the command line."""
  try:
    yield
  except UserError as error:
    raise UserError(_reworded(str(error))) from None
  except RuntimeError as error:
    if not preflight.exhausts(error):
      raise
    raise UserError(
      'A device\'s memory does not suffice; lower batch_size or max_seq_len, or try weights="int8" and '
      'cache="int8".'
    ) from None


def _chosen(what: str, choice: Any) -> dict[str, Any]:
  """`sampler` or `decoding` as a section of settings: its name, if any, and what else is set."""
  if choice is None or isinstance(choice, str):
    return {"name": choice}
  if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
    return dict(choice)
  raise UserError(
    f'{what} is {choice!r}; give it a name, or a dictionary of settings such as {{"name": "plain"}}.'
  )


def _listed(values: Any, what: str, kind: type) -> list:
  """A list of values of one kind."""
  if isinstance(values, Mapping | bytes) or not isinstance(values, Iterable):
    raise UserError(f"{what} is {values!r}; give text, or a list.")
  values = list(values)
  for value in values:
    if not isinstance(value, kind):
      raise UserError(f"{what} has {value!r} in it, which is not of the kind {kind.__name__}.")
  return values


def _unknown(key: str, tables: Mapping[str, Iterable[str]], hint: str = "") -> str:
  """The sentence about a setting that none of these has."""
  said = nearest(key, [] if hint else [name for table in tables.values() for name in table])
  has = "; ".join(f"{what} has: {', '.join(table)}" for what, table in tables.items() if table)
  return f"There is no setting {key!r} here{hint}{said} {has}."


def _sort(options: Mapping[str, Any], sections: dict[str, dict[str, Any]]) -> None:
  """Put each option into the section that it belongs to."""
  chosen = sections["sampler"]
  sampler = settings.sampler_name(chosen["name"], chosen.get("preset") or "")
  method = sections["decoding"]["name"] or decoding.PLAIN
  known = {
    "sampler": sampling.knobs(sampling.find(sampler)),
    "decoding": decoding.options(method),
    "actions": settings.action_knobs(),
  }
  for key, value in options.items():
    homes = [section for section, table in known.items() if key in table]
    if len(homes) > 1:
      raise UserError(
        f"Both the sampler {sampler!r} and the method {method!r} have a setting {key!r}; say whose it is: "
        f'sampler={{"name": "{sampler}", "{key}": {value!r}}} or decoding={{"name": "{method}", ...}}.'
      )
    if not homes:
      others = [
        f'sampler="{s}"' for s in sampling.names() if key in sampling.knobs(sampling.find(s))
      ]
      others += [f'decoding="{m}"' for m in decoding.names() if key in decoding.options(m)]
      hint = f" ({' and '.join(others)} would have it)" if others else ""
      tables = {
        f"The sampler {sampler!r}": known["sampler"],
        f"the method {method!r}": known["decoding"],
        "every call": [*CALL, *known["actions"]],
      }
      raise UserError(_unknown(key, tables, hint))
    sections[homes[0]][key] = value


# -- the API -----------------------------------------------------------------------------------


class LLM:
  """A checkpoint to write and chat with.

  Weights are read at the first call, while its programs compile; `load` reads them at once. Calls with
  other samplers and methods share the weights; a call compiles only what no call before it needed.

  Args:
    folder: in Hugging Face layout, a .gguf file, or the name of a model on the hub.
    data: devices that rows are split over.
    model: devices that the model is split over.
    engine: keys of config.engine, such as dtype, max_seq_len, batch_size (rows at most: a call has as many
      as its prompts need), attn_stats, top_logprobs (5 here), weights and cache.

  Raises:
    UserError: a folder or a setting that cannot be used.
  """

  def __init__(self, folder: str | Path, *, data: int = 1, model: int = 1, **engine: Any):
    with _keywords():
      known = [field.name for field in dataclasses.fields(EngineConfig)]
      for key in engine:
        if key not in known:
          raise UserError(_unknown(key, {"LLM": [*known, "data", "model"]}))
      if not isinstance(folder, str | Path):
        raise UserError(f"The folder is {folder!r}; give it as text or a Path.")
      most = checkpoint.load_config(hub.find(folder)).max_position
      usual = {"top_logprobs": 5, "max_seq_len": min(most, EngineConfig.max_seq_len)}
      mesh = {"data": data, "model": model}
      values = {"checkpoint": str(folder), "engine": usual | engine, "mesh": mesh}
      self._open(Model(settings.resolve(values)))

  @classmethod
  def demo(cls, **engine: Any) -> "LLM":
    """The model that ships with the package: 2 million parameters, short stories and word problems."""
    return cls(settings.ASSETS / "demo" / "instruct", **{"max_seq_len": 1024} | engine)

  @classmethod
  def of(cls, chosen: settings.Settings, peers: Any = None) -> "LLM":
    """From the settings of a config file. Errors name flags here, and in `session`.

    Args:
      peers: the other processes of this run, if any.
    """
    self = cls.__new__(cls)
    self._open(Model(chosen, peers))
    return self

  def _open(self, model: Model) -> None:
    self._model = model
    self.tokenizer, self.cfg, self.config = model.tokenizer, model.cfg, model.config

  def __repr__(self):
    size, c = weights.count(self.cfg), self.config
    return (
      f"LLM({self._model.name!r}, dtype={c.dtype!r}, max_seq_len={c.max_seq_len}, "
      f"batch_size={c.batch_size}): {size:,} parameters"
    )

  def load(self) -> None:
    """Read the weights now, with a progress bar."""
    with _keywords(), self._model.reading({self._model.folder: self.cfg}):
      pass

  def session(self, chosen: settings.Settings, any_knob: bool = False) -> Session:
    """A session with the settings of a config file, over this model's weights; see Session."""
    return Session(self._model, chosen, any_knob)

  def generate(
    self,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
    forced: Sequence[int] = (),
    sampler: str | Mapping[str, Any] | None = None,
    preset: str = settings.AUTO,
    decoding: str | Mapping[str, Any] | None = None,
    stop: str | Sequence[str] = (),
    heal: bool = False,
    system: str = "",
    template: str | None = None,
    format: str = "auto",
    chat_template: str | Path = "",
    chat: Mapping[str, Any] | None = None,
    **options: Any,
  ) -> Completion | list[Completion]:
    """Answer a prompt, or continue it where the model does not chat; a list of prompts is run in batches.

    Args:
      prompt: text, or a list of texts.
      seed: the same seed gives the same text, alone or in a list.
      forced: ids with which the answer begins, as if they had been drawn; what comes after them is returned. With ids
        of an earlier answer and its seed the text goes on as it did, and with another one at the end it is a fork.
      sampler: "quadrant" (the default), "plain", "dslider", "entropy_target" or one of your own.
      preset: name or file of a preset, which says sampler and knobs; "auto": the one that ships for this model,
        for the sampler "quadrant"; "none": the sampler's defaults.
      decoding: "best_of_n", "branch", "speculative", "joint", ...; `n` alone means "best_of_n".
      stop: text, or several, that end the answer, which is what stands before.
      heal: the prompt may end inside a word: its last tokens are chosen anew, with the same bytes (tokens/heal.py);
        only where it is continued as plain text.
      system: system message of a model that chats.
      template: what the prompt of one that does not is put into, such as "Q: {}\\nA:".
      format: "chat", "plain", or "auto": chat where the checkpoint has a chat template or ends its turns as Llama 3.
      chat_template: a file in place of the checkpoint's template, or the name of one of several that it has.
      chat: what the chat template reads besides the messages, such as {"enable_thinking": False}.
      options: knobs of the sampler, options of the method, and actions (inject, stop_ent, ...). Where the
        sampler and the method both have one of a name, say whose it is: sampler={"name": ..., "low_ent": 0.1}.

    Returns:
      A Completion, or a list of them in the order of the prompts.

    Raises:
      UserError: an unknown setting, a value that cannot be used, or a prompt that is empty or too long.
    """
    several = not isinstance(prompt, str)
    done = self._complete(
      _listed(prompt, "prompt", str) if several else [prompt],
      max_new_tokens=max_new_tokens,
      seed=seed,
      forced=forced,
      sampler=sampler,
      preset=preset,
      decoding=decoding,
      stop=stop,
      heal=heal,
      system=system,
      template=template,
      format=format,
      chat_template=chat_template,
      chat=chat,
      **options,
    )
    return done if several else done[0]

  def chat(
    self, messages: Messages | Sequence[Messages], **how: Any
  ) -> Completion | list[Completion]:
    """Answer a conversation; a list of conversations is run in batches.

    Args:
      messages: [{"role": "user", "content": "..."}, ...]; the next turn is [*messages, done.message, ...].
      how: as in `generate`, but for `format`.
    """
    if "format" in how:
      raise UserError("A chat has no format; leave it out, or use generate.")
    if isinstance(messages, str) or not isinstance(messages, Sequence):
      raise UserError(
        'A chat needs messages, [{"role": "user", "content": ...}]; use generate for a text.'
      )
    several = any(isinstance(message, list | tuple) for message in messages)
    done = self._complete(list(messages) if several else [messages], format="chat", **how)
    return done if several else done[0]

  def stream(self, prompt: str | Messages, **how: Any) -> Iterator[Token]:
    """The tokens of an answer as they are made; end the loop whenever you like.

    Args:
      prompt: text, or the messages of a conversation.
      how: as in `generate`, but for methods that choose among several samples.
    """
    how |= {} if isinstance(prompt, str) else {"format": "chat"}
    with _keywords():
      session, todo = self._plan([prompt], **how)
      if session.chooses:
        raise UserError(
          f"{session.settings.method} chooses when all samples have ended; use generate in place of stream."
        )
      session.ready(todo)
    return raising(session.go(todo))

  def score(
    self, prompt: str | Messages, continuations: str | Sequence[str]
  ) -> float | list[float]:
    """log p of each continuation after a prompt, in nats, under the raw model.

    Args:
      prompt: text, which begins as it is, or a conversation, whose answer is scored.
      continuations: a text, or a list of texts; a leading space belongs to them: [" Paris", " Rome"].
    """
    with _keywords():
      session = self._session(preset="none")  # scores are the raw model's
      texts = [continuations] if isinstance(continuations, str) else continuations
      coded = [self.tokenizer.encode(text) for text in _listed(texts, "continuations", str)]
      if isinstance(prompt, str):
        ids = chat_format.plain(self.tokenizer, prompt)
      else:
        ids = session.encode_chat(prompt)
      if not all(coded):
        raise UserError("A continuation is empty; give some text.")
      longest = len(ids) + max(map(len, coded), default=0)
      if longest > self.config.max_seq_len:
        raise UserError(
          f"Prompt and continuation have {longest} tokens, more than max_seq_len={self.config.max_seq_len}."
        )
      # A passage that is injected is emitted whatever the law, and its raw log-probability reported.
      pieces = [
        (i, Request([*ids, *more[:at]], len(piece), actions={"inject": piece, "inject_ent": -1.0}))
        for i, more in enumerate(coded)
        for at in range(0, len(more), sampling.LIST)
        for piece in [more[at : at + sampling.LIST]]
      ]
      pieces.sort(key=lambda piece: len(piece[1].ids))  # those of one prompt share its prefill
      requests = [request for _, request in pieces]
      totals = [0.0] * len(coded)
      if requests:
        session.ready(requests)
        for token in raising(session.go(requests)):
          totals[pieces[token.prompt][0]] += token.logprob
    return totals[0] if isinstance(continuations, str) else totals

  @functools.cached_property
  def tokens(self) -> LLMTools:
    """Tools to look at tokens and tinker with them; see tokens/tools.py."""
    return LLMTools(self)

  # -- from keywords to sessions -----------------------------------------------------------------

  def _complete(self, prompts: Sequence[str | Messages], /, **how: Any) -> list[Completion]:
    with _keywords():
      session, todo = self._plan(prompts, **how)
      if not todo:
        return []
      session.ready(todo)
      found: list[list[Token]] = [[] for _ in todo]
      done: list[Completion | None] = [None] * len(todo)
      quiet = True if len(todo) == 1 else None
      with tqdm(total=len(todo), desc="answers", leave=False, disable=quiet) as bar:
        for event in session.go(todo):
          i = event.prompt
          if isinstance(event, Outcome):
            best = event.samples[event.chosen]
            error = event.error and _reworded(event.error)
            done[i] = Completion(prompts[i], tuple(best.tokens), best.finish, event, error)
          elif isinstance(event, Failure):
            event.close(found[i])
            done[i] = Completion(prompts[i], tuple(found[i]), "error", error=_reworded(event.why))
          elif not session.chooses:
            found[i].append(event)
            if event.finish:
              done[i] = Completion(prompts[i], tuple(found[i]), event.finish)
          bar.update(isinstance(event, Outcome) or done[i] is not None)
    return done

  def _plan(
    self,
    prompts: Sequence[str | Messages],
    /,
    max_new_tokens: int = 256,
    seed: int = 0,
    forced: Sequence[int] = (),
    **how: Any,
  ) -> tuple[Session, list]:
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
      if not hasattr(value, "__index__"):
        raise UserError(f"{name} is {value!r}; it must be a whole number.")
    max_new_tokens, seed = operator.index(max_new_tokens), operator.index(seed)
    session = self._session(**how)
    requests = [session.ask(prompt, max_new_tokens, seed) for prompt in prompts]
    if forced := tuple(_listed(forced, "forced", int)):
      if session.chooses:
        raise UserError(f"{session.settings.method} draws several samples; leave out `forced`.")
      most = max_new_tokens + len(forced)
      changes = {"forced_ids": forced, "max_new_tokens": most}
      requests = [dataclasses.replace(request, **changes) for request in requests]
      for request in requests:
        check_request(session.setup, request)
    return session, session.plan(requests)

  def _session(
    self,
    sampler: Any = None,
    preset: str = settings.AUTO,
    decoding: Any = None,
    stop: Any = (),
    heal: bool = False,
    system: str = "",
    template: str | None = None,
    format: str = "auto",
    chat_template: str | Path = "",
    chat: Mapping[str, Any] | None = None,
    **options: Any,
  ) -> Session:
    if decoding is None and "n" in options:
      decoding = "best_of_n"
    sections = {"sampler": _chosen("sampler", sampler), "decoding": _chosen("decoding", decoding)}
    sections["actions"] = {}
    values: dict[str, Any] = {"system": system, "format": format, "heal": heal}
    values |= {"chat_template": str(chat_template or ""), "chat": chat}
    values["stop"] = (stop,) if isinstance(stop, str) else stop
    if template is not None:
      joint = sections["decoding"]["name"] == "joint"
      (sections["decoding"] if joint else values)["template"] = template
    if preset != settings.AUTO:
      sections["sampler"]["preset"] = str(preset or "")
    _sort(options, sections)
    engine, mesh = (dataclasses.asdict(x) for x in (self.config, self._model.mesh))
    values |= sections | {"checkpoint": self._model.name, "engine": engine, "mesh": mesh}
    # What is typed next may set any knob, and should not have to compile for it.
    return Session(self._model, settings.resolve(values), any_knob=True)
