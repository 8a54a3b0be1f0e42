"""Llama-3.2-1B-Instruct from a Hugging Face folder. Needs one TPU chip or one GPU, or a CPU with 5 GB for the float32 weights.

  python scripts/download.py --repo=meta-llama/Llama-3.2-1B-Instruct --out=checkpoints/Llama-3.2-1B-Instruct
  python -m entropix_jax.main --config=configs/llama3_1b.py --prompt="Why is the sky blue?"

For another folder give --config.checkpoint=DIR; its config.json determines the model's shape.
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
