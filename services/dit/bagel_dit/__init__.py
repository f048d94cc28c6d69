"""The DiT service: draws pictures from the Thinker's K/V, or alone in one process. Arrives with the services."""
