"""Every overlay with every node pool is accepted by a real API server, and its pods are admitted as restricted."""

import json
import time

import pytest
import yaml

from tests.unit.k8s.manifests import installations, label, pods, rendered
from trimtab.deploy.objects import Kubectl
from trimtab.deploy.render import find

BARE = [one for one in installations() if not one.components]
FULL = [one for one in installations() if one.components]


def applied_twice(installation):
    text = yaml.safe_dump_all(rendered(installation), sort_keys=False)
    kubectl = Kubectl()
    assert len(kubectl.apply(text)) == len(rendered(installation))
    for _ in range(5):  # controllers write too while kubectl compares
        changes = kubectl.diff(text)
        if not changes:
            return
        time.sleep(2)
    raise AssertionError(changes)


@pytest.mark.parametrize("installation", BARE, ids=label)
def test_an_overlay_is_applied_server_side_and_again_changes_nothing(namespace, installation):
    applied_twice(installation)


@pytest.mark.parametrize("installation", FULL, ids=label)
def test_so_is_one_with_every_component(namespace, everything, installation):
    applied_twice(installation)


def as_pod(pod):
    spec = pod.spec | {"restartPolicy": pod.spec.get("restartPolicy", "Always")}
    claims = pod.workload["spec"].get("volumeClaimTemplates", [])
    if claims:
        mounted = [{"name": one["metadata"]["name"], "emptyDir": {}} for one in claims]
        spec = spec | {"volumes": [*spec["volumes"], *mounted]}
    name = f"try-{pod.name}-{pod.kind.lower()}"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": pod.labels}, "spec": spec}


def admitted(run, objects):
    """Create every pod of some objects as the API server would admit it; nothing is warned of either."""
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(list(objects)))
    seen = set()
    for pod in pods(objects):
        done = run("-n", "trimtab", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(as_pod(pod)))
        assert "Warning" not in done.stderr, done.stderr
        seen.add(pod.owner)
    return seen


@pytest.mark.parametrize("installation", [one for one in BARE if not one.node_pool], ids=label)
def test_every_pod_is_admitted_under_restricted(run, namespace, installation):
    objects = rendered(installation)
    assert {"Deployment/reward", "CronJob/trainer", "CronJob/rounds"} <= admitted(run, objects)
    bare = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}}
    bare["spec"] = {"containers": [{"name": "c", "image": "c"}]}
    refused = run("-n", "trimtab", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(bare), check=False)
    assert "violates PodSecurity" in refused.stderr
    for word in ("allowPrivilegeEscalation", "capabilities", "runAsNonRoot", "seccompProfile"):
        assert word in refused.stderr


def test_so_is_every_pod_of_every_component(run, namespace, everything):
    (installation,) = [one for one in FULL if one.node_pool == "gke"]
    assert {"JobSet/trainer", "StatefulSet/postgres"} <= admitted(run, rendered(installation))


def test_a_misspelt_field_is_refused(run, namespace, everything):
    """The schemas of the operators' kinds are looked at, not only those of Kubernetes."""
    (installation,) = [one for one in FULL if not one.node_pool]
    objects = rendered(installation)
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(find(objects, "Namespace")))
    for kind in ("JobSet", "GRPCRoute", "Certificate", "ClusterQueue", "HorizontalPodAutoscaler"):
        one = find(objects, kind)[0]
        wrong = one | {"spec": one["spec"] | {"mispelt": 1}}
        refused = run("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(wrong), check=False)
        assert refused.returncode and "mispelt" in refused.stderr, kind
