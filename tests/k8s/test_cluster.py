"""Every overlay with every node pool on a real API server: accepted server-side, admitted as restricted, bound."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from tests.k8s.conftest import node
from tests.unit.k8s.manifests import MANIFESTS, installations, label, pods, rendered
from tests.unit.k8s.node_profiles import cluster
from trimtab.deploy.objects import Kubectl
from trimtab.deploy.render import Installation, find, render
from trimtab.rounds.launchers.kubernetes import Cluster
from trimtab.rounds.launchers.kubernetes_jobs import TrainingJobs
from trimtab.rounds.launchers.kubernetes_states import JobState
from trimtab.rounds.launchers.trainer_job import RunFile

BARE = [one for one in installations() if not one.components]


@pytest.fixture
def namespace(run):
    """An empty namespace trimtab for one test."""
    run("delete", "namespace", "trimtab", "--ignore-not-found", "--wait=true", "--timeout=90s", check=False)
    yield "trimtab"
    run("delete", "namespace", "trimtab", "--ignore-not-found", "--wait=false")


@pytest.mark.parametrize("installation", BARE, ids=label)
def test_an_overlay_is_applied_server_side_and_again_changes_nothing(run, namespace, installation):
    text = yaml.safe_dump_all(rendered(installation), sort_keys=False)
    kubectl = Kubectl()
    assert kubectl.apply(text)
    assert kubectl.diff(text) == ""


@pytest.mark.parametrize("overlay", ["dev", "gpu"])
def test_every_pod_is_admitted_under_restricted(run, namespace, overlay):
    objects = render(Installation(overlay), MANIFESTS)
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))
    for pod in pods(tuple(objects)):
        spec = pod.spec | {"restartPolicy": pod.spec.get("restartPolicy", "Always")}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"try-{pod.name}-{pod.kind.lower()}"},
            "spec": spec,
        }
        body["metadata"]["labels"] = pod.labels
        run("-n", "trimtab", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
    bare = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}}
    bare["spec"] = {"containers": [{"name": "c", "image": "c"}]}
    refused = run("-n", "trimtab", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(bare), check=False)
    assert "violates PodSecurity" in refused.stderr


@pytest.mark.parametrize("kind", ["gke", "eks", "aks", "on-prem"])
def test_pods_are_bound_to_the_nodes_of_their_role(run, namespace, kind):
    if (
        os.environ.get("KUBEBUILDER_ASSETS")
        and not (Path(os.environ["KUBEBUILDER_ASSETS"]) / "kube-scheduler").exists()
    ):
        pytest.skip("KUBEBUILDER_ASSETS has no kube-scheduler")
    nodes = cluster(kind, roles=True)
    for one in nodes:
        capacity = {key: str(int(value)) for key, value in one.capacity.items()}
        run("apply", "--server-side", "-f", "-", stdin=node(one.name, one.labels, list(one.taints), capacity))
        patch = json.dumps({"status": {"allocatable": capacity, "capacity": capacity}})
        run("patch", "node", one.name, "--subresource=status", "--type=merge", "-p", patch)
    try:
        objects = render(Installation("gpu", kind), MANIFESTS)
        run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))
        deadline = time.monotonic() + 90
        while True:
            page = json.loads(run("-n", "trimtab", "get", "pods", "-o", "json").stdout)["items"]
            bound = {
                pod["metadata"]["labels"]["app.kubernetes.io/name"]: pod["spec"].get("nodeName", "") for pod in page
            }
            if all(bound.get(name) for name in ("generator", "reward", "reference", "gateway")):
                break
            assert time.monotonic() < deadline, bound
            time.sleep(1)
        assert bound["generator"].startswith("generator") and bound["reward"].startswith("scoring")
        assert bound["gateway"].startswith("plain")
    finally:
        for one in nodes:
            run("delete", "node", one.name, "--ignore-not-found", "--wait=false")


def test_the_launcher_makes_follows_and_removes_a_job(run, namespace, kubeconfig):
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(render(Installation("dev"), MANIFESTS)))
    jobs = TrainingJobs(Cluster.connect("trimtab", str(kubeconfig)))
    tried = RunFile(run_id="try", stage="sft", config={"data": "x", "stage": {"model": "m"}})
    assert jobs.ensure(tried, {}) == jobs.ensure(tried, {}) == "try"
    given = json.loads(run("-n", "trimtab", "get", "configmap", "try-run", "-o", "json").stdout)
    assert given["metadata"]["ownerReferences"][0]["name"] == "try"
    now = "2026-01-01T00:00:00Z"
    done = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("SuccessCriteriaMet", "Complete")]
    status = {"status": {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": done}}
    status["status"] |= {"completedIndexes": "0", "uncountedTerminatedPods": {}}
    run("-n", "trimtab", "patch", "job", "try", "--subresource=status", "--type=merge", "-p", json.dumps(status))
    told = []
    assert jobs.follow("try", told.append, lambda line: None).state == JobState.SUCCEEDED
    jobs.remove("try")
    assert jobs.adopt(tried, {}) is None


def test_the_role_of_rounds_lets_it_do_its_work_and_nothing_else(run, namespace):
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(render(Installation("dev"), MANIFESTS)))
    account = "--as=system:serviceaccount:trimtab:rounds"

    def may(*what):
        return run("-n", "trimtab", "auth", "can-i", *what, account, check=False).stdout.strip() == "yes"

    for allowed in (
        ("create", "jobs.batch"),
        ("get", "cronjobs.batch/trainer"),
        ("patch", "deployments.apps/generator"),
    ):
        assert may(*allowed), allowed
    for refused in (("get", "secrets"), ("patch", "deployments.apps/gateway"), ("create", "pods"), ("delete", "nodes")):
        assert not may(*refused), refused
    assert find(render(Installation("dev"), MANIFESTS), "Role")
