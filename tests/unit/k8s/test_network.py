"""The network is closed but for the edges that the design names; evaluated as a graph over the rendered policies."""

import pytest

from tests.unit.k8s.manifests import installations, label, pods, rendered
from tests.unit.k8s.policy_graph import Peer, allowed
from trimtab.deploy.render import find

MODELS = {"generator": 7101, "reward": 7102, "reference": 7103}
EDGES = {(client, model) for client in ("trainer", "gateway", "rounds") for model in MODELS}
EDGES |= {("labeling", "generator"), ("rounds", "labeling"), ("trainer", "trainer")}
STORE_CLIENTS = {"generator", "reward", "reference", "trainer", "rounds"}

DNS = Peer("dns", {"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"})
S3 = Peer("s3", address="52.216.10.1")
METADATA = Peer("metadata", address="169.254.169.254")
STRANGER = Peer("stranger", {"app": "x"}, "other", {"kubernetes.io/metadata.name": "other"})
SCORER = Peer("scorer", {"app": "x"}, "friends", {"trimtab.dev/reward-client": "true"})
PROMETHEUS = Peer("prometheus", {"app": "p"}, "monitoring", {"trimtab.dev/monitoring": "true"})
INGRESS = Peer("envoy", {"app": "e"}, "edge", {"trimtab.dev/ingress": "true"})
INTRUDER = Peer("intruder", {"app": "y"})


def peers(installation):
    found = {}
    for pod in pods(rendered(installation)):
        found.setdefault(pod.name, Peer.of(pod))
    return found


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_pods_reach_each_other_by_the_named_edges_alone(installation):
    objects, ends = rendered(installation), peers(installation)
    found = set()
    for source in ends.values():
        for target in ends.values():
            for name, port in target.ports.items():
                if allowed(objects, source, target, port):
                    found.add((source.name, target.name, name))
    services = {(source, target) for source, target, name in found if name not in ("health", "metrics")}
    extra = {("labeling", "postgres")} if "postgres" in ends else set()
    extra |= {(client, "store") for client in STORE_CLIENTS} if "store" in ends else set()
    assert services == EDGES | extra
    # Ranks of one run talk on whatever ports torch chooses.
    assert {edge for edge in found if edge[2] in ("health", "metrics")} == {
        ("trainer", "trainer", "health"),
        ("trainer", "trainer", "metrics"),
    }
    assert allowed(objects, ends["trainer"], ends["trainer"], 41234)


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_everyone_finds_names_and_store_clients_alone_leave_the_cluster(installation):
    objects = rendered(installation)
    for name, peer in peers(installation).items():
        assert allowed(objects, peer, DNS, 53, "UDP") and allowed(objects, peer, DNS, 53)
        assert not allowed(objects, peer, DNS, 443)
        assert allowed(objects, peer, S3, 443) == (name in STORE_CLIENTS)
        assert not allowed(objects, peer, S3, 80)
        metadata = installation.node_pool == "gke" and name in STORE_CLIENTS
        assert allowed(objects, peer, METADATA, 80) == metadata
        assert allowed(objects, peer, S3, 6443) == (name == "rounds")


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_strangers_reach_nothing(installation):
    objects = rendered(installation)
    for name, peer in peers(installation).items():
        for port in (*peer.ports.values(), 41234):
            assert not allowed(objects, STRANGER, peer, port), (name, port)
            assert not allowed(objects, INTRUDER, peer, port), (name, port)
            assert not allowed(objects, peer, STRANGER, port)


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_labelled_namespaces_reach_reward_metrics_and_the_edge(installation):
    objects = rendered(installation)
    has_ingress = bool(find(objects, "Gateway"))
    for name, peer in peers(installation).items():
        for port_name, port in peer.ports.items():
            assert allowed(objects, SCORER, peer, port) == ((name, port_name) == ("reward", "grpc"))
            assert allowed(objects, PROMETHEUS, peer, port) == (port_name == "metrics")
            open_to_people = {("labeling", "http"), ("gateway", "http"), ("gateway", "grpc"), ("reward", "grpc")}
            assert allowed(objects, INGRESS, peer, port) == (has_ingress and (name, port_name) in open_to_people)


def test_a_pod_that_no_policy_names_is_closed_by_the_default_alone():
    (installation,) = [i for i in installations() if label(i) == "gpu"]
    objects, new = rendered(installation), Peer("new", {"app": "new"}, ports={"http": 80})
    without = tuple(one for one in objects if one["metadata"]["name"] != "default-deny")
    assert allowed(without, STRANGER, new, 80)
    assert not allowed(objects, STRANGER, new, 80)
