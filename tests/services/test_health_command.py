"""`trimtab health`, which container images ask whether their server is ready."""

import asyncio
import subprocess
import sys

import pytest

from tests.services.authority import LOOPBACK, Authority
from tests.services.client.conftest import Room
from tests.services.client.test_client_renewal import server
from tests.services.labeling.browser import run_server
from trimtab.runtime.probes import ProbeServer


def health(target: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab", "health", target, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_page_that_serves_is_healthy(tmp_path):
    with run_server(str(tmp_path / "labels.sqlite")) as address:
        there = address.removeprefix("http://")
        assert health(f"{there}/healthz").returncode == 0
        missing = health(f"{there}/no-such-page")
        assert missing.returncode == 1 and "HTTP" in missing.stderr


def test_a_server_that_loads_is_alive_and_not_ready():
    probes = ProbeServer("127.0.0.1:0", ["trimtab.v1.RewardService"], stalled_s=lambda: 0.0, liveness_s=None)
    try:
        target = f"127.0.0.1:{probes.port}"
        loading = health(target)
        assert loading.returncode == 1 and "NOT_SERVING" in loading.stderr
        assert health(target, "--service", "liveness").returncode == 0
    finally:
        probes.close()


@pytest.mark.parametrize("target", ["127.0.0.1:9", "127.0.0.1:9/healthz"])
def test_nobody_there_is_not_healthy_and_says_so_in_a_line(target):
    done = health(target)
    assert done.returncode == 1 and done.stderr.startswith(f"trimtab: {target}: ") and done.stderr.count("\n") == 1


async def test_a_port_that_wants_tls_is_told_in_words(tmp_path):
    cert, key = Authority.make(tmp_path).issue("server", LOOPBACK)
    async with server(Room(), tls_cert=cert, tls_key=key) as running:
        asked = await asyncio.to_thread(health, running.address)
    assert asked.returncode == 1 and "it may want TLS" in asked.stderr
