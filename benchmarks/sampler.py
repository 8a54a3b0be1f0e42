"""Time samplers: microseconds for a sampler's step, draw and commit, and its share of a decode step.

  python benchmarks/sampler.py --batch=1 --batch=8 --batch=64 --out=runs.jsonl
  python benchmarks/sampler.py --batch=1 --step_ms=180 --only=top_p --only=quadrant

Prints one JSON object per batch size at the end, and --out appends it to a file:

  step_us    per case: time of statistics, step, draw and commit for the whole batch; the median turn
  extra_us   time in excess of `greedy`; the median of the turns' differences
  ratio      (greedy step of the model + extra) / greedy step of the model
  sorts      number of sorts and top-ks over the whole vocabulary in the program; should be 0
  branches   how often the rows took each branch in the last turn

Why: a sampler that sorts 128,256 logits is too expensive, and a ratio of whole steps does not show which
part is slow. Each case gets its logits as input, several steps per dispatch, with the rows' state donated,
as in the engine. All cases and the model's greedy step (random weights, `decode.Ours`) take turns, so that
a drift of the machine affects all of them. Logits are normally distributed, plus a dozen likely ids whose
weight varies by row and step. For a branch of `quadrant` the probabilities are those of its entry in
`CASES`, and all other ids have almost none.
"""

import dataclasses
import functools
import gc
import math
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path += [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]

import decode

from entropix_jax import config, metrics, sampling
from entropix_jax.cli import commands
from entropix_jax.engine.setup import compute_dtype
from entropix_jax.errors import UserError
from entropix_jax.model import linear
from entropix_jax.sampling import draw

_FLAGS = commands.Flags()
_BATCH = _FLAGS.multi_integer("batch", [1, 8, 64], "Rows.", 1)
_VOCAB = _FLAGS.integer("vocab", 128_256, "Vocabulary size.", 1024)
_HISTORY = _FLAGS.integer("history", 1024, "History tokens per row.", 1)
_MODEL = _FLAGS.enum("model", "llama3_1b", list(config.PRESETS), "Model shape of the greedy step.")
_CONTEXT = _FLAGS.integer("context", 64, "Tokens per prompt of the greedy step.", 1)
_STEP_MS = _FLAGS.multi_float(
  "step_ms", [], "Known greedy step time, one per --batch; not measured.", 0
)
_ROUNDS = _FLAGS.integer("rounds", 9, "Turns per case.", 1)
_ONLY = _FLAGS.multi_string("only", [], "Measure only these cases.")
_OUT = _FLAGS.string("out", None, "JSONL file to append to.")

BASE = "greedy"
STEPS = 4  # steps per dispatch, each with its own logits
TURN_S = 0.02  # a turn repeats dispatches this long; one alone is mostly launch overhead


# -- the cases -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """One sampler, its knobs, and the kind of distributions it gets."""

  sampler: str
  knobs: dict[str, Any] = dataclasses.field(default_factory=dict)
  p: tuple[float, ...] = ()  # probabilities of some ids; if empty, see `likely`


def _plain(**knobs) -> Case:
  return Case("plain", {"temperature": 0.8} | knobs)


def _dslider(threshold: float, **knobs) -> Case:
  # The extreme threshold decides whether tokens are unusual; the other knobs rule out `concentrated`.
  return Case(
    "dslider", {"warm_up": 0, "threshold": threshold, "calm_least": 0.0, "calm_sd": 1e3} | knobs
  )


CASES = {
  BASE: _plain(temperature=0.0),
  "temperature": _plain(),
  "top_k": _plain(top_k=40),
  "top_p": _plain(top_p=0.9),
  "min_p": _plain(min_p=0.05),
  "top_n_sigma": _plain(top_n_sigma=1.0),
  "top_h": _plain(top_h=0.4),
  "p_less": _plain(p_less=True),
  "typical_p": _plain(typical_p=0.9),
  "eta": _plain(eta=2e-3),
  "dynatemp": _plain(dynatemp_range=0.5),
  "xtc": _plain(xtc_probability=0.5),
  "mirostat": _plain(mirostat_tau=3.466),
  "adaptive_p": _plain(adaptive_p_target=0.3, min_p=0.05),
  "penalties": _plain(repetition_penalty=1.1, presence_penalty=0.5),
  "dry": _plain(dry_multiplier=0.8),
  "logit_bias": _plain(logit_bias={3: 2.0, 7: -1.0}),
  "quadrant": Case("quadrant"),
  **{
    f"quadrant_{branch}": Case("quadrant", p=tuple(case["p"]))
    for branch, case in sampling.find("quadrant").CASES.items()
  },
  "entropy_target_cool": Case("entropy_target"),
  "entropy_target_steer": Case("entropy_target", {"steer": True}),
  "dslider": Case("dslider"),
  "dslider_dispersed": _dslider(1e6),
  "dslider_mix": _dslider(-1e6, ood_sd=-1e6),
  "dslider_ood": _dslider(-1e6, ood_sd=1e6),
}


def likely(rng, B: int, V: int, p: tuple[float, ...]) -> np.ndarray:
  """logits_NBV of a dispatch: normal noise and some likely ids; with `p` these have all the mass."""
  logits_NBV = 3.0 * rng.standard_normal((STEPS, B, V), np.float32)
  n = len(p) or 12
  id_NBX = rng.integers(V // n, size=(STEPS, B, n)) * n + np.arange(n)
  if p:
    value_NBX = 60.0 + np.broadcast_to(np.log(p), id_NBX.shape)
  else:
    # As likely as all the noise together, times e^-1 to e^4: entropies from near 0 to a few nats.
    value_NBX = math.log(V) + 4.5 + rng.uniform(-1.0, 4.0, id_NBX.shape)
  np.put_along_axis(logits_NBV, id_NBX, value_NBX.astype(np.float32), axis=-1)
  return logits_NBV


# -- what is measured ----------------------------------------------------------------------------------


def blank(sampler, cfg, B: int, V: int, S: int) -> dict[str, Any]:
  """The rows' state between steps; half of the history is prompt."""
  return {
    "memory": sampler.init(cfg, B),
    "history_BS": jax.random.randint(jax.random.key(0), (B, S), 0, V),
    "token_B": jnp.zeros((B,), jnp.int32),
    "pos_B": jnp.full((B,), S // 2, jnp.int32),
  }


def dispatch(sampler, cfg, key_B2, carry, logits_NBV):
  """(carry, record) after one step per given logits_BV: what the engine does after the model."""
  B, S = carry["history_BS"].shape
  row_B = jnp.arange(B)
  some_B = jnp.full((B,), 0.5)
  attn = metrics.AttnStats(
    **{field.name: some_B for field in dataclasses.fields(metrics.AttnStats)}
  )

  def step(carry, logits_BV):
    # As in the engine: materialised once for all of its uses.
    logits_BV = jax.lax.optimization_barrier(logits_BV)
    raw = metrics.spread(logits_BV)
    obs = sampling.Observation(
      logits_BV=logits_BV,
      raw=raw,
      attn=attn,
      token_B=carry["token_B"],
      pos_B=carry["pos_B"],
      key_B2=key_B2,
      history_BS=carry["history_BS"],
      len_B=jnp.full((B,), S, jnp.int32),
      stop_BE=jnp.full((B, 8), -1, jnp.int32),
    )
    decision = sampler.step(cfg, carry["memory"], obs)
    token_B = draw.draw(decision.law_BV, key_B2, carry["pos_B"])
    carry = {
      "memory": sampler.commit(cfg, carry["memory"], decision, token_B),
      "history_BS": carry["history_BS"].at[row_B, carry["pos_B"] % S].set(token_B),
      "token_B": token_B,
      "pos_B": carry["pos_B"] + 1,
    }
    record = {
      "token_B": token_B,
      "branch_B": decision.branch_B,
      "logprob_B": logits_BV[row_B, token_B] - raw.lse,
      "law_B": decision.law_BV[row_B, token_B],
      "raw": raw,
      "stats": decision.stats,
    }
    return carry, record

  return jax.lax.scan(step, carry, logits_NBV)


def sorts(jaxpr, V: int) -> int:
  """Number of sorts and top-ks along an axis of V or more in a jaxpr and all that it calls."""
  found = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("sort", "top_k", "approx_top_k"):
      axis = eqn.params.get("dimension", eqn.params.get("reduction_dimension", -1))
      found += eqn.invars[0].aval.shape[axis] >= V
    inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    found += sum(sorts(x, V) for x in inner if hasattr(x, "eqns"))
  return found


@functools.cache
def sorts_of(sampler, B: int, V: int, S: int) -> int:
  """Number of whole-vocabulary sorts in a sampler's program; only traced, nothing is allocated."""
  cfg = sampling.arrays(sampling.configure(sampler, {}), B)
  carry = jax.eval_shape(lambda: blank(sampler, cfg, B, V, S))
  key_B2 = jax.ShapeDtypeStruct((B, 2), jnp.uint32)
  logits_NBV = jax.ShapeDtypeStruct((STEPS, B, V), jnp.float32)
  run = jax.make_jaxpr(lambda *args: dispatch(sampler, *args))
  return sorts(run(cfg, key_B2, carry, logits_NBV), V)


@functools.cache
def program(name: str) -> Callable:
  """The dispatches of a sampler; its cases differ only in arrays and share one."""
  sampler = sampling.find(name)
  return jax.jit(lambda *args: dispatch(sampler, *args), donate_argnums=2)


class Contestant:
  """A case with its rows; `turn` returns the seconds of one step."""

  def __init__(self, case: Case, B: int, V: int, S: int, logits_NBV: jax.Array):
    sampler = sampling.find(case.sampler)
    cfg = jax.tree.map(jnp.asarray, sampling.arrays(sampling.configure(sampler, case.knobs), B))
    zero_B = jnp.zeros((B,), jnp.uint32)
    key_B2 = draw.row_keys(jnp.zeros((B, 2), jnp.uint32), jnp.arange(B, dtype=jnp.uint32), zero_B)
    self.cfg, self.key_B2, self.names = cfg, key_B2, sampler.BRANCHES
    # Through jit, because a donated tree must not hold one buffer twice.
    self.carry = jax.jit(lambda: blank(sampler, cfg, B, V, S))()
    self.logits_NBV, self.program = logits_NBV, program(case.sampler)
    self.sorts = sorts_of(sampler, B, V, S)
    self.times = 1
    self.turn()  # compiles
    self.turn()  # warm-up: touches all memory once
    self.times = math.ceil(TURN_S / (STEPS * self.turn()))

  def turn(self) -> float:
    start = time.perf_counter()
    for _ in range(self.times):
      self.carry, self.record = self.program(self.cfg, self.key_B2, self.carry, self.logits_NBV)
    jax.block_until_ready((self.carry, self.record))
    return (time.perf_counter() - start) / (self.times * STEPS)

  def branches(self) -> dict[str, int]:
    return dict(Counter(self.names[i] for i in np.asarray(self.record["branch_B"]).ravel()))


class Step:
  """The model's greedy decode step; `turn` returns the seconds of one."""

  def __init__(self, cfg: config.ModelConfig, params, batch: int, context: int, rounds: int):
    self.steps = config.EngineConfig().steps_per_dispatch if batch == 1 else STEPS
    room = step_room(context, rounds)
    shapes = config.EngineConfig(batch_size=batch, max_seq_len=room, steps_per_dispatch=self.steps)
    prompt_BT = np.random.default_rng(0).integers(cfg.vocab, size=(batch, context))
    self.ours = decode.Ours(cfg, params, "plain", shapes, {"temperature": 0.0}, prompt_BT)
    for _ in range(decode.WARM):
      self.turn()

  def turn(self) -> float:
    return self.ours.turn() / self.steps


def step_room(context: int, rounds: int) -> int:
  """Positions that a row of the greedy step needs."""
  return context + 2 + (decode.WARM + rounds) * config.EngineConfig().steps_per_dispatch


def needed_bytes(cases: dict[str, Case], batch: int, cfg: config.ModelConfig, room: int) -> float:
  """Bytes that a batch allocates besides the weights: all logits, scratch, keys and values."""
  kinds = len({case.p for case in cases.values()})
  vectors = (kinds + 4) * STEPS * batch * _VOCAB.value * 4
  itemsize = compute_dtype("auto").itemsize
  cache = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * room * batch * itemsize
  return vectors + (0 if _STEP_MS.value else 2 * cache)


def measure(
  cases: dict[str, Case], batch: int, step: Step | None, step_ms: float
) -> dict[str, Any]:
  """The contents of one line, except the machine."""
  shape = batch, _VOCAB.value, _HISTORY.value
  logits = {
    p: jnp.asarray(likely(np.random.default_rng(0), *shape[:2], p))
    for p in {c.p for c in cases.values()}
  }
  contestants = {name: Contestant(case, *shape, logits[case.p]) for name, case in cases.items()}
  timed: dict[str, Any] = contestants | ({"": step} if step else {})
  gc.collect()
  gc.disable()
  turns = [{name: one.turn() for name, one in timed.items()} for _ in range(_ROUNDS.value)]
  gc.enable()

  def median(per_turn) -> float:
    return float(np.median([per_turn(turn) for turn in turns]))

  if step:
    step_ms = median(lambda turn: turn[""]) * 1e3
  extra_us = {
    name: median(lambda turn: turn[name] - turn[BASE]) * 1e6  # noqa: B023
    for name in cases
  }
  return {
    "batch": batch,
    "step_ms": step_ms,
    "step_given": step is None,
    "step_us": {name: median(lambda turn: turn[name]) * 1e6 for name in cases},  # noqa: B023
    "extra_us": extra_us,
    "ratio": {name: 1.0 + us / 1e3 / step_ms for name, us in extra_us.items()},
    "sorts": {name: one.sorts for name, one in contestants.items()},
    "branches": {name: one.branches() for name, one in contestants.items()},
    "vocab": _VOCAB.value,
    "history": _HISTORY.value,
    "rounds": _ROUNDS.value,
    "model": _MODEL.value,
    "context": _CONTEXT.value,
  }


def table(result: dict[str, Any]) -> str:
  """The figures as readable text."""
  how = "given" if result["step_given"] else "measured, random weights"
  lines = [
    "batch {batch}, {vocab} ids, {history} tokens of history, {rounds} turns on {device}; greedy step "
    "of {model}: {step_ms:.4g} ms".format(**result)
    + f" ({how})",
    f"{'':22}{'us':>10}{'over greedy':>13}{'of the step':>13}{'sorts':>7}  branches",
  ]
  for name, us in result["step_us"].items():
    lines.append(
      f"{name:22}{us:10.0f}{result['extra_us'][name]:13.0f}{result['ratio'][name]:13.4f}"
      f"{result['sorts'][name]:7}  {result['branches'][name]}"
    )
  return "\n".join(lines)


def _chosen() -> dict[str, Case]:
  """The selected cases, always with the base. Raises UserError for inconsistent flags."""
  unknown = [name for name in _ONLY.value if name not in CASES]
  if unknown:
    raise UserError(f"There is no case {unknown[0]!r}; choose from: {', '.join(CASES)}.")
  if _STEP_MS.value and len(_STEP_MS.value) != len(_BATCH.value):
    raise UserError(
      f"--step_ms is given {len(_STEP_MS.value)} times for {len(_BATCH.value)} batches; give one each."
    )
  for ms in _STEP_MS.value:
    if not 0 < ms < math.inf:
      raise UserError(f"--step_ms={ms:g} is no time of a step; give the milliseconds of one.")
  return {n: case for n, case in CASES.items() if not _ONLY.value or n in (BASE, *_ONLY.value)}


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  cases = _chosen()
  cfg = dataclasses.replace(config.PRESETS[_MODEL.value], vocab=_VOCAB.value)
  room, context = step_room(_CONTEXT.value, _ROUNDS.value), _CONTEXT.value
  if room > cfg.max_position:
    raise UserError(
      f"The model has {cfg.max_position} positions and {room} are needed; lower --context."
    )
  dtype = compute_dtype("auto")
  finish = linear.transposer(dtype)
  params = None if _STEP_MS.value else decode.random_weights(cfg, dtype, finish=finish)

  lines = []
  for i, batch in enumerate(_BATCH.value):
    need, free = needed_bytes(cases, batch, cfg, room), decode.free_bytes()
    if need > free:
      commands.say(
        f"Batch {batch} is left out: it needs {need / 1e9:.1f} GB and {free / 1e9:.1f} are free."
      )
      continue
    step = None if params is None else Step(cfg, params, batch, context, _ROUNDS.value)
    step_ms = _STEP_MS.value[i] if step is None else math.nan
    result = {"benchmark": "sampler"} | measure(cases, batch, step, step_ms) | decode.machine()
    del step
    gc.collect()
    print(table(result), end="\n\n", flush=True)
    lines.append(commands.keep(out, result))
  if not lines:
    raise UserError("No batch fits the memory that is free; give a smaller --batch.")
  print("\n".join(lines), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
