"""Llama-3.3-70B-Instruct from a Hugging Face folder. Needs eight H100s or a v5p 2x2x2 slice.

  python scripts/download.py --repo=meta-llama/Llama-3.3-70B-Instruct --out=checkpoints/Llama-3.3-70B-Instruct
  python -m entropix_jax.main --config=configs/llama3_70b.py --prompt="Why is the sky blue?"

For another folder give --config.checkpoint=DIR; its config.json determines the model's shape.
"""

from entropix_jax.cli import config_file


def get_config():
  config = config_file.base(
    checkpoint="checkpoints/Llama-3.3-70B-Instruct",
    model="llama3_70b",
    max_seq_len=4096,
    batch_size=4,
    steps_per_dispatch=16,
  )
  config.mesh.model = 8
  return config
