"""Llama-3.2-3B-Instruct from a Hugging Face folder. Needs one TPU chip with 16 GB or more, or one GPU.

  python scripts/download.py --repo=meta-llama/Llama-3.2-3B-Instruct --out=checkpoints/Llama-3.2-3B-Instruct
  python -m entropix_jax.main --config=configs/llama3_3b.py --prompt="Why is the sky blue?"

For another folder give --config.checkpoint=DIR; its config.json determines the model's shape.
"""

from entropix_jax.cli import config_file


def get_config():
  return config_file.base(
    checkpoint="checkpoints/Llama-3.2-3B-Instruct",
    model="llama3_3b",
    max_seq_len=4096,
    batch_size=4,
    steps_per_dispatch=16,
  )
