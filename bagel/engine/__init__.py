"""Torch engines without any transport: building contexts, decoding text, drawing pictures."""
