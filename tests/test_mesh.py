"""The same numbers and the same text on every mesh, up to more chips than key/value heads."""

import dataclasses
import functools

import contract
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from contract import random_attn
from test_engine import PROMPTS, ByHand, assert_same, run, tokens_of

from entropix_jax import errors, sampling
from entropix_jax.config import EngineConfig, MeshConfig, ModelConfig
from entropix_jax.decoding.drafters import DraftModel
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine import step
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.request import Request
from entropix_jax.engine.state import blank
from entropix_jax.model import llama, quant, sharding, weights

# Eight key/value heads of two queries each, like a Llama; what 16 chips need divides by 16.
WIDE = ModelConfig(
  vocab=208, width=48, ffn=80, layers=2, heads=16, kv_heads=8, head_dim=6, tied=True
)
BIASED = dataclasses.replace(WIDE, attention_bias=True, mlp_bias=True)
MESHES = [(4, 1), (1, 2), (2, 4), (1, 8), (1, 16)]
on_meshes = pytest.mark.parametrize("shape", MESHES, ids=str)


@functools.cache
def params(int8=False, cfg=WIDE):
  w = weights.random(cfg, jnp.float32, seed=4)
  w = w.replace(embed_VD=w.embed_VD * 10.0)
  return quant.weights(cfg, w) if int8 else w


def spread(w, mesh, cfg=WIDE):
  """The weights on a mesh."""

  def put(layer, field):
    leaf = getattr(w if layer is None else w.layers[layer], field)
    letters = weights.letters(field)
    if isinstance(leaf, quant.Int8):
      scale = jax.device_put(leaf.scale, sharding.of(mesh, quant.outputs(field)))
      return quant.Int8(jax.device_put(leaf.q, sharding.of(mesh, letters)), scale)
    return jax.device_put(leaf, sharding.of(mesh, letters))

  return weights.assemble(cfg, put)


@functools.cache
def engine(shape=(1, 1), sampler=tired, **changes):
  shape = MeshConfig(*shape)
  w = params(changes.get("weights") == "int8")
  mesh = sharding.mesh(shape, WIDE)
  config = EngineConfig(4, 128, **changes)
  sampler = sampling.find(sampler) if isinstance(sampler, str) else sampler
  return Engine.create(WIDE, spread(w, mesh) if mesh else w, sampler, config, shape)


DECODE = Program("decode", steps=8, window=128)


def requests():
  """The second one is greedy."""
  temperature = (1.0, 0.0, 1.0, 1.0, 1.0)
  return [
    Request(ids, 12 + i, seed=i, knobs={"temperature": temperature[i]})
    for i, ids in enumerate(PROMPTS)
  ]


@pytest.mark.parametrize(
  ("shape", "int8", "cfg"),
  [
    *((s, False, WIDE) for s in MESHES), ((2, 4), True, WIDE), ((1, 16), True, WIDE),
    ((2, 4), False, BIASED), ((1, 16), True, BIASED),
  ],
  ids=lambda x: "biased" * x.mlp_bias if isinstance(x, ModelConfig) else str(x),
)  # fmt: skip
def test_logits_agree(shape, int8, cfg):
  token_BT = jnp.asarray(np.random.default_rng(0).integers(0, 208, (4, 24)), jnp.int32)

  def logits(mesh, w):
    def f(w, token_BT):
      last_B = jnp.full((4,), 23)
      x_BTD, _, seen = llama.forward(cfg, w, token_BT, last_B=last_B, attn_stats="all", mesh=mesh)
      return llama.unembed(w, x_BTD), seen

    return jax.jit(f)(w, token_BT)

  want = logits(None, params(int8, cfg))
  mesh = sharding.mesh(MeshConfig(*shape), cfg)
  got = logits(mesh, spread(params(int8, cfg), mesh, cfg))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), got, want)


@on_meshes
def test_text_is_the_same(shape):
  """Prefill, insert and decode, five requests through four slots."""
  assert_same(run(engine(shape), requests()), run(engine(), requests()))
  cache = engine(shape).init().cache.k[0]
  kv, rep = sharding.split(WIDE, shape[1])
  assert len(cache.sharding.device_set) == shape[0] * shape[1]
  assert cache.addressable_shards[0].data.shape == (4 // shape[0], 8 // kv, 128, 6)
  assert kv * rep == shape[1]


@pytest.mark.parametrize("name", sampling.names())
def test_decisions_are_the_same(name):
  """Rows shared out over the chips decide what they decide on one."""
  e = engine((1, 1), name)
  rng = np.random.default_rng(1)
  rows = blank(e.setup, 4).light.replace(live_B=jnp.ones((4,), bool))
  key_B2 = jnp.asarray(rng.integers(0, 2**32, (4, 2)), jnp.uint32)
  rows = rows.replace(key_B2=key_B2, limit_B=jnp.full((4,), 9))
  logits_BV = jnp.asarray(rng.standard_normal((4, 208)) * [[0.1], [1], [3], [9]], jnp.float32)
  attn = random_attn(rng, 4)
  mesh = sharding.mesh(MeshConfig(1, 16), WIDE)

  def decide(mesh):
    decide = functools.partial(step._decide, e.setup, choose=step.drawn)
    return jax.jit(lambda *args: sharding.per_row(mesh, decide, *args)[:2])

  want = decide(None)(rows, logits_BV, attn)
  got = decide(mesh)(*jax.device_put((rows, logits_BV, attn), sharding.of(mesh, "")))
  np.testing.assert_array_equal(got[0]["token_B"], want[0]["token_B"])
  got, want = ((changed, e.unpack(np.asarray(record))) for changed, record in (got, want))
  # A fit of 140 steps adds up the rounding of one row alone and of four.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=5e-5), got, want)


@pytest.mark.parametrize("shape", [(1, 8), (1, 16)], ids=str)
def test_a_step_sends_two_sums_a_layer_and_little_else(shape):
  """Heads, queries and weights lie where they are needed, more chips than key/value heads or not."""
  program = hlo.Program(engine(shape).compiled[DECODE].as_text())
  sent = {kind: n / 8 for kind, n in program.collectives().items()}
  assert 2 * WIDE.layers < sent.pop("all-reduce") < 2 * WIDE.layers + 5
  assert sum(sent.values()) < 4  # rows out and answers back


def test_rows_on_chips_of_their_own_send_nothing():
  program = hlo.Program(engine((4, 1)).compiled[DECODE].as_text())
  assert not program.collectives()


def test_a_prompt_is_fed_by_all_chips():
  """Each takes some of its tokens, so a quarter of the work, and they exchange keys and values."""

  def prefill(shape):
    return engine(shape).compiled[Program("prompt", tokens=64, slots=(64,))]

  one, four = (prefill(shape).cost_analysis()["flops"] for shape in ((1, 1), (4, 1)))
  assert four < 0.4 * one
  sent = hlo.Program(prefill((4, 1)).as_text()).collectives()
  assert sent.pop("all-gather") <= 2 * WIDE.layers + 2
  assert sum(sent.values()) < 4  # the last token's row


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
def test_a_fork_goes_on_as_its_source_would(shape):
  """The same noise gives the source's text, other noise another; the source is undisturbed."""
  e = engine(shape)
  request = dataclasses.replace(requests()[2], max_new_tokens=50)
  rows = ByHand(e)
  rows.insert(1, request)
  rows.decode(64)
  rows.fork(1, 0, request.seed, 0)
  rows.fork(1, 3, request.seed, 7)
  values = rows.decode(64)
  ids_NB = values["id"]
  np.testing.assert_array_equal(ids_NB[:, 0], ids_NB[:, 1])
  assert (ids_NB[:, 3] != ids_NB[:, 1]).any()
  assert (values["flags"][:, 2] == 0).all()  # a free slot stays free


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 16)], ids=str)
def test_a_prefix_in_common_is_read_on_every_chip(shape):
  e, records = engine(shape), []
  r = dataclasses.replace(requests()[4], max_new_tokens=20)
  for shares in (False, True):
    prefix = e.prefill(r)
    state = e.init()
    for slot in range(3):
      row = dataclasses.replace(r, stream=slot)
      state = e.insert(state, prefix, slot, row, share=shares)
    state, _ = e.first(state, range(3))
    _, record = e.decode(state, len(r.ids) + 8, 8, prefix if shares else None)
    records.append(e.unpack(np.asarray(record)))
  copied, shared = records
  for column in copied:
    np.testing.assert_allclose(
      copied[column][:, :3], shared[column][:, :3], atol=2e-4, rtol=1e-3, err_msg=column
    )


@pytest.mark.parametrize("verify", ["noise", "rejection"])
@pytest.mark.parametrize("shape", [(4, 1), (2, 4)], ids=str)
def test_guesses_are_checked_on_every_mesh(shape, verify):
  """By the model's own first layer, whose guesses are now right and now wrong."""

  def said(shape):
    target, few = engine(shape), dataclasses.replace(WIDE, layers=1)
    first = target.weights.replace(layers=target.weights.layers[:1])
    drafter = Engine.create(
      few, first, target.setup.sampler, target.setup.config, target.setup.mesh_config
    )
    e = SpeculativeDecoder(target, DraftModel(drafter, bar=0.0), 4, always=True, verify=verify)
    tokens = tokens_of(e, requests())
    for program in e.compiled.values():
      assert contract.conditions_with_messages(program.as_text()) == []
    return tokens

  got, want = said(shape), said((1, 1))

  def facts(tokens):
    return sorted((t.prompt, t.position, t.id, t.drafted, t.accepted, t.finish) for t in tokens)

  assert facts(got) == facts(want)
  assert 0 < sum(t.accepted for t in got) < sum(t.drafted for t in got)


def test_what_does_not_divide_says_what_would():
  with pytest.raises(errors.UserError, match="would fit: 1, 2, 4, 8, 16"):
    sharding.check_divisible(WIDE, MeshConfig(1, 3), 4)
  with pytest.raises(errors.UserError, match="multiple of it as batch size"):
    sharding.check_divisible(WIDE, MeshConfig(3, 1), 4)
  with pytest.raises(errors.UserError, match="there are 16"):
    sharding.mesh(MeshConfig(4, 8), WIDE)


@pytest.mark.parametrize("rows", [1, 3, 4])
@on_meshes
def test_rows_come_back_in_order(shape, rows):
  """Whatever their number, types and shapes."""
  mesh = sharding.mesh(MeshConfig(*shape), WIDE)
  x = {
    "a": jnp.arange(rows * 6, dtype=jnp.float32).reshape(rows, 2, 3),
    "b": jnp.arange(rows) % 2 == 0,
    "c": jnp.arange(rows, dtype=jnp.int32) - 1,
  }

  def f(x):
    return {"a": x["a"] * 2, "b": ~x["b"], "c": x["c"], "d": jnp.sum(x["a"], (1, 2))}

  got = jax.jit(lambda x: sharding.per_row(mesh, f, x))(x)
  jax.tree.map(np.testing.assert_array_equal, got, f(x))
