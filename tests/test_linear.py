"""Products of few rows with matrices that lie as a CPU reads them best."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from test_engine import PROMPTS, assert_same, run
from test_mesh import WIDE, params

from entropix_jax import settings
from entropix_jax.checkpoints import checkpoint, orbax_store
from entropix_jax.cli import config_file
from entropix_jax.config import EngineConfig, MeshConfig
from entropix_jax.decoding.drafters import Ngram
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program, compile_all
from entropix_jax.engine.request import Request
from entropix_jax.llm import LLM
from entropix_jax.model import linear, sharding, weights

MATRICES = 7  # of a layer
ROWS = [(1,), (3,), (5,), (1, 4), (2, 5), (32,), (33,)]


@pytest.fixture
def small(monkeypatch):
  """Every matrix of WIDE is large enough to be transposed."""
  monkeypatch.setattr(linear, "MIN_TRANSPOSED", 1)
  monkeypatch.setattr(linear, "TILES", (16,))


def turned(w, cfg=WIDE):
  """The weights, transposed."""

  def make(layer, field):
    return linear.transpose(field, getattr(w if layer is None else w.layers[layer], field))

  return weights.assemble(cfg, make)


def count_transposed(layer):
  return sum(isinstance(leaf, linear.Transposed) for leaf in vars(layer).values())


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("least", [24, 25], ids=["many inputs", "few inputs"])
@pytest.mark.parametrize("tile", [16, 7], ids=["tiles", "none"])
def test_a_product_is_one_however_the_matrix_lies(rows, tile, least, monkeypatch):
  """Few rows, and a matrix of whole tiles, go another way on a CPU."""
  monkeypatch.setattr(linear, "TILES", (tile, 5))
  monkeypatch.setattr(linear, "MIN_TILED_INPUTS", least)
  x = jax.random.normal(jax.random.key(4), (*rows, 24))
  w = jax.random.normal(jax.random.key(5), (24, 48))
  want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  for matrix, kwargs in ((w, {}), (w.T, {"transposed": True}), (linear.Transposed(w.T), {})):
    f = jax.jit(lambda x, matrix=matrix, kwargs=kwargs: linear.dot(x, matrix, **kwargs))
    np.testing.assert_allclose(f(x), want, atol=1e-5)
  text = f.lower(x).as_text()
  assert ("tensor<3x16x24xf32>" in text) == (
    tile == 16 and np.prod(rows) <= (linear.MAX_TILED_ROWS if least == 24 else linear.FEW_ROWS)
  )


def test_what_is_transposed(small):
  w = params()
  assert count_transposed(turned(w).layers[0]) == MATRICES
  assert not isinstance(turned(w).embed_VD, linear.Transposed)
  assert linear.any_transposed(turned(w))
  assert not linear.any_transposed(w)
  assert isinstance(linear.transpose("wq_DQ", jnp.ones((3, 32))), linear.Transposed)
  assert isinstance(linear.transpose("wq_DQ", jnp.ones((32, 3))), jax.Array)  # no whole tiles


def test_others_get_a_transposed_matrix_as_they_have_it():
  """A weight in Hugging Face's order, without a copy."""
  w_DF = jax.random.normal(jax.random.key(0), (3, 8))
  turned = linear.Transposed(w_DF.T)
  np.testing.assert_array_equal(weights.hf_order("wup_DF", turned), w_DF.T)
  assert weights.hf_order("wup_DF", turned) is turned.w


def test_small_matrices_stay_as_they_are():
  assert not linear.any_transposed(turned(params()))


@pytest.mark.parametrize(
  ("platform", "dtype", "pieces", "pays"),
  [
    ("cpu", jnp.float32, 1, True),
    ("cpu", jnp.bfloat16, 1, False),
    ("cpu", jnp.float32, 2, False),
    ("gpu", jnp.float32, 1, False),
    ("tpu", jnp.float32, 1, False),
  ],
)
def test_where_it_pays(platform, dtype, pieces, pays, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert linear.transposer(dtype, pieces) is (linear.transpose if pays else None)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_checkpoint_is_transposed_as_it_is_loaded(tmp_path, small, kind):
  w = params()
  checkpoint.save(tmp_path / "safetensors", WIDE, w, jnp.float32)
  if kind == "orbax":

    def make(layer, field):
      return getattr(w if layer is None else w.layers[layer], field)

    orbax_store.write(tmp_path / "orbax", WIDE, "float32", "here", make, {})
  got = checkpoint.load_weights(tmp_path / kind, WIDE, jnp.float32, finish=linear.transpose)
  want = turned(w)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_run_transposes_what_it_loads(monkeypatch):
  """The demo, whose matrices are small, as if they were large."""
  config = config_file.base(checkpoint=str(settings.ASSETS / "demo" / "instruct"), batch_size=1)
  said = []
  for large in (False, True):
    if large:
      monkeypatch.setattr(linear, "MIN_TRANSPOSED", 1)
      monkeypatch.setattr(linear, "TILES", (64,))
    resolved = config_file.resolve(config)
    session = LLM.of(resolved).session(resolved)
    todo = [session.request(session.encode("Tell me a story about a kite."), 12, 0)]
    session.ready(todo)
    assert linear.any_transposed(session.engine.weights) == large
    said.append([t.id for t in session.go(todo)])
  assert said[0] == said[1]


@pytest.mark.parametrize("data", [1, 2])
def test_the_text_is_the_same(small, data):
  """In slots and on devices of their own, which send nothing; by guesses, too; and kernels let such weights be."""
  shape, mesh = MeshConfig(data=data), sharding.mesh(MeshConfig(data=data), WIDE)
  requests = [
    Request(ids, 12, seed=i, knobs={"temperature": 0.5}) for i, ids in enumerate(PROMPTS[:4])
  ]
  said = []
  for w in (params(), turned(params())):
    w = jax.tree.map(lambda x: jax.device_put(x, sharding.of(mesh, "_" * x.ndim)), w)
    engine = Engine.create(WIDE, w, tired, EngineConfig(4, 128, kernels="on"), shape)
    guessing = SpeculativeDecoder(engine, Ngram(), 4, True)
    said += [run(engine, requests), run(guessing, requests)]
    decode = engine.compiled[Program("decode", steps=8, window=128)]
    assert not hlo.Program(decode.as_text()).collectives()
  for other in said[1:]:
    assert_same(said[0], other)


def test_large_products_stand_apart_on_a_cpu(small):
  w = params()
  assert linear.compiler_options(w, "cpu") == linear.NO_DOT_FUSION
  assert linear.compiler_options(w, "gpu") == {}
  assert (
    Engine.create(WIDE, w, tired, EngineConfig(1, 128)).compiled.options == linear.NO_DOT_FUSION
  )


@pytest.mark.parametrize("ahead", [True, False])
def test_each_program_is_compiled_so(small, monkeypatch, ahead):
  """An option that no compiler has is refused, so it was handed over."""
  monkeypatch.setattr(linear, "NO_DOT_FUSION", {"no_such_option": "1"})
  engine = Engine.create(WIDE, params(), tired, EngineConfig(1, 128))
  with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
    compile_all(engine.compiled.jobs([Program("init")])) if ahead else engine.init()


def test_small_ones_need_not():
  assert linear.compiler_options(params(), "cpu") == {}
