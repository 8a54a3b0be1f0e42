"""benchmarks/serve.py: its requests, its arithmetic, and its refusals; servers are in test_serve.py."""

import pytest
from command import CONFIG, load, run

pytest.importorskip("httpx")
SERVE = "benchmarks/serve.py"


@pytest.fixture(scope="module")
def bench():
  module = load(SERVE)
  module._FLAGS(["serve"])
  return module


def test_requests_are_the_same_for_a_seed_and_have_a_spread_of_lengths(bench):
  many = bench.asks(200, 3)
  assert many[:10] == bench.asks(10, 3)
  assert many[:10] != bench.asks(10, 4)
  words = sorted(len(ask.messages[-1]["content"].split()) for ask in many)
  assert 50 < words[100] < 90
  assert words[190] > 2 * words[100]
  assert [len(ask.messages) for ask in many[:4]] == [1, 2, 1, 2]
  assert sorted(ask.tokens for ask in many)[100] == pytest.approx(64, rel=0.15)


def test_figures(bench):
  one = bench.Seen(0.0, [1.0, 2.0, 4.0], 21, 100, 50)
  two = bench.Seen(1.0, [2.0, 3.0], 11, 60, 0)
  found = bench.figures([one, two])
  assert found["tokens_per_s"] == 32 / 4
  assert found["ttft_p50_s"] == 1.0
  assert found["itl_p50_s"] == 1.0
  assert found["itl_p99_s"] == pytest.approx(1.98)
  assert found["tpot_p50_s"] == pytest.approx((3 / 20 + 1 / 10) / 2)
  assert found["occupancy"] == pytest.approx((3 + 1) / 4 / 32)
  assert found["cached_share"] == 50 / 160


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--clients=0"], "positive numbers"),
    (["--clients=two"], "positive numbers"),
    (["--clients=", "--rates="], "nothing to measure"),
    (["--peer=llama-server"], "go together"),
    (["--peer=none", "--peer_model=none"], "is not a file"),
  ],
)
def test_what_cannot_be_measured_is_said(flags, words):
  code, _, err = run(SERVE, CONFIG, *flags)
  assert code == 2
  assert words in err
