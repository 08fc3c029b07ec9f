"""Every installation that the tests look at, rendered once: each overlay with each node pool, bare and with all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trimtab.deploy.render import NODE_POOLS, Installation, Object, pod_template, render

MANIFESTS = Path(__file__).parents[3] / "k8s"
EVERYTHING = ("jobset", "vllm", "postgres", "tls", "ingress", "autoscaling", "kueue", "monitoring")
REFERENCE = re.compile(r"\$\((\w+)\)")
OURS = ("trimtab/generator", "trimtab/generator-vllm", "trimtab/model-server", "trimtab/trainer", "trimtab/web")


def installations() -> list[Installation]:
    """dev and gpu with no and with each node pool; gpu also with all components."""
    pools = ("", *NODE_POOLS)
    bare = [Installation(overlay, pool) for overlay in ("dev", "gpu") for pool in pools]
    present = tuple(name for name in EVERYTHING if (MANIFESTS / "components" / name).is_dir())
    return bare + [Installation("gpu", pool, present) for pool in pools]


def label(installation: Installation) -> str:
    parts = (installation.overlay, installation.node_pool, "everything" if installation.components else "")
    return "-".join(part for part in parts if part)


@cache
def rendered(installation: Installation) -> tuple[Object, ...]:
    return tuple(render(installation, MANIFESTS))


@dataclass(frozen=True)
class Pod:
    """A pod that some workload would make. `owner` is "Deployment/reward"."""

    owner: str
    kind: str
    name: str
    namespace: str
    replicas: int
    labels: dict[str, str]
    spec: Object
    workload: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(objects: tuple[Object, ...]) -> list[Pod]:
    found = []
    for one in objects:
        template = pod_template(one)
        if template is None:
            continue
        spec = one["spec"]
        if one["kind"] == "JobSet":
            replicas = spec["replicatedJobs"][0]["template"]["spec"]["completions"]
        else:
            replicas = 1 if one["kind"] == "CronJob" else spec.get("replicas", 2)
        meta = one["metadata"]
        found.append(
            Pod(
                owner=f"{one['kind']}/{meta['name']}",
                kind=one["kind"],
                name=meta["name"],
                namespace=meta["namespace"],
                replicas=replicas,
                labels=template["metadata"]["labels"],
                spec=template["spec"],
                workload=one,
            )
        )
    return found


def environment(container: Object, objects: Sequence[Object]) -> dict[str, str]:
    """A container's variables as it sees them, from ConfigMaps and with $(NAME) of those before; "x" from its pod."""
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap" and "data" in one}
    found: dict[str, str] = {}
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("configMapKeyRef")
        if reference:
            found[variable["name"]] = maps[reference["name"]][reference["key"]]
        else:
            found[variable["name"]] = REFERENCE.sub(lambda match: found[match[1]], variable.get("value", "x"))
    return found


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """A Kubernetes label selector (matchLabels and matchExpressions); an empty one matches all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_expression(one, labels) for one in selector.get("matchExpressions", []))


def _expression(one: Object, labels: dict[str, str]) -> bool:
    value = labels.get(one["key"])
    match one["operator"]:
        case "In":
            return value in one["values"]
        case "NotIn":
            return value not in one["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise ValueError(f"operator {one['operator']}")
