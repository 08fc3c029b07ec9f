"""Nodes as the four kinds of cluster have them: labels, taints, and what a node can hold. And a small scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tests.unit.k8s.manifests import Pod, matches
from trimtab.deploy.render import Object

UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
GPU = "nvidia.com/gpu"


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: "250m", "64Gi", "8"."""
    for suffix, factor in UNITS.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


@dataclass(frozen=True)
class Node:
    """One node. Taints are as in the API."""

    name: str
    labels: dict[str, str]
    taints: tuple[Object, ...] = ()
    capacity: dict[str, float] = field(default_factory=dict)


def _nodes(prefix: str, count: int, labels: dict[str, str], taints: tuple[Object, ...], gpus: int) -> list[Node]:
    size = {"cpu": 16.0, "memory": quantity("64Gi")} if not gpus else {"cpu": 104.0, "memory": quantity("1Ti")}
    holds = size | {"ephemeral-storage": quantity("1Ti"), "pods": 110.0} | ({GPU: float(gpus)} if gpus else {})
    zones = ("a", "b")
    return [
        Node(
            f"{prefix}-{i}",
            labels | {"kubernetes.io/hostname": f"{prefix}-{i}", "topology.kubernetes.io/zone": zones[i % 2]},
            taints,
            holds,
        )
        for i in range(count)
    ]


def _taint(key: str, value: str) -> Object:
    return {"key": key, "value": value, "effect": "NoSchedule"}


def cluster(kind: str, *, roles: bool) -> list[Node]:
    """A cluster of one kind: two plain nodes and GPU nodes of 8; with `roles`, pools tainted for their role."""
    marks: dict[str, tuple[dict[str, str], tuple[Object, ...]]] = {
        "gke": ({"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}, (_taint(GPU, "present"),)),
        "eks": ({"karpenter.k8s.aws/instance-gpu-name": "h100"}, (_taint(GPU, "true"),)),
        "eks-auto": ({"eks.amazonaws.com/instance-gpu-name": "h100"}, (_taint(GPU, "true"),)),
        "aks": ({"kubernetes.azure.com/accelerator": "nvidia"}, (_taint("sku", "gpu"),)),
        "on-prem": ({"nvidia.com/gpu.present": "true", "nvidia.com/gpu.product": "NVIDIA-L40S"}, ()),
    }
    labels, taints = marks[kind]
    plain = _nodes("plain", 2, {}, (), 0)
    if not roles:
        return plain + _nodes("gpu", 4, labels, taints, 8)
    pools = []
    for role, count in (("generator", 1), ("scoring", 1), ("trainer", 2)):
        own = labels | {"trimtab.dev/pool": role}
        pools += _nodes(role, count, own, (*taints, _taint("trimtab.dev/pool", role)), 8)
    return plain + pools


def tolerates(pod: Pod, taint: Object) -> bool:
    """Whether some toleration of a pod covers a taint."""
    return any(
        one.get("key") in (None, taint["key"])
        and one.get("effect") in (None, taint["effect"])
        and (one.get("operator", "Equal") == "Exists" or one.get("value") == taint["value"])
        for one in pod.spec.get("tolerations", [])
    )


def refusal(pod: Pod, node: Node, free: dict[str, float]) -> str:
    """Why a pod cannot be on a node, in the scheduler's words; "" if it can."""
    taints = [taint for taint in node.taints if not tolerates(pod, taint)]
    if taints:
        return f"untolerated taint {taints[0]['key']}"
    if not matches({"matchLabels": pod.spec.get("nodeSelector", {})}, node.labels):
        return "didn't match Pod's node affinity/selector"
    required = _node_affinity(pod).get("requiredDuringSchedulingIgnoredDuringExecution")
    if required and not any(
        matches({"matchExpressions": term["matchExpressions"]}, node.labels) for term in required["nodeSelectorTerms"]
    ):
        return "didn't match Pod's node affinity/selector"
    for resource, amount in requests(pod).items():
        if amount > free.get(resource, 0.0):
            return f"Insufficient {resource}"
    return ""


def requests(pod: Pod) -> dict[str, float]:
    """What a pod asks for; an extended resource that has only a limit is asked for too."""
    total: dict[str, float] = {"pods": 1.0}
    for one in pod.spec["containers"]:
        asked = {GPU: one["resources"]["limits"][GPU]} if GPU in one["resources"]["limits"] else {}
        for resource, text in (asked | one["resources"]["requests"]).items():
            total[resource] = total.get(resource, 0.0) + quantity(text)
    return total


def place(pods: list[Pod], nodes: list[Node]) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Owner → nodes of its replicas, and owner → refusals of those that found none. Preferred nodes come first."""
    free = {node.name: dict(node.capacity) for node in nodes}
    placed: dict[str, list[str]] = {}
    unplaced: dict[str, set[str]] = {}
    for pod in pods:
        for number in range(pod.replicas):
            one = replace(pod, name=f"{pod.name}-{number}")
            reasons = {node.name: refusal(one, node, free[node.name]) for node in nodes}
            fitting = [node for node in nodes if not reasons[node.name]]
            if not fitting:
                unplaced.setdefault(pod.owner, set()).update(reasons.values())
                continue
            best = max(fitting, key=lambda node: (_preference(one, node), -len(placed.get(node.name, []))))
            for resource, amount in requests(one).items():
                free[best.name][resource] -= amount
            placed.setdefault(pod.owner, []).append(best.name)
    return placed, unplaced


def _node_affinity(pod: Pod) -> Object:
    return pod.spec.get("affinity", {}).get("nodeAffinity", {})


def _preference(pod: Pod, node: Node) -> int:
    return sum(
        one["weight"]
        for one in _node_affinity(pod).get("preferredDuringSchedulingIgnoredDuringExecution", [])
        if matches(one["preference"], node.labels)
    )
