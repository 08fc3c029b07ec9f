"""Every pod finds a node on every kind of cluster, and GPU pods the nodes of their role."""

import pytest

from tests.unit.k8s.manifests import installations, label, pods, rendered
from tests.unit.k8s.node_profiles import GPU, Node, cluster, place, requests

CLUSTERS = ("gke", "eks", "eks-auto", "aks", "on-prem")


def suits(installation, kind):
    return installation.node_pool in ("", kind.partition("-auto")[0])


def cases():
    for installation in installations():
        for kind in CLUSTERS:
            for roles in (False, True):
                if suits(installation, kind) and not (installation.overlay == "gpu" and not installation.node_pool):
                    yield pytest.param(installation, kind, roles, id=f"{label(installation)}-on-{kind}-{roles}")


@pytest.mark.parametrize(("installation", "kind", "roles"), cases())
def test_every_pod_finds_a_node(installation, kind, roles):
    everyone = pods(rendered(installation))
    # A JobSet and the plain Job are two ways of one run.
    owners = [pod for pod in everyone if not (installation.components and pod.owner == "CronJob/trainer")]
    placed, unplaced = place(owners, cluster(kind, roles=roles))
    assert unplaced == {}
    if roles and installation.overlay == "gpu":
        assert all(node.startswith("generator") for node in placed["Deployment/generator"])
        assert all(node.startswith("scoring") for node in placed["Deployment/reward"])
        assert all(node.startswith("trainer") for node in placed.get("JobSet/trainer", placed.get("CronJob/trainer")))
        assert all(node.startswith("plain") for node in placed["Deployment/labeling"])


@pytest.mark.parametrize("kind", CLUSTERS)
def test_without_its_node_pool_component_a_gpu_pod_of_aks_finds_none(kind):
    (installation,) = [i for i in installations() if label(i) == "gpu"]
    _, unplaced = place(pods(rendered(installation)), cluster(kind, roles=False))
    if kind == "aks":
        assert "untolerated taint sku" in unplaced["Deployment/reward"]
    else:
        assert unplaced == {}


def test_pods_on_plain_nodes_alone_are_refused_for_want_of_a_gpu():
    (installation,) = [i for i in installations() if label(i) == "gpu"]
    plain = [Node("plain", {}, (), {"cpu": 64.0, "memory": 1e12, "ephemeral-storage": 1e13, "pods": 110.0})]
    _, unplaced = place(pods(rendered(installation)), plain)
    assert unplaced == {
        owner: {f"Insufficient {GPU}"}
        for owner in ("Deployment/generator", "Deployment/reward", "Deployment/reference", "CronJob/trainer")
    }


def test_dev_fits_on_one_small_node():
    (installation,) = [i for i in installations() if label(i) == "dev"]
    total = {}
    for pod in pods(rendered(installation)):
        for resource, amount in requests(pod).items():
            total[resource] = total.get(resource, 0.0) + amount * pod.replicas
    assert total["cpu"] <= 2 and total["memory"] <= 8 * 2**30
