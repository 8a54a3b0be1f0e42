"""The model that ships with the package: 2 million parameters, short stories and word problems.

  python -m entropix_jax.main --config=configs/demo.py --prompt="Tell me a story about a kite."

A word problem, greedily:  --config.sampler.name=plain --config.sampler.temperature=0
Its base sibling (plain text): --config.checkpoint=entropix_jax/assets/demo/base
"""

from entropix_jax import settings


def get_config():
  return settings.base(
    checkpoint=str(settings.ASSETS / "demo" / "instruct"), max_seq_len=1024, batch_size=4
  )
