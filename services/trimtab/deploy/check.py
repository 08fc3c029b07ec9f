"""What a cluster lacks for an installation: each finding says what it is for and how it is had. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab.deploy.render import Object, find, name_of, pod_template

OLDEST = (1, 30)  # preStop sleep, matchLabelKeys and podReplacementPolicy are on by default from here on
GPU = "nvidia.com/gpu"
OPERATORS = {
    "JobSet.jobset.x-k8s.io": "JobSet (https://jobset.sigs.k8s.io)",
    "Certificate.cert-manager.io": "cert-manager (https://cert-manager.io)",
    "Issuer.cert-manager.io": "cert-manager (https://cert-manager.io)",
    "ClusterQueue.kueue.x-k8s.io": "Kueue (https://kueue.sigs.k8s.io)",
    "LocalQueue.kueue.x-k8s.io": "Kueue (https://kueue.sigs.k8s.io)",
    "ResourceFlavor.kueue.x-k8s.io": "Kueue (https://kueue.sigs.k8s.io)",
    "ServiceMonitor.monitoring.coreos.com": "the Prometheus operator",
    "PodMonitor.monitoring.coreos.com": "the Prometheus operator",
    "PrometheusRule.monitoring.coreos.com": "the Prometheus operator",
}
# Drivers of block storage: their volumes hang on one node at a time.
BLOCK_DRIVERS = {"ebs.csi.aws.com", "ebs.csi.eks.amazonaws.com", "pd.csi.storage.gke.io", "disk.csi.azure.com"}
MADE_LATER = {"gateway-keys", "store"}  # optional: absent with a cloud identity, or before the first key is made


@dataclass(frozen=True)
class Finding:
    """`fatal` ones keep pods from running; the others only say what will not work yet."""

    text: str
    fatal: bool = True


@dataclass(frozen=True)
class ClusterFacts:
    """What a check looks at. `kinds` as `Kubectl.kinds` gives them."""

    version: tuple[int, int]
    kinds: frozenset[str]
    nodes: Sequence[Object]
    storage_classes: Sequence[Object]
    secrets: frozenset[str]


def check(objects: Sequence[Object], facts: ClusterFacts) -> list[Finding]:
    """Everything that is missing; empty where the installation can go ahead."""
    return [
        *_version(facts),
        *_kinds(objects, facts),
        *_nodes(objects, facts),
        *_storage(objects, facts),
        *_secrets(objects, facts),
        *_metrics(objects, facts),
        *_images(objects),
    ]


def _version(facts: ClusterFacts) -> Iterable[Finding]:
    if facts.version < OLDEST:
        here, least = (".".join(map(str, version)) for version in (facts.version, OLDEST))
        yield Finding(f"Kubernetes {here} is too old: {least} or newer")


def _kinds(objects: Sequence[Object], facts: ClusterFacts) -> Iterable[Finding]:
    wanted = {f"{one['kind']}.{_group(one)}" for one in objects}
    missing = sorted(wanted - facts.kinds)
    for source in dict.fromkeys(OPERATORS.get(kind, f"whatever brings {kind}") for kind in missing):
        own = [kind.partition(".")[0] for kind in missing if OPERATORS.get(kind, f"whatever brings {kind}") == source]
        if all(kind.endswith("gateway.networking.k8s.io") for kind in missing if kind.partition(".")[0] in own):
            source = "Gateway API and a controller of it (https://gateway-api.sigs.k8s.io)"
        yield Finding(f"no kind {', '.join(own)}: install {source}")


def _nodes(objects: Sequence[Object], facts: ClusterFacts) -> Iterable[Finding]:
    """Pods that no node of now would take, by labels, taints and GPUs; a pool that scales from zero has none yet."""
    for one in objects:
        template = pod_template(one)
        if template is None:
            continue
        spec = template["spec"]
        gpus = max(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in spec["containers"])
        if not gpus:
            continue
        big = [n for n in facts.nodes if int(n["status"].get("allocatable", {}).get(GPU, 0)) >= gpus]
        if not big:
            yield Finding(
                f"{name_of(one)}: no node has {gpus} {GPU}: is the device plugin or GPU operator there, or does the "
                "pool scale from zero?",
                fatal=False,
            )
        elif not any(_fits(spec, node) for node in big):
            yield Finding(
                f"{name_of(one)}: GPU nodes are there, but none has the labels it asks for: --nodes names a cloud"
            )
        elif not any(_fits(spec, node) and _tolerated(spec, node) for node in big):
            taints = sorted({_taint(t) for n in big for t in n["spec"].get("taints", []) if not _covers(spec, t)})
            yield Finding(f"{name_of(one)}: GPU nodes are tainted {', '.join(taints)}, which it does not tolerate")


def _storage(objects: Sequence[Object], facts: ClusterFacts) -> Iterable[Finding]:
    """Claims without a class, or whose class is not there, or that several nodes share while its disks are for one."""
    mark = "storageclass.kubernetes.io/is-default-class"
    classes = {one["metadata"]["name"]: one for one in facts.storage_classes}
    marked = [n for n, one in classes.items() if one["metadata"].get("annotations", {}).get(mark) == "true"]
    for claim in find(objects, "PersistentVolumeClaim"):
        name = claim["spec"].get("storageClassName", next(iter(marked), None))
        if name is None:
            yield Finding(
                f"{name_of(claim)}: no default StorageClass: mark one, or set storageClassName in your overlay"
            )
        elif name and name not in classes:
            yield Finding(f"{name_of(claim)}: no StorageClass {name}")
        elif name and "ReadWriteMany" in claim["spec"]["accessModes"]:
            driver = classes[name].get("provisioner")
            if driver in BLOCK_DRIVERS:
                yield Finding(
                    f"{name_of(claim)}: volumes of StorageClass {name} ({driver}) are for one node, this one is for "
                    "several: set storageClassName to a file system's in your overlay"
                )


def _secrets(objects: Sequence[Object], facts: ClusterFacts) -> Iterable[Finding]:
    made = {one["spec"]["secretName"] for one in find(objects, "Certificate")}
    made |= {one["metadata"]["name"] for one in find(objects, "Secret")} | facts.secrets
    uses_tls = any(
        one["data"].get("tls-cert") for one in find(objects, "ConfigMap") if "tls-cert" in one.get("data", {})
    )
    for one in objects:
        template = pod_template(one)
        for volume in template["spec"].get("volumes", []) if template else []:
            name = volume.get("secret", {}).get("secretName")
            if not name or name in made or (name.endswith("-tls") and not uses_tls):
                continue
            how = "add --with tls, or create it" if name.endswith("-tls") else "docs/operations.md says what is in it"
            yield Finding(f"{name_of(one)}: no Secret {name}: {how}", fatal=name not in MADE_LATER)


def _metrics(objects: Sequence[Object], facts: ClusterFacts) -> Iterable[Finding]:
    if find(objects, "HorizontalPodAutoscaler") and not any(
        k.endswith(".external.metrics.k8s.io") for k in facts.kinds
    ):
        yield Finding("no external metrics: autoscaling needs an adapter that serves trimtab_queue_depth", fatal=False)


def _images(objects: Sequence[Object]) -> Iterable[Finding]:
    """Ours that say neither registry nor digest: good where they were loaded onto the nodes, as for trying out."""
    pods = [template["spec"] for template in map(pod_template, objects) if template]
    bare = {one["image"] for spec in pods for one in spec["containers"] if one["image"].startswith("trimtab/")}
    if bare:
        how = "give --image NAME=REGISTRY/NAME@sha256:… for each, unless every node has them"
        yield Finding(f"no registry and digest for {', '.join(sorted(bare))}: {how}", fatal=False)


def _group(one: Object) -> str:
    return one["apiVersion"].partition("/")[0] if "/" in one["apiVersion"] else ""


def _fits(spec: Object, node: Object) -> bool:
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in spec.get("nodeSelector", {}).items()):
        return False
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(
        all(
            e["key"] in labels and (e["operator"] == "Exists" or labels[e["key"]] in e["values"])
            for e in term["matchExpressions"]
        )
        for term in required["nodeSelectorTerms"]
    )


def _tolerated(spec: Object, node: Object) -> bool:
    return all(_covers(spec, taint) for taint in node["spec"].get("taints", []))


def _covers(spec: Object, taint: Object) -> bool:
    if taint["effect"] == "PreferNoSchedule":
        return True
    return any(
        one.get("key") in (None, taint["key"])
        and one.get("effect") in (None, taint["effect"])
        and (one.get("operator", "Equal") == "Exists" or one.get("value") == taint.get("value"))
        for one in spec.get("tolerations", [])
    )


def _taint(taint: Object) -> str:
    return f"{taint['key']}={taint.get('value', '')}:{taint['effect']}"
