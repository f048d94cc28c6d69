"""Everything about gRPC: messages, errors, channels, servers, and access to them. No torch here."""
