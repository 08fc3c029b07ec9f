"""One supervised process: spawn it, see that it serves, restart it when it dies, stop it.

A state machine without a thread of its own: the Supervisor (local.py) calls `tick` again and again from
one long-lived thread. That it is always the same thread matters: PR_SET_PDEATHSIG fires when the *thread*
that started the child ends.
"""

from __future__ import annotations

import enum
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.rounds.launchers.log_tail import last_words

TETHER = Path(__file__).with_name("tether.py")


class LaunchError(RuntimeError):
    """A service could not be started or kept running; the message says which, why, and where its log is."""


class ProcessState(enum.StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    NOT_SERVING = "not serving"
    WAITING = "waiting to restart"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED = frozenset({ProcessState.STOPPED, ProcessState.FAILED})


@dataclass(frozen=True)
class ProcessSpec:
    """A process to run and how to see that it serves.

    `health_service` is the name asked of grpc.health.v1, without TLS, at `health_address` (`address` if empty);
    both are "host:port". `env` is laid over the environment of the supervisor. stdout and stderr are appended to
    `log_path`. One that `stops_first` calls others while it drains: they are stopped once it has ended.
    """

    name: str
    command: tuple[str, ...]
    address: str
    health_service: str
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    health_address: str = ""
    stops_first: bool = False


@dataclass(frozen=True)
class RestartPolicy:
    """Bounds of restarting: waits double from `first_s` to `longest_s`; `attempts` deaths in a row are the end.

    A process that has served `steady_s` seconds has its count of deaths set back to zero. One that dies
    before it ever served is not restarted: a wrong model path stays wrong.
    """

    attempts: int = 5
    first_s: float = 0.5
    longest_s: float = 30.0
    steady_s: float = 60.0

    def wait_s(self, deaths: int) -> float:
        """Seconds to wait after the `deaths`-th death in a row (1 is the first)."""
        return min(self.longest_s, self.first_s * 2 ** (deaths - 1))


@dataclass(frozen=True)
class ProcessStatus:
    """A snapshot of one process for people and for the table of `trimtab up`."""

    name: str
    state: ProcessState
    address: str
    pid: int | None
    restarts: int
    message: str
    log_path: Path
    since: float  # time.monotonic() of the last change of state


def tethered(command: Sequence[str]) -> list[str]:
    """The command as one whose process the kernel kills when the thread of this process that starts it is gone."""
    return [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]


def is_serving(address: str, service: str, timeout_s: float = 1.0) -> bool:
    """Ask grpc.health.v1 at `address` whether `service` is SERVING; no answer is a no."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING


def port_is_free(address: str) -> bool:
    """Whether a server could listen at "host:port" now."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError:
            return False
    return True


def describe_exit(returncode: int) -> str:
    """ "exit code 1", or "killed by SIGKILL" for a negative Popen return code."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


class SupervisedProcess:
    """One process and its state; only the supervisor's thread may call `tick`."""

    def __init__(
        self, spec: ProcessSpec, policy: RestartPolicy, grace_s: float, report: Callable[[ProcessStatus], None]
    ) -> None:
        self.spec = spec
        self.state = ProcessState.STARTING
        self.message = ""
        self._policy = policy
        self._grace_s = grace_s
        self._report = report
        self._popen: subprocess.Popen[bytes] | None = None
        self._since = time.monotonic()
        self._deaths = 0
        self._restarts = 0
        self._has_served = False
        self._next_probe = 0.0
        self._deadline = 0.0  # of the restart while WAITING, of the grace period while STOPPING
        self._stop_wanted = False
        self._log_start = 0  # where the log of this life of the process begins

    @property
    def status(self) -> ProcessStatus:
        """What it is doing now."""
        popen = self._popen  # read once: other threads ask too
        pid = popen.pid if popen else None
        return ProcessStatus(
            self.spec.name,
            self.state,
            self.spec.address,
            pid,
            self._restarts,
            self.message,
            self.spec.log_path,
            self._since,
        )

    def request_stop(self, grace_s: float | None = None) -> None:
        """Have it ended at the next ticks: SIGTERM, then SIGKILL after the grace period. Any thread may ask."""
        if grace_s is not None:
            self._grace_s = grace_s
            self._deadline = min(self._deadline, time.monotonic() + grace_s)
        self._stop_wanted = True

    def tick(self) -> None:
        """Look once, act once; blocks at most for one health check."""
        if self.state in ENDED:
            return
        if self._popen is None:
            self._tick_without_process()
        elif self._has_exited():
            self._bury(self._popen)
        elif self.state == ProcessState.STOPPING:
            if time.monotonic() >= self._deadline:
                self._signal_group(signal.SIGKILL)
        elif self._stop_wanted:
            self._deadline = time.monotonic() + self._grace_s
            self._popen.terminate()
            self._set(ProcessState.STOPPING, "")
        elif time.monotonic() >= self._next_probe:
            self._probe()

    def _tick_without_process(self) -> None:
        if self._stop_wanted:
            self._set(ProcessState.STOPPED, "")
        elif self.state != ProcessState.WAITING or time.monotonic() >= self._deadline:
            self._spawn()

    def _spawn(self) -> None:
        if not self._has_served and not port_is_free(self.spec.address):
            self._set(ProcessState.FAILED, f"{self.spec.address} is in use by another process; choose another port")
            return
        if self.state == ProcessState.WAITING:
            self._restarts += 1
        self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                tethered(self.spec.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.spec.env},
                start_new_session=True,  # ctrl-C on the terminal reaches the supervisor alone, which stops in order
            )
        self._next_probe = 0.0
        self._set(ProcessState.STARTING, f"pid {self._popen.pid}")

    def _probe(self) -> None:
        serving = is_serving(self.spec.health_address or self.spec.address, self.spec.health_service)
        now = time.monotonic()
        if serving:
            self._has_served = True
            if self.state != ProcessState.SERVING:
                self._set(ProcessState.SERVING, f"on {self.spec.address}")
            elif now - self._since >= self._policy.steady_s:
                self._deaths = 0
        elif self.state == ProcessState.SERVING:
            self._set(ProcessState.NOT_SERVING, last_words(self.spec.log_path, self._log_start))
        self._next_probe = now + (2.0 if serving else 0.1)

    def _has_exited(self) -> bool:
        """Whether the process ended; it is left unreaped, so that its group's id cannot be reused yet."""
        assert self._popen is not None
        return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _bury(self, popen: subprocess.Popen[bytes]) -> None:
        self._signal_group(signal.SIGKILL)  # whatever it started and left behind
        reason = describe_exit(popen.wait())
        self._popen = None
        line = last_words(self.spec.log_path, self._log_start)
        if self.state == ProcessState.STOPPING or self._stop_wanted:
            self._set(ProcessState.STOPPED, reason)
        elif not self._has_served:
            self._set(ProcessState.FAILED, f"{reason} before it served: {line or 'it logged nothing'}")
        else:
            self._deaths += 1
            if self._deaths >= self._policy.attempts:
                self._set(ProcessState.FAILED, f"{reason}, {self._deaths} times in a row, given up: {line}")
            else:
                wait_s = self._policy.wait_s(self._deaths)
                self._deadline = time.monotonic() + wait_s
                self._set(ProcessState.WAITING, f"{reason}; restarting in {wait_s:g} s; last log line: {line}")

    def _signal_group(self, number: signal.Signals) -> None:
        assert self._popen is not None
        try:
            os.killpg(self._popen.pid, number)
        except ProcessLookupError:
            self._popen.send_signal(number)  # exec has not made the group yet, or all of it is gone

    def _set(self, state: ProcessState, message: str) -> None:
        self.state, self.message, self._since = state, message, time.monotonic()
        self._report(self.status)
