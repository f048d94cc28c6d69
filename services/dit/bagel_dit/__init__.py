"""The DiT service: draws pictures from K/V that a Thinker made, or serves whole requests alone."""
