"""The compiled programs of an engine: their names and sizes, how each is lowered, and which a run needs.

Every program has static shapes. Sizes come from two short lists, prefill buckets and attention windows, so
a run needs few programs and nothing is compiled after them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from entropix_jax import compile_cache
from entropix_jax.engine import moves, record, step
from entropix_jax.engine.request import Request, blank_row, noise_key, pack_row
from entropix_jax.engine.setup import LIFTS, Setup
from entropix_jax.engine.state import (
  abstract_prefix,
  abstract_state,
  blank,
  network_prefix,
)
from entropix_jax.model import linear, sharding

REPLAY = 64  # tokens that a rewind or a resumption goes through at once
# Setting this replaces XLA's own list, so all of it is here; the last entry is not in it [n02].
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled: an operation, and the sizes that it has."""

  verb: str
  tokens: int = 0  # T, fed per call
  slots: tuple[int, ...] = ()  # of the cache of a prompt, one per network
  window: int = 0  # slots of the cache that attention reads
  steps: int = 0  # decode steps
  labels: int = 0  # that a score has
  prefix: int = 0  # slots of the prefix that rows share; 0: none
  network: int = 0  # index of the network that a prompt is fed to
  rows: int = 0  # of a dispatch, from the first slot on; of a first token, 1; 0: all


class Programs(dict[Program, Any]):
  """Compiled programs; one that is missing is compiled at its first use.

  Args:
    lower: Program -> traced.
    facts: Program -> everything that its compiled form depends on, see `compile_cache.describe`.
    options: for the compiler.
  """

  def __init__(
    self,
    lower: Callable[[Program], jax.stages.Lowered],
    facts: Callable[[Program], Any],
    options: dict[str, str],
  ):
    super().__init__()
    self._lower, self._facts, self.options = lower, facts, options

  def __missing__(self, program: Program) -> Any:
    compile_all([(self, program)])
    return self[program]

  def jobs(self, programs: Sequence[Program]) -> list["Job"]:
    """What is missing of these, for `compile_all`."""
    return [(self, p) for p in dict.fromkeys(programs) if p not in self]

  def load(self, environment: str, program: Program) -> bool:
    """Whether the program was found on disk; then it is ready."""
    found = compile_cache.load(environment, (self._facts(program), self.options))
    if found is not None:
      self[program] = found
    return found is not None

  def lower(self, program: Program) -> jax.stages.Lowered:
    """The program, traced."""
    return self._lower(program)

  def finish(self, environment: str, program: Program, lowered: jax.stages.Lowered) -> None:
    """Compile a traced program and keep it."""
    before = compile_cache.written()
    self[program] = lowered.compile(self.options)
    if compile_cache.written() > before:
      compile_cache.save(environment, (self._facts(program), self.options), self[program])


Job = tuple[Programs, Program]


def compile_all(
  jobs: Sequence[Job],
  done: Callable[[], None] = lambda: None,
  begin: Callable[[int], None] = lambda n: None,
) -> None:
  """Compile programs, two at a time, or read them from disk; `done()` after each.

  Args:
    begin: called with the number of programs that were not found on disk, before they are compiled.
  """
  environment = compile_cache.environment() if jobs else ""
  with ThreadPoolExecutor(2) as pool:
    found = list(pool.map(lambda job: job[0].load(environment, job[1]), jobs))
    for _ in range(sum(found)):
      done()
    todo = [job for job, there in zip(jobs, found, strict=True) if not there]
    begin(len(todo))
    # A generator, so that one program is traced while others compile.
    traced = ((programs, p, programs.lower(p)) for programs, p in todo)
    for _ in pool.map(lambda job: job[0].finish(environment, *job[1:]), traced):
      done()


def compiler_options(setup: Setup, weights) -> dict[str, str]:
  """What the compiler is told for every program of a setup with these weights."""
  options = linear.compiler_options(weights, setup.platform)
  if setup.platform == "gpu" and setup.config.graphs == "loops":
    options = options | {"xla_gpu_enable_command_buffer": _GRAPHS}
  return options


def lower(
  setup: Setup, f: Callable, args: Sequence, out, donate: Sequence[int] = ()
) -> jax.stages.Lowered:
  """`f` traced for abstract arguments.

  Args:
    out: abstract results, for their shardings.
    donate: indices of arguments whose memory is used for the results.
  """
  placed = {}
  if setup.mesh is not None:
    placed["out_shardings"] = jax.tree.map(lambda x: x.sharding, out)
  return jax.jit(f, donate_argnums=donate, **placed).lower(*args)


def shape(setup: Setup, letters: str, dims: Sequence[int], dtype=jnp.int32) -> jax.ShapeDtypeStruct:
  """An abstract array, placed as its axis letters say."""
  return jax.ShapeDtypeStruct(tuple(dims), dtype, sharding=sharding.of(setup.mesh, letters))


def replicated(setup: Setup, tree):
  """Abstract arrays that every device has whole."""
  return jax.tree.map(lambda x: shape(setup, "_" * x.ndim, x.shape, x.dtype), tree)


def named(name: str, f: Callable, **static) -> Callable:
  """`f` with static arguments, under a name that profiles and compiled text show."""

  def call(*args):
    return f(*args, **static)

  call.__name__ = call.__qualname__ = name
  return call


def lower_program(setup: Setup, weights, program: Program) -> jax.stages.Lowered:
  """A Program of this file, traced.

  Args:
    weights: abstract.
  """
  return _LOWER[program.verb](setup, weights, program)


def _init(setup: Setup, weights, p: Program):
  f = named("init", functools.partial(blank, setup, setup.config.batch_size))
  return lower(setup, f, (), abstract_state(setup))


def _cache(setup: Setup, weights, p: Program):
  network = setup.model.networks[p.network]
  f = named("cache", functools.partial(network.cache, 1, *p.slots))
  return lower(setup, f, (), network_prefix(setup, network, *p.slots).cache)


def _prompt(setup: Setup, weights, p: Program):
  network = setup.model.networks[p.network]
  prefix = network_prefix(setup, network, *p.slots)
  token_1T, one = shape(setup, "__", (1, p.tokens)), shape(setup, "_", (1,))
  weights = setup.model.parts(weights)[p.network]
  if p.verb == "prompt":
    f = named("prompt", functools.partial(step.prompt, network), slots=p.slots[0])
    return lower(setup, f, (weights, token_1T, one), prefix)
  args = weights, prefix.cache, token_1T, one
  if p.verb == "feed":
    f = named("feed", functools.partial(step.feed, network))
    return lower(setup, f, args, prefix.cache, donate=(1,))
  f = named("prefill", functools.partial(step.prefill, network))
  return lower(setup, f, (*args, one), prefix, donate=(1,))


def _read(setup: Setup, weights, p: Program):
  network, T = setup.model.networks[p.network], p.tokens
  prefix = network_prefix(setup, network, *p.slots)
  token_1T, one = shape(setup, "__", (1, T)), shape(setup, "_", (1,))
  args = setup.model.parts(weights)[p.network], prefix.cache, token_1T, one, one, token_1T
  scores = (
    shape(setup, "_", (T,), jnp.float32),
    shape(setup, "__", (T, setup.top), jnp.float32),
    shape(setup, "__", (T, setup.top)),
  )
  f = named("read", functools.partial(step.read, network), top=setup.top)
  return lower(setup, f, args, (prefix, scores), donate=(1,))


def _piece(setup: Setup, weights, p: Program):
  network, start = setup.model.networks[p.network], shape(setup, "", ())
  cache = network_prefix(setup, network, *p.slots).cache
  piece = network_prefix(setup, network, p.tokens).cache
  if p.verb == "keep":
    f = named("keep", functools.partial(moves.piece, tokens=p.tokens))
    return lower(setup, f, (cache, start), piece)
  return lower(setup, named("put", moves.put_piece), (cache, piece, start), cache, donate=(0,))


def _insert(setup: Setup, weights, p: Program):
  state, bits = abstract_state(setup), replicated(setup, pack_row(blank_row(setup)))
  args = abstract_prefix(setup, p.slots), shape(setup, "__", (1, setup.capacity)), bits
  f = named(p.verb, functools.partial(moves.insert, setup), share=p.verb == "share")
  return lower(setup, f, (state, *args, shape(setup, "", ())), state, donate=(0,))


def _first(setup: Setup, weights, p: Program):
  state, B = abstract_state(setup), setup.config.batch_size
  out = state, shape(setup, "__", (B, len(record.columns(setup))))
  if p.rows:
    f = named("first_of", functools.partial(step.first_of, setup))
    return lower(setup, f, (state, shape(setup, "", ())), out, donate=(0,))
  f = named("first", functools.partial(step.first, setup))
  return lower(setup, f, (state, shape(setup, "_", (B,), bool)), out, donate=(0,))


def _decode(setup: Setup, weights, p: Program):
  state, B = abstract_state(setup), p.rows or setup.config.batch_size
  # A process that sees all devices reads each row where it is; otherwise every process needs all rows.
  letters = "_B_" if jax.process_count() == 1 else "___"
  out = state, shape(setup, letters, (p.steps, B, len(record.columns(setup))))
  f = named(
    "decode",
    functools.partial(step.decode, setup),
    steps=p.steps,
    window=p.window,
    rows=p.rows or None,
  )
  count = [shape(setup, "", ())] if setup.masks else []
  return lower(setup, f, (weights, state, *count, *_shared(setup, p)), out, donate=(1,))


def _change(setup: Setup, weights, p: Program):
  state, slot = abstract_state(setup), shape(setup, "", ())
  key = replicated(setup, noise_key(0, 0, 0))
  if p.verb == "fork":
    f, args = moves.fork, (slot, slot, key)
  elif p.verb == "restart":
    f, args = functools.partial(moves.restart, setup), (slot, key)
  else:
    names = ("live_B", "limit_B", "forced_B")
    B = setup.config.batch_size
    f, args = moves.steer, (dict.fromkeys(names, shape(setup, "_", (B,))),)
    if p.verb == "mask":
      bits_BX = shape(setup, "__", (B, setup.mask_words), jnp.uint32)
      lifts = [shape(setup, "__", (B, LIFTS), dtype) for dtype in (jnp.int32, jnp.float32)]
      args += ((shape(setup, "_", (B,), bool), bits_BX, *lifts),)
  return lower(setup, named(p.verb, f), (state, *args), state, donate=(0,))


def _replay(setup: Setup, weights, p: Program):
  state = abstract_state(setup)
  args = weights, state, shape(setup, "", ()), shape(setup, "_", (1,)), *_shared(setup, p)
  move = {"replay": moves.replay, "force": moves.force}[p.verb]
  f = named(p.verb, functools.partial(move, setup), tokens=p.tokens, window=p.window)
  return lower(setup, f, args, state, donate=(1,))


def _score(setup: Setup, weights, p: Program):
  B = setup.config.batch_size
  label_BY = shape(setup, "__", (B, p.labels))
  args = shape(setup, "__", (B, p.tokens)), shape(setup, "_", (B,)), label_BY
  f = named("score", functools.partial(step.score, setup), window=p.window)
  return lower(setup, f, (weights, abstract_state(setup), *args, *_shared(setup, p)), label_BY)


def _shared(setup: Setup, p: Program) -> list:
  return [abstract_prefix(setup, (p.prefix,)).cache] if p.prefix else []


_LOWER = {
  "init": _init,
  "cache": _cache,
  "prompt": _prompt,
  "feed": _prompt,
  "prefill": _prompt,
  "read": _read,
  "keep": _piece,
  "put": _piece,
  "insert": _insert,
  "share": _insert,
  "first": _first,
  "decode": _decode,
  "steer": _change,
  "mask": _change,
  "fork": _change,
  "restart": _change,
  "replay": _replay,
  "force": _replay,
  "score": _score,
}


# -- what a run needs ----------------------------------------------------------------------------


def prompt_programs(setup: Setup, requests: Sequence[Request]) -> list[Program]:
  """What feeding the prompts of these requests needs."""
  need = []
  for request in requests:
    for i, ids in enumerate(setup.model.prompts(request)):
      need += feeding_programs(setup, len(ids), i)
  return list(dict.fromkeys(need))


def feeding_programs(setup: Setup, n: int, network: int = 0) -> list[Program]:
  """What feeding a prompt of n tokens to a network needs."""
  T, S = setup.bucket(n)
  where = {"slots": (S,), "network": network}
  if n <= T:
    return [Program("prompt", tokens=T, **where)]
  last = setup.bucket(n - (n - 1) // T * T)[0]
  sizes = (("cache", 0), ("feed", T), ("prefill", last))
  return [Program(verb, tokens=tokens, **where) for verb, tokens in sizes]


def any_request(setup: Setup) -> list[Program]:
  """What requests of all lengths need, in one network whose rows do not share prefixes; a server compiles these.

  They may be scored (`read`), begin with kept pieces (`keep`, `put`), and have masks, which are made for
  one token at a time (`mask`).
  """
  T, pieces = setup.config.prefill_chunk, setup.pieces
  need = [Program("init"), Program("first", rows=int(setup.varied_rows))]
  need += [Program("steer"), Program("fork")]
  need.append(Program("force", tokens=REPLAY, window=setup.capacity))
  need += decode_programs(setup, [(1, setup.config.max_seq_len)])
  need += [Program("mask")] * setup.masks
  need += [Program("prompt", tokens=S, slots=(S,)) for S in pieces]
  long = [S for S in setup.windows if S > T and S % T == 0]
  for S in long:
    need += [Program("prefill", tokens=size, slots=(S,)) for size in pieces]
    need += [Program(verb, tokens=T, slots=(S,)) for verb in ("feed", "keep", "put")]
  for S in (*pieces, *long):
    need += [Program("cache", slots=(S,)), Program("read", tokens=min(S, T), slots=(S,))]
    need.append(Program("insert", slots=(S,)))
  return need


def urgent(setup: Setup, need: Sequence[Program]) -> tuple[list[Program], list[Program]]:
  """(those programs of `any_request` that texts after short prompts need, the others in the order of their use).

  A decode program of all rows and the whole window does the work of every other one (`Engine.decode`).
  """
  least, most = setup.windows[0], setup.windows[-1]

  def later(p: Program) -> bool:
    partial = p.verb == "decode" and (p.rows > 0 or p.window < most)
    return p.verb in ("force", "read") or partial or max(p.slots, default=0) > least

  def place(p: Program) -> tuple:
    size = max(p.window, *p.slots, 0)
    return p.verb == "read", p.verb != "force", size, not p.rows, p.rows

  return [p for p in need if not later(p)], sorted(filter(later, need), key=place)


def needed(setup: Setup, requests: Sequence[Request], several: bool = False) -> list[Program]:
  """What running these requests needs, each Program once; with mixed lengths perhaps some more.

  Args:
    several: each request is continued by several rows. While the rows of one prompt share it, those of
      other prompts have copies.
  """
  sharing = [r for r in requests if several and setup.may_share(len(r.ids))]
  copying = [] if sharing and len(requests) == 1 else requests
  grows = [(r.prompt_tokens, r.prompt_tokens + setup.limit(r)) for r in copying]
  need = decode_programs(setup, grows) if grows else []
  # Rows that share a prompt have only its last token and their own in their cache; while they decode, so do
  # the rows of other prompts.
  grows += [(1, 1 + setup.limit(r)) for r in sharing]
  for S in sorted({_buckets(setup, r)[0] for r in sharing}):
    need += decode_programs(setup, grows, S)
  need += [Program("first"), *prompt_programs(setup, requests), Program("init")]
  need += [Program("insert", slots=_buckets(setup, r)) for r in copying]
  need += [Program("share", slots=_buckets(setup, r)) for r in sharing]
  if any(r.forced_ids for r in requests):
    need.append(Program("force", tokens=REPLAY, window=setup.capacity))
  need += [Program("mask")] * setup.masks
  return list(dict.fromkeys(need))


def decode_programs(
  setup: Setup, grows: Sequence[tuple[int, int]], prefix: int = 0
) -> list[Program]:
  """The decode programs of rows that grow from one number of tokens to another, each."""
  low = setup.window(min(setup.covers(*row) for row in grows))
  high = setup.window(max(end for _, end in grows))
  steps = setup.config.steps_per_dispatch
  windows = [w for w in setup.windows if low <= w <= high]
  sizes = {"steps": steps, "prefix": prefix}
  return [decode_program(setup, n, window=w, **sizes) for w in windows for n in setup.row_counts]


def decode_program(setup: Setup, rows: int, **sizes: int) -> Program:
  """The decode program of the first `rows` rows; those of all rows are one, however it is asked for."""
  return Program("decode", rows=rows % setup.config.batch_size, **sizes)


def _buckets(setup: Setup, request: Request) -> tuple[int, ...]:
  return tuple(setup.bucket(len(ids))[1] for ids in setup.model.prompts(request))
