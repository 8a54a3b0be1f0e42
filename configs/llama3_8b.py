"""Llama-3.1-8B-Instruct from a Hugging Face folder. Needs one GPU with 24 GB or more; on TPU v5e set config.mesh.model to 2 or more.

  python scripts/download.py --repo=meta-llama/Llama-3.1-8B-Instruct --out=checkpoints/Llama-3.1-8B-Instruct
  python -m entropix_jax.main --config=configs/llama3_8b.py --prompt="Why is the sky blue?"

For another folder give --config.checkpoint=DIR; its config.json determines the model's shape.
"""

from entropix_jax.cli import config_file


def get_config():
  return config_file.base(
    checkpoint="checkpoints/Llama-3.1-8B-Instruct",
    model="llama3_8b",
    max_seq_len=4096,
    batch_size=4,
    steps_per_dispatch=16,
  )
