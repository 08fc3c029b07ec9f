"""Waiting for what was applied: each workload's state, again and again, until all are there. Knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimtab.deploy.objects import Kubectl
from trimtab.deploy.render import Object, name_of
from trimtab.rounds.launchers.kubernetes_states import pod_waits_for, rollout_waits_for

PERIOD_S = 2.0
WORKLOADS = ("Deployment", "StatefulSet")


class RolloutError(RuntimeError):
    """A workload did not come up; the message says which and in whose words."""


@dataclass(frozen=True)
class Progress:
    """One workload. `waits_for` is "" once it is complete."""

    name: str
    ready: int
    wanted: int
    waits_for: str
    failed: bool = False


def follow(
    kubectl: Kubectl, objects: Sequence[Object], timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Progress, ...]]:
    """Yield the state of all workloads until they are complete. RolloutError for one that fails or is too late."""
    wanted = {name_of(one) for one in objects if one["kind"] in WORKLOADS}
    namespace = next((one["metadata"]["namespace"] for one in objects if one["kind"] in WORKLOADS), "")
    deadline = clock() + timeout_s
    while True:
        now = progress(kubectl, namespace, wanted)
        yield now
        failed = [one for one in now if one.failed]
        if failed:
            raise RolloutError(f"{failed[0].name}: {failed[0].waits_for}")
        late = [one for one in now if one.waits_for]
        if not late:
            return
        if clock() > deadline:
            raise RolloutError(f"{late[0].name} is not up within {timeout_s:g} s: {late[0].waits_for}")
        time.sleep(PERIOD_S)


def progress(kubectl: Kubectl, namespace: str, wanted: set[str]) -> tuple[Progress, ...]:
    """The workloads of these names ("Deployment/reward") as they are."""
    pods = kubectl.get("pods", namespace=namespace)
    found = []
    for kind in WORKLOADS:
        if not any(name.startswith(f"{kind}/") for name in wanted):
            continue
        for one in kubectl.get(f"{kind.lower()}s", namespace=namespace):
            if name_of({"kind": kind, **one}) not in wanted:
                continue
            labels = one["spec"]["selector"]["matchLabels"]
            own = [pod for pod in pods if labels.items() <= pod["metadata"].get("labels", {}).items()]
            status = one.get("status", {})
            wanted_here = one["spec"].get("replicas", 1)
            if kind == "Deployment":
                waits, ready = rollout_waits_for(one, own) or "", status.get("availableReplicas") or 0
            else:
                ready = status.get("readyReplicas") or 0
                complete = status.get("updatedReplicas", 0) == ready == wanted_here
                reasons = [text for text in map(pod_waits_for, own) if text]
                waits = "" if complete else [*reasons, f"{ready} of {wanted_here} replicas ready"][0]
            name = f"{kind}/{one['metadata']['name']}"
            found.append(Progress(name, ready, wanted_here, waits, waits.startswith("no progress")))
    missing = wanted - {one.name for one in found}
    return (*found, *(Progress(name, 0, 0, "is not there yet") for name in sorted(missing)))
