"""What the server counts, for Prometheus. Labels are the model and short closed lists, never a client's text.

HTTP sets what clients see of a request; the thread that drives the engine sets the rest, with the same methods.
"""

import threading
from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
_GAP = ".001 .002 .004 .006 .008 .01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
_TOKENS = " ".join(str(2**i) for i in range(18))
_NATS = ".01 .05 .1 .25 .5 1 1.5 2 3 4 6 8 12"
# Name -> what it is, and the bounds of its buckets.
HISTOGRAMS = {
  "time_to_first_token_seconds": (
    "From a request's arrival to its first token.",
    ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560",
  ),
  "inter_token_latency_seconds": ("Between two reports of new tokens of one text.", _GAP),
  "request_time_per_output_token_seconds": ("(last - first token) / (tokens - 1) of a text.", _GAP),
  "e2e_request_latency_seconds": ("From a request's arrival to its end.", _LATENCY),
  "request_queue_time_seconds": ("From a request's arrival until its prompt is begun.", _LATENCY),
  "request_prefill_time_seconds": ("From a prompt's beginning to the first token.", _LATENCY),
  "request_decode_time_seconds": ("From the first to the last token of a text.", _LATENCY),
  "request_prompt_tokens": ("Tokens of a request's prompts.", _TOKENS),
  "request_generation_tokens": ("Tokens of a request's texts.", _TOKENS),
  "request_params_n": ("Texts asked for per prompt.", "1 2 5 10 20"),
  "iteration_tokens": ("Tokens per dispatch.", "1 8 " + " ".join(str(2**i) for i in range(4, 15))),
}  # fmt: skip
# The same, of many values at once.
TALLIES = {
  "token_entropy": ("Entropy of the model's law before each token, in nats.", _NATS),
  "token_varentropy": ("Varentropy of the model's law before each token, in nats^2.", _NATS),
}
GAUGES = {
  "num_requests_running": "Texts that have a row.",
  "num_requests_waiting": "Texts that wait for a row.",
  "kv_cache_usage_perc": "Share of the cache's slots in use, from 0 to 1.",
  "engine_up": "1 while the engine works.",
}
# Name -> what it is, and its label besides the model.
COUNTERS = {
  "prompt_tokens": ("Tokens of prompts.", None),
  "generation_tokens": ("Tokens generated.", None),
  "request_success": ("Texts that ended well.", "finished_reason"),
  "request_errors": ("Requests that got an error.", "code"),
  "num_preemptions": ("Rows that gave up their slot for a while.", None),
  "prefix_cache_queries": ("Tokens of prompts looked up in the prefix cache.", None),
  "prefix_cache_hits": ("Those found there.", None),
  "admission_rejections": ("Requests that were not taken on.", "reason"),
  "cancelled": ("Requests whose client has gone.", "phase"),
  "compilations": ("Programs compiled after the server was ready.", "bucket"),
  "ignored_fields": ("Fields of requests that do nothing here.", "field"),
  "sampler_action": ("Tokens by the sampler's branch.", "action"),
}
_PREFIX = "entropix_"


class Metrics:
  """The numbers of one server, in a registry of their own. Its methods may be called from any thread."""

  def __init__(self, model: str):
    self.registry = CollectorRegistry()
    self._model, self._children = model, {}
    shared = {"registry": self.registry}
    labels = lambda label: ["model", label] if label else ["model"]  # noqa: E731
    self._metrics: dict = {
      name: Histogram(_PREFIX + name, text, labels(None), buckets=_bounds(bounds), **shared)
      for name, (text, bounds) in HISTOGRAMS.items()
    }
    self._metrics |= {
      n: Gauge(_PREFIX + n, text, labels(None), **shared) for n, text in GAUGES.items()
    }
    self._metrics |= {
      name: Counter(_PREFIX + name, text, labels(label), **shared)
      for name, (text, label) in COUNTERS.items()
    }
    self._http = Counter(
      f"{_PREFIX}http_requests", "Answers by route and status.", ["route", "status"], **shared
    )
    self._tallies = {name: _Tally(name, *facts, model) for name, facts in TALLIES.items()}
    for tally in self._tallies.values():
      self.registry.register(tally)
    for name, (_, label) in COUNTERS.items():
      if label is None:
        self.count(name, 0)
    for name in GAUGES:
      self.set(name, 0)

  def count(self, name: str, amount: float = 1, label: str | None = None) -> None:
    """Add to a counter."""
    self._child(name, label).inc(amount)

  def observe(self, name: str, value: float) -> None:
    """Add one value to a histogram."""
    self._child(name).observe(value)

  def tally(self, name: str, values: Sequence[float]) -> None:
    """Add many values to a histogram of TALLIES, at the cost of one; those that are no numbers are left out."""
    self._tallies[name].add(values)

  def set(self, name: str, value: float) -> None:
    """Set a gauge."""
    self._child(name).set(value)

  def http(self, route: str, status: int) -> None:
    """Count an answer; `route` is one of the server's own paths, or "other"."""
    self._http.labels(route, str(status)).inc()

  def exposition(self) -> bytes:
    """All of it, in Prometheus' text format."""
    return generate_latest(self.registry)

  def _child(self, name: str, label: str | None = None):
    if (name, label) not in self._children:
      values = [self._model] if label is None else [self._model, label]
      self._children[name, label] = self._metrics[name].labels(*values)
    return self._children[name, label]


class _Tally(Collector):
  """A histogram to which many values are added at once."""

  def __init__(self, name: str, text: str, bounds: str, model: str):
    self._name, self._text, self._model = _PREFIX + name, text, model
    self._bounds = _bounds(bounds)
    self._counts, self._sum = np.zeros(len(self._bounds) + 1, np.int64), 0.0
    self._lock = threading.Lock()

  def add(self, values: Sequence[float]) -> None:
    x = np.asarray(values, np.float64).ravel()
    x = x[np.isfinite(x)]
    counts = np.bincount(np.searchsorted(self._bounds, x), minlength=len(self._counts))
    with self._lock:
      self._counts += counts
      self._sum += float(x.sum())

  def collect(self) -> Iterable[HistogramMetricFamily]:
    with self._lock:
      totals, whole = np.cumsum(self._counts).tolist(), self._sum
    names = [*map(str, self._bounds), "+Inf"]
    family = HistogramMetricFamily(self._name, self._text, labels=["model"])
    family.add_metric([self._model], list(zip(names, totals, strict=True)), whole)
    yield family


def _bounds(text: str) -> tuple[float, ...]:
  return tuple(map(float, text.split()))
