"""The jitted operations on a batch of rows: prefill, insert, decode, fork, rewind, score.

Everything in here is about arrays on devices. It knows no tokenizer, no text and no decoding method.
"""
