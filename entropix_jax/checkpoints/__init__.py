"""Checkpoint folders on disk: config.json, weights, tokenizer and chat format.

These modules turn files into arrays and token ids; they know nothing of engines and samplers.
"""
