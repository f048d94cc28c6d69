"""A checkpoint on disk: its files, its configuration, its fingerprint, and the limits it sets. No torch here."""
