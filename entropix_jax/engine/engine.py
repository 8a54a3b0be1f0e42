"""The engine: compiled operations on one donated State.

  prefill   a prompt -> its Prefix: keys, values and the logits of its first token
  insert    a Prefix into a slot, as the row of a request; as often as wanted
  first     the first token of every row that was inserted
  decode    N steps for every row in one dispatch: forward, statistics, law, draw, stop test
  steer     end rows, wake rows that wait, move their limits, choose or restrict their next token
  fork      a row into another slot, to go on from there with other noise
  rewind    a row to the first n of its tokens, to go on from there with other noise
  resume    the same for tokens of another text: a row whose first n tokens are given
  score     log-probabilities of labels after a suffix; the rows do not change

Why: everything that a request may change (seed, limit, stop ids, thresholds) is an array in the State, so
nothing is recompiled once the shapes in use are compiled. Scheduling policy lives above the engine.
"""

from collections.abc import Sequence

import jax
import numpy as np

from entropix_jax import memory
from entropix_jax.engine import record
from entropix_jax.engine.feeding import Feeding
from entropix_jax.engine.programs import (
  REPLAY,
  Program,
  Programs,
  compiler_options,
  decode_program,
  lower_program,
)
from entropix_jax.engine.request import Request, new_row, noise_key, pack_row
from entropix_jax.engine.setup import LIFTS, Setup
from entropix_jax.engine.state import Prefix, State, abstract, prefix_slots
from entropix_jax.errors import UserError
from entropix_jax.model import quant

_SUFFIX_LEAST = 16


class Engine:
  """The compiled programs of a Setup, and the weights that they run with. It owns no rows.

  Args:
    weights: of each network of `setup.model`: placed on the devices already, or `jax.ShapeDtypeStruct`s
      that say where, to compile programs that cannot run.
  """

  def __init__(self, setup: Setup, weights):
    for one in setup.model.parts(weights):
      int8, config = isinstance(one.embed_VD, quant.Int8), setup.config
      if int8 != (config.weights == "int8") or one.norm_D.dtype != setup.dtype:
        raise UserError(
          f"The weights are {'int8 and ' * int8}{one.norm_D.dtype.name} where config.engine.weights is "
          f"{config.weights} and config.engine.dtype is {config.dtype}; load them as those say."
        )
    self.setup, self.weights = setup, weights
    self.compiled = Programs(self.lower, self.facts, compiler_options(setup, weights))

  @classmethod
  def create(cls, cfg, weights, sampler, config, mesh_config=None, devices=None) -> "Engine":
    """The engine of one network; the arguments are those of `Setup.create`."""
    return cls(Setup.create(cfg, sampler, config, mesh_config, devices), weights)

  def lower(self, program: Program) -> jax.stages.Lowered:
    """A program, traced."""
    return lower_program(self.setup, abstract(self.weights), program)

  def facts(self, program: Program) -> tuple:
    """What a program depends on besides the code."""
    return self.setup, abstract(self.weights), program

  def run(self, program: Program, *args):
    """Run a program."""
    return self.compiled[program](*args)

  def put(self, tree):
    """NumPy leaves as a compiled program takes them; over a mesh, replicated arrays."""
    if self.setup.mesh is None:
      # A program takes NumPy arrays as they are: 51 of a row in a third of the time that device_put needs.
      return tree
    everywhere = jax.sharding.NamedSharding(self.setup.mesh, jax.sharding.PartitionSpec())

    def put(x):
      # Among several processes device_put would compare every leaf by a collective of its own.
      return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return jax.tree.map(put, tree)

  # -- operations ------------------------------------------------------------------------------

  def init(self) -> State:
    """A State in which every slot is free."""
    state = self.run(Program("init"))
    if self.setup.covers(0, self.setup.capacity) == self.setup.capacity:
      memory.huge_pages(state.cache)  # of a larger cache a CPU reads a copy of the window
    return state

  def prefill(self, request: Request) -> Prefix:
    """The request's prompt, fed alone, so that its logits depend only on its token ids.

    Raises:
      UserError: a request that this engine cannot run.
    """
    feeding = Feeding(self, request)
    while feeding.prefix is None:
      feeding.feed()
    return feeding.prefix

  def insert(
    self,
    state: State,
    prefix: Prefix,
    slot: int,
    request: Request,
    forced: int = -1,
    share: bool = False,
  ) -> State:
    """The State with the request's row in that slot, before its first token; `state` is donated.

    Args:
      prefix: of the request's prompt; it may be inserted again.
      forced: the id of the first token; -1: it is drawn.
      share: do not copy the prefix's keys and values. While the row lives, `prefix` is passed to `decode`,
        `rewind` and `score`, and no row shares another prefix.
    """
    history_1S = np.zeros((1, self.setup.capacity), np.int32)
    known = [*request.ids, *request.forced_ids]
    history_1S[0, : len(known)] = known
    args = history_1S, pack_row(new_row(self.setup, request, forced)), np.asarray(slot, np.int32)
    program = Program("share" if share else "insert", slots=prefix_slots(self.setup, prefix))
    return self.run(program, state, prefix, *map(self.put, args))

  def first(self, state: State, slots: Sequence[int]) -> tuple[State, jax.Array]:
    """(State, record_BR) with the first tokens of the rows in these slots; `state` is donated.

    With `Setup.varied_rows` there must be one slot.
    """
    if self.setup.varied_rows:
      (slot,) = slots
      return self.run(Program("first", rows=1), state, self.put(np.asarray(slot, np.int32)))
    fresh_B = np.zeros((self.setup.config.batch_size,), bool)
    fresh_B[list(slots)] = True
    return self.run(Program("first"), state, self.put(fresh_B))

  def most_likely(self, prefix: Prefix, n: int) -> list[int]:
    """The n most likely first tokens of the raw model, in that order; fewer where there are fewer."""
    logits_V = np.asarray(self.setup.model.parts(prefix.logits_1V)[0])[0]
    return [int(i) for i in np.argsort(-logits_V, kind="stable")[:n] if logits_V[i] > -np.inf]

  def steer(
    self, state: State, live=None, limit=None, forced=None, masks=None, lifts=None
  ) -> State:
    """Change rows between two dispatches; `state` is donated. Each argument is {slot: value}.

    Args:
      live: False ends the row's text, True lets a row go on whose limit was reached, WAKE one that waits.
      limit: of tokens emitted, in all.
      forced: the id of the next token.
      masks: bits of the ids that may come next, uint32, as in `State.allowed_BX`; a row that has a mask
        keeps it until it gets another, and one without a bit ends the restriction. Needs `Setup.masks`.
      lifts: {id: nats to add to its logit}, up to LIFTS of them, of rows that get a mask.
    """
    change, B = {}, self.setup.config.batch_size
    live = {slot: int(value) for slot, value in (live or {}).items()}
    for name, values in (("live_B", live), ("limit_B", limit), ("forced_B", forced)):
      change[name] = np.full((B,), -1, np.int32)
      for slot, value in (values or {}).items():
        change[name][slot] = value
    if not masks:
      return self.run(Program("steer"), state, self.put(change))
    new_B, allowed_BX = np.zeros((B,), bool), np.zeros((B, self.setup.mask_words), np.uint32)
    lifted_BC, lift_BC = np.full((B, LIFTS), -1, np.int32), np.zeros((B, LIFTS), np.float32)
    for slot, bits_X in masks.items():
      new_B[slot], allowed_BX[slot] = True, bits_X
      own = (lifts or {}).get(slot, {})
      lifted_BC[slot, : len(own)], lift_BC[slot, : len(own)] = [*own], [*own.values()]
    new = self.put((new_B, allowed_BX, lifted_BC, lift_BC))
    return self.run(Program("mask"), state, self.put(change), new)

  def fork(
    self, state: State, source: int, target: int, seed: int, stream: int, attempt: int = 0
  ) -> State:
    """The row at `source`, also at `target`, to go on from here with other noise; `state` is donated.

    Args:
      seed, stream: of the noise of the row at `target`, as in a Request.
    """
    args = *(np.asarray(x, np.int32) for x in (source, target)), noise_key(seed, stream, attempt)
    return self.run(Program("fork"), state, *map(self.put, args))

  def rewind(
    self,
    state: State,
    slot: int,
    request: Request,
    n: int,
    attempt: int,
    prefix: Prefix | None = None,
  ) -> State:
    """The row of `request` as it was after its first `n` tokens, waiting; `state` is donated.

    Args:
      attempt: counts the rewinds of this row; the same number would bring the same tokens again.
      prefix: that rows share; None where none does.
    """
    place, key = np.asarray(slot, np.int32), noise_key(request.seed, request.stream, attempt)
    state = self.run(Program("restart"), state, *map(self.put, (place, key)))
    window = self.setup.window(request.prompt_tokens + n)
    replay = Program("replay", tokens=REPLAY, window=window, prefix=_slots(prefix))
    for start in range(0, n, REPLAY):
      count = np.asarray([min(REPLAY, n - start)], np.int32)
      args = *map(self.put, (place, count)), *_cache(prefix)
      state = self.run(replay, self.weights, state, *args)
    return state

  def resume(self, state: State, prefix: Prefix, slot: int, request: Request) -> State:
    """The State with the request's row in that slot after its `forced_ids`, waiting; `state` is donated.

    The sampler sees the ids as if it had drawn them, so the row goes on as the one whose tokens they were.
    """
    ids, n = request.ids, len(request.forced_ids)
    # The last token of the prompt is fed again: only its logits come from `prefill`, and `force` starts before it.
    len_1, last_1 = (self.put(np.asarray([x], np.int32)) for x in (len(ids) - 1, ids[-1]))
    state = self.insert(state, prefix.replace(len_1=len_1, last_1=last_1), slot, request)
    place = self.put(np.asarray(slot, np.int32))
    program = Program("force", tokens=REPLAY, window=self.setup.capacity)
    for start in range(0, n, REPLAY):
      count = np.asarray([min(REPLAY, n - start)], np.int32)
      state = self.run(program, self.weights, state, place, self.put(count))
    return state

  def score(
    self,
    state: State,
    longest: int,
    suffixes: dict[int, Sequence[int]],
    labels: Sequence[int],
    prefix: Prefix | None = None,
  ) -> dict[int, np.ndarray]:
    """{slot: log p of each label, in nats} after each row's text and a suffix; the rows do not change.

    Args:
      longest: as for `decode`, of the rows that are asked.
      suffixes: slot -> ids, after the last token that was emitted there.
      prefix: that rows share; None where none does.
    """
    T = max(_SUFFIX_LEAST, 1 << (max(map(len, suffixes.values())) - 1).bit_length())
    B = self.setup.config.batch_size
    suffix_BT, n_B = np.zeros((B, T), np.int32), np.zeros((B,), np.int32)
    for slot, ids in suffixes.items():
      suffix_BT[slot, : len(ids)], n_B[slot] = ids, len(ids)
    args = suffix_BT, n_B, np.tile(np.asarray(labels, np.int32), (B, 1))
    sizes = {"window": self.setup.window(longest), "prefix": _slots(prefix)}
    program = Program("score", tokens=T, labels=len(labels), **sizes)
    logp_BY = self.run(program, self.weights, state, *map(self.put, args), *_cache(prefix))
    logp_BY = np.asarray(logp_BY)
    return {slot: logp_BY[slot] for slot in suffixes}

  def decode(
    self,
    state: State,
    longest: int,
    steps: int | None = None,
    prefix: Prefix | None = None,
    rows: int | None = None,
  ) -> tuple[State, jax.Array]:
    """(State, record_NBR) after N steps; `state` is donated.

    Args:
      longest: tokens in the cache of the longest live row before the call, without those in `prefix`; an
        upper bound will do.
      prefix: that rows share; None where none does.
      rows: one of `Setup.row_counts`, of which only the first decode; all when None.
    """
    steps = steps or self.setup.config.steps_per_dispatch
    sizes = {"window": self.setup.window(longest), "prefix": _slots(prefix)}
    rows, count = rows or self.setup.config.batch_size, []
    if self.setup.masks:  # one program for any number of steps up to the usual one
      count = [self.put(np.asarray(steps, np.int32))]
      steps = max(steps, self.setup.config.steps_per_dispatch)
    program = decode_program(self.setup, rows, steps=steps, **sizes)
    if program not in self.compiled:
      program = self._larger(program)
    return self.run(program, self.weights, state, *count, *_cache(prefix))

  def _larger(self, program: Program) -> Program:
    """A decode program that is compiled and does the same with more rows or a larger window; itself without one."""
    most = self.setup.config.batch_size
    able = (
      p
      for p in [*self.compiled]
      if (p.verb, p.steps, p.prefix) == ("decode", program.steps, program.prefix)
      and p.window >= program.window
      and (p.rows or most) >= (program.rows or most)
    )
    return min(able, key=lambda p: (p.window, p.rows or most), default=program)

  def unpack(self, values: np.ndarray) -> dict[str, np.ndarray]:
    """Column name -> values, of a record array fetched from the device."""
    return record.unpack(self.setup, values)


def _slots(prefix: Prefix | None) -> int:
  return 0 if prefix is None else prefix.cache.capacity


def _cache(prefix: Prefix | None) -> list:
  return [] if prefix is None else [prefix.cache]
