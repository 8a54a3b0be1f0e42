"""The shipped drafts: small, of their target's vocabulary, and mostly right about what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired

from entropix_jax import settings
from entropix_jax.checkpoints import chat, checkpoint, vocabulary
from entropix_jax.config import EngineConfig
from entropix_jax.decoding.drafters import DraftModel
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.request import Request
from entropix_jax.model import llama
from entropix_jax.scheduler import generate

DEMO = settings.ASSETS / "demo"
PAIRS = {"instruct": "draft", "base": "draft_base"}
PROBLEM = "Mia has 47 apples. She buys 25 more. How many apples does she have now?"
STORY = {"instruct": "Tell me a story about a fox and a kite.", "base": "Once upon a time there"}


GREEDY = {"temperature": 0.0}
pairs = pytest.mark.parametrize("stage", PAIRS)


def load(folder):
  cfg = checkpoint.load_config(DEMO / folder)
  return cfg, checkpoint.load_weights(DEMO / folder, cfg, jnp.float32)


@functools.cache
def compiled(cfg):
  """Programs know a model's shape and not its weights, so the pairs share them."""
  del cfg
  return {}


def engine(folder):
  cfg, w = load(folder)
  e = Engine.create(cfg, w, tired, EngineConfig(2, 128, attn_stats="off"))
  e.compiled = compiled(cfg).setdefault("programs", e.compiled)
  return e


def files(folder):
  return {path.name: path.read_bytes() for path in (DEMO / folder).iterdir()}


def test_both_drafts_take_two_megabytes_at_most():
  assert 0 < sum(len(data) for folder in PAIRS.values() for data in files(folder).values()) <= 2e6


@pairs
def test_a_draft_has_its_targets_files_and_vocabulary(stage):
  draft, target = files(PAIRS[stage]), files(stage)
  assert draft.keys() == target.keys()
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    assert draft[name] == target[name]
  folder = DEMO / PAIRS[stage]
  assert checkpoint.stop_ids(folder) == checkpoint.stop_ids(DEMO / stage)
  cfg = checkpoint.load_config(folder)
  assert cfg.vocab == checkpoint.load_config(DEMO / stage).vocab
  w = checkpoint.load_weights(folder, cfg, jnp.bfloat16)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(w))


@pairs
def test_most_of_what_is_drafted_is_accepted(stage):
  """A word problem and a story, greedily; each token is the target's likeliest in one whole pass."""
  target, tok = engine(stage), vocabulary.load(DEMO / stage)
  if stage == "base":
    prompts = [chat.plain(tok, text) for text in (PROBLEM + "\n", STORY[stage])]
  else:
    prompts = [
      chat.choose(DEMO / stage, tok).encode([{"role": "user", "content": x}])
      for x in (PROBLEM, STORY[stage])
    ]
  both = SpeculativeDecoder(target, DraftModel(engine(PAIRS[stage])), always=True)
  both.compiled = compiled("both").setdefault("programs", both.compiled)
  stop = (tok.end_of_text, tok.eot)
  todo = [Request(ids, 80, stop=stop, knobs=GREEDY) for ids in prompts]
  tokens = list(generate(target, tok, todo, decoder=both))
  for i, ids in enumerate(prompts):
    mine = [token for token in tokens if token.prompt == i]
    text = [*ids, *(token.id for token in mine)]
    x_BTD, _, _ = llama.forward(target.setup.cfg, target.weights, jnp.asarray([text[:-1]]))
    best_T = jnp.argmax(llama.unembed(target.weights, x_BTD[0, len(ids) - 1 :]), axis=-1)
    assert best_T.tolist() == text[len(ids) :]
    assert sum(t.accepted for t in mine) > 0.75 * sum(t.drafted for t in mine) > 10


def test_drafts_end_where_they_would_fail():
  """The more chance a draft must have, the shorter it is and the more of it stands, in the same text."""
  target, tok = engine("instruct"), vocabulary.load(DEMO / "instruct")
  ids = chat.choose(DEMO / "instruct", tok).encode([{"role": "user", "content": STORY["instruct"]}])
  texts, drafted, kept = [], [], []
  for bar in (0.0, 0.65, 0.9):
    both = SpeculativeDecoder(target, DraftModel(engine("draft"), bar), 8, always=True)
    both.compiled = compiled("both").setdefault("programs", both.compiled)
    todo = [Request(ids, 80, stop=(tok.end_of_text, tok.eot), knobs=GREEDY)]
    tokens = list(generate(target, tok, todo, decoder=both))
    texts.append([token.id for token in tokens])
    drafted.append(sum(t.drafted for t in tokens) / sum(t.drafted > 0 for t in tokens))
    kept.append(sum(t.accepted for t in tokens) / sum(t.drafted for t in tokens))
  assert texts[0] == texts[1] == texts[2]
  assert 8 >= drafted[0] >= drafted[1] > drafted[2] > 2
  assert kept[0] <= kept[1] < kept[2]
  assert kept[0] < kept[2] - 0.05
