"""Runs of training as Jobs, made from the cluster's template: the CronJob "trainer", or the JobSet of that name.

A Job's name follows from its run id and its run file from the run, so doing all of it again after a death finds what is
there. The run file is a ConfigMap that belongs to the Job and goes with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from kubernetes import client

from trimtab.rounds.launchers.kubernetes import Cluster, ClusterError
from trimtab.rounds.launchers.kubernetes_logs import PodLog
from trimtab.rounds.launchers.kubernetes_states import ENDED, JobStatus, job_status
from trimtab.rounds.launchers.kubernetes_watch import Watched
from trimtab.rounds.launchers.trainer_job import RunFile

TEMPLATE = "trainer"
RUN_DIGEST = "trimtab.dev/run-digest"
OF_ROUNDS, OF_STAGE = "trimtab.dev/rounds", "trimtab.dev/stage"
QUEUE_NAME, KUEUE = "trimtab.dev/queue-name", "kueue.x-k8s.io/queue-name"
RUN_FOLDER = "/etc/trimtab/run"
JOBSET = ("jobset.x-k8s.io", "v1alpha2")
KEEP_ENDED_S = 7 * 24 * 3600  # what a launcher that never came back has left, the cluster removes
GONE_S = 600.0
LONGEST_NAME = 63 - len("-rank-0-999-abcde")  # a label is 63 long; JobSet's pods add this much

Plain = dict[str, Any]


def job_name(run_id: str) -> str:
    """A run's name as Kubernetes and JobSet take it: a DNS label that begins with a letter, short enough for what its
    pods' names add to it, and unique where something had to be changed."""
    plain = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".strip("-")
    if plain == run_id and len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_NAME - 9].strip('-')}-{digest}"


def run_digest(run: RunFile) -> str:
    """What a run is, whatever attempt's name it has."""
    text = json.dumps([run.stage, run.config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class TrainingJobs:
    """Makes, follows and removes the Jobs of runs."""

    def __init__(self, cluster: Cluster, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is added to the trainers' of all Jobs."""
        self.cluster = cluster
        self._environment = environment or {}

    def ensure(self, run: RunFile, labels: dict[str, str]) -> str:
        """Have a Job of this run, or one that ended well, and return its name.

        One that failed is removed and made anew: its trainer resumes. ClusterError for another run under that name.
        """
        name = job_name(run.run_id)
        deadline = time.monotonic() + GONE_S
        while True:
            present = self.read(name)
            if present is None:
                try:
                    present = self._create(name, run, labels)
                except client.ApiException as error:
                    if error.status == 409:
                        continue  # made meanwhile, by this program's other life
                    raise ClusterError(f"the template {TEMPLATE} is not there: {error.reason}; deploy first") from error
            if present["metadata"].get("deletionTimestamp") or self._failed(present):
                self.remove(name)
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"job {name} does not go away; its node may be lost (kubectl describe job {name})"
                    )
                time.sleep(0.5)
                continue
            if present["metadata"].get("annotations", {}).get(RUN_DIGEST) != run_digest(run):
                raise ClusterError(f"job {name} is another run of the name {run.run_id}: remove it, or rename the run")
            self._give_run(present, run)
            return name

    def adopt(self, run: RunFile, labels: dict[str, str]) -> str | None:
        """The run id of an earlier attempt at the same, if its Job is there and has not failed."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        found = self.cluster.call(
            self.cluster.batch.list_namespaced_job, self.cluster.namespace, label_selector=selector
        )["items"]
        if self._jobset_template() is not None:
            found += self._jobsets("list_namespaced_custom_object", label_selector=selector)["items"]
        for job in sorted(found, key=lambda one: one["metadata"].get("creationTimestamp") or "", reverse=True):
            notes = job["metadata"].get("annotations", {})
            if notes.get(RUN_DIGEST) == run_digest(run) and not self._failed(job) and "trimtab.dev/run" in notes:
                return str(notes["trimtab.dev/run"])
        return None

    def follow(self, name: str, on_status: Callable[[JobStatus], None], on_line: Callable[[str], None]) -> JobStatus:
        """Tell each change of state and each line of the first pod's log until the Job has ended; returns how."""
        cluster, changed = self.cluster, threading.Event()
        told, log = None, PodLog(cluster, on_line)
        with ExitStack() as stack:
            stack.callback(log.close)
            watched = {
                "jobs": stack.enter_context(self._watch_job(name, changed)),
                "pods": stack.enter_context(
                    Watched(cluster, cluster.core.list_namespaced_pod, changed, label_selector=self._pods_of(name))
                ),
                "events": stack.enter_context(Watched(cluster, cluster.core.list_namespaced_event, changed)),
            }
            while True:
                changed.wait(5.0)
                changed.clear()
                jobs, pods = watched["jobs"].now(), watched["pods"].now()
                if not jobs:
                    # Another life of this program may have removed it at its end, before this one saw that end.
                    ended = job_status(watched["jobs"].last_seen(name) or {}, pods, [])
                    if ended.state in ENDED:
                        return ended
                    raise ClusterError(f"job {name} was removed by someone else")
                names = {name, *(pod["metadata"]["name"] for pod in pods)}
                events = [e for e in watched["events"].now() if e.get("involvedObject", {}).get("name") in names]
                status = job_status(jobs[0], pods, events)
                log.follow(pods)
                if status.state in ENDED:
                    log.finish()
                if status != told:
                    told = status
                    on_status(status)
                if status.state in ENDED:
                    return status

    def remove(self, name: str) -> None:
        """Delete a Job with its pods and its run file; not being there is fine."""
        if self._jobset_template() is not None:
            self.cluster.find(self.cluster.custom.delete_namespaced_custom_object, *JOBSET, **self._named(name))
        else:
            self.cluster.find(
                self.cluster.batch.delete_namespaced_job,
                name,
                self.cluster.namespace,
                propagation_policy="Foreground",
            )

    def read(self, name: str) -> Plain | None:
        """The Job or JobSet of this name as it is."""
        if self._jobset_template() is not None:
            return self.cluster.find(self.cluster.custom.get_namespaced_custom_object, *JOBSET, **self._named(name))
        found = self.cluster.find(self.cluster.batch.read_namespaced_job, name, self.cluster.namespace)
        return found

    def _create(self, name: str, run: RunFile, labels: dict[str, str]) -> Plain:
        notes = {RUN_DIGEST: run_digest(run), "trimtab.dev/run": run.run_id}
        jobset = self._jobset_template()
        if jobset is not None:
            body = jobset_of(jobset, name, labels, notes, self._environment)
            return self._jobsets("create_namespaced_custom_object", body=body)
        template = self.cluster.call(self.cluster.batch.read_namespaced_cron_job, TEMPLATE, self.cluster.namespace)
        body = job_of(template, name, labels, notes, self._environment)
        made = self.cluster.call(self.cluster.batch.create_namespaced_job, self.cluster.namespace, body)
        return made

    def _give_run(self, job: Plain, run: RunFile) -> None:
        """The run file as a ConfigMap that the Job owns; a pod waits for it."""
        owner = {key: job[key] for key in ("apiVersion", "kind") if key in job}
        owner = {"apiVersion": "batch/v1", "kind": "Job"} | owner
        meta = job["metadata"]
        body = {
            "metadata": {
                "name": f"{meta['name']}-run",
                "ownerReferences": [{**owner, "name": meta["name"], "uid": meta["uid"]}],
            },
            "data": {"run.yaml": json.dumps(run.model_dump(mode="json"), indent=1)},
            "immutable": True,
        }
        try:
            self.cluster.call(self.cluster.core.create_namespaced_config_map, self.cluster.namespace, body)
        except client.ApiException as error:
            if error.status != 409:
                raise

    def _failed(self, job: Plain) -> bool:
        conditions = job.get("status", {}).get("conditions") or []
        return any(one["type"] in ("Failed", "FailureTarget") and one.get("status") == "True" for one in conditions)

    def _watch_job(self, name: str, changed: threading.Event) -> Watched:
        selection = {"field_selector": f"metadata.name={name}"}
        if self._jobset_template() is None:
            return Watched(self.cluster, self.cluster.batch.list_namespaced_job, changed, **selection)
        return Watched(self.cluster, _JobSets(self.cluster).list_namespaced_jobset, changed, **selection)

    def _pods_of(self, name: str) -> str:
        key = "job-name" if self._jobset_template() is None else "jobset.sigs.k8s.io/jobset-name"
        return f"{key}={name}"

    def _jobset_template(self) -> Plain | None:
        """The cluster's JobSet template; None where runs are plain Jobs. Looked up once."""
        if not hasattr(self, "_template"):
            self._template: Plain | None = self.cluster.find(
                self.cluster.custom.get_namespaced_custom_object, *JOBSET, **self._named(TEMPLATE)
            )
        return self._template

    def _jobsets(self, method: str, **kwargs: Any) -> Any:
        place = {"namespace": self.cluster.namespace, "plural": "jobsets"}
        return self.cluster.call(getattr(self.cluster.custom, method), *JOBSET, **place, **kwargs)

    def _named(self, name: str) -> dict[str, str]:
        return {"namespace": self.cluster.namespace, "plural": "jobsets", "name": name}


class _JobSets:
    """JobSets with the one list call that `Watched` asks for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def list_namespaced_jobset(self, namespace: str, **kwargs: Any) -> Any:
        """:return: object"""
        return self._cluster.custom.list_namespaced_custom_object(*JOBSET, namespace, "jobsets", **kwargs)


def job_of(
    template: Plain, name: str, labels: dict[str, str], notes: dict[str, str], environment: Mapping[str, str]
) -> Plain:
    """The Job of a run, from the CronJob's template."""
    inner = template["spec"]["jobTemplate"]
    spec = json.loads(json.dumps(inner["spec"]))
    spec["ttlSecondsAfterFinished"] = KEEP_ENDED_S
    with_run(spec["template"]["spec"], name, environment)
    meta = inner.get("metadata", {})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "labels": meta.get("labels", {}) | labels,
            "annotations": meta.get("annotations", {}) | notes,
        },
        "spec": spec,
    }


def jobset_of(
    template: Plain, name: str, labels: dict[str, str], notes: dict[str, str], environment: Mapping[str, str]
) -> Plain:
    """The JobSet of a run, from the suspended one; with a queue's name it stays suspended until Kueue admits it."""
    spec = json.loads(json.dumps(template["spec"]))
    queue = template["metadata"].get("annotations", {}).get(QUEUE_NAME)
    spec["suspend"] = queue is not None
    spec["ttlSecondsAfterFinished"] = KEEP_ENDED_S
    for replicated in spec["replicatedJobs"]:
        with_run(replicated["template"]["spec"]["template"]["spec"], name, environment)
    own = {"app.kubernetes.io/name": TEMPLATE, "app.kubernetes.io/part-of": "trimtab"}
    return {
        "apiVersion": "/".join(JOBSET),
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "labels": own | labels | ({KUEUE: queue} if queue else {}),
            "annotations": notes,
        },
        "spec": spec,
    }


def with_run(pod: Plain, name: str, environment: Mapping[str, str]) -> None:
    """Mount the run file into a pod's trainer and name it on the command line."""
    container = pod["containers"][0]
    container["args"] = [*container["args"], "--run", f"{RUN_FOLDER}/run.yaml"]
    container.setdefault("env", []).extend({"name": key, "value": value} for key, value in environment.items())
    container.setdefault("volumeMounts", []).append({"name": "run", "mountPath": RUN_FOLDER, "readOnly": True})
    pod.setdefault("volumes", []).append({"name": "run", "configMap": {"name": f"{name}-run"}})


def step_of(line: str) -> tuple[int, int, dict[str, float]] | None:
    """(step, total steps, metrics) of a log line that tells a step; None for any other."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("event") != "step" or "step" not in record:
        return None
    values = {key: float(value) for key, value in _numbers(record)}
    return int(record["step"]), int(record.get("total_steps", 0)), values


def _numbers(record: Plain) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key not in ("step", "total_steps") and isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
