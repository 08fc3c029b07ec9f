"""A request holds so many sequences and no more, and what holds far too much is refused in no time."""

import json
import time

import grpc
import grpc.aio
import pytest

from tests.services.gateway.conftest import gateway
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2 as pb
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2_grpc as stubs

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"content-type": "application/json"}
MANY = 1_500_000
PAIR = {"prompt": "w1", "response": "w2"}
CHAT = [{"role": "user", "content": "w1"}]
ROWS = {
    "items": ("/v1/score", {"items": [PAIR]}),
    "conversations": ("/v1/score", {"conversations": [CHAT]}),
    "token_ids": ("/v1/score", {"token_ids": [[5]], "tokenizer_digest": "x"}),
    "references": ("/v1/score", {"conversations": [CHAT], "references": [""]}),
    "prompts": ("/v1/generate", {"prompts": ["w1"]}),
    "prompt": ("/v1/completions", {"model": "policy", "prompt": [[5]]}),
    "query": ("/get_reward", {"query": ["w1"]}),
    "labels": ("/get_reward", {"query": ["w1"], "labels": [""]}),
    "input": ("/classify", {"input": ["w1"]}),
}
ENDLESS = {
    "items[0]": ("/v1/score", b'{"items": [%s1]}' % (b"1," * 4000)),
    "items": ("/v1/score", b'{"items": [%s1]}' % (b"1," * MANY)),
    "token_ids[0][0]": ("/v1/score", b'{"tokenizer_digest": "x", "token_ids": [[%s1]]}' % (b'"a",' * MANY)),
    "messages": (
        "/v1/chat/completions",
        b'{"model": "policy", "messages": [%s1]}' % (b'{"role":"a","content":""},' * 9999),
    ),
    "body": ("/v1/score", b'{"items": [{%s}]}' % b",".join(b'"%d":1' % name for name in range(MANY // 2))),
}


@pytest.fixture(scope="module")
async def strict(upstreams):
    async with gateway(**upstreams, max_rows=2) as opened:
        yield opened


@pytest.mark.parametrize("field", ROWS)
async def test_one_sequence_too_many_is_refused_by_field(strict, field):
    path, body = ROWS[field]
    refused = await strict.http.post(path, json=body | {field: body[field] * 3})
    told = refused.json()["error"]
    assert (refused.status_code, told["field"]) == (422, field)
    assert told["message"] == f"{field}: 3, but a request may hold 2"


async def test_as_many_as_a_request_may_hold_are_answered_and_token_ids_are_no_rows(strict):
    scored = await strict.http.post("/v1/score", json={"items": [PAIR] * 2})
    assert scored.status_code == 200 and len(scored.json()["scores"]) == 2
    one = {"model": "policy", "prompt": [0, 5, 6, 7], "max_tokens": 1}
    assert (await strict.http.post("/v1/completions", json=one)).status_code == 200


@pytest.mark.parametrize("field", ENDLESS)
async def test_what_is_wrong_a_million_times_is_refused_at_its_first(edge, field):
    path, body = ENDLESS[field]
    started = time.monotonic()
    refused = await edge.http.post(path, content=body, headers=JSON | {"x-timeout-s": "2"})
    assert refused.status_code == 422 and refused.json()["error"]["field"].startswith(field)
    assert time.monotonic() - started < 3


def infer(shape: int, texts: int, *, raw: bool = False) -> pb.ModelInferRequest:
    text = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[shape])
    if raw:
        return pb.ModelInferRequest(model_name="reward", inputs=[text], raw_input_contents=[bytes(4) * texts])
    text.contents.bytes_contents.extend([b""] * texts)
    return pb.ModelInferRequest(model_name="reward", inputs=[text])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (infer(3, 3), "inputs[0].shape: 3 rows, but a request may hold 2"),
        (infer(2**40, MANY), f"inputs[0].shape: {2**40} rows, but a request may hold 2"),
        (infer(2, MANY), f"inputs[0].shape: says 2, but there are {MANY} texts"),
        (infer(2, MANY, raw=True), "raw_input_contents[0]: goes on behind the 2 texts that the shape says"),
        (infer(2, 1, raw=True), "inputs[0].shape: says 2, but there are 1 texts"),
    ],
)
async def test_rows_are_counted_before_they_are_unpacked(strict, request_, said):
    async with grpc.aio.insecure_channel(strict.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stubs.GRPCInferenceServiceStub(channel).ModelInfer(request_, timeout=10)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, said)


async def test_the_grpc_port_takes_no_larger_messages_than_the_http_port(upstreams):
    async with gateway(**upstreams, max_body_bytes=4096) as small, grpc.aio.insecure_channel(small.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stubs.GRPCInferenceServiceStub(channel).ModelInfer(infer(1, 4096, raw=True), timeout=10)
        body = json.dumps({"items": [PAIR | {"response": "w1 " * 4096}]}).encode()
        assert (await small.http.post("/v1/score", content=body, headers=JSON)).status_code == 413
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in refused.value.details()
