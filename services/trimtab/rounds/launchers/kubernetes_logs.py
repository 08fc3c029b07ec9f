"""The log of a run, line by line: of the first pod that runs, on over broken connections, and of the pod that follows.

Lines are asked for with their times, so that after a break none is missing and none is told twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from trimtab.rounds.launchers.kubernetes import Cluster

CONTAINER = "trimtab"
RETRY_S = 1.0
FINISH_S = 5.0


class PodLog:
    """Reads the newest pod of rank 0 on a thread of its own."""

    def __init__(self, cluster: Cluster, on_line: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._on_line = on_line
        self._pod = ""
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._last = ""

    def follow(self, pods: Iterable[dict[str, Any]]) -> None:
        """Read the newest pod that has begun to run, if it is not being read already."""
        begun = [
            pod
            for pod in pods
            if pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed") and _rank(pod) == 0
        ]
        if not begun:
            return
        name = max(begun, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")["metadata"]["name"]
        if name == self._pod:
            return
        if self._thread is not None:
            self._thread.join(FINISH_S)  # what the pod before has still to say
            self._stop.set()
        self._pod, self._last, self._stop = name, "", threading.Event()
        self._thread = threading.Thread(target=self._read, args=(name, self._stop), name=f"log-{name}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the rest of the log is read."""
        if self._thread is not None:
            self._thread.join(FINISH_S)

    def close(self) -> None:
        """Read no more."""
        self._stop.set()

    def _read(self, name: str, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                if self._stream(name, stop):
                    return
            except client.ApiException as error:
                if error.status == 404:
                    return
            except (HTTPError, OSError):
                pass  # the connection broke: ask again from the last line on
            stop.wait(RETRY_S)

    def _stream(self, name: str, stop: threading.Event) -> bool:
        """Read to the end of the stream; whether it is the log's end, for the pod has ended."""
        since: dict[str, Any] = {"since_seconds": _seconds_since(self._last)} if self._last else {}
        answer = self._cluster.open(
            self._cluster.core.read_namespaced_pod_log,
            name,
            self._cluster.namespace,
            container=CONTAINER,
            follow=True,
            timestamps=True,
            _request_timeout=(5, 120),
            **since,
        )
        rest = b""
        for chunk in answer.stream(4096):
            if stop.is_set():
                return True
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._tell(line.decode(errors="replace"))
        if rest:
            self._tell(rest.decode(errors="replace"))
        pod = self._cluster.find(self._cluster.core.read_namespaced_pod, name, self._cluster.namespace)
        return pod is None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")

    def _tell(self, line: str) -> None:
        moment, _, text = line.partition(" ")
        if moment > self._last:
            self._last = moment
            self._on_line(text)


def _rank(pod: dict[str, Any]) -> int:
    notes = pod["metadata"].get("annotations") or {}
    return int(notes.get("batch.kubernetes.io/job-completion-index", 0))


def _seconds_since(moment: str) -> int:
    try:
        then = datetime.fromisoformat(moment[:26].rstrip("Z") + "+00:00")
    except ValueError:
        return 3600
    return max(1, round((datetime.now(UTC) - then).total_seconds()) + 2)
