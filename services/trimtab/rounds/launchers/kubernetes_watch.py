"""What some objects are now, kept up to date: listed, then watched, and listed anew whenever a watch breaks.

A watch may miss a deletion when its connection drops; a list cannot. So each break, each "410 Gone" and each end of a
watch leads to a list, and what is no longer in it is gone.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from types import TracebackType
from typing import Any

from kubernetes import client
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from trimtab.rounds.launchers.kubernetes import RETRIED, Cluster, ClusterError

WATCH_S = 60
READ_S = WATCH_S + 15


class Watched:
    """The objects of one list call, by name, as the API's own JSON.

    `with Watched(cluster, cluster.batch.list_namespaced_job, changed, label_selector="…") as jobs: jobs.now()`.
    `changed` is set at every change. What stops it for good (a refusal) is raised by `now`.
    """

    def __init__(
        self, cluster: Cluster, lister: Callable[..., Any], changed: threading.Event, **selection: Any
    ) -> None:
        self._cluster = cluster
        self._lister = lister
        self._changed = changed
        self._selection = selection
        self._items: dict[str, dict[str, Any]] = {}
        self._gone: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._listed = threading.Event()
        self._stopping = threading.Event()
        self._answer: Any = None
        self._error: Exception | None = None
        self.lists = 0
        self._thread = threading.Thread(target=self._run, name=f"watch-{lister.__name__}", daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        connection = getattr(self._answer, "connection", None)
        if connection is not None and connection.sock is not None:
            with suppress(OSError):  # `close` would wait for the thread that reads; this wakes it
                connection.sock.shutdown(socket.SHUT_RDWR)

    def now(self) -> list[dict[str, Any]]:
        """The objects; waits for the first list. ClusterError where the cluster refuses."""
        while not self._listed.wait(0.5):
            if not self._thread.is_alive() and self._error is None:
                raise ClusterError("the watch has ended")
        if self._error is not None:
            raise self._error
        with self._lock:
            return list(self._items.values())

    def last_seen(self, name: str) -> dict[str, Any] | None:
        """An object that was removed, as it was at its end; None if it was never seen."""
        with self._lock:
            return self._gone.get(name)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                version = self._list()
                self._follow(version)
        except Exception as error:  # raised in the thread that asks
            self._error = error
        self._listed.set()
        self._changed.set()

    def _list(self) -> str:
        page = self._cluster.call(self._lister, self._cluster.namespace, **self._selection)
        with self._lock:
            self._gone |= self._items
            self._items = {item["metadata"]["name"]: item for item in page.get("items", [])}
            self.lists += 1
        self._listed.set()
        self._changed.set()
        return page["metadata"].get("resourceVersion", "")

    def _follow(self, version: str) -> None:
        """Apply events until the watch ends or breaks, or what it goes on from has expired."""
        try:
            answer = self._cluster.open(
                self._lister,
                self._cluster.namespace,
                watch=True,
                resource_version=version,
                timeout_seconds=WATCH_S,
                allow_watch_bookmarks=True,
                _request_timeout=(5, READ_S),
                **self._selection,
            )
            with closing(answer):
                self._answer = answer
                for line in iter_resp_lines(answer):
                    if self._stopping.is_set() or (line and not self._apply(json.loads(line))):
                        return
        except client.ApiException as error:
            if error.status not in RETRIED | {410}:
                raise ClusterError(f"the cluster refused to watch: {error.status} {error.reason}") from error
        except (HTTPError, OSError, json.JSONDecodeError):
            pass  # broken off, maybe in the middle of a line: the list says what has happened since
        self._stopping.wait(0.2)

    def _apply(self, event: dict[str, Any]) -> bool:
        """Take an event in; False for one that says the watch is at its end."""
        item = event["object"]
        if event["type"] == "ERROR":
            return False
        if event["type"] == "BOOKMARK":
            return True
        with self._lock:
            if event["type"] == "DELETED":
                self._items.pop(item["metadata"]["name"], None)
                self._gone[item["metadata"]["name"]] = item
            else:
                self._items[item["metadata"]["name"]] = item
        self._changed.set()
        return True
