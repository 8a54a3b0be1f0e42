"""Decoding with more than one path, or more than one model: controllers over the engine's verbs."""
