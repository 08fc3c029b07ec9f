"""What the health port says while a server starts, works, hangs and drains; asked of a real process."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.services.runtime_room import NAME
from trimtab.rounds.launchers.services import free_ports
from trimtab_client.v1 import reference_pb2, reference_pb2_grpc

ROOM = Path(__file__).parent / "runtime_room.py"
SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"
READY, OVERALL, STARTUP, LIVENESS = "readiness", "", "startup", "liveness"


class Probed:
    """A process with a health port; `says` asks it, `call` sends it work and does not wait."""

    def __init__(self, folder: Path, mode: str, **settings: object) -> None:
        self.ready_file = folder / "ready.json"
        port, health_port = free_ports(2)
        given = {"port": port, "health_port": health_port, "ready_file": self.ready_file, **settings}
        command = [sys.executable, str(ROOM), mode, *(f"{name}={value}" for name, value in given.items())]
        self.process = subprocess.Popen(command, stderr=(folder / "log").open("w"))
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.probes = grpc.insecure_channel(f"127.0.0.1:{health_port}")
        self._calls: list[grpc.Future] = []

    def says(self, service: str) -> str:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(self.probes).Check(request, timeout=20, wait_for_ready=True)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def becomes(self, service: str, wanted: str, within_s: float = 30.0) -> None:
        until_s = time.monotonic() + within_s
        while self.says(service) != wanted:
            assert time.monotonic() < until_s, f"{service!r} never became {wanted}"
            time.sleep(0.05)

    def call(self, seconds: float, *, on_device: bool = False, on_loop: bool = False) -> None:
        request = reference_pb2.LogProbsRequest(temperature=seconds, include_lse=on_device, include_entropy=on_loop)
        stub = reference_pb2_grpc.ReferenceServiceStub(self.channel)
        self._calls.append(stub.LogProbs.future(request, timeout=60))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Probed]]:
    started: list[Probed] = []

    def start(mode: str = "serve", **settings: object) -> Probed:
        started.append(Probed(tmp_path, mode, **settings))
        return started[-1]

    yield start
    for probed in started:
        probed.process.kill()
        probed.process.wait()
        probed.channel.close()
        probed.probes.close()


def test_a_loading_process_is_alive_and_not_ready(start):
    room = start("hang", liveness_s=0.2)
    room.becomes(LIVENESS, SERVING)
    time.sleep(0.5)
    assert [room.says(name) for name in (READY, OVERALL, NAME, STARTUP)] == [NOT_SERVING] * 4
    assert room.says(LIVENESS) == SERVING


def test_a_serving_process_is_ready_alive_and_started(start):
    room = start(liveness_s=0.7)
    room.becomes(READY, SERVING)
    assert [room.says(name) for name in (READY, OVERALL, NAME, STARTUP, LIVENESS)] == [SERVING] * 5
    assert "health_port" in json.loads(room.ready_file.read_text())
    time.sleep(1.5)  # nothing to do is no reason to be ended
    assert room.says(LIVENESS) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        room.says("no.such.Service")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_hung_device_worker_is_not_alive_and_work_that_ends_makes_it_so_again(start):
    room = start(liveness_s=1)
    room.becomes(READY, SERVING)
    room.call(3, on_device=True)
    room.becomes(LIVENESS, NOT_SERVING)
    assert room.says(READY) == SERVING  # readiness is another question
    room.becomes(LIVENESS, SERVING)


def test_work_in_many_steps_is_alive_though_all_of_it_takes_long(start):
    room = start(liveness_s=1.5)
    room.becomes(READY, SERVING)
    for _ in range(12):
        room.call(0.2, on_device=True)
    until_s = time.monotonic() + 2.3
    while time.monotonic() < until_s:
        assert room.says(LIVENESS) == SERVING
        time.sleep(0.1)


def test_a_blocked_event_loop_is_told_by_the_probes_own_thread(start):
    room = start(liveness_s=1)
    room.becomes(READY, SERVING)
    room.call(4, on_loop=True)
    room.becomes(LIVENESS, NOT_SERVING)
    room.becomes(LIVENESS, SERVING)


def test_with_loop_and_device_both_hung_probes_are_still_answered_at_once(start):
    room = start(liveness_s=1)
    room.becomes(READY, SERVING)
    room.call(60, on_device=True)
    time.sleep(0.2)
    room.call(60, on_loop=True)
    room.becomes(LIVENESS, NOT_SERVING)
    started_s = time.monotonic()
    assert [room.says(name) for name in (LIVENESS, STARTUP)] == [NOT_SERVING, SERVING]
    assert time.monotonic() - started_s < 20  # the calls take a minute


def test_a_draining_process_is_alive_and_no_longer_ready(start):
    room = start(liveness_s=30, grace_s=60)
    room.becomes(READY, SERVING)
    room.call(60)
    time.sleep(0.5)
    room.process.send_signal(signal.SIGTERM)
    room.becomes(READY, NOT_SERVING)
    assert [room.says(name) for name in (OVERALL, NAME, STARTUP, LIVENESS)] == [NOT_SERVING] * 2 + [SERVING] * 2
