"""SmolLM2-135M-Instruct against transformers' golden, and as a user runs it; fetched once, else skipped."""

import jax.numpy as jnp
import make_goldens
import make_smollm2_golden as golden
import numpy as np
import pytest

from entropix_jax import LLM
from entropix_jax.checkpoints import checkpoint

pytestmark = pytest.mark.real
TEXTS = ("english", "code", "numbers", "chinese", "long", "chat")
TIE = 1e-4  # of the two best logits: then either may come first


@pytest.fixture(scope="module")
def known():
  with np.load(make_goldens.GOLDENS / "smollm2.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def model(smollm2):
  cfg = checkpoint.load_config(smollm2)
  return cfg, checkpoint.load_weights(smollm2, cfg, jnp.float32)


@pytest.fixture(scope="module")
def llm(smollm2):
  return LLM(smollm2, max_seq_len=2048, batch_size=8, top_logprobs=2)


def test_texts_have_the_goldens_ids(smollm2, known):
  for name, ids in golden.texts(smollm2).items():
    assert ids == known[f"{name}/ids"].tolist()


@pytest.mark.parametrize("name", TEXTS)
def test_logits_are_transformers(model, known, name):
  """Teacher-forced, through the cache in pieces, as an engine feeds a prompt."""
  cfg, params = model
  logits_TV = make_goldens.our_logits(cfg, params, known[f"{name}/ids"], 512)
  found = golden.extract(logits_TV)
  for key in ("lse_T", "logits_PC"):
    assert np.abs(found[key] - known[f"{name}/{key}"]).max() <= make_goldens.TOLERANCE
  at_T = np.arange(len(logits_TV))
  assert (
    np.abs(logits_TV[at_T, known[f"{name}/best_T"]] - known[f"{name}/logit_T"]).max()
    <= make_goldens.TOLERANCE
  )


def test_greedy_texts_are_transformers(llm, known):
  """100 tokens; a difference must begin at a tie, after which the texts may differ."""
  session = llm._session(sampler="plain", temperature=0.0)
  todo = [session.request(known[f"{name}/ids"].tolist(), golden.GREEDY, 0) for name in TEXTS]
  ends = {*todo[0].stop}
  session.ready(todo)
  said = {name: [] for name in TEXTS}
  for token in session.go(todo):
    said[TEXTS[token.prompt]].append(token)
  for name, tokens in said.items():
    want = known[f"{name}/greedy"].tolist()
    want = want[: next((i + 1 for i, id in enumerate(want) if id in ends), len(want))]
    ours = [token.id for token in tokens]
    apart = next((i for i, (a, b) in enumerate(zip(ours, want, strict=False)) if a != b), None)
    if apart is None:
      assert len(ours) == len(want)
    else:
      (_, _, first), (_, _, second) = tokens[apart].top[:2]
      assert abs(first - second) < TIE, (name, apart)


def test_it_answers_in_its_own_format_and_stops_by_itself(llm):
  ask = ["Why is the sky blue?", "What is the capital of France?"]
  sky, capital = llm.generate(ask, sampler="plain", temperature=0.0, max_new_tokens=48)
  assert "Rayleigh scattering" in sky.text
  assert capital.finish == "stop"
  assert "Paris" in capital.text
  assert "<|im" not in capital.text


def test_log_likelihoods_that_an_evaluation_asks_for_are_transformers(smollm2, known):
  """Of 200 continuations, as lm-eval asks and adds them, up to three pieces long."""
  import test_serve

  pairs = golden.pairs(smollm2)
  how = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
  sums = []
  with test_serve.Server(smollm2, ("quadrant", "plain")) as server:
    server.http.timeout = 600
    for i in range(0, len(pairs), 50):
      prompts = [ids for ids, _ in pairs[i : i + 50]]
      for choice in server.post("/v1/completions", prompt=prompts, **how)["choices"]:
        context = pairs[i + choice["index"]][1]
        sums.append(sum(choice["logprobs"]["token_logprobs"][context:-1]))
  np.testing.assert_allclose(sums, known["pairs"], rtol=0, atol=1e-3)
