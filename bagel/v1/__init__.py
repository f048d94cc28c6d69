"""The wire contract, generated from protos/ by `make protos`. Never imports torch."""
