"""A rolling restart under load: three replicas replaced one after another as a Deployment with maxSurge 0 does it.

`python -m tests.services.rollout.restart FOLDER TIMING` (TIMING as JSON) does it in the network it is started in, with
a network namespace for each pod, and prints the Outcome.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.services.rollout.names import Names
from tests.services.rollout.pods import PORT, Pod, Replica, Timing
from trimtab_client import ChannelOptions, RewardClient, TrimtabError

REPLICAS = 3
CALLERS = 8
AFTER_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """Calls that were answered, those that failed by code, and the exit codes of the replicas that left."""

    answered: int
    failed: dict[str, int]
    exit_codes: list[int]
    slowest_s: float
    seconds: float


class Load:
    """Callers that score without a pause, with the SDK."""

    def __init__(self, target: str, retries: int) -> None:
        self._client = RewardClient(target, ChannelOptions(retries=retries, timeout_s=30))
        self._stop = threading.Event()
        self.failed: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._callers = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS)]

    def start(self) -> None:
        self._client.score_texts([("a", "bc")])
        for caller in self._callers:
            caller.start()

    def end(self) -> None:
        self._stop.set()
        for caller in self._callers:
            caller.join()
        self._client.close()

    def _call(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                scores = self._client.score_texts([("a", "bc")]).scores
                assert list(scores) == [2.0]
                self.seconds.append(time.monotonic() - started)
            except TrimtabError as error:
                self.failed[error.code] += 1
                print(f"after {time.monotonic() - started:.2f} s: {error}", file=sys.stderr)
                self._stop.wait(0.1)


def rolling_restart(folder: Path, timing: Timing, replica: Replica, *, retries: int) -> Outcome:
    """Three replicas under load, each replaced once."""
    pods = [Pod(number, folder, timing, replica) for number in range(REPLICAS)]
    every, started = list(pods), time.monotonic()
    host = "10.244.0.1" if replica.isolated else "127.0.0.1"
    try:
        for pod in pods:
            pod.wait_ready()
        with Names(host, timing.stale_s) as names, ThreadPoolExecutor(REPLICAS) as kubelet:
            names.set([pod.address for pod in pods], at_once=True)
            load = Load(names.target(PORT), retries)
            load.start()
            leaving = []
            for old in list(pods):
                pods.remove(old)
                names.set([pod.address for pod in pods])
                leaving.append(kubelet.submit(old.end))
                new = Pod(len(every), folder, timing, replica)
                every.append(new)
                new.wait_ready()
                pods.append(new)
                names.set([pod.address for pod in pods])
            exit_codes = [end.result() for end in leaving]
            time.sleep(AFTER_S)
            load.end()
        answered, slowest = len(load.seconds), max(load.seconds)
        return Outcome(answered, dict(load.failed), exit_codes, slowest, time.monotonic() - started)
    finally:
        for pod in every:
            pod.process.kill()
            pod.process.wait()


def main() -> None:
    folder, timing = Path(sys.argv[1]), Timing(**json.loads(sys.argv[2]))
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "link", "add", "pods", "type", "bridge"),
        ("ip", "address", "add", "10.244.0.1/24", "dev", "pods"),
        ("ip", "link", "set", "pods", "up"),
    ):
        subprocess.run(command, check=True)
    outcome = rolling_restart(folder, timing, Replica(isolated=True), retries=0)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
