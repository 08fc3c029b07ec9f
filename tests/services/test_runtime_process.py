"""A server process from its first line of log to its exit code."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trimtab_client.v1 import reference_pb2, reference_pb2_grpc

ROOM = Path(__file__).parent / "runtime_room.py"


class Room:
    """One process; `ports` waits until it serves."""

    def __init__(self, folder: Path, mode: str, **settings: object) -> None:
        self.ready = folder / "ready.json"
        given = {"log_format": "json", "ready_file": self.ready, **settings}
        command = [sys.executable, str(ROOM), mode, *(f"{name}={value}" for name, value in given.items())]
        self.errors = folder / f"{mode}-{len(list(folder.iterdir()))}.log"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors)

    async def address(self) -> str:
        for _ in range(1500):
            if self.ready.exists():
                return f"127.0.0.1:{json.loads(self.ready.read_text())['port']}"
            assert self.process.poll() is None, self.end()
            await asyncio.sleep(0.02)
        raise TimeoutError("the room did not come up")

    def end(self) -> tuple[int, list[dict]]:
        """Its exit code and its log."""
        code = self.process.wait(timeout=30)
        return code, [json.loads(line) for line in self.errors.read_text().splitlines() if line.startswith("{")]

    async def listening(self) -> None:
        """Return once it has a port."""
        for _ in range(1500):
            if '"listening"' in self.errors.read_text():
                return
            await asyncio.sleep(0.02)
        raise TimeoutError("the room did not listen")


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    rooms: list[Room] = []

    def start(mode: str = "serve", **settings: object) -> Room:
        rooms.append(Room(tmp_path, mode, **settings))
        return rooms[-1]

    yield start
    for room in rooms:
        if room.process.poll() is None:
            room.process.kill()
            room.process.wait()


def slow_call(channel: grpc.aio.Channel, seconds: float, *, on_device: bool = False) -> grpc.aio.UnaryUnaryCall:
    stub = reference_pb2_grpc.ReferenceServiceStub(channel)
    return stub.LogProbs(reference_pb2.LogProbsRequest(temperature=seconds, include_lse=on_device), timeout=20)


async def test_sigterm_lets_the_call_in_flight_finish_refuses_new_ones_and_exits_0(start):
    room = start(grace_s=10)
    address = await room.address()
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = slow_call(channel, 1.0)
        await asyncio.sleep(0.3)
        room.process.send_signal(signal.SIGTERM)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await slow_call(channel, 0)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "draining" in (caught.value.details() or "")
        assert (await call).hidden_size == 7
    code, log = await asyncio.to_thread(room.end)
    assert code == 0
    assert log[-1]["event"] == "drained"
    assert log[-1]["finished"] is True
    assert not room.ready.exists()


async def test_the_grace_period_ends_calls_that_take_longer(start):
    room = start(grace_s=0.3)
    async with grpc.aio.insecure_channel(await room.address()) as channel:
        call = slow_call(channel, 15)
        await asyncio.sleep(0.2)
        room.process.send_signal(signal.SIGTERM)
        started_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    code, log = await asyncio.to_thread(room.end)
    assert (code, log[-1]["finished"]) == (0, False)
    assert time.monotonic() - started_s < 8


async def test_a_device_that_is_busy_beyond_the_grace_period_does_not_hold_the_process(start):
    room = start(grace_s=0.3)
    async with grpc.aio.insecure_channel(await room.address()) as channel:
        call = slow_call(channel, 60, on_device=True)
        await asyncio.sleep(0.2)
        room.process.send_signal(signal.SIGTERM)
        started_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    code, _ = await asyncio.to_thread(room.end)
    assert code == 0
    assert time.monotonic() - started_s < 15


async def test_a_second_signal_ends_the_grace_period(start):
    room = start(grace_s=60)
    async with grpc.aio.insecure_channel(await room.address()) as channel:
        call = slow_call(channel, 15)
        await asyncio.sleep(0.2)
        room.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        room.process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    assert (await asyncio.to_thread(room.end))[0] == 0


async def test_sigterm_while_loading_exits_0(start):
    room = start("hang")
    await room.listening()
    room.process.send_signal(signal.SIGTERM)
    code, log = await asyncio.to_thread(room.end)
    assert code == 0
    assert log[-1]["event"] == "drained"


def test_a_port_in_use_is_one_clear_line_and_exit_1(start):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        code, log = start(port=port).end()
        assert code == 1
        assert f"port: cannot listen on 127.0.0.1:{port}: the port is in use" in log[-1]["event"]
        code, log = start(metrics_port=port).end()
        assert code == 1
        assert f"metrics_port: cannot listen on 127.0.0.1:{port}" in log[-1]["event"]


async def test_two_servers_never_share_a_port(start, tmp_path):
    first = start()
    port = (await first.address()).split(":")[1]
    code, log = start(port=port, ready_file=tmp_path / "second.json").end()
    assert (code, "in use" in log[-1]["event"]) == (1, True)


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_1(start):
    code, log = start("fail").end()
    assert code == 1
    refusal = next(line for line in log if line["level"] == "error")
    assert refusal["event"] == "cannot serve room: model: /nowhere is not a model folder"
    assert "exception" not in refusal


def test_a_defect_of_the_load_keeps_its_traceback(start):
    code, log = start("defect").end()
    assert code == 1
    assert any("exception" in line for line in log)


def test_a_wrong_setting_is_refused_before_anything_starts(start):
    room = start(grace_s="soon")
    assert room.end()[0] == 2
    errors = room.errors.read_text()
    assert errors.count("\n") == 1
    assert errors.startswith("grace_s: ")


def test_once_loaded_garbage_is_collected_and_what_was_loaded_is_not_looked_through():
    script = """
import gc
from trimtab.runtime import server

async def run_service(label, config, *, services, load):
    await load(None)
    print(gc.isenabled(), gc.get_freeze_count() > 10_000)
    return 0

async def load(context):
    assert not gc.isenabled()
    return []

gc.disable()  # as `trimtab serve` does before its imports
server.run_service = run_service
server.serve("room", None, services=[], load=load)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "True"]
