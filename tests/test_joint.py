"""Several models on one text: what each sees, what is mixed, and that one model cannot tell the difference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from test_engine import ENGINES, PROMPTS, SMALL, Words, engine, run, tokens_of
from test_groups import OPTIONS, go, make
from test_rows import drain, ids

from entropix_jax import errors
from entropix_jax.config import EngineConfig
from entropix_jax.decoding import joint, mixing
from entropix_jax.decoding.drafters import DraftModel, Ngram
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.engine.state import blank
from entropix_jax.model import llama, weights
from entropix_jax.rows import Rows
from entropix_jax.scheduler import generate

V = SMALL.vocab
STOP = 200  # ends a text of the first model; the second ends by 201


@functools.cache
def other(rows=5, **changes):
  """A model of other width and depth than that of `engine`, so that no cache can be taken for the other."""
  cfg = dataclasses.replace(SMALL, layers=1, kv_heads=3, head_dim=8, ffn=64)
  w = weights.random(cfg, jnp.float32, seed=4)
  return Engine.create(
    cfg, w.replace(head_DV=w.head_DV * 15.0), tired, EngineConfig(rows, 256, **changes)
  )


@functools.cache
def pair(way="revive", rows=5, stops=((STOP,), (201,)), banned=(205,), changes=(), knobs=()):
  """The joint engine of a way to mix, whose further models have the second entry of `stops`, and `banned`."""
  engines = singles(len(mixing.find(way).MODELS), rows, **dict(changes))
  tables, further = (np.arange(V) % 4 == 0, (np.arange(V) % 3).astype(np.int8)), len(engines) - 1
  align = {"stops": [stops[0], *stops[1:] * further], "banned": [(), *[banned] * further]}
  setups = [e.setup for e in engines]
  align |= {"canonical": STOP, "tables": tables}
  setup = joint.setup(setups, mixing.find(way), dict(knobs), **align)
  return Engine(setup, tuple(e.weights for e in engines))


def singles(k=2, rows=5, **changes):
  """The engines of the k models by themselves."""
  return [engine(rows=rows, **changes), *[other(rows, **changes)] * (k - 1)]


def request(i=1, new=24, k=1, **changes):
  """The other models' prompts are longer or shorter than the main model's."""
  beside = [[*range(60, 60 + n)] for n in (17, 2)][:k]
  base = Request(PROMPTS[i], new, seed=5, stop=(STOP,), beside=beside)
  return dataclasses.replace(base, **changes)


WAYS = mixing.names()


@functools.cache
def last_logits(part):
  """ids of at most 128 tokens -> logits of the last one's successor, by one full pass."""

  @jax.jit
  def run(token_1T, n):
    x_BTD, _, _ = llama.forward(part.setup.cfg, part.weights, token_1T)
    x_1D = jax.lax.dynamic_index_in_dim(x_BTD, n - 1, axis=1, keepdims=False)
    return llama.unembed(part.weights, x_1D)

  return lambda ids: run(jnp.asarray([[*ids, *[0] * (128 - len(ids))]]), len(ids))


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_full_passes_mixed_at_every_token(way):
  """Each model fed its own prompt and the text so far: no cache, no batch."""
  k = len(mixing.find(way).MODELS) - 1
  e = pair(way)

  @jax.jit
  def mix(logits, rows, id_B):
    logits_BV, stats, commit = e.setup.model.mix(rows, logits)
    return logits_BV, stats, commit(id_B)

  todo = [request(i, 16, k) for i in range(4)]
  tokens = list(generate(e, Words(), todo))
  for p, r in enumerate(todo):
    mine = [t for t in tokens if t.prompt == p]
    rows = blank(e.setup, 1, 64)
    stop_BE = jnp.asarray([[STOP, *[-1] * 7]], jnp.int32)
    for n, token in enumerate(mine):
      said = [t.id for t in mine[:n]]
      prompts = (r.ids, *r.beside)
      logits = tuple(
        last_logits(part)([*prompt, *said])
        for part, prompt in zip(singles(k + 1), prompts, strict=True)
      )
      fed = jnp.asarray([said[-1] if said else r.ids[-1]], jnp.int32)
      rows = rows.replace(token_B=fed, out_B=jnp.asarray([n], jnp.int32), stop_BE=stop_BE)
      logits_BV, stats, state = mix(logits, rows, jnp.asarray([token.id], jnp.int32))
      logp = np.asarray(jax.nn.log_softmax(logits_BV))[0]
      assert token.numbers["logprob"] == pytest.approx(logp[token.id], abs=1e-3)
      for name, value in stats.items():
        assert token.numbers[name] == pytest.approx(float(value[0]), abs=1e-3), name
      rows = rows.replace(model_state=state)


@pytest.mark.parametrize(
  ("way", "knobs"),
  [
    ("revive", {"weight": 0.0}),
    ("proxy", {"alpha": 0.0}),
    ("contrastive", {"beta": 0.0, "cut": 0.0}),
    ("nudge", {"sure": 0.0}),
  ],
)
def test_who_speaks_alone_says_what_it_says_alone(way, knobs):
  r = request(k=len(mixing.find(way).MODELS) - 1)
  e = pair(way, stops=((STOP,), (STOP,)), knobs=tuple(knobs.items()))
  assert run(e, [r])[0] == run(engine(), [dataclasses.replace(r, beside=())])[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_gives_each_row_what_it_gets_alone(way):
  k = len(mixing.find(way).MODELS) - 1
  e = pair(way)
  todo = [request(i, 24 - i, k, seed=i) for i in range(5)]
  together = run(e, todo)
  for i, r in enumerate(todo):
    assert run(e, [r])[0][0] == together[0][i]


@pytest.mark.parametrize("way", WAYS)
def test_forks_waits_and_rewinds_carry_what_is_mixed(way):
  k = len(mixing.find(way).MODELS) - 1
  e = pair(way)
  r = request(k=k)
  want = run(e, [r])[0][0]
  marked = dataclasses.replace(r, actions={"fork_ent": 0.3, "fork_wait": True})
  rows = Rows(e, Words())
  row = rows.admit(marked, rows.engine.prefill(marked))
  events = drain(rows)
  while not row.done:  # the first wait is before the first token, behind the prompts
    rows.wake(row)
    events += drain(rows)
  assert ids(events) == want
  rows = Rows(e, Words())
  row = rows.admit(r, rows.engine.prefill(r), limit=7)
  events = drain(rows)
  rows.fork(row, sample=1, stream=0)
  rows.wake(row)
  more = drain(rows)
  assert ids(events) + ids(more) == ids(events) + ids(more, 1) == want
  rows = Rows(e, Words())
  row = rows.admit(r, rows.engine.prefill(r), limit=20)
  said = ids(drain(rows))
  n = min(9, len(said) - 1)
  state = e.steer(e.rewind(rows.state, row.slot, r, n, 0), live={row.slot: True})
  _, record = e.decode(state, 64, 8)
  again = e.unpack(np.asarray(record))
  got = again["id"][again["flags"][:, row.slot] > 0, row.slot].tolist()
  assert got[:5] == want[n : n + len(got)][:5]


def test_other_models_stop_by_what_ends_the_text():
  """The second model's end is the first's: where it speaks alone and would stop, the text stops.

  Greedily, since noise goes by the id, and the end has another one.
  """
  knobs = {"weight": 1.0, "low_ent": 50.0, "high_ent": 60.0, "patience": 1, "most": 10_000}
  r = request(knobs={"temperature": 0.0})
  unstopped = run(pair(stops=((STOP,), (STOP,)), knobs=tuple(knobs.items())), [r])[0][0]
  end = unstopped[len(unstopped) // 2]
  e = pair(stops=((STOP,), (end,)), knobs=tuple(knobs.items()))
  assert run(e, [r])[0][0] == [*unstopped[: unstopped.index(end)], STOP]


def test_methods_above_several_models():
  e = pair(rows=6, changes=tuple(ENGINES.items()))
  for kind, options in (("best", {"n": 4}), ("cot", {"n": 3}), ("branch", OPTIONS)):
    outcome = go(e, [make(kind, request(new=30), **options)])[1][0]
    assert outcome.tokens_total > 0


def test_nothing_compiles_that_was_not_planned():
  e = pair()
  todo = [request(i, 10) for i in range(3)]
  PlainDecoder(e).compile(todo)
  planned = set(e.compiled)
  run(e, todo)
  assert set(e.compiled) == planned


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({}, "needs 1 beside config.checkpoint"),
    ({"mix": "proxy", "models": "a"}, "give config.decoding.models=EXPERT,ANTI"),
    ({"mix": "stir", "models": "a"}, "no way to mix models"),
    ({"models": "a", "template": "x"}, "hold {} once"),
    ({"models": "a", "alpha": 1.0}, "has no knob 'alpha'"),
    ({"models": "a", "weight": 2.0}, "must lie in"),
  ],
)
def test_bad_options_are_refused(options, words):
  with pytest.raises(errors.UserError, match=words):
    joint.configure(options)


def test_prompts_for_another_number_of_models_are_refused():
  with pytest.raises(errors.UserError, match="brings 3 prompts"):
    run(pair(), [request(k=2)])


@pytest.mark.parametrize("kind", ["ngram", "beside"])
def test_a_drafter_changes_no_token(kind):
  """One of the models may be the drafter: it guesses by the main model's prompt, in a cache of its own."""
  knobs = {"weight": 0.5, "low_ent": 0.5, "high_ent": 2.0, "patience": 2}
  e = pair(knobs=tuple(knobs.items()))
  who = Ngram(least=1) if kind == "ngram" else DraftModel(other())
  fast = SpeculativeDecoder(e, who, always=True)
  todo = [request(i, 30) for i in range(4)]
  fast.compile(todo)
  tokens = tokens_of(fast, todo)
  want = run(e, todo)[0]
  assert [[t.id for t in tokens if t.prompt == i] for i in range(4)] == want
  assert sum(t.drafted for t in tokens) >= sum(t.accepted for t in tokens) > 0
