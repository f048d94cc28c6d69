"""Fuzzing of whatever parses bytes from outside: one target a file in `targets`, its inputs in `corpus`.

In CI each target reads its corpus and some hundred mutations of it. By hand: `python -m tests.fuzz TARGET --seconds N`.
"""
