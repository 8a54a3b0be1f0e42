"""Decoding methods for the demo models, compared by benchmarks/answers.py; each run overrides keys of the base config.

python benchmarks/answers.py --config=configs/demo_ways.py --out=answers.jsonl
python -m entropix_jax.main --config=configs/demo_ways.py --prompt="..." --compare=greedy,majority,branch
"""

from entropix_jax import settings
from entropix_jax.cli import config_file

DEMO = settings.ASSETS / "demo"
BASE, INSTRUCT = str(DEMO / "base"), str(DEMO / "instruct")
DRAFT, DRAFT_BASE = str(DEMO / "draft"), str(DEMO / "draft_base")
GREEDY = {"name": "plain", "temperature": 0.0}
WARM = {"name": "plain", "temperature": 1.0}


def joint(main, mix, *models, **knobs):
  decoding = {"name": "joint", "mix": mix, "models": ",".join(models), **knobs}
  return {"checkpoint": main, "sampler": GREEDY, "decoding": decoding}


def several(sampler, name, **options):
  return {"sampler": sampler, "decoding": {"name": name, **options}}


def get_config():
  # All runs report what only some of them use, so that they share one compiled engine.
  told = {"confidence": 20, "top_logprobs": 3}
  config = config_file.base(checkpoint=INSTRUCT, max_seq_len=256, batch_size=16, **told)
  config.runs = {
    "greedy": {"sampler": GREEDY},
    "base": {"checkpoint": BASE, "template": "{}\n", "sampler": GREEDY},
    "temperature": {"sampler": WARM},
    "quadrant": {},
    "dslider": {"sampler": {"name": "dslider"}},
    "entropy_target": {"sampler": {"name": "entropy_target"}},
    # Sample i does not depend on n, so this one run gives majority@1, 2, 4, 8 and 16.
    "majority": several(WARM, "best_of_n", n=16),
    "mean_logprob": several(WARM, "best_of_n", n=8, rule="mean_logprob"),
    "self_certainty": several(WARM, "best_of_n", n=8, rule="self_certainty"),
    "borda": several(WARM, "best_of_n", n=8, rule="borda"),
    "deepconf_offline": several(WARM, "best_of_n", n=8, rule="deepconf", window=16),
    "deepconf": several(WARM, "deepconf", n=16, warmup=4, window=8),
    "cot": several(GREEDY, "cot", n=8),
    "adaptive": several(WARM, "adaptive", n=8, enough=0.995),
    "adaptive_half": several(WARM, "adaptive", n=8, enough=0.995, half=8),
    "branch": several(GREEDY, "branch", ways=3, beam=2, horizon=8, ent=0.3),
    "branch_warm": several(WARM, "branch", ways=3, beam=2, horizon=8, ent=0.3),
    "route": joint(BASE, "route", INSTRUCT),
    "nudge": joint(BASE, "nudge", INSTRUCT, aligned_ends=False),
    "revive": joint(INSTRUCT, "revive", BASE),
    "contrastive": joint(INSTRUCT, "contrastive", DRAFT),
    "proxy": joint(BASE, "proxy", DRAFT, DRAFT_BASE),
    "proxy_cut": joint(BASE, "proxy", DRAFT, DRAFT_BASE, cut=0.1),
    "proxy_self": joint(BASE, "proxy", INSTRUCT, BASE, alpha=1.5),
  }
  return config
