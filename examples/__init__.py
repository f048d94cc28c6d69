"""Example programs; run them as `python -m examples.NAME`."""
