"""Tokens to tinker with: what a tokenizer does to a text, and what that does to a model.

  spelling.py       the bytes of a vocabulary, sorted, and its merges
  lens.py           a text's tokens made visible; two tokenizers side by side
  segmentations.py  all ways to write a text, sampled ones, and the probability of a text over all of them
  heal.py           a prompt that ends inside a word goes on as if it had not been cut there
  bytes.py          the next byte instead of the next token; models with different tokenizers mixed
  laws.py           next-token laws of a model after many short paths, in batches
  tools.py          all of it for one model: `llm.tokens`
  __main__.py       python -m entropix_jax.tokens

A path is a tuple of token ids. Everything counts in the bytes that the ids stand for, in which a SentencePiece text
begins with a space. Control tokens have no bytes here.
"""
