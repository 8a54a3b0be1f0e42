"""The forward pass of a Llama decoder: pure functions of weights, cache and token ids.

Nothing in here knows a sampler, a request or a file. Start with llama.py.
"""
