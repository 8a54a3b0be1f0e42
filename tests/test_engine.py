"""Metamorphic tests of the engine: what must not change a request's tokens, laws and statistics."""

import dataclasses
import functools
import re

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tired
from conftest import TINY, refusal

from entropix_jax import errors, sampling, scheduler
from entropix_jax.config import EngineConfig, RopeConfig
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program, compiler_options
from entropix_jax.engine.request import Request, check_request
from entropix_jax.engine.setup import Setup
from entropix_jax.engine.state import Prefix
from entropix_jax.engine.step import decode
from entropix_jax.model import kvcache, llama, quant, weights
from entropix_jax.sampling import plain

SMALL = dataclasses.replace(TINY, layers=2, tied=False)
PROMPTS = ([3, 1, 4], [9, 2, 6, 5, 3, 5, 8, 9, 7], [11] * 30, [7], list(range(20, 90)))
# Knobs with which real samplers reach their branches in random text.
KNOBS = {
  "plain": {"mirostat_tau": 1.5, "repetition_penalty": 1.2},
  "quadrant": {"high_varent": 0.5, "low_ent": "q40", "low_varent": "q90"},
}


class Words:
  """A tokenizer whose tokens are words, for the host loop."""

  def decode_bytes(self, ids, show_control=False):
    return "".join(f"{i} " for i in ids).encode()


@functools.cache
def small_weights(seed=3):
  """Of a model that does not repeat itself, as a tied one with random weights does."""
  w = weights.random(SMALL, jnp.float32, seed=seed)
  return w.replace(head_DV=w.head_DV * 15.0)


@functools.cache
def engine(sampler=tired, rows=5, **changes):
  """Engines are shared between tests: what they compile is most of the time spent here."""
  sampler = sampling.find(sampler) if isinstance(sampler, str) else sampler
  config = EngineConfig(**{"batch_size": rows, "max_seq_len": 256} | changes)
  return Engine.create(SMALL, small_weights(), sampler, config)


@functools.cache
def engine_for_knobs(name):
  """An engine for requests with KNOBS of that sampler."""
  sampler, config = sampling.find(name), EngineConfig(5, 256)
  used = sampling.varying(sampler, KNOBS.get(name, {}))
  return Engine(Setup.create(SMALL, sampler, config, varying=used), small_weights())


# What decoding methods look at.
ENGINES = {"confidence": 20, "top_logprobs": 4}


def six():
  """The engine of six rows that most tests of methods share."""
  return engine(rows=6, **ENGINES)


def requests(new=24):
  return [Request(ids, new - 2 * i, seed=100 + i) for i, ids in enumerate(PROMPTS)]


def decoder_of(e):
  """The decoder of an engine; a decoder itself."""
  return e if isinstance(e, PlainDecoder) else PlainDecoder(e)


def tokens_of(e, requests):
  """The tokens that an engine or a decoder gives."""
  decoder = decoder_of(e)
  return list(scheduler.generate(decoder.engine, Words(), requests, decoder=decoder))


class ByHand:
  """The rows of an engine or a decoder, driven step by step."""

  def __init__(self, e):
    self.decoder = decoder_of(e)
    self.decoder.begin()
    self.engine = self.decoder.engine
    self.state = self.engine.init()

  def insert(self, slot, request):
    self.state = self.engine.insert(self.state, self.engine.prefill(request), slot, request)
    self.decoder.inserted(slot, request)
    self.state, record = self.engine.first(self.state, [slot])
    self.decoder.first()
    return self.engine.unpack(np.asarray(record)[[slot]])

  def decode(self, longest):
    self.state, record = self.decoder.decode(self.state, longest)
    return self.engine.unpack(np.asarray(record))

  def fork(self, source, target, *noise):
    self.state = self.engine.fork(self.state, source, target, *noise)
    self.decoder.forked(source, target)


def run(e, requests):
  """Per request: ids and the (tokens, columns) array of everything reported."""
  tokens = tokens_of(e, requests)
  each = [[t for t in tokens if t.prompt == i] for i in range(len(requests))]
  numbers = [np.asarray([list(t.numbers.values()) for t in mine]) for mine in each]
  return [[t.id for t in mine] for mine in each], numbers


def assert_same(a, b, atol=2e-4):
  """Equal tokens, and laws and statistics within float32 tolerance."""
  assert a[0] == b[0]
  for x, y in zip(a[1], b[1], strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=1e-3)


def assert_live_same(one, two, exact=False):
  """Equal flags, and where they say that there is a token, equal columns of unpacked records."""
  live = one["flags"] > 0
  np.testing.assert_array_equal(live, two["flags"] > 0)
  tolerance = {} if exact else {"atol": 2e-4, "rtol": 1e-3}
  same = np.testing.assert_array_equal if exact else np.testing.assert_allclose
  for column in one:
    same(one[column][live], two[column][live], err_msg=column, **tolerance)


@functools.cache
def alone():
  """(ids, numbers) of each request by itself: the other slots are idle."""
  ids, numbers = zip(*(run(engine(), [r]) for r in requests()), strict=True)
  return [x for (x,) in ids], [x for (x,) in numbers]


def assert_as_alone(e, order=range(5)):
  """Five prompts of different lengths, limits and seeds, in this order."""
  got = run(e, [requests()[i] for i in order])
  assert_same(got, tuple([column[i] for i in order] for column in alone()))


def test_a_batch_gives_each_row_what_it_gets_alone():
  assert_as_alone(engine())
  assert [len(ids) for ids in alone()[0]] == [24, 22, 20, 18, 16]


def test_slots_and_order_of_arrival_do_not_matter():
  assert_as_alone(engine(), range(4, -1, -1))


def test_first_tokens_leave_other_rows_alone():
  rows = ByHand(engine())
  for slot, request in enumerate(requests()[:2]):
    rows.insert(slot, request)
  assert rows.state.live_B[:2].tolist() == [True, True]
  assert rows.state.out_B[:2].tolist() == [1, 1]


def test_more_requests_than_slots():
  """Slots are used again by shorter prompts: what the last tenant left must not be seen."""
  assert_as_alone(engine(rows=2), [4, 2, 1, 0, 3])


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_per_dispatch_do_not_matter(steps):
  assert_as_alone(engine(steps_per_dispatch=steps))


def test_cache_size_and_window_do_not_matter(monkeypatch):
  wide = engine(max_seq_len=1000)
  assert wide.setup.capacity == 1024
  assert_as_alone(wide)
  monkeypatch.setattr(Setup, "window", lambda self, n: 1024)
  assert_as_alone(wide)


def test_prefill_bucket_and_chunks_do_not_matter(monkeypatch):
  pieces = engine(prefill_chunk=16)
  assert pieces.setup.bucket(70) == (16, 128)
  assert_as_alone(pieces)
  monkeypatch.setattr(Setup, "bucket", lambda self, n: (256, 256))
  assert_as_alone(Engine(engine().setup, small_weights()))


SIXTEEN = (
  {"temperature": 0.0},
  {"temperature": 1.3, "min_p": 0.1},
  {"top_k": 5, "temperature": 0.7},
  {"top_p": 0.8},
  {"top_n_sigma": 1.0},
  {"top_h": 0.4, "temperature": 1.5},
  {"p_less": True},
  {"typical_p": 0.8, "eta": 0.01},
  {"dynatemp_range": 0.5, "temperature_last": True, "top_k": 20},
  {"edt_theta": 1.0, "epsilon": 0.01},
  {"xtc_probability": 0.5, "xtc_threshold": 0.05},
  {"mirostat_tau": 1.5},
  {"adaptive_p_target": 0.4, "min_p": 0.05},
  {"dry_multiplier": 0.8, "repetition_penalty": 1.2, "temperature": 0.5},
  {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {3: 4.0}},
  {"banned": [1, 4], "temperature": 0.9},
)


def test_sixteen_settings_side_by_side_each_as_alone():
  e = engine("plain")
  todo = [Request(PROMPTS[i % 5], 20, seed=i, knobs=knobs) for i, knobs in enumerate(SIXTEEN)]
  together = run(e, todo)
  for i, request in enumerate(todo):
    assert_same(run(e, [request]), ([together[0][i]], [together[1][i]]))
  assert len({tuple(ids) for ids in together[0]}) >= 12


def test_what_no_request_uses_need_not_be_compiled():
  """The same texts from an engine that was compiled for the knobs in use only; others are refused by name."""
  knobs = {"temperature": 0.8, "min_p": 0.05, "frequency_penalty": 0.5, "banned": [1, 4]}
  todo = [Request(ids, 16, seed=i, knobs=knobs) for i, ids in enumerate(PROMPTS)]
  todo[1] = dataclasses.replace(todo[1], knobs={})
  config, used = engine("plain").setup.config, sampling.varying(plain, knobs)
  assert {"top_p", "presence_penalty", "logit_bias"} < {*used}
  assert not {"top_k", "xtc_probability", "dry_base"} & {*used}
  few = Engine(Setup.create(SMALL, plain, config, varying=used), small_weights())
  assert_same(run(few, todo), run(engine("plain"), todo))
  check_request(few.setup, Request([1], knobs={"top_k": 0}))  # as it is anyway
  refusal(["without the knob 'top_k'"], check_request, few.setup, Request([1], knobs={"top_k": 5}))
  program = few.setup.config.steps_per_dispatch, few.setup.windows[0]
  sizes = [
    len(e.lower(Program("decode", steps=program[0], window=program[1])).as_text())
    for e in (few, engine("plain"))
  ]
  assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize(
  ("knobs", "found"),
  [
    ({"temperature": 0.0}, {"conditional": 3, "while": 0}),
    # The two loops are XLA:CPU's scatters, which count tokens.
    ({"min_p": 0.1, "repetition_penalty": 1.1}, {"conditional": 4, "while": 2}),
  ],
)
def test_on_a_gpu_plain_has_no_loop_and_conditions_of_the_knobs_in_use_only(knobs, found):
  """Of sampling, top-p and min-p, and one for each further family. What is lowered for CUDA is compiled here only so
  that constant cases fold away."""
  setup = dataclasses.replace(engine("plain").setup, varying=sampling.varying(plain, knobs))
  args = sampling.arrays(sampling.configure(plain, {}), 5), contract.observe(np.zeros((5, 97)))

  def step(cfg, obs):
    cfg = setup.constants(cfg)
    return plain.step(cfg, plain.init(cfg, 5), obs).law_BV

  checks = [jax.export.DisabledSafetyCheck.platform()]
  there = jax.export.export(jax.jit(step), platforms=("cuda",), disabled_checks=checks)(*args)
  text = jax.jit(there.call).lower(*args).compile().as_text()
  assert {op: len(re.findall(rf"\b{op}\(", text)) for op in found} == found


def test_loops_are_captured_where_that_is_asked_for():
  """And only by programs for a GPU; what the compiler makes of it, no test here can see."""
  setup = engine().setup
  for platform, graphs, captured in (("gpu", "loops", 1), ("gpu", "auto", 0), ("cpu", "loops", 0)):
    config = dataclasses.replace(setup.config, graphs=graphs)
    other = dataclasses.replace(setup, platform=platform, config=config)
    options = compiler_options(other, small_weights())
    assert options.get("xla_gpu_enable_command_buffer", "").count("WHILE") == captured


def test_kinds_of_samplers_share_weights_and_nothing_else():
  """One engine for each; running one between two runs of another changes neither."""
  kinds = sampling.names()
  todo = [Request(ids, 16, seed=i) for i, ids in enumerate(PROMPTS)]
  first = [run(engine(name), todo) for name in kinds]
  again = [run(engine(name), todo) for name in reversed(kinds)]
  for name, a, b in zip(kinds, first, reversed(again), strict=True):
    assert_same(a, b, atol=0)
    assert_same(run(engine(name), todo[2:3]), ([a[0][2]], [a[1][2]]))


def poisoned(state, k, v):
  """A State or a Prefix with everything in its cache that was never written replaced."""
  len_B = state.len_1 if isinstance(state, Prefix) else state.len_B
  len_B = len_B - getattr(state, "shared_B", 0)
  dead_BS = jnp.arange(state.cache.capacity) >= len_B[:, None]

  def put(x_BKSH, value):
    return jnp.where(dead_BS[:, None, :, None], value, x_BKSH).astype(x_BKSH.dtype)

  cache = kvcache.Cache(
    tuple(put(x, k) for x in state.cache.k), tuple(put(x, v) for x in state.cache.v)
  )
  return state.replace(cache=cache)


@pytest.mark.parametrize(("k", "v"), [(1e30, -1e30), (np.nan, 1e30)])
def test_unwritten_slots_may_hold_anything(k, v):
  """Scores of dead slots are replaced before use, so NaN keys are harmless; a dead value is only
  multiplied by an exact zero, so it must be finite."""
  e = engine()

  def go(spoil):
    state = spoil(e.init())
    for slot, request in enumerate(requests()[:4]):
      state = e.insert(state, spoil(e.prefill(request)), slot, request)
    state, record = e.first(state, range(4))
    records, state = [record], spoil(state)
    for i in range(2):
      state, record = e.decode(state, 31 + 8 * i)
      records.append(record)
    return [e.unpack(np.asarray(record)) for record in records]

  dirty = go(lambda state: poisoned(state, k, v))
  for one, two in zip(go(lambda state: state), dirty, strict=True):
    assert_live_same(one, two, exact=True)


def test_prefill_then_decode_equals_one_full_forward():
  """Position by position: raw log-probability, entropy and varentropy of the greedy text."""
  e = engine()
  prompt = PROMPTS[1]
  request = Request(prompt, 20, knobs={"temperature": 0.0})
  tokens = tokens_of(e, [request])
  text = [*prompt, *(t.id for t in tokens)]
  x_BTD, _, _ = llama.forward(e.setup.cfg, e.weights, jnp.asarray([text]))
  logits = np.asarray(llama.unembed(e.weights, x_BTD)[0], np.float64)
  for i, token in enumerate(tokens):
    logp = oracles.log_softmax(logits[len(prompt) - 1 + i])
    assert token.id == int(np.argmax(logp))
    ent, varent = oracles.ent_varent(np.exp(logp))
    got = [token.numbers[n] for n in ("logprob", "logprob_law", "entropy", "varentropy")]
    np.testing.assert_allclose(got, [logp[token.id], 0.0, ent, varent], atol=2e-4)


@pytest.mark.parametrize("n", [512, 513, 769])
def test_a_long_prompt_in_pieces_equals_one_pass(n):
  """Around the edges of a piece and of the blocks in which a CPU reads the cache."""
  e = engine(max_seq_len=1000, prefill_chunk=512)
  ids = np.random.default_rng(n).integers(SMALL.vocab, size=n).tolist()
  x_BTD, _, _ = llama.forward(e.setup.cfg, e.weights, jnp.asarray([ids]))
  want_V = llama.unembed(e.weights, x_BTD)[:, -1]
  np.testing.assert_allclose(e.prefill(Request(ids)).logits_1V, want_V, atol=1e-4)


def test_jit_does_not_matter():
  e = engine()
  request = requests()[1]
  state, _ = e.first(e.insert(e.init(), e.prefill(request), 2, request), [2])
  once = functools.partial(decode, e.setup, e.weights, state, steps=1, window=128)
  jitted = jax.jit(once)()[1]
  with jax.disable_jit():
    plain = once()[1]
  a, b = (e.unpack(np.asarray(x)) for x in (jitted, plain))
  assert a["id"][0, 2] == b["id"][0, 2]
  for column in a:
    np.testing.assert_allclose(a[column][0, 2], b[column][0, 2], atol=1e-4, rtol=1e-4)


def test_a_request_ends_at_its_limit_and_at_the_end_of_the_cache():
  e = engine()
  assert [len(x) for x in run(e, [Request([1, 2], 1), Request([1, 2], 2)])[0]] == [1, 2]
  full = tokens_of(e, [Request(list(range(1, 201)), 10_000)])
  assert len(full) == 256 - 200
  assert full[-1].finish == "length"


def test_a_stop_id_ends_the_text_and_is_reported():
  e = engine()
  request = Request(PROMPTS[0], 24, seed=5)
  ids = run(e, [request])[0][0]
  stop = ids[9]
  first = ids.index(stop)
  tokens = tokens_of(e, [dataclasses.replace(request, stop=(stop,))])
  assert [t.id for t in tokens] == ids[: first + 1]
  assert [t.finish for t in tokens] == [None] * first + ["stop"]
  assert tokens[-1].text == ""


def test_seed_and_stream_and_settings_are_per_row():
  e = engine()
  base = Request(PROMPTS[0], 24, seed=1)
  variants = [
    base,
    dataclasses.replace(base, seed=2),
    dataclasses.replace(base, stream=1),
    dataclasses.replace(base, knobs={"temperature": 0.0}),
    dataclasses.replace(base, knobs={"temperature": 0.0}, seed=2),
  ]
  ids, _ = run(e, variants)
  assert ids[3] == ids[4]
  assert len({tuple(x) for x in ids}) == 4


# -- the compiled program --------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
  """A list that grows by one with every program the backend compiles."""
  seen = []

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_after_warm_up(compilations):
  """Other prompts, lengths, seeds, limits, stop ids and every knob: all of it is data."""
  e = Engine(engine("plain").setup, small_weights())
  warm = [Request(PROMPTS[0], 20), Request(PROMPTS[4][:64], 30)]
  run(e, warm[:1])
  assert compilations  # the counter can count
  PlainDecoder(e).compile(warm)
  run(e, warm)
  compilations.clear()
  rng = np.random.default_rng(0)
  knobs = {k: v for k, v in sampling.knobs(e.setup.sampler).items() if isinstance(v, float) and v}
  for _ in range(3):
    todo = []
    for n in rng.integers(1, 60, 4):
      new = {k: v * rng.uniform(0.6, 1.0) for k, v in knobs.items()}
      new |= {"banned": [1, 2], "logit_bias": {3: 0.5}, "top_k": 9}
      ids, stop = (rng.integers(0, 211, size).tolist() for size in (n, 3))
      todo.append(Request(ids, int(rng.integers(1, 40)), int(n), stop=stop, knobs=new))
    run(e, todo)
  assert not compilations


def test_the_state_is_donated():
  """The compiled decode writes its cache in place, and the caller's arrays are gone."""
  e = engine(max_seq_len=4096)  # large, so that a copy of the cache would be seen
  state = e.init()
  cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.cache))
  program = Program("decode", steps=8, window=128)
  memory = e.compiled[program].memory_analysis()
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < cache_bytes / 8
  after, _ = e.decode(state, 1)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))
  assert not any(x.is_deleted() for x in jax.tree.leaves(after.cache))


def test_one_copy_to_host_a_dispatch(monkeypatch):
  """Each dispatch's record starts its copy at once and is read once; nothing else is read."""
  e = engine()
  log = []

  class Spy:
    def __init__(self, record, name):
      self.record, self.name = record, name

    def copy_to_host_async(self):
      log.append(("start", self.name))
      self.record.copy_to_host_async()

    def __array__(self, dtype=None, copy=None):
      log.append(("read", self.name))
      return np.asarray(self.record)

  def spy(verb, call):
    def spied(*args, **kwargs):
      out, record = call(*args, **kwargs)
      return out, Spy(record, f"{verb}{sum(kind == 'start' for kind, _ in log)}")

    monkeypatch.setattr(e, verb, spied)

  spy("first", e.first)
  spy("decode", e.decode)
  tokens = tokens_of(e, [Request(PROMPTS[0], 33)])
  assert len(tokens) == 33
  starts = [n for kind, n in log if kind == "start"]
  reads = [n for kind, n in log if kind == "read"]
  assert starts == reads == ["first0", "decode1", "decode2", "decode3", "decode4"]
  # The device is kept busy: dispatch k + 1 is sent before the record of k is read.
  assert log.index(("start", "decode2")) < log.index(("read", "decode1"))


def test_logits_are_one_value():
  """The vocabulary is read once per step: one product with the head in the decode program."""
  text = engine().compiled[Program("decode", steps=8, window=128)].as_text()
  products = [
    line for line in text.splitlines() if " dot(" in line and "211" in line.split("dot(")[0]
  ]
  assert len(products) == 1


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"ids": []}, "empty"),
    ({"ids": [1] * 256}, "leaves no room"),
    ({"ids": [211]}, "outside the model's vocabulary"),
    ({"max_new_tokens": 0}, "at least 1"),
    ({"stop": range(33)}, "32 stop ids"),
    ({"knobs": {"heat": 1.0}}, "no knob 'heat'"),
    ({"seed": 2**65}, "64 bits"),
  ],
)
def test_bad_requests_are_refused_before_any_work(change, message):
  with pytest.raises(errors.UserError, match=message):
    next(
      scheduler.generate(engine("plain"), Words(), [dataclasses.replace(Request([1]), **change)])
    )


def test_a_cache_beyond_the_models_positions_is_refused():
  with pytest.raises(errors.UserError, match="8192 positions of this model; lower"):
    engine(max_seq_len=10_000)
  dynamic = dataclasses.replace(SMALL, rope=RopeConfig(kind="dynamic"))
  with pytest.raises(errors.UserError, match="dynamic rope depends on the length"):
    Setup.create(dynamic, tired, EngineConfig(4, 10_000))


@pytest.mark.parametrize(
  ("int8", "changes", "words"),
  [
    (False, {"weights": "int8"}, "are float32 where config.engine.weights is int8"),
    (True, {}, "are int8 and float32 where config.engine.weights is auto"),
    (False, {"dtype": "bfloat16"}, "config.engine.dtype is bfloat16"),
  ],
)
def test_weights_that_are_not_what_the_settings_say_are_refused(int8, changes, words):
  given = quant.weights(SMALL, small_weights()) if int8 else small_weights()
  with pytest.raises(errors.UserError, match=words):
    Engine.create(SMALL, given, tired, EngineConfig(2, 128, **changes))
