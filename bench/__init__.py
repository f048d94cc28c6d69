"""Benchmarks: `python -m bench` on a CPU, `python -m bench gpu` on one H100 or H200. See README.md beside this."""
