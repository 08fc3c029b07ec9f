"""Scores through Triton's own client library: a process of its own, for both register the same protocol.

`python triton_scores.py ADDRESS` prints JSON.
"""

import json
import sys
from typing import Any

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException


def texts(name: str, values: list[str], shape: list[int]) -> grpc.InferInput:
    tensor = grpc.InferInput(name, shape, "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], dtype=np.object_).reshape(shape))
    return tensor


def main(address: str) -> None:
    client: Any = grpc.InferenceServerClient(address)
    metadata = client.get_model_metadata("reward", client_timeout=20)
    pair = [texts("prompt", ["w1 w2 w3", "w1"], [2, 1]), texts("response", ["w4 w5", "w9 w8 w7 w6"], [2, 1])]
    both = client.infer("reward", pair, request_id="r-1", client_timeout=20)
    outputs = [grpc.InferRequestedOutput("score")]
    alone = client.infer("reward", [texts("text", ["w1 w2"], [1])], outputs=outputs, client_timeout=20)
    refusals = []
    for model, inputs in (("other", pair), ("reward", pair[:1])):
        try:
            client.infer(model, inputs, client_timeout=20)
        except InferenceServerException as error:
            refusals.append([error.status(), error.message()])
    print(
        json.dumps(
            {
                "live": client.is_server_live(),
                "ready": client.is_server_ready(),
                "model_ready": [
                    client.is_model_ready(name, version)
                    for name, version in (("reward", ""), ("other", ""), ("reward", "0"), ("reward", "7"))
                ],
                "versions": list(metadata.versions),
                "inputs": [tensor.name for tensor in metadata.inputs],
                "scores": both.as_numpy("score").tolist(),
                "normalized": both.as_numpy("normalized_score").tolist(),
                "id": both.get_response().id,
                "alone": alone.as_numpy("score").tolist(),
                "outputs_of_alone": [output.name for output in alone.get_response().outputs],
                "refusals": refusals,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
