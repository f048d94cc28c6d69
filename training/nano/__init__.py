"""bagel-nano: a small BAGEL trained on procedural scenes; see docs/nano.md."""
