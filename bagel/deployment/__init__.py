"""Which services run, with which settings: the deploy file, and starting them on this machine. No torch here."""
