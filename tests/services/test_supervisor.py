"""Promises of the local supervisor, kept by real processes that serve real gRPC health."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.process import LaunchError, ProcessSpec, ProcessState, ProcessStatus, RestartPolicy
from trimtab.rounds.launchers.services import free_ports, service_process

SMALL_SERVICE = Path(__file__).with_name("small_service.py")
QUICK = RestartPolicy(attempts=3, first_s=0.05, longest_s=0.2)


def small(folder: Path, mode: str = "serve", name: str = "small", port: int | None = None) -> ProcessSpec:
    port = port or free_ports(1)[0]
    command = (sys.executable, str(SMALL_SERVICE), str(port), mode, str(folder / f"{name}.pid"))
    return ProcessSpec(name, command, f"127.0.0.1:{port}", "small", folder / f"{name}.log")


def eventually(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Alive, and no zombie that only waits for its reaper."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ready_means_grpc_health_says_serving_and_leaving_stops_all(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK) as supervisor:
        supervisor.add(small(tmp_path, name="one"), small(tmp_path, name="two"))
        supervisor.wait_ready(timeout_s=30)
        statuses = supervisor.statuses()
        assert [s.state for s in statuses] == [ProcessState.SERVING, ProcessState.SERVING]
        pids = [s.pid for s in statuses if s.pid is not None]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    assert [s.state for s in supervisor.statuses()] == [ProcessState.STOPPED, ProcessState.STOPPED]
    assert [s.message for s in supervisor.statuses()] == ["exit code 0", "exit code 0"]  # SIGTERM was enough


def test_a_killed_child_is_reported_and_restarted_on_its_old_address(tmp_path: Path) -> None:
    events: list[ProcessStatus] = []
    with Supervisor(policy=QUICK, on_event=events.append) as supervisor:
        supervisor.add(small(tmp_path))
        supervisor.wait_ready(timeout_s=30)
        (before,) = supervisor.statuses()
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: supervisor.statuses()[0].restarts == 1)
        supervisor.wait_ready(timeout_s=30)
        (after,) = supervisor.statuses()
    assert after.address == before.address and after.pid != before.pid
    assert any(e.state == ProcessState.WAITING and "killed by SIGKILL" in e.message for e in events)


def test_restarts_are_bounded(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK) as supervisor:
        supervisor.add(small(tmp_path))
        supervisor.wait_ready(timeout_s=30)

        def kill_until_given_up() -> bool:
            (status,) = supervisor.statuses()
            if status.state == ProcessState.SERVING and status.pid is not None:
                os.kill(status.pid, signal.SIGKILL)
            return status.state == ProcessState.FAILED

        eventually(kill_until_given_up, timeout_s=30)
        with pytest.raises(LaunchError, match="3 times in a row"):
            supervisor.raise_failure()


def test_a_service_that_cannot_start_is_named_with_its_last_log_line_and_not_restarted(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK) as supervisor:
        supervisor.add(small(tmp_path, "fail"))
        with pytest.raises(LaunchError) as caught:
            supervisor.wait_ready(timeout_s=30)
        assert supervisor.statuses()[0].restarts == 0
    assert "small: exit code 3 before it served: model folder /nowhere does not exist" in str(caught.value)
    assert str(tmp_path / "small.log") in str(caught.value)


def test_a_taken_port_is_said_at_once(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK) as supervisor:
        first = small(tmp_path, name="first")
        supervisor.add(first)
        supervisor.wait_ready(timeout_s=30)
        supervisor.add(small(tmp_path, name="second", port=int(first.address.rsplit(":", 1)[1])))
        with pytest.raises(LaunchError, match=r"second: .* is in use by another process"):
            supervisor.wait_ready("second", timeout_s=30)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK, grace_s=0.3) as supervisor:
        supervisor.add(small(tmp_path, "stubborn"))
        supervisor.wait_ready(timeout_s=30)
        began = time.monotonic()
    assert 0.3 <= time.monotonic() - began < 5
    assert supervisor.statuses()[0].message == "killed by SIGKILL"


def test_what_stops_first_has_ended_before_the_others_are_asked(tmp_path: Path) -> None:
    events: list[tuple[str, ProcessState]] = []
    with Supervisor(policy=QUICK, grace_s=0.5, on_event=lambda e: events.append((e.name, e.state))) as supervisor:
        caller = replace(small(tmp_path, mode="stubborn", name="caller"), stops_first=True)
        supervisor.add(small(tmp_path, name="server"), caller)
        supervisor.wait_ready(timeout_s=30)
    assert events.index(("caller", ProcessState.STOPPED)) < events.index(("server", ProcessState.STOPPING))
    assert events[-1] == ("server", ProcessState.STOPPED)


def test_what_a_dead_child_had_started_dies_with_it(tmp_path: Path) -> None:
    with Supervisor(policy=QUICK) as supervisor:
        supervisor.add(small(tmp_path, "family"))
        supervisor.wait_ready(timeout_s=30)
        child, grandchild = map(int, (tmp_path / "small.pid").read_text().split())
        os.kill(child, signal.SIGKILL)
        eventually(lambda: not is_alive(grandchild))


def test_sigkill_of_the_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_supervisor import small, Supervisor\n"
        "with Supervisor() as supervisor:\n"
        "    supervisor.add(*(small(Path(sys.argv[1]), 'stubborn', name=n) for n in 'ab'))\n"
        "    supervisor.wait_ready(timeout_s=30); print('ready', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(SMALL_SERVICE.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        pids = [int((tmp_path / f"{name}.pid").read_text()) for name in "ab"]
        assert all(is_alive(pid) for pid in pids)
        parent.kill()
    eventually(lambda: not any(is_alive(pid) for pid in pids), timeout_s=5)


def test_a_service_gets_its_thread_budget_and_its_config_file(tmp_path: Path) -> None:
    spec = service_process("reward", {"model": "some/model", "port": 7999}, tmp_path, threads=2)
    assert spec.env["OMP_NUM_THREADS"] == "2" and spec.env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert spec.address == "127.0.0.1:7999"
    assert "model: some/model" in (tmp_path / "reward.yaml").read_text()
