"""Who may open a connection to whom, by the NetworkPolicies of the rendered objects: both ends must allow it.

As the API has it (networking.k8s.io/v1): a pod that no policy of a direction selects is open in that direction;
policies add up; a rule without peers means everyone, one without ports means every port.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from tests.unit.k8s.manifests import Pod, matches
from trimtab.deploy.render import Object, find

OWN = "trimtab"


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod with labels in a labelled namespace, or an address outside of the cluster."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = OWN
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = ""
    ports: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pod: Pod) -> Peer:
        ports = {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", [])}
        return cls(pod.name, pod.labels, pod.namespace, {"kubernetes.io/metadata.name": pod.namespace}, "", ports)


def allowed(objects: tuple[Object, ...], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` reaches `target` on a port."""
    policies = find(objects, "NetworkPolicy")
    leaves = _passes(policies, "Egress", source, target, target, port, protocol)
    return leaves and _passes(policies, "Ingress", target, source, target, port, protocol)


def _passes(
    policies: list[Object], direction: str, subject: Peer, other: Peer, listener: Peer, port: int, protocol: str
) -> bool:
    """What the policies that select `subject` say of its connection with `other`; `listener` has the port."""
    if subject.namespace != OWN or subject.address:
        return True
    mine = [
        one["spec"]
        for one in policies
        if direction in one["spec"]["policyTypes"] and matches(one["spec"]["podSelector"], subject.labels)
    ]
    if not mine:
        return True
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    rules = [rule for spec in mine for rule in spec.get(key, [])]
    return any(
        (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or any(_is_port(entry, listener, port, protocol) for entry in rule["ports"]))
        for rule in rules
    )


def _is(peer: Object, other: Peer) -> bool:
    if "ipBlock" in peer:
        if not other.address:
            return False
        address, block = ipaddress.ip_address(other.address), peer["ipBlock"]
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(cut) for cut in block.get("except", []))
    if other.address:
        return False
    in_namespace = (
        matches(peer["namespaceSelector"], other.namespace_labels)
        if "namespaceSelector" in peer
        else other.namespace == OWN
    )
    return in_namespace and matches(peer.get("podSelector", {}), other.labels)


def _is_port(entry: Object, listener: Peer, port: int, protocol: str) -> bool:
    if entry.get("protocol", "TCP") != protocol:
        return False
    wanted = entry.get("port")
    return wanted is None or (listener.ports.get(wanted) if isinstance(wanted, str) else wanted) == port
