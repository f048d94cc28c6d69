"""A client without generated code: it asks the gateway for its API by reflection, and builds messages from the answer.

bagel serve
python -m examples.reflection_client 127.0.0.1:50051 pictures
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

LARGEST = 64 * 2**20
REQUEST = {
    "request": {
        "modality": "MODALITY_TEXT2IMG",
        "prompt": [{"text": {"text": "a large red circle"}}],
        "seed": 7,
        "image": {"steps": 24},
    }
}


def main(address: str, folder: Path) -> None:
    """Print the gateway's services and methods, and draw a picture into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # gRPC's default of 4 MiB is too small for large pictures.
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", LARGEST)]) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        service = DescriptorPool(database).FindServiceByName("bagel.v1.GatewayService")
        print("services:", ", ".join(database.get_services()))
        for method in service.methods:
            print(f"{method.name}({', '.join(field.name for field in method.input_type.fields)})")

        for event in call(channel, service.methods_by_name["Generate"], REQUEST):
            print("event:", kind := event.WhichOneof("event"))
            if kind == "picture":
                (folder / "reflected.png").write_bytes(event.picture.data)


def call(channel: grpc.Channel, method: MethodDescriptor, request: dict[str, Any]) -> Any:
    """Call a method with a request in protobuf's JSON form; returns the stream of responses."""
    request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    stream: Any = channel.unary_stream(path, request_class.SerializeToString, response_class.FromString)
    return stream(ParseDict(request, request_class()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "pictures"))
