"""SmolLM2-135M-Instruct from one .gguf file: a real model that is small enough for two CPU cores and 2 GB of memory.

  python scripts/get_smollm2.py
  python -m entropix_jax.main --config=configs/smollm2_135m.py --prompt="Why is the sky blue?"

The original weights are --config.checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from entropix_jax.cli import config_file


def get_config():
  return config_file.base(
    checkpoint="checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
    model="smollm2_135m",
    max_seq_len=4096,
    batch_size=4,
  )
