"""Programs that show the project at work; run them as `python -m examples.NAME`."""
