"""A real Kubernetes API server: the one of KUBECONFIG, or a control plane started from KUBEBUILDER_ASSETS.

Without either every test here is skipped and says so; tests/unit/k8s holds the same rules without a cluster.
TRIMTAB_CRDS is a folder with the kinds of the components' operators (JobSet, cert-manager, Gateway API, Kueue,
Prometheus), to be installed first; a cluster that has them needs none.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from tests.k8s.control_plane import start_control_plane
from tests.unit.k8s.manifests import EVERYTHING
from trimtab.deploy.objects import Kubectl
from trimtab.deploy.render import kubectl

REASON = "no cluster: set KUBECONFIG, or KUBEBUILDER_ASSETS to a folder with kube-apiserver and etcd"
DISKS = 6


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/k8s" in str(item.path):
            item.add_marker(pytest.mark.timeout(900))
            if not (os.environ.get("KUBECONFIG") or os.environ.get("KUBEBUILDER_ASSETS")):
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory) -> Iterator[str]:
    """The path of a kubeconfig whose cluster answers."""
    given = os.environ.get("KUBECONFIG")
    if given:
        yield given
        return
    folder = tmp_path_factory.mktemp("control-plane")
    processes = start_control_plane(Path(os.environ["KUBEBUILDER_ASSETS"]), folder)
    os.environ["KUBECONFIG"] = str(folder / "kubeconfig")
    try:
        yield str(folder / "kubeconfig")
    finally:
        os.environ.pop("KUBECONFIG", None)
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run(kubeconfig) -> Run:
    """run("get", "pods", stdin=…): kubectl's answer; an AssertionError with its words where it fails."""

    def call(*args: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [kubectl(), "--kubeconfig", kubeconfig, *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def kinds(run) -> set[str]:
    """ "KIND.GROUP" of what the cluster serves, with those of TRIMTAB_CRDS."""
    folder = os.environ.get("TRIMTAB_CRDS")
    if folder:
        run("apply", "--server-side", "--force-conflicts", "-f", folder)
        run("wait", "--for=condition=Established", "--timeout=120s", "crd", "--all")
    return Kubectl().kinds()


@pytest.fixture(scope="session")
def core(kubeconfig) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(kubeconfig))


@pytest.fixture
def namespace(run, kinds, kubeconfig) -> Iterator[str]:
    """No namespace trimtab, for one test at a time; whatever the test makes of it is deleted."""
    name = f"trimtab-tests-of-{Path(kubeconfig).resolve().as_posix().replace('/', '_')}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clear(run)
        yield "trimtab"
        clear(run)


def clear(run: Run) -> None:
    """Delete the namespace; pods of nodes that are gone are not waited for."""
    run("-n", "trimtab", "delete", "pods", "--all", "--force", "--grace-period=0", check=False)
    run("delete", "namespace", "trimtab", "--ignore-not-found", "--wait=true", "--timeout=200s")


@pytest.fixture
def controllers(run, namespace) -> None:
    """Skips where no controller manager and no scheduler work: only an API server was given."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        lacks = [name for name in ("kube-scheduler", "kube-controller-manager") if not (Path(assets) / name).exists()]
        if lacks:
            pytest.skip(f"KUBEBUILDER_ASSETS has no {' and no '.join(lacks)}")


@pytest.fixture
def disks(run, controllers) -> Iterator[None]:
    """Volumes for the claims of the manifests, which ask for no class of their own."""
    names = [f"trimtab-tests-{uuid.uuid4().hex[:8]}-{number}" for number in range(DISKS)]
    for name in names:
        spec: dict[str, Any] = {"capacity": {"storage": "4Ti"}, "hostPath": {"path": f"/var/lib/{name}"}}
        spec |= {"accessModes": ["ReadWriteOnce", "ReadWriteMany"], "persistentVolumeReclaimPolicy": "Retain"}
        body = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}
        run("create", "-f", "-", stdin=json.dumps(body))
    yield
    for name in names:
        run("delete", "persistentvolume", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def everything(kinds) -> tuple[str, ...]:
    """All components; skips where the cluster lacks kinds of theirs."""
    wanted = {
        "JobSet.jobset.x-k8s.io",
        "Certificate.cert-manager.io",
        "HTTPRoute.gateway.networking.k8s.io",
        "GRPCRoute.gateway.networking.k8s.io",
        "BackendTLSPolicy.gateway.networking.k8s.io",
        "ClusterQueue.kueue.x-k8s.io",
        "PodMonitor.monitoring.coreos.com",
        "PrometheusRule.monitoring.coreos.com",
    }
    if wanted - kinds:
        pytest.skip(f"the cluster has no {', '.join(sorted(wanted - kinds))}: TRIMTAB_CRDS names a folder with them")
    return EVERYTHING
