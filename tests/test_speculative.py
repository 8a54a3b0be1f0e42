"""Speculative decoding: the same text, whoever drafts, and what must not leave a trace."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tired
from conftest import TINY
from test_engine import (
  KNOBS,
  PROMPTS,
  SMALL,
  ByHand,
  assert_same,
  engine,
  engine_for_knobs,
  poisoned,
  run,
  tokens_of,
)

from entropix_jax import sampling
from entropix_jax.config import EngineConfig
from entropix_jax.decoding import drafters, verify
from entropix_jax.decoding.drafters import DraftModel, Echo, Ngram
from entropix_jax.decoding.race import AGAIN, FIRST, HALFWAY, LONGEST, MARGIN, RECENT, Race
from entropix_jax.decoding.speculative import SpeculativeDecoder
from entropix_jax.decoding.verify import NONE
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.record import DRAFTED
from entropix_jax.engine.request import Request
from entropix_jax.engine.step import next_token
from entropix_jax.errors import UserError
from entropix_jax.model import llama, weights
from entropix_jax.sampling import draw


@dataclasses.dataclass(frozen=True)
class Guess(Ngram):
  """A drafter by rule: `guess(state, G)` -> (draft_BG, count_B)."""

  guess: object = None

  def draft(self, weights, memory, state, G, window):
    return memory, *self.guess(state, G)


def wrong(state, G):
  """What a sampler would have to be unlucky to draw: the id itself plus one, again and again."""
  draft_BG = (state.token_B[:, None] + 1 + jnp.arange(G)) % TINY.vocab
  return draft_BG, jnp.full_like(state.token_B, G)


def arbitrary(state, G):
  """Ids and counts that are a hash of the row's length."""
  x_BG = (state.len_B[:, None] * 7919 + jnp.arange(G) * 104_729) % 1_000_003
  return x_BG % TINY.vocab, x_BG[:, 0] % (G + 1)


def nothing(state, G):
  """Empty drafts."""
  return jnp.zeros((state.token_B.shape[0], G), jnp.int32), jnp.zeros_like(state.token_B)


def knowing(todo, said):
  """Drafts of the texts that are known to come, every fifth id of them replaced; prompts begin differently."""
  text_VS = np.zeros((TINY.vocab, 64), np.int32)
  for r, ids in zip(todo, said, strict=True):
    text = np.array([*r.ids, *ids])
    text_VS[r.ids[0], : len(text)] = np.where(np.arange(len(text)) % 5, text, 0)

  def guess(state, G):
    place_BG = state.len_B[:, None] + 1 + jnp.arange(G)
    draft_BG = jnp.asarray(text_VS)[state.history_BS[:, :1], jnp.minimum(place_BG, 63)]
    return draft_BG, jnp.full_like(state.token_B, G)

  return Guess(guess=guess)


@functools.cache
def sibling(sampler=tired):
  """A model that mostly agrees with the target: its weights, a little disturbed."""
  e, noise = engine(sampler), weights.random(SMALL, jnp.float32, seed=9)
  near = jax.tree.map(lambda x, y: x + 0.05 * y if x.ndim > 1 else x, e.weights, noise)
  other = Engine(e.setup, near)
  other.compiled = e.compiled
  return other


@functools.cache
def compiled():
  """Programs know the shape of a draft model, and neither its weights nor its bar."""
  return {}


def by_model(bar=0.0, length=4, drafter=None, always=True):
  """A decoder whose drafter is the sibling, or another engine of the same setup."""
  e = SpeculativeDecoder(engine(), DraftModel(drafter or sibling(), bar), length, always)
  e.compiled = compiled().setdefault(length, e.compiled)
  return e


def sure():
  """By a drafter that is always right."""
  return by_model(length=8, drafter=engine())


def decoder(kind):
  if kind.startswith("model"):
    return by_model(bar=0.6 if "careful" in kind else 0.0)
  rules = {"wrong": wrong, "arbitrary": arbitrary, "nothing": nothing}
  drafter = Guess(guess=rules[kind]) if kind in rules else Ngram(least=1)
  return SpeculativeDecoder(engine(), drafter, always=True)


def requests(new=24, seed=0, sampler=None):
  """Short enough for the smallest window, with all that may be drafted."""
  rng = np.random.default_rng(1)
  prompts = [rng.integers(1, TINY.vocab, n).tolist() for n in (3, 9, 30, 1, 17)]
  return [
    Request(ids, new - 2 * i, seed=seed + i, knobs=KNOBS.get(sampler, {}))
    for i, ids in enumerate(prompts)
  ]


FEW = tuple(range(3, TINY.vocab, 5))


class Coins(Race):
  """Its way is thrown for."""

  def __init__(self, coins):
    self.coins, self.coming = coins, next(coins)
    super().__init__(False, lambda: 0.0)

  trying = False

  @property
  def drafts(self):
    return self.coming

  def next(self, counts=True):
    way, self.coming = self.coming, next(self.coins)
    self.sent.append(None)
    return way


def assert_same_text(e, plain, todo):
  """Equal tokens, branches and ends; equal laws and raw statistics within float32 tolerance.

  What a stateful sampler reports besides is left out: a score in standard deviations of a text that
  repeats itself is rounding, magnified.

  Returns:
    The tokens of `e`.
  """
  ours, theirs = (
    sorted(tokens_of(x, todo), key=lambda t: (t.prompt, t.position)) for x in (e, plain)
  )
  for a, b in zip(ours, theirs, strict=True):
    assert (a.prompt, a.position, a.id, a.branch, a.finish) == (
      (b.prompt, b.position, b.id, b.branch, b.finish)
    )
    for name in ("logprob", "logprob_law", "entropy", "varentropy", "attn_ent", "agreement"):
      assert a.numbers[name] == pytest.approx(b.numbers[name], abs=5e-4, rel=1e-3), name
  return ours


@pytest.mark.parametrize("sampler", sampling.names())
def test_the_text_is_that_of_plain_decoding(sampler):
  """Rows of every sampler that accept different numbers, then one of them alone."""
  plain, todo = engine_for_knobs(sampler), requests(sampler=sampler)
  want = run(plain, todo)[0]
  e = SpeculativeDecoder(plain, knowing(todo, want), always=True)
  tokens = assert_same_text(e, plain, todo)
  assert sum(t.drafted for t in tokens) > sum(t.accepted for t in tokens) > len(tokens) / 3
  tokens = tokens_of(e, todo[1:2])
  assert [t.id for t in tokens] == want[1]
  # Every pass but the prompt's gives what it accepts and one more, or ends the row.
  passes, accepted = sum(t.new_pass for t in tokens), sum(t.accepted for t in tokens)
  assert passes + accepted in (len(tokens), len(tokens) + 1)
  assert passes < len(tokens)


@pytest.mark.parametrize(
  "kind", ["wrong", "arbitrary", "nothing", "ngram", "model", "model, careful"]
)
def test_any_drafter_will_do(kind):
  """With three seeds each."""
  e, found = decoder(kind), 0
  for seed in (0, 100, 200):
    todo = requests(seed=seed)
    assert_same_text(e, engine(), todo)
    assert_same(run(e, todo[1:3]), run(engine(), todo[1:3]))
    tokens = tokens_of(e, todo)
    found += sum(t.accepted for t in tokens)
    assert sum(t.drafted for t in tokens) >= sum(t.accepted for t in tokens)
  assert found > 0 or kind in ("wrong", "arbitrary", "nothing")


@pytest.mark.parametrize("length", [1, 8])
def test_any_length_and_other_seeds(length):
  e = by_model(length=length)
  for seed in (100, 200):
    todo = requests(seed=seed)
    assert run(e, todo)[0] == run(engine(), todo)[0]


def test_more_requests_than_rows_and_one_row():
  e = SpeculativeDecoder(engine(rows=1), Ngram(least=1), always=True)
  assert_same(run(e, requests()), run(engine(), requests()))


def test_both_ways_in_one_text():
  """Where a clock decides, rows go on plainly and by drafts in turns; the drafter keeps up."""
  todo = requests(new=56)
  e = by_model(always=False)
  coins = np.random.default_rng(0).integers(0, 2, 1000).astype(bool)
  e.race = Coins(iter(coins.tolist()))
  tokens = tokens_of(e, todo)
  want = run(engine(), todo)[0]
  assert [[t.id for t in tokens if t.prompt == i] for i in range(5)] == want
  assert {t.drafted > 0 for t in tokens if t.new_pass} == {True, False}
  # A model that has missed a stretch of text guesses badly from there on.
  late = [t for t in tokens if t.position > 30 and t.prompt < 2]
  assert sum(t.accepted for t in late) > 0.5 * sum(t.drafted for t in late) > 0


def test_a_stop_inside_a_draft_ends_the_row_there():
  e, free = sure(), requests()[1]
  ids = run(engine(), [free])[0][0]
  for place in (2, 3, 6):
    stop = dataclasses.replace(free, stop=(ids[place],))
    tokens = tokens_of(e, [stop])
    assert [t.id for t in tokens] == ids[: ids.index(ids[place]) + 1]
    assert tokens[-1].finish == "stop"


def test_a_stop_string_inside_a_draft_ends_the_text_before_it():
  """Wherever tokens and drafts begin and end; other rows go on, and the slot can be used again."""
  e, todo = sure(), requests()[:3]
  free = [tokens_of(engine(), [request]) for request in todo]
  text = "".join(t.text for t in free[1])
  for start, end in ((3, 9), (10, 12), (0, 4)):
    ends = dataclasses.replace(todo[1], stop_text=("never", text[start:end]))
    tokens = tokens_of(e, [todo[0], ends, todo[2], todo[0], todo[1], todo[2], ends])
    said = [[t for t in tokens if t.prompt == i] for i in range(7)]
    for i in (1, 6):
      assert "".join(t.text for t in said[i]) == text[: text.find(text[start:end])]
      assert said[i][-1].finish == "stop"
      assert [t.id for t in said[i]] == [t.id for t in free[1]][: len(said[i])]
      whole = "".join(t.text for t in free[1][: len(said[i])])
      assert text[start:end] in whole
      assert text[start:end] not in whole[: -len(free[1][len(said[i]) - 1].text)]
    for i in (0, 2, 3, 4, 5):
      assert [t.id for t in said[i]] == [t.id for t in free[i % 3]]


def test_limits_inside_a_draft():
  """Of the request, and of the cache."""
  one = [dataclasses.replace(requests()[1], max_new_tokens=new) for new in (1, 2, 5, 11)]
  whole = Request([*range(1, 211), *range(1, 19)], 1000, seed=5)
  for e, r, n in [*((sure(), r, r.max_new_tokens) for r in one), (by_model(), whole, 28)]:
    tokens = tokens_of(e, [r])
    assert [t.id for t in tokens] == run(engine(), [r])[0][0]
    assert len(tokens) == n
    assert tokens[-1].finish == "length"


def test_what_was_rejected_leaves_no_trace():
  """Everything beyond a row's length is spoiled after every dispatch, in both models' caches."""

  def go(spoil):
    e = by_model()
    rows = ByHand(e)
    for slot, request in enumerate(requests()[:3]):
      rows.insert(slot, request)
    out = []
    for i in range(4):
      if spoil:
        e._memory = e._memory and poisoned(e._memory, np.nan, 1e30)
        rows.state = poisoned(rows.state, np.nan, 1e30)
      out.append(rows.decode(31 + 10 * i))
    return out

  for clean, dirty in zip(go(False), go(True), strict=True):
    for name in ("id", "flags", "branch"):
      live = clean["flags"] > 0
      np.testing.assert_array_equal(clean[name][live], dirty[name][live])


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_a_fork_goes_on_as_its_source_would(kind):
  """With the same noise, and as fast: the drafter's memory is forked, too."""
  rows, request = ByHand(decoder(kind)), requests(new=40)[1]
  rows.insert(1, request)
  rows.decode(9)
  rows.fork(1, 0, request.seed, 0)
  rows.fork(1, 3, request.seed, 7)
  said = [[] for _ in range(5)]
  for _ in range(4):
    values = rows.decode(60)
    live_NB = values["flags"] > 0
    for name in ("id", "flags"):
      np.testing.assert_array_equal(values[name][:, 0], values[name][:, 1])
    said = [ids + values["id"][:, i][live_NB[:, i]].tolist() for i, ids in enumerate(said)]
  assert said[0] == said[1] != said[3]
  assert said[3]
  assert not said[2] + said[4]


def test_ngram_drafts_what_followed_last_time():
  state = engine().init()
  history = np.zeros(state.history_BS.shape, np.int32)
  history[0, :10] = [5, 6, 7, 8, 9, 1, 5, 6, 7, 0]  # 5 6 7 stood there before, 8 9 1 followed
  history[1, :8] = [1, 2, 3, 4, 1, 2, 5, 2]  # only the last token did
  history[2, :9] = [1, 2, 7, 1, 2, 8, 9, 1, 2]  # twice: the latest counts
  history[3, :6] = [4, 4, 4, 4, 4, 4]  # up to the present
  state = state.replace(
    history_BS=jnp.asarray(history), len_B=jnp.asarray([8, 7, 8, 5, 0], jnp.int32)
  )
  _, draft_BG, count_B = Ngram().draft(None, (), state, 4, 128)
  assert count_B.tolist() == [4, 0, 4, 1, 0]
  assert draft_BG[0].tolist() == [8, 9, 1, 5]
  assert draft_BG[2].tolist() == [8, 9, 1, 2]
  assert draft_BG[3, 0] == 4


def test_what_became_of_guesses_is_counted():
  """By hand: of those behind the first that did not stand nothing is known."""
  rounds = {  # (drafted, accepted): (missed, foreseen)
    (4, 4): (0, 1.5),
    (4, 3): (1, 1.5),
    (4, 1): (1, 0.75),
    (4, 0): (1, 0.5),
    (1, 1): (0, 0.5),
  }
  risk_BG = jnp.asarray([[0.5, 0.25, 0.5, 0.25, 0.125]])
  for (drafted, accepted), (missed, foreseen) in rounds.items():
    counts = jnp.asarray([drafted]), jnp.asarray([accepted])
    found = drafters.adapt(jnp.asarray([2.0]), jnp.asarray([3.0]), risk_BG, *counts)
    kept = drafters.KEPT
    assert [float(x) for x in (found[0][0], found[1][0])] == pytest.approx(
      [2.0 * kept + missed, 3.0 * kept + foreseen]
    )
  none = jnp.asarray([0])
  found = drafters.adapt(jnp.asarray([2.0]), jnp.asarray([3.0]), risk_BG, none, none)
  assert [float(x) for x in (found[0][0], found[1][0])] == [2.0, 3.0]


def test_what_was_learned_is_a_rows_own():
  """A fork copies it, its row's drafts move it and no other's do, a new row has nothing of it; by it drafts end."""
  todo = requests(new=60)

  def rows_of(slots, bar=0.6):
    rows = ByHand(by_model(bar))
    for slot in slots:
      rows.insert(slot, todo[slot])
    return rows

  def learned(rows):
    memory = rows.decoder._memory
    return list(zip(memory.missed_B.tolist(), memory.foreseen_B.tolist(), strict=True))

  new = (0.0, 0.0)
  both, alone = rows_of([1, 2]), rows_of([1])
  for _ in range(2):
    both.decode(60), alone.decode(60)
  moved = learned(both)
  assert new != moved[1] != moved[2]
  assert moved[0] == moved[3] == moved[4] == new
  assert learned(alone)[1] == moved[1]
  both.fork(1, 3, 0, 0)
  assert learned(both)[3] == moved[1]
  both.insert(1, todo[4])
  both.decode(80)
  fresh = rows_of([])
  fresh.insert(1, todo[4])
  fresh.decode(80)
  assert learned(both)[1] == learned(fresh)[1]
  # Drafters of one engine share its programs, and not their bars.
  drafted = {}
  for bar in (0.0, 1.0):
    flags_N = rows_of([1], bar).decode(20)["flags"][:, 1]
    drafted[bar] = (flags_N >> DRAFTED).sum() / (flags_N >> DRAFTED > 0).sum()
  assert drafted[0.0] > drafted[1.0] >= 1


@functools.cache
def drafts():
  """The jitted draft of eight tokens, with the sampler that can exclude ids."""
  drafter = DraftModel(sibling("plain"))
  return drafter, jax.jit(lambda *rows: drafter.draft(drafter.weights, *rows, 8, 128))


@pytest.mark.parametrize("knobs", [{"temperature": 0.7}, {"temperature": 0.0, "allowed": FEW}])
def test_a_draft_ends_where_little_chance_is_left(knobs):
  """What each guess risks, by one pass over the text in float64, and so where drafts end."""
  request, (drafter, draft) = dataclasses.replace(requests()[0], knobs=knobs), drafts()
  hand = ByHand(engine("plain"))
  hand.insert(2, request)
  rows = hand.state
  new = drafter.insert(drafter.init(), drafter.prefill(request), 2)
  after, draft_BG, _ = draft(new, rows)

  text = [*request.ids, int(rows.token_B[2]), *draft_BG[2].tolist()]
  x_BTD, _, _ = llama.forward(SMALL, drafter.weights, jnp.asarray([text[:-1]]))
  logits_GV = np.asarray(llama.unembed(drafter.weights, x_BTD[0, len(request.ids) :]), np.float64)
  risk_G = []
  for g, logits_V in enumerate(logits_GV):
    noise_V = np.asarray(draw.gumbel(rows.key_B2[2:3], rows.out_B[2:3] + g, TINY.vocab), float)[0]
    score_V = logits_V + knobs["temperature"] * noise_V
    score_V[list(set(range(TINY.vocab)) - set(knobs.get("allowed", range(TINY.vocab))))] = -np.inf
    *_, second, first = np.sort(score_V)
    assert np.argmax(score_V) == draft_BG[2, g]
    ent, _ = oracles.ent_varent(oracles.probabilities(logits_V))
    risk_G.append(np.sqrt(drafters.GAMMA * ent) * np.exp(second - first))
  np.testing.assert_allclose(after.risk_BG[2, :8], risk_G, atol=1e-4)
  for missed, foreseen in ((0.0, 0.0), (0.5, 3.0), (2.0, 0.5)):
    memory = new.replace(
      missed_B=new.missed_B.at[2].set(missed), foreseen_B=new.foreseen_B.at[2].set(foreseen)
    )
    chance_G = 1 - np.array(risk_G) * (1 + missed) / (1 + foreseen)
    chance_G = np.cumprod([1.0, *np.maximum(chance_G, 0.0)])
    tried = 0
    for guesses, (before, now) in enumerate(itertools.pairwise(chance_G[:-1]), 1):
      if before - now > 1e-3:
        bar = (before + now) / 2
        count_B = draft(memory.replace(bar_B=memory.bar_B + bar), rows)[2]
        assert count_B.tolist() == [0, 0, guesses, 0, 0]
        tried += 1
    assert tried > 0


class Silent:
  """A sampler that reports no score and no temperature."""

  BRANCHES, Config, init, commit = tired.BRANCHES, tired.Config, tired.init, tired.commit

  @staticmethod
  def step(cfg, state, obs):
    return tired.step(cfg, state, obs).replace(stats={})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_lead_of_a_sampler_that_says_nothing_of_itself(temperature):
  """Of a law that is certain it is that of the logits, of another that of the law."""
  hand = ByHand(engine(Silent))
  knobs = {"temperature": temperature, "tires": 0.0, "luck": 0.0}
  hand.insert(2, dataclasses.replace(requests()[0], knobs=knobs))
  logits_BV = jnp.asarray(np.random.default_rng(3).normal(0, 2, (5, TINY.vocab)), jnp.float32)
  logits_BV, rows = logits_BV.at[:, 5:7].set(-jnp.inf), hand.state

  @jax.jit
  def next(rows):
    return next_token(hand.engine.setup, rows, logits_BV, None, drafters._with_lead)

  after, _, lead_B = next(rows)
  score_V = np.array(logits_BV[2])
  if temperature:
    noise_BV = draw.gumbel(rows.key_B2[2:3], rows.out_B[2:3], TINY.vocab)
    score_V = score_V / temperature + np.asarray(noise_BV)[0]
  *_, second, first = np.sort(score_V)
  assert np.argmax(score_V) == int(after.token_B[2])
  assert float(lead_B[2]) == pytest.approx(first - second, abs=1e-5)


def test_a_drafter_that_costs_more_is_tried_later():
  guesses = Ngram(), DraftModel(sibling())
  firsts = [SpeculativeDecoder(engine(), each, 8).race.first for each in guesses]
  # One of the target's size: eight and a half steps beyond a step, three passes, of 0.05 of the time.
  steps = engine().setup.config.steps_per_dispatch
  assert firsts == [FIRST, math.ceil(3 * 8.5 / (0.05 * steps))]


def test_a_pass_is_as_long_as_the_longest_draft():
  """Of every length, the logits are those of a whole pass."""
  e = engine()
  state = e.init()
  token_BT = np.full((5, 9), NONE, np.int32)
  token_BT[:, 0] = range(1, 6)
  past = e.setup.model.past(state, state.cache, 9, 128)
  sevens_BT = jnp.full((5, 9), 7).at[:, 0].set(token_BT[:, 0])
  whole = e.setup.model.logits(e.weights, state, sevens_BT, past)
  look = jax.jit(lambda token_BT: verify._logits(e.setup, e.weights, state, token_BT, past))
  for most in range(9):
    token_BT[2, 1 : most + 1] = 7
    logits, recent, attn = look(jnp.asarray(token_BT))
    fed = int(recent.n)
    assert fed == next(size for size in (1, 5, 9) if size > most)
    np.testing.assert_allclose(logits[2, : most + 1], whole[0][2, : most + 1], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(logits[0, 0], whole[0][0, 0], atol=2e-5, rtol=2e-5)
    assert not np.any(logits[:, fed:])
    assert jax.tree.leaves(attn)[0].shape == (5, 9)


def race_of(n, seconds, tokens=lambda i, way: 8, ahead=1, **kwargs):
  """The ways of n dispatches that take `seconds(i, way)` and give `tokens(i, way)`; some are sent ahead."""
  now, sent, ways = [0.0], [], []
  race = Race(False, lambda: now[0], **kwargs)
  for i in range(n):
    ways.append(race.next())
    sent.append((i, ways[-1]))
    if len(sent) > ahead:
      now[0] += seconds(*sent[0])
      race.read(tokens(*sent.pop(0)), 1, 1)
  return ways


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_race_that_drafting_wins(ahead):
  ways = race_of(400, lambda i, way: 1.0 if way else 2.0, ahead=ahead)
  assert ways[: FIRST + 1] == [False] * FIRST + [True]
  # After the first try it goes on by drafts, and the plain way gets a try of two now and then.
  again = ways[FIRST + 2 + ahead :]
  assert again[:FIRST] == [True] * FIRST
  assert 3 <= again.count(False) <= (2 + ahead) * (2 + 400 / AGAIN)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_race_that_drafting_loses_costs_little(ahead):
  """Guesses that are never right, passes that take twice as long: under 5% of 96 tokens, 2.5% of a long text."""
  for n, most in ((12, 0.05), (1000, 0.025)):
    for reads in (True, False):
      how = {"ahead": ahead, "catches_up": reads}
      ways = race_of(n, lambda i, way: 0.5 if way else 1.0, lambda i, way: 2 if way else 8, **how)
      lost = sum(ways) * (0.5 - 2 / 8)
      assert 0 < lost <= most * n
  assert ways.count(True) >= 1000 // LONGEST


def test_a_race_is_not_decided_by_one_slow_dispatch():
  """A machine stalls now and then, also during the first try."""
  late = []
  for seed in range(6):
    stalls = np.random.default_rng(seed).uniform(size=1000) < 0.05
    stalls[FIRST : FIRST + 2] = True
    costs = [5.0 * stall for stall in stalls]
    ways = race_of(1000, lambda i, way, costs=costs: (1.0 if way else 1.5) + costs[i])
    late += ways[400:]
  assert np.mean(late) > 0.55


def test_a_race_follows_the_text():
  """Drafts are good for a while, then never right: it is back on the plain way after a few dispatches."""
  ways = race_of(200, lambda i, way: 1.0, lambda i, way: (16 if i < 100 else 3) if way else 8)
  assert sum(ways[10:100]) > 80
  assert sum(ways[100 + RECENT + 2 :]) <= 10


def test_a_race_that_drafting_wins_narrowly_is_run_again_soon():
  """By less than one try can tell; what it has lost says nothing then."""
  tries = race_of(40, lambda i, way: 1.0 if way else (HALFWAY + MARGIN) / 2, catches_up=False)
  places = [i for i, way in enumerate(tries) if way]
  assert len(places) >= 5
  assert max(np.diff(places)) <= FIRST + 2


@pytest.mark.parametrize("each", [3, 5, 6])
def test_a_try_that_the_end_of_a_text_cut_off_is_made_again(each):
  """Texts of so many dispatches, of which the last gives nothing that counts; once, lest short ones pay for it."""
  now, ways = [0.0], []
  race = Race(False, lambda: now[0])
  for _ in range(30):
    race.begin()
    race.prompt()
    race.read(0, 0, 0)
    for i in range(each):
      ways.append(race.next(counts=i > 0))
      now[0] += 1.0 if ways[-1] else 2.0
      race.read(8, 1, int(i < each - 1))
  assert np.mean(ways[-3 * each :]) > 0.5
  assert sum(ways[: FIRST + 2 * each]) >= 2


def test_short_texts_do_not_try_each_time():
  now = [0.0]
  race = Race(False, lambda: now[0])
  tries = 0
  for _ in range(100):  # no verdict ever
    race.begin()
    tries += race.next(counts=False) + race.next()
  assert tries <= 4 * (1 + 200 / AGAIN)


def test_a_race_looks_again_when_the_text_begins_to_repeat_itself():
  """Drafts are never right for 100 dispatches, and always from then on; the host sees that for nothing."""
  for sees in (False, True):
    now, ways, race = [0.0], [], None
    race = Race(False, lambda now=now: now[0], catches_up=False)
    for i in range(140):
      race.would = (1.0 if i < 100 else 8.0) if sees else None
      ways.append(race.next())
      now[0] += 1.0
      race.read((16 if i >= 100 else 4) if ways[-1] else 8, 2 if ways[-1] else 8, 1)
    assert sum(ways[:100]) <= 4
    assert (sum(ways[104:]) >= 30) == sees
  assert race.cost == pytest.approx(4.0)  # two passes take as long as eight steps


@pytest.mark.parametrize("rule", [Ngram(), Ngram(least=1, most=2)])
def test_the_host_knows_what_ngrams_would_have_drafted(rule):
  """Tokens of each pass, of repetitive texts that always draft."""
  decoder = SpeculativeDecoder(engine(), rule, 4, always=True)
  decoder.compiled = compiled().setdefault(repr(rule), decoder.compiled)
  todo = [Request(ids * 3, 40, seed=i) for i, ids in enumerate(([3, 8, 13], [3, 3], [8, 3, 8, 18]))]
  said = tokens_of(decoder, todo)
  for i, request in enumerate(todo):
    tokens = [token for token in said if token.prompt == i]
    echo = Echo(rule, 4, request.ids)
    ends = [i + 1 for i, token in enumerate(tokens) if echo.passes([token.id])]
    begins = [i for i, token in enumerate(tokens) if token.new_pass]
    assert begins[1:] == ends[: len(begins) - 1]
  assert rule.least > 1 or sum(token.accepted for token in said) > 3


def test_a_race_of_equals_stays_where_it_is():
  rng = np.random.default_rng(0)
  ways = race_of(400, lambda i, way: 1.0 + 0.01 * rng.uniform())
  assert sum(ways) <= 2 * (1 + 400 / AGAIN)  # tries, which cost nothing here


def test_models_of_other_vocabularies_are_refused():
  cfg = dataclasses.replace(TINY, vocab=TINY.vocab + 8)
  other = Engine.create(cfg, weights.random(cfg, jnp.float32), tired, EngineConfig(5, 256))
  with pytest.raises(UserError, match="share one vocabulary"):
    SpeculativeDecoder(engine(), DraftModel(other))


def test_prompts_are_read_by_both_models():
  """Long ones, too, in pieces."""
  pieces = engine(prefill_chunk=16)
  e = SpeculativeDecoder(pieces, DraftModel(Engine(pieces.setup, sibling().weights)), always=True)
  e.drafter.engine.compiled = pieces.compiled
  todo = [Request(ids, 12, seed=3) for ids in PROMPTS[:2] + PROMPTS[4:]]
  assert_same(run(e, todo), run(engine(), todo))
