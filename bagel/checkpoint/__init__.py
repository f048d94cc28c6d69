"""A checkpoint on disk: its files, its configuration, what names its content, and the limits it sets. No torch here."""
