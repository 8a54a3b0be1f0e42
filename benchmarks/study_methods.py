"""The methods of benchmarks/study.py, and the settings of each that are tried.

Every method that has something to choose gets SETTINGS settings, each a point that its authors or users recommend or one on both
sides of it; the one that is best on the prompts for choosing goes to the comparison. Names and settings are fixed before any result is seen;
docs/study.md says what is compared.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

from entropix_jax import sampling
from entropix_jax.sampling import calibration, presets, quadrant

HERE = pathlib.Path(__file__).parent
SETTINGS = 6
SAMPLERS = ("plain", "quadrant", "entropy_target", "dslider", "placebo")
NEVER = quadrant.NEVER


@dataclasses.dataclass(frozen=True)
class Setting:
  """A sampler with its knobs, and a decoding method with its options."""

  sampler: str
  knobs: dict[str, Any]
  method: str = "plain"  # of decoding: plain, adaptive or branch
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _plain(*knobs: dict) -> list[Setting]:
  return [Setting("plain", k) for k in knobs]


def _grid(**axes) -> list[Setting]:
  return _plain(*(dict(zip(axes, x, strict=True)) for x in itertools.product(*axes.values())))


# The middle of the original follows varentropy, with coefficients for a model whose varentropy is small [n30]. "calm" leaves that out.
_CALM = {"mid_temp_varent": 0.0, "mid_min_p_varent": 0.0}


def _quadrants(thresholds: dict) -> list[Setting]:
  return [
    Setting("quadrant", thresholds | calm | {"temp": temp})
    for calm, temp in itertools.product(({}, _CALM), (0.666, 0.333, 0.15))
  ]


def preset(name: str) -> dict:
  """The knobs of a preset."""
  return dict(presets.load(name).knobs)


FIXED = {
  "greedy": _plain({"temperature": 0.0}),
  "temperature": _grid(temperature=[0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
  "top_p": _grid(temperature=[0.7, 1.0], top_p=[0.5, 0.8, 0.95]),
  "min_p": _grid(temperature=[0.7, 1.0, 1.5], min_p=[0.05, 0.2]),
  "top_n_sigma": _grid(temperature=[0.7, 1.0, 1.5], top_n_sigma=[0.5, 1.0]),
  "mirostat": _grid(mirostat_tau=[0.25, 0.5, 1.0, 1.5, 2.0, 3.0]),
  "entropy_target": [
    *(Setting("entropy_target", {"cap": cap}) for cap in (0.25, 0.5, 1.0, 1.5)),
    Setting("entropy_target", {"steer": True, "w_mean": 0.5, "cap": 1.5}),
    Setting("entropy_target", {"steer": True, "w_mean": 1.0, "cap": 1.0}),
  ],
  "dslider": [
    Setting("dslider", {}),
    Setting("dslider", {"unusual": 0.02}),
    Setting("dslider", {"unusual": 0.3}),
    Setting("dslider", {"calm_sd": 0.0}),
    Setting("dslider", {"calm_sd": 0.0, "unusual": 0.02}),
    Setting("dslider", preset("entropix-2411")),
  ],
  "quadrant_original": [
    *_quadrants(preset("entropix-2410"))[:4],
    Setting("quadrant", preset("entropix-2410-server")),
    Setting("quadrant", preset("entropix-2410-70b")),
  ],
  "quadrant_quantile": _quadrants(preset("quantile")),
  # A text is chosen among several; tokens count all of them.
  "adaptive": [
    Setting("plain", {}, "adaptive", {"n": 4, "enough": e, "heat": t})
    for t, e in itertools.product((0.5, 1.0), (0.6, 0.9, 0.99))
  ],
  "branch": [
    Setting("plain", {"temperature": t}, "branch", {"ways": 2, "beam": 2, "horizon": 12, "ent": e})
    for t, e in itertools.product((0.0, 0.6), (0.3, 0.7, 1.5))
  ],
}
QUADRANTS = ("quadrant_original", "quadrant_calibrated", "quadrant_quantile")
ADAPTIVE = ("entropy_target", "dslider", *QUADRANTS)
CONTROLS = ("greedy", "top_p", "min_p", "top_n_sigma", "mirostat")
SEVERAL = ("adaptive", "branch")
SINGLE = ("temperature", *CONTROLS, *ADAPTIVE)
PLACEBOS = (
  "permuted", "varent_mean", "varent_constant", "no_attention", "only_middle", "only_ask", "only_fork",
  "only_mist",
)  # fmt: skip
TRANSFERS = ("own_thresholds", "foreign_thresholds")
# The first setting of `quadrant_calibrated`, whatever is best, with placebos, and the temperature whose law is about as uncertain.
WARM = ("warm", "warm_permuted", "warm_varent_mean", "warm_temperature")
NAMES = (*SINGLE, *SEVERAL, *PLACEBOS, *TRANSFERS, *WARM)
POOL = 8  # samples of `temperature` per prompt; the rules that choose among samples are applied to these afterwards


def tried(thresholds: dict) -> dict[str, list[Setting]]:
  """Method -> its settings; `thresholds` are the numbers that were calibrated for the model."""
  return FIXED | {"quadrant_calibrated": _quadrants(thresholds)}


# Attention: no condition on it, and no term of a formula.
_GATES = {
  k: v.default
  for k, v in quadrant.Config.__dataclass_fields__.items()
  if abs(v.default) == NEVER and k != "mist_ent"
}
_ATTENTION = (
  "ask_temp_attn_ent", "fork_temp_score", "fork_k_dispersion", "mist_temp_spread", "mist_p_attn_ent",
  "mid_temp_attn_ent", "mid_temp_spread", "mid_temp_agreement", "mid_p_spread", "mid_k_score",
  "mid_k_agreement",
)  # fmt: skip
BLIND = _GATES | dict.fromkeys(_ATTENTION, 0.0)
# Thresholds that send every token to one branch. Flow alone is greedy decoding.
_ONLY = {
  "middle": {"low_varent": -1.0, "high_varent": NEVER},
  "ask": {"low_ent": -1.0, "low_varent": NEVER, "ask_ent": -1.0},
  "fork": {"low_varent": -1.0, "high_varent": -1.0, "high_ent": NEVER, "mist_ent": NEVER},
  "mist": {"low_varent": -1.0, "high_varent": -1.0, "high_ent": -1.0},
}


def placebos(knobs: dict, varent: float) -> dict[str, Setting]:
  """The placebos of a setting of quadrant; `varent` is the constant in place of varentropy."""
  return {
    "permuted": Setting("placebo", knobs | {"shuffle": True}),
    "varent_mean": Setting("placebo", knobs | {"varent": -2.0}),
    "varent_constant": Setting("placebo", knobs | {"varent": varent}),
    "no_attention": Setting("quadrant", knobs | BLIND),
    **{f"only_{n}": Setting("quadrant", knobs | _GATES | only) for n, only in _ONLY.items()},
  }


def transfers(knobs: dict, own: dict, foreign: dict) -> dict[str, Setting]:
  """A setting of quadrant with thresholds of this task's own texts, and with those of another model."""
  return {
    "own_thresholds": Setting("quadrant", knobs | own),
    "foreign_thresholds": Setting("quadrant", knobs | foreign),
  }


def warm(setting: Setting, temperature: Setting) -> dict[str, Setting]:
  """What WARM names."""
  made = {f"warm_{n}": x for n, x in placebos(setting.knobs, 0.0).items() if f"warm_{n}" in WARM}
  return {"warm": setting, **made, "warm_temperature": temperature}


def own_thresholds(values: dict) -> dict[str, float]:
  """Thresholds as scripts/calibrate.py has them by default, from tokens of the task."""
  at = {knob: float(q[1:]) / 100 for knob, (_, q) in calibration.THRESHOLDS.items()}
  return calibration.thresholds(values, at)


def check() -> None:
  """Raises UserError for a setting that its sampler refuses."""
  for setting in itertools.chain(*FIXED.values()):
    sampling.configure(sampling.find(setting.sampler), setting.knobs)
