"""Healing, bytes and segmentations against enumeration on a small vocabulary with byte fallback, and on the demo model."""

import collections
import functools
import itertools
import math

import command
import numpy as np
import pytest
from conftest import refusal

from entropix_jax import LLM
from entropix_jax.checkpoints.tokenizer import Tokenizer
from entropix_jax.scheduler import generate
from entropix_jax.tokens import bytes as by_bytes
from entropix_jax.tokens import heal, lens, segmentations
from entropix_jax.tokens.spelling import Spelling, spelling

# Ids 0 to 3 are bytes of a fallback, of which "a" and "b" have tokens of their own, too.
WORDS = [b"a", b"b", b"c", b"\xc3", b"a", b"b", b"ab", b"bc", b"abc", b"ca", b"aba", b" a"]
END = len(WORDS)


def greedy(text, begins):
  """The longest token at each place."""
  data, ids = text.encode(), []
  while data:
    n = max(n for n in range(1, 4) if data[:n] in WORDS)
    ids.append(len(WORDS) - 1 - WORDS[::-1].index(data[:n]))
    data = data[n:]
  return ids


@functools.cache
def small(words=tuple(WORDS)):
  """The Spelling of a small vocabulary."""
  return Spelling(Tokenizer(greedy, dict(enumerate(words)), {"<end>": len(words)}))


class Random:
  """A model whose laws are random, each fixed by the last two tokens."""

  def __init__(self, seed=0, vocab=END + 1):
    self.seed, self.vocab, self.rows = seed, vocab, 0

  def after(self, texts):
    self.rows += len(texts)
    rngs = (np.random.default_rng([self.seed, *(i + 1 for i in text[-2:])]) for text in texts)
    return np.log([rng.dirichlet(np.full(self.vocab, 0.5)) for rng in rngs])

  def score(self, texts, start):
    return [
      np.asarray([self.after([text[:i]])[0, text[i]] for i in range(start, len(text))])
      for text in texts
    ]


def paths(laws, spelled, before, data, ids=(), p=1.0):
  """(path, probability) of all paths whose bytes begin with `data` and would not without their last token."""
  if ids and spelled.data(ids)[: len(data)] == data:
    yield ids, p
    return
  p_V = np.exp(laws.after([(*before, *ids)])[0])
  for id in spelled.rank:
    got = spelled.data((*ids, id))
    if got.startswith(data) or data.startswith(got):
      yield from paths(laws, spelled, before, data, (*ids, id), p * p_V[id])


# -- healing -----------------------------------------------------------------------------------


def followed(tree):
  """{path: probability} of the law that a tree's guides give a sampler that draws from what it is given."""
  found, todo = {}, [((), 1.0)]
  while todo:
    path, p = todo.pop()
    guide = tree.guide()
    for id in path:
      guide.push(id)
    if guide.free:
      found[path] = p
      continue
    bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")[: tree.vocab]
    logp_V = np.where(bits, LAWS.after([(*tree.kept, *path)])[0], -np.inf)
    for id, lift in guide.lifts.items():
      logp_V[id] += lift
    logp_V -= np.logaddexp.reduce(logp_V)
    todo += [((*path, id), p * math.exp(logp_V[id])) for id in range(tree.vocab) if bits[id]]
  return found


LAWS = Random()
HELD = [(4,), (6,), (4, 5), (6, 4), (8, 6), (11,), (2, 9, 2), (3,)]


@pytest.mark.parametrize("held", HELD)
def test_healing_follows_the_exact_conditional_law(held):
  """Also the law of masking step by step is another one, wherever a token can write a part of the bytes."""
  spelled, kept = small(), (2, 2)
  want = dict(paths(LAWS, spelled, kept, spelled.data(held)))
  whole = sum(want.values())
  tree = heal.Tree(LAWS, spelled, kept, held, tolerance=0.0, most=10**4)
  got = followed(tree)
  assert tree.missing == 0
  assert got.keys() == want.keys()
  np.testing.assert_allclose(
    [got[path] for path in want], np.array([*want.values()]) / whole, rtol=1e-9
  )
  assert tree.nodes[()].value == pytest.approx(whole, rel=1e-9)
  masked = heal.Tree(LAWS, spelled, kept, held, tolerance=0.0, most=10**4)
  masked.lifts = lambda path: {}
  distance = 0.5 * sum(abs(p - got[path]) for path, p in followed(masked).items())
  assert (distance > 0.01) == any(tree.nodes[path].within for path in tree.nodes)


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
def test_a_tree_that_is_cut_is_as_close_as_it_says(tolerance):
  spelled, kept, held = small(), (2,), (8, 8, 6)
  want = dict(paths(LAWS, spelled, kept, spelled.data(held)))
  whole = sum(want.values())
  before = LAWS.rows
  tree = heal.Tree(LAWS, spelled, kept, held, tolerance)
  asked = LAWS.rows - before
  got = followed(tree)
  distance = 0.5 * sum(abs(got.get(path, 0) - p / whole) for path, p in want.items())
  assert 0 < distance <= tree.missing
  assert asked == len(tree.nodes)


@pytest.mark.parametrize(
  ("ids", "held"),
  [
    ([2, 8], (8,)),  # "cabc": "ca" begins with the last "c"
    ([2, 4, 5], (4, 5)),  # "cab": "abc" begins with "ab"
    ([2, 2, 3], ()),  # no token begins with the last byte and goes on
    ([6, END, 5], (5,)),  # control tokens stay
    ([6], ()),  # and so does the first token
  ],
)
def test_a_prompt_is_rolled_back_as_far_as_a_token_could_have_bridged(ids, held):
  assert heal.roll_back(small(), ids) == (tuple(ids[: len(ids) - len(held)]), held)


def test_a_pair_that_the_tokenizer_would_not_make_has_the_probability_that_the_model_gives_it():
  """ "a" is kept and "b" held: the tokenizer would write "ab" as one token, but "a" stays what it is."""
  tree = heal.Tree(LAWS, small(), (4,), (5,), tolerance=0.0)
  p_V = np.exp(LAWS.after([(4,)])[0])
  assert greedy("ab", True) == [6]
  assert followed(tree)[(5,)] == pytest.approx(p_V[5] / p_V[[1, 5, 7]].sum())


# -- bytes -------------------------------------------------------------------------------------


def enumerated(laws, spelled, before, data):
  """p_X of the next byte or the end, by the sum over all paths."""
  mass = np.zeros(by_bytes.END + 1)
  for ids, p in paths(laws, spelled, before, data) if data else [((), 1.0)]:
    got = spelled.data(ids)
    if len(got) > len(data):
      mass[got[len(data)]] += p
    else:
      p_V = np.exp(laws.after([(*before, *ids)])[0])
      mass[by_bytes.END] += p * p_V[END]
      for id in spelled.rank:
        mass[spelled.data([id])[0]] += p * p_V[id]
  return mass / mass.sum()


@pytest.mark.parametrize("data", [b"abcab", b"caabac", b" a\xc3ab"])
def test_the_law_of_the_next_byte_is_the_sum_over_all_paths(data):
  walk = by_bytes.Walk(LAWS, small(), (2,), [END], tolerance=0.0)
  for i in range(len(data)):
    np.testing.assert_allclose(walk.law, enumerated(LAWS, small(), (2,), data[:i]), atol=1e-12)
    walk.push(data[i])
  np.testing.assert_allclose(walk.law, enumerated(LAWS, small(), (2,), data), atol=1e-12)
  assert walk.missing == 0


def test_dropped_paths_move_the_law_by_no_more_than_is_said():
  """The law after each text, and that of whole texts, for all texts of four bytes."""
  share, distance, asked = 0.05, 0.0, []
  for text in itertools.product(b"abc", repeat=4):
    found = []
    for tolerance in (0.0, share):
      walk, p = by_bytes.Walk(LAWS, small(), (2,), [END], tolerance), 1.0
      start = walk.logp
      for byte in text:
        p *= walk.law[byte]
        if not p:
          break
        walk.push(byte)
      found.append((p, walk))
      asked.append(walk.rows)
    (whole, exact), (part, rough) = found
    assert math.log(whole) == pytest.approx(exact.logp - start, abs=1e-9)
    distance += max(part - whole, 0)
    if part:
      assert rough.logp <= exact.logp + 1e-12
      assert 0.5 * np.abs(exact.law - rough.law).sum() <= rough.missing + 1e-12
  assert 0 < distance <= 1 - (1 - share) ** 4
  assert sum(asked[1::2]) < sum(asked[::2])


def test_two_tokenizers_write_one_text_from_the_mean_of_their_laws():
  """The bytes that are drawn have the mixed law, by chi-square over their first three."""
  other = small((b"a", b"b", b"c", b"\xc3", b" ", b"ba", b"cab"))
  models = ((LAWS, small(), END), (Random(5, 8), other, 7))

  def walks():
    return [by_bytes.Walk(laws, s, (2,), [end], 0.0) for laws, s, end in models]

  want = {}
  for text in itertools.product(b"abc", repeat=3):
    both, p = walks(), 1.0
    for byte in text:
      p *= by_bytes.mixed([walk.law for walk in both], [1, 3])[byte]
      [walk.push(byte) for walk in both]
    want[bytes(text)] = p
  got = collections.Counter(by_bytes.written(walks(), 3, [1, 3], seed=i) for i in range(1500))
  terms = [(got[text] - 1500 * p) ** 2 / (1500 * p) for text, p in want.items()]
  rest = 1 - sum(want.values())
  terms.append((1500 - sum(got[t] for t in want) - 1500 * rest) ** 2 / (1500 * rest))
  assert sum(terms) < 27 + 4 * math.sqrt(2 * 27)


def test_mixing_is_a_mean_or_a_product():
  a, b = np.asarray([0.5, 0.5, 0.0]), np.asarray([0.9, 0.0, 0.1])
  np.testing.assert_allclose(by_bytes.mixed([a, b], [3, 1]), 0.75 * a + 0.25 * b)
  np.testing.assert_allclose(by_bytes.mixed([a, b], [1, 1], "product"), [1, 0, 0])
  np.testing.assert_allclose(by_bytes.mixed([a, b], [1, 0], "product"), a)
  refusal(["no next byte in common"], by_bytes.mixed, [a, a[::-1] * [0, 0, 1]], [1, 1], "product")
  refusal(["shares"], by_bytes.mixed, [a, b], [1, -1])
  refusal(["mean or product"], by_bytes.mixed, [a, b], [1, 1], "sum")
  walk = by_bytes.Walk(LAWS, small(), (2,))
  refusal(["byte 120"], walk.push, ord("x"))


# -- segmentations -----------------------------------------------------------------------------


def test_segmentations_are_all_ways_to_write_a_text():
  spelled, data = small(), b"abcab"
  found = list(segmentations.every(spelled, data))
  want = {
    ids
    for n in range(1, 6)
    for ids in itertools.product(spelled.rank, repeat=n)
    if spelled.data(ids) == data
  }
  assert set(found) == want
  assert len(found) == len(want) == segmentations.count(spelled, data)
  assert segmentations.count(spelled, b"xa") == 0


def test_the_probability_of_a_text_is_the_sum_over_its_segmentations():
  """Enumerated exactly; estimated without bias, within the error that is told."""
  spelled, own = small(), (8, 6, 8)
  data = spelled.data(own)
  p = {
    ids: math.exp(LAWS.score([(2, *ids)], 1)[0].sum()) for ids in segmentations.every(spelled, data)
  }
  exact = segmentations.marginal(LAWS, spelled, (2,), own)
  assert exact.total == pytest.approx(math.log(sum(p.values())), abs=1e-9)
  assert exact.canonical == pytest.approx(math.log(p[own]), abs=1e-9)
  assert (exact.error, exact.ways, len(exact.rows)) == (0.0, len(p), len(p))
  assert exact.gap > 0
  likeliest = exact.rows[0][0]  # so that counting it twice would be seen
  assert exact.rows[0][1] - exact.total > math.log(0.2)
  drawn = [
    segmentations.marginal(LAWS, spelled, (2,), likeliest, draws=40, most=1, seed=i)
    for i in range(40)
  ]
  assert all(one.gap >= 0 for one in drawn)
  share = np.exp([one.total - exact.total for one in drawn])
  assert abs(share.mean() - 1) < 4 * share.std() / math.sqrt(40)
  assert np.mean([one.error for one in drawn]) == pytest.approx(share.std(), rel=0.5)


# -- the demo ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
  return LLM.demo(max_seq_len=128, batch_size=4)


STORY = "Once upon a time there was a little girl named Lily. She loved to pl"
PLAIN = {"format": "plain", "sampler": "plain"}


def test_dropout_splits_words_and_none_is_the_tokenizers_own(llm):
  spelled, ids = spelling(llm.tokenizer), llm.tokenizer.encode(STORY + "ay 12 games,\n\n  don't!")
  rng = np.random.default_rng(0)
  assert segmentations.sampled(spelled, ids, 0.0, rng) == tuple(ids)
  for dropout in (0.2, 0.7, 1.0):
    other = segmentations.sampled(spelled, ids, dropout, rng)
    assert spelled.data(other) == spelled.data(ids)
    assert len(other) > len(ids)
  assert len(other) == len(spelled.data(ids))
  refusal(["dropout is 2"], segmentations.sampled, spelled, ids, 2, rng)


def test_healed_tokens_have_the_conditional_law_of_the_model(llm):
  """The law that the engine reports is the one by enumeration, and its draws follow it."""
  ids = [*llm.tokenizer.prefix, *llm.tokenizer.encode(STORY)]
  spelled = spelling(llm.tokenizer)
  kept, held = heal.roll_back(spelled, ids)
  assert spelled.data(held) == b" pl"
  session = llm._session(heal=True, **PLAIN)
  session.ready([session.ask(STORY, 2, 0)])
  want = collections.Counter()
  for path, p in paths(session.laws, spelled, kept, spelled.data(held)):
    want[path[0]] += p
  whole = sum(want.values())
  got = collections.Counter()
  for seed in range(0, 400, 100):
    for token in session.go([session.ask(STORY, 1, seed + i) for i in range(100)]):
      got[token.id] += 1
      assert token.logprob_law == pytest.approx(math.log(want[token.id] / whole), abs=2e-3)
  likely = [id for id, p in want.items() if 400 * p / whole > 4]
  terms = [(got[id] - 400 * want[id] / whole) ** 2 / (400 * want[id] / whole) for id in likely]
  assert len(likely) > 3
  assert sum(terms) < len(likely) + 4 * math.sqrt(2 * len(likely))


def test_the_engine_adds_what_a_guide_says(llm):
  """A guide that allows two tokens and lifts one of them: their laws have the ratio that it says."""

  class Two:
    over = free = False

    def __init__(self, lift):
      self.lifts = {101: lift}

    def push(self, id):
      self.free = True

    def mask(self):
      bit_V = np.zeros((32 * session.setup.mask_words,), bool)
      bit_V[[100, 101]] = True
      return np.packbits(bit_V, bitorder="little").view("<u4").astype(np.uint32)

  session = llm._session(heal=True, **PLAIN)
  todo = [session.ask(STORY, 1, seed) for seed in range(8)]
  session.ready(todo)
  found = {}
  for lift in (0.0, 2.5):
    guides = [functools.partial(Two, lift)] * len(todo)
    for token in generate(
      session.engine, llm.tokenizer, todo, decoder=session.decoder, guides=guides
    ):
      assert token.id in (100, 101)
      odds = token.logprob_law - math.log1p(-math.exp(token.logprob_law))
      sign = 1 if token.id == 101 else -1
      assert sign * odds == pytest.approx(found.setdefault(lift, sign * odds), abs=1e-3)
  assert found[2.5] - found[0.0] == pytest.approx(2.5, abs=1e-3)


def test_healing_goes_on_with_the_bytes_that_were_cut(llm):
  """The text begins after the prompt; tokens begin with the bytes that it had; a seed gives the same text in any company."""
  alone = llm.generate(STORY, heal=True, seed=3, max_new_tokens=12, **PLAIN)
  done = llm.generate(["One d", STORY, "The"], heal=True, seed=3, max_new_tokens=12, **PLAIN)
  assert [t.id for t in done[1].tokens] == [t.id for t in alone.tokens]
  data = llm.tokenizer.decode_bytes([t.id for t in alone.tokens])
  assert data == b" pl" + alone.text.encode()
  assert len(alone.tokens) == 12
  stream = llm.stream(STORY, heal=True, seed=3, max_new_tokens=12, **PLAIN)
  assert "".join(token.text for token in stream) == alone.text
  stopped = llm.generate(STORY, heal=True, seed=3, stop=alone.text[:3], **PLAIN)
  assert (stopped.text, stopped.finish) == ("", "stop")


def test_healing_changes_nothing_where_nothing_can_bridge_the_end(llm):
  """A line break begins no longer token of the demo."""
  prompt = STORY + "ay.\n"
  assert not spelling(llm.tokenizer).extends(b"\n")
  healed, usual = (
    llm.generate(prompt, heal=heals, seed=1, max_new_tokens=8, **PLAIN) for heals in (True, False)
  )
  assert [t.numbers for t in healed.tokens] == [t.numbers for t in usual.tokens]


def test_what_healing_cannot_do_is_said_in_a_sentence(llm):
  refusal(["heal", "chat"], llm.generate, "Hel", heal=True)
  refusal(["heal", "best_of_n"], llm.generate, "Hel", heal=True, format="plain", n=2)
  refusal(["banned", "heal"], llm.generate, "Hel", heal=True, banned=[5], **PLAIN)
  refusal(["inject", "heal"], llm.generate, "Hel", heal=True, inject="x", inject_ent=1.0, **PLAIN)
  refusal(["heal is 'yes'"], llm.generate, "Hel", heal="yes", format="plain")


def test_laws_are_those_of_the_engine_whatever_is_asked_together(llm):
  session = llm._session(preset="none", **PLAIN)
  ids = [*llm.tokenizer.prefix, *llm.tokenizer.encode(STORY)]
  session.ready([session.ask(STORY, 2, 0)])
  texts = [ids[:n] for n in (1, 2, 5, len(ids))] + [[*ids[:7], *ids[3:9]]]
  for group in (texts, texts[3:], texts[3:4]):
    got = session.laws.after(group)
    for text, logp_V in zip(group, got, strict=True):
      prefix = session.engine.prefill(session.request(text, 1, 0))
      logits_V = np.asarray(prefix.logits_1V, np.float64)[0]
      np.testing.assert_allclose(logp_V, logits_V - np.logaddexp.reduce(logits_V), atol=1e-4)
  scores = session.laws.score(texts[2:], 3)
  assert [len(x) for x in scores] == [len(text) - 3 for text in texts[2:]]
  assert scores[1].sum() == pytest.approx(
    llm.score(llm.tokenizer.decode(ids[1:3]), llm.tokenizer.decode(ids[3:])), abs=1e-3
  )


def test_a_lens_shows_every_byte_of_a_text(llm):
  text = "A story\t12\n\u00e9\u2003<|eot_id|>!"
  found = lens.look(llm.tokenizer, text, control=True)
  assert b"".join(p.data for p in found) == text.encode()
  assert [p.start for p in found[1:]] == [p.end for p in found[:-1]]
  kinds = {p.text: p.kind for p in found}
  assert kinds["<|eot_id|>"] == "control"
  assert (kinds["1"], kinds["\u23ce"], kinds["\u00e9"], kinds["!"]) == (
    "digit",
    "space",
    "word",
    "sign",
  )
  assert "bytes" in kinds.values()
  merged = next(p for p in found if p.text == "\u00b7story")
  assert merged.merges[-1][0] + merged.merges[-1][1] == "\u00b7story"
  plain = lens.look(llm.tokenizer, text)
  assert "control" not in {p.kind for p in plain}
  left, right = lens.look(llm.tokenizer, "abcab"), lens.look(small().tokenizer, "abcab")
  spans = lens.beside(left, right)
  assert [p for span in spans for p in span[1]] == right
  assert all(sum(len(p.data) for p in a) == sum(len(p.data) for p in b) for a, b in spans)
  twice = lens.beside(plain, plain)
  assert [len(left) for left, right in twice] == [1] * len(plain)


# -- the command line ------------------------------------------------------------------------------

TOOL = "entropix_jax/tokens/__main__.py"


def test_every_tool_has_a_command(llm, monkeypatch):
  program = command.load(TOOL)
  monkeypatch.setattr(program, "_llm", lambda name: llm)
  for args, words in {
    ("lens", "A story", "--beside", str(command.BASE)): "\u00b7story",
    ("segmentations", " kite", "--before", "She flew her"): "all 6 segmentations",
    ("heal", STORY): "held: \u00b7pl",
    ("heal", STORY + "ay.\n"): "nothing is held",
    ("bytes", STORY): "end of the text",
    ("bytes", STORY, "--write", "4"): STORY,
    ("answers", "What is 7 + 5?", "-k", "2", "--json"): '"entropy"',
  }.items():
    code, out, err = command.run(program, *args)
    assert code == 0, err
    assert words in out
  for args, words in {
    ("look", "a"): "invalid choice",
    ("lens", ""): "empty",
    ("lens", "a", "--model", "no_such_model"): "no_such_model",
    ("segmentations", "a", "-k", "0"): "k is 0",
    ("segmentations", "a" * 301): "300 bytes",
    ("answers", "a", "--dropout", "7"): "dropout is 7",
    ("bytes", "a", "--write", "-1"): "--write is -1",
    ("bytes", "a", "--beside", "b"): "--write",
  }.items():
    command.is_one_sentence(command.run(program, *args), words)


def test_healing_is_a_flag(llm):
  flags = ["--config.format=plain", "--config.sampler.name=plain", "--max_new_tokens=8", "--seed=3"]
  code, out, err = command.run(
    command.MAIN, command.CONFIG, f"--prompt={STORY}", "--config.heal", *flags
  )
  assert code == 0, err
  want = llm.generate(STORY, heal=True, seed=3, max_new_tokens=8, **PLAIN)
  assert out.strip() == STORY + want.text.rstrip()
  found = command.run(command.MAIN, command.CONFIG, "--prompt=Hel", "--config.heal")
  command.is_one_sentence(found, "config.heal")
