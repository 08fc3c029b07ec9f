"""What a Job's objects say: where it stands, and in whose words it waits. Only reads plain JSON of the API."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Plain = Mapping[str, Any]

UNREMARKABLE = frozenset({"ContainerCreating", "PodInitializing"})
NODES = re.compile(r"^\d+/\d+ nodes are available: ")
PREEMPTION = re.compile(r"\.? ?(no new claims to deallocate, )?preemption: .*$")


class JobState(StrEnum):
    """Where a Job is."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED})


@dataclass(frozen=True)
class JobStatus:
    """`detail` says what a waiting Job waits for, or why one failed; "" where there is nothing to say."""

    state: JobState
    detail: str = ""


def job_status(job: Plain, pods: Iterable[Plain], events: Iterable[Plain]) -> JobStatus:
    """The state of a Job or JobSet with what its pods and events add."""
    for condition in job.get("status", {}).get("conditions") or []:
        if condition.get("status") != "True":
            continue
        if condition["type"] in ("Complete", "Completed", "SuccessCriteriaMet"):
            return JobStatus(JobState.SUCCEEDED)
        if condition["type"] in ("Failed", "FailureTarget"):
            reason, message = condition.get("reason", ""), condition.get("message", "")
            return JobStatus(JobState.FAILED, f"{reason}: {message}".strip(": "))
    alive = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
    alive = [pod for pod in alive if pod.get("status", {}).get("phase") in (None, "Pending", "Running")]
    reasons = [waits for waits in map(pod_waits_for, alive) if waits]
    if reasons:
        return JobStatus(JobState.WAITING, reasons[0])
    if alive and all(pod.get("status", {}).get("phase") == "Running" for pod in alive):
        return JobStatus(JobState.RUNNING)
    if job.get("spec", {}).get("suspend"):
        return JobStatus(JobState.WAITING, "suspended: the queue has not admitted it yet")
    return JobStatus(JobState.WAITING, last_warning(events))


def pod_waits_for(pod: Plain) -> str:
    """Why a pod does not run yet, in the cluster's words made short; "" if it runs or is just being started."""
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("status") == "False":
            return short(condition.get("message") or condition.get("reason", ""))
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") not in UNREMARKABLE:
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".strip(": ")
    return ""


def is_ready(pod: Plain) -> bool:
    """Whether a pod takes calls: ready, and not on its way out."""
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(one["type"] == "Ready" and one.get("status") == "True" for one in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def short(message: str) -> str:
    """The scheduler's sentence without its frame: "4 Insufficient nvidia.com/gpu"."""
    return PREEMPTION.sub("", NODES.sub("", message)).strip().rstrip(".")


def last_warning(events: Iterable[Plain]) -> str:
    """The newest warning among events; "" if there is none."""
    warnings = [event for event in events if event.get("type") == "Warning"]
    if not warnings:
        return ""
    newest = max(warnings, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
    return f"{newest.get('reason', '')}: {newest.get('message', '')}".strip(": ")


def rollout_waits_for(deployment: Plain, pods: Iterable[Plain]) -> str | None:
    """None once a rollout is complete and available; else what it waits for."""
    spec, status = deployment.get("spec", {}), deployment.get("status", {})
    wanted = spec.get("replicas", 1)
    observed = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    counts = [status.get(name) or 0 for name in ("updatedReplicas", "replicas", "availableReplicas")]
    if observed and counts == [wanted] * 3:
        return None
    for condition in status.get("conditions") or []:
        if observed and condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return f"no progress: {condition.get('message', '')}"
    reasons = [waits for waits in map(pod_waits_for, pods) if waits]
    return reasons[0] if reasons else f"{counts[2]} of {wanted} replicas ready"
