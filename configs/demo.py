"""The demo model that ships with the package: 2 million parameters, trained on short stories and word problems.

  python -m entropix_jax.main --config=configs/demo.py --prompt="Tell me a story about a kite."

Greedy decoding, for a word problem:  --config.sampler.name=plain --config.sampler.temperature=0
The base model, the instruct model, and both together:  --compare=base,instruct,joint
"""

from entropix_jax import settings
from entropix_jax.cli import config_file

DEMO = settings.ASSETS / "demo"
BASE, INSTRUCT = str(DEMO / "base"), str(DEMO / "instruct")


def get_config():
  config = config_file.base(checkpoint=INSTRUCT, max_seq_len=1024, batch_size=4)
  config.runs = {
    "base": {"checkpoint": BASE, "template": "{}\n"},
    "instruct": {},
    # The base model writes; where it is uncertain, the instruct model chooses the next words.
    "joint": {
      "checkpoint": BASE,
      "decoding": {"name": "joint", "mix": "nudge", "models": INSTRUCT, "aligned_ends": False},
    },
  }
  return config
