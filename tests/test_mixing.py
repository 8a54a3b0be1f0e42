"""Mixing several models' logits: every formula and state machine against float64, and what all must hold."""

import dataclasses
import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import refusal

from entropix_jax import sampling
from entropix_jax.checkpoints import vocabulary
from entropix_jax.decoding import mixing
from entropix_jax.decoding.mixing import CONTENT, FUNCTION, MARK

V, B, T = 41, 6, 300
END = 40  # the id by which texts end
NEVER = 1e9
every_method = pytest.mark.parametrize("name", mixing.names())


# -- a world to mix in -------------------------------------------------------------------------


def words():
  """(starts_V, words_V) of a made-up vocabulary: marks, starts and pieces in turns."""
  words_V = np.full(V, CONTENT, np.int8)
  words_V[::7], words_V[1::7], words_V[END] = MARK, FUNCTION, MARK
  starts_V = np.arange(V) % 3 > 0
  return starts_V | (words_V == MARK), words_V


def streams(k, seed=0):
  """(logits (k, T, B, V), token_TB): kin models that agree a lot, from sure to open, and drift."""
  rng = np.random.default_rng(seed)
  common = rng.standard_normal((T, B, V))
  drift = np.cumsum(rng.standard_normal((T, B)), axis=0)
  sharp = np.exp(1.2 + 0.9 * np.sin(drift / 3))[..., None]
  own = rng.standard_normal((k, T, B, V))
  logits = sharp * (common + 0.35 * own) + 3 * rng.standard_normal((k, 1, 1, 1))
  return logits.astype(np.float32), rng.integers(0, V, (T, B)).astype(np.int32)


def knobs(name, *settings):
  """A Config of one row for each settings, or of B equal rows."""
  method = mixing.find(name)
  cfgs = [sampling.configure(method, s) for s in settings]
  if len(cfgs) == 1:
    return sampling.arrays(cfgs[0], B)
  return jax.tree.map(lambda *x: np.concatenate(x), *(sampling.arrays(c) for c in cfgs))


_compiled = {}


def view_of(logits, token_B, pos_B):
  """What a method sees of rows in the made-up vocabulary."""
  starts_V, words_V = map(jnp.asarray, words())
  stop_BE = jnp.tile(jnp.asarray([END, -1], jnp.int32), (len(token_B), 1))
  return mixing.View(tuple(logits), token_B, pos_B, starts_V, words_V, stop_BE)


def play(name, cfg, logits, token_TB):
  """Mixed.logits_BV and stats, stacked over time, of a jitted scan; jit and scan are part of the test."""
  method = mixing.find(name)

  def run(cfg, logits, token_TB):
    rows = token_TB.shape[1]

    def step(state, at):
      z, fed_B, next_B, i = at
      view = view_of(z, fed_B, jnp.full((rows,), i))
      mixed = method.mix(cfg, state, view)
      state = method.commit(cfg, state, mixed, view, next_B)
      return state, (mixed.logits_BV, mixed.stats)

    steps = len(token_TB)
    fed_TB = jnp.concatenate([jnp.zeros_like(token_TB[:1]), token_TB[:-1]])
    xs = (jnp.moveaxis(logits, 0, 1), fed_TB, token_TB, jnp.arange(steps))
    return jax.lax.scan(step, method.init(cfg, rows), xs)[1]

  run = _compiled.setdefault(name, jax.jit(run))
  out, stats = jax.tree.map(np.asarray, run(cfg, jnp.asarray(logits), jnp.asarray(token_TB)))
  return out, stats


def models(name):
  return len(mixing.find(name).MODELS)


def probabilities(z):
  return np.exp(np.apply_along_axis(oracles.log_softmax, -1, np.asarray(z, np.float64)))


# -- formulas ----------------------------------------------------------------------------------


def test_proxy_is_base_and_what_tuning_changed_within_what_base_finds_plausible():
  logits, tokens = streams(3)
  out, stats = play("proxy", knobs("proxy", {"cut": 0.02, "alpha": 2.0}), logits, tokens)
  p = probabilities(logits[0])
  keep = p >= 0.02 * p.max(-1, keepdims=True)
  np.testing.assert_array_equal(out > -np.inf, keep)
  np.testing.assert_array_equal(stats["kept"], keep.sum(-1))

  alphas = [0.0, 0.3, 1.0, 1.5, 2.0, 4.0]
  out, stats = play("proxy", knobs("proxy", *({"alpha": a} for a in alphas)), logits, tokens)
  base, expert, anti = logits.astype(np.float64)
  truth = base + np.asarray(alphas)[:, None] * (expert - anti)
  np.testing.assert_allclose(probabilities(out), probabilities(truth), rtol=1e-4, atol=1e-9)
  assert np.all(stats["kept"] == V)
  for i, z in enumerate(logits):
    truth = [[oracles.ent_varent(p)[0] for p in row] for row in probabilities(z)]
    np.testing.assert_allclose(stats[f"entropy_{i}"], truth, atol=2e-5)


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_contrastive_is_the_published_score_in_the_published_set(temp):
  logits, tokens = streams(2)
  betas = [0.0, 0.1, 0.5, 1.0, 2.0, 0.5]
  cuts = [0.1, 0.0, 0.1, 0.3, 1.0, 0.01]
  settings = ({"beta": b, "cut": c, "amateur_temp": temp} for b, c in zip(betas, cuts, strict=True))
  out, stats = play("contrastive", knobs("contrastive", *settings), logits, tokens)
  expert, amateur = logits.astype(np.float64)
  beta, p = np.asarray(betas)[:, None], probabilities(expert)
  keep = p >= np.asarray(cuts)[:, None] * p.max(-1, keepdims=True)
  truth = np.where(keep, (1 + beta) * expert - beta * amateur / temp, -np.inf)
  np.testing.assert_allclose(probabilities(out), probabilities(truth), rtol=1e-4, atol=1e-9)
  np.testing.assert_array_equal(stats["kept"], keep.sum(-1))


# -- state machines ----------------------------------------------------------------------------


class Slow:
  """What a row's machine may ask about a position, in float64 and plain Python."""

  def __init__(self, logits, fed, pos):
    starts_V, words_V = words()
    self.p = [probabilities(z) for z in logits]
    self.best = [int(np.argmax(p)) for p in self.p]
    self.ent = [oracles.ent_varent(p)[0] for p in self.p]
    self.sure = [p.max() for p in self.p]
    self.role = words_V[self.best[0]]
    self.starts = [pos == 0 or words_V[fed] == MARK or bool(starts_V[b]) for b in self.best]
    self.pos = pos


class SlowNudge:
  def __init__(self, sure=0.3, agree=True, aligned_ends=True):
    self.least, self.agree, self.aligned_ends, self.speaker = sure, agree, aligned_ends, "base"

  def step(self, at):
    sure = at.sure[0] >= self.least and not (self.aligned_ends and at.best[0] == END)
    if self.speaker == "base":
      if not sure:
        self.speaker = "aligned"
    elif at.starts[1] and (sure or (self.agree and at.best[0] == at.best[1])):
      self.speaker = "base"
    return {"weight": float(self.speaker == "aligned")}


class SlowRoute:
  def __init__(self, prob=0.5, ent=NEVER, marks=True, functions=False):
    self.prob, self.ent, self.speaker = prob, ent, 0
    self.aligned_roles = [MARK] * marks + [FUNCTION] * functions

  def step(self, at):
    if at.starts[self.speaker]:
      unsure = at.sure[0] < self.prob or at.ent[0] > self.ent
      self.speaker = 0 if unsure and at.role not in self.aligned_roles else 1
    return {"weight": float(self.speaker)}


class SlowRevive:
  """The definition read aloud: all means are kept, and the last `patience` of them looked at."""

  def __init__(
    self, decay=0.9, low_ent=0.1, high_ent=0.5, patience=8, most=8, weight=0.5, weight_kl=0.0
  ):
    self.decay, self.low, self.high = decay, low_ent, high_ent
    self.patience, self.most = patience, most
    self.weight, self.weight_kl = weight, weight_kl
    self.means, self.since = [], 0  # since: the first position that counts to `patience`
    self.collapse, self.injected = False, 0

  def step(self, at):
    before = self.means[-1] if self.means else None
    mean = at.ent[0] if before is None else self.decay * before + (1 - self.decay) * at.ent[0]
    self.means.append(mean)
    if self.collapse and mean >= self.high:
      self.collapse, self.injected = False, 0
      self.since = len(self.means)
    elif not self.collapse:
      window = self.means[self.since :][-self.patience :]
      self.collapse = len(window) == self.patience and max(window) < self.low
    out = {"entropy_mean": mean, "collapsed": float(self.collapse), "weight": 0.0, "kl": 0.0}
    if self.collapse and (self.injected or at.starts[0]):
      self.injected += 1
      kl = float((at.p[1] * np.log(at.p[1] / at.p[0])).sum())
      out["kl"] = kl
      out["weight"] = 1 - (1 - self.weight) * math.exp(-self.weight_kl * kl)
      if self.injected == self.most:
        self.collapse, self.injected, self.since = False, 0, len(self.means)
    return out


SETTINGS = {
  "nudge": [
    {}, {"sure": 0.6}, {"sure": 0.8, "agree": False}, {"sure": 0.5, "aligned_ends": False},
    {"sure": 0.95}, {"sure": 0.9, "agree": False, "aligned_ends": False},
  ],
  "route": [
    {}, {"prob": 0.8}, {"prob": 0.0, "ent": 1.0}, {"prob": 0.9, "functions": True},
    {"prob": 0.7, "marks": False}, {"prob": 0.6, "ent": 1.5, "marks": False, "functions": True},
  ],
  "revive": [
    {"low_ent": 0.9, "high_ent": 1.2, "patience": 3},
    {"low_ent": 0.8, "high_ent": 1.2, "patience": 1, "most": 3, "decay": 0.5},
    {"low_ent": 1.0, "high_ent": 1.01, "patience": 5, "most": 50, "weight": 0.2},
    {"low_ent": 0.7, "high_ent": 2.0, "patience": 4, "most": 20, "weight_kl": 0.3},
    {"low_ent": 1.2, "high_ent": 1.3, "patience": 2, "most": 2, "weight": 0.0, "weight_kl": 1.0},
    {"low_ent": 0.5, "high_ent": 0.8, "patience": 2, "most": 1, "decay": 0.0, "weight": 0.9},
  ],
}  # fmt: skip
MACHINES = {"nudge": SlowNudge, "route": SlowRoute, "revive": SlowRevive}


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("seed", range(3))
def test_a_machine_is_the_one_told_in_plain_python(name, seed):
  logits, tokens = streams(2, seed)
  out, stats = play(name, knobs(name, *SETTINGS[name]), logits, tokens)
  for b, settings in enumerate(SETTINGS[name]):
    machine = MACHINES[name](**settings)
    truth, laws = [], []
    for t in range(T):
      at = Slow(logits[:, t, b], tokens[t - 1, b] if t else 0, t)
      truth.append(machine.step(at))
      w = truth[-1]["weight"]
      laws.append((1 - w) * at.p[0] + w * at.p[1])
    for key in truth[0]:
      got, want = stats[key][:, b], [step[key] for step in truth]
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5, err_msg=f"{key} of row {b}")
    np.testing.assert_allclose(probabilities(out[:, b]), laws, rtol=1e-4, atol=1e-7)
    assert 0 < np.mean([step["weight"] > 0 for step in truth]) < 1, f"row {b} tests nothing"


def test_a_collapse_by_hand():
  """decay 0, patience 3, most 2: dry at 1..3, so collapsed at 3; a word begins at 4 only."""
  inside, at = 3, 4  # of the made-up words, one that goes on and one that begins
  open_, dry, begin = np.zeros(V), np.full(V, -40.0), np.full(V, -40.0)
  dry[inside] = begin[at] = 0.0
  main = np.asarray([open_, dry, dry, dry, begin, dry, dry, dry, dry, begin, open_, dry])
  logits = np.stack([main, np.zeros_like(main)])[:, :, None].repeat(B, 2).astype(np.float32)
  tokens = np.full((len(main), B), inside, np.int32)
  settings = {"decay": 0.0, "patience": 3, "most": 2, "low_ent": 0.1, "high_ent": 0.2}
  out, stats = play("revive", knobs("revive", settings), logits, tokens)
  assert stats["collapsed"][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]
  assert (stats["weight"][:, 0] > 0).tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0]
  np.testing.assert_allclose(probabilities(out[4, 0])[at], 0.5 + 0.5 / V, rtol=1e-5)
  np.testing.assert_allclose(stats["kl"][4, 0], np.log(1 / V) + 40 * (V - 1) / V, rtol=1e-5)


def test_nudging_stays_for_a_word_and_ends_the_text():
  """Base unsure at 1; the word of two pieces is finished though base is sure again at once."""
  start, piece = 4, 3
  sure, unsure = np.zeros(V), np.zeros(V)
  sure[2] = 20.0
  aligned = np.zeros((5, V))
  aligned[[0, 1, 3, 4], start] = 20.0
  aligned[2, piece] = 20.0
  ends = np.where(np.arange(V) == END, 20.0, 0.0)
  base = np.asarray([sure, unsure, sure, sure, ends])
  logits = np.stack([base, aligned])[:, :, None].repeat(B, 2).astype(np.float32)
  tokens = np.full((5, B), start, np.int32)
  _, stats = play("nudge", knobs("nudge", {}), logits, tokens)
  assert stats["weight"][:, 0].tolist() == [0, 1, 1, 0, 1]
  _, stats = play("nudge", knobs("nudge", {"aligned_ends": False}), logits, tokens)
  assert stats["weight"][:, 0].tolist() == [0, 1, 1, 0, 0]


# -- what all must hold ------------------------------------------------------------------------

ALWAYS = {"low_ent": NEVER, "high_ent": 2 * NEVER, "patience": 1}  # every row of `revive` is dry
ALONE = [
  ("proxy", {"alpha": 0.0}, 0),
  ("contrastive", {"cut": 0.0, "beta": 0.0}, 0),
  ("nudge", {"sure": 0.0, "aligned_ends": False}, 0),
  ("nudge", {"sure": 2.0, "agree": False}, 1),
  ("route", {"prob": 2.0, "marks": False}, 0),
  ("route", {"prob": 0.0}, 1),
  ("revive", {"low_ent": 0.0}, 0),
  ("revive", {"low_ent": 1.0, "high_ent": 2.0, "patience": 1, "weight": 0.0}, 0),
  ("revive", ALWAYS | {"most": 2**31 - 1, "weight": 1.0}, 1),
]


@pytest.mark.parametrize(("name", "settings", "speaker"), ALONE)
def test_alone_means_bit_for_bit(name, settings, speaker):
  logits, tokens = streams(models(name))
  logits[:, :, :, 11:13] = -np.inf
  logits[speaker, :, :, 5:9], logits[speaker, :, :, 11:13] = -np.inf, 0.5
  out, _ = play(name, knobs(name, settings), logits, tokens)
  np.testing.assert_array_equal(out, logits[speaker])


# Settings under which a method does much: a row each.
LOOSE = SETTINGS | {
  "proxy": [{"alpha": a, "cut": c} for a, c in ((1, 0), (3, 0), (1, 0.1), (0, 0.2), (0, 0), (9, 1))],
  "contrastive": [
    {"cut": c, "beta": b} for c, b in ((0, 0.5), (0.1, 0.5), (1, 2), (0, 0), (0.3, 9), (0.1, 0))
  ],
}  # fmt: skip


@every_method
def test_exclusions_never_make_nan_or_more_than_everything(name):
  logits, tokens = streams(models(name))
  rng = np.random.default_rng(1)
  # From nothing excluded to all but a few ids, in each model for itself; two models may share no id.
  share = rng.uniform(0, 1, logits.shape[:3])[..., None]
  gone = rng.uniform(0, 1, logits.shape) < share**0.3
  np.put_along_axis(gone, rng.integers(0, V, (*gone.shape[:3], 1)), False, axis=-1)
  out, stats = play(name, knobs(name, *LOOSE[name]), np.where(gone, -np.inf, logits), tokens)
  law = np.asarray(jax.nn.log_softmax(out, axis=-1))
  assert not np.isnan(law).any()
  assert np.all(out < np.inf)
  np.testing.assert_allclose(np.exp(law.astype(np.float64)).sum(-1), 1.0, atol=1e-5)
  assert all(np.isfinite(x).all() for x in stats.values())
  if name in ("proxy", "contrastive"):  # the main model's exclusions are everybody's
    assert np.all(out[gone[0]] == -np.inf)
  if name == "proxy":
    moves = np.asarray([s["alpha"] > 0 for s in LOOSE[name]])
    left = (~gone[0] & ~gone[1]).any(-1) & moves & np.asarray([s["cut"] == 0 for s in LOOSE[name]])
    assert np.all(out[gone[1] & left[..., None]] == -np.inf)


@every_method
def test_a_model_that_excludes_everything_says_nothing(name):
  logits, tokens = streams(models(name))
  logits[1:] = -np.inf
  out, stats = play(name, knobs(name, *LOOSE[name]), logits, tokens)
  assert not np.isnan(out).any()
  assert all(np.isfinite(x).all() for x in stats.values())
  assert name in ("nudge", "route") or np.isfinite(np.asarray(jax.nn.logsumexp(out, -1))).all()


def test_what_only_one_side_of_a_difference_excludes_is_not_moved():
  for name in ("proxy", "contrastive"):
    logits, tokens = streams(models(name))
    logits[-1, :, :, 7] = -np.inf
    # Not moved in the law either, whatever level the models' logits lie at.
    cfg = knobs(name, {"cut": 0.0})
    out, far = (play(name, cfg, logits + np.float32(x), tokens)[0] for x in (0.0, 16.0))
    assert np.abs((out - logits[0])[..., 7]).max() == 0
    np.testing.assert_allclose(probabilities(far), probabilities(out), rtol=1e-3, atol=1e-9)


@every_method
def test_a_constant_added_to_a_models_logits_changes_no_law(name):
  logits, tokens = streams(models(name))
  level = np.float32([16.0, -8.0, 4.0])[: models(name), None, None, None]
  cfg = knobs(name, *LOOSE[name])
  before, after = (play(name, cfg, z, tokens)[0] for z in (logits, logits + level))
  np.testing.assert_allclose(probabilities(after), probabilities(before), rtol=2e-3, atol=1e-7)


@every_method
def test_rows_are_strangers(name):
  logits, tokens = streams(models(name))
  cfg = knobs(name, *LOOSE[name])
  out, stats = play(name, cfg, logits, tokens)
  for b in range(B):
    own = jax.tree.map(lambda x, b=b: x[b : b + 1], cfg)
    alone, alone_stats = play(name, own, logits[:, :, [b]], tokens[:, [b]])
    np.testing.assert_array_equal(alone[:, 0], out[:, b])
    for key, values in alone_stats.items():
      np.testing.assert_array_equal(values[:, 0], stats[key][:, b])


@every_method
def test_no_dead_knobs(name):
  method = mixing.find(name)
  logits, tokens = streams(models(name))
  start = [{}, *getattr(method, "USES", ()), *LOOSE[name]]
  if name == "revive":
    start = start[1:]
  seen = [(sampling.configure(method, s), logits) for s in start]

  def outcome(cfg, logits):
    return play(name, sampling.arrays(cfg, B), logits, tokens)[0].tobytes()

  assert contract.unmoved(method, seen, outcome) == []


@every_method
def test_ranges_are_of_knobs(name):
  method = mixing.find(name)
  assert set(method.RANGES) <= {f.name for f in dataclasses.fields(method.Config)}
  refusal([], sampling.configure, method, {"no_such_knob": 1.0})


def test_mixtures_lie_between_the_levels_of_their_models():
  """A model's logits may lie anywhere; a penalty that divides them shall see no jump."""
  logits, tokens = streams(2)
  logits[0] += 20.0
  logits[1] += 20.0
  settings = {"low_ent": 1.0, "high_ent": 1.5, "patience": 1}
  out, stats = play("revive", knobs("revive", settings), logits, tokens)
  lse = [np.asarray(jax.nn.logsumexp(z, axis=-1)) for z in (*logits, out)]
  injected = stats["weight"] > 0
  assert 0 < injected.mean() < 1
  mean = 0.5 * (lse[0] + lse[1])[injected]
  np.testing.assert_allclose(lse[2][injected], mean, rtol=1e-5)


def test_contradictions_and_unknown_methods_are_refused():
  equal = {"low_ent": 1.0, "high_ent": 1.0}
  refusal(["larger than low_ent"], sampling.configure, mixing.find("revive"), equal)
  assert mixing.names() == ["contrastive", "nudge", "proxy", "revive", "route"]
  refusal([", ".join(mixing.names())], mixing.find, "blend")


# -- stop ids ----------------------------------------------------------------------------------

# A base model ends by EOS, an instruct model by EOT; HEAD is a template's.
EOS, EOT, HEAD = 36, 37, 38


def endings(seed=0):
  """Logits of a base and an instruct model that both want to end, each in its own way."""
  z = np.random.default_rng(seed).standard_normal((2, B, V)).astype(np.float32)
  z[:, :, [EOS, EOT, HEAD]] = -12.0
  z[0, :, EOS] = z[1, :, EOT] = 7.0
  return jnp.asarray(z)


def test_the_mass_of_all_stops_meets_on_one_id():
  base, instruct = endings()
  stops, banned = [[EOS], [EOS, EOT]], [[EOT, HEAD], []]
  out = mixing.align((base, instruct), stops, banned, EOT)
  for z, was, mine, never in zip(out, (base, instruct), stops, banned, strict=True):
    truth = np.asarray(was, np.float64).copy()
    mass = np.log(np.exp(truth[:, mine]).sum(-1))
    truth[:, [EOS, EOT, *never]] = -np.inf
    truth[:, EOT] = mass
    np.testing.assert_allclose(z, truth, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(z)[:, :EOS], np.asarray(was)[:, :EOS])


def test_what_another_model_ends_with_is_no_end_of_this_one():
  z = jnp.zeros((1, V))
  (first, second) = mixing.align((z, z), [[EOS], []], [[], []], EOT)
  np.testing.assert_array_equal(first[0, [EOT, EOS]], [0.0, -np.inf])
  np.testing.assert_array_equal(second[0, [EOT, EOS]], -np.inf)
  (_, third) = mixing.align((z, z), [[EOS], [EOT]], [[], []], EOT)
  np.testing.assert_array_equal(third[0, [EOT, EOS]], [0.0, -np.inf])
  (again, _) = mixing.align((z, z), [[EOS, EOS], []], [[], []], EOT)
  assert again[0, EOT] == 0.0, "an id that is named twice counts once"


def test_one_stop_id_of_all_is_the_same_bits_and_a_banned_stop_is_banned():
  base, instruct = endings()
  out = mixing.align((base, instruct), [[EOT], [EOT]], [[], []], EOT)
  np.testing.assert_array_equal(out[0], base)
  np.testing.assert_array_equal(out[1], instruct)
  out = mixing.align((base, instruct), [[EOS], [EOT]], [[EOS], []], EOT)
  assert np.all(np.asarray(out[0])[:, [EOS, EOT]] == -np.inf)


def test_without_alignment_who_ends_otherwise_vetoes_the_end():
  """Base is surer than its small sister that EOT is no word of its own: the expert's wish is lost."""
  base, expert = endings()
  anti = base.at[:, EOT].set(-6.0)
  stops, banned = [[EOS], [EOT], [EOS]], [[], [], []]
  tokens = np.zeros((1, B), np.int32)

  def end(logits):
    out, _ = play("proxy", knobs("proxy", {}), np.asarray(logits)[:, None], tokens)
    return probabilities(out[0])[:, [EOS, EOT]].sum(-1).max()

  asked = (base, expert, anti)
  assert min(probabilities(z)[:, [EOS, EOT]].sum(-1).min() for z in asked) > 0.85
  assert end(asked) < 0.2
  assert end(mixing.align(asked, stops, banned, EOT)) > 0.85


def test_without_alignment_the_end_loses_a_vote_that_it_won():
  """Both models end with 60 %; half and half, each of two ids has 30 % and a word 40 %."""
  p = np.full((2, V), 1e-9)
  p[:, 3], p[0, EOT], p[1, EOS] = 0.4, 0.6, 0.6
  logits = np.log(p)[:, None, None].repeat(B, 2).astype(np.float32)

  def likeliest(logits):
    out, _ = play("revive", knobs("revive", ALWAYS), logits, np.zeros((1, B), np.int32))
    return set(out[0].argmax(-1))

  assert likeliest(logits) == {3}
  aligned = mixing.align(tuple(jnp.asarray(logits)), [[EOT], [EOS]], [[], []], EOT)
  assert likeliest(np.stack(aligned)) == {EOT}


def test_bad_ids_are_refused():
  z = (jnp.zeros((1, V)),)
  for stops, banned, canonical in (([[V]], [[]], 0), ([[0]], [[-1]], 0), ([[0]], [[]], V)):
    refusal(["outside the vocabulary"], mixing.align, z, stops, banned, canonical)
  refusal(["1 models"], mixing.align, z, [[0], [0]], [[]], 0)


# -- words -------------------------------------------------------------------------------------


def test_words_of_the_demo_tokenizer():
  demo = vocabulary.load("entropix_jax/assets/demo/base")
  starts_V, words_V = mixing.word_tables(demo, demo.vocab + 3)
  assert (starts_V.dtype, words_V.dtype) == (bool, np.int8)
  assert len(starts_V) == len(words_V) == demo.vocab + 3
  cases = {
    " the": (True, FUNCTION), "What": (False, FUNCTION), " and": (True, FUNCTION),
    " apples": (True, CONTENT), "ing": (False, CONTENT), "4": (False, CONTENT),
    ",": (True, MARK), ".": (True, MARK), ' "': (True, MARK), "\n": (True, MARK), " ": (True, MARK),
    "é": (False, CONTENT),
  }  # fmt: skip
  for text, (starts, role) in cases.items():
    (id,) = demo.encode(text)
    assert (starts_V[id], words_V[id]) == (starts, role), text
  for id in (*demo.control, demo.vocab, demo.vocab + 2):
    assert (starts_V[id], words_V[id]) == (True, MARK)
  half = next(id for id in range(demo.vocab) if demo.token_bytes(id) == b"\xc3")
  assert (starts_V[half], words_V[half]) == (False, CONTENT)
  # Every boundary by the tables is one by the text: where white space or punctuation is on either side.
  ids = demo.encode('First, the boy said: "How many apples?"\nThen he\'d went home. (No!)')
  texts = [demo.token_bytes(id).decode() for id in ids]
  for before, id, text in zip(texts, ids[1:], texts[1:], strict=False):
    begins = bool(starts_V[id] or words_V[demo.encode(before)[0]] == MARK)
    bare = not text[0].isspace() and any(c.isalnum() for c in text)
    assert begins == (not bare or not any(c.isalnum() for c in before)), (before, text)


def test_a_mark_that_combines_is_part_of_its_word():
  assert mixing._kind("ा".encode()) == CONTENT
  assert mixing._kind(b" \xe2\x82") == CONTENT
  assert mixing._kind("€".encode()) == MARK
  assert mixing._kind(b"") == MARK


def test_a_boundary_is_the_beginning_or_behind_a_mark_or_where_a_word_starts():
  view = view_of((), jnp.asarray([3, 3, 7, 3]), jnp.asarray([0, 5, 5, 5]))
  assert mixing.boundary(view, jnp.asarray([3, 3, 3, 4])).tolist() == [True, False, True, True]


def test_the_dear_part_waits_for_a_row_that_needs_it():
  """The mixture stands behind one condition, which an injection alone opens."""
  method = mixing.find("revive")
  cfg, zero_B = knobs("revive", {}), jnp.zeros((B,), jnp.int32)
  view = view_of([jnp.zeros((B, V))] * 2, zero_B, zero_B)
  run = jax.jit(lambda cfg, view: method.mix(cfg, method.init(cfg, B), view))
  assert "conditional(" in run.lower(cfg, view).compile().as_text()
