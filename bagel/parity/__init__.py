"""Comparison of this implementation with recordings of the reference: `python -m bagel.parity DIR`."""
