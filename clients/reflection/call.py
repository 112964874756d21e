"""Call any method of a server by reflection alone: no .proto file, no generated code. JSON in, JSON out.

    python call.py 127.0.0.1:50052                                    what is served
    python call.py 127.0.0.1:50052 weft.v1.GatewayService/Generate '{"text": "Once upon a time"}'

As does: grpcurl -plaintext -d '{"text": "Once upon a time"}' 127.0.0.1:50052 weft.v1.GatewayService/Generate
Needs: grpcio, grpcio-reflection, protobuf. WEFT_API_KEY is sent when it is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def services(channel: grpc.Channel) -> list[str]:
    """The names of all services."""
    return sorted(ProtoReflectionDescriptorDatabase(channel).get_services())


def call(channel: grpc.Channel, path: str, document: str, metadata: list[tuple[str, str]]) -> Iterator[str]:
    """Call `service/Method` with a JSON document; each answer as JSON. KeyError for an unknown name."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service, _, name = path.rpartition("/")
    method = pool.FindServiceByName(service).methods_by_name[name]
    request = json_format.Parse(document, message_factory.GetMessageClass(method.input_type)())
    answer = message_factory.GetMessageClass(method.output_type)
    # A stream-stream stub speaks all four kinds of methods: they differ only in how many messages there are.
    stub = channel.stream_stream(
        f"/{path}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    responses = stub(iter([request]), metadata=metadata)
    try:
        for response in responses:
            yield json_format.MessageToJson(response, preserving_proto_field_name=True)
    finally:
        responses.cancel()


def main(arguments: list[str]) -> int:
    """List, or call."""
    if len(arguments) not in (1, 2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    metadata = [("authorization", f"Bearer {key}")] if (key := os.environ.get("WEFT_API_KEY")) else []
    with grpc.insecure_channel(arguments[0]) as channel:
        try:
            if len(arguments) == 1:
                print(*services(channel), sep="\n")
                return 0
            for answer in call(channel, arguments[1], (arguments[2:] or ["{}"])[0], metadata):
                print(answer, flush=True)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
        except (KeyError, json_format.ParseError) as error:
            print(f"{arguments[1]}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
