"""Calls a trimtab server without trimtab's client and without its .proto files, as grpcurl does: by reflection.

    python examples/clients/reflect.py 127.0.0.1:7102 trimtab.v1.RewardService/Score \
        '{"texts": {"items": [{"prompt": "Once upon a time", "response": " there was a happy dog."}]}}'

The same with grpcurl: grpcurl -plaintext -d '{…}' 127.0.0.1:7102 trimtab.v1.RewardService/Score
"""

from __future__ import annotations

import base64
import json
import struct
import sys

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT_S = 30


def call(address: str, method: str, request: str) -> dict[str, object]:
    """The answer to one unary call, as JSON."""
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service, name = method.split("/")
        found = pool.FindServiceByName(service).FindMethodByName(name)
        request_class = message_factory.GetMessageClass(found.input_type)
        answer_class = message_factory.GetMessageClass(found.output_type)
        send = channel.unary_unary(
            f"/{method}", request_class.SerializeToString, answer_class.FromString, _registered_method=False
        )
        answer = send(json_format.Parse(request, request_class(), descriptor_pool=pool), timeout=TIMEOUT_S)
        return json_format.MessageToDict(answer, descriptor_pool=pool)


def main() -> None:
    answer = call(*sys.argv[1:4])
    print(json.dumps(answer))
    if isinstance(scores := answer.get("scores"), str):  # float32, little-endian; bytes are base64 in JSON
        data = base64.b64decode(scores)
        print("scores:", *struct.unpack(f"<{len(data) // 4}f", data))


if __name__ == "__main__":
    main()
