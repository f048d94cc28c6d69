"""Everything about gRPC: messages and errors on the wire, channels and servers, and who may call. No torch here."""
