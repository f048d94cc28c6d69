"""Clients of a running gateway, and `Omni`, which starts the services by itself. No torch here."""

from bagel.client.async_client import AsyncClient
from bagel.client.calls import ImageInput, OnServiceEvent, PromptInput, PromptPart
from bagel.client.sync_client import Client
from bagel.rpc.transport import PLAINTEXT, Security

__all__ = [
    "PLAINTEXT", "AsyncClient", "Client", "ImageInput", "OnServiceEvent", "PromptInput", "PromptPart", "Security",
]  # fmt: skip
