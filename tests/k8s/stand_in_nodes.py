"""Nodes without machines: what a kubelet tells the API server, told by a thread.

They stay Ready, their pods run and are ready a moment after they are bound, and a pod that is deleted ends as a
container that was asked to stop ends. A test says how a pod of a Job ends (`finish`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from kubernetes import client, config

from tests.unit.k8s.node_profiles import Node

PERIOD_S = 0.25
HEARTBEAT_S = 10.0
SIGTERM_EXIT = 143


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class StandInNodes:
    """`with StandInNodes(kubeconfig, cluster("gke", roles=True)) as nodes: nodes.finish("run-0-abcde", 0)`."""

    def __init__(self, kubeconfig: str, nodes: Sequence[Node]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stand-in-nodes", daemon=True)
        self._addresses: dict[str, str] = {}
        self.error: Exception | None = None
        self.starts = True
        """Whether pods that are bound here come to run."""

    def __enter__(self) -> StandInNodes:
        for node in self._nodes.values():
            self._join(node)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join(30)
        for pod in self._pods():  # a pod of a node that is gone would stay for a minute
            self._delete(pod)
        for name in list(self._nodes):
            with suppress(client.ApiException):
                self._core.delete_node(name)
        assert self.error is None, self.error

    def add(self, node: Node) -> None:
        """One more node, as an autoscaler brings it."""
        self._join(node)
        self._nodes[node.name] = node

    def finish(self, pod: str, code: int, namespace: str = "trimtab") -> None:
        """End a pod's container with an exit code."""
        self._patch(pod, namespace, ended(self._core.read_namespaced_pod(pod, namespace), code))

    def _join(self, node: Node) -> None:
        body = {"metadata": {"name": node.name, "labels": node.labels}, "spec": {"taints": list(node.taints)}}
        with suppress(client.ApiException):
            self._core.delete_node(node.name)
        self._core.create_node(body)
        self._heartbeat(node)

    def _heartbeat(self, node: Node) -> None:
        capacity = {key: str(int(value)) for key, value in node.capacity.items()}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "stands in"}
        ready |= {"lastHeartbeatTime": now(), "lastTransitionTime": now()}
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        self._core.patch_node_status(node.name, {"status": status})

    def _run(self) -> None:
        heartbeat_s = HEARTBEAT_S
        while not self._stopping.wait(PERIOD_S):
            try:
                for pod in self._pods():
                    if pod["metadata"].get("deletionTimestamp"):
                        self._delete(pod)
                    elif self.starts and pod.get("status", {}).get("phase") == "Pending":
                        self._patch(pod["metadata"]["name"], pod["metadata"]["namespace"], self._running(pod))
                heartbeat_s -= PERIOD_S
                if heartbeat_s <= 0:
                    heartbeat_s = HEARTBEAT_S
                    for node in list(self._nodes.values()):
                        self._heartbeat(node)
            except client.ApiException as error:
                if error.status not in (404, 409, 429, 500, 503):
                    self.error = error
                    return

    def _pods(self) -> list[dict[str, Any]]:
        """Pods that are bound to these nodes."""
        page = json.loads(self._core.list_pod_for_all_namespaces(_preload_content=False).data)
        return [pod for pod in page["items"] if pod["spec"].get("nodeName") in self._nodes]

    def _running(self, pod: dict[str, Any]) -> dict[str, Any]:
        """A status as of a pod that serves."""
        name = pod["metadata"]["uid"]
        address = self._addresses.setdefault(name, f"10.244.{len(self._addresses) // 250}.{len(self._addresses) % 250}")
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": now()}
            for kind in ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready")
        ]
        containers = [
            {
                "name": one["name"],
                "image": one["image"],
                "imageID": "",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now()}},
            }
            for one in pod["spec"]["containers"]
        ]
        own = {"podIP": address, "podIPs": [{"ip": address}], "startTime": now()}
        return {"phase": "Running", "conditions": conditions, "containerStatuses": containers, **own}

    def _delete(self, pod: dict[str, Any]) -> None:
        """As a kubelet does it: the container ends, then the pod goes."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        with suppress(client.ApiException):
            if pod.get("status", {}).get("phase") in ("Pending", "Running"):
                self._patch(name, namespace, ended(self._core.read_namespaced_pod(name, namespace), SIGTERM_EXIT))
            self._core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)

    def _patch(self, pod: str, namespace: str, status: dict[str, Any]) -> None:
        self._core.patch_namespaced_pod_status(pod, namespace, {"status": status})


def ended(pod: Any, code: int) -> dict[str, Any]:
    """A status as of a pod whose containers have ended."""
    state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "finishedAt": now()}}
    containers = [
        {"name": one.name, "image": one.image, "imageID": "", "ready": False, "restartCount": 0, "state": state}
        for one in pod.spec.containers
    ]
    for one in containers:
        one["state"] = {"running": None, "waiting": None, **state}
    conditions = [
        {"type": kind, "status": "False", "lastTransitionTime": now()} for kind in ("ContainersReady", "Ready")
    ]
    return {"phase": "Succeeded" if code == 0 else "Failed", "containerStatuses": containers, "conditions": conditions}
