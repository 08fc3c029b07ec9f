"""The Open Inference Protocol over gRPC, by Triton's own client and by bare messages."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from tests.services.gateway.conftest import TIMEOUT_S, gateway
from trimtab.gateway.dialects.oip import host_of
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2 as pb
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2_grpc as stubs
from trimtab_client import AsyncRewardClient
from trimtab_client.errors import from_rpc_error

pytestmark = pytest.mark.asyncio(loop_scope="module")
PEER = Path(__file__).parent / "peers" / "triton_scores.py"


async def test_triton_s_client_gets_the_reward_service_s_scores(edge, upstreams):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PEER), edge.grpc, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    told = json.loads(out)
    async with AsyncRewardClient(upstreams["reward"]) as client:
        both = await client.score_texts([("w1 w2 w3", "w4 w5"), ("w1", "w9 w8 w7 w6")])
        alone = await client.score_texts([("", "w1 w2")])
    np.testing.assert_allclose(told["scores"], both.scores, rtol=1e-6)
    np.testing.assert_allclose(told["normalized"], both.normalized_scores, rtol=1e-6)
    np.testing.assert_allclose(told["alone"], alone.scores, rtol=1e-6)
    assert told["live"] and told["ready"] and told["id"] == "r-1"
    assert told["model_ready"] == [True, False, True, False] and told["versions"] == ["0"]
    assert told["outputs_of_alone"] == ["score"] and told["inputs"] == ["prompt", "response", "text", "reference"]
    (unknown, _), (missing, message) = told["refusals"]
    assert unknown == "StatusCode.NOT_FOUND" and missing == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("inputs: give prompt and response")


def tensor(name="text", values=(b"w1",), *, datatype="BYTES", shape=None) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(
        name=name,
        datatype=datatype,
        shape=[len(values)] if shape is None else shape,
        contents=pb.InferTensorContents(bytes_contents=values),
    )


def flag(value: int) -> dict[str, pb.InferParameter]:
    return {"truncate": pb.InferParameter(int64_param=value)}


def raw(content: bytes, rows: int = 1) -> dict[str, Any]:
    text = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[rows])
    return {"inputs": [text], "raw_input_contents": [content]}


WRONG = [
    ("inputs", {"inputs": []}),
    ("inputs[0].name", {"inputs": [tensor("image")]}),
    ("inputs[1].name", {"inputs": [tensor(), tensor()]}),
    ("inputs[0].datatype", {"inputs": [tensor(datatype="FP32")]}),
    ("inputs[0].shape", {"inputs": [tensor(shape=[2])]}),
    ("inputs[0].contents", {"inputs": [tensor(values=(b"\xff",))]}),
    ("raw_input_contents", {"inputs": [tensor()], "raw_input_contents": [b"", b""]}),
    ("raw_input_contents[0]", raw(b"\xff\xff\xff\xffw")),
    ("raw_input_contents[0]", raw(b"\0\0\0\0\0")),
    (
        "outputs[0].name",
        {"inputs": [tensor()], "outputs": [pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]},
    ),
    (
        "outputs[1].name",
        {"inputs": [tensor()], "outputs": 2 * [pb.ModelInferRequest.InferRequestedOutputTensor(name="score")]},
    ),
    ("model_version", {"inputs": [tensor()], "model_version": "newest"}),
    ("model_version", {"inputs": [tensor()], "model_version": "²"}),
    ("model_version", {"inputs": [tensor()], "model_version": "9" * 19}),
    ("parameters.truncate", {"inputs": [tensor()], "parameters": flag(1)}),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG)
async def test_a_wrong_request_is_refused_by_the_field_that_is_wrong(edge, field, wrong):
    async with grpc.aio.insecure_channel(edge.grpc) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(pb.ModelInferRequest(model_name="reward", **wrong), timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith(f"{field}: ")


async def test_calls_count_with_the_requests_over_http_and_too_many_are_told_when_to_come_again(upstreams):
    async with (
        gateway(**upstreams, requests_per_s=0.5, burst=2) as strict,
        grpc.aio.insecure_channel(strict.grpc) as channel,
    ):
        stub = stubs.GRPCInferenceServiceStub(channel)
        request = pb.ModelInferRequest(model_name="reward", inputs=[tensor()])
        assert (await strict.http.get("/v1/models")).status_code == 200
        await stub.ModelInfer(request, timeout=TIMEOUT_S)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request, timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(refused.value)
    assert error.retry_after_s is not None and 0 < error.retry_after_s <= 2


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.0.0.1:4711", "10.0.0.1"), ("ipv6:%5B::1%5D:4711", "::1"), ("unix:", "unix:")],
)
async def test_the_host_of_a_grpc_peer(peer, host):
    assert host_of(peer) == host


async def test_what_the_service_refuses_is_named_in_this_protocol_s_words(edge):
    async with grpc.aio.insecure_channel(edge.grpc) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(pb.ModelInferRequest(model_name="reward", inputs=[tensor(values=(b"w1 " * 200,))]))
        error = from_rpc_error(refused.value)
        assert (error.code, error.field) == ("INVALID_ARGUMENT", "inputs")
        assert error.message.startswith("inputs: sequence 0 has ")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(pb.ModelInferRequest(model_name="reward:none", inputs=[tensor()]))
    assert from_rpc_error(refused.value).field == "model_name"


async def test_a_step_that_is_not_served_is_not_scored_by_another(edge):
    async with grpc.aio.insecure_channel(edge.grpc) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(
                pb.ModelInferRequest(model_name="reward", model_version="7", inputs=[tensor()]), timeout=TIMEOUT_S
            )
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
