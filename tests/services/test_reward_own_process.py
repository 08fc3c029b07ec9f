"""A reward model in a process of its own: the same answers, and what becomes of either process when the other ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc import StatusCode

from tests.services.reward_room import TIMEOUT_S, Peer, children_that_run, refusal, serving
from trimtab.reward import forward_runner
from trimtab.reward.forward_messages import Order
from trimtab.reward.forward_runner import ProcessForward
from trimtab.runtime.errors import StartError
from trimtab.weights.store import open_store
from trimtab_client.v1 import model_pb2, reward_pb2, reward_pb2_grpc, tokens_pb2

SEQUENCES = [[0, 7, 9, 12], [0, 5], [0, *range(5, 45)], [0, 30, 31, 32, 33, 34, 1]]


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    return make_tiny("reward", seed=1, trimtab_score_mean=0.5, trimtab_score_std=2.0)


def model_processes(of: int | None = None) -> list[int]:
    return children_that_run("trimtab.reward.forward_process", of)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 another process's end has no event here
            await asyncio.sleep(0.02)


async def answers(peer: Peer) -> list[reward_pb2.ScoreResponse]:
    """What it says of tokens, texts and a conversation, and of itself."""
    messages = [
        tokens_pb2.ChatMessage(role="user", content="w1"),
        tokens_pb2.ChatMessage(role="assistant", content="w2"),
    ]
    pair = reward_pb2.TextPair(prompt="w1 w2", response=" w3")
    return [
        await peer.send(tokens=await peer.batch(SEQUENCES)),
        await peer.send(texts=reward_pb2.TextBatch(items=[pair])),
        await peer.send(
            conversations=reward_pb2.ConversationBatch(conversations=[tokens_pb2.Conversation(messages=messages)])
        ),
    ]


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), {"dtype": "bfloat16", "deterministic": True}]
)
async def test_it_answers_bit_for_bit_as_a_model_within_the_server(folder, settings):
    async with serving(folder, **settings) as peer:
        assert not model_processes()
        want, want_info = await answers(peer), await peer.info()
    async with serving(folder, own_process=True, **settings) as peer:
        assert len(model_processes()) == 1
        assert await answers(peer) == want
        assert await peer.info() == want_info
    assert not model_processes(), "it ends with its server"


async def test_a_new_version_gets_a_process_and_the_old_one_ends(folder, make_tiny, tmp_path):
    store = open_store(str(tmp_path / "store"))
    first = store.publish(folder, run_id="rm", name="reward", step=1).version
    second = store.publish(make_tiny("reward", seed=2), run_id="rm", name="reward", step=2).version
    async with serving("version:rm/reward@1", store=str(tmp_path / "store"), own_process=True) as peer:
        before = await peer.send(tokens=await peer.batch(SEQUENCES))
        (old,) = model_processes()
        await peer.load(second.to_proto())
        after = await peer.send(tokens=await peer.batch(SEQUENCES))
        await until(lambda: old not in model_processes())
        (new,) = model_processes()
        missing = await refusal(peer.load(model_pb2.ModelVersion(run_id="rm", name="reward", step=9)))
        assert model_processes() == [new]
        assert not peer.server.context.failed.is_set(), "an end that was wanted is no failure"
    assert (before.version.digest, after.version.digest) == (first.digest, second.digest)
    assert before.scores != after.scores
    assert missing.code() == StatusCode.NOT_FOUND


def all_nan(model: torch.nn.Module) -> None:
    model.score.weight.data[:] = float("nan")


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        pytest.param(None, {}, "model: .*absent", marks=pytest.mark.slow),
        pytest.param("policy", {}, "weights: .*score", marks=pytest.mark.slow),
        ("reward", {"edit": all_nan}, "not finite"),
    ],
)
async def test_what_cannot_be_served_is_refused_at_start_with_the_reason(make_tiny, tmp_path, kind, changes, reason):
    model = make_tiny(kind, **changes) if kind else tmp_path / "absent"
    with pytest.raises(StartError, match=reason):
        async with serving(model, own_process=True):
            pytest.fail(f"{model} was served")
    assert not model_processes()


async def test_a_process_that_ends_while_it_loads_is_a_reason_not_to_start(folder, monkeypatch):
    monkeypatch.setattr(forward_runner.sys, "executable", "/bin/false")
    with pytest.raises(StartError, match=r"model: .*its process ended with code 1"):
        async with serving(folder, own_process=True):
            pytest.fail("it was served")


async def test_a_batch_that_fails_leaves_the_process_serving(folder):
    order = Order(str(folder), dtype="float32", device="cpu", threads=1, log_level="info", log_format="json")
    async with serving(folder) as peer:
        _, forward = await ProcessForward.start(order, peer.server.context)
        with pytest.raises(RuntimeError, match="IndexError"):
            await asyncio.to_thread(forward.score, [np.array([10**6], np.int32)], alone=True)
        scores = await asyncio.to_thread(forward.score, [np.array([1], np.int32)], alone=True)
        assert np.isfinite(scores).all()
        await forward.close()


async def test_a_score_that_is_no_number_fails_its_call_alone(make_tiny):
    def poison(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight.data[20] = float("nan")

    async with serving(make_tiny("reward", edit=poison), own_process=True) as peer:
        error = await refusal(peer.score([[0, 5], [0, 20]]))
        assert len(await peer.score([[0, 5]])) == 1
    assert error.code() == StatusCode.INTERNAL
    assert "sequence 1 " in (error.details() or "")


@contextmanager
def server_process(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, str, int]]:
    """`serve` in a process group of its own: it, its address, and the process id of its model."""
    ready = tmp_path / "ready.json"
    settings = f"model={str(folder)!r}, port=0, metrics_port=None, ready_file={str(ready)!r}, own_process=True"
    imports = "import sys; from trimtab.reward.config import RewardConfig; from trimtab.reward.service import main"
    command = [sys.executable, "-c", f"{imports}; sys.exit(main(RewardConfig({settings})))"]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        ends = time.monotonic() + 60
        while not ready.exists() and server.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        (model,) = model_processes(server.pid)
        yield server, f"127.0.0.1:{json.loads(ready.read_text())['port']}", model
        ends = time.monotonic() + 10
        while lives(model) and time.monotonic() < ends:
            time.sleep(0.02)
        assert not lives(model), "no orphan"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_server_whose_model_process_is_killed_ends_so_that_another_is_started(folder, tmp_path):
    with server_process(folder, tmp_path) as (server, _, model):
        os.kill(model, signal.SIGKILL)
        assert server.wait(TIMEOUT_S) == 1


@pytest.mark.slow
def test_the_model_process_ends_with_a_server_that_is_killed(folder, tmp_path):
    with server_process(folder, tmp_path) as (server, _, _):
        server.kill()
        assert server.wait(TIMEOUT_S) == -signal.SIGKILL


def test_calls_in_flight_are_answered_when_the_whole_group_is_told_to_stop(folder, tmp_path):
    texts = reward_pb2.TextBatch(items=[reward_pb2.TextPair(prompt="w1 " * 40, response="w2")] * 256)
    with server_process(folder, tmp_path) as (server, address, _), grpc.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        request = reward_pb2.ScoreRequest(texts=texts, deterministic=True)
        stub.Score(reward_pb2.ScoreRequest(texts=texts, deterministic=True), timeout=TIMEOUT_S)
        calls = [stub.Score.future(request, timeout=TIMEOUT_S) for _ in range(4)]
        time.sleep(0.1)
        assert not any(call.done() for call in calls)
        os.killpg(server.pid, signal.SIGTERM)
        assert [len(call.result().scores) for call in calls] == [4 * 256] * 4
        assert server.wait(TIMEOUT_S) == 0
