"""A control plane of one's own: etcd, kube-apiserver, and scheduler and controllers where the folder has them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from trimtab.deploy.render import kubectl

TOKEN = "tests-of-trimtab"
START_S = 180


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start_control_plane(assets: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start what `assets` holds; `folder` gets a kubeconfig, the data and a log of each process."""
    etcd, peers, secure = free_port(), free_port(), free_port()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "sa.key").write_bytes(pem)
    (folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "it", "cluster": {"server": f"https://127.0.0.1:{secure}", "insecure-skip-tls-verify": True}}
        ],
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
            "--unsafe-no-fsync",
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
    for number, command in enumerate(commands):
        if number == 2:  # what comes after the API server ends if it is not there yet
            wait_ready(folder / "kubeconfig")
        log = (folder / f"{Path(command[0]).name}.log").open("wb")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    wait_ready(folder / "kubeconfig")
    return processes


def wait_ready(kubeconfig: Path) -> None:
    """Return once the API server says it is ready; AssertionError after START_S."""
    deadline = time.monotonic() + START_S
    command = [kubectl(), "--kubeconfig", str(kubeconfig), "get", "--raw", "/readyz"]
    while subprocess.run(command, capture_output=True, timeout=60, check=False).stdout != b"ok":
        assert time.monotonic() < deadline, f"the API server is not ready; see {kubeconfig.parent}"
        time.sleep(0.5)
