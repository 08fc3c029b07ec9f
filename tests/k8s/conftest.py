"""A real Kubernetes API server: the one of KUBECONFIG, or a control plane started from KUBEBUILDER_ASSETS.

Without either every test here is skipped and says so; tests/unit/k8s holds the same rules without a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from trimtab.deploy.render import kubectl

REASON = "no cluster: set KUBECONFIG, or KUBEBUILDER_ASSETS to a folder with kube-apiserver and etcd"
TOKEN = "tests-of-trimtab"
START_S = 120


def pytest_collection_modifyitems(items):
    if not (os.environ.get("KUBECONFIG") or os.environ.get("KUBEBUILDER_ASSETS")):
        for item in items:
            if "tests/k8s" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory):
    """The path of a kubeconfig whose cluster answers."""
    given = os.environ.get("KUBECONFIG")
    if given:
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("control-plane")
    processes = start_control_plane(Path(os.environ["KUBEBUILDER_ASSETS"]), folder)
    try:
        wait_ready(folder / "kubeconfig")
        os.environ["KUBECONFIG"] = str(folder / "kubeconfig")
        yield folder / "kubeconfig"
    finally:
        os.environ.pop("KUBECONFIG", None)
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


@pytest.fixture
def run(kubeconfig):
    """run("get", "pods", stdin=…): kubectl's answer; an AssertionError with its words where it fails."""

    def call(*args, stdin=None, check=True):
        command = [kubectl(), "--kubeconfig", str(kubeconfig), *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start_control_plane(assets: Path, folder: Path) -> list[subprocess.Popen]:
    """etcd and kube-apiserver, and scheduler and controller manager where the folder has them."""
    etcd, peers, secure = free_port(), free_port(), free_port()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "sa.key").write_bytes(pem)
    (folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    server = f"https://127.0.0.1:{secure}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "admin"}}],
        "current-context": "it",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    commands = [
        [
            shutil.which("etcd", path=str(assets)) or "etcd",
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
        ],
        [
            str(assets / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            f"--secure-port={secure}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={folder / 'certificates'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={folder / 'sa.key'}",
            f"--service-account-key-file={folder / 'sa.key'}",
            "--service-cluster-ip-range=10.96.0.0/16",
        ],
    ]
    own = f"--kubeconfig={folder / 'kubeconfig'}"
    if (assets / "kube-scheduler").exists():
        commands.append([str(assets / "kube-scheduler"), own, "--leader-elect=false", "--secure-port=0"])
    if (assets / "kube-controller-manager").exists():
        private = f"--service-account-private-key-file={folder / 'sa.key'}"
        manager = str(assets / "kube-controller-manager")
        commands.append([manager, own, "--leader-elect=false", "--secure-port=0", private])
    processes = []
    for command in commands:
        log = (folder / f"{Path(command[0]).name}.log").open("wb")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    return processes


def wait_ready(kubeconfig: Path) -> None:
    deadline = time.monotonic() + START_S
    command = [kubectl(), "--kubeconfig", str(kubeconfig), "get", "--raw", "/readyz"]
    while subprocess.run(command, capture_output=True, timeout=60, check=False).stdout != b"ok":
        assert time.monotonic() < deadline, f"the API server is not ready; see {kubeconfig.parent}"
        time.sleep(0.5)


def node(name: str, labels: dict[str, str], taints: list[dict[str, str]], capacity: dict[str, str]) -> str:
    """A node without a kubelet, as YAML takes it."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": taints},
            "status": {"allocatable": capacity, "capacity": capacity},
        }
    )
