"""What lies on disk: config.json, weights, tokenizer, chat format.

Files in, arrays and token ids out. It knows no engine and no sampler.
"""
