"""Logs, traces, metrics and stage timings of a service. No torch here."""
