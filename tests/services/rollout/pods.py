"""Pods as processes, with what a kubelet does: probes, and at the end preStop, SIGTERM, grace and SIGKILL.

A pod has an address of its own: one of loopback, or one in a network namespace that goes with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

PORT, HEALTH_PORT = 7102, 7200
START_S = 120
SMALL = Path(__file__).with_name("small_reward.py")
SCORER = """
import time
def score(response):
    time.sleep(0.1)
    return len(response)
"""


@dataclass(frozen=True)
class Timing:
    """What the pods and the name's caches keep to."""

    pre_stop_s: float
    grace_s: float
    connection_age_s: float | None
    stale_s: float
    drain_s: float = 20.0


@dataclass(frozen=True)
class Replica:
    """What a pod runs: `trimtab serve reward` with a rule, or with `small` a server that starts in a second.

    `isolated`: in a network namespace of its own.
    """

    small: bool = False
    isolated: bool = False


class Pod:
    """One replica of the reward service."""

    def __init__(self, number: int, folder: Path, timing: Timing, replica: Replica) -> None:
        isolated = replica.isolated
        self.address = f"10.244.0.{10 + number}" if isolated else f"127.24.0.{10 + number}"
        self._timing = timing
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pod_scorer.py").write_text(SCORER)
        config = folder / f"pod-{number}.yaml"
        settings: dict[str, object] = {
            "host": self.address,
            "port": PORT,
            "health_port": HEALTH_PORT,
            "metrics_port": None,
            "insecure": isolated,
            "grace_s": timing.drain_s,
            "connection_age_s": timing.connection_age_s,
        }
        serve = [sys.executable, str(SMALL), str(config)]
        if not replica.small:
            scorer = {"kind": "function", "function": "pod_scorer:score", "folder": str(folder)}
            settings |= {"scorers": {"slow": scorer}}
            serve = [sys.executable, "-m", "trimtab", "serve", "reward", "--config", str(config)]
        config.write_text(yaml.safe_dump(settings))
        self.log = folder / f"pod-{number}.log"
        if isolated:
            arrived = f"until ip address show eth0 2>/dev/null | grep -q {self.address}/; do sleep 0.02; done"
            serve = ["unshare", "--net", "sh", "-c", f'ip link set lo up; {arrived}; exec "$@"', "pod", *serve]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(serve, env=environment, stderr=self.log.open("w"), stdout=subprocess.DEVNULL)
        if isolated:
            self._connect(f"veth{number}")

    def wait_ready(self) -> None:
        """Return once the readiness probe succeeds."""
        until = time.monotonic() + START_S
        while not self._ready():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def end(self) -> int:
        """What a kubelet does to a pod that is deleted; returns the exit code."""
        time.sleep(self._timing.pre_stop_s)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self._timing.grace_s - self._timing.pre_stop_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _ready(self) -> bool:
        with grpc.insecure_channel(f"{self.address}:{HEALTH_PORT}") as channel:
            try:
                request = health_pb2.HealthCheckRequest(service="readiness")
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    def _connect(self, link: str) -> None:
        """A link between the bridge and the process's own network."""
        inside, pid = ("nsenter", "-t", str(self.process.pid), "-n"), str(self.process.pid)
        parent = Path("/proc/self/ns/net").stat().st_ino
        until = time.monotonic() + START_S
        while Path(f"/proc/{pid}/ns/net").stat().st_ino == parent:
            assert time.monotonic() < until, "the pod has no network of its own"
            time.sleep(0.01)
        for command in (
            ("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid),
            ("ip", "link", "set", link, "master", "pods", "up"),
            (*inside, "ip", "link", "set", "eth0", "up"),
            (*inside, "ip", "address", "add", f"{self.address}/24", "dev", "eth0"),
        ):
            subprocess.run(command, check=True, capture_output=True)
