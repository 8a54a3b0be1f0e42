"""Llama-3.2-1B-Instruct from a Hugging Face folder. One chip or one GPU; 5 GB as float32 on a CPU.

  python scripts/download.py --repo=meta-llama/Llama-3.2-1B-Instruct --out=checkpoints/Llama-3.2-1B-Instruct
  python -m entropix_jax.main --config=configs/llama3_1b.py --prompt="Why is the sky blue?"

Another folder: --config.checkpoint=DIR (its own config.json decides the model's shape).
"""

from entropix_jax.cli import config_file


def get_config():
  return config_file.base(
    checkpoint="checkpoints/Llama-3.2-1B-Instruct",
    model="llama3_1b",
    max_seq_len=4096,
    batch_size=4,
    steps_per_dispatch=16,
  )
