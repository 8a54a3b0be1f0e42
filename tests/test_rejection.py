"""Speculation by rejection: another text with the same law, of one token and of whole texts."""

import dataclasses
import functools
import itertools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tired
from test_engine import ByHand, engine, run, tokens_of
from test_speculative import Guess, nothing, requests, sibling

from entropix_jax.config import EngineConfig, ModelConfig
from entropix_jax.decoding import verify
from entropix_jax.decoding.drafters import DraftModel, Ngram
from entropix_jax.decoding.speculative import Config, SpeculativeDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.programs import Program
from entropix_jax.engine.record import ACCEPTED, EMITTED
from entropix_jax.engine.request import Request
from entropix_jax.errors import UserError
from entropix_jax.model import weights
from entropix_jax.sampling import draw

# -- one token ---------------------------------------------------------------------------------

TRIALS, CHUNK = 200_000, 10_000


def softmax(x, temperature=1.0):
  x = np.exp((x - x.max(-1, keepdims=True)) / temperature)
  return x / x.sum(-1, keepdims=True)


def narrow():
  """p and q that are as unlike as can be: of 16 logits, and of their negatives."""
  logits = np.random.default_rng(3).normal(size=16)
  return softmax(logits), softmax(-logits)


def log(p_V):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(p_V), jnp.float32)


def honest(law_BV, key_B2, pos_B):
  """(drafted tokens, what is said to be the law that they were drawn from)."""
  return draw.draw(law_BV, key_B2, pos_B, draw.Purpose.DRAFT), law_BV


def same_keys(n, seed=5):
  return draw.row_keys(*(jnp.full((n, *rest), seed, jnp.uint32) for rest in ((2,), (), ())))


@functools.cache
def program(chunk, drafts, *mutable):
  """Compiled once for these parts; tests change them."""
  del mutable

  @jax.jit
  def some(p_V, q_V, start):
    p_BV, q_BV = (jnp.broadcast_to(x, (chunk, len(x))) for x in (p_V, q_V))
    pos_B, key_B2 = start + jnp.arange(chunk), jnp.broadcast_to(same_keys(1), (chunk, 2))
    draft_B, q_BV = drafts(q_BV, key_B2, pos_B)
    draft = verify.Draft(draft_B, jnp.ones((chunk,), bool), q_BV)
    return draft_B, verify.accept(p_BV, key_B2, pos_B, draft)

  return some


def trials(p_V, q_V, n=TRIALS, chunk=CHUNK, drafts=honest):
  """(drafted, emitted) tokens of n positions of one text."""
  some = program(chunk, drafts, verify.residual, draw.log_uniform)
  starts = range(0, n, chunk)
  return np.concatenate([np.asarray(some(log(p_V), log(q_V), jnp.int32(i))) for i in starts], 1)


def excess(counts, p_V):
  """Chi-square in units of its bound, df + 10 sqrt(2 df)."""
  statistic, dof = contract.chi_square(counts, p_V)
  return statistic / max(dof + 10 * np.sqrt(2 * dof), 1)


def misfit(p_V, q_V, **kwargs):
  _, token_B = trials(p_V, q_V, **kwargs)
  return excess(np.bincount(token_B, minlength=len(p_V)), p_V)


def test_the_emitted_token_has_the_target_law():
  p_V, q_V = narrow()
  draft_B, token_B = trials(p_V, q_V)
  assert excess(np.bincount(draft_B, minlength=16), q_V) < 0.5
  assert excess(np.bincount(token_B, minlength=16), p_V) < 0.5


def test_the_law_is_kept_in_a_wide_vocabulary():
  p_V, q_V = softmax(np.random.default_rng(4).normal(size=(2, 2048)), 0.4)
  assert misfit(p_V, q_V, n=4096, chunk=2048) < 1


def test_laws_with_zeros():
  """Filtered laws: of either, of both; nothing in common; one token alone, alike or not."""
  p_V, q_V = narrow()
  top, bottom = np.argsort(-p_V)[:5], np.argsort(p_V)[:5]
  cut = [np.where(np.isin(np.arange(16), keep), x, 0) for keep in (top, bottom) for x in (p_V, q_V)]
  cut = [x / x.sum() for x in cut]
  alone = np.eye(16)[3]
  for p, q in itertools.product([p_V, *cut, alone], [q_V, *cut, alone]):
    draft_B, token_B = trials(p, q, n=CHUNK)
    assert excess(np.bincount(token_B, minlength=16), p) < 0.7
    assert (p[token_B] > 0).all()
    if (p == q).all():
      np.testing.assert_array_equal(draft_B, token_B)


def swollen(law_BV, key_B2, pos_B):
  """A law that is more than the target's everywhere, so that nothing is left of it."""
  draft_B, _ = honest(law_BV, key_B2, pos_B)
  return draft_B, law_BV + 0.1


def test_where_rounding_leaves_nothing_the_target_law_is_drawn_from():
  p_V, _ = narrow()
  assert misfit(p_V, p_V, n=50_000, drafts=swollen) < 0.5


def one_hot(law_BV, key_B2, pos_B):
  """What has no law of its own: the likeliest, a fixed token, or a draw."""
  draft_B, _ = honest(law_BV, key_B2, pos_B)
  fixed_B = jnp.where(pos_B % 3 == 0, jnp.argmax(law_BV, axis=-1).astype(jnp.int32), 7)
  return jnp.where(pos_B % 3 == 2, draft_B, fixed_B), None


def test_a_guess_without_a_law_needs_none():
  p_V, q_V = narrow()
  assert misfit(p_V, q_V, drafts=one_hot) < 0.5


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_guesses_stand_as_often_as_can_be(spread):
  """sum min(p, q), and never less often than by shared noise."""
  rng = np.random.default_rng(5)
  logits = rng.normal(0, 1.5, 200)
  p_V, q_V = softmax(logits), softmax(logits + rng.normal(0, spread, 200))
  n = 20_000
  draft_B, token_B = trials(p_V, q_V, n=n)
  stands, best = np.mean(draft_B == token_B), np.minimum(p_V, q_V).sum()
  sigma = np.sqrt(best * (1 - best) / n)
  assert abs(stands - best) < 3 * sigma
  key_B2 = same_keys(n)
  laws = (jnp.broadcast_to(log(x), (n, 200)) for x in (p_V, q_V))
  shared = np.mean(np.equal(*(draw.draw(law, key_B2, jnp.arange(n)) for law in laws)))
  assert stands > shared - 3 * sigma
  assert shared > 1 / 3 * best


def test_a_row_without_a_guess_draws_as_ever():
  """And the guesses of others do not move it."""
  n, (p_V, q_V) = 64, narrow()
  key_B2 = same_keys(n)
  pos_B, on_B = jnp.arange(n), jnp.arange(n) % 2 == 0
  law_BV = jnp.broadcast_to(log(p_V), (n, 16))
  draft_B, q_BV = honest(jnp.broadcast_to(log(q_V), (n, 16)), key_B2, pos_B)
  plain_B = draw.draw(law_BV, key_B2, pos_B)
  all_B, some_B, none_B = (
    verify.accept(law_BV, key_B2, pos_B, verify.Draft(draft_B, on_B, q_BV))
    for on_B in (on_B | True, on_B, on_B & False)
  )
  np.testing.assert_array_equal(none_B, plain_B)
  np.testing.assert_array_equal(some_B, np.where(on_B, all_B, plain_B))
  assert (np.asarray(all_B) != np.asarray(plain_B)).any()


def test_the_uniform_is_fine_where_ratios_are_small():
  n = 400_000
  x_B = draw.log_uniform(same_keys(n), jnp.arange(n), draw.Purpose.ACCEPT)
  x_B = np.asarray(x_B, np.float64)
  assert (x_B <= 0).all()
  u_B = np.sort(np.exp(x_B))
  assert np.abs(u_B - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov
  assert len(np.unique(u_B[:200])) == 200
  assert np.mean(u_B <= 1e-3) == pytest.approx(1e-3, abs=4e-3 / np.sqrt(0.4 * 1e3))


# -- what must not pass ------------------------------------------------------------------------


def shared(law_BV, key_B2, pos_B):
  """Drafted with the noise that the residual is drawn with."""
  return draw.draw(law_BV, key_B2, pos_B, draw.Purpose.RESIDUAL), law_BV


def greedy(law_BV, key_B2, pos_B):
  """The likeliest token, said to be drawn."""
  return jnp.argmax(law_BV, axis=-1).astype(jnp.int32), law_BV


def from_top_4(law_BV, key_B2, pos_B):
  """Drawn from the four likeliest, said to be drawn from all."""
  fourth_B1 = jnp.sort(law_BV, axis=-1)[:, -4:][:, :1]
  top_BV = jax.nn.log_softmax(jnp.where(law_BV >= fourth_B1, law_BV, -jnp.inf))
  return honest(top_BV, key_B2, pos_B)[0], law_BV


@pytest.mark.parametrize("drafts", [shared, greedy, from_top_4])
def test_a_draft_that_is_not_of_its_law_is_found(drafts):
  assert misfit(*narrow(), drafts=drafts) > 5


def softmaxed(law_BV, guess):
  return jax.nn.log_softmax(jnp.maximum(jnp.exp(law_BV) - jnp.exp(guess.law_BV), 0.0))


def all_of_p(law_BV, guess):
  return law_BV


@pytest.mark.parametrize("residual", [softmaxed, all_of_p])
def test_a_wrong_residual_is_found(residual, monkeypatch):
  monkeypatch.setattr(verify, "residual", residual)
  assert misfit(*narrow()) > 100


def test_an_acceptance_that_knows_the_draft_is_found(monkeypatch):
  true = draw.log_uniform
  monkeypatch.setattr(draw, "log_uniform", lambda key, pos, _: true(key, pos, draw.Purpose.DRAFT))
  assert misfit(*narrow()) > 1.5


# -- whole texts -------------------------------------------------------------------------------

TOY = ModelConfig(vocab=2, width=8, ffn=12, layers=1, heads=2, kv_heads=1, head_dim=4)
T, ROWS, RUNS = 6, 2048, 8
# One law, and one that each token moves; neither by noise, of which a text has its own.
RESTED, TIRED = ({"tires": tires, "luck": 0.0} for tires in (0.0, 1.0))
PROMPT = (0, 1, 1, 0)


@functools.cache
def toy(seed, rows=ROWS):
  w = weights.random(TOY, jnp.float32, seed=seed)
  config = EngineConfig(rows, 128, attn_stats="off")
  return Engine.create(TOY, w.replace(embed_VD=w.embed_VD * 30.0), tired, config)


def alike(x, B):
  return jax.tree.map(lambda x: jnp.repeat(x[:1], B, axis=0), x)


TEXT_BT = np.asarray(list(itertools.product(range(2), repeat=T)), np.int32)


def told(law_BV, key_B2, pos_B):
  """In place of a draw: row i says text i, so that its record has the law of each of its tokens."""
  text_BT = jnp.asarray(TEXT_BT)[: len(pos_B)]
  return jnp.take_along_axis(text_BT, jnp.maximum(pos_B - 1, 0)[:, None], axis=1)[:, 0]


@functools.cache
def teller():
  """An engine whose decode is compiled while `told` stands in for the draw."""
  e = Engine(toy(1, len(TEXT_BT)).setup, toy(1).weights)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(draw, "draw", told)
    e.compiled[Program("decode", steps=T, window=128)]
  return e


def request(knobs):
  return Request(PROMPT, T + 1, seed=1, knobs=knobs)


def exact(knobs):
  """p of every text of T tokens behind the prompt and a 0, by plain decoding."""
  e = teller()
  state = e.insert(e.init(), e.prefill(request(knobs)), 0, request(knobs), forced=0)
  state, _ = e.first(state, [0])
  _, record = e.decode(alike(state, len(TEXT_BT)), 16, steps=T)
  values = e.unpack(np.asarray(record))
  np.testing.assert_array_equal(values["id"].T, TEXT_BT)
  p_B = np.exp(values["logprob_law"].astype(np.float64).sum(0))
  assert p_B.sum() == pytest.approx(1.0, abs=1e-4)
  return p_B


def texts(e, knobs, runs=RUNS):
  """(count of every text, tokens that had been drafted, of those accepted) of many rows by `e`."""
  count, drafted, accepted = np.zeros(2**T, np.int64), 0, 0
  engine, drafter = e.engine, e.drafter
  prefix, read = engine.prefill(request(knobs)), drafter.prefill(request(knobs))
  for i in range(runs):
    e.begin()
    rows = engine.insert(engine.init(), prefix, 0, request(knobs), forced=0)
    rows, _ = engine.first(rows, [0])
    e._memory = alike(drafter.insert(drafter.init(), read, 0), ROWS)
    stream_B = jnp.arange(i * ROWS, (i + 1) * ROWS, dtype=jnp.uint32)
    key_B2 = draw.row_keys(jnp.zeros((ROWS, 2), jnp.uint32), stream_B, jnp.zeros_like(stream_B))
    _, record = e.decode(alike(rows, ROWS).replace(key_B2=key_B2), 16)
    values = engine.unpack(np.asarray(record))
    on_BN = (values["flags"] & EMITTED > 0).T
    assert (on_BN.sum(1) == T).all()
    id_BT = values["id"].T[on_BN].reshape(ROWS, T)
    count += np.bincount(id_BT @ 2 ** np.arange(T)[::-1], minlength=2**T)
    drafted += int(np.where(on_BN.T, values["flags"] >> 10, 0).sum())
    accepted += int((values["flags"] & ACCEPTED > 0).sum())
  return count, drafted, accepted


class EnoughRounds(SpeculativeDecoder):
  """In one dispatch every row gets T tokens at least."""

  _rounds = T


def judging(target, drafter, length=2):
  return EnoughRounds(target, drafter, length, verify="rejection")


@pytest.mark.parametrize(("bar", "length"), [(0.0, 2), (0.5, 4)])
def test_whole_texts_have_the_law_of_plain_decoding(bar, length):
  """Several rounds, six tokens, all 64 texts; with one law, and where each token moves those behind it.

  The other drafts end by what was learned: two ids have a risk of a third, if what was foreseen came.
  """
  e = judging(toy(1), DraftModel(toy(2), bar), length)
  for knobs, other in ((RESTED, TIRED), (TIRED, RESTED)):
    count, drafted, accepted = texts(e, knobs)
    assert drafted > accepted > count.sum()
    assert excess(count, exact(knobs)) < 0.6
    assert excess(count, exact(other)) > 10


def test_whole_texts_guessed_from_their_own_past():
  count, drafted, accepted = texts(judging(toy(1), Ngram(least=1)), TIRED)
  assert drafted > accepted > count.sum()
  assert excess(count, exact(TIRED)) < 0.6


@dataclasses.dataclass(frozen=True)
class Table(Ngram):
  """A drafter with a law of its own, that of a token behind another; `peeks` at what it must not."""

  peeks: str = ""

  LAW_VV = np.log([[0.75, 0.25], [0.8, 0.2]]).astype(np.float32)

  def abstract(self):
    return jax.eval_shape(self.init)

  def init(self):
    return jnp.zeros((ROWS, 4), jnp.int32), jnp.zeros((ROWS,), jnp.int32)

  def propose(self, weights, memory, state, G, window):
    token_B, drafts, laws = state.token_B, [], []
    for g in range(G):
      laws.append(jnp.asarray(self.LAW_VV)[token_B])
      token_B = draw.draw(laws[-1], state.key_B2, state.out_B + g, draw.Purpose.DRAFT)
      drafts.append(token_B)
    draft_BG = jnp.stack(drafts, 1)
    old_BG, began_B = memory
    place_B = state.out_B - began_B
    old_B = jnp.take_along_axis(old_BG, jnp.minimum(place_B, G - 1)[:, None], axis=1)[:, 0]
    drops_B = {
      "": jnp.zeros_like(place_B, bool),
      # What was drafted for this place in the round before, and thrown away.
      "thrown": (place_B < G) & (old_B == 0) & (state.out_B > 1),
      # What is drafted for it now.
      "drafted": draft_BG[:, 0] == 0,
    }[self.peeks]
    return (draft_BG, state.out_B), draft_BG, jnp.where(drops_B, 0, G), jnp.stack(laws, 1)


@pytest.mark.parametrize("peeks", ["", "thrown", "drafted"])
def test_a_draft_may_not_depend_on_the_noise_that_it_will_see(peeks):
  """Noise of a place may be looked at again, if nothing was decided by it: only then is the law kept."""
  count, _, accepted = texts(
    judging(toy(1), Table(peeks=peeks), 4), RESTED, 2 if peeks == "drafted" else RUNS
  )
  assert accepted > count.sum() / 2
  misfit = excess(count, exact(RESTED))
  assert misfit > 2 if peeks else misfit < 0.6


# -- rows --------------------------------------------------------------------------------------


def test_a_row_is_the_same_alone_and_among_others():
  """Six texts in five rows that accept different numbers; each is its own."""
  e = judging(engine(), DraftModel(sibling()), 4)
  todo = [*requests(), dataclasses.replace(requests()[2], max_new_tokens=14, seed=5)]
  ids = run(e, todo)[0]
  assert [len(x) for x in ids] == [24, 22, 20, 18, 16, 14]
  assert [run(e, [r])[0][0] for r in todo[1:3]] == ids[1:3]
  tokens = tokens_of(e, todo[:2])
  assert sum(t.drafted for t in tokens) > sum(t.accepted for t in tokens) > 0


def test_without_drafts_the_text_is_that_of_plain_decoding():
  e = judging(engine(), Guess(guess=nothing), 4)
  assert run(e, requests())[0] == run(engine(), requests())[0]


def test_stops_and_limits_inside_a_draft():
  e = judging(engine(), DraftModel(engine()), 8)
  free = requests()[1]
  tokens = tokens_of(e, [free])
  ids = [t.id for t in tokens]
  assert sum(t.accepted for t in tokens) > 0.9 * sum(t.drafted for t in tokens) > 10
  for place in (2, 3, 6):
    tokens = tokens_of(e, [dataclasses.replace(free, stop=(ids[place],))])
    assert [t.id for t in tokens] == ids[: ids.index(ids[place]) + 1]
    assert tokens[-1].finish == "stop"
  for new in (1, 2, 5, 11):
    tokens = tokens_of(e, [dataclasses.replace(free, max_new_tokens=new)])
    assert len(tokens) == new
    assert not tokens[-1].accepted
    # The last one is never drafted, so it is another draw.
    assert [t.id for t in tokens][:-1] == ids[: new - 1]
    assert tokens[-1].finish == "length"


def test_what_is_injected_or_forced_stands_whatever_was_drafted():
  e = judging(engine(), Ngram(least=1), 4)
  act = {"inject": [5, 6, 7], "inject_ent": 0.0, "inject_varent": 1e9}
  tokens = tokens_of(e, [dataclasses.replace(r, actions=act) for r in requests()[:3]])
  for i in range(3):
    assert [t.id for t in tokens if t.prompt == i][:3] == [5, 6, 7]
  rows = ByHand(e)
  rows.insert(1, requests()[2])
  rows.state = rows.engine.steer(rows.state, forced={1: 9})
  values = rows.decode(40)
  assert values["id"][:, 1][values["flags"][:, 1] > 0][0] == 9


# -- settings ----------------------------------------------------------------------------------


def test_it_always_drafts():
  """Between two ways with two texts no clock may choose."""
  e = judging(engine(), Ngram())
  assert e.race.always
  assert "decode" not in [program.verb for _, program in e.jobs(requests())]


def test_what_cannot_be_verified_by_is_refused():
  assert Config(verify="rejection").verify == "rejection"
  with pytest.raises(UserError, match="'noise' or 'rejection'"):
    Config(verify="typical")
