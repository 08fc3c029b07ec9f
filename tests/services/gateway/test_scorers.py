"""A reward service of several scorers behind the gateway: chosen by model name, in every dialect and adapter."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from tests.services.gateway.conftest import PORTS, TIMEOUT_S, Edge, gateway
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2 as pb
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2_grpc as stubs
from trimtab.reward import service as reward_service
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer
from trimtab_client import AsyncRewardClient, RewardClient
from trimtab_client.adapters.openrlhf import OpenRlhfReward
from trimtab_client.adapters.trl import TrlReward
from trimtab_client.adapters.verl import VerlReward

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCORERS = {
    "length": {"kind": "length"},
    "answer": {"kind": "answer"},
    "both": {"kind": "sum", "weights": {"length": 0.5, "answer": 2.0}, "of": "raw"},
}
# Two words and the right answer; three words and a wrong one.
ITEMS = [
    {"prompt": "6 times 7?", "response": "It's 42", "reference": "42"},
    {"prompt": "6 times 7?", "response": "It is 41", "reference": "42"},
]


@pytest.fixture(scope="module")
async def reward() -> AsyncIterator[str]:
    config = RewardConfig(**PORTS, threads=1, scorers=SCORERS, default="length")
    async with RunningServer("reward", config, services=reward_service.SERVICES, load=reward_service.load) as server:
        yield server.address


@pytest.fixture(scope="module")
async def edge(reward) -> AsyncIterator[Edge]:
    async with gateway(reward=reward, reward_names=["reward", "org/my-rm"]) as opened:
        yield opened


async def test_a_model_name_chooses_the_scorer_and_a_sum_shows_its_parts(edge):
    async def scored(**fields) -> dict:
        return (await edge.http.post("/v1/score", json={"items": ITEMS, **fields})).json()

    plain = await scored()
    assert plain["scores"] == [2, 3] and plain["scorer"] == "length" and plain["parts"] == []
    assert (await scored(model="org/my-rm:answer"))["scores"] == [1, 0]
    summed = await scored(model="reward:both", deterministic=True)
    assert summed["scores"] == [3, 1.5] and summed["scorer"] == "both"
    assert [(part["scorer"], part["weight"], part["scores"]) for part in summed["parts"]] == [
        ("length", 0.5, [2, 3]),
        ("answer", 2.0, [1, 0]),
    ]


async def test_conversations_have_references_of_their_own(edge):
    chats = [[{"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}]] * 2
    asked = {"conversations": chats, "model": "reward:answer"}
    right = await edge.http.post("/v1/score", json=asked | {"references": ["42", "43"]})
    assert right.json()["scores"] == [1, 0]
    for wrong in (["42"], None):
        refused = await edge.http.post("/v1/score", json=asked | {"references": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["field"].startswith("references")


@pytest.mark.parametrize("name", ["reward:none", "reward:", ":answer", "answer"])
async def test_a_scorer_that_is_not_there_is_404_by_the_caller_s_own_field(edge, name):
    answer = await edge.http.post("/v1/score", json={"items": ITEMS, "model": name})
    assert answer.status_code == 404 and answer.json()["error"]["field"] == "model"
    assert (await edge.http.get(f"/v1/models/{name}")).status_code == 404


async def test_what_is_missing_is_named_as_the_caller_calls_it(edge):
    unreferenced = [ITEMS[0], {"prompt": "a", "response": "b"}]
    answer = await edge.http.post("/v1/score", json={"items": unreferenced, "model": "reward:answer"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["field"] == "items[1].reference"
    assert error["message"].startswith("items[1].reference")
    classify = await edge.http.post("/classify", json={"input": ["a"], "model": "reward:answer"})
    assert classify.json()["error"]["field"] == "input[0].reference"


async def test_scorers_are_listed_as_models(edge):
    listed = {one["id"]: one for one in (await edge.http.get("/v1/models")).json()["data"]}
    assert list(listed) == ["reward", "org/my-rm", "reward:length", "reward:answer", "reward:both"]
    assert listed["reward:both"]["scorer"]["weights"] == {"length": 0.5, "answer": 2.0}
    assert listed["reward:answer"]["scorer"]["needs_reference"] and listed["reward"]["scorer"] is None
    alone = (await edge.http.get("/v1/models/org/my-rm:answer")).json()
    assert alone == listed["reward:answer"] | {"id": "org/my-rm:answer"}


async def test_openrlhf_chooses_by_the_address_and_its_labels_are_references(edge):
    body = {"query": ["a42", "a41"], "prompts": ["a", "a"], "labels": ["42", "42"]}
    answer = await edge.http.post("/get_reward?model=reward:answer", json=body)
    assert answer.json()["rewards"] == [1, 0]
    without = await edge.http.post("/get_reward", json=body | {"labels": None})
    assert without.json()["rewards"] == [1, 1]


async def test_the_open_inference_protocol_has_scorers_and_references(edge):
    def tensor(name: str) -> pb.ModelInferRequest.InferInputTensor:
        values = pb.InferTensorContents(bytes_contents=[item[name].encode() for item in ITEMS])
        return pb.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[2], contents=values)

    async with grpc.aio.insecure_channel(edge.grpc) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        inputs = [tensor(name) for name in ("prompt", "response", "reference")]
        request = pb.ModelInferRequest(model_name="reward:answer", inputs=inputs)
        answer = await stub.ModelInfer(request, timeout=TIMEOUT_S)
        ready = [
            (await stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=TIMEOUT_S)).ready
            for name in ("reward:answer", "reward:none")
        ]
    assert list(answer.outputs[0].contents.fp32_contents) == [1, 0]
    assert ready == [True, False]


async def test_the_adapters_choose_a_scorer_and_pass_references(reward):
    def by_trl() -> list[float]:
        found = TrlReward(reward, scorer="answer", reference_column="solution")
        return found(["p", "p"], ["42", "41"], solution=[42, 42])

    assert await asyncio.to_thread(by_trl) == [1, 0]
    verl = VerlReward(reward, scorer="answer")
    assert (await verl.compute_score("x", "42", "42", {"prompt": "p"}))["score"] == 1
    openrlhf = OpenRlhfReward(reward, scorer="answer")
    told = await asyncio.to_thread(openrlhf, ["p42", "p41"], ["p", "p"], ["42", "42"])
    assert told["rewards"].tolist() == [1, 0]


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_score_many_chooses_a_scorer(reward, style):
    async def found(rows: list[Any], scorer: str) -> list[float]:
        if style == "asyncio":
            async with AsyncRewardClient(reward) as client:
                return [one.score async for one in client.score_many(rows, scorer=scorer, deterministic=True)]

        def ask() -> list[float]:
            with RewardClient(reward) as client:
                return [one.score for one in client.score_many(rows, scorer=scorer, deterministic=True)]

        return await asyncio.to_thread(ask)

    assert await found([("", "one two"), ("", "one"), ("", "one two three", "a reference")], "length") == [2, 1, 3]
    assert await found([("q", "it is 7", "7"), ("q", "it is 8", "7")], "answer") == [1, 0]
