"""What the client for threads and the one for asyncio share. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import grpc

from bagel.client.calls import Call, ImageInput, PromptInput, make_call
from bagel.client.responses import DESCRIBE, ResponseReader
from bagel.errors import BagelError
from bagel.request import Modality
from bagel.rpc.api_keys import key_metadata
from bagel.rpc.deadlines import deadline_of
from bagel.rpc.transport import PLAINTEXT, Security
from bagel.v1 import gateway_pb2

Stream = TypeVar("Stream")


class ClientBase(ABC, Generic[Stream]):
    """A client of the gateway at `target`, a host:port. Stream: what its events come in.

    api_key: what a gateway with API keys asks for; ConfigError where it would go to another machine without TLS and
    security does not say that the network is trusted.
    """

    _stub: Any
    """The stub of GatewayService, made by the subclass with its own kind of channel."""
    _serve: Any
    """Its method Generate, which takes and gives bytes."""

    def __init__(self, target: str, security: Security = PLAINTEXT, *, api_key: str | None = None) -> None:
        self._target, self._security, self._api_key = target, security, api_key
        # Checked now, before any call could send the key in plaintext.
        self._key = key_metadata(api_key, target, security)

    def stream(
        self,
        prompt: PromptInput,
        *,
        modality: str = Modality.TEXT2IMG,
        image: ImageInput | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        output_format: str = "PNG",
        output_compression: int | None = None,
        partial_images: int = 0,
        **options: Any,
    ) -> Stream:
        """What happens, the Result last; closing the iterator cancels the request.

        image: goes before the prompt. timeout: seconds for everything. output_format: PNG, JPEG or WEBP;
        output_compression: quality of the latter two, from 0 to 100. partial_images: Preview events wanted, at most 3.
        options: the fields of bagel.request, such as steps, seed or think; an unknown one raises InvalidRequest.
        """
        call = make_call(
            prompt,
            modality=modality,
            image=image,
            timeout=timeout,
            request_id=request_id,
            output_format=output_format,
            output_compression=output_compression,
            partial_images=partial_images,
            **options,
        )
        return self._events(call)

    @abstractmethod
    def _events(self, call: Call) -> Stream:
        """The events of a call."""

    def _generate(self, call: Call) -> tuple[Any, ResponseReader]:
        """A call's responses, which can be cancelled, and what reads them."""
        metadata, sent = (*call.metadata, *self._key), call.message.SerializeToString()
        # As bytes, of which both sides keep a digest.
        return self._serve(sent, timeout=call.timeout, metadata=metadata), self._reader(call.index, sent)

    def _describe(self, timeout: float | None) -> Any:
        request = gateway_pb2.DescribeModelRequest()
        return self._stub.DescribeModel(request, timeout=deadline_of(timeout), metadata=self._key)

    def _reader(self, index: int, sent: bytes) -> ResponseReader:
        return ResponseReader(index, self._target, sent)

    def _describe_error(self, error: grpc.RpcError) -> BagelError:
        """What `_describe` has failed with."""
        sent = gateway_pb2.DescribeModelRequest().SerializeToString()
        return ResponseReader(0, self._target, sent, DESCRIBE).error(error)
