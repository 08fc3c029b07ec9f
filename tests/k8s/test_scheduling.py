"""A real scheduler binds every pod to a node of its role, evicts within the budget and rolls GPU pods out in place."""

import json
import time

import pytest
import yaml

from tests.k8s.stand_in_nodes import StandInNodes
from tests.unit.k8s.manifests import MANIFESTS, rendered
from tests.unit.k8s.node_profiles import GPU, Node, cluster
from trimtab.deploy.render import Installation, render

KINDS = ("gke", "eks", "eks-auto", "aks", "on-prem")
MODELS = ("generator", "reward", "reference")
HOLDS = {"cpu": 104.0, "memory": float(2**40), "ephemeral-storage": float(2**40), "pods": 110.0}


def apply(run, objects):
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(list(objects)))


def pods_now(run):
    return json.loads(run("-n", "trimtab", "get", "pods", "-o", "json").stdout)["items"]


def name_of(pod):
    return pod["metadata"]["labels"]["app.kubernetes.io/name"]


def until(run, condition, timeout_s=180.0):
    """The pods, once they meet a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition(found := pods_now(run)):
        shown = [(name_of(pod), pod["spec"].get("nodeName"), pod["status"].get("conditions")) for pod in found]
        assert time.monotonic() < deadline, json.dumps(shown, indent=1)
        time.sleep(0.5)
    return found


def bound(*names):
    return lambda found: {name_of(pod) for pod in found if pod["spec"].get("nodeName")} >= set(names)


def ready(name, count):
    def is_ready(pod):
        return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))

    return lambda found: sum(is_ready(pod) for pod in found if name_of(pod) == name) == count


@pytest.mark.parametrize("kind", KINDS)
def test_pods_are_bound_to_the_nodes_of_their_role(run, disks, kubeconfig, kind):
    with StandInNodes(kubeconfig, nodes := cluster(kind, roles=True)):
        apply(run, rendered(Installation("gpu", kind.removesuffix("-auto"))))
        run("-n", "trimtab", "create", "configmap", "rounds-recipe", "--from-literal=recipe.yaml=x")
        for template in ("trainer", "rounds"):
            run("-n", "trimtab", "create", "job", f"try-{template}", f"--from=cronjob/{template}")
        everyone = {*MODELS, "gateway", "labeling", "trainer", "rounds"}
        found = until(run, lambda now: bound(*everyone)(now) and all(pod["spec"].get("nodeName") for pod in now))
    with_gpus = {node.name for node in nodes if GPU in node.capacity}
    role = {"generator": "generator", "reward": "scoring", "reference": "scoring", "trainer": "trainer"}
    for pod in found:
        at, name = pod["spec"]["nodeName"], name_of(pod)
        assert at.startswith(role[name]) if name in role else at not in with_gpus, (name, at)
    assert sum(name_of(pod) in MODELS for pod in found) == 6


def test_a_rollout_takes_the_gpus_of_the_pods_that_go(run, controllers, kubeconfig):
    """No GPU is spare: with the default surge the new pod would wait for ever."""
    exactly = Node("gpu-0", {"nvidia.com/gpu.present": "true"}, (), HOLDS | {GPU: 6.0})
    with StandInNodes(kubeconfig, [exactly, Node("plain-0", {}, (), HOLDS)]):
        apply(run, render(Installation("gpu", "on-prem"), MANIFESTS))
        for name in MODELS:
            until(run, ready(name, 2))
        run("-n", "trimtab", "rollout", "restart", "deployment/reward")
        run("-n", "trimtab", "rollout", "status", "deployment/reward", "--timeout=200s")
        assert {pod["spec"]["nodeName"] for pod in pods_now(run) if name_of(pod) == "reward"} == {"gpu-0"}


def test_a_drain_takes_one_replica_at_a_time(run, controllers, kubeconfig):
    with StandInNodes(kubeconfig, cluster("on-prem", roles=False)) as nodes:
        apply(run, rendered(Installation("gpu", "on-prem")))
        first, second = [pod for pod in until(run, ready("reward", 2)) if name_of(pod) == "reward"]
        budget = (
            "-n",
            "trimtab",
            "wait",
            "--for=jsonpath={.status.disruptionsAllowed}=1",
            "pdb/reward",
            "--timeout=60s",
        )
        run(*budget)
        nodes.starts = False  # what comes in its place is not ready yet
        assert evict(run, first).returncode == 0
        refused = evict(run, second)
        assert refused.returncode and "disruption budget" in refused.stderr


def evict(run, pod):
    name = pod["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": "trimtab"}}
    path = f"/api/v1/namespaces/trimtab/pods/{name}/eviction"
    return run("create", "--raw", path, "-f", "-", stdin=json.dumps(body), check=False)


def test_dynamic_resource_allocation_serves_the_same_manifests(run, controllers, kinds, kubeconfig):
    """A DeviceClass with the extended resource's name stands where a device plugin would."""
    if json.loads(run("version", "-o", "json").stdout)["serverVersion"]["minor"] < "36":
        pytest.skip("the extended-resource bridge is on by default from Kubernetes 1.36 on")
    class_spec = {
        "selectors": [{"cel": {"expression": 'device.driver == "gpu.nvidia.com"'}}],
        "extendedResourceName": GPU,
    }
    devices = {"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": "gpu.nvidia.com"}}
    pool = {"name": "gpu-0", "generation": 1, "resourceSliceCount": 1}
    slice_spec = {"driver": "gpu.nvidia.com", "nodeName": "gpu-0", "pool": pool}
    slice_spec["devices"] = [{"name": f"gpu-{number}"} for number in range(6)]
    of_node = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "trimtab-tests-gpu-0"}}
    without_plugin = Node("gpu-0", {"nvidia.com/gpu.present": "true"}, (), HOLDS)
    try:
        with StandInNodes(kubeconfig, [without_plugin, Node("plain-0", {}, (), HOLDS)]):
            run("apply", "-f", "-", stdin=json.dumps(devices | {"spec": class_spec}))
            run("apply", "-f", "-", stdin=json.dumps(of_node | {"spec": slice_spec}))
            apply(run, rendered(Installation("gpu", "on-prem")))
            for name in MODELS:
                until(run, ready(name, 2))
            claims = json.loads(run("-n", "trimtab", "get", "resourceclaims", "-o", "json").stdout)["items"]
            given = [one["device"] for c in claims for one in c["status"]["allocation"]["devices"]["results"]]
            assert sorted(given) == [f"gpu-{number}" for number in range(6)]
    finally:
        run("delete", "resourceslice", "trimtab-tests-gpu-0", "--ignore-not-found")
        run("delete", "deviceclass", "gpu.nvidia.com", "--ignore-not-found")
